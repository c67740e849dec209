"""Arrow's columns -> rows: what the formats have in common that store columns."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence

import pyarrow as pa

from batcher.errors import JobError
from batcher.records import Row
from batcher.source.base import ALTERED, BATCH_BYTES, KEPT_ROWS, Source, no_column

_ROWS = 2048
_UNHELD = (ValueError, OverflowError, pa.ArrowException)
"""What is raised for a value that is damaged, or that a type cannot hold."""


class ColumnarSource(Source):
    """Rows that lie in columns; only the asked columns are read."""

    total: int
    _built = True
    """Whether Arrow built the arrays itself; those that a file brings as they are may lead it astray."""

    @abstractmethod
    def _slices(self, start: int, stop: int, names: Sequence[str], most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Positions [start, stop) as they are stored: (position of the first row, at most `most` rows)."""

    @abstractmethod
    def _origin(self, position: int) -> str:
        """Where a row stands, for people."""

    def batches(self, start: int, columns: Collection[str] | None = None, size: int = 256) -> Iterator[list[Row]]:
        names = list(self.columns if columns is None else columns)
        for name in names:
            if name not in self.types:
                no_column(name, self.columns)
        if not names:
            for first in range(start, self.total, size):
                yield [Row(position, {}) for position in range(first, min(first + size, self.total))]
            return
        for first, whole in self._slices(start, self.total, names, _ROWS):
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
            arrays = [_held(batch.column(name), self.types[name], altered) for name in names]
            yield pa.record_batch([*arrays, pa.array(altered, pa.bool_())], schema=schema)

    def schema(self, names: Sequence[str]) -> pa.Schema:
        schema = super().schema(names)
        for field in schema:
            if _contains(field.type, _is_unkeepable):
                raise JobError(
                    f"column {field.name!r} is of type {field.type}, which Parquet cannot hold; "
                    "name the columns to keep, without it, in output.keep"
                )
        return schema

    def count(self, stopped: Callable[[], bool]) -> int | None:
        return self.total

    def _rows(self, first: int, batch: pa.RecordBatch, names: list[str]) -> list[Row]:
        columns = []
        problems: dict[int, str] = {}
        for name in names:
            column = batch.column(name)
            try:
                if not self._built:
                    column.validate(full=True)
                columns.append(_for_python(column).to_pylist())
            except _UNHELD:
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
        for index in range(len(column)):
            one = column.slice(index, 1)
            try:
                if not self._built:
                    one.validate(full=True)
                values.append(_for_python(one)[0].as_py())
            except _UNHELD as error:
                where = self._origin(first + index)
                problems[index] = f"{where}: column {name!r} cannot be read: {str(error).splitlines()[0]}"
                values.append(None)
        return values


def rows_within(size: int, rows: int) -> int:
    """How many of so many rows, of so many bytes in all, make up a batch of bounded bytes."""
    return max(1, BATCH_BYTES * rows // max(size, 1))


def columns_of(schema: pa.Schema, place: str) -> dict[str, pa.DataType]:
    """The columns of a schema and how they are kept. Raises JobError for two of one name."""
    found = {name: kept_type(kind) for name, kind in zip(schema.names, schema.types, strict=True)}
    if len(found) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise JobError(f"{place} has two columns named {twice!r}")
    return found


def kept_type(kind: pa.DataType) -> pa.DataType:
    """The type that a column is kept with: one that Parquet gives back as it was written.

    Dictionaries, run-ends, views and extensions become what they stand for.
    """
    return _mapped(kind, _plain)


_STAND_FOR = {
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
    pa.time32("s"): pa.time32("ms"),
    pa.duration("s"): pa.duration("ms"),
}


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if pa.types.is_list_view(kind):
        return pa.list_(kind.value_field)
    if pa.types.is_large_list_view(kind):
        return pa.large_list(kind.value_field)
    if pa.types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    return _STAND_FOR.get(kind, kind)


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


def _contains(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    return wanted(kind) or any(_contains(kind.field(index).type, wanted) for index in range(kind.num_fields))


def _is_unkeepable(kind: pa.DataType) -> bool:
    empty = pa.types.is_struct(kind) and not kind.num_fields
    return empty or pa.types.is_union(kind) or kind == pa.month_day_nano_interval()


def _microseconds(kind: pa.DataType) -> pa.DataType:
    """Nanoseconds as microseconds: to_pylist gives nanoseconds as pandas types, or not at all without pandas."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if kind == pa.time64("ns") else kind


def _for_python(column: pa.Array) -> pa.Array:
    """A column that to_pylist makes plain Python of."""
    kind = _mapped(column.type, _microseconds)
    return column if kind == column.type else column.cast(kind, safe=False)


def _held(column: pa.Array, kind: pa.DataType, altered: list[bool]) -> pa.Array:
    """A column as it is kept: of this type, and without broken text, which other readers refuse; marks its changes."""
    try:
        column.validate(full=True)
        return cast(column, kind)
    except _UNHELD:
        pass
    arrays: list[pa.Array] = []
    for index in range(len(column)):
        one = column.slice(index, 1)
        try:
            one.validate(full=True)
            arrays.append(cast(one, kind))
        except _UNHELD:
            altered[index] = True
            arrays.append(pa.array([_mended(one)], kind))
    return pa.concat_arrays(arrays)


def cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A sound column as this type. Raises ValueError or OverflowError for a value that the type cannot hold."""
    if column.type == kind:
        return column
    try:
        made = column.cast(kind)
        made.validate()  # Arrow's own cast of views is not always sound
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array(column.to_pylist(), kind)
    return made


def _mended(text: pa.Array) -> str | None:
    """A text that is not UTF-8, mended; None for what is broken otherwise."""
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(text.type)
    if raw is None:
        return None
    try:
        text = text.cast(raw)
        text.validate(full=True)
    except pa.ArrowException:
        return None
    mended: str = text[0].as_py().decode(errors="replace")
    return mended
