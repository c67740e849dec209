"""The rows that a rehearsal asks: all of a job's, or stretches of them from its beginning to its end, read once."""

from collections.abc import Callable, Collection, Iterator, Sequence

import pyarrow as pa

from batcher import bits
from batcher.engine import Selection
from batcher.records import Row
from batcher.source import ALTERED, FileIdentity, Source

STRETCHES = 16
"""Of the input, from which a sample takes rows that follow one another."""
_FAR = 20_000
"""Rows: what is nearer is read on to, what is further is looked up."""


def positions(selection: Selection, size: int) -> list[int]:
    """The positions of `size` selected rows, or of all: the beginnings of equal stretches of the input, in order.

    Rows that stand together stay together, so that what they share is shared in a sample too.
    """
    if selection.size <= size:
        return bits.rows(selection.rows)
    whole, passed = selection.rows.bit_length(), 0
    found: list[int] = []
    for number in range(STRETCHES):
        start, stop = whole * number // STRETCHES, whole * (number + 1) // STRETCHES
        here = bits.cut(selection.rows, start, stop)
        passed += here.bit_count()
        found += bits.rows(here, start, size * passed // selection.size - len(found))
    return found


def read(source: Source, places: Sequence[int], columns: Collection[str]) -> Iterator[Row]:
    """The rows at these positions, which go up, with these columns at least."""
    batch: list[Row] = []
    reader: Iterator[list[Row]] = iter(())
    for position in places:
        if not batch or position > batch[-1].position + _FAR:
            reader = source.batches(position, columns)
            batch = next(reader, [])
        while batch and batch[-1].position < position:
            batch = next(reader, [])
        if not batch:
            return
        yield batch[position - batch[0].position]


class Rows(Source):
    """Rows of another source, held in memory and numbered anew."""

    format = "rows"

    def __init__(self, source: Source, places: Sequence[int], columns: Collection[str]) -> None:
        self._rows = [row._replace(position=number) for number, row in enumerate(read(source, places, columns))]
        super().__init__([], [FileIdentity("rows", len(self._rows), 0, "")], source.types)
        self.total = len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def first(self, most: int) -> list[Row]:
        """The first so many rows."""
        return self._rows[:most]

    def batches(self, start: int, columns: Collection[str] | None = None, size: int = 256) -> Iterator[list[Row]]:
        """With all that was read of them."""
        for at in range(start, len(self._rows), size):
            yield self._rows[at : at + size]

    def kept(self, start: int, stop: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Nothing but nulls: nobody reads what is carried along."""
        flags = [None if row.problem else False for row in self._rows[start:stop]]
        for at in range(0, len(flags), 8_192):
            altered = pa.array(flags[at : at + 8_192], pa.bool_())
            nulls = [pa.nulls(len(altered), self.types[name]) for name in names]
            yield pa.record_batch([*nulls, altered], names=[*names, ALTERED])

    def count(self, stopped: Callable[[], bool]) -> int | None:
        """They are counted."""
        return self.total

    def digest(self, file: int, stopped: Callable[[], bool]) -> str | None:
        """They have no file."""
        return ""

    def check(self) -> None:
        """They stay as they are."""
