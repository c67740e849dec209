"""Answers as streams of events: what each chunk carries, when it goes, and how a stream goes wrong."""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import cycle
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from batcher.simulator import likelihood, vocabulary, wire
from batcher.simulator.speech import Said
from batcher.simulator.wire import Call, Called, ChunkChoice, Delta

CONTENT_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
SIZES = (1, 3, 5, 8, 5, 3)  # tokens of a choice's chunks, again and again
ERROR = b'{"error":%s,"status_code":500}' % wire.ERRORS[500]  # in the middle of a stream

FinalChunk: TypeAlias = Literal["asked", "together", "apart"]
"""Where usage and times stand: in the chunk that finishes, or in one more without choices; or as the request says."""


_CHUNK = msgspec.json.Decoder(wire.Chunk)


class StreamFault(StrEnum):
    """What can go wrong with a stream besides; a request that is not streamed does not meet these."""

    BROKEN = "broken"  # an error event in the middle, and no more
    STALL = "stall"  # nothing more after the middle, until the connection is reset
    UNDONE = "undone"  # it ends in the middle without [DONE], in good order
    RAGGED = "ragged"  # a good answer with comments between its events, in odd lines and odd pieces


class Piece(NamedTuple):
    """Bytes of a stream, and how many seconds after its beginning they go."""

    at: float
    data: bytes


def pieces(
    completed: wire.Completed, said: Sequence[Said], question: wire.Question, final: FinalChunk, seconds: float
) -> tuple[Piece, ...]:
    """The same answer as a stream that takes so many seconds; the choices' chunks come as their tokens do."""
    longest = max((one.tokens for one in said), default=0) or 1
    parts = [
        (done / longest, part)
        for index, one in enumerate(said if completed.choices else ())
        for done, part in _added(one, index, question)
    ]
    parts.sort(key=lambda timed: timed[0])
    apart = not parts or final == "apart" or (final == "asked" and question.include_usage)
    start = wire.Chunk(
        completed.id,
        "chat.completion.chunk" if question.chat else completed.object,
        completed.created,
        completed.model,
        completed.system_fingerprint,
        [],
        service_tier=completed.service_tier,
        service_tier_used=completed.service_tier_used,
    )
    timed = [(share, replace(start, choices=[part])) for share, part in parts]
    if apart:
        timed.append((1.0, start))
    share, last = timed[-1]
    timed[-1] = share, replace(last, usage=completed.usage, time_info=completed.time_info)
    made = [Piece(share * seconds, b"data: %s\n\n" % wire.ENCODER.encode(chunk)) for share, chunk in timed]
    return (*made, Piece(seconds, DONE))


def _added(said: Said, index: int, question: wire.Question) -> Iterator[tuple[int, ChunkChoice]]:
    """The chunks of one choice, each with the tokens that are said by its end."""
    likely = said.likely(question)
    done = told = 0
    if not question.chat:
        offset = 0
        for size, part in _groups(said.echo):
            shown = likely[told : told + size]
            yield 0, ChunkChoice(index, text=part, logprobs=likelihood.text(shown, offset) or UNSET)
            offset, told = offset + len(part), told + size
        numbers = vocabulary.numbers(said.content) if question.raw else []
        for size, part in _groups(said.content):
            shown = likely[told : told + size]
            yield (
                done + size,
                ChunkChoice(
                    index,
                    text=UNSET if question.raw else part,
                    tokens=numbers[done : done + size] if question.raw else UNSET,
                    logprobs=likelihood.text(shown, offset) or UNSET,
                ),
            )
            offset, told, done = offset + len(part), told + size, done + size
        rest: str | UnsetType = UNSET if question.raw else ""
        yield done, ChunkChoice(index, text=rest, finish_reason=said.finish_reason)
        return

    empty = said.calls and not said.content and not (question.format == "raw" and said.reasoning)
    yield 0, ChunkChoice(index, Delta("assistant", UNSET if empty else ""))
    thought = said.thought(question) if question.format == "parsed" else []
    for size, part in _groups(said.reasoning):
        if question.format != "hidden":
            delta = Delta(content=part) if question.format == "raw" else Delta(reasoning=part)
            own = likelihood.chat(thought[done : done + size]) or UNSET
            shared = UNSET if thought else likelihood.chat(likely[told : told + size]) or UNSET
            told += 0 if thought else size
            yield done + size, ChunkChoice(index, delta, logprobs=shared, reasoning_logprobs=own)
        done += size
    for size, part in _groups(said.content):
        shared = likelihood.chat(likely[told : told + size]) or UNSET
        yield done + size, ChunkChoice(index, Delta(content=part), logprobs=shared)
        done, told = done + size, told + size
    for position, call in enumerate(said.calls):
        done += wire.tokens(str(call.function.name))
        begun = Call(Called("", call.function.name), call.id, index=position)
        yield done, ChunkChoice(index, Delta(tool_calls=[begun]))
        for size, part in _groups(call.function.arguments):
            done += size
            yield done, ChunkChoice(index, Delta(tool_calls=[Call(Called(part), index=position)]))
    yield done, ChunkChoice(index, Delta(), finish_reason=said.finish_reason)


