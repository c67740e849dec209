"""The ledger keeps what it was told, in order, once, whatever the disk and the next process do."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher.errors import OutputInUseError, StorageError
from batcher.ledger import FORMAT, RESERVE_BYTES, Ledger, Lock, Progress, refuse_network_file_system
from batcher.records import Attempt, FileRecord, Kind, Outcome, PartRecord, Totals

FEW = settings(max_examples=20, deadline=None)
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where the many ledgers of a property lie: there a sync costs nothing."""
OUTCOMES = st.sampled_from([None, *Outcome])


def attempt(row: int, number: int = 1, outcome: Outcome | None = Outcome.ANSWERED, **changes: object) -> Attempt:
    """An attempt as the engine records it."""
    values: dict[str, object] = {
        "unit": 0,
        "row": row,
        "attempt": number,
        "outcome": outcome,
        "sent_at": 1_790_000_000_000_000 + row,
        "waited": 0.25,
        "latency": 1.5,
        "time_to_first_token": None,
        "prompt_tokens": 12,
        "output_tokens": 64,
        "request_hash": row.to_bytes(16, "big"),
        "model": "gpt-oss-120b",
        "cache_key": None,
        "body": b'{"row": %d}' % row,
        "status": 200,
        "kind": Kind.SERVER_ERROR if outcome in (Outcome.AGAIN, Outcome.FAILED) else None,
        **changes,
    }
    return Attempt(**values)  # type: ignore[arg-type]


