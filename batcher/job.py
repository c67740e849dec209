"""The job file: typed, validated before anything is sent, and fingerprinted."""

import copy
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from batcher.errors import JobError
from batcher.records import Price, Rates

SIMULATOR = "simulator"

_Section = TypeVar("_Section", bound=Struct)

_Count = Annotated[int, Meta(ge=1, le=2**53)]
_Rate = Annotated[float, Meta(gt=0, le=1e12)]
_Text = Annotated[str, Meta(min_length=1)]


class Input(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the rows come from."""

    path: _Text | Annotated[list[_Text], Meta(min_length=1)] | None = None
    """None where the rows come from Python."""
    format: Literal["parquet", "jsonl", "csv", "arrow", "openai-batch"] | None = None
    id: _Text | None = None
    where: _Text | None = None
    sample: _Count | None = None
    limit: _Count | None = None


class Service(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is asked, and how it is reached. `timeout` is in seconds once read."""

    base_url: _Text = "https://api.cerebras.ai/v1"
    api_key_env: _Text | None = None
    dialect: Literal["cerebras", "openai"] | None = None
    headers_env: _Text | None = None
    encoding: Literal["json", "msgpack"] = "json"
    compression: Literal["none", "gzip"] = "none"
    timeout: float = 600.0
    proxy: bool = False
    prices: dict[str, Price] = {}


class Schedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be under way: numbers are ceilings, an absent rate is no limit of ours."""

    max_in_flight: Annotated[int, Meta(ge=1, le=100_000)] | Literal["auto"] = "auto"
    requests_per_minute: _Rate | None = None
    tokens_per_minute: _Rate | None = None
    uncached_tokens_per_minute: _Rate | None = None


class Retry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often a row is asked again."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 6
    max_invalid: Annotated[int, Meta(ge=0, le=100)] = 2


class Output(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the answers go."""

    path: _Text
    ledger: _Text | None = None
    keep: list[_Text] | Literal["all"] = "all"
    rows_per_part: Annotated[int, Meta(ge=1, le=10_000_000)] = 50_000
    raw: bool = False


class RequestTemplate(Struct, frozen=True, kw_only=True):
    """The `[request]` section with its files read: what every row's request is made from."""

    endpoint: Literal["chat", "completions"] | None
    """None: the column `url` names each row's."""
    parameters: dict[str, object]
    """The API's own names; strings may be templates. `messages` or `prompt` is among them, or there are none."""
    body: str | None = None
    """A template that gives a whole request, in place of all parameters."""
    schema: dict[str, object] | None = None
    schema_name: str = "answer"


_Unit = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_PARAMETERS: dict[str, Any] = {
    "model": _Text,
    "frequency_penalty": _Penalty,
    "max_completion_tokens": _Count,
    "max_tokens": _Count,
    "n": Annotated[int, Meta(ge=1, le=128)],
    "presence_penalty": _Penalty,
    "prompt_cache_key": Annotated[str, Meta(max_length=1024)],
    "reasoning_effort": Literal["none", "low", "medium", "high"],
    "response_format": dict[str, Any],
    "seed": Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)],
    "stop": str | Annotated[list[str], Meta(min_length=1, max_length=4)],
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "top_p": _Unit,
    "user": str,
}
"""Types and ranges of the chat completions reference (api.cerebras.ai, /v1/chat/completions)."""
_MESSAGES = Annotated[list[dict[str, Any]], Meta(min_length=1)]
_CHAT: dict[str, Any] = _PARAMETERS | {"messages": _MESSAGES}
_NOT_COMPLETIONS = {"max_completion_tokens", "response_format", "reasoning_effort"}
_COMPLETIONS: dict[str, Any] = {k: t for k, t in _PARAMETERS.items() if k not in _NOT_COMPLETIONS} | {"prompt": str}
_SHORTHANDS = ("endpoint", "system", "prompt", "body")

