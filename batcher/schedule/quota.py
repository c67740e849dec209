"""What the account, or the job, allows one model and tier: a bucket for each resource and span of time."""

from collections.abc import Callable, Sequence
from math import inf

from batcher.records import Failure, KnownLimit, Limit
from batcher.schedule.cap import Load
from batcher.schedule.learning import Learned, Returns

RESOURCES = ("requests", "tokens", "uncached_tokens")
SURELY = 0.8
"""The share of its estimate that a request takes at least: prompts are reckoned before they are counted."""
BURST = 1.0
"""Seconds' worth of a job's own rate that may go at once; the service's buckets may be drained whole."""
_UNSTATED_BURST = 5.0
"""Seconds' worth that may go at once of a limit that nobody states: a wait after a refusal must not be lost."""
_LONGEST_LEARNED = 60.0
"""Seconds: limits of longer windows are not learned from refusals, which would take as long."""
_FIRST_RESERVE, _MOST_RESERVE = 0.25, 4.0
"""Seconds' worth that stay in a stated limit that refused all the same: others draw from it, or it is told late."""
_DAY, _HOUR = 86_400.0, 3_600.0
_WINDOWS = {1.0: "second", 60.0: "minute", _HOUR: "hour", _DAY: "day"}

Amounts = tuple[float, float, float]
"""What a request takes of each of `RESOURCES`."""


class Flow:
    """What went of one resource: `charged` in all, `spent` less what came back, `given` back of reservations."""

    __slots__ = ("charged", "given", "spent")

    def __init__(self) -> None:
        self.charged = self.spent = self.given = 0.0

    def charge(self, amount: float) -> None:
        """So much goes."""
        self.charged += amount
        self.spent += amount

    def settle(self, unused: float) -> None:
        """So much of it was not used."""
        self.spent -= unused
        self.given += unused


