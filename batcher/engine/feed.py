"""The rows that are left, read in order, turned into requests and offered as fast as they are taken."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime

import msgspec

from batcher.engine.counts import Counts
from batcher.engine.prepared import Prepared
from batcher.engine.publish import Press
from batcher.engine.threads import aside
from batcher.engine.turns import Turns
from batcher.errors import StorageError
from batcher.ledger import Ledger, Progress
from batcher.records import UNIT, Attempt, Failure, Kind, Outcome, PartRecord, Row, Turn
from batcher.schedule import Dispatcher
from batcher.source import Place


class Feed:
    """Feeds the dispatcher range by range; complete ranges are skipped without being read."""

    def __init__(
        self,
        prepared: Prepared,
        ledger: Ledger,
        press: Press,
        dispatcher: Dispatcher,
        turns: Turns,
        counts: Counts,
    ) -> None:
        self._prepared = prepared
        self._source = prepared.source
        self._ledger = ledger
        self._press = press
        self._dispatcher = dispatcher
        self._turns = turns
        self._counts = counts
        self._now = asyncio.get_running_loop().time
        self._size = prepared.job.output.rows_per_part
        self._limit = prepared.job.input.limit
        self.ended = False
        """Whether every row that is left was offered."""
        self.total = self._source.total
        """The input's rows, once they are counted."""
        self._parts: dict[int, PartRecord] = {}
        self._progress: dict[int, Progress] = {}

    @property
    def selected(self) -> int | None:
        """How many rows the job is about, once that is known."""
        if self._limit is None or self.total is None:
            return self.total if self._limit is None else self._limit
        return min(self._limit, self.total)

    def take_up(self) -> bool:
        """Learn what earlier runs have done; whether they had answers. Blocks while it reads the ledger.

        Raises StorageError when a file is gone whose rows the ledger no longer has.
        """
        self._parts = self._ledger.parts(UNIT)
        for part, record in self._parts.items():
            start = part * self._size
            if record.settled > start:
                self._check_files(record)
            if record.place is not None:
                self._source.places[start] = Place(*record.place)
            progress = self._ledger.progress(UNIT, max(start, record.settled), start + self._size)
            if progress.done or progress.tried:
                self._progress[part] = progress
            # A part that was opened again stands half in its former self, half in the ledger.
            failed = max(progress.failed, record.totals.failed)
            self._counts.resume(record.settled - start + len(progress.done) - failed, failed)
        counted = msgspec.json.decode(self._ledger.meta("counted") or b"null", type=tuple[int, int] | None)
        if self.total is None and counted is not None and counted[0] == len(self._source.identities):
            self.total = counted[1]
        return self._counts.answered_rows > 0

    def _check_files(self, record: PartRecord) -> None:
        folder = self._prepared.job.output_folder
        for file in record.files:
            # Its size tells nothing: a run may have been killed between placing a newer self and noting it.
            if not (folder / file.name).exists():
                raise StorageError(
                    f"{folder / file.name} is gone, and its rows are nowhere else\n"
                    "put it back, or start anew with another output and ledger"
                )

    def count(self, stopped: Callable[[], bool]) -> None:
        """Learn how many rows there are and what the files hold. Blocks, until `stopped`: for a thread of its own."""
        total = self._source.count(stopped)
        if total is not None:
            self.total = total
            self._ledger.set_meta({"counted": msgspec.json.encode((len(self._source.identities), total))})
        digests = msgspec.json.decode(self._ledger.meta("digests") or b"[]", type=list[str])
        for file in range(len(digests), len(self._source.identities)):
            digest = self._source.digest(file, stopped)
            if digest is None:
                return
            self._source.check()
            digests.append(digest)
            self._ledger.set_meta({"digests": msgspec.json.encode(digests)})

    async def work(self) -> None:
        """Offer what is left. Raises JobError when the input cannot be read on."""
        reader: _Reader | None = None
        part = 0
        while not self._turns.closed:
            start = part * self._size
            if self.selected is not None and start >= max(self.selected, 1):
                break
            stop = start + self._size if self._limit is None else min(start + self._size, self._limit)
            record = self._parts.get(part)
            if record is not None and record.settled >= min(stop, self.selected or stop):
                reader = None
            else:
                if reader is None or reader.position != start:
                    reader = _Reader(self._source.batches(start, self._prepared.composer.names), start)
                if not await self._feed(part, range(start, stop), record, reader):
                    break
            part += 1
        self.ended = True

    async def _feed(self, part: int, rows: range, record: PartRecord | None, reader: "_Reader") -> bool:
        """Offer one range's rows that are not done; false when the input or the run ends in it."""
        opened = await self._press.begin(part, rows, record, self._dispatcher.window.ceiling)
        progress = self._progress.pop(part, None) or Progress(frozenset(), 0, {})
        opened.changed = bool(progress.done)
        seen = rows.start
        async for batch in reader.until(rows.stop):
            if seen == rows.start:
                self._note(part, rows, record)
            seen = batch[-1].position + 1
            left = [row for row in batch if row.position >= opened.settled and row.position not in progress.done]
            opened.left += len(left)
            self._dispatcher.offer([turn for row in left if (turn := self._turn(row, progress.tried)) is not None])
            self._turns.wake()
            await self._turns.hungry()
            if self._turns.closed:
                return False
        opened.rows = range(rows.start, seen)
        opened.fed = True
        if seen < rows.stop and self.total is None:
            self.total = seen
        if seen == rows.start and part:
            del self._press.open[part]  # the input ended where the range before it did
        else:
            self._press.publish_if_complete(opened)
        return seen == rows.stop

    def _note(self, part: int, rows: range, record: PartRecord | None) -> None:
        """Let the next run know where the range starts in the input."""
        known = record or PartRecord(stop=rows.stop, settled=rows.start)
        self._ledger.open_part(UNIT, part, msgspec.structs.replace(known, place=self._source.places.get(rows.start)))

    def _turn(self, row: Row, tried: Mapping[int, tuple[int, dict[Kind, int]]]) -> Turn | None:
        """A row's request with what is known of earlier attempts; a row that cannot be one has failed."""
        request = self._prepared.composer.compose(row, UNIT)
        if isinstance(request, Failure):
            self._ledger.record(_never_sent(row.position, request))
            return None
        attempt, kinds = tried.get(row.position, (0, None))
        return Turn(request, self._now(), attempt + 1, kinds)


