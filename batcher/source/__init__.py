"""Input files -> rows, streamed, numbered."""

import os
from collections.abc import Sequence
from pathlib import Path

from batcher.errors import JobError
from batcher.source.base import ALTERED, Place, Source
from batcher.source.files import (
    FORMATS,
    KNOWN,
    LATER,
    LATER_FORMATS,
    SUFFIXES,
    File,
    FileIdentity,
    changed,
    find,
    identity,
    named,
    suffix,
)
from batcher.source.jsonl import Jsonl
from batcher.source.parquet import Parquet

__all__ = ["ALTERED", "FileIdentity", "Place", "Source", "changed", "open_source"]


def open_source(paths: str | Sequence[str], base: Path, format: str | None, stride: int) -> Source:
    """The rows of files, folders and globs, relative to the folder `base`; `stride` is the distance of `places`.

    A folder stands for all its files of the format, sorted by path, those of its folders too; hidden names and names
    that start with `_` are left out, and links to folders are not followed. Raises JobError, one line, for everything
    that keeps the input from being read.
    """
    if format is not None and format not in FORMATS:
        problem = "is not yet supported" if format in LATER_FORMATS else "is unknown"
        raise JobError(f"input format {format!r} {problem}: {KNOWN}")
    base = Path(os.path.abspath(base))
    asked = (paths,) if isinstance(paths, str) else paths
    found = [path for text in asked for path in find(text, base, format)]
    if not found:
        raise JobError("input path names no file")
    formats: dict[str, str] = {}
    files = []
    for path in found:
        name = named(path, base)
        ending, compression = suffix(path)
        kind = format or SUFFIXES.get(ending)
        if kind is None:
            if ending in LATER:
                raise JobError(f"input file {name}: format {LATER[ending]} is not yet supported; {KNOWN}")
            raise JobError(f"input file {name}: its suffix names no format; {KNOWN}; or set format under [input]")
        if kind == "parquet" and compression:
            raise JobError(f"input file {name}: a Parquet file is not compressed as a whole; unpack it")
        formats.setdefault(kind, name)
        files.append(File(path, name, compression))
    if len(formats) > 1:
        raise JobError(f"input has mixed formats: {formats['parquet']} is Parquet, {formats['jsonl']} is JSONL")
    identities = [identity(file) for file in files]
    return Parquet(files, identities) if "parquet" in formats else Jsonl(files, identities, stride)
