"""One dispatcher decides who goes next: pure state, told what happened and when; it never waits itself."""

import heapq
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from batcher.records import Failure, Kind, Limit, Turn, Usage
from batcher.schedule.budget import Budget
from batcher.schedule.capacity import Breaker, Window
from batcher.schedule.quota import Bucket

AUTO_START = 8
AUTO_CEILING = 1024
FIRST_OUTPUT_GUESS = 500.0
"""Completion tokens to expect of a request without an output cap, until answers have told."""
MOST_RESERVED = 16_384.0
"""What Cerebras was seen to reserve for the answer of a request without an output cap."""
RETRY_BUDGET = 500.0
"""Retries draw about 5 each and get it back when they are answered; every answer gives 0.5, every second 1."""

_CONGESTION = {Kind.OVERLOADED, Kind.UNAVAILABLE, Kind.DISCONNECTED, Kind.TIMEOUT, Kind.REQUEST_TIMEOUT}
_UNREACHABLE = {Kind.CONNECTION, Kind.CONNECT_TIMEOUT, Kind.DNS}
_BROKEN = {*_UNREACHABLE, Kind.UNAVAILABLE, Kind.SERVER_ERROR, Kind.DISCONNECTED, Kind.TIMEOUT, Kind.REQUEST_TIMEOUT}
_TELLS_NOTHING = {Kind.STALE_CONNECTION, Kind.LOCAL_RESOURCES}
"""Failures from which nobody learns whether the service answers."""
_ASKED_TO_WAIT = {Kind.RATE_LIMITED, Kind.DAY_QUOTA}
_NOT_CONSUMED = {*_UNREACHABLE, Kind.RATE_LIMITED, Kind.OVERLOADED, Kind.DAY_QUOTA, Kind.LOCAL_RESOURCES}


_RESOURCES = ("requests", "tokens", "uncached_tokens")
_MOST_IN_FLIGHT = "schedule.max_in_flight"


class Pace(NamedTuple):
    """What the job says of its own speed; None and "auto" say nothing. Rates are per minute."""

    max_in_flight: int | None = None
    requests: float | None = None
    tokens: float | None = None
    uncached_tokens: float | None = None


class Ticket(NamedTuple):
    """The right to send one request, and what was charged for it: to the buckets, and to the retry budget."""

    turn: Turn
    sent: float
    tokens: float
    uncached: float
    cost: float
    probe: bool
    """Whether it goes to see if an outage is over."""
    marks: tuple[float, float, float]
    """What had been charged in all of each of `_RESOURCES` when it went: headers are read against it."""


class Pressure(NamedTuple):
    """What the dispatcher is doing, for people: counts, and the name of what binds."""

    in_flight: int
    window: int
    fresh: int
    retrying: int
    binds: str
    """What held the last request back that could not go: a word of docs/scheduling.md."""


