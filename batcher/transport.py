"""One request over HTTP: a reply or a failure, never an exception for a row's sake."""

import asyncio
import contextlib
import errno
import io
import os
import re
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Final, Protocol

import aiohttp
import msgspec
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from batcher.dialects import Dialect
from batcher.dialects.stream import Assembler, StreamTooLargeError
from batcher.errors import JobError
from batcher.payload import ASIDE_FROM, CONTENT_TYPES, pack
from batcher.records import PATHS, Failure, Kind, Reply, Request, Timing
from batcher.redact import redactor


class Transport(Protocol):
    """The way to the service."""

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once. A reply has status 200 and its body whole."""

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path below the service's address, such as `/models`."""

    async def close(self) -> None:
        """Close every connection."""


_CONNECT_TIMEOUT: Final = 10.0
_LARGE_REQUEST: Final = 1 << 20
"""Above this many bytes aiohttp wants a stream rather than one piece."""
_REFUSAL_BYTES: Final = 1 << 16
"""As much of a refusal as is worth reading."""
_AFTERWARDS: Final = 1.0
"""Seconds that a connection may take to end an answer that is whole, or it is not kept."""
_WORDINESS: Final = 64
"""Times that a stream may be longer than the answer in it: events of one token say everything else again."""
_PIECE: Final = 1 << 18
_UNREAD: Final = frozenset((400, 415, 422))
"""Statuses of a service that cannot read a body."""
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
    everything that comes back. `encoding` and `compression` are the job's; `silence` is how many seconds a stream may
    stand still once it has begun to answer. JobError when the address or a header cannot
    be sent.
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
        encoding: str = "json",
        compression: str = "none",
        silence: float = 60.0,
    ) -> None:
        self._url = _address(url)
        self._urls = {endpoint: _address(url + path) for endpoint, path in PATHS.items()}
        self._dialect = dialect
        self._timeout = timeout
        self._max_wire_bytes = max_wire_bytes
        self._max_body_bytes = max_body_bytes
        proxy = _proxy(self._url) if proxy_from_environment else None
        self._redact = redactor([*secrets, *_passwords(proxy)])
        self._encoding, self._compression = encoding, compression
        self._silence = silence
        self._plain = encoding == "json" and compression == "none"
        self._read: set[str] = set()  # how bodies were packed that the service has answered
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_open_socket),
            headers=_checked({**_HEADERS, **dialect.headers}, headers, CONTENT_TYPES[encoding]),
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
        return await self._exchange(self._urls[request.endpoint], request.body)

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path below the service's address."""
        return await self._exchange(_address(f"{self._url}{path}"), None)

    async def _exchange(self, url: URL, body: bytes | None) -> Reply | Failure:
        """One request, a POST where it has a body, and its answer read to its end."""
        opened: list[bool] = []
        _opened.set(opened)
        packing = ""
        response: aiohttp.ClientResponse | None = None
        events: _Events | None = None
        sent_at = time.time_ns() // 1000
        started = time.perf_counter()
        try:
            if body is None:
                response = await self._session.get(url, allow_redirects=False)
            else:
                if not self._plain:
                    body, packing = await self._packed(body)
                response = await self._session.post(
                    url,
                    data=body if len(body) <= _LARGE_REQUEST else io.BytesIO(body),
                    headers=_GZIPPED if packing.endswith("gzip") else None,
                    allow_redirects=False,
                )
            status = response.status
            if status != 200:
                answer = await self._start(response)
            elif "event-stream" not in response.headers.get(hdrs.CONTENT_TYPE, "").lower():
                answer = await self._whole(response)
            else:
                events = _Events()
                answer = await events.read(response, self._max_body_bytes, self._silence)
            timing = _timing(sent_at, started, events)
        except MemoryError:
            raise
        except Exception as error:
            timing = _timing(sent_at, started, events)
            kind, message, paid = self._meaning(error, reused=not opened, begun=response is not None)
            return self._failure(kind, message, timing, None if response is None else response.status, paid=paid)
        finally:
            if response is not None and not response.closed:
                response.close()
        reply = Reply(status, response.headers, self._redact(answer), timing)
        if status == 200:
            if packing:
                self._read.add(packing)
            return reply
        if status < 300:
            message = f"status {status} where 200 was expected"
            return self._failure(Kind.MALFORMED_RESPONSE, message, timing, status, reply.body, paid=True)
        if status < 400:
            return self._failure(Kind.REDIRECT, self._redirection(response), timing, status, reply.body)
        refusal = self._dialect.refusal(reply)
        if packing and status in _UNREAD and packing not in self._read:
            return msgspec.structs.replace(refusal, packing=packing)
        return refusal

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def _packed(self, body: bytes) -> tuple[bytes, str]:
        """A body as it is sent, and how it was packed. ValueError or OverflowError when it cannot be."""
        arguments = body, self._encoding, self._compression
        if len(body) < ASIDE_FROM:
            packed, gzipped = pack(*arguments)
        else:
            packed, gzipped = await asyncio.get_running_loop().run_in_executor(None, pack, *arguments)
        return packed, "+".join([self._encoding] * (self._encoding != "json") + ["gzip"] * gzipped)

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
            case StreamTooLargeError():
                return Kind.RESPONSE_TOO_LARGE, f"the answer is longer than {self._max_body_bytes:,} bytes", True
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
        words = self._redact(" ".join(message.split()).encode("utf-8", "replace")).decode("utf-8", "replace")
        return Failure(kind, words[:_LONGEST_MESSAGE], timing, status, body=body, paid=paid)


