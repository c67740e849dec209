"""One request over HTTP, against servers on real sockets that misbehave."""

import asyncio
import contextlib
import gzip
import json
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.dialects import cerebras
from batcher.errors import JobError
from batcher.records import Failure, Kind, Reply, Request
from batcher.transport import HttpTransport, Library
from benchmarks.tls import AUTHORITY, context
from tests import stories

SECRET = "csk-0123456789abcdef"
ANSWER = b'{"choices":[{"index":0,"message":{"content":"yes"},"finish_reason":"stop"}]}'
REQUEST = Request(0, 0, "gpt-oss-120b", b'{"model":"gpt-oss-120b","messages":[]}', 10, 20, b"")

KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg7r33O8w3d20EQz+W
5X1t4HT9Cp0lsFIKnsgJOEHqVlqhRANCAARIZfhNqiURCwb1iPFcAKQHlcoOrGLS
cyaoZDe7ahhr3q9pEQ3vc+U99Xax/hdwYCRW/kVYpe1qX3BsbumrO1zz
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUa9jGWr16Cqe4Q4g+cBAisLtPDz8wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzAyMjM0MVoYDzIxMjYxMDMw
MDIyMzQxWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARIZfhNqiURCwb1iPFcAKQHlcoOrGLScyaoZDe7ahhr3q9pEQ3vc+U9
9Xax/hdwYCRW/kVYpe1qX3BsbumrO1zzo28wbTAdBgNVHQ4EFgQUD1jmaS1Lb7ff
dzytgxGLrPoJuQUwHwYDVR0jBBgwFoAUD1jmaS1Lb7ffdzytgxGLrPoJuQUwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgdUA1ypSbexbcejtYsAQTeF2Kr8u9eoHHjBoUa0i+2+ICIQCq
iBkXioRFN+hT87Lds99G1jHYh6ls1vGepr1U9J0QPg==
-----END CERTIFICATE-----
"""
"""A pair that no authority signed and nothing but these tests uses."""

Talk = Callable[["Caller"], Awaitable[None]]

library: Library = "aiohttp"
"""What the test at hand sends with."""


STALE = {"aiohttp": Kind.STALE_CONNECTION, "reqwest": Kind.DISCONNECTED}
"""pyreqwest does not say whether a connection had been kept."""


@pytest.fixture(autouse=True, params=["aiohttp", "reqwest"])
def with_each_library(request: pytest.FixtureRequest) -> None:
    """Every test is about both libraries: nobody can tell them apart."""
    global library
    library = request.param


class Caller:
    """One connection as the server sees it."""

    def __init__(self, server: "Server", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer

    async def request(self) -> bytes:
        """Read one request and remember it; empty when the client is gone."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        lines = head.lower().split(b"\r\n")
        length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
        whole = head + await self._reader.readexactly(length)
        self._server.requests.append(whole)
        return whole

    async def say(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(raw)
        await self._writer.drain()

    async def gone(self) -> None:
        """Wait until the client has closed its side."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(1 << 16):
                pass
        self._server.gone.set()

    def reset(self) -> None:
        """Close with RST rather than FIN."""
        held: socket.socket = self._writer.get_extra_info("socket")
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class Server:
    """A listening socket, what it was sent, and a sign that a client went away."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.requests: list[bytes] = []
        self.gone = asyncio.Event()

    def url(self, scheme: str = "http") -> str:
        """The address of its endpoint."""
        return f"{scheme}://127.0.0.1:{self.port}/v1"


@contextlib.asynccontextmanager
async def serving(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """A server whose every connection is led by `talk`."""
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await talk(Caller(server, reader, writer))
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    listener = await asyncio.start_server(accepted, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer(body: bytes = ANSWER, headers: str = "Content-Type: application/json\r\n", status: str = "200 OK") -> bytes:
    """A response with its length."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def saying(raw: bytes) -> Talk:
    """Answer each request of a connection with the same bytes."""

    async def talk(caller: Caller) -> None:
        while await caller.request():
            await caller.say(raw)

    return talk


def breaking(raw: bytes, *, reset: bool = False) -> Talk:
    """Answer one request with these bytes, then hang up."""

    async def talk(caller: Caller) -> None:
        await caller.request()
        await caller.say(raw)
        if reset:
            for _ in range(10):  # turns of the loop, in which the client takes the bytes
                await asyncio.sleep(0)
            caller.reset()

    return talk


@contextlib.asynccontextmanager
async def transport_to(
    url: str,
    *,
    limit: float = 20.0,
    headers: dict[str, str] | None = None,
    proxy_from_environment: bool = False,
    max_wire_bytes: int = 4 << 20,
    max_body_bytes: int = 8 << 20,
    encoding: str = "json",
    compression: str = "none",
) -> AsyncIterator[HttpTransport]:
    """A transport, closed in the end."""
    transport = HttpTransport(
        url,
        headers or {},
        cerebras,
        limit,
        [SECRET],
        proxy_from_environment,
        max_wire_bytes,
        max_body_bytes,
        encoding,
        compression,
        library=library,
    )
    try:
        yield transport
    finally:
        await transport.close()


def outcomes(
    talk: Talk, *, times: int = 1, timeout: float = 20.0, max_body_bytes: int = 8 << 20
) -> list[Reply | Failure]:
    """What comes of asking such a server, one request after the other."""

    async def run() -> list[Reply | Failure]:
        async with serving(talk) as server:
            async with transport_to(server.url(), limit=timeout, max_body_bytes=max_body_bytes) as transport:
                return [await transport.send(REQUEST) for _ in range(times)]

    return anyio.run(run)


def failure(talk: Talk, *, timeout: float = 20.0, max_body_bytes: int = 8 << 20) -> Failure:
    """The one failure that comes of asking such a server."""
    [outcome] = outcomes(talk, timeout=timeout, max_body_bytes=max_body_bytes)
    assert isinstance(outcome, Failure)
    assert outcome.timing is not None
    return outcome


def test_a_request_arrives_as_it_is_and_its_answer_whole() -> None:
    """Body and headers reach the server byte for byte, and its body comes back with times that are ours."""

    async def run() -> None:
        async with serving(saying(answer())) as server:
            headers = {"authorization": f"Bearer {SECRET}", "user-agent": "mine"}
            async with transport_to(server.url(), headers=headers) as transport:
                reply = await transport.send(REQUEST)
        assert isinstance(reply, Reply)
        assert (reply.status, reply.body) == (200, ANSWER)
        assert reply.headers["content-type"] == "application/json"
        assert reply.timing.sent_at > 1_700_000_000_000_000
        assert 0 < reply.timing.latency < 20
        assert reply.timing.time_to_first_token is None
        [request] = server.requests
        head, body = request.split(b"\r\n\r\n")
        assert body == REQUEST.body
        lines = head.decode().lower().split("\r\n")
        assert lines[0] == "post /v1/chat/completions http/1.1"
        assert {
            f"authorization: bearer {SECRET}",
            "user-agent: mine",
            "accept-encoding: gzip",
            "content-type: application/json",
            "x-cerebras-version-patch: 2",
        } <= set(lines)

    anyio.run(run)


def test_a_request_goes_to_its_endpoint() -> None:
    """Chat and completions lie below one base address."""

    async def run() -> None:
        async with serving(saying(answer())) as server, transport_to(server.url()) as transport:
            for endpoint in ("completions", "chat"):
                await transport.send(msgspec.structs.replace(REQUEST, endpoint=endpoint))
        lines = [request.split(b"\r\n")[0] for request in server.requests]
        assert lines == [b"POST /v1/completions HTTP/1.1", b"POST /v1/chat/completions HTTP/1.1"]

    anyio.run(run)


def test_connections_are_kept() -> None:
    """Requests one after the other share one connection."""

    async def run() -> None:
        async with serving(saying(answer())) as server:
            async with transport_to(server.url()) as transport:
                for _ in range(5):
                    assert isinstance(await transport.send(REQUEST), Reply)
            assert (server.connections, len(server.requests)) == (1, 5)

    anyio.run(run)


def test_a_large_request_arrives_whole() -> None:
    """A body of several megabytes is sent as it is."""
    body = bytes(range(256)) * 12_000
    large = Request(0, 0, "m", body, 0, 0, b"")

    async def run() -> None:
        async with serving(saying(answer())) as server:
            async with transport_to(server.url()) as transport:
                assert isinstance(await transport.send(large), Reply)
            assert server.requests[0].endswith(b"\r\n\r\n" + body)

    anyio.run(run)


@pytest.mark.parametrize(
    "raw",
    [
        answer(gzip.compress(ANSWER, mtime=0), "Content-Encoding: gzip\r\n"),
        answer(zlib.compress(ANSWER), "Content-Encoding: deflate\r\n"),
        answer(ANSWER, "Content-Encoding: identity\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(ANSWER), ANSWER),
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
    ],
    ids=["gzip", "deflate", "identity", "chunked", "after-100"],
)
def test_an_answer_is_the_same_however_it_is_packed(raw: bytes) -> None:
    """Content and transfer encodings do not show in the body."""
    for outcome in outcomes(saying(raw), times=2):
        assert isinstance(outcome, Reply)
        assert outcome.body == ANSWER


def test_an_answer_that_ends_with_the_connection_is_whole() -> None:
    """A body without a length ends where the connection ends."""
    [outcome] = outcomes(breaking(b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER))
    assert isinstance(outcome, Reply)
    assert outcome.body == ANSWER


def test_an_answer_cut_by_the_connection_is_found_by_the_dialect() -> None:
    """HTTP cannot see that a body without a length is cut; reading it does."""
    [outcome] = outcomes(breaking(b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER[:-20]))
    assert isinstance(outcome, Reply)
    found = cerebras.read(outcome)
    assert isinstance(found, Failure)
    assert (found.kind, found.paid) == (Kind.MALFORMED_RESPONSE, True)


def unused_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def asked(url: str, limit: float = 20.0) -> Failure:
    """The failure of one request to an address."""

    async def run() -> Reply | Failure:
        async with transport_to(url, limit=limit) as transport:
            return await transport.send(REQUEST)

    outcome = anyio.run(run)
    assert isinstance(outcome, Failure)
    return outcome


def test_a_refused_connection_is_not_paid() -> None:
    """Nobody listens: nothing was sent."""
    port = unused_port()
    found = asked(f"http://127.0.0.1:{port}/v1")
    assert (found.kind, found.paid, found.status) == (Kind.CONNECTION, False, None)
    assert found.message == f"cannot connect to 127.0.0.1:{port}: Connection refused"


def test_an_unknown_host_is_told_apart() -> None:
    """A name without an address is a fault of DNS and not of the service."""
    found = asked("http://nowhere.invalid/v1")
    assert (found.kind, found.paid) == (Kind.DNS, False)
    assert found.message.startswith("cannot find the address of nowhere.invalid: ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops connections to a full queue")
def test_a_connection_that_never_opens_times_out_unpaid() -> None:
    """A server that does not even accept ends the wait early, and nothing was sent."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        found = asked(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", limit=0.4)
    assert (found.kind, found.paid) == (Kind.CONNECT_TIMEOUT, False)
    assert found.message == "no connection to 127.0.0.1 within 0.2 s"


@pytest.mark.skipif(sys.platform == "win32", reason="limits of open files are POSIX")
def test_a_lack_of_open_files_is_our_own_fault() -> None:
    """When this machine cannot open another socket, the service is not blamed."""

    async def run() -> Reply | Failure:
        async with serving(saying(answer())) as server:
            async with transport_to(server.url()) as transport:
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                with socket.socket() as lowest_free:
                    number = lowest_free.fileno()
                resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
                try:
                    return await transport.send(REQUEST)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    outcome = anyio.run(run)
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.paid) == (Kind.LOCAL_RESOURCES, False)


def test_a_kept_connection_that_was_closed_is_told_apart() -> None:
    """Closed on reuse without a byte is the race with the server's idle timeout; on a fresh connection it is a loss."""

    async def only_one(caller: Caller) -> None:
        await caller.request()
        await caller.say(answer())
        await caller.request()

    first, second = outcomes(only_one, times=2)
    assert isinstance(first, Reply)
    assert isinstance(second, Failure)
    assert second.kind is STALE[library]

    found = failure(breaking(b""))
    assert (found.kind, found.paid) == (Kind.DISCONNECTED, True)


def test_a_reset_of_a_kept_connection_is_told_apart() -> None:
    """A reset before the first byte on a reused connection counts as the same race."""

    async def only_one(caller: Caller) -> None:
        await caller.request()
        await caller.say(answer())
        await caller.request()
        caller.reset()

    first, second = outcomes(only_one, times=2)
    assert isinstance(first, Reply)
    assert isinstance(second, Failure)
    assert second.kind is STALE[library]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(
    "raw",
    [
        answer()[:-10],
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"cho\r\n',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{"cho',
        b"HTTP/1.1 200 OK\r\nContent-Ty",
    ],
    ids=["length", "chunk-missing", "chunk-cut", "head"],
)
def test_an_answer_that_breaks_off_is_lost_and_may_be_paid(raw: bytes, reset: bool) -> None:
    """Half an answer is none; the service may bill it."""
    found = failure(breaking(raw, reset=reset))
    assert (found.kind, found.paid, found.body) == (Kind.DISCONNECTED, True, None)


def test_an_answer_whose_rest_is_no_http_is_lost() -> None:
    """When the head was right and the body is not, the service may have done its work; the time limit holds."""

    async def in_two_pieces(caller: Caller) -> None:
        await caller.request()
        await caller.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(10):  # turns of the loop, in which the client takes the head
            await asyncio.sleep(0)
        await caller.say(b"no chunk\r\n")
        await caller.gone()

    found = failure(in_two_pieces, timeout=0.3)
    # aiohttp 3.14 does not tell the reader of a wrong chunk, so that it waits until the limit.
    assert found.kind in (Kind.DISCONNECTED, Kind.TIMEOUT)
    assert (found.paid, found.status) == (True, 200)


def test_a_server_that_never_answers_times_out() -> None:
    """The whole request has one time limit, and its message says what was missing."""

    async def silent(caller: Caller) -> None:
        await caller.request()
        await caller.gone()

    found = failure(silent, timeout=0.3)
    assert (found.kind, found.paid, found.message) == (Kind.TIMEOUT, True, "no answer within 0.3 s")
    assert found.timing is not None
    assert found.timing.latency >= 0.29


def test_a_server_that_drips_times_out() -> None:
    """Bytes that keep coming do not extend the time limit."""

    async def drip(caller: Caller) -> None:
        await caller.request()
        await caller.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            await caller.say(b" ")
            await asyncio.sleep(0.02)

    found = failure(drip, timeout=0.3)
    assert (found.kind, found.paid) == (Kind.TIMEOUT, True)
    assert found.message == "the answer was not whole within 0.3 s"


def test_endless_interim_answers_time_out() -> None:
    """A server that only ever says that it goes on does not hold the request beyond its time."""

    async def on_and_on(caller: Caller) -> None:
        await caller.request()
        while True:
            await caller.say(b"HTTP/1.1 102 Processing\r\n\r\n" * 10)
            await asyncio.sleep(0.001)

    assert failure(on_and_on, timeout=0.3).kind is Kind.TIMEOUT


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(10_000)) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x00\x05" + b"\x00" * 64,
        b"HTTP/1.1 200 OK\r\nX-Echo: " + SECRET.encode() + b"\x00\r\n\r\n",
    ],
    ids=["words", "status", "long-header", "many-headers", "two-lengths", "length-and-chunks", "binary", "nul"],
)
def test_what_is_not_http_is_a_fault_of_protocol(raw: bytes) -> None:
    """Nonsense has no status, and its message neither shows a secret nor grows with the nonsense."""
    found = failure(breaking(raw))
    assert (found.kind, found.status, found.paid) == (Kind.PROTOCOL_ERROR, None, False)
    assert SECRET not in found.message
    assert len(found.message) < 600


