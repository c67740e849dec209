"""What services' answers, refusals and headers mean."""

import gzip
import json
from collections.abc import Mapping, Sequence
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from batcher.dialects import PRICES_AS_OF, Dialect, at_home, cerebras, cost, groq, named, of_url, openai
from batcher.records import (
    Alternative,
    Answer,
    Choice,
    Failure,
    Kind,
    Limit,
    Price,
    Rates,
    Reply,
    ServiceTimes,
    Timing,
    Token,
    ToolCall,
    Usage,
)

TIMING = Timing(1_790_000_000_000_000, 0.25)

CEREBRAS_CHAT = {
    "id": "chatcmpl-292e278f",
    "choices": [
        {
            "finish_reason": "stop",
            "index": 0,
            "message": {"content": "billing", "reasoning": "It asks about an invoice.", "role": "assistant"},
            "logprobs": None,
        }
    ],
    "created": 1790000000,
    "model": "gpt-oss-120b",
    "system_fingerprint": "fp_70185065a4",
    "object": "chat.completion",
    "service_tier": "auto",
    "service_tier_used": "flex",
    "usage": {
        "prompt_tokens": 90,
        "completion_tokens": 30,
        "total_tokens": 120,
        "image_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {
            "reasoning_tokens": 20,
            "accepted_prediction_tokens": 1,
            "rejected_prediction_tokens": 2,
        },
    },
    "time_info": {
        "queue_time": 0.00027,
        "prompt_time": 0.0164,
        "completion_time": 1.1533,
        "total_time": 1.1721,
        "created": 1790000000.5,
    },
}
GROQ_CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {
        "queue_time": 0.018,
        "prompt_tokens": 18,
        "prompt_time": 0.0006,
        "completion_tokens": 5,
        "completion_time": 0.0046,
        "total_tokens": 23,
        "total_time": 0.0053,
    },
    "x_groq": {"id": "req_1"},
}
VLLM_CHAT = {
    "id": "chatcmpl-2",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "reasoning_content": "Hm.", "content": "4", "tool_calls": []},
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {"prompt_tokens": 18, "total_tokens": 23, "completion_tokens": 5, "prompt_tokens_details": None},
}
OPENAI_IMAGES = {
    "choices": [{"index": 0, "message": {"content": "a cat", "refusal": None}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 5}},
    "service_tier": "default",
}


