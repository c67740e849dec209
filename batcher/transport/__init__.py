"""One request over HTTP: a reply or a failure, never an exception for a row's sake.

`client` says what an HTTP library has to do for it, `aio` and `reqwest` do it with aiohttp and with pyreqwest. What is
the same whichever is used stands here and in `body`: sizes, packing, streams, words, secrets.
"""

import asyncio
import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Final, Literal, Protocol

import msgspec
from yarl import URL

from batcher.dialects import Dialect
from batcher.errors import JobError
from batcher.payload import ASIDE_FROM, CONTENT_TYPES, pack
from batcher.records import PATHS, Failure, Kind, Reply, Request, Timing
from batcher.redact import redactor
from batcher.transport.aio import Aiohttp
from batcher.transport.body import Events, start, whole
from batcher.transport.client import Client, Incoming, LostError, Settings

Library = Literal["aiohttp", "reqwest"]


class Transport(Protocol):
    """The way to the service."""

    @property
    def name(self) -> str:
        """What `summary.json` calls it."""

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once. A reply has status 200 and its body whole."""

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path below the service's address, such as `/models`."""

    async def close(self) -> None:
        """Close every connection."""


_CONNECT_TIMEOUT: Final = 10.0
_UNREAD: Final = frozenset((400, 415, 422))
"""Statuses of a service that cannot read a body."""
_PAID: Final = frozenset(
    (Kind.DISCONNECTED, Kind.STALE_CONNECTION, Kind.TIMEOUT, Kind.MALFORMED_RESPONSE, Kind.RESPONSE_TOO_LARGE)
)
"""The service may have done its work."""
_LONGEST_MESSAGE: Final = 500
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_HEADERS: Final[Mapping[str, str]] = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip",
    "User-Agent": "batcher",
}


