"""Every parameter of the API: carried by a job file, checked, and seen by a service exactly as it was given."""

import json
import threading
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

import batcher
from batcher.errors import JobError
from batcher.job import load
from batcher.parameters import CHAT, COMPLETIONS, clash, misfit
from batcher.plan import plan, render
from batcher.prompt import Composer
from batcher.records import Failure, Kind, Request, Row
from tests import stories

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL_ANSWER = {"role": "tool", "content": "7", "tool_call_id": "c1"}
TOOL = (
    '{type = "function", function = {name = "f", description = "d", strict = true, '
    'parameters = {type = "object", properties = {x = {type = "string"}}, additionalProperties = false}}}'
)
TOOL_JSON = (
    '{"type":"function","function":{"name":"f","description":"d","strict":true,'
    '"parameters":{"type":"object","properties":{"x":{"type":"string"}},"additionalProperties":false}}}'
)
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5E"
    "rkJggg=="
)


class Case(NamedTuple):
    """A parameter, in TOML and as it is sent; one bad value and what is said of it; what has to stand beside it."""

    name: str
    toml: str
    sent: str
    bad: object
    said: str
    beside: str = ""
    endpoint: str = "chat"

    def __str__(self) -> str:
        return f"{self.endpoint}-{self.name}-{self.toml}"[:60]


def either(name: str, toml: str, sent: str, bad: object, said: str, beside: str = "") -> list[Case]:
    """A parameter of both endpoints."""
    return [Case(name, toml, sent, bad, said, beside, endpoint) for endpoint in ("chat", "completions")]


def legacy(name: str, toml: str, sent: str, bad: object, said: str, beside: str = "") -> Case:
    """A parameter of completions."""
    return Case(name, toml, sent, bad, said, beside, "completions")


