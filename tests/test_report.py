"""Progress and summary: true figures, and nothing foreign that acts on a terminal."""

import importlib
import io
import os
import pty
import re
import subprocess
import unicodedata
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TextIO

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.records import Snapshot, Summary, Totals
from batcher.report import Progress, count, duration, failure_lines, money, printable, render
from batcher.report.progress import SPAN, Mark, Rates, mark, rates, time_left

NOW = Snapshot(
    total=1_000,
    answered=0,
    failed=0,
    before=0,
    in_flight=8,
    window=8,
    waiting=0,
    binds="schedule.max_in_flight",
    buckets={},
    requests=0,
    refused=0,
    prompt_tokens=0,
    completion_tokens=0,
    cost_usd=0.0,
    seconds=0.0,
    phase="running",
)
DONE = Summary(
    name="tickets",
    state="complete",
    selected=12_345,
    pending=0,
    totals=Totals(
        rows=12_345,
        answered=12_340,
        failed=5,
        attempts=12_400,
        prompt_tokens=1_234_567,
        cached_tokens=1_000,
        completion_tokens=98_765,
        cost_usd=1.5,
        finish_reasons={"stop": 12_300, "length": 40},
        failure_kinds={"unsendable": 2, "rejected": 3},
    ),
    started_at="2026-11-01T10:00:00+00:00",
    finished_at="2026-11-01T10:01:40+00:00",
    seconds=100.0,
    requests=12_400,
    transport="reqwest",
    version="1",
)


# Figures


@given(st.integers(0, 10**9), st.floats(0.1, 1e6), st.integers(0, 10**6))
def test_rows_of_earlier_runs_are_no_speed(before: int, seconds: float, rows: int) -> None:
    """From the first second after a resume the speed is that of this run alone."""
    snapshot = NOW._replace(before=before, answered=before + rows, seconds=seconds)
    assert rates([mark(snapshot)]).rows == pytest.approx(rows / seconds)


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 1000)), min_size=1, max_size=100))
def test_speed_is_that_of_the_last_seconds(steps: list[tuple[float, int]]) -> None:
    """What was done before the window is no part of the speed; what was done in it is."""
    history, now, rows = [], 0.0, 0
    for seconds, done in steps:
        now, rows = now + seconds, rows + done
        history.append(Mark(now, rows, 2 * rows))
    speed = rates(history)
    old = [one for one in [Mark(0.0, 0, 0), *history] if one.seconds <= now - SPAN]
    first = old[-1] if old else Mark(0.0, 0, 0)
    assert speed.rows * (now - first.seconds) == pytest.approx(rows - first.rows)
    assert speed.tokens == pytest.approx(2 * speed.rows)


def test_a_run_that_stands_still_shows_no_speed() -> None:
    """When nothing ends for the whole window, the speed is 0 and the time left is not known."""
    history = [Mark(5.0, 500, 500), Mark(6.0, 500, 500), Mark(20.0, 500, 500)]
    assert rates(history) == Rates(0.0, 0.0)
    assert time_left(NOW._replace(answered=500, seconds=20.0), rates(history)) is None


def test_the_time_left_follows_from_the_rows_left() -> None:
    """Failed rows are done, rows of earlier runs too; an input that is still being counted has no end."""
    snapshot = NOW._replace(total=1_000, before=400, answered=590, failed=10)
    assert time_left(snapshot, Rates(20.0, 0.0)) == 20.0
    assert time_left(snapshot._replace(total=None), Rates(20.0, 0.0)) is None
    assert time_left(snapshot._replace(answered=990), Rates(0.0, 0.0)) == 0.0


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(1_234_567), "1,234,567"),
        (count(3), "3"),
        (count(3.14), "3.1"),
        (money(None), "unknown price"),
        (money(0.0), "$0.00"),
        (money(1234.5), "$1,234.50"),
        (money(0.0123), "$0.0123"),
        (money(0.0000042), "$4.2e-06"),
        (duration(0.42), "0.4 s"),
        (duration(59.9), "1 min 00 s"),
        (duration(3_599.9), "1 h 00 min"),
        (duration(5_400), "1 h 30 min"),
        (duration(90_000), "1 d 01 h"),
    ],
)
def test_numbers_are_written_for_people(shown: str, expected: str) -> None:
    """Thousands have separators, prices that are not known are no zero, times have two units."""
    assert shown == expected


