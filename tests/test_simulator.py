"""The simulator's promises: limits in virtual time, answers, faults, and what it does on real sockets."""

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hashlib import sha256

import aiohttp
import anyio
import jsonschema_rs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.simulator import Fault, Settings, Simulator, parse_fault, running, serve
from batcher.simulator.answers import Json, Schema
from batcher.simulator.model import Answer, Service, Waiting
from batcher.simulator.wire import Completed, Reply, tokens

MODEL = "gpt-oss-120b"
CHAT = "/v1/chat/completions"
OPEN = Settings(  # no limits, no delays
    requests_per_minute=None,
    tokens_per_minute=None,
    latency=0,
    seconds_per_prompt_token=0,
    seconds_per_completion_token=0,
)
HEADERS = {"Authorization": "Bearer key", "Content-Type": "application/json"}
TICKET = "My parcel never came. Please tell me where it is! I paid for express delivery."


def body(prompt: str = TICKET, **parameters: Json) -> bytes:
    """A chat request."""
    request: Schema = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **parameters}
    return msgspec.json.encode(request)


def shaped(schema: Schema) -> Schema:
    """The response_format that asks for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def ask(
    service: Service, request: bytes, now: float = 0.0, path: str = CHAT, authorization: str | None = "Bearer key"
) -> Answer:
    """What the service decides about one request that need not wait."""
    answer = service.receive("POST", path, authorization, request, now)
    assert isinstance(answer, Answer)
    return answer


def read(answer: Answer) -> Completed:
    """A good answer, read as a client would."""
    assert answer.status == 200
    return msgspec.json.decode(answer.body, type=Completed)


def content(answer: Answer) -> str:
    """The text of the first choice."""
    return spoken(read(answer))


def spoken(completed: Completed) -> str:
    """The text of a body's first choice."""
    message = completed.choices[0].message
    assert isinstance(message, Reply)
    assert message.content is not None
    return message.content


def error(answer: Answer) -> dict[str, str]:
    """A refusal's body."""
    return msgspec.json.decode(answer.body, type=dict[str, str])


