"""Malformed job files: real ones, broken in every way that a hand, an editor or a program breaks them."""

import json
import re
import string
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tests.test_job import SMALL, VALUES, WHOLE, Sections

SECRET = "sk-canary-77d1e0c4"
"""A secret that somebody wrote into a job file: no message may repeat it."""

TICKETS = Path(__file__).parent.parent / "jobs" / "tickets.toml"
LISTED: Sections = {
    "input": {"path": "*.jsonl", "format": "jsonl", "where": "b = 1 AND text <> ''", "sample": 2},
    "request": {
        "model": "{{ model }}",
        "messages": [
            {"role": "system", "content": {"file": "prompt.txt"}},
            {"role": "user", "content": [{"type": "text", "text": "{% if a %}{{ a | upper }}{% endif %} {{ text }}"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
        "response_format": {"schema": "ticket.schema.json"},
    },
    "service": {"base_url": "simulator"},
    "output": {"path": "out", "keep": ["a"]},
}
_SECTIONS = (SMALL, WHOLE, LISTED)
BASES = (TICKETS.read_bytes(), *(msgspec.toml.encode({"name": "it", **sections}) for sections in _SECTIONS))

_TOKENS = [
    *(
        "",
        " ",
        "\n",
        "=",
        "==",
        '"',
        '"""',
        "'''",
        "'",
        "[",
        "]",
        "[[",
        "{",
        "}",
        ",",
        ".",
        "#",
        "\\",
        "\r",
        "\t",
        "\0",
    ),
    *("true", "nan", "-inf", "null", "None", "0x", "1_", "1e999", "-0", "9" * 30, "9" * 5000, "1." + "0" * 400 + "1"),
    *("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0000-00-00", "[]", "{}", "[1, 'a']", "{ a = { b = 1 } }"),
    *(
        '"\\u0000"',
        '"\\ud800"',
        '"\\u001b[2J"',
        '"\\u202e"',
        '"\x1b[31m"',
        '"\x07"',
        '"\x9b2J"',
        '"\u2028"',
        '"\ufeff"',
    ),
    *(
        '"{{"',
        '"{{ }}"',
        '"{% for x in y %}"',
        '"{{ nope }}"',
        '"{{ a.__class__ }}"',
        "\"{% include 'x' %}\"",
        '"{{ 1/0 }}"',
    ),
    *(
        '"../.."',
        '"/dev/null"',
        '"no/such/file"',
        '"folder"',
        '"binary"',
        '"s3://b/k"',
        '"file:///etc/passwd"',
        '"*"',
        '"[a"',
    ),
    *('{ file = "no" }', '{ file = "folder" }', '{ file = "binary" }', '{ file = "a\\u0000b" }', "{ file = 1 }"),
    *('{ schema = "no" }', '{ schema = "binary" }', '{ schema = "deep.json" }', '{ schema = "list.json" }'),
    *('{ schema = "around.json" }', '{ schema = { type = "objekt" } }', '{ schema = { "$ref" = "http://x/y" } }'),
    *("[input]", "[[input]]", "[request.messages]", "[request]", "[a.b.c]", "[output.path]", "input = 1", "[]", "[ ]"),
    *(
        "auto",
        "all",
        '"auto"',
        '"all"',
        '["all"]',
        '"simulator"',
        '"http://[::1"',
        '"http://x.example"',
        '"https://h:99999"',
    ),
]
_SECRETS = [
    f'[service]\napi_key = "{SECRET}"',
    f'[service]\napi_key_env = "{SECRET}"',
    f'[service]\napi_key_env = ["{SECRET}"]',
    f'[service]\nheaders_env = {{ Authorization = "Bearer {SECRET}" }}',
    f'[service]\nheaders_env = "Authorization: Bearer {SECRET}"',
    f'[service]\nbase_url = "https://user:{SECRET}@api.example.com/v1"',
    f'[service]\nbase_url = "https://api.example.com/v1?key={SECRET}"',
    f'[service]\nkey = "{SECRET}"',
    f'[service.headers]\nAuthorization = "{SECRET}"',
]
_BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([token.encode("utf-8", "surrogatepass") for token in _TOKENS]),
    st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"\xed\xa0\x80", b"\r\n", b"\x1b]0;x\x07"]),
)


NAMES = ("rows.jsonl", "a.jsonl", "tickets.jsonl", "a.parquet", "b.parquet", "prompt.txt", "ticket.schema.json")
"""Files that a message may name in the job file's place."""


def lay_out(folder: Path) -> None:
    """The files that the job files speak of, sound ones and others."""
    rows = [
        {
            "text": "tea",
            "a": "x",
            "b": 1,
            "model": "m",
            "ticket_id": "T-1",
            "subject": "s",
            "body": "b",
            "label": "l",
            "key": "k",
        },
        {
            "text": "rain",
            "a": "y",
            "b": 2,
            "model": "m",
            "ticket_id": "T-2",
            "subject": "s",
            "body": "b",
            "label": "l",
            "key": "k",
        },
    ]
    for name in ("rows.jsonl", "tickets.jsonl", "a.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    (folder / "ticket.schema.json").write_bytes(TICKETS.with_name("ticket.schema.json").read_bytes())
    (folder / "prompt.txt").write_text("Be short, {{ a }}.")
    (folder / "folder").mkdir()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "list.json").write_text("[1]")
    (folder / "deep.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    around = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    (folder / "around.json").write_text(json.dumps(around))


@st.composite
def _bytes(draw: st.DrawFn, base: bytes) -> bytes:
    """Bytes put in, taken out, cut off."""
    start = draw(st.integers(0, len(base)))
    stop = min(len(base), start + draw(st.sampled_from([0, 0, 1, 1, 2, 10, 10_000])))
    return base[:start] + draw(st.one_of(st.just(b""), _BYTES)) + base[stop:]


@st.composite
def _values(draw: st.DrawFn, base: bytes) -> bytes:
    """A key with another value, another name, or another place."""
    lines = base.decode("utf-8", "surrogateescape").split("\n")
    number = draw(st.sampled_from([at for at, line in enumerate(lines) if "=" in line] or [0]))
    key, _, value = lines[number].partition("=")
    token = draw(st.sampled_from(_TOKENS))
    lines[number] = draw(
        st.sampled_from(
            [
                f"{key}= {token}",
                f"{token}= {value}",
                f"{key.strip()}.x = {value}",
                f"{key}= {value}\n{key}= {value}",
                f"{key}= [{value}]",
                f"{key}= {{ file = {value} }}",
                f"{key[:-2]} = {value}",
                f"{key}{value}",
            ]
        )
    )
    if draw(st.booleans()):
        lines.append(lines.pop(draw(st.integers(0, len(lines) - 1))))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def _typed(draw: st.DrawFn, base: bytes) -> bytes:
    """A sound TOML file with a key set to whatever TOML can say."""
    document = draw(st.sampled_from([{"name": "it", **sections} for sections in _SECTIONS]))
    made = msgspec.toml.decode(msgspec.toml.encode(document))
    section = draw(st.sampled_from([*made]))
    value = draw(VALUES)
    if isinstance(made[section], dict) and draw(st.integers(0, 4)):
        made[section][draw(st.one_of(st.sampled_from([*made[section]]), st.text(max_size=5)))] = value
    else:
        made[section] = value
    try:
        return msgspec.toml.encode(made)
    except (TypeError, ValueError):  # what TOML cannot say
        return base


@st.composite
def _deep(draw: st.DrawFn, base: bytes) -> bytes:
    """Nested without end: lists, tables, keys, headers, templates."""
    depth = draw(st.sampled_from([20, 200, 2_000]))
    key = draw(
        st.sampled_from(["request.stop", "request.messages", "request.response_format.schema", "x", "input.path"])
    )
    return draw(
        st.sampled_from(
            [
                f"{key} = {'[' * depth}{']' * depth}\n",
                f"{key} = {'[' * depth}\n",
                f"{key} = {'{ a = ' * depth}1{' }' * depth}\n",
                f"{'.'.join('a' * depth)} = 1\n",
                f'request.prompt = "{{{{ {"(" * depth}1{")" * depth} }}}}"\n',
                f'request.prompt = "{{{{ {"-" * depth}1 }}}}"\n',
                f'request.prompt = "{"{% if a %}" * depth}"\n',
            ]
        )
    ).encode() + (base if draw(st.booleans()) else re.sub(rb"(?m)^(stop|messages|prompt|path) ?=.*\n", b"", base))


@st.composite
def _secret(draw: st.DrawFn, base: bytes) -> bytes:
    """A secret where none belongs."""
    without = re.sub(rb"(?ms)^\[service\]\n.*?(?=^\[|\Z)", b"", base)
    return without + b"\n" + draw(st.sampled_from(_SECRETS)).encode() + b"\n"


@st.composite
def job_files(draw: st.DrawFn) -> bytes:
    """The bytes of a job file that is broken once or a few times, or by luck not at all."""
    made = draw(st.sampled_from(BASES))
    for _ in range(draw(st.integers(1, 3))):
        made = draw(draw(st.sampled_from([_bytes, _values, _values, _typed, _typed, _deep, _secret]))(made))
    if draw(st.integers(0, 30)) == 0:
        made = draw(st.one_of(st.binary(max_size=100), st.text(string.printable, max_size=100).map(str.encode)))
    return made
