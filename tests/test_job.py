"""The job file: what it may say, and one clear line for everything that it may not."""

import copy
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.job import Job, differences, duration, load
from batcher.parameters import misfit
from batcher.records import Rates

Sections = dict[str, dict[str, object]]

SMALL: Sections = {
    "input": {"path": "rows.jsonl"},
    "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}"},
    "output": {"path": "out"},
}
WHOLE: Sections = {
    "input": {"path": ["a.parquet", "b.parquet"], "format": "parquet", "id": "key", "limit": 10},
    "request": {
        "endpoint": "chat",
        "model": "gpt-oss-120b",
        "system": "Be short.",
        "prompt": "{{ text }}",
        "max_completion_tokens": 64,
        "temperature": 0.5,
        "top_p": 1,
        "seed": -7,
        "n": 2,
        "stop": ["\n", "END"],
        "frequency_penalty": -2,
        "presence_penalty": 2.0,
        "reasoning_effort": "low",
        "user": "u",
        "prompt_cache_key": "{{ text }}",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": -1.5},
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra": {"top_k": 5},
        "response_format": {"schema": {"title": "label", "type": "object", "properties": {"a": {"type": "string"}}}},
    },
    "service": {
        "base_url": "https://api.cerebras.ai/v1",
        "api_key_env": "MY_KEY",
        "dialect": "cerebras",
        "headers_env": "MY_HEADERS",
        "encoding": "json",
        "compression": "none",
        "transport": "reqwest",
        "timeout": "90s",
        "proxy": True,
        "prices": {
            "gpt-oss-120b": {"input": 0.35, "cached": 0.1, "output": 0.75, "flex": {"input": 0.2, "output": 0.4}},
        },
    },
    "schedule": {
        "max_in_flight": 64,
        "requests_per_minute": 1000,
        "tokens_per_minute": 1e6,
        "uncached_tokens_per_minute": 0.5,
        "service_tier": "flex",
        "queue_threshold": "2s",
    },
    "retry": {"max_attempts": 3, "max_invalid": 0},
    "output": {"path": "out", "ledger": "state/ledger.sqlite", "keep": "all", "rows_per_part": 100, "raw": True},
}


def write(folder: Path, sections: Mapping[str, object]) -> Path:
    """A job file of these sections."""
    path = folder / "job.toml"
    path.write_bytes(msgspec.toml.encode(sections))
    return path


def changed(key: str, value: object, sections: Sections = SMALL) -> dict[str, object]:
    """The sections with one key set; a value of None takes the key out."""
    made: dict[str, object] = copy.deepcopy(dict(sections))
    *path, name = key.split(".")
    place = made
    for part in path:
        inner = place.setdefault(part, {})
        assert isinstance(inner, dict)
        place = inner
    if value is None:
        del place[name]
    else:
        place[name] = value
    return made


