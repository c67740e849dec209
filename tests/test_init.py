"""A first job: whatever the input, the file that is written is one that plan accepts as it stands."""

import json
import os
import pty
import re
import select
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batcher import cli
from batcher.errors import JobError
from batcher.init import MODEL, Answers, default_target, look, prompt_of, write
from batcher.job import load
from batcher.plan import plan
from tests import stories

TICKETS = Path(__file__).parent.parent / "jobs" / "tickets.jsonl"


def jsonl(path: Path, *rows: dict[str, object]) -> Path:
    """An input of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begun(path: Path, target: Path) -> Path:
    """The job file that is written for an input when nothing is said."""
    seen = look(str(path), target.parent)
    write(seen, Answers(prompt_of(seen, seen.prompt), None, MODEL, seen.id, "simulator"), target)
    return target


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Ended]


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """The command, called in a folder of its own where nobody can answer a question."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(["init", *words])
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capfd.readouterr())

    return call


INPUTS: dict[str, tuple[dict[str, object], str]] = {
    "one column": ({"text": "tea"}, "{{ text }}"),
    "the telling name": ({"title": "a much longer text than the other", "question": "why?"}, "{{ question }}"),
    "the longest text": ({"a": "x", "b": "something to read", "ticket_id": "T-1"}, "{{ b }}"),
    "no text": ({"n": 1, "x": 2.5}, "n: {{ n }}\nx: {{ x }}"),
    "one number": ({"n": 1}, "n: {{ n }}"),
    "nested": ({"tags": ["a"], "of": {"b": 1}}, "tags: {{ tags | tojson }}\nof: {{ of | tojson }}"),
    "odd names": (
        {
            "a.b": "x",
            "a b": "x",
            'say "hi"': "x",
            "it's": "x",
            "{{ x }}": "x",
            "#": "x",
            "\n": "x",
            "\u202e": "x",
            "t": "y",
        },
        "{{ t }}",
    ),
    "words of Jinja": (
        {"if": "long " * 9, "true": "long " * 9, "None": "long " * 9, "not": "x", "loop": "y"},
        "{{ if }}",
    ),
    "functions of Jinja": ({"range": "some"}, "{{ range }}"),
    "our own names": ({"row": 1, "response": "yes", "id": 5}, "{{ response }}"),
    "many columns": ({f"column_{n}": n for n in range(200)} | {"words": "x"}, "{{ words }}"),
    "other letters": ({"größe": "klein"}, "{{ größe }}"),
    "a wild value": ({"text": "\x1b[2J\u202e\n\r\0" + "x" * 500}, "{{ text }}"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_plan_accepts_what_is_written(tmp_path: Path, name: str) -> None:
    """The prompt is made of the column that has most to read, and the plan has nothing to refuse."""
    row, prompt = INPUTS[name]
    job = load(begun(jsonl(tmp_path / "rows.jsonl", row, row), tmp_path / "rows.toml"))
    made = plan(job)
    assert (made.rows, made.unsendable, made.refusal) == (2, (), None)
    assert made.body is not None
    assert job.request.parameters["messages"] == [{"role": "user", "content": prompt}]
    text = (tmp_path / "rows.toml").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())


def test_plan_accepts_a_parquet_input(tmp_path: Path) -> None:
    """Of types that JSON has not, the texts among them found."""
    columns: dict[str, pa.Array] = {
        "key": pa.array([b"\x00"]),
        "when": pa.array([0], pa.timestamp("ns", "UTC")),
        "price": pa.array(["1.50"]).cast(pa.decimal128(5, 2)),
        "pair": pa.array([{"a": 1}]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    job = load(begun(tmp_path / "a.parquet", tmp_path / "a.toml"))
    made = plan(job)
    assert made.unsendable == ()
    assert made.body is not None
    assert "when: 1970-01-01" in made.body.decode()
    pq.write_table(pa.table({**columns, "words": pa.array(["some"], pa.large_string())}), tmp_path / "b.parquet")
    assert '"some"' in (plan(load(begun(tmp_path / "b.parquet", tmp_path / "b.toml"))).body or b"").decode()


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=5), max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_columns_are_called(tmp_path: Path, row: dict[str, str]) -> None:
    """The job is sound, or a line says that no column can be named."""
    path = jsonl(tmp_path / "rows.jsonl", row | {"a-b": 1})
    target = tmp_path / "rows.toml"
    target.unlink(missing_ok=True)
    if look(str(path), tmp_path).usable:
        assert plan(load(begun(path, target))).refusal is None
        return
    with pytest.raises(JobError, match="no column of the input has a name that a template can use"):
        begun(path, target)
    assert not target.exists()


def test_every_key_that_is_offered_is_one(tmp_path: Path) -> None:
    """Each commented key, put in force, makes a job that is sound."""
    text = begun(TICKETS, tmp_path / "job.toml").read_text(encoding="utf-8")
    offered = re.findall(r"^# (\w+) = (.*)$", text, re.M)
    assert {"limit", "system", "temperature", "response_format", "base_url", "max_in_flight", "keep"} <= dict(
        offered
    ).keys()
    (tmp_path / "answer.schema.json").write_text('{"type": "object", "properties": {"a": {"type": "string"}}}')
    for key, value in offered:
        whole = re.sub(rf"^{key} = .*\n", "", text, flags=re.M).replace(f"# {key} = {value}", f"{key} = {value}")
        (tmp_path / "other.toml").write_text(whole, encoding="utf-8")
        assert key in load(tmp_path / "other.toml").document().decode()


def test_flags_say_it_all(tmp_path: Path, called: Call) -> None:
    """Each flag goes into the job, paths start from the job file, and the next command is printed."""
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "rows.jsonl", {"a": "x", "b": "y", "k": 1})
    ended = called(
        *("rows.jsonl", "--column", "a", "--column", "b", "--system", "Be short.", "--model", "m", "--id", "k"),
        *("--base-url", "http://localhost:9/v1", "--output", "sub/my job.toml"),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "sub/my job.toml is written\nbatcher plan 'sub/my job.toml'\n"
    document = tomllib.loads((tmp_path / "sub" / "my job.toml").read_text())
    assert document["name"] == "my job"
    assert document["input"] == {"path": "../rows.jsonl", "id": "k"}
    assert document["request"] == {
        "model": "m",
        "system": "Be short.",
        "prompt": "a: {{ a }}\nb: {{ b }}",
        "max_completion_tokens": 1024,
    }
    assert document["service"] == {"base_url": "http://localhost:9/v1"}
    assert plan(load(tmp_path / "sub" / "my job.toml")).rows == 1


def test_nothing_is_asked_without_a_terminal_and_nothing_overwritten(tmp_path: Path, called: Call) -> None:
    """The defaults are taken; a job file that is there stays."""
    jsonl(tmp_path / "rows.jsonl", {"a": "x"})
    ended = called("rows.jsonl")
    assert ended.returncode == 0
    written = (tmp_path / "rows.toml").read_text()
    ended = called("rows.jsonl", "--prompt", "other")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("batcher: rows.toml is there already\n")
    assert (tmp_path / "rows.toml").read_text() == written


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    """The new job names a folder of its own."""
    jsonl(tmp_path / "rows.jsonl", {"a": "x"})
    (tmp_path / "out" / "rows").mkdir(parents=True)
    assert load(begun(tmp_path / "rows.jsonl", tmp_path / "rows.toml")).output.path == "out/rows-2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name the input"),
        (("nowhere.jsonl",), "'nowhere.jsonl' does not exist"),
        (("rows.jsonl", "--column", "c"), "no column 'c' in the input; its columns are 'a', 'x y'"),
        (("rows.jsonl", "--column", "x y"), "no template can name the column 'x y'"),
        (("rows.jsonl", "--prompt", "{{ c }}"), "no column 'c'"),
        (("rows.jsonl", "--prompt", "{{ a"), "not a Jinja template"),
        (("rows.jsonl", "--prompt", "p", "--column", "a"), "not both"),
        (("rows.jsonl", "--id", "c"), "no column 'c'"),
        (("rows.jsonl", "--base-url", "ftp://x"), "service.base_url"),
        (("rows.jsonl", "--model", ""), "request.model"),
        (("empty.jsonl",), "no column of the input"),
    ],
)
def test_what_cannot_be_is_said_before_a_file_is_written(
    tmp_path: Path, called: Call, words: tuple[str, ...], said: str
) -> None:
    """Exit code 2, a line or two, and no job file."""
    jsonl(tmp_path / "rows.jsonl", {"a": "x", "x y": "z"})
    jsonl(tmp_path / "empty.jsonl")
    ended = called(*words)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) <= 2
    assert not list(tmp_path.glob("*.toml"))


