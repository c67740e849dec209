"""A model of the service: pure functions of (state, request, time), with randomness only from a seed."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from msgspec import UNSET, Struct
from msgspec.structs import replace

from batcher.simulator import bodies, cache, catalogue, queues, quota, requests, speech, stream, wire
from batcher.simulator.recorded import Recorded
from batcher.simulator.speech import Said
from batcher.simulator.stream import StreamFault

MODELS = ("gpt-oss-120b", "qwen-3.8-27b", "gemma-4-31b", "zai-glm-4.7")


class Fault(StrEnum):
    """What can go wrong besides an error status; that one is named by its number, such as `500`."""

    QUEUE = "queue"  # 429, refused as congested
    RESET = "reset"  # the connection is reset before a byte of the answer
    CUT = "cut"  # the connection ends in the middle of the body
    MALFORMED = "malformed"  # 200, and half of the JSON
    HTML = "html"  # 200, and a web page
    EMPTY = "empty"  # 200, and no choices
    INVALID = "invalid"  # 200, and content that does not fit the asked format
    HANG = "hang"  # nothing, until the client gives up or the connection is reset
    SLOW = "slow"  # a good answer, late
    SURROGATE = "surrogate"  # a good answer that ends with a lone surrogate and a NUL
    ERROR200 = "error200"  # 200, and an error inside


RateHeaders: TypeAlias = Literal["all", "answers", "none"]
"""Which answers about a model tell its limits: all, all but 429s, or none."""
Course: TypeAlias = tuple[tuple[float, float], ...]
"""Seconds since the first request and a share of what there is, in order; between them it goes in straight lines."""


def parse_limit(text: str) -> tuple[str, int | None]:
    """`[MODEL:][TIER:]BUCKET=N` as (bucket and whose, N), 0 for no limit; raises ValueError in words."""
    bucket, _, number = text.rpartition("=")
    if not number.isdecimal():
        raise ValueError(f"a limit is [MODEL:][TIER:]BUCKET=N, such as flex:tokens-minute=9000000, not {text!r}")
    quota.limit_of(bucket)
    return bucket, int(number) or None


def parse_capacity(text: str) -> tuple[str, int | None]:
    """`TIER=N` as (tier, N), 0 for no bound; raises ValueError that says what is allowed."""
    tier, _, number = text.partition("=")
    if tier not in queues.TIERS or not number.isdecimal():
        raise ValueError(f"a tier's capacity is TIER=N, such as flex=50, not {text!r}; {_TIERS}")
    return tier, int(number) or None


def parse_drift(texts: Sequence[str]) -> dict[str, Course]:
    """`[TIER:]SECONDS=SHARE`, each, as the course of the capacity and of each tier's; raises ValueError in words."""
    points: dict[str, list[tuple[float, float]]] = {}
    for text in texts:
        tier, _, point = text.rpartition(":")
        seconds, _, share = point.partition("=")
        try:
            moment = float(seconds), float(share)
        except ValueError:
            raise ValueError(f"a drift is [TIER:]SECONDS=SHARE, such as 600=0.5, not {text!r}") from None
        points.setdefault(tier, []).append(moment)
    return {tier: tuple(sorted(course)) for tier, course in points.items()}


def parse_fault(text: str) -> tuple[str, float]:
    """`KIND=SHARE` as (kind, share), such as `500=0.05`; raises ValueError that says what is allowed."""
    kind, _, share = text.partition("=")
    try:
        number = float(share)
    except ValueError:
        raise ValueError(f"a fault is KIND=SHARE, such as 500=0.05, not {text!r}") from None
    _check_fault(kind, number)
    return kind, number


