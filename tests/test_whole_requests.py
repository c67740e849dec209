"""Rows that hold their request whole, from the file to the service and into the output."""

import json
from pathlib import Path

import pytest

import batcher
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
        {"key": "c", "body": chat("three", stream=True)},
        {"key": "d", "body": None},
    ]
    with stories.service() as service:
        path = job(tmp_path, service.url, lines)
        shown = render(plan(load(path)))
        assert f"POST {service.url}/chat/completions" in shown
        assert json.dumps(chat("one", max_tokens=7), separators=(",", ":")) in shown
        assert "2 of all rows cannot become requests, the first is row 2: request.body: stream" in shown
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