def reply(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply with a body of bytes, or of what becomes JSON."""
    return Reply(status, headers or {}, body if isinstance(body, bytes) else json.dumps(body).encode(), TIMING)


def answered(body: object) -> Answer:
    """The answer in a body with status 200."""
    answer = cerebras.read(reply(body))
    assert isinstance(answer, Answer)
    return answer


def unanswered(body: object, headers: Mapping[str, str] | None = None) -> Failure:
    """The failure in a body with status 200."""
    found = cerebras.read(reply(body, headers=headers))
    assert isinstance(found, Failure)
    assert (found.status, found.timing) == (200, TIMING)
    return found


def refused(status: int, body: object = b"", headers: Mapping[str, str] | None = None) -> Failure:
    """The meaning of a refusal."""
    found = cerebras.refusal(reply(body, status, headers))
    assert (found.status, found.timing) == (status, TIMING)
    return found


def chat(message: object, finish_reason: object = "stop") -> dict[str, object]:
    """A chat answer with one choice."""
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def flat(message: str, type: str | None = None, code: object = None, param: str | None = None) -> dict[str, object]:
    """An error as Cerebras sends it."""
    return {"message": message, "type": type, "param": param, "code": code}


def nested(message: str, type: str | None = None, code: object = None) -> dict[str, object]:
    """An error as OpenAI sends it."""
    return {"error": flat(message, type, code)}


# Names


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.cerebras.ai/v1", "cerebras"),
        ("https://cerebras.ai", "cerebras"),
        ("https://API.CEREBRAS.AI.:443/v1", "cerebras"),
        ("https://notcerebras.ai/v1", "openai"),
        ("https://api.cerebras.ai.example/v1", "openai"),
        ("https://cerebras.ai@example.com/v1", "openai"),
        ("https://api.openai.com/v1", "openai"),
        ("https://api.groq.com/openai/v1", "groq"),
        ("http://127.0.0.1:8000/v1", "openai"),
        ("simulator", "openai"),
    ],
)
def test_the_host_decides_the_dialect(url: str, name: str) -> None:
    """A host of Cerebras, or below it, speaks its dialect; every other the common one."""
    assert of_url(url) == name


def test_a_key_has_a_home() -> None:
    """Each dialect says which variable holds its key and where that key may go."""
    found: list[Dialect] = [named("cerebras"), named("openai"), named("groq")]
    assert [dialect.api_key_env for dialect in found] == ["CEREBRAS_API_KEY", "OPENAI_API_KEY", "GROQ_API_KEY"]
    assert at_home(found[0], "https://api.cerebras.ai/v1")
    assert not at_home(found[0], "https://api.openai.com/v1")
    assert at_home(found[1], "https://api.openai.com/v1")
    assert dict(found[0].headers) == {"X-Cerebras-Version-Patch": "2"}
    assert dict(found[1].headers) == {}
    with pytest.raises(KeyError):
        named("other")


# Prices


def test_a_cost_is_the_sum_over_kinds_of_tokens() -> None:
    """Cached tokens are part of the prompt and have their own price where one is given."""
    price = Price(input=1.0, output=4.0, cached=0.25)
    assert cost(price, 1_000_000, 400_000, 500_000, None) == pytest.approx(0.6 + 0.1 + 2.0)
    assert cost(Price(input=1.0, output=4.0), 1_000_000, 400_000, 0, None) == pytest.approx(1.0)
    assert cost(price, 10, 50, 0, None) == pytest.approx(2.5e-6)


def test_a_tier_may_have_its_own_price() -> None:
    """The tier that served it decides; `auto`, of which nobody said what it became, counts as the dearest."""
    flex, priority = Rates(input=0.5, output=2.0, cached=0.1), Rates(input=3.0, output=3.0)
    price = Price(input=1.0, output=4.0, cached=0.25, flex=flex, priority=priority)
    used = (1_000_000, 500_000, 1_000_000)
    assert cost(price, *used, None) == cost(price, *used, "default") == pytest.approx(0.5 + 0.125 + 4.0)
    assert cost(price, *used, "flex") == pytest.approx(0.25 + 0.05 + 2.0)
    assert cost(price, *used, "priority") == pytest.approx(3.0 + 3.0)
    assert cost(price, *used, "auto") == cost(price, *used, "priority")
    assert cost(price, 0, 0, 1_000_000, "auto") == pytest.approx(4.0)
    alike = Price(input=1.0, output=4.0)
    assert {cost(alike, *used, tier) for tier in (None, "flex", "priority", "auto", "turbo")} == {5.0}


def test_the_price_table_has_a_date() -> None:
    """Prices are dated; a model without one is absent rather than free."""
    assert PRICES_AS_OF.year >= 2026
    assert cerebras.prices["gpt-oss-120b"] == Price(input=0.35, output=0.75)
    assert all(price.input > 0 and price.output > 0 for price in cerebras.prices.values())
    assert "unknown" not in cerebras.prices
    assert not openai.prices


# Answers


def test_a_cerebras_answer_is_read_in_full() -> None:
    """Every value that the records have a place for comes out of a Cerebras chat answer."""
    assert answered(CEREBRAS_CHAT) == Answer(
        choices=(Choice(0, "billing", "It asks about an invoice.", "stop", None),),
        usage=Usage(90, 30, 120, 64, 20, 1, 2, 7),
        times=ServiceTimes(0.00027, 0.0164, 1.1533, 1.1721),
        id="chatcmpl-292e278f",
        model="gpt-oss-120b",
        system_fingerprint="fp_70185065a4",
        service_tier="auto",
        service_tier_used="flex",
    )


def test_other_services_put_the_same_things_elsewhere() -> None:
    """Times inside usage, reasoning under another name, image tokens among the details."""
    groq = answered(GROQ_CHAT)
    assert groq.times == ServiceTimes(0.018, 0.0006, 0.0046, 0.0053)
    assert groq.usage == Usage(18, 5, 23)
    assert answered(VLLM_CHAT).choices == (Choice(0, "4", "Hm.", "stop", None),)
    assert answered(OPENAI_IMAGES).usage == Usage(prompt_tokens=9, cached_tokens=0, image_tokens=5)


def test_a_completion_is_read_like_a_chat() -> None:
    """The older endpoint has its text in the choice itself."""
    body = {"object": "text_completion", "choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    assert answered(body).choices == (Choice(0, "", None, "length", None),)


def test_tool_calls_are_an_answer_without_text() -> None:
    """Arguments stay the text that the model wrote."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1'}}
    [choice] = answered(chat({"content": None, "tool_calls": [call]}, "tool_calls")).choices
    assert (choice.text, choice.tool_calls) == (None, (ToolCall("c1", "function", "f", '{"a": 1'),))


def test_tool_calls_come_in_order_of_their_index() -> None:
    """Where each has its own; otherwise as they were sent."""
    calls: list[dict[str, object]] = [{"id": "b", "index": 1}, {"id": "a", "index": 0}]
    [choice] = answered(chat({"content": None, "tool_calls": calls}, "tool_calls")).choices
    assert [call.id for call in choice.tool_calls or ()] == ["a", "b"]
    for index in (None, "0", 1):
        calls[1]["index"] = index
        [choice] = answered(chat({"content": None, "tool_calls": calls}, "tool_calls")).choices
        assert len(choice.tool_calls or ()) == 2
    assert [call.id for call in choice.tool_calls or ()] == ["b", "a"]


LIKELY = {"token": " the", "logprob": -0.25, "bytes": [32, 116, 104, 101]}
THE = Alternative(" the", -0.25, (32, 116, 104, 101))


def test_logprobs_of_a_chat_are_read_to_the_last_alternative() -> None:
    """Of the text and then of a refusal, and apart from these of the reasoning."""
    token = {**LIKELY, "top_logprobs": [LIKELY, {"token": "\u00e9", "logprob": -9999.0, "bytes": None}]}
    body = chat({"content": " the the", "reasoning": " the"})
    choice = body["choices"][0]  # type: ignore[index]
    choice["logprobs"] = {"content": [token, {**LIKELY, "top_logprobs": []}], "refusal": [LIKELY]}
    choice["reasoning_logprobs"] = {"content": [LIKELY], "refusal": None}
    [read] = answered(body).choices
    likely = " the", -0.25, (32, 116, 104, 101)
    assert read.logprobs == [
        Token(*likely, [THE, Alternative("\u00e9", -9999.0, None)]),
        Token(*likely, []),
        Token(*likely),
    ]
    assert read.reasoning_logprobs == [Token(*likely)]
    choice["logprobs"] = {"content": None}
    assert answered(body).choices[0].logprobs is None
    choice["logprobs"] = {"content": []}
    assert answered(body).choices[0].logprobs == []


def test_logprobs_of_a_completion_take_the_same_form() -> None:
    """Four lists side by side become tokens; the first token of an echo has no probability."""
    logprobs = {
        "tokens": ["Hi", " the"],
        "token_logprobs": [None, -0.25],
        "top_logprobs": [None, {" the": -0.25, " a": -2}],
        "text_offset": [0, 2],
    }
    body: dict[str, object] = {
        "choices": [{"index": 0, "text": "Hi the", "finish_reason": "stop", "logprobs": logprobs}]
    }
    alternatives = [Alternative(" the", -0.25), Alternative(" a", -2.0)]
    first, second = Token("Hi", None, None, None, 0), Token(" the", -0.25, None, alternatives, 2)
    assert answered(body).choices[0].logprobs == [first, second]
    del logprobs["text_offset"], logprobs["top_logprobs"]
    assert answered(body).choices[0].logprobs == [Token("Hi"), Token(" the", -0.25)]
    logprobs["tokens"] = ["Hi"]
    assert answered(body).choices[0].logprobs == [Token("Hi"), Token(None, -0.25)]


@pytest.mark.parametrize("wrong", ["x", True, [], {}, [[]], 10**400, "\ud800"])
def test_a_wrong_part_of_a_logprob_costs_itself_alone(wrong: object) -> None:
    """The tokens around it, and what else is said of its own, arrive."""
    body = chat({"content": "x"})
    choice = body["choices"][0]  # type: ignore[index]
    choice["logprobs"] = {"content": [LIKELY, {**LIKELY, "logprob": wrong, "top_logprobs": [LIKELY, wrong]}, wrong]}
    first, second, third = answered(body).choices[0].logprobs or ()
    assert first == Token(" the", -0.25, (32, 116, 104, 101))
    assert second == Token(" the", None, (32, 116, 104, 101), [THE, Alternative()])
    assert third == Token()
    choice["logprobs"] = {"tokens": ["a", wrong], "token_logprobs": [-1, -2], "top_logprobs": [{"a": -1, "b": wrong}]}
    first, second = answered(body).choices[0].logprobs or ()
    assert first == Token("a", -1.0, None, [Alternative("a", -1.0), Alternative("b")])
    assert second == Token(wrong if isinstance(wrong, str) else None, -2.0)


def test_raw_tokens_are_an_answer_without_text() -> None:
    """Ids as they came; what is none is unknown, in its place."""

    def ids(tokens: object) -> Sequence[int | None] | None:
        choice = {"index": 0, "text": None, "tokens": tokens, "finish_reason": "length"}
        return answered({"choices": [choice]}).choices[0].tokens

    assert ids([1, 200_000]) == [1, 200_000]
    assert ids([1, 2**31, "x", None, 7]) == [1, None, None, None, 7]
    assert ids([]) == []


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (None,) * 4, (0, 0, 0, 0), (0, 1, 0, 1), (0, None, 0, None)])
def test_choices_of_several_prompts_follow_one_another(indices: tuple[int | None, ...]) -> None:
    """Counted on, not counted, or counted anew for each prompt: they stay in the order of the prompts."""
    wire = [{"index": at, "text": text, "finish_reason": "stop"} for at, text in zip(indices, "abcd", strict=True)]
    assert [choice.text for choice in answered({"choices": wire}).choices] == ["a", "b", "c", "d"]


