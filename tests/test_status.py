"""What a run tells of itself: its timeline, its state seen from outside, its attempts, its log."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batcher
from batcher.errors import JobError
from batcher.ledger import Ledger, Lock, added_up, held, note_of, open_read_only, timeline_of
from batcher.records import Note, Second, Snapshot, Status, Totals, Trouble
from batcher.report import status_text
from batcher.simulator import Simulator
from batcher.status import status
from batcher.verify import verify
from tests import stories

HOUR, DAY = 3600, 86400
BEGAN = 1_790_000_000 // HOUR * HOUR


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every story has its key in the environment."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)


def note(seconds: float = 0.0, phase: str = "running") -> Note:
    """A run's word of itself."""
    snapshot = Snapshot(
        total=None,
        answered=0,
        failed=0,
        before=0,
        in_flight=0,
        window=8,
        waiting=0,
        binds="input",
        buckets={},
        requests=0,
        refused=0,
        prompt_tokens=0,
        completion_tokens=0,
        cost_usd=0.0,
        seconds=seconds,
        phase=phase,
    )
    return Note(time=BEGAN, started_at="2026-11-01T00:00:00+00:00", pid=1, snapshot=snapshot, troubles={})


def lines(path: Path) -> list[Second]:
    """The whole timeline of a ledger."""
    with open_read_only(path) as ledger:
        return list(timeline_of(ledger))


def kept(path: Path, seconds: list[Second]) -> None:
    """A ledger that was told these seconds, by several runs."""

    async def run(some: list[Second]) -> None:
        ledger = Ledger(path)
        ledger.start(lambda attempts: None, lambda trouble: None)
        for second in some:
            ledger.note(note(), second)
        await ledger.flush()
        ledger.close()

    third = len(seconds) // 3
    for some in (seconds[:third], seconds[third:]):
        anyio.run(run, some)


# The timeline


def test_the_timeline_is_bounded_and_adds_up(tmp_path: Path) -> None:
    """Over three days an hour of seconds is kept, a day of minutes, and hours before that; nothing is lost of sums."""
    step = 20
    told = [
        Second(
            time=BEGAN + at,
            seconds=step,
            sent=at % 7,
            rows=at % 5,
            refused=at % 2,
            prompt_tokens=at % 11,
            cost_usd=0.25,
            in_flight=8,
            held={"input": 4.0, "capacity": 5.0},
            buckets={"tokens per minute": 0.5},
        )
        for at in range(0, 3 * DAY, step)
    ]
    kept(tmp_path / "ledger.sqlite", told)
    found = lines(tmp_path / "ledger.sqlite")
    assert len(found) <= 2 * HOUR / step + (DAY + HOUR) / 60 + 49
    assert [line.time for line in found] == sorted(line.time for line in found)
    last = told[-1].time
    recent = [line for line in told if line.time > last - HOUR]
    assert found[-len(recent) :] == recent
    assert {line.time % 60 for line in found if last - DAY < line.time < last - HOUR - 60} == {0}
    assert {line.time % HOUR for line in found if line.time < last - DAY - HOUR} == {0}
    whole, expected = added_up(0, found), added_up(0, told)
    assert (whole.sent, whole.rows, whole.refused) == (expected.sent, expected.rows, expected.refused)
    assert whole.prompt_tokens == expected.prompt_tokens
    assert whole.seconds == pytest.approx(3 * DAY)
    assert whole.cost_usd == pytest.approx(expected.cost_usd)
    assert whole.held == pytest.approx(expected.held)
    assert whole.in_flight == pytest.approx(8)
    assert whole.buckets == pytest.approx({"tokens per minute": 0.5})


_SECONDS = st.lists(
    st.builds(
        Second,
        time=st.integers(0, 10**6),
        seconds=st.floats(0.1, 60),
        sent=st.integers(0, 1000),
        cost_usd=st.none() | st.floats(0, 10),
        window=st.floats(0, 1000),
        held=st.dictionaries(st.sampled_from("abc"), st.floats(0, 60)),
    ),
    min_size=1,
    max_size=20,
)


