"""Input files, objects and tables -> rows, streamed, numbered."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from batcher.errors import JobError
from batcher.source.arrow import Arrow
from batcher.source.base import ALTERED, Place, Source
from batcher.source.csv import Csv
from batcher.source.files import FORMATS, KNOWN, SUFFIXES, File, FileIdentity, changed, ending, find, identity
from batcher.source.jsonl import Jsonl
from batcher.source.openai_batch import OpenaiBatch
from batcher.source.parquet import Parquet
from batcher.source.table import Table

__all__ = ["ALTERED", "FileIdentity", "Place", "Source", "changed", "open_source", "open_table"]

_NAMES = {"parquet": "Parquet", "arrow": "Arrow", "jsonl": "JSONL", "csv": "CSV"}


def open_source(
    paths: str | Sequence[str], base: Path, format: str | None, stride: int, known: Sequence[str] = ()
) -> Source:
    """The rows of files, folders, globs and URIs, relative to the folder `base`; `stride` is the distance of `places`.

    A folder stands for all its files of the format, sorted by path, those of its folders too; hidden names and names
    that start with `_` are left out, and links to folders are not followed. `known` are the names of the files of an
    earlier run: they stand first, in their old order. Raises JobError, one line, for everything that keeps the input
    from being read.
    """
    if format is not None and format not in FORMATS:
        raise JobError(f"input format {format!r} is unknown: {KNOWN}")
    base = Path(os.path.abspath(base))
    asked = (paths,) if isinstance(paths, str) else paths
    files = _known_first([file for text in asked for file in find(text, base, format)], known)
    if not files:
        raise JobError("input path names no file")
    formats: dict[str, str] = {}
    for file in files:
        kind = format or SUFFIXES.get(ending(file.path)[0])
        if kind is None:
            raise JobError(f"input file {file.name}: its suffix names no format; {KNOWN}; or set format under [input]")
        if kind in ("parquet", "arrow") and file.compression:
            raise JobError(f"input file {file.name}: {_NAMES[kind]} is not compressed as a whole; unpack it")
        formats.setdefault(kind, file.name)
    if len(formats) > 1:
        (one, first), (other, second), *_ = formats.items()
        raise JobError(f"input has mixed formats: {first} is {_NAMES[one]}, {second} is {_NAMES[other]}")
    identities = [identity(file) for file in files]
    match next(iter(formats)):
        case "parquet":
            return Parquet(files, identities)
        case "arrow":
            return Arrow(files, identities)
        case "csv":
            return Csv(files, identities, stride)
        case "openai-batch":
            return OpenaiBatch(files, identities, stride)
        case _:
            return Jsonl(files, identities, stride)


def open_table(rows: object) -> Source:
    """The rows of a table or a DataFrame: of anything that has Arrow's C interface. Raises JobError."""
    return Table(rows)


def _known_first(files: Sequence[File], known: Sequence[str]) -> list[File]:
    """Files of an earlier run in their order, then the others in theirs: what is appended changes no position."""
    found = {file.name: file for file in files}
    left = Counter(file.name for file in files)
    first = []
    for name in known:
        if left[name]:
            left[name] -= 1
            first.append(found[name])
    others = []
    for file in reversed(files):
        if left[file.name]:
            left[file.name] -= 1
            others.append(file)
    return [*first, *reversed(others)]
