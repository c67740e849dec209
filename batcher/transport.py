"""One request over HTTP: a reply or a failure, never an exception for a row's sake."""

import errno
import io
import os
import re
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Final, Protocol

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from batcher.dialects import Dialect
from batcher.errors import JobError
from batcher.records import PATHS, Failure, Kind, Reply, Request, Timing


class Transport(Protocol):
    """The way to the service."""

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once. A reply has status 200 and its body whole."""

    async def close(self) -> None:
        """Close every connection."""


_CONNECT_TIMEOUT: Final = 10.0
_LARGE_REQUEST: Final = 1 << 20
"""Above this many bytes aiohttp wants a stream rather than one piece."""
_REFUSAL_BYTES: Final = 1 << 16
"""As much of a refusal as is worth reading."""
_SHORTEST_SECRET: Final = 8
"""Anything shorter would be found in ordinary text."""
_LONGEST_MESSAGE: Final = 500
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_LOCAL_ERRNOS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL))
_PROBES: Final = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
"""An answer may take minutes of silence; these find out that the other side is gone."""

_opened: ContextVar[list[bool]] = ContextVar("_opened")
"""Has a member when the request on its way opened a connection rather than used a kept one."""


class _UnreadableError(Exception):
    """A whole answer that cannot be used."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class HttpTransport:
    """Requests to one service over HTTP. Made inside a running event loop.

    `url` is the service's base address, `timeout` the seconds that a whole request may take. `secrets` are cut out of
    everything that comes back. JobError when the address or a header cannot be sent.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        dialect: Dialect,
        timeout: float,
        secrets: Sequence[str] = (),
        proxy_from_environment: bool = False,
        max_wire_bytes: int = 4 << 20,
        max_body_bytes: int = 8 << 20,
    ) -> None:
        self._url = _address(url)
        self._urls = {endpoint: _address(url + path) for endpoint, path in PATHS.items()}
        self._dialect = dialect
        self._timeout = timeout
        self._max_wire_bytes = max_wire_bytes
        self._max_body_bytes = max_body_bytes
        proxy = _proxy(self._url) if proxy_from_environment else None
        hidden = [*secrets, *_passwords(proxy)]
        self._secrets = tuple(secret.encode() for secret in hidden if len(secret) >= _SHORTEST_SECRET)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_open_socket),
            headers=_checked({**_HEADERS, **dialect.headers}, headers),
            cookie_jar=aiohttp.DummyCookieJar(),
            # No limit on silence: a service that thinks for minutes is silent, too.
            timeout=aiohttp.ClientTimeout(
                total=timeout, sock_connect=min(_CONNECT_TIMEOUT, timeout / 2), sock_read=None
            ),
            proxy=proxy,
            trust_env=False,
            auto_decompress=False,
            raise_for_status=False,
        )

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once, and read the answer to its end."""
        opened: list[bool] = []
        _opened.set(opened)
        body = request.body
        response: aiohttp.ClientResponse | None = None
        sent_at = time.time_ns() // 1000
        started = time.perf_counter()
        try:
            response = await self._session.post(
                self._urls[request.endpoint],
                data=body if len(body) <= _LARGE_REQUEST else io.BytesIO(body),
                allow_redirects=False,
            )
            status = response.status
            answer = await (self._whole(response) if status == 200 else self._start(response))
            timing = Timing(sent_at, time.perf_counter() - started)
        except MemoryError:
            raise
        except Exception as error:
            timing = Timing(sent_at, time.perf_counter() - started)
            kind, message, paid = self._meaning(error, reused=not opened, begun=response is not None)
            return self._failure(kind, message, timing, None if response is None else response.status, paid=paid)
        finally:
            if response is not None and not response.closed:
                response.close()
        for secret in self._secrets:
            if secret in answer:
                answer = answer.replace(secret, b"[redacted]")
        reply = Reply(status, response.headers, answer, timing)
        if status == 200:
            return reply
        if status < 300:
            message = f"status {status} where 200 was expected"
            return self._failure(Kind.MALFORMED_RESPONSE, message, timing, status, answer, paid=True)
        if status < 400:
            return self._failure(Kind.REDIRECT, self._redirection(response), timing, status, answer)
        return self._dialect.refusal(reply)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def _whole(self, response: aiohttp.ClientResponse) -> bytes:
        """The body of an answer, unpacked."""
        length = response.content_length
        if length is not None and length > self._max_wire_bytes:
            raise _too_large(self._max_wire_bytes)
        body = await (_read(response, self._max_wire_bytes) if length is None else response.read())
        if len(body) > self._max_wire_bytes:
            raise _too_large(self._max_wire_bytes)
        encoding = response.headers.get(hdrs.CONTENT_ENCODING)
        return body if encoding is None else _unpacked(body, encoding, self._max_body_bytes)

    async def _start(self, response: aiohttp.ClientResponse) -> bytes:
        """The body of a refusal as far as it came and is worth reading: its status says the most."""
        body = b""
        try:
            body = (await _read(response, _REFUSAL_BYTES))[:_REFUSAL_BYTES]
            encoding = response.headers.get(hdrs.CONTENT_ENCODING)
            return body if encoding is None else _unpacked(body, encoding, _REFUSAL_BYTES)
        except (aiohttp.ClientError, OSError, _UnreadableError):
            return b""

    def _meaning(self, error: Exception, *, reused: bool, begun: bool) -> tuple[Kind, str, bool]:
        """What an exception says of the attempt: kind, message, and whether it may be paid."""
        host = self._url.host
        match error:
            case _UnreadableError():
                return error.kind, str(error), True
            case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as reason):
                return Kind.CERTIFICATE, f"the certificate of {host} is not valid: {reason.verify_message}", False
            case aiohttp.ClientConnectorCertificateError() | aiohttp.ServerFingerprintMismatch():
                return Kind.CERTIFICATE, f"the certificate of {host} is not valid", False
            case OSError(errno=number) if number in _LOCAL_ERRNOS:
                return Kind.LOCAL_RESOURCES, f"this machine cannot open a connection: {_reason(error)}", False
            case aiohttp.ClientConnectorDNSError():
                return Kind.DNS, f"cannot find the address of {host}: {_reason(error)}", False
            case aiohttp.ClientConnectorSSLError():
                return Kind.TLS, f"no TLS with {host}: {_reason(error)}", False
            case aiohttp.ClientConnectorError():
                return Kind.CONNECTION, f"cannot connect to {error.host}:{error.port}: {_reason(error)}", False
            case aiohttp.ConnectionTimeoutError():
                wait = min(_CONNECT_TIMEOUT, self._timeout / 2)
                return Kind.CONNECT_TIMEOUT, f"no connection to {host} within {wait:g} s", False
            case TimeoutError():
                lacking = "the answer was not whole" if begun else "no answer"
                return Kind.TIMEOUT, f"{lacking} within {self._timeout:g} s", True
            case aiohttp.ClientHttpProxyError(status=407):
                return Kind.PROXY, "the proxy wants a user and a password", False
            case aiohttp.ClientHttpProxyError():
                return Kind.CONNECTION, f"the proxy does not connect to {host}: status {error.status}", False
            case aiohttp.ClientResponseError():
                return Kind.PROTOCOL_ERROR, f"what {host} sent is not HTTP: {error.message}", False
            case aiohttp.ClientPayloadError():
                return Kind.DISCONNECTED, f"{host} broke off its answer", True
            case aiohttp.ClientConnectionError() | OSError() if reused and not begun:
                return Kind.STALE_CONNECTION, f"{host} had closed the kept connection", True
            case aiohttp.ClientConnectionError() | OSError():
                return Kind.DISCONNECTED, f"{host} closed the connection: {error}", True
            case ValueError() | OverflowError() if not begun:
                return Kind.UNSENDABLE, f"the request cannot be sent: {error}", False
            case _:
                return Kind.PROTOCOL_ERROR, f"unexpected {type(error).__name__}: {error}", False

    def _redirection(self, response: aiohttp.ClientResponse) -> str:
        try:
            target = response.url.join(URL(response.headers.get(hdrs.LOCATION, "")))
        except ValueError:
            return "the service redirects to an address that is none"
        return f"the service redirects to {target.host}; redirects are not followed, set base_url to the final address"

    def _failure(
        self,
        kind: Kind,
        message: str,
        timing: Timing,
        status: int | None,
        body: bytes | None = None,
        *,
        paid: bool = False,
    ) -> Failure:
        words = " ".join(message.split())[:_LONGEST_MESSAGE].encode("utf-8", "replace")
        for secret in self._secrets:
            words = words.replace(secret, b"[redacted]")
        return Failure(kind, words.decode("utf-8", "replace"), timing, status, body=body, paid=paid)