_URLS = {"/chat/completions": "chat", "/completions": "completions"}

_LATER = {
    "request": (
        *("extra", "tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs", "logit_bias"),
        *("prediction", "stream", "stream_options", "clear_thinking", "disable_reasoning", "reasoning_format"),
        *("min_completion_tokens", "min_tokens", "return_raw_tokens", "grammar_root", "echo", "best_of"),
        *("service_tier", "queue_threshold"),
    ),
    "schedule": ("service_tier", "queue_threshold", "deadline", "budget_usd", "dedupe", "wait"),
    "retry": ("repair",),
    "": ("sweep", "score"),
}
_LATER_VALUES = {
    ("request", "prompt_cache_key"): ("auto",),
    ("request", "max_completion_tokens"): ("auto",),
    ("schedule", "requests_per_minute"): ("auto",),
    ("schedule", "tokens_per_minute"): ("auto",),
    ("schedule", "uncached_tokens_per_minute"): ("auto",),
}
_SECTIONS: dict[str, type[Struct]] = {
    "input": Input,
    "service": Service,
    "schedule": Schedule,
    "retry": Retry,
    "output": Output,
}


class Job:
    """What is to be done: the sections of a job file, checked.

    `folder` is what relative paths start from. `texts` are the prompt and schema files by the names that the job gives
    them; those that are handed over are not read. Raises JobError naming the key and what is allowed.
    """

    __slots__ = (
        *("_sections", "folder", "input", "name", "origin", "output", "request", "retry", "schedule", "service"),
        "texts",
    )

    def __init__(
        self,
        *,
        name: str = "job",
        request: Mapping[str, object] | None = None,
        output: Mapping[str, object],
        input: Mapping[str, object] | None = None,
        service: Mapping[str, object] | None = None,
        schedule: Mapping[str, object] | None = None,
        retry: Mapping[str, object] | None = None,
        folder: str | Path = ".",
        origin: str = "job",
        texts: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise JobError(f"{origin}: name: a text that is not empty, please")
        given: dict[str, Mapping[str, object] | None] = {
            "input": input,
            "request": request,
            "service": service,
            "schedule": schedule,
            "retry": retry,
            "output": output,
        }
        self._sections: dict[str, dict[str, object]] = {}
        for section, values in given.items():
            if values is None:
                continue
            if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
                raise JobError(f"{origin}: {section}: a section, please: [{section}]")
            self._sections[section] = {key: value for key, value in values.items() if value is not None}
        batch = self._sections.get("input", {}).get("format") == "openai-batch"
        for section in ("request", "output"):
            if section not in self._sections and not (batch and section == "request"):
                raise JobError(f"{origin}: the section [{section}] is missing")
        self.name = name
        self.folder = Path(folder).absolute()
        self.origin = origin
        sections = {name: self._sections.get(name, {}) for name in (*_SECTIONS, "request")}
        self.input: Input = _section(Input, "input", sections["input"], origin)
        if batch:  # the file says what is asked, and what it is called
            sections["request"] = {"body": "{{ body }}", **sections["request"]}
            if self.input.id is None:
                self.input = msgspec.structs.replace(self.input, id="custom_id")
        if self.input.sample is not None and self.input.limit is not None:
            raise JobError(f"{origin}: input: sample or limit, not both")
        self.service: Service = _service(sections["service"], origin)
        self.schedule: Schedule = _section(Schedule, "schedule", sections["schedule"], origin)
        self.retry: Retry = _section(Retry, "retry", sections["retry"], origin)
        self.output: Output = _section(Output, "output", sections["output"], origin)
        self.texts = dict(texts or {})
        self.request = _request(sections["request"], batch, self.folder, origin, self.texts)
        inputs = [self.input.path] if isinstance(self.input.path, str) else self.input.path or []
        places = [("input.path", place) for place in inputs]
        places += [("output.path", self.output.path), ("output.ledger", self.output.ledger or "")]
        for key, place in places:
            if "://" in place and key != "input.path":
                raise JobError(f"{origin}: {key}: {_shown(place)}: only local paths are supported yet")
            if "\0" in place:
                raise JobError(f"{origin}: {key}: no path holds a NUL")
        try:
            self.document()
        except (TypeError, ValueError) as error:  # Python can say what TOML cannot: a null in a schema, say
            raise JobError(f"{origin}: the job cannot be written as TOML: {error}") from None

    def __repr__(self) -> str:
        asked = self.request.parameters.get("model", self.request.body)
        return f"Job({self.name!r}, {asked!r}, output={self.output.path!r})"

    @property
    def output_folder(self) -> Path:
        """The output's folder, absolute."""
        return Path(os.path.normpath(self.folder / self.output.path))

    @property
    def ledger_path(self) -> Path:
        """The ledger's file, absolute; inside the output unless the job says otherwise."""
        return (
            Path(os.path.normpath(self.folder / self.output.ledger))
            if self.output.ledger
            else (self.output_folder / "ledger.sqlite")
        )

    def document(self) -> bytes:
        """The job as TOML, overrides included; the ledger's path is absolute: the output may be read from anywhere."""
        document: dict[str, object] = {"name": self.name}
        document |= {name: section for name, section in self._sections.items() if section}
        if self.output.ledger:
            document["output"] = {**self._sections["output"], "ledger": str(self.ledger_path)}
        return msgspec.toml.encode(document)

    def changed(self, settings: Sequence[str]) -> "Job":
        """The same job for some rows that are asked again otherwise: `section.key=value`, never of input and output.

        The files that these settings name are read now; all others are what they were.
        """
        sections = copy.deepcopy(self._sections)
        texts = dict(self.texts)
        for setting in settings:
            section, *keys = _override(sections, setting)
            if section not in ("request", "service", "schedule", "retry"):
                raise JobError(
                    f"--set {_word(setting)}: a retry may change [request], [service], [schedule] and [retry] only"
                )
            if section == "request":
                value = _with_files(sections[section][keys[0]], self.folder, f"{self.origin}: request.{keys[0]}", {})
                sections[section][keys[0]] = value
                if isinstance(value, dict) and isinstance(value.get("schema"), str):
                    texts.pop(value["schema"], None)
        return from_document({"name": self.name, **sections}, self.folder, self.origin, texts)

    def meaning(self) -> dict[str, object]:
        """What may not change between the runs of one output, by dotted key, as JSON-able values."""
        parameters = {f"request.{name}": value for name, value in self.request.parameters.items()}
        return {
            "request.endpoint": self.request.endpoint,
            **parameters,
            "request.body": self.request.body,
            "request.response_format.schema": self.request.schema,
            "service.host": SIMULATOR
            if self.service.base_url == SIMULATOR
            else urlsplit(self.service.base_url).hostname,
            "input.id": self.input.id,
            "input.where": self.input.where,
            "output.keep": self.output.keep,
            "output.rows_per_part": self.output.rows_per_part,
            "output.raw": self.output.raw,
        }


def load(path: str | Path, settings: Sequence[str] = ()) -> Job:
    """Read a job file. `settings` are `section.key=value` overrides, the value in TOML or a bare text."""
    path = Path(path)
    document = read_document(path)
    for setting in settings:
        _override(document, setting)
    return from_document(document, path.absolute().parent, path.name)


def read_document(path: Path) -> dict[str, Any]:
    """The tables of a job file, not checked yet."""
    origin = path.name
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read: {_reason(error)}") from None
    except ValueError as error:  # TOMLDecodeError, and numbers beyond all measure
        raise JobError(f"{origin}: not valid TOML: {error}") from None
    except RecursionError:
        raise JobError(f"{origin}: nested too deeply") from None


def from_document(
    document: Mapping[str, Any], folder: Path, origin: str, texts: Mapping[str, str] | None = None
) -> Job:
    """The job that a file's tables describe."""
    top = ("name", "request", *_SECTIONS)
    for key in document:
        if key in _LATER[""]:
            raise JobError(f"{origin}: [{key}] is not supported yet")
        if key not in top:
            raise _unknown("", key, top, origin)
    given: dict[str, Any] = dict.fromkeys(("request", "output")) | dict(document)
    try:
        return Job(**given, folder=folder, origin=origin, texts=texts)
    except RecursionError:
        raise JobError(f"{origin}: nested too deeply") from None


def keys() -> tuple[Mapping[str, type[Struct]], Mapping[str, Mapping[str, Any]]]:
    """What a job file may hold: the struct of each section, and the types of `[request]`'s keys by endpoint."""
    return _SECTIONS, {"chat": _CHAT | {"system": str, "prompt": str}, "completions": _COMPLETIONS}


def endpoint_of(url: object) -> str | None:
    """The endpoint that a batch file's `url` names; None where we do not serve it."""
    return _URLS.get(url.removeprefix("/v1")) if isinstance(url, str) else None


def misfits(endpoint: str, request: Mapping[str, object]) -> str | None:
    """Say what is wrong with a whole request, or None. What nobody here knows may be another server's: it passes."""
    for name in ("model", "messages" if endpoint == "chat" else "prompt"):
        if request.get(name) is None:
            return f"{name} is missing"
    if request.get("stream"):
        return "stream: answers are read whole here; take it out"
    known = _CHAT if endpoint == "chat" else _COMPLETIONS
    for name in known:
        if request.get(name) is not None and (wrong := misfit(endpoint, name, request[name])):
            return wrong
    return None


def misfit(endpoint: str, name: str, value: object) -> str | None:
    """Say what is wrong with one parameter's value, or None. The check of both job files and rendered rows."""
    kind = (_CHAT if endpoint == "chat" else _COMPLETIONS)[name]
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return f"{name}{_place(error)}: {_allowed(kind, error)}, not {_shown(value)}"
    if name == "messages":
        for index, message in enumerate(value if isinstance(value, list) else []):
            if not isinstance(message.get("role"), str):
                return f"{name}[{index}]: every message has a role"
    return None


def duration(text: object) -> float:
    """Seconds of "10m", "1.5h", "250ms" or a plain number. Raises ValueError."""
    seconds = 0.0
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(min(text, 1e9))
    elif found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", str(text).strip(), re.ASCII):
        seconds = float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
    if not 0 < seconds < 1e9:
        raise ValueError(f'a duration such as "90s" or "10m", not {_shown(text)}')
    return seconds


def is_template(value: object) -> bool:
    """Whether a value of `[request]` is a text that Jinja has to render."""
    return isinstance(value, str) and ("{{" in value or "{%" in value or "{#" in value)


def _section(kind: type[_Section], name: str, given: Mapping[str, object], origin: str) -> _Section:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in given.items():
        _refuse_later(name, key, value, origin)
        if key not in fields:
            raise _unknown(name, key, fields, origin)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        place = _place(error)
        if missing := re.search(r"missing required field `(\w+)`", str(error)):
            raise JobError(f"{origin}: {name}{place}.{missing[1]} is missing") from None
        key = re.split(r"[.\[]", place)[1]
        allowed = _allowed(fields[key], error)
        if key.endswith("_env"):  # whoever mistakes it puts the secret itself there
            raise JobError(f"{origin}: {name}{place}: {allowed}: the name of an environment variable") from None
        raise JobError(f"{origin}: {name}{place}: {allowed}, not {_shown(given.get(key))}") from None


def _service(given: Mapping[str, object], origin: str) -> Service:
    values = dict(given)
    if "timeout" in values:
        try:
            values["timeout"] = duration(values["timeout"])
        except ValueError as error:
            raise JobError(f"{origin}: service.timeout: {error}") from None
    service: Service = _section(Service, "service", values, origin)
    for key in ("api_key_env", "headers_env"):
        if not re.fullmatch(r"[A-Za-z_]\w*", getattr(service, key) or "_", re.ASCII):
            raise JobError(f"{origin}: service.{key}: the name of an environment variable, never the secret itself")
    for model, price in service.prices.items():
        _check_rates(price, cast(Any, given)["prices"][model], f"service.prices.{_word(model)}", origin)
    if service.base_url == SIMULATOR:
        return service
    try:
        url = urlsplit(service.base_url)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        sound = False
    if "@" in service.base_url:
        raise JobError(f"{origin}: service.base_url: no user or password in the URL; name a variable in api_key_env")
    if not sound or not service.base_url.isprintable() or " " in service.base_url:
        raise JobError(f'{origin}: service.base_url: an http(s) URL or "simulator", not {_shown(service.base_url)}')
    if url.query or url.fragment:
        raise JobError(f"{origin}: service.base_url: no ? or # part, please")
    if url.scheme == "http" and not _is_near(url.hostname or ""):
        raise JobError(
            f"{origin}: service.base_url: http:// would send key and prompts unencrypted to {url.hostname}; use https://"
        )
    return service


def _check_rates(rates: Rates, given: Mapping[str, Any], where: str, origin: str) -> None:
    """Refuse keys that are none and rates below 0, in a model's price and in those of its tiers."""
    if strange := sorted(given.keys() - set(rates.__struct_fields__)):
        raise _unknown(where, strange[0], rates.__struct_fields__, origin)
    for key in rates.__struct_fields__:
        rate = getattr(rates, key)
        if isinstance(rate, Rates):
            _check_rates(rate, given[key], f"{where}.{key}", origin)
        elif not 0 <= (rate or 0) < 1e9:
            raise JobError(f"{origin}: {where}.{key}: USD per million tokens, from 0 on")


def _is_near(host: str) -> bool:
    """Whether plain HTTP to this host stays on the machine or its private network."""
    try:
        return (address := ip_address(host)).is_loopback or (address.is_private and not address.is_link_local)
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))


