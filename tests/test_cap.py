"""Output caps that are learned: the best ones are found, and nothing that they cut off is ever an answer."""

import asyncio
import bisect
import random
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher import dialects, engine
from batcher.errors import JobError, PausedError
from batcher.job import from_document
from batcher.plan import plan, render
from batcher.records import FIRST_CAP, Kind, Request, Summary, Turn, Usage
from batcher.schedule import Dispatcher, Pace, Ticket
from batcher.schedule.cap import MOST, Caps, Load
from batcher.simulator import Front, ModelTransport, Recorded, Settings, VirtualLoop
from tests import stories

PROMPT = 20
"""Tokens of a prompt, about."""


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


# Which cap is best


def asked(caps: Caps, length: int, prompt: int, load: Load) -> float:
    """Ask a row whose answer is so long until it has ended; what that takes of the quota."""
    taken, floor = 0.0, 0
    while True:
        if caps.due:
            caps.choose(load)
        cap = caps.next(floor)
        assert floor < cap <= MOST or floor == MOST
        used = min(length, cap)
        taken += prompt + used + load.kept * (cap - used)
        if length <= cap or cap == MOST:
            caps.ended(used, floor)
            caps.took(prompt, prompt, 1.0)
            return taken
        caps.cut(cap, floor)
        caps.took(prompt, prompt, 1.0)
        floor = cap


def best_of_two(lengths: list[int], prompt: int, kept: float) -> float:
    """What a row takes on average with the best first cap and then the longest answer's, by trying all."""
    lengths = sorted(lengths)
    most, count = lengths[-1], len(lengths)
    below, told = [0.0], 0.0
    for length in lengths:
        told += length
        below.append(told)
    costs = []
    for cap in sorted(set(lengths)):
        ends = bisect.bisect_right(lengths, cap)
        first = count * (prompt + kept * cap) + (1 - kept) * (below[ends] + (count - ends) * cap)
        again = (count - ends) * (prompt + kept * most) + (1 - kept) * (below[-1] - below[ends])
        costs.append(first + again)
    return min(costs) / count


