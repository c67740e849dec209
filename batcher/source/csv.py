"""CSV and TSV files (RFC 4180) -> rows and columns: every column is text."""

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from batcher.errors import JobError
from batcher.source.base import same_columns
from batcher.source.files import File, FileIdentity, ending
from batcher.source.lines import LONGEST, TOO_LONG, Streams, lines
from batcher.source.text import TextSource


def _solid(text: bytes) -> bytes:
    return text.rstrip(b"\r")


class Csv(TextSource):
    """Files with a header each. A cell in quotes may hold delimiters and line breaks."""

    format = "csv"
    _solid = staticmethod(_solid)

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity], stride: int) -> None:
        self._marks = ["\t" if ending(file.path)[0] == ".tsv" else "," for file in files]
        self._headers = [_header(file, mark) for file, mark in zip(files, self._marks, strict=True)]
        types = dict.fromkeys(self._headers[0], pa.string())
        for file, header in zip(files, self._headers, strict=True):
            same_columns(types, dict.fromkeys(header, pa.string()), files[0].name, file.name)
        super().__init__(files, identities, types, stride)

    def _records(self, index: int, byte: int, line: int) -> Iterator[tuple[int, int, list[bytes]]]:
        found = _records(self._files[index], self._marks[index].encode(), byte, line, self._streams)
        return found if byte else self._after_header(found)

    def _after_header(self, records: Iterator[tuple[int, int, list[bytes]]]) -> Iterator[tuple[int, int, list[bytes]]]:
        for byte, line, texts in records:
            for offset, text in enumerate(texts, 1):
                if _solid(text):
                    yield byte + sum(map(len, texts[:offset])) + offset, line + offset, texts[offset:]
                    yield from records
                    return
            yield byte, line, []

    def _decoder(self, index: int) -> Callable[[bytes], dict[str, object]]:
        names, mark = self._headers[index], self._marks[index]
        width = len(names)

        def decode(text: bytes) -> dict[str, object]:
            cells = _cells(text, mark)
            if len(cells) != width or text is TOO_LONG or not _solid(text):
                raise ValueError(f"has {len(cells)} {'cell' if len(cells) == 1 else 'cells'}, the header {width}")
            return dict(zip(names, cells, strict=True))

        return decode

    def _second_look(self, index: int, text: bytes) -> dict[str, object] | str:
        try:
            return self._decoder(index)(text)
        except UnicodeDecodeError as error:
            return f"is not UTF-8: byte {error.start + 1} of the row"
        except ValueError as error:
            return str(error)


def _header(file: File, mark: str) -> list[str]:
    """The names of a file's columns. Raises JobError where there are none, or not one of each."""
    for _, line, texts in _records(file, mark.encode(), 0, 1, Streams()):
        for offset, text in enumerate(texts):
            if not _solid(text):
                continue
            where = f"input file {file.name}: its header, line {line + offset},"
            if text is TOO_LONG:
                raise JobError(f"{where} is longer than {LONGEST >> 20} MiB")
            try:
                names = _cells(text, mark)
            except UnicodeDecodeError:
                raise JobError(f"{where} is not UTF-8") from None
            except ValueError as error:
                raise JobError(f"{where} {error}") from None
            if "" in names:
                raise JobError(f"{where} has no name for column {names.index('') + 1}")
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise JobError(f"{where} names two columns {twice!r:.60}")
            return names
    raise JobError(f"input file {file.name} has no header: the first line of a CSV file names its columns")


def _records(file: File, mark: bytes, byte: int, line: int, streams: Streams) -> Iterator[tuple[int, int, list[bytes]]]:
    """Records of a file from the start of one on, as `lines` gives lines; one of several lines stands alone.

    One that is longer than a line may be is given as `TOO_LONG`; no more of it is held.
    """
    parts: list[bytes] = []
    length = 0
    begun, first = byte, line
    for at, number, texts in lines(file, byte, line, streams):
        if not parts and not any(b'"' in text for text in texts):
            yield at, number, texts
            continue
        yield at, number, []  # there may be no end of a record in many blocks, and whoever counts is to be asked
        single: list[bytes] = []  # whole records since `here`
        here = (at, number)
        for text in texts:
            if parts:
                parts.append(text)
                length += len(text) + 1
                if text is not TOO_LONG and _within(text, True, mark):
                    if length > LONGEST:
                        parts[:] = [TOO_LONG]
                else:
                    long = length > LONGEST or text is TOO_LONG
                    yield begun, first, [TOO_LONG if long else b"\n".join(parts)]
                    parts.clear()
                    here = (at + len(text) + 1, number + 1)
            elif b'"' in text and text is not TOO_LONG and _within(text, False, mark):
                yield *here, single
                single = []
                parts, length = [text], len(text)
                begun, first = at, number
            else:
                single.append(text)
            at += len(text) + 1
            number += 1
        if single:
            yield *here, single
    if parts:
        yield begun, first, [TOO_LONG if length > LONGEST else b"\n".join(parts)]


def _within(text: bytes, inside: bool, mark: bytes) -> bool:
    """Whether a line ends within a quoted cell, when it begins within one or not."""
    at = 0
    if not inside and text.startswith(b'"'):
        inside, at = True, 1
    while True:
        if inside:
            at = text.find(b'"', at) + 1
            if not at:
                return True
            if text.startswith(b'"', at):
                at += 1
                continue
        at = text.find(mark + b'"', at)
        if at < 0:
            return False
        inside, at = True, at + 2


def _cells(text: bytes, mark: str) -> list[str]:
    """The cells of a record. Raises ValueError that says what is wrong with it."""
    record = text.decode()
    if record.endswith("\r"):
        record = record[:-1]
    if '"' not in record:
        return record.split(mark)
    cells: list[str] = []
    at = 0
    while True:
        if record.startswith('"', at):
            end = record.find('"', at + 1)
            while end >= 0 and record.startswith('"', end + 1):
                end = record.find('"', end + 2)
            if end < 0:
                raise ValueError(f"has a quote that is never closed, at character {at + 1}")
            cells.append(record[at + 1 : end].replace('""', '"'))
            at = end + 1
            if at < len(record) and not record.startswith(mark, at):
                raise ValueError(f"has text after a closing quote, at character {at + 1}")
        else:
            end = record.find(mark, at)
            cells.append(record[at:] if end < 0 else record[at:end])
            at = len(record) if end < 0 else end
        if at >= len(record):
            return cells
        at += 1
