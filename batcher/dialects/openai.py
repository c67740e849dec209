"""How OpenAI's API speaks, and most services with it: answers, refusals and rate-limit headers."""

import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from itertools import zip_longest
from types import UnionType
from typing import Annotated, Any, Final, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import msgspec

from batcher.records import (
    Alternative,
    Answer,
    Choice,
    Failure,
    Kind,
    Limit,
    Price,
    Reply,
    ServiceTimes,
    Token,
    ToolCall,
    Usage,
)

name = "openai"
api_key_env = "OPENAI_API_KEY"
home = ("openai.com",)
headers: Mapping[str, str] = {}
catalogue: str | None = None
strict_subset = False  # what servers of this kind take differs from nearly all to very little
prices: Mapping[str, Price] = {}


# Answers

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)] | None
_Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | None
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None
_Id = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    index: _Count = None
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # vLLM and others
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Logprobs(msgspec.Struct, gc=False):
    """Of a chat: `content` and `refusal`. Of a completion: the others, each a list as long as `tokens`."""

    content: list[Token] | None = None
    refusal: list[Token] | None = None
    tokens: list[str | None] | None = None
    token_logprobs: list[_Number] | None = None
    top_logprobs: list[dict[str, _Number] | None] | None = None
    text_offset: list[_Offset] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: _Count = None
    message: _Message | None = None
    text: str | None = None
    tokens: list[_Id] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    reasoning_logprobs: _Logprobs | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: _Count = None
    image_tokens: _Count = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: _Count = None
    accepted_prediction_tokens: _Count = None
    rejected_prediction_tokens: _Count = None


class _Times(msgspec.Struct, gc=False):
    queue_time: _Seconds = None
    prompt_time: _Seconds = None
    completion_time: _Seconds = None
    total_time: _Seconds = None


class _Usage(_Times, gc=False):
    """Groq puts its times in here, Cerebras its image tokens."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    total_tokens: _Count = None
    image_tokens: _Count = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Groq(msgspec.Struct, gc=False):
    """Where Groq puts the usage of an answer that it streams."""

    usage: _Usage | None = None


class _Wire(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    service_tier_used: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    time_info: _Times | None = None
    x_groq: _Groq | None = None


_UNFINISHED: Final = frozenset((None, "error", "abort"))
"""Finish reasons of a generation that broke off."""
_NO_USAGE: Final = Usage()
_NO_TIMES: Final = ServiceTimes()

_decode: Final = msgspec.json.Decoder(_Wire).decode


def read(reply: Reply) -> Answer | Failure:
    """As `understood`; of the tiers these services tell only the one that served."""
    answer = understood(reply)
    if isinstance(answer, Answer) and answer.service_tier is not None and answer.service_tier_used is None:
        return msgspec.structs.replace(answer, service_tier=None, service_tier_used=answer.service_tier)
    return answer


def understood(reply: Reply) -> Answer | Failure:
    """The answer in a reply with status 200, or why it is none. Never raises."""
    try:
        answer = _answer(_decode(reply.body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = None
    return _understood_loosely(reply) if answer is None else answer


def _answer(wire: _Wire) -> Answer | None:
    """The answer, when every choice is complete."""
    if not wire.choices:
        return None
    choices = []
    for position, choice in enumerate(wire.choices):
        finish_reason = choice.finish_reason
        if finish_reason in _UNFINISHED:
            return None
        message = choice.message
        reasoning: str | None = None
        refusal: str | None = None
        calls: tuple[ToolCall, ...] | None = None
        if message is None:
            text = choice.text
        else:
            text = message.content
            reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
            refusal = message.refusal
            if message.tool_calls:
                calls = tuple(map(_tool_call, _in_order(message.tool_calls)))
        if (
            text is None
            and reasoning is None
            and calls is None
            and refusal is None
            and choice.tokens is None
            and finish_reason != "content_filter"
        ):
            return None
        choices.append(
            Choice(
                position if choice.index is None else choice.index,
                text,
                reasoning,
                finish_reason,
                calls,
                refusal,
                None if choice.logprobs is None else _logprobs(choice.logprobs),
                None if choice.reasoning_logprobs is None else _logprobs(choice.reasoning_logprobs),
                choice.tokens,
            )
        )
    usage = wire.usage
    if usage is None and wire.x_groq is not None:
        usage = wire.x_groq.usage
    return Answer(
        tuple(choices if len(choices) == 1 else _in_order(choices)),
        _NO_USAGE if usage is None else _usage(usage),
        _times(wire.time_info or usage),
        wire.id,
        wire.model,
        wire.system_fingerprint,
        wire.service_tier,
        wire.service_tier_used,
    )


_Indexed = TypeVar("_Indexed", _ToolCall, Choice)


def _in_order(members: list[_Indexed]) -> list[_Indexed]:
    """By index where each has its own. Where they repeat, as when each prompt's choices are counted anew, as sent."""
    indices = [member.index for member in members if member.index is not None]
    if len(set(indices)) < len(members):
        return members
    return sorted(members, key=lambda member: member.index or 0)


