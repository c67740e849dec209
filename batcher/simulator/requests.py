"""Requests as the service checks them: names, types, ranges, and what does not go together."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import DecodeError, Meta, Raw, Struct, ValidationError
from msgspec.structs import replace

from batcher.simulator import answers, bodies, images, strict, wire
from batcher.simulator.wire import Question, tokens

Top: TypeAlias = Annotated[int, Meta(ge=0, le=20)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Tokens: TypeAlias = Annotated[int, Meta(ge=-1)]  # -1: as many as there can be
GrammarRoot: TypeAlias = Literal[
    "root", "fcall", "nofcall", "insidevalue", "value", "object", "array", "string", "number", "funcarray", "func", "ws"
]
ReasoningFormat: TypeAlias = Literal["none", "parsed", "text_parsed", "raw", "hidden"]

_THRESHOLD = range(50, 20_001)  # milliseconds


class Text(Struct, tag="text", forbid_unknown_fields=True):
    """A piece of text."""

    text: str


class Url(Struct, forbid_unknown_fields=True):
    """Where an image is."""

    url: str
    detail: str | None = None


class ImageUrl(Struct, tag="image_url", forbid_unknown_fields=True):
    """An image, one way to write it."""

    image_url: Url


class Image(Struct, tag="image", forbid_unknown_fields=True):
    """An image, the other way."""

    image: str


Content: TypeAlias = str | list[Text | ImageUrl | Image]


class System(Struct, tag_field="role", tag="system", forbid_unknown_fields=True):
    """A message of the system."""

    content: Content
    name: str | None = None


class Developer(System, tag="developer"):
    """A message of the developer."""


class User(System, tag="user"):
    """A message of the user."""


class Function(Struct, forbid_unknown_fields=True):
    """What an earlier turn called."""

    name: str
    arguments: str


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call of an earlier turn."""

    id: str
    type: Literal["function"]
    function: Function
    index: int | None = None


class Assistant(Struct, tag_field="role", tag="assistant", forbid_unknown_fields=True):
    """What the model said in an earlier turn."""

    content: str | list[Text] | None = None
    reasoning: str | list[Text] | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None


class Tool(Struct, tag_field="role", tag="tool", forbid_unknown_fields=True):
    """What a tool answered."""

    content: str | list[Text]
    tool_call_id: str
    name: str | None = None


class JsonSchema(Struct, forbid_unknown_fields=True):
    """The schema that an answer has to fit."""

    name: str
    description: str | None = None
    schema: Raw = Raw(b"null")
    strict: bool | None = None


class Format(Struct, forbid_unknown_fields=True):
    """The form that an answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema(self) -> answers.Schema | None:
        """The schema asked for, if any."""
        if self.type != "json_schema":
            return None
        if self.json_schema is None:
            raise ValidationError("Object missing required field `json_schema` - at `$.response_format`")
        return schema(self.json_schema.schema, bool(self.json_schema.strict), "response_format.json_schema.schema")


class Declared(Struct, forbid_unknown_fields=True):
    """A function that is offered to the model."""

    name: str
    description: str | None = None
    parameters: Raw = Raw(b"null")
    strict: bool | None = None


class Offered(Struct, forbid_unknown_fields=True):
    """A tool that is offered to the model."""

    type: Literal["function"]
    function: Declared


class Named(Struct, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class Chosen(Struct, forbid_unknown_fields=True):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: Named


class Prediction(Struct, forbid_unknown_fields=True):
    """The text that the answer will mostly be."""

    type: Literal["content"]
    content: str | list[Text]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How an answer is streamed."""

    include_usage: bool | None = None


