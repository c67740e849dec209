"""How a job's service is reached: its address and dialect, the key and the headers."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from batcher import dialects
from batcher.dialects import Dialect
from batcher.errors import JobError
from batcher.job import SIMULATOR, Service
from batcher.payload import CONTENT_TYPES

_SECRET = re.compile(r"auth|key|token|secret|cookie|session|password", re.IGNORECASE)
"""Names of headers whose values are cut out of everything that comes back."""


_OF_THE_BODY = {"content-type", "content-encoding", "content-length", "transfer-encoding"}


class Access(NamedTuple):
    """The way to a service; nothing was sent."""

    url: str
    """The service's base address."""
    dialect: Dialect
    headers: Mapping[str, str]
    key_env: str | None
    """The variable that holds the key; None where none is sent."""
    extra: tuple[str, ...]
    """Names of the headers that come from the environment."""
    secrets: tuple[str, ...]
    """Values that must never be written or printed."""


def access(service: Service, origin: str, base_url: str | None = None, queue_threshold: float | None = None) -> Access:
    """Find what a service is asked with; `base_url` stands in for its own. JobError where a key or header is missing.

    `origin` is what messages begin with: the job file's name. `queue_threshold` is in seconds.
    """
    base_url = (base_url or service.base_url).rstrip("/")
    local = service.base_url == SIMULATOR
    dialect = dialect_of(service, base_url)
    key_env = service.api_key_env
    if key_env is None and not local and dialects.at_home(dialect, base_url):
        key_env = dialect.api_key_env
    extra = _extra_headers(service.headers_env, origin)
    given = {field.lower() for field in extra}
    if "authorization" in given and key_env is not None:
        raise JobError(f"{origin}: service.headers_env: Authorization is made of {key_env}; take it out, or the key")
    own = {**dialect.headers, **({"Authorization": "Bearer simulator"} if local and key_env is None else {})}
    if queue_threshold is not None:
        own["queue_threshold"] = str(round(queue_threshold * 1000))
    headers = {
        "Content-Type": CONTENT_TYPES[service.encoding],
        **{field: value for field, value in own.items() if field.lower() not in given},
        **extra,
    }
    secrets = tuple(
        word for field, value in extra.items() if _SECRET.search(field) for word in {value, *value.split()[-1:]}
    )
    if key_env is not None:
        key = _key(key_env, origin)
        headers["Authorization"] = f"Bearer {key}"
        secrets += (key,)
    return Access(base_url, dialect, headers, key_env, tuple(extra), secrets)


def dialect_of(service: Service, base_url: str | None = None) -> Dialect:
    """How a service speaks: as the job says, else by its address, for which `base_url` may stand in."""
    local = service.base_url == SIMULATOR
    return dialects.named(service.dialect or ("cerebras" if local else dialects.of_url(base_url or service.base_url)))


def _key(name: str, origin: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key:
        raise JobError(f"{origin}: the environment variable {name} holds no API key; set it and run again")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JobError(f"{origin}: the key in {name} holds characters that no key has")
    return key


def _extra_headers(name: str | None, origin: str) -> dict[str, str]:
    if name is None:
        return {}
    lines = os.environ.get(name, "").splitlines()
    pairs = [line.partition(":") for line in lines if line.strip()]
    if not pairs or any(not field.strip() or not colon for field, colon, _ in pairs):
        raise JobError(f"{origin}: service.headers_env: {name} should hold lines of the form Name: value")
    headers = {field.strip(): value.strip() for field, _, value in pairs}
    if body := next((field for field in headers if field.lower() in _OF_THE_BODY), None):
        raise JobError(f"{origin}: service.headers_env: {name} holds {body}, which is set by how a body is sent")
    return headers
