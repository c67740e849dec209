"""Disks that are full, read-only or networked, and two runners at once: the promised end, and nothing lost."""

import base64
import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batcher.simulator import Simulator
from batcher.verify import verify
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
    seen = disk.seen / output.relative_to(disk.path) if output.is_relative_to(disk.path) else output
    stories.check_complete(seen, rows, service)
    assert Counter(stories.row_of(entry) for entry in service.book if stories.good(entry)) == Counter(range(rows))
    checked = disk.program("verify", str(output))
    assert f"{rows:,} rows answered, 0 failed, 0 pending; no problem found" in checked.stdout, checked


def test_the_disk_fills_while_answers_are_recorded(tmp_path: Path) -> None:
    """The run stops sending and says so; what had been answered by then, in flight or not, is never asked again."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 600)
    with stories.service(latency=0.05) as service, disks.tmpfs(tmp_path / "disk", "size=40m") as disk:
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
    stories.write_jsonl(tmp_path / "rows.jsonl", 600)
    with stories.service(latency=0.05) as service, disks.tmpfs(tmp_path / "disk", "size=40m") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": OUT})
        process = disk.begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 100, process)
        disk.fill()
        disks.until(lambda: not (disk.seen / "out" / "ledger.sqlite.reserve").exists(), process)
        disk.fill(0)
        told(disks.ended(process))
        disk.clear()
        assert disk.program("run", str(job), "--quiet").returncode == 0
        stories.check_complete(disk.seen / "out", 600, service)
        assert len(service.book) <= 600 + 2 * 16
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
        for files in (2, *range(12, 40)):
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


def test_a_ledger_on_another_disk_may_fill_it(tmp_path: Path) -> None:
    """The parts have room, the ledger has not: the same end, the same going on."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 600)
    with stories.service(latency=0.05) as service, disks.tmpfs(tmp_path / "disk", "size=40m") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": {"path": "out", "ledger": "disk/it.sqlite"}})
        process = disk.begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 100, process)
        disk.fill()
        assert f"{disk.path}: no space left on the device" in told(disks.ended(process))
        assert len(service.book) < 600
        disk.clear()
        assert disk.program("run", str(job), "--quiet").returncode == 0
        check_whole(disk, service, 600, tmp_path / "out")


def test_a_read_only_disk_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    """Also to root: exit code 6 with the place, whether the output is new or half done; looking at it works."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 100)
    with stories.service() as service, disks.tmpfs(tmp_path / "disk", "ro") as disk:
        job = stories.write_job(tmp_path, service.url, more={"output": OUT})
        said = told(disk.program("run", str(job), "--quiet"))
        assert f"{disk.path}/out cannot be written: Read-only file system; let it be written, or name another" in said
        disk.remount("rw")
        process = disk.begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 30, process)
        process.terminate()
        assert disks.ended(process).returncode == 143
        before = len(service.book)
        disk.remount("ro")
        told(disk.program("run", str(job), "--quiet"))
        assert disk.program("verify", str(disk.path / "out")).returncode == 0
        said = told(disk.program("export", str(disk.path / "out"), "--to", "csv"))
        assert "cannot be written: Read-only file system" in said
        assert len(service.book) == before
        disk.remount("rw")
        assert disk.program("run", str(job), "--quiet").returncode == 0
        check_whole(disk, service, 100, disk.path / "out")


def test_a_read_only_input_is_no_trouble(tmp_path: Path) -> None:
    """Job file and input may lie where nothing can be written."""
    with stories.service() as service, disks.tmpfs(tmp_path / "disk", "size=1m") as disk:
        stories.write_jsonl(disk.seen / "rows.jsonl", 20)
        made = stories.write_job(disk.seen, service.url, more={"output": {"path": "../out"}})
        disk.remount("ro")
        assert disk.program("run", str(disk.path / made.name), "--quiet").returncode == 0
        stories.check_complete(tmp_path / "out", 20, service)


def test_a_ledger_on_a_network_file_system_is_refused(tmp_path: Path) -> None:
    """Before anything is written or sent, with what to do; with the ledger elsewhere the output may lie there."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60)
    with stories.service() as service, disks.network(tmp_path / "disk", tmp_path / "there") as disk:
        job = stories.write_job(tmp_path, service.url, rows_per_part=20, more={"output": OUT})
        said = told(disk.program("run", str(job), "--quiet"))
        assert "lies on a network file system (fuse.sshfs), where the ledger is not safe;\nname a local file" in said
        assert service.book == []
        assert list((tmp_path / "there").rglob("*.sqlite*")) == []
        ledger = f"output.ledger={tmp_path / 'it.sqlite'}"
        process = disk.begin("run", str(job), "--quiet", "--set", ledger)
        disks.until(lambda: len(service.book) >= 30, process)
        process.kill()
        process.wait()
        assert disk.program("run", str(job), "--quiet", "--set", ledger).returncode == 0
        stories.check_complete(disk.seen / "out", 60, service)
        stories.check_complete(tmp_path / "there" / "out", 60, service)
        assert disk.program("verify", str(disk.path / "out")).returncode == 0


