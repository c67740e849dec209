"""Open ranges of rows: published as they become complete, once a minute while they are not, and at the end."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

import anyio
import msgspec

from batcher import bits
from batcher.engine.attempt import reply
from batcher.engine.prepared import Prepared
from batcher.engine.threads import aside
from batcher.errors import BatcherError
from batcher.ledger import Ledger
from batcher.records import UNIT, Answer, Attempt, Failure, Former, PartRecord
from batcher.sink import Shape, Sink

PUBLISH_EVERY = 60.0
OPEN_RANGES = 8
"""Ranges that may be open at once, beyond those that the window alone needs: one slow row keeps its range open."""


class Range:
    """One part in the making. `record` is what was known of it before: rows that stand in its former self alone.

    Of these, a retry asks the rows `again`.
    """

    __slots__ = ("again", "changed", "done", "fed", "former", "left", "part", "record", "rows")

    def __init__(
        self, part: int, rows: range, record: PartRecord | None, again: Mapping[int, Former] | None = None
    ) -> None:
        self.part = part
        self.again = again or {}
        self.rows = rows
        self.record = record or PartRecord(rows.stop, rows.start)
        self.former = tuple(file.name for file in record.files) if record and record.settled > rows.start else ()
        self.done = 0
        """The set of rows that are done once nothing is left, counted from the range's start."""
        self.left = 0
        """Offered rows that are not done."""
        self.fed = False
        """Whether all rows were offered."""
        self.changed = False
        """Whether the ledger knows more than the published part."""

    def asks(self, row: int) -> bool:
        """Whether a row that is not done yet is asked by this run."""
        return row in self.again if self.again else bool(self.done >> (row - self.rows.start) & 1)

    @property
    def complete(self) -> bool:
        """Whether every row is done and durable."""
        return self.fed and not self.left


class Press:
    """Publishes ranges, one at a time, on a thread. `end` is told when the disk refuses."""

    def __init__(self, prepared: Prepared, shape: Shape, ledger: Ledger, end: Callable[[BatcherError], None]) -> None:
        job = prepared.job
        self.open: dict[int, Range] = {}
        self._prepared = prepared
        self._ledger = ledger
        self._end = end
        self._sink = Sink(job.results, shape, self._read, prepared.price)
        self._sink.prepare()
        self._size = job.output.rows_per_part
        self._columns = shape.kept.names
        self._due: deque[Range] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._busy = anyio.Lock()
        self._closed = False
        self._hasty = False
        self.full = False
        """Whether the feed waits because too many ranges are open."""

    async def begin(self, opened: Range, left: int, window: int) -> None:
        """Open a range in which so many rows are left, as soon as not too many are open."""
        while not self.has_room(left, window) and not self._closed:
            self._room.clear()
            self.full = True
            await self._room.wait()
        self.full = False
        self.open[opened.part] = opened

    def has_room(self, left: int, window: int) -> bool:
        """Whether a range in which so many rows are left may be opened now."""
        return len(self.open) < OPEN_RANGES + 2 * window // max(1, left)

    @property
    def behind(self) -> bool:
        """Whether a complete range waits to be published."""
        return bool(self._due) or self._busy.locked()

    def of(self, row: int) -> Range | None:
        """The open range that a row is in."""
        return self.open.get(row // self._size)

    def asks(self, row: int) -> bool:
        """Whether a row that is not done yet is asked by this run. May be asked on any thread."""
        opened = self.of(row)
        return opened is not None and opened.asks(row)

    def publish_if_complete(self, opened: Range) -> None:
        """Have a range published once nothing is left in it."""
        if opened.complete:
            self._due.append(opened)
            self._wake.set()

    def close(self) -> None:
        """No more ranges are opened."""
        self._closed = True
        self._room.set()

    async def work(self) -> None:
        """Publish what becomes complete, and what is open once a minute."""
        now = asyncio.get_running_loop().time
        minute = now() + PUBLISH_EVERY
        while True:
            with anyio.move_on_after(max(0.0, minute - now())):
                await self._wake.wait()
            self._wake.clear()
            while self._due:
                await self._publish(self._due.popleft())
            if now() >= minute:
                await self.publish_open()
                minute = now() + PUBLISH_EVERY

    async def publish_open(self) -> None:
        """Publish every open range of which the ledger knows more than its part."""
        for opened in list(self.open.values()):
            if (opened.changed or opened.complete) and not self._hasty:
                await self._publish(opened)

    def stop(self) -> None:
        """Publish nothing more than the part that is being built."""
        self._hasty = True

    def finish(self) -> None:
        """Nothing more is published."""
        self._sink.finish()

    async def _publish(self, opened: Range) -> None:
        with anyio.CancelScope(shield=True):
            async with self._busy:
                if opened.part not in self.open:
                    return
                complete = opened.complete
                opened.changed = False
                try:
                    record = await aside(self._make, opened, complete)
                    noted = self._ledger.published(UNIT, opened.part, record, opened.rows if complete else None)
                    await asyncio.wrap_future(noted)
                except BatcherError as error:
                    opened.changed = True
                    self._end(error)
                    return
                if complete:
                    del self.open[opened.part]
                    self._room.set()

    def _read(self, attempt: Attempt) -> Answer | Failure:
        return self._prepared.access.dialect.read(reply(attempt))

    def _make(self, opened: Range, complete: bool) -> PartRecord:
        """Build a part and put it in its place: what is to be noted of it in the ledger. Runs on a thread."""
        rows, source = opened.rows, self._prepared.source
        totals, files = self._sink.publish(
            opened.part,
            rows,
            self._ledger.attempts(UNIT, rows.start, rows.stop),
            source.kept(rows.start, rows.stop, self._columns),
            opened.former,
            source.check,
            opened.again,
        )
        if opened.again:  # whatever becomes of them, the part has the rows that it had
            return msgspec.structs.replace(opened.record, totals=totals, files=files)
        place, settled = source.places.get(rows.start), opened.record.settled
        if complete:
            done = bits.cut(opened.done, 0, len(rows))
            some = None if done == bits.first(len(rows)) else bits.pack(done)
            return PartRecord(rows.stop, rows.stop, place, totals, files, some)
        # An open range always has rows to come, even when it is not yet known where the input ends.
        stop = max(rows.stop, settled + 1)
        return PartRecord(stop, settled, place, totals, files, opened.record.rows)
