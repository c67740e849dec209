"""Recorded answers become typed Parquet parts: every row once, in order, exact or flagged, whole or not at all."""

import contextlib
import gc
import json
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.dialects import openai
from batcher.dialects.prices import cost
from batcher.errors import StorageError
from batcher.parse import AnswerSchema
from batcher.records import (
    Answer,
    Attempt,
    Failure,
    FileRecord,
    Former,
    Kind,
    Outcome,
    Price,
    Rates,
    Reply,
    Timing,
    Totals,
)
from batcher.sink import FILLABLE, ROW_GROUP_BYTES, ROW_GROUP_ROWS, Shape, Sink
from batcher.store import Folder

SENT = 1_790_000_000_000_000
PRICE = Price(input=1.0, output=10.0, cached=0.5)
TIERED = Price(input=1.0, output=10.0, flex=Rates(input=0.25, output=2.0))
SCHEMA = AnswerSchema(
    {"type": "object", "properties": {"label": {"type": "string"}, "score": {"type": "integer"}}}, "answer"
)
INPUT = pa.schema([("key", pa.string()), ("size", pa.int32())])
NONE: frozenset[str] = frozenset()
SEVERAL = frozenset({"choices", "tool_calls"})
PLAIN = Shape(INPUT, "key", ("key", "size"), None, NONE, False)
BARE = Shape(pa.schema([]), None, (), None, NONE, False)


def sql(query: str) -> list[tuple[Any, ...]]:
    """What DuckDB answers."""
    relation = duckdb.sql(query)
    assert relation is not None
    return relation.fetchall()


def read(attempt: Attempt) -> Answer | Failure:
    """An attempt's answer as the service's dialect reads it."""
    return openai.read(Reply(attempt.status or 200, {}, attempt.body or b"", Timing(attempt.sent_at, attempt.latency)))


def price(model: str, prompt: int, cached: int, completion: int, tier: str | None) -> float | None:
    """What two models cost; others are not known."""
    known = {"known": PRICE, "tiered": TIERED}.get(model)
    return None if known is None else cost(known, prompt, cached, completion, tier)


def answer(text: object, **more: object) -> bytes:
    """A service's whole answer with this text."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "r-1", "model": "known-1", "choices": [choice], "usage": usage, **more}).encode()


def attempt(row: int, number: int = 1, outcome: Outcome | None = Outcome.ANSWERED, **changes: object) -> Attempt:
    """One recorded attempt: an answer that names its row, or a failure without a body."""
    answered = outcome is Outcome.ANSWERED
    values: dict[str, object] = {
        "unit": 0,
        "row": row,
        "attempt": number,
        "outcome": outcome,
        "sent_at": SENT + row * 1_000_000 + number,
        "waited": 0.25,
        "latency": 2.0,
        "time_to_first_token": None,
        "prompt_tokens": 100,
        "output_tokens": 64,
        "request_hash": bytes(15) + bytes([row % 256]),
        "model": "known",
        "cache_key": None,
        "body": answer(f"answer {row}.{number}") if answered else None,
        "status": 200 if answered else 500,
        "kind": None if answered else Kind.SERVER_ERROR,
        "message": None if answered else f"failure {row}.{number}",
        **changes,
    }
    return Attempt(**values)  # type: ignore[arg-type]


def beside(
    rows: range, schema: pa.Schema = INPUT, altered: Sequence[int] = (), batch: int = 7, width: int = 0
) -> Iterator[pa.RecordBatch]:
    """The input's columns over these rows as a source gives them, in small batches; `key` tells the row."""
    for first in range(rows.start, rows.stop, batch):
        some = range(first, min(first + batch, rows.stop))
        values = {"key": [f"k{row}" + "x" * width for row in some], "size": [row * 2 for row in some]}
        arrays = [pa.array(values.get(name, list(some)), schema.field(name).type) for name in schema.names]
        flags = pa.array([row in altered for row in some], pa.bool_())
        yield pa.record_batch([*arrays, flags], schema=schema.append(pa.field("__altered", pa.bool_())))


@dataclass
class Output:
    """One output folder and its sink."""

    folder: Path
    shape: Shape = PLAIN
    sink: Sink = field(init=False)

    def __post_init__(self) -> None:
        """Open it as a run does."""
        self.sink = Sink(Folder(self.folder), self.shape, read, price)
        self.sink.prepare()

    def publish(
        self,
        attempts: Sequence[Attempt],
        rows: range = range(100),
        former: Sequence[FileRecord] = (),
        part: int = 0,
        kept: Iterator[pa.RecordBatch] | None = None,
        again: Mapping[int, Former] | None = None,
    ) -> tuple[Totals, tuple[FileRecord, ...]]:
        """Publish a part as the engine does."""
        kept = beside(rows, self.shape.kept) if kept is None else kept
        names = [file.name for file in former]
        return self.sink.publish(part, rows, iter(attempts), kept, names, again=again or {})

    def path(self, name: str, part: int = 0) -> Path:
        """Where a part's file lies."""
        return self.folder / name / f"part-{part:06d}.parquet"

    def rows(self, name: str, part: int = 0) -> list[dict[str, Any]]:
        """A part's rows; none where it has no file."""
        path = self.path(name, part)
        return pq.read_table(path).to_pylist() if path.exists() else []

    def row(self, name: str = "responses") -> dict[str, Any]:
        """The only row of a part."""
        (only,) = self.rows(name)
        return only


# Columns

