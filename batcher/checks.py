"""A value held against its type, and what is wrong with it in words."""

import re
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec


class Misfit(NamedTuple):
    """Where in a value it is wrong (`.key`, `[0]`, or nothing), and what is allowed there."""

    place: str
    allowed: str


class Check:
    """A type that values are held against."""

    __slots__ = ("_box", "kind")

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        # Of a struct msgspec remembers how it is checked; a bare type it would take apart for every value.
        self._box = msgspec.defstruct("Box", [("value", kind)])

    def misfit(self, value: object) -> Misfit | None:
        """What is wrong with a value, or None."""
        try:
            msgspec.convert({"value": value}, self._box)
        except msgspec.ValidationError as error:
            place = place_of(error).removeprefix(".value")
            return Misfit(place, allowed(self.kind, error) if not place else _inside(error))
        return None


def place_of(error: msgspec.ValidationError) -> str:
    """Where in the value it is wrong: `.key`, `[0]`, or nothing."""
    found = re.search(r"`\$((?:\.\w+|\[[^\]]*\])*)`", str(error))
    return found[1] if found else ""


def allowed(kind: Any, error: msgspec.ValidationError) -> str:
    """What a value may be, in words; inside of it, what msgspec says."""
    if re.search(r"\[[^\]]*\]", place_of(error)) or re.search("missing required|at `key`", str(error)):
        return _inside(error)
    return " or ".join(_words(kind, {}))


def _inside(error: msgspec.ValidationError) -> str:
    said = re.sub(r" - at .*$", "", str(error)).replace("`", "")
    if missing := re.fullmatch(r"Object missing required field (\w+)", said):
        return f"{missing[1]} is missing"
    return said.replace("Expected ", "expected ").replace("Invalid value", "unknown:").split(", got")[0]


def _words(kind: Any, bounds: Mapping[str, Any]) -> list[str]:
    """The alternatives of a type, with the bounds of its annotation."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, meta = get_args(kind)
        return _words(inner, {name: bound for name in _BOUNDS if (bound := getattr(meta, name)) is not None})
    if origin is Literal:
        return [str(choice) for choice in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return ["a table"]
    if kind is not NoneType and (kind in _NAMES or origin in _NAMES):
        words = [_NAMES[origin or kind]]
        words += [f"{_BOUNDS[name]} {bound:,}" for name, bound in bounds.items() if abs(bound) < 2**53]
        return [" ".join(words)]
    return list(dict.fromkeys(word for part in get_args(kind) for word in _words(part, bounds)))


_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}
_BOUNDS = {"gt": "above", "ge": "from", "le": "to", "min_length": "of at least", "max_length": "of at most"}


def word(text: str) -> str:
    """A key or a name, fit for a line."""
    return text if text.isprintable() and 0 < len(text) <= 60 else shown(text)


def shown(value: object) -> str:
    """A value, fit for a line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number beyond all measure"
    return text if len(text) <= 60 else text[:57] + "…"
