"""Input files -> rows, streamed, numbered."""

import glob
import hashlib
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batcher.errors import JobError
from batcher.records import Row

ALTERED = "__altered"
"""The last column of `Source.kept`: true where a row's kept values are not exactly those of the input."""

_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_LATER = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
_FORMATS = ("parquet", "jsonl")
_LATER_FORMATS = ("csv", "arrow", "openai-batch")
_KNOWN = "formats are parquet (.parquet .pq) and jsonl (.jsonl .ndjson, also with .gz or .zst)"

_BLOCK = 1 << 19
_STOP_EVERY = 16 << 20
_LONGEST_LINE = 64 << 20
_BATCH_BYTES = 4 << 20
_KEPT_ROWS = 8192
_PARQUET_ROWS = 2048
_TOO_LONG = b"(a line that is too long to be held)"

_SAMPLE_ROWS, _SAMPLE_BYTES = 10_000, 8 << 20
_SAMPLE_ROWS_FURTHER = 100
_MOST_FIELDS = 256
_DEEPEST = 16


class FileIdentity(msgspec.Struct, frozen=True):
    """What tells one input file from another without reading it whole."""

    name: str
    """Path relative to the job's folder when below it, else absolute."""
    size: int
    mtime_ns: int
    sample: str
    """sha256 of the first and last 64 KiB and 60 blocks of 4 KiB between; of the whole file when it is small."""


class Place(NamedTuple):
    """Where a row starts in a JSONL file: file index, byte (decompressed) and number of its line (from 1)."""

    file: int
    byte: int
    line: int


class _File(NamedTuple):
    path: str
    name: str
    compression: str | None


