"""The API's parameters: which there are, their types and ranges, and which go together.

From the reference of api.cerebras.ai (/v1/chat/completions and /v1/completions, versions of 2026); what it leaves open
is accepted. A job file and a row are held against the same.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from batcher.checks import Check, shown

Tier = Literal["priority", "default", "auto", "flex"]
"""The service tiers that can be asked for."""

Count = Annotated[int, Meta(ge=1, le=2**53)]
"""A number of things that there is at least one of."""
Text = Annotated[str, Meta(min_length=1)]

_Unit = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Choices = Annotated[int, Meta(ge=1, le=128)]
_Least = Annotated[int, Meta(ge=-1, le=2**53)]  # -1: as long as the model can
_Logprobs = Annotated[int, Meta(ge=0, le=20)]
_Image = Annotated[str, Meta(pattern=r"^(data:image/[\w.+-]+;base64,|https?://)")]


class _TextPart(Struct, tag="text", tag_field="type"):
    text: str


class _ImageUrl(Struct):
    url: _Image
    detail: str | None = None


class _ImageUrlPart(Struct, tag="image_url", tag_field="type"):
    image_url: _ImageUrl


class _ImagePart(Struct, tag="image", tag_field="type"):
    image: _Image


_Parts = Annotated[list[_TextPart | _ImageUrlPart | _ImagePart], Meta(min_length=1)]
_TextParts = Annotated[list[_TextPart], Meta(min_length=1)]


class _Called(Struct):
    name: Text
    arguments: str


class _Call(Struct, tag="function", tag_field="type"):
    id: Text
    function: _Called
    index: int | None = None


class _System(Struct, tag="system", tag_field="role"):
    content: str | _Parts
    name: str | None = None


class _Developer(_System, tag="developer", tag_field="role"):
    pass


class _User(_System, tag="user", tag_field="role"):
    pass


class _Assistant(Struct, tag="assistant", tag_field="role"):
    content: str | _TextParts | None = None
    reasoning: str | _TextParts | None = None
    tool_calls: list[_Call] | None = None
    name: str | None = None


class _ToolAnswer(Struct, tag="tool", tag_field="role"):
    content: str | _TextParts
    tool_call_id: Text
    name: str | None = None


_Message = _System | _Developer | _User | _Assistant | _ToolAnswer


class _Function(Struct):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(Struct, tag="function", tag_field="type"):
    function: _Function


class _Named(Struct):
    name: Text


class _ToolChoice(Struct, tag="function", tag_field="type"):
    function: _Named


class _Prediction(Struct, tag="content", tag_field="type"):
    content: str | _TextParts


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _PlainFormat(Struct, tag="text", tag_field="type"):
    pass


class _ObjectFormat(Struct, tag="json_object", tag_field="type"):
    pass


class _JsonSchema(Struct):
    name: Text
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _SchemaFormat(Struct, tag="json_schema", tag_field="type"):
    json_schema: _JsonSchema


_Root = Literal[
    "root",
    "fcall",
    "nofcall",
    "insidevalue",
    "value",
    "object",
    "array",
    "string",
    "number",
    "funcarray",
    "func",
    "ws",
]

_BOTH: dict[str, Any] = {
    "model": Text,
    "frequency_penalty": _Penalty,
    "logit_bias": dict[Annotated[str, Meta(pattern=r"^[0-9]+$")], Annotated[float, Meta(ge=-100, le=100)]],
    "max_tokens": Count,
    "min_tokens": _Least,
    "n": _Choices,
    "presence_penalty": _Penalty,
    "prompt_cache_key": Annotated[str, Meta(max_length=1024)],
    "reasoning_format": Literal["parsed", "text_parsed", "raw", "hidden", "none"],
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "stop": str | Annotated[list[str], Meta(min_length=1, max_length=4)],
    "stream": bool,
    "stream_options": _StreamOptions,
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "top_logprobs": _Logprobs,
    "top_p": _Unit,
    "user": str,
}
CHAT: dict[str, Any] = _BOTH | {
    "clear_thinking": bool,
    "disable_reasoning": bool,
    "logprobs": bool,
    "max_completion_tokens": Count,
    "messages": Annotated[list[_Message], Meta(min_length=1)],
    "min_completion_tokens": _Least,
    "model_parameters": dict[str, Any],
    "parallel_tool_calls": bool,
    "prediction": _Prediction,
    "reasoning_effort": Literal["none", "low", "medium", "high"],
    "response_format": _PlainFormat | _ObjectFormat | _SchemaFormat,
    "tool_choice": Literal["none", "auto", "required"] | _ToolChoice,
    "tools": list[_Tool],
}
"""The parameters of a chat request, by name, with their types."""
COMPLETIONS: dict[str, Any] = _BOTH | {
    "best_of": _Choices,
    "echo": bool,
    "grammar_root": _Root,
    "logprobs": bool | _Logprobs,  # the reference has both: with top_logprobs, or the number itself
    "prompt": str | list[Any],
    "return_raw_tokens": bool,
    "suffix": str,
}
"""The parameters of a completions request."""

# Whole requests name their tier themselves; a job does so in its schedule.
_CHECKS: Mapping[str, Mapping[str, Check]] = {
    "chat": {name: Check(kind) for name, kind in {**CHAT, "service_tier": Tier}.items()},
    "completions": {name: Check(kind) for name, kind in COMPLETIONS.items()},
}
_MESSAGE = Check(_Message)

_URLS = {"/chat/completions": "chat", "/completions": "completions"}


def endpoint_of(url: object) -> str | None:
    """The endpoint that a batch file's `url` names; None where we do not serve it."""
    return _URLS.get(url.removeprefix("/v1")) if isinstance(url, str) else None


