"""Stories that cross all rooms: a job goes in, Parquet comes out, and what goes wrong ends as promised."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import anyio
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batcher
from batcher.errors import BatcherError, JobError, OutputInUseError, PausedError, ServiceError
from batcher.simulator import Simulator
from tests import stories

More = Mapping[str, Mapping[str, object]]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every story has its key in the environment."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)


@pytest.fixture(scope="module")
def well() -> Iterator[Simulator]:
    """A service without faults."""
    with stories.service(latency=0.002) as service:
        yield service


def job(folder: Path, url: str, rows: int = 40, more: More | None = None, **how: object) -> batcher.Job:
    """A job over a new input in this folder, or over the one that lies there."""
    if not (folder / "rows.jsonl").exists():
        stories.write_jsonl(folder / "rows.jsonl", rows)
    return batcher.load(stories.write_job(folder, url, more=more, **how))  # type: ignore[arg-type]


def asked(service: Simulator) -> int:
    """How often the service was asked so far."""
    return len(service.book)


def ended(kind: type[BatcherError], run: Callable[[], object]) -> BatcherError:
    """The error that ends a run; its text is a line or two and holds no secret."""
    with pytest.raises(kind) as caught:
        run()
    assert len(str(caught.value).splitlines()) <= 2
    assert stories.KEY not in str(caught.value)
    return caught.value


def test_every_row_has_its_answer(tmp_path: Path, well: Simulator) -> None:
    """A plain run leaves one typed row per input row, in the input's order, in parts of the asked size."""
    result = batcher.run(job(tmp_path, well.url, rows=95, rows_per_part=30))
    answers = result.table()
    assert answers["row"].to_pylist() == list(range(95))
    assert answers["text"].to_pylist() == [stories.prompt(row) for row in range(95)]
    assert answers["id"].to_pylist() == [f"k{row}" for row in range(95)]
    assert answers["finish_reason"].to_pylist() == ["stop"] * 95
    assert set(answers["attempts"].to_pylist()) == {1}
    assert [pq.read_metadata(part).num_rows for part in sorted((tmp_path / "out/responses").iterdir())] == [
        30,
        30,
        30,
        5,
    ]
    assert result.failures().num_rows == 0
    stories.check_no_secret(tmp_path / "out")


def test_the_output_opens_in_other_tools(tmp_path: Path, well: Simulator) -> None:
    """pandas, Polars and DuckDB open the parts as they are, and find the same rows and sums."""
    result = batcher.run(job(tmp_path, well.url, rows_per_part=15))
    parts = str(tmp_path / "out/responses/*.parquet")
    tokens = result.summary.totals.completion_tokens
    assert pd.read_parquet(tmp_path / "out/responses")["completion_tokens"].sum() == tokens
    assert pl.read_parquet(parts)["completion_tokens"].sum() == tokens
    query = "SELECT count(*), count(DISTINCT row), sum(completion_tokens) FROM read_parquet(?)"
    with duckdb.connect() as database:
        assert database.execute(query, [parts]).fetchall() == [(40, 40, tokens)]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "parquet", "folder"])
