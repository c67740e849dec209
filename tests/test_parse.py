"""Answers that fit a schema become typed values; others say why they do not."""

import io
import json
import re
from datetime import UTC, date, datetime, time, timedelta, timezone
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.parse import AnswerSchema, format_schema
from batcher.records import Misfit

STRING = {"type": "string"}
INTEGER = {"type": "integer"}


def of(members: dict[str, object], **keywords: object) -> AnswerSchema:
    """The schema of an object with these properties."""
    return AnswerSchema({"type": "object", "properties": members, **keywords}, "test")


def fitting(schema: AnswerSchema, text: str) -> dict[str, object]:
    """The value of a text that fits."""
    value = schema.read(text)
    assert not isinstance(value, Misfit), value
    return value


def message(schema: AnswerSchema, text: str | None) -> str:
    """The message about a text that does not fit."""
    value = schema.read(text)
    assert isinstance(value, Misfit), value
    return value.message


# Types.

NODE = {"type": "object", "properties": {"name": STRING, "next": {"$ref": "#/$defs/node"}}}
DEFS = {
    "label": {"enum": ["a", "b"]},
    "a/b c": INTEGER,
    "again": {"$ref": "#/$defs/label"},
    "loop": {"$ref": "#/$defs/loop"},
    "node": NODE,
    "other": {"$id": "http://example.com/other", "$defs": {"x": INTEGER}},
}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (STRING, pa.string()),
        ({"type": ["string"]}, pa.string()),
        ({"enum": ["a", "b"]}, pa.string()),
        ({"enum": ["a", None]}, pa.string()),
        ({"const": "a"}, pa.string()),
        (INTEGER, pa.int64()),
        ({"enum": [1, 2]}, pa.int64()),
        ({"enum": [None, 1]}, pa.int64()),
        ({"const": 1}, pa.int64()),
        ({"type": "number"}, pa.float64()),
        ({"type": "number", "enum": [1, 2]}, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"type": "string", "format": "date"}, pa.date32()),
        ({"enum": ["2026-01-31", None], "format": "date"}, pa.date32()),
        ({"type": ["null", "string"], "format": "date-time"}, pa.timestamp("us", tz="UTC")),
        ({"type": "string", "format": "time"}, pa.time64("us")),
        ({"type": "string", "format": "email"}, pa.string()),
        ({"allOf": [{"$ref": "#/$defs/label"}], "default": "a"}, pa.string()),
        ({"type": ["integer", "null"]}, pa.int64()),
        ({"anyOf": [INTEGER, {"type": "null"}]}, pa.int64()),
        ({"anyOf": [{"type": "null", "title": "none"}, {"$ref": "#/$defs/label"}]}, pa.string()),
        ({"type": "array", "items": INTEGER}, pa.list_(pa.int64())),
        ({"type": ["array", "null"], "items": {"type": "array", "items": STRING}}, pa.list_(pa.list_(pa.string()))),
        ({"type": "array", "items": {}}, pa.list_(pa.string())),
        ({"type": "object", "properties": {"z": INTEGER, "a": STRING}}, pa.struct({"z": pa.int64(), "a": pa.string()})),
        (
            {"type": "object", "properties": {"z": INTEGER}, "additionalProperties": False, "required": ["z"]},
            pa.struct({"z": pa.int64()}),
        ),
        ({"$ref": "#/$defs/again"}, pa.string()),
        ({"$ref": "#/$defs/a~1b%20c", "description": "escaped"}, pa.int64()),
        ({"$ref": "#/$defs/node"}, pa.struct({"name": pa.string(), "next": pa.string()})),
    ],
)
def test_types(place: dict[str, object], expected: pa.DataType) -> None:
    """Each place in a schema that is of the typed subset has its Arrow type, and the field may be null."""
    assert of({"x": place}, **{"$defs": DEFS}).arrow_type == pa.struct([pa.field("x", expected)])


