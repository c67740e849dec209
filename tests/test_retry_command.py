"""Rows are asked again: failures become answers, answers are never lost, sums go on, a kill changes nothing of it."""

import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batcher
from batcher.errors import JobError, OutputInUseError, StorageError
from batcher.ledger import Lock
from batcher.records import Summary
from batcher.simulator import Simulator
from batcher.verify import verify
from tests import stories

ROWS, PART = 60, 20
POISON = {f"[row {row:05d}]": 400 for row in (3, 13, 33)}
STEPS = ("written", "synced", "renamed", "placed")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


@pytest.fixture(scope="module")
def well() -> Iterator[Simulator]:
    """A service that answers everything."""
    with stories.service(latency=0.002) as service:
        yield service


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job in which three rows of 60 have failed, and every answer was cut off after 8 tokens."""
    folder = tmp_path_factory.mktemp("finished")
    stories.write_jsonl(folder / "rows.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch, stories.service(latency=0.002, poison=POISON) as service:
        patch.setenv("STORY_KEY", stories.KEY)
        job = stories.write_job(folder, service.url, rows_per_part=PART, more={"request": {"max_completion_tokens": 8}})
        batcher.run(batcher.load(job))
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """The output of that job, moved away from it: the job's folder is found all the same."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


def to(service: Simulator) -> str:
    """The setting that sends rows to another service."""
    return f"service.base_url={service.url}"


def rows_of(output: Path, folder: str) -> dict[int, dict[str, Any]]:
    """All rows of a folder by position."""
    parts = sorted((output / folder).glob("*.parquet"))
    return {row["row"]: row for part in parts for row in pq.read_table(part).to_pylist()}


def check(output: Path, rows: int = ROWS) -> Summary:
    """What holds after every retry: each row once, nothing left in the ledger, sums as in attempts and summary."""
    verdict = verify(output)
    assert verdict.problems == []
    assert (verdict.pending, verdict.again) == (0, 0)
    responses, failures = rows_of(output, "responses"), rows_of(output, "failures")
    assert sorted([*responses, *failures]) == list(range(rows))
    tried: dict[int, list[dict[str, Any]]] = {row: [] for row in range(rows)}
    for attempt in stories.table(output, "attempts").to_pylist():
        tried[attempt["row"]].append(attempt)
    for row, told in {**responses, **failures}.items():
        attempts = tried[row]
        assert [attempt["attempt"] for attempt in attempts] == list(range(1, told["attempts"] + 1))
        assert told["billed_prompt_tokens"] == sum(attempt["prompt_tokens"] or 0 for attempt in attempts)
        assert told["billed_completion_tokens"] == sum(attempt["completion_tokens"] or 0 for attempt in attempts)
        if attempts:
            assert told["started_at"] == min(attempt["sent_at"] for attempt in attempts)
            assert told["finished_at"] >= max(attempt["sent_at"] for attempt in attempts)
    with closing(sqlite3.connect(output / "ledger.sqlite")) as ledger:
        for table in ("attempts", "again"):
            assert ledger.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    stories.check_no_secret(output)
    summary: Summary = msgspec.json.decode((output / "summary.json").read_bytes(), type=Summary)
    assert summary.state == "complete"
    assert all(retry.finished_at for retry in summary.retries)
    return summary


def test_failed_rows_are_asked_again(output: Path, finished: Path, well: Simulator) -> None:
    """The failures alone are asked, become answers, and the job finds everything done."""
    before, seen = rows_of(output, "responses"), len(well.book)
    job = (output / "job.toml").read_bytes()
    ended = stories.program("retry", str(output), "--set", to(well))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("3 rows are asked again\n")
    assert stories.KEY not in ended.stdout + ended.stderr
    assert sorted(map(stories.row_of, well.book[seen:])) == [3, 13, 33]
    summary = check(output)
    after = rows_of(output, "responses")
    assert {row: after[row] for row in before} == before
    assert [after[row]["attempts"] for row in (3, 13, 33)] == [2, 2, 2]
    assert rows_of(output, "failures") == {}
    (retry,) = summary.retries
    assert (retry.where, retry.settings, retry.rows, retry.answered) == (None, (to(well),), 3, 3)
    assert summary.requests == 3
    assert (output / "job.toml").read_bytes() == job
    again = stories.program("retry", str(output))
    assert (again.returncode, again.stdout) == (0, "no row is asked again: none has failed\n")
    ended = stories.run(finished / "job.toml", "--set", f"output.path={output}")
    assert ended.returncode == 0, ended.stderr
    assert check(output).retries == summary.retries


