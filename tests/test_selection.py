"""A job that asks some rows only: which they are, that no other is asked, and that a larger choice asks what is new."""

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batcher
from batcher import bits
from batcher.engine import Selection, prepare, select
from batcher.errors import JobError
from batcher.job import load
from batcher.plan import plan
from batcher.simulator import Simulator
from batcher.verify import verify
from tests import stories

EVEN = "CAST(substr(key, 2) AS INTEGER) % 2 = 0"


def job(
    folder: Path,
    url: str = "http://127.0.0.1:9",
    more: Mapping[str, object] | None = None,
    *,
    rows: int = 60,
    part: int = 10,
    **given: object,
) -> Path:
    """A job over so many rows that asks those that `given` and `more` select."""
    if not (folder / "rows.jsonl").exists():
        stories.write_jsonl(folder / "rows.jsonl", rows)
    return stories.write_job(folder, url, rows_per_part=part, more={"input": {**given, **(more or {})}})


def selected(path: Path) -> list[int]:
    """The rows that a job selects."""
    found = select(prepare(load(path)), lambda: False)
    assert found is not None
    assert found.size == found.rows.bit_count()
    return bits.rows(found.rows)


def splitmix64(number: int) -> int:
    """The published generator, number by number, as the reference for our draws."""
    mask = (1 << 64) - 1
    mixed = (number + 1) * 0x9E3779B97F4A7C15 & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    return mixed ^ mixed >> 31


def asked(service: Simulator) -> list[int]:
    """The rows that were asked since this was last called."""
    found = sorted(stories.row_of(entry) for entry in service.book)
    service.book.clear()
    return found


def in_output(folder: Path) -> list[object]:
    """The rows that the output holds, checked by `verify`."""
    assert verify(folder / "out").problems == []
    return stories.column(folder / "out", "responses", "row")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


# Which rows


@given(rows=st.sets(st.integers(0, 3000)), start=st.integers(0, 100), size=st.integers(0, 500))
def test_sets_of_rows_say_what_is_in_them(rows: set[int], start: int, size: int) -> None:
    """A set tells its rows in order, survives packing, and a piece of it is the piece."""
    made = bits.of(rows)
    assert bits.rows(made) == sorted(rows)
    assert bits.unpack(bits.pack(made)) == made
    piece = {row for row in rows if start <= row < start + size}
    assert bits.cut(made, start, start + size) == bits.of(piece, start)
    assert bits.rows(bits.of(piece, start), start, most=3) == sorted(piece)[:3]


def test_a_damaged_set_is_found() -> None:
    """What is no packed set is refused, not taken for another one."""
    with pytest.raises(ValueError, match="damaged"):
        bits.unpack(b"nonsense")


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=60),
    least=st.integers(0, 9),
    cap=st.none() | st.integers(1, 20),
    drawn=st.booleans(),
    parquet=st.booleans(),
)
def test_the_selection_is_that_of_a_plain_evaluation(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[int | None],
    least: int,
    cap: int | None,
    drawn: bool,
    parquet: bool,
) -> None:
    """`where` takes the rows for which it holds, `limit` the first of them, `sample` so many of them."""
    folder = tmp_path_factory.mktemp("job")
    rows = [{"key": f"k{row}", "text": "x", "n": value} for row, value in enumerate(values)]
    rows[0]["n"] = 5  # so that the column is one of numbers
    source = "rows.parquet" if parquet else "rows.jsonl"
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), folder / source, row_group_size=7)
    else:
        (folder / source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice: dict[str, object] = {"path": source, "where": f"n >= {least}"}
    if cap is not None:
        choice["sample" if drawn else "limit"] = cap
    path = job(folder, more=choice)
    holds = [row for row, values in enumerate(rows) if values["n"] is not None and int(str(values["n"])) >= least]
    found = selected(path)
    if cap is None or not drawn:
        assert found == holds[:cap]
    else:
        assert set(found) <= set(holds)
        assert len(found) == min(cap, len(holds))


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path) -> None:
    """The same rows every time, and spread over the input."""
    samples = [selected(job(tmp_path, rows=1000, sample=size)) for size in (10, 10, 100, 2000)]
    assert samples[0] == samples[1]
    assert set(samples[0]) < set(samples[2])
    assert samples[3] == list(range(1000))
    assert [bits.cut(bits.of(samples[2]), start, start + 250).bit_count() > 10 for start in (0, 250, 500, 750)]
    assert samples[0] == sorted(sorted(range(1000), key=splitmix64)[:10])


def test_a_row_that_cannot_be_read_is_selected(tmp_path: Path) -> None:
    """It ends among the failures: nobody knows whether the condition would hold for it."""
    lines = [json.dumps({"key": f"k{row}", "text": "x"}) for row in range(4)]
    lines[2] = "{broken"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert selected(job(tmp_path, where="key = 'k1'")) == [1, 2]


def test_a_condition_that_fails_on_a_row_ends_the_run(tmp_path: Path) -> None:
    """The message names the key of the job and the value; nothing was sent."""
    (tmp_path / "rows.jsonl").write_text('{"key": "1", "text": "a"}\n' * 9000 + '{"key": "one", "text": "b"}\n')
    with stories.service() as service:
        path = job(tmp_path, service.url, where="key::integer = 1")
        ended = stories.run(path)
        assert ended.returncode == 2
        assert "job.toml: input.where: Conversion Error: Could not convert string 'one'" in ended.stderr
        assert service.book == []
    with pytest.raises(JobError, match="Could not convert"):
        plan(load(path))


# Runs