def _groups(text: str) -> Iterator[tuple[int, str]]:
    """A text in parts of some tokens each: how many, and the text."""
    cut = vocabulary.texts(vocabulary.pieces(text))
    at, sizes = 0, cycle(SIZES)
    while at < len(cut):
        group = cut[at : at + next(sizes)]
        yield len(group), "".join(group)
        at += len(group)


def broken(stream: Sequence[Piece], error: bytes, named: bool) -> tuple[Piece, ...]:
    """The first half of a stream, and then an error: in an event that is named so, or in one like all others."""
    half = stream[: len(stream) // 2]
    event = b"data: %s\n\n" % error
    return (*half, Piece(half[-1].at, b"event: error\n" + event if named else event))


def undone(stream: Sequence[Piece]) -> tuple[tuple[Piece, ...], bytes]:
    """The first half of a stream, and what its texts come to: choices that have not ended."""
    half = tuple(stream[: len(stream) // 2])
    choices: dict[int, wire.Unended] = {}
    for _, data in half:
        for part in _CHUNK.decode(data.removeprefix(b"data: ")).choices:
            choice = choices.setdefault(part.index, wire.Unended(part.index))
            if isinstance(part.text, str):
                choice.text = (choice.text or "") + part.text
            if isinstance(part.delta, Delta):
                message = choice.message or {"role": "assistant"}
                for name, words in (("content", part.delta.content), ("reasoning", part.delta.reasoning)):
                    if isinstance(words, str):
                        message[name] = message.get(name, "") + words
                choice.message = message
    return half, wire.ENCODER.encode({"choices": [choices[index] for index in sorted(choices)]})


def malformed(stream: Sequence[Piece]) -> tuple[tuple[Piece, ...], bytes]:
    """A stream with half an event in its middle, and what that event says."""
    middle = len(stream) // 2
    at, data = stream[middle]
    rest = data[: len(data) // 2]
    return (*stream[:middle], Piece(at, rest + b"\n\n"), *stream[middle + 1 :]), rest.removeprefix(b"data: ")


def ragged(stream: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same stream as only the standard allows it: comments, CRLF, data over two lines, pieces cut anywhere."""
    odd: list[Piece] = []
    for number, (at, data) in enumerate(stream):
        match number % 4:
            case 0:
                data = b": still here\n\n" + data
            case 1:
                data = data.replace(b"\n", b"\r\n")
            case 2:
                data = data.replace(b"data: {", b"data:{\ndata: ")
        thirds = len(data) // 3
        odd += [Piece(at, data[:thirds]), Piece(at, data[thirds : 2 * thirds]), Piece(at, data[2 * thirds :])]
    return tuple(odd)
