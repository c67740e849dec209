"""What is recorded, what is published, what is left: SQLite with one writer and group commit."""

import asyncio
import errno
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from batcher.errors import OutputInUseError, StorageError
from batcher.killpoint import killpoint
from batcher.records import Attempt, Former, Kind, Note, Outcome, PartRecord, Reparse, Retried, Second, Spending

FORMAT = 1
GATHER = 0.008
GATHER_IDLE = 0.002
BUSY = 3000.0
"""Seconds that answers gather before they are committed together, while more than so many come in a second and while
fewer do: a commit costs as much as 40 rows in it, which matters only when the processor is what is scarce."""
RESERVE_BYTES = 16 << 20
"""Kept free for the answers that are still in flight when the disk fills up."""
WORTH_BYTES = 1 << 20
LITTLE_BYTES = 16 << 20
GONE = "the ledger is gone; put it back, or start anew in another output folder"
"""A ledger that ends with at least so many bytes free gives them back, when it holds no more than so many others."""

REPARSE = "reparse"
"""What meta keeps of a reparse under way, see records.Reparse."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    unit INTEGER NOT NULL, row INTEGER NOT NULL, attempt INTEGER NOT NULL,
    outcome INTEGER, kind TEXT, record BLOB NOT NULL,
    PRIMARY KEY (unit, row, attempt)
);
CREATE TABLE IF NOT EXISTS parts (
    unit INTEGER NOT NULL, part INTEGER NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (unit, part)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS timeline (
    id INTEGER PRIMARY KEY, time INTEGER NOT NULL, grain INTEGER NOT NULL, seconds REAL NOT NULL,
    sent INTEGER NOT NULL, answered INTEGER NOT NULL, refused INTEGER NOT NULL, failed INTEGER NOT NULL,
    rows INTEGER NOT NULL, in_flight REAL NOT NULL, window REAL NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL,
    binds TEXT NOT NULL, held TEXT NOT NULL, buckets TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS retries (
    number INTEGER PRIMARY KEY, started_at TEXT NOT NULL, finished_at TEXT,
    condition TEXT, settings BLOB NOT NULL, rows INTEGER NOT NULL, answered INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS again (
    unit INTEGER NOT NULL, row INTEGER NOT NULL,
    answered INTEGER NOT NULL, attempts INTEGER NOT NULL, started_at INTEGER NOT NULL,
    billed_prompt_tokens INTEGER, billed_completion_tokens INTEGER, cost_usd REAL,
    PRIMARY KEY (unit, row)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spending (one INTEGER PRIMARY KEY CHECK (one = 1), usd REAL NOT NULL, lost REAL NOT NULL);
CREATE TABLE IF NOT EXISTS leases (
    unit INTEGER NOT NULL, row INTEGER NOT NULL, attempt INTEGER NOT NULL, usd REAL NOT NULL,
    PRIMARY KEY (unit, row, attempt)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leaders (
    unit INTEGER NOT NULL, hash BLOB NOT NULL, retry INTEGER NOT NULL, row INTEGER NOT NULL, record BLOB,
    UNIQUE (unit, hash)
);
CREATE INDEX IF NOT EXISTS leaders_by_row ON leaders (unit, row);
"""
_ASKED_IN = "(SELECT coalesce(max(number), 0) FROM retries WHERE finished_at IS NULL)"
"""The retry that is under way, 0 where it is a run."""
_FOLDS = ((3600, 60), (86400, 3600))
"""What lies back further than this many seconds is kept in spans of so many: an hour of seconds, a day of minutes."""
_PAGES = ("page_size", "page_count", "freelist_count")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "ncpfs"}
_LOCAL_FUSE = {"fuseblk", "fuse.ext2", "fuse.ntfs", "fuse.exfat"}

_encode_attempt = msgspec.msgpack.Encoder().encode
_decode_attempt = msgspec.msgpack.Decoder(Attempt).decode
_decode_part = msgspec.msgpack.Decoder(PartRecord).decode
_T = TypeVar("_T")


class Progress(msgspec.Struct, frozen=True):
    """What is known of a range before its rows are read again: the rows that are done, and how others failed so far."""

    done: frozenset[int]
    failed: int
    """How many of the done rows have failed."""
    tried: dict[int, tuple[int, dict[Kind, int]]]
    """By row: the last attempt's number, and failed attempts by kind."""


