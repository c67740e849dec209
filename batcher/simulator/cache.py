"""What prefixes of prompts a replica still knows, so that it need not read them again."""

from collections import OrderedDict
from hashlib import blake2b

BLOCK = 128  # tokens


def chain(text: str, block_bytes: int, start: bytes = b"") -> list[bytes]:
    """A digest for each whole block of a text, of everything up to its end: equal where all before is equal."""
    content = text.encode()
    hasher = blake2b(start, digest_size=8)
    update, digest = hasher.update, hasher.digest
    digests: list[bytes] = []
    for end in range(block_bytes, len(content) + 1, block_bytes):
        update(content[end - block_bytes : end])
        digests.append(digest())
    return digests


class PrefixCache:
    """The blocks that one replica keeps for one model: at most `size` tokens of them, the ones least lately used leave.

    A block is there from the moment at which its prompt has been read until `lifetime` seconds after its last use.
    """

    def __init__(self, size: int, lifetime: float) -> None:
        self._most = size // BLOCK
        self._lifetime = lifetime
        self._since: OrderedDict[bytes, float] = OrderedDict()  # when a block was last used, or will have been made

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._since)

    def known(self, blocks: list[bytes], now: float) -> int:
        """How many blocks from the first on need not be read."""
        oldest = now - self._lifetime
        for number, block in enumerate(blocks):
            since = self._since.get(block)
            if since is None or not oldest < since <= now:
                return number
        return len(blocks)

    def keep(self, blocks: list[bytes], known: int, now: float, read: float) -> None:
        """A prompt is used from now on: its known blocks are so now, the others once it has been `read`."""
        kept = self._since
        oldest = now - self._lifetime
        for number in range(len(blocks) - 1, -1, -1):  # the first block leaves last: without it the rest is lost
            block = blocks[number]
            since = kept.get(block, read) if number >= known else now
            kept[block] = read if since <= oldest else min(read, max(now, since))
            kept.move_to_end(block)
        while len(kept) > self._most:
            kept.popitem(last=False)
