"""The job file's JSON Schema: it takes the jobs that run, and refuses what the job file refuses."""

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest

from batcher.schema import MEANINGS, schema
from tests import stories
from tests.test_job import LATER, SMALL, UNKNOWN, WHOLE, WRONG, Sections, changed

ROOT = Path(__file__).parent.parent
CHECK = jsonschema_rs.Draft202012Validator(schema())

BEYOND = [
    ("input.path", "a\0b"),
    ("output.path", "a\0b"),
    ("input.path", "s3://bucket/rows.parquet"),
    ("input.path", ["rows.jsonl", "hf://datasets/x/y.parquet"]),
    ("output.path", "s3://bucket/out"),
    ("output.ledger", "gs://bucket/ledger"),
    ("schedule.queue_threshold", "2s"),
    ("schedule.queue_threshold", "20ms"),
    ("schedule.queue_threshold", "21s"),
    ("score", {"target": "label", "answer": "regex:("}),
    ("score", {"target": "label", "answer": "regex:"}),
    ("request.parse", "regex:(\\d*)"),
]
"""What a schema does not say: which texts are paths or expressions and what these find, which words are for later, how
long a time is."""


def documents() -> Iterator[tuple[str, dict[str, object]]]:
    """Every whole job that the project shows: the files under jobs/, and those in the docs."""
    for path in sorted((ROOT / "jobs").glob("*.toml")):
        yield path.name, tomllib.loads(path.read_text(encoding="utf-8"))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for index, block in enumerate(
            re.findall(r"^```toml\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)
        ):
            document = tomllib.loads(block)
            if {"input", "request", "output"} <= document.keys():
                yield f"{path.name}:{index}", document


@pytest.mark.parametrize(("name", "document"), [*documents(), ("small", SMALL), ("whole", WHOLE)])
def test_every_job_that_is_shown_fits(name: str, document: dict[str, object]) -> None:
    """Jobs of the project and of the docs pass."""
    assert [error.message for error in CHECK.iter_errors(document)] == []


def test_it_is_a_json_schema() -> None:
    """Of the draft that it names."""
    assert jsonschema_rs.meta.is_valid(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def in_json(value: object) -> bool:
    """Whether JSON can say a value: it has no word for NaN."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, value, *_ in (*UNKNOWN, *WRONG, *LATER) if in_json(value)],
)
def test_what_the_job_file_refuses_does_not_fit(key: str, value: object) -> None:
    """Unknown keys, wrong types, values out of range and what is to come, but for what a schema cannot tell."""
    assert CHECK.is_valid(changed(key, value)) == ((key, value) in BEYOND)


@pytest.mark.parametrize(
    ("request_", "fits"),
    [
        ({"model": "m", "prompt": "p"}, True),
        ({"model": "m", "prompt": {"file": "p.txt"}, "system": {"file": "s.txt"}}, True),
        ({"model": "{{ m }}", "prompt": "p", "temperature": "{{ t }}", "n": "{% if a %}1{% endif %}"}, True),
        ({"model": "m", "messages": "{{ messages }}"}, True),
        ({"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "{{ a }}"}]}]}, True),
        ({"model": "m", "prompt": "p", "stop": ["a", {"file": "stop.txt"}]}, True),
        ({"model": "m", "prompt": "p", "response_format": {"schema": "s.json"}}, True),
        ({"model": "m", "prompt": "p", "response_format": {"schema": {"type": "object"}}}, True),
        ({"model": "m", "prompt": "p", "response_format": {"type": "json_object"}}, True),
        ({"model": "m", "prompt": "p", "endpoint": "completions", "max_tokens": 1}, True),
        ({"body": "{{ body }}"}, True),
        ({"body": "{{ body }}", "endpoint": "completions"}, True),
        ({"body": "{{ body }}", "model": "m"}, False),
        ({"body": {"model": "m"}}, False),
        ({"model": "m"}, False),
        ({"prompt": "p"}, False),
        ({"model": "m", "system": "s"}, False),
        ({"model": "m", "prompt": "p", "messages": [{"role": "user"}]}, False),
        ({"model": "m", "system": "s", "messages": [{"role": "user"}]}, False),
        ({"model": "m", "messages": [{"content": "c"}]}, False),
        ({"model": "m", "prompt": "p", "max_tokens": 1, "max_completion_tokens": 1}, False),
        ({"model": "m", "endpoint": "completions"}, False),
        ({"model": "m", "endpoint": "completions", "prompt": "p", "system": "s"}, False),
        ({"model": "m", "endpoint": "completions", "prompt": "p", "max_completion_tokens": 1}, False),
        ({"model": "m", "prompt": "p", "response_format": {"schema": "s.json", "strict": True}}, False),
        ({"model": "m", "prompt": "p", "temperature": "hot"}, False),
        ({"model": "m", "prompt": ["p"]}, False),
        ({"model": "m", "prompt": ["p", "q"], "endpoint": "completions", "logprobs": 3}, True),
        ({"model": "m", "prompt": [[1, 2]], "endpoint": "completions", "echo": True}, True),
        ({"model": "m", "prompt": "p", "echo": True}, False),
        ({"model": "m", "prompt": "p", "tools": [{"type": "function", "function": {"name": "f"}}]}, True),
        ({"model": "m", "prompt": "p", "tools": "{{ tools }}", "tool_choice": "required"}, True),
        ({"model": "m", "prompt": "p", "tools": [{"function": {"name": "f"}}]}, False),
        ({"model": "m", "prompt": "p", "tool_choice": "maybe"}, False),
        ({"model": "m", "prompt": "p", "logit_bias": {"5": -100}}, True),
        ({"model": "m", "prompt": "p", "logit_bias": {"5": 101}}, False),
        ({"model": "m", "prompt": "p", "extra": {"top_k": 5}}, True),
        ({"model": "m", "prompt": "p", "extra": {"n": 5}}, False),
    ],
)
def test_what_goes_together(request_: Sections, fits: bool) -> None:
    """Templates and files may stand for values; parameters that contradict each other do not fit."""
    assert CHECK.is_valid(changed("request", request_)) == fits


@pytest.mark.parametrize(
    ("given", "request_", "fits"),
    [
        ({"format": "openai-batch"}, None, True),
        ({"format": "openai-batch"}, {"body": "{{ body }}"}, True),
        ({"format": "openai-batch"}, {"endpoint": "chat"}, False),
        ({"format": "openai-batch"}, {"model": "m", "prompt": "p"}, False),
        ({"format": "csv"}, None, False),
        ({"where": "a > 3", "limit": 5}, {"body": "{{ body }}"}, True),
        ({"where": "a > 3", "sample": 5}, {"body": "{{ body }}"}, True),
        ({"sample": 3, "limit": 5}, {"body": "{{ body }}"}, False),
    ],
)
def test_what_goes_with_an_input(given: Sections, request_: Sections | None, fits: bool) -> None:
    """A batch file needs no request; a sample and a limit exclude each other."""
    document = {"input": {"path": "in", **given}, "output": {"path": "out"}}
    assert CHECK.is_valid(document | ({} if request_ is None else {"request": request_})) == fits


def test_every_key_says_what_it_is_for() -> None:
    """Each section and key has its line in MEANINGS, and no line is left over."""
    sections = schema()["properties"]
    keys = {f"{name}.{key}" for name, section in sections.items() for key in section.get("properties", ())}
    assert sorted(MEANINGS) == sorted({*sections, *keys})


def test_the_command_prints_it() -> None:
    """As JSON on standard output."""
    ended = subprocess.run(stories.command("schema"), capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == schema()
