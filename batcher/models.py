"""Which models a service has, what is publicly known of them, and whether a job's model is among them."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from batcher.access import Access
from batcher.dialects import PRICES_AS_OF
from batcher.errors import BatcherError, PausedError, ServiceError
from batcher.job import Service
from batcher.records import Failure, Kind, Price, Rates, Reply
from batcher.report import count, printable
from batcher.retry import sentence
from batcher.transport import HttpTransport, Transport

TIMEOUT: Final = 30.0
"""Seconds that a list of models may take."""
_LATER: Final = frozenset(
    (
        *(Kind.RATE_LIMITED, Kind.DAY_QUOTA, Kind.NO_CREDIT, Kind.OVERLOADED, Kind.SERVER_ERROR, Kind.UNAVAILABLE),
        *(Kind.REQUEST_TIMEOUT, Kind.CONFLICT, Kind.DNS, Kind.CONNECTION, Kind.CONNECT_TIMEOUT, Kind.DISCONNECTED),
        *(Kind.STALE_CONNECTION, Kind.TIMEOUT, Kind.LOCAL_RESOURCES),
    )
)
"""What may be otherwise the next time."""
_NO_SUCH_CALL: Final = frozenset((Kind.NOT_FOUND, Kind.NOT_SERVED, Kind.REJECTED))
_CONTEXT: Final = ("max_context_length", "context_length", "context_window", "max_model_len")
"""Cerebras' catalogue; OpenRouter and others; Groq; vLLM."""


class Model(msgspec.Struct, kw_only=True):
    """A model as its service describes it; what is not said is None."""

    id: str
    owned_by: str | None = None
    context: int | None = None
    """Tokens of prompt and answer together."""
    max_output: int | None = None
    price: Rates | None = None
    """What the service says that it costs now, USD per million tokens."""
    run_price: Price | None = None
    """What a run counts with."""
    run_price_from: str | None = None
    """job, or the built-in list and its date; None where a run knows no price."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    preview: bool | None = None
    deprecated: bool | None = None
    capabilities: tuple[str, ...] = ()


async def described(transport: Transport, name: str) -> Model | ServiceError | None:
    """A model as the service's list has it; what to say when it does not have it; None when it does not tell.

    A list may lack what can be asked all the same (aliases, wildcards, models that a server loads when they are asked),
    so the service itself has to say that there is no such model.
    """
    listed = _read(await transport.get("/models"))
    if isinstance(listed, Failure):
        return None
    if (found := next((model for model in listed if model.id == name), None)) is not None:
        return found
    told = await transport.get(_path(name))
    return _missing(name, listed) if isinstance(told, Failure) and told.kind is Kind.MODEL_NOT_FOUND else None


async def look(service: Service, access: Access, name: str | None = None) -> list[Model]:
    """The models that the key may use, or the one of that name. Raises ServiceError and PausedError.

    The service's public catalogue, where its dialect knows of one, adds what the list does not say.
    """
    transport = _transport(access.url, access.headers, service, access)
    try:
        listed = _read(await transport.get("/models"))
        if name is not None and not (isinstance(listed, list) and any(model.id == name for model in listed)):
            listed = _one(await transport.get(_path(name)), name, listed)
        elif name is not None and isinstance(listed, list):
            listed = [model for model in listed if model.id == name]
    finally:
        await transport.close()
    if isinstance(listed, Failure):
        raise _ended(listed, access.url)
    known = {model.id: model for model in await _catalogue(service, access)}
    return [_priced(_together(model, known.get(model.id)), service, access) for model in listed]


def render(models: Sequence[Model]) -> str:
    """Models as a table, without the columns that would be empty."""
    columns = {
        "model": [printable(model.id) for model in models],
        "context": [_count(model.context) for model in models],
        "max output": [_count(model.max_output) for model in models],
        "USD per million in / out": [_rates(model.price) for model in models],
        "requests/min": [_count(model.requests_per_minute) for model in models],
        "tokens/min": [_count(model.tokens_per_minute) for model in models],
        "a run counts with": [_counted(model) for model in models],
        "": [_state(model) for model in models],
    }
    table = [[name, *cells] for name, cells in columns.items() if any(cells)]
    widths = [max(map(len, column)) for column in table]
    rows = zip(*table, strict=True)
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def render_one(model: Model) -> str:
    """All that is known of one model, a line each."""
    lines = {
        "model": printable(model.id),
        "owned by": printable(model.owned_by or ""),
        "context": model.context and f"{count(model.context)} tokens",
        "max output": model.max_output and f"{count(model.max_output)} tokens",
        "price": model.price and f"USD {_rates(model.price)} per million tokens in / out, as the service says",
        "a run": f"counts with {_counted(model)}" if model.run_price else "knows no price; name it in service.prices",
        "limits": ", ".join(
            f"{count(limit)} {what} per minute"
            for limit, what in ((model.requests_per_minute, "requests"), (model.tokens_per_minute, "tokens"))
            if limit is not None
        ),
        "can do": printable(", ".join(model.capabilities)),
        "state": _state(model),
    }
    return "\n".join(f"{name:<11}{text}" for name, text in lines.items() if text)


# What services say


def _read(told: Reply | Failure) -> list[Model] | Failure:
    """A list of models; a failure where it is none."""
    if isinstance(told, Failure):
        return told
    try:
        answer = msgspec.json.decode(told.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = None
    entries = answer.get("data") if isinstance(answer, dict) else answer  # Together answers with the bare list
    if not isinstance(entries, list):
        return Failure(Kind.MALFORMED_RESPONSE, "what it answers is no list of models", told.timing, told.status)
    return [model for entry in entries if (model := _model(entry)) is not None]


def _one(told: Reply | Failure, name: str, listed: list[Model] | Failure) -> list[Model] | Failure:
    """A model that is not in the list, as the service describes it. Raises ServiceError when there is no such model."""
    if isinstance(told, Failure):
        if told.kind is Kind.MODEL_NOT_FOUND or (isinstance(listed, list) and told.kind in _NO_SUCH_CALL):
            raise _missing(name, listed if isinstance(listed, list) else [])
        return told
    try:
        model = _model(msgspec.json.decode(told.body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        model = None
    if model is None:
        return Failure(Kind.MALFORMED_RESPONSE, "what it answers is no model", told.timing, told.status)
    return [model]


def _model(entry: object) -> Model | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return None
    limits, abilities = _table(entry, "limits"), _table(entry, "capabilities")
    owner = entry.get("owned_by")
    return Model(
        id=entry["id"],
        owned_by=owner if isinstance(owner, str) else None,
        context=next((size for name in _CONTEXT if (size := _whole((entry | limits).get(name)))), None),
        max_output=_whole((entry | limits).get("max_completion_tokens")),
        price=_price(_table(entry, "pricing")),
        requests_per_minute=_whole(limits.get("requests_per_minute")),
        tokens_per_minute=_whole(limits.get("tokens_per_minute")),
        preview=_flag(entry.get("preview")),
        deprecated=_flag(entry.get("deprecated")),
        capabilities=tuple(name for name, has in abilities.items() if has is True),
    )


def _table(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = entry.get(name)
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _price(pricing: Mapping[str, object]) -> Rates | None:
    """USD per million from a catalogue's texts, which are USD per token."""
    try:
        prompt, completion = (round(float(str(pricing.get(key))) * 1e6, 6) for key in ("prompt", "completion"))
    except ValueError:
        return None
    return Rates(prompt, completion) if 0 <= prompt < 1e9 and 0 <= completion < 1e9 else None