class _Reader:
    """The source's batches, fetched on a thread and cut where ranges end."""

    def __init__(self, batches: Iterator[list[Row]], position: int) -> None:
        self.position = position
        self._batches = batches
        self._rest: list[Row] = []

    async def until(self, stop: int) -> AsyncIterator[list[Row]]:
        """The following rows below `stop`."""
        while True:
            batch = self._rest or await aside(self._next)
            if not batch or batch[0].position >= stop:
                self._rest = batch
                return
            fitting = min(len(batch), stop - batch[0].position)
            self._rest = batch[fitting:]
            self.position = batch[fitting - 1].position + 1
            yield batch[:fitting]

    def _next(self) -> list[Row]:
        return next(self._batches, [])


def _never_sent(row: int, failure: Failure) -> Attempt:
    """The line of the ledger for a row that never became a request."""
    return Attempt(
        unit=UNIT,
        row=row,
        attempt=0,
        outcome=Outcome.FAILED,
        sent_at=int(datetime.now(UTC).timestamp() * 1e6),
        waited=0.0,
        latency=0.0,
        time_to_first_token=None,
        prompt_tokens=0,
        output_tokens=0,
        request_hash=b"",
        model="",
        cache_key=None,
        body=None,
        kind=failure.kind,
        message=failure.message,
    )
