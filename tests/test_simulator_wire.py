"""The simulator as it looks on the wire: refusals, answers of every kind, streams, encodings, lists of models."""

import asyncio
import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher import dialects
from batcher.dialects.stream import Assembler
from batcher.records import Failure, Reply, Request
from batcher.simulator import Front, ModelTransport, Recorded, Settings, StreamFault, VirtualLoop, load_answers
from batcher.simulator.catalogue import entry
from batcher.simulator.model import Answer, Service
from batcher.simulator.vocabulary import SIZE, numbers
from batcher.simulator.wire import tokens

MODEL = "gpt-oss-120b"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TICKET = "My parcel never came. Please tell me where it is! What is the weather in Berlin, and what time is it?"
OPEN = Settings(
    requests_per_minute=None,
    tokens_per_minute=None,
    latency=0,
    seconds_per_prompt_token=0,
    seconds_per_completion_token=0,
)
PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time", "description": "time", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "book_flight"}},
]
CALL: Any = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (960).to_bytes(4) + (480).to_bytes(4) + b"\x08\x02\0\0\0"
JPEG = b"\xff\xd8\xff\xe0\0\x04ab\xff\xc0\0\x11\x08" + (480).to_bytes(2) + (960).to_bytes(2) + b"\x03"
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def user(content: Any = TICKET) -> Any:
    """One message of the user."""
    return [{"role": "user", "content": content}]


def ask(
    service: Service, request: Mapping[str, Any] | bytes, path: str = CHAT, headers: Mapping[str, str] | None = None
) -> Answer:
    """What the service decides about a request, whose missing parts are the usual ones."""
    if not isinstance(request, bytes):
        usual: dict[str, Any] = {"model": MODEL, **({"messages": user()} if path == CHAT else {"prompt": TICKET})}
        request = msgspec.json.encode(usual | dict(request))
    answer = service.receive("POST", path, "Bearer key", request, 0.0, headers or {})
    assert isinstance(answer, Answer)
    return answer


def told(request: Mapping[str, Any], path: str = CHAT, settings: Settings = OPEN) -> Any:
    """The body of a good answer."""
    answer = ask(Service(settings), request, path)
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def message(request: Mapping[str, Any], settings: Settings = OPEN) -> Any:
    """The message of the first choice."""
    return told(request, settings=settings)["choices"][0]["message"]


def assembled(pieces: Sequence[bytes]) -> Any:
    """What a stream comes to, by the rules of who reads it in this project."""
    events = Assembler(1 << 24)
    for piece in pieces:
        events.feed(piece)
    return json.loads(events.finish())