@given(_SECONDS, st.integers(0, 20))
def test_adding_up_in_steps_is_adding_up_at_once(seconds: list[Second], cut: int) -> None:
    """Spans of spans have the same sums and means; an unknown cost stays unknown."""
    parts = [some for some in (seconds[:cut], seconds[cut:]) if some]
    stepwise, at_once = added_up(0, [added_up(0, some) for some in parts]), added_up(0, seconds)
    assert stepwise.sent == at_once.sent == sum(second.sent for second in seconds)
    assert stepwise.window == pytest.approx(at_once.window)
    assert stepwise.held == pytest.approx(at_once.held)
    if any(second.cost_usd is None for second in seconds):
        assert stepwise.cost_usd is at_once.cost_usd is None
    else:
        assert stepwise.cost_usd == pytest.approx(at_once.cost_usd)


def test_the_timeline_agrees_with_the_books(tmp_path: Path) -> None:
    """Over a run with faults: as many requests as the service saw, and the summary's bill."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 150)
    with stories.service(requests_per_minute=600_000, latency=0.1, faults=stories.FAULTS, seed=5) as service:
        job = batcher.load(stories.write_job(tmp_path, service.url))
        totals = batcher.run(job).summary.totals
        found = lines(tmp_path / "out" / "ledger.sqlite")
        whole = added_up(0, found)
        kinds = Counter(stories.column(tmp_path / "out", "attempts", "kind"))
        refused = kinds["rate_limited"] + kinds["overloaded"]
        assert whole.sent == totals.attempts == len(service.book) > 150
        assert whole.rows == 150
        assert (whole.answered, whole.refused) == (kinds[None], refused)
        assert whole.failed == totals.attempts - kinds[None] - refused
        assert whole.prompt_tokens == totals.billed_prompt_tokens
        assert whole.completion_tokens == totals.billed_completion_tokens
        assert whole.cost_usd == pytest.approx(totals.cost_usd)
        costs = stories.column(tmp_path / "out", "attempts", "cost_usd")
        assert sum(costs) == pytest.approx(totals.cost_usd)  # type: ignore[arg-type]
        assert sum(whole.held.values()) == pytest.approx(whole.seconds, abs=0.05)
        assert "schedule.max_in_flight" in whole.held


def test_the_timeline_tells_why_there_was_nothing_to_send(tmp_path: Path) -> None:
    """Slow rows that keep too many parts open, and the end of the input, are not taken for a slow input."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 400)
    with stories.service(latency=0.01, faults={"slow": 0.1}, slow=2.0, seed=1) as service:
        job = stories.write_job(tmp_path, service.url, in_flight=32, rows_per_part=20)
        batcher.run(batcher.load(job))
    held = added_up(0, lines(tmp_path / "out" / "ledger.sqlite")).held
    assert held["open parts"] > 1
    assert held["the last rows"] > 1
    assert held.get("input", 0) < 1


# Seen from outside


def test_a_finished_output_tells_what_verify_counts(tmp_path: Path) -> None:
    """After the end the numbers are those of a recount, and a larger limit moves them on."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60)
    with stories.service(poison={"00007": 422}) as service:
        for limit in (40, 60):
            job = stories.write_job(tmp_path, service.url, rows_per_part=20, more={"input": {"limit": limit}})
            batcher.run(batcher.load(job))
            found, counted = status(tmp_path / "out"), verify(tmp_path / "out")
            assert (found.state, found.total, found.pending) == ("complete", limit, 0)
            assert (found.answered, found.failed) == (limit - 1, 1)
            assert found.totals == counted.totals
            assert found.cost_usd == counted.totals.cost_usd
            assert (found.prompt_tokens, found.parts) == (counted.totals.billed_prompt_tokens, limit // 20)
            assert found.parts == found.complete_parts
    assert found.troubles == {}
    assert found.ledger_bytes == (tmp_path / "out" / "ledger.sqlite").stat().st_size


@pytest.fixture
def going(tmp_path: Path) -> Iterator[tuple[Path, Simulator, "subprocess.Popen[str]"]]:
    """A run of 200 rows in another process, which has some answers."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 200)
    with stories.service(latency=0.2) as service:
        path = stories.write_job(tmp_path, service.url, in_flight=8)
        with subprocess.Popen(stories.command("run", str(path), "-q"), env=stories.environment(), text=True) as run:
            try:
                while len(service.book) < 30:
                    assert run.poll() is None
                    time.sleep(0.01)
                yield tmp_path / "out", service, run
            finally:
                run.kill()


