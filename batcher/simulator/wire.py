"""What goes over the wire: request bodies as they are checked, answer bodies, and errors as the service words them."""

import re
from http import HTTPStatus

import msgspec
from msgspec import UNSET, Struct, UnsetType, ValidationError

from batcher.simulator import answers

BYTES_PER_TOKEN = 4


def tokens(text: str) -> int:
    """About how many tokens a text has."""
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // BYTES_PER_TOKEN)


class RefusedError(Exception):
    """A request is refused as it stands: the status, and the body that says why."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class Tool(Struct, frozen=True):
    """A function that the model may call."""

    name: str
    description: str
    parameters: answers.Schema


class Question(Struct, frozen=True):
    """A request of either endpoint, as far as it matters for the answer."""

    model: str
    chat: bool
    text: str  # everything that the model reads
    tokens: int  # of it
    prompts: list[str]  # what is answered: the last user message, or each prompt
    n: int  # choices for each prompt
    cap: int | None  # completion tokens of a choice, at most
    seed: int | None
    json: bool = False
    schema: answers.Schema | None = None
    effort: str | None = None
    tier: str | None = None  # as the request says it
    threshold: float | None = None  # seconds that it would queue at most
    cache_key: str | None = None
    prefix: str = ""  # all that the model reads in the order in which it does, tools first
    prediction: str | None = None
    tools: tuple[Tool, ...] = ()
    choice: str = "auto"  # none, auto, required, or the tool's name after a colon
    parallel: bool = True
    after_tool: bool = False  # the last message is a tool's answer
    format: str = "text_parsed"  # of the reasoning
    logprobs: int | None = None  # likely tokens told beside each; None: no probabilities at all
    stop: tuple[str, ...] = ()
    least: int = 0  # completion tokens of a choice; -1: as many as it can have
    kept: int | None = None  # of the n choices, where not all are given back
    echo: bool = False
    raw: bool = False  # numbers of tokens instead of text
    images: int = 0
    image_tokens: int = 0  # in `tokens` too
    stream: bool = False
    include_usage: bool = False


class Called(Struct, frozen=True):
    """The function of a tool call; in a stream a part of it."""

    arguments: str
    name: str | UnsetType = UNSET


class Call(Struct, frozen=True):
    """A tool call; in a stream a part of it, which has an index."""

    function: Called
    id: str | UnsetType = UNSET
    type: str = "function"
    index: int | UnsetType = UNSET


class Reply(Struct, frozen=True):
    """The message of a choice."""

    role: str
    content: str | None
    reasoning: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class Likely(Struct, frozen=True):
    """A token that was likely at a place."""

    token: str
    logprob: float
    bytes: list[int]


class Sampled(Struct, frozen=True):
    """The token that was taken at a place, and the likely ones there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Likely]


class Logprobs(Struct, frozen=True):
    """The log probabilities of a chat choice."""

    content: list[Sampled]
    refusal: None = None


class TextLogprobs(Struct, frozen=True):
    """The log probabilities of a choice of the completions endpoint: a list per property, a member per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(Struct, frozen=True):
    """One choice of either endpoint: a message, or a text or its tokens."""

    index: int
    finish_reason: str
    message: Reply | UnsetType = UNSET
    text: str | UnsetType | None = UNSET
    tokens: list[int] | UnsetType = UNSET
    logprobs: object = UNSET  # Logprobs, or TextLogprobs at the completions endpoint
    reasoning_logprobs: Logprobs | UnsetType = UNSET


class Delta(Struct, frozen=True):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """What a chunk adds to a choice of either endpoint."""

    index: int
    delta: Delta | UnsetType = UNSET
    text: str | UnsetType = UNSET
    tokens: list[int] | UnsetType = UNSET
    finish_reason: str | None = None
    logprobs: object = UNSET  # Logprobs, or TextLogprobs at the completions endpoint
    reasoning_logprobs: Logprobs | UnsetType = UNSET


class Unended(Struct):
    """A choice of a stream that ended before it did."""

    index: int
    message: dict[str, str] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    finish_reason: None = None


class PromptDetails(Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: int = 0


class CompletionDetails(Struct, frozen=True):
    """Of the completion's tokens."""

    reasoning_tokens: int
    accepted_prediction_tokens: int | UnsetType = UNSET
    rejected_prediction_tokens: int | UnsetType = UNSET