LEADING = {"row": "int64", "id": "string", "key": "string", "size": "int32"}
DESCRIPTION = {
    "finish_reason": "string",
    "model": "string",
    "system_fingerprint": "string",
    "response_id": "string",
    "service_tier": "string",
    "service_tier_used": "string",
    "prompt_cache_key": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "total_tokens": "int64",
    "cached_tokens": "int64",
    "reasoning_tokens": "int64",
    "accepted_prediction_tokens": "int64",
    "rejected_prediction_tokens": "int64",
    "image_tokens": "int64",
    "queue_time": "double",
    "prompt_time": "double",
    "completion_time": "double",
    "total_time": "double",
    "latency": "double",
    "time_to_first_token": "double",
    "waited": "double",
}
PAID = {
    "started_at": "timestamp[us, tz=UTC]",
    "finished_at": "timestamp[us, tz=UTC]",
    "attempts": "int32",
    "billed_prompt_tokens": "int64",
    "billed_completion_tokens": "int64",
    "cost_usd": "double",
    "request_hash": "string",
}
FAILURE = {"kind": "string", "status": "int32", "type": "string", "code": "string", "message": "string"}
FAILURE["response"] = "string"
ATTEMPT = {
    "row": "int64",
    "attempt": "int32",
    "sent_at": "timestamp[us, tz=UTC]",
    "tier": "string",
    "status": "int32",
    "kind": "string",
    "waited": "double",
    "latency": "double",
    "queue_time": "double",
    "prompt_tokens": "int64",
    "cached_tokens": "int64",
    "completion_tokens": "int64",
    "reasoning_tokens": "int64",
    "cost_usd": "double",
    "retry_after": "double",
}
TOOL_CALLS = "list<element: struct<id: string, type: string, name: string, arguments: string>>"
CHOICES = (
    "list<element: struct<index: int32, text: string, reasoning: string, finish_reason: string, "
    f"tool_calls: {TOOL_CALLS}>>"
)


def types(path: Path) -> dict[str, str]:
    """A file's columns in order, with their types."""
    return {column.name: str(column.type).replace("item: ", "element: ") for column in pq.read_schema(path)}


def test_the_columns_and_types_are_those_that_are_promised(tmp_path: Path) -> None:
    """A plain job has exactly the documented columns, each with its type, in all three folders."""
    output = Output(tmp_path)
    output.publish([attempt(0), attempt(1, outcome=Outcome.FAILED)])
    text = {"response": "string", "reasoning": "string"}
    assert types(output.path("responses")) == {**LEADING, **text, **DESCRIPTION, **PAID, "altered": "bool"}
    assert types(output.path("failures")) == {**LEADING, **FAILURE, **PAID, "body": "binary"}
    assert types(output.path("attempts")) == ATTEMPT


def test_columns_that_a_job_can_fill_are_there(tmp_path: Path) -> None:
    """A schema adds `parsed`, several choices add `choices`, and the whole answer `raw`, each at its place."""
    output = Output(tmp_path, Shape(pa.schema([]), None, (), SCHEMA, SEVERAL, True))
    output.publish([attempt(0, body=answer('{"label": "a", "score": 3}'))])
    found = types(output.path("responses"))
    assert found["parsed"] == "struct<label: string, score: int64>"
    assert found["choices"] == CHOICES
    assert found["raw"] == "string"
    assert list(found)[:7] == ["row", "id", "response", "parsed", "reasoning", "tool_calls", "choices"]
    row = output.row()
    assert (row["parsed"], row["raw"]) == (
        {"label": "a", "score": 3},
        answer('{"label": "a", "score": 3}').decode(),
    )


def test_an_answer_fills_its_columns(tmp_path: Path) -> None:
    """Each column holds what the service, the request and our clock say, and nothing else."""
    body = answer(
        "yes",
        system_fingerprint="fp",
        service_tier="auto",
        service_tier_used="flex",
        choices=[
            {"index": 0, "message": {"content": "yes", "reasoning": "so"}, "finish_reason": "length", "logprobs": None}
        ],
        usage={
            "prompt_tokens": 9,
            "completion_tokens": 8,
            "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 4, "image_tokens": 1},
            "completion_tokens_details": {
                "reasoning_tokens": 3,
                "accepted_prediction_tokens": 2,
                "rejected_prediction_tokens": 1,
            },
        },
        time_info={"queue_time": 0.1, "prompt_time": 0.2, "completion_time": 0.3, "total_time": 0.6},
    )
    output = Output(tmp_path)
    output.publish([attempt(7, 3, body=body, cache_key="group", time_to_first_token=0.5)])
    at = datetime.fromtimestamp((SENT + 7_000_003) / 1e6, UTC)
    row = output.row()
    assert (row.pop("started_at"), row.pop("finished_at")) == (at, at.replace(second=at.second + 2))
    assert row.pop("cost_usd") == pytest.approx((5 * 1.0 + 4 * 0.5 + 8 * 10.0) / 1e6)
    assert row == {
        "row": 7,
        "id": "k7",
        "key": "k7",
        "size": 14,
        "response": "yes",
        "reasoning": "so",
        "finish_reason": "length",
        "model": "known-1",
        "system_fingerprint": "fp",
        "response_id": "r-1",
        "service_tier": "auto",
        "service_tier_used": "flex",
        "prompt_cache_key": "group",
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "total_tokens": 17,
        "cached_tokens": 4,
        "reasoning_tokens": 3,
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 1,
        "image_tokens": 1,
        "queue_time": 0.1,
        "prompt_time": 0.2,
        "completion_time": 0.3,
        "total_time": 0.6,
        "latency": 2.0,
        "time_to_first_token": 0.5,
        "waited": 0.25,
        "attempts": 3,
        "billed_prompt_tokens": 9,
        "billed_completion_tokens": 8,
        "request_hash": "00" * 15 + "07",
        "altered": False,
    }


ALTERNATIVE = "token: string, logprob: double, bytes: binary"
LOGPROBS = (
    f"list<element: struct<{ALTERNATIVE}, top_logprobs: list<element: struct<{ALTERNATIVE}>>, text_offset: int32>>"
)