def test_inputs_of_every_form(tmp_path: Path, well: Simulator, suffix: str) -> None:
    """Compressed lines, Parquet and a folder of files give the same rows."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 40)
    text = (tmp_path / "rows.jsonl").read_bytes()
    if suffix == "jsonl.gz":
        source = tmp_path / "rows.jsonl.gz"
        source.write_bytes(gzip.compress(text))
    elif suffix == "parquet":
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in text.splitlines()]), source, row_group_size=7)
    else:
        source = tmp_path / "rows"
        source.mkdir()
        lines = text.splitlines(keepends=True)
        (source / "a.jsonl").write_bytes(b"".join(lines[:25]))
        (source / "b.jsonl").write_bytes(b"".join(lines[25:]))
    result = batcher.run(job(tmp_path, well.url, source=source.name))
    assert result.table()["text"].to_pylist() == [stories.prompt(row) for row in range(40)]


def test_a_wrong_key_ends_the_run_with_every_row_pending(tmp_path: Path) -> None:
    """401 from the start: exit code 4, no row is a failure, and the right key finishes the job."""
    with stories.service(key="sk-another") as service:
        error = ended(ServiceError, lambda: batcher.run(job(tmp_path, service.url)))
        assert error.exit_code == 4
        assert "key" in str(error)
    with stories.service() as service:
        result = batcher.run(job(tmp_path, service.url))
    assert (result.summary.totals.answered, result.summary.totals.failed) == (40, 0)


def test_an_unknown_model_ends_the_run(tmp_path: Path, well: Simulator) -> None:
    """A model that the service does not have: exit code 4, the model is named, nothing is a failure."""
    wrong = job(tmp_path, well.url, more={"request": {"model": "gpt-none"}})
    assert "gpt-none" in str(ended(ServiceError, lambda: batcher.run(wrong)))
    assert stories.column(tmp_path / "out", "failures", "row") == []


def test_a_request_that_is_always_rejected_ends_the_run(tmp_path: Path) -> None:
    """400 for every row: about twenty requests, then the run ends with all rows pending."""
    with stories.service(poison={"Say something": 400}) as service:
        always = job(tmp_path, service.url, rows=500)
        error = ended(ServiceError, lambda: batcher.run(always))
        assert asked(service) <= 20 + 16
    assert "pending" in str(error)
    assert stories.column(tmp_path / "out", "failures", "row") == []
    with stories.service() as service:
        assert batcher.run(job(tmp_path, service.url)).summary.totals.answered == 500


def test_a_small_pilot_that_is_always_rejected_fails_no_row(tmp_path: Path) -> None:
    """Ten rows, all refused: nothing tells a bad job from bad rows, so they stay pending."""
    with stories.service(poison={"Say something": 422}) as service:
        error = ended(ServiceError, lambda: batcher.run(job(tmp_path, service.url, rows=10)))
    assert "pending" in str(error)
    assert stories.column(tmp_path / "out", "failures", "row") == []


def test_refused_rows_do_not_hold_up_the_run(tmp_path: Path) -> None:
    """A long stretch of refused rows fills all open ranges; it ends as failures, and the rows behind it are asked."""
    poison = {f"[row {row:05d}]": 400 for row in range(20, 220)}
    with stories.service(poison=poison) as service:
        result = batcher.run(job(tmp_path, service.url, rows=240, in_flight=4, rows_per_part=10))
    assert result.failures()["row"].to_pylist() == list(range(20, 220))
    assert result.summary.totals.answered == 40


def test_single_rejected_rows_are_failures(tmp_path: Path) -> None:
    """A row that the service rejects while others are answered is a dead letter with the service's reason."""
    with stories.service(poison={"[row 00007]": 400, "[row 00021]": 422}) as service:
        result = batcher.run(job(tmp_path, service.url))
    failures = result.failures()
    assert failures["row"].to_pylist() == [7, 21]
    assert failures["status"].to_pylist() == [400, 422]
    assert set(failures["kind"].to_pylist()) == {"rejected"}
    assert failures["attempts"].to_pylist() == [1, 1]
    assert result.summary.totals.failure_kinds == {"rejected": 2}


def test_rows_that_only_get_server_errors_fail_after_three_retries(tmp_path: Path) -> None:
    """A poisoned row is given up after its retries; the others are answered."""
    with stories.service(poison={"[row 00005]": 500}) as service:
        result = batcher.run(job(tmp_path, service.url))
        failed = [entry for entry in service.book if entry.status == 500]
    assert result.failures().select(["row", "kind", "attempts"]).to_pylist() == [
        {"row": 5, "kind": "server_error", "attempts": 4}
    ]
    assert len(failed) == 4
    attempts = stories.table(tmp_path / "out", "attempts")
    assert attempts.num_rows == 43
    assert sorted(attempts.filter(pa.compute.equal(attempts["row"], 5))["attempt"].to_pylist()) == [1, 2, 3, 4]


def test_answers_that_do_not_fit_are_asked_again(tmp_path: Path) -> None:
    """With a schema, a misfit is asked `max_invalid` times more; every payment is in the row's cost."""
    schema = {
        "type": "object",
        "properties": {"mood": {"type": "string", "enum": ["good", "bad"]}, "score": {"type": "integer"}},
        "required": ["mood", "score"],
        "additionalProperties": False,
    }
    more: More = {"request": {"response_format": {"schema": schema}}, "retry": {"max_invalid": 1}}
    with stories.service(faults={"invalid": 0.3}, seed=3) as service:
        result = batcher.run(job(tmp_path, service.url, rows=60, more=more))
        seen = {row: [e for e in service.book if stories.row_of(e) == row] for row in range(60)}
    answers = result.table()
    assert answers.schema.field("parsed").type == pa.struct([("mood", pa.string()), ("score", pa.int64())])
    assert all(value["mood"] in ("good", "bad") for value in answers["parsed"].to_pylist())
    failed = result.failures().to_pylist()
    assert failed, "three tenths of the answers twice in a row: some rows must end so"
    for row in failed:
        assert (row["kind"], row["attempts"]) == ("invalid_output", 2)
        assert json.loads(row["body"])["choices"]
        assert row["billed_completion_tokens"] == sum(entry.completion_tokens for entry in seen[row["row"]])
    for row in answers.to_pylist():
        assert row["billed_prompt_tokens"] == sum(entry.prompt_tokens for entry in seen[row["row"]])