def test_answers_are_asked_again_with_other_parameters(output: Path, well: Simulator) -> None:
    """What was cut off is asked with a larger cap; the answer is replaced, and its hash tells."""
    before = rows_of(output, "responses")
    cut = [row for row, told in before.items() if told["finish_reason"] == "length"]
    assert len(cut) > ROWS / 2
    where, settings = "finish_reason = 'length'", (to(well), "request.max_completion_tokens=400")
    result = batcher.retry(output, where, settings)
    after = rows_of(output, "responses")
    assert [row for row, told in after.items() if told["finish_reason"] == "length"] == []
    for row, told in after.items():
        assert told == before[row] if row not in cut else told["request_hash"] != before[row]["request_hash"]
        assert told["attempts"] == 1 + (row in cut)
    assert sorted(rows_of(output, "failures")) == [3, 13, 33]
    (retry,) = check(output).retries
    assert (retry.where, retry.settings, retry.rows, retry.answered) == (where, settings, len(cut), len(cut))
    watched: list[object] = []
    assert batcher.retry(output, where, settings, watch=watched.append).summary == result.summary
    assert watched == []


def test_a_condition_may_name_columns_of_both_folders(output: Path, well: Simulator) -> None:
    """A column that only one folder has is null in the other."""
    where = "kind = 'rejected' and row < 20 or finish_reason is not null and row = 5"
    result = batcher.retry(output, where, [to(well)])
    (retry,) = result.summary.retries
    assert (retry.rows, retry.answered) == (3, 3)
    check(output)
    assert sorted(rows_of(output, "failures")) == [33]


def test_an_answer_is_kept_when_the_new_attempt_fails(output: Path) -> None:
    """The row stays an answer, with the attempt that was made in vain counted; a failure becomes the new failure."""
    before, failed = rows_of(output, "responses"), rows_of(output, "failures")
    poison = {"[row 00003]": 422, "[row 00005]": 422}
    with stories.service(latency=0.002, poison=poison) as service:
        result = batcher.retry(output, "row < 8", [to(service)])
    after = rows_of(output, "responses")
    assert (result.summary.retries[0].rows, result.summary.retries[0].answered) == (8, 6)
    changed = {"attempts": 2, "finished_at": after[5]["finished_at"]}
    assert after[5] == before[5] | changed
    assert after[5]["finished_at"] > before[5]["finished_at"]
    assert (after[4]["attempts"], after[8]) == (2, before[8])
    now = rows_of(output, "failures")
    assert (now[3]["status"], now[3]["attempts"], failed[3]["status"]) == (422, 2, 400)
    assert sorted(now) == [3, 13, 33]
    assert now[13] == failed[13]
    check(output)


def test_retries_follow_on_each_other(output: Path, well: Simulator) -> None:
    """Twice in vain, then answered, then asked once more: the counts go on."""
    with stories.service(latency=0.002, poison=POISON) as service:
        for attempts in (2, 3):
            ended = stories.program("retry", str(output), "--quiet", "--set", to(service))
            assert ended.returncode == 3, ended.stderr
            assert [told["attempts"] for told in rows_of(output, "failures").values()] == [attempts] * 3
            check(output)
    assert batcher.retry(output, settings=[to(well)]).failures().num_rows == 0
    batcher.retry(output, "attempts = 4", [to(well)])
    assert [retry.rows for retry in check(output).retries] == [3, 3, 3, 3]
    assert rows_of(output, "responses")[13]["attempts"] == 5