class Usage(Struct, frozen=True):
    """The tokens that an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails
    prompt_tokens_details: PromptDetails = PromptDetails()
    image_tokens: int | UnsetType = UNSET


class TimeInfo(Struct, frozen=True):
    """Where the service's time went, in seconds; `created` is a Unix time."""

    queue_time: float
    prompt_time: float
    completion_time: float
    total_time: float
    created: float


class Completed(Struct, frozen=True):
    """The body of a good answer."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    time_info: TimeInfo
    service_tier: str | UnsetType | None = UNSET
    service_tier_used: str | UnsetType = UNSET


class Chunk(Struct, frozen=True):
    """One event of a streamed answer."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType = UNSET
    time_info: TimeInfo | UnsetType = UNSET
    service_tier: str | UnsetType | None = UNSET
    service_tier_used: str | UnsetType = UNSET


def error_body(message: str, type: str, param: str, code: str) -> bytes:
    """An error as the service words it: one object at the top level."""
    return msgspec.json.encode({"message": message, "type": type, "param": param, "code": code})


def _error(status: int) -> bytes:
    """The error that goes with a status when nothing more is known."""
    match status:
        case 400:
            return invalid("The request was rejected.")
        case 401:
            return error_body("Wrong API Key", "invalid_request_error", "api_key", "wrong_api_key")
        case 403:
            return b'{"detail":"Not authenticated"}'
        case 405:
            return b'{"detail":"Method Not Allowed"}'
        case 422:
            return b'{"detail":"Unprocessable Entity"}'
        case 502:
            return b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
        case 504:
            return b""
        case 429:
            return QUOTA_EXCEEDED["requests-minute"]
    known = status in {known.value for known in HTTPStatus}
    phrase = HTTPStatus(status).phrase if known else "Server Error" if status >= 500 else "Client Error"
    code = re.sub(r"\W+", "_", phrase.lower())
    return error_body(f"{phrase}.", "server_error" if status >= 500 else f"{code}_error", "", code)


def error_type(status: int) -> str:
    """The content type of the body in `ERRORS`."""
    return "text/html" if status in (502, 504) else "application/json"


def invalid(message: str, param: str = "") -> bytes:
    """The body of a 400."""
    return error_body(message, "invalid_request_error", param, "invalid_request")


def invalid_as(wrong: ValidationError) -> bytes:
    """The body of a 400 from msgspec's words: what is wrong, and in which parameter."""
    message, _, place = str(wrong).partition(" - at ")
    path = place.removeprefix("`key` in ").removeprefix("`$")
    missing = re.search(r"(?:missing required|contains unknown) field `([^`]+)`", message)
    param = f"{path.rstrip('`')}.{missing[1]}" if missing else path.rstrip("`")
    return invalid(message, param.removeprefix("."))


def no_model(name: str) -> bytes:
    """The body of a 404 for a model that is not served."""
    message = f"Model {name} does not exist or you do not have access to it."
    return error_body(message, "not_found_error", "model", "model_not_found")


def _too_many(kind: str, what: str, window: str, done: str) -> bytes:
    message = f"{kind} per {window} limit exceeded - too many {what} {done}."
    return error_body(message, f"too_many_{what}_error", "quota", f"{what.removesuffix('s')}_quota_exceeded")


QUOTA_EXCEEDED = {  # by the bucket's name in headers; `total` where uncached tokens have a bucket of their own
    f"{resource}-{window}": _too_many(kind, what, window, done)
    for resource, kind, what, done in (
        ("requests", "Requests", "requests", "sent"),
        ("tokens", "Tokens", "tokens", "processed"),
        ("total-tokens", "Total tokens", "tokens", "processed"),
        ("uncached-tokens", "Uncached tokens", "tokens", "processed"),
    )
    for window in ("day", "hour", "minute", "second")
}
QUEUE_EXCEEDED = error_body(
    "We're experiencing high traffic right now! Please try again soon.",
    "too_many_requests_error",
    "queue",
    "queue_exceeded",
)
ERRORS = {status: _error(status) for status in range(400, 600)}
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body><h1>Sign in to the network</h1></body></html>"
ENCODER = msgspec.json.Encoder()
