"""The models that are served: what they can, what they cost, and the forms in which the service lists them."""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

from batcher.simulator import wire
from batcher.simulator.answers import Json

WARMING = "/v1/tcp_warming"
_PUBLIC = "/public"
_LIST = "/v1/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model of the catalogue; prices are USD per million tokens."""

    name: str
    owner: str
    source: str | None = None  # its name where its weights are published
    context: int = 131_072  # tokens of prompt and completion together
    completion: int = 40_960  # of it, tokens of a completion
    prompt_price: float = 0.35
    completion_price: float = 0.75
    images: int = 0  # in one request
    reasons: bool = True
    preview: bool = False


_ENTRIES = {
    "gpt-oss-120b": Entry(name="GPT OSS 120B", owner="OpenAI", source="openai/gpt-oss-120b"),
    "qwen-3.8-27b": Entry(
        name="Qwen 3.8 27B",
        owner="Alibaba",
        source="Qwen/Qwen3.8-27B",
        completion=32_768,
        prompt_price=0.99,
        completion_price=1.49,
        images=10,
    ),
    "gemma-4-31b": Entry(
        name="Gemma 4 31B",
        owner="Google",
        source="google/gemma-4-31b-it",
        prompt_price=0.99,
        completion_price=1.49,
        images=5,
        reasons=False,
        preview=True,
    ),
    "zai-glm-4.7": Entry(
        name="Z.ai GLM 4.7",
        owner="Z.ai",
        source="zai-org/GLM-4.7",
        completion=40_000,
        prompt_price=2.25,
        completion_price=2.75,
        preview=True,
    ),
}


def entry(model: str) -> Entry:
    """What is known of a model; of one that was named in the settings only, the usual."""
    return _ENTRIES.get(model) or Entry(name=model, owner="Cerebras")


def refuse(question: wire.Question) -> None:
    """Raises RefusedError for a question that its model cannot take."""
    known = entry(question.model)
    if question.images > known.images:
        message = (
            f"At most {known.images} images in one request." if known.images else "This model does not take images."
        )
        raise wire.RefusedError(400, wire.invalid(message, "messages"))
    length = question.tokens + (question.cap or 0)
    if length > known.context:
        message = (
            "Please reduce the length of the messages or completion. "
            f"Current length is {length} while limit is {known.context}"
        )
        body = wire.error_body(message, "invalid_request_error", "messages", "context_length_exceeded")
        raise wire.RefusedError(400, body)


def is_listing(path: str) -> bool:
    """Whether a path is one of this module's."""
    bare = path.removeprefix(_PUBLIC)
    return path == WARMING or bare == _LIST or bare.startswith(f"{_LIST}/")


def is_open(path: str) -> bool:
    """Whether a path of this module answers without a key."""
    return path == WARMING or path.startswith(_PUBLIC)


def listed(path: str, query: str, limits: Mapping[str, Mapping[str, float]]) -> bytes:
    """The answer about all models or about one; `limits` are those of each model that is served.

    Raises RefusedError for a model or a format that there is not.
    """
    if path == WARMING:
        return b"{}"
    public = path.startswith(_PUBLIC)
    name = unquote(path.removeprefix(_PUBLIC).removeprefix(_LIST).removeprefix("/"))
    form = parse_qs(query).get("format", ["default"])[-1]
    if form not in _FORMS or (public and form != "default"):
        known = ", ".join(_FORMS)
        raise wire.RefusedError(400, wire.invalid(f"Unknown format {form!r}; known are {known}.", "format"))
    if name and name not in limits:
        raise wire.RefusedError(404, wire.no_model(name))
    described = [
        _public(model, limits[model]) if public else _FORMS[form](model) for model in ([name] if name else limits)
    ]
    return wire.ENCODER.encode(described[0] if name else {"object": "list", "data": described})


def _plain(model: str) -> dict[str, Json]:
    """A model as OpenAI's clients read it."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "Cerebras"}


def _per_token(dollars: float) -> str:
    """A price per million tokens as one per token, in plain digits."""
    return f"{dollars / 1e6:.12f}".rstrip("0")


def _pricing(known: Entry) -> dict[str, Json]:
    return {"prompt": _per_token(known.prompt_price), "completion": _per_token(known.completion_price)}


def _openrouter(model: str) -> dict[str, Json]:
    """A model in the form of OpenRouter."""
    known = entry(model)
    return {
        "id": f"cerebras/{model}",
        "name": known.name,
        "created": 0,
        "description": f"{known.name}, simulated",
        "hugging_face_id": known.source,
        "context_length": known.context,
        "max_output_length": known.completion,
        "pricing": _pricing(known),
        "input_modalities": ["text", "image"] if known.images else ["text"],
        "output_modalities": ["text"],
        "quantization": "fp16",
        "supported_features": ["tools", "json_mode", "structured_outputs", *(["reasoning"] if known.reasons else [])],
        "supported_sampling_parameters": ["temperature", "top_p", "stop", "seed", "max_tokens"],
        "datacenters": [{"country_code": "US"}],
        "openrouter": {"slug": model},
    }


def _huggingface(model: str) -> dict[str, Json]:
    """A model in the form of Hugging Face."""
    known = entry(model)
    return {
        "id": model,
        "object": "model",
        "created": 0,
        "owned_by": known.owner,
        "hugging_face_id": known.source,
        "context_length": known.context,
        "pricing": {"input": known.prompt_price, "output": known.completion_price},
        "capabilities": {
            "function_calling": True,
            "streaming": True,
            "structured_outputs": True,
            "vision": bool(known.images),
        },
    }


_FORMS = {"default": _plain, "openrouter": _openrouter, "huggingface": _huggingface}


def _whole(limit: float | None) -> int | None:
    return None if limit is None else int(limit)


def _public(model: str, limits: Mapping[str, float]) -> dict[str, Json]:
    """A model as the public catalogue has it."""
    known = entry(model)
    return {
        "id": model,
        "object": "model",
        "name": known.name,
        "description": f"{known.name}, simulated",
        "owned_by": known.owner,
        "created": 0,
        "hugging_face_id": known.source,
        "pricing": _pricing(known),
        "limits": {
            "max_context_length": known.context,
            "max_completion_tokens": known.completion,
            "requests_per_minute": _whole(limits.get("requests-minute")),
            "tokens_per_minute": _whole(limits.get("uncached-tokens-minute", limits.get("tokens-minute"))),
        },
        "capabilities": {
            **dict.fromkeys(
                (
                    *("streaming", "function_calling", "structured_outputs", "json_mode", "tools", "tool_choice"),
                    *("parallel_tool_calls", "response_format"),
                ),
                True,
            ),
            "vision": bool(known.images),
            "reasoning": known.reasons,
        },
        "supported_parameters": {
            **dict.fromkeys(
                (
                    *("temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs"),
                    *("top_logprobs", "max_completion_tokens", "seed", "stop"),
                ),
                True,
            ),
            "repetition_penalty": False,
        },
        "architecture": {
            "modality": "text+vision" if known.images else "text",
            "tokenizer": known.name,
            "instruct_type": None,
        },
        "datacenter_locations": ["simulated"],
        "deprecated": False,
        "preview": known.preview,
        "quantization": "FP16",
    }
