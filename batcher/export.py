"""An output's answers and failures as files for other tools: OpenAI's batch lines, JSON lines, CSV."""

import csv
import io
import math
import os
import secrets
import tomllib
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from decimal import Decimal
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batcher.errors import JobError, StorageError
from batcher.records import Summary
from batcher.store import Results, results_at

Format = Literal["openai-batch", "jsonl", "csv"]

_ROWS = 256
_SUFFIXES: Mapping[Format, tuple[str, str]] = {
    "openai-batch": (".output.jsonl", ".errors"),
    "jsonl": (".jsonl", ".failures"),
    "csv": (".csv", ".failures"),
}
"""What the exported file's name ends with, and what comes before the suffix of the one with the failures."""
_JSON = msgspec.json.Encoder(decimal_format="number", enc_hook=str)

_Row = dict[str, Any]
_Write = Callable[[pa.RecordBatch], bytes]


class Exported(NamedTuple):
    """What was written. `failures` is None where no row failed: then there is no such file."""

    answers: Path
    failures: Path | None
    answered: int
    failed: int
    pending: int | None
    """Selected rows that are in neither; None while a run goes on, or when the last one did not come to its end."""


def export(output: str | Path, to: Format, path: Path | None = None) -> Exported:
    """Write an output's rows in another format, as far as they are published; they stand in order.

    The answers go to `path`; where none is given, beside the output's folder, or here where that is in a store. The
    failures go to a second file beside it. Both are put in place whole, and nothing is overwritten.
    Raises JobError, StorageError.
    """
    results = results_at(output)
    endpoint = _endpoint(results)
    suffix, infix = _SUFFIXES[to]
    whole = Path(os.path.abspath(results.folder or results.name))
    answers = path or whole.with_name(whole.name + suffix)
    failures = answers.with_name(f"{answers.stem.removesuffix('.output')}{infix}{answers.suffix}")
    for target in (answers, failures):
        if target.exists():
            raise JobError(f"{target} is there already\nmove it away, or name another file with --output")
    if not answers.parent.is_dir():
        raise JobError(f"{answers.parent}: no such folder; make it, or name another file with --output")
    columns = {"responses": _ANSWER_COLUMNS, "failures": _FAILURE_COLUMNS} if to == "openai-batch" else {}
    counts = {"responses": 0, "failures": 0}
    with ExitStack() as stack:
        drafts = {
            "responses": stack.enter_context(_Draft(answers)),
            "failures": stack.enter_context(_Draft(failures)),
        }
        writers: dict[str, _Write] = {}
        for folder, batch in batches(results, columns):
            if folder not in writers:
                writers[folder] = _writer(to, folder, endpoint, batch.schema.names)
            counts[folder] += batch.num_rows
            drafts[folder].write(writers[folder](batch))
        if counts["failures"]:
            drafts["failures"].place()
        drafts["responses"].place()
    return Exported(
        answers,
        failures if counts["failures"] else None,
        counts["responses"],
        counts["failures"],
        pending(results, sum(counts.values())),
    )


def _endpoint(results: Results) -> str:
    """The endpoint that the job asked."""
    written = results.read("job.toml")
    if written is None:
        raise JobError(f"{results}: no output of batcher, for it has no job.toml")
    try:
        document = tomllib.loads(written.decode())
        return str(document.get("request", {}).get("endpoint", "chat"))
    except (ValueError, KeyError, AttributeError):
        raise JobError(f"{results}/job.toml: is damaged, so the output cannot be exported") from None


def pending(results: Results, ended: int) -> int | None:
    """Selected rows that are not among those that have ended; None while nobody knows."""
    try:
        summary = msgspec.json.decode(results.read("summary.json") or b"", type=Summary)
    except (StorageError, msgspec.DecodeError):
        return None
    if summary.selected is None or results.unfinished:
        return None
    return max(0, summary.selected - ended)


def batches(results: Results, columns: Mapping[str, Collection[str]]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of all parts, in order, with their folder; an empty batch first for every part's columns."""
    there = (name.split("/") for name in results.parts())
    names = {name for folder, name in there if folder != "attempts" and fnmatch(name, "part-*.parquet")}
    for name in sorted(names):
        with ExitStack() as stack:
            opened: list[tuple[str, pq.ParquetFile]] = []
            # Opened together: a part that a run puts in place meanwhile changes nothing in what is read.
            for folder in ("responses", "failures"):
                with suppress(FileNotFoundError), _reading(f"{results}/{folder}/{name}"):
                    path = stack.enter_context(results.local(f"{folder}/{name}"))
                    opened.append((folder, stack.enter_context(pq.ParquetFile(path))))
            for folder, file in opened:
                with _reading(f"{results}/{folder}/{name}"):
                    schema = file.schema_arrow
                    wanted = [known for known in schema.names if known in columns.get(folder, schema.names)]
                    yield folder, pa.RecordBatch.from_pylist([], pa.schema([schema.field(known) for known in wanted]))
                    for group in range(file.num_row_groups):
                        for batch in file.read_row_group(group, columns=wanted).to_batches(_ROWS):
                            yield folder, batch


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What goes wrong with a part ends as one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"{path}: cannot be read: {(why.splitlines() or [''])[0]}\nsee batcher verify") from None


