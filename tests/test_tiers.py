"""A list of service tiers: what one has no room for goes to the next; with a deadline, only what would be late."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher import dialects, engine
from batcher.errors import BatcherError, JobError, PausedError
from batcher.job import from_document
from batcher.prompt import Composer
from batcher.records import Request, Row, Summary
from batcher.schedule import Deadline
from batcher.simulator import Front, ModelTransport, Settings, Simulator, VirtualLoop
from batcher.verify import verify
from tests import stories

TIERS = ["flex", "default", "priority"]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.dictionaries(st.text("ab"), st.text(), max_size=2),
    st.sampled_from([100, "auto"]),
)
def test_a_request_for_another_tier_is_the_same_but_for_that(text: str, extra: dict[str, str], cap: object) -> None:
    """Its body says what that of a job of that tier says, whatever stands in it; its hash stays that of the row."""

    def composer(*tiers: str) -> Composer:
        asked = {"model": "m", "prompt": "{{ v }}", "max_completion_tokens": cap}
        asked["extra"] = {"nest": {"service_tier": "flex"}, **extra}
        document = {"input": {"path": "x"}, "request": asked, "output": {"path": "o"}}
        return Composer(from_document(document, Path(), "job").request, None, "job", tiers)

    row = Row(0, {"v": text})
    request = composer(*TIERS).compose(row)
    assert isinstance(request, Request)
    assert request.on("flex") is request
    for tier in TIERS:
        other, sole = request.on(tier), composer(tier).compose(row)
        assert isinstance(sole, Request)
        assert msgspec.json.decode(other.body) == msgspec.json.decode(sole.body)
        assert (other.tier, other.hash) == (tier, request.hash)
        assert other.on("flex") == request
        if cap == "auto":
            assert msgspec.json.decode(other.capped(77).body)["max_completion_tokens"] == 77


def ran(folder: Path, service: Simulator, rows: int, **schedule: object) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The answers of a run in flex and, after it, in the default tier; and how many rows each has served."""
    stories.write_jsonl(folder / "rows.jsonl", rows)
    path = stories.write_job(folder, service.url, more={"schedule": {"service_tier": TIERS[:2], **schedule}})
    result = batcher.run(batcher.load(path))
    assert result.summary.totals.failed == 0
    stories.check_complete(folder / "out", rows, service)
    assert verify(folder / "out").problems == []
    answers = stories.table(folder / "out", "responses").to_pylist()
    return answers, Counter(row["service_tier"] for row in answers)


def test_what_the_first_tier_has_no_quota_for_goes_to_the_next(tmp_path: Path) -> None:
    """A day's limit of one tier ends no run, even of a job that does not wait, while another has quota."""
    with stories.service(limits={"flex:requests-day": 40}) as service:
        answers, served = ran(tmp_path, service, 100, wait=False, max_in_flight=4)
        asked = Counter(entry.tier for entry in service.book if stories.good(entry))
    assert served == asked
    assert 35 <= served["flex"] <= 40
    assert len({row["request_hash"] for row in answers}) == 100


def test_what_the_first_tier_refuses_goes_to_the_next(tmp_path: Path) -> None:
    """A row that one tier has refused for its queue is not sent there again, and the tier takes what it can."""
    with stories.service(capacities={"flex": 1}, latency=0.1) as service:
        _, served = ran(tmp_path, service, 200, queue_threshold="50ms")
    attempts = pq.read_table(tmp_path / "out" / "attempts").to_pylist()
    refused = Counter(each["row"] for each in attempts if each["kind"] == "overloaded")
    assert {each["tier"] for each in attempts if each["kind"] == "overloaded"} == {"flex"}
    assert set(refused.values()) == {1}
    assert min(served["flex"], served["default"]) > 0


def test_a_first_tier_with_room_keeps_all(tmp_path: Path) -> None:
    """A window that is still small is no lack of room."""
    with stories.service() as service:
        _, served = ran(tmp_path, service, 100)
    assert served == {"flex": 100}