def test_an_answer_that_is_declared_too_long_is_not_read() -> None:
    """A length above the cap ends the request at once, and the connection with it."""

    async def huge(caller: Caller) -> None:
        await caller.request()
        await caller.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2147483648\r\n\r\n")
        await caller.gone()

    async def run() -> None:
        async with serving(huge) as server, transport_to(server.url()) as transport:
            found = await transport.send(REQUEST)
            assert isinstance(found, Failure)
            assert (found.kind, found.paid) == (Kind.RESPONSE_TOO_LARGE, True)
            assert found.message == "the answer is longer than 4,194,304 bytes"
            with anyio.fail_after(5):
                await server.gone.wait()

    anyio.run(run)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    ],
    ids=["plain", "chunked"],
)
def test_an_endless_answer_is_cut(head: bytes, piece: bytes) -> None:
    """A body without end is read to the cap and no further."""
    sent = 0

    async def endless(caller: Caller) -> None:
        nonlocal sent
        await caller.request()
        await caller.say(head)
        while True:
            await caller.say(piece)
            sent += len(piece)

    found = failure(endless)
    assert (found.kind, found.paid, found.body) == (Kind.RESPONSE_TOO_LARGE, True, None)
    assert sent < 64 << 20


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_bomb_is_not_unpacked(chunked: bool) -> None:
    """A small body that would grow without bounds costs no more memory than the cap."""
    bomb = gzip.compress(b"\0" * (64 << 20))
    raw = answer(bomb, "Content-Encoding: gzip\r\n")
    if chunked:
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(bomb), bomb)
    tracemalloc.start()
    try:
        found = failure(saying(raw), max_body_bytes=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.kind, found.paid) == (Kind.RESPONSE_TOO_LARGE, True)
    assert found.message == "the answer is longer than 1,048,576 bytes"
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(ANSWER, mtime=0)[:-9]),
        ("gzip", gzip.compress(ANSWER, mtime=0) + b"more"),
        ("gzip", ANSWER),
        ("br", ANSWER),
        ("gzip, gzip", gzip.compress(gzip.compress(ANSWER, mtime=0), mtime=0)),
    ],
    ids=["cut", "more", "plain", "unasked", "nested"],
)
def test_an_answer_that_cannot_be_unpacked_is_malformed(encoding: str, body: bytes) -> None:
    """A content encoding that is broken, or was not asked for, makes the answer useless."""
    found = failure(saying(answer(body, f"Content-Encoding: {encoding}\r\n")))
    assert (found.kind, found.paid, found.status) == (Kind.MALFORMED_RESPONSE, True, 200)


