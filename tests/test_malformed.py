"""Whatever stands in a job file, the command line answers in a line or two and ends with exit code 2."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from batcher import cli
from tests import malformed, stories

Plan = Callable[[bytes], None]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Plan:
    """`batcher plan` on a job file of these bytes, and what must hold of how it ends."""
    malformed.lay_out(tmp_path)
    path = tmp_path / "job.toml"
    for name in ("STORY_KEY", "CEREBRAS_API_KEY", "OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.setenv(name, stories.KEY)

    monkeypatch.setenv("MY_HEADERS", "X-Team: tea")

    def called(job: bytes) -> None:
        path.write_bytes(job)
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(path)])
        out, err = capfd.readouterr()
        assert ended.value.code in (0, 2)
        assert not err or "job.toml" in err or "input" in err or any(name in err for name in malformed.NAMES)
        assert (ended.value.code == 2) == bool(err)
        lines = err.splitlines()
        assert len(lines) <= 2
        assert all(line.isprintable() and len(line) < 1500 for line in lines)
        for secret in (malformed.SECRET, stories.KEY):
            assert secret not in err
        assert stories.KEY not in out
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()

    return called


SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@given(job=malformed.job_files())
@settings(max_examples=500, deadline=None, suppress_health_check=SUPPRESSED)
def test_no_job_file_brings_the_command_line_down(plan: Plan, job: bytes) -> None:
    """500 malformed job files, half of them distinct: exit code 2 or none, a line or two that name the place.

    No traceback, no control bytes, no secret.
    """
    plan(job)


@pytest.mark.soak
@given(job=malformed.job_files())
@settings(max_examples=5_000, deadline=None, suppress_health_check=SUPPRESSED)
def test_no_job_file_of_thousands_does(plan: Plan, job: bytes) -> None:
    """The same for 5,000."""
    plan(job)


@pytest.mark.parametrize("base", malformed.BASES)
def test_what_is_broken_was_whole(plan: Plan, base: bytes) -> None:
    """The files that are broken here are read to their end when they are not: nothing else is wrong with them."""
    plan(base)
