"""Rows that were read ahead, so that those that share a prefix go together though they lie apart in the input."""

import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from batcher.errors import StorageError
from batcher.prompt import BYTES_PER_TOKEN, keyed, prefix_tokens
from batcher.records import Turn

MOST_ROWS = 1 << 16
MOST_BYTES = 1 << 30
"""How far it reads ahead: rows, and bytes of their requests, which lie on the disk."""
MOST_PREFIXES = 1 << 18
"""Digests of prefixes in memory, about 130 bytes each."""
TOGETHER = 64
"""Rows of a group that go in a row, before others have their turn; a group of more is large."""
SOON = 50_000
"""Tokens between two rows of a large group after which the cache still has what they share, in the input's order."""
ENOUGH = 0.5
"""The share of what it should have, below which the cache is smaller than that."""
_SEGMENT = 32 << 20
_REMEMBERED = 100_000
"""Groups of which it is known, after they went, how many rows they had."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Turn).decode


class _Segment:
    """A stretch of the requests on the disk, given back when none of its rows is left."""

    __slots__ = ("file", "rows", "size")

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.rows = self.size = 0


class _Waiting(NamedTuple):
    """A row in the window: where its request lies, and what it begins with, the longest last."""

    segment: _Segment
    start: int
    size: int
    prefixes: tuple[bytes, ...]


class Window:
    """Rows in memory by their number and their prefixes' digests; what they ask lies in nameless files in a folder.

    The oldest row is always the next to go, and takes with it those that share most with it. So no row waits for longer
    than the window is large, and rows that lie together go in the input's order. All methods but `close` block.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: OrderedDict[int, _Waiting] = OrderedDict()
        self._sharing: dict[bytes, int | dict[int, None]] = {}
        """By prefix: the row that begins with it, or the rows."""
        self._gone: OrderedDict[bytes, int] = OrderedDict()
        """How many rows of a group went, so that later ones are of the same group."""
        self._segments: list[_Segment] = []
        self._bytes = 0
        """Of the requests that are here."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether rows have to go before others are read."""
        return (
            len(self._rows) >= MOST_ROWS
            or len(self._sharing) >= MOST_PREFIXES
            or sum(segment.size for segment in self._segments) >= MOST_BYTES
        )

    def put(self, turns: Sequence[Turn]) -> None:
        """Take rows in. Raises StorageError."""
        try:
            for turn in turns:
                self._put(turn)
        except OSError as error:
            raise StorageError.of(self._folder, error) from None

    def take(self, reuse: float = 1.0) -> list[Turn]:
        """The oldest rows, each with those that share most with it, and their keys. Raises StorageError.

        `reuse` is what caches had of what they should have had by now, as a share.
        """
        taken: list[Turn] = []
        try:
            while self._rows and len(taken) < TOGETHER:
                group, rows, relies = self._next(reuse >= ENOUGH)
                for row in rows:
                    waiting = self._rows[row]
                    waiting.segment.file.seek(waiting.start)
                    turn = _decode(waiting.segment.file.read(waiting.size))
                    self._leave(row, waiting)
                    if relies and group is not None and turn.request.prefixes:
                        turn.shares = prefix_tokens(waiting.prefixes.index(group))
                    taken.append(turn if group is None else self._named(turn, group))
        except OSError as error:
            raise StorageError.of(self._folder, error) from None
        return taken

    def close(self) -> None:
        """Give back what it has on the disk."""
        for segment in self._segments:
            segment.file.close()
        self._segments.clear()
        self._rows.clear()

    def _put(self, turn: Turn) -> None:
        if not self._segments or self._segments[-1].size >= _SEGMENT:
            self._segments.append(_Segment(tempfile.TemporaryFile(dir=self._folder)))  # noqa: SIM115
        segment, packed = self._segments[-1], _encode(turn)
        segment.file.seek(segment.size)
        segment.file.write(packed)
        row, prefixes = turn.request.row, tuple(_prefixes(turn))
        self._rows[row] = _Waiting(segment, segment.size, len(packed), prefixes)
        segment.size += len(packed)
        segment.rows += 1
        self._bytes += len(packed)
        for prefix in prefixes:
            known = self._sharing.get(prefix)
            if known is None:
                self._sharing[prefix] = row
            elif isinstance(known, dict):
                known[row] = None
            else:
                self._sharing[prefix] = {known: None, row: None}

    def _next(self, keeps: bool) -> tuple[bytes | None, list[int], bool]:
        """Which rows go next, by what they belong together, and whether the cache is relied on to have it still.

        `keeps` says that caches are large enough for rows of a large group to go in the input's order.
        """
        oldest, waiting = next(iter(self._rows.items()))
        group = self._group(waiting)
        if group is None:
            return None, [oldest], False
        sharing, rows = self._sharing[group], [oldest]
        here = sharing if isinstance(sharing, dict) else {oldest: None}
        large = self._gone.get(group, 0) + len(here) > TOGETHER
        if large and keeps and self._bytes / len(here) <= SOON * BYTES_PER_TOKEN:
            if 2 * len(here) <= len(self._rows):
                return group, [oldest], True
            self._count(group)  # most rows begin with it: nobody waits for a leader
            return None, [oldest], False
        for looked_at, row in enumerate(here):
            if len(rows) >= TOGETHER or looked_at >= 4 * TOGETHER:
                break
            if row != oldest and self._group(self._rows[row]) == group:  # others share more with one another
                rows.append(row)
        return group, rows, False

    def _group(self, waiting: _Waiting) -> bytes | None:
        """The longest prefix that a row shares with another one, here or gone."""
        for prefix in reversed(waiting.prefixes):
            if isinstance(self._sharing[prefix], dict) or prefix in self._gone:
                return prefix
        return None

    def _leave(self, row: int, waiting: _Waiting) -> None:
        del self._rows[row]
        for prefix in waiting.prefixes:
            sharing = self._sharing[prefix]
            if isinstance(sharing, dict) and len(sharing) > 1:
                del sharing[row]
            else:
                del self._sharing[prefix]
        waiting.segment.rows -= 1
        self._bytes -= waiting.size
        if not waiting.segment.rows and waiting.segment is not self._segments[-1]:
            waiting.segment.file.close()
            self._segments.remove(waiting.segment)

    def _count(self, group: bytes) -> None:
        self._gone[group] = self._gone.pop(group, 0) + 1
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def _named(self, turn: Turn, group: bytes) -> Turn:
        """A row with the name of its group, and with a key where the job leaves it to be found.

        A key ties its rows to one replica: a large group gets several, one after the other, so that all serve it.
        """
        self._count(group)
        turn.group, nth = group.hex(), (self._gone[group] - 1) // TOGETHER
        if turn.request.prefixes:
            turn.group += f"-{nth}" if nth else ""
            turn.request = keyed(turn.request, turn.group)
            turn.plain = None if turn.plain is None else keyed(turn.plain, turn.group)
        return turn


def _prefixes(turn: Turn) -> Iterator[bytes]:
    """What a row may share with others: the key that the job gives it, or what it begins with."""
    request = turn.request
    if request.cache_key is not None:
        yield request.cache_key.encode()
    for end in range(8, len(request.prefixes) + 1, 8):
        yield request.prefixes[end - 8 : end]