@pytest.mark.parametrize("status", ["201 Created", "204 No Content", "206 Partial Content", "101 Switching Protocols"])
def test_any_success_but_200_is_malformed(status: str) -> None:
    """Only 200 is an answer."""
    found = failure(saying(answer(b"", status=status)))
    assert (found.kind, found.status, found.paid) == (Kind.MALFORMED_RESPONSE, int(status[:3]), True)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(status: int) -> None:
    """The request, and with it the key and the prompt, goes to no other host."""

    async def run() -> None:
        async with serving(saying(answer())) as other:
            raw = answer(b"", f"Location: {other.url().replace('127.0.0.1', 'localhost')}\r\n", f"{status} Go")
            async with serving(saying(raw)) as server, transport_to(server.url()) as transport:
                found = await transport.send(REQUEST)
        assert isinstance(found, Failure)
        assert (found.kind, found.status, found.paid) == (Kind.REDIRECT, status, False)
        assert found.message.startswith("the service redirects to localhost; ")
        assert other.connections == 0

    anyio.run(run)


@pytest.mark.parametrize("location", ["", "Location: //[\r\n", "Location: http://[::bad/\r\n"])
def test_a_redirect_to_nowhere_is_still_a_redirect(location: str) -> None:
    """A target that is missing or cannot be read changes nothing."""
    assert failure(saying(answer(b"", location, "302 Found"))).kind is Kind.REDIRECT


