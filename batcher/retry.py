"""Again, and when? Rules for failed attempts, and the guard that ends a run which would fail every row."""

import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import NamedTuple, cast

from tenacity import RetryCallState, wait_exponential_jitter, wait_random, wait_random_exponential
from tenacity.wait import wait_base

from batcher.errors import BatcherError, PausedError, ServiceError
from batcher.records import Failure, Kind

AT_ONCE = wait_random(0, 0.05)
BACK_OFF = wait_random_exponential(multiplier=0.5, min=0.05, max=30)
CAPACITY = wait_exponential_jitter(initial=1, max=60, jitter=1)

MAX_REQUEUES = 200
"""Times that a row is sent back without being charged for it: refusals that are no fault of its own."""
LONGEST_WAIT = 3600.0
"""Seconds: who asks for more is believed this far, or pauses the run."""


class Rule(NamedTuple):
    """What a kind of failure means for its row.

    `again` is how many times the row may be asked again for this kind; `charged` counts it against
    `max_attempts`; `cost` is taken from the job's retry budget.
    """

    again: int
    wait: wait_base
    charged: bool = True
    cost: float = 5


_ALWAYS = 1_000_000
RULES: Mapping[Kind, Rule] = {
    Kind.RATE_LIMITED: Rule(MAX_REQUEUES, BACK_OFF, charged=False, cost=0),
    Kind.DAY_QUOTA: Rule(MAX_REQUEUES, BACK_OFF, charged=False, cost=0),
    Kind.NO_CREDIT: Rule(MAX_REQUEUES, BACK_OFF, charged=False, cost=0),
    Kind.OVERLOADED: Rule(MAX_REQUEUES, CAPACITY, charged=False, cost=0),
    Kind.SERVER_ERROR: Rule(3, BACK_OFF),
    Kind.UNAVAILABLE: Rule(_ALWAYS, BACK_OFF),
    Kind.REQUEST_TIMEOUT: Rule(_ALWAYS, BACK_OFF, cost=10),
    Kind.CONFLICT: Rule(_ALWAYS, BACK_OFF),
    # Nothing was sent: the row is not to blame, and the breaker and the run's patience keep these from being many.
    Kind.DNS: Rule(_ALWAYS, CAPACITY, charged=False, cost=2),
    Kind.CONNECTION: Rule(_ALWAYS, BACK_OFF, charged=False, cost=2),
    Kind.CONNECT_TIMEOUT: Rule(_ALWAYS, BACK_OFF, charged=False, cost=2),
    Kind.LOCAL_RESOURCES: Rule(MAX_REQUEUES, BACK_OFF, charged=False, cost=0),
    Kind.STALE_CONNECTION: Rule(_ALWAYS, AT_ONCE, cost=2),
    Kind.DISCONNECTED: Rule(_ALWAYS, BACK_OFF, cost=10),
    Kind.TIMEOUT: Rule(3, BACK_OFF, cost=10),
    Kind.TLS: Rule(2, BACK_OFF, cost=2),
    Kind.PROTOCOL_ERROR: Rule(2, BACK_OFF),
    Kind.MALFORMED_RESPONSE: Rule(2, BACK_OFF),
    Kind.NOT_JSON: Rule(1, CAPACITY),
    Kind.REDIRECT: Rule(2, BACK_OFF),
    Kind.NOT_FOUND: Rule(2, BACK_OFF),
    Kind.UNAUTHORIZED: Rule(MAX_REQUEUES, CAPACITY, charged=False, cost=0),
    # The cap was our guess; the next one is larger, until there is no larger one.
    Kind.TRUNCATED: Rule(_ALWAYS, AT_ONCE, charged=False, cost=0),
    # It was our own doing, and what is asked again is asked by the next run, at once.
    Kind.INTERRUPTED: Rule(_ALWAYS, AT_ONCE, charged=False, cost=0),
}
"""Kinds that are not named here end their row at once. INVALID_OUTPUT's limit is the job's."""
_TOLD_TO = Rule(_ALWAYS, BACK_OFF)
_WHEN_TOLD = {Kind.REJECTED, Kind.REQUEST_TOO_LARGE, Kind.FORBIDDEN, Kind.NOT_SERVED}
"""Refusals that end their row at once, unless the service says to ask again."""


