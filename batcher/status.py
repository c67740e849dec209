"""What an output's run is doing, or has done: read from the ledger, while it runs and after, and nothing written."""

import os
import sqlite3
import time
from pathlib import Path

import msgspec

from batcher.errors import JobError, StorageError
from batcher.ledger import added_up, done_by_part, held, note_of, open_read_only, parts_of, spending_of, timeline_of
from batcher.records import UNIT, Note, PartRecord, Second, Status, Totals
from batcher.store import results_at
from batcher.verify import lock_of, settings

NOW = 10
"""Seconds over which the present speed is measured."""
TRIES = 5
"""How often it is looked again where a run begins or ends meanwhile."""
SHOWN = 600
"""Seconds of the timeline that are told."""
LIVE = ("running", "draining", "publishing")
_ENDED = ("complete", "paused", "interrupted", "stopped")


def status(output: str | Path) -> Status:
    """Look into an output. Raises JobError where there is none, StorageError where its ledger cannot be read."""
    tries, results = 0, results_at(output)
    while True:
        tries += 1
        busy = results.folder is not None and held(results.folder)
        try:
            size, path, _ = settings(results)
        except JobError:
            if busy:  # a run is just making it
                return Status(output=str(output), state="in use")
            raise
        lock = lock_of(results, path)
        busy = held(lock)
        try:
            with open_read_only(path) as ledger:
                found = _read(str(output), size, ledger, busy)
        except (StorageError, msgspec.MsgspecError) as error:
            if tries < TRIES:  # the journal may have gone as it was opened: a run began or ended just now
                time.sleep(0.05)
                continue
            raise error if isinstance(error, StorageError) else StorageError(f"{path}: is damaged ({error})") from None
        if held(lock) == busy or tries >= TRIES:  # else a run began or ended just now
            found.ledger_bytes = sum(map(_bytes, (path, path.with_name(path.name + "-wal"))))
            return found


def _read(output: str, size: int, ledger: sqlite3.Connection, busy: bool) -> Status:
    """What one consistent look at the ledger tells."""
    ledger.execute("BEGIN")
    note = note_of(ledger)
    records = dict(parts_of(ledger, UNIT))
    totals = Totals()
    for record in records.values():
        totals.add(record.totals)
    phase = note.snapshot.phase if note else ""
    ended = phase in _ENDED
    idle_state, busy_state = (phase, "in use") if ended else ("broken off", phase or "in use")
    found = Status(
        output=output,
        state=busy_state if busy else idle_state,
        answered=totals.answered,
        failed=totals.failed,
        totals=totals,
        parts=sum(bool(record.files) for record in records.values()),
        complete_parts=sum(record.complete for record in records.values()),
        prompt_tokens=totals.billed_prompt_tokens,
        completion_tokens=totals.billed_completion_tokens,
        cost_usd=totals.cost_usd if totals.rows else 0.0,
    )
    live = note is not None and found.state in LIVE
    if note is not None and live:
        found.answered, found.failed = note.snapshot.answered, note.snapshot.failed
    else:
        _count(found, size, ledger, records)
    if live or found.answered + found.failed != totals.rows:  # some of it is not published yet
        spent = added_up(0, list(timeline_of(ledger)))
        found.prompt_tokens, found.completion_tokens = spent.prompt_tokens, spent.completion_tokens
        found.cost_usd = spent.cost_usd
    if note is not None:
        _tell(found, note, ledger)
        found.budget_usd = note.snapshot.budget_usd
        found.spent = None if found.budget_usd is None else spending_of(ledger)
    if found.total is not None:
        if found.state not in LIVE:  # what a retry says of itself is about the rows that it asks
            found.total = max(found.total, totals.rows)
        found.pending = max(0, found.total - found.answered - found.failed)
        if found.pending and busy and found.rows_per_second:
            found.seconds_left = found.pending / found.rows_per_second
    return found


def _count(found: Status, size: int, ledger: sqlite3.Connection, records: dict[int, PartRecord]) -> None:
    """Rows, those that are recorded and not published yet among them."""
    counted = done_by_part(ledger, UNIT, size)
    found.answered = found.failed = 0
    for part, record in records.items():
        done, failed = counted.get(part, (0, 0))
        before = record.done(part * size).bit_count()
        # A part that was opened again stands half in its former self, half in the ledger.
        failed = max(failed, record.totals.failed)
        found.failed += failed
        found.answered += before + done - failed


def _tell(found: Status, note: Note, ledger: sqlite3.Connection) -> None:
    """What the run says of itself."""
    snapshot = note.snapshot
    found.pid, found.started_at, found.noted_at = note.pid, note.started_at, note.time
    found.seconds, found.requests, found.refused = snapshot.seconds, snapshot.requests, snapshot.refused
    found.total, found.troubles = snapshot.total, note.troubles
    found.in_flight, found.window, found.waiting = snapshot.in_flight, snapshot.window, snapshot.waiting
    found.binds, found.buckets = snapshot.binds, dict(snapshot.buckets)
    found.deadline, found.late = snapshot.deadline, snapshot.late
    found.decisions = note.decisions
    lines = list(timeline_of(ledger, note.time - SHOWN))
    last = added_up(0, [line for line in lines if line.time + line.seconds > note.time - NOW])
    found.rows_per_second = last.rows / last.seconds if last.seconds else 0.0
    found.tokens_per_second = (last.prompt_tokens + last.completion_tokens) / last.seconds if last.seconds else 0.0
    if snapshot.seconds:
        done = snapshot.answered + snapshot.failed - snapshot.before
        found.average_rows_per_second = done / snapshot.seconds
    found.timeline = _spans(lines)


def _spans(lines: list[Second]) -> list[Second]:
    """The last minutes in a dozen lines at most: minutes, or tens of seconds of a young run."""
    if not lines:
        return []
    step = 60 if lines[-1].time - lines[0].time > 120 else 10
    groups: dict[int, list[Second]] = {}
    for line in lines:
        groups.setdefault(line.time // step * step, []).append(line)
    return [added_up(start, members) for start, members in groups.items()][-12:]


def _bytes(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