def test_a_refusal_is_read_by_the_dialect() -> None:
    """Status, body and headers of a refusal give kind, code, wait and limits."""
    body = (
        b'{"message":"Tokens per minute limit exceeded","type":"too_many_tokens_error","code":"token_quota_exceeded"}'
    )
    headers = (
        "x-ratelimit-limit-tokens-minute: 30000\r\nx-ratelimit-reset-tokens-minute: 11.5\r\nContent-Encoding: gzip\r\n"
    )
    found = failure(saying(answer(gzip.compress(body, mtime=0), headers, "429 Too Many Requests")))
    assert (found.kind, found.status, found.code) == (Kind.RATE_LIMITED, 429, "token_quota_exceeded")
    assert found.retry_after == 11.5
    assert [(limit.resource, limit.window, limit.limit, limit.remaining) for limit in found.limits] == [
        ("tokens", 60.0, 30000.0, 0.0)
    ]
    assert found.body == body


@pytest.mark.parametrize(
    "talk",
    [
        breaking(answer(b"busy", status="503 Service Unavailable")[:-2]),
        breaking(b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + b"busy" * 500_000),
        saying(answer(b"busy", "Content-Encoding: gzip\r\n", "503 Service Unavailable")),
    ],
    ids=["cut", "long", "unreadable"],
)
def test_a_refusal_counts_by_its_status_whatever_its_body(talk: Talk) -> None:
    """A refusal is not lost because its body is."""
    found = failure(talk)
    assert (found.kind, found.status) == (Kind.UNAVAILABLE, 503)
    assert len(found.body or b"") <= 1 << 16


def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    """TLS is always verified, and the message says what is wrong with the certificate."""
    (tmp_path / "key.pem").write_text(KEY)
    (tmp_path / "certificate.pem").write_text(CERTIFICATE)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")

    async def run() -> None:
        async with serving(saying(answer()), tls) as server:
            async with transport_to(server.url("https")) as transport:
                found = await transport.send(REQUEST)
        assert isinstance(found, Failure)
        assert (found.kind, found.paid) == (Kind.CERTIFICATE, False)
        assert found.message.startswith("the certificate of 127.0.0.1 is not valid: ")
        assert server.requests == []

    anyio.run(run)