class _Events:
    """A streamed answer as it is read, with the moments (of `time.perf_counter`) that matter: begun, and whole."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.ended: float | None = None

    async def read(self, response: aiohttp.ClientResponse, most: int, silence: float) -> bytes:
        """The answer as it comes without streaming, never more than `most` bytes of it in memory."""
        now = asyncio.get_running_loop().time
        events, unpacked = Assembler(most), _unpacking(response.headers.get(hdrs.CONTENT_ENCODING, ""))
        came, renewed = 0, 0.0
        try:
            async with asyncio.timeout(None) as patience:
                while not events.ended and (piece := await response.content.readany()):
                    for plain in unpacked(piece):
                        came += len(plain)
                        if came > most * _WORDINESS:
                            raise StreamTooLargeError
                        events.feed(plain)
                    if events.begun:
                        if self.begun is None:
                            self.begun = time.perf_counter()
                        if (moment := now()) >= renewed + 1.0:  # a timer for every token would cost too much
                            renewed = moment
                            patience.reschedule(moment + silence)
        except TimeoutError:
            if patience.expired():
                raise _UnreadableError(Kind.TIMEOUT, f"the answer stood still for {silence:g} s") from None
            raise
        answer = events.finish()
        self.ended = time.perf_counter()
        if events.ended:
            await _end(response)
        elif not events.complete and not _delimited(response):
            raise aiohttp.ClientPayloadError
        return answer


_GZIPPED: Final[Mapping[str, str]] = {hdrs.CONTENT_ENCODING: "gzip"}
_HEADERS: Final[Mapping[str, str]] = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
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


async def _end(response: aiohttp.ClientResponse) -> None:
    """Read what little follows an answer that is whole, so that its connection can be kept."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        if not response.content.at_eof():
            async with asyncio.timeout(_AFTERWARDS):
                await _read(response, _REFUSAL_BYTES)


def _delimited(response: aiohttp.ClientResponse) -> bool:
    """Whether HTTP says where the body ends; else a broken connection looks like an end."""
    headers = response.headers
    return hdrs.CONTENT_LENGTH in headers or "chunked" in headers.get(hdrs.TRANSFER_ENCODING, "").lower()


def _timing(sent_at: int, started: float, events: _Events | None) -> Timing:
    if events is None:
        return Timing(sent_at, time.perf_counter() - started)
    ended = time.perf_counter() if events.ended is None else events.ended
    return Timing(sent_at, ended - started, None if events.begun is None else events.begun - started)


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The body without its content encoding, never more than `most` bytes of it in memory."""
    unpacker = _unpacker(encoding)
    if unpacker is None:
        return body
    try:
        unpacked = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise _not_unpacked(error) from None
    if len(unpacked) > most:
        raise _too_large(most)
    if not unpacker.eof or unpacker.unused_data:
        raise _not_unpacked("its length is wrong")
    return unpacked


def _unpacking(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """What takes the content encoding off a body as it comes, a little of it in memory at a time."""
    unpacker = _unpacker(encoding)
    if unpacker is None:
        return lambda piece: iter((piece,))

    def unpacked(piece: bytes) -> Iterator[bytes]:
        while piece:
            try:
                plain = unpacker.decompress(piece, _PIECE)
            except zlib.error as error:
                raise _not_unpacked(error) from None
            piece = unpacker.unconsumed_tail
            yield plain

    return unpacked


def _unpacker(encoding: str) -> "zlib._Decompress | None":
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name not in ("gzip", "x-gzip", "deflate"):
        raise _UnreadableError(Kind.MALFORMED_RESPONSE, f"the answer is packed as {name}, which was not asked for")
    return zlib.decompressobj(zlib.MAX_WBITS | 32)


def _not_unpacked(why: object) -> _UnreadableError:
    return _UnreadableError(Kind.MALFORMED_RESPONSE, f"the answer cannot be unpacked: {why}")


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


def _checked(common: Mapping[str, str], own: Mapping[str, str], content_type: str) -> CIMultiDict[str]:
    """One set of headers, `own` before `common`; what a service would never receive is refused."""
    headers = CIMultiDict(common)
    headers.update(own)
    headers[hdrs.CONTENT_TYPE] = content_type
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
