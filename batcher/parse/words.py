"""Words about what does not fit."""

import json
import re

SURROGATE = re.compile("[\ud800-\udfff]")


def line(message: str) -> str:
    """A message that is safe to print and to store: one line, printable, cut."""
    return "".join(character if character.isprintable() else " " for character in cut(message, 300))


def cut(text: str, length: int) -> str:
    """The text, or its beginning where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def quoted(value: object) -> str:
    """A value as JSON has it, cut."""
    return cut(json.dumps(value, ensure_ascii=False), 60)
