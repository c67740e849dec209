"""The measure of the scheduler's benchmark: a perfect schedule scores 1, and the books add up."""

import math
from dataclasses import replace

import pytest

from benchmarks import schedule_books as measure
from benchmarks.schedule_books import Booked, Books, Level, Seen, Sent
from benchmarks.schedule_world import Event, Lengths, World, ours, play

BUCKET = "tokens-minute"
LIMIT = {"requests-minute": 60.0, BUCKET: 6_000.0, "uncached-tokens-minute": 3_000.0}


def one(at: float, tokens: float = 100.0, status: int = 200) -> Booked:
    """A request that came and left at once."""
    used = (1.0, tokens, tokens / 2) if status == 200 else (0.0, 0.0, 0.0)
    return Booked(at, at, status, at, status == 200, used)


def books(*booked: Booked, there: float = 0.0) -> Books:
    """Two minutes of them, with so much in the bucket all the time."""
    levels = [Level(float(at), dict.fromkeys(LIMIT, there), LIMIT) for at in range(121)]
    return Books(120.0, booked=list(booked), levels=levels)


def test_who_uses_what_flows_in_scores_one() -> None:
    """A request a second of a hundred tokens is all that 60 requests and 6,000 tokens a minute allow."""
    perfect = books(*(one(float(at)) for at in range(1, 121)))
    for bucket in LIMIT:
        assert measure.share(perfect, bucket, 60.0) == pytest.approx(1.0)
    assert measure.refused(perfect, 60.0) == 0.0


def test_what_is_left_in_the_bucket_was_not_used() -> None:
    """What was there at the start counts as allowed."""
    assert measure.share(books(*(one(float(at)) for at in range(1, 121)), there=2_000.0), BUCKET, 60.0) == 0.75


def test_others_and_changes_lower_what_is_allowed() -> None:
    """Half of the limit, of which others take 30 %, is 35 % of it."""
    run = books(*(one(float(at), 35.0) for at in range(1, 121)))
    half = {name: limit / 2 for name, limit in LIMIT.items()}
    run.levels = [replace(level, limits=half, others=0.3) for level in run.levels]
    assert measure.share(run, BUCKET, 60.0) == pytest.approx(1.0)


def test_refusals_count_where_they_arrive() -> None:
    """Those of the first minute are not counted, nor is anything used by them."""
    run = books(one(10.0, status=429), one(70.0, status=429), one(80.0), one(90.0), one(100.0))
    assert measure.refused(run, 60.0) == 0.25
    assert measure.used(run, BUCKET, 0.0, 120.0) == 300.0


def test_places_are_busy_while_they_serve() -> None:
    """One of two places serves all the time, the other half of it."""
    run = Books(100.0, booked=[replace(one(0.0), left=100.0), replace(one(0.0), left=50.0)])
    run.levels = [Level(float(at), {}, {}, places=2.0) for at in range(101)]
    assert measure.busy(run, 0.0, 100.0) == 0.75


def test_an_outage_is_measured_from_the_first_failure() -> None:
    """Two were out before the first came back, three went after it, and the rate is full six seconds after the end."""
    run = books(*(one(float(at), 100.0) for at in [*range(1, 21), *range(62, 121)]))
    failed = [Sent(row, at, at + 1.0, "unavailable") for row, at in enumerate((20.5, 21.0, 22.0, 40.0, 50.0))]
    run.sent = [Sent(9, 10.0, 10.5), *failed, Sent(7, 61.0, 61.5)]
    run.seen = [Seen(0.0, 2, 2, "input")]
    assert measure.sent_after_refusal(run, 20.0, 60.0) == 3
    assert measure.sent_beyond_window(run, 20.0, 60.0) == 3
    assert measure.full_rate_after(run, BUCKET, 60.0) == 6.0
    assert measure.full_rate_after(run, BUCKET, 118.0) == math.inf


def test_a_starved_row_waits_for_ever() -> None:
    """The median of the long counts those that were never answered."""
    run = Books(1.0, waited={row: 2.0 for row in range(100) if row % 10})
    assert measure.wait_ratio(run, range(0, 100, 10)) == math.inf
    run.waited |= dict.fromkeys(range(0, 100, 10), 3.0)
    assert measure.wait_ratio(run, range(0, 100, 10)) == 1.5


def world(**settings: object) -> World:
    """A service of 120 requests a minute for a minute and a half, which fails for ten seconds of it."""
    lengths = Lengths([20] * 400, [5] * 400)
    limits = {"requests_per_minute": 120, "uncached_tokens_per_minute": 100_000, "tokens_per_minute": 300_000}
    events = (Event(40.0, {"faults": {"503": 1.0}}), Event(50.0, {"faults": {}}))
    return World(90.0, lengths, 10, {**limits, **settings}, events, {}, 60.0, 0, outage=(40.0, 50.0))


def test_the_books_of_a_run_add_up() -> None:
    """What the real engine sent is what the service saw, and levels, use and refill agree; twice the same."""
    run = play(world(), ours)
    assert len(run.sent) == len(run.booked)
    assert {one.failure for one in run.sent} <= {None, "unavailable", "rate_limited"}
    assert run.failed == 0
    assert run.waited
    first, last = run.levels[0], run.levels[-1]
    spent = measure.used(run, "requests-minute", first.at, last.at)
    assert first.there["requests-minute"] - spent + 2 * (last.at - first.at) >= last.there["requests-minute"] - 1
    again = play(world(), ours)
    assert again.booked == run.booked
    assert again.sent == run.sent