def _tool_call(call: _ToolCall) -> ToolCall:
    function = call.function or _Function()
    return ToolCall(call.id, call.type, function.name, function.arguments)


def _logprobs(wire: _Logprobs) -> list[Token] | None:
    """The tokens of both forms in one."""
    if wire.content is not None or wire.refusal is not None:
        return (wire.content or []) + (wire.refusal or [])
    if wire.tokens is None and wire.token_logprobs is None:
        return None
    columns = zip_longest(wire.tokens or (), wire.token_logprobs or (), wire.top_logprobs or (), wire.text_offset or ())
    return [
        Token(token, logprob, None, [Alternative(*each) for each in likeliest.items()] if likeliest else None, offset)
        for token, logprob, likeliest, offset in columns
    ]


def _usage(usage: _Usage) -> Usage:
    cached = reasoning = accepted = rejected = None
    images = usage.image_tokens
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    if prompt is not None:
        cached = prompt.cached_tokens
        images = prompt.image_tokens if images is None else images
    if completion is not None:
        reasoning = completion.reasoning_tokens
        accepted = completion.accepted_prediction_tokens
        rejected = completion.rejected_prediction_tokens
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        cached,
        reasoning,
        accepted,
        rejected,
        images,
    )


def _times(times: _Times | None) -> ServiceTimes:
    if times is None:
        return _NO_TIMES
    return ServiceTimes(times.queue_time, times.prompt_time, times.completion_time, times.total_time)


def _understood_loosely(reply: Reply) -> Answer | Failure:
    """As `understood`, for a body that does not fit the wire types, or is no answer at all."""
    try:
        value = _loads(reply.body)
        complaint = _complaint_in(value)
    except (ValueError, RecursionError) as error:
        if _is_html(reply):
            return _failure(Kind.NOT_JSON, f"an HTML page instead of an answer: {_text_of(reply)}", reply)
        return _failure(Kind.MALFORMED_RESPONSE, f"the answer is not valid JSON: {error}", reply, paid=True)
    answer = _answer(_salvaged(value, _Wire))
    if answer is not None:
        return answer
    if complaint is not None and (status := _status_of(complaint)) is not None:
        refused = _refused(reply, status, complaint)
        began = complaint.broke_off or refused.kind in _WHILE_ANSWERING
        return msgspec.structs.replace(refused, paid=True) if began else refused
    message = "the answer has no choice that is complete"
    if complaint is not None and complaint.message:
        message = f"{message}: {complaint.message}"
    return _failure(Kind.MALFORMED_RESPONSE, message, reply, paid=True)