# Two at once


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when anything in a folder is written."""
    found = ((path.relative_to(folder), path.stat()) for path in (folder, *folder.rglob("*")))
    return {str(path): (seen.st_ino, seen.st_size, seen.st_mtime_ns) for path, seen in found}


Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """The program, started; it does not outlive the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        begun.append(disks.begin(stories.command(*words)))
        return begun[-1]

    yield start
    disks.stop(begun)


def test_of_two_runs_at_the_same_moment_one_goes_on(tmp_path: Path, begin: Begin) -> None:
    """Started together on one output, one ends with 0 and the other at once with 5; each row is asked once."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 300)
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, in_flight=4)
        both = [disks.ended(process) for process in [begin("run", str(job), "--quiet") for _ in range(2)]]
        winner, loser = sorted(both, key=lambda run: run.returncode)
        assert winner.returncode == 0, winner
        assert "is in use by another run; wait for it, or stop it first" in told(loser, 5)
        assert loser.stdout == ""
        assert len(service.book) == 300
        stories.check_complete(tmp_path / "out", 300, service)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["inside", "elsewhere"])
def test_who_comes_second_writes_nothing_and_sends_nothing(tmp_path: Path, begin: Begin, elsewhere: bool) -> None:
    """While a run stands still, others are refused and nothing in its folder changes; looking at it is welcome."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 300)
    place: dict[str, object] = {"ledger": "state/it.sqlite"} if elsewhere else {}
    with stories.service() as service:
        more: dict[str, dict[str, object]] = {"output": place, "service": {"timeout": "1m"}}
        job = stories.write_job(tmp_path, service.url, in_flight=4, more=more)
        first = begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 40, first)
        first.send_signal(signal.SIGSTOP)
        disks.until(lambda: service.in_flight == 0, first)
        output, sent, before = str(tmp_path / "out"), len(service.book), state(tmp_path)
        assert "is in use by another run" in told(stories.run(job, "--quiet"), 5)
        if not elsewhere:
            assert "is in use by another run" in told(stories.program("verify", output), 5)
            assert stories.program("status", output).stdout.startswith(f"{output}: running")
        else:
            other = stories.run(job, "--quiet", "--set", "output.path=other")
            assert "it.sqlite" in told(other, 5)
        assert (len(service.book), state(tmp_path)) == (sent, before)
        first.send_signal(signal.SIGCONT)
        assert disks.ended(first).returncode == 0
        assert len(service.book) == 300
        stories.check_complete(tmp_path / "out", 300, service)