class _Draft:
    """A file in the making, beside its place; gone unless it was put there."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        self._placed = False

    def __enter__(self) -> "_Draft":
        try:
            self._file = open(self._path, "xb")
        except OSError as error:
            raise self._refused(error) from None
        return self

    def write(self, data: bytes) -> None:
        """Add to the file."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error) from None

    def place(self) -> None:
        """Put the file, whole and on disk, in its place."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._path, self._target)
        except OSError as error:
            raise self._refused(error) from None
        self._placed = True

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.close()
        if not self._placed:
            self._path.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(f"{self._target}: cannot be written: {error.strerror or error}")


def _writer(to: Format, folder: str, endpoint: str, names: Sequence[str]) -> _Write:
    """A function that makes a batch of one folder's rows into bytes of the file."""
    if to == "csv":
        return _csv(names)
    if to == "jsonl":
        return lambda batch: _lines(_rows(batch))
    if folder == "failures":
        return lambda batch: _lines(map(_error_line, _rows(batch)))
    body = _completion if endpoint == "completions" else _chat_completion
    return lambda batch: _lines(_output_line(row, body) for row in _rows(batch))


# Values


def _rows(batch: pa.RecordBatch) -> Iterator[_Row]:
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """A column as values that JSON can hold; moments as ISO 8601, in UTC where they have a zone."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        text = (column.cast(pa.timestamp(kind.unit, "UTC")) if kind.tz else column).cast(pa.string())
        return list(pc.replace_substring_regex(text, r"^(-?\d+-\d+-\d+) ", r"\1T").to_pylist())
    if pa.types.is_date(kind) or pa.types.is_time(kind):
        return list(column.cast(pa.string()).to_pylist())
    if pa.types.is_duration(kind):
        per_second = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[kind.unit]
        return list(pc.divide(column.cast(pa.int64()), per_second).to_pylist())
    try:
        return list(column.cast(_readable(kind, "us"), safe=False).to_pylist())
    except (OverflowError, ValueError):  # inside of a value, a moment beyond what Python can hold
        return list(column.cast(_readable(kind, None)).to_pylist())


def _readable(kind: pa.DataType, unit: str | None) -> pa.DataType:
    """The type with every moment in it in this unit, or as text."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_readable(field.type, unit)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_readable(kind.key_type, unit), _readable(kind.item_type, unit))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_readable(kind.value_type, unit), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_readable(kind.value_type, unit))
    if pa.types.is_large_list(kind):
        return pa.large_list(_readable(kind.value_type, unit))
    if pa.types.is_timestamp(kind):
        return pa.timestamp(unit, kind.tz) if unit else pa.string()
    if pa.types.is_duration(kind):
        return pa.duration(unit) if unit else pa.int64()
    if pa.types.is_temporal(kind) and not unit:
        return pa.string()
    if pa.types.is_time64(kind):
        return pa.time64("us")
    return pa.float32() if pa.types.is_float16(kind) else kind


def _lines(rows: Iterator[_Row]) -> bytes:
    return b"".join(_JSON.encode(row) + b"\n" for row in rows)


# OpenAI's batch files

_TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")
_PROMPT_DETAILS = {"cached_tokens": "cached_tokens", "image_tokens": "image_tokens"}
_COMPLETION_DETAILS = {
    name: name for name in ("reasoning_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
}
_TIMES = ("queue_time", "prompt_time", "completion_time", "total_time")
_SAID = ("system_fingerprint", "service_tier", "service_tier_used")
_ANSWER_COLUMNS = {
    *(
        "row",
        "id",
        "response",
        "reasoning",
        "refusal",
        "tool_calls",
        "choices",
        "logprobs",
        "reasoning_logprobs",
        "tokens",
    ),
    *("finish_reason", "model", "response_id", "finished_at", "request_hash", "raw"),
    *_TOKENS,
    *_PROMPT_DETAILS,
    *_COMPLETION_DETAILS,
    *_TIMES,
    *_SAID,
}
_FAILURE_COLUMNS = {"row", "id", "kind", "status", "message", "request_hash", "body"}


def _output_line(row: _Row, completed: Callable[[_Row], _Row]) -> _Row:
    body = _as_it_came(row.get("raw"))
    return _batch_line(row, 200, completed(row) if body is None else body, None)


def _error_line(row: _Row) -> _Row:
    came: bytes | None = row["body"]
    body = None if came is None else _as_it_came(came) or came.decode("utf-8", "replace")
    return _batch_line(row, row["status"], body, {"code": row["kind"], "message": row["message"]})


def _batch_line(row: _Row, status: int | None, body: object, error: _Row | None) -> _Row:
    response = {"status_code": status, "request_id": row["request_hash"] or "", "body": body}
    return {
        "id": f"batch_req_{row['row']:012d}",
        "custom_id": _custom_id(row),
        "response": None if status is None else response,
        "error": error,
    }


def _custom_id(row: _Row) -> str:
    identity = row["row"] if row["id"] is None else row["id"]
    return identity if isinstance(identity, str) else _JSON.encode(identity).decode()


def _as_it_came(body: str | bytes | None) -> msgspec.Raw | None:
    """A JSON object on one line, its members to the letter; None for anything else."""
    if body is None:
        return None
    try:
        if isinstance(msgspec.json.decode(body), dict):
            line = msgspec.json.format(body, indent=-1)
            return msgspec.Raw(line.encode() if isinstance(line, str) else line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return None


def _chat_completion(row: _Row) -> _Row:
    """The answer as the chat endpoint gives it, from the columns."""

    def choice(of: _Row) -> _Row:
        message: _Row = {"role": "assistant", "content": of["text"], "refusal": of.get("refusal")}
        if of.get("reasoning") is not None:
            message["reasoning"] = of["reasoning"]
        if of.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": call["type"] or "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in of["tool_calls"]
            ]
        made: _Row = {"index": of["index"], "message": message, "finish_reason": of["finish_reason"]}
        made["logprobs"] = _chat_logprobs(of.get("logprobs"))
        if of.get("reasoning_logprobs") is not None:
            made["reasoning_logprobs"] = _chat_logprobs(of["reasoning_logprobs"])
        return made

    return _answer(row, "chat.completion", choice)


def _completion(row: _Row) -> _Row:
    """The answer as the completions endpoint gives it, from the columns."""

    def choice(of: _Row) -> _Row:
        made: _Row = {"index": of["index"], "text": of["text"], "finish_reason": of["finish_reason"]}
        made["logprobs"] = _logprobs(of.get("logprobs"))
        if of.get("tokens") is not None:
            made["tokens"] = of["tokens"]
        return made

    return _answer(row, "text_completion", choice)


def _chat_logprobs(tokens: list[_Row] | None) -> _Row | None:
    return None if tokens is None else {"content": [_token(token) for token in tokens], "refusal": None}


def _token(token: _Row) -> _Row:
    made: _Row = {"token": token["token"], "logprob": token["logprob"]}
    made["bytes"] = None if token["bytes"] is None else list(token["bytes"])
    if token.get("top_logprobs") is not None:
        made["top_logprobs"] = [_token(each) for each in token["top_logprobs"]]
    return made


def _logprobs(tokens: list[_Row] | None) -> _Row | None:
    """Four lists side by side, as the completions endpoint gives them."""
    if tokens is None:
        return None
    likeliest = [
        each and {other["token"]: other["logprob"] for other in each} for each in (t["top_logprobs"] for t in tokens)
    ]
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": [token["text_offset"] for token in tokens],
    }


def _answer(row: _Row, name: str, choice: Callable[[_Row], _Row]) -> _Row:
    sole = {"index": 0, "text": row["response"], **row}
    usage: _Row = {token: row[token] for token in _TOKENS}
    for details, known in (
        ("prompt_tokens_details", _PROMPT_DETAILS),
        ("completion_tokens_details", _COMPLETION_DETAILS),
    ):
        if said := {theirs: row[ours] for theirs, ours in known.items() if row[ours] is not None}:
            usage[details] = said
    answer: _Row = {
        "id": row["response_id"],
        "object": name,
        "created": _seconds(row["finished_at"]),
        "model": row["model"],
        "choices": [choice(each) for each in row.get("choices") or [sole]],
        "usage": usage if any(value is not None for value in usage.values()) else None,
    }
    answer |= {said: row[said] for said in _SAID if row[said] is not None}
    if times := {time: row[time] for time in _TIMES if row[time] is not None}:
        answer["time_info"] = times
    return answer


def _seconds(moment: str | None) -> int | None:
    """Seconds since 1970 of a moment as `_values` gives it."""
    return None if moment is None else int(datetime.fromisoformat(moment).timestamp())


# CSV

_FORMULA = frozenset("=+-@\u2212")


def harmless(text: str) -> str:
    """A cell's text that no spreadsheet runs as a formula: with an apostrophe before it where one would.

    Spreadsheets trim spaces and what is invisible, and take full-width signs for signs. NUL becomes U+FFFD.
    """
    first = next((sign for sign in text if not (sign.isspace() or unicodedata.category(sign) in ("Cc", "Cf"))), "")
    runs = text[:1] in ("\t", "\r", "\n") or unicodedata.normalize("NFKC", first)[:1] in _FORMULA
    return ("'" if runs and text else "") + text.replace("\0", "\ufffd")


def _cell(value: Any) -> str | int | float | None:
    match value:
        case None:
            return None
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return None
        case int() | float():
            return value
        case Decimal():
            return format(value, "f")
        case str():
            return harmless(value)
    text = _JSON.encode(value).decode()
    return harmless(text[1:-1] if text.startswith('"') else text)


def _csv(names: Sequence[str]) -> _Write:
    """Rows by RFC 4180; the header goes before the first."""
    started = False

    def write(batch: pa.RecordBatch) -> bytes:
        nonlocal started
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\r\n")
        if not started:
            writer.writerow(map(harmless, names))
            started = True
        columns = [map(_cell, _values(column)) for column in batch.columns]
        writer.writerows(zip(*columns, strict=True))
        return text.getvalue().encode("utf-8", "replace")

    return write