class Told:
    """What a ledger's callbacks have said, and a way to wait for it."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Attempt]] = []
        self.troubles: list[StorageError] = []
        self._news = anyio.Event()

    def durable(self, attempts: Sequence[Attempt]) -> None:
        """The callback after a commit."""
        self.batches.append(attempts)
        self._wake()

    def trouble(self, error: StorageError) -> None:
        """The callback when the disk refuses."""
        self.troubles.append(error)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    @property
    def attempts(self) -> list[Attempt]:
        """All that was told durable, in the order of telling."""
        return [attempt for batch in self.batches for attempt in batch]

    async def until(self, true: Callable[[], bool]) -> None:
        """Return when it is true; it is asked after each callback."""
        with anyio.fail_after(30):
            while not true():
                await self._news.wait()


@contextlib.asynccontextmanager
async def writing(path: Path) -> AsyncIterator[tuple[Ledger, Told]]:
    """A ledger whose writer runs."""
    ledger, told = Ledger(path), Told()
    ledger.start(told.durable, told.trouble)
    try:
        yield ledger, told
    finally:
        ledger.give_up()
        ledger.close()


def recorded(path: Path, attempts: Sequence[Attempt]) -> None:
    """Record attempts and close the ledger."""

    async def main() -> None:
        async with writing(path) as (ledger, _):
            for one in attempts:
                ledger.record(one)
            await ledger.flush()

    anyio.run(main)


# Recording


@FEW
@given(st.lists(st.lists(st.builds(attempt, st.integers(0, 9), st.integers(1, 3), OUTCOMES), max_size=8), max_size=4))
def test_what_was_told_durable_is_there_after_reopening(turns: list[list[Attempt]]) -> None:
    """Every attempt is told once, in the order it was recorded; the last word on each is what a reader finds."""

    async def main(path: Path) -> list[Attempt]:
        async with writing(path) as (ledger, told):
            for turn in turns:
                for one in turn:
                    ledger.record(one)
                await anyio.lowlevel.checkpoint()
            await ledger.flush()
            assert ledger.backlog == 0
            return told.attempts

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder, "ledger.sqlite")
        told = anyio.run(main, path)
        everything = [one for turn in turns for one in turn]
        assert told == everything
        last = {(one.row, one.attempt): one for one in everything}
        assert list(Ledger(path).attempts(0, 0, 10)) == [last[key] for key in sorted(last)]


def test_one_turn_is_one_commit(tmp_path: Path) -> None:
    """What is recorded together is committed together, and nothing is told before others can read it."""

    async def main() -> None:
        async with writing(tmp_path / "ledger.sqlite") as (ledger, told):
            for row in range(300):
                ledger.record(attempt(row))
            assert ledger.gathered == 300
            assert ledger.backlog == sum(len(one.body or b"") for one in map(attempt, range(300)))
            await told.until(lambda: bool(told.batches))
            assert [one.row for one in ledger.attempts(0, 0, 300)] == list(range(300))
            assert [len(batch) for batch in told.batches] == [300]

    anyio.run(main)


def test_an_attempt_may_change_until_its_turn_ends(tmp_path: Path) -> None:
    """An answer is queued first and judged after; what was judged in the same turn is recorded."""

    async def main() -> None:
        async with writing(tmp_path / "ledger.sqlite") as (ledger, told):
            one = attempt(3, outcome=None)
            ledger.record(one)
            one.outcome = Outcome.ANSWERED
            await told.until(lambda: bool(told.batches))
            assert ledger.undecided() == []
            assert ledger.progress(0, 0, 9).done == {3}

    anyio.run(main)


def test_a_waiter_that_goes_away_does_not_stop_the_writer(tmp_path: Path) -> None:
    """A flush that is cancelled leaves a ledger that goes on writing."""

    async def main() -> None:
        async with writing(tmp_path / "ledger.sqlite") as (ledger, told):
            with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")  # the writer has to wait for this one
                ledger.record(attempt(1))
                with anyio.move_on_after(0.02) as waiting:
                    await ledger.flush()
                assert waiting.cancelled_caught
                assert told.batches == []
                other.execute("ROLLBACK")
            ledger.record(attempt(2))
            await ledger.flush()
            assert [one.row for one in told.attempts] == [1, 2]

    anyio.run(main)


def test_closing_writes_what_is_queued_and_leaves_one_file(tmp_path: Path) -> None:
    """After closing nothing but the ledger itself is left: no journal, no reserve."""

    async def main() -> None:
        ledger = Ledger(tmp_path / "ledger.sqlite")
        ledger.start(lambda attempts: None, lambda error: None)
        assert (tmp_path / "ledger.sqlite.reserve").stat().st_size == RESERVE_BYTES
        ledger.record(attempt(7))
        ledger.close()

    anyio.run(main)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]
    assert list(Ledger(tmp_path / "ledger.sqlite").attempts(0, 0, 8)) == [attempt(7)]


# What is left to do


@FEW
@given(st.dictionaries(st.integers(0, 12), st.lists(OUTCOMES, min_size=1, max_size=4)))
def test_progress_tells_what_is_done_and_what_was_tried(rows: dict[int, list[Outcome | None]]) -> None:
    """A row is done when an attempt of it was answered or failed; else its failed attempts are told by kind."""
    kinds = [Kind.TIMEOUT, Kind.SERVER_ERROR]
    everything = [
        attempt(row, number, outcome, kind=kinds[number % 2] if outcome is Outcome.AGAIN else None)
        for row, outcomes in rows.items()
        for number, outcome in enumerate(outcomes, 1)
    ]
    strange = [attempt(row, unit=1) for row in range(13)]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder, "ledger.sqlite")
        recorded(path, [*everything, *strange])
        found = Ledger(path).progress(0, 2, 11)
    inside = {row: outcomes for row, outcomes in rows.items() if 2 <= row < 11}
    ended = {row: [o for o in outcomes if o in (Outcome.ANSWERED, Outcome.FAILED)] for row, outcomes in inside.items()}
    tried: dict[int, tuple[int, dict[Kind, int]]] = {}
    for row, outcomes in inside.items():
        again = [number for number, outcome in enumerate(outcomes, 1) if outcome is Outcome.AGAIN]
        if again and not ended[row]:
            by_kind = {kind: sum(kinds[number % 2] is kind for number in again) for kind in kinds}
            tried[row] = again[-1], {kind: count for kind, count in by_kind.items() if count}
    failed = sum(outcomes.count(Outcome.FAILED) for outcomes in ended.values())
    assert found == Progress(frozenset(row for row in ended if ended[row]), failed, tried)


def test_answers_of_a_run_that_died_before_it_decided_are_found(tmp_path: Path) -> None:
    """Such an answer is no row's end and is offered for judgement, once: what is then decided is final."""
    path = tmp_path / "ledger.sqlite"
    recorded(path, [attempt(0), attempt(1, outcome=None), attempt(2, outcome=Outcome.AGAIN), attempt(2, 2, None)])
    ledger = Ledger(path)
    assert ledger.progress(0, 0, 5).done == {0}
    assert [(one.row, one.attempt) for one in ledger.undecided()] == [(1, 1), (2, 2)]
    recorded(path, [attempt(1), attempt(2, 2, Outcome.AGAIN)])
    assert Ledger(path).undecided() == []
    assert Ledger(path).progress(0, 0, 5) == Progress(frozenset({0, 1}), 0, {2: (2, {Kind.SERVER_ERROR: 2})})


