"""Which files a job's input is, and what tells each from another."""

import glob
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import msgspec
from pyarrow import fs

from batcher.errors import JobError
from batcher.store import connect, is_remote, reading

SUFFIXES = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
}
FORMATS = ("parquet", "jsonl", "csv", "arrow", "openai-batch")
KNOWN = (
    "formats are parquet (.parquet .pq), arrow (.arrow .feather .ipc), jsonl (.jsonl .ndjson) and csv (.csv .tsv), "
    "the last two also with .gz or .zst"
)
TABLE = "the table from Python"
"""The name of an input that is no file."""
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_LOCAL = fs.LocalFileSystem()
_AT_ONCE = 16
"""Reads of one object that are under way at a time: each of them is a request to its store."""


class FileIdentity(msgspec.Struct, frozen=True):
    """What tells one input file from another without reading it whole."""

    name: str
    """Path relative to the job's folder when below it, else absolute; the URI of an object."""
    size: int
    mtime_ns: int
    sample: str
    """sha256 of the first and last 64 KiB and 60 blocks of 4 KiB between; of the whole file when it is small."""


class File(NamedTuple):
    """An input file: where it lies, what it is called, and the compression around it."""

    system: fs.FileSystem
    path: str
    """Its path in its file system."""
    name: str
    compression: str | None

    @property
    def remote(self) -> bool:
        """Whether every read of it is a request to somewhere else."""
        return self.system is not _LOCAL


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
        if old.name == TABLE and new != old:
            return f"{old.name} has other rows"
        if new.size != old.size:
            compared = "larger" if new.size > old.size else "smaller"
            return f"{old.name} is {compared}: {old.size} bytes before, {new.size} now"
        if new.sample != old.sample:
            return f"{old.name} has the same size but other content"
    return None


def find(text: str, base: Path, format: str | None) -> list[File]:
    """The files that one path of the job stands for. Raises JobError."""
    if not text:
        raise JobError("input path is empty")
    if is_remote(text):
        return _objects(text, format)
    path = os.path.join(base, text)
    if os.path.isfile(path):
        hits = [path]
    elif os.path.isdir(path):
        hits = _in_folder(path, text, format)
    elif os.path.exists(path):
        raise JobError(f"input path {text!r} is neither a file nor a folder")
    elif not glob.has_magic(text):
        raise JobError(f"input file {text!r} does not exist in {base}")
    else:
        hits = [os.path.join(base, hit) for hit in glob.glob(text, root_dir=base, recursive=True)]
        hits = sorted((hit for hit in hits if os.path.isfile(hit)), key=lambda hit: Path(hit).parts)
        if not hits:
            raise JobError(f"input path {text!r} matches no file in {base}")
    return [File(_LOCAL, os.path.abspath(hit), _name(hit, base), ending(hit)[1]) for hit in hits]


def _in_folder(folder: str, text: str, format: str | None) -> list[str]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[str] = []
    with reading(text):
        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if name[0] not in "._"]
            found += (os.path.join(parent, name) for name in files if name[0] not in "._")
    hits = [path for path in _of_format(found, text, format) if os.path.isfile(path)]
    return sorted(hits, key=lambda path: Path(path).parts)


def _of_format(paths: Sequence[str], folder: str, format: str | None) -> list[str]:
    """Of the files in a folder, those whose suffix names the format, or any."""
    wanted = "jsonl" if format == "openai-batch" else format
    hits = [path for path in paths if (kind := SUFFIXES.get(ending(path)[0])) is not None and wanted in (None, kind)]
    if not hits:
        raise JobError(f"input folder {folder!r} has no {format or 'input'} file; {KNOWN}")
    return hits


def _objects(uri: str, format: str | None) -> list[File]:
    """The objects that a URI stands for: one, all under a prefix, or those that match a pattern."""
    scheme, _, whole = uri.partition("://")
    root, _, key = whole.partition("/")
    # Only the store itself is asked for by URI: a key is no URI, and may hold what one may not.
    system, top = connect(f"{scheme}://{root}")
    path = f"{top}/{key}".rstrip("/")
    with reading(uri):
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            found = [path]
        elif info.type == fs.FileType.Directory:
            inside = _listed(system, path)
            seen = [hit for hit in inside if not any(p[0] in "._" for p in _parts(hit[len(path) :]))]
            found = _of_format(seen, uri, format)
        elif not glob.has_magic(key):
            raise JobError(f"input {uri} does not exist")
        else:
            pattern = _parts(key)
            fixed = next(index for index, part in enumerate(pattern) if glob.has_magic(part))
            under = "/".join([top, *pattern[:fixed]])
            found = [hit for hit in _listed(system, under) if _matches(_parts(hit[len(under) :]), pattern[fixed:])]
            if not found:
                raise JobError(f"input {uri} matches nothing")
    return [
        File(system, hit, f"{scheme}://{root}{hit[len(top) :]}", ending(hit)[1]) for hit in sorted(found, key=_parts)
    ]


def _listed(system: fs.FileSystem, folder: str) -> list[str]:
    infos = system.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return [info.path for info in infos if info.type == fs.FileType.File]


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.lstrip("/")).parts


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, as `glob` would say it."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if parts[0][0] == "." and pattern[0][0] != ".":
        return False
    if pattern[0] == "**":
        return _matches(parts[1:], pattern) or _matches(parts, pattern[1:])
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def ending(path: str) -> tuple[str, str | None]:
    """The suffix that tells the format, and the compression around it."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        return os.path.splitext(stem)[1], _COMPRESSIONS[suffix]
    return suffix, None


def _name(path: str, base: Path) -> str:
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
    with reading(file.name), file.system.open_input_file(file.path) as stream:
        written = file.system.get_file_info(file.path).mtime_ns or 0
        size = stream.size()
        if size <= 2 * edge + pieces * between:
            blocks = [(0, size)]
        else:
            step = (size - 2 * edge - between) / (pieces - 1)
            blocks = [(edge + int(index * step), between) for index in range(pieces)]
            blocks = [(0, edge), *blocks, (size - edge, edge)]
        digest = hashlib.sha256()
        with ThreadPoolExecutor(_AT_ONCE if file.remote else 1) as pool:
            for piece in pool.map(lambda block: stream.read_at(block[1], block[0]), blocks):
                digest.update(piece)
    return FileIdentity(file.name, size, written, digest.hexdigest())