def _request(
    given: Mapping[str, object], batch: bool, folder: Path, origin: str, texts: dict[str, str]
) -> RequestTemplate:
    """The `[request]` section; `batch` says that the rows have the columns of an OpenAI batch file."""
    endpoint = given.get("endpoint", "chat")
    if endpoint not in ("chat", "completions"):
        raise JobError(f"{origin}: request.endpoint: chat or completions, not {_shown(endpoint)}")
    chat = endpoint == "chat"
    known = _CHAT if chat else _COMPLETIONS
    for key, value in given.items():
        _refuse_later("request", key, value, origin)
        if key not in known and not (key in _SHORTHANDS if chat else key in ("endpoint", "body")):
            if key in {*_CHAT, *_COMPLETIONS, *_SHORTHANDS}:
                raise JobError(f"{origin}: request.{key}: not with endpoint = {_shown(endpoint)}")
            raise _unknown("request", key, {*known, *_SHORTHANDS} if chat else {*known, "endpoint", "body"}, origin)
    if "body" in given:
        return _whole_request(given, batch, folder, origin, texts)
    values = {key: _with_files(value, folder, f"{origin}: request.{key}", texts) for key, value in given.items()}
    values.pop("endpoint", None)
    if "max_tokens" in values and "max_completion_tokens" in values:
        raise JobError(f"{origin}: request: max_tokens or max_completion_tokens, not both")

    schema: dict[str, object] | None = None
    schema_name = "answer"
    wanted = values.get("response_format")
    if isinstance(wanted, dict) and "schema" in wanted:
        if set(wanted) != {"schema"}:
            raise JobError(f"{origin}: request.response_format: schema stands alone, or give the API's own object")
        schema, schema_name = _schema(wanted["schema"], folder, f"{origin}: request.response_format.schema", texts)
        del values["response_format"]

    if chat:
        for key in ("system", "prompt"):
            if key in values and not isinstance(values[key], str):
                raise JobError(f"{origin}: request.{key}: a text, not {_shown(values[key])}")
        shorthands = {key: values.pop(key) for key in ("system", "prompt") if key in values}
        if ("messages" in values) == ("prompt" in shorthands) or ("messages" in values and shorthands):
            raise JobError(f"{origin}: request: give prompt (and system, if you like), or messages")
        if shorthands:
            roles = {"system": "system", "prompt": "user"}
            values["messages"] = [
                {"role": roles[key], "content": shorthands[key]} for key in ("system", "prompt") if key in shorthands
            ]
    elif "prompt" not in values:
        raise JobError(f"{origin}: request.prompt is missing")
    if "model" not in values:
        raise JobError(f"{origin}: request.model is missing")
    for key, value in values.items():
        if not is_template(value) and (wrong := misfit(endpoint, key, value)):
            raise JobError(f"{origin}: request.{wrong}")
    return RequestTemplate(endpoint=endpoint, parameters=values, schema=schema, schema_name=schema_name)


