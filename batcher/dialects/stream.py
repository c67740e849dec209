"""A streamed answer put together: server-sent events in, the answer as it comes without streaming out."""

import json
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Raw

_LONGEST: Final = 1 << 20
"""Bytes of a line, and of the data of one event."""
_OWN: Final = 256
"""Bytes that a choice, a call or a member counts for besides its text."""
_BOM: Final = b"\xef\xbb\xbf"
_NOTHING: Final = frozenset((b"null", b'""', b"[]", b"{}"))
_TEXT, _LIST, _OBJECT = b'"', b"[", b"{"
_CLOSING: Final[Mapping[int, bytes]] = {_TEXT[0]: b'"', _LIST[0]: b"]"}
_GENERATED: Final = frozenset(
    ("content", "reasoning", "reasoning_content", "refusal", "tool_calls", "function_call", "text", "tokens")
)
"""Members whose first content is the first token."""

_Members = dict[str, "bytes | bytearray | _Members"]
"""A JSON object as it grows. Bytes are a whole value; a bytearray is a text or a list that is not closed yet."""


class StreamTooLargeError(Exception):
    """What the events hold is longer than allowed."""


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: Raw = Raw(b"null")
    reasoning: Raw = Raw(b"null")
    reasoning_content: Raw = Raw(b"null")
    role: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None


class _CommonChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    index: int = 0
    delta: _Delta | None = None
    text: Raw = Raw(b"null")
    finish_reason: None = None
    logprobs: None = None
    reasoning_logprobs: None = None
    stop_reason: None = None  # vLLM, as the next
    token_ids: None = None


class _CommonChunk(msgspec.Struct, gc=False):
    """A chunk that adds some text to a choice, as nearly all do. Whatever says more does not fit these types."""

    choices: tuple[_CommonChoice]
    usage: None = None
    time_info: None = None
    error: None = None


_common: Final = msgspec.json.Decoder(_CommonChunk).decode
_decode_object: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_list: Final = msgspec.json.Decoder(list[Raw]).decode


class _Choice:
    """One choice as it grows; `message` is None for completions."""

    __slots__ = ("calls", "members", "message")

    def __init__(self) -> None:
        self.members: _Members = {}
        self.message: _Members | None = None
        self.calls: dict[int, _Members] = {}


