"""One dispatcher decides who goes next: pure state, told what happened and when; it never waits itself."""

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

from batcher.records import Failure, Kind, KnownLimit, Limit, Turn, Usage
from batcher.schedule.budget import Budget
from batcher.schedule.cap import Caps
from batcher.schedule.capacity import Breaker, Window
from batcher.schedule.deadline import Deadline
from batcher.schedule.lane import Lane, no_room
from batcher.schedule.quota import Amounts

AUTO_START = 8
AUTO_CEILING = 1024
RETRY_BUDGET = 500.0
"""Retries draw about 5 each and get it back when they are answered; every answer gives 0.5, every second 1."""
FEW_WAITING, MOST_WAITING = 256, 10_000
"""Rows that should wait of each model, where its window is not larger; and that may wait of all where some has few."""
_ONE = (1.0, 0.0, 0.0)
_MOST_IN_FLIGHT = "schedule.max_in_flight"


class Pace(NamedTuple):
    """What the job says of its own speed; None says nothing. Rates are per minute, of each model and tier."""

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
    marks: Amounts
    """What had been charged in all of each resource when it went: headers are read against it."""
    exceeds: str | None = None
    """The limit that is smaller than this request alone: it is not to be sent."""


class Pressure(NamedTuple):
    """What the dispatcher is doing, for people: counts, and the name of what binds."""

    in_flight: int
    window: int
    fresh: int
    retrying: int
    binds: str
    """What held the last request back that could not go: a word of docs/scheduling.md."""


class Decision(NamedTuple):
    """Something that was decided for all that follow, and why: a line of the trace."""

    at: float
    what: str


