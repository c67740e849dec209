"""Files of OpenAI's batch API -> rows: whole requests, each with its id."""

from collections.abc import Callable, Sequence

import msgspec
import pyarrow as pa

from batcher.source.files import File, FileIdentity
from batcher.source.jsonl import json_object
from batcher.source.text import TextSource


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


_DECODER = msgspec.json.Decoder(_Line)
_BODY = msgspec.json.Decoder(dict[str, object])


class OpenaiBatch(TextSource):
    """Lines with `custom_id`, `method`, `url` and `body`; a row's `body` is a `msgspec.Raw`, byte for byte."""

    format = "openai-batch"

    def __init__(self, files: Sequence[File], identities: Sequence[FileIdentity], stride: int) -> None:
        types = dict.fromkeys(("custom_id", "url", "body"), pa.string())
        super().__init__(files, identities, types, stride)

    def _decoder(self, index: int) -> Callable[[bytes], object]:
        return _fields

    def _second_look(self, index: int, text: bytes) -> dict[str, object] | str:
        found = json_object(text)
        if isinstance(found, str):
            return found
        for name in ("custom_id", "method", "url"):
            if not isinstance(found.get(name), str):
                return f"is no request: its {name} is {_what(found, name)}, not a text"
        if found["method"] != "POST":
            return f"is no request: its method is {found['method']!r:.40}, not 'POST'"
        if not isinstance(found.get("body"), dict):
            return f"is no request: its body is {_what(found, 'body')}, not an object"
        return "holds a lone surrogate, which UTF-8 cannot carry"


def _what(found: dict[str, object], name: str) -> str:
    return "missing" if name not in found else f"{found[name]!r:.40}"


def _fields(text: bytes) -> dict[str, object]:
    line = _DECODER.decode(text)
    _BODY.decode(line.body)
    if line.method != "POST":
        raise ValueError("another method")
    return {"custom_id": line.custom_id, "url": line.url, "body": line.body}
