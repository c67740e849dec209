"""A budget is never exceeded, by the service's own book: at any concurrency, through timeouts, kills and retries."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher.errors import JobError, PausedError
from batcher.ledger import Ledger
from batcher.plan import plan, render
from batcher.records import Attempt, Outcome, Request, Spending, Summary, Turn, Usage
from batcher.report import status_text
from batcher.schedule import Budget, Dispatcher, Pace, Ticket
from batcher.schedule.budget import PATIENCE
from batcher.simulator import Entry, Simulator
from batcher.status import status
from batcher.verify import verify
from tests import stories
from tests.test_ledger import attempt

More = Mapping[str, Mapping[str, object]]
NOTHING = Spending(0.0, 0.0)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


def bill(entries: list[Entry]) -> float:
    """USD that the service charges: for all that it answered, whoever heard of it."""
    return sum(0.35e-6 * entry.prompt_tokens + 0.75e-6 * entry.completion_tokens for entry in entries)


def turn(row: int, price: int = 1) -> Turn:
    """A request that costs at most so much, by its prompt's estimate."""
    return Turn(Request(0, row, "m", b"", prompt_tokens=price, output_tokens=1, hash=b""), 0.0)


def most(request: Request) -> float:
    """What it costs at most."""
    return float(request.prompt_tokens)


# What may go


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.0, 0.3, 1.0, None])), max_size=60),
    st.integers(1, 300),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_what_is_spent_and_held_never_passes_the_limit(
    rows: list[tuple[int, float | None]], limit: int, window: int, chance: random.Random
) -> None:
    """Whatever requests cost of what was leased, in whatever order; and nothing is left undone that could be paid."""
    budget = Budget(limit, NOTHING, most)
    dispatcher = Dispatcher(Pace(window), window, 0.0, budget=budget)
    dispatcher.offer([turn(row, price) for row, (price, _) in enumerate(rows)])
    out: list[Ticket] = []
    gone: set[int] = set()
    while True:
        granted = dispatcher.take(0.0)
        if isinstance(granted, Ticket):
            out.append(granted)
            gone.add(granted.turn.request.row)
        elif out:
            ticket = out.pop(chance.randrange(len(out)))
            row = ticket.turn.request.row
            share = rows[row][1]
            spent = None if share is None else rows[row][0] * share
            budget.settle(attempt(row, spent=spent))
            budget.settle(attempt(row, spent=spent))  # a second word on it changes nothing
            dispatcher.answered(ticket, Usage(), None, 0.0)
            dispatcher.landed(1)
        else:
            break
        assert budget.spent + budget.held <= limit + 1e-9
        assert budget.left >= -1e-9
    assert budget.held == 0
    assert len(rows) - len(gone) == budget.set_aside
    assert all(rows[row][0] > budget.left for row in range(len(rows)) if row not in gone)


def test_a_dear_row_does_not_stop_cheaper_ones() -> None:
    """It waits for what is out, and is left for another run when that does not help; many in a row end the run."""
    budget = Budget(10, NOTHING, most)
    dispatcher = Dispatcher(Pace(4), 4, 0.0, budget=budget)
    dispatcher.offer([turn(0, 4), turn(1, 20), turn(2, 6), *(turn(row, 11) for row in range(3, 1000))])
    first = dispatcher.take(0.0)
    assert isinstance(first, Ticket)
    assert dispatcher.take(0.0) is None
    assert (dispatcher.pressure().binds, budget.set_aside) == ("budget", 0)
    budget.settle(attempt(0, spent=1.0))
    dispatcher.answered(first, Usage(), None, 0.0)
    dispatcher.landed(1)
    second = dispatcher.take(0.0)
    assert isinstance(second, Ticket)
    assert (second.turn.request.row, budget.set_aside) == (2, 1)
    budget.settle(attempt(2, spent=None))
    dispatcher.answered(second, Usage(), None, 0.0)
    dispatcher.landed(1)
    assert dispatcher.take(0.0) is None
    assert (budget.reached, budget.set_aside, dispatcher.waiting) == (True, 1 + PATIENCE, 997 - PATIENCE)
    assert (budget.spent, budget.lost, budget.left, budget.dearest_left) == (7.0, 6.0, 3.0, 11.0)


# What the ledger knows


async def _spend(path: Path, recorded: list[Attempt], leases: list[tuple[int, int, int, float]]) -> None:
    ledger = Ledger(path)
    try:
        ledger.take_up_spending(0.0)
        ledger.start(lambda _: None, lambda _: None)
        assert await asyncio.gather(*(ledger.lease(*lease) for lease in leases)) == [True] * len(leases)
        for one in recorded:
            ledger.record(one)
        await ledger.flush()
    finally:
        ledger.close()


