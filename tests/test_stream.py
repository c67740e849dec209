"""Server-sent events to one answer: cut anywhere, in every shape that services send."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.dialects import openai
from batcher.dialects.stream import Assembler, StreamTooLargeError
from batcher.records import Answer, Failure, Kind, Reply, Timing

TOP: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1764230000,
    "model": "gpt-oss-120b",
    "system_fingerprint": "fp_1",
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TIMES = {"queue_time": 0.01, "prompt_time": 0.02, "completion_time": 0.5, "total_time": 0.53}
DONE = "data: [DONE]\n\n"


def event(members: object, ascii: bool = True) -> str:
    """One event with this data."""
    return f"data: {json.dumps(members, ensure_ascii=ascii)}\n\n"


def chunk(*choices: dict[str, Any], **members: Any) -> str:
    """An event with these choices."""
    return event({**TOP, "choices": list(choices), **members})


def delta(index: int = 0, finish_reason: str | None = None, **members: Any) -> dict[str, Any]:
    """A choice that brings something."""
    return {"index": index, "delta": members, "finish_reason": finish_reason}


def fed(pieces: Iterable[bytes], most: int = 8 << 20) -> Assembler:
    """An assembler that was given these pieces."""
    events = Assembler(most)
    for piece in pieces:
        events.feed(piece)
    return events


def assembled(*parts: str | bytes) -> Any:
    """The object that a stream comes to."""
    raw = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return json.loads(fed([raw]).finish())


def read(*parts: str | bytes) -> Answer | Failure:
    """What a dialect says of a stream."""
    raw = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return openai.read(Reply(200, {}, fed([raw]).finish(), Timing(0, 0.0)))


def test_a_chat_answer_is_what_it_is_without_streaming() -> None:
    """Text, reasoning, usage and times of a stream make the object of a plain answer."""
    whole = assembled(
        chunk(delta(role="assistant", content="")),
        chunk(delta(reasoning="Let me ")),
        chunk(delta(reasoning="think.")),
        chunk(delta(content="Yes")),
        chunk(delta(content=", Zoë 🙂\n")),
        chunk(delta(finish_reason="stop"), usage=USAGE, time_info=TIMES, service_tier="auto"),
        DONE,
    )
    assert whole == {
        **TOP,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Yes, Zoë 🙂\n", "reasoning": "Let me think."},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "time_info": TIMES,
        "service_tier": "auto",
    }


@pytest.mark.parametrize(
    "end",
    [
        chunk(delta(finish_reason="stop"), usage=USAGE, service_tier_used="flex"),
        chunk(delta(finish_reason="stop"), usage=None) + chunk(usage=USAGE, service_tier_used="flex"),
        chunk(delta(finish_reason="stop")) + event({"usage": USAGE, "service_tier_used": "flex"}),
        chunk(delta(finish_reason="stop"), x_groq={"id": "r", "usage": USAGE}, service_tier_used="flex"),
    ],
    ids=["with-the-reason", "without-choices", "alone", "groq"],
)
def test_usage_is_found_wherever_it_stands(end: str) -> None:
    """Usage comes with the finish reason, in a chunk after it, or where Groq puts it."""
    whole = assembled(chunk(delta(content="Yes"), usage=None), end, DONE)
    assert whole["usage"] == USAGE
    assert whole["service_tier_used"] == "flex"


def test_tool_calls_are_joined_by_their_index() -> None:
    """Several calls that come mixed keep their own arguments; beside them an empty text is none."""

    def call(index: int, **members: Any) -> str:
        return chunk(delta(tool_calls=[{"index": index, **members}]))

    whole = assembled(
        chunk(delta(role="assistant", content="")),
        call(0, id="a", type="function", function={"name": "look", "arguments": ""}),
        call(0, function={"arguments": '{"at":'}),
        call(1, id="b", type="function", function={"name": "ask", "arguments": '{"x'}),
        call(0, id=None, function={"name": None, "arguments": ' "home"}'}),
        call(1, id="", function={"arguments": '": 1}'}),
        chunk(delta(finish_reason="tool_calls")),
        DONE,
    )
    message = whole["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "home"}'}},
        {"id": "b", "type": "function", "function": {"name": "ask", "arguments": '{"x": 1}'}},
    ]


def test_tool_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    """Servers that leave the index out send an id with each new call."""

    def call(**members: Any) -> str:
        return chunk(delta(tool_calls=[members]))

    whole = assembled(
        call(id="a", function={"name": "f", "arguments": "{"}),
        call(function={"arguments": "}"}),
        call(id="b", function={"name": "g", "arguments": "{}"}),
        chunk(delta(finish_reason="tool_calls")),
    )
    calls = whole["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "{}"), ("b", "{}")]


def test_logprobs_of_all_chunks_follow_each_other() -> None:
    """Both kinds of logprobs are one list each in the end, numbers as they were sent."""

    def with_logprobs(**logprobs: Any) -> str:
        return chunk({**delta(content="x"), **logprobs})

    first, second = {"token": "a", "logprob": -0.25, "top_logprobs": []}, {"token": "b", "logprob": -1e-7}
    whole = assembled(
        chunk(delta(role="assistant")),
        with_logprobs(reasoning_logprobs={"content": [first]}, logprobs=None),
        with_logprobs(logprobs={"content": [first], "refusal": None}),
        with_logprobs(logprobs={"content": []}),
        with_logprobs(logprobs={"content": [second, first]}),
        chunk({**delta(finish_reason="stop"), "logprobs": None}),
    )
    choice = whole["choices"][0]
    assert choice["logprobs"] == {"content": [first, second, first], "refusal": None}
    assert choice["reasoning_logprobs"] == {"content": [first]}


def test_completions_keep_text_tokens_and_their_own_logprobs() -> None:
    """The older endpoint streams the object of its answers, with one choice per prompt."""

    def part(index: int, **members: Any) -> str:
        return event({**TOP, "object": "text_completion", "choices": [{"index": index, **members}]})

    whole = assembled(
        part(1, text="B", finish_reason=None),
        part(0, text="A", tokens=[1, 2], logprobs={"tokens": ["A"], "token_logprobs": [-1.0], "text_offset": [0]}),
        part(1, text="b"),
        part(0, text="a", tokens=[3], logprobs={"tokens": ["a"], "token_logprobs": [-2.0], "text_offset": [1]}),
        part(0, text="", finish_reason="length"),
        part(1, text="", finish_reason="stop"),
        DONE,
    )
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [
        {
            "index": 0,
            "text": "Aa",
            "tokens": [1, 2, 3],
            "logprobs": {"tokens": ["A", "a"], "token_logprobs": [-1.0, -2.0], "text_offset": [0, 1]},
            "finish_reason": "length",
        },
        {"index": 1, "text": "Bb", "finish_reason": "stop"},
    ]


def test_what_nobody_here_knows_is_kept() -> None:
    """Unknown members of chunks, choices and deltas are in the object: texts and lists joined, else the last value."""
    whole = assembled(
        chunk({**delta(content="a", notes="x", links=[1]), "stop_reason": None}, extra={"a": 1}),
        chunk({**delta(content="b", notes="y", links=[2]), "stop_reason": 7}, extra=None),
        chunk(delta(finish_reason="stop", score=1)),
    )
    assert whole["extra"] == {"a": 1}
    assert whole["choices"][0]["stop_reason"] == 7
    message = whole["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "ab", "notes": "xy", "links": [1, 2], "score": 1}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_end_in_every_way_and_what_is_no_data_is_ignored(newline: str) -> None:
    """Comments, other fields, empty data, names of events, a BOM and data of several lines are all valid."""
    stream = (
        "\ufeff: welcome\n\n: heartbeat\nid: 7\nretry: 100\nevent: message\n"
        + chunk(delta(content="Yes"))
        + "data:\n\ndata\n\nunknown\n\n"
        + 'data: {"choices": [{"index": 0,\ndata:"delta": {"content": "!"},\ndata: "finish_reason": "stop"}]}\n\n'
        + DONE
    ).replace("\n", newline)
    for size in (1, 2, 3, 7, len(stream)):
        raw = stream.encode()
        events = fed(raw[start : start + size] for start in range(0, len(raw), size))
        assert events.ended
        assert json.loads(events.finish())["choices"][0]["message"]["content"] == "Yes!"


def test_only_what_was_generated_counts_as_the_first_token() -> None:
    """A role, an empty text and a comment are no token; reasoning, a call and a text are."""
    for first in (
        delta(reasoning="a"),
        delta(content="a"),
        delta(tool_calls=[{"index": 0, "id": "x"}]),
        {"index": 0, "text": "a"},
    ):
        events = Assembler(1 << 20)
        events.feed(b": hello\n\n" + chunk(delta(role="assistant", content="", reasoning=None)).encode())
        assert not events.begun
        events.feed(chunk(first).encode())
        assert events.begun


def test_an_end_is_told_from_a_cut() -> None:
    """Every choice's finish reason or [DONE] ends an answer, and nothing counts after [DONE]."""
    one, two = chunk(delta(content="a"), delta(1, content="b")), chunk(delta(finish_reason="stop"))
    assert not fed([]).complete
    assert not fed([one.encode(), two.encode()]).complete
    assert fed([one.encode(), two.encode(), chunk(delta(1, "stop")).encode()]).complete
    assert fed([DONE.encode()]).complete
    late = assembled(chunk(delta(content="a", finish_reason="stop")), DONE, chunk(delta(content="b")))
    assert late["choices"][0]["message"]["content"] == "a"
    # The last event may lack its blank line.
    assert assembled(chunk(delta(content="a", finish_reason="stop")).rstrip())["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("end", ["", DONE, 'data: {"choices": [{"ind'])
def test_an_answer_that_is_not_whole_is_never_taken_for_one(end: str) -> None:
    """Partial text is malformed and may be paid, whatever ends it."""
    found = read(chunk(delta(content="Ye")), end)
    assert isinstance(found, Failure)
    assert (found.kind, found.paid) == (Kind.MALFORMED_RESPONSE, True)


@pytest.mark.parametrize(
    "error",
    [
        event({"error": {"message": "no room", "type": "server_error"}, "status_code": 503}),
        "event: error\n" + event({"error": {"message": "no room"}, "status_code": 503}),
        "event: error\n" + event({"message": "no room"}),
        "event: error\ndata: no room\n\n",
    ],
    ids=["unnamed", "named", "bare", "text"],
)
def test_an_error_in_the_stream_takes_the_answers_place(error: str) -> None:
    """What came before an error is no answer, even if it had ended, and nothing after it counts."""
    before = chunk(delta(content="Yes", finish_reason="stop"))
    events = fed([before.encode(), error.encode(), chunk(delta(content="more")).encode()])
    assert events.ended
    whole = json.loads(events.finish())
    assert "choices" not in whole
    assert "no room" in json.dumps(whole["error"])
    found = read(before, error)
    assert isinstance(found, Failure)
    assert "no room" in found.message


def test_half_characters_are_joined() -> None:
    """A character that is cut in two, as bytes or as escapes, is whole in the answer."""
    for first, second in ((rb"\ud83d", rb"\ude42"), ("🙂".encode()[:2], "🙂".encode()[2:])):
        halves = [
            b'data: {"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}\n\n' % half
            for half in ((b"a", b"null"), (first, b"null"), (second, b'"stop"'))
        ]
        found = read(*halves)
        assert isinstance(found, Answer)
        assert found.choices[0].text == "a🙂"


def test_sizes_are_bounded_by_what_is_kept() -> None:
    """A line, an event and the kept text have their bounds; what every event repeats has none here."""
    repeated = Assembler(100_000)
    for _ in range(10_000):
        repeated.feed(chunk(delta(content="a")).encode())
    repeated.feed(b": heartbeat\n" * 100_000)
    assert len(json.loads(repeated.finish())["choices"][0]["message"]["content"]) == 10_000
    endless = [
        (chunk(delta(content="a" * 1000)).encode() for _ in range(1000)),
        (chunk(delta(number, content="a")).encode() for number in range(10_000)),
        (chunk(delta(tool_calls=[{"index": number}])).encode() for number in range(10_000)),
        (event({f"member{number}": 1}).encode() for number in range(10_000)),
        (b"data: " + b"x" * 60_000 for _ in range(100)),
        (b"data: 1\n" * 1000 for _ in range(1000)),
    ]
    for pieces in endless:
        with pytest.raises(StreamTooLargeError):
            fed(pieces, most=100_000)


TEXTS = st.text(max_size=8)
MAYBE = st.one_of(st.none(), TEXTS)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks of some answer, and what they come to."""
    chunks: list[dict[str, Any]] = []
    choices = []
    for index in range(draw(st.integers(1, 3))):
        message: dict[str, Any] = {"role": "assistant", "content": None}
        chunks.append({"choices": [delta(index, role="assistant")]})
        for name in draw(st.sampled_from([("content",), ("reasoning", "content"), ("reasoning_content",)])):
            parts = draw(st.lists(TEXTS, min_size=1, max_size=4))
            message[name] = "".join(parts)
            chunks += [{"choices": [delta(index, **{name: part})]} for part in parts]
        reason = draw(st.sampled_from(["stop", "length", "done"]))
        chunks.append({"choices": [delta(index, finish_reason=reason)]})
        choices.append({"index": index, "message": message, "finish_reason": reason})
    chunks.append({"choices": [], "usage": USAGE})
    whole = {**TOP, "object": "chat.completion", "choices": choices, "usage": USAGE}
    return [{**TOP, **chunk} for chunk in chunks], whole


@settings(max_examples=200, deadline=None)
@given(answers(), st.booleans(), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_any_answer_cut_anywhere_comes_to_the_same(
    answer: tuple[list[dict[str, Any]], dict[str, Any]], ascii: bool, newline: str, data: st.DataObject
) -> None:
    """However an answer is divided into chunks, and its bytes into pieces, it is the same object."""
    chunks, whole = answer
    stream = "".join(event(part, ascii) + (": heartbeat\n\n" if data.draw(st.booleans()) else "") for part in chunks)
    raw = (stream + DONE).replace("\n", newline).encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert json.loads(fed(pieces).finish()) == whole


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from(
                [
                    *(b"data: ", b"\n\n", b"\r", b"event: error\n", b"[DONE]", b'{"error": 1}', b"{", b"null"),
                    b'{"choices": {}}',
                    b'{"choices": [1, null, {"index": -1, "delta": 3}]}',
                    b'{"choices": [{"index": 1e3, "delta": {"content": ["a"], "tool_calls": {"a": 1}}}]}',
                    b'{"choices": [{"delta": {"content": 1, "tool_calls": [null, {"function": ""}]}}], "logprobs": []}',
                    b'{"usage": "many", "x_groq": 3, "object": 7}',
                    b'{"choices": [{"message": {"content": "a"}, "text": null, "logprobs": {"content": 1}}]}',
                ]
            ),
        ),
        max_size=10,
    )
)
def test_whatever_comes_is_a_value(parts: list[bytes]) -> None:
    """No bytes make it raise, and what it gives can be read or is a failure."""
    body = fed(part + b"\n\n" if part.startswith(b"{") else b"data: " + part for part in parts).finish()
    assert isinstance(openai.read(Reply(200, {}, body, Timing(0, 0.0))), Answer | Failure)