def test_nested_parts_are_typed_columns(tmp_path: Path) -> None:
    """Calls, log probabilities, tokens and refusals are lists of structs, the same ones in each choice."""
    output = Output(tmp_path, Shape(pa.schema([]), None, (), None, frozenset(FILLABLE), False))
    likely = {"token": "\u00e9", "logprob": -0.5, "bytes": [195, 169]}
    half = {"token": "", "logprob": -1, "bytes": [195]}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    first = {
        "message": {"content": "\u00e9", "tool_calls": [call], "refusal": "no"},
        "finish_reason": "tool_calls",
        "logprobs": {"content": [{**likely, "top_logprobs": [likely, half]}]},
        "reasoning_logprobs": {"content": [half]},
    }
    second = {"text": None, "tokens": [5, 70_000], "finish_reason": "stop", "index": 1}
    output.publish([attempt(0, body=answer("", choices=[first, second])), attempt(1)])
    found = types(output.path("responses"))
    members = "index: int32, text: string, reasoning: string, finish_reason: string, refusal: string"
    nested = {
        "refusal": "string",
        "tool_calls": TOOL_CALLS,
        "choices": f"list<element: struct<{members}, tool_calls: {TOOL_CALLS}, logprobs: {LOGPROBS}, "
        f"reasoning_logprobs: {LOGPROBS}, tokens: list<element: int32>>>",
        "logprobs": LOGPROBS,
        "reasoning_logprobs": LOGPROBS,
        "tokens": "list<element: int32>",
    }
    assert {name: found[name] for name in nested} == nested
    assert list(found)[2:11] == ["response", "reasoning", *nested, "finish_reason"]
    row, plain = output.rows("responses")
    kept = {"token": "\u00e9", "logprob": -0.5, "bytes": "\u00e9".encode()}
    rest = {"token": "", "logprob": -1.0, "bytes": b"\xc3"}
    parts = {
        "refusal": "no",
        "tool_calls": [{"id": "c", "type": "function", "name": "f", "arguments": "{}"}],
        "logprobs": [{**kept, "top_logprobs": [kept, rest], "text_offset": None}],
        "reasoning_logprobs": [{**rest, "top_logprobs": None, "text_offset": None}],
        "tokens": None,
    }
    assert {name: row[name] for name in parts} == parts
    said = {"index": 0, "text": "\u00e9", "reasoning": None, "finish_reason": "tool_calls"}
    none = dict.fromkeys(("text", "reasoning", *parts))
    assert row["choices"] == [{**said, **parts}, {**none, "index": 1, "finish_reason": "stop", "tokens": [5, 70_000]}]
    assert {name: plain[name] for name in parts} == dict.fromkeys(parts)
    assert not row["altered"]
    seen = sql(
        f"SELECT decode(logprobs[1].bytes), choices[2].tokens[2] FROM '{tmp_path}/responses/*.parquet' WHERE row = 0"
    )
    assert seen == [("\u00e9", 70_000)]
    assert polars.read_parquet(tmp_path / "responses/*.parquet")["tool_calls"][0][0]["name"] == "f"
    assert pandas.read_parquet(tmp_path / "responses")["choices"][0][1]["tokens"].tolist() == [5, 70_000]


def test_the_tier_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """As the request named it, for each attempt; else as the answer repeats it. The used one is the service's word."""
    output = Output(tmp_path, BARE)
    told = {"service_tier": "priority", "service_tier_used": "default"}
    output.publish(
        [
            attempt(0, 1, Outcome.AGAIN, tier="flex"),
            attempt(0, 2, tier="auto", body=answer("x", **told)),
            attempt(1, body=answer("x", **told)),
            attempt(2, tier="flex"),
        ]
    )
    tiers = [(row["service_tier"], row["service_tier_used"]) for row in output.rows("responses")]
    assert tiers == [("auto", "default"), ("priority", "default"), ("flex", None)]
    assert [row["tier"] for row in output.rows("attempts")] == ["flex", "auto", None, "flex"]


def test_unknown_is_null_and_never_zero(tmp_path: Path) -> None:
    """What the service did not say is null: its counts, its times, and with them the bill."""
    output = Output(tmp_path, BARE)
    body = json.dumps({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}).encode()
    output.publish([attempt(0, body=body)])
    told = {"row", "id", "response", "finish_reason", "latency", "waited", "started_at", "finished_at", "attempts"}
    known = {name for name, value in output.row().items() if value is not None}
    assert known == told | {"request_hash", "altered"}
    assert {n for n, v in output.row("attempts").items() if v is not None} == {
        *("row", "attempt", "sent_at", "status", "waited", "latency")
    }


@pytest.mark.parametrize(("model", "known"), [("known", True), ("other", False)])
def test_a_cost_is_known_only_with_a_price(tmp_path: Path, model: str, known: bool) -> None:
    """Without a price for its model a row has its tokens and no cost, and so has the whole output."""
    output = Output(tmp_path, BARE)
    totals, _ = output.publish([attempt(0, model=model)])
    assert output.row()["billed_prompt_tokens"] == 10
    assert output.row()["cost_usd"] == (pytest.approx(60e-6) if known else None)
    assert totals.cost_usd == (pytest.approx(60e-6) if known else None)


PAID_FOR = {"status": None, "kind": Kind.TIMEOUT, "paid": True}


