"""The official clients against the simulator, as they are: a test per call, each blocking and asynchronous."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import cerebras.cloud.sdk as cerebras
import msgspec
import openai
import pytest

from batcher.simulator import Settings, running

MODEL = "gpt-oss-120b"
TICKET = "My parcel never came. Please tell me where it is! What is the weather in Berlin?"
ASK: Any = {"model": MODEL, "messages": [{"role": "user", "content": TICKET}]}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
]
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "ticket",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"topic": {"enum": ["delivery", "billing"]}, "urgent": {"type": "boolean"}},
            "required": ["topic", "urgent"],
            "additionalProperties": False,
        },
    },
}
QUICK = Settings(key="right", latency=0, seconds_per_prompt_token=0, seconds_per_completion_token=0)
Call = Callable[[Any], Any]


class Client:
    """One of the four clients, asked in one way: the call is written once and says what it wants of a client."""

    def __init__(self, module: Any, name: str, url: str) -> None:
        self.module = module
        self.name = name
        self.base = url if module is openai else url.removesuffix("/v1")

    def made(self, **options: Any) -> Any:
        """A new client that does not try again."""
        given = {"api_key": "right", "base_url": self.base, "max_retries": 0, **options}
        return getattr(self.module, self.name)(**given)

    def ask(self, call: Call, **options: Any) -> Any:
        """What a call returns; of a stream the list of its chunks."""
        if not self.name.startswith("Async"):
            with self.made(**options) as client:
                answer = call(client)
                return list(answer) if isinstance(answer, openai.Stream | cerebras.Stream) else answer

        async def main() -> Any:
            async with self.made(**options) as client:
                answer = await cast(Awaitable[Any], call(client))
                if isinstance(answer, openai.AsyncStream | cerebras.AsyncStream):
                    return [chunk async for chunk in answer]
                return answer

        return asyncio.run(main())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A simulator with a key and no delays."""
    with running(QUICK) as service:
        yield service.url


@pytest.fixture(params=["OpenAI", "AsyncOpenAI", "Cerebras", "AsyncCerebras"])
def client(request: pytest.FixtureRequest, url: str) -> Client:
    """Each client of both packages."""
    return client_of(request.param, url)


def client_of(name: str, url: str) -> Client:
    """The client of that name."""
    return Client(openai if name.endswith("OpenAI") else cerebras, name, url)


def test_models_are_listed(client: Client) -> None:
    """`models.list` gives those that are served."""
    if client.name == "AsyncOpenAI":  # its list is an awaitable that is an iterator too

        async def main() -> list[str]:
            async with client.made() as one:
                return [model.id async for model in one.models.list()]

        names = asyncio.run(main())
    else:
        names = [model.id for model in client.ask(lambda one: one.models.list()).data]
    assert MODEL in names


def test_a_model_is_retrieved(client: Client) -> None:
    """`models.retrieve` gives one."""
    assert client.ask(lambda one: one.models.retrieve(MODEL)).id == MODEL


def test_a_chat_is_answered(client: Client) -> None:
    """A message, why it ended, and a usage that adds up."""
    answer = client.ask(lambda one: one.chat.completions.create(**ASK))
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.service_tier is None