# Parts


def test_what_is_known_of_a_part_is_kept(tmp_path: Path) -> None:
    """The record of a range comes back as it was put, by unit and part, the newest one."""
    path = tmp_path / "ledger.sqlite"
    opened = PartRecord(stop=20, settled=10, place=(2, 4096, 17))
    files = (FileRecord("responses/part-000001.parquet", 5, 900, "ab" * 32),)
    done = PartRecord(20, 20, (2, 4096, 17), Totals(rows=5, answered=5, finish_reasons={"stop": 5}), files)

    async def main() -> None:
        async with writing(path) as (ledger, _):
            ledger.open_part(0, 1, PartRecord(stop=20, settled=0))
            ledger.open_part(0, 1, opened)
            ledger.open_part(0, 0, opened)
            ledger.open_part(1, 0, opened)
            await ledger.flush()
            assert ledger.parts(0) == {0: opened, 1: opened}
            await anyio.to_thread.run_sync(ledger.published(0, 1, done, range(10, 20)).result)

    anyio.run(main)
    assert list(Ledger(path).parts(0).items()) == [(0, opened), (1, done)]
    assert Ledger(path).parts(1) == {0: opened}


@FEW
@given(st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_a_complete_part_drops_exactly_its_rows(start: int, length: int, complete: bool) -> None:
    """Noting a complete range drops the attempts of its rows and no others; noting an open one drops nothing."""
    rows = range(start, start + length)
    record = PartRecord(stop=rows.stop, settled=rows.stop if complete else rows.start)
    everything = [attempt(row, number, unit=unit) for unit in (0, 1) for row in range(12) for number in (1, 2)]

    async def main(path: Path) -> None:
        async with writing(path) as (ledger, _):
            for one in everything:
                ledger.record(one)
            await ledger.flush()
            noted = ledger.published(0, 3, record, rows if complete else None)
            await anyio.to_thread.run_sync(noted.result)

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder, "ledger.sqlite")
        anyio.run(main, path)
        ledger = Ledger(path)
        left = [one for unit in (0, 1) for one in ledger.attempts(unit, 0, 12)]
        assert left == [one for one in everything if not (complete and one.unit == 0 and one.row in rows)]
        assert ledger.parts(0) == {3: record}


def test_a_ledger_gives_back_the_space_of_answers_that_have_gone_to_their_part(tmp_path: Path) -> None:
    """It does not stay as large as it once had to be, and keeps what is left to publish."""
    path = tmp_path / "ledger.sqlite"
    rows = [attempt(row, body=bytes(4096)) for row in range(1000)]
    recorded(path, rows)
    assert path.stat().st_size > 4 << 20

    async def publish() -> None:
        async with writing(path) as (ledger, _):
            await asyncio.wrap_future(ledger.published(0, 0, PartRecord(stop=990, settled=990), range(990)))

    anyio.run(publish)
    assert path.stat().st_size < 1 << 20
    with contextlib.closing(Ledger(path)) as ledger:
        assert [kept.row for kept in ledger.attempts(0, 0, 1000)] == list(range(990, 1000))
        assert list(ledger.parts(0)) == [0]


def test_values_of_the_output_are_kept_together(tmp_path: Path) -> None:
    """Values that are set together are there together; one that cannot be kept takes the others with it."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_meta({"meaning": b"one", "kept": b"two"})
    assert (ledger.meta("meaning"), ledger.meta("kept"), ledger.meta("rows")) == (b"one", b"two", None)
    unfit: dict[str, bytes] = {"meaning": b"three", "kept": None}  # type: ignore[dict-item]
    with pytest.raises(StorageError):
        ledger.set_meta(unfit)
    assert Ledger(ledger.path).meta("meaning") == b"one"


# One runner

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from batcher.ledger import Lock
with Lock(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def child(code: str, *arguments: object) -> list[str]:
    """The command line of a Python process that imports the same batcher."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def surroundings() -> dict[str, str]:
    """Its environment."""
    return {**os.environ, "PYTHONPATH": str(Path(batcher.__file__).parents[1]), "PYTHONWARNINGS": "error"}


