"""Which rows a job is about, where it does not take them as they come: `input.where` and `input.sample`."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batcher import bits
from batcher.engine.prepared import Prepared
from batcher.errors import JobError
from batcher.records import Row
from batcher.source import ALTERED

LOOKED_AT = 1_000
"""Selected rows from the start of the input that are looked at before anything is sent."""
_CHUNK = 1 << 16


class Selection(NamedTuple):
    """The selected rows of an input as a set, and how many they are."""

    rows: int
    size: int

    def part(self, start: int, stop: int) -> int:
        """The selected rows of [start, stop) as a set."""
        return bits.cut(self.rows, start, stop)


def is_selective(prepared: Prepared) -> bool:
    """Whether rows have to be looked at, or drawn, before it is known which are selected."""
    return prepared.condition is not None or prepared.job.input.sample is not None


def select(prepared: Prepared, stopped: Callable[[], bool]) -> Selection | None:
    """Look through the input once; None when `stopped()` came true on the way.

    A row that cannot be read is selected: it ends among the failures rather than nowhere. Raises JobError where the
    condition cannot be evaluated on a row.
    """
    given = prepared.job.input
    if prepared.condition is None:
        total = prepared.source.total
        if total is None:
            total = prepared.source.count(stopped)
        if total is None:
            return None
        if given.sample is None:
            total = min(total, given.limit or total)
            return Selection(bits.first(total), total)
        positions = (pa.array(range(at, min(at + _CHUNK, total)), pa.uint64()) for at in range(0, total, _CHUNK))
        return _of(_sample(positions, given.sample))
    chosen: list[pa.BooleanArray] = []
    count = 0
    for batch in prepared.source.kept(0, sys.maxsize, prepared.condition.columns):
        if stopped():
            return None
        unreadable = pc.is_null(batch.column(ALTERED))
        chosen.append(pc.or_(prepared.condition.mask(batch), unreadable))
        count += chosen[-1].true_count
        if given.limit is not None and count >= given.limit:
            break
    if given.sample is not None:
        starts = accumulate(map(len, chosen[:-1]), initial=0)
        found = (pc.add(pc.indices_nonzero(mask), _word(start)) for mask, start in zip(chosen, starts, strict=False))
        return _of(_sample(found, given.sample))
    whole = pa.chunked_array(chosen, pa.bool_()).combine_chunks()
    selected = _bits(whole)
    if given.limit is not None and count > given.limit:
        last = pc.indices_nonzero(whole)[given.limit].as_py()
        selected = bits.cut(selected, 0, last)
    return Selection(selected, selected.bit_count())


def basis(prepared: Prepared) -> bytes:
    """All that a selection follows from: while it is the same, the selection need not be made again."""
    given, files = prepared.job.input, prepared.source.identities
    return msgspec.json.encode((given.where, given.sample, given.limit, files))


def first_rows(prepared: Prepared, selection: Selection, most: int) -> list[Row]:
    """The first selected rows, with the columns that requests and scores need."""
    wanted = frozenset(bits.rows(selection.rows, most=most))
    rows = chain.from_iterable(prepared.source.batches(0, prepared.columns))
    return [row for row in islice(rows, max(wanted, default=-1) + 1) if row.position in wanted]


def refuse_unserved(prepared: Prepared, rows: Iterable[Row]) -> None:
    """Raise JobError when one of these rows goes to an endpoint that is not served."""
    for row in rows:
        if wrong := prepared.composer.unserved(row):
            raise JobError(f"{prepared.job.origin}: input: {prepared.source.locate(row.position)}: {wrong}")


def unscored(prepared: Prepared, rows: Sequence[Row]) -> tuple[tuple[int, str], ...]:
    """Which of these rows have no target that an answer could hit, and why. Raises JobError where none has one."""
    if prepared.scorer is None:
        return ()
    readable = [row for row in rows if row.problem is None]
    reasons = prepared.scorer.wrong([row.fields for row in readable])
    wrong = tuple((row.position, reason) for row, reason in zip(readable, reasons, strict=True) if reason is not None)
    if wrong and len(wrong) == len(readable):
        position, reason = wrong[0]
        place = prepared.source.locate(position)
        raise JobError(f"{prepared.job.origin}: score: no answer could be right: {place}: {reason}")
    return wrong


def _of(rows: list[int]) -> Selection:
    return Selection(bits.of(rows), len(rows))


def _bits(mask: pa.BooleanArray) -> int:
    """Arrow's own bits, which stand in the same order."""
    if not len(mask):
        return 0
    held = int.from_bytes(mask.buffers()[1], "little")
    return bits.cut(held, mask.offset, mask.offset + len(mask))


def _sample(positions: Iterator[pa.Array], number: int) -> list[int]:
    """The positions that come first when all are ordered by their draw: a larger sample holds the smaller one."""
    best = pa.table({"draw": pa.array([], pa.uint64()), "row": pa.array([], pa.uint64())})

    def lowest(drawn: pa.Table) -> pa.Table:
        return drawn.take(pc.sort_indices(drawn, [("draw", "ascending")]).slice(0, number))

    for some in positions:
        best = pa.concat_tables([best, pa.table({"draw": _draw(some), "row": some})])
        if best.num_rows > 2 * number + _CHUNK:
            best = lowest(best)
    return sorted(lowest(best)["row"].to_pylist())


def _draw(positions: pa.Array) -> pa.Array:
    """A number for each position that looks random and is always the same, and no other position's: SplitMix64."""

    def mixed(number: pa.Array, shift: int, factor: int) -> pa.Array:
        return pc.multiply(pc.bit_wise_xor(number, pc.shift_right(number, _word(shift))), _word(factor))

    number = pc.multiply(pc.add(positions, _word(1)), _word(0x9E3779B97F4A7C15))
    number = mixed(mixed(number, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
    return pc.bit_wise_xor(number, pc.shift_right(number, _word(31)))


def _word(number: int) -> pa.Scalar:
    return pa.scalar(number, pa.uint64())
