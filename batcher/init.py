"""A first job file for an input: commented, with sensible values, and sound as it stands."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from batcher.errors import JobError, StorageError
from batcher.job import SIMULATOR, Job, RequestTemplate
from batcher.prompt import Composer
from batcher.report import printable
from batcher.schema import MEANINGS
from batcher.source import open_source
from batcher.store import is_remote

MODEL = "gpt-oss-120b"

_SHOWN_COLUMNS = 40
_SHOWN_VALUE = 40
_PROMPT_COLUMNS = 10
_SAMPLE = 100
_PROMPT_NAMES = ("prompt", "question", "text", "instruction", "body", "content", "message", "input", "query")
_ID_NAMES = ("id", "custom_id", "key", "uuid")


class Look(NamedTuple):
    """What is seen of an input before its job is written."""

    path: str
    """As the job file will have it."""
    types: Mapping[str, pa.DataType]
    first: Mapping[str, object]
    """The first row that could be read."""
    usable: tuple[str, ...]
    """Columns that a template can name."""
    prompt: tuple[str, ...]
    """The columns that a prompt would be made of."""
    id: str | None
    """The column that looks like an id."""
    whole: bool
    """Whether it is an OpenAI batch file: its rows are whole requests."""


def look(path: str, folder: Path) -> Look:
    """Look at an input, for a job file in this folder. Raises JobError where it cannot be read."""
    if not is_remote(path):
        path = Path(os.path.relpath(path, folder)).as_posix()
    source = open_source(path, folder, None, 1)
    rows = [row.fields for row in next(source.batches(0, None, _SAMPLE), []) if row.problem is None]
    types = dict(source.types)
    usable = tuple(name for name in types if _is_usable(name))
    identity = next((name for name in _ID_NAMES if name in types), None)
    if identity is None:
        identity = next((name for name in types if name.lower().endswith("_id") and name.isprintable()), None)
    told = _told(usable, types, rows, identity)
    whole = {"custom_id", "url", "body"} <= types.keys() and pa.types.is_struct(types["body"])
    return Look(path, types, rows[0] if rows else {}, usable, told, identity, whole)


def _is_usable(name: str) -> bool:
    """Whether a template can name a column: words of Jinja and what is no identifier cannot be."""
    template = RequestTemplate(endpoint="chat", parameters={"model": MODEL, "prompt": _expression(name)})
    try:
        return Composer(template, None, "").names == {name}
    except JobError:
        return False


def _told(
    usable: Sequence[str], types: Mapping[str, pa.DataType], rows: Sequence[Mapping[str, object]], identity: str | None
) -> tuple[str, ...]:
    """The column that holds the most to read; of an input without texts all columns."""
    texts = [name for name in usable if _is_text(types[name]) and name != identity]

    def length(name: str) -> int:
        return sum(len(text) for row in rows if isinstance(text := row.get(name), str))

    for name in _PROMPT_NAMES:
        if name in texts:
            return (name,)
    if texts:
        return (max(texts, key=length),)
    plain = [name for name in usable if not pa.types.is_binary(types[name]) and name != identity]
    return tuple((plain or usable)[:_PROMPT_COLUMNS])


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def prompt_of(seen: Look, columns: Sequence[str]) -> str:
    """A prompt template that shows these columns, each with its name where there are several. Raises JobError."""
    for name in columns:
        if name not in seen.types:
            raise JobError(f"no column {name!r} in the input; its columns are {', '.join(map(repr, seen.types))}")
        if name not in seen.usable:
            raise JobError(f"no template can name the column {name!r}; rename it to a plain word")
    if not columns:
        raise JobError("no column of the input has a name that a template can use; rename one to a plain word")
    if len(columns) == 1 and _is_text(seen.types[columns[0]]):
        return _expression(columns[0])
    nested = {name: pa.types.is_nested(seen.types[name]) for name in columns}
    return "\n".join(f"{name}: {_expression(name, ' | tojson' if nested[name] else '')}" for name in columns)


def _expression(name: str, filters: str = "") -> str:
    return "{{ " + name + filters + " }}"


class Answers(NamedTuple):
    """What the job is to say, by flags or by answers."""

    prompt: str | None
    """None where the rows are whole requests, which are sent as they are."""
    system: str | None
    model: str
    id: str | None
    base_url: str


def write(seen: Look, answers: Answers, target: Path) -> str:
    """Write the job file, and return its path as a command would have it. Raises JobError, StorageError.

    The file is checked before it is written, and nothing is overwritten.
    """
    text = _text(seen, answers, target)
    job = Job(**tomllib.loads(text), folder=target.parent, origin=target.name)
    names = Composer(job.request, None, target.name).names
    for name in [*sorted(names), *([answers.id] if answers.id else [])]:
        if name not in seen.types:
            raise JobError(f"no column {name!r} in the input; its columns are {', '.join(map(repr, seen.types))}")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise taken(target) from None
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror}") from None
    return str(target)


def taken(target: Path) -> JobError:
    """Why a job file is not written over another."""
    return JobError(f"{target} is there already\nmove it away, or name another file with --output")


def _text(seen: Look, answers: Answers, target: Path) -> str:
    name = target.stem
    output = f"out/{name}"
    number = 1
    while (target.parent / output).exists():
        number += 1
        output = f"out/{name}-{number}"
    remote, whole = answers.base_url != SIMULATOR, answers.prompt is None
    columns = [
        f"{printable(column)}: {kind}{_example(seen.first.get(column))}"
        for column, kind in list(seen.types.items())[:_SHOWN_COLUMNS]
    ]
    if len(seen.types) > _SHOWN_COLUMNS:
        columns.append(f"and {len(seen.types) - _SHOWN_COLUMNS} more")
    lines = [
        f"# Asks a model once per row of {printable(seen.path)}.",
        "#",
        f"#     batcher plan {printable(target.name)}     shows the first request and the cost; sends nothing",
        f"#     batcher run {printable(target.name)}      asks; stop it at any time, the same command goes on",
        "#",
        "# Paths are relative to this file. Lines that start with `# key =` show other useful keys.",
        "",
        _line("", "name", name),
        "",
        "[input]",
        _line("input", "path", seen.path),
        *([_line("input", "format", "openai-batch")] if whole else [_id(seen, answers)]),
        _line("input", "limit", 100, given=False),
        "",
        f"# The columns and their first values{'' if whole else ', for the templates below'}:",
        *(f"#     {column}" for column in columns),
        "",
        *(_WHOLE if answers.prompt is None else _request(answers, answers.prompt)),
        "",
        "[service]",
        _line("service", "base_url", answers.base_url),
        *([] if remote else _REAL),
        _line("service", "api_key_env", "CEREBRAS_API_KEY", given=False),
        "",
        "[schedule]",
        _line("schedule", "max_in_flight", 32, given=False),
        _line("schedule", "requests_per_minute", 1000, given=False),
        "",
        "[output]",
        _line("output", "path", output),
        _line("output", "keep", [name for name in seen.usable if name != answers.id][:1], given=False),
        _line("output", "raw", True, given=False),
    ]
    return "\n".join(lines) + "\n"


def _id(seen: Look, answers: Answers) -> str:
    return _line("input", "id", answers.id or seen.id or "id", given=answers.id is not None)


def _request(answers: Answers, prompt: str) -> list[str]:
    told = answers.system or "You answer in one sentence."
    return [
        "[request]",
        _line("request", "model", answers.model),
        _line("request", "system", told, given=answers.system is not None),
        _line("request", "prompt", prompt),
        _line("request", "max_completion_tokens", 1024),
        _line("request", "temperature", 0, given=False),
        _line("request", "reasoning_effort", "low", given=False),
        _line("request", "response_format", {"schema": "answer.schema.json"}, given=False),
    ]


def _example(value: object) -> str:
    """A column's first value on a line."""
    if value is None:
        return ""
    text = printable(value if isinstance(value, str) else repr(value))
    return ", " + (text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 1]}…")


def _line(section: str, key: str, value: object, given: bool = True) -> str:
    """One key with its meaning; as a comment where it is only an offer."""
    written = msgspec.toml.encode({key: value}).decode().strip()
    if isinstance(value, dict):
        inner = ", ".join(msgspec.toml.encode({name: each}).decode().strip() for name, each in value.items())
        written = f"{key} = {{ {inner} }}"
    if isinstance(value, list):
        written = f"{key} = [{', '.join(msgspec.toml.encode({'x': each}).decode().strip()[4:] for each in value)}]"
    meaning = MEANINGS[f"{section}.{key}" if section else key]
    return f"{written if given else f'# {written}':<42} # {meaning}"


def default_target(path: str) -> Path:
    """The job file beside the caller, named after the input."""
    stem = Path(path.rstrip("/")).name.split(".")[0].strip("*?[]") or "job"
    return Path(f"{stem}.toml")


_WHOLE = ("# There is no section [request]: each row's `body` is sent as it is, to the endpoint of its `url`.",)
_REAL = (
    "# The real service in place of the line above; name another output.path then, for an output belongs to one:",
    _line("service", "base_url", "https://api.cerebras.ai/v1", given=False),
)
