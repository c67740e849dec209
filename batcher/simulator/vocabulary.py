"""Texts cut into tokens, and the numbers of tokens: a token is up to four bytes of UTF-8."""

from codecs import getincrementaldecoder
from collections.abc import Iterable
from zlib import crc32

from batcher.simulator.wire import BYTES_PER_TOKEN, tokens

SIZE = 200_000  # numbers of tokens are below it
_DECODER = getincrementaldecoder("utf-8")


def pieces(text: str) -> list[bytes]:
    """The bytes of each token, as many as `tokens` counts."""
    data = text.encode()
    return [data[at : at + BYTES_PER_TOKEN] for at in range(0, len(data), BYTES_PER_TOKEN)]


def texts(cut: Iterable[bytes]) -> list[str]:
    """What each token adds to the text; a character belongs to the token that ends it."""
    decoder = _DECODER()
    return [decoder.decode(piece) for piece in cut]


def numbers(text: str) -> list[int]:
    """The number of each token. They cannot be read back: many tokens share one."""
    return [crc32(piece) % SIZE for piece in pieces(text)]


def first(text: str, cap: int) -> str:
    """As much of a text as so many tokens hold."""
    return text if tokens(text) <= cap else text.encode()[: cap * BYTES_PER_TOKEN].decode(errors="ignore")


def shared(one: str, other: str) -> int:
    """How many tokens two texts have in common, at their beginnings and then at their ends."""
    left, right = pieces(one), pieces(other)
    most, same = min(len(left), len(right)), 0
    while same < most and left[same] == right[same]:
        same += 1
    ends = 0
    while ends < most - same and left[-1 - ends] == right[-1 - ends]:
        ends += 1
    return same + ends