@pytest.mark.parametrize(
    ("tried", "prompt", "completion"),
    [
        ([{}], 10, 5),
        ([{"outcome": Outcome.AGAIN}, {}], 10, 5),
        ([{"outcome": Outcome.AGAIN, **PAID_FOR}, {}], 110, 69),
        ([{"outcome": Outcome.AGAIN, "body": answer("misfit"), "status": 200, "paid": True}, {}], 20, 10),
        ([{"outcome": Outcome.AGAIN, **PAID_FOR, "output_tokens": 0}, {}], 110, None),
        ([{"outcome": Outcome.AGAIN, "body": answer("?", usage={"prompt_tokens": 7}), "status": 200}, {}], 17, None),
        ([{"outcome": Outcome.AGAIN, **PAID_FOR}, {"outcome": Outcome.FAILED, **PAID_FOR}], 200, 128),
        ([{"outcome": Outcome.AGAIN}, {"outcome": Outcome.FAILED}], 0, 0),
    ],
)
def test_the_bill_sums_every_attempt_that_may_be_paid(
    tmp_path: Path, tried: list[dict[str, object]], prompt: int | None, completion: int | None
) -> None:
    """Told tokens count as told; what may be paid and was not told counts as the most it can be, null without a cap."""
    output = Output(tmp_path, BARE)
    attempts = [attempt(0, number, **changes) for number, changes in enumerate(tried, 1)]  # type: ignore[arg-type]
    totals, _ = output.publish(attempts)
    ended = "failures" if attempts[-1].outcome is Outcome.FAILED else "responses"
    row = output.row(ended)
    assert (row["billed_prompt_tokens"], row["billed_completion_tokens"]) == (prompt, completion)
    whole = None if prompt is None or completion is None else cost(PRICE, prompt, 0, completion, None)
    assert row["cost_usd"] == (None if whole is None else pytest.approx(whole))
    assert (totals.billed_prompt_tokens, totals.billed_completion_tokens) == (prompt or 0, completion or 0)
    assert row["attempts"] == len(tried)
    costs = [sent["cost_usd"] for sent in output.rows("attempts")]
    assert (None if None in costs else pytest.approx(sum(costs))) == row["cost_usd"]


@pytest.mark.parametrize(
    ("asked", "said", "usd"),
    [
        (None, {}, 60e-6),
        ("flex", {}, 12.5e-6),
        ("flex", {"service_tier": "default"}, 60e-6),
        ("auto", {}, 60e-6),
        ("auto", {"service_tier": "auto", "service_tier_used": "flex"}, 12.5e-6),
    ],
)
def test_the_tier_that_served_an_answer_has_its_price(
    tmp_path: Path, asked: str | None, said: dict[str, object], usd: float
) -> None:
    """What the service says of the tier goes before what was asked for; a lost attempt costs as it was asked for."""
    output = Output(tmp_path, BARE)
    lost = attempt(0, 1, Outcome.AGAIN, model="tiered", tier=asked, **PAID_FOR)
    output.publish([lost, attempt(0, 2, model="tiered", tier=asked, body=answer("well", **said))])
    costs = [sent["cost_usd"] for sent in output.rows("attempts")]
    assert costs == pytest.approx([cost(TIERED, 100, 0, 64, asked), usd])
    assert output.row()["cost_usd"] == pytest.approx(sum(costs))


def test_kept_columns_give_way_to_ours(tmp_path: Path) -> None:
    """A kept column with one of our names, of now or later, gets `input_` before it until its name is free."""
    names = ("model", "logprobs", "input_model", "key", "row")
    schema = pa.schema([(name, pa.int64() if name != "key" else pa.string()) for name in names])
    output = Output(tmp_path, Shape(schema, None, names, None, NONE, False))
    output.publish([attempt(3), attempt(4, outcome=Outcome.FAILED)], range(10))
    for name in ("responses", "failures"):
        columns = list(types(output.path(name)))
        assert columns[:7] == ["row", "id", "input_input_model", "input_logprobs", "input_model", "key", "input_row"]
        assert len(columns) == len(set(columns))
    row = output.row()
    assert (row["id"], row["input_row"], row["input_input_model"], row["model"]) == (3, 3, 3, "known-1")


# Cells that Parquet cannot hold


def test_a_text_that_cannot_be_held_costs_that_cell_only(tmp_path: Path) -> None:
    """Lone surrogates are replaced and flagged in any column of an answer; the rows beside it stay exact."""
    output = Output(tmp_path, Shape(pa.schema([]), None, (), SCHEMA, SEVERAL, True))
    lone = {"label": "a\ud800b"}
    call = {"id": "c\udfff", "type": "function", "function": {"name": "n", "arguments": '{"a": "\udc00"}'}}
    strange = answer(
        json.dumps(lone, ensure_ascii=False),
        id="i\ud800",
        choices=[
            {"index": 0, "message": {"content": json.dumps(lone), "tool_calls": [call]}, "finish_reason": "sto\ud800p"},
            {"index": 1, "message": {"content": "two\ud800"}, "finish_reason": "stop"},
        ],
    )
    good = answer('{"label": "é\\u0000"}')
    totals, _ = output.publish([attempt(0, body=good), attempt(1, body=strange), attempt(2, body=good)])
    before, row, after = output.rows("responses")
    assert [one["altered"] for one in (before, row, after)] == [False, True, False]
    assert totals.altered == 1
    assert row["finish_reason"] == "sto\ufffdp"
    assert row["response_id"] == "i\ufffd"
    assert row["parsed"]["label"][0::2] == "ab"
    assert row["choices"][0]["tool_calls"] == [
        {"id": "c\ufffd", "type": "function", "name": "n", "arguments": '{"a": "\ufffd"}'}
    ]
    assert row["choices"][1]["text"] == "two\ufffd"
    assert row["raw"] == strange.decode()
    assert before["parsed"] == after["parsed"] == {"label": "é\0", "score": None}
    assert before["choices"][0]["text"] == '{"label": "é\\u0000"}'


def test_bytes_that_are_no_text_are_flagged(tmp_path: Path) -> None:
    """An answer that is not UTF-8 is kept as far as text can keep it, and says so."""
    output = Output(tmp_path, Shape(pa.schema([]), None, (), None, NONE, True))
    body = answer("caf%").replace(b"%", b"\xe9")
    output.publish([attempt(0, body=body), attempt(1)])
    row, other = output.rows("responses")
    assert (row["response"], row["altered"], other["altered"]) == ("caf\ufffd", True, False)
    assert row["raw"] == body.replace(b"\xe9", "\ufffd".encode()).decode()


def test_a_number_that_is_too_large_costs_that_cell_only(tmp_path: Path) -> None:
    """A number beyond its column is null and flagged; the other cells of its row are as they were told."""
    output = Output(tmp_path, Shape(pa.schema([]), None, (), None, SEVERAL, False))
    most = 2**63 - 1
    usage = {"prompt_tokens": most, "completion_tokens": 3}
    choices = [{"index": 2**40, "message": {"content": "yes"}, "finish_reason": "stop"}]
    again = attempt(0, 1, Outcome.AGAIN, body=answer("?", usage=usage), status=200)
    output.publish([again, attempt(0, 2, body=answer("yes", usage=usage, choices=choices)), attempt(1)])
    row, other = output.rows("responses")
    assert (row["prompt_tokens"], row["billed_prompt_tokens"], row["billed_completion_tokens"]) == (most, None, 6)
    assert row["choices"][0] == {
        "index": None,
        "text": "yes",
        "reasoning": None,
        "finish_reason": "stop",
        "tool_calls": None,
    }
    assert (row["altered"], other["altered"], other["billed_prompt_tokens"]) == (True, False, 10)


def test_input_that_could_not_be_kept_exactly_is_flagged(tmp_path: Path) -> None:
    """A row whose kept columns are not what the input held says so."""
    output = Output(tmp_path)
    output.publish([attempt(row) for row in range(10)], range(10), kept=beside(range(10), altered=[4]))
    assert [row["row"] for row in output.rows("responses") if row["altered"]] == [4]


# Rows, groups of rows, attempts


def test_row_groups_are_bounded_by_rows(tmp_path: Path) -> None:
    """No row group has more rows than the bound; all rows are there, in order, beside their own input."""
    output = Output(tmp_path)
    count = ROW_GROUP_ROWS + 1010
    done = [row for row in range(count + 50) if row % 1000 != 7]
    one = answer("same")
    output.publish(
        [attempt(row, body=one) for row in done], range(count + 50), kept=beside(range(count + 50), batch=3000)
    )
    file = pq.ParquetFile(output.path("responses"))
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    assert max(sizes) <= ROW_GROUP_ROWS
    assert len(sizes) <= 3
    table = file.read(["row", "id", "size"])
    assert table["row"].to_pylist() == done
    assert table["id"].to_pylist() == [f"k{row}" for row in done]
    assert table["size"].to_pylist() == [row * 2 for row in done]


@pytest.mark.parametrize("where", ["answers", "input"])
def test_row_groups_are_bounded_by_bytes(tmp_path: Path, where: str) -> None:
    """Long answers, and long input that is kept beside short ones, end a row group early."""
    output = Output(tmp_path)
    size, rows = 1 << 20, range(40)
    body = answer("y" * size) if where == "answers" else answer("y")
    kept = beside(rows, batch=1, width=size if where == "input" else 0)
    output.publish([attempt(row, body=body) for row in rows], rows, kept=kept)
    file = pq.ParquetFile(output.path("responses"))
    for index in range(file.num_row_groups):
        group = file.read_row_group(index, ["response", "key"])
        assert group.nbytes <= ROW_GROUP_BYTES + 2 * size
    assert file.read(["row"])["row"].to_pylist() == list(rows)


def test_every_request_that_was_sent_is_an_attempt(tmp_path: Path) -> None:
    """The attempts have one line per request, of rows that are not done too; what was never sent has none."""
    output = Output(tmp_path)
    told = answer("?", usage={"prompt_tokens": 4, "completion_tokens": 2}, time_info={"queue_time": 0.5})
    output.publish(
        [
            attempt(0, 0, Outcome.FAILED, kind=Kind.UNSENDABLE, sent_at=SENT, status=None, model=""),
            attempt(1, 1, Outcome.AGAIN, kind=Kind.RATE_LIMITED, status=429, retry_after=3.5),
            attempt(1, 2, Outcome.AGAIN, kind=Kind.INVALID_OUTPUT, status=200, body=told, paid=True),
            attempt(1, 3),
            attempt(2, 1, None),
            attempt(9, 1, Outcome.AGAIN, kind=Kind.TIMEOUT, status=None, paid=True),
        ]
    )
    rows = output.rows("attempts")
    assert [(row["row"], row["attempt"], row["kind"], row["status"]) for row in rows] == [
        (1, 1, "rate_limited", 429),
        (1, 2, "invalid_output", 200),
        (1, 3, None, 200),
        (2, 1, "server_error", 500),
        (9, 1, "timeout", None),
    ]
    assert [row["retry_after"] for row in rows] == [3.5, None, None, None, None]
    assert [row["completion_tokens"] for row in rows] == [None, 2, 5, None, None]
    assert [row["queue_time"] for row in rows] == [None, 0.5, None, None, None]
    assert rows[0]["sent_at"] == datetime.fromtimestamp((SENT + 1_000_001) / 1e6, UTC)
    assert [row["row"] for row in output.rows("responses")] == [1]
    failed = output.row("failures")
    assert (failed["row"], failed["kind"], failed["attempts"], failed["cost_usd"]) == (0, "unsendable", 0, 0.0)


def test_a_failure_keeps_what_came(tmp_path: Path) -> None:
    """A row without an answer tells why, and keeps the bytes of an answer that could not be used."""
    output = Output(tmp_path)
    body = b"\x00\xff not json"
    output.publish(
        [attempt(5, 2, Outcome.FAILED, kind=Kind.MALFORMED_RESPONSE, status=200, type="t", code="c", body=body)]
    )
    row = output.row("failures")
    said = ("kind", "status", "type", "code", "message", "attempts", "body", "key", "id")
    assert [row[name] for name in said] == [*("malformed_response", 200, "t", "c", "failure 5.2", 2, body, "k5", "k5")]
    assert output.rows("responses") == []


# Publishing again

State = str | None
ROWS = range(24)