class Ledger:
    """The durable state of one output.

    Made and read on any thread; `record` and `start` on the event loop's. Raises StorageError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backlog = 0
        """Bytes of answers that are queued and not yet durable."""
        self._reserve = path.with_name(path.name + ".reserve")
        self._queue: list[_Batch | _Write] = []
        self._writing = False
        """Whether the writer will look into the queue once more."""
        self._hands = threading.Lock()
        """Held while queue and writer are looked at together."""
        self._refused: StorageError | None = None
        self._gathered: list[Attempt] = []
        self._gathered_bytes = 0
        self._gather = GATHER_IDLE
        self._judged_at = float("-inf")
        self._since_judged = 0
        self._writer: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = threading.Event()
        self._leases: list[tuple[int, int, int, float]] = []
        self._leased: asyncio.Future[bool] | None = None
        self._leasing = False
        """Whether what attempts have cost is counted."""
        refuse_network_file_system(path.parent)
        version = self._format() if path.exists() else None
        if version is not None and version > FORMAT:
            raise StorageError(f"{path}: written by a newer batcher (format {version}); use that one")
        with self._open() as db:
            db.executescript(_SCHEMA)
        if version is None:
            self.set_meta({"format": str(FORMAT).encode()})

    # What is known

    def _format(self) -> int | None:
        """The format of the file that is there; looking changes nothing in it."""
        with _told_as_storage_errors(self.path):
            with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as db:
                if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
                    return None
                found = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
            return int(found[0]) if found else None

    def meta(self, key: str) -> bytes | None:
        """A value kept for the whole output."""
        with self._open() as db:
            found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def set_meta(self, values: dict[str, bytes]) -> None:
        """Keep values for the whole output, all or none; durable when this returns."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())
            db.execute("COMMIT")

    def parts(self, unit: int) -> dict[int, PartRecord]:
        """What is known of every range that was ever opened."""
        with self._open() as db:
            rows = db.execute("SELECT part, record FROM parts WHERE unit = ? ORDER BY part", (unit,)).fetchall()
            return {part: msgspec.msgpack.decode(record, type=PartRecord) for part, record in rows}

    def progress(self, unit: int, start: int, stop: int) -> Progress:
        """Which rows of [start, stop) are done, and how the others failed so far."""
        done: set[int] = set()
        failed = 0
        tried: dict[int, tuple[int, dict[Kind, int]]] = {}
        with self._open() as db:
            for row, attempt, outcome, kind in db.execute(
                "SELECT row, attempt, outcome, kind FROM attempts WHERE unit = ? AND row >= ? AND row < ?"
                " ORDER BY row, attempt",
                (unit, start, stop),
            ):
                if outcome == Outcome.AGAIN:
                    _, kinds = tried.get(row, (0, {}))
                    tried[row] = (attempt, kinds | {Kind(kind): kinds.get(Kind(kind), 0) + 1} if kind else kinds)
                elif outcome is not None:
                    done.add(row)
                    failed += outcome == Outcome.FAILED
        return Progress(frozenset(done), failed, {row: told for row, told in tried.items() if row not in done})

    def undecided(self) -> list[Attempt]:
        """Answers that were recorded by a run that died before it had decided what they are."""
        with self._open() as db:
            rows = db.execute("SELECT record FROM attempts WHERE outcome IS NULL").fetchall()
            return [_decode_attempt(record) for (record,) in rows]

    def attempts(self, unit: int, start: int, stop: int) -> Iterator[Attempt]:
        """The recorded attempts of rows [start, stop), by row and attempt, as one consistent view."""
        with self._open() as db:
            for (record,) in db.execute(
                "SELECT record FROM attempts WHERE unit = ? AND row >= ? AND row < ? ORDER BY row, attempt",
                (unit, start, stop),
            ):
                yield _decode_attempt(record)

    def unfit(self, unit: int, start: int, stop: int, kind: Kind) -> dict[int, Attempt]:
        """Of the rows of [start, stop) the last answers that were unfit in this way and are to be asked for again."""
        with self._open() as db:
            rows = db.execute(
                "SELECT row, record FROM attempts WHERE unit = ? AND row >= ? AND row < ? AND outcome = ? AND kind = ?"
                " ORDER BY row, attempt",
                (unit, start, stop, Outcome.AGAIN, kind),
            ).fetchall()
            return {row: _decode_attempt(record) for row, record in rows}

    def pending(self, unit: int) -> bool:
        """Whether some row of a range that was opened has no published outcome yet."""
        with self._open() as db:
            if db.execute("SELECT 1 FROM attempts WHERE unit = ? LIMIT 1", (unit,)).fetchone() is not None:
                return True
            return any(not record.complete for _, record in parts_of(db, unit))

    # Rows that are asked again

    def retries(self) -> tuple[Retried, ...]:
        """All retries of this output, in order; one that is under way is the last."""
        with self._open() as db:
            return tuple(
                Retried(
                    started_at=started_at,
                    finished_at=finished_at,
                    where=condition,
                    settings=msgspec.json.decode(settings, type=tuple[str, ...]),
                    rows=rows,
                    answered=answered,
                )
                for started_at, finished_at, condition, settings, rows, answered in db.execute(
                    "SELECT started_at, finished_at, condition, settings, rows, answered FROM retries ORDER BY number"
                )
            )

    def begin_retry(self, retry: Retried, unit: int, chosen: Iterable[tuple[int, Former]]) -> int:
        """Note a retry and its rows, all or nothing; how many there are, and without any there is no retry.

        Durable when this returns. What `chosen` raises leaves nothing behind.
        """
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            added = db.executemany(
                "INSERT INTO again VALUES (?, ?, ?, ?, ?, ?, ?, ?)", ((unit, row, *former) for row, former in chosen)
            ).rowcount
            rows = max(0, added)
            if rows:
                db.execute(
                    "INSERT INTO retries (started_at, condition, settings, rows, answered) VALUES (?, ?, ?, ?, 0)",
                    (retry.started_at, retry.where, msgspec.json.encode(retry.settings), rows),
                )
            killpoint("retry.inside")
            db.execute("COMMIT")
            killpoint("retry.begun")
        return rows

    def again(self, unit: int, start: int, stop: int) -> dict[int, Former]:
        """The rows of [start, stop) that a retry asks again, and what they had come to before."""
        with self._open() as db:
            return {
                row: Former(bool(answered), *others)
                for row, answered, *others in db.execute(
                    "SELECT row, answered, attempts, started_at, billed_prompt_tokens, billed_completion_tokens,"
                    " cost_usd FROM again WHERE unit = ? AND row >= ? AND row < ?",
                    (unit, start, stop),
                )
            }

    def parts_again(self, unit: int, size: int) -> tuple[list[int], int]:
        """Ranges of `size` rows that a retry has not published yet, and how many rows of theirs are asked again."""
        with self._open() as db:
            parts = db.execute(
                "SELECT row / ? FROM again WHERE unit = ? UNION SELECT row / ? FROM attempts WHERE unit = ? ORDER BY 1",
                (size, unit, size, unit),
            ).fetchall()
            (rows,) = db.execute("SELECT count(*) FROM again WHERE unit = ?", (unit,)).fetchone()
        return [part for (part,) in parts], rows

    def abandon(self, unit: int) -> None:
        """Let rows that a retry has not asked yet be what they were; those that it has tried have failed."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            spared = db.execute(
                "DELETE FROM again WHERE unit = ? AND NOT EXISTS"
                " (SELECT 1 FROM attempts WHERE attempts.unit = again.unit AND attempts.row = again.row)",
                (unit,),
            ).rowcount
            db.execute("UPDATE retries SET rows = rows - ? WHERE finished_at IS NULL", (spared,))
            tried = db.execute(
                "SELECT record FROM attempts AS last WHERE unit = ? AND outcome = ? AND attempt ="
                " (SELECT max(attempt) FROM attempts WHERE unit = last.unit AND row = last.row)",
                (unit, Outcome.AGAIN),
            ).fetchall()
            last = [msgspec.structs.replace(_decode_attempt(record), outcome=Outcome.FAILED) for (record,) in tried]
            _put_attempts(db, last)
            db.execute("COMMIT")

    def end_retry(self, finished_at: str) -> None:
        """Note that the retry which is under way has ended, if one is."""
        with self._open() as db:
            db.execute("UPDATE retries SET finished_at = ? WHERE finished_at IS NULL", (finished_at,))

    # Answers that are read again

    def reread(self, mark: Reparse, unit: int, part: int, record: PartRecord) -> None:
        """Note a part that was written again, and how far the reparse has come; durable when this returns."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            _put_part(db, unit, part, record)
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (REPARSE, msgspec.json.encode(mark)))
            killpoint("reparse.inside")
            db.execute("COMMIT")
            killpoint("reparse.noted")

    def end_reparse(self, values: dict[str, bytes]) -> None:
        """Keep values for the whole output and note that its reparse has ended, all or nothing."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())
            db.execute("DELETE FROM meta WHERE key = ?", (REPARSE,))
            db.execute("COMMIT")

    # Rows that make the same request

    def lead(
        self,
        unit: int,
        asked: Sequence[tuple[bytes, int, bool]],
        under_way: Callable[[int], bool],
        tell: Callable[[Sequence[int | Attempt | None]], None],
    ) -> None:
        """Find out, by the hashes of requests, which rows lead their twins, and note them.

        `asked` are hash, row, and whether the row was tried before, so that it is asked whoever leads. `tell` is called
        on the event loop, in the order in which attempts are told durable: for each row with None where it is to be
        asked, with the row that it waits for, or with what that row has come to. A leader that is neither done nor
        `under_way` leads no more. Nothing is told where the disk refuses.
        """
        found: list[int | Attempt | None] = []

        def write(db: sqlite3.Connection) -> None:
            found[:] = _led(db, unit, asked, under_way)

        done: Future[None] = Future()
        done.add_done_callback(lambda write: None if write.exception() else self._tell(tell, found))
        self._put(_Write(write, done))

    # What may be spent

    def take_up_spending(self, before: float) -> Spending:
        """What was spent, or may have been; from now on it is counted. A lease that is still open is spent in full.

        `before` is what runs have spent while nobody counted: it is asked for once.
        """
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT OR IGNORE INTO spending VALUES (1, ?, 0.0)", (before,))
            (open_,) = db.execute("SELECT total(usd) FROM leases").fetchone()
            db.execute("UPDATE spending SET usd = usd + ?, lost = lost + ?", (open_, open_))
            db.execute("DELETE FROM leases")
            db.execute("COMMIT")
            spent = spending_of(db)
        assert spent is not None
        self._leasing = True
        return spent

    def spending(self) -> Spending | None:
        """What was spent, or may have been, open leases included; None where nobody has counted."""
        with self._open() as db:
            return spending_of(db)

    def spent_uncounted(self) -> float | None:
        """What all runs have spent by their timeline; None where a price was not known."""
        with self._open() as db:
            return added_up(0, list(timeline_of(db))).cost_usd

    def lease(self, unit: int, row: int, attempt: int, usd: float) -> "asyncio.Future[bool]":
        """Queue what an attempt may cost at most; the future tells whether that is durable, or never will be.

        What was leased is settled by the transaction that records the attempt.
        """
        assert self._loop is not None
        if self._leased is None:
            self._leased = self._loop.create_future()
            self._loop.call_soon(self._hand_over_leases)  # with those that others ask for in this turn of the loop
        self._leases.append((unit, row, attempt, usd))
        return self._leased

    def _hand_over_leases(self) -> None:
        leases, leased = self._leases, self._leased
        self._leases, self._leased = [], None

        def tell(durable: bool) -> None:
            if leased is not None and not leased.done():
                leased.set_result(durable)

        done: Future[None] = Future()
        done.add_done_callback(lambda write: self._tell(tell, write.exception() is None))
        self._put(_Write(lambda db: _put_leases(db, leases), done))

    # Writing

    def start(
        self,
        on_durable: Callable[[Sequence[Attempt]], None],
        on_trouble: Callable[[StorageError], None],
    ) -> None:
        """Start the writer. Both callbacks run on this event loop: after each commit, and when the disk refuses."""
        try:
            with self._reserve.open("wb") as file:
                file.write(bytes(RESERVE_BYTES))
        except OSError as error:
            self._free_reserve()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"{self.path.parent}: {os.strerror(error.errno)}; {RESERVE_BYTES >> 20} MiB must be free\n"
                    "free some space and run the same command again"
                ) from None
            raise StorageError.of(self._reserve, error) from None
        self._loop = asyncio.get_running_loop()
        self._on_durable, self._on_trouble = on_durable, on_trouble
        with _told_as_storage_errors(self.path):
            self._db = self._connect()
        self._writer = ThreadPoolExecutor(1, "ledger")

    def record(self, attempt: Attempt) -> None:
        """Queue an attempt; it is durable when the callback names it.

        It may still be changed until this turn of the event loop ends, or until it is handed over.
        """
        self._gathered.append(attempt)
        size = len(attempt.body) if attempt.body else 0
        self._gathered_bytes += size
        self.backlog += size
        if len(self._gathered) == 1:
            assert self._loop is not None
            self._loop.call_later(self._gather, self.hand_over)

    @property
    def gathered(self) -> int:
        """Attempts that are not handed over yet."""
        return len(self._gathered)

    def hand_over(self) -> None:
        """Let the writer have what has gathered."""
        if self._gathered:
            self._judge_load()
            self._put(self._batch())

    def open_part(self, unit: int, part: int, record: PartRecord) -> None:
        """Queue what is known of a range that is being opened."""
        self._put(_Write(lambda db: _put_part(db, unit, part, record), Future()))

    def published(self, unit: int, part: int, record: PartRecord, rows: range | None = None) -> "Future[None]":
        """Note that a part lies in its place; with `rows`, that its range is complete: their attempts are dropped."""
        killpoint("complete.before" if rows else "published.before")

        def write(db: sqlite3.Connection) -> None:
            _put_part(db, unit, part, record)
            if rows is not None:
                range_of = (unit, rows.start, rows.stop)
                db.execute(
                    "UPDATE retries SET answered = answered + (SELECT count(*) FROM attempts"
                    " WHERE unit = ? AND row >= ? AND row < ? AND outcome = ?) WHERE finished_at IS NULL",
                    (*range_of, Outcome.ANSWERED),
                )
                db.execute(  # rows of other ranges may make the same requests
                    "UPDATE leaders SET record = coalesce((SELECT record FROM attempts WHERE unit = leaders.unit"
                    " AND row = leaders.row AND outcome IN (?, ?)), record)"
                    f" WHERE unit = ? AND row >= ? AND row < ? AND retry = {_ASKED_IN}",
                    (Outcome.ANSWERED, Outcome.FAILED, *range_of),
                )
                for table in ("attempts", "again"):
                    db.execute(f"DELETE FROM {table} WHERE unit = ? AND row >= ? AND row < ?", range_of)

        done: Future[None] = Future()
        self._put(_Write(write, done))
        return done

    def note(self, note: Note, second: Second | None = None) -> None:
        """Queue what a run says of itself, and a line of the timeline."""
        encoded = msgspec.msgpack.encode(note)  # now: it goes on changing

        def write(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('note', ?)", (encoded,))
            if second is not None:
                _put_second(db, second)

        self._put(_Write(write, Future()))

    async def flush(self) -> None:
        """Return when everything that was queued before is durable. Raises StorageError when it cannot be."""
        self.hand_over()
        done: Future[None] = Future()
        self._put(_Write(lambda db: None, done))
        await asyncio.wrap_future(done)

    def give_up(self) -> None:
        """Stop trying to write what the disk refuses."""
        self._stopped.set()

    def close(self) -> None:
        """Write what is queued, fold the journal into the file, and let go."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
            if self._gathered:
                self._queue.append(self._batch())
            self._write()
            with suppress(sqlite3.Error):
                self._shrink()
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()
        self._free_reserve()

    def _free_reserve(self) -> None:
        with suppress(OSError):  # not there, or on a disk that was made read-only meanwhile
            self._reserve.unlink()

    def _shrink(self) -> None:
        """Give back the space of answers that have gone to their parts, when what is left is little to copy."""
        size, pages, free = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in _PAGES)
        if size * (pages - free) <= LITTLE_BYTES and size * free >= WORTH_BYTES:
            self._db.execute("VACUUM")

    def _judge_load(self) -> None:
        """Gather longer when more rows came than a process can well do since this was last asked."""
        assert self._loop is not None
        self._since_judged += len(self._gathered)
        now = self._loop.time()
        passed = now - self._judged_at
        if passed > 0.05:
            self._gather = GATHER if self._since_judged > BUSY * passed else GATHER_IDLE
            self._judged_at, self._since_judged = now, 0

    def _batch(self) -> "_Batch":
        batch = _Batch(self._gathered, self._gathered_bytes)
        self._gathered, self._gathered_bytes = [], 0
        return batch

    def _put(self, item: "_Batch | _Write") -> None:
        """Queue something for the writer, and set it to work if it is not."""
        with self._hands:
            self._queue.append(item)
            idle, self._writing = not self._writing, True
        if idle:
            assert self._loop is not None
            self._loop.run_in_executor(self._writer, self._write)

    def _write(self) -> None:
        """The writer: commit whatever has queued up and tell the loop, until nothing is queued."""
        db = self._db
        while True:
            with self._hands:
                work, self._queue = self._queue, []
                if not work:
                    self._writing = False
                    return
            self._refused = self._refused or self._commit(db, work)  # after a gap nothing may pass for durable
            refused = self._refused
            for item in work:
                if isinstance(item, _Batch):
                    if refused is None:
                        self._tell(self._durable, item)
                elif not item.done.set_running_or_notify_cancel():
                    pass  # whoever waited has gone
                elif refused is None:
                    item.done.set_result(None)
                else:
                    item.done.set_exception(refused)

    def _commit(self, db: sqlite3.Connection, work: "Sequence[_Batch | _Write]") -> StorageError | None:
        """One transaction; tried again with the reserve given free, then until somebody gives up."""
        told = False
        while True:
            try:
                killpoint("commit.before")
                db.execute("BEGIN IMMEDIATE")
                for item in work:
                    if isinstance(item, _Batch):
                        _put_attempts(db, item.attempts)
                        if self._leasing:
                            _settle(db, item.attempts)
                    else:
                        item.write(db)
                killpoint("commit.inside")
                db.execute("COMMIT")
                killpoint("commit.after")
            except Exception as error:  # whatever it is: a writer that died unheard would leave the run waiting
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                trouble = _storage_error(self.path, error)
                if not told:
                    told = True
                    self._free_reserve()
                    self._tell(self._on_trouble, trouble)
                elif self._stopped.wait(0.2):
                    return trouble
            else:
                return None

    def _durable(self, batch: "_Batch") -> None:
        self.backlog -= batch.size
        self._on_durable(batch.attempts)

    def _tell(self, callback: Callable[[_T], None], value: _T) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is gone: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, value)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with _told_as_storage_errors(self.path), closing(self._connect()) as db:
            yield db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
        # Pages of 16 KiB hold whole answers; overwriting what is dropped would cost more than recording it.
        db.executescript(
            "PRAGMA page_size=16384; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=OFF;"
        )
        return db