def test_a_second_runner_is_refused(tmp_path: Path) -> None:
    """While one holds the output nobody else gets it, and the message names the folder; after it anybody does."""
    with Lock(tmp_path), pytest.raises(OutputInUseError, match=str(tmp_path)):
        Lock(tmp_path)
    with Lock(tmp_path):
        pass
    with pytest.raises(StorageError, match="No such file"):
        Lock(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_right_to_write_dies_with_its_holder(tmp_path: Path) -> None:
    """A holder that is killed lets go at once, although a process that it started lives on."""
    with subprocess.Popen(child(HOLDER, tmp_path), env=surroundings(), stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        orphan = int(holder.stdout.readline())
        try:
            with pytest.raises(OutputInUseError):
                Lock(tmp_path)
            holder.kill()
            holder.wait()
            os.kill(orphan, 0)
            with Lock(tmp_path):
                pass
        finally:
            os.kill(orphan, signal.SIGKILL)


# Where a ledger may lie


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("30 1 0:30 / /data rw shared:1 - nfs4 server:/x rw", "nfs4"),
        ("30 1 0:30 / /data rw - cifs //server/x rw", "cifs"),
        ("30 1 0:30 / /data rw - fuse.sshfs me@there: rw", "fuse.sshfs"),
        ("30 1 0:30 / /data rw - 9p x rw", "9p"),
        ("30 1 0:30 / /data/my\\040out rw - nfs x rw", "nfs"),
        ("30 1 0:30 / /data rw - autofs auto rw\n31 30 0:31 / /data rw - nfs4 x rw", "nfs4"),
        ("30 1 8:3 / /data rw - ext4 /dev/b rw\n31 30 0:31 / /data/my\\040out rw - ceph x rw", "ceph"),
    ],
)
def test_a_network_file_system_is_refused(mounts: str, kind: str) -> None:
    """Where locks and syncs do not hold, the ledger is refused with its kind and the way out."""
    text = f"25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/a rw\n{mounts}\n"
    with pytest.raises(StorageError) as refused:
        refuse_network_file_system(Path("/data/my out/run"), text)
    first, second = str(refused.value).splitlines()
    assert (kind in first, "/data/my out/run" in first) == (True, True)
    assert "[output] ledger" in second


@pytest.mark.parametrize(
    "mounts",
    [
        "30 1 0:30 / /data2 rw - nfs4 x rw",
        "30 1 0:30 / /data rw - nfs4 x rw\n31 30 8:3 / /data/my\\040out rw - xfs /dev/b rw",
        "30 1 0:30 / /data rw - nfs4 x rw\n31 30 0:31 / /data rw - ext4 /dev/b rw",
        "30 1 8:3 / /data rw - fuseblk /dev/usb rw",
        "30 1 0:30 / /data rw master:1 - tmpfs none rw",
    ],
)
def test_a_local_file_system_is_accepted(mounts: str) -> None:
    """What counts is the mount that the folder lies on, not others beside it or below it."""
    refuse_network_file_system(Path("/data/my out"), f"25 1 8:1 / / rw - btrfs /dev/a rw\n{mounts}\n")


def test_a_newer_format_is_refused_untouched(tmp_path: Path) -> None:
    """A ledger of a later version is left as it is, byte for byte."""
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;"
            f"INSERT INTO meta VALUES ('format', '{FORMAT + 1}'); CREATE TABLE new (a)"
        )
    before = path.read_bytes()
    with pytest.raises(StorageError, match=f"newer batcher.*format {FORMAT + 1}"):
        Ledger(path)
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.sqlite"]
    assert path.read_bytes() == before


# A damaged file


