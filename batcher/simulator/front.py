"""The front of the simulated service: it takes requests in, lets their time pass, and keeps the book."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from batcher.simulator.model import Answer, Service, Settings, Waiting

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
    model: str | None = None
    tier: str | None = None  # that served it, or refused to
    served_at: float | None = None  # when it had waited for its turn; None: it was not served
    cached_tokens: int = 0
    charged: int = 0  # tokens, as it arrived
    charged_uncached: int = 0  # of them
    settled: int = 0  # tokens, as its answer left
    settled_uncached: int = 0  # of them


class Front:
    """A service at work, whatever its answers travel over. `now` is its clock, `epoch` the Unix time of that clock's 0.

    Requests wait on the event loop for their time to pass, so `now` is to go as the loop's clock does.
    """

    def __init__(self, settings: Settings, now: Callable[[], float], epoch: float, record: bool) -> None:
        self.service = Service(settings, epoch)
        self.book: list[Entry] = []  # what was asked, in the order of the answers; empty unless recorded
        self.looks: list[str] = []  # the paths of requests that ask nothing, such as for the models; the same
        self.in_flight = 0
        self.peak_in_flight = 0
        self._now = now
        self._record = record
        self._turns: dict[Waiting, asyncio.Future[Answer]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def ask(
        self,
        method: str,
        path: str,
        authorization: str | None,
        body: bytes,
        deliver: Callable[[Answer, dict[str, str]], Awaitable[_T]],
        headers: Mapping[str, str],
    ) -> _T:
        """One request, from its arrival until `deliver` has handed over the answer with its rate-limit headers."""
        arrived = self._now()
        received = self.service.receive(method, path, authorization, body, arrived, headers)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        status = answered_at = None
        try:
            if isinstance(received, Waiting):
                try:
                    answer = await self._its_turn(received)
                except asyncio.CancelledError:
                    answer = self.service.leave(received, self._now())
                    raise
            else:
                answer = received
            try:
                if (rest := arrived + answer.delay - self._now()) > 0:
                    await asyncio.sleep(rest)
            except asyncio.CancelledError:  # a client that has given up has had its answer made all the same
                self.service.settle(answer, self._now())
                raise
            begun = replace(answer, charged=0) if answer.pieces else answer
            told = self.service.settle(begun, self._now())
            status = answer.status or None
            try:
                delivered = await deliver(answer, told)
            finally:
                if answer.pieces:  # what it took is known when it ends
                    self.service.settle(answer, self._now())
            if answer.whole:
                answered_at = self._now()
            return delivered
        finally:
            self.in_flight -= 1
            if self._record and method == "GET":
                self.looks.append(path)
            elif self._record:
                self.book.append(
                    Entry(
                        path=path.partition("?")[0],
                        body_sha256=sha256(body).hexdigest(),
                        arrived=arrived,
                        answered_at=answered_at,
                        status=status,
                        fault=answer.fault,
                        prompt=answer.prompt,
                        content=answer.content,
                        prompt_tokens=answer.prompt_tokens,
                        completion_tokens=answer.completion_tokens,
                        model=answer.model,
                        tier=answer.tier,
                        served_at=arrived + answer.queue_time if answer.prompt_tokens else None,
                        cached_tokens=answer.cached_tokens,
                        charged=answer.charged,
                        charged_uncached=answer.charged_uncached,
                        settled=answer.settled,
                        settled_uncached=answer.settled_uncached,
                    )
                )

    async def _its_turn(self, waiting: Waiting) -> Answer:
        """Wait until a request is served; gives what it is answered."""
        turn = self._turns[waiting] = asyncio.get_running_loop().create_future()
        self._advance()
        try:
            answer: Answer = await turn
            return answer
        finally:
            del self._turns[waiting]

    def _advance(self) -> None:
        """Serve those whose turn it is, and see to it that the next are served at theirs."""
        now = self._now()
        for waiting in self.service.advance(now):
            turn = self._turns.get(waiting)
            if turn is not None and not turn.done() and waiting.answer is not None:
                turn.set_result(waiting.answer)
        if self._timer is not None:
            self._timer.cancel()
        at = self.service.next()
        self._timer = None if at is None else asyncio.get_running_loop().call_later(max(0.0, at - now), self._advance)
