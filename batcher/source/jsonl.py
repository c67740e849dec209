"""JSONL files -> rows and columns."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import msgspec

from batcher.source.base import BLOCK
from batcher.source.files import File, FileIdentity
from batcher.source.lines import Streams, lines
from batcher.source.text import TextSource
from batcher.source.values import SURROGATE, guessed

_SAMPLE_ROWS, _SAMPLE_BYTES = 10_000, 8 << 20
_SAMPLE_ROWS_FURTHER = 100


class Jsonl(TextSource):
    """Files with one JSON object per line."""

    format = "jsonl"

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity], stride: int) -> None:
        values: dict[str, list[object]] = {}
        for index, file in enumerate(files):
            rows, size = (_SAMPLE_ROWS_FURTHER, BLOCK) if index else (_SAMPLE_ROWS, _SAMPLE_BYTES)
            for fields in _sample(file, rows, size):
                for name, value in fields.items():
                    values.setdefault(name, []).append(value)
        types = {name: guessed(seen) for name, seen in values.items() if not SURROGATE.search(name)}
        super().__init__(files, identities, types, stride)

    def _decoder(self, index: int) -> Callable[[bytes], object]:
        return _DECODER.decode

    def _second_look(self, index: int, text: bytes) -> dict[str, object] | str:
        return json_object(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is out of range")
    return value


_DECODER = msgspec.json.Decoder()
# Takes lone surrogates, which are JSON and which msgspec refuses, and says better what is wrong.
_PATIENT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_JSON_KINDS = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def json_object(text: bytes) -> dict[str, object] | str:
    """A JSON object read with patience, or what is wrong with it."""
    try:
        value = _PATIENT.decode(text.decode())
    except UnicodeDecodeError as error:
        return f"is not UTF-8: byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    except ValueError as error:
        return f"is not JSON: {error}"
    except RecursionError:
        return "is nested too deeply"
    return value if type(value) is dict else f"is not a JSON object but {_JSON_KINDS.get(type(value), 'null')}"


def _sample(file: File, most_rows: int, most_bytes: int) -> Iterator[dict[str, object]]:
    rows = 0
    for byte, _, texts in lines(file, 0, 1, Streams()):
        for text in filter(bytes.strip, texts):
            if rows == most_rows:
                return
            try:
                fields = _DECODER.decode(text)
            except (ValueError, RecursionError):
                fields = json_object(text)
            if type(fields) is dict:
                yield fields
            rows += 1
        if byte >= most_bytes and rows:
            return