def one_line(call: Callable[[], object], path: Path) -> None:
    """The call ends with a StorageError of one line that names the file."""
    with pytest.raises(StorageError) as raised:
        call()
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["no database", "cut short", "zeros inside", "a record", "a word"])
def test_a_damaged_ledger_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    """Whatever part of the file is damaged, opening or reading says so and nobody sees a traceback."""
    path = tmp_path / "ledger.sqlite"
    recorded(path, [attempt(row, body=b"x" * 3000) for row in range(100)])
    whole = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as db:
        if damage == "no database":
            path.write_bytes(b"not a database at all" * 1000)
        elif damage == "cut short":
            path.write_bytes(whole[: len(whole) // 2])
        elif damage == "zeros inside":
            path.write_bytes(whole[:16384] + bytes(len(whole) - 16384))
        elif damage == "a record":
            db.execute("UPDATE attempts SET record = x'c1c1' WHERE row = 50")
        else:
            db.execute("UPDATE attempts SET kind = 'strange', outcome = 0 WHERE row = 50")
        db.commit()

    def read() -> object:
        ledger = Ledger(path)
        return [ledger.progress(0, 0, 100), *ledger.attempts(0, 0, 100)]

    one_line(read, path)


def test_a_folder_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    """A ledger that cannot be made is an error of storage, not a traceback."""
    path = tmp_path / "nowhere" / "ledger.sqlite"
    one_line(lambda: Ledger(path), path)


# A full disk

FULL = """
import json, os, resource, signal, sys
from pathlib import Path
import anyio
import anyio.lowlevel
from tests.test_ledger import attempt, writing
from batcher.errors import StorageError

folder, way = Path(sys.argv[1]), sys.argv[2]
filler = folder / "filler"

def fill():
    "Leave no space for anybody."
    if way == "limit":
        wal = (folder / "ledger.sqlite-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(wal, 65536), resource.RLIM_INFINITY))
        return
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass

def free():
    "Give it back."
    if way == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        filler.unlink()

async def main():
    large = b"y" * (1 << 20)
    said = {}
    async with writing(folder / "ledger.sqlite") as (ledger, told):
        rows = lambda: [one.row for one in told.attempts]
        stored = lambda: [one.row for one in ledger.attempts(0, 0, 10)]
        ledger.record(attempt(0))
        await told.until(lambda: rows() == [0])
        reserve = folder / "ledger.sqlite.reserve"
        assert reserve.exists()
        fill()
        ledger.record(attempt(1, body=large))
        await told.until(lambda: bool(told.troubles))
        said["first"] = str(told.troubles[0])
        said["reserve"] = reserve.exists()
        if way == "limit":
            said["before space"] = stored()
            free()
        await told.until(lambda: rows() == [0, 1])
        said["second"] = stored()
        fill()
        ledger.record(attempt(2, body=large * 8))
        await told.until(lambda: len(told.troubles) > 1)
        said["kept"] = stored()
        said["told"] = rows()
        free()
        await told.until(lambda: rows() == [0, 1, 2])
        said["third"] = stored()
        fill()
        ledger.record(attempt(3, body=large * 12))
        await told.until(lambda: len(told.troubles) > 2)
        ledger.give_up()
        try:
            await ledger.flush()
        except StorageError as error:
            said["given up"] = str(error)
        free()
    said["end"] = stored()
    print(json.dumps(said))

anyio.run(main)
"""


def filled(command: Sequence[str]) -> dict[str, object]:
    """What a ledger on a disk without space has said."""
    home = str(Path(batcher.__file__).parents[1])
    ended = subprocess.run(
        command, env=surroundings(), cwd=home, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    said: dict[str, object] = json.loads(ended.stdout)
    return said


def may_mount() -> bool:
    """Whether this process may mount a file system where nobody else sees it."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def test_a_full_disk_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    """On a disk that is really full: trouble is told, the reserve takes what is in flight, and space heals it."""
    if not may_mount():
        pytest.skip("mounting a small file system needs root")
    mounted = f'mount -t tmpfs -o size=40m none "{tmp_path}" && exec "$@"'
    said = filled(["unshare", "-m", "sh", "-c", mounted, "sh", *child(FULL, tmp_path, "tmpfs")])
    assert "no space left" in str(said["first"])
    assert said["reserve"] is False
    assert said["second"] == [0, 1], "the reserve was not enough for what was in flight"
    assert (said["kept"], said["told"]) == ([0, 1], [0, 1])
    assert said["third"] == [0, 1, 2]
    assert "no space left" in str(said["given up"])
    assert said["end"] == [0, 1, 2]


def test_a_disk_that_refuses_to_grow_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    """The same where the system refuses each write past a size: nothing is told durable that is not."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    said = filled(child(FULL, tmp_path, "limit"))
    assert (said["reserve"], said["before space"]) == (False, [0])
    assert said["second"] == [0, 1]
    assert (said["kept"], said["told"]) == ([0, 1], [0, 1])
    assert said["third"] == said["end"] == [0, 1, 2]
    assert str(tmp_path) in str(said["given up"])