def test_a_run_is_seen_from_outside_while_it_goes_on(
    going: tuple[Path, Simulator, "subprocess.Popen[str]"],
) -> None:
    """However often somebody looks, each look is whole and never behind by more than moments; the run is not hurt."""
    output, service, run = going
    seen: list[Status] = []
    while run.poll() is None:
        before = sum(map(stories.good, service.book))
        found = status(output)
        assert found.answered <= sum(map(stories.good, service.book))
        if found.state == "running":
            seen.append(found)
            assert found.pid == run.pid
            assert found.total in (None, 200)
            assert 0 <= found.in_flight <= found.window == 8
            assert before - found.answered <= 8 * 5 * 2.5  # what is answered in two and a half seconds
        else:
            assert found.state in ("publishing", "complete", "in use")
    assert run.returncode == 0
    assert len(seen) > 3
    assert {found.binds for found in seen} & {"schedule.max_in_flight"}
    assert seen[-1].rows_per_second == pytest.approx(40, rel=0.5)
    assert seen[-1].timeline
    ended = status(output)
    assert (ended.state, ended.answered, ended.pending) == ("complete", 200, 0)


def test_a_killed_run_is_told_as_it_lies_there(going: tuple[Path, Simulator, "subprocess.Popen[str]"]) -> None:
    """After a kill nothing is written by looking, and what is pending is exactly what the next run asks for."""
    output, _, run = going
    run.send_signal(signal.SIGKILL)
    run.wait()

    def files() -> dict[str, str]:
        return {str(path): sha256(path.read_bytes()).hexdigest() for path in output.rglob("*") if path.is_file()}

    before = files()
    found = status(output)
    assert files() == before
    assert found.state == "broken off"
    assert found.answered > 0
    assert "run the job again" in status_text(found)
    assert (found.total, found.pending) in ((None, None), (200, 200 - found.answered))
    told = len(lines(output / "ledger.sqlite"))
    with stories.service(latency=0.01) as again:
        assert stories.run(stories.write_job(output.parent, again.url, in_flight=8)).returncode == 0
        assert len(again.book) == 200 - found.answered
    ended = status(output)
    assert (ended.state, ended.totals) == ("complete", verify(output).totals)
    assert len(lines(output / "ledger.sqlite")) > told


def test_there_must_be_an_output(tmp_path: Path) -> None:
    """No output is exit code 2; one that is just being made is in use."""
    with pytest.raises(JobError) as caught:
        status(tmp_path)
    assert caught.value.exit_code == 2
    with pytest.raises(JobError):
        status(tmp_path / "nowhere")
    with Lock(tmp_path):
        assert status(tmp_path).state == "in use"