def _whole_request(
    given: Mapping[str, object], batch: bool, folder: Path, origin: str, texts: dict[str, str]
) -> RequestTemplate:
    """A `[request]` section with `body`, beside which nothing stands but `endpoint`."""
    for key in given:
        if key == "endpoint" and batch:
            raise JobError(f"{origin}: request.endpoint: in a batch file the url of each row names it")
        if key not in ("endpoint", "body"):
            why = "a batch file's rows are whole requests" if batch else "body is a whole request"
            raise JobError(f"{origin}: request.{key}: {why}; nothing is added to it")
    body = _with_files(given["body"], folder, f"{origin}: request.body", texts)
    if not isinstance(body, str) or not is_template(body):
        raise JobError(f'{origin}: request.body: a template such as "{{{{ body }}}}", not {_shown(body)}')
    endpoint: Any = None if batch else given.get("endpoint", "chat")
    return RequestTemplate(endpoint=endpoint, parameters={}, body=body)


def _with_files(value: object, folder: Path, where: str, texts: dict[str, str]) -> object:
    """The value with every `{ file = "…" }` replaced by that file's text; what was read stands in `texts`."""
    match value:
        case {"file": str(name), **rest} if not rest:
            try:
                if name not in texts:
                    texts[name] = (folder / name).read_text(encoding="utf-8-sig")
                return texts[name].rstrip("\n")
            except (OSError, ValueError) as error:
                raise JobError(f"{where}: {_word(name)} cannot be read: {_reason(error)}") from None
        case dict():
            return {key: _with_files(inner, folder, where, texts) for key, inner in value.items()}
        case list():
            return [_with_files(inner, folder, where, texts) for inner in value]
        case _:
            return value


