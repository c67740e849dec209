"""JSON values -> typed columns."""

import json
import re
from collections.abc import Iterable
from itertools import chain

import msgspec
import pyarrow as pa

_MOST_FIELDS = 256
_DEEPEST = 16

SURROGATE = re.compile("[\ud800-\udfff]")
_EXACT = {
    pa.string(): {str, type(None)},
    pa.int64(): {int, type(None)},
    pa.float64(): {float, type(None)},
    pa.bool_(): {bool, type(None)},
}


def guessed(values: Iterable[object], depth: int = 0) -> pa.DataType:
    """The type that holds these values; string, for JSON text, where no other does."""
    seen = [value for value in values if value is not None]
    kinds = set(map(type, seen))
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64() if all(map(_in_int64, seen)) else pa.string()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    if depth < _DEEPEST and kinds == {list}:
        return pa.list_(guessed(chain.from_iterable(seen), depth + 1))  # type: ignore[arg-type]
    if depth < _DEEPEST and kinds == {dict}:
        fields: dict[str, list[object]] = {}
        for value in seen:
            for name, inner in value.items():  # type: ignore[attr-defined]
                fields.setdefault(name, []).append(inner)
        if 0 < len(fields) <= _MOST_FIELDS and not any(map(SURROGATE.search, fields)):
            return pa.struct([pa.field(name, guessed(inner, depth + 1)) for name, inner in fields.items()])
    return pa.string()


def _in_int64(value: object) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def column(values: list[object], kind: pa.DataType, altered: list[bool | None]) -> pa.Array:
    """JSON values as a column of this type; marks where one is not held exactly."""
    if set(map(type, values)) <= _EXACT.get(kind, set()):
        try:
            return pa.array(values, kind)
        except (UnicodeEncodeError, OverflowError):
            pass
    fitted = [_fitted(value, kind) for value in values]
    for index, (_, other) in enumerate(fitted):
        if other:
            altered[index] = True
    return pa.array([value for value, _ in fitted], kind)


def _fitted(value: object, kind: pa.DataType) -> tuple[object, bool]:
    """A JSON value as its column holds it, and whether that is another value."""
    if value is None:
        return None, False
    if pa.types.is_string(kind):
        if type(value) is not str:
            return _json_text(value)
        clean = SURROGATE.sub("\ufffd", value)
        return clean, clean != value
    if pa.types.is_boolean(kind) and type(value) is bool:
        return value, False
    if pa.types.is_int64(kind):
        if type(value) is float and value.is_integer():
            value = int(value)
        if _in_int64(value):
            return value, False
    if pa.types.is_float64(kind) and type(value) in (int, float):
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            return None, True
        return number, number != value
    if pa.types.is_list(kind) and type(value) is list:
        items = [_fitted(item, kind.value_type) for item in value]
        return [item for item, _ in items], any(other for _, other in items)
    if pa.types.is_struct(kind) and type(value) is dict:
        names = [kind.field(index).name for index in range(kind.num_fields)]
        fields = {name: _fitted(value.get(name), kind.field(name).type) for name in names}
        other = any(other for _, other in fields.values()) or not value.keys() <= fields.keys()
        return {name: inner for name, (inner, _) in fields.items()}, other
    return None, True


def _json_text(value: object) -> tuple[object, bool]:
    try:
        try:
            return msgspec.json.encode(value).decode(), False
        except UnicodeEncodeError:
            return json.dumps(value), False  # escapes lone surrogates
    except (RecursionError, ValueError, OverflowError):
        return None, True
