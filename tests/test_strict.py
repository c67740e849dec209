"""A schema made to fit a service's strict mode: what is sent, what is checked here alone, and what does not fit."""

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.strict import doubts, fit, response_format

Schema = dict[str, object]
STRING = {"type": "string"}


def closed(properties: Schema, **more: object) -> Schema:
    """An object of these properties and no others."""
    return {"type": "object", "properties": properties, **more, "additionalProperties": False}


def root(member: object, **more: object) -> Schema:
    """A schema whose one property is this."""
    return {"type": "object", "properties": {"a": member}, **more}


@pytest.mark.parametrize(
    ("given_", "sent", "left_out"),
    [
        (STRING, STRING, []),
        ({"type": "string", "description": "d", "title": "t", "default": "x"}, {"description": "d", **STRING}, []),
        ({"type": "string", "format": "email", "pattern": "@"}, STRING, ["format", "pattern"]),
        ({"type": "integer", "minimum": 1, "multipleOf": 2}, {"type": "integer"}, ["minimum", "multipleOf"]),
        ({"type": "integer", "pattern": "x", "items": STRING}, {"type": "integer"}, []),
        (
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            {"type": "array", "items": STRING},
            ["minItems", "items/minLength"],
        ),
        ({"const": "x"}, {"type": "string", "enum": ["x"]}, []),
        ({"enum": ["x", "y"]}, {"type": "string", "enum": ["x", "y"]}, []),
        ({"enum": [1, None]}, {"anyOf": [{"type": "integer", "enum": [1]}, {"type": "null"}]}, []),
        ({"type": ["string"]}, STRING, []),
        (
            {"type": ["string", "null"], "format": "date", "description": "d"},
            {"description": "d", "anyOf": [STRING, {"type": "null"}]},
            ["format"],
        ),
        (
            {"type": ["string", "null"], "enum": ["x", None]},
            {"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "null"}]},
            [],
        ),
        ({"type": ["string", "null"], "enum": ["x"]}, {"type": "string", "enum": ["x"]}, []),
        ({"oneOf": [STRING, {"type": "null"}]}, {"anyOf": [STRING, {"type": "null"}]}, ["oneOf"]),
        ({"type": "string", "anyOf": [STRING]}, {"anyOf": [STRING]}, []),
        ({"allOf": [STRING], "description": "d"}, {"description": "d", **STRING}, []),
        ({"type": "object", "properties": {"b": STRING}}, closed({"b": STRING}), []),
        ({"properties": {"b": STRING}, "required": ["b"]}, closed({"b": STRING}, required=["b"]), []),
        (
            {"type": "object", "properties": {"b": STRING}, "additionalProperties": True, "minProperties": 1},
            closed({"b": STRING}),
            ["additionalProperties", "minProperties"],
        ),
        ({"type": "object", "additionalProperties": False}, closed({}), []),
        ({"type": "string", "not": {"const": "x"}}, STRING, ["not"]),
    ],
)
def test_what_is_sent(given_: Schema, sent: Schema, left_out: list[str]) -> None:
    """Objects are closed, unions take another form, and what strict mode does not know is left out and named."""
    made = fit(root(given_))
    assert made.unfit == ()
    assert made.schema == closed({"a": sent})
    assert made.left_out == tuple(f"/properties/a/{keyword}" for keyword in left_out)


def test_definitions() -> None:
    """Definitions that are used go along under `$defs`; a reference to any other place becomes what stands there."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "definitions": {"Old/1": STRING, "unused": STRING, "both": STRING},
        "$defs": {"New": {"type": "object", "properties": {"x": {"$ref": "#/definitions/Old~11"}}}, "both": STRING},
        **root({"$ref": "#/$defs/New", "description": "d"}),
    }
    properties: Schema = schema["properties"]  # type: ignore[assignment]
    properties |= {
        "b": {"$ref": "#/properties/c"},
        "c": {"type": "string", "maxLength": 3},
        "d": {"$ref": "#/definitions/both"},
        "e": {"$ref": "#/$defs/both"},
    }
    made = fit(schema)
    assert made.unfit == ()
    assert made.left_out == ("/properties/c/maxLength",)
    assert made.schema == {
        **closed(
            {
                "a": {"$ref": "#/$defs/New"},
                "b": STRING,
                "c": STRING,
                "d": {"$ref": "#/$defs/both"},
                "e": {"$ref": "#/$defs/both_"},
            }
        ),
        "$defs": {
            "Old/1": STRING,
            "New": closed({"x": {"$ref": "#/$defs/Old~11"}}),
            "both": STRING,
            "both_": STRING,
        },
    }


def test_a_root_that_is_a_reference() -> None:
    """The root is an object itself."""
    made = fit({"$ref": "#/$defs/A", "$defs": {"A": root(STRING)}})
    assert (made.schema, made.unfit) == (closed({"a": STRING}), ())


def nested(levels: int) -> Schema:
    """Objects within objects."""
    schema: Schema = {"type": "string"}
    for _ in range(levels):
        schema = root(schema)
    return schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (root({}), "/properties/a: no type"),
        (root(True), "/properties/a: anything is allowed there"),
        (root({"type": "object"}), "/properties/a: an object whose properties have no names"),
        (root({"type": "object", "additionalProperties": STRING}), "/properties/a: an object whose properties"),
        (root({"type": "array"}), "/properties/a: an array of anything"),
        (root({"type": "string", "enum": [1]}), "/properties/a: nothing is allowed there"),
        (root({"allOf": [STRING, STRING]}), "/properties/a/allOf: strict mode does not know it"),
        (root({"anyOf": [STRING] * 6}), "/properties/a: 6 branches; strict mode takes 5"),
        (root({"$ref": "#"}), "/properties/a/$ref: recursion"),
        (root({"$ref": "#/$defs/A"}, **{"$defs": {"A": root({"$ref": "#/$defs/A"})}}), "/$defs/A/properties/a/$ref"),
        ({"$ref": "#/$defs/A", "$defs": {"A": root({"$ref": "#/$defs/A"})}}, "recursion"),
        (root({"$ref": "other.json"}), "/properties/a/$ref: leads to no place in the schema"),
        (root(STRING, required=["b"]), "/required: b is no property of it"),
        (nested(11), "11 levels; strict mode takes 10"),
        (nested(3000), "nested too deeply"),
        (root({"enum": [str(number) for number in range(501)]}), "501 values of enums; strict mode takes 500"),
        ({"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(501)}}, "501 properties"),
        (root({"type": "string", "description": "x" * 5000}), "characters; strict mode takes 5,000"),
    ],
)
def test_what_does_not_fit(schema: Schema, said: str) -> None:
    """It is sent as it is, not strictly, and the plan says why."""
    made = fit(schema)
    assert any(said in reason for reason in made.unfit), made.unfit
    assert made.schema is schema
    form, note = response_format(schema, "x", fitted=True)
    assert form["json_schema"] == {"name": "x", "strict": False, "schema": schema}
    assert note is not None
    assert note.startswith("sent with strict = false and checked here")


def test_at_the_limits() -> None:
    """What just fits is sent."""
    assert fit(nested(10)).unfit == ()
    assert fit(root({"anyOf": [STRING] * 5})).unfit == ()
    assert fit(root({"enum": [str(number) for number in range(500)]})).unfit == ()
    size = 5000 - len(json.dumps(closed({"a": {"description": "", **STRING}}), separators=(",", ":")))
    assert fit(root({"type": "string", "description": "ü" * size})).unfit == ()
    assert fit(root({"type": "string", "description": "ü" * (size + 1)})).unfit != ()


def test_the_api_s_own_object() -> None:
    """It is made of a schema under a name that the API accepts; for other services the schema stays as it is."""
    form, note = response_format(root(STRING), "my schema: ü/" + "x" * 80, fitted=True)
    assert form == {
        "type": "json_schema",
        "json_schema": {"name": "my_schema_" + "x" * 54, "strict": True, "schema": closed({"a": STRING})},
    }
    assert note is None
    schema = root({"type": "string", "pattern": "x"})
    assert response_format(schema, "", fitted=False) == (
        {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
        None,
    )
    many = {"type": "object", "properties": {f"p{n}": {"type": "string", "pattern": "x"} for n in range(8)}}
    _, note = response_format(many, "x", fitted=True)
    assert note is not None
    assert note.startswith("checked here and not sent: /properties/p0/pattern, ")
    assert note.endswith(" and 2 more")


def test_doubts() -> None:
    """The API's own object is sent as it stands; a plan says where the service may refuse it."""

    def own(schema: Schema, strict: bool = True) -> Schema:
        return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}

    def tool(schema: Schema, strict: bool = True) -> Schema:
        return {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}

    pattern = closed({"a": {"type": "string", "pattern": "x"}})
    fine = closed({"a": STRING})
    assert doubts({"response_format": own(fine), "tools": [tool(fine), tool(pattern, strict=False)]}) is None
    assert doubts({"response_format": own(root(STRING), strict=False), "tools": "{{ tools }}"}) is None
    assert doubts({"response_format": {"type": "json_object"}}) is None
    assert doubts({}) is None
    assert "response_format has objects that are not closed" in (doubts({"response_format": own(root(STRING))}) or "")
    assert "tools[1] /properties/a/pattern" in (doubts({"tools": [tool(fine), tool(pattern)]}) or "")