# Foreign text


@given(st.text())
def test_nothing_printable_acts_on_a_terminal(text: str) -> None:
    """No control, format, surrogate or unassigned character and no line break is left, and plain text is unchanged."""
    shown = printable(text)
    assert all(unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp") for c in shown)
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),
        ("user\u202egnp", r"user\u202egnp"),
        ("a\r\nb\u2028", r"a\r\nb\u2028"),
        ("\U000e0041", r"\U000e0041"),
        ("\ud800", r"\ud800"),
        ("Grüße, 東京\u3000[red] \U0001f600", "Grüße, 東京\u3000[red] \U0001f600"),
    ],
)
def test_control_characters_are_seen(text: str, shown: str) -> None:
    """A reader sees which character was there, and every other letter as it is."""
    assert printable(text) == shown


# Progress


def test_lines_come_at_once_then_every_ten_seconds_and_at_the_end() -> None:
    """Where there is no terminal, the log has few lines: the first, one each ten seconds of the run, the last state."""
    stream = io.StringIO()
    progress = Progress("tickets", stream)
    for half_seconds in range(50):
        progress.show(NOW._replace(answered=20 * half_seconds, seconds=half_seconds / 2))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["0", "400", "800", "980"]
    assert "40 rows/s" in lines[1]
    assert "about 15 s left" in lines[1]