def _check_fault(kind: str, share: float) -> None:
    if kind not in _FAULTS:
        raise ValueError(
            f"unknown fault {kind!r}; known are {', '.join([*Fault, *StreamFault])} and the statuses 400 to 599"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"the share of fault {kind} must be between 0 and 1, not {share:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the simulated service is like; times in seconds, None is no limit. Raises ValueError for what cannot be."""

    models: tuple[str, ...] = MODELS
    encodings: tuple[str, ...] = bodies.ENCODINGS  # of request bodies, besides plain JSON
    final_chunk: stream.FinalChunk = "asked"  # of streams: where usage and times stand
    answers: Recorded | None = None  # said to the questions in it
    key: str | None = None  # the only key accepted; None: any
    requests_per_minute: int | Literal["plan"] | None = "plan"  # of each model; the developer plan's
    requests_per_day: int | None = None
    tokens_per_minute: int | Literal["plan"] | None = "plan"  # all; by plan 3 for each uncached one
    uncached_tokens_per_minute: int | Literal["plan"] | None = "plan"  # none where only the one above is stated
    limits: Mapping[str, int | None] = field(default_factory=dict)  # [MODEL:][TIER:]BUCKET -> limit, over those above
    flex_limits: float = 5.0  # how many times the others' limits flex has
    others: float = 0.0  # the share of every limit's refill that other clients of the account use
    assumed_completion_tokens: int = 16_384  # charged at first for a request without max_completion_tokens
    reserves_cached: bool = False  # at first uncached tokens are charged for what the cache has, too
    keeps_reservation: bool = False  # what was charged at first stays charged
    rate_headers: RateHeaders = "all"
    retry_after: bool = False  # send that header with refusals
    latency: float = 0.05  # of every answer
    seconds_per_prompt_token: float = 0.000_03
    seconds_per_completion_token: float = 0.000_8
    jitter: float = 0.1  # the share by which an answer takes longer or shorter, at most
    capacity: int | None = None  # requests served at once; the others queue
    capacities: Mapping[str, int | None] = field(default_factory=dict)  # of them, or besides, those of one tier
    drift: Mapping[str, Course] = field(default_factory=dict)  # of a tier's capacity, or by "" of the whole
    queue_limit: float = 5.0  # a request that would queue longer is refused
    replicas: int = 1  # among which the capacity is divided; each has its own cache
    cache_tokens: int = 2_000_000  # that a replica keeps of each model; 0: no prefix is cached
    cache_lifetime: float = 300.0  # after the last use
    faults: Mapping[str, float] = field(default_factory=dict)  # kind -> share of the admitted requests
    poison: Mapping[str, int] = field(default_factory=dict)  # text in a prompt -> the status that always answers it
    slow: float = 5.0  # added by the fault of that name
    hang: float = 600.0  # until the fault of that name resets the connection
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            *("requests_per_minute", "requests_per_day", "tokens_per_minute", "uncached_tokens_per_minute"),
            *("capacity", "replicas"),
        ):
            limit = getattr(self, name)
            if limit not in (None, "plan") and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, not {limit}")
        for text, limit in self.limits.items():
            quota.limit_of(text)
            if limit is not None and limit < 1:
                raise ValueError(f"the limit {text} must be at least 1, or None for no limit, not {limit}")
        _check_capacities(self)
        if not 0 <= self.others <= 1:
            raise ValueError(f"others must be a share between 0 and 1, not {self.others:g}")
        if not 0 < self.flex_limits < math.inf:
            raise ValueError(f"flex_limits must be above 0, not {self.flex_limits:g}")
        if self.rate_headers not in get_args(RateHeaders):
            raise ValueError(
                f"rate_headers must be one of {', '.join(get_args(RateHeaders))}, not {self.rate_headers!r}"
            )
        if self.cache_tokens < 0:
            raise ValueError(f"cache_tokens must be 0 or more, not {self.cache_tokens}")
        for name in (
            "latency",
            "seconds_per_prompt_token",
            "seconds_per_completion_token",
            "queue_limit",
            "cache_lifetime",
            "slow",
            "hang",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more seconds, not {getattr(self, name):g}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1, not {self.jitter:g}")
        for kind, share in self.faults.items():
            _check_fault(kind, share)
        if (whole := sum(self.faults.values())) > 1 + 1e-9:
            raise ValueError(f"the shares of all faults must not pass 1; they make {whole:g}")
        for name in self.encodings:
            if name not in bodies.ENCODINGS:
                raise ValueError(f"unknown encoding {name!r}; known are {', '.join(bodies.ENCODINGS)}")
        if self.final_chunk not in get_args(stream.FinalChunk):
            shapes = ", ".join(get_args(stream.FinalChunk))
            raise ValueError(f"final_chunk must be one of {shapes}, not {self.final_chunk!r}")
        for text, status in self.poison.items():
            if status not in wire.ERRORS:
                raise ValueError(f"the status for poison {text!r} must be between 400 and 599, not {status}")

    def limits_of(self, model: str, tier: str) -> dict[str, float]:
        """The limits of a model in the tiers that are not flex, or in flex, by the buckets' names."""
        limits: dict[str, float | None] = dict(quota.PLANS.get(model, quota.PLAN))
        if self.requests_per_minute != "plan":
            limits["requests-minute"] = self.requests_per_minute
        if self.requests_per_day is not None:
            limits["requests-day"] = self.requests_per_day
        if self.uncached_tokens_per_minute != "plan":
            uncached = limits["uncached-tokens-minute"] = self.uncached_tokens_per_minute
            if uncached is not None:
                limits["tokens-minute"] = uncached * quota.TOTAL
        elif self.tokens_per_minute != "plan":
            limits["uncached-tokens-minute"] = None
        if self.tokens_per_minute != "plan":
            limits["tokens-minute"] = self.tokens_per_minute
        return quota.merged(limits, self.limits, model, tier, self.flex_limits)

    def places(self, tier: str, seconds: float) -> list[float]:
        """How many requests of a tier, or by "" in all, each replica serves at once, so long after the first one."""
        bound = self.capacities.get(tier) if tier else self.capacity
        if bound is None:
            return [math.inf] * self.replicas
        whole = max(self.replicas, math.floor(bound * _share_at(self.drift.get(tier, ()), seconds) + 1e-9))
        each, rest = divmod(whole, self.replicas)
        return [each + (number < rest) for number in range(self.replicas)]


def _check_capacities(settings: Settings) -> None:
    bounds = {f"the capacity of {tier}": bound for tier, bound in settings.capacities.items()}
    for name, bound in {"capacity": settings.capacity, **bounds}.items():
        if bound is not None and bound < settings.replicas:
            raise ValueError(f"{name} must be at least 1 for each of the {settings.replicas} replicas, not {bound}")
    for tier in (*settings.capacities, *settings.drift):
        if tier not in queues.TIERS and (tier or tier in settings.capacities):
            raise ValueError(f"unknown tier {tier!r}; {_TIERS}")
    for tier, course in settings.drift.items():
        if (settings.capacities.get(tier) if tier else settings.capacity) is None:
            raise ValueError(f"drift of {tier or 'the whole'}: there is no capacity that could drift")
        if not all(0 <= seconds < math.inf and 0 <= share < math.inf for seconds, share in course):
            raise ValueError("drift: seconds and shares must be 0 or more")
        if [seconds for seconds, _ in course] != sorted({seconds for seconds, _ in course}):
            raise ValueError("drift: the seconds must go up")


_FAILURES: dict[str, tuple[int, bytes, str]] = {  # faults without an answer of the model: status, body, content type
    Fault.RESET: (0, b"", ""),
    Fault.QUEUE: (429, wire.QUEUE_EXCEEDED, "application/json"),
    Fault.HTML: (200, wire.PAGE, "text/html"),
    Fault.ERROR200: (200, b'{"error":%s}' % wire.ERRORS[500], "application/json"),
    **{str(status): (status, body, wire.error_type(status)) for status, body in wire.ERRORS.items()},
}
_FAULTS = {*Fault, *StreamFault, *_FAILURES}
_OF_STREAMS = frozenset(StreamFault)
_TIERS = f"known are {', '.join(queues.TIERS)}"
_SPARED, _WASTED = 0.75, 0.9  # of the time of a token: where it was predicted, and where that was in vain
_AVERAGED = 10.0  # seconds whose queue times are what is expected of the next one

# msgspec cannot encode a lone surrogate, so the text carries private-use characters that are replaced on the wire.
# Inside JSON that is itself in a string, NUL has to be escaped twice.
_ENDING, _ENDING_IN_JSON = "\ue000\ue001", "\ue000\ue002"
_SPOILED = {0xE000: "\ud800", 0xE001: "\0", 0xE002: r"\u0000"}
_SPOILED_BYTES = {"\ue000".encode(): rb"\ud800", "\ue001".encode(): rb"\u0000", "\ue002".encode(): rb"\\u0000"}


class Answer(Struct, frozen=True):
    """What the service sends for one request, when, and what that means for its limits."""

    status: int  # 0: nothing is sent, the connection is reset
    body: bytes = b""
    content_type: str = "application/json"
    pieces: tuple[stream.Piece, ...] = ()  # what is sent of a stream; the body is what it comes to
    ends_after: int | None = None  # bytes of the body, or of the pieces, after which the connection ends
    stalls: float = 0.0  # seconds before it does
    delay: float = 0.0  # seconds between the request and this answer, of a stream its beginning
    fault: str | None = None  # the fault that made it, or `poison`
    model: str | None = None  # whose limits its headers tell
    tier: str | None = None  # that serves it, or refuses to
    charged: int = 0  # tokens, before it was known what it takes
    charged_uncached: int = 0  # of them
    settled: int = 0  # tokens, when it leaves
    settled_uncached: int = 0  # of them
    retry_after: float | None = None
    prompt: str = ""  # the last user message, or the first prompt
    content: str | None = None  # the first choice's text, where a client can read it
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_time: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether a client gets all of it."""
        return self.status != 0 and self.ends_after is None


@dataclass(slots=True, eq=False)
class Waiting(queues.Waiter):
    """An admitted request until it is served; `answer` is there from then on."""

    question: wire.Question
    digest: bytes
    fault: str | None
    said: list[Said]
    charged: int
    charged_uncached: int
    arrived: float
    replica: int
    blocks: list[bytes]
    pace: float
    answer: Answer | None = field(default=None, init=False)


class Service:
    """The whole state of one simulated service. It reads no clock: every call is told the time.

    `now` is in seconds from any origin and never goes back; `epoch` is the Unix time of that origin.
    """

    def __init__(self, settings: Settings, epoch: float = 0.0) -> None:
        self.settings = settings
        self.epoch = epoch
        self._key = str(settings.seed).encode()
        self._faults = sorted(settings.faults.items())
        self._quotas: dict[tuple[str, str], quota.Buckets] = {}
        unbounded = dict.fromkeys(queues.TIERS, math.inf)
        self._lines = [queues.Line[Waiting](math.inf, unbounded) for _ in range(settings.replicas)]
        self._bounded = _is_bounded(settings)
        self._sized: Settings | None = None  # by which the lines have their places
        self._queued = {tier: queues.Average(_AVERAGED) for tier in queues.TIERS}
        self._begun: list[Waiting] = []  # since the last `advance`
        self._caches: dict[tuple[str, int], cache.PrefixCache] = {}
        self._first: float | None = None  # when the first request came
        self._flowed = 0.0  # until when the queues have been worked off
        self._turn = 0  # of the replicas, where nothing else decides
        self._seen: Counter[bytes] = Counter()  # admitted requests by body, counted only where faults are drawn
        self._answered = 0

    def change(self, now: float | None = None, /, **settings: object) -> None:
        """From now on the service is otherwise; what is in buckets, queues and caches stays. Raises ValueError.

        Without `now` buckets refill by the new limits from the last request on.
        """
        changed = dataclasses.replace(self.settings, **settings)  # type: ignore[arg-type]
        if changed.replicas != self.settings.replicas:
            raise ValueError("replicas cannot change")
        if now is not None:
            self._flow(now)
            for buckets in self._quotas.values():
                buckets.refill(now, self.settings.others)
        self.settings = changed
        self._faults = sorted(changed.faults.items())
        self._bounded = _is_bounded(changed) or any(line.waiting for line in self._lines)
        for (model, tier), buckets in self._quotas.items():
            buckets.change(changed.limits_of(model, tier))

    def receive(
        self,
        method: str,
        path: str,
        authorization: str | None,
        body: bytes,
        now: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Answer | Waiting:
        """Decide everything about the answer to a request that arrives now, or have it wait for its turn.

        The names of `headers` are in lower case, or the mapping does not mind.
        """
        settings = self.settings
        path, _, query = path.partition("?")
        listing = catalogue.is_listing(path)
        if not listing and path not in requests.ENDPOINTS:
            return Answer(404, content_type="text/plain")
        if not (listing and catalogue.is_open(path)):
            scheme, _, key = (authorization or "").partition(" ")
            if scheme.lower() != "bearer" or not key.strip():
                return self._brief(403, wire.ERRORS[403])
            if settings.key is not None and key.strip() != settings.key:
                return self._brief(401, wire.ERRORS[401])
        if method != ("GET" if listing else "POST"):
            return self._brief(405, wire.ERRORS[405])
        try:
            if listing:
                limits = {model: settings.limits_of(model, "default") for model in settings.models}
                return self._brief(200, catalogue.listed(path, query, limits))
            question, body = requests.read(path, headers, body, settings.encodings)
            if question.model not in settings.models:
                raise wire.RefusedError(404, wire.no_model(question.model))
            catalogue.refuse(question)
        except wire.RefusedError as refused:
            return self._brief(refused.status, refused.body)
        return self.admit(question, body, now)

    def advance(self, now: float) -> list[Waiting]:
        """Those that wait no longer, since the last time this was asked."""
        self._flow(now)
        begun, self._begun = self._begun, []
        return begun

    def next(self) -> float | None:
        """When to ask again who waits no longer; None where nobody waits."""
        if self._begun:
            return self._flowed
        at = self._next()
        return at if at < math.inf else None

    def leave(self, waiting: Waiting, now: float) -> Answer:
        """The client of one that waits has given up; gives what stands in the book: nothing was made or used.

        Where its turn has just come it is too late for that.
        """
        self._flow(now)
        if waiting.answer is not None:
            self.settle(waiting.answer, now)
            return waiting.answer
        self._lines[waiting.replica].leave(waiting)
        question = waiting.question
        self._buckets(question.model, waiting.tier, now).give_back(waiting.charged, waiting.charged_uncached)
        return Answer(0, fault=waiting.fault, model=question.model, tier=waiting.tier, prompt=question.prompts[0])

    def settle(self, answer: Answer, now: float) -> dict[str, str]:
        """Correct the charge as the answer leaves now; gives its rate-limit headers."""
        settings = self.settings
        headers: dict[str, str] = {}
        if answer.model is not None and answer.tier is not None:
            buckets = self._buckets(answer.model, answer.tier, now)
            if answer.charged:
                buckets.give_back(answer.charged - answer.settled, answer.charged_uncached - answer.settled_uncached)
            if settings.rate_headers == "all" or (settings.rate_headers == "answers" and answer.status != 429):
                headers = buckets.headers()
        if settings.retry_after and answer.retry_after is not None:
            headers["retry-after"] = str(math.ceil(answer.retry_after))
        return headers

    def levels(self, model: str, now: float, tier: str = "default") -> dict[str, float]:
        """What is in each bucket of a model and tier, by the names in headers."""
        return self._buckets(model, tier, now).levels()

    def _brief(
        self, status: int, body: bytes, model: str | None = None, tier: str | None = None, wait: float | None = None
    ) -> Answer:
        """An answer for which no text is made and nothing is charged."""
        return Answer(status, body, delay=self.settings.latency, model=model, tier=tier, retry_after=wait)

    def _buckets(self, model: str, tier: str, now: float) -> quota.Buckets:
        """The buckets of a model and tier as of now; full when first asked for."""
        whose = model, "flex" if tier == "flex" else "default"
        buckets = self._quotas.get(whose)
        if buckets is None:
            buckets = self._quotas[whose] = quota.Buckets(self.settings.limits_of(*whose), now)
        buckets.refill(now, self.settings.others)
        return buckets

    def admit(self, question: wire.Question, body: bytes, now: float) -> Answer | Waiting:
        """Charge the limits and answer or queue, or refuse and charge nothing."""
        settings = self.settings
        self._flow(now)
        cap = settings.assumed_completion_tokens if question.cap is None else question.cap
        charged = question.tokens + cap * question.n * len(question.prompts)
        blocks = self._blocks(question)
        refusal: Answer | None = None
        for tier in queues.TIERS if question.tier == "auto" else (question.tier or "default",):
            replica = self._replica_for(question, tier, now)
            known = 0 if settings.reserves_cached else self._known(question, replica, blocks, now)
            uncached = charged - known
            refusal = self._refusal(question, tier, replica, charged, uncached, now)
            if refusal is None:
                break
        if refusal is not None:
            return refusal
        self._turn += 1
        self._buckets(question.model, tier, now).charge(charged, uncached)

        digest = blake2b(body, key=self._key, digest_size=16).digest()
        for text, status in settings.poison.items():
            if text in question.text:
                return self._fail(
                    "poison", (status, wire.ERRORS[status], "application/json"), question, tier, charged, uncached
                )
        fault = self._draw_fault(digest)
        if fault is not None and fault in _FAILURES:
            return self._fail(fault, _FAILURES[fault], question, tier, charged, uncached)
        if not question.stream and fault in _OF_STREAMS:
            fault = None
        ending = "" if fault != Fault.SURROGATE else _ENDING_IN_JSON if question.json else _ENDING
        misfits = fault == Fault.INVALID
        said = speech.say(question, self._key, settings.answers, ending=ending, misfits=misfits)
        pace = 1 + settings.jitter * (2 * _share(digest[:8]) - 1)
        takes = sum(self._seconds(question.tokens, said)) * pace
        waiting = Waiting(tier, takes, question, digest, fault, said, charged, uncached, now, replica, blocks, pace)
        line = self._lines[replica]
        if self._bounded and not line.free(tier):
            line.join(waiting, now)
            return waiting
        answer, until = self._answer(waiting, now)
        if self._bounded:
            line.occupy(tier, until)
        return answer

    def _replica_for(self, question: wire.Question, tier: str, now: float) -> int:
        """Equal keys go to the same replica, others to where they wait least and the least is done, in turn."""
        count = len(self._lines)
        if count == 1:
            return 0
        if question.cache_key is not None:
            return int.from_bytes(blake2b(question.cache_key.encode(), key=self._key, digest_size=8).digest()) % count
        turns = [(self._turn + number) % count for number in range(count)]
        if not self._bounded:
            return turns[0]
        return min(turns, key=lambda number: (self._lines[number].wait(tier, now), self._lines[number].serving))

    def _refusal(
        self, question: wire.Question, tier: str, replica: int, charged: int, uncached: int, now: float
    ) -> Answer | None:
        """Why a tier does not take a request now; None: it does."""
        settings = self.settings
        buckets = self._buckets(question.model, tier, now)
        if (short := buckets.shortage(charged, uncached)) is not None:
            paired = f"uncached-{short.bucket}" in buckets.levels()
            body = wire.QUOTA_EXCEEDED[f"total-{short.bucket}" if paired else short.bucket]
            return self._brief(429, body, question.model, tier, short.wait)
        if not self._bounded:
            return None
        wait = self._lines[replica].wait(tier, now)
        limit, expected = settings.queue_limit, wait
        if question.threshold is not None and question.tier in ("flex", "auto"):
            limit, expected = question.threshold, max(wait, self._queued[tier].mean(now) or 0.0)
        if expected > limit:
            return self._brief(429, wire.QUEUE_EXCEEDED, question.model, tier, expected - limit)
        return None

    def _next(self) -> float:
        """When the queues are to be looked at again: a place becomes free, or the capacity drifts."""
        at = min((line.next() for line in self._lines if line.waiting), default=math.inf)
        if at < math.inf and self._first is not None:
            ends = max((course[-1][0] for course in self.settings.drift.values() if course), default=0.0)
            if self._flowed < self._first + ends:  # it drifts in steps of a second
                at = min(at, self._first + self._second(self._flowed) + 1)
        return at

    def _flow(self, now: float) -> None:
        """Let places become free and those who wait be served, each at his moment, until now."""
        if self._first is None:
            self._first = self._flowed = now
        if not self._bounded:
            return
        while (at := self._next()) <= now:
            self._step(at)
        self._step(now)

    def _step(self, now: float) -> None:
        """What happens in the queues at one moment."""
        self._flowed = max(self._flowed, now)
        if self._sized is not self.settings or self.settings.drift:
            self._resize(now)
        for line in self._lines:
            line.release(now)
            while line.waiting and (waiting := line.call()) is not None:
                waiting.answer, until = self._answer(waiting, now)
                line.occupy(waiting.tier, until, called=True)
                self._begun.append(waiting)

    def _second(self, now: float) -> int:
        """Whole seconds since the first request, such that the next begins after now: rounding may hide the last."""
        first = self._first or 0.0
        passed = math.floor(now - first)
        return passed + (first + passed + 1 <= now)

    def _resize(self, now: float) -> None:
        """Give the lines the places that they have by the settings."""
        self._sized = self.settings
        seconds = self._second(now)
        whole, *own = (self.settings.places(tier, seconds) for tier in ("", *queues.TIERS))
        for number, line in enumerate(self._lines):
            line.resize(whole[number], {tier: places[number] for tier, places in zip(queues.TIERS, own, strict=True)})

    def _blocks(self, question: wire.Question) -> list[bytes]:
        """The digests of a prompt's blocks; none where nothing of it would be kept."""
        if question.tokens < cache.BLOCK or self.settings.cache_tokens < cache.BLOCK:
            return []
        return cache.chain(question.prefix, cache.BLOCK * wire.BYTES_PER_TOKEN)

    def _cache(self, model: str, replica: int) -> cache.PrefixCache:
        """What a replica keeps of a model's prompts."""
        kept = self._caches.get((model, replica))
        if kept is None:
            kept = cache.PrefixCache(self.settings.cache_tokens, self.settings.cache_lifetime)
            self._caches[model, replica] = kept
        return kept

    def _known(self, question: wire.Question, replica: int, blocks: list[bytes], now: float) -> int:
        """Tokens of a prompt that need not be read."""
        known = self._cache(question.model, replica).known(blocks, now) if blocks else 0
        return min(known * cache.BLOCK, question.tokens)

    def _read(self, waiting: Waiting, now: float) -> int:
        """Tokens of a prompt that need not be read as it is served now; afterwards all of it is known."""
        question, blocks = waiting.question, waiting.blocks
        if not blocks:
            return 0
        kept = self._cache(question.model, waiting.replica)
        known = kept.known(blocks, now)
        cached = min(known * cache.BLOCK, question.tokens)
        seconds = (question.tokens - cached) * self.settings.seconds_per_prompt_token * waiting.pace
        kept.keep(blocks, known, now, now + seconds)
        return cached

    def _seconds(self, prompt_tokens: int, said: list[Said]) -> tuple[float, float, float]:
        """How long an answer takes besides waiting: at least, for its prompt, and for what is said."""
        settings = self.settings
        longest = max(one.tokens - _SPARED * one.accepted - _WASTED * one.rejected for one in said)
        return (
            settings.latency,
            prompt_tokens * settings.seconds_per_prompt_token,
            longest * settings.seconds_per_completion_token,
        )

    def _draw_fault(self, digest: bytes) -> str | None:
        """The fault of this request, by the seed, the body, and how often that body was admitted before."""
        if not self._faults:
            return None
        times = self._seen[digest]
        self._seen[digest] = times + 1
        drawn = _share(blake2b(digest + times.to_bytes(8), key=self._key, digest_size=8).digest())
        for kind, share in self._faults:
            if drawn < share:
                return kind
            drawn -= share
        return None

    def _fail(
        self,
        fault: str,
        failure: tuple[int, bytes, str],
        question: wire.Question,
        tier: str,
        charged: int,
        uncached: int,
    ) -> Answer:
        """The answer of a fault; no token was used."""
        status, body, content_type = failure
        kept = self.settings.keeps_reservation
        return Answer(
            status,
            body,
            content_type,
            delay=self.settings.latency,
            fault=fault,
            model=question.model,
            tier=tier,
            charged=charged,
            charged_uncached=uncached,
            settled=charged if kept else 0,
            settled_uncached=uncached if kept else 0,
            retry_after=1.0 if status in (429, 503) else None,
            prompt=question.prompts[0],
        )

    def _answer(self, waiting: Waiting, now: float) -> tuple[Answer, float]:
        """The model's answer to a request that is served from now on, spoiled as its fault says, and until when."""
        settings, question, said, fault = self.settings, waiting.question, waiting.said, waiting.fault
        queue_time = now - waiting.arrived
        if self._bounded:
            self._queued[waiting.tier].add(queue_time, now)
        cached = self._read(waiting, now)
        prompt_tokens, completion_tokens = question.tokens, sum(one.tokens for one in said)
        used = prompt_tokens + completion_tokens
        base, prompt_time, completion_time = (
            part * waiting.pace for part in self._seconds(prompt_tokens - cached, said)
        )
        served = base + prompt_time + completion_time
        created = self.epoch + waiting.arrived
        self._answered += 1
        given = speech.given(question, said)
        completed = wire.Completed(
            id=f"{'chatcmpl' if question.chat else 'cmpl'}-{waiting.digest.hex()[:16]}-{self._answered}",
            object="chat.completion" if question.chat else "text_completion",
            created=int(created),
            model=question.model,
            system_fingerprint=f"fp_{settings.seed & 0xFFFFFFFFFF:010x}",
            choices=[] if fault == Fault.EMPTY else [one.choice(i, question) for i, one in enumerate(given)],
            usage=wire.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                total_tokens=used,
                completion_tokens_details=_details(question, said),
                prompt_tokens_details=wire.PromptDetails(cached),
                image_tokens=question.image_tokens or UNSET,
            ),
            time_info=wire.TimeInfo(queue_time, prompt_time, completion_time, queue_time + served, created),
            service_tier=question.tier if question.chat else UNSET,
            service_tier_used=waiting.tier if question.tier == "auto" else UNSET,
        )
        kept = settings.keeps_reservation
        answer = Answer(
            200,
            wire.ENCODER.encode(completed),
            delay=queue_time + served,
            fault=fault,
            model=question.model,
            tier=waiting.tier,
            charged=waiting.charged,
            charged_uncached=waiting.charged_uncached,
            settled=waiting.charged if kept else used,
            settled_uncached=waiting.charged_uncached if kept else used - cached,
            prompt=question.prompts[0],
            content=given[0].text(),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=cached,
            queue_time=queue_time,
        )
        if question.stream:
            answer = replace(
                answer,
                content_type=stream.CONTENT_TYPE,
                pieces=stream.pieces(completed, given, question, settings.final_chunk, completion_time),
                delay=answer.delay - completion_time,
            )
        return answer if fault is None else _spoil(answer, settings, waiting.digest), now + served