TOOLS = f"tools = [{TOOL}]"
CASES = [
    *either("model", '"m/1"', '"m/1"', 5, "model: a text of at least 1, not 5"),
    *either("frequency_penalty", "-2", "-2", -2.1, "frequency_penalty: a number from -2 to 2, not -2.1"),
    *either("presence_penalty", "1.0", "1.0", 2.1, "presence_penalty: a number from -2 to 2, not 2.1"),
    *either(
        "logit_bias",
        '{"50256" = -100, "7" = 0.5}',
        '{"50256":-100,"7":0.5}',
        {"7": 101},
        "logit_bias[...]: expected float <= 100.0",
    ),
    *either("logit_bias", '{"7" = 100}', '{"7":100}', {"x": 1}, "logit_bias: the keys are token ids"),
    *either("max_tokens", "7", "7", 0, "max_tokens: a whole number from 1, not 0"),
    *either("min_tokens", "-1", "-1", -2, "min_tokens: a whole number from -1, not -2", "max_tokens = 3"),
    *either("min_tokens", "0", "0", 0.5, "min_tokens: a whole number from -1, not 0.5"),
    *either("n", "3", "3", 129, "n: a whole number from 1 to 128, not 129"),
    *either("prompt_cache_key", '"k"', '"k"', "k" * 1025, "prompt_cache_key: a text of at most 1,024"),
    *either("reasoning_format", '"parsed"', '"parsed"', "deep", "reasoning_format: parsed or text_parsed or raw or"),
    *either("reasoning_format", '"raw"', '"raw"', 1, "reasoning_format: parsed or text_parsed or raw or"),
    *either("seed", "-7", "-7", 0.5, "seed: a whole number, not 0.5"),
    *either("stop", '"\\n\\n"', '"\\n\\n"', 5, "stop: a text or a list of at least 1 of at most 4, not 5"),
    *either("stop", '["a", "b", "c", "d"]', '["a","b","c","d"]', ["a"] * 5, "stop: a text or a list"),
    *either("stream", "false", "false", "yes", "stream: true or false, not 'yes'"),
    *either("stream", "true", "true", 1, "stream: true or false, not 1"),
    *either(
        "stream_options",
        "{include_usage = true}",
        '{"include_usage":true}',
        {"include_usage": 1},
        "stream_options.include_usage: expected bool",
        "stream = true",
    ),
    *either("temperature", "0", "0", 2.1, "temperature: a number from 0 to 2, not 2.1"),
    *either("temperature", "0.70", "0.7", "hot", "temperature: a number from 0 to 2, not 'hot'"),
    *either("top_p", "1", "1", 1.1, "top_p: a number from 0 to 1, not 1.1"),
    *either("top_logprobs", "20", "20", 21, "top_logprobs: a whole number from 0 to 20, not 21", "logprobs = true"),
    *either("user", '"u"', '"u"', 5, "user: a text, not 5"),
    Case("clear_thinking", "false", "false", "no", "clear_thinking: true or false, not 'no'"),
    Case("disable_reasoning", "true", "true", 1, "disable_reasoning: true or false, not 1"),
    Case("logprobs", "true", "true", 3, "logprobs: true or false, not 3"),
    Case("max_completion_tokens", "9", "9", -1, "max_completion_tokens: a whole number from 1, not -1"),
    Case(
        "min_completion_tokens",
        "-1",
        "-1",
        -2,
        "min_completion_tokens: a whole number from -1, not -2",
        "max_tokens = 3",
    ),
    Case("model_parameters", "{x = [1, 1.0]}", '{"x":[1,1.0]}', 5, "model_parameters: a table, not 5"),
    Case("parallel_tool_calls", "false", "false", 0, "parallel_tool_calls: true or false, not 0"),
    Case(
        "prediction",
        '{type = "content", content = "x"}',
        '{"type":"content","content":"x"}',
        {"type": "content"},
        "prediction.content is missing",
    ),
    Case(
        "prediction",
        '{type = "content", content = [{type = "text", text = "x"}]}',
        '{"type":"content","content":[{"type":"text","text":"x"}]}',
        {"type": "other", "content": "x"},
        "prediction.type: content, not 'other'",
    ),
    *(
        Case(
            "reasoning_effort", f'"{effort}"', f'"{effort}"', "huge", "reasoning_effort: none or low or medium or high"
        )
        for effort in ("none", "low", "medium", "high")
    ),
    Case("response_format", '{type = "text"}', '{"type":"text"}', "json", "response_format: a table, not 'json'"),
    Case(
        "response_format",
        '{type = "json_object"}',
        '{"type":"json_object"}',
        {"type": "xml"},
        "response_format.type: text, json_object or json_schema, not 'xml'",
    ),
    Case(
        "response_format",
        '{type = "json_schema", json_schema = {schema = {type = "object", '
        'properties = {a = {type = "string"}}}, name = "s"}}',
        '{"type":"json_schema","json_schema":{"schema":{"type":"object","properties":{"a":{"type":"string"}}},"name":"s"}}',
        {"type": "json_schema"},
        "response_format.json_schema is missing",
    ),
    Case("tools", f"[{TOOL}]", f"[{TOOL_JSON}]", [{"type": "function"}], "tools[0].function is missing"),
    Case("tools", f"[{TOOL}]", f"[{TOOL_JSON}]", [{"type": "web"}], "tools[0].type: function, not 'web'"),
    Case(
        "tools",
        f"[{TOOL}]",
        f"[{TOOL_JSON}]",
        [{"type": "function", "function": {"name": ""}}],
        "tools[0].function.name: expected str of length >= 1",
    ),
    *(
        Case("tool_choice", f'"{choice}"', f'"{choice}"', "maybe", "tool_choice: none or auto or required", TOOLS)
        for choice in ("none", "auto", "required")
    ),
    Case(
        "tool_choice",
        '{type = "function", function = {name = "f"}}',
        '{"type":"function","function":{"name":"f"}}',
        {"type": "function", "function": {}},
        "tool_choice.function.name is missing",
        TOOLS,
    ),
    legacy("best_of", "3", "3", 0, "best_of: a whole number from 1 to 128, not 0"),
    legacy("echo", "true", "true", 1, "echo: true or false, not 1"),
    *(
        legacy(
            "grammar_root", f'"{rule}"', f'"{rule}"', "rule", "grammar_root: root or fcall or nofcall or insidevalue"
        )
        for rule in (
            *("root", "fcall", "nofcall", "insidevalue", "value", "object"),
            *("array", "string", "number", "funcarray", "func", "ws"),
        )
    ),
    legacy("logprobs", "true", "true", "all", "logprobs: true or false or a whole number from 0 to 20, not 'all'"),
    legacy("logprobs", "0", "0", 21, "logprobs: true or false or a whole number from 0 to 20, not 21"),
    legacy("return_raw_tokens", "true", "true", 1, "return_raw_tokens: true or false, not 1"),
    legacy("suffix", '"s"', '"s"', 1, "suffix: a text, not 1"),
    legacy("prompt", '"one"', '"one"', 5, "prompt: a text, a list of texts, a list of token ids or a list of such"),
    legacy("prompt", '["one", "two"]', '["one","two"]', [], "prompt: a text, a list of texts"),
    legacy("prompt", "[1, 2, 3]", "[1,2,3]", [1, -2], "prompt: a text, a list of texts"),
    legacy("prompt", "[1, 2]", "[1,2]", [1, "a"], "prompt: a text, a list of texts"),
    legacy("prompt", "[[1, 2], [3]]", "[[1,2],[3]]", [[1], []], "prompt: a text, a list of texts"),
    legacy("prompt", "[[1], [2]]", "[[1],[2]]", [[True]], "prompt: a text, a list of texts"),
]


