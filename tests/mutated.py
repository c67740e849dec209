"""Answers as services send them, and the same ones broken in every way that a bug, a proxy or a wire breaks them."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

USAGE = {
    "prompt_tokens": 90,
    "completion_tokens": 30,
    "total_tokens": 120,
    "image_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 20, "accepted_prediction_tokens": 1},
}
TIMES = {"queue_time": 0.00027, "prompt_time": 0.0164, "completion_time": 1.1533, "total_time": 1.1721}
HEAD = {"id": "chatcmpl-292e278f", "created": 1790000000, "model": "gpt-oss-120b", "system_fingerprint": "fp_7018506"}


def likely(token: str, logprob: float) -> dict[str, Any]:
    """A token as chat answers tell it."""
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def chat(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A chat answer."""
    numbered = [{"index": at, "finish_reason": "stop", **choice} for at, choice in enumerate(choices)]
    return {**HEAD, "object": "chat.completion", "choices": numbered, "usage": USAGE, "time_info": TIMES, **more}


def completion(*choices: dict[str, Any]) -> dict[str, Any]:
    """A completion."""
    return {**chat(*choices), "object": "text_completion"}


TOKENS = [
    {**likely("caf\u00e9", -0.25), "top_logprobs": [likely("caf\u00e9", -0.25), likely("tea", -2.0)]},
    {**likely("!", -1.5), "top_logprobs": []},
]
CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}, "index": 0},
    {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}, "index": 1},
]
ANSWERS: list[dict[str, Any]] = [
    chat(
        {"message": {"role": "assistant", "content": "billing", "reasoning": "It asks about an invoice."}},
        service_tier="auto",
        service_tier_used="flex",
    ),
    chat({"message": {"role": "assistant", "content": None, "tool_calls": CALLS}, "finish_reason": "tool_calls"}),
    chat(
        {
            "message": {"role": "assistant", "content": "caf\u00e9!", "reasoning": "!"},
            "logprobs": {"content": TOKENS, "refusal": None},
            "reasoning_logprobs": {"content": TOKENS[1:], "refusal": None},
        }
    ),
    chat(
        *(
            {"message": {"content": text, "tool_calls": CALLS[:1]}, "logprobs": {"content": TOKENS}}
            for text in ("a", "b")
        )
    ),
    chat({"message": {"content": None, "refusal": "I cannot help."}, "logprobs": {"content": None, "refusal": TOKENS}}),
    chat({"message": {"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}}),
    completion(
        {
            "text": " tea.",
            "logprobs": {
                "tokens": [" tea", "."],
                "token_logprobs": [None, -0.5],
                "top_logprobs": [None, {".": -0.5, "!": -2.0}],
                "text_offset": [0, 4],
            },
        }
    ),
    completion(
        *({"index": 0, "text": None, "tokens": [at, 200_000 + at], "finish_reason": "length"} for at in range(3))
    ),
    {
        "choices": [{"index": 0, "message": {"reasoning_content": "Hm.", "content": "4"}, "finish_reason": "stop"}],
        "usage": {**TIMES, "prompt_tokens": 18, "completion_tokens": 5, "prompt_tokens_details": None},
        "x_groq": {"id": "req_1", "usage": USAGE},
    },
]
"""One of each kind: text, calls, log probabilities, several choices, refusal, parts, raw tokens, other services'."""
ERRORS: list[dict[str, Any]] = [
    {"message": "bad", "type": "invalid_request_error", "param": None, "code": "context_length_exceeded"},
    {"error": {"message": "broken", "type": "server_error", "param": None, "code": None, "id": ""}, "status_code": 500},
    {"object": "error", "message": "bad", "type": "BadRequestError", "param": None, "code": 400},
]
REFUSALS: list[dict[str, Any]] = [
    {
        "message": "Tokens per minute limit exceeded - too many uncached tokens processed.",
        "type": "too_many_tokens_error",
        "param": "quota",
        "code": "token_quota_exceeded",
    },
    {"message": "high traffic", "type": "too_many_requests_error", "param": "queue", "code": "queue_exceeded"},
    {"error": {"message": "on tokens per min (TPM): try again in 5.289s", "type": "tokens", "code": "rate_limit"}},
    {"detail": [{"loc": ["body"], "msg": "field required"}]},
]

ODD: list[Any] = [
    *(None, True, False, 0, -1, 7, 1.5, 2**31, 2**63, 10**40, -(10**400), 1e300, float("nan"), float("inf")),
    *("", "x", "1", "\ud800", "a\udfffb", "\ud83d\ude00", "\0", "\u2028", "<html>", "x" * 5000),
    *([], [None], [[]], ["x"], [1, 2], [{}], {}, {"a": 1}, {"text": "x"}, {"\ud800": "\ud800"}, {"": {}}),
    [[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]],
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every member of every object and list, as its container and its key or index."""
    found = []
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        found += [(value, key), *_places(member)]
    return found


def _odd(luck: random.Random, value: Any, at: Any) -> None:
    value[at] = copy.deepcopy(luck.choice(ODD))


def _dropped(luck: random.Random, value: Any, at: Any) -> None:
    del value[at]


def _renamed(luck: random.Random, value: Any, at: Any) -> None:
    name = luck.choice([str(at) + "s", str(at).title(), "error", "content", "text", "message", "\ud800", ""])
    if isinstance(value, dict):
        value[name] = value.pop(at)


def _retyped(luck: random.Random, value: Any, at: Any) -> None:
    was = value[at]
    value[at] = luck.choice([[was], {"value": was}, str(was), json.dumps(was), [was, was]])


def _repeated(luck: random.Random, value: Any, at: Any) -> None:
    if isinstance(value, list):
        value.insert(luck.randrange(len(value) + 1), copy.deepcopy(value[at]))


def _cut(luck: random.Random, body: bytes) -> bytes:
    return body[: luck.randrange(len(body) + 1)]


def _doubled(luck: random.Random, body: bytes) -> bytes:
    """A key that stands twice, with other values."""
    names = [b'"choices"', b'"content"', b'"message"', b'"usage"', b'"finish_reason"', b'"text"', b'"logprobs"']
    name = luck.choice(names)
    other = json.dumps(luck.choice(ODD)).encode()
    if luck.random() < 0.5:
        return body.replace(name + b":", name + b":" + other + b"," + name + b":", 1)
    return body.replace(name + b":", name + b":" + other + b',"x":', 1)


def _encoded(luck: random.Random, body: bytes) -> bytes:
    encoding = luck.choice(["utf-16", "utf-32-le", "latin-1", "utf-8-sig", "utf-7"])
    return json.dumps(json.loads(body), ensure_ascii=False).encode(encoding, "replace")


def _bytes(luck: random.Random, body: bytes) -> bytes:
    at = luck.randrange(len(body) + 1)
    put = luck.choice([b"\xff", b"\x00", b'"', b"{", b"]", b",", b"\\ud800", b"NaN", b"1e999", b"[" * 2000, b"-"])
    return body[:at] + put + body[at + luck.choice([0, 0, 1, 3]) :]


def _deep(luck: random.Random, body: bytes) -> bytes:
    depth = luck.choice([50, 900, 1100, 100_000])
    opened, closed = luck.choice([(b"[", b"]"), (b'{"top_logprobs":', b"}"), (b'{"error":', b"}")])
    nested = opened * depth + b"1" + closed * depth
    name = luck.choice([b'"x"', b'"error"', b'"logprobs"', b'"usage"'])
    return b"{" + name + b":" + nested + b"," + body[1:]


_IN_VALUES: list[Callable[[random.Random, Any, Any], None]] = [_odd, _odd, _dropped, _renamed, _retyped, _repeated]
_IN_BYTES: list[Callable[[random.Random, bytes], bytes]] = [_cut, _doubled, _encoded, _bytes, _bytes, _deep]


def mutated(luck: random.Random, bases: list[dict[str, Any]]) -> bytes:
    """The bytes of an answer that is broken once or a few times, or by luck not at all."""
    value = copy.deepcopy(luck.choice(bases))
    for _ in range(luck.randrange(4)):
        places = _places(value)
        if places:
            luck.choice(_IN_VALUES)(luck, *luck.choice(places))
    body = json.dumps(value, separators=(",", ":")).encode()
    if luck.random() < 0.35:
        try:
            body = luck.choice(_IN_BYTES)(luck, body)
        except ValueError:  # what cannot be encoded so
            body = _cut(luck, body)
    return body