def test_a_run_trusts_the_authorities_that_the_environment_names(tmp_path: Path) -> None:
    """`SSL_CERT_FILE` counts, as it does for other programs of the machine; the summary names the library."""
    authority = tmp_path / "authority.pem"
    authority.write_text(AUTHORITY)
    stories.write_jsonl(tmp_path / "rows.jsonl", 3)

    async def run() -> "subprocess.CompletedProcess[str]":
        async with serving(saying(answer()), context()) as server:
            service = {"transport": library}
            job = stories.write_job(tmp_path, server.url("https"), more={"service": service})
            return await anyio.to_thread.run_sync(lambda: stories.run(job, SSL_CERT_FILE=str(authority)))

    ended = anyio.run(run)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_bytes())["transport"] == library
    assert f"requests per second over {library}" in ended.stdout + ended.stderr


def test_tls_with_a_server_that_speaks_none_is_told_apart() -> None:
    """An https address of a plain server is a fault of TLS; nothing is sent in the clear."""

    async def plain(caller: Caller) -> None:
        await caller.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await caller.gone()

    async def run() -> None:
        async with serving(plain) as server, transport_to(server.url("https")) as transport:
            found = await transport.send(REQUEST)
        assert isinstance(found, Failure)
        assert (found.kind, found.paid) == (Kind.TLS, False)

    anyio.run(run)


def test_tls_that_is_never_agreed_on_times_out_unpaid() -> None:
    """A server that says nothing to a greeting is one to which no connection opens."""
    found = asyncio.run(asked_for_tls(Caller.gone, limit=0.4))
    assert (found.kind, found.paid) == (Kind.CONNECT_TIMEOUT, False)
    assert found.message == "no connection to 127.0.0.1 within 0.2 s"


def test_tls_that_the_server_breaks_off_was_not_paid() -> None:
    """A connection that closes before TLS is agreed on has carried no request."""

    async def closing(caller: Caller) -> None:
        await caller.say(b"")

    found = asyncio.run(asked_for_tls(closing))
    assert (found.kind, found.paid) == (Kind.CONNECTION, False)


async def asked_for_tls(talk: Talk, limit: float = 20.0) -> Failure:
    """The failure of one request to an https address of such a server."""
    async with serving(talk) as server, transport_to(server.url("https"), limit=limit) as transport:
        found = await transport.send(REQUEST)
    assert isinstance(found, Failure)
    return found


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without proxies, and with a netrc that knows a password."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password from-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    return monkeypatch


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_proxy_of_the_environment_is_used_only_when_asked_for(
    environment: pytest.MonkeyPatch, asked_for: bool
) -> None:
    """Without asking, requests go straight; a netrc is never read."""

    async def run() -> None:
        async with serving(saying(answer())) as proxy, serving(saying(answer())) as server:
            environment.setenv("http_proxy", f"http://somebody:proxy-password@127.0.0.1:{proxy.port}")
            async with transport_to(server.url(), proxy_from_environment=asked_for) as transport:
                assert isinstance(await transport.send(REQUEST), Reply)
        used, spared = (proxy, server) if asked_for else (server, proxy)
        assert (len(used.requests), spared.connections) == (1, 0)
        [request] = used.requests
        assert (b"proxy-authorization: basic" in request.lower()) is asked_for
        assert b"\r\nauthorization:" not in request.lower()
        assert request.startswith(b"POST http://127.0.0.1" if asked_for else b"POST /v1/")

    anyio.run(run)


def test_the_environment_may_except_hosts_from_its_proxy(environment: pytest.MonkeyPatch) -> None:
    """`no_proxy` holds when the environment's proxy was asked for."""

    async def run() -> None:
        async with serving(saying(answer())) as server:
            environment.setenv("http_proxy", f"http://127.0.0.1:{unused_port()}")
            environment.setenv("no_proxy", "127.0.0.1")
            async with transport_to(server.url(), proxy_from_environment=True) as transport:
                assert isinstance(await transport.send(REQUEST), Reply)

    anyio.run(run)


def test_a_proxy_that_wants_a_password_is_told_apart(environment: pytest.MonkeyPatch) -> None:
    """407 from a tunnel is the proxy's refusal, not the service's."""

    async def tunnel(caller: Caller) -> None:
        await caller.say(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        await caller.gone()

    async def run() -> None:
        async with serving(tunnel) as proxy:
            environment.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
            async with transport_to("https://api.example/v1", proxy_from_environment=True) as transport:
                found = await transport.send(REQUEST)
        assert isinstance(found, Failure)
        assert (found.kind, found.paid) == (Kind.PROXY, False)

    anyio.run(run)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["502", "403"],
)
def test_a_proxy_that_does_not_connect_is_told_apart(environment: pytest.MonkeyPatch, said: bytes) -> None:
    """Whatever a proxy says instead of opening a tunnel, nothing was sent to the service."""

    async def tunnel(caller: Caller) -> None:
        await caller.say(said)

    async def run() -> None:
        async with serving(tunnel) as proxy:
            environment.setenv("https_proxy", f"http://me:proxy-password@127.0.0.1:{proxy.port}")
            async with transport_to("https://api.example/v1", proxy_from_environment=True) as transport:
                found = await transport.send(REQUEST)
        assert isinstance(found, Failure)
        assert (found.kind, found.paid) == (Kind.CONNECTION, False)
        assert "proxy-password" not in found.message

    anyio.run(run)


def test_a_proxy_that_is_not_there_is_named(environment: pytest.MonkeyPatch) -> None:
    """The address that nobody listens on is the proxy's."""
    port = unused_port()
    environment.setenv("http_proxy", f"http://127.0.0.1:{port}")

    async def run() -> Reply | Failure:
        async with transport_to("http://service.internal/v1", proxy_from_environment=True) as transport:
            return await transport.send(REQUEST)

    found = anyio.run(run)
    assert isinstance(found, Failure)
    assert (found.kind, found.paid) == (Kind.CONNECTION, False)
    assert found.message == f"cannot connect to 127.0.0.1:{port}: Connection refused"


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request", "302 Found", "201 Created"])
def test_a_secret_that_is_sent_back_is_cut_out(status: str) -> None:
    """The key stands in no body and no message, whoever repeats it."""
    body = b'{"message":"the key ' + SECRET.encode() + b' is wrong"}'
    [outcome] = outcomes(saying(answer(body, f"Location: http://{SECRET}/\r\n", status)))
    assert outcome.body is not None
    assert b"the key [redacted] is wrong" in outcome.body
    assert SECRET not in repr(outcome.body)
    if isinstance(outcome, Failure):
        assert SECRET not in outcome.message