def _schema(given: object, folder: Path, where: str, texts: dict[str, str]) -> tuple[dict[str, object], str]:
    if isinstance(given, dict):
        return given, str(given.get("title", "answer"))
    if not isinstance(given, str):
        raise JobError(f"{where}: a file name or a table, not {_shown(given)}")
    try:
        if given not in texts:
            texts[given] = (folder / given).read_text(encoding="utf-8")
        schema = msgspec.json.decode(texts[given])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise JobError(f"{where}: {_word(given)} is not JSON: {error}") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{where}: {_word(given)} cannot be read: {_reason(error)}") from None
    if not isinstance(schema, dict):
        raise JobError(f"{where}: {_word(given)} holds no JSON object")
    return schema, str(schema.get("title") or Path(given).name.split(".")[0])


def _refuse_later(section: str, key: str, value: object, origin: str) -> None:
    if key in _LATER.get(section, ()):
        raise JobError(f"{origin}: {section}.{key} is not supported yet")
    if isinstance(value, str) and value in _LATER_VALUES.get((section, key), ()):
        raise JobError(f"{origin}: {section}.{key} = {_shown(value)} is not supported yet")


def _override(document: dict[str, Any], setting: str) -> list[str]:
    """Change one key of a job's tables; where it stands, from its section on."""
    key, equals, text = setting.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name or len(sections) > 2:
        raise JobError(f"--set {_word(setting)}: section.key=value, please")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise JobError(f"--set {_word(setting)}: {section} is not a section")
    document[name] = value
    return [*sections, name]