def test_no_parameter_is_left_out() -> None:
    """The table has each of them; messages have one of their own."""
    for endpoint, known in (("chat", CHAT), ("completions", COMPLETIONS)):
        assert {case.name for case in CASES if case.endpoint == endpoint} >= known.keys() - {"messages"}


class Book(NamedTuple):
    """A service that answers everything, and what it was sent."""

    url: str
    requests: list[tuple[str, dict[str, str], bytes]]


@pytest.fixture(scope="module")
def book() -> Iterator[Book]:
    """The service, listening."""
    requests: list[tuple[str, dict[str, str], bytes]] = []

    class Listener(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}  # in any case, says RFC 9110
            requests.append((self.path, headers, body))
            given = json.loads(body)
            chat = "messages" in given
            said = {"message": {"role": "assistant", "content": '{"a":"x"}'}} if chat else {"text": "x"}
            answer = {
                "id": "1",
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", **said}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
            kind, sent = "application/json", json.dumps(answer).encode()
            if given.get("stream"):
                if chat:
                    answer["choices"] = [{"index": 0, "finish_reason": "stop", "delta": said["message"]}]
                kind, sent = "text/event-stream", b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            """Nothing to standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Book(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write(folder: Path, url: str, request: str, more: str = "", rows: str = '{"v": "x"}\n') -> Path:
    """A job of one row with these lines of TOML under `[request]`, and others after."""
    (folder / "rows.jsonl").write_text(rows)
    path = folder / "job.toml"
    path.write_text(
        f'[input]\npath = "rows.jsonl"\n[service]\nbase_url = "{url}"\ndialect = "cerebras"\n'
        f'[output]\npath = "out"\n[request]\n{request}\n{more}\n'
    )
    return path


def lines(case: Case, value: str) -> str:
    """The `[request]` section of a case with this value."""
    given = {"model": '"m"', "prompt": '"hi"', "endpoint": f'"{case.endpoint}"', case.name: value}
    return "\n".join([*(f"{name} = {text}" for name, text in given.items()), case.beside])


@pytest.mark.parametrize("case", {(case.endpoint, case.name): case for case in CASES}.values(), ids=str)
def test_a_parameter_is_seen_by_the_service(tmp_path: Path, book: Book, case: Case) -> None:
    """From the job file to the service, byte for byte."""
    book.requests.clear()
    result = batcher.run(load(write(tmp_path, book.url, lines(case, case.toml))))
    assert result.table().num_rows == 1, result.failures().to_pylist()
    [(path, _, body)] = book.requests
    assert path == ("/v1/chat/completions" if case.endpoint == "chat" else "/v1/completions")
    assert f'"{case.name}":{case.sent}'.encode() in body


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_the_simulator_takes_every_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Literal["chat", "completions"]
) -> None:
    """It checks requests as the service does, and sees each body of the table, and of the messages, as it was made.

    Two it refuses as the service does: what no model has, and what only servers that fill in have.
    """
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    requests: list[dict[str, object]] = [
        {"prompt": "hi", **tomllib.loads(f"{case.name} = {case.toml}\n{case.beside}")}
        for case in CASES
        if case.endpoint == endpoint and case.name != "model"
    ]
    if endpoint == "chat":
        requests += [{"messages": without_null(messages), "model": "qwen-3.8-27b"} for messages in GOOD]
    model = {"model": "gpt-oss-120b", "endpoint": endpoint}
    made = [Composer(job(**model | request).request, None, "job").compose(Row(0, {})) for request in requests]
    bodies = [each.body for each in made if isinstance(each, Request)]
    assert len(bodies) == len(made)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"key": 0, "v": body.decode()}) + "\n" for body in bodies))
    whole: dict[str, object] = {"model": None, "prompt": None, "max_completion_tokens": None}
    whole |= {"body": "{{ v }}", "endpoint": endpoint}
    with stories.service() as service:
        path = stories.write_job(tmp_path, service.url, more={"request": whole, "output": {"keep": ["v"]}})
        result = batcher.run(load(path))
    refused = {"chat": ["This model has no model_parameters"], "completions": ["suffix is not supported"]}
    assert result.failures()["message"].to_pylist() == refused[endpoint]
    assert sorted(entry.body_sha256 for entry in service.book) == sorted(sha256(body).hexdigest() for body in bodies)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_value_is_refused(tmp_path: Path, case: Case) -> None:
    """In the job file, and where a row's template makes it: there it costs that row alone."""
    beside = tomllib.loads(case.beside)
    request: dict[str, object] = {"endpoint": case.endpoint, "model": "m", "prompt": "hi", **beside}
    with pytest.raises(JobError) as caught:
        job(**request | {case.name: case.bad})
    assert str(caught.value).startswith(f"job: request.{case.said}")

    composer = Composer(job(**request | {case.name: "{{ v }}"}).request, None, "job")
    bad = composer.compose(Row(0, {"v": case.bad}))
    assert isinstance(bad, Failure)
    assert (bad.kind, bad.message[: len(case.said)]) == (Kind.UNSENDABLE, case.said)
    value = tomllib.loads(f"v = {case.toml}")["v"]
    fixed = Composer(job(**request | {case.name: value}).request, None, "job")
    for good in (composer.compose(Row(0, {"v": value})), fixed.compose(Row(0, {}))):
        assert isinstance(good, Request), good
        assert f'"{case.name}":{case.sent}'.encode() in good.body


def job(**request: object) -> batcher.Job:
    """A job with this request."""
    return batcher.Job(input={"path": "rows.jsonl"}, request=request, output={"path": "out"})


# Messages

GOOD: list[list[object]] = [
    [{"role": "system", "content": "s", "name": "n"}, {"role": "developer", "content": "d"}, USER],
    [{"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "text", "text": ""}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}]}],
    [{"role": "user", "content": [{"type": "image", "image": PIXEL}]}],
    [USER, {"role": "assistant", "content": "a", "reasoning": "r", "name": "n"}, USER],
    [USER, {"role": "assistant", "reasoning": [{"type": "text", "text": "r"}]}, USER],
    [USER, CALLING, TOOL_ANSWER],
    [
        USER,
        {**CALLING, "tool_calls": [CALL | {"index": 0}, CALL | {"id": "c2"}]},
        TOOL_ANSWER | {"tool_call_id": "c2"},
        TOOL_ANSWER | {"name": "f", "content": [{"type": "text", "text": "7"}]},
        USER,
    ],
]
BAD: list[tuple[list[object], str]] = [
    ([], "messages: a list of at least 1, not []"),
    (["hi"], "messages[0]: expected object, not 'hi'"),
    ([{"content": "c"}], "messages[0]: every message has a role"),
    ([{"role": 5, "content": "c"}], "messages[0]: every message has a role"),
    (
        [USER, {"role": "bot", "content": "c"}],
        "messages[1].role: system, developer, user, assistant or tool, not 'bot'",
    ),
    ([{"role": "user"}], "messages[0].content is missing"),
    ([{"role": "user", "content": None}], "messages[0].content: expected str | array, not"),
    ([{"role": "user", "content": 5}], "messages[0].content: expected str | array, not 5"),
    ([{"role": "user", "content": []}], "messages[0].content: expected array of length >= 1"),
    ([{"role": "user", "content": "c", "name": 5}], "messages[0].name: expected str | null, not 5"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0].type: text, image_url or image, not"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is missing"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}],
        "messages[0].content[0].image_url: expe",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}],
        "messages[0].content[0].image_url.url: an image as a data URI",
    ),
    ([{"role": "assistant", "content": [{"type": "image", "image": PIXEL}]}], "messages[0].content[0].type: text"),
    ([{"role": "assistant", "reasoning": 5}], "messages[0].reasoning: expected str | array | null, not 5"),
    ([USER, CALLING | {"tool_calls": [{"id": "c1"}]}], "messages[1].tool_calls[0].function is missing"),
    (
        [USER, CALLING | {"tool_calls": [CALL | {"type": "web"}]}],
        "messages[1].tool_calls[0].type: function, not 'web'",
    ),
    (
        [USER, CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": {}}}]}],
        "messages[1].tool_calls[0].function.arguments: expected str, not {}",
    ),
    ([USER, CALLING], "messages: the tool call 'c1' is not answered"),
    ([USER, CALLING, USER], "messages[2]: the tool call 'c1' has to be answered before"),
    ([USER, TOOL_ANSWER], "messages[1].tool_call_id: answers no call of the assistant's message before"),
    ([USER, CALLING, TOOL_ANSWER, TOOL_ANSWER], "messages[3].tool_call_id: answers no call"),
    ([USER, CALLING, {"role": "tool", "content": "7"}], "messages[2].tool_call_id is missing"),
    ([USER, CALLING | {"tool_calls": [CALL, CALL]}], "messages[1].tool_calls: two calls with one id"),
]


def test_messages_are_seen_by_the_service(tmp_path: Path, book: Book) -> None:
    """All roles, parts, calls and their answers, in a column or in the job, as they are."""
    book.requests.clear()
    rows = "".join(json.dumps({"v": messages}) + "\n" for messages in GOOD)
    result = batcher.run(load(write(tmp_path, book.url, 'model = "m"\nmessages = "{{ v }}"', rows=rows)))
    assert result.table().num_rows == len(GOOD)
    assert sorted(body for _, _, body in book.requests) == sorted(map(whole, GOOD))
    for messages in GOOD:
        composer = Composer(job(model="m", messages=without_null(messages)).request, None, "job")
        made = composer.compose(Row(0, {}))
        assert isinstance(made, Request)
        assert made.body == whole(without_null(messages))


def whole(messages: object) -> bytes:
    """The body of a request with these messages."""
    return json.dumps({"model": "m", "messages": messages}, separators=(",", ":")).encode()


def without_null(value: object) -> object:
    """The value as TOML can say it."""
    if isinstance(value, dict):
        return {key: without_null(inner) for key, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("messages", "said"), BAD)
def test_bad_messages_are_refused(messages: list[object], said: str) -> None:
    """With the place, whether the job or a row has them."""
    assert (misfit("chat", "messages", messages) or "").startswith(said)
    composer = Composer(job(model="m", messages="{{ v }}").request, None, "job")
    made = composer.compose(Row(0, {"v": messages}))
    assert isinstance(made, Failure)
    assert made.kind is Kind.UNSENDABLE
    assert messages == [] or made.message.startswith(said.split(", not")[0])