def test_bad_lines_and_nulls_are_their_rows_failures(tmp_path: Path, well: Simulator) -> None:
    """A line that is not JSON, and a null in a template, cost their row and nothing else; the line is named."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 20)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[4] = '{"key": "k4", "text": '
    lines[9] = '{"key": "k9", "text": null}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    result = batcher.run(job(tmp_path, well.url))
    failures = result.failures().select(["row", "kind", "message", "attempts"]).to_pylist()
    assert [(row["row"], row["kind"], row["attempts"]) for row in failures] == [
        (4, "bad_input", 0),
        (9, "unsendable", 0),
    ]
    assert "line 5 of rows.jsonl" in failures[0]["message"]
    assert "text is null" in failures[1]["message"]
    assert result.summary.totals.answered == 18


def test_text_that_parquet_cannot_hold_costs_only_its_exactness(tmp_path: Path) -> None:
    """Lone surrogates are replaced and the row is flagged; the part is written."""
    with stories.service(faults={"surrogate": 0.5}, seed=1) as service:
        result = batcher.run(job(tmp_path, service.url))
        spoiled = {stories.row_of(entry) for entry in service.book if entry.fault == "surrogate"}
    answers = result.table().to_pylist()
    assert {row["row"] for row in answers if row["altered"]} == spoiled != set()
    assert result.summary.totals.altered == len(spoiled)


def test_limits_are_obeyed_without_a_failure(tmp_path: Path) -> None:
    """A small account: its headers are followed, few requests are refused, no row fails."""
    with stories.service(requests_per_minute=600, tokens_per_minute=None) as service:
        result = batcher.run(job(tmp_path, service.url, rows=620, in_flight=32))
        refused = sum(entry.status == 429 for entry in service.book)
    assert (result.summary.totals.answered, result.summary.totals.failed) == (620, 0)
    assert refused <= 6


def test_a_ceiling_of_ours_is_kept(tmp_path: Path, well: Simulator) -> None:
    """max_in_flight is never exceeded, by the service's own count."""
    with stories.service(latency=0.03) as service:
        batcher.run(job(tmp_path, service.url, rows=120, in_flight=5))
        assert service.peak_in_flight == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """The first signal lets requests in flight be answered; nothing is asked twice; the code tells the signal."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 200)
    with stories.service(latency=0.1) as service:
        path = stories.write_job(tmp_path, service.url)
        process = subprocess.Popen(
            stories.command("run", str(path), "--quiet"), env=stories.environment(), stderr=subprocess.PIPE, text=True
        )
        while asked(service) < 40:
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert "Traceback" not in errors
        summary = json.loads((tmp_path / "out/summary.json").read_text())
        assert (summary["state"], summary["pending"]) == ("interrupted", 200 - summary["totals"]["rows"])
        assert len(stories.column(tmp_path / "out", "responses", "row")) == summary["totals"]["answered"] > 0
        assert stories.run(path).returncode == 0
        assert asked(service) == 200
        stories.check_complete(tmp_path / "out", 200, service)


def test_a_second_signal_stops_now_and_loses_nothing_recorded(tmp_path: Path) -> None:
    """Two signals: the run ends at once although requests are in flight, and what was answered is not asked again."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 100)
    with stories.service(latency=0.05, poison={}, faults={"hang": 0.3}, hang=30.0, seed=2) as service:
        path = stories.write_job(tmp_path, service.url, more={"service": {"timeout": "60s"}})
        process = subprocess.Popen(stories.command("run", str(path), "--quiet"), env=stories.environment())
        while service.in_flight < 16:
            time.sleep(0.005)
        time.sleep(0.3)
        answered = {stories.row_of(entry) for entry in service.book if stories.good(entry)}
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        before = asked(service)
    with stories.service(latency=0.01) as service:
        assert stories.run(stories.write_job(tmp_path, service.url)).returncode == 0
        assert not answered & {stories.row_of(entry) for entry in service.book}
        assert before
    assert stories.column(tmp_path / "out", "responses", "row") == list(range(100))