def is_template(value: object) -> bool:
    """Whether a value of `[request]` is a text that Jinja has to render."""
    return isinstance(value, str) and ("{{" in value or "{%" in value or "{#" in value)


def misfit(endpoint: str, name: str, value: object) -> str | None:
    """Say what is wrong with one parameter's value, or None."""
    check = _CHECKS[endpoint][name]
    if name == "prompt":
        right = isinstance(value, str) or (isinstance(value, list | tuple) and _are_prompts(value))
        return None if right else f"prompt: {_PROMPTS}, not {shown(value)}"
    if found := check.misfit(value):
        return _said(name, found.place, found.allowed, value)
    if name == "messages":
        assert isinstance(value, list | tuple)
        return _unanswered(value)
    return None


_PROMPTS = "a text, a list of texts, a list of token ids or a list of such lists"


def _are_prompts(value: Sequence[object]) -> bool:
    kinds = set(map(type, value))
    if kinds <= {list, tuple}:
        return bool(value) and all(_are_tokens(prompt) for prompt in value)
    return kinds == {str} or _are_tokens(value)


def _are_tokens(value: Any) -> bool:
    return set(map(type, value)) == {int} and min(value) >= 0


def _said(name: str, place: str, allowed: str, value: object) -> str:
    if name == "messages" and re.search(r"\]\.role$", place):
        if allowed.startswith("unknown"):
            return f"{name}{place}: system, developer, user, assistant or tool, not {allowed[9:]}"
        allowed, place = "role is missing", place.removesuffix(".role")
    if allowed == "role is missing":
        return f"{name}{place}: every message has a role"
    if allowed.endswith("is missing"):
        return f"{name}{place}.{allowed}"
    if "base64" in allowed:
        allowed = "an image as a data URI, such as {{ path | data_uri }} makes of a file"
    elif "regex" in allowed:  # logit_bias
        allowed = "the keys are token ids"
    elif allowed.startswith("unknown"):
        allowed = "function" if ".tool_calls" in place else _TYPES.get(name, "text, image_url or image")
    inner = _at(value, place)
    return f"{name}{place}: {allowed}, not {shown(value if inner is None else inner)}"


_TYPES = {
    "prediction": "content",
    "response_format": "text, json_object or json_schema",
    "tool_choice": "function",
    "tools": "function",
}
"""What `type` may be in a parameter, other than in the parts of messages."""


def _at(value: object, place: str) -> object:
    """What stands at a place in a value; None where that cannot be told."""
    for key, index in re.findall(r"\.(\w+)|\[(\d*|\.\.\.)\]", place):
        if key and isinstance(value, dict):
            value = value.get(key)
        elif index.isdecimal() and isinstance(value, list | tuple):
            value = value[int(index)]
        else:
            return None
    return value