class TestLimits:
    """Quotas in virtual time: buckets, refusals, headers."""

    def test_a_request_bucket_refills_continuously(self) -> None:
        """60 requests a minute are 60 at once, and then one more each second, not 60 more each minute."""
        service = Service(Settings(requests_per_minute=60, tokens_per_minute=None))
        assert [ask(service, body(), 0).status for _ in range(61)] == [200] * 60 + [429]
        assert [ask(service, body(), 0.99).status, ask(service, body(), 1.0).status] == [429, 200]
        assert [ask(service, body(), 3.5).status for _ in range(3)] == [200, 200, 429]

    @given(st.integers(1, 50), st.lists(st.floats(0, 30), min_size=1, max_size=200))
    def test_no_order_of_arrivals_gets_more_than_the_limit(self, limit: int, pauses: list[float]) -> None:
        """Whatever the arrivals, the admitted are at most a full bucket plus what flowed in meanwhile."""
        service = Service(Settings(requests_per_minute=limit, tokens_per_minute=None))
        now, admitted = 0.0, 0
        for pause in pauses:
            now += pause
            admitted += ask(service, body(), now).status == 200
            assert admitted <= limit + now * limit / 60 + 1e-6
        assert admitted >= min(len(pauses), limit)

    def test_the_refusals_are_worded_as_the_service_words_them(self) -> None:
        """Each exhausted bucket is refused with its own type, code and message, in one object at the top level."""
        requests = Service(Settings(requests_per_minute=1))
        per_day = Service(Settings(requests_per_day=1))
        per_token = Service(Settings(tokens_per_minute=10))
        for service in (requests, per_day):
            assert ask(service, body(max_completion_tokens=1)).status == 200
        assert error(ask(requests, body())) == {
            "message": "Requests per minute limit exceeded - too many requests sent.",
            "type": "too_many_requests_error",
            "param": "quota",
            "code": "request_quota_exceeded",
        }
        assert error(ask(per_day, body()))["message"] == "Requests per day limit exceeded - too many requests sent."
        assert error(ask(per_token, body())) == {
            "message": "Tokens per minute limit exceeded - too many tokens processed.",
            "type": "too_many_tokens_error",
            "param": "quota",
            "code": "token_quota_exceeded",
        }

    def test_tokens_are_charged_by_the_cap_and_settled_to_the_use(self) -> None:
        """While an answer is made its whole cap is charged; once it has left only what it used is."""
        service = Service(Settings(requests_per_minute=None, tokens_per_minute=1_000))
        first = ask(service, body(max_completion_tokens=900))
        assert ask(service, body(max_completion_tokens=900)).status == 429
        headers = service.settle(first, 0)
        used = first.prompt_tokens + first.completion_tokens
        assert headers["x-ratelimit-remaining-tokens-minute"] == str(1_000 - used)
        assert ask(service, body(max_completion_tokens=900)).status == 200

    def test_a_request_without_a_cap_is_charged_an_assumed_one(self) -> None:
        """Without max_completion_tokens, or with -1, the assumed output is reserved; for each of n choices."""
        settings = Settings(tokens_per_minute=1_000, assumed_completion_tokens=600)
        assert ask(Service(settings), body()).status == 200
        assert ask(Service(settings), body(max_completion_tokens=-1)).status == 200
        assert ask(Service(settings), body(n=2)).status == 429

    def test_a_refusal_charges_nothing(self) -> None:
        """A request refused by the token bucket leaves the request bucket as it was."""
        service = Service(Settings(requests_per_minute=2, tokens_per_minute=100))
        refused = [ask(service, body(max_completion_tokens=500)) for _ in range(5)]
        assert {answer.status for answer in refused} == {429}
        assert service.settle(refused[-1], 0)["x-ratelimit-remaining-requests-minute"] == "2"

    def test_headers_tell_limit_remainder_and_seconds_to_a_full_bucket(self) -> None:
        """Every answer about a model carries its buckets' state; the day's bucket appears when there is one."""
        service = Service(Settings(requests_per_minute=60, tokens_per_minute=6_000, requests_per_day=100))
        answer = ask(service, body(max_completion_tokens=50))
        used = answer.prompt_tokens + answer.completion_tokens
        assert service.settle(answer, 0) == {
            "x-ratelimit-limit-requests-day": "100",
            "x-ratelimit-remaining-requests-day": "99",
            "x-ratelimit-reset-requests-day": "864.0",
            "x-ratelimit-limit-requests-minute": "60",
            "x-ratelimit-remaining-requests-minute": "59",
            "x-ratelimit-reset-requests-minute": "1.0",
            "x-ratelimit-limit-tokens-minute": "6000",
            "x-ratelimit-remaining-tokens-minute": str(6_000 - used),
            "x-ratelimit-reset-tokens-minute": str(used * 60 / 6_000),
        }
        assert service.settle(ask(service, body(model="no-such-model")), 0) == {}

    def test_retry_after_is_sent_only_when_it_is_set(self) -> None:
        """The header is seconds, rounded up, until the refused request would fit; by default there is none."""
        for wanted, expected in ((False, None), (True, "20")):
            service = Service(Settings(requests_per_minute=3, retry_after=wanted))
            answers = [ask(service, body(max_completion_tokens=1)) for _ in range(4)]
            assert service.settle(answers[-1], 0).get("retry-after") == expected

    def test_each_model_has_its_own_limits(self) -> None:
        """A bucket emptied for one model leaves the other models' full."""
        service = Service(Settings(requests_per_minute=1))
        statuses = [ask(service, body(model=model)).status for model in (MODEL, MODEL, "zai-glm-4.7")]
        assert statuses == [200, 429, 200]


class TestTime:
    """How long answers take."""

    def test_latency_grows_with_the_tokens(self) -> None:
        """An answer takes the base, and so much for each token of prompt and completion; time_info says how much."""
        settings = Settings(latency=1, seconds_per_prompt_token=0.5, seconds_per_completion_token=2, jitter=0)
        answer = ask(Service(settings), body())
        times, usage = read(answer).time_info, read(answer).usage
        assert times.prompt_time == usage.prompt_tokens * 0.5
        assert times.completion_time == usage.completion_tokens * 2
        assert answer.delay == times.total_time == 1 + times.prompt_time + times.completion_time

    @given(st.text(max_size=50), st.floats(0, 1))
    def test_jitter_stays_within_its_share(self, prompt: str, jitter: float) -> None:
        """No answer is faster or slower than the share allows."""
        settings = Settings(latency=1, seconds_per_prompt_token=0, seconds_per_completion_token=0, jitter=jitter)
        assert 1 - jitter - 1e-9 <= ask(Service(settings), body(prompt)).delay <= 1 + jitter + 1e-9

    def test_beyond_the_capacity_requests_queue_and_then_are_refused(self) -> None:
        """Two places, two seconds each: pairs wait 0, 2, 4 seconds, and who would wait longer than 5 is refused."""
        settings = Settings(
            latency=2, seconds_per_prompt_token=0, seconds_per_completion_token=0, jitter=0, capacity=2, queue_limit=5
        )
        service = Service(settings)
        came = [service.receive("POST", CHAT, "Bearer key", body(max_completion_tokens=10), 0.0) for _ in range(7)]
        service.advance(100)
        answers = [answer for one in came if (answer := one.answer if isinstance(one, Waiting) else one) is not None]
        assert [read(answer).time_info.queue_time for answer in answers[:6]] == [0, 0, 2, 2, 4, 4]
        assert [answer.delay for answer in answers[:6]] == [2, 2, 4, 4, 6, 6]
        assert error(answers[6]) == {
            "message": "We're experiencing high traffic right now! Please try again soon.",
            "type": "too_many_requests_error",
            "param": "queue",
            "code": "queue_exceeded",
        }
        assert read(ask(service, body(max_completion_tokens=10), 100)).time_info.queue_time == 0


