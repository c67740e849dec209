"""Which files a job's input is, and what tells each from another."""

import glob
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from batcher.errors import JobError
from batcher.store import reading

SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
LATER = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
FORMATS = ("parquet", "jsonl")
LATER_FORMATS = ("csv", "arrow", "openai-batch")
KNOWN = "formats are parquet (.parquet .pq) and jsonl (.jsonl .ndjson, also with .gz or .zst)"


class FileIdentity(msgspec.Struct, frozen=True):
    """What tells one input file from another without reading it whole."""

    name: str
    """Path relative to the job's folder when below it, else absolute."""
    size: int
    mtime_ns: int
    sample: str
    """sha256 of the first and last 64 KiB and 60 blocks of 4 KiB between; of the whole file when it is small."""


class File(NamedTuple):
    """An input file: where it lies, what it is called, and the compression around it."""

    path: str
    name: str
    compression: str | None


def changed(before: Sequence[FileIdentity], after: Sequence[FileIdentity]) -> str | None:
    """What differs between the files of an earlier run and those of now, in one line.

    None when nothing does: the old files stand first, with equal names, sizes and samples. Files appended after them
    are welcome, and a new time of modification alone is no change.
    """
    for index, old in enumerate(before):
        new = after[index] if index < len(after) else None
        if new is None or new.name != old.name:
            gone = all(old.name != other.name for other in after)
            if new is None or (gone and any(new.name == other.name for other in before)):
                return f"{old.name} is missing"
            return f"file {index + 1} was {old.name}, is now {new.name}"
        if new.size != old.size:
            compared = "larger" if new.size > old.size else "smaller"
            return f"{old.name} is {compared}: {old.size} bytes before, {new.size} now"
        if new.sample != old.sample:
            return f"{old.name} has the same size but other content"
    return None


def find(text: str, base: Path, format: str | None) -> list[str]:
    """The files that one path of the job stands for. Raises JobError."""
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise JobError(f"input path {text!r} is not yet supported: only local files")
    if not text:
        raise JobError("input path is empty")
    path = os.path.join(base, text)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return _in_folder(path, text, format)
    if os.path.exists(path):
        raise JobError(f"input path {text!r} is neither a file nor a folder")
    if not glob.has_magic(text):
        raise JobError(f"input file {text!r} does not exist in {base}")
    hits = (os.path.join(base, hit) for hit in glob.glob(text, root_dir=base, recursive=True))
    files = sorted((hit for hit in hits if os.path.isfile(hit)), key=lambda hit: Path(hit).parts)
    if not files:
        raise JobError(f"input path {text!r} matches no file in {base}")
    return files


def _in_folder(folder: str, text: str, format: str | None) -> list[str]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[str] = []
    with reading(text):
        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if name[0] not in "._"]
            found += (os.path.join(parent, name) for name in files if name[0] not in "._")
    wanted = FORMATS if format is None else (format,)
    hits = [path for path in found if SUFFIXES.get(suffix(path)[0]) in wanted and os.path.isfile(path)]
    if not hits:
        raise JobError(f"input folder {text!r} has no {' or '.join(wanted)} file; {KNOWN}")
    return sorted(hits, key=lambda path: Path(path).parts)


def suffix(path: str) -> tuple[str, str | None]:
    """The suffix that tells the format, and the compression around it."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        return os.path.splitext(stem)[1], _COMPRESSIONS[suffix]
    return suffix, None


def named(path: str, base: Path) -> str:
    """What a file is called: its path relative to the job's folder when below it. Raises JobError."""
    whole = Path(os.path.abspath(path))
    name = (whole.relative_to(base) if whole.is_relative_to(base) else whole).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise JobError(f"input file {name!a}: its name is not UTF-8; rename it") from None
    return name


def identity(file: File) -> FileIdentity:
    """What tells a file from another. Raises JobError."""
    edge, between, pieces = 64 << 10, 4 << 10, 60
    with reading(file.name), open(file.path, "rb", buffering=0) as stream:
        status = os.fstat(stream.fileno())
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise JobError(f"input file {file.name} is not a regular file")
        if size <= 2 * edge + pieces * between:
            blocks = [(0, size)]
        else:
            step = (size - 2 * edge - between) / (pieces - 1)
            blocks = [(edge + int(index * step), between) for index in range(pieces)]
            blocks = [(0, edge), *blocks, (size - edge, edge)]
        digest = hashlib.sha256()
        for offset, length in blocks:
            digest.update(os.pread(stream.fileno(), length, offset))
    return FileIdentity(file.name, size, status.st_mtime_ns, digest.hexdigest())