def test_a_chat_with_many_parameters_is_answered(client: Client) -> None:
    """What both packages know of is accepted."""
    answer = client.ask(
        lambda one: one.chat.completions.create(
            **ASK,
            frequency_penalty=0.1,
            presence_penalty=-0.1,
            logit_bias={"12": 3},
            max_completion_tokens=10,
            n=2,
            parallel_tool_calls=False,
            prompt_cache_key="k",
            reasoning_effort="low",
            seed=7,
            stop=["zzz"],
            temperature=0.3,
            top_p=0.9,
            user="u",
            service_tier="auto",
            response_format={"type": "text"},
        )
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.service_tier == "auto"
    assert answer.service_tier_used in ("priority", "default")


def test_reasoning_is_given_back(client: Client) -> None:
    """In the message's own field, and counted."""
    answer = client.ask(lambda one: one.chat.completions.create(**ASK, reasoning_effort="high"))
    assert answer.choices[0].message.reasoning
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_predictions_are_counted(client: Client) -> None:
    """Accepted and rejected tokens stand in the usage."""
    text = "one two three four five six seven eight nine ten " * 4
    prediction = {"type": "content", "content": text}
    details = client.ask(
        lambda one: one.chat.completions.create(**ASK, prediction=prediction)
    ).usage.completion_tokens_details
    assert details.accepted_prediction_tokens > details.rejected_prediction_tokens > 0


def test_a_chat_is_streamed(client: Client) -> None:
    """Chunks that come to the same answer, with the usage in the last one."""
    answer = client.ask(lambda one: one.chat.completions.create(**ASK))
    chunks = client.ask(lambda one: one.chat.completions.create(**ASK, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_a_stream_includes_its_usage_when_asked(client: Client) -> None:
    """In one more chunk without choices."""
    chunks = client.ask(
        lambda one: one.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


def test_tools_are_called_and_answered(client: Client) -> None:
    """A call with arguments that fit, whose answer the next turn takes in."""
    answer = client.ask(lambda one: one.chat.completions.create(**ASK, tools=TOOLS, tool_choice="auto"))
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    [call] = message.tool_calls
    assert call.function.name == "get_weather"
    assert set(msgspec.json.decode(call.function.arguments)) == {"city", "unit"}
    turns: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude_none=True)]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    again = client.ask(lambda one: one.chat.completions.create(model=MODEL, messages=turns, tools=TOOLS))
    assert again.choices[0].message.content
    assert again.choices[0].finish_reason == "stop"


def test_tool_calls_are_streamed(client: Client) -> None:
    """The arguments come in parts and make the same call."""
    forced: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.ask(lambda one: one.chat.completions.create(**ASK, tools=TOOLS, tool_choice=forced))
    chunks = client.ask(lambda one: one.chat.completions.create(**ASK, tools=TOOLS, tool_choice=forced, stream=True))
    parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    [call] = answer.choices[0].message.tool_calls
    assert len(parts) > 2
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments
    assert (parts[0].id, parts[0].function.name) == (call.id, call.function.name)


def test_schemas_are_fitted(client: Client) -> None:
    """With a strict schema, and as any JSON object."""
    answer = client.ask(lambda one: one.chat.completions.create(**ASK, response_format=SCHEMA))
    assert set(msgspec.json.decode(answer.choices[0].message.content)) == {"topic", "urgent"}
    form: Any = {"type": "json_object"}
    answer = client.ask(lambda one: one.chat.completions.create(**ASK, response_format=form))
    assert isinstance(msgspec.json.decode(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("name", ["OpenAI", "AsyncOpenAI"])
def test_openai_parses_into_models(name: str, url: str) -> None:
    """Its helper that makes a strict schema of a class is served too."""
    from pydantic import BaseModel

    class Ticket(BaseModel):
        """What is wanted."""

        topic: str
        urgent: bool

    answer = client_of(name, url).ask(lambda one: one.chat.completions.parse(**ASK, response_format=Ticket))
    assert isinstance(answer.choices[0].message.parsed, Ticket)


def test_log_probabilities_are_told(client: Client) -> None:
    """Of each token, with the likely ones; streamed they are the same."""
    told: Any = {"logprobs": True, "top_logprobs": 3}
    answer = client.ask(lambda one: one.chat.completions.create(**ASK, **told))
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    assert {len(token.top_logprobs) for token in tokens} == {3}
    chunks = client.ask(lambda one: one.chat.completions.create(**ASK, **told, stream=True))
    streamed = [one for chunk in chunks if (told := chunk.choices[0].logprobs) for one in told.content]
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in tokens]


@pytest.mark.parametrize("prompt", ["One apple.", ["One apple.", "Two pears."], [1, 2, 3], [[1, 2], [3]]])
def test_a_completion_is_answered(client: Client, prompt: Any) -> None:
    """Of a text, of several, of tokens, of several lists of them; a choice for each, in order."""
    answer = client.ask(lambda one: one.completions.create(model=MODEL, prompt=prompt, max_tokens=30, n=2))
    count = len(prompt) if isinstance(prompt[0], list) or (isinstance(prompt, list) and prompt[0] != 1) else 1
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == list(range(2 * count))
    assert all(choice.text for choice in answer.choices)


def test_a_completion_is_streamed(client: Client) -> None:
    """With the prompt given back and log probabilities."""
    wanted: Any = {"model": MODEL, "prompt": TICKET, "echo": True, "logprobs": 2, "best_of": 1}
    answer = client.ask(lambda one: one.completions.create(**wanted))
    chunks = client.ask(lambda one: one.completions.create(**wanted, stream=True))
    choice = answer.choices[0]
    assert choice.text.startswith(TICKET)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == choice.text
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for one in told for token in one.tokens] == choice.logprobs.tokens
    assert [offset for one in told for offset in one.text_offset] == choice.logprobs.text_offset


@pytest.mark.parametrize(
    ("faults", "options", "changed", "error", "status"),
    [
        ({}, {}, {"temperature": 9}, "BadRequestError", 400),
        ({}, {"api_key": "wrong"}, {}, "AuthenticationError", 401),
        ({"403": 1}, {}, {}, "PermissionDeniedError", 403),
        ({}, {}, {"model": "gpt-9"}, "NotFoundError", 404),
        ({"409": 1}, {}, {}, "ConflictError", 409),
        ({"422": 1}, {}, {}, "UnprocessableEntityError", 422),
        ({"429": 1}, {}, {}, "RateLimitError", 429),
        ({"500": 1}, {}, {}, "InternalServerError", 500),
        ({"502": 1}, {}, {}, "InternalServerError", 502),
        ({"503": 1}, {}, {}, "InternalServerError", 503),
        ({"504": 1}, {}, {}, "InternalServerError", 504),
    ],
)
@pytest.mark.parametrize("name", ["OpenAI", "AsyncOpenAI", "Cerebras", "AsyncCerebras"])
def test_an_error_is_of_its_own_class(
    name: str, faults: dict[str, float], options: Any, changed: Any, error: str, status: int
) -> None:
    """The package's exception for the status, with the service's words where there are any."""
    with running(replace(QUICK, faults=faults)) as service:
        client = client_of(name, service.url)
        with pytest.raises(getattr(client.module, error)) as failed:
            client.ask(lambda one: one.chat.completions.create(**{**ASK, **changed}), **options)
    assert failed.value.status_code == status
    if status in (401, 404):
        body = cast(dict[str, str], failed.value.body)
        assert body["code"] == {401: "wrong_api_key", 404: "model_not_found"}[status]


@pytest.mark.parametrize("name", ["OpenAI", "AsyncOpenAI", "Cerebras", "AsyncCerebras"])
def test_an_error_in_the_middle_of_a_stream_is_raised(name: str) -> None:
    """By the package's exception; Cerebras' has the class of the status in the event."""
    with running(replace(QUICK, faults={"broken": 1})) as service:
        client = client_of(name, service.url)
        error = cerebras.InternalServerError if client.module is cerebras else openai.APIError
        with pytest.raises(error, match="Internal Server Error"):
            client.ask(lambda one: one.chat.completions.create(**ASK, stream=True))


@pytest.mark.parametrize("name", ["OpenAI", "AsyncOpenAI", "Cerebras", "AsyncCerebras"])
def test_a_ragged_stream_is_read_as_any_other(name: str) -> None:
    """Comments, odd lines and odd pieces are within the standard."""
    read = []
    for faults in ({}, {"ragged": 1.0}):
        with running(replace(QUICK, faults=faults)) as service:
            chunks = client_of(name, service.url).ask(lambda one: one.chat.completions.create(**ASK, stream=True))
            read.append([choice.model_dump() for chunk in chunks for choice in chunk.choices])
    assert read[0] == read[1]
