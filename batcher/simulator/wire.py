"""What goes over the wire: request bodies as they are checked, answer bodies, and errors as the service words them."""

import re
from http import HTTPStatus
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, ValidationError

from batcher.simulator import answers

BYTES_PER_TOKEN = 4


def tokens(text: str) -> int:
    """About how many tokens a text has."""
    size = len(text) if text.isascii() else len(text.encode())
    return -(-size // BYTES_PER_TOKEN)


class Part(Struct):
    """A part of a message's content; only text is read."""

    type: str
    text: str = ""


class Message(Struct):
    """One message of a chat request."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class JsonSchema(Struct):
    """The schema that an answer has to fit."""

    name: str
    schema: Raw = Raw(b"null")


class Format(Struct):
    """The form that an answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema(self) -> answers.Schema | None:
        """The schema asked for, if any."""
        if self.type != "json_schema":
            return None
        if self.json_schema is None:
            raise ValidationError("Object missing required field `json_schema` - at `$.response_format`")
        raw = bytes(self.json_schema.schema)
        try:
            return None if raw == b"null" else answers.read_schema(raw)
        except ValidationError:
            raise ValidationError("Expected `object` - at `$.response_format.json_schema.schema`") from None


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


class Parameters(Struct):
    """The parameters that both endpoints have, with the ranges that the service checks."""

    model: str
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    seed: int | None = None
    user: str | None = None
    stream: bool | None = None

    def refuse_stream(self) -> None:
        """Raises ValidationError for a request that cannot be answered whole."""
        if self.stream:
            raise ValidationError("This simulator does not stream - at `$.stream`")


class ChatRequest(Parameters, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=-1)] | None = None
    response_format: Format | None = None
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None

    def question(self) -> Question:
        """What is asked; raises ValidationError where fields do not go together."""
        self.refuse_stream()
        last, texts = "", []
        for position, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise ValidationError(f"Expected `str | array`, got `null` - at `$.messages[{position}].content`")
            texts.append(message.text())
            if message.role == "user":
                last = texts[-1]
        cap = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        form = self.response_format
        text = "\n".join(texts)
        return Question(
            model=self.model,
            chat=True,
            text=text,
            tokens=tokens(text),
            prompts=[last or texts[-1]],
            n=self.n or 1,
            cap=None if cap == -1 else cap,
            seed=self.seed,
            json=form is not None and form.type != "text",
            schema=None if form is None else form.schema(),
            effort=self.reasoning_effort,
        )


class CompletionRequest(Parameters, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Meta(min_length=1)]

    def question(self) -> Question:
        """What is asked; raises ValidationError where fields do not go together."""
        self.refuse_stream()
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        text = "\n".join(prompts)
        return Question(
            model=self.model,
            chat=False,
            text=text,
            tokens=tokens(text),
            prompts=prompts,
            n=self.n or 1,
            cap=None if self.max_tokens == -1 else self.max_tokens,
            seed=self.seed,
        )


class Reply(Struct, frozen=True):
    """The message of a choice."""

    role: str
    content: str
    reasoning: str | UnsetType = UNSET


class Choice(Struct, frozen=True):
    """One choice of either endpoint: a message, or a text."""

    index: int
    finish_reason: str
    message: Reply | UnsetType = UNSET
    text: str | UnsetType = UNSET


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


class Model(Struct, frozen=True):
    """An entry of GET /v1/models."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "Cerebras"


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
        case 429:
            return QUOTA_EXCEEDED["requests-minute"]
    known = status in {known.value for known in HTTPStatus}
    phrase = HTTPStatus(status).phrase if known else "Server Error" if status >= 500 else "Client Error"
    code = re.sub(r"\W+", "_", phrase.lower())
    return error_body(f"{phrase}.", "server_error" if status >= 500 else f"{code}_error", "", code)


def invalid(message: str, param: str = "") -> bytes:
    """The body of a 400."""
    return error_body(message, "invalid_request_error", param, "invalid_request")


def invalid_as(wrong: ValidationError) -> bytes:
    """The body of a 400 from msgspec's words: what is wrong, and in which parameter."""
    message, _, path = str(wrong).partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", message)
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
CHAT = msgspec.json.Decoder(ChatRequest)
COMPLETION = msgspec.json.Decoder(CompletionRequest)
ENCODER = msgspec.json.Encoder()