def events(*data: str, done: bool = True) -> bytes:
    """A chunked response of server-sent events, each in a chunk of its own."""
    chunks = [f"data: {part}\n\n".encode() for part in (*data, *(["[DONE]"] if done else []))]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return STREAM + b"Transfer-Encoding: chunked\r\n\r\n" + body


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
ROLE = '{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'
WORDS = '{"choices":[{"index":0,"delta":{"content":"yes"}}]}'
STOP = '{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
ASKED = msgspec.structs.replace(REQUEST, stream=True)
STREAMED = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}]}


def test_a_streamed_answer_is_one_object_and_its_connection_is_kept() -> None:
    """Events become the object of a plain answer; the moment of the first token is that of the first word."""

    async def talk(caller: Caller) -> None:
        while await caller.request():
            await caller.say(events(ROLE, done=False))
            await asyncio.sleep(0.05)
            await caller.say(events(WORDS, STOP).partition(b"\r\n\r\n")[2])
            await asyncio.sleep(0.02)
            await caller.say(b"0\r\n\r\n")

    async def run() -> None:
        async with serving(talk) as server, transport_to(server.url()) as transport:
            for _ in range(3):
                reply = await transport.send(ASKED)
                assert isinstance(reply, Reply)
                assert json.loads(reply.body) == STREAMED
                first = reply.timing.time_to_first_token
                assert first is not None
                assert 0.05 <= first <= reply.timing.latency
        assert server.connections == 1

    anyio.run(run)


def test_a_service_may_stream_or_not_whatever_was_asked() -> None:
    """A plain answer to a request for a stream is accepted, and a stream to a plain request."""

    async def run() -> None:
        for raw, request in ((answer(), ASKED), (events(WORDS, STOP) + b"0\r\n\r\n", REQUEST)):
            async with serving(saying(raw)) as server, transport_to(server.url()) as transport:
                reply = await transport.send(request)
            assert isinstance(reply, Reply)
            assert not isinstance(cerebras.read(reply), Failure)
            assert (reply.timing.time_to_first_token is None) is (request is ASKED)

    anyio.run(run)


def test_a_stream_may_be_packed() -> None:
    """A content encoding is taken off as the pieces come."""
    packer = zlib.compressobj(wbits=31)
    parts = [packer.compress(f"data: {part}\n\n".encode()) + packer.flush(zlib.Z_SYNC_FLUSH) for part in (WORDS, STOP)]
    raw = b"".join((*parts, packer.flush()))
    head = STREAM + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(raw)
    for outcome in outcomes(saying(head + raw), times=2):
        assert isinstance(outcome, Reply)
        assert json.loads(outcome.body) == STREAMED


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (events(WORDS, done=False), Kind.DISCONNECTED),
        (events(WORDS, STOP, done=False), Kind.DISCONNECTED),
        (STREAM + b"\r\ndata: " + WORDS.encode() + b"\n\n", Kind.DISCONNECTED),
        (STREAM + b"\r\n", Kind.DISCONNECTED),
        (STREAM + b"Content-Encoding: gzip\r\n\r\n" + b"data: 1\n\n", Kind.MALFORMED_RESPONSE),
        (STREAM + b"Content-Encoding: br\r\n\r\n" + b"data: 1\n\n", Kind.MALFORMED_RESPONSE),
    ],
    ids=["chunks", "unended", "unlimited", "empty", "not-packed", "unasked-packing"],
)
def test_a_stream_that_breaks_off_is_no_answer(raw: bytes, kind: Kind) -> None:
    """Nothing of a stream that lost its connection is stored, and it may be paid."""
    found = failure(breaking(raw))
    assert (found.kind, found.status, found.paid, found.body) == (kind, 200, True, None)


@pytest.mark.parametrize(
    "raw",
    [
        events(WORDS, STOP),
        events(WORDS, STOP, done=False) + b"0\r\n\r\n",
        STREAM + f"\r\ndata: {WORDS}\n\ndata: {STOP}\n\n".encode(),
    ],
    ids=["no-end-of-chunks", "no-done", "neither"],
)
def test_a_stream_that_says_that_it_is_whole_is(raw: bytes) -> None:
    """[DONE], or a finish reason for every choice at an end that HTTP allows, makes an answer whole."""
    [outcome] = outcomes(breaking(raw))
    assert isinstance(outcome, Reply)
    assert json.loads(outcome.body) == STREAMED


def test_a_stream_that_ends_unfinished_is_malformed_and_kept() -> None:
    """A clean end without a finish reason is the service's fault: what came is there to be looked at."""
    [outcome] = outcomes(saying(events(WORDS) + b"0\r\n\r\n"))
    assert isinstance(outcome, Reply)
    found = cerebras.read(outcome)
    assert isinstance(found, Failure)
    assert (found.kind, found.paid) == (Kind.MALFORMED_RESPONSE, True)
    assert b"yes" in (found.body or b"")


