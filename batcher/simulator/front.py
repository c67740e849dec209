"""The front of the simulated service: it takes requests in, lets their time pass, and keeps the book."""

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import TypeVar

from msgspec import Struct

from batcher.simulator.model import Answer, Service, Settings

_T = TypeVar("_T")


class Entry(Struct, frozen=True):
    """One request as the service saw it; times are seconds of the monotonic clock."""

    path: str
    body_sha256: str
    arrived: float
    answered_at: float | None  # when its last byte was handed to the network; None: it did not leave whole
    status: int | None  # None: no answer began
    fault: str | None  # what the simulator did to it on purpose
    prompt: str  # the last user message, or the first prompt
    content: str | None  # the text of the first choice, where a client could read it
    prompt_tokens: int
    completion_tokens: int


class Front:
    """A service at work, whatever its answers travel over. `now` is its clock, `epoch` the Unix time of that clock's 0.

    Requests wait on the event loop for their time to pass, so `now` is to go as the loop's clock does.
    """

    def __init__(self, settings: Settings, now: Callable[[], float], epoch: float, record: bool) -> None:
        self.service = Service(settings, epoch)
        self.book: list[Entry] = []  # in the order of the answers; empty unless recorded
        self.in_flight = 0
        self.peak_in_flight = 0
        self._now = now
        self._record = record

    async def ask(
        self,
        method: str,
        path: str,
        authorization: str | None,
        body: bytes,
        deliver: Callable[[Answer, dict[str, str]], Awaitable[_T]],
    ) -> _T:
        """One request, from its arrival until `deliver` has handed over the answer with its rate-limit headers."""
        arrived = self._now()
        answer = self.service.receive(method, path, authorization, body, arrived)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        status = answered_at = None
        try:
            try:
                if answer.delay:
                    await asyncio.sleep(answer.delay)
            finally:  # a client that has given up has had its answer made all the same
                headers = self.service.settle(answer, self._now())
            status = answer.status or None
            delivered = await deliver(answer, headers)
            if answer.whole:
                answered_at = self._now()
            return delivered
        finally:
            self.in_flight -= 1
            if self._record:
                self.book.append(
                    Entry(
                        path=path,
                        body_sha256=sha256(body).hexdigest(),
                        arrived=arrived,
                        answered_at=answered_at,
                        status=status,
                        fault=answer.fault,
                        prompt=answer.prompt,
                        content=answer.content,
                        prompt_tokens=answer.prompt_tokens,
                        completion_tokens=answer.completion_tokens,
                    )
                )