class Source(ABC):
    """The rows of a job's input, by position. All methods block; readers of one source may be in several threads."""

    format: str
    total: int | None
    """Number of rows; None while nobody knows."""

    def __init__(
        self, files: Sequence[_File], identities: Sequence[FileIdentity], types: dict[str, pa.DataType]
    ) -> None:
        self._files = tuple(files)
        self.identities = tuple(identities)
        self.columns = tuple(types)
        self.types = types
        """How each column is kept. JSONL guesses it from the first rows of each file, and files may be appended later:
        a caller who goes on with an earlier run puts that run's types here."""
        self.places: dict[int, Place] = {}
        """Where rows at multiples of the stride start, as far as known. The caller may add what it knows."""

    @abstractmethod
    def batches(self, start: int, columns: Collection[str] | None = None, size: int = 256) -> Iterator[list[Row]]:
        """Rows from position `start` to the end, in order, in lists of 1 to `size`.

        Parquet rows hold the asked columns alone (None: all), JSONL rows every key of their line. Values are plain
        Python; nanoseconds are cut to microseconds, the finest that Python's own types hold.
        A row that cannot be read has a `problem`. Raises JobError when a file cannot be read on.
        """

    @abstractmethod
    def kept(self, start: int, stop: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Columns `names` of the positions [start, stop), typed as `schema(names)`, and `ALTERED` as the last column.

        Batches have at most 8,192 rows. A row that cannot be read is null.
        """

    def check(self) -> None:
        """Raise JobError when a file is no longer the one that was opened."""
        for file, known in zip(self._files, self.identities, strict=True):
            with _reading(file.name):
                now = os.stat(file.path)
            if (now.st_size, now.st_mtime_ns) != (known.size, known.mtime_ns):
                raise JobError(
                    f"{file.name} was changed while the run was reading it\nput it back, and run the same command again"
                )

    @abstractmethod
    def count(self, stopped: Callable[[], bool]) -> int | None:
        """Find `total`. None when `stopped()` came true on the way; it is asked about every 16 MiB."""

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """Arrow types that these columns are kept with. Raises JobError for a name that the input has not."""
        for name in names:
            if name not in self.types:
                _no_column(name, self.columns)
        return pa.schema([pa.field(name, self.types[name]) for name in names])

    def digest(self, file: int, stopped: Callable[[], bool]) -> str | None:
        """sha256 (hex) of a file's bytes as they are on disk; None when `stopped()` came true on the way."""
        digest = hashlib.sha256()
        with _reading(self._files[file].name), open(self._files[file].path, "rb", buffering=0) as stream:
            for index, block in enumerate(iter(lambda: stream.read(_BLOCK), b"")):
                if index * _BLOCK % _STOP_EVERY == 0 and stopped():
                    return None
                digest.update(block)
        return digest.hexdigest()


def open_source(paths: str | Sequence[str], base: Path, format: str | None, stride: int) -> Source:
    """The rows of files, folders and globs, relative to the folder `base`; `stride` is the distance of `places`.

    A folder stands for all its files of the format, sorted by path, those of its folders too; hidden names and names
    that start with `_` are left out, and links to folders are not followed. Raises JobError, one line, for everything
    that keeps the input from being read.
    """
    if format is not None and format not in _FORMATS:
        problem = "is not yet supported" if format in _LATER_FORMATS else "is unknown"
        raise JobError(f"input format {format!r} {problem}: {_KNOWN}")
    base = Path(os.path.abspath(base))
    asked = (paths,) if isinstance(paths, str) else paths
    found = [path for text in asked for path in _find(text, base, format)]
    if not found:
        raise JobError("input path names no file")
    formats: dict[str, str] = {}
    files = []
    for path in found:
        name = _name(path, base)
        suffix, compression = _suffix(path)
        kind = format or _SUFFIXES.get(suffix)
        if kind is None:
            if suffix in _LATER:
                raise JobError(f"input file {name}: format {_LATER[suffix]} is not yet supported; {_KNOWN}")
            raise JobError(f"input file {name}: its suffix names no format; {_KNOWN}; or set format under [input]")
        if kind == "parquet" and compression:
            raise JobError(f"input file {name}: a Parquet file is not compressed as a whole; unpack it")
        formats.setdefault(kind, name)
        files.append(_File(path, name, compression))
    if len(formats) > 1:
        raise JobError(f"input has mixed formats: {formats['parquet']} is Parquet, {formats['jsonl']} is JSONL")
    identities = [_identity(file) for file in files]
    return _Parquet(files, identities) if "parquet" in formats else _Jsonl(files, identities, stride)


def changed(before: Sequence[FileIdentity], after: Sequence[FileIdentity]) -> str | None:
    """What differs between the files of an earlier run and those of now, in one line.

    None when nothing does: the old files stand first, with equal names, sizes and samples. Files appended after them
    are welcome, and a new time of modification alone is no change.
    """
    for index, old in enumerate(before):
        new = after[index] if index < len(after) else None
        if new is None or new.name != old.name:
            gone = all(old.name != other.name for other in after)
            if new is None or (gone and any(new.name == other.name for other in before)):
                return f"{old.name} is missing"
            return f"file {index + 1} was {old.name}, is now {new.name}"
        if new.size != old.size:
            compared = "larger" if new.size > old.size else "smaller"
            return f"{old.name} is {compared}: {old.size} bytes before, {new.size} now"
        if new.sample != old.sample:
            return f"{old.name} has the same size but other content"
    return None


# Which files


def _find(text: str, base: Path, format: str | None) -> list[str]:
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise JobError(f"input path {text!r} is not yet supported: only local files")
    if not text:
        raise JobError("input path is empty")
    path = os.path.join(base, text)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return _in_folder(path, text, format)
    if os.path.exists(path):
        raise JobError(f"input path {text!r} is neither a file nor a folder")
    if not glob.has_magic(text):
        raise JobError(f"input file {text!r} does not exist in {base}")
    hits = (os.path.join(base, hit) for hit in glob.glob(text, root_dir=base, recursive=True))
    files = sorted((hit for hit in hits if os.path.isfile(hit)), key=lambda hit: Path(hit).parts)
    if not files:
        raise JobError(f"input path {text!r} matches no file in {base}")
    return files


def _in_folder(folder: str, text: str, format: str | None) -> list[str]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[str] = []
    with _reading(text):
        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if name[0] not in "._"]
            found += (os.path.join(parent, name) for name in files if name[0] not in "._")
    wanted = _FORMATS if format is None else (format,)
    hits = [path for path in found if _SUFFIXES.get(_suffix(path)[0]) in wanted and os.path.isfile(path)]
    if not hits:
        raise JobError(f"input folder {text!r} has no {' or '.join(wanted)} file; {_KNOWN}")
    return sorted(hits, key=lambda path: Path(path).parts)