def test_an_error_within_a_stream_is_read_by_the_dialect() -> None:
    """The error takes the place of the answer, secrets cut out, and the connection is not waited for."""
    error = '{"error":{"message":"no, ' + SECRET + '","code":"queue_exceeded"},"status_code":429}'

    async def stuck(caller: Caller) -> None:
        await caller.request()
        await caller.say(events(WORDS, error, done=False))
        await caller.gone()

    [outcome] = outcomes(stuck)
    assert isinstance(outcome, Reply)
    assert json.loads(outcome.body) == {
        "error": {"message": "no, [redacted]", "code": "queue_exceeded"},
        "status_code": 429,
    }
    found = cerebras.read(outcome)
    assert isinstance(found, Failure)
    assert (found.kind, found.message) == (Kind.OVERLOADED, "no, [redacted]")


def test_a_secret_that_is_streamed_in_parts_is_cut_out() -> None:
    """The answer is looked through when it is whole."""
    parts = [WORDS.replace("yes", SECRET[start : start + 3]) for start in range(0, len(SECRET), 3)]
    [outcome] = outcomes(saying(events(*parts, STOP) + b"0\r\n\r\n"))
    assert isinstance(outcome, Reply)
    assert json.loads(outcome.body)["choices"][0]["message"]["content"] == "[redacted]"


def test_a_stream_that_hangs_ends_with_the_time_of_the_request() -> None:
    """`timeout` holds for the whole of a stream, however lively it is."""

    async def lively(caller: Caller) -> None:
        await caller.request()
        await caller.say(events(WORDS, done=False))
        while True:
            await caller.say(b"3\r\n:.\n\r\n")
            await asyncio.sleep(0.01)

    found = failure(lively, timeout=0.3)
    assert (found.kind, found.paid) == (Kind.TIMEOUT, True)
    assert found.message == "the answer was not whole within 0.3 s"
    assert found.timing is not None
    assert found.timing.time_to_first_token is not None


def test_a_stream_that_stands_still_is_given_up() -> None:
    """Once an answer has begun, silence ends it long before the time of the whole request."""

    async def silent(caller: Caller) -> None:
        await caller.request()
        await caller.say(events(WORDS, done=False))
        await caller.gone()

    async def run() -> Reply | Failure:
        async with serving(silent) as server:
            transport = HttpTransport(server.url(), {}, cerebras, 20.0, silence=0.2, library=library)
            try:
                return await transport.send(ASKED)
            finally:
                await transport.close()

    found = anyio.run(run)
    assert isinstance(found, Failure)
    assert (found.kind, found.paid, found.message) == (Kind.TIMEOUT, True, "the answer stood still for 0.2 s")


def test_an_endless_stream_is_cut() -> None:
    """What is kept has a bound, and what is thrown away has another one."""
    for said in (WORDS, '{"choices":[]}'):
        piece = f"data: {said}\n\n".encode() * 2000

        async def endless(caller: Caller, piece: bytes = piece) -> None:
            await caller.request()
            await caller.say(STREAM + b"\r\n")
            while True:
                await caller.say(piece)

        found = failure(endless, max_body_bytes=20_000)
        assert (found.kind, found.paid) == (Kind.RESPONSE_TOO_LARGE, True)
        assert found.message == "the answer is longer than 20,000 bytes"


LONG = msgspec.structs.replace(
    REQUEST,
    body=msgspec.json.encode(
        {"model": "m", "messages": [{"role": "user", "content": "long text " * 20_000}], "n": 1, "temperature": 1.0}
    ),
)


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("request_", [REQUEST, LONG], ids=["short", "long"])
def test_bodies_travel_as_the_job_says(encoding: str, compression: str, request_: Request) -> None:
    """msgpack and gzip, alone and together, say in the headers what they are and unpack to the same values."""

    async def run() -> bytes:
        async with serving(saying(answer())) as server:
            headers = {"content-type": "text/plain"}
            async with transport_to(
                server.url(), headers=headers, encoding=encoding, compression=compression
            ) as transport:
                assert isinstance(await transport.send(request_), Reply)
            return server.requests[0]

    head, _, body = anyio.run(run).partition(b"\r\n\r\n")
    gzipped = compression == "gzip" and request_ is LONG
    assert (b"\r\ncontent-encoding: gzip\r\n" in head.lower() + b"\r\n") is gzipped
    content_type = {"json": b"application/json", "msgpack": b"application/vnd.msgpack"}[encoding]
    assert [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-type:")] == [
        b"content-type: " + content_type
    ]
    plain = gzip.decompress(body) if gzipped else body
    if encoding == "json":
        assert plain == request_.body
    else:
        values = msgspec.msgpack.decode(plain)
        assert values == json.loads(request_.body)
        if request_ is LONG:
            assert (type(values["n"]), type(values["temperature"])) == (int, float)


def test_a_number_that_msgpack_cannot_hold_is_its_rows_own_failure() -> None:
    """Whole numbers end at 64 bits there; larger ones are not sent as something else."""
    large = msgspec.structs.replace(REQUEST, body=b'{"seed":18446744073709551616}')

    async def run() -> None:
        async with serving(saying(answer())) as server:
            async with transport_to(server.url(), encoding="msgpack") as transport:
                found = await transport.send(large)
                assert isinstance(await transport.send(REQUEST), Reply)
            assert len(server.requests) == 1
        assert isinstance(found, Failure)
        assert (found.kind, found.paid) == (Kind.UNSENDABLE, False)

    anyio.run(run)


@pytest.mark.parametrize("status", [400, 415, 422, 429])
def test_a_refusal_says_how_the_body_went_until_one_was_answered(status: int) -> None:
    """A service that has answered a gzipped body can read gzip: later refusals have other reasons."""

    async def talk(caller: Caller) -> None:
        number = 0
        while await caller.request():
            await caller.say(answer() if number == 1 else answer(b"{}", status=f"{status} No"))
            number += 1

    async def run() -> list[str | None]:
        async with serving(talk) as server, transport_to(server.url(), compression="gzip") as transport:
            sent = [await transport.send(LONG) for _ in range(3)]
        return [outcome.packing for outcome in sent if isinstance(outcome, Failure)]

    assert anyio.run(run) == ([None, None] if status == 429 else ["gzip", None])