def test_a_list_names_each_tier_once(tmp_path: Path) -> None:
    """And its members are tiers."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 1)
    for tiers, said in ((["flex", "flex"], "may stand in the list once"), (["slow"], "slow"), ([], "a list")):
        path = stories.write_job(tmp_path, "simulator", more={"schedule": {"service_tier": tiers}})
        with pytest.raises(JobError, match=f"schedule.service_tier.*{said}"):
            batcher.load(path)
    path = stories.write_job(tmp_path, "simulator", more={"schedule": {"service_tier": TIERS, "queue_threshold": "2s"}})
    assert batcher.load(path).schedule.tiers == tuple(TIERS)


Ended = tuple[Summary | BatcherError, float]
"""How a run ends, and how many seconds it took."""


def virtual(folder: Path, rows: int, settings: dict[str, Any], **schedule: object) -> Ended:
    """A run over rows of flex and default, in virtual time."""
    folder.mkdir(exist_ok=True)
    stories.write_jsonl(folder / "rows.jsonl", rows)
    more: dict[str, dict[str, object]] = {"schedule": {"service_tier": TIERS[:2], **schedule}}
    job = batcher.load(stories.write_job(folder, "https://simulated.invalid/v1", more=more))
    nothing = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "uncached_tokens_per_minute"))

    async def live() -> Ended:
        now = asyncio.get_running_loop().time
        front = Front(Settings(**{**nothing, "latency": 0.5, **settings}), now, 1_790_000_000.0, record=False)
        headers = {name.lower(): value for name, value in engine.prepare(job).access.headers.items()}
        refusal = dialects.named("cerebras").refusal
        transport = ModelTransport(front, f"Bearer {stories.KEY}", 60.0, refusal, headers)
        try:
            return await engine.run(job, transport=transport), now()
        except BatcherError as error:
            return error, now()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(until=1e5, work=lambda: 0.002)) as runner:
        return runner.run(live())


def test_a_tier_that_had_no_room_is_asked_again_later(tmp_path: Path) -> None:
    """Where the next one is shut for a day, rows that the first has refused go there after a while."""
    narrow = {"capacities": {"flex": 2}, "limits": {"default:requests-day": 50}}
    ended, seconds = virtual(tmp_path, 200, narrow, queue_threshold="50ms", wait=False)
    assert isinstance(ended, Summary)
    assert ended.totals.answered == 200
    assert seconds < 200


def test_a_budget_with_several_tiers_ends_in_a_pause(tmp_path: Path) -> None:
    """Whichever tier a row was to go to, and where the cheaper one never takes it."""
    ended, _ = virtual(tmp_path / "a", 200, {"capacities": {"flex": 2}}, queue_threshold="50ms", budget_usd=0.004)
    assert isinstance(ended, PausedError)
    assert "the budget is reached" in str(ended)
    ended, _ = virtual(tmp_path / "b", 40, {"limits": {"flex:tokens-minute": 60}}, budget_usd=0.001)
    assert isinstance(ended, PausedError)
    assert "the budget is reached" in str(ended)


def test_a_deadline_keeps_no_tier_shut_that_alone_has_quota(tmp_path: Path) -> None:
    """A run that does not wait for a day's limit goes on in the next tier, needed or not."""
    ended, seconds = virtual(tmp_path, 200, {"limits": {"flex:requests-day": 60}}, deadline="1h", wait=False)
    assert isinstance(ended, Summary)
    assert seconds < 300


# Deadlines

COURSES: dict[str, Callable[[float], float]] = {
    "even": lambda share: 1.0,
    "falls by half": lambda share: 4 / 3 - 2 / 3 * share,
    "doubles": lambda share: 2 / 3 + 2 / 3 * share,
    "wave": lambda share: 1 + math.sin(7 * share) / 3,
    "slow wave": lambda share: 1 - math.sin(3 * share) / 3,
}
"""How quick the first tier is over the time to the deadline, as a share of its mean or about so."""