def _unknown(section: str, key: str, known: Iterable[str], origin: str) -> JobError:
    """What to say of a key that is not there: the one that was meant, or the section that has it."""
    homes = {name: {*kind.__struct_fields__, *_LATER.get(name, ())} for name, kind in _SECTIONS.items()}
    homes["request"] = {*_CHAT, *_SHORTHANDS, *_LATER["request"]}
    close = difflib.get_close_matches(key, sorted(known), n=1)
    home = next((name for name, keys in homes.items() if key in keys), None)
    if home is not None:
        hint = f"it belongs in [{home}]"
    elif close:
        hint = f"did you mean {close[0]}?"
    else:
        hint = f"known are {', '.join(sorted(known))}"
    return JobError(f"{origin}: unknown key {section}{'.' if section else ''}{_word(key)}; {hint}")


def _place(error: msgspec.ValidationError) -> str:
    """Where in the value it is wrong: `.key`, `[0]`, or nothing."""
    found = re.search(r"at `\$((?:\.\w+|\[[^\]]*\])*)`", str(error))
    return found[1] if found else ""


def _allowed(kind: Any, error: msgspec.ValidationError) -> str:
    """What a value may be, in words; inside of it, what msgspec says."""
    if re.search(r"\[[^\]]*\]", _place(error)):
        return (
            re.sub(r" - at `.*`$", "", str(error)).replace("`", "").replace("Expected ", "expected ").split(", got")[0]
        )
    return " or ".join(_words(kind, {}))


