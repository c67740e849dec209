"""Malformed inputs: whatever lies in a file, reading it ends in rows, in rows that failed, or in one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests import stories
from tests.malformed_inputs import Case, cases, save


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
    """250 malformed files of every format: no traceback, no crash, every bad row with its place."""
    said = read_all(tmp_path, drawn(250))
    assert any("refused" in line for line in said)
    assert any("rows, " in line and " 0 of them bad" not in line for line in said)


@pytest.mark.soak
def test_thousands_of_malformed_inputs(tmp_path: Path) -> None:
    """The same for thousands."""
    read_all(tmp_path, drawn(10_000))


def test_the_command_line_takes_malformed_inputs_calmly(tmp_path: Path) -> None:
    """Through the whole program: done, done with failures, or refused in a line or two; never a traceback."""
    with stories.service() as service:
        for number, case in enumerate(drawn(8)):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / case.name).write_bytes(case.data)
            more: dict[str, dict[str, object]] = {
                "input": {"path": case.name, "id": None, "format": case.format},
                "request": {"prompt": "Say something."},
                "output": {"keep": "all"},
            }
            run = stories.run(stories.write_job(folder, service.url, more=more), "--quiet")
            assert run.returncode in (0, 2, 3), run.stderr
            assert "Traceback" not in run.stderr
            assert len(run.stderr.splitlines()) <= 3, run.stderr
            if run.returncode == 2:
                assert "batcher: " in run.stderr