def test_nobody_runs_into_a_retry(tmp_path: Path, begin: Begin) -> None:
    """A run, a second retry and a recount during a retry are refused with 5; the retry ends as if alone."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60)
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, in_flight=2, more={"service": {"timeout": "1m"}})
        assert stories.run(job, "--quiet").returncode == 0
        output = str(tmp_path / "out")
        first = begin("retry", output, "--where", "true", "--quiet")
        disks.until(lambda: len(service.book) >= 70, first)
        first.send_signal(signal.SIGSTOP)
        disks.until(lambda: service.in_flight == 0, first)
        sent, before = len(service.book), state(tmp_path)
        for words in (("run", str(job), "--quiet"), ("retry", output, "--abandon")):
            assert "is in use by another run" in told(stories.program(*words), 5)
        assert (len(service.book), state(tmp_path)) == (sent, before)
        first.send_signal(signal.SIGCONT)
        assert disks.ended(first).returncode == 0
        assert len(service.book) == 120
        stories.check_complete(tmp_path / "out", 60, service)
        assert verify(tmp_path / "out").problems == []


def test_an_export_during_a_run_takes_what_is_published(tmp_path: Path, begin: Begin) -> None:
    """It neither waits nor disturbs, and says that rows are pending."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 100)
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, in_flight=4, rows_per_part=20)
        run = begin("run", str(job), "--quiet")
        disks.until(lambda: (tmp_path / "out" / "responses" / "part-000001.parquet").exists(), run)
        made = stories.program("export", str(tmp_path / "out"), "--to", "jsonl")
        assert made.returncode == 0, made
        rows = [json.loads(line)["row"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert rows == list(range(len(rows)))
        assert len(rows) >= 40
        assert disks.ended(run).returncode == 0
        stories.check_complete(tmp_path / "out", 100, service)


# What surrounds a run


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_few_open_files_fail_no_row(tmp_path: Path, hard: bool) -> None:
    """`ulimit -n 64`: a soft limit is raised as far as it may be, with a hard one the window stays small."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60 if hard else 400)
    with stories.service(latency=0.01) as service:
        job = stories.write_job(tmp_path, service.url, in_flight="auto", rows_per_part=20 if hard else 500)
        limit = 'ulimit "$0" 64 && exec "$@"'
        ended = subprocess.run(
            ["sh", "-c", limit, "-n" if hard else "-Sn", *stories.command("run", str(job), "--quiet")],
            env=stories.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        rows = 60 if hard else 400
        assert len(service.book) == rows
        stories.check_complete(tmp_path / "out", rows, service)


def test_nobody_has_to_read_what_a_run_says(tmp_path: Path, begin: Begin) -> None:
    """Standard output and standard error closed early (`| head -1`) stop nothing."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 200)
    with stories.service() as service:
        process = begin("run", str(stories.write_job(tmp_path, service.url, in_flight=4)))
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=60) == 0
        stories.check_complete(tmp_path / "out", 200, service)


def test_a_run_that_stood_still_goes_on(tmp_path: Path, begin: Begin) -> None:
    """Stopped for longer than its timeout and continued, it fails no row and repeats at most what was in flight."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 200)
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, in_flight=8, more={"service": {"timeout": "1s"}})
        process = begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 40, process)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)  # the passing of its timeout is what is tried here
        process.send_signal(signal.SIGCONT)
        ended = disks.ended(process)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert len(service.book) <= 200 + 8
        stories.check_complete(tmp_path / "out", 200, service)


def test_a_closed_terminal_is_an_interruption(tmp_path: Path, begin: Begin) -> None:
    """SIGHUP drains: exit code 129, nothing in flight is lost, and the same command ends it."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 200)
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, in_flight=8)
        process = begin("run", str(job), "--quiet")
        disks.until(lambda: len(service.book) >= 40, process)
        process.send_signal(signal.SIGHUP)
        assert told(disks.ended(process), 129) == "batcher: interrupted; the same command goes on from here\n"
        assert stories.run(job, "--quiet").returncode == 0
        assert len(service.book) == 200
        stories.check_complete(tmp_path / "out", 200, service)
