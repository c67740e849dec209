"""Recounts an output without its job: every row exactly once, files intact, sums as they were written down."""

import hashlib
import math
import re
import sqlite3
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batcher import bits
from batcher.errors import JobError, StorageError
from batcher.job import Output
from batcher.ledger import Lock, done_rows, lock_beside, open_read_only, parts_of, reparse_of
from batcher.records import UNIT, FileRecord, PartRecord, Summary, Totals
from batcher.store import FOLDERS, UNFINISHED, Results, not_here, results_at

_ANSWERED_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "latency", "altered")
_BILLED_SUMS = ("billed_prompt_tokens", "billed_completion_tokens", "cost_usd")


@dataclass(slots=True)
class Verdict:
    """What a recount found. `totals` are the sums over the folders; `problems` has one line each, naming the file."""

    totals: Totals = field(default_factory=Totals)
    parts: int = 0
    files: int = 0
    pending: int | None = None
    """Selected rows without an outcome; None where the last run did not come to its end."""
    again: int = 0
    """Rows that a retry which was interrupted has still to ask."""
    rereading: bool = False
    """Whether a reparse was interrupted, so that parts are of the former reading or of the new one."""
    problems: list[str] = field(default_factory=list)


def verify(output: str | Path) -> Verdict:
    """Recount an output, part by part, and write nothing.

    Raises JobError where there is no output, OutputInUseError while a run writes to it.
    """
    results = results_at(output)
    found = settings(results)
    with Lock(lock_of(results, found.ledger)), open_read_only(found.ledger) as ledger:
        return _Recount(results, found, ledger).verdict()


class Settings(NamedTuple):
    """What an output's job.toml tells."""

    rows_per_part: int
    ledger: Path
    selective: bool
    """Whether it is the ledger that tells which rows the last run was about."""


def settings(results: Results) -> Settings:
    """What an output says of itself. Raises JobError where there is none, StorageError where its ledger is not here."""
    written = results.read("job.toml")
    if written is None:
        raise JobError(f"{results}: no output of batcher, for it has no job.toml")
    try:
        document = tomllib.loads(written.decode())
        section = msgspec.convert(document["output"], Output)
        given = document.get("input", {})
        selective = "where" in given or "sample" in given
    except (ValueError, KeyError, TypeError, msgspec.ValidationError):
        raise JobError(f"{results}/job.toml: is damaged, so the output cannot be read") from None
    ledger = Path(results.folder or "", section.ledger or "ledger.sqlite")
    if not ledger.exists():
        if results.folder is None:
            raise StorageError(f"{ledger}: {not_here(results)}")
        if not (results.folder / "responses").exists():
            raise JobError(f"{results}: no output of batcher, for it has neither ledger nor responses")
    return Settings(section.rows_per_part, ledger, selective)


def lock_of(results: Results, ledger: Path) -> Path:
    """What a run of this output locks."""
    return results.folder or lock_beside(ledger)