def shown_types() -> list[tuple[str, ...]]:
    """The lines of the type table in docs/labels.md: schema, type, answer and what is kept, the last in a cell each."""
    text = (Path(__file__).parents[1] / "docs/labels.md").read_text()
    table = text.partition("| a place in the schema |")[2].partition("\n\n")[0]
    return [tuple(re.findall(r"`([^`]*)`", cell)[-1] for cell in line.split(" | ")) for line in table.splitlines()[2:]]


@pytest.mark.parametrize("line", shown_types())
def test_the_type_table_is_true(line: tuple[str, ...]) -> None:
    """Each line of the table says what column a schema has, and what becomes of an answer."""
    place, kind, answer, kept = line
    schema = of({"x": json.loads(place)}, **{"$defs": DEFS})
    assert str(schema.arrow_type.field("x").type) == kind
    array, altered = schema.column([fitting(schema, f'{{"x": {answer}}}')])
    assert json.loads(json.dumps(array.to_pylist()[0]["x"], default=str)) == json.loads(kept)
    assert altered == []


@pytest.mark.parametrize(
    "place",
    [
        {},
        True,
        {"type": "null"},
        {"type": ["string", "integer"]},
        {"anyOf": [STRING, INTEGER]},
        {"anyOf": [STRING, INTEGER, {"type": "null"}]},
        {"oneOf": [STRING, INTEGER]},
        {"enum": ["a", 1]},
        {"enum": [True, 1]},
        {"const": None},
        {"type": "array"},
        {"type": "array", "prefixItems": [INTEGER], "items": STRING},
        {"type": "object"},
        {"type": "object", "properties": {}},
        {"properties": {"a": STRING}},
        {"type": "object", "additionalProperties": STRING},
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": True},
        {"type": "object", "properties": {"a": STRING}, "patternProperties": {"^b": STRING}},
        {"type": "object", "properties": {"a": STRING}, "allOf": [{"properties": {"b": STRING}}]},
        {"$ref": "#/$defs/node", "properties": {"more": STRING}},
        {"$ref": "#/$defs/loop"},
        {"$ref": "#/$defs/other/$defs/x"},
        {"$ref": "http://example.com/other#/$defs/x"},
        {"$id": "http://example.com/mine", "type": "integer"},
    ],
)
def test_all_else_is_json_text(place: object) -> None:
    """A place whose values have no one simple type is a string column."""
    assert of({"x": place}, **{"$defs": DEFS}).arrow_type == pa.struct({"x": pa.string()})


def test_root_may_be_a_reference() -> None:
    """The root object may stand in `$defs`, and where it holds itself it is JSON text."""
    schema = AnswerSchema({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, "node")
    assert schema.arrow_type == pa.struct({"name": pa.string(), "next": pa.string()})
    assert fitting(schema, '{"name": "a", "next": {"name": "b"}}') == {"name": "a", "next": '{"name":"b"}'}


def test_root_is_always_a_struct() -> None:
    """What the root allows beyond its named properties is left to the text of the answer."""
    schema = of({"a": INTEGER}, additionalProperties=True)
    assert schema.arrow_type == pa.struct({"a": pa.int64()})
    assert fitting(schema, '{"a": 1, "b": 2}') == {"a": 1}


# Values.


class Case(NamedTuple):
    """A place in a schema, its Arrow type, and values: as the model writes them, and as they are stored."""

    schema: dict[str, object]
    type: pa.DataType
    values: st.SearchStrategy[tuple[object, object]]


def same(values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, object]]:
    """Values that are stored as they are written."""
    return values.map(lambda value: (value, value))