def _loads(body: bytes) -> object:
    """JSON as msgspec reads it, and also bodies with lone surrogates or bytes that are not UTF-8.

    Both arrive as lone surrogates in the text. Raises ValueError or RecursionError.
    """
    text = body.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    value: object = json.loads(text, parse_constant=_no_constant)
    return value


def _no_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


_AnyStruct = TypeVar("_AnyStruct", bound=msgspec.Struct)


def _salvaged(value: object, struct: type[_AnyStruct]) -> _AnyStruct:
    """What fits the struct; a member of another type counts as not sent."""
    members = _members(value) or {}
    kept = {}
    for field in msgspec.structs.fields(struct):
        member = members.get(field.name)
        if field.name == "content" and struct is _Message and isinstance(member, list):
            member = _joined(member)
        fitting = None if member is None else _fitting(member, field.type)
        if fitting is not None:
            kept[field.name] = fitting
    return struct(**kept)


def _fitting(value: object, kind: Any) -> object:
    """What of a value fits a type. In a list each member stands for itself, and keeps its place."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError):
        pass
    for option in get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,):
        if _is_struct(option) and isinstance(value, dict):
            return _salvaged(value, option)
        if get_origin(option) is list and isinstance(value, list):
            (member,) = get_args(option)
            return [_salvaged(each, member) if _is_struct(member) else _fitting(each, member) for each in value]
        if get_origin(option) is dict and isinstance(value, dict):
            _, member = get_args(option)
            return {name: _fitting(each, member) for name, each in value.items()}
    return None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _members(value: object) -> Mapping[str, object] | None:
    """The members of a JSON object."""
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else None


def _joined(parts: list[object]) -> str | None:
    """The text of a message that came as a list of parts."""
    texts = [members.get("text") for part in parts if (members := _members(part)) is not None]
    return "".join(text for text in texts if isinstance(text, str)) or None


# Refusals

_LONGEST_MESSAGE: Final = 2048
_LONGEST_CODE: Final = 200
_LONGEST_WAIT: Final = 3600.0

_KINDS: Final[Mapping[int, Kind]] = {
    401: Kind.UNAUTHORIZED,
    402: Kind.NO_CREDIT,
    403: Kind.FORBIDDEN,
    **dict.fromkeys((404, 410), Kind.NOT_FOUND),
    **dict.fromkeys((405, 406, 411, 412, 414, 415, 426, 428, 431, 501, 505), Kind.NOT_SERVED),
    407: Kind.PROXY,
    **dict.fromkeys((408, 499, 524), Kind.REQUEST_TIMEOUT),
    **dict.fromkeys((409, 421, 423, 424, 425), Kind.CONFLICT),
    413: Kind.REQUEST_TOO_LARGE,
    429: Kind.RATE_LIMITED,
    **dict.fromkeys((498, 529), Kind.OVERLOADED),
    **dict.fromkeys((502, 503, 504, 520, 521, 522, 523, 530), Kind.UNAVAILABLE),
    **dict.fromkeys((525, 526), Kind.TLS),
}
_ASK_TO_WAIT: Final = frozenset((Kind.RATE_LIMITED, Kind.OVERLOADED, Kind.UNAVAILABLE))
_BOOLEANS: Final = {"true": True, "false": False}
_WHILE_ANSWERING: Final = frozenset((Kind.SERVER_ERROR, Kind.UNAVAILABLE, Kind.REQUEST_TIMEOUT))
"""What goes wrong while a service generates; told with status 200, it may have generated a part."""
_MAY_BE_PAID: Final = frozenset((408, 499, 504, 524))
"""Statuses after which the service may have generated, and billed, an answer that nobody got."""

_CREDIT: Final = re.compile(r"insufficient_(quota|balance|funds)|billing|payment_required|credit")
_CREDIT_MESSAGE: Final = re.compile(r"insufficient (credits?|balance|funds)")
_KEY: Final = re.compile(r"api_key|organi[sz]ation")
_MODEL: Final = re.compile(r"model_(not_found|not_available|decommissioned)|(unknown|invalid)_model")
_MODEL_MESSAGE: Final = re.compile(r"\bmodel\b.{0,200}\b(does not exist|not found)", re.DOTALL)
_BUSY: Final = re.compile(r"queue_exceeded|capacity|overloaded|resource_unavailable|slow_down")
_BUSY_MESSAGE: Final = re.compile(r"high traffic|capacity|overloaded|resource unavailable")
_BUCKET: Final = re.compile(
    r"(?:\b(uncached|total)[ _-])?(request|token)s?[ _-]?per[ _-]?(second|sec|minute|min|hour|day)"
)
_BUCKET_INITIALS: Final = re.compile(r"(?:\b(uncached|total)[ _-])?\b([rt])p([smhd])\b")
_BUCKET_CODE: Final = re.compile(r"\b(?:(uncached|total)_)?(request|token)(?:_quota_exceeded|s)\b")
_WAIT_IN_WORDS: Final = re.compile(
    r"\b(?:try again|retry) (?:in|after) "
    r"(?:([\d.]+(?:ms|[dhms][\d.dhms]*))(?!\w)|(\d{1,6}(?:\.\d{1,6})?) ?(second|minute|hour)s?\b)",
    re.ASCII,
)
_DAILY: Final = re.compile(r"\bdaily\b|\bper[ _-]day\b")
_EXCEEDS: Final = re.compile(r"\blimit:? (\d{1,15})\b.{0,100}\brequested:? (\d{1,15})\b", re.DOTALL | re.ASCII)
_UNCACHED: Final = re.compile(r"(?<![a-z])uncached(?![a-z])")
_TOTAL: Final = re.compile(r"(?<![a-z])total(?![a-z])")
_TITLE: Final = re.compile(rb"<title[^>]{0,200}>([^<]{1,200})", re.IGNORECASE)

_STATUS_OF_TYPE: Final = (
    (re.compile(r"authentication|api_key"), 401),
    (re.compile(r"permission"), 403),
    (re.compile(r"not_?found"), 404),
    (re.compile(r"rate_limit|too_many|quota_exceeded|queue_exceeded|resource_exhausted"), 429),
    (_CREDIT, 402),
    (re.compile(r"overloaded|capacity"), 529),
    (re.compile(r"unavailable"), 503),
    (re.compile(r"timeout"), 408),
    (
        re.compile(r"invalid_request|invalid_argument|bad_?request|validation|context_length|content_(filter|policy)"),
        400,
    ),
    (re.compile(r"server_error|api_error|internal"), 500),
)
"""What the type or code of an error inside a 200 would have had as status; the first that fits."""


class _Complaint(NamedTuple):
    """What a service says is wrong."""

    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None
    status: int | None = None
    """The HTTP status that goes with it, where it says so."""
    broke_off: bool = False
    """Whether it ended an answer that was being sent."""

    @property
    def labels(self) -> str:
        """Code and type, to search in."""
        return f"{self.code or ''} {self.type or ''}".lower()


def refusal(reply: Reply, requests_window: float = 60.0) -> Failure:
    """The meaning of a reply with any status but 200. Never raises. `requests_window` as in `limits`."""
    try:
        complaint = _complaint_in(_loads(reply.body))
    except (ValueError, RecursionError):
        complaint = None
    return _refused(reply, reply.status, complaint or _Complaint(""), requests_window)


def _refused(reply: Reply, status: int, complaint: _Complaint, requests_window: float = 60.0) -> Failure:
    headers = _unambiguous(reply.headers)
    kind = _kind(status, complaint, _is_html(reply))
    buckets = _limits(headers, requests_window)
    if kind is Kind.RATE_LIMITED:
        buckets = _emptied(buckets, _named_buckets(complaint))
    wait = _asked_wait(headers)
    if wait is None and kind in _ASK_TO_WAIT:
        wait = _wait_in_words(complaint.message.lower())
    if kind is Kind.RATE_LIMITED:
        empty = [bucket for bucket in buckets if bucket.remaining == 0]
        if wait is None:
            wait = max((bucket.reset for bucket in empty if bucket.reset is not None), default=None)
        if (
            (wait is not None and wait > _LONGEST_WAIT)
            or any(bucket.window >= _WINDOWS["day"] for bucket in empty)
            or _DAILY.search(complaint.message.lower())
        ):
            kind = Kind.DAY_QUOTA
    if wait is not None and kind is not Kind.DAY_QUOTA:
        wait = min(wait, _LONGEST_WAIT)
    return Failure(
        kind,
        _plain(complaint.message or _text_of(reply), _LONGEST_MESSAGE),
        reply.timing,
        reply.status,
        complaint.type,
        complaint.code,
        wait,
        buckets,
        reply.body,
        status in _MAY_BE_PAID,
        should_retry=_BOOLEANS.get(headers.get("x-should-retry", "").lower()),
    )


def _kind(status: int, complaint: _Complaint, html: bool) -> Kind:
    labels, message = complaint.labels, complaint.message.lower()
    if 400 <= status < 500 and (_CREDIT.search(labels) or (status == 429 and _CREDIT_MESSAGE.search(message))):
        return Kind.NO_CREDIT
    if status in (400, 401, 403, 404) and _MODEL.search(labels):
        return Kind.MODEL_NOT_FOUND
    if status == 404 and (complaint.param == "model" or _MODEL_MESSAGE.search(message)):
        return Kind.MODEL_NOT_FOUND
    if status == 400 and (complaint.param == "api_key" or _KEY.search(labels)):
        return Kind.UNAUTHORIZED
    if status == 403 and html:
        # A firewall or a shield in front of the service, not the service.
        return Kind.OVERLOADED
    if status in (413, 429) and (found := _EXCEEDS.search(message)) and int(found[2]) > int(found[1]):
        return Kind.EXCEEDS_QUOTA
    if status in (429, 503):
        if complaint.param == "queue" or _BUSY.search(labels):
            return Kind.OVERLOADED
        if not _named_buckets(complaint) and _BUSY_MESSAGE.search(message):
            return Kind.OVERLOADED
    return _KINDS.get(status, Kind.REJECTED if 300 <= status < 500 else Kind.SERVER_ERROR)


def _named_buckets(complaint: _Complaint) -> tuple[tuple[str, float], ...]:
    """Resource and window of each bucket that a 429 names."""
    message = complaint.message.lower()
    found = _BUCKET.findall(message) + _BUCKET_INITIALS.findall(message)
    if not found:
        found = [(*names, "minute") for names in _BUCKET_CODE.findall(complaint.labels)]
    # Where the name itself does not tell, the words around it do: "Tokens per minute …: too many uncached tokens".
    spoken = _UNCACHED.search(f"{message} {complaint.labels}") and not _TOTAL.search(message)
    named = set()
    for share, resource, window in found:
        uncached = resource.startswith("t") and (share == "uncached" or (not share and spoken))
        named.add(("uncached_tokens" if uncached else _RESOURCES[resource], _WINDOWS[window]))
    return tuple(sorted(named))


def _wait_in_words(message: str) -> float | None:
    """Seconds that a message like "try again in 2m59.56s" asks for."""
    found = _WAIT_IN_WORDS.search(message)
    if found is None:
        return None
    duration, number, unit = found.groups()
    return _duration(duration.rstrip(".")) if duration else float(number) * _WINDOWS[unit]


def _emptied(limits: tuple[Limit, ...], named: tuple[tuple[str, float], ...]) -> tuple[Limit, ...]:
    """The limits with nothing left in the buckets that the refusal names."""
    known = {(limit.resource, limit.window): limit for limit in limits}
    for resource, window in named:
        limit = known.get((resource, window)) or Limit(resource, window, None, None, None)
        known[resource, window] = limit._replace(remaining=0.0)
    return tuple(known.values())


def _status_of(complaint: _Complaint) -> int | None:
    """The status that an error inside a 200 should have had."""
    if complaint.status is not None:
        return complaint.status
    return next((status for pattern, status in _STATUS_OF_TYPE if pattern.search(complaint.labels)), None)


def _complaint_in(value: object) -> _Complaint | None:
    """The error in a decoded body: flat, under `error` or `detail`, or either as mere text."""
    if isinstance(value, list) and value:
        value = value[0]
    outer = _members(value)
    if outer is None:
        return None
    error = outer.get("error", outer.get("detail"))
    inner = _members(error)
    if inner is None:
        inner = outer if error is None else {**outer, "message": error}
    code, said = inner.get("code"), inner.get("message")
    message = said if isinstance(said, str) else "" if said is None else json.dumps(said)
    labels = _label(inner.get("type")), _label(code)
    status = next(
        (
            number
            for number in (outer.get("status_code"), inner.get("status_code"), code)
            if isinstance(number, int) and 400 <= number <= 599
        ),
        None,
    )
    # What a stream is broken off with has its status beside it: `{"error": …, "status_code": …}`.
    broke_off = "error" in outer and "status_code" in outer
    if not message and labels == (None, None) and (status is None or not broke_off):
        return None
    return _Complaint(_plain(message, _LONGEST_MESSAGE), *labels, _label(inner.get("param")), status, broke_off)


def _label(value: object) -> str | None:
    """A type or code as text; services send numbers too."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return _plain(str(value), _LONGEST_CODE) or None