class Bucket:
    """A token bucket that refills continuously and may go into debt.

    `rate` is units per second, None while nobody has said it: such a bucket only blocks. It refills up to
    `capacity`; what is given back may lift it up to `most`. Times are monotonic seconds and are always passed in.
    """

    __slots__ = (
        *("blocked_until", "capacity", "flow", "heard", "learned", "level", "most", "name", "promised", "rate"),
        *("reserve", "returns", "unfit", "updated", "which", "window"),
    )

    def __init__(
        self, name: str, rate: float | None, capacity: float, now: float, which: int = 0, window: float = 60.0
    ) -> None:
        self.name = name
        self.which = which
        """Its place in `RESOURCES`."""
        self.window = window
        self.flow = Flow()
        self.rate = rate
        self.capacity = self.most = capacity
        self.level = capacity
        self.updated = now
        self.blocked_until = now
        self.promised = False
        """The service named the moment at which the next one may go, whatever is reckoned here."""
        self.heard = -inf
        """When the request was sent whose headers were last believed."""
        self.returns = Returns()
        self.learned: Learned | None = None
        self.reserve = 0.0
        """What is left in it."""
        self.unfit = inf
        """A request of this size was refused by the full bucket."""

    @classmethod
    def within(cls, name: str, limit: float, now: float, which: int = 0) -> "Bucket":
        """A bucket that lets no more than `limit` go in any minute, a burst in it included."""
        rate = limit / (60 + BURST)
        bucket = cls(name, rate, max(rate * BURST, 1.0), now, which)
        bucket.most = max(limit, bucket.capacity)
        return bucket

    def remember(self, known: KnownLimit, now: float) -> None:
        """Begin with what an earlier run knew; how much is in it now nobody knows."""
        if known.stated:
            self.rate, self.capacity = known.limit / known.window, known.limit
            self.level = 0.1 * known.limit
        else:
            self._learn(Learned(known.limit / known.window, now, known.window), now)
            self.level = BURST * known.limit / known.window
        self.most = self.capacity

    @property
    def stated(self) -> bool:
        """Whether the service has said in this run how large it is."""
        return self.heard > -inf

    @property
    def fits(self) -> float:
        """What goes must surely be less: as far as it is known how large it is, and how large a request."""
        return min(self.unfit, self.capacity / SURELY if self.stated and self.capacity > 0 else inf)

    @property
    def keeps(self) -> bool:
        """Whether the service seems to keep what was reserved and not used."""
        return self.returns.share < 0.5

    @property
    def limit(self) -> float | None:
        """Units per window, as stated or learned."""
        if self.learned is not None and self.learned.base is not None:
            return self.learned.base * self.window
        return None if self.rate is None else self.rate * self.window

    def ready(self, cost: float, now: float) -> float:
        """The moment from which `cost` may be charged; `now` or earlier when it may be at once.

        What is larger than the bucket goes when the bucket is full, and leaves it in debt.
        """
        if self.rate is None or self.promised:
            return self.blocked_until
        if now > self.updated:
            self._refill(now)
        wanted = cost + self.reserve
        missing = (wanted if wanted < self.capacity else self.capacity) - self.level
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
        """Take `cost` out."""
        if now > self.updated:
            self._refill(now)
        self.promised = False
        if self.learned is not None and self.level >= self.capacity > cost:
            self.learned.rested(self.flow.spent - cost, self.window, now)
        if self.rate is not None:
            self.level -= cost

    def give_back(self, cost: float, now: float) -> None:
        """A request was never served: what it was charged is there again."""
        self._refill(now)
        if self.rate is not None:
            self.level = min(self.most, self.level + cost)

    def settle(self, unused: float, now: float) -> None:
        """An answer left so much of its charge unused, or took more, where it is below 0."""
        if now > self.updated:
            self._refill(now)
        if self.rate is not None:
            level = self.level + (unused * self.returns.share if unused > 0 else unused)
            self.level = level if level < self.most else self.most

    def block(self, until: float) -> None:
        """The service refused for want of this: it is empty, and nothing goes before `until`."""
        self.level = min(self.level, 0.0)
        self.blocked_until = max(self.blocked_until, until)
        self.promised = True

    def refused(self, cost: float, since: float, sent: float, began: float, now: float) -> None:
        """A request of this cost, given back by now, found it empty at `sent`; `since` was charged after that."""
        if self.stated:
            most = min(0.1 * self.capacity, _MOST_RESERVE * (self.rate or 0.0))
            self.reserve = min(most, max(2 * self.reserve, _FIRST_RESERVE * (self.rate or 0.0)))
            if cost > self.capacity:
                self.unfit = min(self.unfit, cost)
        if self.stated or self.window > _LONGEST_LEARNED:
            return
        learned = self.learned or Learned(None, began, self.window)
        learned.refused(cost, self.flow.spent - since, sent)
        self._learn(learned, now)

    def _learn(self, learned: Learned, now: float) -> None:
        """Go by this rate from now on."""
        self.learned, self.rate, self.updated = learned, learned.rate(now), now
        self.capacity = self.most = max(1.0, _UNSTATED_BURST * (self.rate or 0.0))
        self.level = min(self.level, 0.0)

    def correct(self, limit: Limit, sent: float, since: float, now: float) -> None:
        """Believe a header that was written for a request sent at `sent`; `since` was charged after that.

        It was written between then and now, so the level lies between what it says without and with what was
        charged since. Above that is cut at once; below it is believed in part: what another request gave back may be
        in it already. Headers for requests older than the last one that was heard of are passed over.
        """
        if limit.limit is None or limit.remaining is None or sent < self.heard:
            return
        first, self.heard = not self.stated, sent
        self._refill(now)
        if limit.limit > 0 and (self.rate is None or limit.limit != self.capacity):
            self.capacity = self.most = limit.limit
            self.rate = limit.limit / limit.window
            self.learned, self.reserve, self.unfit = None, 0.0, inf
            self.returns.forget()
        least = limit.remaining - since
        if first:
            self.level = least
        elif self.level > limit.remaining:
            self.level = limit.remaining
        elif self.level < least:
            self.level += 0.2 * (least - self.level)
        if self.which and self.rate is not None:
            gross = self.flow.spent + self.flow.given
            self.returns.heard(limit.remaining, self.capacity, self.rate * now, gross, self.flow.given)

    def _refill(self, now: float) -> None:
        if now > self.updated:
            if self.learned is not None:
                self.rate = self.learned.rate(now)
            if self.rate is not None and self.level < self.capacity:
                self.level = min(self.capacity, self.level + self.rate * (now - self.updated))
            self.updated = now