def refusal(path: Path, *overrides: str) -> str:
    """The line that refuses a job file."""
    with pytest.raises(JobError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


def test_a_small_job(tmp_path: Path) -> None:
    """Three sections are enough; all else has a default."""
    job = load(write(tmp_path, SMALL))
    assert (job.name, job.origin, job.folder) == ("job", "job.toml", tmp_path)
    assert job.request.parameters == {
        "model": "gpt-oss-120b",
        "messages": [{"role": "user", "content": "{{ text }}"}],
    }
    assert job.service.base_url == "https://api.cerebras.ai/v1"
    assert job.service.timeout == 600.0
    assert job.schedule.max_in_flight == "auto"
    assert (job.schedule.requests_per_minute, job.schedule.wait) == ("auto", True)
    assert (job.retry.max_attempts, job.retry.max_invalid) == (6, 2)
    assert (job.output.keep, job.output.rows_per_part, job.output.raw) == ("all", 50_000, False)
    assert job.results.folder == tmp_path / "out"
    assert job.ledger_path == tmp_path / "out" / "ledger.sqlite"


def test_a_whole_job(tmp_path: Path) -> None:
    """Every key that there is can be given, and arrives typed."""
    job = load(write(tmp_path, {"name": "whole", **WHOLE}))
    assert job.name == "whole"
    assert job.input.path == ["a.parquet", "b.parquet"]
    assert job.input.limit == 10
    assert job.service.timeout == 90.0
    assert job.service.prices["gpt-oss-120b"].cached == 0.1
    assert job.service.prices["gpt-oss-120b"].flex == Rates(input=0.2, output=0.4)
    assert job.schedule.tokens_per_minute == 1e6
    assert job.ledger_path == tmp_path / "state" / "ledger.sqlite"
    assert job.request.schema == {"title": "label", "type": "object", "properties": {"a": {"type": "string"}}}
    assert job.request.schema_name == "label"
    assert job.request.parameters["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "{{ text }}"},
    ]
    assert "response_format" not in job.request.parameters


UNKNOWN = [
    ("inputs", {}, ["unknown key inputs", "did you mean input?"]),
    ("colour", {}, ["unknown key colour", "known are", "request"]),
    ("prompt", "x", ["unknown key prompt", "belongs in [request]"]),
    ("input.paht", "x", ["unknown key input.paht", "did you mean path?"]),
    ("input.zzz", "x", ["unknown key input.zzz", "known are format, id, limit, path"]),
    ("input.model", "x", ["unknown key input.model", "belongs in [request]"]),
    ("request.temprature", 1, ["unknown key request.temprature", "did you mean temperature?"]),
    ("request.max_in_flight", 1, ["unknown key request.max_in_flight", "belongs in [schedule]"]),
    ("request.service_tier", "flex", ["unknown key request.service_tier", "belongs in [schedule]"]),
    ("request.queue_threshold", "2s", ["unknown key request.queue_threshold", "belongs in [schedule]"]),
    ("request.extra.model", "m", ["request.extra.model: belongs in [request] itself"]),
    ("request.extra.service_tier", "flex", ["request.extra.service_tier: belongs in [schedule]"]),
    ("service.base_ur", "x", ["unknown key service.base_ur", "did you mean base_url?"]),
    ("service.api_key", "csk-secret", ["unknown key service.api_key", "did you mean api_key_env?"]),
    ("schedule.max_inflight", 1, ["unknown key schedule.max_inflight", "did you mean max_in_flight?"]),
    ("schedule.max_attempts", 1, ["unknown key schedule.max_attempts", "belongs in [retry]"]),
    ("retry.attempts", 1, ["unknown key retry.attempts", "did you mean max_attempts?"]),
    ("output.row_per_part", 1, ["unknown key output.row_per_part", "did you mean rows_per_part?"]),
    ("output.a\nb", 1, ["unknown key output.'a\\nb'"]),
    ("service.prices.m", {"input": 1, "output": 1, "cahced": 1}, ["service.prices.m.cahced", "did you mean cached?"]),
    ("service.prices.m", {"input": 1, "output": 1, "flax": {}}, ["service.prices.m.flax", "did you mean flex?"]),
    (
        "service.prices.m",
        {"input": 1, "output": 1, "flex": {"input": 1, "output": 1, "cahced": 1}},
        ["service.prices.m.flex.cahced", "did you mean cached?"],
    ),
]
WRONG = [
    ("name", 5, ["name", "a text"]),
    ("name", "", ["name", "a text"]),
    ("input", [1], ["input", "[input]"]),
    ("request", "hello", ["request", "[request]"]),
    ("schedule", 3, ["schedule", "[schedule]"]),
    ("input.path", 5, ["input.path: a text", "or a list", "not 5"]),
    ("input.path", "", ["input.path: a text of at least 1"]),
    ("input.path", [], ["input.path", "a list of at least 1"]),
    ("input.path", ["a", 1], ["input.path[1]: expected str"]),
    ("input.path", {"file": "x"}, ["input.path: a text"]),
    ("input.path", "a\0b", ["input.path", "NUL"]),
    ("input.format", "xml", ["input.format: parquet or jsonl or csv or arrow or openai-batch, not 'xml'"]),
    ("input.limit", 0, ["input.limit: a whole number from 1, not 0"]),
    ("input.limit", 1.5, ["input.limit: a whole number from 1, not 1.5"]),
    ("input.limit", True, ["input.limit: a whole number from 1, not True"]),
    ("request.endpoint", "embeddings", ["request.endpoint: chat or completions, not 'embeddings'"]),
    ("request.model", 5, ["request.model: a text", "not 5"]),
    ("request.model", "", ["request.model: a text of at least 1"]),
    ("request.prompt", 5, ["request.prompt: a text, not 5"]),
    ("request.temperature", "hot", ["request.temperature: a number from 0 to 2, not 'hot'"]),
    ("request.temperature", 2.1, ["request.temperature: a number from 0 to 2, not 2.1"]),
    ("request.temperature", float("nan"), ["request.temperature: a number from 0 to 2, not nan"]),
    ("request.temperature", True, ["request.temperature: a number from 0 to 2, not True"]),
    ("request.top_p", -0.1, ["request.top_p: a number from 0 to 1"]),
    ("request.frequency_penalty", 3, ["request.frequency_penalty: a number from -2 to 2"]),
    ("request.n", 0, ["request.n: a whole number from 1 to 128, not 0"]),
    ("request.max_completion_tokens", 0, ["request.max_completion_tokens: a whole number from 1"]),
    ("request.max_completion_tokens", 10**30, ["request.max_completion_tokens: a whole number from 1"]),
    ("request.seed", 0.5, ["request.seed: a whole number, not 0.5"]),
    ("request.seed", 2**70, ["request.seed: a whole number"]),
    ("request.stop", ["a"] * 5, ["request.stop: a text or a list of at least 1 of at most 4"]),
    ("request.stop", [1], ["request.stop[0]: expected str"]),
    ("request.reasoning_effort", "huge", ["request.reasoning_effort: none or low or medium or high, not 'huge'"]),
    ("request.user", 5, ["request.user: a text, not 5"]),
    ("request.prompt_cache_key", "k" * 1025, ["request.prompt_cache_key: a text of at most 1,024"]),
    ("request.response_format", "json", ["request.response_format: a table, not 'json'"]),
    ("request.messages", [], ["request", "prompt", "or messages"]),
    ("service.base_url", 5, ["service.base_url: a text"]),
    ("service.dialect", "anthropic", ["service.dialect: cerebras or openai or groq, not 'anthropic'"]),
    ("service.encoding", "xml", ["service.encoding: json or msgpack, not 'xml'"]),
    (
        "service.api_key_env",
        ["csk-secret"],
        ["service.api_key_env: a text of at least 1: the name of an environment variable"],
    ),
    ("service.timeout", "soon", ["service.timeout: a duration such as", "not 'soon'"]),
    ("service.timeout", 0, ["service.timeout"]),
    ("service.timeout", -5, ["service.timeout"]),
    ("service.timeout", True, ["service.timeout"]),
    ("service.timeout", float("inf"), ["service.timeout"]),
    ("service.timeout", 10**400, ["service.timeout"]),
    ("service.proxy", 1, ["service.proxy: true or false, not 1"]),
    ("service.prices", {"m": {"input": 1}}, ["service.prices", "output is missing"]),
    ("service.prices", {"m": {"input": -1, "output": 1}}, ["service.prices.m.input: USD per million tokens"]),
    ("service.prices", {"m": {"input": float("nan"), "output": 1}}, ["service.prices.m.input"]),
    ("service.prices", {"m": {"input": 1, "output": 1, "flex": {"input": 1}}}, ["service.prices", "output is missing"]),
    (
        "service.prices",
        {"m": {"input": 1, "output": 1, "flex": {"input": 1, "output": -1}}},
        ["service.prices.m.flex.output: USD per million tokens"],
    ),
    ("service.prices", {"m": {"input": "x", "output": 1}}, ["service.prices", "expected float"]),
    ("service.prices", [], ["service.prices: a table"]),
    ("schedule.max_in_flight", 0, ["schedule.max_in_flight: a whole number from 1 to 100,000 or auto, not 0"]),
    ("schedule.max_in_flight", "many", ["schedule.max_in_flight: a whole number from 1 to 100,000 or auto"]),
    ("schedule.requests_per_minute", 0, ["schedule.requests_per_minute: a number above 0"]),
    ("schedule.tokens_per_minute", float("inf"), ["schedule.tokens_per_minute: a number above 0"]),
    ("schedule.tokens_per_minute", float("nan"), ["schedule.tokens_per_minute: a number above 0"]),
    (
        "schedule.service_tier",
        "slow",
        ["schedule.service_tier: priority or default or auto or flex or a list of at least 1, not 'slow'"],
    ),
    ("schedule.deadline", "soon", ['schedule.deadline: a duration such as "6h", or a time such as', "not 'soon'"]),
    ("schedule.deadline", 0, ["schedule.deadline: a duration"]),
    ("schedule.deadline", True, ["schedule.deadline: a duration"]),
    ("schedule.queue_threshold", "2s", ['schedule.queue_threshold: only with service_tier = "flex" or "auto"']),
    ("schedule.queue_threshold", "20ms", ["schedule.queue_threshold: from 50 ms to 20 s, not '20ms'"]),
    ("schedule.queue_threshold", "21s", ["schedule.queue_threshold: from 50 ms to 20 s"]),
    ("schedule.queue_threshold", "long", ["schedule.queue_threshold: a duration such as"]),
    ("schedule.uncached_tokens_per_minute", "1M", ["schedule.uncached_tokens_per_minute: a number above 0"]),
    ("retry.max_attempts", 0, ["retry.max_attempts: a whole number from 1 to 100, not 0"]),
    ("schedule.budget_usd", 0, ["schedule.budget_usd: a number above 0"]),
    ("schedule.dedupe", "yes", ["schedule.dedupe: true or false, not 'yes'"]),
    ("retry.max_invalid", -1, ["retry.max_invalid: a whole number from 0 to 100, not -1"]),
    ("output.path", "", ["output.path: a text of at least 1"]),
    ("output.path", "a\0b", ["output.path", "NUL"]),
    ("output.keep", "some", ["output.keep", "all", "not 'some'"]),
    ("output.keep", [""], ["output.keep[0]"]),
    ("output.rows_per_part", 0, ["output.rows_per_part: a whole number from 1 to 10,000,000, not 0"]),
    ("output.raw", "yes", ["output.raw: true or false, not 'yes'"]),
    ("score", {}, ["score.target is missing"]),
    ("score.target", "", ["score.target: a text of at least 1"]),
    (
        "score",
        {"target": "label", "method": "exakt"},
        ["score.method: exact, number, choice", "or module:function", "did you mean exact?"],
    ),
    ("score", {"target": "label", "method": "mine.py:grade it"}, ["score.method: exact", "not 'mine.py:grade it'"]),
    ("score", {"target": "label", "answer": "regex:("}, ["score.answer: not a regular expression"]),
    ("score", {"target": "label", "answer": "regex:"}, ["score.answer: matches nothing at the end of any text"]),
    ("request.parse", r"regex:(\d*)", ["request.parse: matches nothing at the end of any text", "say .+, not .*"]),
    ("score", {"target": "label", "answer": "label"}, ["score.answer: response, parsed, reasoning", "not 'label'"]),
    ("score", {"target": "label", "by": ["task"]}, ["score.by: a text"]),
]
LATER = [
    ("sweep", {"model": ["a", "b"]}),
]


@pytest.mark.parametrize(("key", "value", "said"), UNKNOWN)
def test_an_unknown_key_is_refused(tmp_path: Path, key: str, value: object, said: list[str]) -> None:
    """A key that there is not is named, with the one that was probably meant, or its section, or all there are."""
    message = refusal(write(tmp_path, changed(key, value)))
    assert message.startswith("job.toml: ")
    assert [part for part in said if part not in message] == []
    assert "csk-secret" not in message


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_a_wrong_value_is_refused(tmp_path: Path, key: str, value: object, said: list[str]) -> None:
    """A value of a wrong type or out of range is refused with file, key, what is allowed and what was given."""
    message = refusal(write(tmp_path, changed(key, value)))
    assert message.startswith(f"job.toml: {key.split('.')[0]}")
    assert "csk-secret" not in message
    assert [part for part in said if part not in message] == []


STORES = [
    ({"path": "s3://bucket/out"}, "output.ledger is missing"),
    ({"path": "s3://bucket/out", "ledger": "s3://bucket/l.sqlite"}, "output.ledger: the ledger lies on this machine"),
    ({"path": "s3://", "ledger": "l.sqlite"}, "output.path: s3://BUCKET/PREFIX, please"),
    ({"path": "s3:///out", "ledger": "l.sqlite"}, "output.path: s3://BUCKET/PREFIX, please"),
    ({"path": "s3://id:canary@bucket/out", "ledger": "l.sqlite"}, "output.path: keys do not belong into a path"),
    ({"path": "s3://bucket/out?secret_key=canary", "ledger": "l.sqlite"}, "output.path: s3:// paths hold no ?"),
    ({"path": "file:///tmp/out", "ledger": "l.sqlite"}, "output.path: a folder on this machine is named without"),
]


@pytest.mark.parametrize(("output", "message"), STORES)
def test_a_store_that_cannot_take_results_is_refused(tmp_path: Path, output: dict[str, str], message: str) -> None:
    """Results in a store need a ledger on this machine and a plain address; a key in it is not repeated."""
    refused = refusal(write(tmp_path, {**SMALL, "output": output}))
    assert message in refused
    assert "canary" not in refused


def test_results_may_go_to_a_store(tmp_path: Path) -> None:
    """The job knows the store; its ledger is absolute in what it writes of itself."""
    job = load(write(tmp_path, {**SMALL, "output": {"path": "s3://bucket/out/", "ledger": "state/l.sqlite"}}))
    assert str(job.results) == "s3://bucket/out"
    assert job.results.folder is None
    assert job.ledger_path == tmp_path / "state" / "l.sqlite"
    assert str(job.ledger_path) in job.document().decode()


@pytest.mark.parametrize(("key", "value"), LATER)
def test_what_is_to_come_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """A key or value that is planned but not there yet is refused as such, never passed over."""
    message = refusal(write(tmp_path, changed(key, value)))
    assert message.startswith("job.toml: ")
    assert key.split(".")[-1] in message
    assert "supported yet" in message


@pytest.mark.parametrize("section", ["request", "output"])
def test_a_missing_section_is_named(tmp_path: Path, section: str) -> None:
    """A job without request or output says which is missing."""
    assert refusal(write(tmp_path, changed(section, None))) == f"job.toml: the section [{section}] is missing"


@pytest.mark.parametrize("key", ["request.model", "output.path"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    """A key that every job needs is named when it is not there."""
    assert refusal(write(tmp_path, changed(key, None))) == f"job.toml: {key} is missing"


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"model": "m"}, "give prompt"),
        ({"model": "m", "system": "s"}, "give prompt"),
        ({"model": "m", "prompt": "p", "messages": [{"role": "user", "content": "c"}]}, "give prompt"),
        ({"model": "m", "system": "s", "messages": [{"role": "user", "content": "c"}]}, "give prompt"),
        ({"model": "m", "messages": [{"content": "c"}]}, "messages[0]: every message has a role"),
        ({"model": "m", "messages": ["c"]}, "request.messages[0]: expected object"),
        ({"model": "m", "prompt": "p", "max_tokens": 1, "max_completion_tokens": 1}, "not both"),
        ({"model": "m", "endpoint": "completions"}, "request.prompt is missing"),
        ({"model": "m", "endpoint": "completions", "prompt": "p", "system": "s"}, "request.system: not with endpoint"),
        ({"model": "m", "endpoint": "completions", "prompt": "p", "messages": []}, "request.messages: not with"),
        ({"model": "m", "endpoint": "completions", "prompt": "p", "max_completion_tokens": 1}, "not with endpoint"),
        ({"model": "m", "prompt": "p", "response_format": {"schema": "s.json", "strict": True}}, "schema stands alone"),
        ({"model": "m", "prompt": "p", "response_format": {"schema": 5}}, "a file name or a table, not 5"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, request_: dict[str, object], said: str) -> None:
    """Parameters that contradict each other, or that the endpoint does not have, are refused."""
    assert said in refusal(write(tmp_path, changed("request", request_)))


def test_messages_and_completions(tmp_path: Path) -> None:
    """A job may give the whole conversation, or a column that holds it; completions take a bare prompt."""
    messages: object
    for messages in ([{"role": "user", "content": "{{ a }}"}], "{{ messages }}"):
        job = load(write(tmp_path, changed("request", {"model": "m", "messages": messages})))
        assert job.request.parameters["messages"] == messages
    job = load(write(tmp_path, changed("request", {"model": "m", "endpoint": "completions", "prompt": "{{ a }}"})))
    assert job.request.endpoint == "completions"
    assert job.request.parameters == {"model": "m", "prompt": "{{ a }}"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("api.cerebras.ai/v1", 'an http(s) URL or "simulator"'),
        ("ftp://files.example.com", 'an http(s) URL or "simulator"'),
        ("file:///etc/passwd", 'an http(s) URL or "simulator"'),
        ("https://", 'an http(s) URL or "simulator"'),
        ("https://[::1", 'an http(s) URL or "simulator"'),
        ("https://localhost:99999/v1", 'an http(s) URL or "simulator"'),
        ("https://local host/v1", 'an http(s) URL or "simulator"'),
        ("https://example.com/v1\n", 'an http(s) URL or "simulator"'),
        ("https://api.example.com/v1?key=1", "no ? or # part"),
        ("http://api.cerebras.ai/v1", "http:// would send key and prompts unencrypted to api.cerebras.ai"),
        ("http://8.8.8.8/v1", "unencrypted"),
        ("http://[::ffff:8.8.8.8]/v1", "unencrypted"),
        ("http://169.254.169.254/v1", "unencrypted"),
        ("https://me:hunter2@example.com/v1", "no user or password"),
        ("ftp://me:hunter2@example.com/v1", "no user or password"),
    ],
)
def test_a_bad_address_is_refused(tmp_path: Path, url: str, said: str) -> None:
    """Only sound URLs are asked, plain HTTP stays near, and a password in a URL is never repeated."""
    message = refusal(write(tmp_path, changed("service.base_url", url)))
    assert message.startswith("job.toml: service.base_url: ")
    assert said in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "url",
    [
        "simulator",
        "https://api.cerebras.ai/v1",
        "http://localhost:8000/v1",
        "http://127.0.0.1:8000/v1",
        "http://[::1]:8000/v1",
        "http://10.0.0.7/v1",
        "http://vllm:8000/v1",
        "http://gpu.internal/v1",
    ],
)
def test_a_good_address_is_taken(tmp_path: Path, url: str) -> None:
    """HTTPS goes anywhere; plain HTTP to this machine and its private network."""
    assert load(write(tmp_path, changed("service.base_url", url))).service.base_url == url


