"""An answer's text -> a value that fits the job's schema, with Arrow types fixed from the schema.

| schema                                                  | Arrow type                                   |
|---------------------------------------------------------|----------------------------------------------|
| `type: string`, or an `enum` or `const` of strings      | string                                       |
| the same with `format: date`                            | date32                                       |
| the same with `format: date-time`                       | timestamp in µs, UTC                         |
| the same with `format: time`                            | time64 in µs                                 |
| `type: integer`, or an `enum` or `const` of integers    | int64 (1.0 is an integer and is stored as 1) |
| `type: number`                                          | float64                                      |
| `type: boolean`                                         | bool                                         |
| `type: array` with `items`                              | list of the items' type                      |
| `type: object` with `properties`                        | struct, its fields in the schema's order     |
| `$ref` to a place in the same schema                    | the type of that place                       |
| `anyOf: [X, {type: "null"}]`, `type: [X, "null"]`       | the type of X                                |
| all else: unions, free-form objects, no type, recursion | string: the value as JSON text               |

Every field is nullable; absent and null are the same. Properties beyond the named ones are dropped from a struct where
the schema says nothing about them; where it does (`additionalProperties: true`, `patternProperties`, `allOf` and the
like) the object is JSON text. The root is always a struct of its named properties, for the text is stored beside it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from typing import TypeAlias
from urllib.parse import unquote

import jsonschema_rs
import msgspec
import pyarrow as pa
from jsonschema_rs import ValidationErrorKind

from batcher.errors import JobError
from batcher.parse.parser import Parser
from batcher.parse.text import decode
from batcher.parse.words import SURROGATE, line, quoted
from batcher.records import Misfit

_Schema: TypeAlias = dict[str, object]
_Reader: TypeAlias = Callable[[object], object]

_SPEAKERS = frozenset(
    {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties", "properties"}
)
"""Keywords by which a place in a schema names properties."""


class AnswerSchema(Parser):
    """A JSON Schema that answers must fit, and the Arrow type that holds them.

    Raises JobError where the schema is invalid, refers to what is not in it, or is not an object with properties.
    """

    arrow_type: pa.StructType

    def __init__(self, schema: Mapping[str, object], name: str, vote: bool = False) -> None:
        super().__init__(vote)
        self._schema = dict(schema)
        self._name = name
        try:
            self._validator = jsonschema_rs.validator_for(self._schema, offline=True, mask="the value")
            self.arrow_type, self._convert = _root(self._schema)
        except jsonschema_rs.ValidationError as error:
            raise JobError(self._complaint(_explain(error))) from None
        except (ValueError, RecursionError) as error:
            raise JobError(self._complaint(str(error))) from None

    def _complaint(self, reason: str) -> str:
        return line(f"schema {self._name} cannot be used: {reason}")

    def read(self, text: str | None) -> dict[str, object] | Misfit:
        """As in Parser."""
        if text is None:
            return Misfit("the answer has no text")
        try:
            value = decode(text)
            try:
                self._validator.validate(value)
            except UnicodeEncodeError:
                self._validator.validate(_clean(value))
            return self._convert(value)
        except json.JSONDecodeError as error:
            return Misfit(line(f"not JSON: {error.msg}, at character {error.pos} of {len(error.doc)}"))
        except jsonschema_rs.ValidationError as error:
            return Misfit(line(_explain(error)))
        except _UnstorableError as error:
            return Misfit(line(_place(error.path[::-1]) + error.reason))
        except RecursionError:
            return Misfit("the answer is nested too deeply")
        except ValueError as error:
            return Misfit(line(str(error)))

    def column(self, values: Sequence[dict[str, object] | None]) -> tuple[pa.StructArray, list[int]]:
        """As in Parser."""
        try:
            return self._array(values), []
        except UnicodeEncodeError:
            cleaned = [_clean(value) for value in values]
            altered = [index for index, value in enumerate(values) if value != cleaned[index]]
            return self._array(cleaned), altered

    def _array(self, values: Sequence[object]) -> pa.StructArray:
        array = pa.array(values, type=self.arrow_type)
        assert isinstance(array, pa.StructArray)
        return array


def format_schema(response_format: Mapping[str, object]) -> Mapping[str, object] | None:
    """The schema inside the API's own `response_format` object; None where it holds none."""
    if response_format.get("type") != "json_schema":
        return None
    wrapper = response_format.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
    return schema if isinstance(schema, Mapping) else None