def test_a_tier_that_is_told_is_the_asked_or_the_used_one() -> None:
    """Cerebras repeats the tier it was asked for; elsewhere the tier in an answer is the one that served."""
    body = chat({"content": "x"})
    for tier in ("default", "on_demand", "performance", "a tier of tomorrow"):
        found = openai.read(reply({**body, "service_tier": tier}))
        assert isinstance(found, Answer)
        assert (found.service_tier, found.service_tier_used) == (None, tier)
    asked = {**body, "service_tier": "flex"}
    assert (answered(asked).service_tier, answered(asked).service_tier_used) == ("flex", None)
    both = openai.read(reply({**body, "service_tier": "auto", "service_tier_used": "flex"}))
    assert isinstance(both, Answer)
    assert (both.service_tier, both.service_tier_used) == ("auto", "flex")


def test_a_refusal_is_kept_beside_the_text() -> None:
    """The model's own words for why it gives no answer."""
    [choice] = answered(chat({"content": None, "refusal": "I cannot help with that."})).choices
    assert (choice.text, choice.refusal, choice.finish_reason) == (None, "I cannot help with that.", "stop")


def test_groq_may_put_usage_apart() -> None:
    """In an answer that it streamed."""
    body = {**GROQ_CHAT, "usage": None, "x_groq": {"id": "req_1", "usage": GROQ_CHAT["usage"]}}
    assert answered(body).usage == Usage(18, 5, 23)
    assert answered(body).times == ServiceTimes(0.018, 0.0006, 0.0046, 0.0053)


def test_choices_come_in_order_of_their_index() -> None:
    """Order on the wire, gaps and missing indices do not matter."""
    wire = [{"index": index, "text": text, "finish_reason": "stop"} for index, text in [(5, "c"), (0, "a"), (2, "b")]]
    assert [choice.text for choice in answered({"choices": wire}).choices] == ["a", "b", "c"]
    for choice in wire:
        del choice["index"]
    assert [choice.index for choice in answered({"choices": wire}).choices] == [0, 1, 2]


@pytest.mark.parametrize(
    ("message", "finish_reason"),
    [
        ({"content": ""}, "stop"),
        ({"content": "cut of"}, "length"),
        ({"content": None, "reasoning": "still thinking"}, "length"),
        ({"content": None, "refusal": "I cannot help with that."}, "stop"),
        ({"content": None}, "content_filter"),
        ({}, "content_filter"),
        ({"content": "x"}, "a reason of tomorrow"),
    ],
)
def test_an_answer_may_be_short_of_text(message: object, finish_reason: str) -> None:
    """Empty, truncated, filtered and refused answers are answers; the finish reason says so."""
    assert answered(chat(message, finish_reason)).choices[0].finish_reason == finish_reason


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": [{}]},
        chat(None),
        chat({"content": "half"}, None),
        chat({"content": None}),
        chat({"content": None, "tool_calls": []}),
        chat({"content": "half"}, "error"),
        chat({"content": 7}),
        {"choices": [{"text": "a", "finish_reason": "stop"}, {"text": "b", "finish_reason": None}]},
        json.dumps(CEREBRAS_CHAT).encode()[:-1],
        json.dumps(CEREBRAS_CHAT).encode()[:200],
        json.dumps(CEREBRAS_CHAT).encode() + b"}",
        json.dumps(chat({"content": "a"})).encode("utf-16"),
        b"\xef\xbb\xbf\xef\xbb\xbf" + json.dumps(CEREBRAS_CHAT).encode(),
        b'{"usage": NaN, "choices": [{"text": "a", "finish_reason": "stop"}]}',
        b'{"choices": [{"text": "a", "finish_reason": "stop"}], "x": ' + b"[" * 100_000,
        b'{"choices": [{"text": "a", "finish_reason": "stop"}], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"total_tokens": ' + b"9" * 5000 + b"}}",
        gzip.compress(b"{}", mtime=0),
        b"\x00" * 100,
    ],
)
def test_what_is_no_whole_answer_is_malformed_and_may_be_paid(body: object) -> None:
    """Cut, empty, unfinished or unreadable: never passed off as an answer, and the service may bill it."""
    found = unanswered(body)
    assert (found.kind, found.paid) == (Kind.MALFORMED_RESPONSE, True)
    assert found.body is not None
    assert found.message


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"<!DOCTYPE html><title>Log in to\n the WLAN</title>", {}),
        (b"\n  <html><title>Log in to the WLAN</title></html>", {"Content-Type": "application/json"}),
        (b"Welcome <title>Log in to the WLAN</title>", {"content-type": "Text/HTML; charset=utf-8"}),
    ],
)
def test_a_web_page_is_told_apart(body: bytes, headers: dict[str, str]) -> None:
    """A page of a proxy or a portal is no answer of the service, and free."""
    found = unanswered(body, headers)
    assert (found.kind, found.paid) == (Kind.NOT_JSON, False)
    assert found.message == "an HTML page instead of an answer: Log in to the WLAN"