def test_only_selected_rows_are_asked_and_published(tmp_path: Path) -> None:
    """Ranges without a selected row have no part; the rest of the run agrees with the plan."""
    with stories.service() as service:
        path = job(tmp_path, service.url, where=f"{EVEN} and text like '%[row 0002%'")
        made = plan(load(path))
        assert (made.rows, made.done, made.sampled) == (5, 0, 5)
        summary = batcher.run(load(path)).summary
        assert (summary.selected, summary.pending, summary.totals.answered) == (5, 0, 5)
        assert asked(service) == in_output(tmp_path) == [20, 22, 24, 26, 28]
        assert [part.name for part in (tmp_path / "out" / "responses").iterdir()] == ["part-000002.parquet"]
        assert plan(load(path)).done == 5
        batcher.run(load(path))
        assert asked(service) == []


def test_no_row_selected_leaves_an_empty_output(tmp_path: Path) -> None:
    """A condition that holds nowhere is no error: there is an empty part with all columns."""
    with stories.service() as service:
        path = job(tmp_path, service.url, where="key = 'nobody'")
        assert batcher.run(load(path)).summary.selected == 0
        assert in_output(tmp_path) == []
        assert batcher.run(load(path)).table().num_rows == 0


CHOICES = st.lists(
    st.one_of(
        st.none(),
        st.tuples(st.just("sample"), st.integers(1, 70)),
        st.tuples(st.just("limit"), st.integers(1, 70)),
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(choices=CHOICES, condition=st.sampled_from([None, EVEN]))
def test_each_row_is_asked_once_whatever_is_selected_in_turn(
    tmp_path_factory: pytest.TempPathFactory, choices: list[tuple[str, int] | None], condition: str | None
) -> None:
    """Pilots of any kind and size, one after the other on one output: each asks only what is new to it."""
    folder = tmp_path_factory.mktemp("job")
    done: set[int] = set()
    with stories.service(latency=0.001) as service:
        for choice in choices:
            given: dict[str, object] = {"where": condition} | ({} if choice is None else {choice[0]: choice[1]})
            path = job(folder, service.url, given)
            wanted = set(selected(path))
            summary = batcher.run(load(path)).summary
            assert (summary.selected, summary.pending) == (len(wanted), 0)
            assert asked(service) == sorted(wanted - done)
            done |= wanted
            assert in_output(folder) == sorted(done)


def test_an_appended_file_is_looked_through(tmp_path: Path) -> None:
    """What is remembered of the old files is not taken for all of the new ones."""
    with stories.service() as service:
        (tmp_path / "in").mkdir()
        stories.write_jsonl(tmp_path / "in" / "a.jsonl", 15)
        path = job(tmp_path, service.url, path="in", where=EVEN)
        batcher.run(load(path))
        assert len(asked(service)) == 8
        (tmp_path / "in" / "b.jsonl").write_bytes((tmp_path / "in" / "a.jsonl").read_bytes())
        batcher.run(load(path))
        assert len(asked(service)) == 8
        assert in_output(tmp_path) == [*range(0, 15, 2), *range(15, 30, 2)]


def test_another_condition_is_another_job(tmp_path: Path) -> None:
    """`where` is part of what the output was begun with."""
    with stories.service() as service:
        batcher.run(load(job(tmp_path, service.url, where="key = 'k1'")))
        with pytest.raises(JobError, match=r"begun with another job: input\.where: was \"key = 'k1'\""):
            batcher.run(load(job(tmp_path, service.url, where="key = 'k2'")))


# Kills


@pytest.mark.parametrize("point", ["responses.renamed", "complete.before"])
def test_a_part_that_is_opened_for_a_larger_sample_survives_a_kill(tmp_path: Path, point: str) -> None:
    """Killed where its newer self is in place and not yet noted: each row is there once, and was asked once."""
    with stories.service(latency=0.005) as service:
        path = job(tmp_path, service.url, part=30, sample=10)
        first = selected(path)
        assert stories.run(path).returncode == 0
        path = job(tmp_path, service.url, part=30, sample=40)
        story = stories.Kills(tmp_path, service, path, in_flight=16, seed=0)
        assert story.kill_once(1_000_000, within=0, BATCHER_KILLPOINT=f"{point}:1"), "the point was never reached"
        # A smaller selection, in which nothing is left, brings out what the killed run had recorded.
        assert stories.run(job(tmp_path, service.url, part=30, sample=10)).returncode == 0
        assert set(first) <= set(in_output(tmp_path))
        assert stories.run(job(tmp_path, service.url, part=30)).returncode == 0
        stories.check_complete(tmp_path / "out", 60, service)
        assert in_output(tmp_path) == list(range(60))
        story.check_repeats()


def test_verify_finds_a_selected_row_that_was_taken_out(tmp_path: Path) -> None:
    """It knows from the ledger which rows a part has, and which were selected."""
    with stories.service() as service:
        batcher.run(load(job(tmp_path, service.url, sample=20)))
    part = sorted((tmp_path / "out" / "responses").iterdir())[1]
    table = pq.read_table(part)
    gone = table["row"][0].as_py()
    pq.write_table(table.slice(1), part)
    problems = verify(tmp_path / "out").problems
    assert any(f"row {gone} is in neither responses nor failures" in problem for problem in problems)
    part.unlink()
    ledger = sqlite3.connect(tmp_path / "out" / "ledger.sqlite")
    with ledger:
        ledger.execute("DELETE FROM parts WHERE part = ?", (int(part.stem[5:]),))
    ledger.close()
    problems = verify(tmp_path / "out").problems
    assert any(f"calls 20 rows complete, and row {gone} is not" in problem for problem in problems)


def test_a_selection_tells_the_rows_of_a_range() -> None:
    """Counted from the range's start, whatever lies around it."""
    assert Selection(bits.of([1, 9, 10, 25]), 4).part(9, 20) == 0b11
