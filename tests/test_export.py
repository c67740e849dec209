"""Exported files: what other tools find in them, what no spreadsheet runs, and that none is ever half there."""

import csv
import datetime
import decimal
import json
import os
import subprocess
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import batcher
from batcher.errors import JobError, StorageError
from batcher.export import export, harmless
from batcher.simulator import Settings, Simulator, running
from tests import stories

ROWS = 12
POISON = "poison"


@pytest.fixture(scope="module")
def service() -> Iterator[Simulator]:
    """A simulated service that refuses one word."""
    with running(Settings(latency=0.0, poison={POISON: 422}), record=True) as simulator:
        yield simulator


def made(folder: Path, url: str, table: pa.Table, more: Mapping[str, Mapping[str, object]] | None = None) -> Path:
    """The output of a job over this table; its rows with the word fail."""
    pq.write_table(table, folder / "rows.parquet")
    sections: dict[str, Any] = {
        "input": {"path": "rows.parquet"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 20},
        "service": {"base_url": url, "api_key_env": "EXPORT_KEY", "dialect": "cerebras"},
        "output": {"path": "out", "rows_per_part": 5},
    }
    for name, values in (more or {}).items():
        sections[name] = sections[name] | dict(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPORT_KEY", "sk-nobody")
        batcher.run(batcher.Job(folder=folder, **sections))
    return folder / "out"


def texts(*poisoned: int) -> list[str]:
    """Prompts of the rows."""
    return [POISON if row in poisoned else f"Say something about {row}." for row in range(ROWS)]


def lines(path: Path | None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def cells(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


# OpenAI's batch files


@pytest.mark.parametrize("raw", [True, False])
def test_batch_files_are_what_readers_of_openai_expect(service: Simulator, tmp_path: Path, raw: bool) -> None:
    """The usual way to the text, the usage and the error works, from the raw answer and from the columns alike."""
    table = pa.table({"key": [f"k{row}" for row in range(ROWS)], "text": texts(3, 7)})
    output = made(tmp_path, service.url, table, {"input": {"id": "key"}, "output": {"raw": raw}})
    found = export(output, "openai-batch")
    assert (found.answers.name, found.failures and found.failures.name) == ("out.output.jsonl", "out.errors.jsonl")
    assert (found.answered, found.failed, found.pending) == (ROWS - 2, 2, 0)

    answers = {row["row"]: row for row in stories.table(output, "responses").to_pylist()}
    exported = lines(found.answers)
    assert [line["custom_id"] for line in exported] == [f"k{row}" for row in answers]
    assert len({line["id"] for line in exported}) == len(exported)
    for line, row in zip(exported, answers.values(), strict=True):
        assert set(line) == {"id", "custom_id", "response", "error"}
        assert line["error"] is None
        assert set(line["response"]) == {"status_code", "request_id", "body"}
        assert line["response"]["status_code"] == 200
        body = line["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["content"] == row["response"]
        assert body["choices"][0]["message"]["role"] == "assistant"
        assert body["choices"][0]["finish_reason"] == row["finish_reason"]
        assert (body["id"], body["model"]) == (row["response_id"], row["model"])
        assert isinstance(body["created"], int)
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert body["usage"][name] == row[name]
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == row["cached_tokens"]
        if raw:
            assert body == json.loads(row["raw"])

    refused = lines(found.failures)
    assert [line["custom_id"] for line in refused] == ["k3", "k7"]
    for line in refused:
        assert line["error"]["code"] == "rejected"
        assert line["error"]["message"]
        assert line["response"]["status_code"] == 422
        assert isinstance(line["response"]["body"], dict)


def test_the_position_stands_for_an_id(service: Simulator, tmp_path: Path) -> None:
    """Where the job names no id, or a row has none, custom_id is the position; other types become text."""
    (tmp_path / "a").mkdir()
    found = export(made(tmp_path / "a", service.url, pa.table({"text": texts()})), "openai-batch")
    assert [line["custom_id"] for line in lines(found.answers)] == [str(row) for row in range(ROWS)]
    assert found.failures is None
    table = pa.table({"key": [None, *(row / 2 for row in range(1, ROWS))], "text": texts()})
    found = export(made(tmp_path, service.url, table, {"input": {"id": "key"}}), "openai-batch")
    assert [line["custom_id"] for line in lines(found.answers)][:3] == ["0", "0.5", "1.0"]


def test_all_choices_and_completions(service: Simulator, tmp_path: Path) -> None:
    """With n above 1 every choice is there; a completion has its own shape."""
    (tmp_path / "n").mkdir()
    table = pa.table({"text": texts()})
    output = made(tmp_path / "n", service.url, table, {"request": {"n": 3}})
    for line in lines(export(output, "openai-batch").answers):
        choices = line["response"]["body"]["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert all(choice["message"]["content"] for choice in choices)
    request = {"endpoint": "completions", "model": "gpt-oss-120b", "prompt": "{{ text }}", "max_tokens": 20}
    (tmp_path / "job").mkdir()
    output = made(tmp_path / "job", service.url, table, {"request": request | {"max_completion_tokens": None}})
    for line in lines(export(output, "openai-batch").answers):
        assert line["response"]["body"]["object"] == "text_completion"
        assert line["response"]["body"]["choices"][0]["text"]


def test_log_probabilities_and_tokens_take_their_endpoint_s_form(service: Simulator, tmp_path: Path) -> None:
    """From the columns, as the service would have sent them: the same answers with `raw` are exported as they came."""
    table = pa.table({"text": texts()})
    chat: dict[str, object] = {
        "logprobs": True,
        "top_logprobs": 2,
        "reasoning_format": "parsed",
        "reasoning_effort": "high",
        "n": 2,
    }
    completions = {
        "endpoint": "completions",
        "prompt": "Say {{ text }}",
        "max_completion_tokens": None,
        "max_tokens": 9,
    }
    requests: list[dict[str, object]] = [
        chat,
        {**completions, "logprobs": 2},
        {**completions, "return_raw_tokens": True},
    ]
    for number, request in enumerate(requests):
        found = []
        for raw in (False, True):
            (folder := tmp_path / f"{number}{raw}").mkdir()
            output = made(folder, service.url, table, {"request": {**request, "seed": 7}, "output": {"raw": raw}})
            found.append(
                [line["response"]["body"]["choices"] for line in lines(export(output, "openai-batch").answers)]
            )
        parts, came = ([[comparable(each) for each in choices] for choices in choices] for choices in found)
        assert parts == came


def comparable(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without what is null, and without the role that all have."""
    message = {name: member for name, member in choice.pop("message", {}).items() if member and name != "role"}
    choice |= {"message": message} if message else {}
    for name in ("logprobs", "reasoning_logprobs"):
        if choice.get(name):
            choice[name] = {key: value for key, value in choice[name].items() if value is not None}
    return {name: member for name, member in choice.items() if member is not None}


def test_a_row_that_was_never_sent_has_no_response(service: Simulator, tmp_path: Path) -> None:
    """Its line in the error file says why, and that nothing came."""
    table = pa.table({"text": ["a", None, "b"]})
    found = export(made(tmp_path, service.url, table), "openai-batch")
    (line,) = lines(found.failures)
    assert (line["custom_id"], line["response"], line["error"]["code"]) == ("1", None, "unsendable")
    assert "null" in line["error"]["message"]


# JSON lines


def odd() -> pa.Table:
    """A row of every type that is not obvious, and a row of nulls."""
    moment = datetime.datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=datetime.UTC)
    columns = {
        "text": pa.array(["one", "two"]),
        "when": pa.array([moment, None], pa.timestamp("ns", "Europe/Berlin")),
        "nano": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns")),
        "far": pa.array([3 * 10**11, None], pa.int64()).cast(pa.timestamp("s")),
        "day": pa.array([moment.date(), None]),
        "time": pa.array([moment.time(), None]),
        "long": pa.array([1_500_000, None], pa.duration("us")),
        "bytes": pa.array([b"\x00\xff", None]),
        "nan": pa.array([float("nan"), None]),
        "inf": pa.array([float("-inf"), None]),
        "price": pa.array([decimal.Decimal("-12.50"), None]),
        "big": pa.array([2**64 - 1, None], pa.uint64()),
        "nested": pa.array(
            [{"a": [1, None], "t": moment, "n": float("nan")}, None],
            pa.struct([("a", pa.list_(pa.int8())), ("t", pa.timestamp("ns", "UTC")), ("n", pa.float64())]),
        ),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
        "line": pa.array(["a\r\nb\u2028\x00\x1b", None]),
        "=1+1": pa.array(["=1+1", None]),
        "minus": pa.array([-1, None]),
        "flag": pa.array([True, None]),
    }
    return pa.table(columns)


def test_json_lines_hold_every_column(service: Simulator, tmp_path: Path) -> None:
    """Moments are ISO 8601, bytes base64, what is no number null, what is nested JSON; no column is left out."""
    output = made(tmp_path, service.url, odd())
    found = export(output, "jsonl")
    first, second = lines(found.answers)
    assert list(first) == stories.table(output, "responses").schema.names
    expected = {
        "when": "2024-02-29T23:59:59.123456000Z",
        "nano": "2023-11-14T22:13:20.123456789",
        "far": "11476-08-15T05:20:00.000",
        "day": "2024-02-29",
        "time": "23:59:59.123456",
        "long": 1.5,
        "bytes": "AP8=",
        "nan": None,
        "inf": None,
        "price": -12.5,
        "big": 2**64 - 1,
        "nested": {"a": [1, None], "t": "2024-02-29T23:59:59.123456Z", "n": None},
        "map": [["k", 1]],
        "line": "a\r\nb\u2028\x00\x1b",
        "=1+1": "=1+1",
        "minus": -1,
        "flag": True,
    }
    assert {name: first[name] for name in expected} == expected
    assert all(second[name] is None for name in odd().schema.names if name != "text")
    assert b"-12.50" in found.answers.read_bytes()
    assert datetime.datetime.fromisoformat(first["started_at"]).tzinfo is not None


def test_failures_go_to_a_second_file(service: Simulator, tmp_path: Path) -> None:
    """The rows without an answer, with all columns; together the files hold every row once."""
    output = made(tmp_path, service.url, pa.table({"text": texts(0, 11)}))
    found = export(output, "jsonl", tmp_path / "elsewhere.ndjson")
    assert found.failures == tmp_path / "elsewhere.failures.ndjson"
    failed = lines(found.failures)
    assert [row["row"] for row in failed] == [0, 11]
    assert [row["kind"] for row in failed] == ["rejected", "rejected"]
    assert sorted(row["row"] for row in failed + lines(found.answers)) == list(range(ROWS))


# CSV


def test_csv_is_read_back_by_everybody(service: Simulator, tmp_path: Path) -> None:
    """Header, CRLF, quotes where they are needed; texts come back as they were, numbers as numbers."""
    output = made(tmp_path, service.url, odd())
    found = export(output, "csv")
    first, second = cells(found.answers)
    assert first["response"] == harmless(str(stories.column(output, "responses", "response")[0]))
    expected = {
        "minus": "-1",
        "price": "-12.50",
        "nan": "",
        "inf": "",
        "flag": "true",
        "'=1+1": "'=1+1",
        "map": '[["k",1]]',
        "nested": '{"a":[1,null],"t":"2024-02-29T23:59:59.123456Z","n":null}',
        "line": "a\r\nb\u2028\ufffd\x1b",
        "bytes": "AP8=",
    }
    assert {name: first[name] for name in expected} == expected
    assert second["minus"] == second["line"] == ""
    data = found.answers.read_bytes()
    assert data.endswith(b"\r\n")
    assert b"\0" not in data
    import pandas

    assert pandas.read_csv(found.answers)["minus"][0] == -1


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n1",
        "\tx",
        "  =1",
        "\u00a0=1",
        "\u200b=1",
        "\ufeff@x",
        "\0=1",
        "\x1f-1",
        "＝1+1",
        "＋1",
        "－1",
        "＠x",
        "﹣1",
        "⁼1",
        "−1",
        "\u202e=1",
    ],
)
def test_what_a_spreadsheet_would_run_is_made_a_text(text: str) -> None:
    """An apostrophe goes before it, also where the sign hides behind what spreadsheets trim."""
    assert harmless(text) == "'" + text.replace("\0", "\ufffd")


@given(st.text())
@example("")
@example("a=1")
@example("1-2")
@example("'=1")
@example("é+")
def test_other_texts_stay(text: str) -> None:
    """Only an apostrophe is ever added, and only before what could be run; NUL is all that is replaced."""
    made_harmless = harmless(text)
    assert made_harmless.removeprefix("'") == text.replace("\0", "\ufffd").removeprefix("'")
    visible = [sign for sign in text if not (sign.isspace() or unicodedata.category(sign) in ("Cc", "Cf"))]
    if visible and visible[0].isalnum() and text[0] == visible[0]:
        assert made_harmless == text.replace("\0", "\ufffd")
    assert not made_harmless.lstrip().startswith(("=", "+", "-", "@"))


# The files


def test_nothing_is_overwritten(service: Simulator, tmp_path: Path) -> None:
    """A file that is there stays, the one with the failures too, and the message says what to do."""
    output = made(tmp_path, service.url, pa.table({"text": texts(1)}))
    for name in ("out.csv", "out.failures.csv"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(JobError, match=rf"{name} is there already\nmove it away"):
            export(output, "csv")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    export(output, "csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("out", "out.csv", "out.failures.csv", "rows.parquet"),
    ]


def test_what_cannot_be_exported_is_said_in_a_line(service: Simulator, tmp_path: Path) -> None:
    """No output, a damaged job, a damaged part, no folder to write to; and nothing is left behind."""
    with pytest.raises(JobError, match="no output of batcher"):
        export(tmp_path / "nowhere", "csv")
    output = made(tmp_path, service.url, pa.table({"text": texts(1)}))
    with pytest.raises(JobError, match="no such folder"):
        export(output, "csv", tmp_path / "none" / "x.csv")
    part = output / "responses" / "part-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-40])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"part-000001\.parquet: cannot be read.*\nsee batcher verify"):
        export(output, "jsonl")
    assert sorted(tmp_path.iterdir()) == before
    part.write_bytes(whole)
    (output / "job.toml").write_text("=")
    with pytest.raises(JobError, match="is damaged"):
        export(output, "jsonl")


def test_rows_without_an_outcome_are_counted(service: Simulator, tmp_path: Path) -> None:
    """What a run that was cut short left is exported, and how many are missing is said; none is made up."""
    output = made(tmp_path, service.url, pa.table({"text": texts()}))
    summary = json.loads((output / "summary.json").read_text())
    (output / "summary.json").write_text(json.dumps(summary | {"selected": ROWS + 30, "pending": 30}))
    assert export(output, "csv").pending == 30
    (output / "summary.json").unlink()
    assert export(output, "jsonl").pending is None


def test_an_export_may_go_beside_a_run(tmp_path: Path) -> None:
    """While a run publishes, each export holds rows in order, each at most once, and the last one all of them."""
    rows = 160
    stories.write_jsonl(tmp_path / "rows.jsonl", rows)
    with stories.service(latency=0.04) as service:
        job = stories.write_job(tmp_path, service.url, rows_per_part=20, in_flight=8)
        with subprocess.Popen(
            stories.command("run", str(job), "--quiet"), env=stories.environment(), stdout=subprocess.DEVNULL
        ) as process:
            counts: list[int] = []
            while process.poll() is None:
                if not (tmp_path / "out" / "job.toml").exists():
                    continue
                found = export(tmp_path / "out", "jsonl", tmp_path / f"{len(counts)}.jsonl")
                exported = [row["row"] for row in lines(found.answers)]
                assert exported == sorted(set(exported))
                counts.append(found.answered)
            assert process.returncode == 0
    assert counts == sorted(counts)
    assert export(tmp_path / "out", "jsonl").answered == rows


def test_the_command_says_what_it_wrote(service: Simulator, tmp_path: Path) -> None:
    """The files and their rows on standard output; what is missing on standard error."""
    output = made(tmp_path, service.url, pa.table({"text": texts(2)}))
    summary = json.loads((output / "summary.json").read_text())
    (output / "summary.json").write_text(json.dumps(summary | {"selected": ROWS + 1}))
    ended = subprocess.run(
        stories.command("export", "out", "--to", "csv"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "batcher: 1 rows are pending: not exported\n")
    assert ended.stdout == f"out.csv: {ROWS - 1} rows answered\nout.failures.csv: 1 rows failed\n"
    assert os.stat(tmp_path / "out.csv").st_mode & 0o600 == 0o600


def test_the_raw_answer_stays_to_the_letter(service: Simulator, tmp_path: Path) -> None:
    """A raw answer is put on one line and not written anew: long numbers keep their digits; a broken one gives way."""
    output = made(tmp_path, service.url, pa.table({"text": ["a", "b", "c"]}), {"output": {"raw": True}})
    part = output / "responses" / "part-000000.parquet"
    table = pq.read_table(part)
    bodies = ['{\n "choices": [],\n "n": 123456789012345678901234567890.10}', "{broken", "[1]"]
    table = table.set_column(table.schema.names.index("raw"), table.schema.field("raw"), pa.array(bodies))
    pq.write_table(table, part)
    found = export(output, "openai-batch")
    first, second, third = found.answers.read_bytes().splitlines()
    assert b'"body":{"choices":[],"n":123456789012345678901234567890.10}' in first
    for line in (second, third):
        assert msgspec.json.decode(line)["response"]["body"]["choices"][0]["message"]["content"]