class Dispatcher:
    """Which request may go, and when. All times are monotonic seconds, passed in.

    Rows of each model and tier stand in a lane of their own; lanes take turns.
    """

    def __init__(
        self,
        pace: Pace,
        ceiling: int,
        now: float,
        *,
        budget: Budget | None = None,
        memory: float = inf,
        known: Sequence[KnownLimit] = (),
        learns_caps: bool = False,
        tiers: Sequence[str] = (),
        deadline: Deadline | None = None,
        trace: Callable[[Decision], None] | None = None,
    ) -> None:
        """`ceiling` bounds what is in flight whatever the job says: open files, workers; `memory` bounds its bytes.

        `budget` bounds what may be spent, `known` are limits from an earlier run; `trace` is told the decisions.
        With `learns_caps` every request that goes gets its output cap here. What the first of `tiers` has no room for
        goes to the next ones; with a `deadline` only to those that it has opened.
        """
        self._budget = budget
        self.in_flight = 0
        self.sent = 0
        """Requests that were let go."""
        self.ceiling = min(pace.max_in_flight or AUTO_CEILING, ceiling)
        self._start = min(pace.max_in_flight or AUTO_START, ceiling)
        self._rates = (pace.requests, pace.tokens, pace.uncached_tokens)
        self._known = known
        self._learns_caps = learns_caps
        self._bounds: tuple[int | None, int | None] = (None, None)
        self._trace = trace
        self._tiers, self._several = tuple(tiers), len(tiers) > 1
        self._deadline = deadline
        self._most_open = 1
        self._latency = 0.0
        """Seconds that answers take, for the deadline."""
        self._memory, self._bytes = memory, 0
        self._lanes: dict[tuple[str, str | None], Lane] = {}
        self._order: list[Lane] = [self._open("", None, now)]
        self._next = 0
        self._pushed = 0
        self._waiting = 0
        self._retries = RETRY_BUDGET
        self._retries_at = now
        self._blocked_until = now
        self._blocked_by = ""
        self._at_ceiling = "open files" if ceiling < (pace.max_in_flight or AUTO_CEILING) else _MOST_IN_FLIGHT
        self._binds, self._bound_since = "input", now
        self._held: dict[str, float] = {}
        self._now = now

    # What happens

    def offer(self, turns: Sequence[Turn]) -> None:
        """Rows that were never asked."""
        self._waiting += len(turns)
        for turn in turns:
            self._lane(turn).fresh.append(turn)

    def again(self, turn: Turn, cost: float) -> None:
        """A row that is to be asked again from `turn.ready` on; `cost` is drawn from the retry budget as it goes."""
        self._pushed += 1
        self._waiting += 1
        if self._several:
            turn.request = turn.request.on(self._tiers[0])
        self._lane(turn).push(turn, self._pushed, cost)

    def take(self, now: float) -> Ticket | float | None:
        """The next request with the right to send it; or the moment to ask again; or None: when something happened."""
        self._now = now
        lanes = self._order
        if not self._waiting:
            self._bind("input", now)
            return None
        if self.in_flight >= self.window_size:
            self._bind(self._full(), now)
            return None
        if self._blocked_until > now:
            self._bind(self._blocked_by, now)
            return self._blocked_until
        for_retries = self._for_retries(now)
        soonest, why = inf, ""
        for number in range(self._next, self._next + len(lanes)):
            lane = lanes[number % len(lanes)]
            if lane.fresh or lane.again or lane.groups.held:
                granted = self._from(lane, for_retries, now)
                if isinstance(granted, Ticket):
                    self._next = (number + 1) % len(lanes)
                    return granted
                at, what = granted
                if at < soonest or not why:
                    soonest, why = at, what
        self._bind(why, now)
        return None if soonest == inf else soonest

    def answered(self, ticket: Ticket, usage: Usage, queue_time: float | None, now: float) -> None:
        """A request was answered: settle what it used, let the window grow."""
        self._retries = min(RETRY_BUDGET, self._retries + ticket.cost + 0.5)
        self._bytes -= len(ticket.turn.request.body)
        amounts = (1.0, ticket.tokens, ticket.uncached)
        self._lane(ticket.turn).answered(ticket.turn, amounts, usage, queue_time, ticket.sent, now)
        if ticket.turn.group is not None:
            self._back(ticket.turn, True)
        if self._deadline is not None:
            self._deadline.answered(self._tier(ticket.turn))
            self._latency += 0.01 * (now - ticket.sent - self._latency)

    def failed(self, ticket: Ticket, failure: Failure, now: float) -> None:
        """A request failed: give back what it did not use, and slow down for all as the refusal asks."""
        self._bytes -= len(ticket.turn.request.body)
        amounts = (1.0, ticket.tokens, ticket.uncached)
        self._lane(ticket.turn).failed(failure, ticket.turn, amounts, ticket.sent, ticket.marks, now)
        if ticket.turn.group is not None:
            self._back(ticket.turn, failure.kind is Kind.TRUNCATED)

    def may_be_longer(self, ticket: Ticket, usage: Usage | None) -> bool:
        """Whether an answer that was cut off at its learned cap may end with a larger one."""
        return self._lane(ticket.turn).may_be_longer(ticket.turn, usage)

    def bound(self, output: int | None, context: int | None) -> None:
        """The service says how many tokens its model writes at most, and has room for with the prompt."""
        self._bounds = output, context
        for lane in self._order:
            if lane.caps is not None:
                lane.caps.bound(output, context)

    def landed(self, count: int) -> None:
        """What came of this many requests is durable: only now others go in their place."""
        self.in_flight -= count

    def limits(self, limits: Sequence[Limit], ticket: Ticket, now: float) -> None:
        """What the service's headers say of its buckets, written for this ticket's request."""
        self._lane(ticket.turn).quota.told(limits, ticket.sent, ticket.marks, now)

    def left(self, rows: int, now: float) -> None:
        """So many rows are not done yet: decide again which tiers are needed, where there is a deadline."""
        if self._deadline is None or (opened := self._deadline.look(rows, self._latency, now)) is None:
            return
        if opened > self._most_open and self._trace is not None:  # it closes and opens again many times
            self._most_open = opened
            self._trace(Decision(now, f"{self._tiers[opened - 1]} is needed for the deadline: {rows:,} rows are left"))

    def pause(self, until: float, why: str) -> None:
        """Nothing goes before `until`."""
        if until > self._blocked_until:
            self._blocked_until, self._blocked_by = until, why

    # What is seen

    @property
    def window(self) -> Window:
        """The window of the model that was asked first: the only one, as a rule."""
        return self._order[0].window

    @property
    def breaker(self) -> Breaker:
        """The breaker of the model that was asked first: the only one, as a rule."""
        return self._order[0].breaker

    @property
    def window_size(self) -> int:
        """How many may be in flight now, of all models together."""
        if len(self._order) == 1:
            return int(self._order[0].window.size)
        return min(self.ceiling, sum([int(lane.window.size) for lane in self._order]))

    @property
    def down_since(self) -> float | None:
        """Since when nothing answers, whatever the model."""
        since = [lane.breaker.open_since for lane in self._order]
        return None if None in since else max(at for at in since if at is not None)

    def is_down(self, turn: Turn) -> bool:
        """Whether the service does not answer requests for this one's model."""
        return self._lane(turn).breaker.open_since is not None

    def elsewhere(self, turn: Turn, failure: Failure) -> int:
        """The place of the tier that a row may go to at once, as the one that it went to had no room; 0: none."""
        tier = self._tier(turn) + 1
        return tier if self._deadline is None and no_room(failure) and tier < len(self._tiers) else 0

    def opens(self) -> bool:
        """Open one more tier, whatever the deadline needs: those that are open have no quota. False: all are."""
        if self._deadline is None or self._deadline.open >= len(self._tiers):
            return False
        self._deadline.open = self._deadline.least = self._deadline.open + 1
        return True

    def has_quota(self, turn: Turn, now: float) -> bool:
        """Whether some tier of a list has quota for a row within the hour."""
        lanes = [self._lanes[turn.request.model, tier] for tier in self._tiers] if self._several else []
        return any(max(lane.waits_until, lane.quota.ready(_ONE, now)[0]) < now + 3600.0 for lane in lanes)

    @property
    def reuse(self) -> float:
        """What caches had of what they should have had of rows whose groups do not go together, as a share."""
        return min(lane.sizes.reuse for lane in self._order)

    @property
    def waiting(self) -> int:
        """Rows that were never sent yet."""
        return sum([lane.waiting for lane in self._order])

    def hungry(self, most: float = inf) -> bool:
        """Whether more rows are wanted: some model has few, and all together have no more than `most`.

        Rows that wait for others of their group are not counted among the few: rows of other groups may go.
        """
        if len(self._order) == 1:
            lane = self._order[0]
            return len(lane.fresh) <= max(FEW_WAITING, int(lane.window.size)) and lane.waiting <= most
        few = any(
            len(lane.fresh) <= max(FEW_WAITING, int(lane.window.size))
            for (_, tier), lane in self._lanes.items()
            if tier not in self._tiers[1:]
        )
        return few and self.waiting <= min(most, MOST_WAITING)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not (self.in_flight or self._waiting)

    @property
    def out_of_rows(self) -> bool:
        """Whether nothing is in flight, and nothing goes but what the budget has no money for."""
        return not self.in_flight and (self.idle or (self._budget is not None and self._budget.reached))

    def pressure(self) -> Pressure:
        """The state in numbers and a word."""
        again = sum(len(lane.again) for lane in self._order)
        return Pressure(self.in_flight, self.window_size, self.waiting, again, self._binds)

    def held(self, now: float) -> dict[str, float]:
        """Seconds that each thing held requests back since this was last asked."""
        self._note_held(now)
        held, self._held = self._held, {}
        return held

    def used(self, now: float) -> dict[str, float]:
        """By the names of the buckets: which share of it is used up, 0 to 1."""
        return {name + lane.name: used for lane in self._order for name, used in lane.quota.used(now).items()}

    def known(self) -> list[KnownLimit]:
        """What was found out about the service's limits, to be remembered for the next run; without its host."""
        return [limit for (model, tier), lane in self._lanes.items() for limit in lane.quota.known(model, tier)]

    # How it is reckoned

    def _lane(self, turn: Turn) -> Lane:
        request = turn.request
        lane = self._lanes.get((request.model, request.tier))
        return lane or self._begin(request.model, request.tier)

    def _begin(self, model: str, tier: str | None) -> Lane:
        """The lane of a model that was not asked before."""
        if not self._lanes:
            self._order.clear()
        lane = self._lanes[model, tier] = self._open(model, tier, self._now)
        self._order.append(lane)
        if self._several and tier == self._tiers[0]:
            lane.below = [self._begin(model, other) for other in self._tiers[1:]]
        if len(self._order) > 1:
            for (name, asked), each in self._lanes.items():
                each.name = f" of {name}" + (f" ({asked})" if asked else "")
        return lane

    def _open(self, model: str, tier: str | None, now: float) -> Lane:
        known = [limit for limit in self._known if (limit.model, limit.tier) == (model, tier)]

        def note(at: float, what: str) -> None:
            if self._trace is not None:
                self._trace(Decision(at, what + lane.name))

        caps = Caps() if self._learns_caps else None
        if caps is not None:
            caps.bound(*self._bounds)
        lane = Lane(Window(self._start, self.ceiling, now), self._rates, known, caps, note, now)
        return lane

    @property
    def _open_tiers(self) -> int:
        """How many of the tiers, from the first, rows may go to."""
        return len(self._tiers) if self._deadline is None else self._deadline.open

    def _tier(self, turn: Turn) -> int:
        """The place of the tier that a row went to, in the list of them."""
        return self._tiers.index(str(turn.request.tier)) if self._several else 0

    def _back(self, turn: Turn, answered: bool) -> None:
        """Something came of a row: those of its group that wait for it may go."""
        home = self._lanes[turn.request.model, self._tiers[0] if self._several else turn.request.tier]
        home.groups.ended(turn, answered, home.fresh)

    def _from(self, lane: Lane, for_retries: float, now: float) -> Ticket | tuple[float, str]:
        """The next request of a lane; or from when on one may go, inf where something must happen first, and why."""
        granted = self._through(lane, lane, 0, True, False, for_retries, now)
        if not lane.below or isinstance(granted, Ticket):
            return granted
        # A window that congestion has not bounded yet is no sign that there is no room.
        spills = self._deadline is not None or lane.window.bounded or lane.out < int(lane.window.size)
        for tier, below in enumerate(lane.below, 1):
            never = granted[0] <= now
            if tier < self._open_tiers or never:
                other = self._through(below, lane, tier, spills or never, never, for_retries, now)
                if isinstance(other, Ticket):
                    return other
                granted = other if never or other[0] < granted[0] else granted
        return granted

    def _through(
        self, lane: Lane, rows: Lane, tier: int, spills: bool, never: bool, for_retries: float, now: float
    ) -> Ticket | tuple[float, str]:
        """The next request to this lane's tier of the rows that stand in another one; else as `_from`.

        `never` says that no earlier tier can take it. A moment that is not later than now says so for this one.
        """
        if lane.out >= int(lane.window.size):
            return inf, "capacity" + lane.name
        down = lane.breaker.doubtful
        if down and (probe := lane.breaker.ready(now, lane.out)) > now:
            return max(probe, lane.waits_until), "outage"
        if lane.waits_until > now:
            return lane.waits_until, "the service's wait"
        found = rows.next(now, for_retries, tier, spills)
        if found is None:
            at, what = rows.soonest(lambda cost: self._retries_at + cost - self._retries)
            return inf if tier else at, what  # the first tier says when
        turn, cost = found
        if lane.caps is not None:
            lane.cap(turn, lane.caps, now)
        amounts = lane.amounts(turn, turn.group is not None and rows.groups.follows(turn, now))
        at, what = lane.quota.ready(amounts, now)
        if tier and at > now:
            return at, what + lane.name  # before its body is made
        request = turn.request.on(self._tiers[tier]) if self._several else turn.request
        if self._budget is not None and not self._budget.affords(request):
            later = self._tiers[tier + 1 : self._open_tiers] if rows.below else ()
            cheaper = any(self._budget.affords(turn.request.on(other)) for other in later)
            if (tier and not never) or cheaper or not self._budget.skips(request):
                return inf, "budget"
            rows.drop(turn)
            self._waiting -= 1
            waits = rows.waiting or rows.again
            return self._through(lane, rows, tier, spills, never, for_retries, now) if waits else (inf, "budget")
        size = len(request.body)
        if self._bytes + size > self._memory and self._bytes:
            return inf, "memory"
        if amounts[1] >= lane.quota.fits and (exceeds := lane.quota.exceeded(amounts)):
            if tier < len(rows.below):
                return now, exceeds + lane.name
            rows.drop(turn)
            self._waiting -= 1
            self.in_flight += turn.attempt > 1  # a row that was never sent takes no place
            return Ticket(turn, now, amounts[1], amounts[2], 0.0, False, (0.0, 0.0, 0.0), exceeds)
        if at > now:
            return at, what + lane.name
        rows.drop(turn)
        turn.request = request
        self._waiting -= 1
        self._retries -= cost
        marks = lane.quota.charge(amounts, now)
        if self._budget is not None:
            self._budget.lease(turn)
        lane.out += 1
        if turn.group is not None:
            rows.groups.sent(turn, now)
        self._bytes += size
        self.sent += 1
        self.in_flight += 1
        if self.in_flight >= self.ceiling:
            self._bind(self._at_ceiling, now)  # every worker is out now, and nobody will ask
        lane.breaker.sent(now)
        if down:
            for other in self._order:  # one probe at a time, whatever the model
                if other.breaker.open_since is not None:
                    other.breaker.sent(now)
        return Ticket(turn, now, amounts[1], amounts[2], cost, down, marks)

    def _bind(self, what: str, now: float) -> None:
        """From now on this holds requests back; until now it was what was said last."""
        if what != self._binds:
            self._note_held(now)
            self._binds = what

    def _note_held(self, now: float) -> None:
        self._held[self._binds] = self._held.get(self._binds, 0.0) + now - self._bound_since
        self._bound_since = now

    def _full(self) -> str:
        return self._at_ceiling if self.window_size >= self.ceiling else "capacity"

    def _for_retries(self, now: float) -> float:
        """What there is for retries."""
        self._retries = min(RETRY_BUDGET, self._retries + now - self._retries_at)
        self._retries_at = now
        return self._retries + 1e-9