class Assembler:
    """A streamed answer as it comes.

    Texts are joined as they stand in the JSON, so that a character may be cut in two. Of the `most` bytes that an
    answer may have only what is kept counts, not what every event says again. What it knows no rule for is kept as
    well: in a delta texts and lists are joined, elsewhere the last value counts.
    """

    def __init__(self, most: int) -> None:
        self.begun = False
        """Whether something generated has come: a role alone is not."""
        self.ended = False
        """Whether no event counts any more: the stream has said so, has failed, or cannot be read."""
        self._room = most
        self._pieces: list[bytes] = []  # of a line that has not ended
        self._held = 0  # their bytes
        self._returned = False  # the last byte was CR: LF would belong to it
        self._first = True
        self._data: list[bytes] = []  # of an event that has not ended
        self._size = 0  # bytes of its lines
        self._name = b""
        self._top: _Members = {}
        self._choices: dict[int, _Choice] = {}
        self._instead: bytes | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer has ended: the stream says so, or every choice does."""
        return self.ended or (
            bool(self._choices)
            and all(choice.members.get("finish_reason", b"null") != b"null" for choice in self._choices.values())
        )

    def feed(self, piece: bytes) -> None:
        """Take in the next bytes, cut anywhere. Raises StreamTooLargeError."""
        if self._returned and piece.startswith(b"\n"):
            piece = piece[1:]
        self._returned = piece.endswith(b"\r")
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        whole, newline, rest = piece.rpartition(b"\n")
        if newline:
            self._pieces.append(whole)
            lines = b"".join(self._pieces).split(b"\n")
            self._pieces, self._held = [], 0
            for line in lines:
                self._line(line)
        self._pieces.append(rest)
        self._held += len(rest)
        if self._held > _LONGEST:
            raise StreamTooLargeError

    def finish(self) -> bytes:
        """The answer that came: one JSON object, or an error as the service put it, or what could not be read.

        Raises StreamTooLargeError.
        """
        self._line(b"".join(self._pieces))
        self._line(b"")
        if self._instead is not None:
            return self._instead
        top = self._top
        groq = top.get("x_groq")
        if top.get("usage", b"null") == b"null" and isinstance(groq, bytes) and (usage := _members(groq).get("usage")):
            top["usage"] = usage
        if isinstance(what := top.get("object"), bytes):
            top["object"] = what.replace(b'.chunk"', b'"')
        if not top and not self._choices:
            return b""
        choices = b",".join(_text(_whole(index, self._choices[index])) for index in sorted(self._choices))
        return _text({**top, "choices": b"[" + choices + b"]"})

    def _line(self, line: bytes) -> None:
        if self._first:
            line, self._first = line.removeprefix(_BOM), False
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
            if self._size > _LONGEST:
                raise StreamTooLargeError
        elif not line:
            if self._data and not self.ended:
                self._event(b"\n".join(self._data) if len(self._data) > 1 else self._data[0])
            self._data.clear()
            self._size, self._name = 0, b""
        elif line.startswith(b"event:"):
            self._name = line[6:].strip()

    def _event(self, data: bytes) -> None:
        if data.startswith(b"[DONE]"):
            self.ended = True
        elif not self._added(data) and data.strip():
            try:
                members = _members(data)
            except (ValueError, RecursionError):
                self.ended = True
                self._instead = data if self._name != b"error" else _error(json.dumps(data.decode("utf-8", "replace")))
                return
            if members.get("error", b"null") != b"null":
                self.ended = True
                self._instead = _text({name: text for name, text in members.items() if name != "choices"})
            elif self._name == b"error":
                self.ended, self._instead = True, _error(data.decode("utf-8", "replace"))
            else:
                self._chunk(members)

    def _added(self, data: bytes) -> bool:
        """Whether these are a known choice's next words and nothing else; then they are added to it."""
        try:
            chunk = _common(data)
        except (ValueError, RecursionError):
            return False
        choice = chunk.choices[0]
        known = self._choices.get(choice.index)
        if known is None or self._name:
            return False
        delta, message = choice.delta, known.message
        if delta is None:
            self._generated(known.members, "text", bytes(choice.text))
        elif message is None:
            return False
        else:
            for name, words in (
                ("reasoning", delta.reasoning),
                ("reasoning_content", delta.reasoning_content),
                ("content", delta.content),
            ):
                if (text := bytes(words)) != b"null":
                    self._generated(message, name, text)
        return True

    def _chunk(self, members: Mapping[str, bytes]) -> None:
        """Any chunk, by what its members are."""
        for name, text in members.items():
            if name == "choices":
                for position, item in enumerate(_items(text)):
                    self._choice(position, _members(item))
            else:
                self._settle(self._top, name, text)

    def _choice(self, position: int, members: Mapping[str, bytes]) -> None:
        index = _number(members.get("index"), position)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
            self._take(_OWN)
        for name, text in members.items():
            if name == "delta" or (name == "message" and choice.message is None):
                self._delta(choice, _members(text))
            elif name in ("text", "tokens"):
                self._generated(choice.members, name, text)
            elif name in ("logprobs", "reasoning_logprobs") and text.startswith(_OBJECT):
                lists = choice.members.get(name)
                if not isinstance(lists, dict):
                    lists = choice.members[name] = {}
                for inner, part in _members(text).items():
                    self._grow(lists, inner, part)
            elif name not in ("index", "message"):
                self._settle(choice.members, name, text)

    def _delta(self, choice: _Choice, members: Mapping[str, bytes]) -> None:
        if choice.message is None:
            choice.message = {"role": b'"assistant"', "content": b"null"}
        for name, text in members.items():
            if name == "role":
                self._settle(choice.message, name, text)
            elif name == "tool_calls":
                for item in _items(text):
                    self.begun = True
                    self._call(choice.calls, _members(item))
            else:
                self._generated(choice.message, name, text)

    def _call(self, calls: dict[int, _Members], members: Mapping[str, bytes]) -> None:
        """A part of a call. Where no index says of which one: who brings an id begins another."""
        last = len(calls) - (1 if calls and members.get("id", b"null") in _NOTHING else 0)
        index = _number(members.get("index"), last)
        call = calls.get(index)
        if call is None:
            call = calls[index] = {}
            self._take(_OWN)
        for name, text in members.items():
            if name == "function" and text.startswith(_OBJECT):
                function = call.get(name)
                if not isinstance(function, dict):
                    function = call[name] = {}
                for inner, part in _members(text).items():
                    if inner == "arguments":
                        self._grow(function, inner, part)
                    else:
                        self._settle(function, inner, part)
            elif name != "index":
                self._settle(call, name, text)

    def _generated(self, into: _Members, name: str, text: bytes) -> None:
        if not self.begun and name in _GENERATED and text not in _NOTHING:
            self.begun = True
        self._grow(into, name, text)

    def _grow(self, into: _Members, name: str, text: bytes) -> None:
        """Add to a text or a list; of anything else the last counts."""
        kind = text[:1]
        if kind not in (_TEXT, _LIST):
            self._settle(into, name, text)
            return
        inner = text[1:-1] if kind == _TEXT else text[1:-1].strip()
        known = into.get(name)
        if isinstance(known, bytearray) and known.startswith(kind):
            if inner:
                known += b"," + inner if kind == _LIST and len(known) > 1 else inner
                self._take(len(inner) + 1)
        else:
            into[name] = bytearray(kind + inner)
            self._take(_OWN + len(inner))

    def _settle(self, into: _Members, name: str, text: bytes) -> None:
        """Take the last value that says something."""
        known = into.get(name)
        if known is None:
            into[name] = text
            self._take(_OWN + len(text))
        elif text not in _NOTHING:
            into[name] = text
            self._take(len(text) - len(known))

    def _take(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise StreamTooLargeError


def _whole(index: int, choice: _Choice) -> _Members:
    """A choice as it comes without streaming."""
    members: _Members = {"index": b"%d" % index}
    if choice.message is not None:
        message = members["message"] = dict(choice.message)
        if choice.calls:
            message["tool_calls"] = b"[" + b",".join(_text(choice.calls[at]) for at in sorted(choice.calls)) + b"]"
            if message.get("content") == bytearray(_TEXT):
                message["content"] = b"null"
    return members | choice.members


def _error(text: str) -> bytes:
    return b'{"error":%s}' % text.encode()


def _text(value: "bytes | bytearray | _Members") -> bytes:
    """A value as JSON."""
    if isinstance(value, dict):
        return b"{" + b",".join(b"%s:%s" % (json.dumps(name).encode(), _text(value[name])) for name in value) + b"}"
    return bytes(value) + _CLOSING[value[0]] if isinstance(value, bytearray) else value


def _members(text: bytes) -> dict[str, bytes]:
    """The members of an object, each as JSON; none of another value. ValueError or RecursionError if it is no JSON."""
    try:
        return {name: bytes(part) for name, part in _decode_object(text).items()}
    except msgspec.DecodeError:
        value = _loads(text)
        return {name: json.dumps(part).encode() for name, part in value.items()} if isinstance(value, dict) else {}


def _items(text: bytes) -> list[bytes]:
    """The items of a list, each as JSON; none of another value."""
    try:
        return list(map(bytes, _decode_list(text)))
    except msgspec.DecodeError:
        value = _loads(text)
        return [json.dumps(part).encode() for part in value] if isinstance(value, list) else []


def _loads(text: bytes) -> object:
    """JSON with half characters in it, which msgspec refuses, as a service that cuts its texts anywhere may send it."""
    value: object = json.loads(text.decode("utf-8", "surrogateescape"), parse_constant=_no_constant)
    return value


def _no_constant(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _number(text: bytes | None, default: int) -> int:
    return int(text) if text is not None and text.isdigit() and len(text) < 10 else default
