"""A retry: rows of a finished output are asked again, and their parts written again with what came of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batcher.engine.feed import Feed, Reader
from batcher.engine.held import finished_summary, held, reparse_under_way, summary_of
from batcher.engine.prepared import agree_again, prepare
from batcher.engine.publish import Range
from batcher.engine.run import live
from batcher.engine.threads import aside
from batcher.errors import JobError, StorageError
from batcher.job import Job
from batcher.ledger import Ledger, Progress
from batcher.records import UNIT, Former, Kind, PartRecord, Retried, Snapshot, Summary
from batcher.sink import Shape
from batcher.store import Results
from batcher.transport import Transport
from batcher.where import Condition

_FORMER = ("attempts", "started_at", "billed_prompt_tokens", "billed_completion_tokens", "cost_usd")


class Retrial(NamedTuple):
    """An output held for a retry. `job` is what its rows are asked with, `base` what the output was begun with."""

    base: Job
    job: Job
    ledger: Ledger
    where: str | None
    settings: tuple[str, ...]
    begun: bool
    """Whether this goes on with a retry that was interrupted."""


@contextmanager
def reopened(output: str | Path, where: str | None, settings: Sequence[str]) -> Iterator[Retrial]:
    """Hold a finished output, or one whose retry was interrupted. Raises JobError, OutputInUseError, StorageError."""
    with held(output) as (base, ledger):
        if refusal := reparse_under_way(ledger, base.results):
            raise JobError(refusal)
        retries = ledger.retries()
        begun = retries[-1] if retries and retries[-1].finished_at is None else None
        anew: tuple[str, ...] = ()
        if begun is not None:
            # How its rows are asked may change on the way, and has to where its budget is reached.
            anew = tuple(setting for setting in settings if setting.strip().startswith("schedule."))
            others = tuple(setting for setting in settings if setting not in anew)
            known = tuple(setting for setting in begun.settings if not setting.strip().startswith("schedule."))
            if (where, others) not in ((None, ()), (begun.where, known)):
                raise JobError(
                    f"a retry of {begun.rows:,} rows with other options is under way: batcher retry {output} goes on"
                    " with it;\nwith --abandon it leaves the rest as it is"
                )
            where, settings = begun.where, begun.settings
        yield Retrial(base, base.changed((*settings, *anew)), ledger, where, tuple(settings), begun is not None)


async def retry(
    retrial: Retrial,
    *,
    abandon: bool = False,
    base_url: str | None = None,
    table: object = None,
    transport: Transport | None = None,
    watch: Callable[[Snapshot], None] | None = None,
    signals: bool = False,
) -> Summary:
    """Ask the chosen rows again; where there are none, the summary stays what it is. `watch` is called if there are.

    With `abandon`, rows of a retry under way that were not asked yet keep what they have.
    """
    job, ledger = retrial.job, retrial.ledger
    if abandon and not retrial.begun:
        raise JobError(f"no retry is under way in {job.results}")
    prepared = await aside(prepare, job, base_url, table)
    shape = await aside(agree_again, ledger, retrial.base, prepared)
    before = summary_of(job.results)
    if not retrial.begun:
        finished = finished_summary(job.results, before, ledger)
        if not await aside(_begin, retrial, shape):
            return finished
    feed = partial(_Again, abandon, before.selected if before else None)
    return await live(prepared, ledger, shape, feed, transport, watch, signals)


# Which rows


def _begin(retrial: Retrial, shape: Shape) -> int:
    """Choose the rows and note them, before anything is sent; how many there are."""
    holds = None if retrial.where is None else _condition(retrial.where, shape)
    results, parts = retrial.job.results, retrial.ledger.parts(UNIT)
    chosen = (pair for record in parts.values() for pair in _chosen(results, record, holds))
    begun = Retried(started_at=_now(), where=retrial.where, settings=retrial.settings)
    return retrial.ledger.begin_retry(begun, UNIT, chosen)


class _Holds(NamedTuple):
    """A condition over the columns of responses and failures; one that a file has not is null in it."""

    condition: Condition
    schema: pa.Schema

    def mask(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """For which rows of a file it holds."""
        fields = [self.schema.field(name) for name in self.condition.columns]
        columns = [
            batch.column(field.name) if field.name in batch.schema.names else pa.nulls(len(batch), field.type)
            for field in fields
        ]
        return self.condition.mask(pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields)))


def _condition(sql: str, shape: Shape) -> _Holds:
    responses, failures = shape.responses(), shape.failures()
    schema = pa.schema([*responses, *(field for field in failures if field.name not in responses.names)])
    return _Holds(Condition(sql, schema, "--where"), schema)


def _chosen(results: Results, record: PartRecord, holds: _Holds | None) -> Iterator[tuple[int, Former]]:
    """The rows of a part that are to be asked again: its failures, or those for which a condition holds."""
    needed = {"row", *_FORMER, *(holds.condition.columns if holds else ())}
    for file in record.files:
        folder = file.name.split("/")[0]
        if folder == "attempts" or (folder == "responses" and holds is None):
            continue
        try:
            with (
                results.local(file.name) as path,
                pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as parquet,
            ):
                columns = [name for name in parquet.schema_arrow.names if name in needed]
                for batch in parquet.iter_batches(columns=columns):
                    found = batch if holds is None else batch.filter(holds.mask(batch))
                    formers = zip(*(_plain(found.column(name)) for name in _FORMER), strict=True)
                    for row, former in zip(_plain(found.column("row")), formers, strict=True):
                        yield row, Former(folder == "responses", *former)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise StorageError(f"{results}/{file.name}: cannot be read ({reason}); restore it") from None


def _plain(column: pa.Array) -> list[Any]:
    """Values as Python's own; times as whole microseconds."""
    plain: list[Any] = (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()
    return plain


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# The rows on their way


class _Again(Feed):
    """Feeds the rows that a retry has noted; their parts are complete, and stay so until they are written again."""

    def __init__(self, abandon: bool, selected: int | None, *rooms: Any) -> None:
        super().__init__(*rooms)
        self._abandon, self._former_selected = abandon, selected
        self._waiting: list[int] = []
        self._rows = self._asked = 0

    @property
    def selected(self) -> int | None:
        """How many rows the job is about, as its last run has said."""
        return self._former_selected

    @property
    def total_in_output(self) -> int:
        """How many rows the output has: nothing of it is pending."""
        return self._rows

    @property
    def asked(self) -> int:
        """How many rows this retry is about, those that it has done included."""
        return self._asked

    def take_up(self) -> bool:
        """Learn which rows are left; whether the output has answers, so that a refusal is a row's. Blocks.

        Raises StorageError when a file is gone.
        """
        if self._abandon:
            self._ledger.abandon(UNIT)
        self._parts = self._ledger.parts(UNIT)
        self._rows = sum(record.totals.rows for record in self._parts.values())
        begun = self._ledger.retries()[-1]
        self._waiting, left = self._ledger.parts_again(UNIT, self._size)
        self._asked = begun.rows
        self._counts.resume(begun.answered, begun.rows - left - begun.answered)
        there = self._prepared.job.results.parts()
        for part in self._waiting:
            start, record = part * self._size, self._parts[part]
            self._find(start, record, there)
            progress = self._ledger.progress(UNIT, start, record.stop)
            if progress.done or progress.tried:
                self._progress[part] = progress
                self._counts.resume(len(progress.done) - progress.failed, progress.failed)
        return any(record.totals.answered for record in self._parts.values())

    def count(self, stopped: Callable[[], bool]) -> None:
        """The input was counted before."""

    async def work(self) -> None:
        """Offer what is left. Raises JobError when the input cannot be read on."""
        for part in self._waiting:
            if self._turns.closed or not await self._ask(part):
                break
        await self._offer_rest()
        self.ended = True

    async def _range(self, part: int) -> Range:
        """A part as it is, with what its rows that are asked again had come to."""
        record = self._parts[part]
        rows = range(part * self._size, record.stop)
        return Range(part, rows, record, await aside(self._ledger.again, UNIT, rows.start, rows.stop))

    async def _ask(self, part: int) -> bool:
        """Offer one part's rows that are asked again; false when the run ends in it."""
        opened = await self._range(part)
        rows, again = opened.rows, opened.again
        opened.changed = part in self._progress
        progress = self._progress.pop(part, None) or Progress(frozenset(), 0, {})
        wanted = again.keys() - progress.done
        await self._begin(opened, len(wanted))
        # Their attempts are counted on from those of before; what failed then is forgiven.
        before: dict[int, tuple[int, dict[Kind, int]]] = {row: (again[row].attempts, {}) for row in wanted}
        tried = before | progress.tried
        reader = Reader(self._source.batches(rows.start, self._prepared.composer.names), rows.start)
        async for batch in reader.until(max(wanted, default=rows.start - 1) + 1):
            left = [row for row in batch if row.position in wanted]
            opened.left += len(left)
            if not await self._offer(left, tried):
                return False
        opened.fed = True
        self._press.publish_if_complete(opened)
        return True
