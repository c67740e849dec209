"""Workers waiting for the dispatcher: the one place where its answers become waiting."""

import asyncio
from collections import deque

from batcher.schedule import Dispatcher, Ticket

WAITING_BYTES = 64 << 20
"""Bodies that may wait for their turn: with images in them a few hundred would fill the memory."""


class Turns:
    """The door between a fixed set of workers and the dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._parked: deque[asyncio.Future[Ticket | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()
        self._called = asyncio.Event()
        self.closed = False
        """Whether nothing more is to be sent."""
        self.until: float | None = None
        """The moment that the dispatcher named when it last had nothing to send."""

    async def take(self) -> Ticket | None:
        """The next request that may go; None when nothing more is to be sent."""
        if self.closed:
            return None
        ticket = self._grant()
        if ticket is not None:
            if self._parked:
                self.wake()
            return ticket
        turn: asyncio.Future[Ticket | None] = self._loop.create_future()
        self._parked.append(turn)
        return await turn

    async def called(self) -> None:
        """Return when there is a first request to send, or nothing is to be sent."""
        await self._called.wait()

    def wake(self) -> None:
        """Something happened: let go whom the dispatcher lets go."""
        if self._dispatcher.waiting and not self._called.is_set():
            self._called.set()
        while self._parked:
            if self._parked[0].done():
                self._parked.popleft()
            elif (ticket := self._grant()) is not None:
                self._parked.popleft().set_result(ticket)
            else:
                return

    async def hungry(self, size: int) -> None:
        """Return when more rows are wanted, whose bodies have so many bytes each."""
        most = WAITING_BYTES // max(size, 1)
        while not self._dispatcher.hungry(most) and not self.closed:
            self._wanted.clear()
            await self._wanted.wait()

    def close(self) -> None:
        """Nothing more is sent."""
        self.closed = True
        self._called.set()
        self._wanted.set()
        while self._parked:
            turn = self._parked.popleft()
            if not turn.done():
                turn.set_result(None)

    def _grant(self) -> Ticket | None:
        if self.closed:
            return None
        granted = self._dispatcher.take(self._loop.time())
        if not self._wanted.is_set() and self._dispatcher.hungry():
            self._wanted.set()  # also where none may go: rows may have been left for another run
        if isinstance(granted, Ticket):
            self.until = None
            return granted
        self.until = granted
        if granted is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(granted, self.wake)
        return None