class _Recount:
    """The state of one recount."""

    def __init__(self, results: Results, found: Settings, ledger: sqlite3.Connection) -> None:
        self._results = results
        self._size = found.rows_per_part
        self._ledger = ledger
        self._schemas: dict[str, tuple[str, pa.Schema]] = {}
        self._complete: dict[int, int] = {}
        """Complete parts, and the sets of rows that are done in them."""
        self._open = 0
        self._found = Verdict()
        self._summary = self._read_summary()
        self._ended = self._summary is not None and not results.unfinished
        """Whether the last run came to its end, and the summary is its."""
        self._selective = found.selective
        self._under_way: int | None = None
        """The part that a reparse which was interrupted was about to write."""

    def verdict(self) -> Verdict:
        """All parts, then what they make together."""
        damage = self._ledger.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            self._say("ledger.sqlite", f"is damaged: {damage}")
        records = dict(parts_of(self._ledger, UNIT))
        if (reparse := reparse_of(self._ledger)) is not None:
            self._found.rereading, self._ended = True, False
            self._under_way = min((part for part in records if part > reparse.part), default=None)
        files = self._files()
        recorded = Totals()
        for part in sorted({*records, *files}):
            record = records.get(part)
            if record is None:
                for name in files[part]:
                    self._say(name, "is not known to the ledger")
                continue
            self._found.parts += 1
            rewritten = self._under_way is not None and part == self._under_way
            complete = record.complete and not self._has("attempts", part) and not rewritten
            again = rewritten or self._has("again", part)
            totals = self._part(part, record, complete, again, files.get(part, set()))
            self._found.totals.add(totals)
            recorded.add(record.totals)
            if not complete:
                self._open += 1
            else:
                self._complete[part] = record.done(part * self._size)
            if complete or self._ended:
                self._compare(f"part {part:06d}", totals, "the ledger", record.totals)
        self._whole(recorded)
        (self._found.again,) = self._ledger.execute("SELECT count(*) FROM again WHERE unit = ?", (UNIT,)).fetchone()
        return self._found

    # One part

    def _part(self, part: int, record: PartRecord, complete: bool, again: bool, names: set[str]) -> Totals:
        """One part's files against what is recorded of them, and their sums."""
        totals = Totals()
        start = part * self._size
        allowed = range(start, record.stop if complete or again else start + self._size)
        settled = complete or self._ended
        for file in record.files if settled else ():
            if file.name not in names:
                self._say(file.name, f"is missing ({file.rows:,} rows)")
        known = {file.name: file for file in record.files}
        rows: dict[str, pa.ChunkedArray] = {}
        for name in sorted(names, key=lambda name: FOLDERS.index(name.split("/")[0])):
            if settled and name not in known:
                self._say(name, "is not known to the ledger")
            read = self._file(name, known.get(name) if settled else None, totals)
            if read is None:
                continue
            folder = name.split("/")[0]
            self._in_order(name, read, allowed)
            rows[folder] = read["row"]
            if settled and name in known and known[name].rows != read.num_rows:
                self._say(name, f"holds {read.num_rows:,} rows, and {known[name].rows:,} were published")
        self._once(part, rows, record, complete, again)
        return totals

    def _file(self, name: str, known: FileRecord | None, totals: Totals) -> pa.Table | None:
        """A file against what is known of it, and its rows (and attempts). None: cannot be read."""
        self._found.files += 1
        try:
            with self._results.local(name) as path:
                if known is not None:
                    self._intact(path, known)
                return self._read(name, path, totals)
        except (OSError, pa.ArrowException, KeyError) as error:
            self._say(name, f"cannot be read: {error}")
            return None

    def _intact(self, path: Path, file: FileRecord) -> None:
        if (size := path.stat().st_size) != file.bytes:
            self._say(file.name, f"has {size:,} bytes, and {file.bytes:,} were published")
            return
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                self._say(file.name, "is not what was published: its sha256 differs")

    def _read(self, name: str, path: Path, totals: Totals) -> pa.Table:
        """The rows (and attempts) of a file, every page of it checked; its sums are added."""
        folder = name.split("/")[0]
        numbers: list[pa.RecordBatch] = []
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            self._same_columns(name, file.schema_arrow)
            columns = ["row", "attempt"] if folder == "attempts" else ["row"]
            for batch in file.iter_batches(batch_size=4096):
                numbers.append(batch.select(columns))
                _add(totals, folder, batch)
            return pa.Table.from_batches(numbers, pa.schema([file.schema_arrow.field(name) for name in columns]))

    def _same_columns(self, name: str, schema: pa.Schema) -> None:
        first, expected = self._schemas.setdefault(name.split("/")[0], (name, schema))
        if not schema.equals(expected) and not self._found.rereading:
            fields = {*schema, *expected} - ({*schema} & {*expected})
            names = ", ".join(sorted({field.name for field in fields})) or "their order"
            self._say(name, f"has other columns than {first}: {names}")

    def _in_order(self, name: str, read: pa.Table, allowed: range) -> None:
        """Rows stand in order, each once, inside the part's range; attempts by row and attempt."""
        rows = read["row"].combine_chunks()
        if not len(rows):
            return
        before, after = rows[:-1], rows[1:]
        rising = pc.greater(after, before)
        if "attempt" in read.column_names:
            number = read["attempt"].combine_chunks()
            rising = pc.or_(rising, pc.and_(pc.equal(after, before), pc.greater(number[1:], number[:-1])))
        wrong = pc.index(rising, False).as_py()
        if wrong >= 0:
            row, last = rows[wrong + 1].as_py(), rows[wrong].as_py()
            self._say(name, f"row {row} stands twice" if row == last else f"row {row} stands after row {last}")
        outside = pc.or_(pc.less(rows, allowed.start), pc.greater_equal(rows, allowed.stop))
        if (wrong := pc.index(outside, True).as_py()) >= 0:
            self._say(name, f"row {rows[wrong].as_py()} is outside of {allowed.start} to {allowed.stop - 1}")

    def _once(
        self, part: int, rows: dict[str, pa.ChunkedArray], record: PartRecord, complete: bool, again: bool
    ) -> None:
        """No row has both answer and failure; none is missing that is done, also while it is asked again."""
        empty = pa.chunked_array([], pa.int64())
        answered, failed = rows.get("responses", empty), rows.get("failures", empty)
        both = pc.index(pc.is_in(failed, value_set=answered), True).as_py()
        # Killed between the two files of a part, a row that has just been answered stands in both.
        if both >= 0 and not (again and not self._ended):
            row = failed[both].as_py()
            self._say(f"failures/part-{part:06d}.parquet", f"row {row} stands in responses too")
        start = part * self._size
        done = bits.rows(record.done(start), start)
        if not complete and not again:
            if not self._ended or self._summary is None or self._summary.state == "stopped":
                return
            done += done_rows(self._ledger, UNIT, start, start + self._size)
        expected = pa.array(done, pa.int64())
        there = pc.is_in(expected, value_set=pa.chunked_array([*answered.chunks, *failed.chunks], pa.int64()))
        missing = pc.sum(pc.invert(there)).as_py()
        if missing:
            row = expected[pc.index(there, False).as_py()].as_py()
            self._say(f"part {part:06d}", f"row {row} is in neither responses nor failures ({missing:,} rows are not)")

    def _has(self, table: str, part: int) -> bool:
        """Whether the ledger holds something of a range: it is open, or was complete and has been taken up again."""
        found = self._ledger.execute(
            f"SELECT 1 FROM {table} WHERE unit = ? AND row >= ? AND row < ? LIMIT 1",
            (UNIT, part * self._size, (part + 1) * self._size),
        )
        return found.fetchone() is not None

    # All parts

    def _whole(self, recorded: Totals) -> None:
        """What the parts make together, once the last run has come to its end."""
        summary = self._summary
        folder = self._results.folder
        leftovers = [] if folder is None else list((folder / UNFINISHED).glob("*"))
        if leftovers and not self._open and summary is not None and summary.state == "complete":
            self._say(f"{UNFINISHED}/{leftovers[0].name}", "was left behind; run the job again to clear it away")
        if summary is None or not self._ended:
            return
        self._found.pending = summary.pending
        self._compare("summary.json", summary.totals, "the folders", self._found.totals)
        self._compare("summary.json", summary.totals, "the ledger", recorded)
        if summary.state != "complete":
            return
        if summary.selected is None:
            self._say("summary.json", "calls the output complete and does not say how many rows that is")
            return
        selected = self._selected() if self._selective else bits.first(summary.selected)
        if selected.bit_count() != summary.selected:
            self._say("summary.json", f"tells of {summary.selected:,} rows, and {selected.bit_count():,} are selected")
        for part in range(-(-selected.bit_length() // self._size)):
            start = part * self._size
            if missing := bits.cut(selected, start, start + self._size) & ~self._complete.get(part, 0):
                row = bits.rows(missing, start)[0]
                self._say("summary.json", f"calls {summary.selected:,} rows complete, and row {row} is not")
                return

    def _selected(self) -> int:
        """The set of rows that the last run selected."""
        found = self._ledger.execute("SELECT value FROM meta WHERE key = 'selection'").fetchone()
        try:
            return bits.unpack(found[0] if found else bits.pack(0))
        except ValueError as error:
            self._say("ledger.sqlite", str(error))
            return 0

    def _compare(self, name: str, said: Totals, where: str, found: Totals) -> None:
        for key in Totals.__struct_fields__:
            mine, theirs = getattr(said, key), getattr(found, key)
            if isinstance(mine, float) and isinstance(theirs, float):
                if not math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-9):
                    self._say(name, f"{key} is {mine:g}, and {theirs:g} in {where}")
            elif mine != theirs:
                self._say(name, f"{key} is {mine}, and {theirs} in {where}")

    def _files(self) -> dict[int, set[str]]:
        """The published files by part; what else lies in the folders is a problem."""
        found: dict[int, set[str]] = {}
        for name in sorted(self._results.parts()):
            if match := re.fullmatch(r"part-(\d{6,})\.parquet", name.split("/")[1]):
                found.setdefault(int(match[1]), set()).add(name)
            else:
                self._say(name, "is no part of the output")
        return found

    def _read_summary(self) -> Summary | None:
        try:
            written = self._results.read("summary.json")
            return None if written is None else msgspec.json.decode(written, type=Summary)
        except (StorageError, msgspec.MsgspecError) as error:
            self._say("summary.json", f"cannot be read: {error}")
            return None

    def _say(self, name: str, problem: str) -> None:
        self._found.problems.append(f"{name}: {problem}".replace("\n", " "))


def _add(totals: Totals, folder: str, batch: pa.RecordBatch) -> None:
    """Add a batch's sums."""
    if folder == "attempts":
        totals.attempts += batch.num_rows
        return
    part = Totals(rows=batch.num_rows)
    for name in (*_BILLED_SUMS, *(_ANSWERED_SUMS if folder == "responses" else ())):
        summed = pc.sum(batch.column(name)).as_py()
        setattr(part, name, summed if name == "cost_usd" else summed or 0)
    values = pc.value_counts(batch.column("finish_reason" if folder == "responses" else "kind")).to_pylist()
    counted = {pair["values"] or "": pair["counts"] for pair in values}
    part.unpriced = batch.column("cost_usd").null_count
    if folder == "responses":
        part.answered, part.finish_reasons = batch.num_rows, counted
        part.unfit = batch.column("parsed").null_count if "parsed" in batch.schema.names else 0
    else:
        part.failed, part.failure_kinds = batch.num_rows, counted
    totals.add(part)