@contextmanager
def open_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A ledger to read from, left as it is, also when a killed run left its journal behind. Raises StorageError."""
    journal, index = path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")
    if not path.is_file():
        raise StorageError(f"{path}: {GONE}")
    with tempfile.TemporaryDirectory() as elsewhere:
        if not journal.is_file() or not journal.stat().st_size:
            how = "immutable=1"
        elif index.is_file():
            how = "mode=ro&readonly_shm=1"
        else:  # SQLite reads a journal through its index only, and would make one here
            for file in (path, journal):
                shutil.copy(file, elsewhere)
            path, how = Path(elsewhere, path.name), "mode=ro"
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as db:
                yield db
        except sqlite3.Error as error:
            raise StorageError(f"{path}: cannot be read: {error}") from None


def parts_of(ledger: sqlite3.Connection, unit: int) -> Iterator[tuple[int, PartRecord]]:
    """What a ledger knows of every range that was ever opened, in order. Raises StorageError."""
    for part, record in ledger.execute("SELECT part, record FROM parts WHERE unit = ? ORDER BY part", (unit,)):
        try:
            yield part, _decode_part(record)
        except msgspec.DecodeError:
            raise StorageError(f"the ledger's record of part {part} is damaged; start anew in another output") from None


def note_of(ledger: sqlite3.Connection) -> Note | None:
    """What the last run said of itself; None where it came to say nothing."""
    try:
        found = ledger.execute("SELECT value FROM meta WHERE key = 'note'").fetchone()
        return msgspec.msgpack.decode(found[0], type=Note) if found else None
    except (sqlite3.OperationalError, msgspec.MsgspecError):
        return None  # a ledger that was only just made


def latest_attempts(ledger: sqlite3.Connection, unit: int, most: int) -> list[Attempt]:
    """The attempts that were recorded last, of rows that no published part has yet."""
    rows = ledger.execute("SELECT record FROM attempts WHERE unit = ? ORDER BY rowid DESC LIMIT ?", (unit, most))
    return [_decode_attempt(record) for (record,) in rows]


def reparse_of(ledger: sqlite3.Connection) -> Reparse | None:
    """The reparse that is under way, if one is."""
    found = ledger.execute("SELECT value FROM meta WHERE key = ?", (REPARSE,)).fetchone()
    return msgspec.json.decode(found[0], type=Reparse) if found else None


def spending_of(ledger: sqlite3.Connection) -> Spending | None:
    """What was spent, or may have been, open leases included; None where nobody has counted."""
    try:
        found = ledger.execute(
            "SELECT usd + (SELECT total(usd) FROM leases), lost + (SELECT total(usd) FROM leases) FROM spending"
        ).fetchone()
    except sqlite3.OperationalError:
        return None  # a ledger that was only just made
    return Spending(*found) if found else None


def timeline_of(ledger: sqlite3.Connection, since: int = 0) -> Iterator[Second]:
    """The lines of the timeline from this second of UTC on, in the order in which they happened."""
    with suppress(sqlite3.OperationalError):  # a ledger that was only just made
        for _, second in _seconds(ledger, "time >= ?", since):
            yield second


def done_rows(ledger: sqlite3.Connection, unit: int, start: int, stop: int) -> list[int]:
    """Rows of [start, stop) whose outcome the ledger still holds, in order."""
    rows = ledger.execute(
        "SELECT DISTINCT row FROM attempts WHERE unit = ? AND row >= ? AND row < ? AND outcome IN (?, ?) ORDER BY row",
        (unit, start, stop, Outcome.ANSWERED, Outcome.FAILED),
    )
    return [row for (row,) in rows]


def done_by_part(ledger: sqlite3.Connection, unit: int, size: int) -> dict[int, tuple[int, int]]:
    """By part of so many rows: how many have an outcome that the ledger still holds, and how many of them failed.

    Rows that are asked again are not among them: they stand in their parts all the time.
    """
    counted = ledger.execute(
        "SELECT row / ?, count(*), sum(outcome = ?) FROM attempts WHERE unit = ? AND outcome IN (?, ?)"
        " AND NOT EXISTS (SELECT 1 FROM again WHERE again.unit = attempts.unit AND again.row = attempts.row)"
        " GROUP BY 1",
        (size, Outcome.FAILED, unit, Outcome.ANSWERED, Outcome.FAILED),
    )
    return {part: (done, failed) for part, done, failed in counted}


class _Batch:
    """Attempts that are committed together."""

    __slots__ = ("attempts", "size")

    def __init__(self, attempts: list[Attempt], size: int) -> None:
        self.attempts = attempts
        self.size = size


class _Write:
    """Any other change, with a future for whoever waits for it."""

    __slots__ = ("done", "write")

    def __init__(self, write: Callable[[sqlite3.Connection], None], done: "Future[None]") -> None:
        self.write = write
        self.done = done


def _put_attempts(db: sqlite3.Connection, attempts: Sequence[Attempt]) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?, ?, ?, ?)",
        [(a.unit, a.row, a.attempt, a.outcome, a.kind, _encode_attempt(a)) for a in attempts],
    )


def _led(
    db: sqlite3.Connection, unit: int, asked: Sequence[tuple[bytes, int, bool]], under_way: Callable[[int], bool]
) -> Iterator[int | Attempt | None]:
    """Of each row who leads it: nobody, a row that is under way, or one that has come to something."""
    (retry,) = db.execute(f"SELECT {_ASKED_IN}").fetchone()
    outcomes: dict[int, Attempt] = {}
    for digest, row, tried in asked:
        known = db.execute(
            "SELECT row, record FROM leaders WHERE unit = ? AND hash = ? AND retry >= ?", (unit, digest, retry)
        ).fetchone()
        if known is not None and known[0] != row:
            leader, record = known
            outcome = outcomes.get(leader) or _come_to(db, unit, leader, record)
            if outcome is not None:
                outcomes[leader] = outcome
            if outcome is not None or under_way(leader):
                yield None if tried else outcome or leader
                continue
        elif known is not None:
            yield None
            continue
        db.execute("INSERT OR REPLACE INTO leaders VALUES (?, ?, ?, ?, NULL)", (unit, digest, retry, row))
        yield None


def _come_to(db: sqlite3.Connection, unit: int, row: int, record: bytes | None) -> Attempt | None:
    """What a row has come to: as its part was published, or since."""
    if record is None:
        found = db.execute(
            "SELECT record FROM attempts WHERE unit = ? AND row = ? AND outcome IN (?, ?)",
            (unit, row, Outcome.ANSWERED, Outcome.FAILED),
        ).fetchone()
        record = found[0] if found else None
    return None if record is None else _decode_attempt(record)


def _put_leases(db: sqlite3.Connection, leases: Sequence[tuple[int, int, int, float]]) -> None:
    db.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", leases)


def _settle(db: sqlite3.Connection, attempts: Sequence[Attempt]) -> None:
    """Turn the leases of these attempts into what they have cost; one that was settled before has none any more."""
    usd = lost = 0.0
    for attempt in attempts:
        key = (attempt.unit, attempt.row, attempt.attempt)
        settled = db.execute("DELETE FROM leases WHERE unit = ? AND row = ? AND attempt = ? RETURNING usd", key)
        found = settled.fetchone()
        if found is not None:
            usd += found[0] if attempt.spent is None else attempt.spent
            lost += found[0] if attempt.spent is None else 0.0
    db.execute("UPDATE spending SET usd = usd + ?, lost = lost + ?", (usd, lost))


def _put_part(db: sqlite3.Connection, unit: int, part: int, record: PartRecord) -> None:
    db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (unit, part, msgspec.msgpack.encode(record)))


_COUNTS = ("sent", "answered", "refused", "failed", "rows", "prompt_tokens", "completion_tokens")
_MEANS = ("in_flight", "window")
_SECOND = ("time", "seconds", *_COUNTS, *_MEANS, "cost_usd")


def _put_second(db: sqlite3.Connection, second: Second) -> None:
    """Add a line to the timeline, and fold the old ones once a minute: so the table stays small."""
    last = db.execute("SELECT time FROM timeline ORDER BY id DESC LIMIT 1").fetchone()
    _insert_second(db, None, 1, second)
    if last is None or last[0] // 60 != second.time // 60:
        for age, grain in _FOLDS:
            _fold(db, (second.time - age) // grain * grain, grain)


def _insert_second(db: sqlite3.Connection, place: int | None, grain: int, second: Second) -> None:
    values = [getattr(second, name) for name in _SECOND]
    texts = [second.binds, *(msgspec.json.encode(each).decode() for each in (second.held, second.buckets))]
    names = ", ".join(("id", "grain", *_SECOND, "binds", "held", "buckets"))
    db.execute(
        f"INSERT INTO timeline ({names}) VALUES ({', '.join('?' * (len(values) + 5))})", (place, grain, *values, *texts)
    )


def _seconds(db: sqlite3.Connection, where: str, *values: int) -> Iterator[tuple[int, Second]]:
    chosen = f"SELECT id, {', '.join(_SECOND)}, held, buckets FROM timeline WHERE {where} ORDER BY id"
    for place, *figures, held, buckets in db.execute(chosen, values):
        shares = (msgspec.json.decode(text, type=dict[str, float]) for text in (held, buckets))
        yield place, Second(**dict(zip((*_SECOND, "held", "buckets"), (*figures, *shares), strict=True)))


def _fold(db: sqlite3.Connection, before: int, grain: int) -> None:
    """Add up what happened before this second of UTC into spans of `grain` seconds."""
    groups: dict[int, list[tuple[int, Second]]] = {}
    for place, second in _seconds(db, "time < ? AND grain < ?", before, grain):
        groups.setdefault(second.time // grain * grain, []).append((place, second))
    for start, members in groups.items():
        db.executemany("DELETE FROM timeline WHERE id = ?", [(place,) for place, _ in members])
        _insert_second(db, members[0][0], grain, added_up(start, [second for _, second in members]))


def added_up(time: int, seconds: Sequence[Second]) -> Second:
    """Several spans as one that begins at `time`."""
    whole = Second(time=time, seconds=sum(each.seconds for each in seconds))
    for name in _COUNTS:
        setattr(whole, name, sum(getattr(each, name) for each in seconds))
    costs = [each.cost_usd for each in seconds]
    whole.cost_usd = None if None in costs else sum(cost for cost in costs if cost is not None)
    shares = [each.seconds / (whole.seconds or 1.0) for each in seconds]
    for name in _MEANS:
        setattr(whole, name, sum(share * getattr(each, name) for share, each in zip(shares, seconds, strict=True)))
    for share, each in zip(shares, seconds, strict=True):
        for what, held in each.held.items():
            whole.held[what] = whole.held.get(what, 0.0) + held
        for bucket, used in each.buckets.items():
            whole.buckets[bucket] = whole.buckets.get(bucket, 0.0) + share * used
    return whole


class Lock:
    """The right to write to one folder, held until this process ends. Raises OutputInUseError, StorageError."""

    def __init__(self, folder: Path) -> None:
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}") from None
        for again in reversed(range(20)):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if again:
                    time.sleep(0.01)  # it may be somebody who only looks, see `held`
        os.close(self._descriptor)
        raise OutputInUseError(f"{folder} is in use by another run; wait for it, or stop it first") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def lock_beside(ledger: Path) -> Path:
    """The file to lock where a ledger does not lie in its output's folder."""
    return ledger.with_name(ledger.name + ".lock")