@pytest.mark.parametrize("wrong", ["12", -1, 2**63, 2**64, 10**40, 1.5, True, [], {}])
def test_a_count_that_is_none_is_unknown(wrong: object) -> None:
    """A wrong count costs itself alone: not the row, nor its neighbours."""
    usage = {"prompt_tokens": 5, "completion_tokens": wrong, "prompt_tokens_details": {"cached_tokens": wrong}}
    answer = answered({**CEREBRAS_CHAT, "usage": usage})
    assert answer.usage == Usage(prompt_tokens=5)
    assert answer.choices[0].text == "billing"
    assert answer.times.queue_time == 0.00027


@pytest.mark.parametrize("name", ["usage", "time_info", "model", "service_tier", "id"])
@pytest.mark.parametrize("wrong", ["x", 7, [], [1], {"a": "b"}, None, -0.5])
def test_a_member_of_a_wrong_type_is_unknown(name: str, wrong: object) -> None:
    """Whatever stands beside the choices, the text arrives."""
    answer = answered({**CEREBRAS_CHAT, name: wrong})
    assert answer.choices[0].text == "billing"
    if name in ("usage", "time_info"):
        assert answer.usage == (Usage() if name == "usage" else Usage(90, 30, 120, 64, 20, 1, 2, 7))
    else:
        assert getattr(answer, name) == (wrong if isinstance(wrong, str) else None)


def test_negative_and_endless_times_are_unknown() -> None:
    """A time that cannot be is as if it had not been sent."""
    body = json.dumps({**CEREBRAS_CHAT, "time_info": {"queue_time": -1, "total_time": 0.5}})
    assert answered(body.encode()).times == ServiceTimes(total_time=0.5)
    assert answered(body.replace("0.5", "1e999").encode()).times == ServiceTimes()


def test_content_in_parts_is_joined() -> None:
    """Some services send a message's text as a list."""
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}, 7]
    assert answered(chat({"content": parts})).choices[0].text == "ab"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb"\ud800", "\ud800"),
        (rb"a\udfffb", "a\udfffb"),
        (rb"\ud83d\ude00", "\U0001f600"),
        (rb"\u0000\u2028", "\x00\u2028"),
        (b"\xff", "\udcff"),
        ("\U0001f600\u2028".encode(), "\U0001f600\u2028"),
    ],
)
def test_text_that_is_hard_to_hold_arrives(raw: bytes, text: str) -> None:
    """Lone surrogates and bytes that are not UTF-8 reach the one who knows where the text will be stored."""
    body = json.dumps(CEREBRAS_CHAT).encode().replace(b'"billing"', b'"' + raw + b'"')
    answer = answered(body)
    assert answer.choices[0].text == text
    assert answer.usage.total_tokens == 120


def test_one_byte_order_mark_is_tolerated() -> None:
    """A mark before the JSON is not part of it."""
    assert answered(b"\xef\xbb\xbf" + json.dumps(CEREBRAS_CHAT).encode()).choices[0].text == "billing"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (nested("m", "server_error"), Kind.SERVER_ERROR),
        (nested("m", code=502), Kind.UNAVAILABLE),
        ({**nested("m", code=524), "choices": None}, Kind.REQUEST_TIMEOUT),
        (flat("m", "too_many_requests_error", "queue_exceeded", "queue"), Kind.OVERLOADED),
        (flat("Tokens per minute limit exceeded", "too_many_tokens_error", "token_quota_exceeded"), Kind.RATE_LIMITED),
        (nested("m", "invalid_request_error", "wrong_api_key"), Kind.UNAUTHORIZED),
        (nested("m", "invalid_request_error", "context_length_exceeded"), Kind.REJECTED),
        (nested("m", "invalid_request_error", "model_not_found"), Kind.MODEL_NOT_FOUND),
        (nested("m", "overloaded_error"), Kind.OVERLOADED),
        (nested("m", code="insufficient_quota"), Kind.NO_CREDIT),
        ({**nested("m"), "status_code": 503}, Kind.UNAVAILABLE),
        ({"object": "error", "message": "m", "type": "BadRequestError", "param": None, "code": 400}, Kind.REJECTED),
        (flat("m", "NotFoundError"), Kind.NOT_FOUND),
    ],
)
def test_an_error_inside_a_success_counts_as_the_error(body: object, kind: Kind) -> None:
    """An error that comes with status 200 is classified by its own words."""
    assert unanswered(body).kind is kind


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (flat("m", "too_many_requests_error", "queue_exceeded", "queue"), 429, Kind.OVERLOADED),
        (flat("Tokens per minute limit exceeded", "too_many_tokens_error"), 429, Kind.RATE_LIMITED),
        (flat("m", "server_error", 502), 500, Kind.SERVER_ERROR),
        (flat("m", "invalid_request_error", "context_length_exceeded"), 400, Kind.REJECTED),
        ({"id": "x"}, 503, Kind.UNAVAILABLE),
        ({}, 408, Kind.REQUEST_TIMEOUT),
        ("gone", 504, Kind.UNAVAILABLE),
        (None, 500, Kind.SERVER_ERROR),
    ],
)
def test_a_stream_that_broke_off_counts_as_its_status(error: object, status: int, kind: Kind) -> None:
    """The status beside the error decides, whatever members the error has; a part was generated, and may be paid."""
    found = unanswered({"error": error, "status_code": status})
    assert (found.kind, found.paid) == (kind, True)


