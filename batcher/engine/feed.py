"""The rows that are left, read in order, turned into requests and offered as fast as they are taken."""

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from batcher import bits
from batcher.engine import selection
from batcher.engine.attempt import repair
from batcher.engine.counts import Counts
from batcher.engine.prepared import UNBOUNDED, Prepared
from batcher.engine.publish import Press, Range
from batcher.engine.selection import LOOKED_AT, Selection, is_selective
from batcher.engine.threads import abandonable, aside
from batcher.engine.turns import Turns
from batcher.engine.twins import Twins
from batcher.engine.window import Window
from batcher.errors import StorageError
from batcher.ledger import Ledger, Progress
from batcher.prompt import Composer
from batcher.records import UNIT, Attempt, Failure, Kind, Outcome, PartRecord, Request, Row, Turn
from batcher.schedule import Dispatcher
from batcher.source import Place

_IMAGES_AT_ONCE = 8
"""Rows whose images are read before they are offered: up to 80 MiB."""


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
        twins: Twins | None,
    ) -> None:
        self._twins = twins
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
        self._budgeted = prepared.job.schedule.budget_usd is not None
        self._window = Window(prepared.job.ledger_path.parent) if prepared.composer.groups else None
        self._selection: Selection | None = None
        self._beyond = 0
        self.ended = False
        """Whether every row that is left was offered."""
        self.total = self._source.total
        """The input's rows, once they are counted."""
        self._parts: dict[int, PartRecord] = {}
        self._progress: dict[int, Progress] = {}
        self._done: dict[int, int] = {}
        """By range, the set of rows that earlier runs have done."""

    @property
    def selected(self) -> int | None:
        """How many rows the job is about, once that is known."""
        if is_selective(self._prepared):
            return self._selection.size if self._selection else None
        if self._limit is None or self.total is None:
            return self.total if self._limit is None else self._limit
        return min(self._limit, self.total)

    @property
    def total_in_output(self) -> int | None:
        """How many rows the output has in the end: the selected ones, and others that earlier runs have done."""
        return None if self.selected is None else self.selected + self._beyond

    @property
    def asked(self) -> int | None:
        """How many rows this run is about, those that earlier runs have done included."""
        return self.total_in_output

    def take_up(self) -> bool:
        """Learn what earlier runs have done; whether they had answers. Blocks while it reads the ledger.

        Raises StorageError when a file is gone whose rows the ledger no longer has.
        """
        self._parts = self._ledger.parts(UNIT)
        there = self._prepared.job.results.parts() if self._parts else set()
        for part, record in self._parts.items():
            start = part * self._size
            self._find(start, record, there)
            progress = self._ledger.progress(UNIT, start, start + self._size)
            if progress.done or progress.tried:
                self._progress[part] = progress
            # A part that was opened again stands half in its former self, half in the ledger.
            failed = max(progress.failed, record.totals.failed)
            self._done[part] = record.done(start) | bits.of(progress.done, start)
            self._counts.resume(self._done[part].bit_count() - failed, failed)
        counted = msgspec.json.decode(self._ledger.meta("counted") or b"null", type=tuple[int, int] | None)
        if self.total is None and counted is not None and counted[0] == len(self._source.identities):
            self.total = counted[1]
        if self._limit is not None and not is_selective(self._prepared):
            self._look_beyond()
        return self._counts.answered_rows > 0

    def _find(self, start: int, record: PartRecord, there: Container[str]) -> None:
        """See that a part is there, and learn where its rows stand in the input."""
        if record.place is not None:
            self._source.places[start] = Place(*record.place)
        for file in record.files if record.settled > start else ():
            # Its size tells nothing: a run may have been killed between placing a newer self and noting it.
            if file.name not in there:
                raise StorageError(
                    f"{self._prepared.job.results}/{file.name} is gone, and its rows are nowhere else\n"
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

    def _select(self) -> None:
        """Find the rows that the job is about, or remember them from an earlier run. Blocks."""
        basis = selection.basis(self._prepared)
        if self._ledger.meta("selection_basis") == basis:
            rows = bits.unpack(self._ledger.meta("selection") or b"")
            self._selection = Selection(rows, rows.bit_count())
        elif found := selection.select(self._prepared, lambda: self._turns.closed):
            self._ledger.set_meta({"selection_basis": basis, "selection": bits.pack(found.rows)})
            self._selection = found
        else:
            return
        self._look_beyond()

    def _look_ahead(self) -> None:
        """Raise JobError, before anything is sent, for what the first rows show to be wrong with all. Blocks."""
        most = LOOKED_AT if self._limit is None else min(LOOKED_AT, self._limit)
        chosen = self._selection or Selection(bits.first(most), most)
        rows = selection.first_rows(self._prepared, chosen, most)
        selection.refuse_unserved(self._prepared, rows)
        selection.unscored(self._prepared, rows)

    def _look_beyond(self) -> None:
        """Count what earlier runs have done of rows that are not selected now."""
        self._beyond = sum((done & ~self._wanted(part)).bit_count() for part, done in self._done.items())

    def _wanted(self, part: int) -> int:
        """A range's selected rows as a set; as far as it is known where the input ends."""
        start = part * self._size
        if self._selection is not None:
            return self._selection.part(start, start + self._size)
        return bits.first(self._size if self.selected is None else min(self._size, self.selected - start))

    async def work(self) -> None:
        """Offer what is left. Raises JobError when the input cannot be read on."""
        if is_selective(self._prepared):
            await abandonable(self._select)
        looks = self._prepared.job.request.endpoint is None or self._prepared.scorer is not None
        if looks and not self._turns.closed:
            await aside(self._look_ahead)
        reader: Reader | None = None
        part, recorded = 0, max(self._progress, default=0)
        while not self._turns.closed and (part <= recorded or not self._beyond_all(part)):
            start = part * self._size
            progress = self._progress.get(part)
            left = self._wanted(part) & ~self._done.get(part, 0)
            # What was recorded and not published is published now, selected or not.
            if left or (progress is not None and progress.done) or (not part and not self._parts and not self.selected):
                if reader is None or reader.position != start:
                    reader = Reader(self._source.batches(start, self._prepared.composer.names), start)
                if not await self._feed(part, left, reader):
                    break
            part += 1
        await self._offer_rest()
        self.ended = True

    async def reopen(self) -> None:
        """Open the ranges that were not reached and of which earlier runs recorded more than they published.

        Attempts are enough: a killed run may have put a part with nothing else into its place, and not noted it.
        """
        for part in self._progress:
            opened = await self._range(part)
            opened.changed = True
            self._press.open[part] = opened

    async def _range(self, part: int) -> Range:
        """A range as it is before anything of it is offered."""
        return Range(part, self._stretch(part), self._parts.get(part))

    def _beyond_all(self, part: int) -> bool:
        """Whether a range begins after the last selected row."""
        if self._selection is not None:
            return part * self._size >= self._selection.rows.bit_length()
        return self.selected is not None and part * self._size >= self.selected

    def _stretch(self, part: int) -> range:
        """A range's rows, to the limit: and further where rows beyond it have been done."""
        start = part * self._size
        if self._selection is not None or self._limit is None:
            return range(start, start + self._size)
        record = self._parts.get(part)
        known = max(self._done.get(part, 0).bit_length(), record.settled - start if record else 1)
        return range(start, start + min(self._size, max(self._limit - start, known)))

    async def _feed(self, part: int, wanted: int, reader: "Reader") -> bool:
        """Offer these rows of one range; false when the input or the run ends in it."""
        opened = await self._range(part)
        rows = opened.rows
        await self._begin(opened, wanted.bit_count())
        opened.done = self._done.get(part, 0) | wanted
        opened.changed = part in self._progress
        progress = self._progress.pop(part, None) or Progress(frozenset(), 0, {})
        seen = rows.start
        async for batch in reader.until(rows.stop):
            if seen == rows.start:
                self._note(part, rows)
            some = bits.cut(wanted, seen - rows.start, seen - rows.start + len(batch))
            seen = batch[-1].position + 1
            left = batch if some == bits.first(len(batch)) else [batch[index] for index in bits.rows(some)]
            opened.left += len(left)
            if not await self._offer(left, progress.tried):
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

    async def _begin(self, opened: Range, left: int) -> None:
        """Open a range in which so many rows are left, as soon as there is room, for rows that were read ahead too."""
        window = self._dispatcher.ceiling
        if self._window is not None:
            while len(self._window) and not self._press.has_room(left, window + len(self._window)):
                if not await self._offer_oldest(self._window):
                    break
            window += len(self._window)
        await self._press.begin(opened, left, window)

    async def _offer_oldest(self, window: Window) -> bool:
        """Offer the row that was read ahead the longest ago, with those of its group; false when the run ended."""
        turns = await aside(window.take, self._dispatcher.reuse)
        for turn in turns:
            turn.ready = self._now()
        return await self._hand_over(turns)

    async def _offer_rest(self) -> None:
        """Offer what was read ahead, to the last row."""
        if self._window is None:
            return
        while len(self._window) and not self._turns.closed:
            await self._offer_oldest(self._window)
        self._window.close()

    async def _hand_over(self, turns: Sequence[Turn]) -> bool:
        """Give rows to the dispatcher and return when more are wanted; false when the run ended."""
        self._dispatcher.offer(turns)
        self._turns.wake()
        await self._turns.hungry(sum([len(turn.request.body) for turn in turns]) // max(1, len(turns)))
        return not self._turns.closed

    def _note(self, part: int, rows: range) -> None:
        """Let the next run know where the range starts in the input."""
        known = self._parts.get(part) or PartRecord(stop=rows.stop, settled=rows.start)
        self._ledger.open_part(UNIT, part, msgspec.structs.replace(known, place=self._source.places.get(rows.start)))

    async def _offer(self, rows: Sequence[Row], tried: Mapping[int, tuple[int, dict[Kind, int]]]) -> bool:
        """Offer these rows and return when more are wanted; false when the run ended."""
        composer = self._prepared.composer
        unfit: Mapping[int, Attempt] = {}
        cut: Mapping[int, Attempt] = {}
        if rows and tried:
            span = UNIT, rows[0].position, rows[-1].position + 1
            if self._prepared.job.retry.repair:
                unfit = await aside(self._ledger.unfit, *span, Kind.INVALID_OUTPUT)
            if self._prepared.job.request.learned_cap is not None:
                cut = await aside(self._ledger.unfit, *span, Kind.TRUNCATED)
        size = _IMAGES_AT_ONCE if composer.reads_files else max(1, len(rows))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            made = await aside(_composed, composer, some) if composer.reads_files else _composed(composer, some)
            pairs = zip(some, made, strict=True)
            turns = [
                turn for row, request in pairs if (turn := self._turn(row, request, tried, unfit, cut)) is not None
            ]
            led = turns if self._twins is None else await self._twins.leading(turns)
            if self._window is None:
                if not await self._hand_over(led):
                    return False
                continue
            await aside(self._window.put, led)
            while self._window.full:
                if not await self._offer_oldest(self._window):
                    return False
        return not self._turns.closed

    def _turn(
        self,
        row: Row,
        request: Request | Failure,
        tried: Mapping[int, tuple[int, dict[Kind, int]]],
        unfit: Mapping[int, Attempt],
        cut: Mapping[int, Attempt],
    ) -> Turn | None:
        """A row's request with what is known of earlier attempts; a row that cannot be one has failed.

        Of an answer in `unfit` the model is told why it does not fit; those in `cut` were cut off.
        """
        if self._budgeted and isinstance(request, Request) and self._prepared.most(request) is None:
            request = Failure(Kind.UNSENDABLE, UNBOUNDED)
        if isinstance(request, Failure):
            self._ledger.record(_never_sent(row.position, request))
            return None
        attempt, kinds = tried.get(row.position, (0, None))
        floor = cut[row.position].output_tokens if row.position in cut else 0
        if unfit and (shown := unfit.get(row.position)) is not None:
            return Turn(repair(self._prepared, request, shown), self._now(), attempt + 1, kinds, request, floor)
        return Turn(request, self._now(), attempt + 1, kinds, None, floor)


class Reader:
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


def _composed(composer: Composer, rows: Sequence[Row]) -> list[Request | Failure]:
    return [composer.compose(row, UNIT) for row in rows]


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