@given(
    st.floats(2.5, 7.5),
    st.floats(0.0, 1.2),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(5, 3000),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_the_caps_are_nearly_as_good_as_the_best_two(
    middle: float, spread: float, long: float, prompt: int, kept: float, seed: int
) -> None:
    """Whatever the lengths, also where some are ten times as long, and whether a reservation is kept or given back."""
    draw = Random(seed)
    lengths = [
        min(MOST, max(1, round(draw.lognormvariate(middle, spread) * (10 if draw.random() < long else 1))))
        for _ in range(1_000)
    ]
    caps = Caps()
    taken = [asked(caps, length, prompt, Load(kept, 1 / 60)) for length in lengths]
    assert best_of_two(lengths[200:], prompt, kept) >= 0.9 * sum(taken[200:]) / 800


def test_a_cap_is_there_before_anything_is_known() -> None:
    """It begins with a guess that grows fourfold; what the service says of its model is never passed."""
    caps = Caps()
    assert [caps.next(floor) for floor in (0, 1024, 4096, 16_384, MOST)] == [FIRST_CAP, 4096, 16_384, MOST, MOST]
    caps.bound(2_000, 8_000)
    assert [caps.next(floor) for floor in (0, 1024, 2000)] == [FIRST_CAP, 2000, 2000]
    for _ in range(100):
        asked(caps, 1_500, 100, Load(1.0))
    assert 1_500 <= caps.next(0) <= 2_000


def test_where_requests_are_scarce_the_cap_is_large() -> None:
    """An attempt that is cut off costs a request: with as many tokens to spare, none is."""
    lengths = list(range(10, 510, 5))
    few, many = Caps(), Caps()
    for length in lengths * 3:
        asked(few, length, 10, Load(1.0, 1 / 60, request=2_000.0))
        asked(many, length, 10, Load(1.0, 1 / 60))
    assert many.next(0) < few.next(0)
    assert few.next(0) >= 505


@given(st.lists(st.tuples(st.integers(1, 40_000), st.booleans()), max_size=60), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_next_cap_is_always_larger(seen: list[tuple[int, bool]], kept: float) -> None:
    """Whatever was seen, in whatever order: a row comes to its end."""
    caps = Caps()
    for length, was_cut in seen:
        (caps.cut if was_cut else caps.ended)(min(length, MOST), 0)
        caps.took(10, 10, 0.5)
    if seen:
        caps.choose(Load(kept))
    floor, steps = 0, 0
    while floor < MOST:
        assert caps.next(floor) > floor
        floor, steps = caps.next(floor), steps + 1
    assert steps < 100


# The dispatcher


def turn(row: int, floor: int = 0) -> Turn:
    """A row's request, as it is composed."""
    body = b'{"model":"m","max_completion_tokens":%d}' % FIRST_CAP
    return Turn(Request(0, row, "m", body, PROMPT, FIRST_CAP, b"", None), 0.0, floor=floor)


def test_the_cap_is_put_into_the_body_as_it_goes() -> None:
    """The next row goes with what was learned, one that was cut off with more; what full contexts cut is given up."""
    dispatcher = Dispatcher(Pace(1), 1, 0.0, learns_caps=True)
    dispatcher.bound(3_000, 4_000)
    for row in range(40):
        dispatcher.offer([turn(row)])
        ticket = dispatcher.take(float(row))
        assert isinstance(ticket, Ticket)
        cap = ticket.turn.request.output_tokens
        assert ticket.turn.request.body == b'{"model":"m","max_completion_tokens":%d}' % cap
        dispatcher.answered(ticket, Usage(PROMPT, 1_500, PROMPT + 1_500), None, row + 0.5)
        dispatcher.landed(1)
    assert 1_500 <= cap <= 3_000
    dispatcher.offer([turn(40, floor=2_000)])
    larger = dispatcher.take(50.0)
    assert isinstance(larger, Ticket)
    assert 2_000 < larger.turn.request.output_tokens <= 3_000

    def may_be_longer(cap: int, completion: int) -> bool:
        asked = turn(41)
        asked.request = asked.request.capped(cap)
        return dispatcher.may_be_longer(larger._replace(turn=asked), Usage(PROMPT, completion))

    assert may_be_longer(2_000, 2_000)
    assert not may_be_longer(2_000, 800)
    assert not may_be_longer(3_000, 3_000)


# The run


LENGTHS = [40] * 30 + [3_000, 50, 40_000, 600] + [40] * 60 + [900, 45, 200, 44, 5_000]
"""By row, tokens of its answer; the third long one never ends."""
ENDLESS = 32


def job_of(folder: Path, output: str = "out", **more: dict[str, object]) -> batcher.Job:
    """The job, over rows from Python."""
    sections: dict[str, dict[str, Any]] = {
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": "auto"},
        "service": {"base_url": "https://simulated.invalid/v1", "api_key_env": "STORY_KEY", "dialect": "cerebras"},
        "schedule": {"max_in_flight": 4},
        "retry": {"max_attempts": 1, "max_invalid": 0},
        "output": {"path": output, "keep": [], "rows_per_part": 40},
    }
    for name, values in more.items():
        sections[name] = {**sections[name], **values}
    given = {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}
    return from_document(given, folder, "job.toml")


TEXTS = [stories.prompt(row) for row in range(len(LENGTHS))]


def served() -> Front:
    """A service whose answers are as long as they are meant to be, and that keeps what was reserved."""
    answers = Recorded({text: ("yes " * tokens,) for text, tokens in zip(TEXTS, LENGTHS, strict=True)})
    settings = Settings(
        answers=answers,
        requests_per_minute=None,
        tokens_per_minute=100_000,
        uncached_tokens_per_minute=100_000,
        keeps_reservation=True,
    )
    return Front(settings, lambda: NOW[0](), 1_790_000_000.0, record=True)


NOW: list[Any] = [lambda: 0.0]
"""The clock of the service."""


def lived(job: batcher.Job, front: Front, start: float, after: float | None = None, picture: Path | None = None) -> Any:
    """One run in virtual time, killed after so many seconds: then `picture` is what is left on the disk."""
    loop = VirtualLoop(start, work=lambda: 0.001)
    NOW[0] = loop.time

    async def life() -> Summary | None:
        line = ModelTransport(front, f"Bearer {stories.KEY}", 3600.0, dialects.named("cerebras").refusal)
        task = asyncio.create_task(engine.run(job, table=pa.table({"text": TEXTS}), transport=line))
        await asyncio.wait([task], timeout=after)
        if task.done():
            return task.result()
        line.cut = True
        assert picture is not None
        shutil.copytree(job.results.folder or "", picture, ignore=shutil.ignore_patterns("*.reserve"))
        task.cancel()
        await asyncio.wait([task])
        return None

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(life()), loop.time()


def checked(output: Path) -> list[dict[str, Any]]:
    """Every answer is whole, and what never ends has failed; gives all rows."""
    answers = pq.read_table(output / "responses").to_pylist()
    assert {row["row"]: row["response"] for row in answers} == {
        row: "yes " * tokens for row, tokens in enumerate(LENGTHS) if row != ENDLESS
    }
    assert {row["finish_reason"] for row in answers} == {"stop"}
    (failure,) = pq.read_table(output / "failures").to_pylist()
    assert (failure["row"], failure["kind"], failure["status"]) == (ENDLESS, Kind.TRUNCATED, 200)
    assert "no larger cap would help" in failure["message"]
    cuts: dict[int, list[int]] = {}
    for attempt in pq.read_table(output / "attempts").to_pylist():
        if attempt["kind"] == Kind.TRUNCATED:
            cuts.setdefault(attempt["row"], []).append(attempt["completion_tokens"])
    assert all(sorted(set(caps)) == caps for caps in cuts.values())
    hashes = {row["row"]: row["request_hash"] for row in answers}
    assert len(set(hashes.values())) == len(answers)
    return [*answers, failure]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_what_is_cut_off_is_asked_again_and_never_an_answer(tmp_path: Path, endpoint: str) -> None:
    """With no other attempt allowed; both payments are in the row's cost."""
    more: dict[str, object] = {}
    if endpoint == "completions":
        more = {"endpoint": "completions", "max_tokens": "auto", "max_completion_tokens": None}
    front = served()
    summary, _ = lived(job_of(tmp_path, request=more), front, 0.0)
    assert (summary.totals.answered, summary.totals.failed) == (len(LENGTHS) - 1, 1)
    assert summary.totals.failure_kinds == {"truncated": 1}
    bills: dict[int, float] = {}
    for entry in front.book:
        if entry.prompt:
            row, price = stories.row_of(entry), 0.35e-6 * entry.prompt_tokens + 0.75e-6 * entry.completion_tokens
            bills[row] = bills.get(row, 0.0) + price
    assert {row["row"]: row["cost_usd"] for row in checked(tmp_path / "out")} == pytest.approx(bills)
    attempts = pq.read_table(tmp_path / "out" / "attempts").to_pylist()
    assert {row["kind"] for row in attempts} == {None, "truncated"}
    assert len([row for row in attempts if row["row"] == ENDLESS]) > 2


def test_a_killed_run_goes_on_with_larger_caps(tmp_path: Path) -> None:
    """Killed again and again: a row that was cut off is not asked with less than before, and costs what it costs."""
    front, chance = served(), random.Random(5)
    now, output = 0.0, "out0"
    for number in range(1, 100):
        after = chance.uniform(0.05, 0.6) if number < 12 else None
        picture = tmp_path / f"out{number}"
        ended, now = lived(job_of(tmp_path, output), front, now + 1, after, picture)
        if ended is not None:
            break
        output = picture.name
    assert ended is not None
    checked(tmp_path / output)


def test_a_budget_holds_the_cap_that_is_sent(tmp_path: Path) -> None:
    """What is spent by the service's book is never more."""
    front = served()
    with pytest.raises(PausedError, match="the budget is reached"):
        lived(job_of(tmp_path, schedule={"budget_usd": 0.02, "max_in_flight": 4}), front, 0.0)
    billed = sum(0.35e-6 * entry.prompt_tokens + 0.75e-6 * entry.completion_tokens for entry in front.book)
    assert 0.002 < billed <= 0.02
    finishes = pq.read_table(tmp_path / "out" / "responses")["finish_reason"].to_pylist()
    assert set(finishes) == {"stop"}


# The job


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"n": 3}, 'request.max_completion_tokens = "auto": only with one answer to a request, so not with n'),
        ({"min_completion_tokens": 10}, 'request.max_completion_tokens = "auto": not with min_completion_tokens'),
        ({"max_tokens": 5}, "max_tokens or max_completion_tokens, not both"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, more: dict[str, object], said: str) -> None:
    """In one line."""
    with pytest.raises(JobError, match=said.split("=")[0]) as caught:
        job_of(tmp_path, request=more)
    assert said in str(caught.value)


def test_several_prompts_in_one_request_fail_their_row(tmp_path: Path) -> None:
    """One cap would be for all of them."""
    (tmp_path / "rows.jsonl").write_text('{"text": ["one", "two"]}\n{"text": "three"}\n')
    request = {
        "endpoint": "completions",
        "prompt": "{{ text }}",
        "max_tokens": "auto",
        "max_completion_tokens": None,
    }
    job = from_document(
        {
            "input": {"path": "rows.jsonl"},
            "request": {"model": "gpt-oss-120b", **{k: v for k, v in request.items() if v is not None}},
            "service": {"base_url": "simulator"},
            "output": {"path": "out"},
        },
        tmp_path,
        "job.toml",
    )
    told = render(plan(job))
    assert 'request.max_tokens = "auto": only with one prompt in a request' in told
    assert "their cap is learned" in told
