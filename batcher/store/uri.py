"""Files behind a URI: which file system speaks its scheme, and what goes wrong with it in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from batcher.errors import JobError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
NATIVE = {"s3": "allow_delayed_open=true", **dict.fromkeys(("gs", "gcs"), "retry_limit_seconds=20")}
"""Spoken by Arrow itself, and how; any other scheme is fsspec's, where its package is installed.

S3: what is small is put by one request. Google: it would try for 15 minutes where there are no credentials.
"""


def is_remote(path: str) -> bool:
    """Whether a path is a URI, not a place on this machine."""
    return _URI.match(path) is not None


def unfit(uri: str) -> str | None:
    """Why results cannot go to a URI, in words that hold no secret; None where nothing speaks against it."""
    scheme, _, rest = uri.partition("://")
    if "@" in rest.split("/")[0]:
        return "keys do not belong into a path; set them in the environment"
    if "?" in rest or "#" in rest:
        return f"{scheme}:// paths hold no ? and no #; settings of the store come from the environment"
    if scheme.lower() in ("file", "local"):
        return "a folder on this machine is named without a scheme"
    if not rest.strip("/") or (scheme.lower() in NATIVE and rest.startswith("/")):
        return f"{scheme}://BUCKET/PREFIX, please"
    return None


def connect(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that a URI names, and the path in it. Keys come from the environment, never from the URI.

    Raises JobError, one line, for a scheme that nobody here speaks, and for secrets in the URI.
    """
    parts = urlsplit(uri)
    if parts.username is not None or parts.password is not None:
        raise JobError(f"{parts.scheme}:// path: keys do not belong into a path; set them in the environment")
    scheme = parts.scheme.lower()
    try:
        if scheme in NATIVE:
            native: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(f"{uri}?{NATIVE[scheme]}")
            return native
        import fsspec
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        system, path = fsspec.core.url_to_fs(uri)
        return PyFileSystem(FSSpecHandler(system)), path
    except ImportError:
        known = ", ".join(f"{name}://" for name in NATIVE)
        raise JobError(f"{uri}: spoken here are {known}; for {scheme}:// install its fsspec package") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise JobError(f"{uri}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """What went wrong with a file, in one line."""
    detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (detail.splitlines() or [""])[0]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """What goes wrong with an input file ends as one line that names it. Raises JobError."""
    try:
        yield
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise JobError(f"input file {name} cannot be read: {reason(error)}") from error