def _words(kind: Any, bounds: Mapping[str, Any]) -> list[str]:
    """The alternatives of a type, with the bounds of its annotation."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, meta = get_args(kind)
        return _words(inner, {name: bound for name in _BOUNDS if (bound := getattr(meta, name)) is not None})
    if origin is Literal:
        return [str(choice) for choice in get_args(kind)]
    if kind is not NoneType and (kind in _NAMES or origin in _NAMES):
        words = [_NAMES[origin or kind]]
        words += [f"{_BOUNDS[name]} {bound:,}" for name, bound in bounds.items() if abs(bound) < 2**53]
        return [" ".join(words)]
    return [word for part in get_args(kind) for word in _words(part, bounds)]


_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
_BOUNDS = {"gt": "above", "ge": "from", "le": "to", "min_length": "of at least", "max_length": "of at most"}


def _word(text: str) -> str:
    """A key or a name, fit for a line."""
    return text if text.isprintable() and 0 < len(text) <= 60 else _shown(text)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number beyond all measure"
    return text if len(text) <= 60 else text[:57] + "…"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def differences(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    """One line per key whose value is not the same in both, as a person would want to read it."""
    for key in sorted({*before, *after}):
        yield from _difference(key, before.get(key), after.get(key))


def _difference(key: str, before: object, after: object) -> Iterator[str]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for inner in sorted({*before, *after}):
            yield from _difference(f"{key}.{inner}", before.get(inner), after.get(inner))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _difference(f"{key}[{index}]", one, other)
    else:
        if isinstance(before, str) and isinstance(after, str):
            pairs = enumerate(zip(before, after, strict=False))
            same = next((i for i, (one, other) in pairs if one != other), min(len(before), len(after)))
            if same > 40:  # of long texts, the place where they part
                before, after = (f"…{text[same - 20 :]}" for text in (before, after))
        was, now = ("absent" if value is None else _shown(value) for value in (before, after))
        yield f"{key}: was {was}, is now {now}"