@pytest.mark.parametrize("key", ["api_key_env", "headers_env"])
@pytest.mark.parametrize("secret", ["csk-5f0c1b7d", "gsk_5f0c1b7dQx93kLmZt0aB2cD4"])
def test_a_secret_in_place_of_its_variable_is_not_repeated(tmp_path: Path, key: str, secret: str) -> None:
    """Who writes the key itself where its variable's name belongs is told so, without the key."""
    message = refusal(write(tmp_path, changed(f"service.{key}", secret)))
    assert f"service.{key}: the name of an environment variable" in message
    assert "5f0c1b7d" not in message


# Files


def test_files_stand_for_long_texts(tmp_path: Path) -> None:
    """`{ file = … }` is the file's text, from the job's folder, without the last newline."""
    (tmp_path / "prompt.txt").write_text("\ufeffRead this:\n{{ text }}\n\n", encoding="utf-8")
    job = load(write(tmp_path, changed("request.prompt", {"file": "prompt.txt"})))
    assert job.request.parameters["messages"] == [{"role": "user", "content": "Read this:\n{{ text }}"}]
    messages = [{"role": "user", "content": {"file": "prompt.txt"}}]
    job = load(write(tmp_path, changed("request", {"model": "m", "messages": messages})))
    assert job.request.parameters["messages"] == [{"role": "user", "content": "Read this:\n{{ text }}"}]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.txt", "no.txt cannot be read: No such file or directory"),
        ("", "cannot be read: Is a directory"),
        ("latin.txt", "latin.txt cannot be read"),
        ("a\0b", "cannot be read"),
    ],
)
def test_a_text_file_that_cannot_be_read(tmp_path: Path, name: str, said: str) -> None:
    """A missing or unreadable text file is named with its key."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    message = refusal(write(tmp_path, changed("request.prompt", {"file": name})))
    assert message.startswith("job.toml: request.prompt: ")
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'"\xff"', "is not JSON"),
        (b"[" * 5000, "is not JSON"),
        (b"[]", "holds no JSON object"),
    ],
)
def test_a_schema_file_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    """A schema file that is missing or not a JSON object is named with its key."""
    if content is not None:
        (tmp_path / "label.schema.json").write_bytes(content)
    message = refusal(write(tmp_path, changed("request.response_format", {"schema": "label.schema.json"})))
    assert message.startswith("job.toml: request.response_format.schema: label.schema.json ")
    assert said in message


def test_a_schema_has_a_name(tmp_path: Path) -> None:
    """A schema is named by its title, or by its file."""
    for content, name in (({"type": "object"}, "label"), ({"title": "Ticket"}, "Ticket")):
        (tmp_path / "label.schema.json").write_text(json.dumps(content))
        job = load(write(tmp_path, changed("request.response_format", {"schema": "label.schema.json"})))
        assert job.request.schema == content
        assert job.request.schema_name == name
    form = {"type": "json_object"}
    job = load(write(tmp_path, changed("request.response_format", form)))
    assert (job.request.schema, job.request.parameters["response_format"]) == (None, form)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name = ", "not valid TOML"),
        (b"[input]\npath = 1\npath = 2", "not valid TOML"),
        (b"\xff", "cannot be read"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        (b"a = " + b"[" * 3000, "nested too deeply"),
        (
            b'[input]\npath="a"\n[output]\npath="b"\n[request]\nmodel="m"\nprompt="p"\n[request.response_format'
            + b".a" * 3000
            + b"]",
            "nested too deeply",
        ),
    ],
)
def test_what_is_no_job_file(tmp_path: Path, content: bytes, said: str) -> None:
    """A file that is not TOML, not text, or a trap, is refused in a line."""
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    message = refusal(path)
    assert "job.toml: " in message
    assert said in message


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is said with the path."""
    assert refusal(tmp_path / "no.toml") == f"{tmp_path / 'no.toml'}: no such job file"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


# Overrides


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("request.model=other-1b", "request.model", "other-1b"),
        ("request.model = other-1b", "request.model", "other-1b"),
        ('request.user="two words"', "request.user", "two words"),
        ("request.temperature=0.5", "request.temperature", 0.5),
        ("request.n=2", "request.n", 2),
        ('request.stop=["a", "b"]', "request.stop", ["a", "b"]),
        ("request.response_format.type=json_object", "request.response_format", {"type": "json_object"}),
    ],
)
def test_overrides(tmp_path: Path, setting: str, key: str, value: object) -> None:
    """`--set` takes TOML, or a bare text, and goes through the same checks."""
    job = load(write(tmp_path, SMALL), [setting])
    assert job.request.parameters[key.split(".")[1]] == value


def test_overrides_make_sections_and_the_last_one_counts(tmp_path: Path) -> None:
    """A section that the file lacks can be made; of two overrides the later one counts."""
    job = load(write(tmp_path, SMALL), ["schedule.max_in_flight=8", "schedule.max_in_flight=9", "name=other"])
    assert (job.schedule.max_in_flight, job.name) == (9, "other")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("request.model", "--set request.model: section.key=value, please"),
        ("=5", "--set =5: section.key=value, please"),
        ("request.=5", "section.key=value, please"),
        ("a.b.c.d=5", "section.key=value, please"),
        ("name.x=5", "name is not a section"),
        ("request.model.x=5", "model is not a section"),
        ("request.temprature=1", "job.toml: unknown key request.temprature; did you mean temperature?"),
        ("request.temperature=hot", "job.toml: request.temperature: a number from 0 to 2, not 'hot'"),
        ("request=5", "job.toml: request: a section, please: [request]"),
        ("schedule.deadline=soon", 'job.toml: schedule.deadline: a duration such as "6h", or a time such as'),
        ("colour=blue", "job.toml: unknown key colour"),
        ("a\nb", "section.key=value, please"),
    ],
)
def test_bad_overrides(tmp_path: Path, setting: str, said: str) -> None:
    """An override that is none, or sets what may not be set, is refused in a line."""
    assert said in refusal(write(tmp_path, changed("name", "x")), setting)


# From Python


def test_a_job_from_python_is_checked_alike(tmp_path: Path) -> None:
    """`Job(...)` goes through the checks of a job file; None stands for a key that is not given."""
    job = Job(
        input=SMALL["input"],
        request=SMALL["request"],
        output=SMALL["output"],
        service={"base_url": "simulator", "api_key_env": None},
        folder=tmp_path,
    )
    assert job.service.api_key_env is None
    assert job.results.folder == tmp_path / "out"
    assert "gpt-oss-120b" in repr(job)
    wrong: list[tuple[dict[str, object], str]] = [
        (changed("request.temperature", 3), "job: request.temperature: a number from 0 to 2, not 3"),
        (changed("input.paht", "x"), "job: unknown key input.paht; did you mean path?"),
        (changed("input", "rows.jsonl"), "job: input: a section, please: [input]"),
        (changed("input", {1: 2}), "job: input: a section, please: [input]"),
        (changed("input.path", Path("x")), "job: input.path: a text"),
        (changed("name", 5), "job: name: a text"),
        (changed("request.response_format", {"schema": {"enum": ["a", None]}}), "cannot be written as TOML"),
        (changed("request.user", "\ud800"), "cannot be written as TOML"),
    ]
    for sections, said in wrong:
        with pytest.raises(JobError) as caught:
            Job(**sections)  # type: ignore[arg-type]
        assert said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


# What a job means


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("request.model", "other"),
        ("request.prompt", "{{ text }}!"),
        ("request.system", "Be long."),
        ("request.temperature", 0.6),
        ("request.seed", 8),
        ("request.top_logprobs", 3),
        ("request.extra", {"top_k": 6}),
        ("request.endpoint", "completions"),
        ("request.response_format", {"schema": {"type": "object"}}),
        ("service.base_url", "https://elsewhere.example.com/v1"),
        ("service.base_url", "simulator"),
        ("input.id", "other"),
        ("output.keep", ["text"]),
        ("output.rows_per_part", 7),
        ("output.raw", False),
    ],
)
def test_a_change_of_meaning_is_shown(tmp_path: Path, key: str, value: object) -> None:
    """What changes the rows' answers, or the output's form, is a difference, and the difference names the key."""
    before = load(write(tmp_path, WHOLE)).meaning()
    sections = changed(key, value, WHOLE)
    if value == "completions":
        sections["request"] = {"model": "gpt-oss-120b", "prompt": "{{ text }}", "endpoint": "completions"}
        sections["schedule"] = {}
    after = load(write(tmp_path, sections)).meaning()
    lines = list(differences(before, after))
    assert lines
    name = {"prompt": "messages", "system": "messages", "base_url": "host"}.get(key.split(".")[1], key.split(".")[1])
    assert any(f"{key.split('.')[0]}.{name}" in line for line in lines)
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert list(differences(after, after)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input.limit", 20),
        ("input.path", "c.parquet"),
        ("service.api_key_env", "OTHER_KEY"),
        ("service.timeout", "1h"),
        ("service.prices", {}),
        ("schedule.max_in_flight", 5),
        ("schedule.service_tier", "auto"),
        ("schedule.queue_threshold", 0.05),
        ("schedule.requests_per_minute", 5),
        ("retry.max_attempts", 5),
        ("output.ledger", "elsewhere.sqlite"),
        ("output.path", "other"),
    ],
)
def test_a_change_of_means_is_none_of_meaning(tmp_path: Path, key: str, value: object) -> None:
    """Limits, keys, patience and places may change between the runs of one output."""
    before = load(write(tmp_path, WHOLE)).meaning()
    after = load(write(tmp_path, changed(key, value, WHOLE))).meaning()
    assert list(differences(before, after)) == []


def test_meaning_survives_json_and_the_order_of_keys(tmp_path: Path) -> None:
    """A meaning that was stored as JSON, and one whose keys stand in another order, are the same."""
    meaning = load(write(tmp_path, WHOLE)).meaning()

    def reversed_(value: object) -> object:
        if isinstance(value, dict):
            return {key: reversed_(value[key]) for key in reversed(value)}
        return value

    other = reversed_(WHOLE)
    assert isinstance(other, dict)
    stored = msgspec.json.decode(msgspec.json.encode(load(write(tmp_path, other)).meaning()))
    assert list(differences(stored, meaning)) == []


def test_differences_are_readable() -> None:
    """Each line names the innermost key and shows the place where long texts part."""
    long = "You sort the tickets of a software company. " * 20
    before = {"a": 1, "m": [{"role": "user", "content": long + "Be short."}], "s": long, "gone": 1, "same": {"x": 1}}
    after = {
        "a": 2,
        "m": [{"role": "user", "content": long + "Be long."}],
        "s": long + "!",
        "new": [1],
        "same": {"x": 1},
    }
    lines = list(differences(before, after))
    assert lines[0] == "a: was 1, is now 2"
    assert lines[1] == "gone: was 1, is now absent"
    assert lines[2].startswith("m[0].content: was '…")
    assert "Be short.'" in lines[2]
    assert "Be long.'" in lines[2]
    assert lines[3] == "new: was absent, is now [1]"
    assert lines[4].startswith("s: was '…")
    assert lines[4].endswith("company. !'")
    assert len(lines) == 5
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize("sections", [SMALL, WHOLE])
def test_the_document_is_the_job(tmp_path: Path, sections: Sections) -> None:
    """A job written back as TOML is the same job, overrides included, also read from another folder."""
    (tmp_path / "elsewhere").mkdir()
    job = load(write(tmp_path, {"name": "it", **sections}), ["schedule.max_in_flight=3", "request.temperature=1"])
    copied = tmp_path / "elsewhere" / "job.toml"
    copied.write_bytes(job.document())
    again = load(copied)
    assert again.name == "it"
    assert again.meaning() == job.meaning()
    assert (again.input, again.service, again.schedule, again.retry) == (
        *(job.input, job.service, job.schedule, job.retry),
    )
    if sections is WHOLE:
        assert again.ledger_path == job.ledger_path
        assert again.document() == job.document()


# Durations and single parameters


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10m", 600), ("90s", 90), ("1.5h", 5400), ("250ms", 0.25), ("2d", 172800), (" 3 s ", 3), (7, 7), (0.5, 0.5)],
)
def test_durations(text: object, seconds: float) -> None:
    """A duration is a number with its unit, or plain seconds."""
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "10 years", "-1s", "1e3s", "1_0s", "nan", "infs", 0, -1, None, [], "0s"])
def test_what_is_no_duration(text: object) -> None:
    """Everything else is none."""
    with pytest.raises(ValueError, match="a duration such as"):
        duration(text)


def test_misfit_speaks_of_rows_as_of_jobs() -> None:
    """The check of a rendered parameter is the check of the job file."""
    assert misfit("chat", "temperature", 1) is None
    assert misfit("chat", "temperature", 3) == "temperature: a number from 0 to 2, not 3"
    assert misfit("chat", "messages", [{"role": "user", "content": "hi"}]) is None
    assert misfit("chat", "messages", [{"role": 5}]) == "messages[0]: every message has a role"
    assert misfit("completions", "prompt", 5) == (
        "prompt: a text, a list of texts, a list of token ids or a list of such lists, not 5"
    )


# Whatever comes

KEYS = st.one_of(
    st.sampled_from(
        [
            *(f"{section}.{key}" for section, values in WHOLE.items() for key in values),
            *(key for key, _, _ in (*UNKNOWN, *WRONG)),
            *(key for key, _ in LATER),
            *WHOLE,
        ]
    ),
    st.tuples(st.sampled_from([*WHOLE]), st.text(max_size=8)).map(
        lambda pair: f"{pair[0]}.{pair[1].replace('.', '_')}"
    ),
    st.text(max_size=8).map(lambda text: text.replace(".", "_")),
)
SCALARS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["auto", "{{ a }}", "{{", "http://[", "s3://x", "simulator", "10m", "\0", "\n", "../..", "all"]),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(),
    st.booleans(),
    st.datetimes(),
    st.dates(),
    st.times(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["file", "schema", "role", "content", "input", "output", "type"]), st.text(max_size=5)
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=5,
)


@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3), st.sampled_from([SMALL, WHOLE]))
@example([("request.seed", int("9" * 4000))], SMALL)
@example([("output.a\nb\nc\nd", 1)], SMALL)
@example([("service.prices.a\nb\nc\nd", {"input": -1, "output": 1})], SMALL)
@example([("request.model", "\x1b[2J"), ("input.\x1b[2J", 1)], SMALL)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_job_file_breaks_the_reading(
    tmp_path: Path, mutations: list[tuple[str, object]], sections: Sections
) -> None:
    """Whatever stands in a job file, it is a job that can be written back, or a JobError of a few plain lines."""
    made: dict[str, object] = copy.deepcopy(dict(sections))
    for key, value in mutations:
        section, _, name = key.partition(".")
        inner = made.get(section)
        if name and isinstance(inner, dict):
            inner[name] = value
        else:
            made[key] = value
    path = tmp_path / "job.toml"
    path.write_bytes(msgspec.toml.encode(made))
    tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        job = load(path)
    except JobError as error:
        message = str(error)
        assert 0 < len(message.splitlines()) <= 3
        assert len(message) < 2000
        assert "Traceback" not in message
        assert "\x1b" not in message
    else:
        path.write_bytes(job.document())
        assert list(differences(load(path).meaning(), job.meaning())) == []
        msgspec.json.encode(job.meaning())


# Whole requests

BODY: Sections = {"input": {"path": "rows.jsonl"}, "request": {"body": "{{ body }}"}, "output": {"path": "out"}}
BATCH: Sections = {"input": {"path": "in.jsonl", "format": "openai-batch"}, "output": {"path": "out"}}


def test_a_body_is_a_whole_request(tmp_path: Path) -> None:
    """Nothing but the endpoint stands beside it, and it is part of what the output is begun with."""
    job = load(write(tmp_path, changed("request.endpoint", "completions", BODY)))
    assert (job.request.endpoint, job.request.body, job.request.parameters) == ("completions", "{{ body }}", {})
    assert job.meaning()["request.body"] == "{{ body }}"
    assert "{{ body }}" in repr(job)


def test_a_batch_file_needs_no_request(tmp_path: Path) -> None:
    """Its rows say what is asked, where, and under which id; an id of the job goes before."""
    job = load(write(tmp_path, BATCH))
    assert (job.request.endpoint, job.request.body, job.input.id) == (None, "{{ body }}", "custom_id")
    assert load(write(tmp_path, changed("input.id", "url", BATCH))).input.id == "url"


@pytest.mark.parametrize(
    ("sections", "key", "value", "said"),
    [
        (BODY, "request.model", "m", "request.model: body is a whole request; nothing is added to it"),
        (BODY, "request.prompt", "{{ text }}", "request.prompt: body is a whole request"),
        (BODY, "request.body", "{}", "request.body: a template such as \"{{ body }}\", not '{}'"),
        (BODY, "request.body", {"model": "m"}, 'request.body: a template such as "{{ body }}"'),
        (BATCH, "request.temperature", 0, "request.temperature: a batch file's rows are whole requests"),
        (BATCH, "request.endpoint", "chat", "request.endpoint: in a batch file the url of each row names it"),
        (SMALL, "input", {"path": "a", "sample": 3, "limit": 4}, "input: sample or limit, not both"),
        (SMALL, "input", {"path": "a", "sample": 0}, "input.sample: a whole number from 1, not 0"),
    ],
)
def test_what_nothing_is_added_to_stands_alone(
    tmp_path: Path, sections: Sections, key: str, value: object, said: str
) -> None:
    """One line says which key, and why."""
    assert said in refusal(write(tmp_path, changed(key, value, sections)))
