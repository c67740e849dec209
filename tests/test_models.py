"""Models are looked up before anything is spent, and shown with what is known of them."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

import pytest
from aiohttp import web
from anyio.from_thread import start_blocking_portal
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher import cli, dialects, engine, models
from batcher.errors import ServiceError
from batcher.records import Failure, Reply, Request, Timing
from batcher.simulator import Front, ModelTransport, Settings, VirtualLoop
from tests import stories

Answer = tuple[int, object]
Call = Callable[..., tuple[int, str, str]]

CATALOGUE = {
    "id": "gpt-oss-120b",
    "pricing": {"prompt": "0.00000040", "completion": "0.00000075"},
    "limits": {"max_context_length": 131072, "max_completion_tokens": 40960, "requests_per_minute": 1000},
    "capabilities": {"streaming": True, "tools": True, "vision": False},
    "preview": True,
    "deprecated": False,
}
NO_MODEL = (404, {"message": "no such model", "type": "not_found_error", "param": "model", "code": "model_not_found"})


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its key in the environment, and no other."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    monkeypatch.delenv("CEREBRAS_API_KEY", raising=False)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command line, called with these words: exit code, output, errors."""

    def called(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["models", *words])
        out, err = capfd.readouterr()
        assert stories.KEY not in out + err
        assert isinstance(ended.value.code, int)
        assert len(err.splitlines()) == (ended.value.code != 0)
        return ended.value.code, out, err

    return called


class Other:
    """A server that this project did not write, as far as its models go; chats are answered as the tests need it."""

    def __init__(self, url: str, answers: Mapping[str, Answer]) -> None:
        self.url = url
        self.answers = answers
        self.asked: list[tuple[str, str | None]] = []
        """Path and key of every request."""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request."""
        path = unquote(request.raw_path)
        self.asked.append((path, request.headers.get("Authorization")))
        status, body = self.answers.get(path, (404, {"detail": "Not Found"}))
        return web.Response(status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode())


@contextlib.contextmanager
def other(answers: Mapping[str, Answer]) -> Iterator[Other]:
    """Such a server, on a thread of its own."""

    @contextlib.asynccontextmanager
    async def serve() -> AsyncIterator[Other]:
        server = Other("", answers)
        runner = web.ServerRunner(web.Server(server.answer))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"{site.name}/v1"
        try:
            yield server
        finally:
            await runner.cleanup()

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serve()) as server:
        yield server


def listed(*names: str, **more: object) -> Answer:
    """A list of models."""
    return 200, {"object": "list", "data": [{"id": name, "object": "model", **more} for name in names]}


def job(folder: Path, url: str, rows: int = 5, **request: object) -> batcher.Job:
    """A job over a new input."""
    stories.write_jsonl(folder / "rows.jsonl", rows)
    return batcher.load(stories.write_job(folder, url, more={"request": request}))


# Before a run


def test_a_run_looks_once_before_its_first_request(tmp_path: Path) -> None:
    """One look for a run that asks something; none for one that has nothing left to ask."""
    with stories.service() as service:
        made = job(tmp_path, service.url)
        assert batcher.run(made).summary.totals.answered == 5
        assert service.looks == ["/v1/models"]
        assert batcher.run(made).summary.requests == 0
        assert service.looks == ["/v1/models"]


def test_an_unknown_model_ends_the_run_before_anything_is_spent(tmp_path: Path) -> None:
    """Exit code 4, one line with the name and those that are close, every row pending, no request."""
    with stories.service() as service:
        with pytest.raises(ServiceError) as caught:
            batcher.run(job(tmp_path, service.url, model="gpt-oss-12b"))
        assert caught.value.exit_code == 4
        assert str(caught.value) == "the service has no model gpt-oss-12b; did you mean gpt-oss-120b?"
        assert service.book == []
        assert service.looks == ["/v1/models", "/v1/models/gpt-oss-12b"]
        summary = json.loads((tmp_path / "out/summary.json").read_text())
        assert (summary["pending"], summary["requests"]) == (5, 0)


def test_models_of_the_rows_are_not_looked_up(tmp_path: Path) -> None:
    """What a template names is not known before anything is asked."""
    with stories.service() as service:
        summary = batcher.run(job(tmp_path, service.url, model="{{ 'gpt-oss-' + '120b' }}")).summary
        assert (summary.totals.answered, service.looks) == (5, [])


CHAT: Answer = (
    200,
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    },
)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"/v1/models": (405, {})},
        {"/v1/models": (501, {})},
        {"/v1/models": (500, b"<html>")},
        {"/v1/models": (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}})},
        {"/v1/models": (401, {"error": {"message": "no"}})},
        {"/v1/models": (403, {"error": {"message": "this key may not list models"}})},
        {"/v1/models": (302, b"")},
        {"/v1/models": (200, b"<html>not JSON</html>")},
        {"/v1/models": (200, b"\xff")},
        {"/v1/models": (200, {"models": []})},
        {"/v1/models": (200, [1, None, {"id": 5}])},
        {"/v1/models": listed("others", "only")},
        {"/v1/models": listed("others"), "/v1/models/gpt-oss-120b": (200, {"id": "an alias"})},
        {"/v1/models": listed("others"), "/v1/models/gpt-oss-120b": (500, b"")},
    ],
)
def test_a_service_that_does_not_tell_its_models_is_no_error(tmp_path: Path, answers: Mapping[str, Answer]) -> None:
    """No such call, no right to it, an odd answer, a model that is not listed: the first request decides."""
    with other({"/v1/chat/completions": CHAT, **answers}) as server:
        assert batcher.run(job(tmp_path, server.url)).summary.totals.answered == 5


def test_a_service_that_is_silent_delays_a_run_by_seconds_only(tmp_path: Path) -> None:
    """The look has a short time of its own, whatever the job's timeout is."""

    class Silent(ModelTransport):
        async def get(self, path: str) -> Reply | Failure:
            silence: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            return await silence

    loop = VirtualLoop(0.0, 1000.0, lambda: 0.0)
    front = Front(Settings(), loop.time, 1_790_000_000.0, record=True)
    made = job(tmp_path, "https://simulated.invalid/v1")
    transport = Silent(front, f"Bearer {stories.KEY}", 600.0, dialects.named("cerebras").refusal)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        summary = runner.run(engine.run(made, transport=transport))
    assert summary.totals.answered == 5
    assert min(entry.arrived for entry in front.book) == pytest.approx(5.0)


