"""What a kill cannot show: which bytes lie on the disk, and in which order, if the power fails at any moment.

A library is loaded before libc that writes down every change to the files under one folder, in order. From that book
the disk is rebuilt as a power loss at any point of it would leave it: what was not synced is gone, or there in part.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import anyio
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batcher
from batcher.dialects import openai
from batcher.ledger import Ledger
from batcher.records import Answer, Attempt, Failure, Kind, Outcome, PartRecord, Reply, Timing
from batcher.sink import Shape, Sink
from batcher.store import Folder
from tests import stories

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static const char *watched;
static int book = -1;

__attribute__((constructor)) static void begin(void) {
    watched = getenv("BOOK_OF");
    const char *path = getenv("BOOK");
    if (watched && path) book = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

struct line { char kind; char pad[7]; uint64_t inode; int64_t offset; uint32_t first, second; } __attribute__((packed));

static void note(char kind, uint64_t inode, int64_t offset, const void *a, size_t an, const void *b, size_t bn) {
    struct line head = {kind, {0}, inode, offset, (uint32_t)an, (uint32_t)bn};
    struct iovec all[3] = {{&head, sizeof head}, {(void *)a, an}, {(void *)b, bn}};
    if (syscall(SYS_writev, book, all, 3) != (ssize_t)(sizeof head + an + bn)) abort();
}

static int inside(const char *path) { return book >= 0 && strncmp(path, watched, strlen(watched)) == 0; }

/* The absolute path of a name at a folder's descriptor; whether it is watched. */
static int at(int folder, const char *name, char *path) {
    if (book < 0) return 0;
    path[0] = 0;
    if (name[0] != '/') {
        if (folder == AT_FDCWD) { if (!getcwd(path, PATH_MAX)) return 0; }
        else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, path, PATH_MAX - 1);
            if (n < 0) return 0;
            path[n] = 0;
        }
        strncat(path, "/", PATH_MAX - strlen(path) - 1);
    }
    strncat(path, name, PATH_MAX - strlen(path) - 1);
    return inside(path);
}

/* The path of an open descriptor, when it is watched. */
static int of(int descriptor, char *path) {
    char link[64];
    if (book < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

static uint64_t inode_of(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) ? 0 : found.st_ino;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

static int opened(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE || !at(folder, name, path))
        return syscall(SYS_openat, folder, name, flags, mode);
    pthread_mutex_lock(&turn);
    struct stat found;
    int there = stat(path, &found) == 0;
    int descriptor = syscall(SYS_openat, folder, name, flags, mode);
    if (descriptor >= 0 && !there) note('C', inode_of(descriptor), 0, path, strlen(path), "", 0);
    if (descriptor >= 0 && there && (flags & O_TRUNC)) note('T', inode_of(descriptor), 0, path, strlen(path), "", 0);
    pthread_mutex_unlock(&turn);
    return descriptor;
}

#define MODE(flags) mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list v; va_start(v, flags); mode = va_arg(v, mode_t); va_end(v); }
int open(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE(flags) return opened(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE(flags) return opened(folder, name, flags, mode); }
int __open_2(const char *name, int flags) { return opened(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return opened(AT_FDCWD, name, flags, 0); }
int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define WRITTEN(call, where) \
    char path[PATH_MAX]; \
    if (!of(descriptor, path)) return call; \
    pthread_mutex_lock(&turn); \
    ssize_t n = call; \
    if (n > 0) note('W', inode_of(descriptor), where, path, strlen(path), data, n); \
    pthread_mutex_unlock(&turn); \
    return n;
ssize_t write(int descriptor, const void *data, size_t size) {
    WRITTEN(syscall(SYS_write, descriptor, data, size), lseek(descriptor, 0, SEEK_CUR) - n)
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    WRITTEN(syscall(SYS_pwrite64, descriptor, data, size, offset), offset)
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t offset) {
    WRITTEN(syscall(SYS_pwrite64, descriptor, data, size, offset), offset)
}

static int cut(int descriptor, off_t size) {
    char path[PATH_MAX];
    if (!of(descriptor, path)) return syscall(SYS_ftruncate, descriptor, size);
    pthread_mutex_lock(&turn);
    int result = syscall(SYS_ftruncate, descriptor, size);
    if (!result) note('T', inode_of(descriptor), size, path, strlen(path), "", 0);
    pthread_mutex_unlock(&turn);
    return result;
}
int ftruncate(int descriptor, off_t size) { return cut(descriptor, size); }
int ftruncate64(int descriptor, off_t size) { return cut(descriptor, size); }

static int synced(int descriptor, long call) {
    char path[PATH_MAX];
    if (!of(descriptor, path)) return syscall(call, descriptor);
    usleep(2000); /* a slow disk: whoever does not wait for it is found out */
    pthread_mutex_lock(&turn);
    int result = syscall(call, descriptor);
    if (!result) note('S', inode_of(descriptor), 0, path, strlen(path), "", 0);
    pthread_mutex_unlock(&turn);
    return result;
}
int fsync(int descriptor) { return synced(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return synced(descriptor, SYS_fdatasync); }

static int moved(char kind, int a, const char *from, int b, const char *to, long call, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    int known = at(a, from, old) + at(b, to, new);
    if (!known) return syscall(call, a, from, b, to, flags);
    pthread_mutex_lock(&turn);
    int result = syscall(call, a, from, b, to, flags);
    if (!result) note(kind, 0, 0, old, strlen(old), new, strlen(new));
    pthread_mutex_unlock(&turn);
    return result;
}
int rename(const char *from, const char *to) { return moved('R', AT_FDCWD, from, AT_FDCWD, to, SYS_renameat2, 0); }
int renameat(int a, const char *from, int b, const char *to) { return moved('R', a, from, b, to, SYS_renameat2, 0); }
int link(const char *from, const char *to) { return moved('L', AT_FDCWD, from, AT_FDCWD, to, SYS_linkat, 0); }

static int removed(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!at(folder, name, path)) return syscall(SYS_unlinkat, folder, name, flags);
    pthread_mutex_lock(&turn);
    int result = syscall(SYS_unlinkat, folder, name, flags);
    if (!result && !(flags & AT_REMOVEDIR)) note('U', 0, 0, path, strlen(path), "", 0);
    pthread_mutex_unlock(&turn);
    return result;
}
int unlink(const char *name) { return removed(AT_FDCWD, name, 0); }
int unlinkat(int folder, const char *name, int flags) { return removed(folder, name, flags); }
"""

