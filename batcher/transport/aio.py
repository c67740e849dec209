"""aiohttp as a transport's HTTP library: the one that is always there."""

import io
import os
import socket
import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final

import aiohttp
from aiohttp import hdrs
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

_LARGE_REQUEST: Final = 1 << 20
"""Above this many bytes aiohttp wants a stream rather than one piece."""
_GZIPPED: Final[Mapping[str, str]] = {hdrs.CONTENT_ENCODING: "gzip"}
_PROBES: Final = (("TCP_KEEPIDLE", PROBE_AFTER), ("TCP_KEEPINTVL", PROBE_EVERY), ("TCP_KEEPCNT", PROBES))

_opened: ContextVar[list[bool]] = ContextVar("_opened")
"""Has a member when the request on its way opened a connection rather than used a kept one."""


class Aiohttp:
    """An aiohttp session. Made inside a running event loop."""

    def __init__(self, settings: Settings) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE, socket_factory=_open_socket),
            headers=settings.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            # No limit on silence: a service that thinks for minutes is silent, too.
            timeout=aiohttp.ClientTimeout(
                total=settings.timeout, sock_connect=settings.connect_timeout, sock_read=None
            ),
            proxy=settings.proxy,
            trust_env=False,
            auto_decompress=False,
            raise_for_status=False,
        )

    async def ask(self, url: URL, body: bytes | None, *, gzipped: bool) -> "_Incoming":
        """Send a request and wait for the head of its answer."""
        opened: list[bool] = []
        _opened.set(opened)
        try:
            if body is None:
                response = await self._session.get(url, allow_redirects=False)
            else:
                response = await self._session.post(
                    url,
                    data=body if len(body) <= _LARGE_REQUEST else io.BytesIO(body),
                    headers=_GZIPPED if gzipped else None,
                    allow_redirects=False,
                )
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, aiohttp.InvalidURL):
                raise
            raise _lost(error, reused=not opened) from None
        return _Incoming(response)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()


class _Incoming:
    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    async def whole(self) -> bytes:
        try:
            return await self._response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise _lost(error) from None

    async def piece(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise _lost(error) from None

    async def close(self) -> None:
        if not self._response.closed:
            self._response.close()


def _lost(error: Exception, *, reused: bool = False) -> LostError:
    """What an exception of aiohttp says of the attempt; `reused`: nothing came, and its connection had been kept."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as reason):
            return LostError(Kind.CERTIFICATE, reason.verify_message)
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ServerFingerprintMismatch():
            return LostError(Kind.CERTIFICATE)
        case OSError(errno=number) if number in LOCAL_ERRNOS:
            return LostError(Kind.LOCAL_RESOURCES, _reason(error))
        case aiohttp.ClientConnectorDNSError():
            return LostError(Kind.DNS, _reason(error))
        case aiohttp.ClientConnectorSSLError():
            return LostError(Kind.TLS, _reason(error))
        case aiohttp.ClientConnectorError():
            return LostError(Kind.CONNECTION, _reason(error))
        case aiohttp.ConnectionTimeoutError():
            return LostError(Kind.CONNECT_TIMEOUT)
        case TimeoutError():
            return LostError(Kind.TIMEOUT)
        case aiohttp.ClientHttpProxyError(status=407):
            return LostError(Kind.PROXY)
        case aiohttp.ClientHttpProxyError():
            return LostError(Kind.CONNECTION, f"status {error.status}", tunnel=True)
        case aiohttp.ClientResponseError():
            return LostError(Kind.PROTOCOL_ERROR, error.message)
        case aiohttp.ClientPayloadError():
            return LostError(Kind.DISCONNECTED)
        case _ if reused:
            return LostError(Kind.STALE_CONNECTION)
    return LostError(Kind.DISCONNECTED, str(error))


def _reason(error: OSError) -> str:
    """What the system says, without the names of classes and numbers around it."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if inner.errno and not isinstance(inner, ssl.SSLError | socket.gaierror):
        return os.strerror(inner.errno)
    return inner.strerror or str(inner)


def _open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for a new connection of the current request."""
    _opened.get().append(True)
    opened = socket.socket(*address[:3])
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES:
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened
