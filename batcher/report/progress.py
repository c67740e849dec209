"""Progress while a job runs: a live panel on a terminal, plain lines elsewhere."""

import os
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batcher.records import Snapshot
from batcher.report.text import count, deadline, duration, money, printable

SPAN = 10.0
"""Seconds over which speed is measured."""
LINE_EVERY = 10.0
"""Seconds between two plain lines."""


class Mark(NamedTuple):
    """How far a run was at one moment: rows and tokens of this run alone."""

    seconds: float
    rows: int
    tokens: int


START = Mark(0.0, 0, 0)
"""Where every run begins, whatever earlier runs have done."""


class Rates(NamedTuple):
    """Speed over the last seconds, per second."""

    rows: float
    tokens: float


def mark(snapshot: Snapshot) -> Mark:
    """What this run has done by then."""
    return Mark(
        snapshot.seconds,
        snapshot.answered + snapshot.failed - snapshot.before,
        snapshot.prompt_tokens + snapshot.completion_tokens,
    )


def rates(history: Iterable[Mark]) -> Rates:
    """Speed over the last `SPAN` seconds up to the last mark; a young run is measured from its start."""
    marks = [START, *history]
    last = marks[-1]
    first = [START, *(one for one in marks if one.seconds <= last.seconds - SPAN)][-1]
    seconds = last.seconds - first.seconds
    if seconds <= 0:
        return Rates(0.0, 0.0)
    return Rates((last.rows - first.rows) / seconds, (last.tokens - first.tokens) / seconds)


def time_left(snapshot: Snapshot, speed: Rates) -> float | None:
    """Seconds until the last row, at this speed; None where nobody knows."""
    if snapshot.total is None:
        return None
    left = max(0, snapshot.total - snapshot.answered - snapshot.failed)
    return None if left and speed.rows <= 0 else left / (speed.rows or 1.0)


def line(snapshot: Snapshot, speed: Rates) -> str:
    """The state in one plain line."""
    phase = "" if snapshot.phase == "running" else f"{snapshot.phase}: "
    figures = [*_figures(snapshot, speed), _held(snapshot), _left(snapshot, speed)]
    return printable(phase + ", ".join([_done(snapshot), f"{count(snapshot.failed)} failed", *filter(None, figures)]))


def panel(snapshot: Snapshot, speed: Rates, name: str) -> Panel:
    """The state as a panel with a bar."""
    failed = Text(f"{count(snapshot.failed)} failed", "red" if snapshot.failed else "")
    rows = Text.assemble(_done(snapshot), "   ", failed)
    if snapshot.before:
        rows.append(f"   {count(snapshot.before)} done before", "dim")
    top = Table.grid(expand=True)
    top.add_column()
    top.add_column(justify="right")
    top.add_row(rows, Text(_left(snapshot, speed)))
    total = None if snapshot.total is None else max(1, snapshot.total)
    bar = ProgressBar(total=total, completed=snapshot.answered + snapshot.failed)
    body = Table.grid(expand=True)
    for each in (top, bar, Text("   ".join(filter(None, _figures(snapshot, speed))))):
        body.add_row(each)
    footer = Text(printable(", ".join(filter(None, [snapshot.phase, duration(snapshot.seconds), _held(snapshot)]))))
    return Panel(body, title=Text(printable(name)), subtitle=footer)


class Progress:
    """Shows snapshots on a terminal as they come, elsewhere one line every ten seconds of the run."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        """`name` is the job's; `stream` is standard error where none is given."""
        self._name = name
        self._stream = stream or sys.stderr
        self._history: deque[Mark] = deque()
        self._last: Snapshot | None = None
        self._told: Snapshot | None = None
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            console = Console(file=self._stream, force_terminal=True, markup=False, highlight=False, emoji=False)
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)

    def show(self, snapshot: Snapshot) -> None:
        """Show the state of this moment. A terminal that has gone away is no reason to end a run."""
        self._last = snapshot
        self._history.append(mark(snapshot))
        while len(self._history) > 1 and self._history[1].seconds <= snapshot.seconds - SPAN:
            self._history.popleft()
        with suppress(OSError):
            if self._live is not None:
                self._live.start()
                self._live.update(panel(snapshot, rates(self._history), self._name), refresh=True)
            elif self._told is None or snapshot.seconds - self._told.seconds >= LINE_EVERY:
                self._tell(snapshot)

    def close(self) -> None:
        """Show the last state, once, and leave the terminal as it was."""
        with suppress(OSError):
            if self._live is not None:
                self._live.stop()
            elif self._last is not None and self._last is not self._told:
                self._tell(self._last)

    def _tell(self, snapshot: Snapshot) -> None:
        self._told = snapshot
        self._stream.write(line(snapshot, rates(self._history)) + "\n")
        self._stream.flush()


def _left(snapshot: Snapshot, speed: Rates) -> str:
    left = time_left(snapshot, speed)
    by = f"deadline {deadline(snapshot.deadline, snapshot.late)}" if snapshot.deadline is not None else ""
    if left is None:
        return ", ".join(filter(None, ["time left unknown", by]))
    return ", ".join(filter(None, [f"about {duration(left)} left", by])) if left else ""


def _held(snapshot: Snapshot) -> str:
    if snapshot.phase != "running":
        return ""
    until = "" if snapshot.until is None else f" until {datetime.fromtimestamp(snapshot.until, UTC):%Y-%m-%d %H:%M} UTC"
    return f"held by {snapshot.binds}{until}"


def _done(snapshot: Snapshot) -> str:
    done = snapshot.answered + snapshot.failed
    if snapshot.total is None:
        return f"{count(done)} rows done"
    share = f" ({100 * done // snapshot.total} %)" if snapshot.total else ""
    return f"{count(done)} of {count(snapshot.total)} rows{share}"


def _figures(snapshot: Snapshot, speed: Rates) -> list[str]:
    return [
        f"{count(speed.rows)} rows/s",
        f"{count(speed.tokens)} tokens/s",
        f"{count(snapshot.in_flight)} of {count(snapshot.window)} in flight",
        money(snapshot.cost_usd),
        ""
        if snapshot.budget_usd is None or snapshot.spent_usd is None
        else f"{money(snapshot.spent_usd)} of {money(snapshot.budget_usd)} spent",
    ]
