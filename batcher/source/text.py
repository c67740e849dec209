"""Text files -> rows and columns: what the formats of one record per line have in common."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence

import pyarrow as pa

from batcher.records import Row
from batcher.source.base import ALTERED, BATCH_BYTES, KEPT_ROWS, STOP_EVERY, Place, Source
from batcher.source.files import File, FileIdentity
from batcher.source.lines import LONGEST, TOO_LONG, Streams, lines
from batcher.source.values import column

_NO_END = 1 << 62


class TextSource(Source):
    """Files of records, each a line or, where its format allows that, several."""

    def __init__(
        self, files: Sequence[File], identities: Sequence[FileIdentity], types: dict[str, pa.DataType], stride: int
    ) -> None:
        super().__init__(files, identities, types)
        self.total = None
        self._stride = stride
        self._streams = Streams()

    @abstractmethod
    def _decoder(self, index: int) -> Callable[[bytes], object]:
        """What makes a record of this file a dict of fields; it raises ValueError, or gives no dict, where it cannot.

        A record that is no row (`_solid`) is never a dict.
        """

    @abstractmethod
    def _second_look(self, index: int, text: bytes) -> dict[str, object] | str:
        """The fields of a record that `_decoder` did not read, or what is wrong with it, as "is not JSON"."""

    _solid: Callable[[bytes], bytes] = staticmethod(bytes.strip)
    """Gives nothing for a record that is no row: a blank line."""

    def _records(self, index: int, byte: int, line: int) -> Iterator[tuple[int, int, list[bytes]]]:
        """Records of a file from a place on, as `lines` gives lines; one of several lines stands alone in its list."""
        return lines(self._files[index], byte, line, self._streams)

    def batches(self, start: int, columns: Collection[str] | None = None, size: int = 256) -> Iterator[list[Row]]:
        return self._rows(start, _NO_END, size)

    def _rows(self, start: int, stop: int, size: int) -> Iterator[list[Row]]:
        """As `batches`; ends before `stop` where that is a multiple of the stride."""
        stride, places, solid = self._stride, self.places, self._solid
        position, place = self._before(start)
        rows: list[Row] = []
        for index in range(place.file, len(self._files)):
            decode = self._decoder(index)
            mark, first = (place.byte, place.line) if index == place.file else (0, 1)
            for byte, line, texts in self._records(index, mark, first):
                if rows and byte - mark > BATCH_BYTES:
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
                        elif not solid(text):
                            continue
                        else:
                            rows.append(self._problem(position, index, text, line + offset))
                    elif not solid(text):
                        continue
                    if not position % stride:
                        places[position] = Place(index, byte + sum(map(len, texts[:offset])) + offset, line + offset)
                        if position == stop:
                            if len(rows) > 1:
                                yield rows[:-1]
                            return
                    position += 1
                    if len(rows) == size:
                        yield rows
                        rows, mark = [], byte
        if rows:
            yield rows

    def _problem(self, position: int, index: int, text: bytes, line: int) -> Row:
        found = f"is longer than {LONGEST >> 20} MiB" if text is TOO_LONG else self._second_look(index, text)
        if isinstance(found, dict):
            return Row(position, found)
        return Row(position, {}, f"line {line} of {self._files[index].name} {found}")

    def kept(self, start: int, stop: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        types = self.schema(names)
        schema = types.append(pa.field(ALTERED, pa.bool_()))
        if start >= stop:
            return
        for rows in self._rows(start, stop, KEPT_ROWS):
            del rows[stop - rows[0].position :]
            altered = [None if row.problem else False for row in rows]
            arrays = [column([row.fields.get(field.name) for row in rows], field.type, altered) for field in types]
            yield pa.record_batch([*arrays, pa.array(altered, pa.bool_())], schema=schema)
            if rows[-1].position + 1 >= stop and stop % self._stride:
                return

    def locate(self, position: int) -> str:
        at, place = self._before(position)
        for index in range(place.file, len(self._files)):
            byte, start = (place.byte, place.line) if index == place.file else (0, 1)
            for _, line, texts in self._records(index, byte, start):
                for offset, text in enumerate(texts):
                    if not self._solid(text):
                        continue
                    if at == position:
                        return f"line {line + offset} of {self._files[index].name}"
                    at += 1
        return super().locate(position)

    def count(self, stopped: Callable[[], bool]) -> int | None:
        total = 0
        for index in range(len(self._files)):
            due = 0
            for byte, _, texts in self._records(index, 0, 1):
                if byte >= due:
                    due = byte + STOP_EVERY
                    if stopped():
                        return None
                total += len(list(filter(self._solid, texts)))
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
