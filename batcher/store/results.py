"""The place of an output's results: a folder of this machine, or a prefix of an object store."""

import hashlib
import os
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs

from batcher.errors import StorageError
from batcher.records import FileRecord
from batcher.store.uri import NATIVE, connect, is_remote, reason

_T = TypeVar("_T")

FOLDERS = ("responses", "failures", "attempts")
"""Of the results: a folder of parts each."""
UNFINISHED = ".publishing"
"""Is there from the beginning of a run to its end."""
WAITS = (1.0, 4.0, 16.0)
"""Seconds between the times that a store is asked for one thing. The S3 library itself tries for 6 s each time."""
_BLOCK = 8 << 20
_REFUSED = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|INVALID_SIGNATURE"
    "|UNRECOGNIZED_CLIENT|VALIDATION|EXPIRED_TOKEN|[Uu]nauthorized|[Ff]orbidden|credentials"
)
"""What a store says that says the same again when it is asked again."""


def results_at(place: str | Path) -> "Results":
    """The results of an output that is there already, by the path or URI that its user gives."""
    return Bucket(place) if isinstance(place, str) and is_remote(place) else Folder(Path(place))


def not_here(results: "Results") -> str:
    """What to say of a ledger whose results are in a store, and which is not on this machine."""
    return f"the ledger of {results} is not on this machine; call this where it lies"


class Results(ABC):
    """The place of an output's files, each known by its name below it. Raises StorageError where that refuses.

    A file is there whole or not at all, and is replaced at once.
    """

    folder: Path | None
    """The place, where it is a folder on this machine."""
    workshop: Path | None
    """Where files are made before they are put in their place; None where nothing is made."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the place is called, without where it lies."""

    @property
    @abstractmethod
    def unfinished(self) -> bool:
        """Whether a run is under way, or was broken off."""

    @abstractmethod
    def begin(self) -> None:
        """Make ready for a run, and clear away what a killed one was making."""

    @abstractmethod
    def end(self) -> None:
        """A run has ended; what somebody else put into the workshop stays."""

    @abstractmethod
    def parts(self) -> set[str]:
        """The names of all that lies in the folders of parts."""

    @abstractmethod
    def put(self, made: Path, file: FileRecord) -> None:
        """Put a finished file of the workshop in its place; it is lasting only after `settle`."""

    @abstractmethod
    def settle(self, name: str) -> None:
        """See that what was put under this name, or removed from it, stays so."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take a file away for good, if it is there."""

    @abstractmethod
    def local(self, name: str) -> AbstractContextManager[Path]:
        """A file to be read on this machine. Where there is none, FileNotFoundError here or on opening."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file whole, None where there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Put a small file in its place."""

    @abstractmethod
    def arrow(self) -> tuple[fs.FileSystem, str]:
        """The place as Arrow knows it."""


