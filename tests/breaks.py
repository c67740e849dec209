"""Breaks the durability of a copy of the package in one place at a time, and sees whether the tests find it.

    python -m tests.breaks [words of a name ...]

Each break is a piece of text that stands exactly once in the code and what is put in its stead. Exits with 1 when a
break is not found, when the code has moved away from a break, or when the tests fail without any break.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).parents[1]
PATIENCE = 300.0
"""Seconds that the tests of one break are given; a run that hangs is found too."""


class Break(NamedTuple):
    """One deliberate mistake, and the tests that have to find it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LEDGER = ("tests/test_ledger.py",)
SINK = ("tests/test_sink.py",)
WORLDS = ("tests/test_simulation.py", "-k", "every_world")
POWER = ("tests/test_power_loss.py",)
RETRY = ("tests/test_retry_command.py",)
BUDGET = ("tests/test_budget.py",)
DEDUPE = ("tests/test_dedupe.py", "-k", "not kills")
STORES = ("tests/test_stores.py",)

BREAKS = (
    Break(
        "the journal is not synced",
        "ledger.py",
        "PRAGMA synchronous=FULL;",
        "PRAGMA synchronous=OFF;",
        POWER,
    ),
    Break(
        "the journal is synced at checkpoints only",
        "ledger.py",
        "PRAGMA synchronous=FULL;",
        "PRAGMA synchronous=NORMAL;",
        POWER,
    ),
    Break(
        "an attempt is told durable before its commit",
        "ledger.py",
        "            self._refused = self._refused or self._commit(db, work)",
        "            for item in work:\n"
        "                if isinstance(item, _Batch):\n"
        "                    self._tell(self._durable, item)\n"
        "            self._refused = self._refused or self._commit(db, work)\n"
        "            work = [item for item in work if not isinstance(item, _Batch)]",
        POWER,
    ),
    Break(
        "a lost batch is forgotten by the next commit",
        "ledger.py",
        "self._refused = self._refused or self._commit(db, work)",
        "self._refused = self._commit(db, work)",
        LEDGER,
    ),
    Break(
        "a second word on an attempt is not taken",
        "ledger.py",
        "INSERT OR REPLACE INTO attempts",
        "INSERT OR IGNORE INTO attempts",
        LEDGER,
    ),
    Break(
        "answers are dropped without the record of their part",
        "ledger.py",
        "            _put_part(db, unit, part, record)\n            if rows is not None:",
        "            if rows is None:\n                _put_part(db, unit, part, record)\n            else:",
        LEDGER,
    ),
    Break(
        "answers are dropped in a transaction of their own",
        "ledger.py",
        "            _put_part(db, unit, part, record)\n            if rows is not None:\n",
        "            if rows is not None:\n"
        "                db.execute('DELETE FROM attempts WHERE row >= ? AND row < ?', (rows.start, rows.stop))\n"
        "            db.execute('COMMIT')\n"
        "            db.execute('BEGIN IMMEDIATE')\n"
        "            _put_part(db, unit, part, record)\n"
        "            if rows is not None:\n",
        POWER,
    ),
    Break(
        "one answer too many is dropped",
        "ledger.py",
        "(unit, rows.start, rows.stop)\n",
        "(unit, rows.start, rows.stop + 1)\n",
        LEDGER,
    ),
    Break(
        "undecided answers are not found",
        "ledger.py",
        "WHERE outcome IS NULL",
        "WHERE outcome IS NULL AND row < 0",
        LEDGER,
    ),
    Break(
        "undecided answers count as done",
        "ledger.py",
        "                elif outcome is not None:\n                    done.add(row)",
        "                else:\n                    done.add(row)",
        LEDGER,
    ),
    Break(
        "a request does not wait for its lease",
        "engine/attempt.py",
        "not await self._leased(ticket, self._budget):",
        "asyncio.ensure_future(self._leased(ticket, self._budget)) is None:",
        WORLDS,
    ),
    Break(
        "an open lease is forgotten",
        "ledger.py",
        'db.execute("UPDATE spending SET usd = usd + ?, lost = lost + ?", (open_, open_))',
        "pass",
        BUDGET,
    ),
    Break(
        "half of a lease is held",
        "schedule/budget.py",
        "self.held += usd",
        "self.held += usd / 2",
        BUDGET,
    ),
    Break(
        "what a leader has come to goes with its part",
        "ledger.py",
        "AND row = leaders.row AND outcome IN (?, ?))",
        "AND row = leaders.row AND outcome IN (?, ?) AND 0)",
        DEDUPE,
    ),
    Break(
        "the lock is shared",
        "ledger.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        LEDGER,
    ),
    Break(
        "a newer format is written to before it is refused",
        "ledger.py",
        "        version = self._format() if path.exists() else None\n",
        "        with self._open() as db:\n"
        "            db.executescript(_SCHEMA)\n"
        "        version = self._format() if path.exists() else None\n",
        LEDGER,
    ),
    Break(
        "a part is not synced",
        "sink.py",
        "            os.fsync(file.fileno())\n",
        "",
        POWER,
    ),
    Break(
        "a part is renamed before it is synced",
        "sink.py",
        '        with made.open("rb") as file:\n',
        "        self._results.put(made, FileRecord(target, rows, 0, ''))\n"
        '        made = self._workshop.parent / target\n        with made.open("rb") as file:\n',
        POWER,
    ),
    Break(
        "the folder is not synced after a rename",
        "sink.py",
        "        self._results.settle(target)\n",
        "",
        POWER,
    ),
    Break(
        "the folder is not synced after a removal",
        "store/results.py",
        "            self.settle(name)\n",
        "",
        POWER,
    ),
    Break(
        "parts have a temporary name inside the dataset",
        "store/results.py",
        "        os.replace(made, self._path / file.name)\n",
        '        near = (self._path / file.name).with_suffix(".new")\n'
        "        os.replace(made, near)\n        os.replace(near, self._path / file.name)\n",
        POWER,
    ),
    Break(
        "parts are built in their place",
        "sink.py",
        '        made, target = self._workshop / f"{name}-{part:06d}", _file(name, part)\n',
        '        made, target = self._workshop / f"{name}-{part:06d}", _file(name, part)\n'
        "        (self._workshop.parent / target).write_bytes(made.read_bytes())\n",
        POWER,
    ),
    Break(
        "the former self is not merged",
        "sink.py",
        "        if _file(name, part) not in former:\n",
        "        if former is not None:\n",
        SINK,
    ),
    Break(
        "the former self wins over new rows",
        "sink.py",
        '            old = old.filter(pc.invert(pc.is_in(old["row"], value_set=ended)))\n',
        '            new = new.filter(pc.invert(pc.is_in(new["row"], value_set=old["row"])))\n',
        SINK,
    ),
    Break(
        "the former self is not checked",
        "sink.py",
        "page_checksum_verification=True",
        "page_checksum_verification=False",
        SINK,
    ),
    Break(
        "row groups lose their last row",
        "sink.py",
        "                writers[name].write_table(table)\n",
        "                writers[name].write_table(table.slice(0, max(1, table.num_rows - 1)))\n",
        SINK,
    ),
    Break(
        "a file without rows left stays",
        "sink.py",
        "            self._results.remove(_file(name, part))\n",
        "            pass\n",
        SINK,
    ),
    Break(
        "unknown tokens are billed as none",
        "sink.py",
        "            prompt, completion = told.prompt_tokens, told.completion_tokens\n",
        "            prompt, completion = told.prompt_tokens or 0, told.completion_tokens or 0\n",
        SINK,
    ),
    Break(
        "answers are dropped before their part is published",
        "engine/publish.py",
        "        totals, files = self._sink.publish(\n"
        "            opened.part,\n"
        "            rows,\n"
        "            self._ledger.attempts(UNIT, rows.start, rows.stop),\n",
        "        answers = list(self._ledger.attempts(UNIT, rows.start, rows.stop))\n"
        "        if complete:\n"
        "            early = PartRecord(rows.stop, rows.stop)\n"
        "            self._ledger.published(UNIT, opened.part, early, rows).result()\n"
        "        totals, files = self._sink.publish(\n"
        "            opened.part,\n"
        "            rows,\n"
        "            iter(answers),\n",
        POWER,
    ),
    Break(
        "an open part is noted as complete",
        "engine/publish.py",
        "                complete = opened.complete\n",
        "                complete = True\n",
        POWER,
    ),
    Break(
        "what was left undecided is not judged",
        "engine/run.py",
        "for attempt in self._ledger.undecided():",
        "for attempt in self._ledger.undecided()[:0]:",
        POWER,
    ),
    Break(
        "the output is not locked",
        "engine/run.py",
        "            stack.enter_context(Lock(results.folder))\n",
        "",
        ("tests/test_engine.py", "-k", "second_runner"),
    ),
    Break(
        "a store that does not answer is not given time",
        "store/results.py",
        "wait = next(waits, None) if self._answers else None",
        "wait = None",
        (*STORES, "-k", "comes_back"),
    ),
    Break(
        "results of another ledger are written over",
        "engine/prepared.py",
        "    if owner is not None and owner != _known(job, _NAME):\n",
        "    if owner is not None and not results:\n",
        (*STORES, "-k", "another_ledger"),
    ),
    Break(
        "the sums of a row that is asked again begin anew",
        "sink.py",
        "billed_prompt, billed_completion, cost = before[-3:]",
        "billed_prompt, billed_completion, cost = (0, 0, 0.0)",
        SINK,
    ),
    Break(
        "an answer gives way to a failure",
        "sink.py",
        "last.outcome is Outcome.FAILED and before.answered",
        "last.outcome is Outcome.FAILED and False",
        SINK,
    ),
    Break(
        "an empty file of failures is taken away",
        "sink.py",
        'if name == "responses" or _file(name, part) in former:',
        'if name == "responses":',
        RETRY,
    ),
    Break(
        "the rows of a retry are noted without what they had come to",
        "ledger.py",
        "((unit, row, *former) for row, former in chosen)",
        "((unit, row, *former[:2], 0, 0, 0, 0.0) for row, former in chosen)",
        RETRY,
    ),
    Break(
        "the rows of a retry are not noted before it begins",
        "ledger.py",
        """            killpoint("retry.inside")
            db.execute("COMMIT")
""",
        """            killpoint("retry.inside")
""",
        RETRY,
    ),
    Break(
        "rows that are done are asked again",
        "engine/feed.py",
        "            left = self._wanted(part) & ~self._done.get(part, 0)\n",
        "            left = self._wanted(part)\n",
        WORLDS,
    ),
    Break(
        "a row is asked once too often",
        "retry.py",
        "    if charged >= max_attempts:\n",
        "    if charged > max_attempts:\n",
        WORLDS,
    ),
)


