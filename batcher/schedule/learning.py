"""What nobody states, found out: a rate from its refusals, sizes from usage, whether a reservation is given back."""

from batcher.records import Request

FIRST_OUTPUT_GUESS = 500.0
"""Completion tokens to expect of a request without an output cap, until answers have told."""
MOST_RESERVED = 16_384.0
"""What Cerebras was seen to reserve for the answer of a request without an output cap."""
_SLOWLY = 0.05
"""The weight of one answer among all before it."""
_FIRST_PATIENCE, _PATIENCE = 10.0, 60.0
"""Seconds after a refusal in which a rate that is not refused again doubles: while it is unsure, and later."""
_FIRST_REQUESTS, _REQUESTS = 10.0, 100.0
"""The same in requests, where these take longer: a probe of the limit costs one of them."""
_FEW = 3
"""Requests that must have gone before a rate is made of them."""
_ENOUGH = 0.02
"""The share of a limit that must have been given back before it is judged whether it came."""


class Learned:
    """A rate that only refusals tell: between two of them, what went is what had flowed in.

    It stays about where it was and then rises ever faster (as RFC 9438 does with windows), until it is refused again.
    """

    __slots__ = ("_full", "_patience", "_since", "_spent", "base")

    def __init__(self, base: float | None, since: float, full: float) -> None:
        """`base` is units per second, where it is known; at `since` there were at most `full` seconds' worth."""
        self.base = base
        self._since, self._spent, self._full = since, 0.0, full
        self._patience = _FIRST_PATIENCE

    def rate(self, now: float) -> float | None:
        """Units per second by which to go now; None while nothing was refused."""
        if self.base is None:
            return None
        return self.base * (1.0 + ((now - self._since) / self._patience) ** 3)

    def rested(self, spent: float, full: float, now: float) -> None:
        """So little went that the bucket may have been full: nothing can be said of the time before."""
        self._since, self._spent, self._full = now, spent, full

    def refused(self, cost: float, spent: float, sent: float) -> None:
        """A request of this cost found too little at `sent`, when `spent` had gone in all."""
        went, seconds = max(0.0, spent - self._spent), max(1e-3, sent - self._since)
        least, most = (went - cost) / (seconds + self._full), (went + cost) / seconds
        seldom = 0.0 if self.base is None else cost / self.base
        if self.base is None:
            if went >= _FEW * cost:
                self.base = went / (seconds + self._full)
        elif least <= self.base <= most:
            self._patience = min(max(_PATIENCE, _REQUESTS * seldom), 1.5 * self._patience)
        else:
            self.base = max(went / (seconds + self._full), self.base / 2)
            self._patience = max(_FIRST_PATIENCE, _FIRST_REQUESTS * seldom)
        self._since, self._spent, self._full = sent, spent, 0.0


class Returns:
    """Whether what a request reserved and did not use comes back, judged by what headers say remains."""

    __slots__ = ("_last", "share")

    def __init__(self) -> None:
        self.share = 1.0
        """Of what should come back."""
        self._last: tuple[float, float, float, float] | None = None

    def forget(self) -> None:
        """The limit is another one: what was heard before cannot be compared."""
        self._last = None

    def heard(self, remaining: float, limit: float, flowed: float, gross: float, given: float) -> None:
        """Something `remaining` was heard of when so much had `flowed` in, `gross` had gone and `given` come back."""
        if remaining >= limit:
            self._last = None
        elif self._last is None:
            self._last = (remaining, flowed, gross, given)
        else:
            before, flowed_before, gross_before, given_before = self._last
            due = given - given_before
            if due >= _ENOUGH * limit:
                came = remaining - before - (flowed - flowed_before) + gross - gross_before
                self.share += 0.3 * (min(1.0, max(0.0, came / due)) - self.share)
                self._last = (remaining, flowed, gross, given)


class Sizes:
    """How many tokens requests of one model take, as usage comes back."""

    __slots__ = ("_cached_shares", "_output_guess", "_prompt_ratio", "_reserved", "reuse")

    def __init__(self) -> None:
        self._prompt_ratio = 1.0
        self._output_guess = FIRST_OUTPUT_GUESS
        self._reserved = 0.0
        self._cached_shares = [0.0, 0.0]
        """Of prompts: of those that go by themselves or ahead, and of those that follow another of their group."""
        self.reuse = 1.0
        """What caches had of what they should have had of rows that do not go together, as a share."""

    def estimate(self, request: Request, follows: bool = False) -> tuple[float, float]:
        """The tokens that will be reserved for a request: all, and those that no cache has.

        `follows` says that another of its group has gone before it.
        """
        output = request.output_tokens or max(self._output_guess, self._reserved)
        prompt = self._prompt_ratio * request.prompt_tokens
        return prompt + output, prompt * (1.0 - self._cached_shares[follows]) + output

    def answered(self, request: Request, prompt: int, completion: int, cached: int, followed: bool = False) -> None:
        """An answer tells what its request took."""
        self._prompt_ratio += _SLOWLY * (prompt / request.prompt_tokens - self._prompt_ratio)
        self._output_guess += _SLOWLY * (completion - self._output_guess)
        self._cached_shares[followed] += _SLOWLY * (cached / max(1, prompt) - self._cached_shares[followed])

    def relied(self, cached: int, shares: int) -> None:
        """An answer tells what a cache had of tokens that it should have had."""
        self.reuse += _SLOWLY * (min(1.0, cached / shares) - self.reuse)

    def refused(self) -> None:
        """More is reserved for an answer without a cap than was charged here: refusals teach how much."""
        self._reserved = min(2 * max(self._reserved, self._output_guess), MOST_RESERVED)