def test_an_error_without_a_code_inside_a_success_is_malformed() -> None:
    """Words alone do not say what to do; they are shown."""
    found = unanswered({"error": "something went wrong"})
    assert (found.kind, found.paid) == (Kind.MALFORMED_RESPONSE, True)
    assert "something went wrong" in found.message


# Refusals


QUOTA_REQUESTS = flat(
    "Requests per minute limit exceeded - too many requests sent.",
    "too_many_requests_error",
    "request_quota_exceeded",
    "quota",
)
QUOTA_TOKENS = flat(
    "Tokens per minute limit exceeded - too many tokens processed.",
    "too_many_tokens_error",
    "token_quota_exceeded",
    "quota",
)
QUEUE = flat(
    "We're experiencing high traffic right now! Please try again soon.",
    "too_many_requests_error",
    "queue_exceeded",
    "queue",
)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"message": "bad", "type": "invalid_request_error", "code": "context_length_exceeded"}, Kind.REJECTED),
        (400, nested("bad", "invalid_request_error", "invalid_api_key"), Kind.UNAUTHORIZED),
        (400, nested("bad", "invalid_request_error", "mismatched_organization"), Kind.UNAUTHORIZED),
        (400, nested("gone", "invalid_request_error", "model_decommissioned"), Kind.MODEL_NOT_FOUND),
        (400, nested("no", "invalid_request_error", "billing_hard_limit_reached"), Kind.NO_CREDIT),
        (401, flat("Wrong API Key", "invalid_request_error", "wrong_api_key", "api_key"), Kind.UNAUTHORIZED),
        (402, b"", Kind.NO_CREDIT),
        (403, {"detail": "Not authenticated"}, Kind.FORBIDDEN),
        (403, b"<html>Attention Required!</html>", Kind.OVERLOADED),
        (403, nested("no access to model x", "invalid_request_error", "model_not_found"), Kind.MODEL_NOT_FOUND),
        (404, flat("no", "not_found_error", "model_not_found", "model"), Kind.MODEL_NOT_FOUND),
        (404, flat("The model `x` does not exist.", "NotFoundError", 404), Kind.MODEL_NOT_FOUND),
        (404, nested("model 'x' not found, try pulling it first"), Kind.MODEL_NOT_FOUND),
        (404, b"", Kind.NOT_FOUND),
        (410, b"", Kind.NOT_FOUND),
        (405, {"detail": "Method Not Allowed"}, Kind.NOT_SERVED),
        (415, b"", Kind.NOT_SERVED),
        (431, b"", Kind.NOT_SERVED),
        (501, b"", Kind.NOT_SERVED),
        (407, b"", Kind.PROXY),
        (408, b"", Kind.REQUEST_TIMEOUT),
        (409, b"", Kind.CONFLICT),
        (421, b"", Kind.CONFLICT),
        (425, b"", Kind.CONFLICT),
        (413, b"", Kind.REQUEST_TOO_LARGE),
        (413, nested("on tokens per minute (TPM): Limit 6000, Requested 7000", "tokens"), Kind.EXCEEDS_QUOTA),
        (418, b"", Kind.REJECTED),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, Kind.REJECTED),
        (451, b"", Kind.REJECTED),
        (429, QUOTA_REQUESTS, Kind.RATE_LIMITED),
        (429, QUOTA_TOKENS, Kind.RATE_LIMITED),
        (429, {**QUOTA_REQUESTS, "message": "Requests per second limit exceeded"}, Kind.RATE_LIMITED),
        (429, {**QUOTA_TOKENS, "message": "Tokens per hour limit exceeded"}, Kind.RATE_LIMITED),
        (429, {**QUOTA_TOKENS, "message": "Tokens per day limit exceeded"}, Kind.DAY_QUOTA),
        (429, nested("on requests per day (RPD): Limit 200, Used 200, Requested 1.", "requests"), Kind.DAY_QUOTA),
        (429, nested("You have reached your daily limit."), Kind.DAY_QUOTA),
        (429, nested("on tokens per min (TPM): Limit 30000, Requested 40000.", "tokens"), Kind.EXCEEDS_QUOTA),
        (429, nested("on tokens per min (TPM): Limit 10000, Used 9000, Requested 2000.", "tokens"), Kind.RATE_LIMITED),
        (429, nested("You exceeded your current quota", "insufficient_quota", "insufficient_quota"), Kind.NO_CREDIT),
        (429, nested("Insufficient credits. Add more."), Kind.NO_CREDIT),
        (429, nested("Insufficient balance", code="1113"), Kind.NO_CREDIT),
        (429, QUEUE, Kind.OVERLOADED),
        (429, {"message": QUEUE["message"]}, Kind.OVERLOADED),
        (429, nested("Resource unavailable", code="resource_unavailable"), Kind.OVERLOADED),
        (400, {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}, Kind.REJECTED),
        (400, b"Model not loaded", Kind.REJECTED),
        (429, {**QUOTA_TOKENS, "message": "Tokens per minute; more capacity on request"}, Kind.RATE_LIMITED),
        (429, b"", Kind.RATE_LIMITED),
        (429, b"<html>slow down</html>", Kind.RATE_LIMITED),
        (498, nested("flex", code="capacity_exceeded"), Kind.OVERLOADED),
        (529, nested("Overloaded", "overloaded_error"), Kind.OVERLOADED),
        (499, b"", Kind.REQUEST_TIMEOUT),
        (500, b"", Kind.SERVER_ERROR),
        (502, b"<html><title>502 Bad Gateway</title></html>", Kind.UNAVAILABLE),
        (503, nested("The engine is currently overloaded, please try again later"), Kind.OVERLOADED),
        (503, b"", Kind.UNAVAILABLE),
        (504, b"", Kind.UNAVAILABLE),
        (507, b"", Kind.SERVER_ERROR),
        (520, b"", Kind.UNAVAILABLE),
        (524, b"", Kind.REQUEST_TIMEOUT),
        (525, b"", Kind.TLS),
        (530, b"", Kind.UNAVAILABLE),
        (599, b"", Kind.SERVER_ERROR),
        (600, b"", Kind.SERVER_ERROR),
        (999, b"", Kind.SERVER_ERROR),
    ],
)
def test_a_refusal_has_a_kind(status: int, body: object, kind: Kind) -> None:
    """Status, code and words decide what a refusal is; both dialects see the same."""
    assert refused(status, body).kind is kind
    assert openai.refusal(reply(body, status)).kind is kind


