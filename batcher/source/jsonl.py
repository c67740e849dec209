"""JSONL files -> rows and columns."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NoReturn

import msgspec
import pyarrow as pa

from batcher.records import Row
from batcher.source.base import ALTERED, BATCH_BYTES, BLOCK, KEPT_ROWS, STOP_EVERY, Place, Source
from batcher.source.files import File, FileIdentity
from batcher.source.lines import LONGEST_LINE, TOO_LONG, lines
from batcher.source.values import SURROGATE, column, guessed

_SAMPLE_ROWS, _SAMPLE_BYTES = 10_000, 8 << 20
_SAMPLE_ROWS_FURTHER = 100


class Jsonl(Source):
    """Files with one JSON object per line."""

    format = "jsonl"

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity], stride: int) -> None:
        values: dict[str, list[object]] = {}
        for index, file in enumerate(files):
            rows, size = (_SAMPLE_ROWS_FURTHER, BLOCK) if index else (_SAMPLE_ROWS, _SAMPLE_BYTES)
            for fields in _sample(file, rows, size):
                for name, value in fields.items():
                    values.setdefault(name, []).append(value)
        super().__init__(
            files, identities, {name: guessed(seen) for name, seen in values.items() if not SURROGATE.search(name)}
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
            for byte, line, texts in lines(file, mark, first):
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
        for rows in self.batches(start, size=KEPT_ROWS):
            del rows[stop - rows[0].position :]
            altered = [False] * len(rows)
            arrays = [column([row.fields.get(field.name) for row in rows], field.type, altered) for field in types]
            yield pa.record_batch([*arrays, pa.array(altered, pa.bool_())], schema=schema)
            if rows[-1].position + 1 >= stop:
                return

    def count(self, stopped: Callable[[], bool]) -> int | None:
        total = 0
        for file in self._files:
            due = 0
            for byte, _, texts in lines(file, 0, 1):
                if byte >= due:
                    due = byte + STOP_EVERY
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
    if text is TOO_LONG:
        problem = f"is longer than {LONGEST_LINE >> 20} MiB"
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


def _sample(file: File, most_rows: int, most_bytes: int) -> Iterator[dict[str, object]]:
    rows = 0
    for byte, line, texts in lines(file, 0, 1):
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
