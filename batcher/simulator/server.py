"""The simulated service over HTTP: it does on real sockets what the model decides."""

import asyncio
import os
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib.util import find_spec

import anyio
from aiohttp import web
from anyio.from_thread import start_blocking_portal

from batcher.errors import JobError
from batcher.simulator.front import Front
from batcher.simulator.model import Answer, Settings

_BACKLOG = 4096  # connections that may wait to be accepted: a client opens thousands at once
_SHUTDOWN = 1.0  # seconds for requests in flight to notice that their connection is closed
_LOOP = {"use_uvloop": find_spec("uvloop") is not None}
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing resets the connection


class Simulator(Front):
    """A service that is being simulated: where it is, and what it sees."""

    def __init__(self, settings: Settings, record: bool) -> None:
        super().__init__(settings, time.monotonic, time.time() - time.monotonic(), record)
        self.url = ""  # to be used as a base URL

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from its body to its answer or to the fault in its place."""
        body = await request.content.read()
        authorization = request.headers.get("Authorization")
        deliver = partial(_send, request)
        return await self.ask(request.method, request.path_qs, authorization, body, deliver, request.headers)


async def _send(request: web.BaseRequest, answer: Answer, headers: dict[str, str]) -> web.StreamResponse:
    """Hand the answer to the network, whole or as far as its fault lets it go."""
    transport = request.transport
    if answer.status == 0:
        if transport is not None:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            transport.abort()
        return web.Response()
    headers["Content-Type"] = answer.content_type
    if answer.pieces:
        return await _stream(request, answer, headers)
    if answer.ends_after is None:
        response = web.Response(status=answer.status, body=answer.body, headers=headers)
        await response.prepare(request)
        await response.write_eof()
        return response
    headers["Content-Length"] = str(len(answer.body))
    begun = web.StreamResponse(status=answer.status, headers=headers)
    await begun.prepare(request)
    await begun.write(answer.body[: answer.ends_after])
    if transport is not None:
        transport.close()
    return begun


async def _stream(request: web.BaseRequest, answer: Answer, headers: dict[str, str]) -> web.StreamResponse:
    """Hand the pieces of a stream to the network, each at its time, as far as its fault lets it go."""
    begun = web.StreamResponse(status=answer.status, headers=headers)
    begun.enable_chunked_encoding()
    await begun.prepare(request)
    now = asyncio.get_running_loop().time
    start = now()
    left = answer.ends_after
    for at, data in answer.pieces:
        if (pause := start + at - now()) > 0:
            await asyncio.sleep(pause)
        if left is not None and len(data) >= left:
            await begun.write(data[:left])
            break
        await begun.write(data)
        left = None if left is None else left - len(data)
    if answer.whole:
        await begun.write_eof()
    else:
        await asyncio.sleep(answer.stalls)
        if request.transport is not None:
            request.transport.close()
    return begun


@asynccontextmanager
async def serve(
    settings: Settings | None = None, *, host: str = "127.0.0.1", port: int = 0, record: bool = False
) -> AsyncIterator[Simulator]:
    """Serve the simulation in this event loop; port 0 takes a free one, `record` keeps the book.

    Raises JobError when the address cannot be used.
    """
    service = Simulator(settings or Settings(), record)
    server = web.Server(service.answer, handler_cancellation=True, access_log=None, auto_decompress=False)
    runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
        try:
            await site.start()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise JobError(f"cannot listen on {host}:{port}: {reason}; choose another port") from None
        service.url = f"{site.name}/v1"
        yield service
    finally:
        for connection in server.connections:
            connection.force_close()
        await runner.cleanup()


@contextmanager
def running(
    settings: Settings | None = None, *, host: str = "127.0.0.1", port: int = 0, record: bool = False
) -> Iterator[Simulator]:
    """The same on a thread and an event loop of its own, for callers that block or whose loop is busy."""
    with (
        start_blocking_portal(backend_options=_LOOP) as portal,
        portal.wrap_async_context_manager(serve(settings, host=host, port=port, record=record)) as service,
    ):
        yield service


def run(settings: Settings, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `started` is told the URL. Raises JobError when the address cannot be used."""

    async def live() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with serve(settings, host=host, port=port) as service:
                started(service.url)
                await anext(signals)

    anyio.run(live, backend_options=_LOOP)
