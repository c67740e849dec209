"""JSON out of a model's text: the whole text, or the last object in it.

A text that is JSON is taken as it is. Only where it is not, an object is looked for in it, between Markdown fences or
sentences: the last one that stands in no other brackets. Where brackets are left open, the text was cut off or means
something else by them, and nothing is taken.
"""

import json
import re
from typing import NoReturn

import msgspec


def decode(text: str) -> object:
    """The value of a text that is JSON, or that has an object in it.

    Raises ValueError or RecursionError: where neither is so, where a key stands twice in one object, where a number is
    none of JSON (NaN, Infinity) or is beyond a float.
    """
    text = text.strip().removeprefix("\ufeff")
    try:
        return _decode(text)
    except json.JSONDecodeError:
        found = _last_object(text)
        if found is None:
            raise
    return _decode(found)


def _decode(text: str) -> object:
    try:
        value: object = msgspec.json.decode(text)
        # msgspec keeps the last of two equal keys. Each key in the text has a colon of its own, so as many keys as
        # colons means that none was lost.
        if text.count(":") == _count_keys(value):
            return value
    except ValueError:
        pass  # its errors do not tell a lone surrogate, which is allowed, from what is not JSON
    return _decode_exactly(text)


def _count_keys(value: object) -> int:
    count = 0
    if isinstance(value, dict):
        count = len(value)
        value = value.values()
    elif not isinstance(value, list):
        return 0
    for child in value:
        if isinstance(child, (dict, list)):
            count += _count_keys(child)
    return count


def _decode_exactly(text: str) -> object:
    """As `_decode`, and slower: takes lone surrogates, refuses duplicate keys, says where the text is not JSON."""
    value: object = _EXACT.decode(text)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object')
    return members


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits} is out of range")
    return number


_EXACT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
_LENIENT = json.JSONDecoder()
"""Finds where an object ends, also one that is refused then: nothing inside of it is the answer."""
_BRACKET = re.compile(r"[\[\]{}]")


def _last_object(text: str) -> str | None:
    """The text of the last object that stands in no other brackets; None where brackets are left open, or it is none.

    A bracket that closes nothing is passed over.
    """
    found: str | None = None
    depth = at = 0
    while (bracket := _BRACKET.search(text, at)) is not None:
        at = bracket.end()
        sign = bracket[0]
        if sign in "]}":
            depth = max(0, depth - 1)
            continue
        if sign == "{" and depth == 0:
            try:
                _, at = _LENIENT.raw_decode(text, bracket.start())
            except ValueError:
                pass
            else:
                found = text[bracket.start() : at]
                continue
        depth += 1
    return None if depth else found