@pytest.mark.parametrize(
    ("message", "value", "said"),
    [
        ({"role": "user", "content": "{{ v }}"}, 5, "messages[0].content: expected str | array, not 5"),
        (
            {"role": "user", "content": [{"type": "text", "text": "{{ v }}"}]},
            5,
            "messages[0].content[0].text: expected",
        ),
        ({"role": "{{ v }}", "content": "c"}, "bot", "messages[0].role: system, developer, user, assistant or tool"),
        ({"role": "user", "content": "c", "name": "{{ v }}"}, 5, "messages[0].name: expected str | null, not 5"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "{{ v }}"}}]},
            "x.png",
            "messages[0].content[0].image_url.url: an image as a data URI",
        ),
    ],
)
def test_what_templates_make_inside_of_messages(message: dict[str, object], value: object, said: str) -> None:
    """It is checked like all else; a list of parts may stand for a text."""
    composer = Composer(job(model="m", messages=[message, USER]).request, None, "job")
    made = composer.compose(Row(0, {"v": value}))
    assert isinstance(made, Failure)
    assert made.message.startswith(said)
    parts = [{"type": "text", "text": "t"}, {"type": "image", "image": PIXEL}]
    made = Composer(job(model="m", prompt="{{ v }}").request, None, "job").compose(Row(0, {"v": parts}))
    assert isinstance(made, Request)
    assert json.loads(made.body)["messages"][0]["content"] == parts


def test_a_conversation_with_tools_and_templates() -> None:
    """Calls and answers are held against each other as each row has them."""
    messages = [USER, {"role": "assistant", "tool_calls": [CALL | {"id": "{{ v }}"}]}, TOOL_ANSWER]
    composer = Composer(job(model="m", messages=messages).request, None, "job")
    assert isinstance(composer.compose(Row(0, {"v": "c1"})), Request)
    made = composer.compose(Row(0, {"v": "c2"}))
    assert isinstance(made, Failure)
    assert made.message.startswith("messages[2].tool_call_id: answers no call")


# What goes together

