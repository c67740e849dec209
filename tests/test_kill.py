"""Killed at any moment, a run loses no answer that had arrived, and the same command ends it."""

from pathlib import Path

import pytest

from batcher.ledger import open_read_only
from tests import stories

PART = 200
STATED = {"requests_per_minute": 600_000}
"""A service that says what it allows: where nobody does, a fault that looks like a limit makes a run slow."""
STEPS = ("written", "synced", "renamed", "placed")
POINTS = [
    *("commit.before", "commit.inside", "commit.after", "published.before", "complete.before"),
    *(f"{name}.{step}" for name in ("responses", "failures", "attempts") for step in STEPS),
]


def kills(
    folder: Path, seed: int, rows: int, times: int, per_life: int, part: int = PART, library: str | None = None
) -> stories.Kills:
    """A run over `rows` rows with a tenth of the answers faulty, killed `times` times, then left to end."""
    stories.write_jsonl(folder / "rows.jsonl", rows)
    faults = {**stories.FAULTS, "surrogate": 0.01}
    with stories.service(**STATED, latency=0.03, faults=faults, poison={"[row 00013]": 400}, seed=seed) as service:
        more = {"service": {"transport": library}}
        job = stories.write_job(folder, service.url, in_flight=16, rows_per_part=part, more=more)
        story = stories.Kills(folder, service, job, in_flight=16, seed=seed)
        for _ in range(times):
            if not story.kill_once(story.random.randrange(per_life), within=0.1):
                break
        ended = stories.run(job)
        assert ended.returncode in (0, 3), ended.stderr
        assert stories.KEY not in ended.stdout + ended.stderr
        stories.check_complete(folder / "out", rows, service)
        story.check_repeats()
    return story


@pytest.mark.parametrize(("library", "times"), [("reqwest", 8), ("aiohttp", 2)])
def test_a_run_survives_kills_at_random_moments(tmp_path: Path, library: str, times: int) -> None:
    """Killed again and again: no row is missing, none stands twice, none is asked again whose answer had arrived."""
    story = kills(tmp_path, seed=1, rows=75 * times, times=times, per_life=120, library=library)
    assert len(story.at) >= times // 2


@pytest.mark.parametrize("point", POINTS)
def test_a_run_survives_a_kill_at_each_named_point(tmp_path: Path, point: str) -> None:
    """Killed before, inside and after each step of recording and publishing, the same promises hold."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 90)
    with stories.service(
        latency=0.005, faults={"500": 0.05}, poison={"[row 00003]": 400, "[row 00040]": 400}
    ) as service:
        job = stories.write_job(tmp_path, service.url, in_flight=16, rows_per_part=30)
        story = stories.Kills(tmp_path, service, job, in_flight=16, seed=0)
        visit = 3 if point.startswith("commit") else 1
        drained = point == "published.before"  # a part that is still open is published when the run drains
        requests = 50 if drained else 1_000_000
        armed = story.kill_once(requests, within=60, drained=drained, BATCHER_KILLPOINT=f"{point}:{visit}")
        assert armed, "the point was never reached"
        ended = stories.run(job)
        assert ended.returncode == 3, ended.stderr
        stories.check_complete(tmp_path / "out", 90, service)
        story.check_repeats()


@pytest.mark.parametrize("point", ["responses.renamed", "attempts.placed", "complete.before"])
def test_a_part_that_is_opened_again_survives_a_kill(tmp_path: Path, point: str) -> None:
    """A pilot, then all rows, killed where the part's newer self is in place and not yet noted: the run goes on."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 30)
    with stories.service(latency=0.005) as service:
        job = stories.write_job(tmp_path, service.url, in_flight=16, rows_per_part=30)
        assert stories.run(job, "--limit", "10").returncode == 0
        story = stories.Kills(tmp_path, service, job, in_flight=16, seed=0)
        assert story.kill_once(1_000_000, within=0, BATCHER_KILLPOINT=f"{point}:1"), "the point was never reached"
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
        stories.check_complete(tmp_path / "out", 30, service)
        story.check_repeats()


def test_what_a_killed_run_recorded_is_published_by_a_run_that_ends_before_it_gets_there(tmp_path: Path) -> None:
    """A pilot over all parts, killed; then all rows with a key that is refused: every recorded answer is published."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 1500)
    with stories.service(key=stories.KEY) as service:
        job = stories.write_job(tmp_path, service.url, in_flight=4)
        words = ("run", str(job), "--set", "input.sample=60")
        story = stories.Kills(tmp_path, service, job, in_flight=4, seed=0, words=words)
        assert story.kill_once(40, within=0)
        with open_read_only(tmp_path / "out" / "ledger.sqlite") as ledger:
            recorded = {row for (row,) in ledger.execute("SELECT row FROM attempts")}
        assert max(recorded) >= 500, "only the first part has anything of the pilot"
        before = {*stories.column(tmp_path / "out", "responses", "row")} | recorded
        ended = stories.run(job, STORY_KEY="sk-revoked-and-gone")
        assert ended.returncode == 4, ended.stderr
        assert {*stories.column(tmp_path / "out", "responses", "row")} == before
        checked = stories.program("verify", str(tmp_path / "out"))
        assert checked.returncode == 0, checked.stdout
        assert stories.run(job).returncode == 0
        stories.check_complete(tmp_path / "out", 1500, service)
        story.check_repeats()


def test_a_part_of_nothing_but_attempts_that_was_not_noted_is_no_stranger(tmp_path: Path) -> None:
    """Killed between placing and noting it while nothing was answered; the next run, too, ends there."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 30)
    with stories.service(faults={"500": 1.0}) as service:
        job = stories.write_job(tmp_path, service.url, in_flight=4)
        story = stories.Kills(tmp_path, service, job, in_flight=4, seed=0)
        assert story.kill_once(8, within=60, drained=True, BATCHER_KILLPOINT="responses.renamed:1")
    assert list((tmp_path / "out" / "responses").iterdir()), "killed before the part was in its place"
    with stories.service(models=("another",)) as service:  # such a run ends before it asks a row
        ended = stories.run(job, "--set", f"service.base_url={service.url}")
        assert ended.returncode == 4, ended.stderr
        checked = stories.program("verify", str(tmp_path / "out"))
        assert checked.returncode == 0, checked.stdout


@pytest.mark.soak
def test_two_hundred_kills_over_five_thousand_rows(tmp_path: Path) -> None:
    """The long form: 200 kills over runs of 5,000 rows."""
    killed = 0
    repeated = 0
    for seed in range(40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        story = kills(folder, seed=seed, rows=5000, times=200 - killed, per_life=250, part=1000)
        killed += len(story.at)
        repeated = max(repeated, *story.repeated)
        if killed >= 200:
            break
    assert killed >= 200
    print(f"{killed} kills, at most {repeated} requests repeated by one with 16 in flight")  # noqa: T201
