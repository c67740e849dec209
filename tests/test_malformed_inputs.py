"""Malformed inputs: whatever lies in a file, reading it ends in rows, in rows that failed, or in one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from batcher import cli
from batcher.ledger import done_rows, open_read_only
from batcher.records import UNIT
from tests import stories
from tests.malformed_inputs import SOUND, Case, cases, save


def drawn(number: int) -> list[Case]:
    """So many malformed files."""
    found: list[Case] = []

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def read_all(folder: Path, found: list[Case]) -> list[str]:
    """What reading each came to; a crash of the process that reads is an error that names the file."""
    for number, case in enumerate(found):
        save(folder, number, case)
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.malformed_inputs", str(folder)],
        capture_output=True,
        text=True,
        timeout=60 + len(found),
        check=False,
    )
    said = run.stdout.splitlines()
    assert run.returncode == 0, f"{folder}: {said[-1:]}\n{run.stderr[-3000:]}"
    assert len(said) == len(found)
    return said


def test_a_malformed_input_is_rows_or_one_line(tmp_path: Path) -> None:
    """500 malformed files, some 400 of them distinct, of every format: no traceback, no crash, bad rows with places."""
    found = drawn(500)
    assert len(set(found)) > 250
    assert {case.name for case in found} >= SOUND.keys()
    said = read_all(tmp_path, found)
    assert any("refused" in line for line in said)
    assert any("rows, " in line and " 0 of them bad" not in line for line in said)


@pytest.mark.soak
def test_thousands_of_malformed_inputs(tmp_path: Path) -> None:
    """The same for thousands."""
    read_all(tmp_path, drawn(10_000))


def kept(output: Path) -> int:
    """How many rows an output has answers to, published or in its ledger."""
    if not output.exists():
        return 0
    rows = set(stories.column(output, "responses", "row"))
    with open_read_only(output / "ledger.sqlite") as ledger:
        return len(rows.union(done_rows(ledger, UNIT, 0, 1_000)))


def test_the_command_line_takes_malformed_inputs_calmly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the whole program: done; done, each failed row with its place; or refused in a line or two."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    ends = set()
    with stories.service(latency=0.001) as service:
        for number, case in enumerate(drawn(40)):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / case.name).write_bytes(case.data)
            whole = case.format == "openai-batch"
            more: dict[str, dict[str, object]] = {
                "input": {"path": case.name, "id": None, "format": case.format},
                "request": {"prompt": "Say something."},
                "output": {"keep": [] if whole else "all"},
            }
            if whole:
                more["request"] = dict.fromkeys(("model", "prompt", "max_completion_tokens"))
            path = stories.write_job(folder, service.url, more=more)
            before = len(service.book)
            with pytest.raises(SystemExit) as ended:
                cli.main(["run", str(path), "--quiet"])
            _, said = capfd.readouterr()
            ends.add(ended.value.code)
            assert ended.value.code in (0, 2, 3, 4), said
            if ended.value.code in (2, 4):
                assert said.startswith("batcher: ")
                assert 1 <= len(said.splitlines()) <= 2, said
            else:
                assert said == ""
            if ended.value.code == 2:
                assert case.name in said or "job.toml" in said, said
                # What had been asked before the file broke is kept; where nothing could be read nothing was asked.
                assert kept(folder / "out") == len(service.book) - before
            if ended.value.code == 3:
                for message in stories.column(folder / "out", "failures", "message"):
                    assert case.name in str(message) or whole
    assert {0, 2} < ends