TOOLS_GIVEN = [{"type": "function", "function": {"name": "f"}}]
GUESS = {"type": "content", "content": "c"}
FORM = {"type": "json_schema", "json_schema": {"name": "a"}}
G = {"type": "function", "function": {"name": "g"}}
TOGETHER: list[tuple[str, dict[str, object], str, object]] = [
    ("chat", {"top_logprobs": 3}, "top_logprobs: only with logprobs", {"logprobs": True}),
    ("chat", {"top_logprobs": 0, "logprobs": False}, "top_logprobs: only with logprobs", {"logprobs": True}),
    ("chat", {"prediction": GUESS, "tools": TOOLS_GIVEN}, "prediction: not with tools", {"tools": []}),
    ("chat", {"prediction": GUESS, "logprobs": True}, "prediction: not with logprobs", {"logprobs": False}),
    ("chat", {"prediction": GUESS, "n": 2}, "prediction: not with n above 1", {"n": 1}),
    (
        "chat",
        {"reasoning_format": "raw", "response_format": {"type": "json_object"}},
        "reasoning_format: raw mixes",
        {"reasoning_format": "hidden"},
    ),
    (
        "chat",
        {"reasoning_format": "raw", "response_format": FORM},
        "reasoning_format: raw mixes",
        {"response_format": {"type": "text"}},
    ),
    (
        "chat",
        {"max_tokens": 1, "max_completion_tokens": 1},
        "max_tokens or max_completion_tokens, not both",
        {"max_tokens": None},
    ),
    (
        "chat",
        {"min_tokens": 1, "min_completion_tokens": 1},
        "min_tokens or min_completion_tokens, not both",
        {"min_tokens": None},
    ),
    (
        "chat",
        {"min_completion_tokens": 5, "max_completion_tokens": 4},
        "at least 5 tokens, and at most 4",
        {"max_completion_tokens": 5},
    ),
    ("chat", {"tool_choice": "none"}, "tool_choice: only with tools", {"tools": TOOLS_GIVEN}),
    ("chat", {"tool_choice": G, "tools": TOOLS_GIVEN}, "tool_choice: no tool is called 'g'", {"tool_choice": "auto"}),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options: only with stream = true", {"stream": True}),
    ("completions", {"echo": True, "return_raw_tokens": True}, "echo: not with return_raw_tokens", {"echo": False}),
    ("completions", {"best_of": 2, "n": 3}, "best_of: at least n, which is 3", {"best_of": 3}),
    ("completions", {"best_of": 2, "stream": True}, "best_of: not with stream", {"stream": False}),
    ("completions", {"top_logprobs": 2}, "top_logprobs: only with logprobs", {"logprobs": 0}),
]


@pytest.mark.parametrize(("endpoint", "given", "said", "mended"), TOGETHER)
def test_what_the_service_would_refuse_together(
    endpoint: str, given: dict[str, object], said: str, mended: dict[str, object]
) -> None:
    """Is refused when the job is read; where a row's template makes it so, and in a whole request, the row fails."""
    request: dict[str, object] = {"endpoint": endpoint, "model": "m", "prompt": "hi"}
    with pytest.raises(JobError) as caught:
        job(**request, **given)
    assert str(caught.value).startswith(f"job: request: {said}")
    job(**request, **given | mended)

    templates = {name: f"{{{{ {name} }}}}" for name in given | mended}
    if said.endswith("not both"):
        with pytest.raises(JobError, match=said):
            job(**request, **templates)
    else:
        composer = Composer(job(**request, **templates).request, None, "job")
        off = {"logprobs": False, "stream": False, "tools": []}
        made = composer.compose(Row(0, off | given))
        assert isinstance(made, Failure)
        assert (made.kind, made.message[: len(said)]) == (Kind.UNSENDABLE, said)
        assert isinstance(composer.compose(Row(0, off | given | mended)), Request)
    for some in (given, given | mended):
        whole = {"model": "m", "prompt": "hi", "messages": [USER], **some}
        made = Composer(job(endpoint=endpoint, body="{{ b }}").request, None, "job").compose(Row(0, {"b": whole}))
        assert isinstance(made, Failure) == (some is given)