def test_a_lease_that_was_never_settled_is_spent_in_full(tmp_path: Path) -> None:
    """A killed run's requests may have been paid; one that told its usage counts with that; each counts once."""
    path = tmp_path / "ledger.sqlite"
    leases = [(0, row, 1, 0.5) for row in range(4)]
    recorded = [attempt(0, spent=0.125), attempt(1, spent=None), attempt(2, spent=0.0), attempt(0, spent=0.125)]
    asyncio.run(_spend(path, recorded, leases))
    ledger = Ledger(path)
    assert ledger.spending() == Spending(0.125 + 0.5 + 0.5, 0.5 + 0.5)
    assert ledger.take_up_spending(100.0) == Spending(1.125, 1.0)
    assert ledger.spending() == Spending(1.125, 1.0)
    asyncio.run(_spend(path, [attempt(3, spent=0.0)], []))  # its lease was spent with the run that took it
    assert ledger.spending() == Spending(1.125, 1.0)


def test_what_was_spent_before_anybody_counted_is_taken_once(tmp_path: Path) -> None:
    """An output gets its budget late: what its timeline knows is the beginning."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.spending() is None
    assert ledger.take_up_spending(2.5) == Spending(2.5, 0.0)
    assert ledger.take_up_spending(7.0) == Spending(2.5, 0.0)


# Whole runs


def job(folder: Path, service: Simulator, budget: float | None, rows: int = 60, more: More | None = None) -> Path:
    """A job over a new input, or the one that lies there, with a budget."""
    if not (folder / "rows.jsonl").exists():
        stories.write_jsonl(folder / "rows.jsonl", rows)
    sections: dict[str, dict[str, object]] = {"schedule": {"max_in_flight": 16, "budget_usd": budget}}
    for name, values in (more or {}).items():
        sections.setdefault(name, {}).update(values)
    return stories.write_job(folder, service.url, rows_per_part=20, more=sections)


def paused(path: Path) -> str:
    """What the budget's end says of a run."""
    with pytest.raises(PausedError) as caught:
        batcher.run(batcher.load(path))
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


def summary(folder: Path) -> Summary:
    """What the last run left."""
    return msgspec.json.decode((folder / "out/summary.json").read_bytes(), type=Summary)


def test_a_budget_that_is_reached_pauses_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    """The pause says what is spent, left, pending and what that would cost; nothing is asked twice."""
    with stories.service(latency=0.002) as service:
        said = paused(job(tmp_path, service, 0.0012))
        assert said.startswith("the budget is reached: $0.00")
        assert "of $0.0012 is spent, $" in said
        assert " rows are pending and would cost about $0.00" in said
        assert said.endswith("raise schedule.budget_usd and run the same command again")
        first = summary(tmp_path)
        assert first.pending
        assert (first.state, first.budget_usd) == ("paused", 0.0012)
        assert first.spent is not None
        assert first.spent.usd == pytest.approx(bill(service.book), abs=1e-12)
        assert bill(service.book) <= 0.0012
        assert first.spent.usd > 0.0012 - 0.0003  # less is left than a request may cost
        assert "budget    $0.00" in status_text(status(tmp_path / "out"))
        before = len(service.book)
        assert " rows are pending and would cost about $0.00" in paused(tmp_path / "job.toml")
        assert len(service.book) == before
        assert f"{first.pending} rows" in render(plan(batcher.load(job(tmp_path, service, 0.0015))))
        batcher.run(batcher.load(job(tmp_path, service, 1.0)))
        stories.check_complete(tmp_path / "out", 60, service)
        assert len(service.book) == 60
        assert verify(tmp_path / "out").problems == []


def test_a_budget_too_small_for_any_large_row_is_a_pause(tmp_path: Path) -> None:
    """Also where so few of them may wait that they are all set aside before it is sure: others are read then."""
    with stories.service() as service:
        large: dict[str, dict[str, object]] = {"request": {"prompt": "{{ text * 6000 }}"}, "output": {"keep": []}}
        said = paused(job(tmp_path, service, 0.01, rows=280, more=large))
        assert service.book == []
    assert "the budget is reached" in said
    assert "280 rows are pending" in said


def test_runs_without_a_budget_count_for_a_later_one(tmp_path: Path) -> None:
    """Before the first budget, and between two."""
    with stories.service(latency=0.002) as service:
        batcher.run(batcher.load(job(tmp_path, service, None), ["input.limit=10"]))
        batcher.run(batcher.load(job(tmp_path, service, 1.0), ["input.limit=20"]))
        assert status(tmp_path / "out").spent == Spending(pytest.approx(bill(service.book), abs=1e-12), 0.0)  # type: ignore[arg-type]
        batcher.run(batcher.load(job(tmp_path, service, None), ["input.limit=30"]))
        assert status(tmp_path / "out").spent is None
        spent = bill(service.book)
        assert "$0" in paused(job(tmp_path, service, spent + 0.0001))
        assert bill(service.book) <= spent + 0.0001