NAMES = st.text(max_size=6)
INT64 = st.integers(-(2**63), 2**63 - 1)
WHOLE = st.integers(-(2**53), 2**53)
OFFSETS = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
LEAVES: list[Case] = [
    Case({"type": "string"}, pa.string(), same(st.text())),
    Case({"type": "integer"}, pa.int64(), same(INT64) | WHOLE.map(lambda n: (float(n), n))),
    Case(
        {"type": "number"},
        pa.float64(),
        same(st.floats(allow_nan=False, allow_infinity=False)) | st.integers().map(lambda n: (n, float(n))),
    ),
    Case({"type": "boolean"}, pa.bool_(), same(st.booleans())),
    Case(
        {"type": "string", "format": "date"},
        pa.date32(),
        st.dates(date(1, 1, 1)).map(lambda day: (day.isoformat(), day)),
    ),
    Case(
        {"type": "string", "format": "date-time"},
        pa.timestamp("us", tz="UTC"),
        st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=OFFSETS).map(
            lambda moment: (moment.isoformat(), moment.astimezone(ZoneInfo("UTC")))
        ),
    ),
    Case(
        {"type": "string", "format": "time"},
        pa.time64("us"),
        st.tuples(st.times(), st.sampled_from(["", "Z", "+00:00"])).map(
            lambda p: (p[0].isoformat() + p[1], p[0].replace(fold=0))
        ),
    ),
]


@st.composite
def cases(draw: st.DrawFn, definitions: dict[str, object], depth: int = 3) -> Case:
    """A place of the typed subset; what it refers to is added to `definitions`."""
    form = draw(
        st.sampled_from(["leaf", "strings", "integers", "list", "object", "nullable", "reference"][: 3 + depth * 4])
    )
    match form:
        case "leaf":
            leaf: Case = draw(st.sampled_from(LEAVES))
            return leaf
        case "strings":
            labels = draw(st.lists(st.text(), min_size=1, max_size=4, unique=True))
            return Case({"enum": labels}, pa.string(), same(st.sampled_from(labels)))
        case "integers":
            codes = draw(st.lists(INT64, min_size=1, max_size=4, unique=True))
            return Case({"type": "integer", "enum": codes}, pa.int64(), same(st.sampled_from(codes)))
        case "object":
            return draw(objects(definitions, depth - 1))
    inner = draw(cases(definitions, depth - 1))
    match form:
        case "list":
            lists = st.lists(inner.values, max_size=3).map(lambda pairs: ([p[0] for p in pairs], [p[1] for p in pairs]))
            return Case({"type": "array", "items": inner.schema}, pa.list_(inner.type), lists)
        case "nullable":
            nullable: dict[str, object] = {"anyOf": [inner.schema, {"type": "null"}]}
            if isinstance(inner.schema.get("type"), str) and "enum" not in inner.schema and draw(st.booleans()):
                nullable = {**inner.schema, "type": [inner.schema["type"], "null"]}
            return Case(nullable, inner.type, inner.values | st.just((None, None)))
    name = f"{len(definitions)}/{draw(NAMES)}"
    definitions[name] = inner.schema
    reference = "#/$defs/" + quote(name.replace("~", "~0").replace("/", "~1"))
    return inner._replace(schema={"$ref": reference})