def _unanswered(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with calls of tools and their answers, or None: each call is answered directly after, once."""
    calls: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in calls:
                return f"messages[{index}].tool_call_id: answers no call of the assistant's message before"
            calls.remove(message["tool_call_id"])
            continue
        if calls:
            return f"messages[{index}]: the tool call {shown(calls[0])} has to be answered before"
        calls = [call["id"] for call in message.get("tool_calls") or ()] if message["role"] == "assistant" else []
        if len(set(calls)) < len(calls):
            return f"messages[{index}].tool_calls: two calls with one id"
    return f"messages: the tool call {shown(calls[0])} is not answered" if calls else None


def misfit_message(index: int, message: object) -> str | None:
    """Say what is wrong with one of several messages, or None."""
    found = _MESSAGE.misfit(message)
    return (
        None if found is None else _said("messages", f"[{index}]{found.place}", found.allowed, [message] * (index + 1))
    )


def misfit_given(endpoint: str, name: str, value: object) -> str | None:
    """As `misfit`, of a value of the job file: what is wrong where a template stands shows only in its rows."""
    if is_template(value):
        return None
    if has_template(value):
        found = _CHECKS[endpoint][name].misfit(value)
        if found is None or name == "prompt":
            return None
        inner = _at(value, found.place)
        return None if inner is None or is_template(inner) else _said(name, found.place, found.allowed, value)
    return misfit(endpoint, name, value)


def has_template(value: object) -> bool:
    """Whether a template stands anywhere in a value."""
    if isinstance(value, dict):
        return any(map(has_template, value.values()))
    return any(map(has_template, value)) if isinstance(value, list) else is_template(value)


COMBINED = frozenset(
    {"best_of", "echo", "logprobs", "max_completion_tokens", "max_tokens", "min_completion_tokens", "min_tokens", "n"}
    | {"prediction", "reasoning_format", "response_format", "return_raw_tokens", "stream", "stream_options"}
    | {"tool_choice", "tools", "top_logprobs"}
)
"""The parameters of which `clash` knows that they do not go with others."""


def clash(given: Mapping[str, Any]) -> str | None:
    """Say which parameters do not go together, or None. What is a template or null is not held against others."""
    for one, other in (("max_tokens", "max_completion_tokens"), ("min_tokens", "min_completion_tokens")):
        if given.get(one) is not None and given.get(other) is not None:
            return f"{one} or {other}, not both"
    least = given.get("min_completion_tokens", given.get("min_tokens"))
    most = given.get("max_completion_tokens", given.get("max_tokens"))
    if type(least) is int and type(most) is int and least > most:
        return f"at least {least:,} tokens, and at most {most:,}"
    logprobs = given.get("logprobs")
    if given.get("top_logprobs") is not None and (logprobs is None or logprobs is False):
        return "top_logprobs: only with logprobs"
    several = type(given.get("n")) is int and given["n"] > 1
    tools = given.get("tools")
    if given.get("prediction") is not None:
        if isinstance(tools, list) and tools:
            return "prediction: not with tools"
        if logprobs is True:
            return "prediction: not with logprobs"
        if several:
            return "prediction: not with n above 1"
    form = given.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if given.get("reasoning_format") == "raw" and kind in ("json_object", "json_schema"):
        return f"reasoning_format: raw mixes the reasoning into the text, so not with {kind}"
    if given.get("tool_choice") is not None:
        if not tools:
            return "tool_choice: only with tools"
        if wrong := _chosen(given["tool_choice"], tools):
            return wrong
    if given.get("stream_options") is not None and not given.get("stream"):
        return "stream_options: only with stream = true"
    if given.get("echo") is True and given.get("return_raw_tokens") is True:
        return "echo: not with return_raw_tokens"
    best = given.get("best_of")
    if type(best) is int:
        if type(given.get("n", 1)) is int and best < (given.get("n") or 1):
            return f"best_of: at least n, which is {given['n']}"
        if given.get("stream") is True:
            return "best_of: not with stream"
    return None


def _chosen(choice: object, tools: object) -> str | None:
    """What is wrong with the choice of a tool that is not among the tools, or None."""
    match choice:
        case {"function": {"name": str(name)}} if isinstance(tools, list) and not is_template(name):
            names = [tool["function"]["name"] for tool in tools if isinstance(tool, dict) and _is_plain(tool)]
            if len(names) == len(tools) and name not in names:
                return f"tool_choice: no tool is called {shown(name)}"
    return None


def _is_plain(tool: Mapping[str, Any]) -> bool:
    """Whether a tool's name is known before a row is."""
    function = tool.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str) and not is_template(function["name"])


def misfits(endpoint: str, request: Mapping[str, object]) -> str | None:
    """Say what is wrong with a whole request, or None. What nobody here knows may be another server's: it passes."""
    for name in ("model", "messages" if endpoint == "chat" else "prompt"):
        if request.get(name) is None:
            return f"{name} is missing"
    for name in _CHECKS[endpoint]:
        if request.get(name) is not None and (wrong := misfit(endpoint, name, request[name])):
            return wrong
    return clash(request)