def held(folder: Path) -> bool:
    """Whether somebody has the right to write to a folder. It is asked by taking a share in it for an instant."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def refuse_network_file_system(folder: Path, mounts: str | None = None) -> None:
    """Raise StorageError when a folder lies where locks and syncs do not hold. `mounts` is /proc/self/mountinfo."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return  # not Linux: the system does not tell
    place = os.path.realpath(folder)
    best: tuple[int, str] = (-1, "")
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), left.split()[4])
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= best[0]:
            best = (len(point), right.split()[0])  # of two mounts on one point the later covers the earlier
    kind = best[1]
    if kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
        raise StorageError(
            f"{folder} lies on a network file system ({kind}), where the ledger is not safe;\n"
            "name a local file in [output] ledger"
        )


@contextmanager
def _told_as_storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _storage_error(path, error) from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise _damaged(path, error) from None


def _full(folder: Path) -> bool:
    """Whether the disk has little space left, or room for no more files: SQLite does not always say so."""
    try:
        free = os.statvfs(folder)
    except OSError:
        return False
    return free.f_bavail * free.f_frsize < RESERVE_BYTES or (free.f_files > 0 and not free.f_favail)


def _damaged(path: Path, error: Exception) -> StorageError:
    reason = " ".join(str(error).split())
    return StorageError(f"{path}: is damaged ({reason}); restore it, or start anew in another output folder")


def _storage_error(path: Path, error: Exception) -> StorageError:
    text = " ".join(str(error).split())
    if "disk is full" in text or (("disk I/O error" in text or "unable to open" in text) and _full(path.parent)):
        return StorageError(f"{path.parent}: no space left on the device; free some and run the same command again")
    if "readonly" in text or "unable to open" in text:
        return StorageError(f"{path}: cannot be written; check the folder's permissions")
    if "malformed" in text or "not a database" in text:
        return _damaged(path, error)
    return StorageError(f"{path}: {text}")