def _suffix(path: str) -> tuple[str, str | None]:
    """The suffix that tells the format, and the compression around it."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        return os.path.splitext(stem)[1], _COMPRESSIONS[suffix]
    return suffix, None


def _name(path: str, base: Path) -> str:
    whole = Path(os.path.abspath(path))
    name = (whole.relative_to(base) if whole.is_relative_to(base) else whole).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise JobError(f"input file {name!a}: its name is not UTF-8; rename it") from None
    return name


def _identity(file: _File) -> FileIdentity:
    edge, between, pieces = 64 << 10, 4 << 10, 60
    with _reading(file.name), open(file.path, "rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise JobError(f"input file {file.name} is not a regular file")
        if size <= 2 * edge + pieces * between:
            blocks = [(0, size)]
        else:
            step = (size - 2 * edge - between) / (pieces - 1)
            blocks = [(edge + int(index * step), between) for index in range(pieces)]
            blocks = [(0, edge), *blocks, (size - edge, edge)]
        digest = hashlib.sha256()
        for offset, length in blocks:
            digest.update(os.pread(stream.fileno(), length, offset))
    return FileIdentity(file.name, size, status.st_mtime_ns, digest.hexdigest())


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What goes wrong with a file ends as one line that names it."""
    try:
        yield
    except (OSError, UnicodeError, pa.ArrowException) as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JobError(f"input file {name} cannot be read: {(detail.splitlines() or [''])[0]}") from error


def _no_column(name: str, columns: Sequence[str]) -> NoReturn:
    shown = ", ".join(columns[:30]) + (f" and {len(columns) - 30} more" if len(columns) > 30 else "")
    raise JobError(f"no column {name!r} in the input; columns are {shown or 'none'}")


# Parquet