def test_a_wrong_key_is_what_the_first_request_says(tmp_path: Path) -> None:
    """A look that is refused says nothing; the requests after it end the run, exit code 4."""
    with stories.service(key="another") as service, pytest.raises(ServiceError) as caught:
        batcher.run(job(tmp_path, service.url))
    assert "key" in str(caught.value)


class Said:
    """A transport that answers looks with given bodies."""

    name = "none"

    def __init__(self, *bodies: bytes) -> None:
        self._bodies = list(bodies)

    async def send(self, request: Request) -> Reply | Failure:
        """Nothing is asked here."""
        raise AssertionError

    async def get(self, path: str) -> Reply | Failure:
        """The next body."""
        body = self._bodies.pop(0) if self._bodies else b""
        return Reply(200, {}, body, Timing(0, 0.0))

    async def close(self) -> None:
        """Nothing is open."""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "data", "limits", "pricing", "prompt", "owned_by"]) | st.text(), inner)
    ),
    max_leaves=12,
)


@given(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()), st.text(max_size=10))
@settings(max_examples=200, deadline=None)
def test_no_answer_about_models_breaks_a_run(body: bytes, name: str) -> None:
    """Whatever a look brings, it is no exception, and only a service's plain word ends a run."""
    assert not isinstance(asyncio.run(models.described(Said(body, body), name)), ServiceError)


# The command


def test_the_models_of_the_simulated_service(call: Call) -> None:
    """A list without a key; prices are those that a run would count with, and say where they are from."""
    code, out, _ = call("--base-url", "simulator")
    assert code == 0
    assert re.match(r"model +context +max output +USD per million in / out .* a run counts with\n", out)
    assert re.search(r"^gpt-oss-120b +131,072 .*  0.35 / 0.75 \(list of \d{4}-\d\d-\d\d\)", out, re.MULTILINE)


def test_the_public_catalogue_adds_what_it_knows(call: Call, tmp_path: Path) -> None:
    """Context, prices and limits come from the catalogue, which is asked without the key."""
    answers = {"/v1/models": listed("gpt-oss-120b", "own"), "/public/v1/models": (200, {"data": [CATALOGUE]})}
    with other(answers) as server:
        job(tmp_path, server.url)
        path = str(tmp_path / "job.toml")
        code, out, _ = call(path)
        assert code == 0
        assert server.asked == [("/v1/models", f"Bearer {stories.KEY}"), ("/public/v1/models", None)]
        row = next(line for line in out.splitlines() if line.startswith("gpt-oss-120b"))
        cells = re.split(r" {2,}", row)
        assert cells[:5] == ["gpt-oss-120b", "131,072", "40,960", "0.4 / 0.75", "1,000"]
        assert cells[5].startswith("0.35 / 0.75 (list of ")
        assert cells[6] == "preview"
        assert "own\n" in out
        code, out, _ = call(path, "gpt-oss-120b")
        assert "context    131,072 tokens\n" in out
        assert "can do     streaming, tools\n" in out
        code, out, _ = call(path, "gpt-oss-120b", "--json")
        shown = json.loads(out)
        assert (shown["context"], shown["price"]["input"], shown["run_price"]["input"]) == (131072, 0.4, 0.35)
        code, out, _ = call(path, "--json")
        assert [model["id"] for model in json.loads(out)] == ["gpt-oss-120b", "own"]