def test_services_ask_to_be_asked_again_or_not() -> None:
    """`x-should-retry` says true or false; anything else says nothing."""
    told = [refused(500, b"", {"X-Should-Retry": value}).should_retry for value in ("true", "False", "yes", "")]
    assert told == [True, False, None, None]
    assert refused(500).should_retry is None


@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 499, 500, 502, 503, 504, 524, 529])
def test_a_refusal_after_the_work_may_be_paid(status: int) -> None:
    """When the service or its edge gave up waiting, an answer may have been generated and billed."""
    assert refused(status).paid is (status in (408, 499, 504, 524))


@pytest.mark.parametrize(
    ("body", "message", "type", "code"),
    [
        ({"message": "m", "type": "t", "code": "c"}, "m", "t", "c"),
        ({"error": {"message": "m", "type": "t", "code": 7}}, "m", "t", "7"),
        ({"error": "m"}, "m", None, None),
        ({"error": "m", "code": "c"}, "m", None, "c"),
        ({"detail": "m"}, "m", None, None),
        ({"detail": {"message": "m", "type": "t"}}, "m", "t", None),
        ({"detail": [{"msg": "field required"}]}, '[{"msg": "field required"}]', None, None),
        ([{"error": {"message": "m", "code": 400}}], "m", None, "400"),
        ({"error": {"message": {"a": 1}, "type": ["t"], "code": True}}, '{"a": 1}', None, None),
        (b"upstream\n  failed", "upstream failed", None, None),
        (b"<html><TITLE>502 Bad  Gateway</TITLE>", "502 Bad Gateway", None, None),
        (b"<html>", "500 Internal Server Error", None, None),
        (b"", "500 Internal Server Error", None, None),
        ({}, "{}", None, None),
        (b'{"message": "\\ud800", "code": "\\udfff"}', "?", None, "?"),
        (b"\xff\xfe", "\ufffd\ufffd", None, None),
        (b"[" * 100_000, "[" * 2048, None, None),
    ],
)
def test_a_refusal_is_quoted(body: object, message: str, type: str | None, code: str | None) -> None:
    """Message, type and code come out of every shape of error body, as text that can be stored anywhere."""
    found = refused(500, body)
    assert (found.message, found.type, found.code) == (message, type, code)


def test_a_long_message_is_cut() -> None:
    """Messages keep their first 2 KiB, codes their first 200 characters; the body stays whole."""
    body = json.dumps({"message": "m" * 10_000, "code": "c" * 10_000}).encode()
    found = refused(500, body)
    assert (len(found.message), len(found.code or "")) == (2048, 200)
    assert found.body == body


# Waits and limits


def test_a_refusal_empties_the_buckets_that_it_names() -> None:
    """Nothing is left in a named bucket; what the headers say of others stands."""
    headers = {
        "x-ratelimit-limit-requests-minute": "1000",
        "x-ratelimit-remaining-requests-minute": "990",
        "x-ratelimit-reset-requests-minute": "0.6",
        "x-ratelimit-limit-tokens-minute": "30000",
        "x-ratelimit-remaining-tokens-minute": "12",
        "x-ratelimit-reset-tokens-minute": "11.382867097854614",
    }
    found = refused(429, QUOTA_TOKENS, headers)
    assert found.kind is Kind.RATE_LIMITED
    assert found.retry_after == 11.382867097854614
    assert set(found.limits) == {
        Limit("requests", 60.0, 1000.0, 990.0, 0.6),
        Limit("tokens", 60.0, 30000.0, 0.0, 11.382867097854614),
    }


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (QUOTA_REQUESTS, [("requests", 60.0)]),
        ({**QUOTA_REQUESTS, "message": "Requests per second limit exceeded"}, [("requests", 1.0)]),
        ({**QUOTA_TOKENS, "message": "Tokens per hour"}, [("tokens", 3600.0)]),
        ({**QUOTA_TOKENS, "message": "Uncached tokens-per-minute"}, [("uncached_tokens", 60.0)]),
        ({**QUOTA_TOKENS, "message": "Total tokens per minute limit exceeded"}, [("tokens", 60.0)]),
        (
            {**QUOTA_TOKENS, "message": "Tokens per minute limit exceeded - too many uncached tokens processed."},
            [("uncached_tokens", 60.0)],
        ),
        (
            {**QUOTA_TOKENS, "message": "Tokens per day: the total of cached and uncached tokens"},
            [("tokens", 86400.0)],
        ),
        (
            {**QUOTA_TOKENS, "message": "uncached tokens per minute and total tokens per hour"},
            [("tokens", 3600.0), ("uncached_tokens", 60.0)],
        ),
        (
            {**QUOTA_REQUESTS, "message": "Requests per minute; uncached tokens per minute have room"},
            [("requests", 60.0), ("uncached_tokens", 60.0)],
        ),
        ({**QUOTA_TOKENS, "message": "limit", "code": "uncached_token_quota_exceeded"}, [("uncached_tokens", 60.0)]),
        ({**QUOTA_TOKENS, "message": "limit", "code": "total_token_quota_exceeded"}, [("tokens", 60.0)]),
        ({**QUOTA_TOKENS, "message": "limit"}, [("tokens", 60.0)]),
        (nested("on tokens per min (TPM): Limit 1"), [("tokens", 60.0)]),
        (nested("RPM and TPD are exhausted"), [("requests", 60.0), ("tokens", 86400.0)]),
        (nested("Rate limit reached", "tokens", "rate_limit_exceeded"), [("tokens", 60.0)]),
        (nested("Rate limit reached"), []),
        (b"", []),
    ],
)
def test_words_name_buckets(body: object, named: list[tuple[str, float]]) -> None:
    """Resource and window are read from the message, else from the code."""
    found = refused(429, body)
    assert [(limit.resource, limit.window) for limit in found.limits] == named
    assert all(limit.remaining == 0 for limit in found.limits)