FOLDERS = ("responses", "failures", "attempts")
HOME = Path(batcher.__file__).parents[1]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


# The book


class Change(NamedTuple):
    """One change to the disk: C create, W write, T truncate, S sync, R rename, L link, U unlink."""

    kind: str
    inode: int
    offset: int
    path: str
    data: bytes


def read_book(path: Path) -> list[Change]:
    """All changes, in order."""
    book, changes, place = path.read_bytes(), [], 0
    while place < len(book):
        kind = chr(book[place])
        inode, offset = (int.from_bytes(book[place + n : place + n + 8], "little") for n in (8, 16))
        first, second = (int.from_bytes(book[place + n : place + n + 4], "little") for n in (24, 28))
        place += 32
        name, data = book[place : place + first].decode(), book[place + first : place + first + second]
        place += first + second
        changes.append(Change(kind, inode, offset, name.removesuffix(" (deleted)"), data))
    return changes


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that keeps the book."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("keeping a book of system calls needs Linux and a C compiler, cc")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "book.c").write_text(SHIM)
    built = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "book.so"), str(folder / "book.c"), "-ldl"]
    done = subprocess.run(built, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "book.so"


def booked(shim: Path, folder: Path, book: Path, environment: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process whose changes under a folder are written down."""
    path = {"PYTHONPATH": str(HOME), "PYTHONWARNINGS": "error::ResourceWarning"}
    keeping = {"LD_PRELOAD": str(shim), "BOOK": str(book), "BOOK_OF": f"{folder}/"}
    return {**os.environ, **(environment or {}), **path, **keeping}


# The disk


@dataclass
class File:
    """What lies on the disk of a file for certain, and what was written since it was synced."""

    safe: bytes = b""
    loose: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, data), or (size, None) for a truncation."""

    def with_these(self, loose: Sequence[tuple[int, bytes | None]]) -> bytes:
        """The content when these changes reached the disk."""
        if not loose:
            return self.safe
        content = bytearray(self.safe)
        for offset, data in loose:
            if data is None:
                content[offset:] = bytes(max(0, offset - len(content)))
            else:
                content += bytes(max(0, offset - len(content)))
                content[offset : offset + len(data)] = data
        return bytes(content)


class Disk:
    """A disk that loses what was not synced: contents with their file, names with their folder."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self._names: dict[str, int] = {}
        self._safe_names: dict[str, int] = {}
        self._loose_names: list[tuple[str, str | None, int | None]] = []
        """(folder, name that goes, ...) in order; see `_apply`."""
        self._numbers: dict[int, int] = {}

    def apply(self, change: Change) -> None:
        """One change."""
        folder = os.path.dirname(change.path)
        if change.kind == "C":
            number = len(self.files)
            self.files[number] = File()
            self._numbers[change.inode] = number
            self._name(change.path, None, number)
        elif change.kind in ("R", "L"):
            target = change.data.decode()
            self._name(target, change.path if change.kind == "R" else None, self._names[change.path])
        elif change.kind == "U":
            self._name(None, change.path, None)
        elif change.kind == "S" and os.path.basename(change.path) and self._is_folder(change):
            folder = change.path
            kept = []
            for told in self._loose_names:
                place = told[0] or told[1] or ""
                if os.path.dirname(place) == folder:
                    _rename(self._safe_names, told)
                else:
                    kept.append(told)
            self._loose_names = kept
        elif (number := self._numbers.get(change.inode, -1)) >= 0:
            file = self.files[number]
            if change.kind == "S":
                file.safe, file.loose = file.with_these(file.loose), []
            else:
                file.loose.append((change.offset, None if change.kind == "T" else change.data))

    def _is_folder(self, change: Change) -> bool:
        return change.path not in self._names

    def _name(self, new: str | None, old: str | None, number: int | None) -> None:
        told = (new or "", old, number)
        _rename(self._names, told)
        self._loose_names.append(told)

    def after_power_loss(self) -> dict[str, bytes]:
        """What is there when nothing that was not synced has reached the disk."""
        return {name: self.files[number].safe for name, number in self._safe_names.items()}

    def after_kill(self) -> dict[str, bytes]:
        """What is there when the system lives on and writes everything."""
        return {name: (file := self.files[number]).with_these(file.loose) for name, number in self._names.items()}

    def after_some(self, chance: random.Random) -> dict[str, bytes]:
        """What is there when some of the writes have reached the disk, the last of them torn, and some of the names."""
        names = dict(self._safe_names)
        for told in self._loose_names[: chance.randint(0, len(self._loose_names))]:
            _rename(names, told)
        found = {}
        for name, number in names.items():
            file = self.files[number]
            loose = [one for one in file.loose if chance.random() < 0.6]
            if loose and loose[-1][1] is not None and chance.random() < 0.5:
                offset, data = loose[-1]
                assert data is not None
                loose[-1] = offset, data[: chance.randrange(len(data) + 1) // 512 * 512]
            found[name] = file.with_these(loose)
        return found


def _rename(names: dict[str, int], told: tuple[str, str | None, int | None]) -> None:
    new, old, number = told
    if old is not None:
        names.pop(old, None)
    if new and number is not None:
        names[new] = number


# What is found after it


class Found(NamedTuple):
    """What the next run finds: each done row's text, and how many rows the output shows."""

    rows: dict[int, str]
    shown: int


class Survivor:
    """Opens the output as the next run would, on a disk after a power loss, and checks what must always be true."""

    def __init__(self, output: Path, size: int, rows: int) -> None:
        self._output = str(output)
        self._size = size
        self._rows = rows
        self._known: dict[bytes, Found] = {}
        self._tables: dict[bytes, dict[int, str]] = {}
        self.states = 0

    def found(self, disk: dict[str, bytes]) -> Found:
        """What is found on this disk."""
        mine = {
            path.removeprefix(f"{self._output}/"): content
            for path, content in disk.items()
            if path.startswith(f"{self._output}/") and not path.endswith(("-shm", ".reserve"))
        }
        digest = hashlib.blake2b()
        for path, content in sorted(mine.items()):
            digest.update(f"{path}\0{len(content)}\0".encode())
            digest.update(content)
        key = digest.digest()
        if key not in self._known:
            self.states += 1
            self._known[key] = self._open(mine)
        return self._known[key]

    def _open(self, disk: dict[str, bytes]) -> Found:
        shown: dict[str, dict[int, str]] = {}
        for path, content in disk.items():
            if (folder := path.split("/")[0]) in FOLDERS:
                assert re.fullmatch(r"part-\d{6}\.parquet", path.split("/")[1]), f"{path} is no part"
                shown[path] = self._table(path, folder, content)
        answered = [row for path, rows in shown.items() if path.startswith("responses/") for row in rows]
        assert len(answered) == len(set(answered)), "a row stands twice in responses"
        if "ledger.sqlite" not in disk:
            return Found({}, len(answered))
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            for path in ("ledger.sqlite", "ledger.sqlite-wal"):
                if path in disk:
                    Path(folder, path).write_bytes(disk[path])
            ledger = Ledger(Path(folder, "ledger.sqlite"))
            assert (ledger.meta("meaning") is None) == (ledger.meta("kept") is None), "half of what was kept together"
            rows: dict[int, str] = {}
            waiting = {}
            for attempt in ledger.attempts(0, 0, self._rows):
                waiting[attempt.row // self._size] = attempt.row
                if attempt.outcome is Outcome.ANSWERED:
                    rows[attempt.row] = text(attempt)
                elif attempt.outcome is Outcome.FAILED:
                    rows[attempt.row] = "failed"
            for part, record in ledger.parts(0).items():
                files = {file.name: file for file in record.files}
                if record.complete and part not in waiting:
                    here = {path for path in shown if path.endswith(f"part-{part:06d}.parquet")}
                    assert here == set(files), "a complete part has other files than were noted"
                    for name, file in files.items():
                        assert hashlib.sha256(disk[name]).hexdigest() == file.sha256, f"{name} is not what was noted"
                settled = {row: said for name in files for row, said in shown.get(name, {}).items()}
                for row in range(part * self._size, record.settled):
                    assert row in rows or row in settled, f"row {row} was dropped from the ledger and is in no part"
                    rows.setdefault(row, settled.get(row, ""))
        return Found(rows, len(answered))

    def _table(self, path: str, folder: str, content: bytes) -> dict[int, str]:
        key = hashlib.blake2b(content).digest()
        if folder == "attempts":
            return {}
        if key not in self._tables:
            try:
                table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            except (OSError, pa.ArrowInvalid) as error:
                raise AssertionError(f"{path} cannot be read: {error}") from None
            said = table["response"].to_pylist() if folder == "responses" else ["failed"] * table.num_rows
            self._tables[key] = dict(zip(table["row"].to_pylist(), said, strict=True))
        return self._tables[key]


def text(attempt: Attempt) -> str:
    """The text of a recorded answer."""
    said = read(attempt)
    assert isinstance(said, Answer)
    return said.choices[0].text or ""


def read(attempt: Attempt) -> Answer | Failure:
    """An attempt's answer as the dialect reads it."""
    return openai.read(Reply(attempt.status or 200, {}, attempt.body or b"", Timing(attempt.sent_at, attempt.latency)))


class Outage(NamedTuple):
    """The disk after the power failed when so many changes were made; `sure` when only what was synced is there."""

    made: int
    disk: dict[str, bytes]
    sure: bool


def outages(changes: Sequence[Change], chance: random.Random) -> Iterator[Outage]:
    """A power loss at each moment at which it matters."""
    disk = Disk()
    for index, change in enumerate(changes):
        if change.kind == "S":
            yield Outage(index, disk.after_some(chance), False)  # the most is at stake just before a sync
        disk.apply(change)
        if change.kind in "SRLU" or change.path.endswith("/told"):
            yield Outage(index + 1, disk.after_power_loss(), True)
        if change.kind in "RLU":
            yield Outage(index + 1, disk.after_kill(), False)
    yield Outage(len(changes), disk.after_kill(), True)


# The ledger and the sink, under the engine's rules, by hand

SIZE = 8
ROWS = 24


def one_attempt(row: int, number: int = 1, outcome: Outcome | None = Outcome.ANSWERED) -> Attempt:
    """An attempt whose answer names it."""
    said = {"choices": [{"message": {"content": f"answer {row}.{number}"}, "finish_reason": "stop"}]}
    body = json.dumps(said).encode() if outcome is not Outcome.AGAIN and outcome is not Outcome.FAILED else None
    kind = Kind.SERVER_ERROR if body is None else None
    values = (0, row, number, outcome, 1_790_000_000_000_000, 0.0, 1.0, None, 1, 1, bytes(16), "m", None, body)
    return Attempt(*values, status=200 if body else 500, kind=kind)


def record_and_publish(output: Path) -> None:
    """Record and publish three parts, telling a file what is durable at the moment it is told."""
    anyio.run(_record_and_publish, output)


async def _record_and_publish(output: Path) -> None:
    told = os.open(output.parent / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def durable(attempts: Sequence[Attempt]) -> None:
        names = [f"{one.row}.{one.attempt}" for one in attempts if one.outcome in (Outcome.ANSWERED, Outcome.FAILED)]
        os.write(told, f"{' '.join(names)}\n".encode())

    ledger = Ledger(output / "ledger.sqlite")
    ledger.set_meta({"meaning": b"m" * 20_000, "kept": b"k" * 20_000})
    kept = pa.schema([("__altered", pa.bool_())])
    sink = Sink(Folder(output), Shape(pa.schema([]), None, (), None, frozenset(), False), read, lambda *_: None)
    sink.prepare()
    ledger.start(durable, lambda error: None)

    async def record(*attempts: Attempt) -> None:
        for one in attempts:
            ledger.record(one)
        await ledger.flush()

    async def publish(part: int, stop: int, settled: int, former: tuple[str, ...] = ()) -> tuple[str, ...]:
        rows = range(part * SIZE, stop)
        beside = iter([pa.record_batch([pa.array([False] * len(rows))], schema=kept)])
        totals, files = await anyio.to_thread.run_sync(
            sink.publish, part, rows, ledger.attempts(0, rows.start, rows.stop), beside, former
        )
        complete = rows if settled == stop else None
        noted = ledger.published(0, part, PartRecord(stop, settled, None, totals, files), complete)
        await anyio.to_thread.run_sync(noted.result)
        return tuple(file.name for file in files)

    # A part that is published open, then complete: its only failure is answered in between.
    await record(*[one_attempt(row) for row in range(5)], one_attempt(5, outcome=Outcome.FAILED))
    await publish(0, 8, settled=0)
    await record(one_attempt(5, 2), one_attempt(6, 1, Outcome.AGAIN))
    await record(one_attempt(6, 2), one_attempt(7, outcome=Outcome.FAILED))
    await publish(0, 8, settled=8)
    # A part that is complete, opened again for more rows, published open, and complete again.
    await record(*[one_attempt(row) for row in range(8, 12)], one_attempt(12, outcome=Outcome.FAILED))
    files = await publish(1, 13, settled=13)
    await record(one_attempt(13), one_attempt(14))
    files = await publish(1, 16, settled=13, former=files)
    await record(one_attempt(12, 2), one_attempt(15))
    await publish(1, 16, settled=16, former=files)
    # A part that stays open.
    await record(*[one_attempt(row) for row in range(16, 20)])
    await publish(2, 24, settled=16)
    await record(*[one_attempt(row) for row in range(20, 23)])
    ledger.close()
    sink.finish()


@pytest.fixture(scope="module")
def by_hand(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Change]]:
    """The output of `record_and_publish`, and the book of its making."""
    folder = tmp_path_factory.mktemp("by_hand")
    (folder / "disk" / "out").mkdir(parents=True)
    code = "import sys, pathlib; from tests.test_power_loss import *; record_and_publish(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "disk" / "out")],
        env=booked(shim, folder / "disk", folder / "book"),
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "disk" / "out", read_book(folder / "book")


def test_the_book_tells_what_the_disk_holds(by_hand: tuple[Path, list[Change]]) -> None:
    """Replayed to its end the book gives the files that are there, byte for byte: nothing was missed."""
    output, changes = by_hand
    disk = Disk()
    for change in changes:
        disk.apply(change)
    rebuilt = {path: content for path, content in disk.after_kill().items() if path.startswith(str(output))}
    assert rebuilt == {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_nothing_is_told_durable_before_it_is_synced(by_hand: tuple[Path, list[Change]]) -> None:
    """Every answer was written to the journal, and the journal synced, before anybody heard that it is durable."""
    _, changes = by_hand
    told = [
        (index, change.data.decode().split()) for index, change in enumerate(changes) if change.path[-5:] == "/told"
    ]
    names = [name for index, line in told if changes[index].kind == "W" for name in line]
    assert len(names) == ROWS + 1
    journal = [(index, change) for index, change in enumerate(changes) if change.path.endswith(".sqlite-wal")]
    for at, line in told:
        for name in line:
            said = f'"answer {name}"'.encode()
            written = [index for index, change in journal if change.kind == "W" and said in change.data and index < at]
            if not any(said in change.data for _, change in journal):
                continue  # a failure: it has no text
            assert written, f"row {name} was told before it was written"
            synced = [index for index, change in journal if change.kind == "S" and written[0] < index < at]
            assert synced, f"row {name} was told before it was synced"


def check_parts(output: Path, changes: Sequence[Change]) -> int:
    """Parts come whole, by a rename, for good, and only then into the ledger; returns how many came."""
    folders = tuple(f"{output / name}/" for name in FOLDERS)
    disk = Disk()
    came = 0
    for index, change in enumerate(changes):
        disk.apply(change)
        target = change.data.decode() if change.kind in "RL" else change.path
        if not target.startswith(folders):
            continue
        assert change.kind in "RUS", f"{target} was not put there by a rename"
        if change.kind == "S":
            continue
        rest = list(enumerate(changes[index + 1 :], index + 1))
        settled = next((at for at, one in rest if one.kind == "S" and one.path == os.path.dirname(target)), None)
        assert settled is not None, f"the folder of {target} was not synced"
        journal = [(at, one) for at, one in rest if one.path.endswith(".sqlite-wal") and one.kind == "W"]
        if change.kind == "U":
            continue
        came += 1
        assert change.path.startswith(f"{output / '.publishing'}/")
        content = disk.after_kill()[target]
        (number,) = [number for number, file in disk.files.items() if file.with_these(file.loose) == content][-1:]
        assert not disk.files[number].loose, f"{target} was not synced before it was put in its place"
        digest = hashlib.sha256(content).hexdigest().encode()
        noted = next((at for at, one in journal if digest in one.data), None)
        assert noted is not None, f"{target} was never noted"
        assert settled < noted, f"{target} was noted before its folder was synced"
    return came


def test_parts_are_synced_then_renamed_then_noted(by_hand: tuple[Path, list[Change]]) -> None:
    """A part is synced, renamed, its folder synced, and then the ledger hears of it; nothing else makes names."""
    output, changes = by_hand
    # Five times answers, failures and attempts: a file of a former self is kept, empty where nobody fails any more.
    assert check_parts(output, changes) == 5 * 3 + 2


def test_what_was_told_durable_survives_a_power_loss(by_hand: tuple[Path, list[Change]]) -> None:
    """After a power loss at any moment every answer that was told durable is found, and every part can be read."""
    output, changes = by_hand
    survivor = Survivor(output, SIZE, ROWS)
    spoken: list[dict[int, int]] = [{}]
    for change in changes:
        latest = dict(spoken[-1])
        if change.kind == "W" and change.path.endswith("/told"):
            for name in change.data.decode().split():
                row, number = map(int, name.split("."))
                latest[row] = max(number, latest.get(row, 0))
        spoken.append(latest)
    for chance in map(random.Random, range(3)):
        for outage in outages(changes, chance):
            found = survivor.found(outage.disk)
            for row, number in spoken[outage.made].items():
                said = found.rows.get(row)
                assert said is not None, f"row {row} was told durable and is lost after {outage.made} changes"
                assert said == "failed" or said.startswith(f"answer {row}."), said
                assert int(said.split(".")[1]) >= number if "." in said else number == 1, f"row {row} has an old answer"
    assert len(found.rows) == ROWS - 1
    assert survivor.states > 100


# The engine


def start(job: Path, shim: Path, disk: Path, book: Path) -> subprocess.Popen[str]:
    """The program on its way, its changes written down."""
    return subprocess.Popen(
        stories.command("run", str(job), "--quiet"),
        env=booked(shim, disk, book, stories.environment()),
        cwd=HOME,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_survives_a_power_loss_at_any_moment(shim: Path, tmp_path: Path) -> None:
    """Through a run that is interrupted and resumed: a row that was found is found after every later power loss."""
    disk, book = tmp_path / "disk", tmp_path / "book"
    disk.mkdir()
    stories.write_jsonl(disk / "rows.jsonl", 60)
    poison = {"[row 00003]": 400, "[row 00037]": 400}
    with stories.service(latency=0.15, faults={"500": 0.05}, poison=poison, seed=3) as service:
        job = stories.write_job(disk, service.url, in_flight=4, rows_per_part=20)
        with start(job, shim, disk, book) as first:
            part = disk / "out/responses/part-000000.parquet"
            while first.poll() is None and not part.exists():
                time.sleep(0.005)
            first.send_signal(signal.SIGTERM)
            _, said = first.communicate(timeout=30)
            assert first.returncode == 143, said
        with start(job, shim, disk, book) as second:
            _, said = second.communicate(timeout=60)
            assert second.returncode == 3, said
        stories.check_complete(disk / "out", 60, service)
    changes = read_book(book)
    assert check_parts(disk / "out", changes) >= 8 + 2  # every part once whole, and one while it was open
    survivor = Survivor(disk / "out", 20, 60)
    before: dict[int, str] = {}
    for outage in outages(changes, random.Random(0)):
        found = survivor.found(outage.disk)
        lost = before.keys() - found.rows.keys()
        assert not lost, f"rows {sorted(lost)} were there and are lost after {outage.made} changes"
        if outage.sure:
            before = found.rows
    assert len(found.rows) == 60


def test_what_a_run_left_undecided_is_judged_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of a run that died before it looked into it counts; what turns out to be none is asked again."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    stories.write_jsonl(tmp_path / "rows.jsonl", 6)

    async def die_undecided() -> None:
        ledger = Ledger(tmp_path / "out" / "ledger.sqlite")
        ledger.start(lambda attempts: None, lambda error: None)
        broken = one_attempt(4, outcome=None)
        broken.body = b'{"choices": ['
        ledger.record(one_attempt(3, outcome=None))
        ledger.record(broken)
        await ledger.flush()
        ledger.close()

    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url)
        batcher.run(batcher.load(job, ["input.limit=3"]))
        anyio.run(die_undecided)
        result = batcher.run(batcher.load(job))
        asked = sorted(stories.row_of(entry) for entry in service.book if entry.path.endswith("completions"))
    assert asked == [0, 1, 2, 4, 5]
    assert result.table()["row"].to_pylist() == list(range(6))
    assert result.table()["response"].to_pylist()[3] == "answer 3.1"
    sent = pq.read_table(tmp_path / "out" / "attempts" / "part-000000.parquet")
    pairs = list(zip(sent["row"].to_pylist(), sent["attempt"].to_pylist(), strict=True))
    assert pairs == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 1)]
