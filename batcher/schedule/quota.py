"""Buckets: what the account, or the job, allows in a span of time."""

from math import inf

from batcher.records import Limit

BURST = 1.0
"""Seconds' worth of a job's own rate that may go at once; the service's buckets may be drained whole."""


class Bucket:
    """A token bucket that refills continuously and may go into debt.

    `rate` is units per second, None while nobody has said it: such a bucket only blocks. It refills up to
    `capacity`; what is given back may lift it up to `most`. Times are monotonic seconds and are always passed in.
    """

    __slots__ = ("blocked_until", "capacity", "heard", "level", "most", "name", "promised", "rate", "updated")

    def __init__(self, name: str, rate: float | None, capacity: float, now: float) -> None:
        self.name = name
        self.rate = rate
        self.capacity = self.most = capacity
        self.level = capacity
        self.updated = now
        self.blocked_until = now
        self.promised = False
        """The service named the moment at which the next one may go, whatever is reckoned here."""
        self.heard = -inf
        """When the request was sent whose headers were last believed."""

    @classmethod
    def within(cls, name: str, limit: float, now: float) -> "Bucket":
        """A bucket that lets no more than `limit` go in any minute, a burst in it included."""
        rate = limit / (60 + BURST)
        bucket = cls(name, rate, max(rate * BURST, 1.0), now)
        bucket.most = max(limit, bucket.capacity)
        return bucket

    def ready(self, cost: float, now: float) -> float:
        """The moment from which `cost` may be charged; `now` or earlier when it may be at once.

        What is larger than the bucket goes when the bucket is full, and leaves it in debt.
        """
        if self.rate is None or self.promised:
            return self.blocked_until
        self._refill(now)
        missing = min(cost, self.capacity) - self.level
        if missing <= 1e-9:
            return self.blocked_until
        return max(self.blocked_until, now + missing / self.rate)

    def used(self, now: float) -> float:
        """Which share is used up, 0 to 1; of a bucket whose size nobody has said, whether it is closed."""
        if self.rate is None or self.blocked_until > now or self.capacity <= 0:
            return float(self.blocked_until > now)
        self._refill(now)
        return min(1.0, max(0.0, 1.0 - self.level / self.capacity))

    def charge(self, cost: float, now: float) -> None:
        """Take `cost` out; a negative one gives back."""
        self._refill(now)
        if cost > 0:
            self.promised = False
        if self.rate is not None:
            self.level = min(self.most, self.level - cost)

    def block(self, until: float) -> None:
        """The service refused for want of this: it is empty, and nothing goes before `until`."""
        self.level = min(self.level, 0.0)
        self.blocked_until = max(self.blocked_until, until)
        self.promised = True

    def correct(self, limit: Limit, sent: float, since: float, now: float) -> None:
        """Believe a header that was written for a request sent at `sent`; `since` was charged after that.

        A lower level is taken at once, a higher one in part: what another request gave back may be in it already.
        Headers for requests older than the last one that was heard of are passed over: too much went since.
        """
        if limit.limit is None or limit.remaining is None or sent < self.heard:
            return
        self.heard = sent
        self._refill(now)
        told = limit.remaining - since
        if limit.limit > 0 and (self.rate is None or limit.limit != self.capacity):
            self.capacity = self.most = limit.limit
            self.rate = limit.limit / limit.window
            self.level = min(self.level, limit.remaining)
        self.level = told if told < self.level else self.level + 0.2 * (told - self.level)

    def _refill(self, now: float) -> None:
        if self.rate is not None and now > self.updated and self.level < self.capacity:
            self.level = min(self.capacity, self.level + self.rate * (now - self.updated))
        self.updated = now