class Parameters(Struct, forbid_unknown_fields=True):
    """The parameters that both endpoints have, with the ranges that the service checks; null is unset."""

    model: str
    max_tokens: Tokens | None = None
    min_tokens: Tokens | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    top_logprobs: Top | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    seed: int | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=1024)] | None = None
    reasoning_format: ReasoningFormat | None = None

    def stops(self) -> tuple[str, ...]:
        """The texts that end a choice."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def includes_usage(self) -> bool:
        """Whether a stream tells its usage in a chunk for that."""
        return bool(self.stream_options is not None and self.stream_options.include_usage)


class ChatRequest(Parameters, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[System | Developer | User | Assistant | Tool], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    min_completion_tokens: Tokens | None = None
    response_format: Format | None = None
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None
    disable_reasoning: bool | None = None
    clear_thinking: bool | None = None
    logprobs: bool | None = None
    tools: list[Offered] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    model_parameters: dict[str, object] | None = None

    def question(self) -> Question:
        """What is asked; raises ValidationError where parameters do not go together."""
        self.refuse_combinations()
        answered_tools(self.messages)
        last, texts, pictures = self.read()
        tools, declared = self.offered()
        form = self.response_format
        json = form is not None and form.type != "text"
        text = "\n".join(texts)
        prefix = "\n".join([*declared, text]) if declared else text
        cap = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        least = self.min_tokens if self.min_completion_tokens is None else self.min_completion_tokens
        return Question(
            model=self.model,
            chat=True,
            text=text,
            tokens=tokens(prefix) + sum(pictures),
            prompts=[last or texts[-1]],
            n=self.n or 1,
            cap=None if cap == -1 else cap,
            seed=self.seed,
            json=json,
            schema=None if form is None else form.schema(),
            effort=None if self.disable_reasoning else self.reasoning_effort,
            tier=self.service_tier,
            cache_key=self.prompt_cache_key,
            prefix=prefix,
            prediction=None if self.prediction is None else written(self.prediction.content),
            tools=tools,
            choice=self.chosen(tools),
            parallel=self.parallel_tool_calls is not False,
            after_tool=isinstance(self.messages[-1], Tool),
            format=reasoning_format(self.reasoning_format, self.model, json),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stop=self.stops(),
            least=least or 0,
            images=len(pictures),
            image_tokens=sum(pictures),
            stream=bool(self.stream),
            include_usage=self.includes_usage(),
        )

    def refuse_combinations(self) -> None:
        """Raises ValidationError for parameters that do not go together."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValidationError("Set only one of max_tokens and max_completion_tokens - at `$.max_tokens`")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValidationError("top_logprobs needs logprobs to be true - at `$.top_logprobs`")
        if self.prediction is not None:
            for name, used in (("tools", self.tools), ("logprobs", self.logprobs), ("n", (self.n or 1) > 1)):
                if used:
                    raise ValidationError(f"prediction cannot be used together with {name} - at `$.prediction`")
        form = self.response_format
        if self.reasoning_format == "raw" and form is not None and form.type != "text":
            raise ValidationError(f"raw cannot be used with {form.type} - at `$.reasoning_format`")
        if self.tool_choice is not None and not self.tools:
            raise ValidationError("tool_choice needs tools - at `$.tool_choice`")
        if self.model_parameters:
            raise ValidationError("This model has no model_parameters - at `$.model_parameters`")

    def read(self) -> tuple[str, list[str], list[int]]:
        """The last user message, the text of every message, and the tokens of every image."""
        keeps = self.clear_thinking is False or (self.clear_thinking is None and not self.model.startswith("zai-glm"))
        turn = max((at for at, message in enumerate(self.messages) if isinstance(message, User)), default=0)
        last, texts, pictures = "", [], list[int]()
        for position, message in enumerate(self.messages):
            text = written(message.content)
            if isinstance(message, System) and not isinstance(message.content, str):
                pictures += seen(message.content, position)
            if isinstance(message, User):
                last = text
            elif isinstance(message, Assistant):
                if message.reasoning is not None and (keeps or position > turn):
                    text = f"{written(message.reasoning)}\n{text}"
                calls = [f"{call.function.name} {call.function.arguments}" for call in message.tool_calls or ()]
                text = "\n".join([text, *calls]) if calls else text
            texts.append(text)
        return last, texts, pictures

    def offered(self) -> tuple[tuple[wire.Tool, ...], list[str]]:
        """The tools, and the text in which the model reads them."""
        tools, declared = [], []
        for position, one in enumerate(self.tools or ()):
            function = one.function
            place = f"tools[{position}].function.parameters"
            parameters = schema(function.parameters, bool(function.strict), place) or {}
            tools.append(wire.Tool(function.name, function.description or "", parameters))
            declared.append(f"{function.name}: {function.description or ''} {bytes(function.parameters).decode()}")
        return tuple(tools), declared

    def chosen(self, tools: Sequence[wire.Tool]) -> str:
        """What `Question.choice` says."""
        if not isinstance(self.tool_choice, Chosen):
            return self.tool_choice or "auto"
        name = self.tool_choice.function.name
        if name not in [tool.name for tool in tools]:
            raise ValidationError(f"There is no tool {name} - at `$.tool_choice.function.name`")
        return f":{name}"


