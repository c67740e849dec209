"""All that is decided for one model and tier by itself: its rows, its quota, its window, its outages."""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from math import inf

from batcher.records import Failure, Kind, KnownLimit, Limit, Turn, Usage
from batcher.schedule.cap import Caps
from batcher.schedule.capacity import Breaker, Window
from batcher.schedule.groups import Groups
from batcher.schedule.learning import Sizes
from batcher.schedule.quota import Amounts, Quota

CONGESTION = {Kind.OVERLOADED, Kind.UNAVAILABLE, Kind.DISCONNECTED, Kind.TIMEOUT, Kind.REQUEST_TIMEOUT}
_UNREACHABLE = {Kind.CONNECTION, Kind.CONNECT_TIMEOUT, Kind.DNS}
_LOST = {*_UNREACHABLE, Kind.UNAVAILABLE, Kind.DISCONNECTED, Kind.TIMEOUT, Kind.REQUEST_TIMEOUT}
_BROKEN = {*_LOST, Kind.SERVER_ERROR}
_TELLS_NOTHING = {Kind.STALE_CONNECTION, Kind.LOCAL_RESOURCES}
"""Failures from which nobody learns whether the service answers."""
_ASKED_TO_WAIT = {Kind.RATE_LIMITED, Kind.DAY_QUOTA}
_NO_ROOM = (Kind.RATE_LIMITED, Kind.DAY_QUOTA, Kind.OVERLOADED)
"""What one tier refuses with, and another may take."""
_NOT_CONSUMED = {*_UNREACHABLE, Kind.RATE_LIMITED, Kind.OVERLOADED, Kind.DAY_QUOTA, Kind.LOCAL_RESOURCES}