# The look


def _transport(url: str, headers: Mapping[str, str], service: Service, access: Access) -> HttpTransport:
    timeout = min(TIMEOUT, service.timeout)
    return HttpTransport(
        url, headers, access.dialect, timeout, access.secrets, service.proxy, library=service.transport
    )


async def _catalogue(service: Service, access: Access) -> list[Model]:
    """What the service's host tells everybody, without a key; nothing where it does not."""
    if access.dialect.catalogue is None:
        return []
    parts = urlsplit(access.url)
    address = urlunsplit((parts.scheme, parts.netloc, access.dialect.catalogue, "", ""))
    transport = _transport(address, {}, service, access)
    try:
        listed = _read(await transport.get("/models"))
    finally:
        await transport.close()
    return [] if isinstance(listed, Failure) else listed


def _together(model: Model, public: Model | None) -> Model:
    """A model with what the catalogue adds to it."""
    if public is None:
        return model
    said = {name: value for name in model.__struct_fields__ if (value := getattr(model, name)) not in (None, ())}
    return msgspec.structs.replace(public, **said)


def _priced(model: Model, service: Service, access: Access) -> Model:
    if own := service.prices.get(model.id):
        return msgspec.structs.replace(model, run_price=own, run_price_from="job")
    if listed := access.dialect.prices.get(model.id):
        return msgspec.structs.replace(model, run_price=listed, run_price_from=f"list of {PRICES_AS_OF}")
    return model


def _path(name: str) -> str:
    return f"/models/{quote(name, safe='')}"


def _missing(name: str, listed: Sequence[Model]) -> ServiceError:
    names = [model.id for model in listed]
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        hint = f"close are {', '.join(close)}" if len(close) > 1 else f"did you mean {close[0]}?"
    elif names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        hint = f"it has {', '.join(names[:10])}{more}"
    else:
        hint = "check request.model"
    return ServiceError(f"the service has no model {name}; {hint}")


def _ended(failure: Failure, url: str) -> BatcherError:
    """What ends a look at a service that tells nothing."""
    if failure.kind in _LATER:
        return PausedError(f"{url} does not tell its models now: {failure.message}")
    if failure.kind in _NO_SUCH_CALL or failure.kind is Kind.MALFORMED_RESPONSE:
        status = f" ({failure.status})" if failure.status else ""
        return ServiceError(f"{url} does not list its models{status}: {failure.message or 'no such call'}")
    return ServiceError(sentence(failure))


def _count(number: int | None) -> str:
    return "" if number is None else count(number)


def _rates(rates: Rates | None) -> str:
    return "" if rates is None else f"{rates.input:g} / {rates.output:g}"


def _counted(model: Model) -> str:
    return f"{_rates(model.run_price)} ({model.run_price_from})" if model.run_price else ""


def _state(model: Model) -> str:
    return ", ".join(name for name in ("preview", "deprecated") if getattr(model, name))