class CompletionRequest(Parameters, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: bool | Top | None = None
    echo: bool | None = None
    return_raw_tokens: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None
    grammar_root: GrammarRoot | None = None

    def question(self) -> Question:
        """What is asked; raises ValidationError where parameters do not go together."""
        self.refuse_combinations()
        prompts, numbers = self.read()
        text = "\n".join(prompts)
        n = self.n or 1
        told = self.logprobs
        if isinstance(told, bool):
            told = (self.top_logprobs or 0) if told else None
        return Question(
            model=self.model,
            chat=False,
            text=text,
            tokens=len(numbers) if numbers else tokens(text),
            prompts=prompts,
            n=max(n, self.best_of or 1),
            cap=None if self.max_tokens == -1 else self.max_tokens,
            seed=self.seed,
            cache_key=self.prompt_cache_key,
            prefix="".join(f"{number % 0x10000:04x}" for number in numbers) or text,
            logprobs=told,
            stop=self.stops(),
            least=self.min_tokens or 0,
            kept=n,
            echo=bool(self.echo),
            raw=bool(self.return_raw_tokens),
            stream=bool(self.stream),
            include_usage=self.includes_usage(),
        )

    def refuse_combinations(self) -> None:
        """Raises ValidationError for parameters that do not go together."""
        if self.echo and self.return_raw_tokens:
            raise ValidationError("echo cannot be used together with return_raw_tokens - at `$.echo`")
        if self.top_logprobs is not None and self.logprobs is not True:
            raise ValidationError("top_logprobs needs logprobs to be true - at `$.top_logprobs`")
        if self.suffix is not None:
            raise ValidationError("suffix is not supported - at `$.suffix`")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValidationError("best_of must not be less than n - at `$.best_of`")
        if self.best_of is not None and self.best_of > 1 and self.stream:
            raise ValidationError("best_of cannot be streamed - at `$.best_of`")

    def read(self) -> tuple[list[str], list[int]]:
        """The prompts as texts, and the tokens in all where they came as numbers of tokens.

        Numbers are read as they are written: nobody knows the text behind them.
        """
        if isinstance(self.prompt, str):
            return [self.prompt], []
        kinds = {type(one) for one in self.prompt}
        if len(kinds) > 1:
            raise ValidationError("A prompt is one text, a list of texts, of tokens, or of lists - at `$.prompt`")
        if kinds == {str}:
            return [str(one) for one in self.prompt], []
        lists = [self.prompt] if kinds == {int} else self.prompt
        tokens_of = [[number for number in one if isinstance(number, int)] for one in lists if isinstance(one, list)]
        for position, each in enumerate(tokens_of):
            if not each or min(each) < 0:
                raise ValidationError(f"Tokens are whole numbers from 0, at least one - at `$.prompt[{position}]`")
        return [" ".join(map(str, each)) for each in tokens_of], [number for each in tokens_of for number in each]


def written(content: "str | Sequence[Text | ImageUrl | Image] | None") -> str:
    """The text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if isinstance(part, Text))


def seen(content: "Sequence[Text | ImageUrl | Image]", position: int) -> list[int]:
    """The tokens of each image in a message's content; raises ValidationError for what is none."""
    found = []
    for at, part in enumerate(content):
        if isinstance(part, Text):
            continue
        url, place = (part.image, "image") if isinstance(part, Image) else (part.image_url.url, "image_url.url")
        try:
            found.append(images.tokens(url))
        except ValueError as wrong:
            raise ValidationError(f"{wrong} - at `$.messages[{position}].content[{at}].{place}`") from None
    return found


def answered_tools(messages: Sequence[System | Assistant | Tool]) -> None:
    """Raises ValidationError unless every tool call is answered directly after it, once, and nothing else is."""
    open_calls: set[str] = set()
    known: set[str] = set()
    for position, message in enumerate(messages):
        if isinstance(message, Tool):
            if message.tool_call_id not in open_calls:
                raise ValidationError(
                    f"No tool call waits for {message.tool_call_id} - at `$.messages[{position}].tool_call_id`"
                )
            open_calls.remove(message.tool_call_id)
            continue
        if open_calls:
            break
        if isinstance(message, Assistant):
            for call in message.tool_calls or ():
                if call.id in known:
                    raise ValidationError(f"The id {call.id} is used twice - at `$.messages[{position}].tool_calls`")
                known.add(call.id)
                open_calls.add(call.id)
    if open_calls:
        raise ValidationError(f"The tool call {min(open_calls)} must be answered directly after it - at `$.messages`")


def reasoning_format(asked: ReasoningFormat | None, model: str, json: bool) -> str:
    """How the reasoning is given back; where the request does not say, as the model does it."""
    if asked is not None and asked != "none":
        return asked
    if model.startswith("qwen"):
        return "hidden" if json else "raw"
    return "text_parsed"


def schema(raw: Raw, is_strict: bool, place: str) -> answers.Schema | None:
    """The schema at a place of the request, None where there is none; raises ValidationError for what is none."""
    text = bytes(raw)
    if text == b"null":
        return None
    try:
        read = answers.read_schema(text)
    except ValidationError:
        raise ValidationError(f"Expected `object` - at `$.{place}`") from None
    if is_strict and (problem := _misfit(text)):
        raise ValidationError(f"The schema does not fit strict mode: {problem} - at `$.{place}`")
    return read


@lru_cache(maxsize=64)
def _misfit(raw: bytes) -> str | None:
    """Why strict mode refuses a schema, kept because jobs send the same one with every row."""
    read = answers.read_schema(raw)
    return strict.misfit(read, len(msgspec.json.encode(read)))


ENDPOINTS: dict[str, msgspec.json.Decoder[ChatRequest] | msgspec.json.Decoder[CompletionRequest]] = {
    "/v1/chat/completions": msgspec.json.Decoder(ChatRequest),
    "/v1/completions": msgspec.json.Decoder(CompletionRequest),
}


def read(path: str, headers: Mapping[str, str], body: bytes, encodings: Collection[str]) -> tuple[Question, bytes]:
    """What a request to one of `ENDPOINTS` asks, and its body as JSON; raises RefusedError for what is no request."""
    threshold = _threshold(headers)
    if headers:
        body = bodies.plain(headers, body, encodings)
    try:
        question = ENDPOINTS[path].decode(body).question()
    except ValidationError as wrong:
        raise wire.RefusedError(400, wire.invalid_as(wrong)) from None
    except (DecodeError, UnicodeDecodeError, RecursionError):
        raise wire.RefusedError(400, wire.invalid("The body is not valid JSON.")) from None
    return (question if threshold is None else replace(question, threshold=threshold)), body


def _threshold(headers: Mapping[str, str]) -> float | None:
    """The seconds of the header `queue_threshold`; raises RefusedError where it or the version is wrong."""
    version = headers.get("x-cerebras-version-patch", "2").strip()
    if version != "2":
        message = f"Version patch {version} is not supported; 2 is."
        raise wire.RefusedError(400, wire.invalid(message, "X-Cerebras-Version-Patch"))
    text = headers.get("queue_threshold")
    if text is None:
        return None
    if not text.strip().isdecimal() or int(text) not in _THRESHOLD:
        message = "queue_threshold must be a whole number of milliseconds from 50 to 20000."
        raise wire.RefusedError(400, wire.invalid(message, "queue_threshold"))
    return int(text) / 1000
