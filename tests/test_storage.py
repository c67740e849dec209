"""Disks that are full, read-only or networked, and two runners at once: the promised end, and nothing lost."""

import base64
import json
import random
import subprocess
from collections import Counter
from pathlib import Path

from batcher.simulator import Simulator
from tests import disks, stories

OUT = {"path": "disk/out"}


def told(ended: subprocess.CompletedProcess[str], code: int = 6) -> str:
    """What a run that did not end well has said: a line or two, and no traceback."""
    assert ended.returncode == code, ended
    lines = ended.stderr.splitlines()
    assert 1 <= len(lines) <= 2, ended.stderr
    assert lines[0].startswith("batcher: ")
    assert "Traceback" not in ended.stdout
    assert stories.KEY not in ended.stderr
    return ended.stderr


def check_whole(disk: disks.Disk, service: Simulator, rows: int, output: Path) -> None:
    """Every row is there, was answered once, and was never asked again after that; `verify` finds nothing."""
    stories.check_complete(disk.seen / output.relative_to(disk.path), rows, service)
    assert Counter(stories.row_of(entry) for entry in service.book if stories.good(entry)) == Counter(range(rows))
    checked = disk.program("verify", str(output))
    assert checked.returncode == 0, checked
    assert f"{rows:,} rows answered, 0 failed, 0 pending; no problem found" in checked.stdout


def test_the_disk_fills_while_answers_are_recorded(tmp_path: Path) -> None:
    """The run stops sending and says so; what had been answered by then, in flight or not, is never asked again."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 600)
    with stories.service() as service, disks.tmpfs(tmp_path / "disk", "size=40m") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": OUT})
        process = disk.begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 100, process)
        disk.fill()
        ended = disks.ended(process)
        assert "no space left on the device; free some and run the same command again" in told(ended)
        assert len(service.book) < 600
        assert json.loads((disk.seen / "out" / "summary.json").read_text())["totals"]["answered"] == len(service.book)
        disk.clear()
        assert disk.program("run", str(job), "--quiet").returncode == 0
        check_whole(disk, service, 600, disk.path / "out")


def test_a_disk_that_stays_full_keeps_what_was_recorded(tmp_path: Path) -> None:
    """Somebody takes the reserve too: what the ledger had is kept, and the requests in flight alone are repeated."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 300)
    with stories.service() as service, disks.tmpfs(tmp_path / "disk", "size=40m") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": OUT})
        process = disk.begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 100, process)
        disk.fill()
        disks.until(lambda: not (disk.seen / "out" / "ledger.sqlite.reserve").exists(), process)
        disk.fill(0)
        told(disks.ended(process))
        disk.clear()
        assert disk.program("run", str(job), "--quiet").returncode == 0
        stories.check_complete(disk.seen / "out", 300, service)
        assert len(service.book) <= 300 + 2 * 16
        assert disk.program("verify", str(disk.path / "out")).returncode == 0


def test_a_part_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    """The answers stay in the ledger, no half part is seen, and with space nothing is asked again."""
    drawn = random.Random(1)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for row in range(300):
            large = base64.b64encode(drawn.randbytes(36_000)).decode()
            file.write(json.dumps({"key": f"k{row}", "text": stories.prompt(row), "large": large}) + "\n")
    with stories.service() as service, disks.tmpfs(tmp_path / "disk", "size=24m") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": {**OUT, "keep": ["text", "large"]}})
        said = told(disk.program("run", str(job), "--quiet"))
        assert "part 0 cannot be written: No space left on device; free some space and run the same command" in said
        assert list((disk.seen / "out" / "responses").iterdir()) == []
        assert not (disk.seen / "out" / ".publishing").exists()
        assert len(service.book) == 300
        disk.remount("size=64m")
        assert disk.program("run", str(job), "--quiet").returncode == 0
        check_whole(disk, service, 300, disk.path / "out")


def test_a_disk_without_the_reserve_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    """Less than 16 MiB free: exit code 6 at once, and the same command runs when they are."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 20)
    with stories.service() as service, disks.tmpfs(tmp_path / "disk", "size=15m") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": OUT})
        assert "16 MiB must be free\nfree some space" in told(disk.program("run", str(job), "--quiet"))
        assert service.book == []
        disk.remount("size=24m")
        assert disk.program("run", str(job), "--quiet").returncode == 0
        check_whole(disk, service, 20, disk.path / "out")


def test_wherever_the_disk_has_no_more_files(tmp_path: Path) -> None:
    """Grown by a file at a time, a disk refuses each file that a run makes in turn, down to the summary."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 20)
    with stories.service(poison={"[row 00003]": 400}) as service, disks.tmpfs(tmp_path / "disk", "nr_inodes=2") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": OUT})
        said = []
        for files in (2, 5, *range(10, 40)):
            disk.remount(f"nr_inodes={files}")
            ended = disk.program("run", str(job), "--quiet")
            if ended.returncode != 6:
                break
            said.append(told(ended))
        assert ended.returncode == 3
        assert all("o space left on device" in each or "no space left on the device" in each for each in said)
        assert any("part 0" in each for each in said)
        assert "summary.json" in said[-1]
        stories.check_complete(disk.seen / "out", 20, service)
