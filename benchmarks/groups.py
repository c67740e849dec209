"""What the service's cache gives to rows that share prefixes, grouped and not, in virtual time.

    python -m benchmarks groups [--prefixes N] [--questions FILE]

The client is the whole engine, the service the simulator's model with its caches; only sockets and time are missing.
"""

import asyncio
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batcher import engine
from batcher.job import from_document
from batcher.simulator import Front, ModelTransport, Recorded, Settings, VirtualLoop
from benchmarks.schedule_world import CEREBRAS, KEY, KEY_NAME, MEMORY, MODEL

PREFIX_TOKENS, SHARING, ANSWER_TOKENS = 4_000, 4, 60
REPLICAS = 4
SMALL_CACHE = 200_000
"""Tokens that a replica's cache holds: 50 of the prefixes."""


class Said(Recorded):
    """The same answer for every row."""

    def __init__(self) -> None:
        super().__init__({})

    def find(self, prompt: str) -> tuple[str, ...]:
        """The answer."""
        return ("yes " * ANSWER_TOKENS,)


class Result(NamedTuple):
    """What a run came to."""

    seconds: float
    cached: float
    """Share of the prompts' tokens."""
    replicas: int
    """How many answered something."""


def play(rows: pa.Table, key: str | None, settings: dict[str, Any]) -> Result:
    """Run all rows, in virtual time."""
    loop = VirtualLoop(until=1e6, work=lambda: 0.002)
    state = random.getstate()
    random.seed(0)
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(_play(rows, key, settings, loop))
    finally:
        random.setstate(state)


async def _play(rows: pa.Table, key: str | None, settings: dict[str, Any], loop: VirtualLoop) -> Result:
    os.environ[KEY_NAME] = KEY
    # Of its limits, those of requests do not bind.
    whole = {"requests_per_minute": None, "replicas": REPLICAS, "answers": Said(), **settings}
    front = Front(Settings(**whole), loop.time, 1_790_000_000.0, record=True)
    transport = ModelTransport(front, f"Bearer {KEY}", 60.0, CEREBRAS.refusal)
    request: dict[str, object] = {
        "model": MODEL,
        "system": "{{ prefix }}",
        "prompt": "{{ question }}",
        "max_completion_tokens": ANSWER_TOKENS + 10,
    }
    if key is not None:
        request["prompt_cache_key"] = key
    service = {"base_url": "https://simulated.invalid/v1", "api_key_env": KEY_NAME, "dialect": "cerebras"}
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="batcher-groups-") as folder:
        output = {"path": "out", "keep": []}
        job = from_document({"request": request, "service": service, "output": output}, Path(folder), "job.toml")
        began = loop.time()
        summary = await engine.run(job, table=rows, transport=transport)
        seconds = loop.time() - began
        assert summary.totals.answered == len(rows), summary
        counted = answers(Path(folder, "out", "responses"))
    prompt, cached = (sum(counted[name].to_pylist()) for name in ("prompt_tokens", "cached_tokens"))
    used = sum(1 for replica in range(REPLICAS) if len(front.service._cache(MODEL, replica)))
    return Result(seconds, cached / prompt, used)


def answers(folder: Path) -> pa.Table:
    """All responses of an output."""
    return pa.concat_tables([pq.read_table(path) for path in folder.glob("*.parquet")])


def shared(prefixes: int, sharing: int, shuffled: bool) -> pa.Table:
    """Rows of so many prefixes, so many of each: by prefix, or shuffled."""
    pairs = [(one, each) for one in range(prefixes) for each in range(sharing)]
    if shuffled:
        random.Random(1).shuffle(pairs)
    texts = [f"{number:08d}".ljust(4 * PREFIX_TOKENS, ".") for number in range(prefixes)]
    return pa.table(
        {
            "prefix": [texts[one] for one, _ in pairs],
            "question": [f"question {one} {each}" for one, each in pairs],
        }
    )


def bbh(path: Path) -> tuple[pa.Table, pa.Table]:
    """The questions as they lie, and sorted by task."""
    table = pq.read_table(path, columns=["task", "few_shot", "question"])
    names = ["prefix", "question"]
    lies, ordered = (each.drop_columns(["task"]).rename_columns(names) for each in (table, table.sort_by("task")))
    return lies, ordered


def prompted(rows: int) -> pa.Table:
    """Rows that all have one system prompt."""
    return pa.table(
        {"prefix": ["You are kind. " * 170] * rows, "question": [f"{row:08d} what?" for row in range(rows)]}
    )


def groups(prefixes: int, questions: Path | None) -> bool:
    """Print what each case comes to; whether every bar is met."""
    small, tiny = {"cache_tokens": SMALL_CACHE}, {"cache_tokens": SMALL_CACHE // 40}
    bound = {"capacity": 64, "seconds_per_completion_token": 0.01}
    cases: list[tuple[str, Callable[[], pa.Table], str | None, dict[str, Any]]] = [
        ("shuffled, grouped", lambda: shared(prefixes, SHARING, True), "auto", small),
        ("shuffled", lambda: shared(prefixes, SHARING, True), None, small),
        ("sorted, grouped", lambda: shared(prefixes, SHARING, False), "auto", small),
        ("sorted", lambda: shared(prefixes, SHARING, False), None, small),
        ("one prompt, grouped", lambda: prompted(4_000), "auto", bound),
        ("one prompt", lambda: prompted(4_000), None, bound),
    ]
    if questions is not None:
        cases += [
            ("bbh, grouped", lambda: bbh(questions)[0], "auto", small),
            ("bbh", lambda: bbh(questions)[0], None, small),
            ("bbh sorted, grouped", lambda: bbh(questions)[1], "auto", small),
            ("bbh sorted", lambda: bbh(questions)[1], None, small),
            ("bbh, grouped, tiny caches", lambda: bbh(questions)[0], "auto", tiny),
            ("bbh, tiny caches", lambda: bbh(questions)[0], None, tiny),
            ("bbh sorted, grouped, tiny caches", lambda: bbh(questions)[1], "auto", tiny),
        ]
    found: dict[str, Result] = {}
    for name, rows, key, settings in cases:
        table = rows()
        result = found[name] = play(table, key, settings)
        told = f"cached {result.cached:.1%}, {len(table) / result.seconds * 60:,.0f} rows a minute"
        print(f"  {name}: {told}, {result.replicas} replicas used", flush=True)
    grouped, plain = found["shuffled, grouped"], found["shuffled"]
    ordered = max(found[name].cached for name in ("sorted, grouped", "sorted"))
    one, without = found["one prompt, grouped"], found["one prompt"]
    bars = [
        ("cached share >= 95 % of a full sort's", grouped.cached >= 0.95 * ordered),
        ("rows a minute >= 2 x without groups", 2 * grouped.seconds <= plain.seconds),
        (
            "one prompt: no slower (1 %), all replicas",
            one.seconds <= 1.01 * without.seconds and one.replicas == REPLICAS,
        ),
    ]
    if questions is not None:
        ordered = max(found[name].cached for name in ("bbh sorted, grouped", "bbh sorted"))
        bars.append(("bbh: within 2 points of a full sort", found["bbh, grouped"].cached >= ordered - 0.02))
    for bar, held in bars:
        print(f"  {bar}: {'pass' if held else 'MISS'}")
    return all(held for _, held in bars)
