"""A run that is held by its account's limits, in virtual time: days that are waited for, rows that never fit."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

import batcher
from batcher import dialects, engine
from batcher.errors import PausedError
from batcher.records import Kind, Snapshot, Summary
from batcher.report.progress import line, rates
from batcher.simulator import Front, ModelTransport, Settings, VirtualLoop
from tests import stories

EPOCH = 1_790_000_000.0
DAY = 86_400.0


class Told:
    """What a run came to, and when."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.ended: object = None
        self.seconds = 0.0
        self.front: Front | None = None


def play(
    folder: Path, rows: list[dict[str, object]], settings: Mapping[str, Any], more: Mapping[str, Mapping[str, object]]
) -> Told:
    """A job over these rows against a service, from its start to its end, within a week of virtual time."""
    told = Told()
    loop = VirtualLoop(until=7 * DAY, work=lambda: 0.001)
    (folder / "rows.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    job = batcher.load(stories.write_job(folder, "https://simulated.invalid/v1", in_flight="auto", more=more))
    told.front = front = Front(Settings(**settings), loop.time, EPOCH, record=True)
    transport = ModelTransport(front, f"Bearer {stories.KEY}", 60.0, dialects.named("cerebras").refusal)

    async def live() -> None:
        try:
            told.ended = await engine.run(job, transport=transport, watch=told.snapshots.append)
        except PausedError as error:
            told.ended = error
        told.seconds = loop.time()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(live())
    return told


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every story has its key in the environment."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)


def rows(number: int) -> list[dict[str, object]]:
    """So many rows."""
    return [{"key": f"k{row}", "text": stories.prompt(row), "model": "gpt-oss-120b"} for row in range(number)]


def test_a_long_limit_is_waited_for(tmp_path: Path) -> None:
    """When an hour's quota is used up the run waits, says until when, asks next to nothing, and ends with every row."""
    told = play(tmp_path, rows(60), {"limits": {"requests-hour": 40}}, {})
    assert isinstance(told.ended, Summary)
    assert (told.ended.totals.answered, told.ended.totals.failed) == (60, 0)
    assert 1_700 <= told.seconds <= 4_000
    assert told.front is not None
    assert sum(entry.status == 429 for entry in told.front.book) <= 20
    waiting = [snapshot for snapshot in told.snapshots if snapshot.until is not None]
    assert "held by requests per hour until 2" in line(waiting[0], rates([]))


def test_a_day_is_not_waited_for_where_the_job_says_so(tmp_path: Path) -> None:
    """With `wait = false` the run ends resumable, says when the quota is back, and the same command goes on then."""
    told = play(tmp_path, rows(60), {"requests_per_day": 40}, {"schedule": {"wait": False}})
    assert isinstance(told.ended, PausedError)
    assert told.seconds < 60
    assert "h, until 20" in str(told.ended)
    assert len(stories.column(tmp_path / "out", "responses", "row")) in range(30, 41)


def test_a_row_that_never_fits_fails_alone(tmp_path: Path) -> None:
    """It is not sent once the limit is known, its failure says why, and the others go on."""
    some = rows(30)
    some[20]["text"] = "x" * 400_000
    told = play(tmp_path, some, {"uncached_tokens_per_minute": 30_000}, {})
    assert isinstance(told.ended, Summary)
    assert (told.ended.totals.answered, told.ended.totals.failed) == (29, 1)
    assert stories.column(tmp_path / "out", "failures", "kind") == [Kind.EXCEEDS_QUOTA]
    [message] = stories.column(tmp_path / "out", "failures", "message")
    assert "tokens at once, and the service allows 30,000 uncached tokens per minute" in str(message)
    assert told.front is not None
    assert all(len(entry.prompt) < 1_000 for entry in told.front.book)


def test_two_models_use_each_its_own_limits(tmp_path: Path) -> None:
    """The one that is allowed little does not keep the other from what it is allowed, even where it stands first."""
    some = rows(450)
    for row in some[:150]:
        row["model"] = "qwen-3.8-27b"
    limits = {"gpt-oss-120b:requests-minute": 600, "qwen-3.8-27b:requests-minute": 30}
    told = play(tmp_path, some, {"limits": limits}, {"request": {"model": "{{ model }}"}})
    assert isinstance(told.ended, Summary)
    assert told.ended.totals.answered == 450
    assert told.front is not None
    ends = {
        name: max(entry.answered_at or 0.0 for entry in told.front.book if entry.model == name)
        for name in ("gpt-oss-120b", "qwen-3.8-27b")
    }
    assert ends["gpt-oss-120b"] <= 60
    assert ends["qwen-3.8-27b"] == pytest.approx(60 * (150 - 30) / 30, rel=0.05)
    assert any(snapshot.binds.endswith("of qwen-3.8-27b") for snapshot in told.snapshots)


def test_the_next_run_knows_what_this_one_learned(tmp_path: Path) -> None:
    """Limits that nobody states are kept in the ledger: a run that goes on from it meets hardly a refusal."""
    service = {"rate_headers": "none", "requests_per_minute": 120}
    first = play(tmp_path, rows(360), service, {"input": {"limit": 240}})
    assert first.front is not None
    assert sum(entry.status == 429 for entry in first.front.book) >= 3
    second = play(tmp_path, rows(360), service, {"input": {"limit": 360}})
    assert second.front is not None
    assert len(second.front.book) >= 120
    assert sum(entry.status == 429 for entry in second.front.book) <= 2


def test_a_stray_refusal_holds_a_run_back_for_a_while_only(tmp_path: Path) -> None:
    """A service without limits refuses a request in 200 for no reason, one of the first too: the rate grows again."""
    told = play(tmp_path, rows(1000), {"requests_per_minute": None, "faults": {"429": 0.005}, "seed": 3}, {})
    assert isinstance(told.ended, Summary)
    assert told.ended.totals.answered == 1000
    assert told.front is not None
    refused = [entry.arrived for entry in told.front.book if entry.status == 429]
    assert refused[0] < 10.0, "none of the first was refused"
    assert told.seconds < 300.0