def left() -> tuple[int, int]:
    """How many files and sockets this process holds, and how many threads."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="files and threads are counted in /proc")
def test_nothing_is_left_of_a_transport() -> None:
    """Answered, refused, broken off and cancelled: once it is closed no socket and no thread is there any more."""

    async def talk(caller: Caller) -> None:
        for raw in (answer(), answer(b"{}", status="503 No"), answer()[:-10]):
            await caller.request()
            await caller.say(raw)
        await caller.gone()

    arrived = asyncio.Semaphore(0)

    async def silent(caller: Caller) -> None:
        arrived.release()
        await caller.gone()

    async def used(server: Server, silence: Server) -> None:
        async with transport_to(server.url()) as transport, transport_to(silence.url()) as stuck:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(stuck.send, REQUEST)
                for _ in range(2):
                    await transport.send(REQUEST)
                for _ in range(5):
                    await arrived.acquire()
                group.cancel_scope.cancel()

    async def run() -> None:
        async with serving(talk) as server, serving(silent) as silence:
            await used(server, silence)  # what a process needs once: a loop's threads, Rust's
            await few(left()[0])
            before = left()
            for _ in range(3):
                await used(server, silence)
            await few(before[0])
            assert left()[1] <= before[1]

    async def few(most: int) -> None:
        """Wait until no more than so many files are open, and the servers' sides are closed as well."""
        with anyio.fail_after(5):
            while len(os.listdir("/proc/self/fd")) > most:  # noqa: ASYNC110 - nothing tells of it
                await anyio.sleep(0.001)

    anyio.run(run)


def test_headers_that_nobody_can_read_do_no_harm() -> None:
    """What is not ASCII may be missing; one that comes twice is seen twice."""
    headers = "x-own: \xff\xfe\r\nx-ratelimit-limit-requests-day: 7\r\nx-twice: 1\r\nx-twice: 2\r\n"
    raw = answer(headers="").replace(b"Content-Length", headers.encode("latin-1") + b"Content-Length", 1)
    [reply] = outcomes(saying(raw))
    assert isinstance(reply, Reply)
    assert [value for name, value in reply.headers.items() if name.lower() == "x-twice"] == ["1", "2"]
    assert [limit.limit for limit in cerebras.limits(reply.headers)] == [7.0]
    assert reply.headers.get("x-absent") is None


def test_closing_closes_every_connection() -> None:
    """After close no connection is left, idle ones included."""

    async def kept(caller: Caller) -> None:
        await caller.request()
        await caller.say(answer())
        await caller.gone()

    async def run() -> None:
        async with serving(kept) as server:
            async with transport_to(server.url()) as transport:
                assert isinstance(await transport.send(REQUEST), Reply)
                assert not server.gone.is_set()
            with anyio.fail_after(5):
                await server.gone.wait()

    anyio.run(run)


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"], ids=["before", "within"])
def test_cancellation_passes_and_leaves_no_connection(begun: bytes) -> None:
    """A cancelled request is no failure of its row, and its connection is closed at once."""
    waiting = anyio.Event()

    async def stuck(caller: Caller) -> None:
        await caller.request()
        await caller.say(begun)
        waiting.set()
        await caller.gone()

    async def run() -> None:
        async with serving(stuck) as server, transport_to(server.url()) as transport:
            async with anyio.create_task_group() as group:
                group.start_soon(transport.send, REQUEST)
                await waiting.wait()
                group.cancel_scope.cancel()
            if library == "reqwest" and not begun:  # a request of which nothing has come is not taken back before
                await transport.close()
            with anyio.fail_after(5):
                await server.gone.wait()

    anyio.run(run)


@pytest.mark.parametrize(
    ("url", "headers", "hint"),
    [
        ("ftp://127.0.0.1/v1", {}, "http://"),
        ("127.0.0.1/v1", {}, "http://"),
        ("http://[::bad/v1", {}, "no address"),
        ("http://me:hidden-word@127.0.0.1/v1", {}, "password"),
        ("http://127.0.0.1/v1", {"Authorization": "Bearer hidden-word\n"}, "line break"),
        ("http://127.0.0.1/v1", {"X-Own": "hidden-word\udc80"}, "X-Own"),
        ("http://127.0.0.1/v1", {"X Own": "hidden-word"}, "X Own"),
    ],
)
def test_what_can_never_be_sent_is_refused_before_anything_is(url: str, headers: dict[str, str], hint: str) -> None:
    """A wrong address or header is said once, without its value, rather than by every row."""

    async def run() -> None:
        async with transport_to(url, headers=headers):
            pass

    with pytest.raises(JobError) as caught:
        anyio.run(run)
    assert hint in str(caught.value)
    assert "hidden-word" not in str(caught.value)


FRAGMENTS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 429 No\r\n",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Encoding: gzip\r\n",
        b"Location: x\r\n",
        b"\r\n",
        b"3\r\n{}\n\r\n",
        b"0\r\n\r\n",
        b'{"error":1}',
        gzip.compress(ANSWER, mtime=0),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(FRAGMENTS, st.binary(max_size=20)), max_size=8).map(b"".join))
def test_whatever_comes_back_is_a_value(raw: bytes) -> None:
    """No bytes of a server make sending raise."""
    for outcome in outcomes(breaking(raw), timeout=5.0):
        assert isinstance(outcome, Reply | Failure)