@st.composite
def objects(draw: st.DrawFn, definitions: dict[str, object], depth: int = 3) -> Case:
    """An object of the typed subset. Some properties may be absent, some objects allow more than they name."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    members = {name: draw(cases(definitions, depth)) for name in names}
    required = [name for name in names if draw(st.booleans())]
    closed = draw(st.booleans())

    @st.composite
    def values(draw: st.DrawFn) -> tuple[object, object]:
        written: dict[str, object] = {}
        stored: dict[str, object] = {}
        for name, member in members.items():
            stored[name] = None
            if name in required or draw(st.booleans()):
                written[name], stored[name] = draw(member.values)
        if not closed and draw(st.booleans()):
            written.setdefault(draw(st.text(min_size=7)), {"more": [1]})
        return written, stored

    schema: dict[str, object] = {"type": "object", "properties": {name: m.schema for name, m in members.items()}}
    schema["required"] = required
    if closed:
        schema["additionalProperties"] = False
    return Case(schema, pa.struct([pa.field(name, member.type) for name, member in members.items()]), values())


@st.composite
def roots(draw: st.DrawFn) -> Case:
    """A whole schema of the typed subset."""
    definitions: dict[str, object] = {}
    root = draw(objects(definitions))
    return root._replace(schema={**root.schema, "$defs": definitions})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fitting_values_come_back(data: st.DataObject) -> None:
    """Whatever the schema of the typed subset, values that fit it are read, stored in Parquet and read back equal."""
    root = data.draw(roots())
    schema = AnswerSchema(root.schema, "generated")
    assert schema.arrow_type == root.type
    pairs = data.draw(st.lists(root.values, max_size=4))
    writer = json.JSONEncoder(ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 2])))
    values = [fitting(schema, writer.encode(written)) for written, _ in pairs]
    array, altered = schema.column([None, *values])
    file = io.BytesIO()
    pq.write_table(pa.table({"parsed": array}), file)
    assert altered == []
    # repr tells 1 from 1.0 and from True, and the order of fields.
    assert repr(pq.read_table(file)["parsed"].to_pylist()) == repr([None, *(stored for _, stored in pairs)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_text_holds_the_value(value: object) -> None:
    """A place without a simple type keeps any value as its JSON text, and null as null."""
    schema = of({"x": {}})
    array, _ = schema.column([fitting(schema, json.dumps({"x": value}))])
    stored = array.to_pylist()[0]["x"]
    assert stored is None if value is None else repr(json.loads(stored)) == repr(value)


@pytest.mark.parametrize(
    ("place", "text", "stored"),
    [
        (INTEGER, "1.0", 1),
        (INTEGER, "-1E2", -100),
        (INTEGER, str(2**63 - 1), 2**63 - 1),
        ({"enum": [1, 2]}, "2.0", 2),
        ({"type": "number"}, "3", 3.0),
        ({"type": "number"}, "1e-999", 0.0),
        (STRING, '"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ({"anyOf": [STRING, INTEGER]}, '"3"', '"3"'),
        ({"anyOf": [STRING, INTEGER]}, "3", "3"),
        ({}, str(10**30), str(10**30)),
        ({"type": "array", "items": {"type": ["integer", "null"]}}, "[1, null]", [1, None]),
    ],
)
def test_forms_of_values(place: dict[str, object], text: str, stored: object) -> None:
    """A value is stored in the form of its column, whichever way the model wrote it."""
    assert repr(fitting(of({"x": place}), f'{{"x": {text}}}')) == repr({"x": stored})


def test_absent_and_null_are_the_same() -> None:
    """A property that is absent and one that is null are both null."""
    schema = of({"a": {"type": ["string", "null"]}, "b": INTEGER})
    assert fitting(schema, '{"a": null, "b": 1}') == fitting(schema, '{"b": 1}') == {"a": None, "b": 1}


@pytest.mark.parametrize("text", [' \n{"a": 1}\t ', '\ufeff{"a": 1}', '\r\n\ufeff\n{"a": 1}', '\u00a0{"a":1}\u3000'])
def test_white_space_and_bom(text: str) -> None:
    """White space around an answer and a byte order mark before it do not matter."""
    assert fitting(of({"a": INTEGER}), text) == {"a": 1}


# Misfits.

TICKET = of(
    {
        "label": {"enum": ["bug", "bill"]},
        "level": {"type": "integer", "minimum": 1},
        "size": {"type": "number"},
        "note": {"type": ["string", "null"]},
        "mood": {"anyOf": [{"enum": ["glad", "sad"]}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "object", "properties": {"a/b~": INTEGER}}},
    },
    required=["label"],
    additionalProperties=False,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "the answer has no text"),
        ("", "not JSON: Expecting value, at character 0 of 0"),
        ("It is a bug.", "not JSON: Expecting value, at character 0 of 12"),
        ("{'label': 'bug'}", "not JSON: Expecting property name enclosed in double quotes, at character 1 of 16"),
        ('{"label": "bug"', "not JSON: Expecting ',' delimiter, at character 15 of 15"),
        ('{"label": "bug", "size": NaN}', "NaN is not a JSON number"),
        ('{"label": "bug", "size": -Infinity}', "-Infinity is not a JSON number"),
        ('{"label": "bug", "size": 1e999}', "the number 1e999 is out of range"),
        ('{"label": "bug", "label": "bill"}', 'the key "label" stands twice in one object'),
        ("[1]", 'the value is not of type "object"'),
        ('"bug"', 'the value is not of type "object", found "bug"'),
        ("{}", '"label" is a required property'),
        ('{"label": "Bug"}', '/label: the value is not one of "bug" or "bill", found "Bug"'),
        ('{"label": "\\ud800"}', '/label: the value is not one of "bug" or "bill", found "\ufffd"'),
        ('{"label": null}', '/label: the value is not one of "bug" or "bill", found null'),
        ('{"label": "bug", "x": 1}', "Additional properties are not allowed ('x' was unexpected)"),
        ('{"label": "bug", "\\ud800": 1}', "Additional properties are not allowed ('\ufffd' was unexpected)"),
        ('{"label": "bug", "level": true}', '/level: the value is not of type "integer", found true'),
        ('{"label": "bug", "level": 1.5}', '/level: the value is not of type "integer", found 1.5'),
        ('{"label": "bug", "level": 0}', "/level: the value is less than the minimum of 1, found 0"),
        ('{"label": "bug", "level": 9223372036854775808}', "/level: the integer does not fit into 64 bits"),
        ('{"label": "bug", "level": 1e30}', "/level: the integer does not fit into 64 bits"),
        ('{"label": "bug", "size": 1' + 400 * "0" + "}", "/size: the number is out of range"),
        ('{"label": "bug", "size": 1' + 5000 * "0" + "}", "Exceeds the limit (4300 digits)"),
        ('{"label": "bug", "mood": "bad"}', '/mood: the value is not one of "glad" or "sad", found "bad"'),
        (
            '{"label": "bug", "tags": [{}, {"a/b~": "x"}]}',
            '/tags/1/a~1b~0: the value is not of type "integer", found "x"',
        ),
        ('{"label": "bug", "tags": [{}, {"a/b~": 1e19}]}', "/tags/1/a~1b~0: the integer does not fit into 64 bits"),
        ("[" * 100_000, "the answer is nested too deeply"),
    ],
)
def test_misfits_say_where_and_why(text: str | None, expected: str) -> None:
    """A text that does not fit gets one line: the JSON pointer of the place, and the reason."""
    assert message(TICKET, text)[: len(expected)] == expected


FOUND = '{"label": "bug", "level": 2}'


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{FOUND}\n```",
        f"```\n{FOUND}\n```\nI hope that this helps.",
        f"Here is the answer: {FOUND} I hope that this helps.",
        f'First I thought {{"label": "bill"}}, but no: {FOUND}',
        f"Of [1] and {{those}} I take {FOUND}",
        f"{FOUND}\n\nThat was it }} or so.",
        f"{FOUND}{FOUND}",
    ],
)
def test_an_object_in_prose_is_found(text: str) -> None:
    """Where the text is no JSON, the last object in it that stands in no other brackets is the answer."""
    value = fitting(TICKET, text)
    assert (value["label"], value["level"]) == ("bug", 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Sure: {"more": {"label": "bug"}, "size": NaN}', "NaN is not a JSON number"),
        ('Sure: {"label": "bug", "label": "bug"}', 'the key "label" stands twice in one object'),
        ("Sure: {'label': 'bug', 'more': {\"label\": \"bug\"}}", "not JSON: Expecting value, at character 0 of "),
        ('Sure: {"more": {"label": "bug"}, "label": "b', "not JSON: Expecting value, at character 0 of "),
        ('{"label": "bug"} or rather {"label": "b', "not JSON: Extra data, at character 17 of "),
        ('Sure: ["a", {"label": "bug"}', "not JSON: Expecting value, at character 0 of "),
        ('Sure: ["a", {"label": "bug"}]', "not JSON: Expecting value, at character 0 of "),
        ("{'label': 'bug'}", "not JSON: Expecting property name enclosed in double quotes, at character 1 of 16"),
        ('{"label": "bug",}', "not JSON: "),
    ],
)
def test_what_is_part_of_something_else_is_not_found(text: str, expected: str) -> None:
    """Nothing is taken out of an object that is cut off, refused or none of JSON, or out of an array."""
    assert message(TICKET, text)[: len(expected)] == expected


MOMENTS = of({name: {"type": "string", "format": name} for name in ("date", "date-time", "time")})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("date", "2026-01-31", date(2026, 1, 31)),
        ("date", "2026-02-30", None),
        ("date", "20260131", None),
        ("date", "2026-W05-6", None),
        ("date", "0000-01-01", None),
        ("date", "2026-01-31T00:00:00Z", None),
        ("date", "31.01.2026", None),
        ("date-time", "2026-01-31T08:30:00Z", datetime(2026, 1, 31, 8, 30, tzinfo=UTC)),
        ("date-time", "2026-01-31t08:30:00.123456789z", datetime(2026, 1, 31, 8, 30, 0, 123456, UTC)),
        ("date-time", "2026-01-31T08:30:00-02:30", datetime(2026, 1, 31, 11, 0, tzinfo=UTC)),
        ("date-time", "2026-01-31T08:30:00", None),
        ("date-time", "2026-01-31 08:30:00Z", None),
        ("date-time", "2026-01-31", None),
        ("date-time", "2026-12-31T23:59:60Z", None),
        ("date-time", "9999-12-31T23:59:59-01:00", None),
        ("time", "08:30:00.5", time(8, 30, 0, 500_000)),
        ("time", "08:30:00Z", time(8, 30)),
        ("time", "08:30:00+02:00", None),
        ("time", "08:30", None),
        ("time", "24:00:00", None),
    ],
)
def test_moments_are_those_of_rfc_3339(name: str, text: str, expected: object) -> None:
    """A format that decides a type is checked: what is no date is no answer, and none is guessed."""
    found = MOMENTS.read(json.dumps({name: text}))
    if expected is None:
        assert isinstance(found, Misfit)
        kind = {"date": "a date", "date-time": "a date-time with offset", "time": "a time"}[name]
        assert found.message.startswith(f"/{name}: not {kind} such as ")
        assert found.message.endswith(f'"{text}"')
    else:
        assert not isinstance(found, Misfit)
        assert found[name] == expected


def test_key_twice_is_found_beside_colons_and_escapes() -> None:
    """A key that stands twice is found at any depth and in any writing, and colons in strings do no harm."""
    schema = of({"a": STRING, "b": {}})
    assert message(schema, '{"a": "x", "b": [{"k:": 1, "k:": 2}]}') == 'the key "k:" stands twice in one object'
    assert message(schema, '{"a": "\\u003a", "\\u0061": "y"}') == 'the key "a" stands twice in one object'
    assert fitting(schema, '{"a": "x: y\\":", "b": {"a": {"a": ":"}}}')["a"] == 'x: y":'


@st.composite
def texts_of_pairs(draw: st.DrawFn, depth: int = 2) -> tuple[str, bool]:
    """The text of an object, and whether some object in it has a key twice."""
    keys = draw(st.lists(st.sampled_from(["a", "b", ":", "\\u0061", '\\":']), max_size=4))
    members, twice = [], len({json.loads(f'"{key}"') for key in keys}) < len(keys)
    for key in keys:
        value, inner_twice = draw(st.sampled_from([("1", False), ('":"', False), ('"\\u003a"', False)]))
        if depth and draw(st.booleans()):
            value, inner_twice = draw(texts_of_pairs(depth - 1))
        members.append(f'"{key}":[{value}]')
        twice |= inner_twice
    return "{" + ",".join(members) + "}", twice


@given(texts_of_pairs())
def test_every_key_that_stands_twice_is_found(case: tuple[str, bool]) -> None:
    """An answer is refused for a key that stands twice exactly if there is one."""
    text, twice = case
    value = of({"x": {}}).read(f'{{"x": {text}}}')
    assert isinstance(value, Misfit) == twice


# Texts of any kind.

ANY = AnswerSchema(
    {
        "type": "object",
        "properties": {
            "s": STRING,
            "n": {"type": "number"},
            "i": INTEGER,
            "l": {"type": "array", "items": STRING},
            "o": {"type": "object", "properties": {"k": {"enum": ["\ufffd", "x"]}, "f": {}}},
            "f": {},
            "r": {"$ref": "#"},
        },
    },
    "any",
)
WILD = st.characters(exclude_categories=[])
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "s": st.text(WILD),
        "n": st.integers() | st.floats(),
        "i": st.integers() | st.floats(),
        "l": st.lists(st.text(WILD)),
        "o": st.dictionaries(st.sampled_from(["k", "f"]), st.text(WILD, max_size=1) | JSON),
        "f": st.dictionaries(st.text(WILD), st.text(WILD)) | JSON,
        "r": st.just({"s": "\udc00", "r": {}}) | JSON,
    },
)


@st.composite
def wild_texts(draw: st.DrawFn) -> str:
    """Texts that are nearly answers: a shaped value, with something put somewhere."""
    text = json.dumps(draw(SHAPED), ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        start, end = draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))
        text = text[:start] + draw(st.text(WILD, max_size=3)) + text[end:]
    return text


@settings(max_examples=120, deadline=None)
@given(st.lists(st.text(WILD) | wild_texts(), max_size=4))
def test_no_text_raises(texts: list[str]) -> None:
    """Any text is a value that a column can hold, or a message of one short printable line."""
    values: list[dict[str, object] | None] = []
    for text in texts:
        match ANY.read(text):
            case Misfit(said):
                assert said.isprintable()
                assert 0 < len(said) <= 300
            case value:
                values.append(value)
    array, altered = ANY.column(values)
    array.validate(full=True)
    stored = array.to_pylist()
    assert [i for i, value in enumerate(values) if repr(stored[i]) != repr(value)] == altered


@pytest.mark.parametrize("text", ['{"s": "a\\ud800b", "i": 1}', '{"s": "a\ud800b", "i": 1}'])
def test_lone_surrogates_cost_their_value_alone(text: str) -> None:
    """A lone surrogate, escaped or not, becomes U+FFFD in the column, and the column says in which values."""
    array, altered = ANY.column([fitting(ANY, '{"s": "whole"}'), None, fitting(ANY, text)])
    stored = array.to_pylist()
    assert [row and (row["s"], row["i"]) for row in stored] == [("whole", None), None, ("a\ufffdb", 1)]
    assert altered == [2]


def test_lone_surrogates_in_json_text() -> None:
    """A lone surrogate in a value that is kept as JSON text costs no more than itself either."""
    array, altered = ANY.column([fitting(ANY, '{"f": {"\\ud800": ["\\udc00", 1]}}')])
    assert array.to_pylist()[0]["f"] == '{"\ufffd":["\ufffd",1]}'
    assert altered == [0]


def test_messages_are_cut() -> None:
    """A message about a long or hostile value stays one short printable line, and still says what is wrong."""
    said = message(TICKET, json.dumps({"label": "\x1b[31m\u202e\n" + "x" * 10_000}))
    assert said.startswith('/label: the value is not one of "bug" or "bill", found "')
    assert len(said) <= 300
    assert said.isprintable()
    assert len(message(TICKET, json.dumps({"label": "bug", "x" * 10_000: 1}))) == 300
    deep = message(ANY, '{"r": ' * 200 + "1" + "}" * 200)
    assert deep.startswith("…r/r/r")
    assert deep.endswith('/r/r: the value is not of type "object", found 1')


# Schemas that cannot be used.

NOWHERE = "a reference leads out of the schema, or nowhere: "


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, 'its root must be an object: "type": "object"'),
        ({"type": "array", "items": STRING}, 'its root must be an object: "type": "object"'),
        ({"type": ["object", "null"], "properties": {"a": STRING}}, 'its root must be an object: "type": "object"'),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, 'its root must be an object: "type": "object"'),
        ({"$ref": "#"}, 'its root must be an object: "type": "object"'),
        ({"type": "object"}, "its root names no properties, so the answers have no columns"),
        (
            {"type": "object", "properties": {"a": {"type": "strin"}}},
            "/properties/a/type: the value is not valid under any",
        ),
        (
            {"type": "object", "properties": {"a": {"pattern": "("}}},
            '/properties/a/pattern: the value is not a "regex"',
        ),
        ({"type": "object", "required": "a"}, '/required: the value is not of type "array", found "a"'),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}, NOWHERE + "Pointer '/$defs/b' does not exist"),
        (
            {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/b.json"}}},
            NOWHERE + "Resource 'http://127.0.0.1:9/b.json' is not present",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "b.json"}}}, NOWHERE + "Resource 'b.json' is not present"),
        (
            {"$schema": "http://example.com/mine", "type": "object"},
            NOWHERE + "Unknown meta-schema: 'http://example.com/mine'",
        ),
        ({"type": "object", "properties": {"\ud800": STRING}}, "Failed to get key as UTF-8"),
    ],
)
def test_unusable_schemas(schema: dict[str, object], expected: str) -> None:
    """A schema that cannot be used ends the run with one line that names it, and the place where that is known."""
    with pytest.raises(JobError) as caught:
        AnswerSchema(schema, "ticket")
    said = str(caught.value)
    assert said.startswith(f"schema ticket cannot be used: {expected}")
    assert said.isprintable()


def test_no_other_file_is_read(tmp_path: Path) -> None:
    """A schema does not reach beyond itself, even where there is something to reach."""
    other = tmp_path / "other.json"
    other.write_text('{"type": "string"}')
    with pytest.raises(JobError, match="a reference leads out of the schema"):
        of({"a": {"$ref": other.as_uri()}})


NAME = st.sampled_from(["a", "b"])
TYPE = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"])
PLACES: st.SearchStrategy[object] = st.recursive(
    st.booleans() | st.fixed_dictionaries({"type": TYPE}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": TYPE | st.lists(TYPE, min_size=1, max_size=2, unique=True),
            "properties": st.dictionaries(NAME, inner, max_size=2),
            "additionalProperties": inner,
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "enum": st.lists(st.none() | st.booleans() | st.integers(0, 2) | NAME, min_size=1, max_size=3),
            "const": st.none() | st.integers(0, 1) | NAME,
            "anyOf": st.lists(inner, min_size=1, max_size=3),
            "$ref": st.sampled_from(["#", "#/properties/a", "#/properties/b", "#/properties/a/items", "#/x", "#a"]),
            "$id": st.just("http://example.com/a"),
            "x": st.integers() | inner,
        },
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.just(1.0) | st.just(0.5) | NAME,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAME, inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(NAME, PLACES, min_size=1), st.integers() | PLACES, st.lists(st.dictionaries(NAME, VALUES)))
def test_any_schema_is_used_or_refused(members: dict[str, object], x: object, answers: list[dict[str, object]]) -> None:
    """Whatever a schema holds, it is refused with a JobError, or any answer is read and stored without raising."""
    try:
        schema = of(members, x=x)
    except JobError:
        return
    values = [schema.read(json.dumps(answer)) for answer in answers]
    array, _ = schema.column([value for value in values if not isinstance(value, Misfit)])
    array.validate(full=True)


def test_schema_nested_too_deeply() -> None:
    """A schema too deep to be walked is refused."""
    schema: dict[str, object] = {}
    for _ in range(3000):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(JobError, match="cannot be used"):
        AnswerSchema(schema, "deep")


# The API's own object, and files.


def test_format_schema() -> None:
    """The schema is found in the API's own object, and there only."""
    schema = {"type": "object", "properties": {"a": STRING}}
    assert format_schema({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}) == schema
    assert format_schema({"type": "text"}) is None
    assert format_schema({"type": "json_object"}) is None
    assert format_schema({"type": "json_schema", "json_schema": {"name": "a"}}) is None