def _plain(text: str, longest: int) -> str:
    """Text that can be stored anywhere: not too long, and UTF-8."""
    return text[:longest].encode("utf-8", "replace").decode()


def _is_html(reply: Reply) -> bool:
    content_type = _unambiguous(reply.headers).get("content-type", "")
    return "html" in content_type.lower() or reply.body[:64].lstrip().startswith(b"<")


def _text_of(reply: Reply) -> str:
    """A line about a body that is not JSON, or has no message."""
    text = reply.body[:_LONGEST_MESSAGE]
    if _is_html(reply):
        title = _TITLE.search(reply.body, 0, 8192)
        text = title[1] if title else b""
    words = " ".join(text.decode("utf-8", "replace").split())
    return words or f"{reply.status} {_phrase(reply.status)}".rstrip()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _failure(kind: Kind, message: str, reply: Reply, *, paid: bool = False) -> Failure:
    return Failure(kind, _plain(message, _LONGEST_MESSAGE), reply.timing, reply.status, body=reply.body, paid=paid)


# Headers

_RESOURCES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("r", "req", "request", "requests"), "requests"),
    **dict.fromkeys(("t", "token", "tokens"), "tokens"),
}
_WINDOWS: Final[Mapping[str, float]] = {
    **dict.fromkeys(("s", "sec", "second"), 1.0),
    **dict.fromkeys(("m", "min", "minute"), 60.0),
    **dict.fromkeys(("h", "hour"), 3600.0),
    **dict.fromkeys(("d", "day"), 86400.0),
}
_LONGEST_RESET: Final = 32 * 86400.0

