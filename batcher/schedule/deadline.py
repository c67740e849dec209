"""A moment by which all rows should be done: which tiers of a list carry them, so that as few as possible go late."""

from collections.abc import Sequence
from math import exp

RESERVE = 0.5
"""The share of a later tier's speed that is counted on: it begins late, and can still double when others slow down."""
BAND = 0.01
"""The share by which rows that are too many must be too few again, before a tier is closed."""
MARGIN = 0.01
"""The share of the whole time that is left over at the end, for the last answers."""
LATENCIES = 4.0
"""The same in answers' times, where these are longer."""
SETTLING = 10.0
"""Seconds from which a tier's speed is known: windows begin small, and answers take their time."""
_MEMORY = 60.0
"""Seconds over which speed is measured, at most a tenth of what is left; of slow services, so many seconds are few."""
_FEW, _SHORT, _LONG = 20.0, 5.0, 30.0
"""Answers over which it is measured at least; and seconds, where these are as many, and where they are fewer."""


class Speed:
    """Answers per second, those of long ago counting less."""

    __slots__ = ("_count", "_known", "_span")

    def __init__(self) -> None:
        self._count = self._span = 0.0
        self._known = False

    @property
    def rate(self) -> float:
        """Answers per second; 0 until it is measured for long enough."""
        if not self._known:
            self._known = self._span >= _LONG or (self._span >= _SHORT and self._count >= _FEW)
        return self._count / self._span if self._known else 0.0

    def measured(self, count: int, seconds: float, left: float) -> None:
        """So many came in a time during which as many went as the tier takes; `left` are the seconds to the end."""
        memory = max(min(_MEMORY, left / 10), 2 * _SHORT, _FEW / self.rate if self.rate else _MEMORY)
        kept = exp(-seconds / memory)
        self._count = self._count * kept + count
        self._span = self._span * kept + seconds


class Deadline:
    """How many tiers of a list are open, decided again whenever it is told how many rows are left.

    The first tier is always open. The next one opens when more rows are left than the first will have answered by
    then and the next one can answer at half its speed: so late that a first tier which becomes quicker after all has
    cost few rows, and early enough for the other half to make up for one that becomes slower. Once it is open, that
    half of its speed is about what it runs at. While its speed is not known it opens as soon as the first one is too
    slow, which shows it.
    """

    def __init__(self, at: float, tiers: int, now: float) -> None:
        """`at` is the moment, of the same clock as `now`; without a list of tiers there is one."""
        self.at = at
        self.open = 1
        """Tiers, from the first, that rows may go to; and how many of them never close again."""
        self.least = 1
        self.late: float | None = None
        """Seconds after the moment at which all rows are done if all tiers are open; below 0: before; None: unknown."""
        self._begun = self._looked = now
        self._speeds = [Speed() for _ in range(max(1, tiers))]
        self._answers = [0] * len(self._speeds)
        self._since = [now] * len(self._speeds)
        """When each tier was opened; what comes first says little of its speed."""
        self._too_slow_since: float | None = None

    def answered(self, tier: int) -> None:
        """An answer came from the tier at this place of the list."""
        self._answers[tier] += 1

    def look(self, left: int, latency: float, now: float) -> int | None:
        """Decide by the rows that are left, and by how long answers take; the number of open tiers where it changes."""
        seconds, self._looked = now - self._looked, now
        aim = self.at - max(MARGIN * (self.at - self._begun), LATENCIES * latency) - now
        settling = max(SETTLING, 2 * latency)
        for tier, count in enumerate(self._answers):
            if tier < self.open and now - self._since[tier] >= settling + seconds:
                self._speeds[tier].measured(count, seconds, aim)
            self._answers[tier] = 0
        rates = [speed.rate for speed in self._speeds]
        if not rates[0] and now - self._begun < min(settling + _LONG, aim / 4):
            return None  # it is too early to say
        everything = sum(rates)
        self.late = now + left / everything - self.at if everything else None
        wanted = max(self.least, self._wanted(left, rates, aim))
        if wanted <= self.open:
            self._too_slow_since = None
        elif self._too_slow_since is None:
            self._too_slow_since = now
        patience = min(30.0, 0.02 * aim)
        if wanted < self.open or (self._too_slow_since is not None and now - self._too_slow_since >= patience):
            self.open = wanted if wanted < self.open else self.open + 1
            self._since[self.open - 1 :] = [now] * (len(self._since) - self.open + 1)
            self._too_slow_since = None
            return self.open
        return None

    def _wanted(self, left: int, rates: Sequence[float], aim: float) -> int:
        """How many tiers should be open."""
        if aim <= 0:
            return len(rates) if left else self.open
        carried = rates[0]
        for tier in range(1, len(rates)):
            reach = (carried + RESERVE * rates[tier]) * aim
            if left <= reach * (1 - BAND if tier < self.open else 1 + BAND):
                return tier
            carried += rates[tier]
        return len(rates)