class TestFaults:
    """What goes wrong on purpose."""

    MIX = replace(OPEN, faults={"500": 0.1, "429": 0.1, "reset": 0.1, "malformed": 0.1})

    def faults(self, settings: Settings, order: list[int]) -> dict[int, list[str | None]]:
        """The faults of three tries of each prompt, asked in an order."""
        service = Service(settings)
        drawn: dict[int, list[str | None]] = {number: [] for number in order}
        for number in order * 3:
            drawn[number].append(ask(service, body(f"Prompt {number}")).fault)
        return drawn

    def test_faults_are_reproducible_by_seed_in_any_order(self) -> None:
        """A seed decides which try of which request fails and how, whatever else is asked in between."""
        numbers = list(range(200))
        drawn = self.faults(self.MIX, numbers)
        assert self.faults(self.MIX, numbers[::-1]) == drawn
        assert self.faults(replace(self.MIX, seed=1), numbers) != drawn

    def test_faults_come_in_their_shares_and_pass(self) -> None:
        """Each kind has about its share of the requests, and a request that failed can succeed when asked again."""
        tries = list(self.faults(self.MIX, list(range(1_000))).values())
        counts = Counter(fault for row in tries for fault in row)
        for kind, share in self.MIX.faults.items():
            assert abs(counts[kind] / 3_000 - share) < 0.025
        assert any(first is not None and second is None for first, second, _ in tries)

    def test_quota_refusals_do_not_shift_faults(self) -> None:
        """A request refused by a limit has drawn nothing: when it is admitted its faults are the same."""
        drawn = self.faults(self.MIX, list(range(20)))
        service = Service(replace(self.MIX, requests_per_minute=1))
        now = 0.0
        for number in list(range(20)) * 3:
            while (answer := ask(service, body(f"Prompt {number}"), now)).fault is None and answer.status == 429:
                now += 10
            assert answer.fault == drawn[number].pop(0)

    @pytest.mark.parametrize(
        ("kind", "status", "code"),
        [
            ("429", 429, "request_quota_exceeded"),
            ("queue", 429, "queue_exceeded"),
            ("401", 401, "wrong_api_key"),
            ("408", 408, "request_timeout"),
            ("500", 500, "internal_server_error"),
            ("503", 503, "service_unavailable"),
        ],
    )
    def test_a_refusal_on_purpose_looks_like_one_of_the_service(self, kind: str, status: int, code: str) -> None:
        """A fault that is a status has the service's body for it, and takes no tokens."""
        service = Service(replace(OPEN, tokens_per_minute=1_000, faults={kind: 1}))
        answer = ask(service, body(max_completion_tokens=900))
        assert (answer.status, error(answer)["code"], answer.fault) == (status, code, kind)
        assert service.settle(answer, 0)["x-ratelimit-remaining-tokens-minute"] == "1000"

    def test_poison_always_gets_its_status(self) -> None:
        """A prompt that contains the marked text fails the same way each time; others do not."""
        service = Service(replace(OPEN, poison={"arsenic": 500, "hemlock": 400}))
        prompts = ("some arsenic here", "no harm", "hemlock!")
        assert [[ask(service, body(prompt)).status for prompt in prompts] for _ in range(3)] == [[500, 200, 400]] * 3

    def test_a_slow_answer_is_a_good_one_late(self) -> None:
        """The fault adds its seconds and changes nothing else."""
        good, slow = (ask(Service(replace(OPEN, faults=faults, slow=7)), body()) for faults in ({}, {"slow": 1}))
        assert (slow.delay, slow.body) == (good.delay + 7, good.body)

    def test_the_spoiled_text_is_what_a_client_reads(self) -> None:
        """The surrogate and the NUL are escapes on the wire and characters to whoever reads them."""
        answer = ask(Service(replace(OPEN, faults={"surrogate": 1})), body())
        assert rb"\ud800\u0000" in answer.body
        assert answer.content is not None
        assert answer.content.endswith("\ud800\0")

    def test_inside_json_only_the_strings_are_spoiled(self) -> None:
        """With a schema the content stays JSON: the surrogate and the NUL are in its free text."""
        schema: Schema = {"type": "object", "properties": {"why": {"type": "string"}}, "required": ["why"]}
        answer = ask(Service(replace(OPEN, faults={"surrogate": 1})), body(response_format=shaped(schema)))
        assert answer.content is not None
        assert answer.content.endswith('\ud800\\u0000"}')

    def test_an_invalid_answer_never_fits(self) -> None:
        """By the fault `invalid` the content is not JSON, or JSON that the schema refuses; both occur."""
        schema: Schema = {"type": "object", "properties": {"why": {"type": "string"}}}
        service = Service(replace(OPEN, faults={"invalid": 1}))
        validator = jsonschema_rs.validator_for(schema)
        kinds = set()
        for number in range(30):
            text = content(ask(service, body(f"Prompt {number}", response_format=shaped(schema))))
            try:
                assert not validator.is_valid(msgspec.json.decode(text))
                kinds.add("misfit")
            except msgspec.DecodeError:
                kinds.add("no JSON")
        assert kinds == {"misfit", "no JSON"}

    def test_a_fault_is_read_from_kind_and_share(self) -> None:
        """KIND=SHARE is a known kind or an error status, and a share from 0 to 1."""
        assert parse_fault("500=0.05") == ("500", 0.05)
        assert parse_fault("reset=1") == (Fault.RESET, 1.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("500", "KIND=SHARE, such as 500=0.05, not '500'"),
            ("500=often", "KIND=SHARE, such as 500=0.05, not '500=often'"),
            ("200=0.5", "unknown fault '200'; known are queue, reset, .* and the statuses 400 to 599"),
            ("reset=7", "share of fault reset must be between 0 and 1, not 7"),
            ("reset=nan", "share of fault reset must be between 0 and 1, not nan"),
        ],
    )
    def test_a_wrong_fault_is_refused_in_words(self, text: str, message: str) -> None:
        """What is not a fault is refused with what is allowed."""
        with pytest.raises(ValueError, match=message):
            parse_fault(text)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Settings(faults={"500": 0.6, "reset": 0.6}), "must not pass 1; they make 1.2"),
            (lambda: Settings(faults={"boom": 0.1}), "unknown fault 'boom'"),
            (lambda: Settings(poison={"x": 200}), "poison 'x' must be between 400 and 599, not 200"),
            (lambda: Settings(requests_per_minute=0), "requests_per_minute must be at least 1"),
            (lambda: Settings(latency=-1), "latency must be 0 or more seconds, not -1"),
            (lambda: Settings(jitter=2), "jitter must be between 0 and 1, not 2"),
        ],
    )
    def test_impossible_settings_are_refused(self, make: Callable[[], Settings], message: str) -> None:
        """A setting that no service can have is named, with what it must be."""
        with pytest.raises(ValueError, match=message):
            make()


