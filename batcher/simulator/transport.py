"""The simulated service without a network: a transport in process, in whatever time the event loop keeps."""

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType

from batcher.records import Failure, Kind, Reply, Request, Timing
from batcher.simulator.front import Front
from batcher.simulator.model import Answer

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class ModelTransport:
    """Requests to a `front`, as its client: what breaks comes back as the failures that sockets would give.

    `refusal` says what an answer with another status than 200 means: the dialect's own. `timeout` is in seconds,
    `headers` go with every request. A streamed answer comes as the one that it would be without streaming.
    """

    name = "none"
    """There is no HTTP."""

    def __init__(
        self,
        front: Front,
        authorization: str,
        timeout: float,
        refusal: Callable[[Reply], Failure],
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.unreachable: Kind | None = None
        """What every attempt to connect ends with now, and every connection is lost; None: all is well."""
        self.cut = False
        """Whether its process was killed: what is sent after that reaches nobody, and nothing comes back."""
        self._front = front
        self._authorization = authorization
        self._timeout = timeout
        self._refusal = refusal
        self._headers = headers
        self._kept = 0  # connections that wait for their next request

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once."""
        return await self._exchange("POST", _PATHS[request.endpoint], request.body)

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path below the service's address."""
        return await self._exchange("GET", f"/v1{path}", b"")

    async def _exchange(self, method: str, path: str, body: bytes) -> Reply | Failure:
        loop = asyncio.get_running_loop()
        if self.cut:
            await loop.create_future()
        now = loop.time
        began = now()
        sent_at = int((self._front.service.epoch + began) * 1e6)
        if self.unreachable is not None:
            self._kept = 0
            return Failure(self.unreachable, "cannot connect", Timing(sent_at, 0.0))
        reused = self._kept > 0
        self._kept -= reused
        begun: list[int] = []

        async def deliver(answer: Answer, headers: dict[str, str]) -> Reply:
            if self.unreachable is not None or not answer.status:
                raise ConnectionResetError
            begun.append(answer.status)
            first = now() - began if answer.pieces else None
            if answer.pieces:
                await asyncio.sleep(answer.pieces[-1].at)
            if not answer.whole:
                await asyncio.sleep(answer.stalls)
                raise ConnectionResetError
            return Reply(answer.status, headers, answer.body, Timing(sent_at, now() - began, first))

        try:
            async with asyncio.timeout(self._timeout):
                reply = await self._front.ask(method, path, self._authorization, body, deliver, self._headers)
        except TimeoutError:
            message = f"no answer within {self._timeout:g} s"
            return Failure(
                Kind.TIMEOUT, message, Timing(sent_at, now() - began), begun[0] if begun else None, paid=True
            )
        except ConnectionResetError:
            timing, status = Timing(sent_at, now() - began), begun[0] if begun else None
            kind = Kind.STALE_CONNECTION if reused and status is None else Kind.DISCONNECTED
            return Failure(kind, "the connection was closed", timing, status, paid=True)
        self._kept += 1
        return reply if reply.status == 200 else self._refusal(reply)

    async def close(self) -> None:
        """Close every connection."""
        self._kept = 0
