"""pyreqwest as a transport's HTTP library: Rust's reqwest, for less than half of the CPU."""

import itertools
import os
import re
import socket
import sys
from collections.abc import ItemsView, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Final

from yarl import URL

from batcher.records import Kind
from batcher.transport.client import (
    IDLE,
    LOCAL_ERRNOS,
    PROBE_AFTER,
    PROBE_EVERY,
    PROBES,
    LostError,
    Settings,
)

# Its allocator asks for huge pages, of which connections fill a part: at 2,000 in flight that is a third of the memory.
# It looks only once, when it is loaded.
_HUGE_PAGES: Final = "MIMALLOC_ALLOW_THP"
_unset = _HUGE_PAGES not in os.environ
if _unset:
    os.environ[_HUGE_PAGES] = "0"
try:
    from pyreqwest.client import ClientBuilder
    from pyreqwest.exceptions import DecodeError, PyreqwestError, RequestTimeoutError
    from pyreqwest.http import HeaderMap, Url
    from pyreqwest.proxy import ProxyBuilder
    from pyreqwest.request import StreamRequest
    from pyreqwest.response import Response
finally:
    if _unset:
        del os.environ[_HUGE_PAGES]

TAGS: Final = sys.platform == "linux"
"""Whether a client's sockets can be told from others."""
_tags: Final = itertools.count(15 * 60 * 1000)
"""Milliseconds without acknowledgement after which TCP gives up, as the system does anyway; each client has its own."""
_CONNECTING: Final = "client error (Connect)"
_TUNNEL: Final = "tunnel error: "
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")


class Reqwest:
    """A pyreqwest client. All clients of a process share one thread of Rust, which stays.

    HTTP/1.1 only: docs/performance.md says why. A request of which nothing was written when its kept connection turned
    out to be closed goes over another one.
    """

    def __init__(self, settings: Settings) -> None:
        self._tag = next(_tags)
        builder = (
            ClientBuilder()
            .default_headers(settings.headers)
            .timeout(timedelta(seconds=settings.timeout))
            .connect_timeout(timedelta(seconds=settings.connect_timeout))
            .pool_idle_timeout(timedelta(seconds=IDLE))
            .tcp_keepalive(timedelta(seconds=PROBE_AFTER))
            .tcp_keepalive_interval(timedelta(seconds=PROBE_EVERY))
            .tcp_keepalive_retries(PROBES)
            .follow_redirects(False)
            .referer(False)
            .gzip(False)
            .deflate(False)
            .brotli(False)
            .zstd(False)
            .http1_only()
            .no_proxy()
        )
        if settings.proxy is not None:
            builder = builder.proxy(ProxyBuilder.all(str(settings.proxy)))
        if TAGS:
            builder = builder.tcp_user_timeout(timedelta(milliseconds=self._tag))
        self._client = builder.build()
        self._urls: dict[URL, Url] = {}

    async def ask(self, url: URL, body: bytes | None, *, gzipped: bool) -> "_Incoming":
        """Send a request and wait for the head of its answer."""
        parsed = self._urls.get(url)
        if parsed is None:
            parsed = self._urls[url] = Url(str(url))
        if body is None:
            builder = self._client.get(parsed)
        else:
            builder = self._client.post(parsed).body_bytes(body)
            if gzipped:
                builder = builder.header("Content-Encoding", "gzip")
        # A buffer would save a tenth, but the head waits until that is full, and is lost with a body that breaks off.
        request = builder.streamed_read_buffer_limit(0).build_streamed()
        try:
            response = await request.__aenter__()
        except PyreqwestError as error:
            raise _lost(error, begun=False) from None
        if response.get_header("Transfer-Encoding") and response.get_header("Content-Length"):
            await request.__aexit__(None, None, None)
            raise LostError(Kind.PROTOCOL_ERROR, "two lengths of one body")
        return _Incoming(request, response)

    async def close(self) -> None:
        """Close every connection, also those of requests that were cancelled: pyreqwest lets them run on."""
        if hasattr(self, "_client"):
            if TAGS:
                _shut(self._tag)
            await self._client.close()
            del self._client  # only then it lets go of connections that wait