_WAIT: Final = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,15}(\.\d{1,20})?", re.ASCII)
_DURATION: Final = re.compile(
    r"(?=\d)(?:(\d{1,3})d)?(?:(\d{1,4})h)?(?:(\d{1,6})m)?(?:(\d{1,7}(?:\.\d{1,9})?)s)?(?:(\d{1,9}(?:\.\d{1,9})?)ms)?",
    re.ASCII,
)
_DURATION_UNITS: Final = (86400.0, 3600.0, 60.0, 1.0, 0.001)
_HTTP_DATE: Final = re.compile(r"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT", re.ASCII)


def limits(headers: Mapping[str, str], requests_window: float = 60.0) -> tuple[Limit, ...]:
    """The buckets that `x-ratelimit-…` headers describe. Never raises.

    A bucket of tokens that is named without a window is a minute's, one of requests has `requests_window` seconds.
    """
    return _limits(_unambiguous(headers), requests_window)


def _unambiguous(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers by lower-case name, without those that came twice with different values."""
    seen: dict[str, str] = {}
    twice = set()
    for name, value in headers.items():
        lower = name.lower()
        if seen.setdefault(lower, value) != value:
            twice.add(lower)
    return {name: value.strip() for name, value in seen.items() if name not in twice}


def _limits(headers: Mapping[str, str], requests_window: float) -> tuple[Limit, ...]:
    described: dict[tuple[str, ...], dict[str, float]] = {}
    for name, value in headers.items():
        if not name.startswith("x-ratelimit-"):
            continue
        what, *bucket = name.removeprefix("x-ratelimit-").split("-")
        number = _reset(value, headers) if what == "reset" else _number(value)
        if number is not None:
            described.setdefault(tuple(bucket), {})[what] = number
    found: dict[tuple[str, float], Limit] = {}
    for parts, numbers in described.items():
        resource = next((_RESOURCES[part] for part in parts if part in _RESOURCES), None)
        if resource is None or not numbers.keys() & {"limit", "remaining", "reset"}:
            continue
        unnamed = requests_window if resource == "requests" else 60.0
        window = next((_WINDOWS[part] for part in parts if part in _WINDOWS), unnamed)
        if resource == "tokens" and "uncached" in parts:
            resource = "uncached_tokens"
        limit = Limit(resource, window, numbers.get("limit"), numbers.get("remaining"), numbers.get("reset"))
        # Some services describe several buckets of one kind (a project's, a model's): the fuller one does not bind.
        found[resource, window] = min(found.get((resource, window), limit), limit, key=_room)
    return tuple(found.values())


def _room(limit: Limit) -> tuple[float, float]:
    return (
        float("inf") if limit.remaining is None else limit.remaining,
        float("inf") if limit.limit is None else limit.limit,
    )


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def _reset(text: str, headers: Mapping[str, str]) -> float | None:
    """Seconds until a reset given as seconds, as a duration like 6m0s, or as a moment since 1970."""
    seconds = _number(text)
    if seconds is None:
        return _duration(text)
    if seconds > 1e9:
        seconds = max(0.0, seconds - _now(headers))
    return seconds if seconds <= _LONGEST_RESET else None


def _duration(text: str) -> float | None:
    """Seconds of a duration like 6m0s or 20ms."""
    duration = _DURATION.fullmatch(text)
    if duration is None:
        return None
    seconds = sum(float(part) * unit for part, unit in zip(duration.groups("0"), _DURATION_UNITS, strict=True))
    return seconds if seconds <= _LONGEST_RESET else None


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that `retry-after-ms` or `retry-after` ask for; what is not strictly a number or a date is ignored."""
    milliseconds = headers.get("retry-after-ms", "")
    if _WAIT.fullmatch(milliseconds):
        return float(milliseconds) / 1000
    asked = headers.get("retry-after", "")
    if _WAIT.fullmatch(asked):
        return float(asked)
    moment = _date(asked)
    if moment is None:
        return None
    seconds = max(0.0, moment - _now(headers))
    return seconds if seconds <= _LONGEST_RESET else None


def _now(headers: Mapping[str, str]) -> float:
    """The service's clock when it says so, else ours; seconds since 1970."""
    moment = _date(headers.get("date", ""))
    return time.time() if moment is None else moment


def _date(text: str) -> float | None:
    if not _HTTP_DATE.fullmatch(text):
        return None
    try:
        moment: datetime = parsedate_to_datetime(text)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC).timestamp()