_HEADERS: Final[Mapping[str, str]] = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
    "Content-Type": "application/json",
    "User-Agent": "batcher",
}


def _open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for a new connection of the current request."""
    _opened.get().append(True)
    opened = socket.socket(*address[:3])
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES:
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body, or its start when it is longer than `most` bytes."""
    pieces, size = [], 0
    while size <= most and (piece := await response.content.readany()):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The body without its content encoding, never more than `most` bytes of it in memory."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip", "deflate"):
        raise _UnreadableError(Kind.MALFORMED_RESPONSE, f"the answer is packed as {name}, which was not asked for")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        unpacked = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise _UnreadableError(Kind.MALFORMED_RESPONSE, f"the answer cannot be unpacked: {error}") from None
    if len(unpacked) > most:
        raise _too_large(most)
    if not unpacker.eof or unpacker.unused_data:
        raise _UnreadableError(Kind.MALFORMED_RESPONSE, "the answer cannot be unpacked: its length is wrong")
    return unpacked


def _too_large(most: int) -> _UnreadableError:
    return _UnreadableError(Kind.RESPONSE_TOO_LARGE, f"the answer is longer than {most:,} bytes")


def _reason(error: OSError) -> str:
    """What the system says, without the names of classes and numbers around it."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if inner.errno and not isinstance(inner, ssl.SSLError | socket.gaierror):
        return os.strerror(inner.errno)
    return inner.strerror or str(inner)


def _address(url: str) -> URL:
    try:
        address = URL(url)
    except ValueError as error:
        raise JobError(f"[service] base_url is no address: {error}") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise JobError("[service] base_url must start with http:// or https:// and name a host")
    if address.user is not None or address.password is not None:
        raise JobError("[service] base_url must not hold a user or a password")
    return address


def _checked(common: Mapping[str, str], own: Mapping[str, str]) -> CIMultiDict[str]:
    """One set of headers, `own` before `common`; what a service would never receive is refused."""
    headers = CIMultiDict(common)
    headers.update(own)
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or _HEADER_FORBIDDEN.search(value):
            raise JobError(f"the header {name!r} holds a character that HTTP does not allow, a line break perhaps")
    return headers


def _proxy(address: URL) -> URL | None:
    """The proxy that the environment names for an address."""
    if urllib.request.proxy_bypass(f"{address.host}:{address.port}"):
        return None
    proxies = urllib.request.getproxies()
    named = proxies.get(address.scheme) or proxies.get("all")
    if not named:
        return None
    try:
        proxy = URL(named)
    except ValueError:
        proxy = URL()
    if proxy.scheme not in ("http", "https") or not proxy.host:
        raise JobError(f"the environment names a proxy for {address.scheme} that is no http:// or https:// address")
    return proxy


def _passwords(proxy: URL | None) -> tuple[str, ...]:
    """A proxy's password, as it is and as it stands in its address."""
    if proxy is None or proxy.password is None:
        return ()
    return proxy.password, proxy.raw_password or ""
