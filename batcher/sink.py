"""Recorded answers -> Parquet parts, each written whole and put in place of its former self."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batcher.errors import StorageError
from batcher.killpoint import killpoint
from batcher.records import (
    UNIT,
    Alternative,
    Answer,
    Attempt,
    Choice,
    Failure,
    FileRecord,
    Former,
    Kind,
    Misfit,
    Outcome,
    PartRecord,
    Token,
    Totals,
    Usage,
)
from batcher.store import Results

ROW_GROUP_ROWS = 8192
ROW_GROUP_BYTES = 16 << 20
"""Whichever comes first ends a row group: it bounds the memory of publishing."""
ALTERED = "__altered"
"""The last column of kept batches: where the input's value could not be kept exactly."""

_TIME = pa.timestamp("us", tz="UTC")
_TOOL_CALLS = pa.list_(
    pa.struct([("id", pa.string()), ("type", pa.string()), ("name", pa.string()), ("arguments", pa.string())])
)
_ALTERNATIVE = [("token", pa.string()), ("logprob", pa.float64()), ("bytes", pa.binary())]
_LOGPROBS = pa.list_(
    pa.struct([*_ALTERNATIVE, ("top_logprobs", pa.list_(pa.struct(_ALTERNATIVE))), ("text_offset", pa.int32())])
)
FILLABLE = ("refusal", "tool_calls", "choices", "logprobs", "reasoning_logprobs", "tokens")
"""Columns that not every job can fill, in their order; all but `choices` are of the first choice."""
_USAGE = Usage.__struct_fields__
_usage = attrgetter(*_USAGE)
_TEXT = [("response", pa.string()), ("reasoning", pa.string())]
_ANSWER: list[tuple[str, pa.DataType]] = [
    ("finish_reason", pa.string()),
    ("model", pa.string()),
    ("system_fingerprint", pa.string()),
    ("response_id", pa.string()),
    ("service_tier", pa.string()),
    ("service_tier_used", pa.string()),
    ("prompt_cache_key", pa.string()),
    *((name, pa.int64()) for name in _USAGE),
    ("queue_time", pa.float64()),
    ("prompt_time", pa.float64()),
    ("completion_time", pa.float64()),
    ("total_time", pa.float64()),
    ("latency", pa.float64()),
    ("time_to_first_token", pa.float64()),
    ("waited", pa.float64()),
]
_PAID: list[tuple[str, pa.DataType]] = [
    ("started_at", _TIME),
    ("finished_at", _TIME),
    ("attempts", pa.int32()),
    ("billed_prompt_tokens", pa.int64()),
    ("billed_completion_tokens", pa.int64()),
    ("cost_usd", pa.float64()),
    ("request_hash", pa.string()),
]
_FAILURE: list[tuple[str, pa.DataType]] = [
    ("kind", pa.string()),
    ("status", pa.int32()),
    ("type", pa.string()),
    ("code", pa.string()),
    ("message", pa.string()),
    ("response", pa.string()),
    *_PAID,
    ("body", pa.binary()),
]
ATTEMPTS = pa.schema(
    [
        ("row", pa.int64()),
        ("attempt", pa.int32()),
        ("sent_at", _TIME),
        ("tier", pa.string()),
        ("status", pa.int32()),
        ("kind", pa.string()),
        ("waited", pa.float64()),
        ("latency", pa.float64()),
        ("queue_time", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("reasoning_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
        ("retry_after", pa.float64()),
    ]
)
SCORED = pa.schema(
    [
        ("extracted", pa.string()),
        ("target", pa.string()),
        ("score", pa.float64()),
        ("score_error", pa.string()),
    ]
)
"""The columns of `responses` that say how good an answer is; `score` is never null."""
_REPETITIVE = [
    *("finish_reason", "model", "system_fingerprint", "service_tier", "service_tier_used", "prompt_cache_key"),
    *("kind", "type", "code", "status", "tier", "attempts", "attempt"),
    *("target", "score_error"),
]
_LONG = {"response", "reasoning", "raw", "body", "message", "request_hash", "response_id", "extracted"}
NAMES = {
    *("row", "id", "parsed", "vote_share", *SCORED.names, *FILLABLE, "altered", "raw"),
    *(name for name, _ in (*_TEXT, *_ANSWER, *_FAILURE)),
}
"""Every column name that is ours, now or in a later version of a job: kept columns give way to them."""


_NEW = Former(False, 0, 0, 0, 0, 0.0)
_NONE_AGAIN: Mapping[int, Former] = MappingProxyType({})


class Parser(Protocol):
    """Reads the typed value out of an answer; `parse` has those that there are."""

    arrow_type: pa.DataType
    vote: bool

    def choose(self, texts: Sequence[str | None]) -> tuple[Any, float | None] | Misfit:
        """The typed value of an answer with these choices, and the share of them that have it, by vote."""

    def column(self, values: Sequence[Any]) -> tuple[pa.Array, list[int]]:
        """Values as an Arrow array, and the indices of those that could not be held exactly."""


class Mended(NamedTuple):
    """What came of reading a part's answers again."""

    rows: int
    """Failed rows that are answered now."""
    unfit: int
    """Answered rows of which no value could be read."""


class Scorer(Protocol):
    """Says how good answers are; the job's `[score]` section implements it."""

    def columns(self, answers: pa.Table, inputs: pa.Table) -> pa.Table:
        """The columns SCORED of these answers, with the input's rows beside them."""


class Shape(NamedTuple):
    """What decides the columns, fixed when a run starts: `kept` has the input's types, `id` names the id's column.

    `kept` are all columns that are read of the input, `keep` those of them that are carried along, beside the id.
    `fillable` are the names out of FILLABLE that the job's answers can fill.
    """

    kept: pa.Schema
    id: str | None
    keep: tuple[str, ...]
    parser: Parser | None
    fillable: frozenset[str]
    raw: bool
    scorer: Scorer | None = None

    def input_columns(self) -> list[pa.Field]:
        """`row`, `id` and the kept columns, as they stand in every part."""
        identity = self.kept.field(self.id).type if self.id else pa.int64()
        kept = [self.kept.field(name).with_name(self._renamed(name)) for name in self.keep]
        return [pa.field("row", pa.int64()), pa.field("id", identity), *kept]

    def _renamed(self, name: str) -> str:
        """A kept column's name in the output: with `input_` before it where it is one of ours, until it is free."""
        taken: set[str] = NAMES
        while name in taken:
            name, taken = f"input_{name}", NAMES | {*self.keep}
        return name

    def responses(self) -> pa.Schema:
        """The columns of `responses`."""
        parsed = [("parsed", self.parser.arrow_type)] if self.parser else []
        if self.parser and self.parser.vote:
            parsed.append(("vote_share", pa.float64()))
        raw = [("raw", pa.string())] if self.raw else []
        scored = [(field.name, field.type) for field in SCORED] if self.scorer else []
        text = [*_TEXT[:1], *parsed, *scored, *_TEXT[1:], *self.nested()]
        named = [*text, *_ANSWER, *_PAID, ("altered", pa.bool_()), *raw]
        return pa.schema([*self.input_columns(), *(pa.field(name, kind) for name, kind in named)])

    def nested(self) -> list[tuple[str, pa.DataType]]:
        """The columns that not every job can fill. Each choice has the same ones as members."""
        members = [
            (name, kind) for name, (kind, _) in _OF_CHOICE.items() if name not in FILLABLE or name in self.fillable
        ]
        kinds = {**dict(members), "choices": pa.list_(pa.struct(members))}
        return [(name, kinds[name]) for name in FILLABLE if name in self.fillable]

    def failures(self) -> pa.Schema:
        """The columns of `failures`."""
        return pa.schema([*self.input_columns(), *(pa.field(name, kind) for name, kind in _FAILURE)])


class Sink:
    """The folders of parts among an output's results. Raises StorageError."""

    def __init__(
        self,
        results: Results,
        shape: Shape,
        read: Callable[[Attempt], Answer | Failure],
        cost: Callable[[str, int, int, int, str | None], float | None],
    ) -> None:
        """`read` looks into an attempt's raw answer.

        `cost` prices prompt, cached and completion tokens of a model in a tier.
        """
        assert results.workshop is not None
        self._results = results
        self._workshop = results.workshop
        self._shape = shape
        self._read = read
        self._cost = cost
        self._schemas = {"responses": shape.responses(), "failures": shape.failures(), "attempts": ATTEMPTS}

    def prepare(self) -> None:
        """Make ready, and clear away what a killed run was building."""
        self._results.begin()

    def finish(self) -> None:
        """Nothing more is published."""
        self._results.end()

    def publish(
        self,
        part: int,
        rows: range,
        attempts: Iterator[Attempt],
        kept: Iterator[pa.RecordBatch],
        former: Sequence[str] = (),
        check_input: Callable[[], None] = lambda: None,
        again: Mapping[int, Former] = _NONE_AGAIN,
    ) -> tuple[Totals, tuple[FileRecord, ...]]:
        """Write part N from the attempts of its rows and the names in `former`, files of its that were complete once.

        `kept` are the input's columns over `rows`; `check_input` raises when they are not what was asked about, and
        is called before anything is put in place. `again` says what rows of the former self had come to that were
        asked again since: their sums go on from there. Returns the part's sums and its files.
        """
        with self._making(part) as writers:
            try:
                totals = self._build(writers, part, rows, attempts, kept, former, again)
            except pa.ArrowException:
                check_input()
                raise
            check_input()
            return totals, self._place_all(writers, part, totals)

    def reread(
        self,
        record: PartRecord,
        part: int,
        judge: Callable[[bytes], Answer | str],
        start: int,
        kept: Callable[[], Iterator[pa.RecordBatch]] | None,
    ) -> tuple[PartRecord, Mended]:
        """Write part N again with what its answers are read as now, and with what was an answer all the time.

        `judge` says of a failed row's body what its answer is, or why it does not fit. What is in the ledger of the
        part is not looked at. A part that was written so and not noted may be written so again. `kept` gives the
        input's columns from row `start` on, as often as it is called; None where nothing is scored.
        """
        former = [file.name for file in record.files]
        there: set[int] = set()
        for batch in self._former("responses", part, former, ["row"]):
            there.update(batch.column("row").to_pylist())
        with self._making(part) as writers:
            totals = Totals(attempts=record.totals.attempts)

            def write(folder: str, table: pa.Table) -> None:
                writers[folder].write_table(table)
                _count(totals, folder, table)

            mended: set[int] = set()
            writers["responses"] = self._writer("responses", part)
            inputs, inputs_of_new = (self._inputs(start, kept) for _ in range(2))
            new = _Ahead(self._mended(part, former, there, mended, judge, inputs_of_new), self._schemas["responses"])
            for batch in self._former("responses", part, former):
                old = self._read_again(pa.Table.from_batches([batch]), inputs)
                between = list(new.until(old["row"][-1].as_py())) if len(old) else []
                write("responses", pa.concat_tables([*between, old]).sort_by("row") if between else old)
            for table in new.until(_NO_ROW):
                write("responses", table)
            if _file("failures", part) in former:
                writers["failures"] = self._writer("failures", part)
                for batch in self._former("failures", part, former):
                    gone = [row in mended or row in there for row in batch.column("row").to_pylist()]
                    left = pa.Table.from_batches([batch.filter(pc.invert(pa.array(gone, pa.bool_())))])
                    write("failures", self._explained(left, judge))
            for writer in writers.values():
                writer.close()
            files = [
                self._place(name, part, totals.failed if name == "failures" else totals.answered) for name in writers
            ]
            files += [file for file in record.files if file.name == _file("attempts", part)]
            return msgspec.structs.replace(record, totals=totals, files=tuple(files)), Mended(len(mended), totals.unfit)

    @contextmanager
    def _making(self, part: int) -> Iterator[dict[str, pq.ParquetWriter]]:
        """The writers of a part's files, by folder; unless all goes well nothing is left of them."""
        writers: dict[str, pq.ParquetWriter] = {}
        try:
            yield writers
        except BaseException as error:
            with suppress(OSError):
                for name, writer in writers.items():
                    with suppress(OSError):
                        writer.close()
                    (self._workshop / f"{name}-{part:06d}").unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageError.of(f"{self._workshop.parent}: part {part}", error) from None
            raise

    def _inputs(
        self, start: int, kept: Callable[[], Iterator[pa.RecordBatch]] | None
    ) -> Callable[[Sequence[int]], pa.Table]:
        """A function that gives the input's columns of rows, which ascend from call to call."""
        schema = self._shape.kept.append(pa.field(ALTERED, pa.bool_()))
        if kept is None:
            return lambda rows: schema.empty_table()
        ahead = _Ahead(kept(), schema)

        def inputs(rows: Sequence[int]) -> pa.Table:
            if not rows:
                return schema.empty_table()
            return ahead.rows(rows[0] - start, rows[-1] + 1 - start).take([row - rows[0] for row in rows])

        return inputs

    def _read_again(self, old: pa.Table, inputs: Callable[[Sequence[int]], pa.Table]) -> pa.Table:
        """Answered rows as they stand in a part, with what is read out of their texts now."""
        schema, parser = self._schemas["responses"], self._shape.parser
        columns = {name: old[name] for name in schema.names if name in old.column_names}
        if parser is not None:
            texts: Iterable[Sequence[str | None]] = ([text] for text in old["response"].to_pylist())
            if parser.vote:
                texts = ([choice["text"] for choice in choices] for choices in old["choices"].to_pylist())
            parsed, changed = _parsed(parser, texts)
            columns |= dict(zip(("parsed", "vote_share"), parsed, strict=False))
            if changed:
                marked = pa.array([row in {*changed} for row in range(len(old))], pa.bool_())
                columns["altered"] = pc.or_(old["altered"], marked)
        answers = pa.table({name: columns[name] for name in ("response", "reasoning", "parsed") if name in columns})
        columns |= dict(zip(SCORED.names, self._scored(answers, inputs(old["row"].to_pylist())), strict=False))
        made = [columns.get(field.name, pa.nulls(len(old), field.type)) for field in schema]
        return pa.Table.from_arrays(made, schema=schema)

    def _mended(
        self,
        part: int,
        former: Sequence[str],
        there: set[int],
        mended: set[int],
        judge: Callable[[bytes], Answer | str],
        inputs: Callable[[Sequence[int]], pa.Table],
    ) -> Iterator[pa.RecordBatch]:
        """Rows of a part that failed for what does not fail them now, as answers; they are added to `mended`."""
        times = _Ahead(self._former("attempts", part, former), ATTEMPTS)
        for batch in self._former("failures", part, former):
            table = pa.Table.from_batches([batch])
            last = {row["row"]: row for some in times.until(_end(table)) for row in some.to_pylist()}
            group = _Group(0)
            chosen: list[int] = []
            for index, row in enumerate(table.select(["row", *_JUDGED, *(name for name, _ in _PAID)]).to_pylist()):
                if row["row"] in there or row["kind"] != Kind.INVALID_OUTPUT or row["body"] is None:
                    continue
                answer = judge(row["body"])
                if isinstance(answer, str):
                    continue
                chosen.append(index)
                told = last.get(row["row"], {})
                attempt = Attempt(
                    unit=UNIT,
                    row=row["row"],
                    attempt=row["attempts"],
                    outcome=Outcome.ANSWERED,
                    sent_at=0,
                    waited=told.get("waited", 0.0),
                    latency=told.get("latency", 0.0),
                    time_to_first_token=None,
                    prompt_tokens=0,
                    output_tokens=0,
                    request_hash=b"",
                    model="",
                    cache_key=None,
                    body=row["body"],
                    tier=told.get("tier"),
                )
                group.add(answer, attempt, tuple(row[name] for name, _ in _PAID))
                mended.add(row["row"])
            if chosen:
                beside = table.take(pa.array(chosen, pa.int64())).select(
                    [field.name for field in self._shape.input_columns()]
                )
                rows = beside["row"].to_pylist()
                yield from self._answers(group, beside.columns, [False] * len(chosen), inputs(rows)).to_batches()

    def _explained(self, failures: pa.Table, judge: Callable[[bytes], Answer | str]) -> pa.Table:
        """Failed rows, with why their answers do not fit what reads them now."""
        index = failures.schema.get_field_index("message")
        judged = [
            (judge(body) if kind == Kind.INVALID_OUTPUT and body is not None else message, message)
            for kind, body, message in zip(
                *(failures[name].to_pylist() for name in ("kind", "body", "message")), strict=True
            )
        ]
        messages = [found if isinstance(found, str) else message for found, message in judged]
        return failures.set_column(index, failures.schema.field(index), pa.array(messages, pa.string()))

    def _build(
        self,
        writers: dict[str, pq.ParquetWriter],
        part: int,
        rows: range,
        attempts: Iterator[Attempt],
        kept: Iterator[pa.RecordBatch],
        former: Sequence[str],
        again: Mapping[int, Former],
    ) -> Totals:
        totals = Totals()
        beside = _Ahead(kept, self._shape.kept.append(pa.field(ALTERED, pa.bool_())))
        old = {name: _Ahead(self._former(name, part, former), schema) for name, schema in self._schemas.items()}

        def write(name: str, table: pa.Table) -> None:
            if name not in writers:
                writers[name] = self._writer(name, part)
            if table.num_rows:
                writers[name].write_table(table)
                _count(totals, name, table)

        for name, schema in self._schemas.items():
            # The part of a range is there, answered or not. And no file of a former self goes: killed before that was
            # noted, the next run could not tell it from a lost one.
            if name == "responses" or _file(name, part) in former:
                write(name, schema.empty_table())
        for group in self._row_groups(attempts, beside, again):
            tables = self._tables(group, beside.rows(group.start - rows.start, group.stop - rows.start))
            for name, table in tables.items():
                for before in old[name].until(group.start):
                    write(name, before)
                merged = self._merge(name, list(old[name].until(group.stop)), table, tables, group.unanswered)
                if merged.num_rows:
                    write(name, merged)
        for name in self._schemas:
            for after in old[name].until(rows.stop):
                write(name, after)
        for writer in writers.values():
            writer.close()
        return totals

    def _place_all(self, writers: dict[str, pq.ParquetWriter], part: int, totals: Totals) -> tuple[FileRecord, ...]:
        counts = {"responses": totals.answered, "failures": totals.failed, "attempts": totals.attempts}
        files = tuple(self._place(name, part, counts[name]) for name in writers)
        for name in self._schemas.keys() - writers.keys():
            self._results.remove(_file(name, part))
        return files

    def _row_groups(
        self, attempts: Iterator[Attempt], beside: "_Ahead", again: Mapping[int, Former]
    ) -> Iterator["_Group"]:
        """The part's new rows, in groups bounded by rows and bytes."""
        group: _Group | None = None
        for row, tried in groupby(attempts, key=attrgetter("row")):
            if group is not None:
                rows = row - group.start
                if rows >= ROW_GROUP_ROWS or group.bytes + rows * beside.row_bytes >= ROW_GROUP_BYTES:
                    yield group
                    group = None
            if group is None:
                group = _Group(row)
            self._add(group, row, list(tried), again.get(row))
        if group is not None:
            yield group

    def _add(self, group: "_Group", row: int, tried: list[Attempt], former: Former | None) -> None:
        """Sort one row's attempts into its group, with the sums of what it had come to before."""
        group.stop = row + 1
        before = former or _NEW
        billed_prompt, billed_completion, cost = before[-3:]
        answer: Answer | Failure | None = None
        for attempt in tried:
            body = attempt.body
            answer = self._read(attempt) if body is not None and attempt.status == 200 else None
            told = answer.usage if isinstance(answer, Answer) else None
            tier = answer.tier(attempt.tier) if isinstance(answer, Answer) else attempt.tier
            prompt, completion, price = self._billed(attempt, told, tier)
            if attempt.attempt:
                usage = told or _UNKNOWN
                group.attempts.append(
                    (
                        row,
                        attempt.attempt,
                        attempt.sent_at,
                        attempt.tier,
                        attempt.status,
                        attempt.kind,
                        attempt.waited,
                        attempt.latency,
                        answer.times.queue_time if isinstance(answer, Answer) else None,
                        usage.prompt_tokens,
                        usage.cached_tokens,
                        usage.completion_tokens,
                        usage.reasoning_tokens,
                        price,
                        attempt.retry_after,
                    )
                )
            billed_prompt = None if billed_prompt is None or prompt is None else billed_prompt + prompt
            billed_completion = (
                None if billed_completion is None or completion is None else billed_completion + completion
            )
            cost = None if cost is None or price is None else cost + price
        last = tried[-1]
        group.bytes += len(last.body or b"") + 600
        paid = (
            before.started_at if before.attempts else tried[0].sent_at,
            last.sent_at + int(last.latency * 1e6),
            max(before.attempts, last.attempt),
            billed_prompt,
            billed_completion,
            cost,
            last.request_hash.hex() or None,
        )
        if last.outcome is Outcome.ANSWERED:
            assert isinstance(answer, Answer)
            group.answered.append(row)
            group.add(answer, last, paid)
        elif last.outcome is Outcome.FAILED and before.answered:
            group.unanswered.append((row, *paid[:-1]))
        elif last.outcome is Outcome.FAILED:
            text = answer.choices[0].text if isinstance(answer, Answer) else None
            group.failed.append(row)
            group.failures.append((last.kind, last.status, last.type, last.code, last.message, text, *paid, last.body))

    def _billed(
        self, attempt: Attempt, told: Usage | None, tier: str | None
    ) -> tuple[int | None, int | None, float | None]:
        """Prompt and completion tokens of an attempt that are or may be on the bill, and what they cost."""
        if told is not None:
            prompt, completion = told.prompt_tokens, told.completion_tokens
        elif attempt.paid:
            # It may be on the bill, and nobody said with how much: the most it can be, where there is a most.
            prompt, completion = attempt.prompt_tokens, attempt.output_tokens or None
        else:
            return 0, 0, 0.0
        if prompt is None or completion is None:
            return prompt, completion, None
        cached = (told and told.cached_tokens) or 0
        return prompt, completion, self._cost(attempt.model, prompt, cached, completion, tier)

    def _tables(self, group: "_Group", kept: pa.Table) -> dict[str, pa.Table]:
        """One group's tables, with the input's columns beside the answers."""
        *beside, changed = self._beside(kept, group.answered, group.start)
        inputs = kept.take(pc.subtract(pa.array(group.answered, pa.int64()), group.start))
        responses = self._answers(group, beside, changed.to_pylist(), inputs)
        beside = self._beside(kept, group.failed, group.start)[:-1]
        failures = pa.Table.from_arrays(
            [*beside, *_columns(group.failures, _FAILURE, set())], schema=self._schemas["failures"]
        )
        named = [(field.name, field.type) for field in ATTEMPTS]
        attempts = pa.Table.from_arrays(_columns(group.attempts, named, set()), schema=ATTEMPTS)
        return {"responses": responses, "failures": failures, "attempts": attempts}

    def _answers(
        self, group: "_Group", beside: Sequence[Any], changed_input: Sequence[bool], inputs: pa.Table
    ) -> pa.Table:
        """The answered rows of a group, beside the input's columns; `changed_input` says where those were altered.

        `inputs` are the columns that scores are made from.
        """
        altered: set[int] = set()
        response, reasoning, *others = _columns(group.responses, [*_TEXT, *_ANSWER, *_PAID], altered)
        parsed: list[pa.Array] = []
        if self._shape.parser is not None:
            texts = ([choice.text for choice in answer.choices] for answer in group.answers)
            parsed, changed = _parsed(self._shape.parser, texts)
            altered.update(changed)
        nested = [_nested(group.answers, name, kind, altered) for name, kind in self._shape.nested()]
        raw = [_texts(group.bodies, altered)] if self._shape.raw else []
        flags = pa.array([index in altered or changed for index, changed in enumerate(changed_input)], pa.bool_())
        answers = dict(zip(("response", "reasoning", "parsed"), (response, reasoning, *parsed), strict=False))
        scored = self._scored(pa.table(answers), inputs)
        return pa.Table.from_arrays(
            [*beside, response, *parsed, *scored, reasoning, *nested, *others, flags, *raw],
            schema=self._schemas["responses"],
        )

    def _scored(self, answers: pa.Table, inputs: pa.Table) -> list[pa.ChunkedArray]:
        """How good answers are, where the job says what they should be."""
        return [] if self._shape.scorer is None else list(self._shape.scorer.columns(answers, inputs).columns)

    def _beside(self, kept: pa.Table, rows: list[int], start: int) -> list[Any]:
        """`row`, `id`, the kept columns and the flag of what was altered, for these rows."""
        positions = pa.array(rows, pa.int64())
        chosen = kept if len(rows) == kept.num_rows else kept.take(pc.subtract(positions, start))
        identity = chosen.column(self._shape.id) if self._shape.id else positions
        return [positions, identity, *(chosen.column(name) for name in self._shape.keep), chosen.column(ALTERED)]

    def _merge(
        self,
        name: str,
        former: list[pa.Table],
        new: pa.Table,
        tables: dict[str, pa.Table],
        unanswered: list[tuple[object, ...]],
    ) -> pa.Table:
        """New rows and those of the former self that they do not replace: an answer is never lost for a failure."""
        if not former:
            return new
        old = pa.concat_tables(former)
        if name == "attempts":
            tried = {(row, attempt) for row, attempt in _pairs(new)}
            old = old.filter(pa.array([pair not in tried for pair in _pairs(old)], pa.bool_()))
        else:
            ended = pa.concat_arrays([c for kind in ("responses", "failures") for c in tables[kind]["row"].chunks])
            old = old.filter(pc.invert(pc.is_in(old["row"], value_set=ended)))
            if name == "responses" and unanswered:
                old = _paid_since(old, unanswered)
        order = [("row", "ascending"), ("attempt", "ascending")]
        return pa.concat_tables([old, new]).sort_by(order if name == "attempts" else order[:1])

    def _former(
        self, name: str, part: int, former: Sequence[str], columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        if _file(name, part) not in former:
            return
        former_self = _file(name, part)
        try:
            with (
                self._results.local(former_self) as path,
                pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file,
            ):
                left = file.metadata.num_rows
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(ROW_GROUP_ROWS, row_groups=[group], columns=columns):
                        left -= batch.num_rows
                        yield batch
                if left:  # Arrow passes over a page whose header is damaged
                    raise pa.ArrowInvalid(f"{left} rows are not there")
        except (OSError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())
            place = f"{self._results}/{former_self}"
            raise StorageError(
                f"{place}: its rows are nowhere else, and it cannot be read ({reason}); restore it"
            ) from None

    def _writer(self, name: str, part: int) -> pq.ParquetWriter:
        schema = self._schemas[name]
        return pq.ParquetWriter(
            self._workshop / f"{name}-{part:06d}",
            schema,
            compression="zstd",
            use_dictionary=[column for column in schema.names if column in _REPETITIVE],
            write_statistics=[column for column in schema.names if column not in _LONG],
            write_page_checksum=True,
        )

    def _place(self, name: str, part: int, rows: int) -> FileRecord:
        """Sync a finished file, put it in its place, see that it stays there."""
        made, target = self._workshop / f"{name}-{part:06d}", _file(name, part)
        killpoint(f"{name}.written")
        with made.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            os.fsync(file.fileno())
        record = FileRecord(target, rows, size, digest)
        killpoint(f"{name}.synced")
        self._results.put(made, record)
        killpoint(f"{name}.renamed")
        self._results.settle(target)
        killpoint(f"{name}.placed")
        return record


class _Group:
    """One row group in the making, of the rows from `start` to before `stop`: columns as tuples per row."""

    def __init__(self, start: int) -> None:
        self.start = self.stop = start
        self.bytes = 0
        self.answered: list[int] = []
        self.answers: list[Answer] = []
        self.bodies: list[bytes | None] = []
        self.responses: list[tuple[object, ...]] = []
        self.failed: list[int] = []
        self.failures: list[tuple[object, ...]] = []
        self.unanswered: list[tuple[object, ...]] = []
        """Rows that were asked again in vain and keep their former answer: what they have cost by now."""
        self.attempts: list[tuple[object, ...]] = []

    def add(self, answer: Answer, attempt: Attempt, paid: tuple[object, ...]) -> None:
        """Take in an answer, the attempt that brought it, and what its row has cost."""
        first = answer.choices[0]
        self.answers.append(answer)
        self.bodies.append(attempt.body)
        self.responses.append(
            (
                first.text,
                first.reasoning,
                first.finish_reason,
                answer.model,
                answer.system_fingerprint,
                answer.id,
                attempt.tier or answer.service_tier,
                answer.service_tier_used,
                attempt.cache_key,
                *_usage(answer.usage),
                *answer.times,
                attempt.latency,
                attempt.time_to_first_token,
                attempt.waited,
                *paid,
            )
        )


class _Ahead:
    """Batches in order of row, read no further than asked, and let go when they are given out."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        self._batches = batches
        self._gone = 0
        self._rest = schema.empty_table()
        self.row_bytes = 0.0
        """What a row of the newest batch takes."""
        self._more()

    def rows(self, start: int, stop: int) -> pa.Table:
        """The rows [start, stop), counted from the first batch's first; those before them are gone."""
        while True:
            passed = min(start - self._gone, self._rest.num_rows)
            self._gone += passed
            self._rest = self._rest.slice(passed)
            if self._gone + self._rest.num_rows >= stop or not self._more():
                return self._rest.slice(0, stop - start)

    def until(self, row: int) -> Iterator[pa.Table]:
        """The following rows whose `row` is below this one, batch by batch."""
        while self._rest.num_rows or self._more():
            count = pc.sum(pc.less(self._rest["row"], row)).as_py() or 0
            below, self._rest = self._rest.slice(0, count), self._rest.slice(count)
            if count:
                yield below
            if self._rest.num_rows:
                return

    def _more(self) -> bool:
        batch = next(self._batches, None)
        if batch is None:
            return False
        self.row_bytes = batch.nbytes / max(1, batch.num_rows)
        self._rest = pa.concat_tables([self._rest, pa.Table.from_batches([batch])])
        return True


_UNKNOWN = Usage()
_NO_ROW = 2**63 - 1
"""Beyond all rows."""
_JUDGED = ("kind", "body")


def _paid_since(table: pa.Table, unanswered: list[tuple[object, ...]]) -> pa.Table:
    """The same answers, with the attempts that were made in vain since."""
    named = _PAID[:-1]
    rows, *columns = _columns(unanswered, [("row", pa.int64()), *named], set())
    found = pc.index_in(table["row"].combine_chunks(), value_set=rows)
    for (name, _), column in zip(named, columns, strict=True):
        index = table.schema.get_field_index(name)
        told = pc.if_else(found.is_valid(), column.take(found), table[name].combine_chunks())
        table = table.set_column(index, table.schema.field(index), told)
    return table


def _pairs(attempts: pa.Table) -> Iterator[tuple[int, int]]:
    return zip(attempts["row"].to_pylist(), attempts["attempt"].to_pylist(), strict=True)


def _end(table: pa.Table) -> int:
    """The row after the last one."""
    return int(table["row"][-1].as_py()) + 1 if len(table) else 0


def _file(name: str, part: int) -> str:
    return f"{name}/part-{part:06d}.parquet"


def _parsed(parser: Parser, answers: Iterable[Sequence[str | None]]) -> tuple[list[pa.Array], list[int]]:
    """The columns that a parser makes of answers' texts, and the indices of those that could not be held exactly.

    An answer that does not fit any more, since others are how answers are read, is null.
    """
    chosen = [parser.choose(texts) for texts in answers]
    read = [(None, None) if isinstance(each, Misfit) else each for each in chosen]
    column, altered = parser.column([value for value, _ in read])
    shares = [pa.array([share for _, share in read], pa.float64())] if parser.vote else []
    return [column, *shares], altered


def _columns(
    rows: list[tuple[object, ...]], named: Sequence[tuple[str, pa.DataType]], altered: set[int]
) -> list[pa.Array]:
    """Rows turned into typed columns; where a text cannot be held it is cleaned, and its row's index noted."""
    if not rows:
        return [pa.array([], kind) for _, kind in named]
    made = []
    for values, (_, kind) in zip(zip(*rows, strict=True), named, strict=True):
        try:
            made.append(pa.array(values, kind))
        except (UnicodeEncodeError, pa.ArrowInvalid, OverflowError):
            cleaned = [_clean(value, kind) for value in values]
            altered.update(index for index, value in enumerate(values) if cleaned[index] != value)
            made.append(pa.array(cleaned, kind))
    return made


def _clean(value: object, kind: pa.DataType) -> object:
    """A value that Arrow can hold in this type: lone surrogates become U+FFFD, what is too large null."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, tuple) and pa.types.is_struct(kind):
        return tuple(_clean(member, field.type) for member, field in zip(value, kind, strict=True))
    if isinstance(value, list | tuple):
        return type(value)(_clean(member, kind.value_type) for member in value)
    try:
        pa.scalar(value, kind)
    except (pa.ArrowInvalid, OverflowError):
        return None
    return value


def _nested(answers: Iterable[Answer], name: str, kind: pa.DataType, altered: set[int]) -> pa.Array:
    values: list[tuple[object, ...]]
    if name == "choices":
        readers = [_OF_CHOICE[member.name][1] for member in kind.value_type]
        values = [([tuple(read(choice) for read in readers) for choice in answer.choices],) for answer in answers]
    else:
        _, read = _OF_CHOICE[name]
        values = [(read(answer.choices[0]),) for answer in answers]
    return _columns(values, [(name, kind)], altered)[0]


def _tool_calls(choice: Choice) -> object:
    return choice.tool_calls and [(call.id, call.type, call.name, call.arguments) for call in choice.tool_calls]


def _logprobs(tokens: Sequence[Token] | None) -> object:
    return tokens and [
        (
            *_alternative(token),
            token.top_logprobs and [_alternative(each) for each in token.top_logprobs],
            token.text_offset,
        )
        for token in tokens
    ]


def _alternative(token: Alternative) -> tuple[object, ...]:
    return token.token, token.logprob, None if token.bytes is None else bytes(token.bytes)


_OF_CHOICE: Mapping[str, tuple[pa.DataType, Callable[[Choice], object]]] = {
    "index": (pa.int32(), attrgetter("index")),
    "text": (pa.string(), attrgetter("text")),
    "reasoning": (pa.string(), attrgetter("reasoning")),
    "finish_reason": (pa.string(), attrgetter("finish_reason")),
    "refusal": (pa.string(), attrgetter("refusal")),
    "tool_calls": (_TOOL_CALLS, _tool_calls),
    "logprobs": (_LOGPROBS, lambda choice: _logprobs(choice.logprobs)),
    "reasoning_logprobs": (_LOGPROBS, lambda choice: _logprobs(choice.reasoning_logprobs)),
    "tokens": (pa.list_(pa.int32()), attrgetter("tokens")),
}
"""What a choice has: type, and value as Arrow takes it."""


def _texts(bodies: Iterable[bytes | None], altered: set[int]) -> pa.Array:
    texts: list[tuple[object, ...]] = [((body or b"").decode("utf-8", "surrogateescape"),) for body in bodies]
    return _columns(texts, [("raw", pa.string())], altered)[0]


def _count(totals: Totals, name: str, table: pa.Table) -> None:
    """Add a table's sums: the summary is what a recount of the folders would give."""

    def total(column: str) -> Any:
        return pc.sum(table.column(column)).as_py()

    def counts(column: str) -> dict[str, int]:
        return {pair["values"] or "": pair["counts"] for pair in pc.value_counts(table.column(column)).to_pylist()}

    if name == "attempts":
        totals.attempts += table.num_rows
        return
    totals.rows += table.num_rows
    part = Totals(
        billed_prompt_tokens=total("billed_prompt_tokens") or 0,
        billed_completion_tokens=total("billed_completion_tokens") or 0,
        cost_usd=total("cost_usd"),
        unpriced=table.column("cost_usd").null_count,
    )
    if name == "responses":
        part.answered = table.num_rows
        for column in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "latency"):
            setattr(part, column, total(column) or 0)
        part.altered = total("altered") or 0
        part.unfit = table.column("parsed").null_count if "parsed" in table.column_names else 0
        part.finish_reasons = counts("finish_reason")
    else:
        part.failed = table.num_rows
        part.failure_kinds = counts("kind")
    totals.add(part)