def test_a_schema_of_ours_counts_as_json() -> None:
    """Raw reasoning cannot stand in it."""
    schema = {"schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    with pytest.raises(JobError, match="raw mixes the reasoning into the text, so not with json_schema"):
        job(model="m", prompt="hi", response_format=schema, reasoning_format="raw")


def test_what_is_not_known_yet_does_not_clash() -> None:
    """Templates and nulls are held against nothing."""
    assert clash({"logprobs": "{{ l }}", "top_logprobs": 3, "stream": "{{ s }}", "stream_options": {}}) is None
    assert clash({"prediction": {}, "n": "{{ n }}", "tools": "{{ t }}", "logprobs": "{{ l }}"}) is None
    assert clash({"max_tokens": 1, "max_completion_tokens": None, "top_logprobs": None, "best_of": None}) is None
    assert clash({"best_of": 2, "n": None, "stream": None}) is None


# Beside the parameters


def test_extra_goes_last_and_untouched(tmp_path: Path, book: Book) -> None:
    """What looks like a template or a file in it is neither; it may not change between runs."""
    book.requests.clear()
    path = write(
        tmp_path,
        book.url,
        'model = "m"\nprompt = "{{ v }}"\n'
        'extra = {top_k = 5, guided = "{{ v }}", f = {file = "x"}, nested = {a = 1.0}}',
    )
    batcher.run(load(path))
    [(_, _, body)] = book.requests
    assert body.endswith(b',"top_k":5,"guided":"{{ v }}","f":{"file":"x"},"nested":{"a":1.0}}')
    with pytest.raises(JobError, match=r"request\.extra\.top_k: was 5, is now 6"):
        batcher.run(load(path, ["request.extra.top_k=6"]))
    assert load(path).changed(['request.extra={f = {file = "y"}}']).request.extra == {"f": {"file": "y"}}
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(JobError, match=r"request\.extra: JSON has no infinity"):
            job(model="m", prompt="p", extra={"a": value})
    with pytest.raises(JobError, match=r"request\.model_parameters: JSON has no infinity"):
        job(model="m", prompt="p", model_parameters={"a": float("nan")})


def test_the_order_of_the_job_is_that_of_the_body() -> None:
    """Whether a value is fixed or made by row."""
    made = Composer(
        job(user="{{ v }}", model="m", seed="{{ 7 }}", top_p=1, prompt="hi").request, None, "job", ["flex"]
    ).compose(Row(0, {"v": "u"}))
    assert isinstance(made, Request)
    assert [*json.loads(made.body)] == ["user", "model", "seed", "top_p", "messages", "service_tier"]


@pytest.mark.parametrize("tier", ["priority", "default", "auto", "flex"])
def test_the_tier_is_the_schedule_s(tmp_path: Path, book: Book, tier: str) -> None:
    """It goes into the body and, with a threshold, a header; it may change between runs."""
    book.requests.clear()
    more = f'[schedule]\nservice_tier = "{tier}"\n' + ("queue_threshold = 1.5004\n" if tier in ("auto", "flex") else "")
    path = write(tmp_path, book.url, 'model = "m"\nprompt = "{{ v }}"', more, '{"v": "x"}\n{"v": "y"}\n')
    shown = render(plan(load(path)))
    assert f'"service_tier":"{tier}"' in shown
    assert ("queue_threshold: 1500" in shown) == (tier in ("auto", "flex"))
    batcher.run(load(path, ["input.limit=1"]))
    batcher.run(load(path, ["schedule.service_tier=auto", "schedule.queue_threshold=50ms"]))
    tiers = [json.loads(body)["service_tier"] for _, _, body in book.requests]
    thresholds = [headers.get("queue_threshold") for _, headers, _ in book.requests]
    assert tiers == [tier, "auto"]
    assert thresholds == ["1500" if tier in ("auto", "flex") else None, "50"]


def test_where_a_tier_cannot_be_asked_for() -> None:
    """A completions request has none, and a whole request has its own, which is known to the run."""
    tier = {"schedule": {"service_tier": "flex"}, "input": {"path": "x"}, "output": {"path": "o"}}
    for request, said in (
        ({"endpoint": "completions", "model": "m", "prompt": "p"}, "completions', which has no tiers"),
        ({"body": "{{ b }}"}, "whole requests name their own service_tier"),
    ):
        with pytest.raises(JobError, match=said):
            batcher.Job(request=request, **tier)  # type: ignore[arg-type]
    whole = batcher.Job(
        input={"path": "x"}, request={"body": "{{ b }}"}, output={"path": "o"}, schedule={"queue_threshold": "1s"}
    )
    body = {"model": "m", "messages": [USER], "service_tier": "flex", "stream": True}
    made = Composer(whole.request, None, "job").compose(Row(0, {"b": body}))
    assert isinstance(made, Request)
    assert (made.tier, made.stream) == ("flex", True)


def test_a_request_knows_that_it_streams() -> None:
    """Whether the job says so or a row."""
    for value, streams in (("true", True), ("false", False)):
        for given, row in ((value == "true", {}), ("{{ s }}", {"s": value == "true"})):
            made = Composer(job(model="m", prompt="p", stream=given).request, None, "job").compose(Row(0, row))
            assert isinstance(made, Request)
            assert made.stream is streams


# Headers


def test_extra_headers_go_before_ours(tmp_path: Path, book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their case: another version patch replaces the dialect's."""
    book.requests.clear()
    monkeypatch.setenv("MORE", "x-cerebras-version-patch: 1\nX-Own: secret-value")
    path = write(tmp_path, book.url, 'model = "m"\nprompt = "{{ v }}"')
    settings = ["service.headers_env=MORE"]
    shown = render(plan(load(path, settings)))
    assert "x-cerebras-version-patch: (from $MORE)" in shown
    assert "Version-Patch: 2" not in shown
    assert "secret-value" not in shown
    batcher.run(load(path))
    path.write_text(path.read_text().replace('"out"', '"other"'))
    batcher.run(load(path, settings))
    versions = [
        [value for name, value in headers.items() if name.lower() == "x-cerebras-version-patch"]
        for _, headers, _ in book.requests
    ]
    assert versions == [["2"], ["1"]]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Content-Type: text/plain", "MORE holds Content-Type, which is set by how a body is sent"),
        ("content-encoding: br", "MORE holds content-encoding"),
        ("authorization: Bearer x", "Authorization is made of KEY; take it out, or the key"),
    ],
)
def test_headers_that_are_ours(
    tmp_path: Path, book: Book, monkeypatch: pytest.MonkeyPatch, header: str, said: str
) -> None:
    """What describes the body, and a second key, is refused."""
    monkeypatch.setenv("MORE", header)
    monkeypatch.setenv("KEY", "k")
    path = write(tmp_path, book.url, 'model = "m"\nprompt = "{{ v }}"')
    with pytest.raises(JobError, match=said):
        plan(load(path, ["service.headers_env=MORE", "service.api_key_env=KEY"]))