def pursued(course: Callable[[float], float], second: float, seconds: float) -> tuple[float, float, float]:
    """When all is done, as a share of the time; rows of the second tier, and the fewest that would have sufficed.

    The first tier alone would take a third more than the time, and has as many rows as it takes; the second can do
    `second` times all of the rows in it.
    """
    rows, now, moved = 10_000.0, 0.0, [0.0, 0.0]
    speeds = [0.75 * rows / seconds, second * rows / seconds]
    least = rows - sum(speeds[0] * course(share / 1000) for share in range(1000)) * seconds / 1000
    deadline, left, dues = Deadline(seconds, 2, 0.0), rows, [0.0, 0.0]
    while left > 0:
        now += 0.5
        for tier in range(deadline.open):
            gone = min(left, 0.5 * speeds[tier] * (course(now / seconds) if tier == 0 else 1.0))
            left -= gone
            moved[tier] += gone
            dues[tier] += gone
            while dues[tier] >= 1:
                dues[tier] -= 1
                deadline.answered(tier)
        deadline.look(math.ceil(left), 1.0, now)
    return now / seconds, moved[1], least


@given(st.sampled_from(sorted(COURSES)), st.floats(0.75, 3.0), st.sampled_from([900.0, 3600.0, 20_000.0]))
@settings(max_examples=30, deadline=None)
def test_the_second_tier_carries_no_more_than_it_must(course: str, second: float, seconds: float) -> None:
    """All is done in time, with hardly more in the second tier than would do if the future were known."""
    ended, moved, least = pursued(COURSES[course], second, seconds)
    assert ended <= 1.0
    assert moved <= 1.1 * least + 20 * second * 10_000 / seconds  # and what it takes to learn its speed


def test_a_first_tier_that_is_quick_enough_carries_all() -> None:
    """No row goes to the second tier, and it is said that there is time left."""
    deadline = Deadline(1_000.0, 2, 0.0)
    for second in range(600):
        for _ in range(12):
            deadline.answered(0)
        assert deadline.look(10_000 - 12 * second - 12, 0.5, second + 1.0) is None
    assert deadline.open == 1
    assert deadline.late == pytest.approx(10_000 / 12 - 1_000, abs=5)


def test_a_missed_deadline_opens_all_tiers() -> None:
    """Whatever is left then goes as quickly as it can."""
    deadline = Deadline(100.0, 3, 0.0)
    opened = [deadline.look(1_000, 1.0, moment) for moment in (100.5, 101.0, 101.5)]
    assert opened == [2, 3, None]


def summary(folder: Path) -> Summary:
    """What the run has left behind."""
    return msgspec.json.decode((folder / "out" / "summary.json").read_bytes(), type=Summary)


def test_a_deadline_is_kept_or_said_to_be_missed(tmp_path: Path) -> None:
    """A run goes on after it, and a span counts from the first start of the output, also when it is resumed."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 50)
    with stories.service() as service:
        long: dict[str, dict[str, object]] = {"schedule": {"deadline": "6h"}, "input": {"limit": 20}}
        done = stories.run(stories.write_job(tmp_path, service.url, more=long))
        assert done.returncode == 0
        first = summary(tmp_path)
        assert first.deadline is not None
        assert first.late is not None
        assert -6 * 3600 < first.late < -5 * 3600
        assert ", met" in done.stdout
        stories.run(stories.write_job(tmp_path, service.url, more=long))
        assert summary(tmp_path).late == first.late, "there was nothing left to do"
        stories.run(stories.write_job(tmp_path, service.url, more={"schedule": {"deadline": "6h"}}))
        assert summary(tmp_path).deadline == first.deadline
        assert summary(tmp_path).late != first.late
        past = datetime.now(UTC) - timedelta(hours=1)
        stories.write_jsonl(tmp_path / "rows.jsonl", 50)
        (tmp_path / "more").mkdir()
        stories.write_jsonl(tmp_path / "more" / "rows.jsonl", 50)
        late: dict[str, dict[str, object]] = {"schedule": {"deadline": past, "service_tier": TIERS}}
        done = stories.run(stories.write_job(tmp_path / "more", service.url, more=late))
    assert done.returncode == 0
    assert f"{past:%Y-%m-%d %H:%M} UTC, missed by 1 h" in done.stdout
    told = summary(tmp_path / "more")
    assert told.totals.answered == 50
    assert told.late == pytest.approx(3600, abs=120)