class TestRefusals:
    """Requests that the service does not take."""

    @pytest.mark.parametrize(
        ("request_", "param"),
        [
            ({"frequency_penality": 1}, "frequency_penality"),
            ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
            ({"frequency_penalty": 2.1}, "frequency_penalty"),
            ({"presence_penalty": -3}, "presence_penalty"),
            ({"logit_bias": {"12": 101}}, "logit_bias[...]"),
            ({"logit_bias": {"dog": 1}}, "logit_bias"),
            ({"logprobs": 3}, "logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
            ({"max_completion_tokens": -2}, "max_completion_tokens"),
            ({"min_completion_tokens": "2"}, "min_completion_tokens"),
            ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
            ({"prediction": {"type": "content", "content": "x"}, "n": 2}, "prediction"),
            ({"prediction": {"type": "content", "content": "x"}, "tools": TOOLS}, "prediction"),
            ({"prediction": {"type": "content", "content": "x"}, "logprobs": True}, "prediction"),
            ({"prediction": {"type": "text", "content": "x"}}, "prediction.type"),
            ({"prompt_cache_key": "k" * 1025}, "prompt_cache_key"),
            ({"reasoning_effort": "huge"}, "reasoning_effort"),
            ({"reasoning_format": "loud"}, "reasoning_format"),
            ({"reasoning_format": "raw", "response_format": {"type": "json_object"}}, "reasoning_format"),
            ({"seed": 1.5}, "seed"),
            ({"service_tier": "gold"}, "service_tier"),
            ({"stop": ["a", 1]}, "stop[1]"),
            ({"stream_options": {"include": True}}, "stream_options.include"),
            ({"top_p": 1.1}, "top_p"),
            ({"user": 7}, "user"),
            ({"clear_thinking": "yes"}, "clear_thinking"),
            ({"model_parameters": {"depth": 3}}, "model_parameters"),
            ({"tool_choice": "auto"}, "tool_choice"),
            ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"),
            (
                {"tool_choice": {"type": "function", "function": {"name": "no"}}, "tools": TOOLS},
                "tool_choice.function.name",
            ),
            ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
            (
                {"messages": [*user(), {"role": "tool", "content": "x", "tool_call_id": "c1"}]},
                "messages[1].tool_call_id",
            ),
            ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, *user()]}, "messages"),
            ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
            ({"messages": [{"role": "assistant", "tool_calls": [CALL, CALL]}]}, "messages[0].tool_calls"),
            (
                {
                    "model": "gemma-4-31b",
                    "messages": user([{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]),
                },
                "messages[0].content[0].image_url.url",
            ),
            (
                {"model": "gemma-4-31b", "messages": user([{"type": "image", "image": "data:image/png;base64,AAAA"}])},
                "messages[0].content[0].image",
            ),
            ({"messages": user([{"type": "image", "image": URI}])}, "messages"),
            ({"model": "gemma-4-31b", "messages": user([{"type": "image", "image": URI}] * 6)}, "messages"),
            ({"messages": user("long " * 200_000)}, "messages"),
        ],
    )
    def test_a_wrong_chat_is_told_which_parameter(self, request_: dict[str, Any], param: str) -> None:
        """Unknown, mistyped, out of range or badly combined: 400, with the parameter named."""
        self.refused(request_, CHAT, param)

    @pytest.mark.parametrize(
        ("request_", "param"),
        [
            ({"service_tier": "flex"}, "service_tier"),
            ({"messages": user()}, "messages"),
            ({"echo": True, "return_raw_tokens": True}, "echo"),
            ({"grammar_root": "sentence"}, "grammar_root"),
            ({"logprobs": 21}, "logprobs"),
            ({"logprobs": 3, "top_logprobs": 2}, "top_logprobs"),
            ({"min_tokens": -2}, "min_tokens"),
            ({"suffix": "the end"}, "suffix"),
            ({"best_of": 2, "n": 3}, "best_of"),
            ({"best_of": 2, "stream": True}, "best_of"),
            ({"prompt": []}, "prompt"),
            ({"prompt": ["a", 1]}, "prompt"),
            ({"prompt": [[1], []]}, "prompt[1]"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ],
    )
    def test_a_wrong_completion_is_told_which_parameter(self, request_: dict[str, Any], param: str) -> None:
        """The same of the other endpoint."""
        self.refused(request_, COMPLETIONS, param)

    def refused(self, request: dict[str, Any], path: str, param: str) -> None:
        """A 400 whose one object at the top level names the parameter."""
        answer = ask(Service(OPEN), request, path)
        error = json.loads(answer.body)
        assert (answer.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert set(error) == {"message", "type", "param", "code"}

    def test_what_is_too_long_says_so(self) -> None:
        """The service's own words, and the code that clients look for."""
        error = json.loads(ask(Service(OPEN), {"messages": user("word"), "max_completion_tokens": 131_072}).body)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].endswith("Current length is 131073 while limit is 131072")

    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            ({"type": "array", "items": {"type": "string"}}, "the root must be an object"),
            ({"type": "object", "properties": {}}, "additionalProperties must be false at the root"),
            (PARAMETERS | {"properties": {"a": {"type": "object"}}}, "additionalProperties must be false at a"),
            (PARAMETERS | {"properties": {"a": {"type": ["string", "null"]}}}, "type must be one name"),
            (PARAMETERS | {"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern is not supported at a"),
            (PARAMETERS | {"properties": {"a": {"type": "array", "minItems": 1}}}, "minItems is not supported at a"),
            (PARAMETERS | {"definitions": {}}, "definitions is not supported"),
            (PARAMETERS | {"properties": {"a": {"$ref": "#/properties/b"}}}, r"\$ref must name one of \$defs"),
            (PARAMETERS | {"properties": {"a": {"$ref": "#"}}}, r"\$ref must name one of \$defs"),
            (
                PARAMETERS
                | {
                    "properties": {"a": {"$ref": "#/$defs/a"}},
                    "$defs": {"a": PARAMETERS | {"properties": {"b": {"$ref": "#/$defs/a"}}}},
                },
                "recursive at a.a.b",
            ),
            (PARAMETERS | {"properties": {"a": {"anyOf": [{"type": "null"}] * 6}}}, "more than 5 branches of anyOf"),
            (PARAMETERS | {"properties": {"a": {"enum": list(range(501))}}}, "more than 500 enum values"),
            (PARAMETERS | {"properties": {f"a{i}": True for i in range(501)}}, "more than 500 properties|characters"),
            (PARAMETERS | {"description": "x" * 5_000}, "characters, more than 5000"),
        ],
    )
    def test_strict_schemas_are_checked(self, schema: Any, words: str) -> None:
        """A schema that strict mode does not take is refused with the reason, and taken without strict."""
        for strict in (True, False):
            form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}
            answer = ask(Service(OPEN), {"response_format": form})
            assert answer.status == (400 if strict else 200)
            if strict:
                with pytest.raises(ValueError, match=words):
                    raise ValueError(json.loads(answer.body)["message"])

    def test_a_deep_schema_is_refused(self) -> None:
        """Ten levels pass, eleven do not; in tools as well."""
        for levels, status in ((10, 200), (11, 400)):
            schema: Any = {"type": "object", "additionalProperties": False}
            for _ in range(levels - 1):
                schema = {"type": "object", "properties": {"a": schema}, "additionalProperties": False}
            tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
            assert ask(Service(OPEN), {"tools": [tool]}).status == status

    @pytest.mark.parametrize(
        ("headers", "param"),
        [
            ({"queue_threshold": "49"}, "queue_threshold"),
            ({"queue_threshold": "20001"}, "queue_threshold"),
            ({"queue_threshold": "soon"}, "queue_threshold"),
            ({"x-cerebras-version-patch": "1"}, "X-Cerebras-Version-Patch"),
        ],
    )
    def test_wrong_headers_are_refused(self, headers: dict[str, str], param: str) -> None:
        """The queue threshold has a range, and only one version lives."""
        answer = ask(Service(OPEN), {}, headers=headers)
        assert (answer.status, json.loads(answer.body)["param"]) == (400, param)

    def test_right_headers_are_taken(self) -> None:
        """Within their ranges."""
        for headers in ({"queue_threshold": "50"}, {"queue_threshold": "20000"}, {"x-cerebras-version-patch": "2"}):
            assert ask(Service(OPEN), {}, headers=headers).status == 200

    @pytest.mark.parametrize(
        ("status", "body", "content_type"),
        [
            (403, b'{"detail":"Not authenticated"}', "application/json"),
            (422, b'{"detail":"Unprocessable Entity"}', "application/json"),
            (502, b"<html>", "text/html"),
            (504, b"", "text/html"),
        ],
    )
    def test_some_layers_have_words_of_their_own(self, status: int, body: bytes, content_type: str) -> None:
        """Errors need not be the service's object, nor JSON at all."""
        answer = ask(Service(replace(OPEN, faults={str(status): 1})), {})
        assert (answer.status, answer.content_type) == (status, content_type)
        assert answer.body.startswith(body)
        assert bool(answer.body) == bool(body)


