"""Whatever a service answers, from its bytes to the columns: no traceback, no lost row, no lost part of a cell."""

import json
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batcher
from batcher.dialects import cerebras, openai
from batcher.engine.prepared import fillable
from batcher.job import RequestTemplate
from batcher.records import Answer, Attempt, Choice, Failure, Kind, Outcome, Reply, Timing
from batcher.sink import FILLABLE, Shape
from batcher.verify import verify
from tests import mutated, stories
from tests.test_sink import Output, attempt

WHOLE = Shape(pa.schema([]), None, (), None, frozenset(FILLABLE), True)
EVERY = [*mutated.ANSWERS, *mutated.ERRORS, *mutated.REFUSALS]


def held(value: Any) -> Any:
    """A value of an answer as a column can hold it: lone surrogates replaced, numbers beyond 32 bits gone."""
    if isinstance(value, str):
        return stories.storable(value)
    if isinstance(value, int):
        return value if -(2**31) <= value < 2**31 else None
    if isinstance(value, list | tuple):
        return [held(each) for each in value]
    return {name: held(each) for name, each in value.items()} if isinstance(value, dict) else value


def members(choice: Choice) -> dict[str, Any]:
    """A choice as a reader of the output should find it."""
    found: dict[str, Any] = held(msgspec.to_builtins(choice))
    for name in ("logprobs", "reasoning_logprobs"):
        for token in found[name] or ():
            for each in (token, *(token["top_logprobs"] or ())):
                each["bytes"] = None if each["bytes"] is None else bytes(each["bytes"])
    return found


def check_nothing_is_lost(body: bytes, answer: Answer) -> None:
    """Texts, calls, tokens and probabilities that stand in a body, where they belong, are in the answer."""
    wire = json.loads(body.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
    assert len(answer.choices) == len(wire["choices"])
    texts: list[str] = []
    for choice in wire["choices"]:
        assert isinstance(choice, dict)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        texts += [text] if isinstance(text, str) else []
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list) and calls:
            assert len(calls) in {len(read.tool_calls or ()) for read in answer.choices}
        for name in ("logprobs", "reasoning_logprobs"):
            told = choice.get(name)
            if isinstance(told, dict) and isinstance(told.get("content"), list):
                assert any(len(told["content"]) <= len(getattr(read, name) or ()) for read in answer.choices)
        if isinstance(choice.get("tokens"), list):
            assert len(choice["tokens"]) in {len(read.tokens or ()) for read in answer.choices}
    assert all(text in [read.text for read in answer.choices] for text in texts)