def test_rows_that_never_became_a_request_are_asked_with_another_prompt(tmp_path: Path, well: Simulator) -> None:
    """A null in a template is a failure without attempts; with a prompt that bears it the row has its first one."""
    lines = [b'{"key": "k0", "text": "[row 00000] a"}', b'{"key": "k1", "text": null}', b'{"key": "k2"']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    batcher.run(batcher.load(stories.write_job(tmp_path, well.url)))
    batcher.retry(tmp_path / "out", settings=["request.prompt=[row 00009] {{ text or 'nothing' }}"])
    assert rows_of(tmp_path / "out", "responses")[1]["attempts"] == 1
    (failure,) = rows_of(tmp_path / "out", "failures").values()
    assert (failure["row"], failure["kind"], failure["attempts"]) == (2, "bad_input", 0)
    check(tmp_path / "out", 3)


@pytest.mark.parametrize(
    "chosen", [{"where": "CAST(substr(key, 2) AS INTEGER) % 3 = 0"}, {"sample": 20}, {"limit": 20}]
)
def test_an_output_of_some_rows_stays_one_of_these_rows(tmp_path: Path, chosen: dict[str, object]) -> None:
    """A retry adds no row, and a larger choice afterwards asks what is new alone."""
    stories.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    output = tmp_path / "out"
    with stories.service(latency=0.002, poison={"[row 00003]": 400, "[row 00012]": 400}) as service:
        job = stories.write_job(tmp_path, service.url, rows_per_part=PART, more={"input": chosen})
        batcher.run(batcher.load(job))
        before = {**rows_of(output, "responses"), **rows_of(output, "failures")}
        assert len(before) == 20
    with stories.service(latency=0.002) as service:
        batcher.retry(output, "row % 2 = 0 or kind is not null", [to(service)])
        asked = {stories.row_of(entry) for entry in service.book}
        assert asked == {row for row in before if row % 2 == 0 or row == 3}
        assert verify(output).problems == []
        assert sorted(rows_of(output, "responses")) == sorted(before)
        service.book.clear()
        every = {name: value if name == "where" else None for name, value in chosen.items()}  # a condition is for good
        job = stories.write_job(tmp_path, service.url, rows_per_part=PART, more={"input": every})
        assert batcher.run(batcher.load(job)).summary.pending == 0
        new = set() if "where" in chosen else {*range(ROWS)} - {*before}
        assert sorted(stories.row_of(entry) for entry in service.book) == sorted(new)
    assert verify(output).problems == []


def test_rows_that_came_from_python_are_given_again(tmp_path: Path, well: Simulator) -> None:
    """Without the table a retry cannot be; with it, it goes like any other."""
    table = pa.table({"key": [f"k{row}" for row in range(8)], "text": [stories.prompt(row) for row in range(8)]})
    job = batcher.load(stories.write_job(tmp_path, well.url, more={"input": {"path": None}}))
    batcher.run(job, input=table)
    with pytest.raises(JobError, match="path is missing"):
        batcher.retry(tmp_path / "out", "row = 2")
    assert batcher.retry(tmp_path / "out", "row = 2", input=table).summary.retries[0].answered == 1
    check(tmp_path / "out", 8)


