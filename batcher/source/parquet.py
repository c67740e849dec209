"""Parquet files -> rows and columns."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from batcher.errors import JobError
from batcher.records import Row
from batcher.source.base import ALTERED, BATCH_BYTES, KEPT_ROWS, Source
from batcher.source.files import File, FileIdentity
from batcher.store import reading

_PARQUET_ROWS = 2048


class Parquet(Source):
    """Parquet files of one schema."""

    format = "parquet"

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity]) -> None:
        types: dict[str, pa.DataType] = {}
        self._groups: list[list[int]] = []
        """Rows of each row group of each file."""
        for index, file in enumerate(files):
            with reading(file.name), pq.ParquetFile(file.path) as opened:
                metadata, schema = opened.metadata, opened.schema_arrow
                self._groups.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
                found = {name: _kept_type(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
            if len(found) < len(schema.names):
                twice = next(name for name in schema.names if schema.names.count(name) > 1)
                raise JobError(f"input file {file.name} has two columns named {twice!r}")
            types = types if index else found
            _same_types(types, found, files[0].name, file.name)
        super().__init__(files, identities, types)
        starts = list(accumulate(map(sum, self._groups), initial=0))
        self._starts = starts[:-1]
        """Position of each file's first row."""
        self.total: int = starts[-1]

    def batches(self, start: int, columns: Collection[str] | None = None, size: int = 256) -> Iterator[list[Row]]:
        names = list(self.columns if columns is None else columns)
        self.schema(names)
        if not names:
            for first in range(start, self.total, size):
                yield [Row(position, {}) for position in range(first, min(first + size, self.total))]
            return
        for first, whole in self._slices(start, self.total, names, _PARQUET_ROWS):
            for offset in range(0, len(whole), size):
                yield self._rows(first + offset, whole.slice(offset, size), names)

    def kept(self, start: int, stop: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = self.schema(names).append(pa.field(ALTERED, pa.bool_()))
        stop = min(stop, self.total)
        if not names:
            for first in range(start, stop, KEPT_ROWS):
                yield pa.record_batch([pa.array([False] * min(KEPT_ROWS, stop - first))], schema=schema)
            return
        for _, batch in self._slices(start, stop, names, KEPT_ROWS):
            altered = [False] * len(batch)
            arrays = [_valid(batch.column(name).cast(self.types[name]), altered) for name in names]
            yield pa.record_batch([*arrays, pa.array(altered, pa.bool_())], schema=schema)

    def count(self, stopped: Callable[[], bool]) -> int | None:
        return self.total

    def _slices(self, start: int, stop: int, names: Sequence[str], most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Positions [start, stop) as Arrow reads them: (position of the first row, at most `most` rows)."""
        for file, first, groups in zip(self._files, self._starts, self._groups, strict=True):
            ends = list(accumulate(groups, initial=first))
            if ends[-1] <= start or first >= stop:
                continue
            # With a buffer size Arrow streams a column's pages; without, it loads the row group's column whole.
            with reading(file.name), pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as opened:
                for group in range(max(0, bisect_right(ends, start) - 1), len(groups)):
                    position = ends[group]
                    if position >= stop:
                        break
                    size = min(most, _rows_within(opened.metadata.row_group(group), names))
                    for batch in opened.iter_batches(size, row_groups=[group], columns=list(names), use_threads=False):
                        low, high = max(start - position, 0), min(stop - position, len(batch))
                        if low < high:
                            yield position + low, batch.slice(low, high - low)
                        position += len(batch)
                        if position >= stop:
                            break

    def _rows(self, first: int, batch: pa.RecordBatch, names: list[str]) -> list[Row]:
        columns = []
        problems: dict[int, str] = {}
        for name in names:
            column = _for_python(batch.column(name))
            try:
                columns.append(column.to_pylist())
            except (ValueError, OverflowError, pa.ArrowException):
                columns.append(self._one_by_one(first, name, column, problems))
        rows = [
            Row(position, dict(zip(names, values, strict=True)))
            for position, values in enumerate(zip(*columns, strict=True), first)
        ]
        for index, problem in problems.items():
            rows[index] = Row(first + index, {}, problem)
        return rows

    def _one_by_one(self, first: int, name: str, column: pa.Array, problems: dict[int, str]) -> list[object]:
        """A column in which some value has no Python form: invalid UTF-8, a date in the year 30,000."""
        values: list[object] = []
        for index, scalar in enumerate(column):
            try:
                values.append(scalar.as_py())
            except (ValueError, OverflowError, pa.ArrowException) as error:
                file = bisect_right(self._starts, first + index) - 1
                number = first + index - self._starts[file] + 1
                problems[index] = f"row {number} of {self._files[file].name}: column {name!r} cannot be read: {error}"
                values.append(None)
        return values


def _same_types(expected: dict[str, pa.DataType], found: dict[str, pa.DataType], first: str, other: str) -> None:
    for name in [*expected, *found]:
        one, two = expected.get(name), found.get(name)
        if one != two:
            what = (
                f"has no column {name!r}, which {first} has"
                if two is None
                else f"has a column {name!r}, which {first} has not"
                if one is None
                else f"has column {name!r} as {two}, {first} as {one}"
            )
            raise JobError(f"input files have different schemas: {other} {what}")


def _rows_within(group: pq.RowGroupMetaData, names: Collection[str]) -> int:
    """How many rows of a row group's columns make up a batch of bounded bytes."""
    roots = tuple(f"{name}." for name in names)
    columns = (group.column(index) for index in range(group.num_columns))
    size: int = sum(part.total_uncompressed_size for part in columns if f"{part.path_in_schema}.".startswith(roots))
    rows: int = group.num_rows
    return max(1, BATCH_BYTES * rows // max(size, 1))


def _mapped(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with `change` made to it and to every type within it."""
    kind = change(kind)
    if pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([field.with_type(_mapped(field.type, change)) for field in fields])
    if pa.types.is_map(kind):
        return pa.map_(_mapped(kind.key_type, change), kind.item_field.with_type(_mapped(kind.item_type, change)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = kind.value_field.with_type(_mapped(kind.value_type, change))
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(item, kind.list_size)
        return pa.large_list(item) if pa.types.is_large_list(kind) else pa.list_(item)
    return kind


def _kept_type(kind: pa.DataType) -> pa.DataType:
    def change(kind: pa.DataType) -> pa.DataType:
        if isinstance(kind, pa.BaseExtensionType):
            return change(kind.storage_type)
        return change(kind.value_type) if pa.types.is_dictionary(kind) else kind

    return _mapped(kind, change)


def _for_python(column: pa.Array) -> pa.Array:
    """Nanoseconds as microseconds: to_pylist gives nanoseconds as pandas types, or not at all without pandas."""

    def change(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            return pa.timestamp("us", kind.tz)
        if pa.types.is_duration(kind) and kind.unit == "ns":
            return pa.duration("us")
        return pa.time64("us") if kind == pa.time64("ns") else kind

    kind = _mapped(column.type, change)
    return column if kind == column.type else column.cast(kind, safe=False)


def _valid(column: pa.Array, altered: list[bool]) -> pa.Array:
    """A column without broken text, which Arrow hands through and other readers refuse; marks what it changed."""
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        pass
    values: list[object] = []
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    for index in range(len(column)):
        one = column.slice(index, 1)
        try:
            one.validate(full=True)
            values.append(one[0])
        except pa.ArrowInvalid:
            altered[index] = True
            values.append(one.cast(pa.large_binary())[0].as_py().decode(errors="replace") if text else None)
    return pa.array(values, column.type)
