"""The lines of a text file, counted, from any place on."""

from collections.abc import Iterator
from threading import Lock
from typing import NamedTuple

import pyarrow as pa

from batcher.source.base import BLOCK
from batcher.source.files import File
from batcher.store import reading

LONGEST = 64 << 20
TOO_LONG = b"(a line that is too long to be held)"
_AHEAD = 8 << 20
"""Bytes of an object that one request asks for."""
_PARKED = 4


class _Parked(NamedTuple):
    path: str
    byte: int
    block: bytes
    """What is read of the file from `byte` on."""
    stream: pa.NativeFile


class Streams:
    """Compressed files that stand open where their readers left them: the next range goes on from there.

    A compressed file can only be read forwards, and reaching a place in it means to unpack all that is before.
    """

    def __init__(self) -> None:
        self._parked: list[_Parked] = []
        self._lock = Lock()

    def open(self, file: File, byte: int) -> tuple[pa.NativeFile, bytes]:
        """A stream of a file's bytes, and the first of those from `byte` on, which are read already."""
        if file.compression is None:
            stream = file.system.open_input_file(file.path)
            stream.seek(byte)
            return (pa.BufferedInputStream(stream, _AHEAD) if file.remote else stream), b""
        with self._lock:
            near = [parked for parked in self._parked if parked.path == file.path and parked.byte <= byte]
            best = max(near, key=lambda parked: parked.byte, default=None)
            if best is not None:
                self._parked.remove(best)
        if best is None:
            opened = file.system.open_input_stream(
                file.path, compression=file.compression, buffer_size=_AHEAD if file.remote else BLOCK
            )
            best = _Parked(file.path, 0, b"", opened)
        ahead, block = byte - best.byte, best.block
        while ahead > len(block):
            ahead -= len(block)
            if not (block := best.stream.read(BLOCK)):
                break
        return best.stream, block[ahead:]

    def leave(self, file: File, byte: int, block: bytes, stream: pa.NativeFile) -> None:
        """Give a stream back that read `block` last, which starts at `byte`."""
        if file.compression is None:
            stream.close()
            return
        with self._lock:
            self._parked.append(_Parked(file.path, byte, block, stream))
            old = self._parked[:-_PARKED]
            del self._parked[:-_PARKED]
        for parked in old:
            parked.stream.close()


def lines(file: File, byte: int, line: int, streams: Streams) -> Iterator[tuple[int, int, list[bytes]]]:
    """Lines of a file from `byte` on, where line `line` starts: (byte and number of the first, texts without \\n).

    Every block that is read gives at least one list, which may be empty. A line over 64 MiB is given as `TOO_LONG`
    itself, unless it is blank; no more of it is held.
    """
    with reading(file.name):
        stream, block = streams.open(file, byte)
        left = False
        begin = here = byte  # where the line at hand and the block at hand begin
        parts: list[bytes] = []
        length, told = 0, False
        try:
            while block := block or stream.read(BLOCK):
                if here == 0 and block.startswith(b"\xef\xbb\xbf"):
                    block, here = block[3:], 3
                head, *pieces = block.split(b"\n")
                parts.append(head)
                length += len(head)
                if length > LONGEST:
                    if not told and any(map(bytes.strip, parts)):
                        yield begin, line, [TOO_LONG]
                        told = True
                    parts.clear()
                if pieces:
                    if parts:
                        yield begin, line, [b"".join(parts)]
                    parts.clear()
                    tail = pieces.pop()
                    yield here + len(head) + 1, line + 1, pieces
                    line += len(pieces) + 1
                    begin = here + len(block) - len(tail)
                    parts, length, told = [tail], len(tail), False
                else:
                    yield here, line, []
                here += len(block)
                block = b""
            if parts:
                yield begin, line, [b"".join(parts)]
        except GeneratorExit:
            left = True
            before = b"".join(parts[:-1])  # of a line that began before this block
            streams.leave(file, here - len(before), before + block, stream)
            raise
        finally:
            if not left:
                stream.close()