class Dispatcher:
    """Which request may go, and when. All times are monotonic seconds, passed in."""

    def __init__(self, pace: Pace, ceiling: int, now: float, budget: Budget | None = None) -> None:
        """`ceiling` bounds the window whatever the job says: open files, workers."""
        self._budget = budget
        self.in_flight = 0
        start = min(pace.max_in_flight or AUTO_START, ceiling)
        self.window = Window(start, min(pace.max_in_flight or AUTO_CEILING, ceiling), now)
        self.breaker = Breaker()
        self._fresh: deque[Turn] = deque()
        self._again: list[tuple[float, int, float, Turn]] = []
        self._order = 0
        self._retries = RETRY_BUDGET
        self._retries_at = now
        self._blocked_until = now
        self._blocked_by = ""
        self._own = [
            (resource, Bucket.within(f"schedule.{resource}_per_minute", limit, now))
            for resource in _RESOURCES
            if (limit := getattr(pace, resource)) is not None
        ]
        self._theirs: dict[tuple[str, float], Bucket] = {}
        self._spent = [0.0, 0.0, 0.0]
        self._prompt_ratio = 1.0
        self._output_guess = FIRST_OUTPUT_GUESS
        self._reserved = 0.0
        self._cached_share = 0.0
        self._refusals = 0
        self._refused_at = now
        self._at_ceiling = "open files" if ceiling < (pace.max_in_flight or AUTO_CEILING) else _MOST_IN_FLIGHT
        self._binds, self._bound_since = "input", now
        self._held: dict[str, float] = {}

    # What happens

    def offer(self, turns: Sequence[Turn]) -> None:
        """Rows that were never asked."""
        self._fresh.extend(turns)

    def again(self, turn: Turn, cost: float) -> None:
        """A row that is to be asked again from `turn.ready` on; `cost` is drawn from the retry budget as it goes."""
        self._order += 1
        heapq.heappush(self._again, (turn.ready, self._order, cost, turn))

    def take(self, now: float) -> Ticket | float | None:
        """The next request with the right to send it; or the moment to ask again; or None: when something happened."""
        if not self._fresh and not self._again:
            self._bind("input", now)
            return None
        if self.in_flight >= int(self.window.size):
            self._bind(self._full(), now)
            return None
        until = max(self._blocked_until, self.breaker.ready(now))
        if until > now:
            self._bind("outage" if self.breaker.open_since is not None else self._blocked_by, now)
            return until
        retry = bool(self._again) and self._again[0][0] <= now and self._affords(self._again[0][2], now)
        if retry and self._fresh and self.breaker.open_since is not None:
            retry = False  # rows that have not failed yet make the probes: an outage must not use up anyone's attempts
        if not retry and not self._fresh:
            ready, _, cost, _ = self._again[0]
            self._bind("retries", now)
            return max(ready, self._retries_at + cost - self._retries)
        _, _, cost, turn = self._again[0] if retry else (0.0, 0, 0.0, self._fresh[0])
        if self._budget is not None and not self._budget.affords(turn.request):
            self._bind("budget", now)
            if not self._budget.skips(turn.request):
                return None
            if retry:
                heapq.heappop(self._again)
            else:
                self._fresh.popleft()
            return self.take(now)
        tokens = self._estimate(turn)
        uncached = tokens * (1 - self._cached_share)
        for resource, bucket in self._buckets():
            at = bucket.ready(_charge(resource, tokens, uncached), now)
            if at > now:
                self._bind(bucket.name, now)
                return at
        if retry:
            heapq.heappop(self._again)
            self._retries -= cost
        else:
            self._fresh.popleft()
        for resource, bucket in self._buckets():
            bucket.charge(_charge(resource, tokens, uncached), now)
        if self._budget is not None:
            self._budget.lease(turn)
        self._spent[0] += 1
        self._spent[1] += tokens
        self._spent[2] += uncached
        self.in_flight += 1
        if self.in_flight >= self.window.ceiling:
            self._bind(self._at_ceiling, now)  # every worker is out now, and nobody will ask
        self.breaker.sent(now)
        probe = self.breaker.open_since is not None
        return Ticket(turn, now, tokens, uncached, cost, probe, (self._spent[0], self._spent[1], self._spent[2]))

    def answered(self, ticket: Ticket, usage: Usage, queue_time: float | None, now: float) -> None:
        """A request was answered: settle what it used, let the window grow."""
        self.window.answered(self.in_flight, queue_time, now)
        self._refusals = 0
        self._retries = min(RETRY_BUDGET, self._retries + ticket.cost + 0.5)
        if self.breaker.observe(False, self.in_flight, now):
            self.window.restart(now)
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        if prompt is None or completion is None:
            return
        self._prompt_ratio += 0.05 * (prompt / ticket.turn.request.prompt_tokens - self._prompt_ratio)
        self._output_guess += 0.05 * (completion - self._output_guess)
        self._cached_share += 0.05 * ((usage.cached_tokens or 0) / max(1, prompt) - self._cached_share)
        for resource, bucket in self._buckets():
            if resource != "requests":
                used = prompt + completion - (usage.cached_tokens or 0 if resource == "uncached_tokens" else 0)
                bucket.charge(used - _charge(resource, ticket.tokens, ticket.uncached), now)

    def failed(self, ticket: Ticket, failure: Failure, now: float) -> None:
        """A request failed: give back what it did not use, and slow down for all as the refusal asks."""
        kind = failure.kind
        if kind in _CONGESTION and self.breaker.open_since is None:
            self.window.congested(ticket.sent, now)
        elif kind is Kind.LOCAL_RESOURCES:
            self.window.congested(ticket.sent, now, 0.5)
        if kind not in _TELLS_NOTHING:
            out_of_many = 0 if kind in _UNREACHABLE else self.in_flight
            if self.breaker.observe(kind in _BROKEN, out_of_many, now):
                self.window.restart(now)
        if kind in _NOT_CONSUMED:
            for resource, bucket in self._buckets():
                bucket.charge(-_charge(resource, ticket.tokens, ticket.uncached), now)
        self.limits(failure.limits, ticket, now)
        if kind in _ASKED_TO_WAIT:
            self._refused(failure, ticket, now)
        elif failure.retry_after is not None and kind in _CONGESTION:
            self.pause(now + min(failure.retry_after, 3600.0), "the service's wait")

    def landed(self, count: int) -> None:
        """What came of this many requests is durable: only now others go in their place."""
        self.in_flight -= count

    def limits(self, limits: Sequence[Limit], ticket: Ticket, now: float) -> None:
        """What the service's headers say of its buckets, written for this ticket's request."""
        for limit in limits:
            if limit.limit is None or limit.remaining is None:
                continue
            bucket = self._their(limit, now)
            which = _RESOURCES.index(limit.resource)
            bucket.correct(limit, ticket.sent, self._spent[which] - ticket.marks[which], now)

    def pause(self, until: float, why: str) -> None:
        """Nothing goes before `until`."""
        if until > self._blocked_until:
            self._blocked_until, self._blocked_by = until, why

    # What is seen

    @property
    def waiting(self) -> int:
        """Rows that were never sent yet."""
        return len(self._fresh)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not (self._fresh or self._again or self.in_flight)

    @property
    def out_of_rows(self) -> bool:
        """Whether nothing is in flight, and nothing goes but what the budget has no money for."""
        return not self.in_flight and (self.idle or (self._budget is not None and self._budget.reached))

    def pressure(self) -> Pressure:
        """The state in numbers and a word."""
        return Pressure(self.in_flight, int(self.window.size), len(self._fresh), len(self._again), self._binds)

    @property
    def sent(self) -> int:
        """Requests that were let go."""
        return int(self._spent[0])

    def held(self, now: float) -> dict[str, float]:
        """Seconds that each thing held requests back since this was last asked."""
        self._note_held(now)
        held, self._held = self._held, {}
        return held

    def used(self, now: float) -> dict[str, float]:
        """By the names of the buckets: which share of it is used up, 0 to 1."""
        return {bucket.name: bucket.used(now) for _, bucket in self._buckets()}

    # How it is reckoned

    def _bind(self, what: str, now: float) -> None:
        """From now on this holds requests back; until now it was what was said last."""
        if what != self._binds:
            self._note_held(now)
            self._binds = what

    def _note_held(self, now: float) -> None:
        self._held[self._binds] = self._held.get(self._binds, 0.0) + now - self._bound_since
        self._bound_since = now

    def _full(self) -> str:
        return self._at_ceiling if int(self.window.size) >= self.window.ceiling else "capacity"

    def _refused(self, failure: Failure, ticket: Ticket, now: float) -> None:
        """A quota is used up: block what the refusal names, as long as it says; everything when it names nothing."""
        named = [limit for limit in failure.limits if limit.remaining is None or limit.remaining <= 0]
        if ticket.sent >= self._refused_at:  # what was in flight together is refused together, and counts once
            self._refused_at = now
            self._refusals = min(self._refusals + 1, 10)
            if not ticket.turn.request.output_tokens and any(limit.resource != "requests" for limit in named):
                # More is reserved for an answer without a cap than was charged here: refusals teach how much.
                self._reserved = min(2 * max(self._reserved, self._output_guess), MOST_RESERVED)
        guessed = self._refused_at + min(30.0, 0.5 * 2.0**self._refusals)
        stated = None if failure.retry_after is None else now + min(failure.retry_after, 86400.0)
        for limit in named:
            until = guessed if stated is None else stated
            if limit.reset is not None and limit.reset == failure.retry_after:
                # No Retry-After, but the moment when all is there again: a minute's bucket has something before that.
                until = min(until, guessed) if limit.window <= 60 else until
            self._their(limit, now).block(until)
        if not named:
            self.pause(guessed if stated is None else stated, "the service's wait")

    def _their(self, limit: Limit, now: float) -> Bucket:
        key = (limit.resource, limit.window)
        if key not in self._theirs:
            per = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day"}.get(limit.window, "window")
            name = f"{limit.resource.replace('_', ' ')} per {per}"
            self._theirs[key] = Bucket(name, None, limit.limit or 0.0, now)
        return self._theirs[key]

    def _buckets(self) -> list[tuple[str, Bucket]]:
        return self._own + [(resource, bucket) for (resource, _), bucket in self._theirs.items()]

    def _estimate(self, turn: Turn) -> float:
        request = turn.request
        return self._prompt_ratio * request.prompt_tokens + (
            request.output_tokens or max(self._output_guess, self._reserved)
        )

    def _affords(self, cost: float, now: float) -> bool:
        self._retries = min(RETRY_BUDGET, self._retries + now - self._retries_at)
        self._retries_at = now
        return self._retries >= cost - 1e-9


def _charge(resource: str, tokens: float, uncached: float) -> float:
    """What a request takes from a bucket of this resource."""
    return 1.0 if resource == "requests" else uncached if resource == "uncached_tokens" else tokens