def test_the_last_line_is_not_said_twice() -> None:
    """A run that shows one state only has one line, and one that shows none has none."""
    stream = io.StringIO()
    Progress("tickets", stream).close()
    assert stream.getvalue() == ""
    progress = Progress("tickets", stream)
    progress.show(NOW)
    progress.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_a_line_says_what_a_watcher_wants_to_know() -> None:
    """Rows of how many, failures, speed, flight, cost, and what holds the run back, or its phase."""
    stream = io.StringIO()
    progress = Progress("tickets", stream)
    progress.show(
        NOW._replace(
            total=1_200_000,
            answered=3_000,
            failed=1_000,
            before=2_000,
            seconds=4.0,
            prompt_tokens=6_000,
            completion_tokens=2_000,
            cost_usd=None,
            binds="tokens per minute\x1b[2J",
        )
    )
    Progress("tickets", stream).show(NOW._replace(total=None, answered=30, phase="draining", seconds=15.0))
    assert stream.getvalue().splitlines() == [
        "4,000 of 1,200,000 rows (0 %), 1,000 failed, 500 rows/s, 2,000 tokens/s, 8 of 8 in flight, unknown price, "
        r"held by tokens per minute\x1b[2J, about 39 min 52 s left",
        "draining: 30 rows done, 0 failed, 2 rows/s, 0 tokens/s, 8 of 8 in flight, $0.00, time left unknown",
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    """A real terminal: what it is told can be read from the descriptor."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as stream:
        yield ours, stream
        if not stream.closed:
            stream.flush()
    os.close(ours)


def _told(terminal: int) -> str:
    """All that a terminal was told."""
    os.set_blocking(terminal, False)
    told = b""
    with suppress(BlockingIOError):
        while some := os.read(terminal, 100_000):
            told += some
    return told.decode()


def test_a_terminal_shows_a_panel_that_leaves_no_trace(terminal: tuple[int, TextIO]) -> None:
    """The panel is drawn in place, shows foreign text harmlessly and without markup, and gives the cursor back."""
    ours, stream = terminal
    progress = Progress("tickets [bold] \x1b[2J\u202e", stream)
    progress.show(NOW._replace(before=400, answered=590, failed=10, seconds=10.0, binds="[red]x[/red]\x9b"))
    progress.close()
    told = _told(ours)
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told)
    assert r"tickets [bold] \x1b[2J\u202e" in seen
    assert r"held by [red]x[/red]\x9b" in seen
    assert "600 of 1,000 rows (60 %)" in seen
    assert "400 done before" in seen
    assert "20 rows/s" in seen
    assert not {"\x9b", "\u202e"} & set(told)
    assert "\x1b[2J" not in told
    assert told.rindex("\x1b[?25h") > told.index("\x1b[?25l")


def test_a_panel_needs_no_total(terminal: tuple[int, TextIO]) -> None:
    """While the input is being counted, and when it is empty, there is a panel all the same."""
    ours, stream = terminal
    progress = Progress("tickets", stream)
    progress.show(NOW._replace(total=None, answered=7))
    progress.show(NOW._replace(total=0, seconds=1.0))
    progress.close()
    told = _told(ours)
    assert "7 rows done" in told
    assert "0 of 0 rows" in told


def test_a_terminal_that_goes_away_ends_no_run() -> None:
    """Progress that nobody can see any more is dropped in silence."""
    ours, theirs = os.pipe()
    with open(theirs, "w", encoding="utf-8") as stream:
        os.close(ours)
        progress = Progress("tickets", stream)
        progress.show(NOW)
        progress.close()
        with pytest.raises(BrokenPipeError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), theirs)


# Summary


def test_the_summary_has_every_sum() -> None:
    """Outcomes by kind, requests and repeats, tokens, cost, unusual ends of answers, time, and where it all lies."""
    text = render(DONE, "out/tickets")
    for expected in (
        "tickets: complete",
        "12,340",
        "5  (rejected 3, unsendable 2)",
        "12,400 (60 without an answer)",
        "1,234,567 prompt, 1,000 of them cached, 98,765 completion",
        "$1.50",
        "length 40",
        "1 min 40 s, 124 requests per second over reqwest",
        "out/tickets/responses",
        "out/tickets/failures",
    ):
        assert expected in text
    assert "stop" not in text


def test_what_is_not_known_is_called_unknown() -> None:
    """A missing price and a missing count are no zeros; what this run sent is told apart from what all runs sent."""
    totals = Totals(rows=10, answered=10, attempts=10)
    text = render(
        Summary(
            name="a\x1b[2J",
            state="interrupted",
            selected=None,
            pending=None,
            totals=totals,
            started_at="",
            finished_at="",
            seconds=0.0,
            requests=4,
            transport="aiohttp",
            version="1",
        ),
        "out",
    )
    assert text.startswith(r"a\x1b[2J: interrupted")
    assert "unknown price" in text
    assert "unknown: the input was not counted" in text
    assert "10; 4 by this run" in text
    assert "failures" not in text


def test_rows_without_a_price_are_told_of() -> None:
    """Rows that cost nothing beside rows of unknown price make no cost of $0; what is known is told beside them."""

    def cost(**known: float) -> str:
        totals = msgspec.structs.replace(DONE.totals, **known)
        text = render(msgspec.structs.replace(DONE, totals=totals), "out")
        return next(line.strip() for line in text.splitlines() if line.startswith("  cost"))

    assert cost(cost_usd=0.0, unpriced=12_340) == "cost      unknown price"
    assert cost(cost_usd=1.5, unpriced=40) == "cost      $1.50, and 40 rows whose price is not known"
    assert cost(cost_usd=0.0) == "cost      $0.00"


@pytest.mark.parametrize("name", ["out", 'a folder, "quoted" by O\'Neill for $HOME `x`'])
def test_the_lines_that_open_the_answers_do(tmp_path: Path, name: str) -> None:
    """The commands of the summary read the answers, whatever the folder is called."""
    output = tmp_path / name
    (output / "responses").mkdir(parents=True)
    pq.write_table(pa.table({"row": [0, 1]}), output / "responses" / "part-000000.parquet")
    text = render(DONE, str(output))
    lines = dict(line.strip().split(maxsplit=1) for line in text.splitlines() if line.startswith("  "))
    assert len(eval(lines["pandas"], {"pandas": importlib.import_module("pandas")})) == 2
    shell = ["sh", "-c", 'duckdb() { printf %s "$2"; }; ' + lines["DuckDB"]]
    query = subprocess.run(shell, capture_output=True, check=True, text=True).stdout
    with closing(duckdb.connect()) as db:
        assert len(db.execute(query).fetchall()) == 2


def test_the_most_common_failures_come_first() -> None:
    """Three messages at most, each on one line with its count, and harmless."""
    failures = [("rejected", "too long"), ("timeout", None), ("rejected", "too long"), ("rejected", "\x1b[31m\nred")]
    lines = failure_lines([*failures, ("timeout", None), ("timeout", None), ("dns", "gone")])
    assert lines == [
        "3 × timeout: no message",
        "2 × rejected: too long",
        r"1 × rejected: \x1b[31m\nred",
    ]
