"""Tables and DataFrames from Python -> rows and columns."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batcher.errors import JobError
from batcher.source.columnar import ColumnarSource, cast, columns_of, kept_type, rows_within
from batcher.source.files import TABLE, FileIdentity

_BLOCK_ROWS = 1 << 16


class Table(ColumnarSource):
    """Anything that gives its rows by Arrow's C interface: pyarrow, pandas, Polars, DuckDB."""

    format = "table"

    def __init__(self, rows: object) -> None:
        try:
            if hasattr(rows, "__arrow_c_stream__"):
                table = pa.RecordBatchReader.from_stream(rows).read_all()
            elif hasattr(rows, "__arrow_c_array__"):
                table = pa.Table.from_batches([pa.record_batch(rows)])
            else:
                raise JobError(f"input: a table or a DataFrame, not a {type(rows).__name__}")
            table.validate(full=True)
            types = columns_of(table.schema, TABLE)
            identity = FileIdentity(TABLE, table.num_rows, 0, _fingerprint(table))
        except (pa.ArrowException, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise JobError(f"input: the {type(rows).__name__} cannot be read: {reason}") from error
        super().__init__([], [identity], types)
        self._table = table
        self.total = table.num_rows

    def _slices(self, start: int, stop: int, names: Sequence[str], most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        wanted = self._table.select(list(names)).slice(start, max(0, stop - start))
        size = min(most, rows_within(wanted.nbytes, wanted.num_rows))
        for batch in wanted.to_batches(max_chunksize=size):
            if len(batch):
                yield start, batch
            start += len(batch)

    def _origin(self, position: int) -> str:
        return f"row {position + 1} of {TABLE}"

    def check(self) -> None:
        """A table that was given stays as it is."""

    def digest(self, file: int, stopped: Callable[[], bool]) -> str | None:
        return self.identities[file].sample


def _fingerprint(table: pa.Table) -> str:
    """sha256 (hex) of the names, the types as they are kept, and the values: however they are chunked or encoded."""
    digest = hashlib.sha256()
    for field in table.schema:
        digest.update(f"{field.name}\0{kept_type(field.type)}\0".encode())
    for start in range(0, table.num_rows, _BLOCK_ROWS):
        for column in table.slice(start, _BLOCK_ROWS).columns:
            whole = pa.concat_arrays(column.chunks)
            _feed(digest.update, cast(whole, kept_type(whole.type)))
    return digest.hexdigest()


def _feed(take: Callable[[Any], None], column: pa.Array) -> None:
    """Give out a column's bytes: which are null, and the values of the others. What lies under a null is not looked at.

    Raises TypeError for a type that has no such bytes.
    """
    kind = column.type
    take(struct.pack("<q", len(column)))
    if pa.types.is_null(kind):
        return
    _fixed(take, column.is_valid().cast(pa.uint8()))
    column = column.drop_null()
    if pa.types.is_struct(kind):
        for field in column.flatten():
            _feed(take, field)
    elif pa.types.is_map(kind):
        _feed(take, column.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _fixed(take, pc.list_value_length(column).cast(pa.int64()))
        _feed(take, column.flatten())
    elif pa.types.is_boolean(kind):
        _fixed(take, column.cast(pa.uint8()))
    elif any(is_kind(kind) for is_kind in _TEXT_LIKE):
        lengths = pc.binary_length(column).cast(pa.int64())
        _fixed(take, lengths)
        if len(column):
            _, offsets, values = column.buffers()
            code, width = ("<q", 8) if str(kind).startswith("large") else ("<i", 4)
            begin, end = (struct.unpack_from(code, offsets, (column.offset + at) * width)[0] for at in (0, len(column)))
            if end > begin:
                take(values[begin:end])
    elif pa.types.is_union(kind):
        raise TypeError(f"a column is of type {kind}")
    else:
        _fixed(take, column)


_TEXT_LIKE = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _fixed(take: Callable[[Any], None], column: pa.Array) -> None:
    width = column.type.bit_width // 8
    if len(column):
        take(column.buffers()[1][column.offset * width : (column.offset + len(column)) * width])
