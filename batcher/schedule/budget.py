"""What may still be spent: pure state, told what is leased before a request goes and what it came to."""

from collections.abc import Callable

from batcher.records import Attempt, Request, Spending, Turn

PATIENCE = 256
"""Rows in a row that are too dear before it is said that the budget is reached: a cheaper one may come after a dear."""


class Budget:
    """A limit in USD, and what of it is spent and held. The most that a request may cost is held while it is out.

    So what is spent never passes the limit, whatever comes of the requests that are out.
    """

    def __init__(self, limit: float, spent: Spending, most: Callable[[Request], float | None]) -> None:
        """`most` tells what a request may cost; of one for which it cannot, nothing is held."""
        self.limit = limit
        self.spent, self.lost = spent.usd, spent.lost
        self.held = 0.0
        """What requests that are out may cost."""
        self.set_aside = 0
        """Requests that were too dear for what is left, even when nothing was out."""
        self.dearest_left = 0.0
        """The most that the last one of them may cost."""
        self._in_a_row = 0
        self._most = most
        self._leases: dict[tuple[int, int, int], float] = {}
        """What is held, by unit, row and attempt."""
        self._asked: tuple[Request | None, float] = (None, 0.0)

    @property
    def left(self) -> float:
        """What is neither spent nor held."""
        return self.limit - self.spent - self.held

    @property
    def reached(self) -> bool:
        """Whether one request after the other was too dear."""
        return self._in_a_row >= PATIENCE

    def affords(self, request: Request) -> bool:
        """Whether a request may go now."""
        return self.spent + self.held + self._price(request) <= self.limit

    def skips(self, request: Request) -> bool:
        """Whether a request that may not go is to be left for another run; else it waits for what is out."""
        if self._leases or self.reached:
            return False
        self.set_aside += 1
        self._in_a_row += 1
        self.dearest_left = self._price(request)
        return True

    def lease(self, turn: Turn) -> None:
        """A request goes: hold the most that it may cost."""
        usd = self._leases[turn.request.unit, turn.request.row, turn.attempt] = self._price(turn.request)
        self.held += usd
        self._in_a_row = 0

    def leased(self, turn: Turn) -> float:
        """What is held for a request that is out."""
        return self._leases[turn.request.unit, turn.request.row, turn.attempt]

    def settle(self, attempt: Attempt) -> None:
        """What came of a request is durable: only now what it has not cost is there for others."""
        lease = self._leases.pop((attempt.unit, attempt.row, attempt.attempt), None)
        if lease is None:
            return  # it was settled before
        self.held = self.held - lease if self._leases else 0.0
        self.spent += lease if attempt.spent is None else attempt.spent
        self.lost += lease if attempt.spent is None else 0.0

    def _price(self, request: Request) -> float:
        if self._asked[0] is not request:  # the one at the head is asked about again and again
            self._asked = (request, self._most(request) or 0.0)
        return self._asked[1]