def test_a_jobs_own_prices_are_shown_as_its_own(call: Call, tmp_path: Path) -> None:
    """What a run counts with is the job's, where the job has a price."""
    with other({"/v1/models": listed("mine")}) as server:
        stories.write_jsonl(tmp_path / "rows.jsonl", 1)
        more = {"service": {"prices": {"mine": {"input": 1.5, "output": 3.0}}}}
        path = stories.write_job(tmp_path, server.url, more=more)
        _, out, _ = call(str(path))
        assert re.search(r"^mine +1.5 / 3 \(job\)$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("entry", "context"),
    [({"max_model_len": 4096}, "4,096"), ({"context_window": 8192}, "8,192"), ({"context_length": 7}, "7")],
)
def test_other_services_say_the_context_in_their_own_words(call: Call, entry: dict[str, object], context: str) -> None:
    """vLLM, Groq and OpenRouter tell it in the list itself; no key is needed where none is asked for."""
    with other({"/v1/models": listed("m", **entry)}) as server:
        code, out, _ = call("--base-url", server.url)
        assert (code, server.asked) == (0, [("/v1/models", None)])
        assert re.search(rf"^m +{context}$", out, re.MULTILINE)


def test_a_model_that_is_not_listed_may_be_there(call: Call) -> None:
    """The service is asked for it by name, every character of it."""
    answers = {"/v1/models": listed("a"), "/v1/models/org/model:v1?": (200, {"id": "org/model:v1?"})}
    with other(answers) as server:
        code, out, _ = call("org/model:v1?", "--base-url", server.url, "--api-key-env", "STORY_KEY")
        assert code == 0
        assert "org/model:v1?" in out
        assert {key for _, key in server.asked} == {f"Bearer {stories.KEY}"}


@pytest.mark.parametrize(
    ("answers", "words", "code", "said"),
    [
        ({"/v1/models": listed("llama")}, ["lama"], 4, "no model lama; did you mean llama?"),
        ({"/v1/models": listed("a", "b")}, ["xyz"], 4, "no model xyz; it has a, b"),
        ({"/v1/models": listed("a"), "/v1/models/x": NO_MODEL}, ["x"], 4, "no model x"),
        ({}, [], 4, "does not list its models (404)"),
        ({"/v1/models": (200, b"<html>")}, [], 4, "no list of models"),
        ({"/v1/models": (401, {"error": {"message": "Wrong API Key"}})}, [], 4, "(401): Wrong API Key; check the key"),
        ({"/v1/models": (403, {"error": {"message": "not you"}})}, [], 4, "(403): not you"),
        ({"/v1/models": (503, {"error": {"message": "later"}})}, [], 75, "does not tell its models now: later"),
        (
            {"/v1/models": (401, {"error": {"message": f"wrong key {stories.KEY}\x1b[2J"}})},
            [],
            4,
            "wrong key [redacted]\\x1b[2J",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    call: Call, answers: Mapping[str, Answer], words: list[str], code: int, said: str
) -> None:
    """An unknown model, a wrong key, no such call, a service that is busy: each with its exit code."""
    with other(answers) as server:
        ended, out, err = call(*words, "--base-url", server.url, "--api-key-env", "STORY_KEY")
    assert (ended, out) == (code, "")
    assert said in err


def test_a_service_that_is_not_there(call: Call) -> None:
    """Nobody listens: exit code 75, try again."""
    code, _, err = call("--base-url", "http://127.0.0.1:9/v1")
    assert code == 75
    assert "cannot connect to 127.0.0.1:9" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "CEREBRAS_API_KEY holds no API key"),
        (["--base-url", "http://example.com/v1"], "unencrypted"),
        (["none.toml"], "none.toml"),
        (["none.toml", "--base-url", "simulator"], "not both"),
        (["--api-key-env", "sk-not-a-name"], "the name of an environment variable"),
    ],
)
def test_a_wrong_call_is_exit_code_2(call: Call, words: list[str], said: str) -> None:
    """No key, an address that would leak it, no such job."""
    code, _, err = call(*words)
    assert code == 2
    assert said in err


def test_foreign_names_cannot_act_on_the_terminal(call: Call) -> None:
    """Names are printed escaped."""
    with other({"/v1/models": listed("a\x1b[2Jb")}) as server:
        assert "a\\x1b[2Jb" in call("--base-url", server.url)[1]
