"""Sets of rows as whole numbers: bit i stands for row i of a stretch."""

import zlib
from collections.abc import Iterable


def of(rows: Iterable[int], start: int = 0) -> int:
    """The set of these rows, in a stretch that begins at row `start`."""
    held = bytearray()
    for row in rows:
        index = row - start
        if index >> 3 >= len(held):
            held.extend(bytes((index >> 3) + 1 - len(held)))
        held[index >> 3] |= 1 << (index & 7)
    return int.from_bytes(held, "little")


def first(count: int) -> int:
    """The set of the first so many rows; empty where that is less than one."""
    return (1 << max(0, count)) - 1


def cut(bits: int, start: int, stop: int) -> int:
    """The rows [start, stop) as a stretch of their own."""
    return (bits >> start) & first(stop - start)


def rows(bits: int, start: int = 0, most: int | None = None) -> list[int]:
    """The first so many rows in order, or all, where the stretch begins at row `start`."""
    found: list[int] = []
    text = bin(bits)[:1:-1]
    index = text.find("1")
    while index >= 0 and len(found) != most:
        found.append(start + index)
        index = text.find("1", index + 1)
    return found


def pack(bits: int) -> bytes:
    """A set as few bytes."""
    return zlib.compress(bits.to_bytes((bits.bit_length() + 7) // 8, "little"))


def unpack(packed: bytes) -> int:
    """A packed set. Raises ValueError when it is damaged."""
    try:
        return int.from_bytes(zlib.decompress(packed), "little")
    except zlib.error as error:
        raise ValueError(f"a set of rows is damaged: {error}") from None
