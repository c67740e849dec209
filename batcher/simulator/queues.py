"""Who is served now and who waits: the places of a replica, given to the tiers in their order."""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

TIERS = ("priority", "default", "flex")  # in the order in which they are served

_STALE = 64  # changes that a forecast outlives, besides a quarter of those who wait


@dataclass(slots=True, eq=False)
class Waiter:
    """One who waits to be served, for about so many seconds."""

    tier: str
    takes: float
    gone: bool = field(default=False, init=False)


_W = TypeVar("_W", bound=Waiter)


class Line(Generic[_W]):
    """The places of one replica and the queue before each tier: the first tier is served first, in order of arrival.

    `places` is how many are served at once, `own` how many of one tier; both at least 1, infinite where not bounded.
    It is told the time in order, and knows of each who is served when he will have been.
    """

    def __init__(self, places: float, own: dict[str, float]) -> None:
        self.waiting = 0
        self._places = places
        self._own = own
        self._busy: list[tuple[float, str]] = []  # heap: who is served, by when that ends
        self._served = dict.fromkeys(TIERS, 0)
        self._queues: dict[str, deque[_W]] = {tier: deque() for tier in TIERS}
        self._forecasts: dict[str, tuple[list[float] | None, list[float] | None]] = {}
        self._changes = 0

    @property
    def serving(self) -> int:
        """How many are served now."""
        return len(self._busy)

    def next(self) -> float:
        """When the next place will be free; infinity where all are."""
        return self._busy[0][0] if self._busy else math.inf

    def resize(self, places: float, own: dict[str, float]) -> None:
        """Have more places from now on, or fewer as they become free."""
        if (places, own) != (self._places, self._own):
            self._places, self._own = places, own
            self._forecasts.clear()

    def release(self, now: float) -> None:
        """Free the places of those who have been served by now."""
        while self._busy and self._busy[0][0] <= now:
            self._served[heapq.heappop(self._busy)[1]] -= 1

    def free(self, tier: str) -> bool:
        """Whether one of this tier would be served at once."""
        return len(self._busy) < self._places and self._served[tier] < self._own[tier]

    def occupy(self, tier: str, until: float, called: bool = False) -> None:
        """One is served until then, who was called or did not wait."""
        heapq.heappush(self._busy, (until, tier))
        self._served[tier] += 1
        if not self.waiting:
            self._forecasts.clear()
        elif not called:  # a tier that waits for places of its own finds one of all taken
            for other in TIERS[TIERS.index(tier) :]:
                shared, _ = self._forecasts.get(other, (None, None))
                if shared:
                    heapq.heapreplace(shared, until)

    def join(self, waiter: _W, now: float) -> None:
        """One more waits."""
        for tier in TIERS[TIERS.index(waiter.tier) :]:
            forecast = self._forecasts.get(tier)
            if forecast is not None:
                _plan(forecast, waiter, tier, now)
        self._queues[waiter.tier].append(waiter)
        self.waiting += 1

    def leave(self, waiter: _W) -> None:
        """One who has waited gives up."""
        if not waiter.gone:
            waiter.gone = True
            self.waiting -= 1
            self._changed()

    def call(self) -> _W | None:
        """The next who can be served now; he is to `occupy` his place."""
        if len(self._busy) >= self._places:
            return None
        for tier in TIERS:
            queue = self._queues[tier]
            while queue and queue[0].gone:
                queue.popleft()
            if queue and self._served[tier] < self._own[tier]:
                self.waiting -= 1
                self._changed()
                return queue.popleft()
        return None

    def wait(self, tier: str, now: float) -> float:
        """Seconds that one of this tier who comes now will wait, when nobody overtakes him."""
        if self.free(tier):
            return 0.0
        forecast = self._forecasts.get(tier)
        if forecast is None:
            forecast = self._forecasts[tier] = self._forecast(tier, now)
        return max(0.0, max((ends[0] for ends in forecast if ends), default=now) - now)

    def _changed(self) -> None:
        """Forecasts rest on how long serving takes about: now and then they are made anew."""
        self._changes += 1
        if not self.waiting or self._changes > _STALE + self.waiting / 4:
            self._changes = 0
            self._forecasts.clear()

    def _forecast(self, tier: str, now: float) -> tuple[list[float] | None, list[float] | None]:
        """When each place, and each of those that the tier has of its own, has nobody left to serve who goes first."""
        forecast = (
            _ends([end for end, _ in self._busy], self._places, now),
            _ends([end for end, whose in self._busy if whose == tier], self._own[tier], now),
        )
        for first in TIERS[: TIERS.index(tier) + 1]:
            for waiter in self._queues[first]:
                if not waiter.gone:
                    _plan(forecast, waiter, tier, now)
        return forecast


def _ends(busy: list[float], places: float, now: float) -> list[float] | None:
    """When each place will be free, as a heap; None where there is no bound."""
    if places == math.inf:
        return None
    ends = sorted(busy)[max(0, len(busy) - int(places)) :] + [now] * max(0, int(places) - len(busy))
    heapq.heapify(ends)
    return ends


def _plan(forecast: tuple[list[float] | None, list[float] | None], waiter: Waiter, tier: str, now: float) -> None:
    """Give one who waits his place in a tier's forecast."""
    heaps = [ends for ends in (forecast[0], forecast[1] if waiter.tier == tier else None) if ends]
    end = max([now, *(ends[0] for ends in heaps)]) + waiter.takes
    for ends in heaps:
        heapq.heapreplace(ends, end)


class Average:
    """The mean of what was seen in the last `window` seconds."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._seen: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, value: float, now: float) -> None:
        """See one more."""
        self._seen.append((now, value))
        self._sum += value
        self._forget(now)

    def mean(self, now: float) -> float | None:
        """The mean; None where nothing was seen lately."""
        self._forget(now)
        return self._sum / len(self._seen) if self._seen else None

    def _forget(self, now: float) -> None:
        while self._seen and self._seen[0][0] <= now - self._window:
            self._sum -= self._seen.popleft()[1]
        if not self._seen:
            self._sum = 0.0
