"""Buckets: what the account, or the job, allows in a span of time."""

from batcher.records import Limit

BURST = 1.0
"""Seconds' worth of a configured rate that may go at once; the service's own buckets may be drained whole."""


class Bucket:
    """A token bucket that refills continuously and may go into debt.

    `rate` is units per second, None while nobody has said it: such a bucket only blocks.
    Times are monotonic seconds and are always passed in.
    """

    __slots__ = ("blocked_until", "capacity", "level", "name", "rate", "spent", "updated")

    def __init__(self, name: str, rate: float | None, capacity: float, now: float) -> None:
        self.name = name
        self.rate = rate
        self.capacity = capacity
        self.level = capacity
        self.updated = now
        self.blocked_until = now
        self.spent = 0.0
        """All that was ever charged here: the difference of two readings is what went out in between."""

    def ready(self, cost: float, now: float) -> float:
        """The moment from which `cost` may be charged; `now` or earlier when it may be at once.

        What is larger than the bucket goes when the bucket is full, and leaves it in debt.
        """
        if self.rate is None:
            return self.blocked_until
        self._refill(now)
        missing = min(cost, self.capacity) - self.level
        if missing <= 1e-9:
            return self.blocked_until
        return max(self.blocked_until, now + missing / self.rate)

    def charge(self, cost: float) -> None:
        """Take `cost` out; a negative one gives back."""
        self.spent += cost
        if self.rate is not None:
            self.level = min(self.capacity, self.level - cost)

    def block(self, until: float) -> None:
        """The service refused for want of this: it is empty, and nothing goes before `until`."""
        self.level = min(self.level, 0.0)
        self.blocked_until = max(self.blocked_until, until)

    def correct(self, limit: Limit, mark: float, now: float) -> None:
        """Believe a header that was written for a request after whose charge `spent` stood at `mark`.

        A lower level is taken at once, a higher one in part: what another request gave back may be in it already.
        """
        if limit.limit is None or limit.remaining is None:
            return
        self._refill(now)
        if limit.limit > 0 and (self.rate is None or limit.limit != self.capacity):
            self.capacity = limit.limit
            self.rate = limit.limit / limit.window
            self.level = min(self.level, limit.remaining)
        told = limit.remaining - (self.spent - mark)
        self.level = told if told < self.level else self.level + 0.2 * (told - self.level)

    def _refill(self, now: float) -> None:
        if self.rate is not None and now > self.updated:
            self.level = min(self.capacity, self.level + self.rate * (now - self.updated))
        self.updated = now
