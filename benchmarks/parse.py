"""What reading an answer costs: microseconds of CPU on one core, for the quickstart's schema and for labels."""

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec

from batcher.parse import AnswerSchema, Choices, Parser, Pattern
from batcher.records import Misfit
from benchmarks import workload
from benchmarks.measure import CLIENT_CORE, Answer, Spread, pin
from benchmarks.payload import cpu, show

SCHEMA = json.loads((Path(__file__).parents[1] / "jobs/ticket.schema.json").read_text())
ANSWERS = 2_000
MUST = 20.0


def parse() -> list[Answer]:
    """Parse and check, then what each step of it costs, then the column, then other ways to read."""
    pin(CLIENT_CORE)
    tickets = [ticket(seed) for seed in range(ANSWERS)]
    schema = AnswerSchema(SCHEMA, "ticket")
    fenced = [f"Here it is:\n```json\n{text}\n```" for text in tickets]
    labels = Choices(["bug", "billing", "access", "other"])
    thinking = [f"{workload.VOCABULARY[:400]}\nSo the label is **bug**." for _ in tickets]
    values = [json.loads(text) for text in tickets]
    validator = jsonschema_rs.validator_for(SCHEMA)
    lines: list[tuple[str, str, Callable[[], object]]] = [
        ("parse and check, jobs/ticket.schema.json", f"{MUST:.0f} µs", reading(schema, tickets)),
        ("of it msgspec's decoding", "", partial(each, msgspec.json.decode, tickets)),
        ("of it jsonschema-rs's check", "", partial(each, validator.validate, values)),
        ("the same in prose and a fence", "", reading(schema, fenced)),
        ("the column of such values", "", partial(schema.column, values)),
        ("choices", "", reading(labels, ["**Bug.**"] * ANSWERS)),
        ("a pattern and choices, in 400 characters", "", reading(Pattern(r"label is (\S+)", labels), thinking)),
    ]
    return [Answer(name, must, "", show(cost(function))) for name, must, function in lines]


def ticket(seed: int) -> str:
    """An answer as models write it."""
    luck = random.Random(seed)
    kinds = SCHEMA["properties"]
    made = {
        "category": luck.choice(kinds["category"]["enum"]),
        "urgency": luck.choice(kinds["urgency"]["enum"]),
        "summary": f"The customer wants: {' '.join(luck.choices(workload.VOCABULARY.split(), k=14))}.",
        "needs_human": luck.random() < 0.5,
    }
    return json.dumps(made)


def reading(parser: Parser, texts: Sequence[str]) -> Callable[[], object]:
    """A function that reads all texts, each of which fits."""
    assert not any(isinstance(parser.read(text), Misfit) for text in texts)
    return partial(each, parser.read, texts)


def each(function: Callable[[Any], object], texts: Sequence[Any]) -> None:
    """Call a function with each of these."""
    for text in texts:
        function(text)


def cost(function: Callable[[], object]) -> Spread:
    """Microseconds of CPU per answer."""
    spread = cpu(function)
    return Spread(spread.median / ANSWERS, spread.low / ANSWERS, spread.high / ANSWERS)