class _Parquet(Source):
    format = "parquet"

    def __init__(self, files: Sequence[_File], identities: Sequence[FileIdentity]) -> None:
        types: dict[str, pa.DataType] = {}
        self._groups: list[list[int]] = []
        """Rows of each row group of each file."""
        for index, file in enumerate(files):
            with _reading(file.name), pq.ParquetFile(file.path) as opened:
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
            for first in range(start, stop, _KEPT_ROWS):
                yield pa.record_batch([pa.array([False] * min(_KEPT_ROWS, stop - first))], schema=schema)
            return
        for _, batch in self._slices(start, stop, names, _KEPT_ROWS):
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
            with _reading(file.name), pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20) as opened:
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
    return max(1, _BATCH_BYTES * rows // max(size, 1))


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


# JSONL


class _Jsonl(Source):
    format = "jsonl"

    def __init__(self, files: Sequence[_File], identities: Sequence[FileIdentity], stride: int) -> None:
        values: dict[str, list[object]] = {}
        for index, file in enumerate(files):
            rows, size = (_SAMPLE_ROWS_FURTHER, _BLOCK) if index else (_SAMPLE_ROWS, _SAMPLE_BYTES)
            for fields in _sample(file, rows, size):
                for name, value in fields.items():
                    values.setdefault(name, []).append(value)
        super().__init__(
            files, identities, {name: _guessed(seen) for name, seen in values.items() if not _SURROGATE.search(name)}
        )
        self.total = None
        self._stride = stride

    def batches(self, start: int, columns: Collection[str] | None = None, size: int = 256) -> Iterator[list[Row]]:
        decode = _DECODER.decode
        stride, places = self._stride, self.places
        position, place = self._before(start)
        rows: list[Row] = []
        for index in range(place.file, len(self._files)):
            file = self._files[index]
            mark, first = (place.byte, place.line) if index == place.file else (0, 1)
            for byte, line, texts in _lines(file, mark, first):
                if rows and byte - mark > _BATCH_BYTES:
                    yield rows
                    rows, mark = [], byte
                for offset, text in enumerate(texts):
                    if position >= start:
                        try:
                            fields = decode(text)
                        except (ValueError, RecursionError):
                            fields = None
                        if type(fields) is dict:
                            rows.append(Row(position, fields))
                        elif not text.strip():
                            continue
                        else:
                            rows.append(_second_look(position, text, file.name, line + offset))
                    elif not text.strip():
                        continue
                    if not position % stride:
                        places[position] = Place(index, byte + sum(map(len, texts[:offset])) + offset, line + offset)
                    position += 1
                    if len(rows) == size:
                        yield rows
                        rows, mark = [], byte
        if rows:
            yield rows

    def kept(self, start: int, stop: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        types = self.schema(names)
        schema = types.append(pa.field(ALTERED, pa.bool_()))
        if start >= stop:
            return
        for rows in self.batches(start, size=_KEPT_ROWS):
            del rows[stop - rows[0].position :]
            altered = [False] * len(rows)
            arrays = [_column([row.fields.get(field.name) for row in rows], field.type, altered) for field in types]
            yield pa.record_batch([*arrays, pa.array(altered, pa.bool_())], schema=schema)
            if rows[-1].position + 1 >= stop:
                return

    def count(self, stopped: Callable[[], bool]) -> int | None:
        total = 0
        for file in self._files:
            due = 0
            for byte, _, texts in _lines(file, 0, 1):
                if byte >= due:
                    due = byte + _STOP_EVERY
                    if stopped():
                        return None
                total += len(list(filter(bytes.strip, texts)))
        self.total = total
        return total

    def _before(self, start: int) -> tuple[int, Place]:
        """The greatest known position at or before `start`, and its place.

        Looked up one by one, because another thread may be learning places at the same time.
        """
        for position in range(start - start % self._stride, 0, -self._stride):
            if place := self.places.get(position):
                return position, place
        return 0, Place(0, 0, 1)


def _lines(file: _File, byte: int, line: int) -> Iterator[tuple[int, int, list[bytes]]]:
    """Lines of a file from `byte` on, where line `line` starts: (byte and number of the first, texts without \\n).

    Every block that is read gives at least one list, which may be empty. A line over 64 MiB is given as `_TOO_LONG`
    itself, unless it is blank; no more of it is held.
    """
    with _reading(file.name), pa.input_stream(file.path, compression=file.compression) as stream:
        if file.compression is None:
            stream.seek(byte)
        else:
            ahead = byte
            while ahead and (block := stream.read(min(ahead, _BLOCK))):
                ahead -= len(block)
        begin = here = byte  # where the line at hand and the block at hand begin
        parts: list[bytes] = []
        length, told = 0, False
        while block := stream.read(_BLOCK):
            if here == 0 and block.startswith(b"\xef\xbb\xbf"):
                block, here = block[3:], 3
            head, *pieces = block.split(b"\n")
            parts.append(head)
            length += len(head)
            if length > _LONGEST_LINE:
                if not told and any(map(bytes.strip, parts)):
                    yield begin, line, [_TOO_LONG]
                    told = True
                parts.clear()
            if pieces:
                if parts:
                    yield begin, line, [b"".join(parts)]
                tail = pieces.pop()
                yield here + len(head) + 1, line + 1, pieces
                line += len(pieces) + 1
                begin = here + len(block) - len(tail)
                parts, length, told = [tail], len(tail), False
            else:
                yield here, line, []
            here += len(block)
        if parts:
            yield begin, line, [b"".join(parts)]


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is out of range")
    return value


_DECODER = msgspec.json.Decoder()
# Takes lone surrogates, which are JSON and which msgspec refuses, and says better what is wrong.
_PATIENT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_JSON_KINDS = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def _second_look(position: int, text: bytes, file: str, line: int) -> Row:
    """The row of a line that msgspec did not read as an object."""
    if text is _TOO_LONG:
        problem = f"is longer than {_LONGEST_LINE >> 20} MiB"
    else:
        try:
            value = _PATIENT.decode(text.decode())
            if type(value) is dict:
                return Row(position, value)
            problem = f"is not a JSON object but {_JSON_KINDS.get(type(value), 'null')}"
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8: byte {error.start + 1} of the line"
        except json.JSONDecodeError as error:
            problem = f"is not JSON: {error.msg} at character {error.pos + 1}"
        except ValueError as error:
            problem = f"is not JSON: {error}"
        except RecursionError:
            problem = "is nested too deeply"
    return Row(position, {}, f"line {line} of {file} {problem}")


def _sample(file: _File, most_rows: int, most_bytes: int) -> Iterator[dict[str, object]]:
    rows = 0
    for byte, line, texts in _lines(file, 0, 1):
        for text in filter(bytes.strip, texts):
            if rows == most_rows:
                return
            try:
                fields = _DECODER.decode(text)
            except (ValueError, RecursionError):
                fields = _second_look(0, text, file.name, line).fields
            if type(fields) is dict:
                yield fields
            rows += 1
        if byte >= most_bytes and rows:
            return


# Types of JSON values

_SURROGATE = re.compile("[\ud800-\udfff]")
_EXACT = {
    pa.string(): {str, type(None)},
    pa.int64(): {int, type(None)},
    pa.float64(): {float, type(None)},
    pa.bool_(): {bool, type(None)},
}


def _guessed(values: Iterable[object], depth: int = 0) -> pa.DataType:
    """The type that holds these values; string, for JSON text, where no other does."""
    seen = [value for value in values if value is not None]
    kinds = set(map(type, seen))
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64() if all(map(_in_int64, seen)) else pa.string()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    if depth < _DEEPEST and kinds == {list}:
        return pa.list_(_guessed(chain.from_iterable(seen), depth + 1))  # type: ignore[arg-type]
    if depth < _DEEPEST and kinds == {dict}:
        fields: dict[str, list[object]] = {}
        for value in seen:
            for name, inner in value.items():  # type: ignore[attr-defined]
                fields.setdefault(name, []).append(inner)
        if 0 < len(fields) <= _MOST_FIELDS and not any(map(_SURROGATE.search, fields)):
            return pa.struct([pa.field(name, _guessed(inner, depth + 1)) for name, inner in fields.items()])
    return pa.string()


def _in_int64(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _column(values: list[object], kind: pa.DataType, altered: list[bool]) -> pa.Array:
    if set(map(type, values)) <= _EXACT.get(kind, set()):
        try:
            return pa.array(values, kind)
        except (UnicodeEncodeError, OverflowError):
            pass
    fitted = [_fitted(value, kind) for value in values]
    for index, (_, other) in enumerate(fitted):
        if other:
            altered[index] = True
    return pa.array([value for value, _ in fitted], kind)


def _fitted(value: object, kind: pa.DataType) -> tuple[object, bool]:
    """A JSON value as its column holds it, and whether that is another value."""
    if value is None:
        return None, False
    if pa.types.is_string(kind):
        if type(value) is not str:
            return _json_text(value)
        clean = _SURROGATE.sub("\ufffd", value)
        return clean, clean != value
    if pa.types.is_boolean(kind) and type(value) is bool:
        return value, False
    if pa.types.is_int64(kind):
        if type(value) is float and value.is_integer():
            value = int(value)
        if _in_int64(value):
            return value, False
    if pa.types.is_float64(kind) and type(value) in (int, float):
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            return None, True
        return number, number != value
    if pa.types.is_list(kind) and type(value) is list:
        items = [_fitted(item, kind.value_type) for item in value]
        return [item for item, _ in items], any(other for _, other in items)
    if pa.types.is_struct(kind) and type(value) is dict:
        names = [kind.field(index).name for index in range(kind.num_fields)]
        fields = {name: _fitted(value.get(name), kind.field(name).type) for name in names}
        other = any(other for _, other in fields.values()) or not value.keys() <= fields.keys()
        return {name: inner for name, (inner, _) in fields.items()}, other
    return None, True


def _json_text(value: object) -> tuple[object, bool]:
    try:
        try:
            return msgspec.json.encode(value).decode(), False
        except UnicodeEncodeError:
            return json.dumps(value), False  # escapes lone surrogates
    except (RecursionError, ValueError, OverflowError):
        return None, True
