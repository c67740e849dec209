"""A model of the service: pure functions of (state, request, time), with randomness only from a seed."""

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from random import Random
from urllib.parse import unquote

from msgspec import UNSET, DecodeError, Struct, ValidationError
from msgspec.structs import replace

from batcher.simulator import answers, wire

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
        raise ValueError(f"unknown fault {kind!r}; known are {', '.join(Fault)} and the statuses 400 to 599")
    if not 0 <= share <= 1:
        raise ValueError(f"the share of fault {kind} must be between 0 and 1, not {share:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the simulated service is like; times in seconds, None is no limit. Raises ValueError for what cannot be."""

    models: tuple[str, ...] = MODELS
    key: str | None = None  # the only key accepted; None: any
    requests_per_minute: int | None = 1_000
    requests_per_day: int | None = None
    tokens_per_minute: int | None = 1_000_000
    assumed_completion_tokens: int = 16_384  # charged at first for a request without max_completion_tokens
    retry_after: bool = False  # send that header with refusals
    latency: float = 0.05  # of every answer
    seconds_per_prompt_token: float = 0.000_03
    seconds_per_completion_token: float = 0.000_8
    jitter: float = 0.1  # the share by which an answer takes longer or shorter, at most
    capacity: int | None = None  # requests served at once; the others queue
    queue_limit: float = 5.0  # a request that would queue longer is refused
    faults: Mapping[str, float] = field(default_factory=dict)  # kind -> share of the admitted requests
    poison: Mapping[str, int] = field(default_factory=dict)  # text in a prompt -> the status that always answers it
    slow: float = 5.0  # added by the fault of that name
    hang: float = 600.0  # until the fault of that name resets the connection
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "requests_per_day", "tokens_per_minute", "capacity"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, not {limit}")
        for name in (
            "latency",
            "seconds_per_prompt_token",
            "seconds_per_completion_token",
            "queue_limit",
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
        for text, status in self.poison.items():
            if status not in wire.ERRORS:
                raise ValueError(f"the status for poison {text!r} must be between 400 and 599, not {status}")


@dataclass(slots=True)
class Said:
    """What the model said for one choice, in how many tokens."""

    reasoning: str
    reasoning_tokens: int
    content: str
    tokens: int  # of both
    finish_reason: str

    def choice(self, index: int, chat: bool) -> wire.Choice:
        """The choice on the wire."""
        if chat:
            return wire.Choice(
                index, self.finish_reason, wire.Reply("assistant", self.content, self.reasoning or UNSET)
            )
        return wire.Choice(index, self.finish_reason, text=self.content)


_FAILURES: dict[str, tuple[int, bytes, str]] = {  # faults without an answer of the model: status, body, content type
    Fault.RESET: (0, b"", ""),
    Fault.QUEUE: (429, wire.QUEUE_EXCEEDED, "application/json"),
    Fault.HTML: (200, wire.PAGE, "text/html"),
    Fault.ERROR200: (200, b'{"error":%s}' % wire.ERRORS[500], "application/json"),
    **{str(status): (status, body, "application/json") for status, body in wire.ERRORS.items()},
}
_FAULTS = {*Fault, *_FAILURES}
_HEADERS = {
    name: [f"x-ratelimit-{what}-{name}" for what in ("limit", "remaining", "reset")] for name in wire.QUOTA_EXCEEDED
}
_EFFORTS: dict[str | None, int] = {"low": 1, "medium": 2, "high": 4}  # sentences of reasoning

# msgspec cannot encode a lone surrogate, so the text carries private-use characters that are replaced on the wire.
# Inside JSON that is itself in a string, NUL has to be escaped twice.
_ENDING, _ENDING_IN_JSON = "\ue000\ue001", "\ue000\ue002"
_SPOILED = {0xE000: "\ud800", 0xE001: "\0", 0xE002: r"\u0000"}
_SPOILED_BYTES = {"\ue000".encode(): rb"\ud800", "\ue001".encode(): rb"\u0000", "\ue002".encode(): rb"\\u0000"}


@dataclass(slots=True)
class Bucket:
    """A quota that refills continuously: `limit` more each `window` seconds, never above `limit`, below 0 in debt."""

    limit: int
    window: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Bring the level to now."""
        self.level = min(self.limit, self.level + (now - self.at) * self.limit / self.window)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds from the last refill until the amount is there."""
        return max(0.0, (amount - self.level) * self.window / self.limit)


class Answer(Struct, frozen=True):
    """What the service sends for one request, when, and what that means for its limits."""

    status: int  # 0: nothing is sent, the connection is reset
    body: bytes = b""
    content_type: str = "application/json"
    ends_after: int | None = None  # bytes of the body after which the connection ends
    delay: float = 0.0  # seconds between the request and this answer
    fault: str | None = None  # the fault that made it, or `poison`
    model: str | None = None  # whose limits its headers tell
    refund: float = 0.0  # tokens charged and not used; negative when more were used
    retry_after: float | None = None
    prompt: str = ""  # the last user message, or the first prompt
    content: str | None = None  # the first choice's text, where a client can read it
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def whole(self) -> bool:
        """Whether a client gets all of it."""
        return self.status != 0 and self.ends_after is None


class Service:
    """The whole state of one simulated service. It reads no clock: every call is told the time.

    `now` is in seconds from any origin and never goes back; `epoch` is the Unix time of that origin.
    """

    def __init__(self, settings: Settings, epoch: float = 0.0) -> None:
        self.settings = settings
        self.epoch = epoch
        self._key = str(settings.seed).encode()
        self._faults = sorted(settings.faults.items())
        self._buckets: dict[str, dict[str, Bucket]] = {}
        self._busy: list[float] = []  # heap: when each of the places that `capacity` gives is free again
        self._seen: Counter[bytes] = Counter()  # admitted requests by body, counted only where faults are drawn
        self._answered = 0

    def change(self, **settings: object) -> None:
        """From now on the service is otherwise; the limits of models that were asked for stay. Raises ValueError."""
        self.settings = dataclasses.replace(self.settings, **settings)  # type: ignore[arg-type]
        self._faults = sorted(self.settings.faults.items())

    def receive(self, method: str, path: str, authorization: str | None, body: bytes, now: float) -> Answer:
        """Decide everything about the answer to a request that arrives now."""
        listing = path == "/v1/models" or path.startswith("/v1/models/")
        if not listing and path not in ("/v1/chat/completions", "/v1/completions"):
            return Answer(404, content_type="text/plain")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return self._brief(403, b'{"detail":"Not authenticated"}')
        if self.settings.key is not None and key.strip() != self.settings.key:
            return self._brief(401, wire.ERRORS[401])
        if method != ("GET" if listing else "POST"):
            return self._brief(405, b'{"detail":"Method Not Allowed"}')
        if listing:
            return self._list_models(unquote(path.removeprefix("/v1/models").removeprefix("/")))
        try:
            question = (wire.CHAT if path == "/v1/chat/completions" else wire.COMPLETION).decode(body).question()
        except ValidationError as wrong:
            return self._brief(400, wire.invalid_as(wrong))
        except (DecodeError, UnicodeDecodeError):
            return self._brief(400, wire.invalid("The body is not valid JSON."))
        if question.model not in self.settings.models:
            return self._brief(404, wire.no_model(question.model))
        return self._admit(question, body, now)

    def settle(self, answer: Answer, now: float) -> dict[str, str]:
        """Correct the charge to the actual use as the answer leaves now; gives its rate-limit headers."""
        headers: dict[str, str] = {}
        if answer.model is not None:
            for name, bucket in self._refilled(answer.model, now).items():
                if name == "tokens-minute":
                    bucket.level = min(bucket.limit, bucket.level + answer.refund)
                limit, remaining, reset = _HEADERS[name]
                headers[limit] = str(bucket.limit)
                headers[remaining] = str(max(0, math.floor(bucket.level)))
                headers[reset] = str(bucket.wait(bucket.limit))
        if self.settings.retry_after and answer.retry_after is not None:
            headers["retry-after"] = str(math.ceil(answer.retry_after))
        return headers

    def _brief(self, status: int, body: bytes, model: str | None = None, wait: float | None = None) -> Answer:
        """An answer for which no text is made and nothing is charged."""
        return Answer(status, body, delay=self.settings.latency, model=model, retry_after=wait)

    def _list_models(self, name: str) -> Answer:
        if not name:
            listed = [wire.Model(id=model) for model in self.settings.models]
            return self._brief(200, wire.ENCODER.encode({"object": "list", "data": listed}))
        if name not in self.settings.models:
            return self._brief(404, wire.no_model(name))
        return self._brief(200, wire.ENCODER.encode(wire.Model(id=name)))

    def _refilled(self, model: str, now: float) -> dict[str, Bucket]:
        """The model's buckets as of now, by the name that headers give them; full when first asked for."""
        buckets = self._buckets.get(model)
        if buckets is None:
            limits = (
                ("requests-day", self.settings.requests_per_day, 86_400.0),
                ("requests-minute", self.settings.requests_per_minute, 60.0),
                ("tokens-minute", self.settings.tokens_per_minute, 60.0),
            )
            buckets = {name: Bucket(limit, window, limit, now) for name, limit, window in limits if limit is not None}
            self._buckets[model] = buckets
        for bucket in buckets.values():
            bucket.refill(now)
        return buckets

    def _admit(self, question: wire.Question, body: bytes, now: float) -> Answer:
        """Charge the limits and answer, or refuse and charge nothing."""
        settings = self.settings
        cap = settings.assumed_completion_tokens if question.cap is None else question.cap
        charged = question.tokens + cap * question.n * len(question.prompts)
        buckets = self._refilled(question.model, now)
        amounts = {name: charged if name == "tokens-minute" else 1 for name in buckets}
        for name, bucket in buckets.items():
            if bucket.level < amounts[name]:
                return self._brief(429, wire.QUOTA_EXCEEDED[name], question.model, bucket.wait(amounts[name]))
        full = settings.capacity is not None and len(self._busy) >= settings.capacity
        queue_time = max(0.0, self._busy[0] - now) if full else 0.0
        if queue_time > settings.queue_limit:
            return self._brief(429, wire.QUEUE_EXCEEDED, question.model, queue_time - settings.queue_limit)
        for name, bucket in buckets.items():
            bucket.level -= amounts[name]

        digest = blake2b(body, key=self._key, digest_size=16).digest()
        for text, status in settings.poison.items():
            if text in question.text:
                return self._fail("poison", (status, wire.ERRORS[status], "application/json"), question, charged)
        fault = self._draw_fault(digest)
        if fault is not None and fault in _FAILURES:
            return self._fail(fault, _FAILURES[fault], question, charged)
        answer, served = self._answer(question, fault, digest, charged, queue_time, now)
        if full:
            heapq.heapreplace(self._busy, now + queue_time + served)
        elif settings.capacity is not None:
            heapq.heappush(self._busy, now + served)
        return answer

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

    def _fail(self, fault: str, failure: tuple[int, bytes, str], question: wire.Question, charged: float) -> Answer:
        """The answer of a fault; no token was used."""
        status, body, content_type = failure
        return Answer(
            status,
            body,
            content_type,
            delay=self.settings.latency,
            fault=fault,
            model=question.model,
            refund=charged,
            retry_after=1.0 if status in (429, 503) else None,
            prompt=question.prompts[0],
        )

    def _answer(
        self, question: wire.Question, fault: str | None, digest: bytes, charged: float, queue_time: float, now: float
    ) -> tuple[Answer, float]:
        """The model's answer, spoiled as the fault says, and the seconds that it takes to serve."""
        settings = self.settings
        said = _say(question, fault, self._key)
        prompt_tokens, completion_tokens = question.tokens, sum(one.tokens for one in said)
        pace = 1 + settings.jitter * (2 * _share(digest[:8]) - 1)
        prompt_time = prompt_tokens * settings.seconds_per_prompt_token * pace
        completion_time = max(one.tokens for one in said) * settings.seconds_per_completion_token * pace
        served = settings.latency * pace + prompt_time + completion_time
        created = self.epoch + now
        self._answered += 1
        completed = wire.Completed(
            id=f"{'chatcmpl' if question.chat else 'cmpl'}-{digest.hex()[:16]}-{self._answered}",
            object="chat.completion" if question.chat else "text_completion",
            created=int(created),
            model=question.model,
            system_fingerprint=f"fp_{settings.seed & 0xFFFFFFFFFF:010x}",
            choices=[] if fault == Fault.EMPTY else [one.choice(i, question.chat) for i, one in enumerate(said)],
            usage=wire.Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                total_tokens=prompt_tokens + completion_tokens,
                completion_tokens_details=wire.CompletionDetails(sum(one.reasoning_tokens for one in said)),
            ),
            time_info=wire.TimeInfo(queue_time, prompt_time, completion_time, queue_time + served, created),
        )
        answer = Answer(
            200,
            wire.ENCODER.encode(completed),
            delay=queue_time + served,
            fault=fault,
            model=question.model,
            refund=charged - prompt_tokens - completion_tokens,
            prompt=question.prompts[0],
            content=said[0].content,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )
        return answer if fault is None else _spoil(answer, settings), served


def _say(question: wire.Question, fault: str | None, key: bytes) -> list[Said]:
    """The choices of an answer; the same words for the same model, seed and prompt, whatever the other parameters."""
    asked = f"{question.model}\0{question.seed}\0{question.text}".encode()
    draw = Random(int.from_bytes(blake2b(asked, key=key, digest_size=16).digest()))
    ending = "" if fault != Fault.SURROGATE else _ENDING_IN_JSON if question.json else _ENDING
    said: list[Said] = []
    for prompt in map(answers.Prompt, question.prompts):
        for _ in range(question.n):
            thoughts = (f"It says: {answers.sentence(prompt, draw)}" for _ in range(_EFFORTS.get(question.effort, 0)))
            reasoning = " ".join(thoughts)
            if not question.json:
                content = answers.text(prompt, draw, ending)
            elif question.schema is None:
                content = _in_json(answers.json_object(prompt, draw, ending), fault, "object", draw)
            else:
                value = answers.fitting(question.schema, prompt, draw, ending)
                content = _in_json(value, fault, question.schema.get("type"), draw)
            said.append(_capped(reasoning, content, question.cap))
            if ending and ending not in said[-1].content:
                said[-1].content += _ENDING
    return said


def _in_json(value: answers.Json, fault: str | None, root: answers.Json, draw: Random) -> str:
    """The content that carries a value; by the fault `invalid` a list where an object belongs, or talk around it."""
    if fault != Fault.INVALID:
        return wire.ENCODER.encode(value).decode()
    if root == "object" and draw.random() < 0.5:
        return wire.ENCODER.encode([value]).decode()
    return f"Sure, here it is: {wire.ENCODER.encode(value).decode()}"


def _capped(reasoning: str, content: str, cap: int | None) -> Said:
    """A choice within its cap; reasoning counts first."""
    thought, spoken, finish_reason = wire.tokens(reasoning), wire.tokens(content), "stop"
    if cap is not None and thought + spoken > cap:
        finish_reason = "length"
        reasoning, thought = _first(reasoning, thought, cap)
        content, spoken = _first(content, spoken, cap - thought)
    return Said(reasoning, thought, content, thought + spoken, finish_reason)


def _first(text: str, size: int, cap: int) -> tuple[str, int]:
    """As much of a text as so many tokens hold, and how many it has."""
    return (text, size) if size <= cap else (text.encode()[: cap * wire.BYTES_PER_TOKEN].decode(errors="ignore"), cap)


def _spoil(answer: Answer, settings: Settings) -> Answer:
    """A good answer as its fault leaves it."""
    half = len(answer.body) // 2
    match answer.fault:
        case Fault.EMPTY:
            return replace(answer, content=None)
        case Fault.MALFORMED:
            return replace(answer, content=None, body=answer.body[:half])
        case Fault.CUT:
            return replace(answer, content=None, ends_after=half)
        case Fault.HANG:
            return replace(answer, content=None, status=0, body=b"", delay=settings.hang)
        case Fault.SLOW:
            return replace(answer, delay=answer.delay + settings.slow)
        case Fault.SURROGATE:
            body = answer.body
            for mark, spoiled in _SPOILED_BYTES.items():
                body = body.replace(mark, spoiled)
            return replace(answer, body=body, content=(answer.content or "").translate(_SPOILED))
    return answer


def _share(digest: bytes) -> float:
    """Eight bytes of a hash as a number from 0 to 1, without 1."""
    return int.from_bytes(digest) / 2**64