def test_a_ledger_without_a_note_is_one_that_was_only_begun(tmp_path: Path) -> None:
    """Killed before it said a word, or made before there was a timeline: that is no error."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 1)
    out = tmp_path / "out"
    out.mkdir()
    job = batcher.load(stories.write_job(tmp_path, "http://127.0.0.1:9/v1"))
    (out / "job.toml").write_bytes(job.document())
    Ledger(out / "ledger.sqlite").close()
    found = status(out)
    assert (found.state, found.answered, found.total) == ("broken off", 0, None)
    with open_read_only(out / "ledger.sqlite") as ledger:
        assert note_of(ledger) is None


def test_looking_keeps_no_run_from_starting(tmp_path: Path) -> None:
    """Whoever asks whether a folder is in use never has it when a run wants it."""
    look = (
        "import sys, time, pathlib; from batcher.ledger import held\n"
        "print('looking', flush=True)\n"
        "while True:\n    held(pathlib.Path(sys.argv[1]))\n    time.sleep(0.0002)"
    )
    watchers = [
        subprocess.Popen([sys.executable, "-c", look, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for watcher in watchers:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "looking\n"
        for _ in range(300):
            with Lock(tmp_path):
                assert held(tmp_path)
        assert all(watcher.poll() is None for watcher in watchers)
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.communicate()
    assert not held(tmp_path)


def test_the_command_shows_it_for_people_and_for_programs(tmp_path: Path) -> None:
    """`status OUT` is a screenful, `--json` one object with all of it; no output is exit code 2."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 20)
    with stories.service() as service:
        assert stories.run(stories.write_job(tmp_path, service.url)).returncode == 0

    def called(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(stories.command("status", *words), capture_output=True, text=True, check=False)

    shown = called(str(tmp_path / "out"))
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"{tmp_path}/out: complete\n  rows      20 of 20 (100 %) done, 0 of them failed")
    told = json.loads(called(str(tmp_path / "out"), "--json").stdout)
    assert (told["state"], told["answered"], told["totals"]["attempts"]) == ("complete", 20, 20)
    assert told["timeline"][0]["sent"] == 20
    nothing = called(str(tmp_path))
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.count("\n") == 1


def test_what_is_shown_is_true_and_harmless() -> None:
    """A run in all its figures; foreign text cannot act on the terminal."""
    found = Status(
        output="out\x1b[2J",
        state="running",
        pid=7,
        seconds=100.0,
        total=1_000,
        answered=390,
        failed=10,
        pending=600,
        rows_per_second=5.0,
        tokens_per_second=700.0,
        average_rows_per_second=4.0,
        seconds_left=120.0,
        binds="tokens per minute",
        in_flight=9,
        window=12,
        buckets={"tokens per minute": 0.975},
        requests=500,
        refused=60,
        troubles={
            "timeout": Trouble(40, "no answer\x07", BEGAN),
            "rate_limited": Trouble(60, "slow down", BEGAN + 1),
        },
        prompt_tokens=60_000,
        completion_tokens=10_000,
        cost_usd=None,
        parts=3,
        complete_parts=2,
        ledger_bytes=2_340_000,
        totals=Totals(failed=10, failure_kinds={"rejected": 10}),
        decisions=tuple((BEGAN + each, f"window {each}\x07") for each in range(9)),
        timeline=[
            Second(time=BEGAN, seconds=10, rows=50, prompt_tokens=7_000, refused=3, failed=2, in_flight=8.6, held={}),
            Second(time=BEGAN + 10, seconds=10, rows=5, held={"input": 1, "tokens per minute": 9}, cost_usd=0.5),
        ],
    )
    shown = status_text(found).splitlines()
    assert shown[0] == r"out\x1b[2J: running for 1 min 40 s (process 7)"
    assert shown[1:12] == [
        "  rows      400 of 1,000 (40 %) done, 10 of them failed, 600 pending",
        "  speed     5 rows/s, 700 tokens/s now, 4 rows/s on average; time left about 2 min 00 s",
        "  held by   tokens per minute",
        "  in flight 9 of 12",
        "  limits    tokens per minute 98 % used",
        "  requests  500 by this run, 100 without an answer (60 refused)",
        "  tokens    60,000 prompt, 10,000 completion",
        "  cost      unknown price",
        "  parts     3 published, 2 of them complete",
        "  ledger    2.3 MB",
        "  failed    rejected 10",
    ]
    decided = shown.index("  what the scheduler decided last (UTC):")
    assert [text[12:] for text in shown[decided + 1 : decided + 8]] == [*(rf"window {n}\x07" for n in range(3, 9)), ""]
    clock = time.strftime("%H:%M", time.gmtime(BEGAN))
    assert shown[14:16] == [
        f"  60 × rate_limited, last at {clock}:01: slow down",
        rf"  40 × timeout, last at {clock}:00: no answer\x07",
    ]
    assert shown[-2].split() == [f"{clock}:00", "5", "700", "3", "2", "9", "$0.00"]
    assert shown[-1].endswith("$0.5000  tokens per minute 90 %, input 10 %")