def test_the_texts_are_those_that_were_asked(tmp_path: Path, well: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and schema files may have changed or gone since: a retry asks what was asked, unless it is told to."""
    schema = {"type": "object", "properties": {"label": {"enum": ["a", "b"]}}, "required": ["label"]}
    stories.write_jsonl(tmp_path / "rows.jsonl", 10)
    (tmp_path / "system.txt").write_text("Be brief.")
    (tmp_path / "label.schema.json").write_bytes(msgspec.json.encode(schema))
    request = {
        "system": {"file": "system.txt"},
        "response_format": {"schema": "label.schema.json"},
        "max_completion_tokens": 400,
    }
    batcher.run(batcher.load(stories.write_job(tmp_path, well.url, more={"request": request})))
    output = tmp_path / "out"
    before = rows_of(output, "responses")
    (tmp_path / "system.txt").write_text("Be verbose.")
    (tmp_path / "label.schema.json").unlink()
    monkeypatch.chdir("/")
    batcher.retry(output, "parsed.label in ('a', 'b') and row < 4")
    after = rows_of(output, "responses")
    assert [after[row]["request_hash"] for row in range(4)] == [before[row]["request_hash"] for row in range(4)]
    assert after[3]["attempts"] == 2
    batcher.retry(output, "row = 0", ['request.system={ file = "system.txt" }'])
    assert rows_of(output, "responses")[0]["request_hash"] != before[0]["request_hash"]
    check(output, 10)
    wide = {**schema, "properties": {"label": {"type": "string"}, "score": {"type": "integer"}}}
    (tmp_path / "label.schema.json").write_bytes(msgspec.json.encode(wide))
    with pytest.raises(JobError, match="columns of the output are fixed"):
        batcher.retry(output, "row = 0", ['request.response_format={ schema = "label.schema.json" }'])


@pytest.mark.parametrize(
    ("where", "settings", "said"),
    [
        (None, ["input.path=x.jsonl"], r"a retry may change \[request\], \[service\], \[schedule\] and \[retry\] only"),
        (None, ["output.raw=true"], r"a retry may change \[request\]"),
        (None, ["name=x"], r"a retry may change \[request\]"),
        (None, ["request.n=2"], "--set request.n: the columns of the output are fixed"),
        (None, ["request.temperature=9"], "request.temperature: a number from 0 to 2"),
        (None, ["request.prompt={{ nope }}"], "no column nope in the input"),
        ("nope = 1", [], '--where: Binder Error: Referenced column "nope" not found'),
        ("finish_reason =", [], "--where: not an SQL condition"),
        ("response::int > 3", [], "--where: Conversion Error"),
    ],
)
def test_what_cannot_be_is_refused(output: Path, where: str | None, settings: list[str], said: str) -> None:
    """One or two lines, and nothing is begun."""
    with pytest.raises(JobError, match=said) as refused:
        batcher.retry(output, where, settings)
    assert len(str(refused.value).splitlines()) <= 2
    assert check(output).retries == ()


def test_a_refusal_is_one_line_on_the_terminal(output: Path) -> None:
    """Exit code 2, and no traceback."""
    ended = stories.program("retry", str(output), "--abandon")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"batcher: no retry is under way in {output}\n"


def test_what_is_no_finished_output_is_refused(tmp_path: Path, finished: Path, output: Path, well: Simulator) -> None:
    """A folder without an output, without its ledger, in use, with other input, or with rows still pending."""
    with pytest.raises(JobError, match="no output of batcher"):
        batcher.retry(tmp_path)
    with Lock(output), pytest.raises(OutputInUseError):
        batcher.retry(output)
    more = tmp_path / "more"
    shutil.copytree(finished, more)
    batcher.run(batcher.load(more / "job.toml"))  # from now on the input is that of the copy
    with (more / "rows.jsonl").open("a") as file:
        file.write('{"key": "k", "text": "[row 00060] x"}\n')
    with pytest.raises(JobError, match="the input has changed since the run began"):
        batcher.retry(more / "out", settings=[to(well)])
    (output / "ledger.sqlite").unlink()
    with pytest.raises(StorageError, match="the ledger is gone"):
        batcher.retry(output)


def test_rows_that_are_pending_come_first(tmp_path: Path, well: Simulator) -> None:
    """A run that was interrupted or killed is ended before anything is asked again."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 200)
    with stories.service(latency=0.1) as slow:
        job = stories.write_job(tmp_path, slow.url, in_flight=4, rows_per_part=50)
        story = stories.Kills(tmp_path, slow, job, in_flight=4, seed=0)
        for drained in (True, False):
            process = subprocess.Popen(stories.command(*story.words, "--quiet"), env=stories.environment())
            with process:
                wait(lambda: len(slow.book) > 8)
                process.send_signal(signal.SIGTERM if drained else signal.SIGKILL)
            ended = stories.program("retry", str(tmp_path / "out"))
            assert ended.returncode == 2
            assert "run the job to its end first" in ended.stderr
            assert ("rows are pending" in ended.stderr) == drained or not drained
            slow.book.clear()


def wait(until: Callable[[], bool]) -> None:
    """Wait for something that other threads or processes bring about."""
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def interrupted(output: Path, *words: str) -> int:
    """A retry of all rows that is asked to end when about twenty were sent; how many were."""
    with stories.service(latency=0.1) as slow:
        process = subprocess.Popen(
            stories.command(
                *("retry", str(output), "--quiet", "--where", "true", "--set", to(slow)),
                *("--set", "schedule.max_in_flight=4", *words),
            ),
            env=stories.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with process:
            wait(lambda: len(slow.book) > 20 or process.poll() is not None)
            process.terminate()
            assert process.wait(60) == 143
        return len(slow.book)


def test_a_retry_that_was_interrupted_goes_on(output: Path, finished: Path) -> None:
    """Meanwhile every row stands where it stood, a run is refused, other options are too; then the rest is asked."""
    port = 0
    with stories.service(latency=0.1) as slow:
        port = int(slow.url.split(":")[2].split("/")[0])
        words = ("--where", "true", "--set", to(slow), "--set", "schedule.max_in_flight=4")
        process = subprocess.Popen(
            stories.command("retry", str(output), "--quiet", *words), env=stories.environment(), stderr=subprocess.PIPE
        )
        with process:
            wait(lambda: len(slow.book) > 24 or process.poll() is not None)
            process.terminate()
            assert process.wait(60) == 143
        asked = [stories.row_of(entry) for entry in slow.book]
    assert 24 < len(asked) < ROWS
    rows = [*stories.column(output, "responses", "row"), *stories.column(output, "failures", "row")]
    assert sorted(rows) == list(range(ROWS))  # type: ignore[type-var]
    verdict = verify(output)
    assert verdict.problems == []
    assert 0 < verdict.again <= ROWS
    ended = stories.run(finished / "job.toml", "--set", f"output.path={output}")
    assert ended.returncode == 2
    assert f"batcher retry {output}" in ended.stderr
    ended = stories.program("retry", str(output), "--where", "row = 1")
    assert ended.returncode == 2
    assert "a retry of 60 rows with other options is under way" in ended.stderr
    with stories.at(port) as service:
        ended = stories.program("retry", str(output))
        assert ended.returncode == 0, ended.stderr
        assert sorted(asked + [stories.row_of(entry) for entry in service.book]) == list(range(ROWS))
    summary = check(output)
    assert (summary.retries[0].rows, summary.retries[0].answered) == (ROWS, ROWS)


def test_a_retry_is_abandoned(output: Path, well: Simulator) -> None:
    """What was answered is kept, what was not asked stays as it was, and another retry may begin."""
    before = rows_of(output, "responses")
    asked = interrupted(output)
    ended = stories.program("retry", str(output), "--abandon", "--quiet")
    assert ended.returncode in (0, 3), ended.stderr
    (retry,) = check(output).retries
    assert (retry.rows, retry.answered) == (asked, asked)
    after = rows_of(output, "responses")
    assert sum(after[row] != told for row, told in before.items()) <= asked
    assert after[59] == before[59]
    assert batcher.retry(output, "row = 59", [to(well)]).summary.retries[1].rows == 1
    check(output)


def test_rows_that_were_tried_when_a_retry_is_abandoned_have_failed(output: Path) -> None:
    """Their attempts are counted; an answer stays, a failure becomes the last attempt's."""
    before = rows_of(output, "responses")
    with stories.service(latency=0.01, faults={"500": 1.0}) as broken:
        words = ("--where", "row < 4", "--set", to(broken), "--set", "retry.max_attempts=100")
        process = subprocess.Popen(
            stories.command("retry", str(output), "--quiet", *words), env=stories.environment(), stderr=subprocess.PIPE
        )
        with process:
            wait(lambda: len(broken.book) >= 5 or process.poll() is not None)
            process.kill()
    ended = stories.program("retry", str(output), "--abandon", "--quiet")
    assert ended.returncode == 3, ended.stderr
    check(output)
    after = rows_of(output, "responses")
    assert {row: told["response"] for row, told in after.items()} == {row: t["response"] for row, t in before.items()}
    assert rows_of(output, "failures")[3]["kind"] == "server_error"


POINTS = [
    "retry.begun",
    "published.before",
    "complete.before",
    "responses.renamed",
    "failures.synced",
    "attempts.placed",
]
MORE_POINTS = [
    pytest.param(point, marks=pytest.mark.soak)
    for point in (
        *("retry.inside", "commit.before", "commit.inside", "commit.after"),
        *(f"{name}.{step}" for name in ("responses", "failures", "attempts") for step in STEPS),
    )
    if point not in POINTS
]


@pytest.mark.parametrize("point", [*POINTS, *MORE_POINTS])
def test_a_retry_survives_a_kill_at_each_named_point(output: Path, tmp_path: Path, point: str) -> None:
    """Killed before, inside and after each step: every row stands somewhere, once among the answers, and it goes on."""
    before = rows_of(output, "responses")
    poison = {"[row 00013]": 422, "[row 00014]": 422}
    with stories.service(latency=0.005, poison=poison) as service:
        words = ("retry", str(output), "--where", "row % 2 = 0 or kind is not null", "--set", to(service))
        story = stories.Kills(tmp_path, service, output, in_flight=16, seed=0, words=words)
        drained = point == "published.before"
        visit = 2 if point.startswith("commit") else 1
        requests = 12 if drained else 1_000_000
        armed = story.kill_once(requests, within=60, drained=drained, BATCHER_KILLPOINT=f"{point}:{visit}")
        assert armed, "the point was never reached"
        whole(output, before)
        ended = stories.program(*words)
        assert ended.returncode == 3, ended.stderr
        story.check_repeats()
    finally_right(output, before)


def test_a_retry_survives_kills_at_random_moments(output: Path, tmp_path: Path) -> None:
    """Killed four times: nothing that had arrived is asked again."""
    before = rows_of(output, "responses")
    poison = {"[row 00013]": 422, "[row 00014]": 422}
    with stories.service(latency=0.05, poison=poison, faults={"500": 0.05}) as service:
        settings = ("--set", to(service), "--set", "schedule.max_in_flight=4")
        words = ("retry", str(output), "--where", "row % 2 = 0 or kind is not null", *settings)
        story = stories.Kills(tmp_path, service, output, in_flight=4, seed=7, words=words)
        for _ in range(4):
            if not story.kill_once(story.random.randrange(8), within=0.1):
                break
            whole(output, before)
        assert len(story.at) >= 2
        ended = stories.program(*words)
        assert ended.returncode == 3, ended.stderr
        story.check_repeats()
    finally_right(output, before)


def whole(output: Path, before: dict[int, dict[str, Any]]) -> None:
    """After a kill: no row is missing, no answer is gone, and a recount finds nothing wrong."""
    responses, failures = stories.column(output, "responses", "row"), stories.column(output, "failures", "row")
    assert {*responses, *failures} == {*range(ROWS)}
    assert {*before} <= {*responses}
    assert verify(output).problems == []


def finally_right(output: Path, before: dict[int, dict[str, Any]]) -> None:
    """What that retry comes to, however often it was killed."""
    summary = check(output)
    after, failures = rows_of(output, "responses"), rows_of(output, "failures")
    assert sorted(failures) == [13]
    assert failures[13]["status"] == 422
    assert after[14]["response"] == before[14]["response"]
    assert {row: after[row] for row in range(1, ROWS, 2) if row not in (3, 13, 33)} == {
        row: before[row] for row in range(1, ROWS, 2) if row not in (3, 13, 33)
    }
    (retry,) = summary.retries
    assert (retry.rows, retry.answered) == (33, 31)