def tried(row: int, state: State, number: int, said: str) -> list[Attempt]:
    """A row's attempts: answered, failed, only tried, or none."""
    if state is None:
        return []
    ended = {"answered": Outcome.ANSWERED, "failed": Outcome.FAILED, "tried": Outcome.AGAIN}[state]
    before = [attempt(row, number - 1, Outcome.AGAIN, message=said)] if number > 1 else []
    body = answer(f"{said} {row}") if state == "answered" else None
    return [*before, attempt(row, number, ended, message=said, body=body)]


def states(*names: State) -> st.SearchStrategy[list[State]]:
    """A state for each row."""
    return st.lists(st.sampled_from(names), min_size=len(ROWS), max_size=len(ROWS))


@settings(max_examples=25, deadline=None)
@given(
    states("answered", "failed", "tried", None),
    states("answered", "failed", "tried", None, None),
    st.sampled_from([3, 7, 100]),
)
def test_a_part_merges_with_its_former_self(former: list[State], new: list[State], batch: int) -> None:
    """However rows are split between a part's former self and the ledger: each stands once, and the new word wins."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        output = Output(Path(folder))
        first = [one for row in ROWS for one in tried(row, former[row], 1, "former")]
        _, files = output.publish(first, ROWS)
        second = [one for row in ROWS for one in tried(row, new[row], 2, "new")]
        totals, after = output.publish(second, ROWS, files, kept=beside(ROWS, batch=batch))
        ended = {row: ("new", new[row]) for row in ROWS if new[row] in ("answered", "failed")}
        expected = {
            row: ended.get(row) or ("former", former[row])
            for row in ROWS
            if row in ended or former[row] in ("answered", "failed")
        }
        responses, failures = output.rows("responses"), output.rows("failures")
        assert [(row["row"], row["response"], row["id"], row["size"]) for row in responses] == [
            (row, f"{said} {row}", f"k{row}", row * 2) for row, (said, state) in expected.items() if state == "answered"
        ]
        assert [(row["row"], row["message"], row["key"]) for row in failures] == [
            (row, said, f"k{row}") for row, (said, state) in expected.items() if state == "failed"
        ]
        sent = {(one.row, one.attempt): one.message or "answered" for one in [*first, *second]}
        assert [(row["row"], row["attempt"]) for row in output.rows("attempts")] == sorted(sent)
        assert (totals.answered, totals.failed, totals.attempts) == (len(responses), len(failures), len(sent))
        there = {file.name for file in files}
        assert {file.name: file.rows for file in after} == {
            name: len(output.rows(folder))
            for folder in ("responses", "failures", "attempts")
            if (name := f"{folder}/part-000000.parquet") in there or folder == "responses" or output.rows(folder)
        }
        assert {path.parent.name for path in output.folder.glob("*/*.parquet")} == {
            file.name.split("/")[0] for file in after
        }


def test_a_large_part_merges_in_bounded_row_groups(tmp_path: Path) -> None:
    """A former self of several row groups, every third row of it done anew, stays sorted, whole and in bounds."""
    output = Output(tmp_path, BARE)
    rows = range(ROW_GROUP_ROWS + 2000)
    old, new = answer("old"), answer("new")
    middle = [row for row in rows if 1000 < row < 9900 and row % 3 == 0]
    _, files = output.publish([attempt(row, body=old) for row in rows if row % 5], rows)
    output.publish([attempt(row, 2, body=new) for row in middle], rows, files)
    file = pq.ParquetFile(output.path("responses"))
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    assert max(sizes) <= ROW_GROUP_ROWS
    table = file.read(["row", "response"])
    expected = {row: "old" for row in rows if row % 5} | dict.fromkeys(middle, "new")
    assert list(zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True)) == sorted(expected.items())


TRIED = st.lists(
    st.fixed_dictionaries(
        {
            "model": st.sampled_from(["known", "known", "unknown"]),
            "output_tokens": st.sampled_from([64, 64, 0]),
            "paid": st.booleans(),
            "usage": st.sampled_from([None, {"prompt_tokens": 7, "completion_tokens": 3}, {"prompt_tokens": 7}]),
        }
    ),
    max_size=3,
)
SUMS = ("started_at", "finished_at", "attempts", "billed_prompt_tokens", "billed_completion_tokens", "cost_usd")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TRIED, st.booleans(), TRIED, st.booleans()), min_size=4, max_size=4))
def test_a_row_that_is_asked_again_costs_what_it_costs_at_once(
    rows: list[tuple[list[dict[str, Any]], bool, list[dict[str, Any]], bool]],
) -> None:
    """Sums of former and new attempts are those of all attempts in one run, nulls too, however often it is published.

    An answer that is followed by a failure stays, at the cost of both.
    """

    def made(row: int, told: list[dict[str, Any]], first: int, answered: bool) -> list[Attempt]:
        final = Outcome.ANSWERED if answered else Outcome.FAILED
        if not told:  # never sent
            return [attempt(row, 0, Outcome.FAILED, status=None)]
        numbered = enumerate(told, first)
        return [
            attempt(
                *(row, number, final if one is told[-1] else Outcome.AGAIN),
                model=one["model"],
                output_tokens=one["output_tokens"],
                paid=one["paid"],
                sent_at=SENT + row * 1_000_000 + number,
                status=200 if one["usage"] or (answered and one is told[-1]) else 500,
                body=answer(f"{row}.{number}", usage=one["usage"]) if one["usage"] or one is told[-1] else None,
            )
            for number, one in numbered
        ]

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        places = Path(home, "twice"), Path(home, "once")
        for place in places:
            place.mkdir()
        output, whole = map(Output, places)
        first, second, once = [], [], []
        for row, (old, answered, new, answered_again) in enumerate(rows):
            first.append(made(row, old, 1, answered))
            second.append(made(row, new, len(old) + 1, answered_again))
            sent = [one for one in (*first[-1], *second[-1]) if one.attempt]
            once.append([msgspec.structs.replace(one, outcome=Outcome.AGAIN) for one in sent[:-1]] + sent[-1:])
        _, files = output.publish([one for told in first for one in told], range(4))
        former = {
            row["row"]: Former(
                name == "responses",
                row["attempts"],
                int(row["started_at"].timestamp() * 1e6),
                *(row[p] for p in SUMS[3:]),
            )
            for name in ("responses", "failures")
            for row in output.rows(name)
        }
        before = {row["row"]: row for row in output.rows("responses")}
        for _ in range(2):
            totals, files = output.publish([one for told in second for one in told], range(4), files, again=former)
        whole.publish([one for told in once for one in told], range(4))
        expected = {row["row"]: row for name in ("responses", "failures") for row in whole.rows(name)}
        responses, failures = output.rows("responses"), output.rows("failures")
        assert sorted(row["row"] for row in (*responses, *failures)) == [0, 1, 2, 3]
        assert before.keys() <= {row["row"] for row in responses}
        for told in (*responses, *failures):
            row = told["row"]
            if rows[row][0] and rows[row][2]:
                assert {key: told[key] for key in SUMS} == {key: expected[row][key] for key in SUMS}
            if row in before and not (rows[row][2] and rows[row][3]):
                assert {**told, **dict.fromkeys(SUMS)} == {**before[row], **dict.fromkeys(SUMS)}
        assert totals.attempts == sum(len(old) + len(new) for old, _, new, _ in rows)
        costs = [row["cost_usd"] for row in (*responses, *failures) if row["cost_usd"] is not None]
        assert totals.cost_usd == (pytest.approx(sum(costs)) if costs else None)


def _micros(moment: datetime) -> int:
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))


def _some(row: dict[str, Any], names: Sequence[str]) -> list[Any]:
    return [row[name] for name in names]


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    """The same attempts give the same files, byte for byte, also on top of their former self."""
    output = Output(tmp_path)
    attempts = [attempt(row, outcome=Outcome.FAILED if row % 7 == 0 else Outcome.ANSWERED) for row in range(0, 90, 3)]
    first = output.publish(attempts)
    assert output.publish(attempts) == first
    totals, files = output.publish(attempts, former=first[1])
    assert totals == first[0]
    assert [(file.name, file.rows) for file in files] == [(file.name, file.rows) for file in first[1]]


def test_a_part_is_replaced_whole(tmp_path: Path) -> None:
    """A reader who has a part open goes on reading it; who opens it again sees the new one; no workpiece is left."""
    output = Output(tmp_path)
    output.publish([attempt(row) for row in range(10)])
    with output.path("responses").open("rb") as opened:
        output.publish([attempt(row) for row in range(20)])
        assert pq.read_table(opened).num_rows == 10
    assert len(output.rows("responses")) == 20
    assert list((tmp_path / ".publishing").iterdir()) == []


def test_a_file_of_failures_stays_when_none_is_left(tmp_path: Path) -> None:
    """When the last failure of a part has been answered after all, its file is there and empty."""
    output = Output(tmp_path)
    _, files = output.publish([attempt(1), attempt(2, outcome=Outcome.FAILED)])
    assert [file.name.split("/")[0] for file in files] == ["responses", "failures", "attempts"]
    _, files = output.publish([attempt(2, 2)], former=files)
    assert [(file.name.split("/")[0], file.rows) for file in files] == [
        *(("responses", 2), ("failures", 0), ("attempts", 3))
    ]
    assert output.rows("failures") == []
    assert [row["row"] for row in output.rows("responses")] == [1, 2]


# Files


@pytest.mark.parametrize("attempts", [[], [attempt(3, outcome=Outcome.AGAIN)]])
def test_a_part_without_answers_has_the_columns(tmp_path: Path, attempts: list[Attempt]) -> None:
    """A range in which nothing is answered yet, or an empty input, is a file that every reader can open."""
    for name in ("whole", "empty"):
        (tmp_path / name).mkdir()
    whole, empty = Output(tmp_path / "whole"), Output(tmp_path / "empty")
    whole.publish([attempt(0)])
    totals, files = empty.publish(attempts, range(5 if attempts else 0))
    assert totals == Totals(attempts=len(attempts))
    assert files[0].rows == 0
    path = str(empty.path("responses"))
    assert pq.read_schema(path).equals(pq.read_schema(whole.path("responses")))
    assert len(pandas.read_parquet(path)) == polars.read_parquet(path).height == 0
    assert sql(f"SELECT * FROM '{path}'") == []
    with pq.ParquetFile(path) as file:
        assert list(file.iter_batches()) == []


def test_pandas_polars_and_duckdb_read_the_parts(tmp_path: Path) -> None:
    """Each reads the parts by glob, nested columns among them, and sees the same rows."""
    output = Output(tmp_path, Shape(INPUT, "key", ("size",), SCHEMA, SEVERAL, True))
    for part in range(3):
        rows = range(part * 10, part * 10 + 10)
        attempts = [attempt(row, body=answer(json.dumps({"label": f"l{row}", "score": row}))) for row in rows]
        output.publish(attempts[:-1] if part == 2 else attempts, rows, part=part)
    expected = [(row, f"k{row}", f"l{row}", row) for row in range(29)]
    glob = str(tmp_path / "responses" / "*.parquet")
    found = sql(f"SELECT row, id, parsed.label, parsed.score FROM '{glob}' ORDER BY row")
    assert found == expected
    frame = polars.read_parquet(glob)
    parsed = frame["parsed"].to_list()
    columns = (frame["row"], frame["id"], [one["label"] for one in parsed], [one["score"] for one in parsed])
    assert list(zip(*columns, strict=True)) == expected
    read_by_pandas = pandas.read_parquet(tmp_path / "responses")
    assert read_by_pandas["id"].tolist() == [key for _, key, *_ in expected]
    assert [value["label"] for value in read_by_pandas["parsed"]] == [label for *_, label, _ in expected]
    assert str(read_by_pandas["started_at"].dtype) == "datetime64[us, UTC]"


def test_totals_equal_a_recount_of_the_files(tmp_path: Path) -> None:
    """The sums that go to the summary are what a reader of the files would count."""
    output = Output(tmp_path)
    usage = {"prompt_tokens": 30, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 20}}
    reasons = ["stop", "length", None]
    attempts = []
    for row in range(60):
        if row % 10 == 9:
            attempts += [
                attempt(row, 1, Outcome.AGAIN, paid=row % 20 == 9),
                attempt(row, 2, Outcome.FAILED, kind=Kind.TIMEOUT if row % 20 == 9 else Kind.REJECTED),
            ]
            continue
        text = "a\ud800" if row % 13 == 0 else "a"
        message: Mapping[str, object] = {"content": text}
        finish = reasons[row % 2]
        body = answer("", usage=usage if row % 5 else {}, choices=[{"message": message, "finish_reason": finish}])
        attempts.append(attempt(row, body=body, model="known" if row % 3 else "other"))
    totals = Totals()
    for part in range(2):
        rows = range(part * 30, part * 30 + 30)
        sums, files = output.publish([one for one in attempts if one.row in rows], rows, part=part)
        totals.add(sums)
        for file in files:
            assert file.bytes == (tmp_path / file.name).stat().st_size
            assert file.rows == pq.read_metadata(tmp_path / file.name).num_rows
    responses, failures, sent = (f"'{tmp_path}/{name}/*.parquet'" for name in ("responses", "failures", "attempts"))
    sums_of = ", ".join(
        f"coalesce(sum({name}), 0)"
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "altered::int")
    )
    found = sql(f"SELECT {sums_of}, sum(latency), count(*) FROM {responses}")[0]
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "altered", "latency")
    assert found == (*(getattr(totals, name) for name in names), totals.answered)
    both = f"(SELECT * FROM {responses} UNION ALL BY NAME SELECT * FROM {failures})"
    billed = sql(
        f"SELECT sum(billed_prompt_tokens), sum(billed_completion_tokens), sum(cost_usd), count(*) FROM {both}"
    )[0]
    assert billed[2] == pytest.approx(totals.cost_usd)
    assert (billed[0], billed[1], billed[3]) == (
        *(totals.billed_prompt_tokens, totals.billed_completion_tokens, totals.rows),
    )
    counted = sql(f"SELECT finish_reason, count(*) FROM {responses} GROUP BY 1")
    assert totals.finish_reasons == dict(counted)
    assert totals.failure_kinds == dict(sql(f"SELECT kind, count(*) FROM {failures} GROUP BY 1"))
    assert sql(f"SELECT count(*) FROM {sent}")[0] == (totals.attempts,)
    assert (totals.failed, totals.attempts) == (6, 66)


# Trouble


def test_what_a_killed_run_was_building_is_cleared_away(tmp_path: Path) -> None:
    """Opening an output removes unfinished files; ending a run removes their folder."""
    output = Output(tmp_path)
    (tmp_path / ".publishing" / "responses-000003").write_bytes(b"PAR1 half")
    sink = Sink(Folder(tmp_path), PLAIN, read, price)
    sink.prepare()
    assert list((tmp_path / ".publishing").iterdir()) == []
    output.sink.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "failures", "responses"]


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    """Where a folder of the output cannot be made, the error names the output."""
    (tmp_path / "failures").write_text("not a folder")
    with pytest.raises(StorageError, match=str(tmp_path)):
        Output(tmp_path)


def flipped(part: bytes, rows: bool) -> bytes:
    """A part with one bit flipped so that a reader who checks nothing finds no error: other texts, or too few rows."""
    texts = pq.read_table(pa.BufferReader(part))["response"].to_pylist()
    column = pq.read_metadata(pa.BufferReader(part)).row_group(0).column(4)
    for place in range(column.data_page_offset, column.data_page_offset + column.total_compressed_size):
        damaged = part[:place] + bytes([part[place] ^ 1]) + part[place + 1 :]
        with contextlib.suppress(OSError, pa.ArrowInvalid, UnicodeDecodeError):
            found = pq.read_table(pa.BufferReader(damaged), columns=["response"])["response"].to_pylist()
            if len(found) < len(texts) if rows else len(found) == len(texts) and found != texts:
                return damaged
    raise AssertionError("there is no such bit")


@pytest.mark.parametrize("damage", ["gone", "cut", "texts", "rows"])
def test_a_damaged_former_self_is_not_built_upon(tmp_path: Path, damage: str) -> None:
    """Rows that stand only in a former part are not given up in silence when it cannot be read, nor copied damaged."""
    output = Output(tmp_path)
    _, files = output.publish([attempt(row) for row in range(50)])
    path = output.path("responses")
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(flipped(whole, damage == "rows"))
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(StorageError) as raised:
        output.publish([attempt(60)], former=files)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (path.read_bytes() if path.exists() else None) == before
    assert list((tmp_path / ".publishing").iterdir()) == []


def test_a_part_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When the disk refuses, one line says so, the former part stands, and the next try succeeds."""
    output = Output(tmp_path, BARE)
    output.publish([attempt(0)])
    texts = ["".join(chr(300 + (row * 31 + n * n) % 5000) for n in range(9000)) for row in range(40)]
    attempts = [attempt(row, body=answer(text)) for row, text in enumerate(texts)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (100, 5000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(StorageError) as raised:
                output.publish(attempts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"{tmp_path}: part 0 cannot be written" in str(raised.value)
        assert "\n" not in str(raised.value)
        del raised
        gc.collect()
        assert [row["response"] for row in output.rows("responses")] == ["answer 0.1"]
        assert list((tmp_path / ".publishing").iterdir()) == []
    output.publish(attempts)
    assert len(output.rows("responses")) == 40
    assert capfd.readouterr().err == ""