class Lane:
    """Rows of one model and tier in the order in which they go, and what holds them back."""

    def __init__(
        self,
        window: Window,
        own: Sequence[float | None],
        known: Sequence[KnownLimit],
        caps: Caps | None,
        note: Callable[[float, str], None],
        now: float,
    ) -> None:
        """`own` are the job's rates, `known` are limits from before; `note` is told what is decided, and when.

        With `caps` the requests' output caps are learned.
        """
        self.window = window
        self.breaker = Breaker()
        self.quota = Quota(own, known, note, now)
        self.sizes = Sizes()
        self.caps = caps
        self.groups = Groups()
        self.fresh: deque[Turn] = deque()
        self.again: list[tuple[float, int, float, Turn]] = []
        """A heap by when they are ready; then in order; with what each draws from the retry budget."""
        self.out = 0
        """Requests of which nothing has come yet."""
        self.name = ""
        """What is put behind the names of its limits where there are several models."""
        self.waits_until = now
        self.below: list[Lane] = []
        """The lanes of later tiers, to which rows go that find no room here."""
        self._good = self.window.size
        self._note = note

    def amounts(self, turn: Turn, follows: bool) -> Amounts:
        """What a request is charged before it is known what it takes; `follows`: another of its group went before."""
        tokens, uncached = self.sizes.estimate(turn.request, follows)
        return 1.0, tokens, uncached

    def cap(self, turn: Turn, caps: Caps, now: float) -> None:
        """Give the row that goes next the output cap that is best by now."""
        if caps.due:
            before = caps.next(0)
            caps.choose(self.quota.load())
            if caps.next(0) != before:
                self._note(now, f"output cap {caps.next(0):,}")
        turn.request = turn.request.capped(max(1, self._next_cap(turn, caps, turn.floor)))

    def may_be_longer(self, turn: Turn, usage: Usage | None) -> bool:
        """Whether an answer that was cut off may end with a larger cap: there is one, and it was the cap that cut."""
        cap = turn.request.output_tokens
        if usage is not None and usage.completion_tokens is not None and 2 * usage.completion_tokens < cap:
            return False  # the model's context was full
        return self.caps is not None and self._next_cap(turn, self.caps, cap) > 1.05 * cap

    def _next_cap(self, turn: Turn, caps: Caps, floor: int) -> int:
        """The cap for a row that was cut off at `floor`, no larger than what fits a whole limit, and the model."""
        tokens, uncached = self.sizes.estimate(turn.request)
        output = turn.request.output_tokens
        room = min(caps.context - tokens + output, self.quota.room(tokens - output, uncached - output))
        cap = caps.next(floor)
        return cap if cap <= room else int(room)

    @property
    def waiting(self) -> int:
        """Rows that were never sent yet."""
        return len(self.fresh) + self.groups.held

    def soonest(self, affordable: Callable[[float], float]) -> tuple[float, str]:
        """Where none may go yet: from when on one may, and what is waited for; `affordable` says when a cost is."""
        ready = inf
        if self.again:
            at, _, cost, turn = self.again[0]
            ready = max(at, affordable(cost), turn.barred)
        if self.groups.held and self.groups.until < ready:
            return self.groups.until, "groups"
        return ready, "retries"

    def push(self, turn: Turn, order: int, cost: float) -> None:
        """A row that is to be asked again."""
        heapq.heappush(self.again, (turn.ready, order, cost, turn))

    def next(self, now: float, budget: float, tier: int, spills: bool) -> tuple[Turn, float] | None:
        """The row that goes next to a tier and what it draws from the retry budget; None where none may yet.

        `tier` counts from this lane's; with `spills` the others take what it has no room for, without only rows that
        it has refused. Rows that are asked again go first, but for the probes of an outage: those are made by rows
        that have not failed yet, so that an outage uses up nobody's attempts.
        """
        fresh = self.fresh
        if self.groups.leading or (fresh and fresh[0].group is not None):
            first = self.groups.first(fresh, now)
        else:
            first = fresh[0] if fresh else None
        if self.again and self.again[0][0] <= now and self.again[0][2] <= budget:
            _, _, cost, turn = self.again[0]
            through = self.below[tier - 1] if tier else self
            earliest = turn.earliest if turn.barred > now else 0
            spared = first is not None and through.breaker.doubtful
            if not spared and earliest <= tier and (spills or not tier or earliest):
                return turn, cost
        return None if first is None or (tier and not spills) else (first, 0.0)

    def drop(self, turn: Turn) -> None:
        """The row that was next is on its way."""
        if self.fresh and self.fresh[0] is turn:
            self.fresh.popleft()
        else:
            heapq.heappop(self.again)

    def answered(
        self, turn: Turn, amounts: Amounts, usage: Usage, queue_time: float | None, sent: float, now: float
    ) -> None:
        """An answer came: settle what it used, let the window grow."""
        if self.caps is not None and usage.completion_tokens is not None:
            self.caps.ended(usage.completion_tokens, turn.floor)
        self._served(turn, amounts, usage, queue_time, sent, now)

    def _served(
        self, turn: Turn, amounts: Amounts, usage: Usage, queue_time: float | None, sent: float, now: float
    ) -> None:
        before = self.window.size
        self.window.answered(self.out, queue_time, now, now - sent)
        if self.window.size < before:
            self._note(now, f"window {before:.0f} to {self.window.size:.0f}: requests queue")
        self.quota.answered()
        if self.breaker.observe(False, self.out, now, sent=sent):
            self._back(now)
        self.out -= 1
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        if prompt is not None and completion is not None:
            followed = turn.group is not None and not turn.leads
            self.sizes.answered(turn.request, prompt, completion, usage.cached_tokens or 0, followed)
            if followed and turn.shares and usage.cached_tokens is not None:
                self.sizes.relied(usage.cached_tokens, turn.shares)
            used = prompt + completion
            self.quota.settle((0.0, amounts[1] - used, amounts[2] - used + (usage.cached_tokens or 0)), now)
            if self.caps is not None:
                self.caps.took(prompt, prompt - (usage.cached_tokens or 0), now - sent)

    def failed(self, failure: Failure, turn: Turn, amounts: Amounts, sent: float, marks: Amounts, now: float) -> None:
        """A request failed: give back what it did not use, and slow down as it says."""
        kind, before = failure.kind, self.window.size
        if kind is Kind.TRUNCATED and self.caps is not None:
            self.caps.cut(turn.request.output_tokens, turn.floor)
            self._served(turn, amounts, failure.usage or Usage(), None, sent, now)
            return
        # What went before an outage was over and is lost now, was lost to the outage.
        late = sent < self.breaker.closed_at
        if not self.breaker.doubtful:
            self._good = before
        if kind is Kind.LOCAL_RESOURCES:
            self.window.congested(sent, now, 0.5)
        elif kind in CONGESTION and self.breaker.open_since is None and not late:
            self.window.congested(sent, now)
        if self.window.size < before:
            self._note(now, f"window {before:.0f} to {self.window.size:.0f}: {kind}")
        if late and kind in _BROKEN:
            self.window.given_up()
        elif kind not in _TELLS_NOTHING:
            self._observe(kind in _BROKEN, kind, sent, now)
        self.out -= 1
        if kind in _NOT_CONSUMED:
            self.quota.give_back(amounts, now)
        self.quota.told(failure.limits, sent, marks, now)
        if kind in _ASKED_TO_WAIT:
            if not turn.request.output_tokens and self.quota.first(sent) and _names_tokens(failure.limits):
                self.sizes.refused()
            until = self.quota.refused(failure, amounts, sent, marks, now)
            self.waits_until = max(self.waits_until, until)
        elif failure.retry_after is not None and kind in CONGESTION:
            seconds = min(failure.retry_after, 3600.0)
            self.waits_until = max(self.waits_until, now + seconds)
            self._note(now, f"all wait for {seconds:.0f} s: {kind}")

    def _observe(self, broken: bool, kind: Kind, sent: float, now: float) -> None:
        """Tell the breaker how an attempt failed."""
        opened = self.breaker.open_since
        out_of = 0 if kind in _UNREACHABLE else self.out
        if self.breaker.observe(broken, out_of, now, kind in _LOST, sent):
            self._back(now)
        elif opened is None and self.breaker.open_since is not None:
            self._note(now, f"an outage begins: {kind}")

    def _back(self, now: float) -> None:
        self.window.restart(self._good, self.out - 1, now)
        self._note(now, "the outage is over")


def no_room(failure: Failure) -> bool:
    """Whether a tier had no room for a row, which another one may have."""
    return failure.kind in _NO_ROOM


def _names_tokens(limits: Sequence[Limit]) -> bool:
    """Whether a refusal is for want of tokens."""
    return any(limit.resource != "requests" and not limit.remaining for limit in limits)