def test_an_empty_bucket_of_the_day_is_the_day_s_quota() -> None:
    """A day bucket with nothing left decides, whatever the message names; so does a reset over an hour away."""
    empty = {"x-ratelimit-remaining-tokens-day": "0", "x-ratelimit-reset-tokens-day": "5"}
    found = refused(429, QUOTA_TOKENS, empty)
    assert (found.kind, found.retry_after) == (Kind.DAY_QUOTA, 5.0)
    far = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "30h0m0s"}
    found = refused(429, b"", far)
    assert (found.kind, found.retry_after) == (Kind.DAY_QUOTA, 108_000.0)
    assert refused(429, QUOTA_TOKENS, {"retry-after": "3600"}).kind is Kind.RATE_LIMITED
    assert refused(429, QUOTA_TOKENS, {"retry-after": "3601"}).kind is Kind.DAY_QUOTA
    assert refused(429, QUEUE, {"retry-after": "3601"}).kind is Kind.OVERLOADED


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "999999"}, 3600.0),
        ({"retry-after": "Mon, 21 Sep 2026 12:00:30 GMT", "date": "Mon, 21 Sep 2026 12:00:00 GMT"}, 30.0),
        ({"retry-after": "Mon, 21 Sep 2026 11:00:00 GMT", "date": "Mon, 21 Sep 2026 12:00:00 GMT"}, 0.0),
        ({"retry-after": "Mon, 21 Sep 2026 15:00:00 GMT", "date": "Mon, 21 Sep 2026 12:00:00 GMT"}, 3600.0),
        ({"retry-after": "Mon, 21 Sep 2099 12:00:00 GMT", "date": "Mon, 21 Sep 2026 12:00:00 GMT"}, None),
        ({"retry-after": "Mon, 99 Xyz 2026 12:00:00 GMT"}, None),
        ({"retry-after": "2026-09-21T12:00:00Z"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "+1"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "1_000"}, None),
        ({"retry-after": "1000000000"}, None),
        ({"retry-after": "9" * 1_000_000}, None),
        ({"retry-after": "\u0661\u0662"}, None),
        ({"retry-after": "5, 6"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_a_wait_is_read_strictly(headers: dict[str, str], wait: float | None) -> None:
    """A wait is a plain number or a date, and at most an hour; anything else is ignored."""
    assert refused(503, b"", headers).retry_after == wait


@pytest.mark.parametrize(
    ("words", "wait"),
    [
        ("Please try again in 5.289s. Visit the console.", 5.289),
        ("try again in 2m59.56s", 179.56),
        ("Please try again in 20ms.", 0.02),
        ("Please retry after 6 seconds.", 6.0),
        ("Try again in 1 minute", 60.0),
        ("try again in 1 hour", 3600.0),
        ("try again in 14m24s", 864.0),
        ("try again in a while", None),
        ("try again in 5 parsecs", None),
        ("try again in 5.2.8s", None),
        ("try again in 5sols", None),
        ("try again in " + "9" * 400 + "s", None),
    ],
)
def test_a_wait_may_stand_in_the_words(words: str, wait: float | None) -> None:
    """Where no header says it; of refusals that pass."""
    assert refused(429, nested(words, "tokens", "rate_limit_exceeded")).retry_after == wait
    assert refused(498, nested(words, code="capacity_exceeded")).retry_after == wait
    assert refused(503, words.encode()).retry_after is None
    assert refused(400, nested(words)).retry_after is None
    assert refused(429, nested(words), {"retry-after": "7"}).retry_after == 7.0


def test_a_wait_in_words_goes_before_the_reset_of_the_bucket() -> None:
    """A reset says when all is there again, the words when this request may go."""
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "60"}
    found = refused(429, nested("on tokens per minute (TPM): try again in 5.289s", "tokens"), headers)
    assert (found.kind, found.retry_after) == (Kind.RATE_LIMITED, 5.289)


def test_groq_counts_requests_by_the_day() -> None:
    """Its headers name no window; tokens are those of a minute."""
    headers = {
        "x-ratelimit-limit-requests": "14400",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2m59.56s",
        "x-ratelimit-limit-tokens": "18000",
        "x-ratelimit-remaining-tokens": "17997",
        "x-ratelimit-reset-tokens": "10ms",
        "retry-after": "180",
    }
    told = [Limit("requests", 86400.0, 14400.0, 0.0, 179.56), Limit("tokens", 60.0, 18000.0, 17997.0, 0.01)]
    assert list(groq.limits(headers)) == told
    found = groq.refusal(reply(nested("Rate limit reached", "requests", "rate_limit_exceeded"), 429, headers))
    assert found.kind is Kind.DAY_QUOTA
    assert openai.limits(headers)[0].window == 60.0


def test_a_date_is_measured_by_our_clock_without_the_service_s() -> None:
    """Without a date of its own the service's moment is compared with ours."""
    wait = refused(503, b"", {"retry-after": formatdate(timeval=None, usegmt=True)}).retry_after
    assert wait is not None
    assert 0 <= wait < 5


def test_a_header_that_contradicts_itself_is_ignored() -> None:
    """Two values of one header cancel each other; the same value twice is one."""
    both = CIMultiDictProxy(CIMultiDict([("Retry-After", "1"), ("retry-after", "600")]))
    assert refused(503, b"", both).retry_after is None
    same = CIMultiDictProxy(CIMultiDict([("Retry-After", "3"), ("retry-after", "3")]))
    assert refused(503, b"", same).retry_after == 3.0


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        (
            {
                "x-ratelimit-limit-requests-day": "14400",
                "x-ratelimit-remaining-requests-day": "14370",
                "x-ratelimit-reset-requests-day": "33011.382867097855",
                "X-RateLimit-Limit-Tokens-Minute": "60000",
                "X-RateLimit-Remaining-Tokens-Minute": "59000",
                "X-RateLimit-Reset-Tokens-Minute": "11.382867097854614",
            },
            [
                Limit("requests", 86400.0, 14400.0, 14370.0, 33011.382867097855),
                Limit("tokens", 60.0, 60000.0, 59000.0, 11.382867097854614),
            ],
        ),
        (
            {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-limit-tokens": "150000",
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-remaining-tokens": "149984",
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            [Limit("requests", 60.0, 60.0, 59.0, 1.0), Limit("tokens", 60.0, 150000.0, 149984.0, 360.0)],
        ),
        ({"x-ratelimit-remaining-req-minute": "3"}, [Limit("requests", 60.0, None, 3.0, None)]),
        (
            {
                "x-ratelimit-remaining-tokens-minute": "3",
                "x-ratelimit-remaining-uncached-tokens-minute": "2",
                "x-ratelimit-remaining-tokens-uncached-hour": "1",
                "x-ratelimit-remaining-project-tokens-minute": "5",
            },
            [
                Limit("tokens", 60.0, None, 3.0, None),
                Limit("uncached_tokens", 60.0, None, 2.0, None),
                Limit("uncached_tokens", 3600.0, None, 1.0, None),
            ],
        ),
        (
            {
                "x-ratelimit-limit-tokens-total-minute": "90000",
                "x-ratelimit-remaining-tokens-total-minute": "80000",
                "x-ratelimit-limit-tokens-uncached-minute": "30000",
                "x-ratelimit-remaining-tokens-uncached-minute": "20000",
            },
            [
                Limit("tokens", 60.0, 90000.0, 80000.0, None),
                Limit("uncached_tokens", 60.0, 30000.0, 20000.0, None),
            ],
        ),
        ({"x-ratelimit-limit": "5", "x-ratelimit-reset": "1", "x-ratelimit-policy-tokens": "9"}, []),
        ({"x-ratelimit-limit-tokens": "-5", "x-ratelimit-remaining-tokens": "nan"}, []),
        ({"x-ratelimit-limit-tokens": "1e3", "x-ratelimit-reset-tokens": "inf"}, []),
        ({"x-ratelimit-limit-images": "5"}, []),
        ({"content-type": "application/json"}, []),
    ],
)
def test_headers_describe_buckets(headers: dict[str, str], limits: list[Limit]) -> None:
    """Limits come from headers by their pattern; what is not a plain number is not there."""
    assert list(cerebras.limits(headers)) == limits
    assert list(openai.limits(headers)) == limits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20ms", 0.02),
        ("1s", 1.0),
        ("2m59.56s", 179.56),
        ("6m0s", 360.0),
        ("1h2m3s", 3723.0),
        ("1d", 86400.0),
        ("0", 0.0),
        ("12.5", 12.5),
        ("1789992030", 30.0),
        ("1789990000", 0.0),
        ("1e3", None),
        ("s", None),
        ("", None),
        ("-1s", None),
        ("5 s", None),
        ("99999999", None),
        ("1789992030000", None),
    ],
)
def test_a_reset_is_seconds_a_duration_or_a_moment(text: str, seconds: float | None) -> None:
    """Services write resets in three ways; others are not guessed at."""
    headers = {
        "date": "Mon, 21 Sep 2026 12:00:00 GMT",
        "x-ratelimit-limit-tokens": "1",
        "x-ratelimit-reset-tokens": text,
    }
    [limit] = cerebras.limits(headers)
    assert limit.reset == (None if seconds is None else pytest.approx(seconds))