def test_a_few_questions_on_a_terminal(tmp_path: Path) -> None:
    """What no flag says is asked, Enter takes the default."""
    jsonl(tmp_path / "rows.jsonl", {"title": "x", "text": "y", "row_id": 1})
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        stories.command("init", "--model", "m"),
        cwd=tmp_path,
        env=stories.environment(TERM="dumb"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        for question, typed in (
            (b"folder or a glob)", b"rows.jsonl"),
            (b"Columns to show the model [text]", b"title, text"),
            (b"for nothing)", b"Be kind."),
            (b"ids [row_id]", b""),
            (b"Service [simulator]", b""),
        ):
            while question not in shown:
                assert select.select([ours], [], [], 30)[0], shown
                shown += os.read(ours, 1024)
            os.write(ours, typed + b"\n")
        while True:
            try:
                shown += os.read(ours, 1024)
            except OSError:
                break
        assert process.wait(30) == 0
    os.close(ours)
    assert b"Model" not in shown.replace(b"the model", b"")
    assert b"batcher plan rows.toml" in shown
    document: dict[str, Any] = tomllib.loads((tmp_path / "rows.toml").read_text())
    assert document["input"]["id"] == "row_id"
    assert document["request"]["prompt"] == "title: {{ title }}\ntext: {{ text }}"
    assert document["request"]["system"] == "Be kind."


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("a/rows.jsonl.gz", "rows.toml"),
        ("data/", "data.toml"),
        ("*.jsonl", "job.toml"),
        ("s3://bucket/x.parquet", "x.toml"),
    ],
)
def test_the_job_is_named_after_its_input(path: str, target: str) -> None:
    """In the caller's folder."""
    assert default_target(path) == Path(target)


def test_a_batch_file_is_sent_as_it_is(called: Call, tmp_path: Path) -> None:
    """A batch file becomes a job without [request]; with a prompt its rows are columns like others."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    jsonl(tmp_path / "asked.jsonl", {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    assert called("asked.jsonl").returncode == 0
    job = load(tmp_path / "asked.toml")
    assert (job.input.format, job.input.id, job.request.endpoint) == ("openai-batch", "custom_id", None)
    assert plan(job).rows == 1
    assert called("asked.jsonl", "--prompt", "{{ body }}", "--output", "other.toml").returncode == 0
    assert load(tmp_path / "other.toml").request.endpoint == "chat"
