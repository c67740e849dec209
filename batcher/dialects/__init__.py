"""How one service speaks: what its answers, its refusals and its headers mean."""

from collections.abc import Mapping
from typing import Final, Protocol
from urllib.parse import urlsplit

from batcher.dialects import cerebras, groq, openai
from batcher.dialects.prices import PRICES_AS_OF, cost
from batcher.records import Answer, Failure, Limit, Price, Reply

__all__ = ["PRICES_AS_OF", "Dialect", "at_home", "cost", "named", "of_url"]


class Dialect(Protocol):
    """What the engine must know of a service. Each module of this package that has these names is one."""

    @property
    def name(self) -> str:
        """Its name in the job file."""

    @property
    def api_key_env(self) -> str:
        """The environment variable that holds the key, unless the job names another."""

    @property
    def home(self) -> tuple[str, ...]:
        """The domains that this key may be sent to."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that go with every request."""

    @property
    def strict_subset(self) -> bool:
        """Whether its strict mode takes a part of JSON Schema only, so that schemas are made to fit it."""

    @property
    def prices(self) -> Mapping[str, Price]:
        """List prices by model, as of `PRICES_AS_OF`."""

    @property
    def catalogue(self) -> str | None:
        """Where on its host a list of models for everybody lies: a second base address; None where there is none."""

    def read(self, reply: Reply) -> Answer | Failure:
        """The meaning of a reply with status 200. Never raises."""

    def refusal(self, reply: Reply) -> Failure:
        """The meaning of a reply with any other status. Never raises."""

    def limits(self, headers: Mapping[str, str]) -> tuple[Limit, ...]:
        """What a reply's headers say of the rate limits. Never raises."""


_DIALECTS: Final[Mapping[str, Dialect]] = {dialect.name: dialect for dialect in (openai, cerebras, groq)}


def named(name: str) -> Dialect:
    """The dialect of that name; KeyError when there is none."""
    return _DIALECTS[name]


def at_home(dialect: Dialect, url: str) -> bool:
    """Whether the host of `url` is the dialect's own, or below it."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    return any(host == domain or host.endswith(f".{domain}") for domain in dialect.home)


def of_url(url: str) -> str:
    """The name of the dialect spoken at `url`: its own host's, else the common one."""
    return next((dialect.name for dialect in _DIALECTS.values() if at_home(dialect, url)), openai.name)