# The attempts


def test_requests_that_the_end_cuts_off_are_attempts_too(tmp_path: Path) -> None:
    """After a second signal each request that the service saw is in `attempts`, and the next run has them published."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60)
    with stories.service(latency=0.05, faults={"hang": 0.3}, hang=30.0, seed=2) as service:
        path = stories.write_job(tmp_path, service.url, more={"service": {"timeout": "60s"}})
        run = subprocess.Popen(stories.command("run", str(path), "--quiet"), env=stories.environment())
        while service.in_flight < 16:
            assert run.poll() is None
            time.sleep(0.005)
        run.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        cut_off = service.in_flight
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=10) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
        first = len(service.book)
    found = status(tmp_path / "out")
    assert found.state == "interrupted"
    assert found.answered > 0
    with stories.service(latency=0.01) as service:
        assert stories.run(stories.write_job(tmp_path, service.url)).returncode == 0
        second = len(service.book)
    assert second == 60 - found.answered
    rows = stories.table(tmp_path / "out", "attempts").to_pylist()
    interrupted = [row for row in rows if row["kind"] == "interrupted"]
    assert len(interrupted) == cut_off > 0
    assert len(rows) == first + second
    assert all(row["cost_usd"] > 0 and row["latency"] > 0.2 and row["status"] is None for row in interrupted)
    ended = {row["row"]: row for row in stories.table(tmp_path / "out", "responses").to_pylist()}
    assert {ended[row["row"]]["attempts"] for row in interrupted} == {2}
    assert verify(tmp_path / "out").problems == []


def test_a_cancelled_run_records_what_was_in_flight(tmp_path: Path) -> None:
    """Cancelling `arun` leaves no request out either."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 100)
    with stories.service(latency=0.2) as service:
        spec = batcher.load(stories.write_job(tmp_path, service.url))

        anyio.run(stories.cancelled, spec, service, 20)
        assert status(tmp_path / "out").state == "broken off"
        batcher.run(spec)
        kinds = Counter(stories.column(tmp_path / "out", "attempts", "kind"))
        assert set(kinds) == {None, "interrupted"}
        assert sum(kinds.values()) == len(service.book)


# The log


def test_a_run_tells_of_itself_in_json(tmp_path: Path) -> None:
    """With --log-format json every line of standard error is an object, and standard output stays empty."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 30)
    with stories.service(poison={"00007": 422}) as service:
        path = stories.write_job(tmp_path, service.url)
        ended = stories.run(path, "--log-format", "json")
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    assert (ended.returncode, ended.stdout) == (3, "")
    assert [line["event"] for line in told] == ["started", "progress", "progress", "summary", "finished"]
    assert told[-3] | {"answered": 29, "failed": 1, "phase": "complete", "requests": 30} == told[-3]
    assert set(Snapshot._fields) <= told[1].keys()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told[-2] | summary == told[-2]
    assert told[-1]["exit_code"] == 3


def test_errors_are_lines_of_the_log_too(tmp_path: Path) -> None:
    """What is wrong with the job, and what ends a run, with the exit code; foreign text is escaped by JSON."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 3)
    path = stories.write_job(tmp_path, "http://127.0.0.1:9/v1", more={"request": {"model": ""}})
    wrong = stories.run(path, "--log-format", "json")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    (line,) = wrong.stderr.splitlines()
    error = json.loads(line)
    assert (error["event"], error["exit_code"]) == ("error", 2)
    assert "request.model" in error["message"]
    with stories.service() as service:
        path = stories.write_job(tmp_path, service.url, more={"request": {"model": "no\x1b]0;such\u202e"}})
        refused = stories.run(path, "--quiet", "--log-format", "json")
    told = [json.loads(line) for line in refused.stderr.splitlines()]
    assert [line["event"] for line in told] == ["started", "summary", "error"]
    assert (told[-1]["exit_code"], refused.returncode) == (4, 4)
    assert refused.stderr.isascii()
    assert not set(refused.stderr) & {"\x1b", "\x07"}
