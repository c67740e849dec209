"""Parquet files -> rows and columns."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from batcher.source.base import same_columns
from batcher.source.columnar import ColumnarSource, columns_of, rows_within
from batcher.source.files import File, FileIdentity
from batcher.store import reading


class Parquet(ColumnarSource):
    """Parquet files of one schema."""

    format = "parquet"

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity]) -> None:
        types: dict[str, pa.DataType] = {}
        self._groups: list[list[int]] = []
        """Rows of each row group of each file."""
        for index, file in enumerate(files):
            with _opened(file) as opened:
                metadata = opened.metadata
                self._groups.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
                found = columns_of(opened.schema_arrow, f"input file {file.name}")
            types = same_columns(types, found, files[0].name, file.name) if index else found
        super().__init__(files, identities, types)
        starts = list(accumulate(map(sum, self._groups), initial=0))
        self._starts = starts[:-1]
        """Position of each file's first row."""
        self.total = starts[-1]

    def _slices(self, start: int, stop: int, names: Sequence[str], most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        for file, first, groups in zip(self._files, self._starts, self._groups, strict=True):
            ends = list(accumulate(groups, initial=first))
            if ends[-1] <= start or first >= stop:
                continue
            with _opened(file) as opened:
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

    def _origin(self, position: int) -> str:
        file = bisect_right(self._starts, position) - 1
        return f"row {position - self._starts[file] + 1} of {self._files[file].name}"


@contextmanager
def _opened(file: File) -> Iterator[pq.ParquetFile]:
    # With a buffer size Arrow streams a column's pages; without, it loads the row group's column whole. Of an object
    # it asks for a row group's columns at once: a request per page would take hours.
    buffer = 0 if file.remote else 1 << 20
    with reading(file.name), file.system.open_input_file(file.path) as stream:
        with pq.ParquetFile(stream, pre_buffer=file.remote, buffer_size=buffer) as opened:
            yield opened


def _rows_within(group: pq.RowGroupMetaData, names: Collection[str]) -> int:
    """How many rows of a row group's columns make up a batch of bounded bytes."""
    roots = tuple(f"{name}." for name in names)
    columns = (group.column(index) for index in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in columns if f"{part.path_in_schema}.".startswith(roots))
    return rows_within(size, group.num_rows)