@settings(max_examples=125, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_mutated_answers_come_whole_into_the_columns(luck: random.Random) -> None:
    """500, by fours: an answer has every part in its cell, a failure is of a known kind and keeps each byte."""
    bodies = [mutated.mutated(luck, EVERY) for _ in range(4)]
    judged = [cerebras.read(Reply(200, {}, body, Timing(0, 0.0))) for body in bodies]
    recorded = [attempt(0)]
    for row, (body, found) in enumerate(zip(bodies, judged, strict=True), 1):
        assert type(openai.read(Reply(200, {}, body, Timing(0, 0.0)))) is type(found)
        if isinstance(found, Answer):
            check_nothing_is_lost(body, found)
            recorded.append(attempt(row, body=body))
        else:
            assert isinstance(found.kind, Kind)
            told = {name: getattr(found, name) for name in ("kind", "status", "type", "code", "message", "paid")}
            recorded.append(attempt(row, outcome=Outcome.FAILED, body=body, **told))
            msgspec.msgpack.decode(msgspec.msgpack.encode(recorded[-1]), type=Attempt)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        output = Output(Path(folder), WHOLE)
        output.publish([*recorded, attempt(5)], range(6))
        rows = {row["row"]: row for name in ("responses", "failures") for row in output.rows(name)}
    assert sorted(rows) == list(range(6))
    assert [(rows[row]["response"], rows[row]["altered"]) for row in (0, 5)] == [
        ("answer 0.1", False),
        ("answer 5.1", False),
    ]
    for at, (body, found) in enumerate(zip(bodies, judged, strict=True), 1):
        if isinstance(found, Failure):
            assert (rows[at]["kind"], rows[at]["body"]) == (found.kind.value, body)
        else:
            check_columns(rows[at], body, found)


def check_columns(row: dict[str, Any], body: bytes, answer: Answer) -> None:
    """Each cell holds what the answer says, and where it cannot, the row says so."""
    choices = [members(choice) for choice in answer.choices]
    assert row["choices"] == choices
    first = {"response": choices[0]["text"], **choices[0]}
    for name in ("response", "reasoning", "finish_reason", *FILLABLE):
        assert name == "choices" or row[name] == first[name]
    usage = msgspec.structs.asdict(answer.usage)
    assert {name: row[name] for name in usage} == usage
    assert row["raw"] == stories.storable(body.decode("utf-8", "surrogateescape"))
    told = json.loads(json.dumps(msgspec.to_builtins(answer.choices)))
    assert row["altered"] or told == held(told)


@pytest.mark.parametrize("status", [200, 400, 401, 429, 498, 500, 503])
@settings(max_examples=75, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_mutated_refusal_has_a_kind(status: int, luck: random.Random) -> None:
    """Whatever its body: a known kind, words that can be written down, and a wait that ends."""
    found = cerebras.refusal(Reply(status, {}, mutated.mutated(luck, EVERY), Timing(0, 0.0)))
    assert isinstance(found.kind, Kind)
    assert "".join((found.message, found.type or "", found.code or "")).encode()
    assert found.retry_after is None or 0 <= found.retry_after <= 32 * 86400


@pytest.mark.parametrize("base", EVERY)
def test_what_is_mutated_was_whole(base: dict[str, Any]) -> None:
    """Each of the answers is one, and each of the others none, when nothing is wrong with it."""
    body = json.dumps(base).encode()
    found = cerebras.read(Reply(200, {}, body, Timing(0, 0.0)))
    assert isinstance(found, Answer) == (base in mutated.ANSWERS)
    if isinstance(found, Answer):
        check_nothing_is_lost(body, found)


SEVERAL = {"choices"}
LIKELY = {"logprobs", "reasoning_logprobs"}


@pytest.mark.parametrize(
    ("endpoint", "parameters", "columns"),
    [
        ("chat", {}, set()),
        ("chat", {"n": 1, "tools": [], "logprobs": False, "response_format": None}, set()),
        ("chat", {"n": 3}, SEVERAL),
        ("chat", {"n": "{{ n }}"}, SEVERAL),
        ("chat", {"tools": [{"type": "function"}]}, {"tool_calls"}),
        ("chat", {"tools": "{{ tools }}"}, {"tool_calls"}),
        ("chat", {"logprobs": True}, LIKELY),
        ("chat", {"logprobs": "{{ wanted }}", "reasoning_format": "{{ form }}"}, LIKELY),
        ("chat", {"logprobs": True, "reasoning_format": "parsed"}, LIKELY),
        ("chat", {"logprobs": True, "reasoning_format": "text_parsed"}, {"logprobs"}),
        ("chat", {"response_format": {"type": "json_schema"}}, {"refusal"}),
        ("completions", {"prompt": "Once", "logprobs": 0}, {"logprobs"}),
        ("completions", {"prompt": "Once", "logprobs": False}, set()),
        ("completions", {"prompt": "Once", "return_raw_tokens": True}, {"tokens"}),
        ("completions", {"prompt": "Say {{ text }}"}, set()),
        ("completions", {"prompt": "{{ a }}{{ b }}"}, set()),
        ("completions", {"prompt": " {{ prompts }} "}, SEVERAL),
        ("completions", {"prompt": ["one", "two"]}, SEVERAL),
        ("completions", {"prompt": ["one"]}, set()),
        ("completions", {"prompt": [1, 2, 3]}, set()),
        ("completions", {"prompt": [[1, 2], [3]]}, SEVERAL),
    ],
)
def test_a_job_has_the_columns_that_it_can_fill(
    endpoint: Any, parameters: dict[str, object], columns: set[str]
) -> None:
    """Decided before the first request: by what is asked for, and where each row says it, by what it may ask for."""
    assert fillable(RequestTemplate(endpoint=endpoint, parameters=parameters)) == columns


def test_what_may_ask_for_anything_has_all_columns() -> None:
    """Whole requests may; answers by a schema may be refused."""
    whole = RequestTemplate(endpoint=None, parameters={}, body="{{ body }}")
    assert fillable(whole) == set(FILLABLE)
    assert fillable(RequestTemplate(endpoint="chat", parameters={}, schema={"type": "object"})) == {"refusal"}


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("request_", "columns"),
    [
        ({"tools": [WEATHER], "tool_choice": "required"}, {"tool_calls"}),
        (
            {"logprobs": True, "top_logprobs": 3, "reasoning_format": "parsed", "n": 2, "reasoning_effort": "high"},
            LIKELY | SEVERAL,
        ),
        ({"logprobs": True, "top_logprobs": 2, "reasoning_format": "text_parsed", "stream": True}, {"logprobs"}),
        (
            {"endpoint": "completions", "prompt": ["{{ text }}", "b", "c"], "return_raw_tokens": True},
            SEVERAL | {"tokens"},
        ),
        ({"endpoint": "completions", "prompt": "Say {{ text }}", "logprobs": 2, "echo": True}, {"logprobs"}),
    ],
)
def test_columns_hold_what_a_service_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict[str, object], columns: set[str]
) -> None:
    """A job's own parameters, a service over HTTP, and typed columns that say the same as the whole answer does."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    stories.write_jsonl(tmp_path / "rows.jsonl", 5)
    changes = {**request_, "max_completion_tokens": None, "max_tokens": 40} if "endpoint" in request_ else request_
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, more={"request": changes, "output": {"raw": True}})
        result = batcher.run(batcher.load(job))
    rows = result.table().to_pylist()
    assert len(rows) == 5
    assert {name for name in FILLABLE if name in rows[0]} == columns
    for row in rows:
        sent = json.loads(row["raw"])["choices"]
        assert len(row.get("choices", sent)) == len(sent)
        for name in columns - SEVERAL:
            assert row[name], name
            assert all(name not in choice or choice[name] for choice in row.get("choices", ()))
        message = sent[0].get("message", {})
        calls = [{"id": call["id"], "type": call["type"], **call["function"]} for call in message.get("tool_calls", ())]
        assert row.get("tool_calls", []) == calls
        assert row.get("tokens") == sent[0].get("tokens") or "tokens" not in columns
        for name in columns & LIKELY:
            told = sent[0][name]
            if "content" in told:
                assert [(each["token"], each["logprob"], list(each["bytes"])) for each in row[name]] == [
                    (each["token"], each["logprob"], each["bytes"]) for each in told["content"]
                ]
                assert [len(each["top_logprobs"]) for each in row[name]] == [
                    len(each["top_logprobs"]) for each in told["content"]
                ]
            else:
                assert [(each["token"], each["logprob"], each["text_offset"]) for each in row[name]] == list(
                    zip(told["tokens"], told["token_logprobs"], told["text_offset"], strict=True)
                )
    assert verify(tmp_path / "out").problems == []


@contextmanager
def serving(bodies: list[bytes]) -> Iterator[str]:
    """A service that gives each row the body of its number, with status 200."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["content-length"]))
            body = bodies[int(asked.partition(b"[row ")[2][:5])]
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_over_mutated_answers_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 rows, each with a broken answer: every one ends in one place, with what its answer said or why it is none."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    luck = random.Random(4)
    bodies = [mutated.mutated(luck, [*mutated.ANSWERS, *mutated.ERRORS]) for _ in range(500)]
    with (tmp_path / "rows.jsonl").open("w") as rows:
        for row in range(500):
            asked = {"model": "m", "messages": [{"role": "user", "content": stories.prompt(row)}]}
            rows.write(json.dumps({"key": f"k{row}", "body": asked}) + "\n")
    parameters = {"model": None, "prompt": None, "max_completion_tokens": None}
    with serving(bodies) as url:
        job = stories.write_job(
            tmp_path,
            url,
            more={
                "request": {**parameters, "body": "{{ body }}"},
                "retry": {"max_attempts": 1},
                "output": {"keep": [], "raw": True},
            },
        )
        result = batcher.run(batcher.load(job))
    expected = [cerebras.read(Reply(200, {}, body, Timing(0, 0.0))) for body in bodies]
    answered, failed = result.table().to_pylist(), result.failures().to_pylist()
    assert [row["row"] for row in answered] == [at for at, found in enumerate(expected) if isinstance(found, Answer)]
    assert [row["row"] for row in failed] == [at for at, found in enumerate(expected) if isinstance(found, Failure)]
    assert len(answered) > 100
    assert len(failed) > 100
    for row in answered:
        found = expected[row["row"]]
        assert isinstance(found, Answer)
        assert row["choices"] == [members(choice) for choice in found.choices]
    for row in failed:
        found = expected[row["row"]]
        assert isinstance(found, Failure)
        assert (row["kind"], row["body"]) == (found.kind.value, bodies[row["row"]])
    assert verify(tmp_path / "out").problems == []