# Schema -> type and reader. A reader takes a valid value, never None, to the form that Arrow takes.


class _UnstorableError(Exception):
    """A value fits the schema and not its Arrow type; `path` is from the value outwards."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[str | int] = []


def _root(schema: _Schema) -> tuple[pa.StructType, Callable[[object], dict[str, object]]]:
    place: object = schema
    followed = frozenset({"#"})
    while isinstance(place, dict) and isinstance(reference := place.get("$ref"), str) and reference not in followed:
        followed |= {reference}
        place = _target(schema, reference)
    if not isinstance(place, dict) or place.get("type") != "object":
        raise ValueError('its root must be an object: "type": "object"')
    if not isinstance(properties := place.get("properties"), dict) or not properties:
        raise ValueError("its root names no properties, so the answers have no columns")
    return _struct(properties, schema, followed)


def _typed(schema: object, root: _Schema, followed: frozenset[str]) -> tuple[pa.DataType, _Reader]:
    """The Arrow type of a place in the schema, and the reader of its values.

    All keywords of a place must hold, so any one of them that fixes the type is enough. `followed` are the references
    that led here. A place with an `$id` of its own is another document, whose references mean other places.
    """
    if not isinstance(schema, dict) or "$id" in schema:
        return pa.string(), _read_json
    match schema:
        case {"$ref": str(reference)} if _speaks_by(schema, "$ref"):
            target = None if reference in followed else _target(root, reference)
            return _typed(target, root, followed | {reference})
        case {"anyOf": [branch, {"type": "null"}] | [{"type": "null"}, branch]} if _speaks_by(schema, "anyOf"):
            return _typed(branch, root, followed)
        case {"allOf": [branch]} if _speaks_by(schema, "allOf"):
            return _typed(branch, root, followed)
    match _kinds(schema), schema:
        case ["string"], {"format": str(form)} if form in _MOMENTS:
            return _MOMENTS[form]
        case ["string"], _:
            return pa.string(), _read_string
        case ["integer"], _:
            return pa.int64(), _read_integer
        case ["number"], _:
            return pa.float64(), _read_number
        case ["boolean"], _:
            return pa.bool_(), _read_boolean
        case ["array"], {"items": dict(items)} if "prefixItems" not in schema:
            item, reader = _typed(items, root, followed)
            return pa.list_(item), _list_reader(reader)
        case ["object"], {"properties": dict(properties)} if properties and _speaks_by(schema, "properties"):
            return _struct(properties, root, followed)
    return pa.string(), _read_json


def _kinds(schema: _Schema) -> list[object]:
    """The JSON types beside null that `type` allows, else those of the constants; empty where neither fixes them."""
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return [kind for kind in kinds if kind != "null"]
    constants = schema.get("enum", [schema.get("const")])
    types = {type(constant) for constant in constants if constant is not None} if isinstance(constants, list) else set()
    return ["string"] if types == {str} else ["integer"] if types == {int} else []


def _speaks_by(schema: _Schema, keyword: str) -> bool:
    """Whether no other keyword of this place says a thing about properties."""
    return _SPEAKERS.intersection(schema) == {keyword} and not any(
        schema.get(other, False) is not False for other in ("additionalProperties", "unevaluatedProperties")
    )


def _target(root: _Schema, reference: str) -> object:
    """The place that `#/$defs/x` means; None for references of another form, or through another document."""
    if not reference.startswith("#/"):
        return None
    place: object = root
    for part in unquote(reference[2:]).split("/"):
        if not isinstance(place, dict) or (place is not root and "$id" in place):
            return None
        place = place.get(part.replace("~1", "/").replace("~0", "~"))
    return place


def _struct(
    properties: _Schema, root: _Schema, followed: frozenset[str]
) -> tuple[pa.StructType, Callable[[object], dict[str, object]]]:
    typed = [(name, *_typed(member, root, followed)) for name, member in properties.items()]
    readers = [(name, reader) for name, _, reader in typed]

    def read(value: object) -> dict[str, object]:
        if not isinstance(value, dict):
            raise _UnstorableError("the value is not an object")
        members: dict[str, object] = {}
        try:
            for name, reader in readers:
                member = value.get(name)
                members[name] = None if member is None else reader(member)
        except _UnstorableError as error:
            error.path.append(name)
            raise
        return members

    return pa.struct([pa.field(name, kind) for name, kind, _ in typed]), read


def _list_reader(reader: _Reader) -> _Reader:
    def read(value: object) -> list[object]:
        if not isinstance(value, list):
            raise _UnstorableError("the value is not an array")
        items: list[object] = []
        try:
            for item in value:
                member = None if item is None else reader(item)
                items.append(member)
        except _UnstorableError as error:
            error.path.append(len(items))
            raise
        return items

    return read


def _read_string(value: object) -> str:
    if type(value) is not str:
        raise _UnstorableError("the value is not a string")
    return value


_DATE = r"(?!0000)\d{4}-\d\d-\d\d"
_CLOCK = r"\d\d:\d\d:\d\d(?:\.\d+)?"
_is_date = re.compile(_DATE, re.ASCII).fullmatch
_is_moment = re.compile(rf"{_DATE}[Tt]{_CLOCK}(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII).fullmatch
_is_time = re.compile(rf"({_CLOCK})(?:[Zz]|[+-]00:00)?", re.ASCII).fullmatch


def _read_date(value: object) -> date:
    """RFC 3339, full-date; the forms of ISO 8601 that Python takes beside it are none."""
    try:
        if type(value) is str and _is_date(value):
            return date.fromisoformat(value)
    except ValueError:
        pass
    raise _UnstorableError(f"not a date such as 2026-01-31: {quoted(value)}")


def _read_moment(value: object) -> datetime:
    """RFC 3339, date-time, with its offset; what is finer than a microsecond is cut off."""
    try:
        if type(value) is str and _is_moment(value):
            return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):  # a leap second, a day that is none, the end of time
        pass
    raise _UnstorableError(f"not a date-time with offset such as 2026-01-31T08:30:00Z: {quoted(value)}")


def _read_time(value: object) -> time:
    """RFC 3339, partial-time, or full-time in UTC: the column has no zone."""
    try:
        if type(value) is str and (found := _is_time(value)):
            return time.fromisoformat(found[1])
    except ValueError:
        pass
    raise _UnstorableError(f"not a time such as 08:30:00, without offset or in UTC: {quoted(value)}")


_MOMENTS: Mapping[str, tuple[pa.DataType, _Reader]] = {
    "date": (pa.date32(), _read_date),
    "date-time": (pa.timestamp("us", tz="UTC"), _read_moment),
    "time": (pa.time64("us"), _read_time),
}


def _read_integer(value: object) -> int:
    integer = int(value) if type(value) is float and value.is_integer() else value
    if type(integer) is not int:
        raise _UnstorableError("the value is not an integer")
    if not -(2**63) <= integer < 2**63:
        raise _UnstorableError("the integer does not fit into 64 bits")
    return integer


def _read_number(value: object) -> float:
    if type(value) is float:
        return value
    if type(value) is not int:
        raise _UnstorableError("the value is not a number")
    try:
        return float(value)
    except OverflowError:
        raise _UnstorableError("the number is out of range") from None


def _read_boolean(value: object) -> bool:
    if type(value) is not bool:
        raise _UnstorableError("the value is not a boolean")
    return value


def _read_json(value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except UnicodeEncodeError:  # a lone surrogate: `column` sees to it
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# Words about what does not fit.


def _explain(error: jsonschema_rs.ValidationError) -> str:
    # Of "X or null" only the failure against X tells something.
    while isinstance(error.kind, ValidationErrorKind.AnyOf):
        failures = [branch[0] for branch in error.kind.context if branch and not _wants_null(branch[0])]
        if len(failures) != 1:
            break
        error = failures[0]
    if isinstance(error.kind, ValidationErrorKind.Referencing):
        return f"a reference leads out of the schema, or nowhere: {error.message}"
    found = ""
    if not isinstance(error.instance, dict | list):
        found = f", found {quoted(error.instance)}"
    return _place(error.instance_path) + error.message + found


def _wants_null(error: jsonschema_rs.ValidationError) -> bool:
    return isinstance(error.kind, ValidationErrorKind.Type) and error.kind.types == ["null"]


def _place(path: Sequence[str | int]) -> str:
    """The JSON pointer of a place as the start of a message: `/label: `; nothing for the root."""
    pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
    return f"{pointer if len(pointer) <= 100 else '…' + pointer[-99:]}: " if pointer else ""


def _clean(value: object) -> object:
    """The value with each lone surrogate replaced by U+FFFD."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {SURROGATE.sub("\ufffd", key): _clean(member) for key, member in value.items()}
    return value
