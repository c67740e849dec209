"""Whether a list of tiers keeps a deadline, and what that takes of the second tier, in virtual time.

    python -m benchmarks deadline [--seeds N] [--lengths FILE] [--plots DIR]

The client is the whole engine, the service the simulator's model with a capacity for each tier. The first tier's drifts
by half, another way with each seed. It runs alone first: the deadline is then set so that it would have missed it by a
third, and what it had not answered by then are the fewest rows that the second tier must answer, whoever decides.
"""

import asyncio
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from batcher import engine
from batcher.job import from_document
from batcher.simulator import Entry, Front, ModelTransport, Settings, VirtualLoop
from benchmarks import schedule_plots
from benchmarks.measure import CORES
from benchmarks.schedule import source
from benchmarks.schedule_world import CEREBRAS, KEY, KEY_NAME, MEMORY, MODEL, Lengths, Sized, clock, drawn, texts

TIERS = ("flex", "default")
ROWS = 20_000
PLACES = 20
"""Requests that each tier serves at once."""
SPAN = 2_000.0
"""Seconds over which the first tier drifts, about as long as it takes alone."""
LATE = 4 / 3
"""How long the first tier takes alone, in deadlines."""
MOST = 1.1
COURSES: dict[str, tuple[tuple[float, float], ...]] = {
    "falls": ((0.0, 1.0), (SPAN, 0.5)),
    "rises": ((0.0, 0.5), (SPAN, 1.0)),
    "falls and rises": ((0.0, 1.0), (SPAN / 2, 0.5), (SPAN, 1.0)),
    "rises and falls": ((0.0, 0.5), (SPAN / 2, 1.0), (SPAN, 0.5)),
    "waves": tuple((SPAN * at / 10, 1.0 if at % 2 else 0.5) for at in range(11)),
}


class Kept(NamedTuple):
    """What a seed came to."""

    course: str
    deadline: float
    ended: float
    """Seconds after the start."""
    second: int
    """Rows that the second tier has answered."""
    least: int
    """The fewest that would have done."""
    times: tuple[list[float], list[float]]
    """When the answers of each tier came."""

    def rates(self, times: Sequence[float]) -> list[tuple[float, float]]:
        """Answers a second in each of a hundred steps."""
        step = self.ended / 100
        counts = Counter(int(at / step) for at in times)
        return [((number + 0.5) * step, counts[number] / step) for number in range(100)]


def kept(path: str | None, seed: int) -> Kept:
    """One seed: the first tier alone, then both with a deadline."""
    course = [*COURSES][seed % len(COURSES)]
    lengths = drawn(source(path), ROWS, 8, 125, seed)
    alone = played(lengths, course, seed, {"service_tier": "flex"})
    deadline = max(alone[0]) / LATE
    least = sum(1 for answered in alone[0] if answered > deadline)
    first, second = played(lengths, course, seed, {"service_tier": ["flex", "default"], "deadline": deadline})
    return Kept(course, deadline, max(first + second), len(second), least, (first, second))


def played(lengths: Lengths, course: str, seed: int, schedule: dict[str, object]) -> tuple[list[float], list[float]]:
    """When the answers of the first tier came, and those of the second."""
    loop = clock(until=1e6)
    state = random.getstate()
    random.seed(seed)
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            book = runner.run(_run(lengths, course, seed, schedule, loop))
    finally:
        random.setstate(state)
    good = [entry for entry in book if entry.status == 200 and entry.answered_at is not None]
    first, second = (sorted(entry.answered_at or 0.0 for entry in good if entry.tier == tier) for tier in TIERS)
    assert len(first) + len(second) == ROWS
    return first, second


async def _run(
    lengths: Lengths, course: str, seed: int, schedule: dict[str, object], loop: VirtualLoop
) -> Sequence[Entry]:
    os.environ[KEY_NAME] = KEY
    limits = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "uncached_tokens_per_minute"))
    service = Settings(
        answers=Sized(lengths.completions),
        seed=seed,
        cache_tokens=0,
        capacities=dict.fromkeys(TIERS, PLACES),
        drift={"flex": COURSES[course]},
        queue_limit=1.0,
        seconds_per_completion_token=0.06,
        **limits,  # type: ignore[arg-type]
    )
    front = Front(service, loop.time, 1_790_000_000.0, record=True)
    transport = ModelTransport(front, f"Bearer {KEY}", 60.0, CEREBRAS.refusal)
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="batcher-deadline-") as folder:
        document: dict[str, dict[str, object]] = {
            "request": {"model": MODEL, "prompt": "{{ text }}", "max_completion_tokens": 125},
            "service": {"base_url": "https://simulated.invalid/v1", "api_key_env": KEY_NAME, "dialect": "cerebras"},
            "schedule": schedule,
            "output": {"path": "out", "keep": []},
        }
        job = from_document(document, Path(folder), "job.toml")
        await engine.run(job, table=texts(lengths), transport=transport)
    return front.book


def plots(folder: Path, path: str | None) -> None:
    """Draw who answers, for a first tier that falls and one that rises."""
    panels = {}
    for seed, title in enumerate(("flex falls by half", "flex doubles")):
        one = kept(path, seed)
        panels[title] = {name: one.rates(times) for name, times in zip(TIERS, one.times, strict=True)}
    schedule_plots.lines(folder / "schedule-deadline.svg", "answers a second", panels)


def deadline(seeds: int, path: str | None) -> bool:
    """Print what each seed comes to; whether every deadline is kept with few rows of the second tier."""
    good = True
    with ProcessPoolExecutor(len(CORES)) as pool:
        for each in pool.map(partial(kept, path), range(seeds)):
            share, left = each.second / each.least, each.deadline - each.ended
            good = good and left >= 0 and share <= MOST
            print(
                f"  flex {each.course}: deadline {each.deadline:,.0f} s, {left:,.0f} s left; {each.second:,} of "
                f"{ROWS:,} rows in default, {share:.3f} of the fewest",
                flush=True,
            )
    print(f"  in time, at most {MOST} of the fewest rows in the second tier: {'pass' if good else 'MISS'}")
    return good