# Estimates


@pytest.mark.parametrize(
    ("request_", "row", "prompt", "output"),
    [
        ({"endpoint": "completions", "prompt": [1] * 50, "max_tokens": 10}, {}, 50, 10),
        ({"endpoint": "completions", "prompt": "{{ v }}", "max_tokens": 10}, {"v": [70_000] * 50}, 50, 10),
        ({"endpoint": "completions", "prompt": [[1] * 20, [2] * 30], "max_tokens": 10, "n": 2}, {}, 50, 40),
        ({"endpoint": "completions", "prompt": "{{ v }}", "max_tokens": 10}, {"v": [[1] * 20, [2] * 30]}, 50, 20),
        ({"endpoint": "completions", "prompt": ["a" * 97] * 3, "max_tokens": 10}, {}, 75, 30),
        ({"endpoint": "completions", "prompt": "{{ v }}", "max_tokens": 10, "best_of": 4}, {"v": "a" * 198}, 50, 40),
        ({"endpoint": "completions", "prompt": ["{{ v }}", "b"], "max_tokens": 5, "n": "{{ 3 }}"}, {"v": "a"}, 2, 30),
        ({"prompt": "{{ v }}", "max_completion_tokens": 10, "n": 2}, {"v": "a" * 165}, 50, 20),
        ({"prompt": "{{ v }}", "prediction": {"type": "content", "content": "p" * 400}}, {"v": "a" * 165}, 50, 0),
        ({"prompt": "{{ v }}", "extra": {"x": "x" * 400}, "user": "u" * 400}, {"v": "a" * 165}, 50, 0),
        (
            {"prompt": "{{ v }}", "tools": [{"type": "function", "function": {"name": "f" * 150}}]},
            {"v": "a" * 165},
            97,
            0,
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": PIXEL}] * 2}]}, {}, 580, 0),
        ({"prompt": "{{ v }}"}, {"v": [{"type": "image_url", "image_url": {"url": PIXEL + "A" * 4000}}]}, 299, 0),
    ],
)
def test_the_estimate(request_: dict[str, object], row: dict[str, object], prompt: int, output: int) -> None:
    """Token ids are counted, several prompts count each, tools are read, and an image has a price of its own."""
    made = Composer(job(model="m", **request_).request, None, "job").compose(Row(0, row))
    assert isinstance(made, Request)
    assert (abs(made.prompt_tokens - prompt) <= 3, made.output_tokens) == (True, output), made.prompt_tokens
    whole = Composer(job(endpoint=made.endpoint, body="{{ b }}").request, None, "job").compose(
        Row(0, {"b": made.body.decode()})
    )
    assert isinstance(whole, Request)
    assert (whole.prompt_tokens, whole.output_tokens, whole.body) == (made.prompt_tokens, made.output_tokens, made.body)
