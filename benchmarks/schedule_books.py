"""What the service's books and the client's say of a run: shares of what was allowed, refusals, times to recover."""

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

RESOURCES = ("requests-minute", "tokens-minute", "uncached-tokens-minute")
SPAN = 5.0
"""Seconds over which a rate is looked at."""


@dataclass(slots=True)
class Sent:
    """One request as the client saw it; `ended` is None where the run was over before."""

    row: int
    at: float
    ended: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Booked:
    """One request as the service saw it. `status` None: it left no answer; `used` is settled, by bucket."""

    arrived: float
    left: float | None
    status: int | None
    served: float | None
    charged: bool
    used: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Level:
    """What was in the buckets at a moment, and from then on: what flows in a minute, others' share of it, places."""

    at: float
    there: dict[str, float]
    limits: dict[str, float]
    others: float = 0.0
    places: float = math.inf


@dataclass(frozen=True, slots=True)
class Seen:
    """What the client said of itself at a moment."""

    at: float
    in_flight: int
    window: int
    binds: str


@dataclass(slots=True)
class Books:
    """All that is known of a run of `seconds`; times are virtual seconds since its start."""

    seconds: float
    sent: list[Sent] = field(default_factory=list)
    booked: list[Booked] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    """Once a second, and after each change."""
    seen: list[Seen] = field(default_factory=list)
    waited: dict[int, float] = field(default_factory=dict)
    """By answered row, seconds between when it could have gone and when it went."""
    failed: int = 0
    truncated: int = 0
    """Answers in the output that were cut off."""
    outage: tuple[float, float] = (0.0, 0.0)
    """When it began and ended, where there was one."""


def used(books: Books, bucket: str, since: float, until: float) -> float:
    """What was used of a bucket, by when requests were charged and tokens were settled."""
    which = RESOURCES.index(bucket)
    total = 0.0
    for one in books.booked:
        at = one.arrived if which == 0 else one.left
        if one.charged and at is not None and since < at <= until:
            total += one.used[which]
    return total


def share(books: Books, bucket: str, since: float) -> float:
    """Used over allowed, from the first look at the buckets after a moment to the last one before the end.

    Allowed is what the bucket held at first and what flowed in, less what was others'.
    """
    levels = [level for level in books.levels if since <= level.at <= books.seconds]
    flowed = sum(
        (after.at - before.at) / 60 * before.limits[bucket] * (1 - before.others) for before, after in pairwise(levels)
    )
    allowed = max(0.0, levels[0].there[bucket]) + flowed
    return used(books, bucket, levels[0].at, levels[-1].at) / allowed


def refused(books: Books, since: float) -> float:
    """Refusals over requests, of those that arrived from a moment on."""
    arrived = [one for one in books.booked if since < one.arrived <= books.seconds]
    return sum(one.status == 429 for one in arrived) / max(1, len(arrived))


def busy(books: Books, since: float, until: float) -> float:
    """The share of the time of all places in which they served."""
    levels = [level for level in books.levels if since <= level.at <= until]
    best = sum((after.at - before.at) * before.places for before, after in pairwise(levels))
    since, until = levels[0].at, levels[-1].at
    served = sum(
        max(0.0, min(until, one.left) - max(since, one.served))
        for one in books.booked
        if one.served is not None and one.left is not None
    )
    return served / best


def sent_after_refusal(books: Books, start: float, stop: float) -> int:
    """Requests sent between the first failure after `start` came back, and `stop`."""
    first = min(_failures(books.sent, start), default=math.inf)
    return sum(first < one.at < stop for one in books.sent)


def sent_beyond_window(books: Books, start: float, stop: float) -> int:
    """Requests sent between `start` and `stop`, less the window at the start."""
    window = [one.window for one in books.seen if one.at <= start][-1]
    return sum(start <= one.at < stop for one in books.sent) - window


def full_rate_after(books: Books, bucket: str, stop: float) -> float:
    """Seconds from `stop` to the end of the first span in which 95 % of what flows in was used."""
    enough = 0.95 * books.levels[-1].limits[bucket] * SPAN / 60
    at = stop + SPAN
    while at <= books.seconds:
        if used(books, bucket, at - SPAN, at) >= enough:
            return at - stop
        at += 1
    return math.inf


def wait_ratio(books: Books, long: Collection[int]) -> float:
    """The median wait of the long rows over that of the others, among the rows up to where most of these were answered.

    A row among them that was not answered waits for ever.
    """
    others = sorted(row for row in books.waited if row not in long)
    up_to = others[len(others) * 9 // 10]
    waits = [books.waited.get(row, math.inf) for row in long if row <= up_to]
    usual = statistics.median(books.waited.get(row, math.inf) for row in range(up_to + 1) if row not in long)
    return statistics.median(waits) / usual if usual else math.inf


def best_two_caps(books: Books, pairs: Sequence[tuple[int, int]], limit: float, first: int) -> float:
    """Rows a minute after the first ones over those of the best two fixed caps, where `limit` tokens flow in a minute.

    `pairs` are each row's prompt and completion tokens. The two caps are found by trying all, with the lengths of the
    very rows that were answered: the first, and that of the longest answer for those that it cuts off.
    """
    ended = {one.row: one.ended for one in books.sent if one.ended is not None}
    done = sorted((ended[row], row) for row in books.waited)
    rows = [pairs[row] for _, row in done[first:]]
    most, prompts = max(completion for _, completion in rows), sum(prompt for prompt, _ in rows)
    longest = sorted(rows, key=lambda row: row[1], reverse=True)
    charged, again = [], 0.0
    for prompt, completion in longest:
        charged.append(prompts + len(rows) * completion + again)  # of those that are as long, the last one counts
        again += prompt + most
    return min(charged) / limit / ((done[-1][0] - done[first - 1][0]) / 60)


def _failures(sent: Sequence[Sent], since: float) -> Iterable[float]:
    return (one.ended for one in sent if one.failure and one.ended is not None and one.ended >= since)
