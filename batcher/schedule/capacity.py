"""How much the service can digest: a window over what is in flight, and a breaker for when nothing answers."""

from collections import deque

SPAN = 1.0
"""Seconds between judgements of the queue time, and at least between two cuts."""
SAMPLES = 20
REGROWTH = 15.0
"""Seconds after which a window is back where it was cut, if nothing happens meanwhile."""


class Window:
    """How many requests may be in flight: slow start, quick regrowth, cuts on congestion only.

    As in TCP: doubling per round trip up to the last good size (RFC 5681), then along the cubic curve that has its
    flat place where it was cut (RFC 9438), and by one per round trip at least.
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
        self._calm = float("inf")
        self._slow_spans = 0

    def answered(self, in_flight: int, queue_time: float | None, now: float) -> None:
        """An answer came while `in_flight` were out; `queue_time` is the service's own, seconds."""
        self._since_cut[0] += 1
        if in_flight >= 0.8 * int(self.size):
            if self.size < self._good:
                grown = self.size + 1.0
            else:
                curve = (self._peak - self._good) * ((now - self._cut_at) / REGROWTH - 1.0) ** 3
                grown = max(self.size + 1.0 / self.size, self._peak + curve)
            self.size = min(float(self.ceiling), grown)
        if queue_time is not None:
            self._queued.append(queue_time)
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

    def restart(self, now: float) -> None:
        """The service is back after an outage: begin small, grow quickly to where it was cut."""
        self._good = self.size
        self.size = 1.0
        self._cut_at = now

    def _judge(self, now: float) -> None:
        self._queued.sort()
        typical, slow = self._queued[len(self._queued) // 10], self._queued[len(self._queued) * 9 // 10]
        self._queued.clear()
        self._span_from = now
        self._calm = max(min(self._calm, typical), 0.005)
        self._slow_spans = self._slow_spans + 1 if slow > max(0.5, 4 * self._calm) else 0
        if self._slow_spans >= 2:
            self._slow_spans = 0
            self._cut(0.7, now)


class Breaker:
    """Notices that nothing answers, and lets one probe go at a time until something does."""

    PROBE_EVERY = 12.0
    """Seconds; also how long the first probe waits."""
    _SPAN = 30.0
    _IN_A_ROW = 10

    def __init__(self) -> None:
        self.open_since: float | None = None
        self._probe_at = 0.0
        self._recent: deque[tuple[float, bool]] = deque(maxlen=200)
        self._row = 0

    def ready(self, now: float) -> float:
        """The moment from which a request may go: now while closed, the next probe's time while open."""
        return now if self.open_since is None else self._probe_at

    def sent(self, now: float) -> None:
        """A request went out; while open it is the probe."""
        self._probe_at = now + self.PROBE_EVERY

    def observe(self, broken: bool, in_flight: int, now: float) -> bool:
        """An attempt ended. True when an outage is over.

        Ten failures in a row open the breaker, or as many as are in flight: connections are cut by the dozen. Where
        none was even made, say 0.
        """
        if not broken:
            was_open = self.open_since is not None
            self.open_since, self._row = None, 0
            if was_open:
                self._recent.clear()
            self._recent.append((now, False))
            return was_open
        self._row += 1
        self._recent.append((now, True))
        if self.open_since is None and (self._row >= max(self._IN_A_ROW, in_flight) or self._mostly_broken(now)):
            self.open_since, self._probe_at = now, now + self.PROBE_EVERY
        return False

    def _mostly_broken(self, now: float) -> bool:
        while self._recent and self._recent[0][0] < now - self._SPAN:
            self._recent.popleft()
        failed = sum(broken for _, broken in self._recent)
        return len(self._recent) >= SAMPLES and failed * 2 >= len(self._recent)