class HttpTransport:
    """Requests to one service over HTTP. Made inside a running event loop.

    `url` is the service's base address, `timeout` the seconds that a whole request may take. `secrets` are cut out of
    everything that comes back. `encoding` and `compression` are the job's; `silence` is how many seconds a stream may
    stand still once it has begun to answer; `library` is the one to use. JobError when the address or a header cannot
    be sent, or the library is not there.
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
        library: Library = "aiohttp",
    ) -> None:
        self.name: str = library
        self._url = _address(url)
        self._urls = {endpoint: _address(url + path) for endpoint, path in PATHS.items()}
        self._dialect = dialect
        self._timeout = timeout
        self._connect_timeout = min(_CONNECT_TIMEOUT, timeout / 2)
        self._max_wire_bytes = max_wire_bytes
        self._max_body_bytes = max_body_bytes
        proxy = _proxy(self._url) if proxy_from_environment else None
        self._peer = proxy or self._url
        self._redact = redactor([*secrets, *_passwords(proxy)])
        self._encoding, self._compression = encoding, compression
        self._silence = silence
        self._plain = encoding == "json" and compression == "none"
        self._read: set[str] = set()  # how bodies were packed that the service has answered
        sent = _checked({**_HEADERS, **dialect.headers}, headers, CONTENT_TYPES[encoding])
        self._client = _client(self.name, Settings(sent, timeout, self._connect_timeout, proxy))

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once, and read the answer to its end."""
        return await self._exchange(self._urls[request.endpoint], request.body)

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path below the service's address."""
        return await self._exchange(_address(f"{self._url}{path}"), None)

    async def _exchange(self, url: URL, body: bytes | None) -> Reply | Failure:
        """One request, a POST where it has a body, and its answer read to its end."""
        packing = ""
        incoming: Incoming | None = None
        events: Events | None = None
        sent_at = time.time_ns() // 1000
        started = time.perf_counter()
        try:
            if body is not None and not self._plain:
                body, packing = await self._packed(body)
            incoming = await self._client.ask(url, body, gzipped=packing.endswith("gzip"))
            status = incoming.status
            if status != 200:
                answer = await start(incoming)
            elif "event-stream" not in incoming.header("Content-Type").lower():
                answer = await whole(incoming, self._max_wire_bytes, self._max_body_bytes)
            else:
                events = Events()
                answer = await events.read(incoming, self._max_body_bytes, self._silence)
            timing = _timing(sent_at, started, events)
        except MemoryError:
            raise
        except Exception as error:
            timing = _timing(sent_at, started, events)
            kind, message = self._meaning(error, begun=incoming is not None)
            return self._failure(kind, message, timing, None if incoming is None else incoming.status)
        finally:
            if incoming is not None:
                await incoming.close()
        reply = Reply(status, incoming.headers, self._redact(answer), timing)
        if status == 200:
            if packing:
                self._read.add(packing)
            return reply
        if status < 300:
            message = f"status {status} where 200 was expected"
            return self._failure(Kind.MALFORMED_RESPONSE, message, timing, status, reply.body)
        if status < 400:
            return self._failure(Kind.REDIRECT, _redirection(url, incoming), timing, status, reply.body)
        refusal = self._dialect.refusal(reply)
        if packing and status in _UNREAD and packing not in self._read:
            return msgspec.structs.replace(refusal, packing=packing)
        return refusal

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    async def _packed(self, body: bytes) -> tuple[bytes, str]:
        """A body as it is sent, and how it was packed. ValueError or OverflowError when it cannot be."""
        arguments = body, self._encoding, self._compression
        if len(body) < ASIDE_FROM:
            packed, gzipped = pack(*arguments)
        else:
            packed, gzipped = await asyncio.get_running_loop().run_in_executor(None, pack, *arguments)
        return packed, "+".join([self._encoding] * (self._encoding != "json") + ["gzip"] * gzipped)

    def _meaning(self, error: Exception, *, begun: bool) -> tuple[Kind, str]:
        """What an exception says of the attempt: kind and message."""
        match error:
            case LostError():
                return error.kind, self._words(error, begun=begun)
            case ValueError() | OverflowError() if not begun:
                return Kind.UNSENDABLE, f"the request cannot be sent: {error}"
            case _:
                return Kind.PROTOCOL_ERROR, f"unexpected {type(error).__name__}: {error}"

    def _words(self, lost: LostError, *, begun: bool) -> str:
        """A loss as a person wants to read it."""
        host, detail = self._url.host, lost.detail
        match lost.kind:
            case Kind.CERTIFICATE:
                return f"the certificate of {host} is not valid{detail and ': '}{detail}"
            case Kind.LOCAL_RESOURCES:
                return f"this machine cannot open a connection: {detail}"
            case Kind.DNS:
                return f"cannot find the address of {self._peer.host}: {detail}"
            case Kind.TLS:
                return f"no TLS with {host}: {detail}"
            case Kind.CONNECTION if lost.tunnel:
                return f"the proxy does not connect to {host}: {detail}"
            case Kind.CONNECTION:
                return f"cannot connect to {self._peer.host}:{self._peer.port}: {detail}"
            case Kind.CONNECT_TIMEOUT:
                return f"no connection to {host} within {self._connect_timeout:g} s"
            case Kind.TIMEOUT if not detail:
                lacking = "the answer was not whole" if begun else "no answer"
                return f"{lacking} within {self._timeout:g} s"
            case Kind.PROXY:
                return "the proxy wants a user and a password"
            case Kind.PROTOCOL_ERROR:
                return f"what {host} sent is not HTTP: {detail}"
            case Kind.STALE_CONNECTION:
                return f"{host} had closed the kept connection"
            case Kind.DISCONNECTED if begun:
                return f"{host} broke off its answer"
            case Kind.DISCONNECTED:
                return f"{host} closed the connection: {detail}"
            case _:
                return detail

    def _failure(
        self, kind: Kind, message: str, timing: Timing, status: int | None, body: bytes | None = None
    ) -> Failure:
        words = self._redact(" ".join(message.split()).encode("utf-8", "replace")).decode("utf-8", "replace")
        return Failure(kind, words[:_LONGEST_MESSAGE], timing, status, body=body, paid=kind in _PAID)


def _client(name: str, settings: Settings) -> Client:
    """The library of that name."""
    if name == "aiohttp":
        return Aiohttp(settings)
    if find_spec("pyreqwest") is None:
        raise JobError('[service] transport = "reqwest" needs pyreqwest: pip install "batcher[fast]"')
    from batcher.transport.reqwest import Reqwest

    return Reqwest(settings)


def _redirection(url: URL, incoming: Incoming) -> str:
    try:
        target = url.join(URL(incoming.header("Location")))
    except ValueError:
        return "the service redirects to an address that is none"
    return f"the service redirects to {target.host}; redirects are not followed, set base_url to the final address"


def _timing(sent_at: int, started: float, events: Events | None) -> Timing:
    if events is None:
        return Timing(sent_at, time.perf_counter() - started)
    ended = time.perf_counter() if events.ended is None else events.ended
    return Timing(sent_at, ended - started, None if events.begun is None else events.begun - started)


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


def _checked(common: Mapping[str, str], own: Mapping[str, str], content_type: str) -> dict[str, str]:
    """One set of headers, `own` before `common`; what a service would never receive is refused."""
    headers: dict[str, tuple[str, str]] = {}
    for name, value in (*common.items(), *own.items(), ("Content-Type", content_type)):
        if not _HEADER_NAME.fullmatch(name) or _HEADER_FORBIDDEN.search(value):
            raise JobError(f"the header {name!r} holds a character that HTTP does not allow, a line break perhaps")
        headers[name.lower()] = (name, value)
    return dict(headers.values())


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
