"""Arrow IPC files and streams (Feather) -> rows and columns."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import pyarrow as pa

from batcher.source.base import same_columns
from batcher.source.columnar import ColumnarSource, columns_of, rows_within
from batcher.source.files import File, FileIdentity
from batcher.store import reading


class Arrow(ColumnarSource):
    """Arrow files and streams of one schema. Local files are mapped into memory, not read."""

    format = "arrow"
    _built = False

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity]) -> None:
        types: dict[str, pa.DataType] = {}
        self._schemas: list[pa.Schema] = []
        self._batches: list[list[int]] = []
        """Rows of each record batch of each file."""
        for index, file in enumerate(files):
            with _opened(file) as stream, _reader(stream, None) as reader:
                schema = reader.schema
            found = columns_of(schema, f"input file {file.name}")
            types = same_columns(types, found, files[0].name, file.name) if index else found
            # The shortest way to a batch's length is one narrow column of it.
            narrow = min(range(len(schema)), key=lambda at: _width(schema.types[at]), default=None)
            with _opened(file) as stream, _reader(stream, narrow if narrow is None else [narrow]) as reader:
                self._batches.append([len(batch) for _, batch in _read(reader, 0)])
            self._schemas.append(schema)
        super().__init__(files, identities, types)
        starts = list(accumulate(map(sum, self._batches), initial=0))
        self._starts = starts[:-1]
        """Position of each file's first row."""
        self.total = starts[-1]

    def _slices(self, start: int, stop: int, names: Sequence[str], most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        for index, (file, first, sizes) in enumerate(zip(self._files, self._starts, self._batches, strict=True)):
            ends = list(accumulate(sizes, initial=first))
            if ends[-1] <= start or first >= stop:
                continue
            wanted = sorted(self._schemas[index].get_field_index(name) for name in names)
            skipped = max(0, bisect_right(ends, start) - 1)
            with _opened(file) as stream, _reader(stream, wanted) as reader:
                for number, batch in _read(reader, skipped):
                    position = ends[number]
                    if position >= stop:
                        break
                    low, high = max(start - position, 0), min(stop - position, len(batch))
                    size = min(most, rows_within(batch.nbytes, len(batch)))
                    for at in range(low, high, size):
                        yield position + at, batch.slice(at, min(size, high - at))

    def _origin(self, position: int) -> str:
        file = bisect_right(self._starts, position) - 1
        return f"row {position - self._starts[file] + 1} of {self._files[file].name}"


@contextmanager
def _opened(file: File) -> Iterator[pa.NativeFile]:
    with reading(file.name):
        opened = file.system.open_input_file(file.path) if file.remote else pa.memory_map(file.path)
        with opened as stream:
            yield stream


def _reader(stream: pa.NativeFile, columns: list[int] | None) -> pa.RecordBatchReader | pa.RecordBatchFileReader:
    """A reader of these columns, whichever form the file has."""
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    magic = stream.read(6)
    stream.seek(0)
    if magic[:4] == b"FEA1":
        raise pa.ArrowInvalid("this is Feather version 1; write it again with pyarrow.feather.write_feather")
    return (pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream)(stream, options=options)


def _read(reader: pa.RecordBatchReader | pa.RecordBatchFileReader, first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Record batches from number `first` on. Raises pa.ArrowInvalid for one that would lead Arrow astray."""
    if isinstance(reader, pa.RecordBatchFileReader):
        found = ((number, reader.get_batch(number)) for number in range(first, reader.num_record_batches))
    else:
        found = ((number, batch) for number, batch in enumerate(reader) if number >= first)
    for number, batch in found:
        batch.validate()
        yield number, batch


def _width(kind: pa.DataType) -> int:
    try:
        width: int = kind.bit_width
    except ValueError:
        return 1 << 30
    return width