MEMBERS = st.recursive(
    st.one_of(
        st.sampled_from([STRING, {"type": "integer", "minimum": 0}, {"type": ["number", "null"]}, {}, True]),
        st.lists(st.sampled_from(["x", "y", 1, None]), min_size=1, max_size=3, unique=True).map(lambda v: {"enum": v}),
        st.sampled_from(["#", "#/$defs/d", "#/properties/a", "#/nowhere"]).map(lambda ref: {"$ref": ref}),
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "~/"]), inner, max_size=2).map(
            lambda members: {"type": "object", "properties": members}
        ),
        inner.map(lambda member: {"type": "array", "items": member, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda branches: {"anyOf": branches}),
        st.lists(inner, min_size=1, max_size=2).map(lambda branches: {"oneOf": branches}),
    ),
    max_leaves=5,
)
ANSWERS = st.recursive(
    st.sampled_from(["x", "y", 1, -1, 1.5, None]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@given(MEMBERS, MEMBERS, ANSWERS)
@settings(max_examples=150, deadline=None)
def test_what_fits_the_schema_and_is_closed_fits_what_is_sent(member: object, other: object, answer: object) -> None:
    """Whatever is left out, strict mode never forbids an answer of named properties that the schema allows."""
    schema = root(member, **{"$defs": {"d": other}})
    made = fit(schema)
    if made.unfit:
        return
    text = json.dumps(made.schema)
    for keyword in ("oneOf", "allOf", "minimum", "maxItems", "definitions", "const"):
        assert f'"{keyword}"' not in text
    assert fit(made.schema) == (made.schema, (), ())  # what was made fits as it is
    everything_closed = jsonschema_rs.is_valid(_closed_copy(schema), {"a": answer})
    if everything_closed:
        assert jsonschema_rs.is_valid(dict(made.schema), {"a": answer})


def _closed_copy(schema: Any) -> Any:
    """The schema as it was given, but with every object closed."""
    if isinstance(schema, list):
        return [_closed_copy(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed_copy(value) for key, value in schema.items()}
    return made | ({"additionalProperties": False} if schema.get("type") == "object" else {})