class TestAnswers:
    """What the simulated model says when it is asked for something special."""

    def test_every_role_and_part_is_taken(self) -> None:
        """All five roles, text and image parts, reasoning, calls and names; what is read is counted."""
        messages = [
            {"role": "system", "content": "Be kind.", "name": "s"},
            {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
            *user([{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": URI}}]),
            {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "c1"},
        ]
        usage = told({"model": "qwen-3.8-27b", "messages": messages})["usage"]
        assert usage["image_tokens"] == 253
        assert usage["prompt_tokens"] > usage["image_tokens"] + tokens("Be kind.Be short.What is this?")

    def test_images_are_counted_by_their_size(self) -> None:
        """PNG and JPEG, scaled to the budget and cut into squares."""
        for kind, data in (("png", PNG), ("jpeg", JPEG)):
            uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            content = [{"type": "image_url", "image_url": {"url": uri, "detail": "low"}}]
            usage = told({"model": "gemma-4-31b", "messages": user(content)})["usage"]
            assert usage["image_tokens"] == usage["prompt_tokens"] == min(280, (1135 // 48) * (567 // 48))

    def test_tools_are_called_by_the_words_of_the_prompt(self) -> None:
        """Those that it mentions, each with arguments that fit; one at most without parallel calls."""
        validator = jsonschema_rs.validator_for(PARAMETERS)
        for parallel, names in ((True, ["get_weather", "get_time"]), (False, ["get_weather"])):
            choice = told({"tools": TOOLS, "parallel_tool_calls": parallel})["choices"][0]
            calls = choice["message"]["tool_calls"]
            assert [call["function"]["name"] for call in calls] == names
            assert len({call["id"] for call in calls}) == len(calls)
            for call in calls:
                validator.validate(json.loads(call["function"]["arguments"]))
            assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)

    def test_tool_choice_decides(self) -> None:
        """None calls nothing, required always something, a name that one, and after an answer the model talks."""
        plain: Any = {"tools": TOOLS, "messages": user("Hello!")}
        assert message(plain)["content"]
        assert message({"tools": TOOLS, "tool_choice": "none"})["content"]
        assert message(plain | {"tool_choice": "required"})["tool_calls"]
        named = {"type": "function", "function": {"name": "book_flight"}}
        [call] = message({"tools": TOOLS, "tool_choice": named})["tool_calls"]
        assert call["function"]["name"] == "book_flight"
        turns = [*user(), {"role": "assistant", "tool_calls": [CALL]}]
        answered = [*turns, {"role": "tool", "content": "rain", "tool_call_id": "c1"}]
        assert message({"tools": TOOLS, "messages": answered})["content"]

    @pytest.mark.parametrize("model", [MODEL, "zai-glm-4.7", "qwen-3.8-27b"])
    def test_reasoning_comes_in_the_asked_format(self, model: str) -> None:
        """Apart, inside of the content, or not at all; counted in every case."""
        found = {}
        for form in ("parsed", "text_parsed", "raw", "hidden", "none"):
            answer = told({"model": model, "reasoning_effort": "medium", "reasoning_format": form})
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
            found[form] = answer["choices"][0]["message"]
        reasoning, content = found["parsed"]["reasoning"], found["parsed"]["content"]
        assert found["text_parsed"] == found["parsed"]
        assert found["hidden"] == {"role": "assistant", "content": content}
        tags = ("", "") if model == MODEL else ("<think>", "</think>")
        assert found["raw"] == {"role": "assistant", "content": reasoning.join(tags) + content}
        assert found["none"] == (found["raw"] if model == "qwen-3.8-27b" else found["text_parsed"])

    def test_reasoning_grows_with_the_effort(self) -> None:
        """From none to high, and none when it is disabled."""
        sizes = []
        for effort in ("none", "low", "medium", "high"):
            details = told({"reasoning_effort": effort})["usage"]["completion_tokens_details"]
            sizes.append(details["reasoning_tokens"])
        assert sizes == sorted(set(sizes))
        assert "reasoning" not in message({"reasoning_effort": "high", "disable_reasoning": True})

    def test_earlier_thinking_is_dropped_where_it_is_asked(self) -> None:
        """By clear_thinking, which one model does unless told otherwise; then it is not read."""
        thinking = {"role": "assistant", "content": "Yes.", "reasoning": "I think " * 50}
        messages = [*user(), thinking, *user()]
        sizes = {
            (model, clear): told({"model": model, "messages": messages, "clear_thinking": clear})["usage"][
                "prompt_tokens"
            ]
            for model in (MODEL, "zai-glm-4.7")
            for clear in (None, True, False)
        }
        most = max(sizes.values())
        assert {key for key, size in sizes.items() if size == most} == {
            (MODEL, None),
            (MODEL, False),
            ("zai-glm-4.7", False),
        }

    @pytest.mark.parametrize("top", [None, 0, 1, 20])
    def test_log_probabilities_are_of_the_said_tokens(self, top: int | None) -> None:
        """Joined they are the text; the likely ones differ, go down, and make one at most."""
        answer = told({"logprobs": True, "top_logprobs": top, "messages": user("Zürich 🙂 in the snow")})
        choice = answer["choices"][0]
        items = choice["logprobs"]["content"]
        assert "".join(item["token"] for item in items) == choice["message"]["content"]
        assert b"".join(bytes(item["bytes"]) for item in items).decode() == choice["message"]["content"]
        assert len(items) == answer["usage"]["completion_tokens"]
        for item in items:
            likely = item["top_logprobs"]
            assert len(likely) == len({one["token"] for one in likely}) == (top or 0)
            assert sorted((one["logprob"] for one in likely), reverse=True) == [one["logprob"] for one in likely]
            assert sum(math.exp(one["logprob"]) for one in likely) <= 1
            assert item["logprob"] < 0

    def test_parsed_reasoning_has_probabilities_of_its_own(self) -> None:
        """With `parsed` apart, with `text_parsed` before those of the content."""
        base: Any = {"logprobs": True, "reasoning_effort": "low"}
        apart = told(base | {"reasoning_format": "parsed"})["choices"][0]
        joined = told(base | {"reasoning_format": "text_parsed"})["choices"][0]
        words = [
            "".join(item["token"] for item in apart[name]["content"]) for name in ("reasoning_logprobs", "logprobs")
        ]
        assert words == [apart["message"]["reasoning"], apart["message"]["content"]]
        assert "".join(item["token"] for item in joined["logprobs"]["content"]) == "".join(words)
        assert "reasoning_logprobs" not in joined

    def test_predictions_are_accepted_where_they_match(self) -> None:
        """The answer is the predicted text but for a word; what was accepted and what not makes up the prediction."""
        text = " ".join(f"word{number}" for number in range(60))
        prediction = {"type": "content", "content": [{"type": "text", "text": text}]}
        answer = told({"prediction": prediction})
        usage, content = answer["usage"], answer["choices"][0]["message"]["content"]
        details = usage["completion_tokens_details"]
        accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
        assert sum(one != other for one, other in zip(content.split(), text.split(), strict=True)) == 1
        assert accepted + rejected == tokens(text)
        assert accepted > 0.8 * tokens(text)
        assert rejected > 0
        assert usage["completion_tokens"] == tokens(content) + rejected
        recorded = replace(OPEN, answers=Recorded({TICKET: [text]}))
        details = told({"prediction": prediction}, settings=recorded)["usage"]["completion_tokens_details"]
        assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (tokens(text), 0)

    def test_stop_texts_end_a_choice(self) -> None:
        """Before the first of them, which is not given back."""
        whole = message({})["content"]
        for stop in ("It", ["zzz", " ", "This"], None):
            choice = told({"stop": stop})["choices"][0]
            ends = [whole.find(text) for text in ([stop] if isinstance(stop, str) else stop or []) if text in whole]
            assert choice["message"]["content"] == whole[: min(ends, default=None)]
            assert choice["finish_reason"] == "stop"

    def test_min_tokens_make_it_longer(self) -> None:
        """At least so many; -1 as many as there may be; JSON stays JSON."""
        assert told({"min_completion_tokens": 300})["usage"]["completion_tokens"] >= 300
        answer = told({"min_tokens": -1, "max_tokens": 77}, COMPLETIONS)
        assert answer["usage"]["completion_tokens"] == 77
        answer = told({"min_tokens": 200, "response_format": {"type": "json_object"}})
        assert json.loads(answer["choices"][0]["message"]["content"])
        assert answer["usage"]["completion_tokens"] == 200

    def test_tiers_are_told(self) -> None:
        """The one asked for, and with auto the one used; null where none was asked for."""
        assert told({})["service_tier"] is None
        assert told({"service_tier": "flex"})["service_tier"] == "flex"
        answer = told({"service_tier": "auto"})
        assert answer["service_tier"] == "auto"
        assert answer["service_tier_used"] in ("priority", "default", "flex")
        assert "service_tier_used" not in told({"service_tier": "default"})

    @pytest.mark.parametrize("prompt", [TICKET, ["One apple.", "Two pears."], [11, 22, 33], [[11, 22], [33]]])
    def test_completions_take_prompts_in_four_shapes(self, prompt: Any) -> None:
        """A text, texts, tokens, lists of tokens; a choice for each prompt and each n, in order."""
        answer = told({"prompt": prompt, "n": 2, "echo": True}, COMPLETIONS)
        many = isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str))
        prompts = [one if isinstance(one, str) else " ".join(map(str, one)) for one in (prompt if many else [prompt])]
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
        for choice in answer["choices"]:
            assert choice["text"].startswith(prompts[choice["index"] // 2])
            assert len(choice["text"]) > len(prompts[choice["index"] // 2])
        if not isinstance(prompt, str) and not isinstance(prompt[0], str):
            assert answer["usage"]["prompt_tokens"] == 3

    def test_raw_tokens_stand_for_the_text(self) -> None:
        """Numbers instead of text, as many as were said."""
        answer = told({"return_raw_tokens": True}, COMPLETIONS)
        text = told({}, COMPLETIONS)["choices"][0]["text"]
        [choice] = answer["choices"]
        assert choice["text"] is None
        assert choice["tokens"] == numbers(text)
        assert len(choice["tokens"]) == answer["usage"]["completion_tokens"]
        assert all(0 <= number < SIZE for number in choice["tokens"])

    def test_best_of_is_charged_and_not_given(self) -> None:
        """All candidates count, n of each prompt's come back."""
        one, best = (
            told({"prompt": ["One apple.", "Two pears."], **more}, COMPLETIONS) for more in ({}, {"best_of": 3})
        )
        assert len(best["choices"]) == 2
        assert best["usage"]["completion_tokens"] > 2 * one["usage"]["completion_tokens"] / 1.9

    @pytest.mark.parametrize("wanted", [{"logprobs": 3}, {"logprobs": True, "top_logprobs": 3}])
    @pytest.mark.parametrize("echo", [False, True])
    def test_completions_tell_probabilities_in_both_forms(self, wanted: dict[str, Any], echo: bool) -> None:
        """Lists of equal length, offsets into the text, and of the prompt too where it is given back."""
        choice = told({**wanted, "echo": echo}, COMPLETIONS)["choices"][0]
        told_of = choice["logprobs"]
        assert "".join(told_of["tokens"]) == choice["text"]
        assert len({len(told_of[name]) for name in told_of}) == 1
        assert {len(likely) for likely in told_of["top_logprobs"]} == {3}
        for token, offset in zip(told_of["tokens"], told_of["text_offset"], strict=True):
            assert choice["text"][offset:].startswith(token)

    @pytest.mark.parametrize(
        "root",
        [
            *("root", "fcall", "nofcall", "insidevalue", "value", "object"),
            *("array", "string", "number", "funcarray", "func", "ws"),
        ],
    )
    def test_every_grammar_root_is_taken(self, root: str) -> None:
        """All twelve."""
        assert told({"grammar_root": root}, COMPLETIONS)["choices"][0]["text"]


ANYTHING: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"messages": st.text(max_size=60).map(user), "n": st.integers(1, 3)},
    optional={
        "max_completion_tokens": st.integers(0, 80),
        "reasoning_effort": st.sampled_from(["none", "low", "high"]),
        "reasoning_format": st.sampled_from(["none", "parsed", "text_parsed", "raw", "hidden"]),
        "model": st.sampled_from([MODEL, "qwen-3.8-27b", "zai-glm-4.7"]),
        "tools": st.just(TOOLS),
        "seed": st.integers(0, 9),
        "stop": st.sampled_from(["It", ["e"]]),
        "service_tier": st.sampled_from(["auto", "flex", "default"]),
    },
)
TEXTS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "prompt": st.text(max_size=60)
        | st.lists(st.text(max_size=30), min_size=1, max_size=3)
        | st.lists(st.integers(0, 200_000), min_size=1, max_size=9),
        "n": st.integers(1, 2),
    },
    optional={
        "max_tokens": st.integers(0, 60),
        "logprobs": st.sampled_from([0, 2, True, None]),
        "return_raw_tokens": st.just(True),
    },
)


class TestStreams:
    """Answers in events."""

    @given(ANYTHING, st.sampled_from([None, 0, 2]), st.booleans(), st.sampled_from(["asked", "together", "apart"]))
    def test_a_chat_stream_comes_to_the_same_answer(
        self, request: dict[str, Any], top: int | None, usage: bool, final: Any
    ) -> None:
        """Whatever is asked for, joined chunks are the answer without streaming."""
        request = request | ({} if top is None else {"logprobs": True, "top_logprobs": top})
        self.same(request | {"stream_options": {"include_usage": usage}}, CHAT, replace(OPEN, final_chunk=final))

    @given(TEXTS, st.booleans())
    def test_a_completion_stream_comes_to_the_same_answer(self, request: dict[str, Any], echo: bool) -> None:
        """The other endpoint's too."""
        self.same(request | {"echo": echo and "return_raw_tokens" not in request}, COMPLETIONS, OPEN)

    def same(self, request: dict[str, Any], path: str, settings: Settings) -> None:
        """The joined stream of a request equals its plain answer, but for what is of this one time."""
        plain = told(request, path, settings)
        streamed = ask(Service(settings), request | {"stream": True}, path)
        assert streamed.content_type == "text/event-stream"
        joined = assembled([piece.data for piece in streamed.pieces])
        for one in (plain, joined):
            one["id"] = None
            for choice in one["choices"]:  # absent and null say the same
                if choice.get("text", "") is None:
                    del choice["text"]
                if choice.get("logprobs", "") is None:
                    del choice["logprobs"]
                choice.setdefault("tokens", [])
        assert joined == plain

    def test_chunks_come_as_the_tokens_do(self) -> None:
        """The role first, chunks of several tokens over the completion's time, choices in between, the end last."""
        settings = replace(OPEN, latency=1.0, seconds_per_prompt_token=0.01, seconds_per_completion_token=0.1, jitter=0)
        answer = ask(Service(settings), {"n": 3, "stream": True})
        plain = told({"n": 3}, settings=settings)
        chunks = [json.loads(piece.data[6:]) for piece in answer.pieces[:-1]]
        assert answer.pieces[-1].data == b"data: [DONE]\n\n"
        assert answer.delay == pytest.approx(1.0 + plain["time_info"]["prompt_time"])
        assert answer.pieces[-1].at == pytest.approx(plain["time_info"]["completion_time"])
        assert [piece.at for piece in answer.pieces] == sorted(piece.at for piece in answer.pieces)
        assert len({piece.at for piece in answer.pieces}) > 3
        assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in chunks[:3])
        order = [chunk["choices"][0]["index"] for chunk in chunks]
        assert order != sorted(order)
        assert len(chunks) < plain["usage"]["completion_tokens"]
        assert [chunk.get("usage") for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)

    @pytest.mark.parametrize(
        ("final", "asked", "apart"),
        [
            ("asked", False, False),
            ("asked", True, True),
            ("together", True, False),
            ("apart", False, True),
        ],
    )
    def test_the_usage_is_in_the_last_chunk(self, final: Any, asked: bool, apart: bool) -> None:
        """With the end of the choice, or in a chunk without choices."""
        request = {"stream": True, "stream_options": {"include_usage": asked}}
        answer = ask(Service(replace(OPEN, final_chunk=final)), request)
        last = json.loads(answer.pieces[-2].data[6:])
        assert last["usage"]["total_tokens"] > 0
        assert last["time_info"]["total_time"] >= 0
        assert (last["choices"] == []) == apart

    def test_reasoning_and_calls_have_deltas_of_their_own(self) -> None:
        """The reasoning before the rest; of a call first its name, then its arguments in parts."""
        answer = ask(Service(OPEN), {"stream": True, "tools": TOOLS, "reasoning_effort": "low"})
        deltas = [json.loads(piece.data[6:])["choices"][0]["delta"] for piece in answer.pieces[:-1]]
        names = [next(iter(delta)) for delta in deltas if delta]
        assert names == sorted(names, key=["role", "reasoning", "tool_calls"].index)
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert {call["index"] for call in calls} == {0, 1}
        assert [call["function"]["name"] for call in calls if "id" in call] == ["get_weather", "get_time"]

    def test_a_broken_stream_says_why(self) -> None:
        """An error event with a status, by name or without one, and no [DONE]."""
        named = set()
        for number in range(20):
            answer = ask(Service(replace(OPEN, faults={"broken": 1})), {"stream": True, "seed": number})
            last = answer.pieces[-1].data
            named.add(last.startswith(b"event: error\n"))
            error = json.loads(last.removeprefix(b"event: error\n")[6:])
            assert error["status_code"] == 500
            assert error["error"]["code"] == "internal_server_error"
            assert answer.content is None
        assert named == {False, True}

    def test_an_undone_stream_ends_early(self) -> None:
        """Without an end of its choice, without usage, without [DONE]."""
        answer = ask(Service(replace(OPEN, faults={"undone": 1})), {"stream": True})
        joined = assembled([piece.data for piece in answer.pieces])
        assert joined["choices"][0]["finish_reason"] is None
        assert "usage" not in joined
        assert joined["choices"] == json.loads(answer.body)["choices"]

    def test_a_ragged_stream_comes_to_the_same(self) -> None:
        """Comments, CRLF, data over two lines, cut anywhere."""
        streams = [
            ask(Service(replace(OPEN, faults=faults)), {"stream": True, "messages": user("Zürich 🙂")})
            for faults in ({}, {"ragged": 1.0})
        ]
        plain, ragged = ([piece.data for piece in stream.pieces] for stream in streams)
        assert assembled(plain) == assembled(ragged)
        assert b": still here" in b"".join(ragged)
        assert b"\r\n" in b"".join(ragged)

    @pytest.mark.parametrize("kind", StreamFault)
    def test_what_is_not_streamed_does_not_meet_the_faults_of_streams(self, kind: str) -> None:
        """It is answered well."""
        answer = ask(Service(replace(OPEN, faults={kind: 1})), {})
        assert (answer.status, answer.fault, answer.whole) == (200, None, True)

    def test_in_process_a_stream_is_the_plain_answer(self) -> None:
        """The transport without a network gives what it comes to, after its time, and when it began."""
        settings = replace(OPEN, latency=1.0, seconds_per_completion_token=0.1, jitter=0)

        async def main() -> list[Reply | Failure]:
            front = Front(settings, asyncio.get_running_loop().time, 0.0, record=True)
            transport = ModelTransport(front, "Bearer key", 60.0, dialects.named("cerebras").refusal)
            replies = []
            for stream in (False, True):
                body = msgspec.json.encode({"model": MODEL, "messages": user(), "stream": stream})
                replies.append(await transport.send(Request(0, 0, MODEL, body, 1, 1, b"", stream=stream)))
            return replies

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            plain, streamed = runner.run(main())
        assert isinstance(plain, Reply)
        assert isinstance(streamed, Reply)
        assert json.loads(plain.body)["choices"] == json.loads(streamed.body)["choices"]
        assert plain.timing.latency == pytest.approx(streamed.timing.latency)
        assert (plain.timing.time_to_first_token, streamed.timing.time_to_first_token) == (None, 1.0)

    def test_a_stream_is_settled_when_it_ends(self) -> None:
        """While it is sent its whole cap is charged, and the headers say so; then only what it used."""
        settings = replace(OPEN, tokens_per_minute=10_000, seconds_per_completion_token=0.1, jitter=0)

        async def main() -> tuple[Mapping[str, str], float, float]:
            now = asyncio.get_running_loop().time
            front = Front(settings, now, 0.0, record=True)
            body = msgspec.json.encode({"model": MODEL, "messages": user(), "stream": True, "max_tokens": 900})

            async def deliver(answer: Answer, headers: dict[str, str]) -> dict[str, str]:
                during.append(front.service.levels(MODEL, now())["tokens-minute"])
                return headers

            during: list[float] = []
            headers = await front.ask("POST", CHAT, "Bearer key", body, deliver, {})
            return headers, during[0], front.service.levels(MODEL, now())["tokens-minute"]

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            headers, during, after = runner.run(main())
        used = told({})["usage"]["total_tokens"]
        assert headers["x-ratelimit-remaining-tokens-minute"] == str(int(during))
        assert during == 10_000 - 900 - tokens(TICKET)
        assert after == 10_000 - used


PLAIN = msgspec.json.encode({"model": MODEL, "messages": user("Zürich")})
MSGPACK = msgspec.msgpack.encode(msgspec.json.decode(PLAIN))


class TestEncodings:
    """Bodies that are not plain JSON."""

    def heard(self, body: bytes, kind: str | None, encoding: str | None, known: tuple[str, ...]) -> tuple[int, Any]:
        """The status of a body, and what was said."""
        headers = {"content-type": kind, "content-encoding": encoding}
        service = Service(replace(OPEN, encodings=known))
        answer = ask(service, body, headers={name: value for name, value in headers.items() if value})
        said = json.loads(answer.body)
        return answer.status, said.get("choices", said)

    def test_msgpack_and_gzip_are_the_same_request(self) -> None:
        """Either and both, as well as JSON with a charset."""
        both = ("msgpack", "gzip")
        plain = self.heard(PLAIN, None, None, both)
        assert plain[0] == 200
        for body, kind, encoding in (
            (PLAIN, "application/json; charset=utf-8", "identity"),
            (gzip.compress(PLAIN, mtime=0), "application/json", "gzip"),
            (MSGPACK, "application/vnd.msgpack", None),
            (gzip.compress(MSGPACK, mtime=0), "application/vnd.msgpack", "gzip"),
        ):
            assert self.heard(body, kind, encoding, both) == plain

    @pytest.mark.parametrize(
        ("body", "kind", "encoding", "known", "status"),
        [
            (b"\x81", "application/vnd.msgpack", None, ("msgpack",), 400),
            (b"\xc1", "application/vnd.msgpack", None, ("msgpack",), 400),
            (b"abc", "application/json", "gzip", ("gzip",), 400),
            (gzip.compress(PLAIN, mtime=0)[:-3], "application/json", "gzip", ("gzip",), 400),
            (gzip.compress(PLAIN, mtime=0) + b"x", "application/json", "gzip", ("gzip",), 400),
            (gzip.compress(b"no json", mtime=0), "application/json", "gzip", ("gzip",), 400),
            (gzip.compress(bytes(70 << 20), mtime=0), "application/json", "gzip", ("gzip",), 413),
            (PLAIN, "text/plain", None, ("msgpack", "gzip"), 415),
            (PLAIN, "application/json", "br", ("msgpack", "gzip"), 415),
            (MSGPACK, "application/vnd.msgpack", None, ("gzip",), 415),
            (gzip.compress(PLAIN, mtime=0), "application/json", "gzip", ("msgpack",), 415),
        ],
    )
    def test_what_is_broken_or_unknown_is_refused(
        self, body: bytes, kind: str, encoding: str | None, known: tuple[str, ...], status: int
    ) -> None:
        """Broken bodies are 400, bombs 413, and what this service does not know 415."""
        assert self.heard(body, kind, encoding, known)[0] == status

    @given(st.binary(max_size=200))
    def test_no_bytes_do_harm(self, body: bytes) -> None:
        """Whatever comes as msgpack, gzip or JSON is answered."""
        for kind in ("application/json", "application/vnd.msgpack"):
            for data, encoding in ((body, None), (body, "gzip"), (gzip.compress(body, mtime=0), "gzip")):
                assert self.heard(data, kind, encoding, ("msgpack", "gzip"))[0] == 400

    def test_an_unknown_encoding_cannot_be_set(self) -> None:
        """Settings name what there is."""
        with pytest.raises(ValueError, match="unknown encoding 'zstd'; known are msgpack, gzip"):
            Settings(encodings=("zstd",))
        with pytest.raises(ValueError, match="final_chunk must be one of asked, together, apart, not 'none'"):
            Settings(final_chunk="none")  # type: ignore[arg-type]


class TestCatalogue:
    """The lists of models."""

    def get(self, path: str, key: str | None = None, method: str = "GET") -> tuple[int, Any]:
        """What a path answers."""
        authorization = None if key is None else f"Bearer {key}"
        answer = Service(Settings()).receive(method, path, authorization, b"", 0.0)
        assert isinstance(answer, Answer)
        return answer.status, json.loads(answer.body) if answer.body else None

    @pytest.mark.parametrize("form", ["default", "openrouter", "huggingface"])
    def test_models_are_listed_in_three_forms(self, form: str) -> None:
        """All, or one."""
        status, listed = self.get(f"/v1/models?format={form}", "k")
        assert status == 200
        assert len(listed["data"]) == 4
        assert self.get(f"/v1/models/{MODEL}?format={form}", "k") == (200, listed["data"][0])

    def test_a_form_that_there_is_not_is_refused(self) -> None:
        """So is a model, and a list without a key."""
        assert self.get("/v1/models?format=xml", "k")[0] == 400
        assert self.get("/v1/models/gpt-9", "k")[0] == 404
        assert self.get("/v1/models")[0] == 403
        assert self.get("/v1/models", "k", "POST")[0] == 405

    def test_the_public_catalogue_needs_no_key(self) -> None:
        """It has limits, prices per token as text, and what each model can."""
        status, listed = self.get("/public/v1/models")
        [model] = [one for one in listed["data"] if one["id"] == MODEL]
        assert status == 200
        assert self.get(f"/public/v1/models/{MODEL}") == (200, model)
        assert model["pricing"] == {"prompt": "0.00000035", "completion": "0.00000075"}
        assert model["limits"] == {
            "max_context_length": 131_072,
            "max_completion_tokens": 40_960,
            "requests_per_minute": 1_000,
            "tokens_per_minute": 1_000_000,
        }
        assert model["capabilities"]["tools"]
        assert not model["capabilities"]["vision"]
        assert self.get("/public/v1/models/gpt-9")[0] == 404

    def test_connections_can_be_warmed(self) -> None:
        """The call that the official client makes first."""
        assert self.get("/v1/tcp_warming")[0] == 200

    def test_any_model_can_be_served(self) -> None:
        """One that nobody knows has the usual limits."""
        assert entry("org/model").context == 131_072


class TestRecorded:
    """Answers from a file."""

    def test_a_known_question_gets_its_recorded_answer(self, tmp_path: Path) -> None:
        """Exactly, else the longest that the prompt contains, else as always; streamed, counted and capped."""
        path = tmp_path / "answers.jsonl"
        lines = [
            {"question": "What is 2 + 2?", "answer": "four"},
            {"question": "What is 2 + 2? Think hard.", "answer": "still four, said aloud"},
            {"question": "Which?", "answer": ["this", "that"]},
            {"question": "An object, please", "answer": {"a": 1}},
        ]
        path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        settings = replace(OPEN, answers=load_answers(path))
        for prompt, expected in (
            ("What is 2 + 2?", "four"),
            ("Please: What is 2 + 2? Thanks", "four"),
            ("Please: What is 2 + 2? Think hard. Thanks", "still four, said aloud"),
            ("An object, please", '{"a":1}'),
        ):
            assert message({"messages": user(prompt)}, settings)["content"] == expected
            assert told({"prompt": prompt}, COMPLETIONS, settings)["choices"][0]["text"] == expected
        choices = told({"messages": user("Which?"), "n": 3}, settings=settings)["choices"]
        assert [choice["message"]["content"] for choice in choices] == ["this", "that", "this"]
        assert message({"messages": user("Something else")}, settings)["content"] not in ("four", "this")
        capped = told({"messages": user("What is 2 + 2? Think hard."), "max_tokens": 3}, settings=settings)
        assert capped["choices"][0]["message"]["content"] == "still four, "
        assert capped["choices"][0]["finish_reason"] == "length"
        assert capped["usage"]["completion_tokens"] == 3
        streamed = ask(Service(settings), {"messages": user("What is 2 + 2?"), "stream": True})
        joined = assembled([piece.data for piece in streamed.pieces])
        assert joined["choices"][0]["message"]["content"] == "four"

    def test_parquet_and_other_columns_are_read(self, tmp_path: Path) -> None:
        """By the names that are given."""
        path = tmp_path / "answers.parquet"
        pq.write_table(pa.table({"prompt": ["Why?"], "said": ["Because."], "more": [1]}), path)
        assert load_answers(path, "prompt", "said").find("Why?") == ("Because.",)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.jsonl", "{", "a.jsonl: line 1 is not a JSON object"),
            ("a.jsonl", '{"question": "x"}', "a.jsonl: line 1 needs a text in 'question' and a value in 'answer'"),
            ("a.jsonl", None, "a.jsonl: No such file"),
            ("a.parquet", "PAR", "a.parquet: "),
        ],
    )
    def test_a_wrong_file_is_refused_in_words(self, tmp_path: Path, name: str, content: str | None, words: str) -> None:
        """What is wrong, and where."""
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            load_answers(tmp_path / name)