def bounded(kind: str, low: float, size: float, exclusive: bool) -> Schema:
    """A schema for numbers from low to low + size, with or without the bounds."""
    words = ("exclusiveMinimum", "exclusiveMaximum") if exclusive else ("minimum", "maximum")
    return {"type": kind, words[0]: low, words[1]: low + size}


names = st.text("abcdef_", min_size=1, max_size=8)
leaves = st.one_of(
    st.sampled_from(
        [{"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}]
    ),
    st.builds(bounded, st.just("integer"), st.integers(-1_000, 1_000), st.integers(2, 50), st.booleans()),
    st.builds(bounded, st.just("number"), st.floats(-1e6, 1e6), st.floats(0.001, 1e6), st.booleans()),
    st.builds(lambda step: {"type": "integer", "minimum": -9, "maximum": 30, "multipleOf": step}, st.integers(1, 9)),
    st.builds(lambda low: {"type": "string", "minLength": low, "maxLength": low + 3}, st.integers(0, 150)),
    st.builds(lambda options: {"enum": options}, st.lists(names | st.integers() | st.none(), min_size=1, unique=True)),
    st.builds(lambda value: {"const": value}, names),
    st.just({"$ref": "#/$defs/shared"}),
)


def nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    """Schemas with others inside."""

    def record(properties: dict[str, Schema], required: int) -> Schema:
        return {
            "type": "object",
            "properties": {**properties},
            "required": list[Json](properties)[:required],
            "additionalProperties": False,
        }

    return st.one_of(
        st.builds(record, st.dictionaries(names, inner, max_size=4), st.integers(0, 4)),
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda items, low: {"type": "array", "items": items, "minItems": low}, inner, st.integers(0, 4)),
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 1}, inner),
        st.builds(lambda first, second: {"anyOf": [first, second]}, inner, inner),
        st.builds(lambda only: {"allOf": [only]}, inner),
    )


schemas = st.recursive(leaves, nested, max_leaves=8)
SHARED: Schema = {"shared": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}


