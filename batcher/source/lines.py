"""The lines of a text file, counted, from any place on."""

from collections.abc import Iterator

import pyarrow as pa

from batcher.source.base import BLOCK
from batcher.source.files import File
from batcher.store import reading

LONGEST_LINE = 64 << 20
TOO_LONG = b"(a line that is too long to be held)"


def lines(file: File, byte: int, line: int) -> Iterator[tuple[int, int, list[bytes]]]:
    """Lines of a file from `byte` on, where line `line` starts: (byte and number of the first, texts without \\n).

    Every block that is read gives at least one list, which may be empty. A line over 64 MiB is given as `TOO_LONG`
    itself, unless it is blank; no more of it is held.
    """
    with reading(file.name), pa.input_stream(file.path, compression=file.compression) as stream:
        if file.compression is None:
            stream.seek(byte)
        else:
            ahead = byte
            while ahead and (block := stream.read(min(ahead, BLOCK))):
                ahead -= len(block)
        begin = here = byte  # where the line at hand and the block at hand begin
        parts: list[bytes] = []
        length, told = 0, False
        while block := stream.read(BLOCK):
            if here == 0 and block.startswith(b"\xef\xbb\xbf"):
                block, here = block[3:], 3
            head, *pieces = block.split(b"\n")
            parts.append(head)
            length += len(head)
            if length > LONGEST_LINE:
                if not told and any(map(bytes.strip, parts)):
                    yield begin, line, [TOO_LONG]
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