def test_a_timeout_counts_with_all_that_it_may_have_cost(tmp_path: Path) -> None:
    """What hangs is answered where nobody listens any more, and that is billed too."""
    faults = {"hang": 0.2}
    with stories.service(latency=0.002, faults=faults, hang=30.0) as service:
        more: More = {"service": {"timeout": "200ms"}}
        said = paused(job(tmp_path, service, 0.002, more=more))
        assert "of it maybe, by requests that timed out or were cut off" in said
        spent = summary(tmp_path).spent
        assert spent is not None
        assert bill(service.book) <= spent.usd <= 0.002
        assert spent.lost > 0


def test_a_retry_keeps_the_budget_and_may_raise_it(tmp_path: Path) -> None:
    """`batcher retry` spends from the same budget; paused, it goes on with a larger one."""
    with stories.service(latency=0.002) as service:
        batcher.run(batcher.load(job(tmp_path, service, 0.004, rows=20)))
        out, spent = tmp_path / "out", bill(service.book)
        with pytest.raises(PausedError, match="the budget is reached"):
            batcher.retry(out, "row < 20", [f"schedule.budget_usd={spent + 0.0005}"])
        assert spent < bill(service.book) <= spent + 0.0005
        with pytest.raises(JobError, match="a retry of 20 rows with other options is under way"):
            batcher.retry(out, "row < 20", ["request.seed=4", "schedule.budget_usd=1"])
        batcher.retry(out, None, ["schedule.budget_usd=1"])
        assert len(service.book) == 40
        stories.check_complete(out, 20, service)


def test_kills_never_make_a_run_spend_more_than_its_budget(tmp_path: Path) -> None:
    """Killed again and again until the budget is reached: by the service's book no more is spent, nor much less."""
    rows = 500
    stories.write_jsonl(tmp_path / "rows.jsonl", rows)
    with stories.service(latency=0.01, seconds_per_completion_token=0.0, faults={"hang": 0.01}, hang=9.0) as service:
        budget = 0.008
        more: More = {"schedule": {"budget_usd": budget}, "service": {"timeout": "1s"}}
        path = stories.write_job(tmp_path, service.url, in_flight=8, rows_per_part=100, more=more)
        story = stories.Kills(tmp_path, service, path, in_flight=8, seed=3)
        for _ in range(3):
            assert story.kill_once(story.random.randrange(5, 40), within=0.02)
        ended = stories.run(path, "--quiet")
        assert ended.returncode == 75, ended.stderr
        assert "the budget is reached" in ended.stderr
        spent = summary(tmp_path).spent
        assert spent is not None
        assert spent.lost > 0
        assert bill(service.book) <= spent.usd <= budget
        assert spent.usd > 0.95 * budget
        assert verify(tmp_path / "out").problems == []


# Jobs that cannot have one


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"request": {"max_completion_tokens": None}}, "schedule.budget_usd: only with request.max_completion_tokens"),
        ({"request": {"model": "unheard-of"}}, "schedule.budget_usd: no price of unheard-of is known"),
    ],
)
def test_a_budget_without_prices_or_a_cap_is_refused(tmp_path: Path, more: More, said: str) -> None:
    """The plan says what is missing, and so does the run."""
    with stories.service() as service:
        loaded = batcher.load(job(tmp_path, service, 1.0, more=more))
        for look in (plan, batcher.run):
            with pytest.raises(JobError, match=said):
                look(loaded)


def test_a_row_without_a_price_fails_by_itself(tmp_path: Path) -> None:
    """Where rows name their models, those that have no price are not sent."""
    with stories.service(latency=0.002, models=("gpt-oss-120b", "unheard-of")) as service:
        model = "{{ 'unheard-of' if key == 'k3' else 'gpt-oss-120b' }}"
        loaded = batcher.load(job(tmp_path, service, 1.0, rows=10, more={"request": {"model": model}}))
        assert "1 of all rows cannot become requests, the first is row 3: what it may cost" in render(plan(loaded))
        result = batcher.run(loaded)
        assert result.failures()["row"].to_pylist() == [3]
        assert result.failures()["kind"].to_pylist() == ["unsendable"]
        assert len(service.book) == 9


@pytest.mark.parametrize(
    ("budget", "said"), [(1.0, "$1.00; it reaches for all rows"), (0.001, "it reaches for about ")]
)
def test_the_plan_says_how_far_a_budget_reaches(tmp_path: Path, budget: float, said: str) -> None:
    """By the most that the rows may cost."""
    with stories.service() as service:
        assert said in render(plan(batcher.load(job(tmp_path, service, budget))))


def test_attempts_that_are_recorded_twice_are_settled_once(tmp_path: Path) -> None:
    """A held refusal is recorded again when it is a failure after all."""
    path = tmp_path / "ledger.sqlite"
    again, failed = (attempt(0, outcome=one, spent=0.25) for one in (Outcome.AGAIN, Outcome.FAILED))
    asyncio.run(_spend(path, [again, failed], [(0, 0, 1, 0.5)]))
    assert Ledger(path).spending() == Spending(0.25, 0.0)