def _shut(tag: int) -> None:
    """Shut down the sockets of this process that bear a tag."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, or no TCP socket
            own = os.dup(int(name))
            try:
                held = socket.socket(fileno=own)
            except OSError:
                os.close(own)
                raise
            with held:
                if held.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == tag:
                    held.shutdown(socket.SHUT_RDWR)


class _Incoming:
    __slots__ = ("_reader", "_request", "_response", "status")

    def __init__(self, request: StreamRequest, response: Response) -> None:
        self._request, self._response, self._reader = request, response, response.body_reader
        self.status: int = response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return _Headers(self._response.headers)

    def header(self, name: str) -> str:
        try:
            return self._response.get_header(name) or ""
        except ValueError:  # not ASCII: nothing that we look for is like that
            return ""

    async def whole(self) -> bytes:
        try:
            return (await self._reader.bytes()).to_bytes()
        except PyreqwestError as error:
            raise _lost(error, begun=True) from None

    async def piece(self) -> bytes:
        try:
            while (piece := await self._reader.read_chunk()) is not None:
                if piece:
                    return piece.to_bytes()
        except PyreqwestError as error:
            raise _lost(error, begun=True) from None
        return b""

    async def close(self) -> None:
        await self._request.__aexit__(None, None, None)


class _Headers(Mapping[str, str]):
    """Headers without those whose value is not ASCII, which would raise when they are read."""

    __slots__ = ("_map",)

    def __init__(self, headers: HeaderMap) -> None:
        self._map = headers

    def __getitem__(self, name: str) -> str:
        try:
            return self._map[name]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def items(self) -> ItemsView[str, str]:
        return _Items(self._map)


class _Items(ItemsView[str, str]):
    def __init__(self, headers: HeaderMap) -> None:
        self._map = headers

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for name in dict.fromkeys(self._map):
            with suppress(ValueError):
                yield from [(name, value) for value in self._map.getall(name)]


def _lost(error: PyreqwestError, *, begun: bool) -> LostError:
    """What an exception of pyreqwest says of the attempt: its classes say little, its causes are Rust's own words."""
    details: Mapping[str, object] = getattr(error, "details", None) or {}
    listed = details.get("causes")
    causes = [str(cause["message"]) for cause in listed] if isinstance(listed, list) else []
    last = causes[-1] if causes else error.message
    found = _OS_ERROR.search(last)
    number = int(found[1]) if found else 0
    reason = os.strerror(number) if number else last
    connecting = _CONNECTING in causes
    if isinstance(error, RequestTimeoutError):
        return LostError(Kind.CONNECT_TIMEOUT if connecting else Kind.TIMEOUT)
    if number in LOCAL_ERRNOS:
        return LostError(Kind.LOCAL_RESOURCES, reason)
    if not connecting:
        if begun:
            return LostError(Kind.DISCONNECTED)
        return LostError(Kind.PROTOCOL_ERROR if isinstance(error, DecodeError) else Kind.DISCONNECTED, reason)
    if last.startswith("invalid peer certificate"):
        return LostError(Kind.CERTIFICATE, last.partition(": ")[2])
    if "dns error" in causes:
        return LostError(Kind.DNS, reason.removeprefix("failed to lookup address information: "))
    tunnel = next((cause.removeprefix(_TUNNEL) for cause in causes if cause.startswith(_TUNNEL)), "")
    if tunnel == "proxy authorization required":
        return LostError(Kind.PROXY)
    if tunnel and tunnel == last.removeprefix(_TUNNEL):
        return LostError(Kind.CONNECTION, tunnel, tunnel=True)
    if number or last == "tls handshake eof" or any(cause.startswith("tcp ") for cause in causes):
        return LostError(Kind.CONNECTION, reason)
    return LostError(Kind.TLS, reason)
