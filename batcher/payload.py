"""A request's body as it travels: JSON or msgpack, gzipped or not."""

import zlib
from collections.abc import Mapping
from typing import Final

import msgspec

CONTENT_TYPES: Final[Mapping[str, str]] = {"json": "application/json", "msgpack": "application/vnd.msgpack"}
"""By `service.encoding`."""

GZIPPED_FROM: Final = 2048
"""Bytes: a smaller body fits into a packet or two anyway, and a byte less costs four times as much CPU."""
ASIDE_FROM: Final = 64 << 10
"""Bytes of JSON: from here on packing takes longer than handing it to a thread."""

_LEVEL: Final = 1
_GZIP: Final = zlib.MAX_WBITS | 16


def pack(body: bytes, encoding: str, compression: str) -> tuple[bytes, bool]:
    """A JSON body as it is sent, and whether it was gzipped. ValueError or OverflowError for what msgpack cannot hold.

    Numbers stay what they are, whole or not. msgpack knows whole numbers of 64 bits and no larger ones.
    """
    if encoding == "msgpack":
        body = msgspec.msgpack.encode(msgspec.json.decode(body))
    if compression == "none" or len(body) < GZIPPED_FROM:
        return body, False
    return gzipped(body), True


def gzipped(body: bytes) -> bytes:
    """A body as `Content-Encoding: gzip` wants it, packed as fast as it goes."""
    return zlib.compress(body, _LEVEL, _GZIP)
