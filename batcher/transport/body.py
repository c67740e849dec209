"""The body of an answer as it is read: never more of it in memory than was agreed, packed or not, streamed or not."""

import asyncio
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from batcher.dialects.stream import Assembler, StreamTooLargeError
from batcher.records import Kind
from batcher.transport.client import Incoming, LostError

_REFUSAL_BYTES: Final = 1 << 16
"""As much of a refusal as is worth reading."""
_AFTERWARDS: Final = 1.0
"""Seconds that a connection may take to end an answer that is whole, or it is not kept."""
_WORDINESS: Final = 64
"""Times that a stream may be longer than the answer in it: events of one token say everything else again."""
_PIECE: Final = 1 << 18


async def whole(incoming: Incoming, max_wire_bytes: int, max_body_bytes: int) -> bytes:
    """The body of an answer, unpacked."""
    length = incoming.header("Content-Length")
    if length.isascii() and length.isdigit() and len(length) < 20:
        if int(length) > max_wire_bytes:
            raise _too_large(max_wire_bytes)
        body = await incoming.whole()
    else:
        body = await _read(incoming, max_wire_bytes)
        if len(body) > max_wire_bytes:
            raise _too_large(max_wire_bytes)
    encoding = incoming.header("Content-Encoding")
    return _unpacked(body, encoding, max_body_bytes) if encoding else body


async def start(incoming: Incoming) -> bytes:
    """The body of a refusal as far as it came and is worth reading: its status says the most."""
    body = b""
    try:
        body = (await _read(incoming, _REFUSAL_BYTES))[:_REFUSAL_BYTES]
        encoding = incoming.header("Content-Encoding")
        return _unpacked(body, encoding, _REFUSAL_BYTES) if encoding else body
    except LostError:
        return b""


class Events:
    """A streamed answer as it is read, with the moments (of `time.perf_counter`) that matter: begun, and whole."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.ended: float | None = None

    async def read(self, incoming: Incoming, most: int, silence: float) -> bytes:
        """The answer as it comes without streaming, never more than `most` bytes of it in memory."""
        now = asyncio.get_running_loop().time
        events, unpacked = Assembler(most), _unpacking(incoming.header("Content-Encoding"))
        came, renewed = 0, 0.0
        try:
            async with asyncio.timeout(None) as patience:
                while not events.ended and (piece := await incoming.piece()):
                    for plain in unpacked(piece):
                        came += len(plain)
                        if came > most * _WORDINESS:
                            raise _too_large(most)
                        events.feed(plain)
                    if events.begun:
                        if self.begun is None:
                            self.begun = time.perf_counter()
                        if (moment := now()) >= renewed + 1.0:  # a timer for every token would cost too much
                            renewed = moment
                            patience.reschedule(moment + silence)
            answer = events.finish()
        except TimeoutError:
            if patience.expired():
                raise LostError(Kind.TIMEOUT, f"the answer stood still for {silence:g} s") from None
            raise
        except StreamTooLargeError:
            raise _too_large(most) from None
        self.ended = time.perf_counter()
        if events.ended:
            await _end(incoming)
        elif not events.complete and not _delimited(incoming):
            raise LostError(Kind.DISCONNECTED)
        return answer


async def _read(incoming: Incoming, most: int) -> bytes:
    """The body, or its start when it is longer than `most` bytes."""
    pieces, size = [], 0
    while size <= most and (piece := await incoming.piece()):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


async def _end(incoming: Incoming) -> None:
    """Read what little follows an answer that is whole, so that its connection can be kept."""
    try:
        async with asyncio.timeout(_AFTERWARDS):
            await _read(incoming, _REFUSAL_BYTES)
    except (LostError, TimeoutError):
        pass


def _delimited(incoming: Incoming) -> bool:
    """Whether HTTP says where the body ends; else a broken connection looks like an end."""
    return bool(incoming.header("Content-Length")) or "chunked" in incoming.header("Transfer-Encoding").lower()


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The body without its content encoding, never more than `most` bytes of it in memory."""
    unpacker = _unpacker(encoding)
    if unpacker is None:
        return body
    try:
        unpacked = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise _not_unpacked(error) from None
    if len(unpacked) > most:
        raise _too_large(most)
    if not unpacker.eof or unpacker.unused_data:
        raise _not_unpacked("its length is wrong")
    return unpacked


def _unpacking(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """What takes the content encoding off a body as it comes, a little of it in memory at a time."""
    unpacker = _unpacker(encoding)
    if unpacker is None:
        return lambda piece: iter((piece,))

    def unpacked(piece: bytes) -> Iterator[bytes]:
        while piece:
            try:
                plain = unpacker.decompress(piece, _PIECE)
            except zlib.error as error:
                raise _not_unpacked(error) from None
            piece = unpacker.unconsumed_tail
            yield plain

    return unpacked


def _unpacker(encoding: str) -> "zlib._Decompress | None":
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name not in ("gzip", "x-gzip", "deflate"):
        raise LostError(Kind.MALFORMED_RESPONSE, f"the answer is packed as {name}, which was not asked for")
    return zlib.decompressobj(zlib.MAX_WBITS | 32)


def _not_unpacked(why: object) -> LostError:
    return LostError(Kind.MALFORMED_RESPONSE, f"the answer cannot be unpacked: {why}")


def _too_large(most: int) -> LostError:
    return LostError(Kind.RESPONSE_TOO_LARGE, f"the answer is longer than {most:,} bytes")
