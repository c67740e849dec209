"""What an HTTP library has to do for a transport, in words that no library owns."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from yarl import URL

from batcher.records import Kind

LOCAL_ERRNOS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL))
"""This machine's own limits."""
IDLE: Final = 15.0
"""Seconds that a connection is kept without a request: services close theirs after that or later."""
PROBE_AFTER, PROBE_EVERY, PROBES = 60, 15, 4
"""Seconds, seconds, times: an answer may take minutes of silence; TCP's probes find out that the other side is gone."""


class LostError(Exception):
    """What became of an attempt that has no answer. `tunnel` says that a proxy did not let it through."""

    def __init__(self, kind: Kind, detail: str = "", *, tunnel: bool = False) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.tunnel = kind, detail, tunnel


@dataclass(frozen=True, slots=True)
class Settings:
    """How a service is reached: `headers` of every request, `timeout` of a whole one and of connecting, in seconds."""

    headers: Mapping[str, str]
    timeout: float
    connect_timeout: float
    proxy: URL | None


class Incoming(Protocol):
    """An answer whose head has come. Whatever breaks off is a LostError."""

    @property
    def status(self) -> int:
        """The status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, whatever their case; `items` has one that is sent twice twice."""

    def header(self, name: str) -> str:
        """One header, empty when it is absent."""

    async def whole(self) -> bytes:
        """The body to its end, of which no more is read than its Content-Length says."""

    async def piece(self) -> bytes:
        """What has come of the body since, waiting for something; empty at its end."""

    async def close(self) -> None:
        """Keep the connection when the body was read to its end, else close it. Does not wait."""


class Client(Protocol):
    """Connections to a service, kept between requests. No redirect is followed, no body unpacked, no cookie kept."""

    async def ask(self, url: URL, body: bytes | None, *, gzipped: bool) -> Incoming:
        """Send a request, a POST where it has a body. LostError, or ValueError when it cannot be sent as it is."""

    async def close(self) -> None:
        """Close every connection."""