def _is_bounded(settings: Settings) -> bool:
    """Whether anybody may have to wait."""
    return settings.capacity is not None or any(bound is not None for bound in settings.capacities.values())


def _share_at(course: Course, seconds: float) -> float:
    """What a course says at a moment; 1 where it says nothing."""
    before = after = None
    for point in course:
        if point[0] <= seconds:
            before = point
        else:
            after = point
            break
    if before is None or after is None:
        return (before or after or (0.0, 1.0))[1]
    return before[1] + (after[1] - before[1]) * (seconds - before[0]) / (after[0] - before[0])


def _details(question: wire.Question, said: Sequence[Said]) -> wire.CompletionDetails:
    """What the completion's tokens were."""
    predicted = question.prediction is not None
    return wire.CompletionDetails(
        sum(one.reasoning_tokens for one in said),
        sum(one.accepted for one in said) if predicted else UNSET,
        sum(one.rejected for one in said) if predicted else UNSET,
    )


def _spoil(answer: Answer, settings: Settings, digest: bytes) -> Answer:
    """A good answer as its fault leaves it."""
    half = (sum(len(piece.data) for piece in answer.pieces) or len(answer.body)) // 2
    match answer.fault:
        case Fault.EMPTY:
            return replace(answer, content=None)
        case Fault.MALFORMED:
            if answer.pieces:
                pieces, rest = stream.malformed(answer.pieces)
                return replace(answer, content=None, body=rest, pieces=pieces)
            return replace(answer, content=None, body=answer.body[:half])
        case Fault.CUT:
            return replace(answer, content=None, ends_after=half)
        case Fault.HANG:
            return replace(answer, content=None, status=0, body=b"", pieces=(), delay=settings.hang)
        case Fault.SLOW:
            return replace(answer, delay=answer.delay + settings.slow)
        case Fault.SURROGATE:
            content = (answer.content or "").translate(_SPOILED)
            pieces = tuple(stream.Piece(at, _spoil_bytes(data)) for at, data in answer.pieces)
            return replace(answer, body=_spoil_bytes(answer.body), pieces=pieces, content=content)
        case StreamFault.BROKEN:
            pieces = stream.broken(answer.pieces, stream.ERROR, named=digest[-1] % 2 == 0)
            return replace(answer, content=None, body=stream.ERROR, pieces=pieces)
        case StreamFault.STALL:
            return replace(answer, content=None, ends_after=half, stalls=settings.hang)
        case StreamFault.UNDONE:
            pieces, rest = stream.undone(answer.pieces)
            return replace(answer, content=None, body=rest, pieces=pieces)
        case StreamFault.RAGGED:
            return replace(answer, pieces=stream.ragged(answer.pieces))
    return answer


def _spoil_bytes(data: bytes) -> bytes:
    """The marks of a spoiled text as what they stand for."""
    for mark, spoiled in _SPOILED_BYTES.items():
        data = data.replace(mark, spoiled)
    return data


def _share(digest: bytes) -> float:
    """Eight bytes of a hash as a number from 0 to 1, without 1."""
    return int.from_bytes(digest) / 2**64