class TestAnswers:
    """What the simulated model says."""

    @given(schemas, st.text(max_size=200))
    def test_an_answer_fits_the_asked_schema(self, schema: Schema, prompt: str) -> None:
        """Whatever the schema, of those that the simulator understands, and whatever the prompt."""
        schema = {**schema, "$defs": SHARED}
        answer = ask(Service(OPEN), body(prompt, response_format=shaped(schema)))
        jsonschema_rs.validator_for(schema).validate(msgspec.json.decode(content(answer)))

    @pytest.mark.parametrize(
        "schema",
        [
            {  # a tree
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
                    "more": {"type": "array", "items": {"$ref": "#"}},
                },
                "required": ["name", "left", "more"],
            },
            {  # as model classes write inheritance
                "allOf": [
                    {"$ref": "#/$defs/base"},
                    {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
                ],
                "$defs": {"base": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
            },
            {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
            {"type": ["string", "null"]},
            {"type": "object", "required": ["free"]},
            {
                "type": "object",
                "properties": {"share": {"type": "number", "multipleOf": 0.1, "minimum": 0, "maximum": 1}},
            },
            {},
        ],
    )
    def test_schemas_that_users_write_are_met(self, schema: Schema) -> None:
        """Recursion, inheritance, exclusive bounds, unions of types and open objects get answers that fit."""
        validator = jsonschema_rs.validator_for(schema)
        for number in range(50):
            answer = ask(Service(OPEN), body(f"{TICKET} {number}", response_format=shaped(schema)))
            validator.validate(msgspec.json.decode(content(answer)))

    def test_labels_follow_the_words_of_the_prompt(self) -> None:
        """A label is chosen by its own words and by the hints in the description: right mostly, never always."""
        schema: Schema = {
            "type": "object",
            "properties": {
                "topic": {
                    "enum": ["billing", "bug", "feature_request", "delivery", "other"],
                    "description": "What the ticket is about. billing: invoices, charges, refunds; bug: error, crash, "
                    "broken\ndelivery: parcel, courier, shipping. feature request = wish, would be nice to have",
                }
            },
            "required": ["topic"],
        }
        cases = {
            "I was charged twice, please refund me": "billing",
            "Where is the invoice for March": "billing",
            "The app crashes with an error when I save": "bug",
            "The export button is broken": "bug",
            "It would be a nice feature to have a dark theme": "feature_request",
            "My wish: sort by date": "feature_request",
            "The courier left my parcels at a neighbour": "delivery",
            "When do you ship my order? It is not delivered": "delivery",
            "Hello, good morning to everybody": "other",
        }
        right = total = 0
        for text, label in cases.items():
            for number in range(50):
                answer = ask(Service(OPEN), body(f"{text}, number {number}", response_format=shaped(schema)))
                right += msgspec.json.decode(content(answer), type=dict[str, str])["topic"] == label
                total += 1
        assert 0.8 < right / total < 0.98

    def test_a_boolean_is_true_where_its_words_are_found(self) -> None:
        """The property's name and description say what makes it true."""
        schema: Schema = {
            "type": "object",
            "properties": {"urgent": {"type": "boolean", "description": "outage, deadline, production down"}},
            "required": ["urgent"],
        }
        shares = []
        for text in ("Production is down since nine", "Thanks for the nice mug"):
            bodies = [body(f"{text} {number}", response_format=shaped(schema)) for number in range(100)]
            shares.append(sum("true" in content(ask(Service(OPEN), one)) for one in bodies) / 100)
        assert shares[0] > 0.75 > 0.25 > shares[1]

    def test_json_without_a_schema_is_a_small_object(self) -> None:
        """`json_object` gets an object."""
        answer = ask(Service(OPEN), body(response_format={"type": "json_object"}))
        assert msgspec.json.decode(content(answer), type=dict[str, str | float])

    def test_plain_text_mentions_the_prompt(self) -> None:
        """Without a format the answer speaks in words of the prompt."""
        text = content(ask(Service(OPEN), body()))
        assert set(text.lower().strip(".").replace(",", "").split()) & {"parcel", "never", "came", "express", "please"}

    @given(st.text(max_size=300), st.integers(0, 40), st.sampled_from(["none", "low", "high"]), st.integers(1, 3))
    def test_usage_adds_up_and_keeps_to_the_cap(self, prompt: str, cap: int, effort: str, n: int) -> None:
        """Tokens are those of the texts, about 4 bytes each, and no choice passes the cap; a cut one says `length`."""
        answer = ask(Service(OPEN), body(prompt, max_completion_tokens=cap, reasoning_effort=effort, n=n))
        completed, whole = read(answer), read(ask(Service(OPEN), body(prompt, reasoning_effort=effort, n=n)))
        usage = completed.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens == -(-len(prompt.encode()) // 4)
        assert [choice.index for choice in completed.choices] == list(range(n))
        spent = 0
        for choice, full in zip(completed.choices, whole.choices, strict=True):
            assert isinstance(choice.message, Reply)
            assert isinstance(full.message, Reply)
            assert full.message.content is not None
            assert choice.message.content is not None
            assert full.message.content.startswith(choice.message.content)
            assert choice.finish_reason == ("stop" if choice.message == full.message else "length")
            size = tokens(choice.message.content) + tokens(choice.message.reasoning or "")
            assert size == cap if choice.finish_reason == "length" else size <= cap
            spent += size
        assert usage.completion_tokens == spent

    def test_the_same_question_has_the_same_answer(self) -> None:
        """Model, seed and prompt decide the words; the simulator's own seed gives another service."""
        service = Service(OPEN)
        prompt = "What about apples, bananas, cherries, dates, elderberries, figs and grapes?"
        assert content(ask(service, body(prompt))) == content(ask(service, body(prompt, temperature=1.5)))
        others = [
            ask(service, body(prompt, seed=1)),
            ask(service, body(prompt, model="zai-glm-4.7")),
            ask(Service(replace(OPEN, seed=1)), body(prompt)),
        ]
        assert len({content(answer) for answer in [ask(service, body(prompt)), *others]}) == 4


class TestErrors:
    """What the service refuses."""

    @pytest.mark.parametrize(
        ("request_body", "param"),
        [
            (b"{", ""),
            (b"[]", ""),
            (b'"\xff"', ""),
            (b'{"messages": [{"role": "user", "content": "x"}]}', "model"),
            (b'{"model": "gpt-oss-120b"}', "messages"),
            (b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}', "model"),
            (b'{"model": "gpt-oss-120b", "messages": []}', "messages"),
            (b'{"model": "gpt-oss-120b", "messages": [{"content": "x"}]}', "messages[0].role"),
            (b'{"model": "gpt-oss-120b", "messages": [{"role": "user"}]}', "messages[0].content"),
            (body(temperature="hot"), "temperature"),
            (body(temperature=3), "temperature"),
            (body(n=0), "n"),
            (body(stop=["a"] * 5), "stop"),
            (body(stream="yes"), "stream"),
            (body(response_format={"type": "json_schema"}), "response_format.json_schema"),
            (body(response_format={"type": "xml"}), "response_format.type"),
            (body(response_format=shaped([])), "response_format.json_schema.schema"),  # type: ignore[arg-type]
        ],
    )
    def test_a_wrong_request_is_told_which_parameter(self, request_body: bytes, param: str) -> None:
        """A missing, mistyped or out-of-range parameter is a 400 that names it, and charges nothing."""
        service = Service(Settings(requests_per_minute=1))
        answer = ask(service, request_body)
        assert answer.status == 400
        assert error(answer) == error(answer) | {"type": "invalid_request_error", "param": param}
        assert ask(service, body()).status == 200

    def test_null_is_unset(self) -> None:
        """Optional parameters may be null."""
        unset = dict.fromkeys(
            ("max_completion_tokens", "temperature", "n", "stop", "seed", "stream", "response_format")
        )
        assert ask(Service(OPEN), body(TICKET, **unset)).status == 200

    def test_the_key_is_checked_before_anything_else(self) -> None:
        """No Authorization is 403, a wrong key 401, each with the service's body; a set key is accepted."""
        service = Service(replace(OPEN, key="right"))
        for authorization in (None, "", "Bearer ", "Basic abc"):
            answer = ask(service, b"nonsense", authorization=authorization)
            assert (answer.status, answer.body) == (403, b'{"detail":"Not authenticated"}')
        wrong = ask(service, b"nonsense", authorization="Bearer wrong")
        assert (wrong.status, error(wrong)) == (
            401,
            {
                "message": "Wrong API Key",
                "type": "invalid_request_error",
                "param": "api_key",
                "code": "wrong_api_key",
            },
        )
        assert ask(service, body(), authorization="Bearer right").status == 200

    def test_an_unknown_model_is_not_found(self) -> None:
        """The error names the parameter and the code that clients look for."""
        answer = ask(Service(OPEN), body(model="gpt-9"))
        assert (answer.status, error(answer)["param"], error(answer)["code"]) == (404, "model", "model_not_found")


class TestSockets:
    """The same over HTTP, met by a plain client."""

    def test_the_endpoints_answer_over_http(self) -> None:
        """Chat, completions with several prompts, the models, and what is not there."""

        async def story(service: Simulator, client: aiohttp.ClientSession) -> None:
            async with client.post(f"{service.url}/chat/completions", data=body(n=2)) as answer:
                chat = msgspec.json.decode(await answer.read(), type=Completed)
                assert answer.headers["x-ratelimit-limit-requests-minute"] == "1000"
                assert answer.content_type == "application/json"
            assert (chat.object, chat.model, len(chat.choices)) == ("chat.completion", MODEL, 2)
            request = {"model": "org/model", "prompt": ["One apple.", "Two pears."], "n": 2, "max_tokens": 30}
            async with client.post(f"{service.url}/completions", json=request) as answer:
                completion = msgspec.json.decode(await answer.read(), type=Completed)
            texts = [choice.text for choice in completion.choices]
            assert completion.object == "text_completion"
            assert [isinstance(text, str) and ("apple" in text, "pears" in text) for text in texts] == [
                (True, False),
                (True, False),
                (False, True),
                (False, True),
            ]
            async with client.get(f"{service.url}/models") as answer:
                listed = await answer.json()
            assert [model["id"] for model in listed["data"]] == [MODEL, "org/model"]
            async with client.get(f"{service.url}/models/org/model") as answer:
                assert await answer.json() == listed["data"][1]
            async with client.get(f"{service.url}/models/none") as answer:
                assert (answer.status, (await answer.json())["code"]) == (404, "model_not_found")
            async with client.get(f"{service.url}/batches") as answer:
                assert (answer.status, answer.content_type, await answer.read()) == (404, "text/plain", b"")
            async with client.get(f"{service.url}/chat/completions") as answer:
                assert answer.status == 405

        play(Settings(models=(MODEL, "org/model"), latency=0), story)

    @pytest.mark.parametrize(
        ("fault", "seen"),
        [
            ("reset", "ClientOSError"),
            ("hang", "ClientOSError"),
            ("cut", "ClientPayloadError"),
            ("malformed", "no JSON"),
            ("html", "no JSON"),
            ("empty", "no choices"),
            ("error200", "error"),
            ("503", "503"),
            ("surrogate", "answer"),
            ("slow", "answer"),
        ],
    )
    def test_faults_are_real_on_the_wire(self, fault: str, seen: str) -> None:
        """A client meets each fault as it would meet it in life."""

        async def story(service: Simulator, client: aiohttp.ClientSession) -> None:
            assert (await meet(service, client, body()))[0] == seen
            assert [entry.fault for entry in service.book] == [fault]

        play(replace(OPEN, faults={fault: 1}, hang=0.01, slow=0.01), story)

    def test_the_book_equals_what_clients_saw(self) -> None:
        """Every request is in the book once, with the answer that its client got and when it left."""
        kinds = ["429", "500", "reset", "cut", "malformed", "html", "empty", "slow", "surrogate", "error200"]
        settings = replace(OPEN, faults=dict.fromkeys(kinds, 0.06), slow=0.001)
        bodies = [body(f"Prompt {number} of many", max_completion_tokens=20) for number in range(300)]
        seen: dict[str, tuple[str, str | None]] = {}

        async def story(service: Simulator, client: aiohttp.ClientSession) -> None:
            waiting = iter(bodies)

            async def work() -> None:
                for one in waiting:
                    seen[sha256(one).hexdigest()] = await meet(service, client, one)

            async with anyio.create_task_group() as workers:
                for _ in range(16):
                    workers.start_soon(work)
            assert len(service.book) == len({entry.body_sha256 for entry in service.book}) == len(bodies)
            assert service.in_flight == 0
            assert 1 <= service.peak_in_flight <= 16
            last = 0.0
            for entry in service.book:
                outcome, text = seen[entry.body_sha256]
                assert entry.content == text
                assert (entry.answered_at is None) == (outcome in ("ClientOSError", "ClientPayloadError"))
                assert (entry.status is None) == (outcome == "ClientOSError")
                if entry.answered_at is not None:
                    assert last <= entry.answered_at
                    assert entry.arrived <= entry.answered_at
                    last = entry.answered_at
            assert {entry.fault for entry in service.book} == {*kinds, None}

        play(settings, story)

    def test_a_client_that_gives_up_frees_its_place(self) -> None:
        """What hangs is in flight until its client leaves; the book says that no answer began."""

        async def story(service: Simulator, client: aiohttp.ClientSession) -> None:
            calls = [
                asyncio.create_task(meet(service, client, body(f"{number}", max_completion_tokens=9)))
                for number in range(5)
            ]
            await until(lambda: service.in_flight == 5)
            for call in calls:
                call.cancel()
            await until(lambda: service.in_flight == 0)
            await asyncio.wait(calls)
            assert [(entry.status, entry.answered_at) for entry in service.book] == [(None, None)] * 5
            assert service.peak_in_flight == 5

        play(replace(OPEN, faults={"hang": 1}), story)

    def test_limits_hold_over_sockets(self) -> None:
        """The refusal on the wire has the body and the headers of its bucket."""

        async def story(service: Simulator, client: aiohttp.ClientSession) -> None:
            outcomes = [await meet(service, client, body(max_completion_tokens=9)) for _ in range(3)]
            assert [outcome for outcome, _ in outcomes] == ["answer", "answer", "429"]
            async with client.post(f"{service.url}/chat/completions", data=body()) as answer:
                assert (await answer.json())["code"] == "request_quota_exceeded"
                assert answer.headers["x-ratelimit-remaining-requests-minute"] == "0"
                assert 0 < float(answer.headers["x-ratelimit-reset-requests-minute"]) <= 60

        play(replace(OPEN, requests_per_minute=2), story)

    def test_garbage_on_the_socket_does_no_harm(self, caplog: pytest.LogCaptureFixture) -> None:
        """Half a request, a compressed body, or no HTTP at all: nothing is complained of, the next client is served."""

        async def story(service: Simulator, client: aiohttp.ClientSession) -> None:
            address, port = service.url.removeprefix("http://").removesuffix("/v1").split(":")
            start = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
            async with await anyio.connect_tcp(address, int(port)) as stream:
                await stream.send(start + b"Content-Length: 100\r\n\r\nabc")
            for garbage in (start + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", b"garbage\r\n\r\n"):
                async with await anyio.connect_tcp(address, int(port)) as stream:
                    await stream.send(garbage)
                    assert b" 400 Bad Request" in await stream.receive()
            assert (await meet(service, client, body()))[0] == "answer"

        play(OPEN, story)
        assert [record.message for record in caplog.records if record.levelname != "DEBUG"] == []

    def test_it_ends_with_requests_in_flight(self) -> None:
        """When the service ends, the clients that wait for an answer lose their connection."""

        async def story() -> None:
            async with aiohttp.ClientSession(headers=HEADERS) as client:
                async with serve(replace(OPEN, faults={"hang": 1})) as service:
                    calls = [asyncio.create_task(meet(service, client, body(f"{number}"))) for number in range(3)]
                    await until(lambda: service.in_flight == 3)
                assert {outcome for outcome, _ in await asyncio.gather(*calls)} == {"ServerDisconnectedError"}
                assert service.in_flight == 0

        anyio.run(story)

    def test_it_runs_on_a_thread_of_its_own(self) -> None:
        """`running` serves a caller that blocks, on the same terms."""

        async def call(service: Simulator) -> str:
            async with aiohttp.ClientSession(headers=HEADERS) as client:
                return (await meet(service, client, body()))[0]

        with running(OPEN, record=True) as service:
            assert asyncio.run(call(service)) == "answer"
            assert [entry.status for entry in service.book] == [200]

    def test_a_taken_port_is_said_in_words(self) -> None:
        """An address in use ends in one line that says what to do."""
        with running() as first:
            port = int(first.url.split(":")[2].removesuffix("/v1"))
            with pytest.raises(JobError, match=rf"cannot listen on 127.0.0.1:{port}: .* in use; choose another port"):
                with running(port=port):
                    pass

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_serves_until_a_signal(self, number: signal.Signals) -> None:
        """`run` tells its URL once it serves, and ends quietly by either signal."""
        code = "from batcher.simulator import *; run(Settings(), '127.0.0.1', 0, lambda url: print(url, flush=True))"
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.send_signal(number)
            rest, complaints = process.communicate(timeout=10)
        assert (process.returncode, rest, complaints) == (0, "", "")


def play(settings: Settings, story: Callable[[Simulator, aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Tell a story with a recorded service and a plain client."""

    async def scene() -> None:
        async with serve(settings, record=True) as service:
            async with aiohttp.ClientSession(headers=HEADERS) as client:
                await story(service, client)

    anyio.run(scene)


async def meet(service: Simulator, client: aiohttp.ClientSession, request: bytes) -> tuple[str, str | None]:
    """What a plain client makes of one chat request: in a word, and the text if there is one."""
    try:
        async with client.post(f"{service.url}/chat/completions", data=request) as answer:
            received = await answer.read()
    except aiohttp.ClientError as failed:
        return type(failed).__name__, None
    if answer.status != 200:
        return str(answer.status), None
    return interpreted(received)


def interpreted(received: bytes) -> tuple[str, str | None]:
    """What a body with status 200 says."""
    try:
        decoded = json.loads(received)
    except ValueError:
        return "no JSON", None
    if "error" in decoded:
        return "error", None
    if not decoded["choices"]:
        return "no choices", None
    return "answer", decoded["choices"][0]["message"]["content"]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the condition, which the other side brings about; fail when it does not."""
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110  (it is about a socket's other end, which sets no event)
            await anyio.sleep(0.002)
