"""The job file: typed, validated before anything is sent, and fingerprinted."""

import copy
import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from batcher.checks import allowed, place_of, shown, word
from batcher.errors import JobError
from batcher.imported import is_reference, json_schema
from batcher.parameters import CHAT, COMPLETIONS, Count, Text, Tier, clash, is_template, misfit_given
from batcher.records import Price, Rates
from batcher.store import UNFINISHED, Bucket, Folder, Results, is_remote, unfit

SIMULATOR = "simulator"

_Section = TypeVar("_Section", bound=Struct)

_Rate = Annotated[float, Meta(gt=0, le=1e12)]


class Input(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the rows come from."""

    path: Text | Annotated[list[Text], Meta(min_length=1)] | None = None
    """None where the rows come from Python."""
    format: Literal["parquet", "jsonl", "csv", "arrow", "openai-batch"] | None = None
    id: Text | None = None
    where: Text | None = None
    sample: Count | None = None
    limit: Count | None = None


class Service(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is asked, and how it is reached. `timeout` is in seconds once read."""

    base_url: Text = "https://api.cerebras.ai/v1"
    api_key_env: Text | None = None
    dialect: Literal["cerebras", "openai", "groq"] | None = None
    headers_env: Text | None = None
    encoding: Literal["json", "msgpack"] = "json"
    compression: Literal["none", "gzip"] = "none"
    transport: Literal["aiohttp", "reqwest"] = "aiohttp"
    """The HTTP library."""
    timeout: float = 600.0
    proxy: bool = False
    prices: dict[str, Price] = {}


class Schedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be under way: numbers are ceilings, `"auto"` is what the service is found to allow."""

    max_in_flight: Annotated[int, Meta(ge=1, le=100_000)] | Literal["auto"] = "auto"
    requests_per_minute: _Rate | Literal["auto"] = "auto"
    tokens_per_minute: _Rate | Literal["auto"] = "auto"
    uncached_tokens_per_minute: _Rate | Literal["auto"] = "auto"
    wait: bool = True
    service_tier: Tier | Annotated[list[Tier], Meta(min_length=1)] | None = None
    """Of a list, what one tier has no room for goes to the next; with a deadline, what would be late."""
    queue_threshold: Annotated[float, Meta(ge=0.05, le=20)] | None = None
    """Seconds once read."""
    deadline: float | datetime | None = None
    """Seconds from the first start once read, or a time with its zone."""
    budget_usd: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    dedupe: bool = False

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The service tiers in the order in which they are tried."""
        if self.service_tier is None:
            return ()
        return tuple(self.service_tier) if isinstance(self.service_tier, list) else (self.service_tier,)


class Retry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often a row is asked again."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 6
    max_invalid: Annotated[int, Meta(ge=0, le=100)] = 2
    repair: bool = False


class Output(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the answers go."""

    path: Text
    ledger: Text | None = None
    keep: list[Text] | Literal["all"] = "all"
    rows_per_part: Annotated[int, Meta(ge=1, le=10_000_000)] = 50_000
    raw: bool = False


class Reading(Struct, frozen=True, kw_only=True):
    """How the answers' texts are read; nothing of it is sent."""

    parse: str | None = None
    """`regex:…`, or `module:Type`."""
    schema: dict[str, object] | None = None
    """What JSON answers have to fit: the type's, or the job's own."""
    schema_name: str = "answer"
    choices: tuple[str, ...] | None = None
    vote: bool = False

    @property
    def pattern(self) -> str | None:
        """The regular expression that takes the value out of a text."""
        given = self.parse or ""
        return given.removeprefix(REGEX) if given.startswith(REGEX) else None


class Score(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What answers are compared with, and how."""

    target: Text
    """The truth: a column of the input, or a template over its columns."""
    method: Text = "exact"
    """One of METHODS, or `module:function`."""
    answer: Text | None = None
    """What is compared: `regex:…`, a column of the answer, or a template over these. None: the answer itself."""
    by: Text | None = None
    """The column of the input by which results are grouped."""


METHODS = ("exact", "number", "choice", "contains", "regex", "json")
ANSWER = ("response", "parsed", "reasoning")
"""What of an answer may be scored."""


class RequestTemplate(Struct, frozen=True, kw_only=True):
    """The `[request]` section with its files read: what every row's request is made from."""

    endpoint: Literal["chat", "completions"] | None
    """None: the column `url` names each row's."""
    parameters: dict[str, object]
    """The API's own names; strings may be templates. `messages` or `prompt` is among them, or there are none."""
    extra: dict[str, object] = {}
    """What goes into the body as it is, after all else."""
    body: str | None = None
    """A template that gives a whole request, in place of all parameters."""
    schema: dict[str, object] | None = None
    """The schema that is sent as `response_format`, and its name."""
    schema_name: str = "answer"
    reading: Reading = Reading()

    @property
    def learned_cap(self) -> str | None:
        """The parameter whose value is learned from the lengths of answers, where the job says so."""
        return next((name for name in _CAPS if self.parameters.get(name) == "auto"), None)


_CAPS = ("max_completion_tokens", "max_tokens")
REGEX = "regex:"
READING = ("parse", "choices", "vote")
"""Keys of `[request]` that are not sent: they say how answers are read."""
_SHORTHANDS = ("endpoint", "system", "prompt", "body", "extra", *READING)
_WITHOUT_CHAT = ("endpoint", "body", "extra", *READING)
_KEY_ITSELF = re.compile(r"(?=.*\d)(?=.*[a-z])\w{24,}", re.ASCII)
"""What nobody calls a variable: a service's key, some of which are words."""

_LATER = ("sweep",)
_SECTIONS: dict[str, type[Struct]] = {
    "input": Input,
    "service": Service,
    "schedule": Schedule,
    "retry": Retry,
    "output": Output,
    "score": Score,
}


class Job:
    """What is to be done: the sections of a job file, checked.

    `folder` is what relative paths start from. `texts` are the prompt and schema files by the names that the job gives
    them; those that are handed over are not read. Raises JobError naming the key and what is allowed.
    """

    __slots__ = (
        *("_sections", "folder", "input", "name", "origin", "output", "request", "retry", "schedule", "score"),
        *("results", "service", "texts"),
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
        score: Mapping[str, object] | None = None,
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
            "score": score,
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
        self.service: Service = read_service(sections["service"], origin)
        self.schedule: Schedule = _schedule(sections["schedule"], sections["request"], origin)
        self.retry: Retry = _section(Retry, "retry", sections["retry"], origin)
        self.output: Output = _section(Output, "output", sections["output"], origin)
        self.score: Score | None = _score(sections["score"], origin) if score is not None else None
        self.texts = dict(texts or {})
        self.request = _request(sections["request"], batch, self.folder, origin, self.texts)
        if self.retry.repair and (self.request.endpoint != "chat" or self.request.body is not None):
            raise JobError(f"{origin}: retry.repair: only where the job has messages: it adds two to them")
        inputs = [self.input.path] if isinstance(self.input.path, str) else self.input.path or []
        places = [("input.path", place) for place in inputs]
        places += [("output.path", self.output.path), ("output.ledger", self.output.ledger or "")]
        for key, place in places:
            if "\0" in place:
                raise JobError(f"{origin}: {key}: no path holds a NUL")
        self.results: Results = self._place(origin)
        """Where the results go."""
        try:
            self.document()
        except (TypeError, ValueError) as error:  # Python can say what TOML cannot: a null in a schema, say
            raise JobError(f"{origin}: the job cannot be written as TOML: {error}") from None

    def __repr__(self) -> str:
        asked = self.request.parameters.get("model", self.request.body)
        return f"Job({self.name!r}, {asked!r}, output={self.output.path!r})"

    @property
    def keep(self) -> list[str] | Literal["all"]:
        """The input's columns that are carried along: those of `[output]`, and the one that results are grouped by."""
        by = None if self.score is None else self.score.by
        if self.output.keep == "all" or by is None or by in (self.input.id, *self.output.keep):
            return self.output.keep
        return [*self.output.keep, by]

    @property
    def ledger_path(self) -> Path:
        """The ledger's file, absolute; inside the output unless the job says otherwise."""
        return Path(os.path.normpath(self.folder / (self.output.ledger or f"{self.output.path}/ledger.sqlite")))

    def _place(self, origin: str) -> Results:
        path, ledger = self.output.path, self.output.ledger
        if ledger is not None and is_remote(ledger):
            raise JobError(f"{origin}: output.ledger: the ledger lies on this machine: a local path, please")
        if not is_remote(path):
            return Folder(Path(os.path.normpath(self.folder / path)))
        if problem := unfit(path):
            raise JobError(f"{origin}: output.path: {problem}")
        if ledger is None:
            raise JobError(
                f"{origin}: output.ledger is missing: where results go to a store, it has a place on this machine,"
                f' such as ledger = "{Path(self.name).name}.sqlite"'
            )
        return Bucket(path, self.ledger_path.with_name(self.ledger_path.name + UNFINISHED))

    def document(self) -> bytes:
        """The job as TOML, overrides included; the ledger's path is absolute: the output may be read from anywhere."""
        document: dict[str, object] = {"name": self.name}
        document |= {name: section for name, section in self._sections.items() if section}
        if self.output.ledger:
            document["output"] = {**self._sections["output"], "ledger": str(self.ledger_path)}
        return msgspec.toml.encode(document)

    def scoring(self) -> dict[str, object]:
        """How answers are scored, by dotted key, as JSON-able values; `by` is no part of it."""
        if self.score is None:
            return {}
        return {f"score.{key}": getattr(self.score, key) for key in ("target", "method", "answer")}

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
                    f"--set {word(setting)}: a retry may change [request], [service], [schedule] and [retry] only"
                )
            if section == "request" and keys[0] != "extra":
                value = _with_files(sections[section][keys[0]], self.folder, f"{self.origin}: request.{keys[0]}", {})
                sections[section][keys[0]] = value
                named = value.get("schema") if isinstance(value, dict) else value
                if isinstance(named, str):
                    texts.pop(named, None)
        return from_document({"name": self.name, **sections}, self.folder, self.origin, texts)

    def reread(self, settings: Sequence[str]) -> "Job":
        """The same job that reads or scores its answers otherwise: `section.key=value`, without a value to take it out.

        What answers are read by is read anew, also where it lies in a file or a module; prompts are what they were.
        """
        sections = copy.deepcopy(self._sections)
        for setting in settings:
            section, *keys = _override(sections, setting)
            reads = section == "request" and keys in ([key] for key in (*READING, "response_format"))
            if not reads and (section != "score" or len(keys) != 1):
                raise JobError(
                    f"--set {word(setting)}: a reparse may change request.response_format, request.parse,"
                    " request.choices and request.vote only, and what stands in [score]"
                )
            if sections[section][keys[0]] == "":
                del sections[section][keys[0]]
        texts = dict(self.texts)
        wanted = sections["request"].get("response_format")
        for named in (sections["request"].get("parse"), wanted.get("schema") if isinstance(wanted, dict) else None):
            if isinstance(named, str):
                texts.pop(named, None)
        return from_document({"name": self.name, **sections}, self.folder, self.origin, texts)

    def meaning(self) -> dict[str, object]:
        """What may not change between the runs of one output, by dotted key, as JSON-able values."""
        parameters = {f"request.{name}": value for name, value in self.request.parameters.items()}
        reading = self.request.reading
        return {
            "request.endpoint": self.request.endpoint,
            **parameters,
            "request.extra": self.request.extra,
            "request.body": self.request.body,
            "request.response_format.schema": self.request.schema,
            "request.parse": reading.parse,
            "request.parse.schema": None if reading.schema is self.request.schema else reading.schema,
            "request.choices": reading.choices,
            "request.vote": reading.vote,
            "service.host": SIMULATOR
            if self.service.base_url == SIMULATOR
            else urlsplit(self.service.base_url).hostname,
            "input.id": self.input.id,
            "input.where": self.input.where,
            "output.keep": self.keep,
            "output.rows_per_part": self.output.rows_per_part,
            "output.raw": self.output.raw,
        }


def load(path: str | Path, settings: Sequence[str] = ()) -> Job:
    """Read a job file. `settings` are `section.key=value` overrides, the value in TOML or a bare text."""
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {_reason(error)}") from None
    document = parse_document(text, path.name)
    for setting in settings:
        _override(document, setting)
    return from_document(document, path.absolute().parent, path.name)


def parse_document(text: bytes, origin: str) -> dict[str, Any]:
    """The tables of a job file, not checked yet."""
    try:
        return tomllib.loads(text.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise JobError(f"{origin}: cannot be read: {_reason(error)}") from None
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
        if key in _LATER:
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
    return _SECTIONS, {"chat": CHAT | {"system": str, "prompt": str}, "completions": COMPLETIONS}


def duration(text: object) -> float:
    """Seconds of "10m", "1.5h", "250ms" or a plain number. Raises ValueError."""
    seconds = 0.0
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(min(text, 1e9))
    elif found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", str(text).strip(), re.ASCII):
        seconds = float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
    if not 0 < seconds < 1e9:
        raise ValueError(f'a duration such as "90s" or "10m", not {shown(text)}')
    return seconds


def _section(kind: type[_Section], name: str, given: Mapping[str, object], origin: str) -> _Section:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key in given:
        if key not in fields:
            raise _unknown(name, key, fields, origin)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        place = place_of(error)
        if missing := re.search(r"missing required field `(\w+)`", str(error)):
            raise JobError(f"{origin}: {name}{place}.{missing[1]} is missing") from None
        key = re.split(r"[.\[]", place)[1]
        may_be = allowed(fields[key], error)
        if key.endswith("_env"):  # whoever mistakes it puts the secret itself there
            raise JobError(f"{origin}: {name}{place}: {may_be}: the name of an environment variable") from None
        raise JobError(f"{origin}: {name}{place}: {may_be}, not {shown(given.get(key))}") from None


def _schedule(given: Mapping[str, object], request: Mapping[str, object], origin: str) -> Schedule:
    values = dict(given)
    if "queue_threshold" in values:
        try:
            values["queue_threshold"] = seconds = duration(values["queue_threshold"])
        except ValueError as error:
            raise JobError(f"{origin}: schedule.queue_threshold: {error}") from None
        if not 0.05 <= seconds <= 20:
            raise JobError(
                f"{origin}: schedule.queue_threshold: from 50 ms to 20 s, not {shown(given['queue_threshold'])}"
            )
    if "deadline" in values:
        values["deadline"] = _deadline(values["deadline"], origin)
    schedule: Schedule = _section(Schedule, "schedule", values, origin)
    whole, tiers = "body" in request, schedule.tiers
    if len(set(tiers)) < len(tiers):
        raise JobError(f"{origin}: schedule.service_tier: a tier may stand in the list once")
    if tiers and whole:
        raise JobError(f"{origin}: schedule.service_tier: whole requests name their own service_tier")
    if tiers and request.get("endpoint") == "completions":
        raise JobError(f"{origin}: schedule.service_tier: not with endpoint = 'completions', which has no tiers")
    if schedule.queue_threshold is not None and not {"flex", "auto"} & {*tiers} and not whole:
        raise JobError(f'{origin}: schedule.queue_threshold: only with service_tier = "flex" or "auto"')
    return schedule


def _deadline(given: object, origin: str) -> float | datetime:
    """Seconds, or a moment; without a zone it is this machine's."""
    with suppress(ValueError):
        return duration(given)
    if isinstance(given, str | date):
        with suppress(ValueError, OverflowError):
            return datetime.fromisoformat(given if isinstance(given, str) else given.isoformat()).astimezone()
    may_be = 'a duration such as "6h", or a time such as 2027-01-31T06:00:00Z'
    raise JobError(f"{origin}: schedule.deadline: {may_be}, not {shown(given)}")


def _score(given: Mapping[str, object], origin: str) -> Score:
    score: Score = _section(Score, "score", given, origin)
    if score.method not in METHODS and not is_reference(score.method):
        close = difflib.get_close_matches(score.method, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise JobError(
            f"{origin}: score.method: {', '.join(METHODS)} or module:function, not {shown(score.method)}{hint}"
        )
    if score.answer is None:
        return score
    if score.answer.startswith(REGEX):
        _check_pattern(score.answer, f"{origin}: score.answer")
    elif not is_template(score.answer) and score.answer.split(".")[0] not in ANSWER:
        raise JobError(
            f"{origin}: score.answer: {', '.join(ANSWER)}, a field of parsed such as parsed.label, a template over "
            f"these, or regex:…, not {shown(score.answer)}"
        )
    return score


def _check_pattern(given: str, where: str) -> None:
    """Refuse what is no regular expression, and one whose last match is empty in every text, as that of `.*` is."""
    try:
        pattern = re.compile(given.removeprefix(REGEX))
    except (re.error, RecursionError, OverflowError) as error:
        raise JobError(f"{where}: not a regular expression: {error}") from None
    last = [pattern.match(text, len(text)) for text in ("a", "7", " ", ".", "\n")]
    if all(found is not None and not found[1 if pattern.groups else 0] for found in last):
        raise JobError(f"{where}: matches nothing at the end of any text, and the last match counts; say .+, not .*")


def read_service(given: Mapping[str, object], origin: str) -> Service:
    """The `[service]` section, checked. Raises JobError."""
    values = dict(given)
    if "timeout" in values:
        try:
            values["timeout"] = duration(values["timeout"])
        except ValueError as error:
            raise JobError(f"{origin}: service.timeout: {error}") from None
    service: Service = _section(Service, "service", values, origin)
    for key in ("api_key_env", "headers_env"):
        named = getattr(service, key) or "_"
        if not re.fullmatch(r"[A-Za-z_]\w*", named, re.ASCII) or _KEY_ITSELF.fullmatch(named):
            raise JobError(f"{origin}: service.{key}: the name of an environment variable, never the secret itself")
    for model, price in service.prices.items():
        _check_rates(price, cast(Any, given)["prices"][model], f"service.prices.{word(model)}", origin)
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
        raise JobError(f'{origin}: service.base_url: an http(s) URL or "simulator", not {shown(service.base_url)}')
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
        raise JobError(f"{origin}: request.endpoint: chat or completions, not {shown(endpoint)}")
    chat = endpoint == "chat"
    known = CHAT if chat else COMPLETIONS
    for key in given:
        own = _SHORTHANDS if chat else _WITHOUT_CHAT
        if key not in known and key not in own:
            if key in {*CHAT, *COMPLETIONS, *_SHORTHANDS}:
                raise JobError(f"{origin}: request.{key}: not with endpoint = {shown(endpoint)}")
            raise _unknown("request", key, {*known, *own}, origin)
    reading = _reading(given, folder, origin, texts)
    if "body" in given:
        return _whole_request(given, batch, folder, origin, texts, reading)
    extra = _extra(given.get("extra", {}), origin)
    values = {
        key: _with_files(value, folder, f"{origin}: request.{key}", texts)
        for key, value in given.items()
        if key not in ("endpoint", "extra", *READING)
    }
    schema: dict[str, object] | None = None
    schema_name = "answer"
    wanted = values.get("response_format")
    if isinstance(wanted, dict) and "schema" in wanted:
        if set(wanted) != {"schema"}:
            raise JobError(f"{origin}: request.response_format: schema stands alone, or give the API's own object")
        schema, schema_name = _schema(wanted["schema"], folder, f"{origin}: request.response_format.schema", texts)
        del values["response_format"]
        if reading.parse is None:
            reading = msgspec.structs.replace(reading, schema=schema, schema_name=schema_name)
    elif wanted is None and chat and reading.schema is not None:
        schema, schema_name = reading.schema, reading.schema_name
    if reading.choices is not None and reading.pattern is None and (reading.schema or "response_format" in values):
        raise JobError(f"{origin}: request.choices: not with a schema; let the schema have an enum")
    if reading.vote and values.get("n", 1) == 1:
        raise JobError(f"{origin}: request.vote: only with n, the number of answers")

    if chat:
        for key in ("system", "prompt"):
            if key in values and not isinstance(values[key], str):
                raise JobError(f"{origin}: request.{key}: a text, not {shown(values[key])}")
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
        if key in _CAPS and value == "auto":
            _check_learned(key, values, origin)
        elif wrong := misfit_given(endpoint, key, value):
            raise JobError(f"{origin}: request.{wrong}")
        if not _is_json(value):
            raise JobError(f"{origin}: request.{key}: JSON has no infinity and no nan")
    if wrong := clash(values if schema is None else {**values, "response_format": {"type": "json_schema"}}):
        raise JobError(f"{origin}: request: {wrong}")
    return RequestTemplate(
        endpoint=endpoint,
        parameters=values,
        extra=extra,
        schema=schema,
        schema_name=schema_name,
        reading=reading,
    )


def _check_learned(key: str, values: Mapping[str, object], origin: str) -> None:
    """Refuse what a learned output cap does not go with."""
    for other in ("n", "best_of"):
        if values.get(other, 1) != 1:
            raise JobError(f'{origin}: request.{key} = "auto": only with one answer to a request, so not with {other}')
    for other in ("min_completion_tokens", "min_tokens"):
        if values.get(other, 0) != 0:
            raise JobError(f'{origin}: request.{key} = "auto": not with {other}')


def _reading(given: Mapping[str, object], folder: Path, origin: str, texts: dict[str, str]) -> Reading:
    """How answers are read: the keys of `[request]` that are not sent. A type is imported unless `texts` knows it."""
    parse, choices, vote = (given.get(key) for key in READING)
    schema: dict[str, object] | None = None
    name = "answer"
    if isinstance(parse, str) and parse.startswith(REGEX):
        _check_pattern(parse, f"{origin}: request.parse")
    elif isinstance(parse, str) and is_reference(parse):
        try:
            if parse not in texts:
                texts[parse] = msgspec.json.encode(json_schema(parse, folder)).decode()
        except JobError as error:
            raise JobError(f"{origin}: request.parse: {error}") from None
        schema, name = msgspec.json.decode(texts[parse], type=dict[str, object]), parse.partition(":")[2]
        name = name.rpartition(".")[2]
    elif parse is not None:
        raise JobError(f'{origin}: request.parse: "module:Type" or "regex:…", not {shown(parse)}')
    try:
        labels = msgspec.convert(choices, Annotated[list[Text], Meta(min_length=1)] | None)
    except msgspec.ValidationError:
        raise JobError(f"{origin}: request.choices: a list of texts, not {shown(choices)}") from None
    if labels is not None and (twice := [label for label in labels if labels.count(label) > 1]):
        raise JobError(f"{origin}: request.choices: {shown(twice[0])} stands twice")
    if vote not in (None, "majority"):
        raise JobError(f'{origin}: request.vote: "majority", not {shown(vote)}')
    return Reading(
        parse=parse,
        schema=schema,
        schema_name=name,
        choices=None if labels is None else tuple(labels),
        vote=vote is not None,
    )


def _extra(given: object, origin: str) -> dict[str, object]:
    """The section `[request.extra]`, which is for other servers: what this program knows has a key of its own."""
    if not isinstance(given, dict):
        raise JobError(f"{origin}: request.extra: a table, not {shown(given)}")
    for key in given:
        if key in {*CHAT, *COMPLETIONS, *_SHORTHANDS}:
            raise JobError(f"{origin}: request.extra.{key}: belongs in [request] itself")
        if key in Schedule.__struct_fields__:
            raise JobError(f"{origin}: request.extra.{key}: belongs in [schedule]")
    if not _is_json(given):
        raise JobError(f"{origin}: request.extra: JSON has no infinity and no nan")
    return given


def _is_json(value: object) -> bool:
    """Whether JSON has a word for every number of a value."""
    match value:
        case float():
            return math.isfinite(value)
        case dict():
            return all(map(_is_json, value.values()))
        case list():
            return all(map(_is_json, value))
    return True


def _whole_request(
    given: Mapping[str, object], batch: bool, folder: Path, origin: str, texts: dict[str, str], reading: Reading
) -> RequestTemplate:
    """A `[request]` section with `body`, beside which nothing stands but `endpoint` and how answers are read."""
    for key in given:
        if key == "endpoint" and batch:
            raise JobError(f"{origin}: request.endpoint: in a batch file the url of each row names it")
        if key not in ("endpoint", "body", *READING):
            why = "a batch file's rows are whole requests" if batch else "body is a whole request"
            raise JobError(f"{origin}: request.{key}: {why}; nothing is added to it")
    body = _with_files(given["body"], folder, f"{origin}: request.body", texts)
    if not isinstance(body, str) or not is_template(body):
        raise JobError(f'{origin}: request.body: a template such as "{{{{ body }}}}", not {shown(body)}')
    endpoint: Any = None if batch else given.get("endpoint", "chat")
    if reading.choices is not None and reading.schema is not None:
        raise JobError(f"{origin}: request.choices: not with a schema; let the schema have an enum")
    return RequestTemplate(endpoint=endpoint, parameters={}, body=body, reading=reading)


def _with_files(value: object, folder: Path, where: str, texts: dict[str, str]) -> object:
    """The value with every `{ file = "…" }` replaced by that file's text; what was read stands in `texts`."""
    match value:
        case {"file": str(name), **rest} if not rest:
            try:
                if name not in texts:
                    texts[name] = (folder / name).read_text(encoding="utf-8-sig")
                return texts[name].rstrip("\n")
            except (OSError, ValueError) as error:
                raise JobError(f"{where}: {word(name)} cannot be read: {_reason(error)}") from None
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
        raise JobError(f"{where}: a file name or a table, not {shown(given)}")
    try:
        if given not in texts:
            texts[given] = (folder / given).read_text(encoding="utf-8")
        schema = msgspec.json.decode(texts[given])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise JobError(f"{where}: {word(given)} is not JSON: {error}") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{where}: {word(given)} cannot be read: {_reason(error)}") from None
    if not isinstance(schema, dict):
        raise JobError(f"{where}: {word(given)} holds no JSON object")
    return schema, str(schema.get("title") or Path(given).name.split(".")[0])


def _override(document: dict[str, Any], setting: str) -> list[str]:
    """Change one key of a job's tables; where it stands, from its section on."""
    key, equals, text = setting.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name or len(sections) > 2:
        raise JobError(f"--set {word(setting)}: section.key=value, please")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise JobError(f"--set {word(setting)}: {section} is not a section")
    document[name] = value
    return [*sections, name]


def _unknown(section: str, key: str, known: Iterable[str], origin: str) -> JobError:
    """What to say of a key that is not there: the one that was meant, or the section that has it."""
    homes = {name: {*kind.__struct_fields__} for name, kind in _SECTIONS.items()}
    homes["request"] = {*CHAT, *COMPLETIONS, *_SHORTHANDS}
    close = difflib.get_close_matches(key, sorted(known), n=1)
    home = next((name for name, keys in homes.items() if key in keys), None)
    if home is not None:
        hint = f"it belongs in [{home}]"
    elif close:
        hint = f"did you mean {close[0]}?"
    else:
        hint = f"known are {', '.join(sorted(known))}"
    return JobError(f"{origin}: unknown key {section}{'.' if section else ''}{word(key)}; {hint}")


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
        was, now = ("absent" if value is None else shown(value) for value in (before, after))
        yield f"{key}: was {was}, is now {now}"
