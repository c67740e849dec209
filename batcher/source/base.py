"""What every source is: rows by position, and the same rows' columns as Arrow."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, NoReturn

import pyarrow as pa

from batcher.errors import JobError
from batcher.records import Row
from batcher.source.files import File, FileIdentity
from batcher.store import reading

ALTERED = "__altered"
"""The last column of `Source.kept`: true where a row's kept values are not exactly those of the input, null where the
row cannot be read."""

BLOCK = 1 << 19
STOP_EVERY = 16 << 20
BATCH_BYTES = 4 << 20
KEPT_ROWS = 8192


class Place(NamedTuple):
    """Where a row starts in a text file: file index, byte (decompressed) and number of its line (from 1)."""

    file: int
    byte: int
    line: int


class Source(ABC):
    """The rows of a job's input, by position. All methods block; readers of one source may be in several threads."""

    format: str
    total: int | None
    """Number of rows; None while nobody knows."""

    def __init__(
        self, files: Sequence[File], identities: Sequence[FileIdentity], types: dict[str, pa.DataType]
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

        Rows of columnar inputs hold the asked columns alone (None: all), those of text files all that is in their
        line. Values are plain Python; nanoseconds are cut to microseconds, the finest that Python's own types hold.
        A row that cannot be read has a `problem`. Raises JobError when a file cannot be read on.
        """

    @abstractmethod
    def kept(self, start: int, stop: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Columns `names` of the positions [start, stop), typed as `schema(names)`, and `ALTERED` as the last column.

        Batches have at most 8,192 rows. A row that cannot be read is null.
        """

    @abstractmethod
    def count(self, stopped: Callable[[], bool]) -> int | None:
        """Find `total`. None when `stopped()` came true on the way; it is asked about every 16 MiB."""

    def locate(self, position: int) -> str:
        """Where a row is to be found, for people."""
        return f"row {position}, counted from 0"

    def check(self) -> None:
        """Raise JobError when a file is no longer the one that was opened."""
        for file, known in zip(self._files, self.identities, strict=True):
            with reading(file.name):
                now = file.system.get_file_info(file.path)
            if (now.size, now.mtime_ns or 0) != (known.size, known.mtime_ns):
                raise JobError(
                    f"{file.name} was changed while the run was reading it\nput it back, and run the same command again"
                )

    def schema(self, names: Sequence[str]) -> pa.Schema:
        """Arrow types that these columns are kept with. Raises JobError for a name that the input has not."""
        for name in names:
            if name not in self.types:
                no_column(name, self.columns)
        return pa.schema([pa.field(name, self.types[name]) for name in names])

    def digest(self, file: int, stopped: Callable[[], bool]) -> str | None:
        """sha256 (hex) of a file's bytes as they are on disk; None when `stopped()` came true on the way.

        Empty for an object: reading it once more, whole, would cost more than it tells.
        """
        if self._files[file].remote:
            return ""
        digest = hashlib.sha256()
        with reading(self._files[file].name), open(self._files[file].path, "rb", buffering=0) as stream:
            for index, block in enumerate(iter(lambda: stream.read(BLOCK), b"")):
                if index * BLOCK % STOP_EVERY == 0 and stopped():
                    return None
                digest.update(block)
        return digest.hexdigest()


def no_column(name: str, columns: Sequence[str]) -> NoReturn:
    """Say that the input has no such column, and which it has."""
    shown = ", ".join(columns[:30]) + (f" and {len(columns) - 30} more" if len(columns) > 30 else "")
    raise JobError(f"no column {name!r} in the input; columns are {shown or 'none'}")


def same_columns(
    expected: dict[str, pa.DataType], found: dict[str, pa.DataType], first: str, other: str
) -> dict[str, pa.DataType]:
    """The columns of both. Raises JobError where two files of one job differ in a column or its type.

    A file in which a column has nothing but nulls, and so no type, may lie beside one in which it has.
    """
    types = dict(expected)
    for name in [*expected, *found]:
        one, two = expected.get(name), found.get(name)
        if one == pa.null() and two is not None:
            types[name] = two
        elif one != two and not (one is not None and two == pa.null()):
            what = (
                f"has no column {name!r}, which {first} has"
                if two is None
                else f"has a column {name!r}, which {first} has not"
                if one is None
                else f"has column {name!r} as {two}, {first} as {one}"
            )
            raise JobError(f"input files have different schemas: {other} {what}")
    return types
