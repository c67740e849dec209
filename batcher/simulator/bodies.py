"""Request bodies as they come: plain, gzip, msgpack, and what is neither."""

import zlib
from collections.abc import Collection, Mapping

import msgspec

from batcher.simulator import wire

ENCODINGS = ("msgpack", "gzip")
LARGEST = 64 << 20  # bytes of a body, unpacked

_MSGPACK = "application/vnd.msgpack"


def plain(headers: Mapping[str, str], body: bytes, known: Collection[str]) -> bytes:
    """The body as JSON, whatever it came in; `known` are those of `ENCODINGS` that this service takes.

    Raises RefusedError: 415 for what it does not know, 400 for what is broken, 413 for what is too large.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding == "gzip" and "gzip" in known:
        body = _unpacked(body)
    elif encoding != "identity":
        raise _unsupported("content-encoding", encoding)
    if len(body) > LARGEST:
        raise _too_large()
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == _MSGPACK and "msgpack" in known:
        try:
            return msgspec.json.encode(msgspec.msgpack.decode(body))
        except (msgspec.MsgspecError, UnicodeError, TypeError, ValueError, RecursionError):
            raise wire.RefusedError(400, wire.invalid("The body is not valid msgpack.")) from None
    if kind != "application/json":
        raise _unsupported("content-type", kind)
    return body


def _unpacked(body: bytes) -> bytes:
    """The content of one whole gzip member."""
    reader = zlib.decompressobj(31)
    try:
        data = reader.decompress(body, LARGEST)
    except zlib.error:
        raise wire.RefusedError(400, wire.invalid("The body is not valid gzip.")) from None
    if reader.unconsumed_tail:
        raise _too_large()
    if not reader.eof or reader.unused_data:
        raise wire.RefusedError(400, wire.invalid("The body is not valid gzip."))
    return data


def _unsupported(header: str, value: str) -> wire.RefusedError:
    message = f"Unsupported {header}: {value}"
    return wire.RefusedError(415, wire.error_body(message, "invalid_request_error", header, "unsupported_media_type"))


def _too_large() -> wire.RefusedError:
    return wire.RefusedError(413, wire.ERRORS[413])