def main(words: list[str]) -> int:
    """Try each break whose name has these words; the exit code."""
    chosen = [one for one in BREAKS if all(word in one.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("batcher", "tests"):
            shutil.copytree(HOME / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HOME / "pyproject.toml", copy)
        for tests in dict.fromkeys(one.tests for one in chosen):
            ended, by = run(copy, tests)
            if ended != "passed":
                say(f"without a break: {' '.join(tests)}: {ended} {by}")
                return 1
        bad = 0
        for one in chosen:
            began = time.monotonic()
            verdict, by = attempt(copy, one)
            bad += verdict != "found"
            say(f"{verdict:<10} {one.name:<56} {time.monotonic() - began:3.0f} s  {by}")
    say(f"{len(chosen) - bad} of {len(chosen)} breaks are found")
    return 1 if bad else 0


def attempt(copy: Path, one: Break) -> tuple[str, str]:
    """Break the copy, run the tests, mend it: whether they found it, and which one did."""
    path = copy / "batcher" / one.file
    whole = path.read_text(encoding="utf-8")
    if (times := whole.count(one.old)) != 1:
        return f"STANDS {times} TIMES", ""
    path.write_text(whole.replace(one.old, one.new), encoding="utf-8")
    try:
        ended, by = run(copy, one.tests)
    finally:
        path.write_text(whole, encoding="utf-8")
    return {"failed": "found", "hung": "found", "passed": "NOT FOUND"}.get(ended, ended), by


def run(copy: Path, tests: tuple[str, ...]) -> tuple[str, str]:
    """How the tests end on the copy: passed, failed, hung, or in another way that says nothing; and which failed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "hung", ""
    if process.returncode not in (0, 1):
        say(said)
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", said, re.MULTILINE)
    verdict = {0: "passed", 1: "failed"}.get(process.returncode, f"ENDED WITH {process.returncode}")
    return verdict, failed[1] if failed else ""


def say(line: str) -> None:
    """Tell it at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
