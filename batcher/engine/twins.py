"""Rows that make the same request: the first is asked, the others share what comes of it."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from batcher.ledger import Ledger
from batcher.records import UNIT, Attempt, Outcome, Turn

AT_ONCE = 1000
"""Rows that are given an outcome together: of a request that a million rows make, no more are in memory."""


class Twins:
    """Finds the rows that need not be asked, and records for each what another row has come to.

    Which row leads its twins, and what it has come to, is the ledger's to know. Here stand only the numbers of the rows
    that wait for one that is under way, and these are in ranges that are open.
    """

    def __init__(self, ledger: Ledger, under_way: Callable[[int], bool]) -> None:
        """`under_way` tells, on any thread, whether a row that is not done is asked by this run."""
        self._ledger = ledger
        self._under_way = under_way
        self._waiting: dict[int, list[int]] = {}
        """By the row whose outcome they wait for."""
        self.recorded = 0
        """Rows that have been given an outcome which is not durable yet."""

    async def leading(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """Those of these rows that are to be asked, once it is durable that they are."""
        # What was tried goes on: it has attempts of its own.
        asked = [turn for turn in turns if turn.request.repeatable]
        if not asked:
            return turns
        told: asyncio.Future[set[int]] = asyncio.get_running_loop().create_future()

        def tell(found: Sequence[int | Attempt | None]) -> None:
            # At once, not when `told` is heard of: what ends from now on is told after this.
            shared = set()
            for turn, leader in zip(asked, found, strict=True):
                row = turn.request.row
                if leader is None:
                    continue
                shared.add(row)
                if isinstance(leader, Attempt):
                    self._record(leader, row)
                else:
                    self._waiting.setdefault(leader, []).append(row)
            if not told.done():
                told.set_result(shared)

        self._ledger.hand_over()  # what has come before this is looked at
        pairs = [(turn.request.hash, turn.request.row, bool(turn.tried)) for turn in asked]
        self._ledger.lead(UNIT, pairs, self._under_way, tell)
        shared = await told
        return [turn for turn in turns if turn.request.row not in shared]

    def ended(self, attempt: Attempt) -> None:
        """A row's outcome is durable: now its twins may have it too."""
        if not attempt.attempt and attempt.request_hash:
            self.recorded -= 1
        rows = self._waiting.pop(attempt.row, None)
        if rows is None:
            return
        for row in rows[:AT_ONCE]:
            self._record(attempt, row)
        if rest := rows[AT_ONCE:]:
            self._waiting[rows[AT_ONCE - 1]] = rest  # they follow as soon as the last of these is durable

    def _record(self, leader: Attempt, row: int) -> None:
        assert leader.outcome in (Outcome.ANSWERED, Outcome.FAILED)
        self.recorded += 1
        self._ledger.record(msgspec.structs.replace(leader, row=row, attempt=0, spent=None))