# Rules that hold for everything

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "content",
                    "text",
                    "finish_reason",
                    "index",
                    "usage",
                    "time_info",
                    "error",
                    "code",
                    "detail",
                    "type",
                    "param",
                    "status_code",
                    "tool_calls",
                    "function",
                    "prompt_tokens",
                    "total_time",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)
BODIES = st.one_of(
    st.binary(max_size=60),
    JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    st.tuples(st.integers(0, 900), st.binary(max_size=3)).map(
        lambda cut: json.dumps(CEREBRAS_CHAT).encode()[: cut[0]] + cut[1] + json.dumps(CEREBRAS_CHAT).encode()[cut[0] :]
    ),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "retry-after",
            "retry-after-ms",
            "date",
            "content-type",
            "x-ratelimit-reset-tokens",
            "x-ratelimit-limit-t",
            "x-ratelimit-remaining-requests-day",
            "x-ratelimit",
            "x-ratelimit--",
            "X-RateLimit-Reset-Requests-Minute",
        ]
    ),
    st.one_of(
        st.text(max_size=10),
        st.from_regex(r"\A[0-9]{1,12}(\.[0-9]{1,3})?(ms|s|m)?\Z"),
        st.sampled_from(["nan", "inf", "Mon, 21 Sep 0000 12:00:00 GMT", "Mon, 21 Sep 2026 99:00:00 GMT"]),
    ),
)


def is_storable(found: Failure) -> bool:
    """Whether a failure's words and numbers can be written down."""
    "".join((found.message, found.type or "", found.code or "")).encode()
    numbers = [found.retry_after, *(number for limit in found.limits for number in limit[1:])]
    return all(number is None or 0 <= number <= 1e16 for number in numbers)


@given(BODIES, HEADERS)
def test_reading_never_raises(body: bytes, headers: dict[str, str]) -> None:
    """Any bytes with status 200 are an answer with a finished choice, or a failure with words."""
    found = cerebras.read(reply(body, headers=headers))
    if isinstance(found, Answer):
        assert found.choices
        assert all(choice.finish_reason for choice in found.choices)
        counts = [getattr(found.usage, name) for name in found.usage.__struct_fields__]
        assert all(count is None or 0 <= count < 2**63 for count in counts)
    else:
        assert found.message
        assert is_storable(found)


@given(st.integers(0, 999), BODIES, HEADERS)
def test_refusing_never_raises(status: int, body: bytes, headers: dict[str, str]) -> None:
    """Any status, bytes and headers have a kind, words, and a wait that ends."""
    found = cerebras.refusal(reply(body, status, headers))
    assert found.message
    assert is_storable(found)
    if found.kind is not Kind.DAY_QUOTA:
        assert found.retry_after is None or found.retry_after <= 3600


@given(HEADERS)
def test_limits_never_raise(headers: dict[str, str]) -> None:
    """Any headers describe buckets with finite numbers, each bucket once."""
    found = cerebras.limits(headers)
    assert len({(limit.resource, limit.window) for limit in found}) == len(found)
    assert all(number is None or 0 <= number <= 1e16 for limit in found for number in limit[1:])
