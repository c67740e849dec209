"""What the simulated model says to a question: the choices, within their bounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from msgspec import UNSET

from batcher.simulator import answers, likelihood, vocabulary, wire
from batcher.simulator.recorded import Recorded

LONGEST = 40_960  # tokens of a choice that is to be as long as it can

_EFFORTS: dict[str | None, int] = {"low": 1, "medium": 2, "high": 4}  # sentences of reasoning
_TAGS = ("<think>", "</think>")  # around reasoning that stands in the content; one model family has none
_MOST_CALLS = 3


@dataclass(slots=True)
class Said:
    """What the model said for one choice, in how many tokens."""

    reasoning: str
    content: str
    finish_reason: str
    calls: list[wire.Call] = field(default_factory=list)
    echo: str = ""  # the prompt, where it is given back before the content
    reasoning_tokens: int = 0
    tokens: int = 0  # of all that was said
    accepted: int = 0  # of the predicted tokens
    rejected: int = 0

    def text(self) -> str:
        """What stands in `text` at the completions endpoint."""
        return self.echo + self.content

    def choice(self, index: int, question: wire.Question) -> wire.Choice:
        """The choice on the wire."""
        if not question.chat:
            return wire.Choice(
                index,
                self.finish_reason,
                text=None if question.raw else self.text(),
                tokens=vocabulary.numbers(self.content) if question.raw else UNSET,
                logprobs=UNSET if question.logprobs is None else likelihood.text(self.likely(question)),
            )
        shown = {"raw": "", "hidden": ""}.get(question.format, self.reasoning)
        content = self.reasoning + self.content if question.format == "raw" else self.content
        apart = likelihood.chat(self.thought(question)) if question.format == "parsed" else None
        return wire.Choice(
            index,
            self.finish_reason,
            wire.Reply(
                "assistant",
                None if self.calls and not content else content,
                shown or UNSET,
                self.calls or UNSET,
            ),
            logprobs=UNSET if question.logprobs is None else likelihood.chat(self.likely(question)),
            reasoning_logprobs=apart or UNSET,
        )

    def thought(self, question: wire.Question) -> list[wire.Sampled]:
        """The tokens of the reasoning with their probabilities; none where nobody asked."""
        return [] if question.logprobs is None else likelihood.sampled(self.reasoning, question.logprobs)

    def likely(self, question: wire.Question) -> list[wire.Sampled]:
        """The tokens that `logprobs` tells of: of the content, and of reasoning that is neither hidden nor apart."""
        if question.logprobs is None:
            return []
        # At the completions endpoint the token itself always stands among the likely ones.
        top = question.logprobs if question.chat else max(1, question.logprobs)
        before = self.thought(question) if question.chat and question.format in ("text_parsed", "raw") else []
        before += likelihood.sampled(self.echo, top)
        return before + likelihood.sampled(self.content, top, len(before))


def say(
    question: wire.Question, key: bytes, recorded: Recorded | None = None, *, ending: str = "", misfits: bool = False
) -> list[Said]:
    """The choices of an answer; the same words for the same model, seed and prompt, whatever the other parameters.

    `key` is the service's own seed. `recorded` answers come first. `ending` closes free text; with `misfits` what
    should be JSON, or fit a schema, does not.
    """
    asked = f"{question.model}\0{question.seed}\0{question.text}".encode()
    digest = blake2b(asked, key=key, digest_size=16).digest()
    draw = Random(int.from_bytes(digest))
    said: list[Said] = []
    for asked_prompt in question.prompts:
        known = recorded.find(asked_prompt) if recorded is not None else ()
        prompt = answers.Prompt(asked_prompt)
        for number in range(question.n):
            thoughts = (f"It says: {answers.sentence(prompt, draw)}" for _ in range(_EFFORTS.get(question.effort, 0)))
            reasoning = " ".join(thoughts)
            if question.format == "raw" and reasoning and not question.model.startswith("gpt-oss"):
                reasoning = reasoning.join(_TAGS)
            calls = [] if known else _calls(question, prompt, draw, f"{digest.hex()[:12]}{len(said)}")
            if known:
                content = known[number % len(known)]
            elif calls:
                content = ""
            elif not question.json:
                content = answers.text(prompt, draw, ending)
                if question.prediction:
                    content = _altered(question.prediction, draw, ending)
            else:
                value: answers.Json = (
                    answers.json_object(prompt, draw, ending)
                    if question.schema is None
                    else answers.fitting(question.schema, prompt, draw, ending)
                )
                content = _in_json(value, misfits, question.schema, draw)
            said.append(_bounded(question, reasoning, content, calls))
            if question.echo:
                said[-1].echo = asked_prompt
            if ending and not calls and ending not in said[-1].content:
                said[-1].content += ending
    return said


def given(question: wire.Question, said: Sequence[Said]) -> list[Said]:
    """The choices that are given back: of the candidates for each prompt the first ones."""
    kept = question.n if question.kept is None else question.kept
    return [one for at, one in enumerate(said) if at % question.n < kept]


def _in_json(value: answers.Json, misfits: bool, schema: answers.Schema | None, draw: Random) -> str:
    """The content that carries a value; one that misfits is a list where an object belongs, or talk without an end."""
    if not misfits:
        return wire.ENCODER.encode(value).decode()
    if (schema is None or schema.get("type") == "object") and draw.random() < 0.5:
        return wire.ENCODER.encode([value]).decode()
    return f"Sure, here it is: {wire.ENCODER.encode(value).decode().removesuffix('}')}"  # whole, it would be found


def _altered(prediction: str, draw: Random, ending: str) -> str:
    """The predicted text with one word changed."""
    words = prediction.split(" ")
    words[draw.randrange(len(words))] = "indeed"
    return " ".join(words) + ending


def _calls(question: wire.Question, prompt: answers.Prompt, draw: Random, name: str) -> list[wire.Call]:
    """The tools that the model calls, with arguments that fit; `name` is of this choice.

    A tool is called when it is named or must be, and else when the prompt has a word of its name or description.
    """
    if not question.tools or question.choice == "none" or (question.choice == "auto" and question.after_tool):
        return []
    if question.choice.startswith(":"):
        wanted = [tool for tool in question.tools if f":{tool.name}" == question.choice]
    else:
        wanted = [
            tool for tool in question.tools if not prompt.stems.isdisjoint(answers.clues(tool.name, tool.description))
        ]
        if not wanted and question.choice == "required":
            wanted = [draw.choice(question.tools)]
    return [
        wire.Call(
            wire.Called(
                wire.ENCODER.encode(answers.fitting({"type": "object", **tool.parameters}, prompt, draw)).decode(),
                tool.name,
            ),
            f"call_{name}{position}",
        )
        for position, tool in enumerate(wanted[: _MOST_CALLS if question.parallel else 1])
    ]


def _bounded(question: wire.Question, reasoning: str, content: str, calls: list[wire.Call]) -> Said:
    """A choice that ends at its stop texts, is as long as it must be, and within its cap; reasoning counts first."""
    finish_reason = "tool_calls" if calls else "stop"
    ends = [at for text in question.stop if text and (at := content.find(text)) >= 0]
    if ends:
        content = content[: min(ends)]
    thought, cap = wire.tokens(reasoning), question.cap
    if question.least and not calls:
        most = LONGEST if cap is None else cap
        least = most if question.least == -1 else min(question.least, most)
        content = _longer(content, least - thought, question.json)
    if cap is not None and thought > cap:
        reasoning, thought = vocabulary.first(reasoning, cap), cap
        finish_reason = "length"
    room = None if cap is None else cap - thought
    if room is not None and wire.tokens(content) > room:
        content, finish_reason = vocabulary.first(content, room), "length"
    spoken = wire.tokens(content)
    kept = []
    for call in calls:
        size = wire.tokens(str(call.function.name)) + wire.tokens(call.function.arguments)
        if room is not None and spoken + size > room:
            finish_reason = "length"
            left = room - spoken - wire.tokens(str(call.function.name))
            if left > 0:
                arguments = vocabulary.first(call.function.arguments, left)
                kept.append(wire.Call(wire.Called(arguments, call.function.name), call.id))
                spoken = room
            break
        kept.append(call)
        spoken += size
    said = Said(reasoning, content, finish_reason, kept, reasoning_tokens=thought, tokens=thought + spoken)
    if question.prediction is not None:
        said.accepted = vocabulary.shared(question.prediction, content)
        said.rejected = wire.tokens(question.prediction) - said.accepted
        said.tokens += said.rejected
    return said


def _longer(content: str, least: int, json: bool) -> str:
    """A text of so many tokens at least: it says itself again, JSON gets blanks."""
    missing = least - wire.tokens(content)
    if missing <= 0:
        return content
    if json:
        return content + " " * (missing * wire.BYTES_PER_TOKEN)
    again = f" {content}" if content else " And so on."
    size = len(again.encode())
    whole = content + again * (missing * wire.BYTES_PER_TOKEN // size + 1)
    return vocabulary.first(whole, least)