def test_a_changed_job_is_refused_with_the_difference(tmp_path: Path, well: Simulator) -> None:
    """Another prompt over the same output: nothing is sent, the difference is shown; pace may change freely."""
    batcher.run(job(tmp_path, well.url))
    before = asked(well)
    other = job(tmp_path, well.url, more={"request": {"prompt": "Now {{ text }}"}})
    assert "Now {{ text }}" in str(ended(JobError, lambda: batcher.run(other)))
    batcher.run(job(tmp_path, well.url, in_flight=3, more={"retry": {"max_attempts": 2}}))
    assert asked(well) == before


def test_a_changed_input_is_refused(tmp_path: Path, well: Simulator) -> None:
    """A file with other rows, be it of the same size, is noticed before anything is sent."""
    batcher.run(job(tmp_path, well.url, more={"input": {"limit": 10}}))
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("[row 00030]", "[row 99930]"))
    before = asked(well)
    assert "rows.jsonl" in str(ended(JobError, lambda: batcher.run(job(tmp_path, well.url))))
    assert asked(well) == before


def test_an_input_that_changes_under_the_run_spoils_no_part(tmp_path: Path) -> None:
    """Answers are never put beside other rows than those that were asked about."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with stories.service(latency=0.2) as service:
        path = stories.write_job(tmp_path, service.url, in_flight=8)
        process = subprocess.Popen(
            stories.command("run", str(path), "--quiet"), env=stories.environment(), stderr=subprocess.PIPE, text=True
        )
        while asked(service) < 8:
            time.sleep(0.005)
        (tmp_path / "other.jsonl").write_bytes(before.replace(b"k5", b"x5"))
        (tmp_path / "other.jsonl").replace(tmp_path / "rows.jsonl")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "rows.jsonl was changed" in errors
        assert "Traceback" not in errors
        (tmp_path / "rows.jsonl").write_bytes(before)
        assert stories.run(path).returncode == 0
        assert asked(service) == 60
        stories.check_complete(tmp_path / "out", 60, service)


def test_a_part_that_is_gone_is_said(tmp_path: Path, well: Simulator) -> None:
    """A run never says "complete" over an output that has lost a part."""
    spec = job(tmp_path, well.url, rows_per_part=20)
    batcher.run(spec)
    (tmp_path / "out/responses/part-000001.parquet").unlink()
    assert "part-000001.parquet is gone" in str(ended(batcher.errors.StorageError, lambda: batcher.run(spec)))


def test_a_larger_limit_and_more_files_go_on_where_the_run_ended(tmp_path: Path, well: Simulator) -> None:
    """A pilot, then all rows, then a file more: no row is asked twice, its parts are written again whole."""
    folder = tmp_path / "in"
    folder.mkdir()
    stories.write_jsonl(folder / "a.jsonl", 45)
    before = asked(well)
    (tmp_path / "rows.jsonl").touch()
    for limit, expected in ((10, 10), (33, 33), (1000, 45)):
        batcher.run(job(tmp_path, well.url, source="in", rows_per_part=20, more={"input": {"limit": limit}}))
        assert stories.column(tmp_path / "out", "responses", "row") == list(range(expected))
    lines = [{"key": f"k{row}", "text": stories.prompt(row)} for row in range(45, 70)]
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = batcher.run(job(tmp_path, well.url, source="in", rows_per_part=20))
    assert asked(well) - before == 70
    assert result.table()["text"].to_pylist() == [stories.prompt(row) for row in range(70)]
    assert result.summary.totals.answered == result.summary.totals.attempts == 70


def test_a_second_runner_is_refused(tmp_path: Path) -> None:
    """While one process runs, another on the same output ends with 5 and sends nothing."""
    stories.write_jsonl(tmp_path / "rows.jsonl", 60)
    with stories.service(latency=0.2) as service:
        path = stories.write_job(tmp_path, service.url, in_flight=4)
        first = subprocess.Popen(stories.command("run", str(path), "--quiet"), env=stories.environment())
        while not asked(service):
            time.sleep(0.005)
        ended(OutputInUseError, lambda: batcher.run(batcher.load(path)))
        assert first.wait(timeout=60) == 0
        assert asked(service) == 60


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"service": {"api_key_env": "NO_SUCH_KEY"}}, "NO_SUCH_KEY"),
        ({"request": {"prompt": "{{ txt }}"}}, "txt"),
        ({"output": {"keep": ["nothing"]}}, "nothing"),
        ({"input": {"path": "missing.jsonl"}}, "missing.jsonl"),
        ({"request": {"prompt": "{{ text"}}, "template"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(tmp_path: Path, well: Simulator, more: More, says: str) -> None:
    """Key, column, file, template: one clear line each, and no request."""
    before = asked(well)
    assert says in str(ended(JobError, lambda: batcher.run(job(tmp_path, well.url, more=more))))
    assert asked(well) == before


def test_an_outage_costs_no_row(tmp_path: Path) -> None:
    """Nobody listens at first: rows wait uncharged, and the run goes on when the service is there."""
    with stories.service() as service:
        url = service.url
    port = int(url.split(":")[2].split("/")[0])
    stories.write_jsonl(tmp_path / "rows.jsonl", 50)
    path = stories.write_job(tmp_path, url)
    process = subprocess.Popen(stories.command("run", str(path), "--quiet"), env=stories.environment())
    time.sleep(3)
    with stories.at(port) as service:
        assert process.wait(timeout=60) == 0
        stories.check_complete(tmp_path / "out", 50, service)


def test_no_credit_pauses_the_run(tmp_path: Path) -> None:
    """402: exit code 75, every row pending, the reason said."""
    with stories.service(poison={"Say something": 402}) as service:
        error = ended(PausedError, lambda: batcher.run(job(tmp_path, service.url)))
    assert error.exit_code == 75
    assert stories.column(tmp_path / "out", "failures", "row") == []


def test_several_choices_and_completions(tmp_path: Path, well: Simulator) -> None:
    """`n` fills `choices`; the completions endpoint works alike; `raw` keeps the whole answer."""
    request: Mapping[str, object] = {
        "endpoint": "completions",
        "n": 3,
        "max_tokens": 20,
        "max_completion_tokens": None,
    }
    result = batcher.run(job(tmp_path, well.url, rows=5, more={"request": request, "output": {"raw": True}}))
    for row in result.table().to_pylist():
        assert [choice["index"] for choice in row["choices"]] == [0, 1, 2]
        assert row["choices"][0]["text"] == row["response"]
        assert json.loads(row["raw"])["object"] == "text_completion"


def test_a_run_names_its_http_library_and_says_when_that_is_not_there(
    tmp_path: Path, well: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp where the job does not ask for the other one; asked for in vain that is missed in a line."""
    assert batcher.run(job(tmp_path, well.url, rows=3)).summary.transport == "aiohttp"
    spec = job(tmp_path, well.url, rows=3, more={"service": {"transport": "reqwest"}})
    assert batcher.run(spec).summary.transport == "reqwest"
    monkeypatch.setitem(sys.modules, "pyreqwest", None)
    assert "pip install" in str(ended(batcher.errors.JobError, lambda: batcher.run(spec)))