class Folder(Results):
    """Results in a folder of this machine's file system."""

    folder: Path
    workshop: Path

    def __init__(self, path: Path) -> None:
        self.folder = self._path = path
        self.workshop = path / UNFINISHED

    def __str__(self) -> str:
        return str(self._path)

    @property
    def name(self) -> str:
        return self._path.resolve().name

    @property
    def unfinished(self) -> bool:
        return self.workshop.exists()

    def begin(self) -> None:
        try:
            for name in (*FOLDERS, UNFINISHED):
                (self._path / name).mkdir(exist_ok=True)
            for leftover in self.workshop.iterdir():
                leftover.unlink()
            _sync(self._path)
        except OSError as error:
            raise StorageError.of(self._path, error) from None

    def end(self) -> None:
        with suppress(OSError):
            self.workshop.rmdir()

    def parts(self) -> set[str]:
        return {f"{folder}/{path.name}" for folder in FOLDERS for path in (self._path / folder).glob("*")}

    def put(self, made: Path, file: FileRecord) -> None:
        os.replace(made, self._path / file.name)

    def settle(self, name: str) -> None:
        _sync((self._path / name).parent)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            (self._path / name).unlink()
            self.settle(name)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self._path / name

    def read(self, name: str) -> bytes | None:
        try:
            return (self._path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{self._path / name}: cannot be read: {error.strerror}") from None

    def write(self, name: str, content: bytes) -> None:
        path = self._path / name
        temporary = path.with_name(f".{path.name}.new")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StorageError.of(path, error) from None

    def arrow(self) -> tuple[fs.FileSystem, str]:
        return fs.LocalFileSystem(), os.path.abspath(self._path)


class Bucket(Results):
    """Results in an object store, under a URI: each file is one object, put by one request that holds or does not.

    What was asked and not answered is asked again after each of `waits` seconds, once the store has answered at all.
    """

    folder = None

    def __init__(self, uri: str, workshop: Path | None = None, waits: Sequence[float] = WAITS) -> None:
        self.workshop = workshop
        self._uri = uri.rstrip("/")
        self._waits = waits
        self._answers = False
        """Whether the store has answered the last time that it was asked."""

    def __str__(self) -> str:
        return self._uri

    @property
    def name(self) -> str:
        return self._uri.rpartition("/")[2]

    @property
    def unfinished(self) -> bool:
        return self._size(UNFINISHED) is not None

    def begin(self) -> None:
        assert self.workshop is not None
        try:
            self.workshop.mkdir(exist_ok=True)
            for leftover in self.workshop.iterdir():
                leftover.unlink()
        except OSError as error:
            raise StorageError.of(self.workshop, error) from None
        self.write(UNFINISHED, b"")

    def end(self) -> None:
        assert self.workshop is not None
        with suppress(OSError):
            self.workshop.rmdir()
        self.remove(UNFINISHED)

    def parts(self) -> set[str]:
        system, root = self.arrow()

        def listed() -> set[str]:
            selectors = [fs.FileSelector(f"{root}/{folder}", allow_not_found=True) for folder in FOLDERS]
            infos = [
                (folder, info)
                for folder, one in zip(FOLDERS, selectors, strict=True)
                for info in system.get_file_info(one)
            ]
            return {f"{folder}/{info.base_name}" for folder, info in infos}

        return self._ask("cannot be listed", listed)

    def put(self, made: Path, file: FileRecord) -> None:
        with pa.memory_map(str(made)) as source:
            content = source.read_buffer()
            self._put(file.name, content, lambda: self._holds(file))
        made.unlink()

    def settle(self, name: str) -> None:
        """A store that has answered has it."""

    def remove(self, name: str) -> None:
        system, root = self.arrow()

        def delete() -> None:
            with suppress(FileNotFoundError):
                system.delete_file(f"{root}/{name}")

        self._ask(f"{name} cannot be removed", delete)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        near = self.workshop if self.workshop is not None and self.workshop.is_dir() else None  # else no run goes on
        descriptor, path = tempfile.mkstemp(prefix="batcher-", dir=near)
        try:
            with open(descriptor, "r+b") as file:
                self._ask(f"{name} cannot be read", lambda: self._copy(name, file))
            yield Path(path)
        finally:
            os.unlink(path)

    def read(self, name: str) -> bytes | None:
        system, root = self.arrow()

        def whole() -> bytes | None:
            try:
                with system.open_input_file(f"{root}/{name}") as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

        return self._ask(f"{name} cannot be read", whole)

    def write(self, name: str, content: bytes) -> None:
        self._put(name, pa.py_buffer(content), lambda: self.read(name) == content)

    def arrow(self) -> tuple[fs.FileSystem, str]:
        return self._place

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        scheme, _, whole = self._uri.partition("://")
        if scheme.lower() not in NATIVE:
            return connect(self._uri)
        bucket, _, key = whole.partition("/")
        # The store alone is asked for by URI: a key is no URI, and may hold what one may not.
        system, root = connect(f"{scheme}://{bucket}")
        return system, f"{root}/{key}".rstrip("/")

    def _put(self, name: str, content: pa.Buffer, there: Callable[[], bool]) -> None:
        """Put an object. Where no answer came, `there` tells whether the store has it for all that."""

        def upload() -> None:
            try:
                self._upload(name, content)
            except Exception as error:
                if _REFUSED.search(str(error)) or not there():
                    raise
            if (size := self._size(name)) != content.size:
                raise OSError(f"it has {size} bytes there, and {content.size} here")

        try:
            self._ask(f"{name} cannot be put", upload)
        except FileNotFoundError as error:
            raise StorageError(f"{self}: {name} cannot be put: {error}") from None

    def _upload(self, name: str, content: pa.Buffer) -> None:
        """One put. An object is made when the stream is closed, so one that went wrong is left to fall apart.

        Arrow closes what falls apart, but makes nothing then of an S3 upload that has failed.
        """
        system, root = self.arrow()
        path = f"{root}/{name}"
        if isinstance(system, fs.PyFileSystem):
            other = system.handler.fs
            other.makedirs(path.rpartition("/")[0], exist_ok=True)
            stream = other.open(path, "wb", autocommit=False)
            try:
                stream.write(memoryview(content))
                stream.close()
                stream.commit()
            except BaseException:
                stream.discard()
                raise
        else:
            stream = system.open_output_stream(path, compression=None)
            stream.write(content)
            stream.close()

    def _size(self, name: str) -> int | None:
        """How large an object is, None where there is none."""
        system, root = self.arrow()
        if isinstance(system, fs.PyFileSystem):
            system.handler.fs.invalidate_cache()
        info = self._ask(f"{name} cannot be looked at", lambda: system.get_file_info(f"{root}/{name}"))
        return info.size if info.type == fs.FileType.File else None

    def _holds(self, file: FileRecord) -> bool:
        """Whether the store has exactly this file."""
        if self._size(file.name) != file.bytes:
            return False
        with self.local(file.name) as path, path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256

    def _copy(self, name: str, file: BinaryIO) -> None:
        """Copy an object into a file: all of it one and the same object, whoever replaces it meanwhile."""
        system, root = self.arrow()
        while True:
            before = system.get_file_info(f"{root}/{name}")
            file.seek(0)
            file.truncate()
            with system.open_input_file(f"{root}/{name}") as stream:
                while block := stream.read(_BLOCK):
                    file.write(block)
            file.flush()
            after = system.get_file_info(f"{root}/{name}")
            if (before.size, before.mtime_ns) == (after.size, after.mtime_ns) and file.tell() == after.size:
                return

    def _ask(self, what: str, function: Callable[[], _T]) -> _T:
        """Ask the store for something until it answers, or has been given time enough.

        Raises FileNotFoundError as it is, StorageError in one line for anything else.
        """
        waits = iter(self._waits if self._answers else ())
        while True:
            try:
                answer = function()
            except (FileNotFoundError, StorageError):
                raise
            except Exception as error:  # of other schemes' packages too, who raise what they like
                self._answers = self._answers and _REFUSED.search(str(error)) is None
                wait = next(waits, None) if self._answers else None
                if wait is None:
                    self._answers = False
                    raise StorageError(f"{self}: {what}: {reason(error)}; run again when it can") from None
                time.sleep(wait)
            else:
                self._answers = True
                return answer


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