class Again(NamedTuple):
    """The row is to be asked again after `wait` seconds; `cost` is drawn from the retry budget."""

    wait: float
    cost: float


def decide(failure: Failure, tried: Mapping[Kind, int], max_attempts: int, max_invalid: int) -> Again | None:
    """Whether a failed attempt's row is asked again. `tried` counts its failed attempts, this one among them.

    The service's own word counts, except where the row is not what it refuses: a quota, congestion, the key. A limit
    that refills is the scheduler's to wait for: the row goes as soon as there is enough for it.
    """
    kind = failure.kind
    rule = Rule(max_invalid, AT_ONCE) if kind is Kind.INVALID_OUTPUT else RULES.get(kind)
    if failure.should_retry and kind in _WHEN_TOLD:
        rule = _TOLD_TO
    if rule is None or tried[kind] > rule.again or (failure.should_retry is False and rule.charged):
        return None
    free_stale = 1 if Kind.STALE_CONNECTION in tried else 0
    charged = sum(n for k, n in tried.items() if k not in RULES or RULES[k].charged) - free_stale
    if charged >= max_attempts:
        return None
    if failure.retry_after is not None and not any(map(failure.refills, failure.limits)):
        stated = min(failure.retry_after, LONGEST_WAIT)
        return Again(stated + random.uniform(0, min(5.0, stated / 10)), rule.cost)
    state = cast(RetryCallState, SimpleNamespace(attempt_number=tried[kind]))
    return Again(rule.wait(state), rule.cost)


_ROWS_OWN = {"context_length_exceeded", "content_filter", "content_policy_violation", "string_above_max_length"}
_TOO_LONG = re.compile(r"reduce the length|maximum context length", re.IGNORECASE)
"""How Cerebras, OpenAI and vLLM word a prompt that is too long; only OpenAI is known to send a code with it."""
_REFUSALS = {Kind.REJECTED, Kind.FORBIDDEN, Kind.NOT_FOUND, Kind.MODEL_NOT_FOUND, Kind.NOT_SERVED}
_PAGES = {Kind.NOT_JSON, Kind.TLS, Kind.REDIRECT}
_HOPELESS = {Kind.CERTIFICATE, Kind.PROXY}
_UNLESS_ANSWERED = {Kind.FORBIDDEN, Kind.NOT_FOUND, Kind.MODEL_NOT_FOUND, Kind.NOT_SERVED, Kind.REDIRECT}
_UNSUPPORTED = 415
REFUSALS_AT_FIRST = 20
REFUSALS_IN_A_ROW = 500
PAGES_IN_A_ROW = 5
UNAUTHORIZED_AT_FIRST = 3
PROBES = (1.0, 10.0, 60.0)
"""Seconds between probes once a key that worked is refused: keys rotate, and single nodes err."""


