"""A JSON Schema -> what a service's strict mode takes of it.

Strict mode knows a part of JSON Schema (reference of api.cerebras.ai, structured outputs; its numbers are of 2026).
What it does not know is left out of what is sent, or said in words that it does know; the answers are held against the
schema as it was given, by `parse`. So what is sent may allow more than the schema, and never has to allow less, but for
objects that are closed: nothing else than what they name can come back.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

import msgspec

MOST_CHARACTERS = 5_000
MOST_LEVELS = 10
MOST_PROPERTIES = 500
MOST_ENUM_VALUES = 500
MOST_BRANCHES = 5

_Schema: TypeAlias = Mapping[str, Any]

_WORDLESS = frozenset(
    {"$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "title", "default", "examples", "deprecated"}
    | {"readOnly", "writeOnly"}
)
"""Keywords that rule nothing out."""


class Fitted(NamedTuple):
    """A schema as it is sent. `left_out` are the keywords that are checked here alone, with their places."""

    schema: _Schema
    left_out: tuple[str, ...]
    unfit: tuple[str, ...]
    """Why strict mode cannot take it: then `schema` is the one that was given."""


def fit(schema: _Schema) -> Fitted:
    """Make a schema fit. Never raises; a schema nested beyond measure does not fit."""
    fitting = _Fitting(schema)
    try:
        made = fitting.root()
        fitting.measure(made)
    except RecursionError:
        fitting.unfit.append("nested too deeply")
        made = {}
    if fitting.unfit:
        return Fitted(schema, (), tuple(dict.fromkeys(fitting.unfit)))
    return Fitted(made, tuple(dict.fromkeys(fitting.left_out)), ())


def response_format(schema: _Schema, name: str, fitted: bool) -> tuple[dict[str, Any], str | None]:
    """The API's own object for a schema, and what a plan has to say of it.

    `fitted` says to make it fit; else it is sent as it is, for what other services take differs.
    """
    made = fit(schema) if fitted else Fitted(schema, (), ())
    name = re.sub(r"[^a-zA-Z0-9_-]+", "_", name)[:64] or "answer"
    form = {
        "type": "json_schema",
        "json_schema": {"name": name, "strict": not made.unfit, "schema": made.schema},
    }
    if made.unfit:
        return form, f"sent with strict = false and checked here, for it cannot be made to fit: {_few(made.unfit)}"
    return form, f"checked here and not sent: {_few(made.left_out)}" if made.left_out else None


def doubts(parameters: Mapping[str, Any]) -> str | None:
    """What a plan has to say of strict schemas in the API's own objects, which are sent as they stand."""
    tools = parameters.get("tools")
    places = [("response_format", parameters.get("response_format"))]
    places += [(f"tools[{index}]", tool) for index, tool in enumerate(tools if isinstance(tools, list) else [])]
    wrong: list[str] = []
    for name, place in places:
        match place:
            case {"json_schema": {"strict": True, "schema": Mapping() as schema}}:
                wrong += _doubts(name, schema)
            case {"function": {"strict": True, "parameters": Mapping() as schema}}:
                wrong += _doubts(name, schema)
    return f"sent as it stands, and strict mode may refuse it: {_few(wrong)}" if wrong else None


def _doubts(name: str, schema: _Schema) -> list[str]:
    made = fit(schema)
    if made.schema == schema and not made.unfit:
        return []
    wrong = made.unfit or made.left_out or ("has objects that are not closed, or words that it does not know",)
    return [f"{name} {reason}" for reason in wrong]


def _few(places: Sequence[str]) -> str:
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(places[:_SHOWN]) + more


_SHOWN = 6


