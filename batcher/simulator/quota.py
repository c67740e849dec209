"""What an account may use: buckets of requests and tokens that refill continuously, per model and tier."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

WINDOWS = {"day": 86_400.0, "hour": 3_600.0, "minute": 60.0, "second": 1.0}  # seconds
RESOURCES = ("requests", "tokens", "uncached-tokens")
BUCKETS = tuple(f"{resource}-{window}" for resource in RESOURCES for window in WINDOWS)  # by their names in headers
PLAN = {"requests-minute": 1_000.0, "tokens-minute": 3_000_000.0, "uncached-tokens-minute": 1_000_000.0}
"""What a developer's account may use of a model, as published in October 2026."""
PLANS = {"qwen-3.8-27b": {"requests-minute": 300.0, "tokens-minute": 750_000.0, "uncached-tokens-minute": 150_000.0}}
"""The models for which it is less."""
TOTAL = 3  # total tokens for each uncached one, where only the latter are stated

_HEADERS = {name: [f"x-ratelimit-{what}-{name}" for what in ("limit", "remaining", "reset")] for name in BUCKETS}


@dataclass(slots=True)
class Bucket:
    """A quota that refills continuously: `limit` more each `window` seconds, never above `limit`, below 0 in debt."""

    resource: str
    limit: float
    window: float
    level: float
    at: float

    def refill(self, now: float, others: float = 0.0) -> None:
        """Bring the level to now; `others` is the share of what flows in that goes to someone else."""
        flow = (now - self.at) * self.limit / self.window
        self.level = min(self.limit, self.level + flow * (1 - others))
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds from the last refill until the amount is there, were nobody else to take any."""
        return max(0.0, (amount - self.level) * self.window / self.limit)


class Shortage(NamedTuple):
    """The bucket that has too little, and how long until it has enough; None: it never will."""

    bucket: str
    wait: float | None


class Buckets:
    """The quota of one model and tier. Every call needs a refill first; all buckets are full at `now`."""

    def __init__(self, limits: Mapping[str, float], now: float) -> None:
        self._buckets: dict[str, Bucket] = {}
        self._now = now
        self.change(limits)

    def change(self, limits: Mapping[str, float]) -> None:
        """Other limits from now on: what is there stays, as far as it fits; a new bucket is full."""
        before, self._buckets = self._buckets, {}
        for name in BUCKETS:
            if name in limits:
                limit = limits[name]
                resource, _, window = name.rpartition("-")
                bucket = before.get(name) or Bucket(resource, limit, WINDOWS[window], limit, self._now)
                bucket.limit, bucket.level = limit, min(limit, bucket.level)
                self._buckets[name] = bucket

    def refill(self, now: float, others: float = 0.0) -> None:
        """Let flow in what has since the last time, less the share that others use."""
        for bucket in self._buckets.values():
            bucket.refill(now, others)
        self._now = now

    def shortage(self, tokens: float, uncached: float) -> Shortage | None:
        """What keeps a request from being admitted whose tokens are estimated so; None: nothing does."""
        amounts = {"requests": 1.0, "tokens": tokens, "uncached-tokens": uncached}
        for name, bucket in self._buckets.items():
            amount = amounts[bucket.resource]
            if bucket.level < amount:
                return Shortage(name, bucket.wait(amount) if amount <= bucket.limit else None)
        return None

    def charge(self, tokens: float, uncached: float) -> None:
        """Take a request and its estimated tokens out."""
        amounts = {"requests": 1.0, "tokens": tokens, "uncached-tokens": uncached}
        for bucket in self._buckets.values():
            bucket.level -= amounts[bucket.resource]

    def give_back(self, tokens: float, uncached: float) -> None:
        """Correct a charge by so many tokens, of all and of those that no cache had; negative where more was used."""
        for bucket in self._buckets.values():
            if bucket.resource != "requests":
                back = tokens if bucket.resource == "tokens" else uncached
                bucket.level = min(bucket.limit, bucket.level + back)

    def levels(self) -> dict[str, float]:
        """What is in each bucket."""
        return {name: bucket.level for name, bucket in self._buckets.items()}

    def headers(self) -> dict[str, str]:
        """The buckets as headers tell them: limit, remainder, seconds until they are full."""
        headers: dict[str, str] = {}
        for name, bucket in self._buckets.items():
            limit, remaining, reset = _HEADERS[name]
            headers[limit] = f"{bucket.limit:.0f}"
            headers[remaining] = str(max(0, math.floor(bucket.level)))
            headers[reset] = str(bucket.wait(bucket.limit))
        return headers


class LimitOf(NamedTuple):
    """Whom a limit is for, where it is not for all, and of what it is."""

    model: str | None
    tier: str | None
    bucket: str


def limit_of(text: str) -> LimitOf:
    """`[MODEL:][TIER:]BUCKET`, such as `flex:tokens-minute`; raises ValueError that says what is allowed."""
    *whom, bucket = text.split(":")
    if bucket not in BUCKETS:
        raise ValueError(f"unknown limit {text!r}; known are {', '.join(BUCKETS)}")
    tier = whom.pop() if whom and whom[-1] in ("default", "flex") else None
    return LimitOf(":".join(whom) or None, tier, bucket)


def merged(
    plan: Mapping[str, float | None], more: Mapping[str, float | None], model: str, tier: str, flex: float
) -> dict[str, float]:
    """The limits of one model and tier: the plan's, changed by `more`, whose limits for this very model come last.

    Flex has `flex` times the limits of the default tier, but for those that are its own. None takes a limit away.
    """
    limits: dict[str, float | None] = dict(plan)
    named = [(limit_of(text), value) for text, value in more.items()]
    named = sorted((one for one in named if one[0].model in (None, model)), key=lambda one: one[0].model is not None)
    limits |= {limit.bucket: value for limit, value in named if limit.tier != "flex"}
    if tier == "flex":
        limits = {bucket: value and value * flex for bucket, value in limits.items()}
        limits |= {limit.bucket: value for limit, value in named if limit.tier == "flex"}
    return {bucket: value for bucket, value in limits.items() if value is not None}