class Guard:
    """Tells when failures are not the rows' but the run's. Pure state: it is told outcomes and says what follows.

    A service's refusal is `held` until some row is answered after it: were they all alike, none of these rows
    is a failure.
    """

    def __init__(self, wait: bool = False) -> None:
        """`wait` says that a day's quota is waited for, whatever its end."""
        self._wait = wait
        self._answered = self._key_worked = False
        self._refusals = 0
        self._unread = 0
        self._last: Failure | None = None
        self._misled: set[int] = set()
        self._refused_key = 0
        self.key_paused_until = 0.0
        """A key that worked was refused: nothing goes before this moment."""

    def answered(self) -> None:
        """A row was answered."""
        self._answered = self._key_worked = True
        self._refusals = self._refused_key = 0
        self._misled.clear()

    def answered_before(self) -> None:
        """An earlier run had answers: address and job were right then, whatever the key is now."""
        self._answered = True

    def holds(self, failure: Failure) -> bool:
        """Whether a row that ends with this failure must wait to be called failed."""
        own = failure.code in _ROWS_OWN or _TOO_LONG.search(failure.message)
        return failure.kind in _REFUSALS and not own

    def failed(self, failure: Failure, row: int, now: float) -> BatcherError | None:
        """An attempt failed: what ends the run, if anything does."""
        kind = failure.kind
        if kind in _HOPELESS or (kind in _UNLESS_ANSWERED and not self._answered):
            return ServiceError(sentence(failure))
        if failure.packing and self.holds(failure):
            # Small bodies go unpacked and may well be answered, so answers say nothing here.
            self._unread += 1
            if failure.status == _UNSUPPORTED or self._unread >= REFUSALS_AT_FIRST:
                return ServiceError(sentence(failure))
        if kind is Kind.NO_CREDIT:
            return PausedError(
                f"the account has no credit left: {_line(failure)}\nrun the same command again when it has"
            )
        long = failure.retry_after is None or failure.retry_after > LONGEST_WAIT
        if kind is Kind.DAY_QUOTA and long and not self._wait:
            return PausedError(
                f"the day's quota is used up{_until(failure)}: {_line(failure)}\nrun the same command again then"
            )
        if kind is Kind.UNAUTHORIZED:
            return self._key_refused(failure, now)
        if kind in _PAGES:
            self._misled.add(row)
            if len(self._misled) >= PAGES_IN_A_ROW:
                return PausedError(f"{sentence(failure)}\nrun the same command again when that has been mended")
        elif kind in _REFUSALS:
            self._refusals += self.holds(failure)
            self._last = failure
            if self._refusals >= (REFUSALS_IN_A_ROW if self._answered else REFUSALS_AT_FIRST):
                return self._refused()
        return None

    def give_up_on_held(self) -> ServiceError | None:
        """No answer can come that would tell whether held rows have failed: what ends the run, if none ever came."""
        return None if self._answered else self._refused()

    def _refused(self) -> ServiceError:
        said = sentence(self._last) if self._last else "no reason given"
        return ServiceError(f"{self._refusals} rows in a row were refused, so the run ends with them pending: {said}")

    def _key_refused(self, failure: Failure, now: float) -> ServiceError | None:
        if self._key_worked and now < self.key_paused_until:
            return None  # sent before the pause
        self._refused_key += 1
        if self._refused_key > (len(PROBES) if self._key_worked else UNAUTHORIZED_AT_FIRST - 1):
            return ServiceError(sentence(failure))
        if self._key_worked:
            self.key_paused_until = now + PROBES[self._refused_key - 1]
        return None


def _until(failure: Failure) -> str:
    """How long the service asks us to wait, and until when, as far as that is known."""
    if not failure.retry_after:
        return ""
    words = f" for {failure.retry_after / 3600:.1f} h"
    if failure.timing is None:
        return words
    end = failure.timing.sent_at / 1e6 + failure.timing.latency + failure.retry_after
    return f"{words}, until {datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC"


def _line(failure: Failure) -> str:
    """The service's own words, fit for one line."""
    text = " ".join(failure.message.split())
    return text if len(text) <= 300 else text[:299] + "…"


def sentence(failure: Failure) -> str:
    """What to say of a failure that ends everything, with what to check."""
    status = f" ({failure.status})" if failure.status else ""
    hints = {
        Kind.UNAUTHORIZED: "; check the key and its variable, service.api_key_env",
        Kind.FORBIDDEN: "; check that service.api_key_env names the variable of a key, and that this key may do this",
        Kind.MODEL_NOT_FOUND: "; check request.model",
        Kind.NOT_FOUND: "; check service.base_url and request.model",
        Kind.REDIRECT: "; put the address it names into service.base_url",
        Kind.CERTIFICATE: "; check service.base_url and this machine's certificates",
    }
    hint = hints.get(failure.kind, "")
    if failure.packing:
        hint = f"; no body sent as {failure.packing} was answered: check service.encoding and service.compression"
    return f"the service refuses{status}: {_line(failure)}{hint}"