class _Fitting:
    """One schema on its way; places are JSON pointers into the schema as it was given."""

    def __init__(self, schema: _Schema) -> None:
        self._given = schema
        self._made: dict[str, Any] = {}
        """Definitions, by name, that are referred to."""
        self._names: dict[str, str] = {}
        """By reference."""
        self._under_way: list[str] = []
        """References that lead to where we are."""
        self.left_out: list[str] = []
        self.unfit: list[str] = []

    def root(self) -> dict[str, Any]:
        """The schema as it is sent; its root is an object itself, never a reference to one."""
        place: Any = self._given
        while isinstance(place, Mapping) and isinstance(place.get("$ref"), str):
            if place["$ref"] in self._under_way:
                break
            self._under_way.append(place["$ref"])
            place = self._target(place["$ref"])
        made = self._fitted(place, "")
        if made.get("type") != "object":
            self.unfit.append("its root is no object")
        return {**made, "$defs": self._made} if self._made else made

    def measure(self, made: dict[str, Any]) -> None:
        """Hold what was made against the limits."""
        size = len(msgspec.json.encode(made).decode())
        if size > MOST_CHARACTERS:
            self.unfit.append(f"{size:,} characters; strict mode takes {MOST_CHARACTERS:,}")
        properties, values = _counted(made)
        if properties > MOST_PROPERTIES:
            self.unfit.append(f"{properties:,} properties; strict mode takes {MOST_PROPERTIES}")
        if values > MOST_ENUM_VALUES:
            self.unfit.append(f"{values:,} values of enums; strict mode takes {MOST_ENUM_VALUES}")
        if not self.unfit and (levels := _levels(made, made.get("$defs", {}))) > MOST_LEVELS:
            self.unfit.append(f"{levels} levels; strict mode takes {MOST_LEVELS}")

    def _fitted(self, schema: Any, place: str) -> dict[str, Any]:
        if not isinstance(schema, Mapping):
            self.unfit.append(f"{place or '/'}: {'anything' if schema is True else 'nothing'} is allowed there")
            return {}
        if "$ref" in schema:
            return self._referred(schema, place)
        given = dict(schema)
        if isinstance(given.get("allOf"), list) and len(given["allOf"]) == 1:
            sole = given.pop("allOf")[0]
            if isinstance(sole, Mapping) and not given.keys() - _WORDLESS - {"description"}:
                return self._fitted({**given, **sole}, f"{place}/allOf/0")
            given["allOf"] = [sole]
        for key in ("allOf", "prefixItems"):
            if key in given:
                self.unfit.append(f"{place}/{key}: strict mode does not know it")
        described = {"description": given.pop("description")} if isinstance(given.get("description"), str) else {}
        for key in ("anyOf", "oneOf"):
            if isinstance(given.get(key), list):
                return described | self._either(given, key, place)
        kinds = given.get("type")
        values = [given["const"]] if "const" in given else given.get("enum")
        if isinstance(values, list):  # each type has the values that it may have
            found = list(dict.fromkeys(map(_kind, values)))
            asked = [kinds] if isinstance(kinds, str) else kinds
            kinds = [kind for kind in asked or found if any(_is(value, kind) for value in values)]
        if kinds is None:
            kinds = "object" if "properties" in given else "array" if "items" in given else None
            given["type"] = kinds
        if isinstance(kinds, list):
            if len(kinds) == 1:
                return described | self._plain({**given, "type": kinds[0]}, place)
            if not kinds:
                self.unfit.append(f"{place or '/'}: nothing is allowed there")
            branches = [self._plain({**given, "type": kind}, place) for kind in kinds]
            return described | {"anyOf": self._counted_branches(branches, place)}
        return described | self._plain(given, place)

    def _either(self, given: dict[str, Any], key: str, place: str) -> dict[str, Any]:
        """One of several. Of `oneOf`, that no two fit is checked here."""
        if key == "oneOf":
            self.left_out.append(f"{place}/oneOf")
        branches = []
        for index, branch in enumerate(given[key]):
            branches.append(self._fitted(branch, f"{place}/{key}/{index}"))
        others = given.keys() - _WORDLESS - {key}
        if others - {"type"} and given.get("type") in ("object", "array"):
            self.unfit.append(f"{place}: {key} beside {sorted(others - {'type'})[0]}")
        self.left_out += [f"{place}/{other}" for other in sorted(others - {"type"})]
        return {"anyOf": self._counted_branches(branches, place)}

    def _counted_branches(self, branches: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
        if len(branches) > MOST_BRANCHES:
            self.unfit.append(f"{place or '/'}: {len(branches)} branches; strict mode takes {MOST_BRANCHES}")
        return branches

    def _plain(self, given: dict[str, Any], place: str) -> dict[str, Any]:
        """A place of one type, or of fixed values."""
        kind = given["type"]
        values = [given["const"]] if "const" in given else given.get("enum")
        if isinstance(values, list) and kind != "null":
            self._leave_out(given, {"type", "enum", "const"}, place)
            return {"type": kind, "enum": [value for value in values if _is(value, kind)]}
        if kind == "object":
            return self._object(given, place)
        if kind == "array":
            self._leave_out(given, {"type", "items"}, place)
            if not isinstance(given.get("items"), Mapping):
                self.unfit.append(f"{place}: an array of anything")
                return {}
            return {"type": "array", "items": self._fitted(given["items"], f"{place}/items")}
        if kind not in ("string", "integer", "number", "boolean", "null"):
            self.unfit.append(f"{place or '/'}: no type")
            return {}
        self._leave_out(given, {"type", "enum", "const"}, place)
        return {"type": kind}

    def _object(self, given: dict[str, Any], place: str) -> dict[str, Any]:
        properties = given.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            if given.get("additionalProperties") is not False:
                self.unfit.append(f"{place or '/'}: an object whose properties have no names")
            properties = {}
        more = given.get("additionalProperties")
        if more not in (None, False):
            self.left_out.append(f"{place}/additionalProperties")
        self._leave_out(given, {"type", "properties", "required", "additionalProperties"}, place)
        required = given.get("required", [])
        if isinstance(required, list):
            self.unfit += [
                f"{place}/required: {name} is no property of it" for name in required if name not in properties
            ]
        return {
            "type": "object",
            "properties": {
                name: self._fitted(member, f"{place}/properties/{_escaped(name)}")
                for name, member in properties.items()
            },
            **({"required": required} if required else {}),
            "additionalProperties": False,
        }

    def _leave_out(self, given: dict[str, Any], known: set[str], place: str) -> None:
        """Note the keywords that rule something out and are not sent: all but those of other types, which do not."""
        for key in given:
            if key not in known and key not in _WORDLESS and _matters(key, given["type"]):
                self.left_out.append(f"{place}/{_escaped(key)}")

    def _referred(self, schema: _Schema, place: str) -> dict[str, Any]:
        """A reference to a definition, which goes along; one to any other place becomes what stands there."""
        reference = schema["$ref"]
        self.left_out += [
            f"{place}/{_escaped(key)}" for key in schema if key != "$ref" and key not in _WORDLESS | {"description"}
        ]
        target = self._target(reference) if isinstance(reference, str) else None
        if target is None:
            self.unfit.append(f"{place}/$ref: leads to no place in the schema")
            return {}
        if reference in self._under_way or reference == "#":
            self.unfit.append(f"{place}/$ref: recursion")
            return {}
        self._under_way.append(reference)
        pointer = reference.removeprefix("#")
        definition = re.fullmatch(r"/(?:\$defs|definitions)/([^/]+)", pointer)
        if definition is None:
            made = self._fitted(target, pointer)
        else:
            if reference not in self._names:
                name = _unescaped(definition[1])
                while name in self._names.values():  # of `$defs` and `definitions`
                    name += "_"
                self._names[reference] = name
                self._made[name] = self._fitted(target, pointer)
            made = {"$ref": f"#/$defs/{_escaped(self._names[reference])}"}
        self._under_way.pop()
        return made

    def _target(self, reference: str) -> Any:
        """The place that a reference means; None where it means none in this schema."""
        if reference == "#":
            return self._given
        if not reference.startswith("#/"):
            return None
        place: Any = self._given
        for part in unquote(reference[2:]).split("/"):
            key = _unescaped(part)
            if isinstance(place, Mapping) and key in place:
                place = place[key]
            elif isinstance(place, list) and key.isdecimal() and int(key) < len(place):
                place = place[int(key)]
            else:
                return None
        return place


_RULES = {
    "string": {"minLength", "maxLength", "pattern", "format", "contentEncoding", "contentMediaType"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains"}
    | {"items", "prefixItems", "unevaluatedItems"},
    "object": {"minProperties", "maxProperties", "propertyNames", "patternProperties", "dependentRequired"}
    | {"dependentSchemas", "unevaluatedProperties", "properties", "required", "additionalProperties"},
}
"""Keywords that rule something out for values of one type only."""


def _matters(key: str, kind: object) -> bool:
    """Whether a keyword rules anything out for values of this type."""
    homes = [home for home, keys in _RULES.items() if key in keys]
    return not homes or ("number" if kind == "integer" else kind) in homes


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "number"
        case list():
            return "array"
    return "object"


def _is(value: object, kind: object) -> bool:
    found = _kind(value)
    return found == kind or (kind == "number" and found == "integer")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _unescaped(name: str) -> str:
    return name.replace("~1", "/").replace("~0", "~")


def _counted(made: Any) -> tuple[int, int]:
    """How many properties and values of enums there are in all."""
    properties = values = 0
    if isinstance(made, dict):
        inner = [value for key, value in made.items() if key not in ("properties", "$defs", "enum", "required")]
        for named in (made.get("properties", {}), made.get("$defs", {})):
            inner += named.values()
        properties, values = len(made.get("properties", {})), len(made.get("enum", []))
    else:
        inner = made if isinstance(made, list) else []
    for each in inner:
        more = _counted(each)
        properties, values = properties + more[0], values + more[1]
    return properties, values


def _levels(made: dict[str, Any], definitions: dict[str, Any]) -> int:
    """How many objects and arrays stand within each other."""
    if "$ref" in made:
        return _levels(definitions[_unescaped(made["$ref"].removeprefix("#/$defs/"))], definitions)
    inner = [
        *made.get("properties", {}).values(),
        *made.get("anyOf", []),
        *([made["items"]] if "items" in made else []),
    ]
    return (made.get("type") in ("object", "array")) + max((_levels(each, definitions) for each in inner), default=0)
