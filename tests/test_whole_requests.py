"""Rows that hold their request whole, from the file to the service and into the output."""

import json
from pathlib import Path

import msgspec
import pytest

import batcher
from batcher.errors import JobError
from batcher.job import load
from batcher.plan import plan, render
from batcher.verify import verify
from tests import stories


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


def chat(text: str, **more: object) -> dict[str, object]:
    """A chat request."""
    return {"model": "gpt-oss-120b", "messages": [{"role": "user", "content": text}], **more}


def job(folder: Path, url: str, lines: list[object], **request: object) -> Path:
    """A job over such lines of JSONL that sends the column `body`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parameters = {"model": None, "prompt": None, "max_completion_tokens": None}
    return stories.write_job(
        folder,
        url,
        more={"request": {**parameters, "body": "{{ body }}", **request}, "output": {"keep": []}},
    )


def test_a_column_of_requests_is_asked(tmp_path: Path) -> None:
    """Objects and JSON texts, each with its own parameters; what is no request fails its own row."""
    lines: list[object] = [
        {"key": "a", "body": chat("one", max_tokens=7)},
        {"key": "b", "body": json.dumps(chat("two", n=2))},
        {"key": "c", "body": chat("three", temperature=9)},
        {"key": "d", "body": None},
    ]
    with stories.service() as service:
        path = job(tmp_path, service.url, lines)
        shown = render(plan(load(path)))
        assert f"POST {service.url}/chat/completions" in shown
        assert json.dumps(chat("one", max_tokens=7), separators=(",", ":")) in shown
        assert "2 of all rows cannot become requests, the first is row 2: request.body: temperature" in shown
        result = batcher.run(load(path))
    assert sorted(entry.prompt for entry in service.book) == ["one", "two"]
    assert result.table().select(["id", "row"]).to_pylist() == [{"id": "a", "row": 0}, {"id": "b", "row": 1}]
    assert [len(choices) for choices in result.table()["choices"].to_pylist()] == [1, 2]
    assert result.failures()["kind"].to_pylist() == ["unsendable", "unsendable"]
    assert verify(tmp_path / "out").problems == []


def test_completions_may_be_whole_requests_too(tmp_path: Path) -> None:
    """The endpoint of the job is that of all its rows."""
    with stories.service() as service:
        lines: list[object] = [{"key": "a", "body": {"model": "gpt-oss-120b", "prompt": "Once", "max_tokens": 5}}]
        path = job(tmp_path, service.url, lines, endpoint="completions")
        result = batcher.run(load(path))
        assert [entry.path for entry in service.book] == ["/v1/completions"]
    assert result.table()["response"].to_pylist() != [None]


# OpenAI batch files


def line(name: str, body: object, url: str = "/v1/chat/completions") -> str:
    """A line of a batch file."""
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n"


def batch(folder: Path, url: str, lines: list[str], **given: object) -> Path:
    """A job over such a batch file, which needs no `[request]`."""
    (folder / "batch.jsonl").write_text("".join(lines))
    path = folder / "job.toml"
    source = {"path": "batch.jsonl", "format": "openai-batch", **given}
    service = {"base_url": url, "api_key_env": "STORY_KEY", "dialect": "cerebras"}
    sections = {"input": source, "service": service, "output": {"path": "out", "rows_per_part": 500}}
    path.write_bytes(msgspec.toml.encode(sections))
    return path


def test_a_batch_file_is_asked_as_it_is(tmp_path: Path) -> None:
    """Each line goes where its url says, and is found again by its id."""
    lines = [
        line("first", chat("one")),
        "\n",
        line("second", {"model": "gpt-oss-120b", "prompt": "Once"}, "/v1/completions"),
        "{broken\n",
    ]
    with stories.service() as service:
        path = batch(tmp_path, service.url, lines)
        result = batcher.run(load(path))
        assert sorted(entry.path for entry in service.book) == ["/v1/chat/completions", "/v1/completions"]
    assert result.table()["id"].to_pylist() == ["first", "second"]
    assert result.failures()["kind"].to_pylist() == ["bad_input"]
    assert verify(tmp_path / "out").problems == []


def test_a_url_that_is_not_served_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    """With file and line, by `plan` and by `run`; a condition may pass over it."""
    lines = [line("a", chat("one")), "\n", line("b", {"input": "x"}, "/v1/embeddings"), line("c", chat("two"))]
    said = "job.toml: input: line 3 of batch.jsonl: url: /v1/chat/completions or /v1/completions, not '/v1/embeddings'"
    with stories.service() as service:
        path = batch(tmp_path, service.url, lines)
        for act in (plan, batcher.run):
            with pytest.raises(JobError) as refused:
                act(load(path))
            assert str(refused.value) == said
        assert service.book == []
        path = batch(tmp_path, service.url, lines, where="url like '%/chat/completions'")
        path.write_text(path.read_text().replace('"out"', '"elsewhere"'))
        assert batcher.run(load(path)).table()["id"].to_pylist() == ["a", "c"]


def test_a_url_that_is_not_served_and_comes_late_fails_its_row(tmp_path: Path) -> None:
    """Only the first thousand rows are looked at before."""
    lines = [line(f"r{number}", chat("one")) for number in range(1000)]
    with stories.service(latency=0.001) as service:
        path = batch(tmp_path, service.url, [*lines, line("late", {"input": "x"}, "/v1/embeddings")])
        result = batcher.run(load(path))
    assert result.table().num_rows == 1000
    assert result.failures().select(["id", "kind"]).to_pylist() == [{"id": "late", "kind": "unsendable"}]
