"""How much the service can digest: a window over what is in flight, and a breaker for when nothing answers."""

from collections import deque
from math import inf
from statistics import median

SPAN = 1.0
"""Seconds between judgements of the queue time, and at least between two cuts."""
SAMPLES = 20
REGROWTH = 15.0
"""Seconds after which a window is back where it was cut, if nothing happens meanwhile."""
SHORT = 0.1
"""Seconds that requests may queue while the window still grows: a queue that is never empty keeps the service busy."""
LONG = 0.5
"""Seconds of queueing that are congestion, unless they are usual."""


class Window:
    """How many requests may be in flight: slow start, quick regrowth, cuts on congestion only.

    As in TCP: doubling per round trip up to the last good size (RFC 5681), then along the cubic curve that has its
    flat place where it was cut (RFC 9438), and by one per round trip at least. As in TCP Vegas it does not grow
    while requests queue longer than is usual.
    """

    def __init__(self, start: int, ceiling: int, now: float) -> None:
        self.size = float(start)
        self.ceiling = ceiling
        self._good = self._peak = float(ceiling)
        self._cut_at = now - SPAN
        self._since_cut = [0, 0]
        """Answers since the last cut, and signs of congestion on what was sent after it."""
        self._span_from = now
        self._queued: list[float] = []
        self._latencies: list[float] = []
        self._calm = inf
        self._slow_spans = 0
        self._slow_at_cut: float | None = None
        """The queue time for which it was last cut: where a cut does not shorten it, it is not ours."""

    @property
    def bounded(self) -> bool:
        """Whether congestion has shown how many may be in flight."""
        return self._good < self.ceiling

    def answered(self, in_flight: int, queue_time: float | None, now: float, latency: float = 0.0) -> None:
        """An answer came while `in_flight` were out; `queue_time` is the service's own, both in seconds."""
        self._since_cut[0] += 1
        if in_flight >= 0.8 * int(self.size) and (queue_time is None or queue_time <= max(SHORT, 3 * self._calm)):
            if self.size < self._good:
                grown = self.size + 1.0
            else:
                curve = (self._peak - self._good) * ((now - self._cut_at) / REGROWTH - 1.0) ** 3
                grown = max(self.size + 1.0 / self.size, self._peak + curve)
            self.size = min(float(self.ceiling), grown)
        if queue_time is not None:
            self._queued.append(queue_time)
            self._latencies.append(latency)
            if now - self._span_from >= SPAN and len(self._queued) >= SAMPLES:
                self._judge(now)

    def congested(self, sent: float, now: float, factor: float = 0.7) -> None:
        """The service could not keep up with a request that went at `sent`.

        Cuts once a span, for what was in flight together fails together; sooner only where most of what went after
        the last cut has met congestion again.
        """
        answers, signs = self._since_cut
        signs += sent > self._cut_at
        self._since_cut[1] = signs
        if now - self._cut_at >= SPAN or (signs >= SAMPLES and signs > answers):
            self._cut(factor, now)

    def _cut(self, factor: float, now: float) -> None:
        self._peak = self.size
        self.size = self._good = max(1.0, self.size * factor)
        self._cut_at = now
        self._since_cut = [0, 0]

    def restart(self, good: float, lost: int, now: float) -> None:
        """The service is back after an outage: begin small, grow quickly to what was good before.

        `lost` requests of the outage are still out: they are beside the one that may go.
        """
        self._good, self._peak = good, max(good, self._peak)
        self.size = min(1.0 + lost, float(self.ceiling))
        self._cut_at = now
        self._since_cut = [0, 0]

    def given_up(self) -> None:
        """One that was lost to an outage that is over has been given up."""
        self.size = max(1.0, self.size - 1.0)

    def _judge(self, now: float) -> None:
        """Cut when queue times were long over two spans, by about the share of the time that is spent queueing."""
        self._queued.sort()
        fast, typical, slow = (self._queued[len(self._queued) * tenth // 10] for tenth in (1, 5, 9))
        latency = median(self._latencies)
        self._queued.clear()
        self._latencies.clear()
        self._span_from = now
        self._calm = max(min(self._calm, fast), 0.005)
        if slow <= max(LONG, 4 * self._calm):
            self._slow_spans, self._slow_at_cut = 0, None
            return
        self._slow_spans += 1
        if self._slow_spans < 2 or now - self._cut_at < 2 * latency:
            return
        self._slow_spans = 0
        if self._slow_at_cut is not None and typical > 0.8 * self._slow_at_cut:
            self._calm, self._slow_at_cut = fast, None  # fewer of ours did not shorten it: others make it long
            return
        self._slow_at_cut = typical
        excess = (typical - max(SHORT, 2 * self._calm)) / latency if latency > 0 else 0.3
        self._cut(1.0 - min(0.5, max(0.1, excess)), now)


class Breaker:
    """Notices that nothing answers, and lets one probe go at a time until something does."""

    PROBE_EVERY = 12.0
    """Seconds; also how long the first probe waits."""
    _SPAN = 30.0
    _IN_A_ROW = 10
    _SUSPECT = 2

    def __init__(self) -> None:
        self.open_since: float | None = None
        self.closed_at = -inf
        """When an outage was last over: what went before says nothing of the time after."""
        self._probe_at = 0.0
        self._recent: deque[tuple[float, bool]] = deque(maxlen=200)
        self._row = self._lost = 0
        """Broken attempts without an answer between them: all, and those that cannot be a row's own fault."""
        self._lost_from = -inf
        """When the first of those went."""
        self._moved_at = 0.0

    def ready(self, now: float, out: int = 0) -> float:
        """The moment from which a request may go: now while closed, the next probe's time while open.

        Once two attempts in a row were lost the others wait for what comes of the `out` that are still in flight,
        and where there are none, ever longer.
        """
        if self.open_since is not None:
            return self._probe_at
        if self._lost < self._SUSPECT:
            return now
        patience = 2.0 ** min(self._lost - self._SUSPECT, 4)
        return self._moved_at + (self.PROBE_EVERY if out else min(self.PROBE_EVERY, patience))

    @property
    def doubtful(self) -> bool:
        """Whether the service seems not to answer."""
        return self.open_since is not None or self._lost >= self._SUSPECT

    def sent(self, now: float) -> None:
        """A request went out; while open it is the probe."""
        self._moved_at = now
        self._probe_at = now + self.PROBE_EVERY

    def observe(self, broken: bool, in_flight: int, now: float, lost: bool = False, sent: float = inf) -> bool:
        """An attempt that went at `sent` ended. True when an outage is over.

        Ten failures in a row open the breaker, or as many as are in flight: connections are cut by the dozen. Where
        none was even made, say 0. `lost` says that it cannot have been the row's own fault. What went before the first
        that was lost says nothing of the time after.
        """
        if not broken and sent < self._lost_from:
            return False
        if not broken:
            was_open = self.open_since is not None
            self._lost_from = -inf
            self.open_since, self._row, self._lost = None, 0, 0
            if was_open:
                self.closed_at = now
                self._recent.clear()
            self._recent.append((now, False))
            return was_open
        self._row += 1
        if lost and not self._lost:
            self._lost_from = sent
        self._lost += lost
        self._moved_at = now
        self._recent.append((now, True))
        if self.open_since is None and (self._row >= max(self._IN_A_ROW, in_flight) or self._mostly_broken(now)):
            self.open_since, self._probe_at = now, now + self.PROBE_EVERY
        return False

    def _mostly_broken(self, now: float) -> bool:
        while self._recent and self._recent[0][0] < now - self._SPAN:
            self._recent.popleft()
        failed = sum(broken for _, broken in self._recent)
        return len(self._recent) >= SAMPLES and failed * 2 >= len(self._recent)