def test_an_empty_input_is_a_finished_job(tmp_path: Path, well: Simulator) -> None:
    """No rows: one empty part with all columns, so that readers need no special case."""
    table = pa.table({"key": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "rows.parquet")
    result = batcher.run(job(tmp_path, well.url, source="rows.parquet"))
    assert (result.table().num_rows, result.summary.selected) == (0, 0)
    assert "response" in result.table().column_names


def test_cancelling_keeps_what_is_recorded(tmp_path: Path) -> None:
    """A cancelled `arun` loses no answer that was recorded, and the next one asks only for the rest."""
    with stories.service(latency=0.05) as service:
        spec = job(tmp_path, service.url, rows=120)

        anyio.run(stories.cancelled, spec, service, 40)
        batcher.run(spec)
        again = len(service.book) - len({stories.row_of(entry) for entry in service.book})
        assert again <= 16
        stories.check_complete(tmp_path / "out", 120, service)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, well: Simulator) -> None:
    """A read-only place: exit code 6 before anything is sent."""
    spec = job(tmp_path, well.url)
    tmp_path.chmod(0o500)
    before = asked(well)
    try:
        assert ended(batcher.errors.StorageError, lambda: batcher.run(spec)).exit_code == 6
    finally:
        tmp_path.chmod(0o700)
    assert asked(well) == before