class Quota:
    """The buckets of one model and tier: the job's own, and the service's as they become known."""

    __slots__ = ("_active", "_began", "_flows", "_note", "_own", "_refusals", "_refused_at", "_theirs", "fits")

    def __init__(
        self,
        own: Sequence[float | None],
        known: Sequence[KnownLimit],
        note: Callable[[float, str], None],
        now: float,
    ) -> None:
        """`own` are the job's rates per minute, of each of `RESOURCES`; `known` what an earlier run found out."""
        self._note = note
        self._own = [
            Bucket.within(f"schedule.{RESOURCES[which]}_per_minute", limit, now, which)
            for which, limit in enumerate(own)
            if limit is not None
        ]
        self._theirs: dict[tuple[str, float], Bucket] = {}
        self._active: list[Bucket] = self._own
        self.fits = inf
        """Requests of fewer tokens are no larger than a whole limit."""
        self._began: float | None = None
        self._flows = (Flow(), Flow(), Flow())
        self._refusals = 0
        self._refused_at = now
        for each in known:
            self._their(each.resource, each.window, now).remember(each, now)

    def ready(self, amounts: Amounts, now: float) -> tuple[float, str]:
        """The moment from which this may be charged, and what holds it back, if anything does."""
        for bucket in self._active:
            at = bucket.ready(amounts[bucket.which], now)
            if at > now:
                return at, bucket.name
        return now, ""

    def exceeded(self, amounts: Amounts) -> str | None:
        """The limit of the service that a request of more than `fits` tokens can never fit."""
        for bucket in self._theirs.values():
            if bucket.which and amounts[bucket.which] >= bucket.fits:
                return f"{bucket.capacity:,.0f} {bucket.name}"
        return None

    def room(self, tokens: float, uncached: float) -> float:
        """Tokens that an answer may have so that a request with such a prompt still fits every limit of the service."""
        prompts = (0.0, tokens, uncached)
        sizes = [(bucket.capacity, bucket.which) for bucket in self._theirs.values() if bucket.which and bucket.stated]
        return min((capacity - prompts[which] for capacity, which in sizes if capacity > 0), default=inf)

    def load(self) -> Load:
        """How an attempt weighs on the limit of tokens that is smallest."""
        rates = dict.fromkeys(range(3), inf)
        kept, window = 0.0, inf
        scarce = 0
        for bucket in self._active:
            if bucket.rate is not None and 0 < bucket.rate < rates[bucket.which]:
                rates[bucket.which] = bucket.rate
                if bucket.which and bucket.rate <= min(rates[1], rates[2]):
                    kept, window, scarce = 1.0 - bucket.returns.share, bucket.window, bucket.which
        if not scarce:
            return Load()
        return Load(kept, 1.0 / window, rates[scarce] / rates[0], scarce == 2)

    def charge(self, amounts: Amounts, now: float) -> Amounts:
        """Take this out of every bucket; gives what was charged in all then: headers are read against it."""
        if self._began is None:
            self._began = now
        requests, tokens, uncached = self._flows
        requests.charge(1.0)
        tokens.charge(amounts[1])
        uncached.charge(amounts[2])
        for bucket in self._active:
            bucket.charge(amounts[bucket.which], now)
        return requests.charged, tokens.charged, uncached.charged

    def give_back(self, amounts: Amounts, now: float) -> None:
        """What was charged was never used."""
        for flow, amount in zip(self._flows, amounts, strict=True):
            flow.spent -= amount
        for bucket in self._active:
            bucket.give_back(amounts[bucket.which], now)

    def settle(self, unused: Amounts, now: float) -> None:
        """So much was not used of what was charged."""
        self._flows[1].settle(unused[1])
        self._flows[2].settle(unused[2])
        for bucket in self._active:
            if bucket.which:
                bucket.settle(unused[bucket.which], now)

    def answered(self) -> None:
        """Something was answered: refusals are no longer in a row."""
        self._refusals = 0

    def told(self, limits: Sequence[Limit], sent: float, marks: Amounts, now: float) -> None:
        """Headers that were written for a request sent at `sent`, when so much had been charged in all."""
        for limit in limits:
            if limit.limit is None or limit.remaining is None:
                continue
            bucket = self._their(limit.resource, limit.window, now)
            before, kept = bucket.capacity if bucket.stated else None, bucket.keeps
            bucket.correct(limit, sent, bucket.flow.charged - marks[bucket.which], now)
            if bucket.capacity != before:
                self._choose()
                self._note(now, f"{bucket.name}: {bucket.capacity:,.0f}, by headers")
            if bucket.keeps != kept:
                self._note(now, f"{bucket.name}: what is reserved {'comes back' if kept else 'does not come back'}")

    def first(self, sent: float) -> bool:
        """Whether a request that went then and is refused is the first of those that were in flight together."""
        return sent >= self._refused_at

    def refused(self, failure: Failure, amounts: Amounts, sent: float, marks: Amounts, now: float) -> float:
        """Learn from a refusal and block what it names, as long as it says.

        Gives the moment until which everything waits: now, unless it names nothing. What was in flight together is
        refused together, and counts once.
        """
        named = [limit for limit in failure.limits if limit.remaining is None or limit.remaining <= 0]
        if self.first(sent):
            self._teach(named, amounts, sent, marks, now)
            self._refused_at = now
            self._refusals = min(self._refusals + 1, 10)
        guessed = self._refused_at + min(30.0, 0.5 * 2.0**self._refusals)
        stated = None if failure.retry_after is None else now + min(failure.retry_after, _DAY)
        for limit in named:
            until = guessed if stated is None else stated
            if stated is None and limit.window >= _DAY:
                until = now + _HOUR
            elif failure.refills(limit):
                until = min(until, guessed)
            self._their(limit.resource, limit.window, now).block(until)
        return now if named else guessed if stated is None else stated

    def used(self, now: float) -> dict[str, float]:
        """By the names of the buckets: which share of it is used up, 0 to 1."""
        return {bucket.name: bucket.used(now) for bucket in self._active}

    def known(self, model: str, tier: str | None) -> list[KnownLimit]:
        """What was found out about the service's limits, to be remembered."""
        return [
            KnownLimit(
                "", model, tier, RESOURCES[bucket.which], bucket.window, bucket.limit, bucket.stated, bucket.keeps
            )
            for bucket in self._theirs.values()
            if bucket.limit and (bucket.stated or bucket.learned is not None)
        ]

    def _teach(self, named: Sequence[Limit], amounts: Amounts, sent: float, marks: Amounts, now: float) -> None:
        """Learn from a refusal; one that names nothing is of requests, where no limit is stated at all."""
        whose = [(limit.resource, limit.window) for limit in named]
        if not whose and not any(bucket.stated for bucket in self._theirs.values()):
            whose = [("requests", 60.0)]
        for resource, window in whose:
            bucket = self._their(resource, window, now)
            before = bucket.limit
            since = bucket.flow.charged - marks[bucket.which]
            bucket.refused(amounts[bucket.which], since, sent, self._began or sent, now)
            self._choose()
            if bucket.limit is not None and bucket.limit != before:
                self._note(now, f"{bucket.name}: {bucket.limit:,.0f}, by refusals")

    def _their(self, resource: str, window: float, now: float) -> Bucket:
        """The service's bucket, made when it is first heard of."""
        bucket = self._theirs.get((resource, window))
        if bucket is None:
            which = RESOURCES.index(resource)
            name = f"{resource.replace('_', ' ')} per {_WINDOWS.get(window, 'window')}"
            bucket = Bucket(name, None, 0.0, now, which, window)
            bucket.flow = self._flows[which]
            self._theirs[resource, window] = bucket
            self._choose()
        return bucket

    def _choose(self) -> None:
        """A number of the job is a ceiling of its own unless headers say that the account has no more."""
        stated = {
            bucket.which: bucket.capacity
            for bucket in self._theirs.values()
            if bucket.stated and bucket.window == 60 and bucket.capacity > 0
        }
        own = [bucket for bucket in self._own if stated.get(bucket.which, inf) > bucket.most]
        self._active = [*own, *self._theirs.values()]
        self.fits = min((bucket.fits for bucket in self._theirs.values() if bucket.which), default=inf)
