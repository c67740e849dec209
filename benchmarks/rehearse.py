"""How near a rehearsal comes: forecasts from pilots over sockets, of services whose settings the pilot does not see.

The truth is the real engine over all rows against the same settings, in virtual time.
"""

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

import batcher
from batcher import dialects, engine, rehearse
from batcher.records import Summary
from batcher.simulator import Front, ModelTransport, Settings, running
from benchmarks.measure import Answer
from benchmarks.schedule_world import KEY, KEY_NAME, MEMORY, MODEL, Lengths, Sized, clock, texts

PILOT = 200
NEAR = 0.10
ENOUGH = 9
"""Of ten services."""
_TIMEOUT = 120.0
_NONE = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "uncached_tokens_per_minute"))


@dataclass(frozen=True, slots=True)
class Hidden:
    """A service, and the rows that it is asked: lognormal lengths by their medians and sigmas."""

    settings: Mapping[str, Any]
    rows: int = 2_000
    prompt: tuple[float, float] = (400.0, 0.6)
    completion: tuple[float, float] = (150.0, 0.5)
    cap: int = 1_000


SERVICES: Mapping[str, Hidden] = {
    "requests": Hidden({"requests_per_minute": 300, "latency": 0.4}),
    "tokens": Hidden({"tokens_per_minute": 150_000, "latency": 0.3, "seconds_per_completion_token": 0.004}),
    "tokens kept": Hidden({"uncached_tokens_per_minute": 400_000, "keeps_reservation": True, "latency": 0.5}),
    "capacity 20": Hidden({"capacity": 20, "queue_limit": 3.0, "seconds_per_completion_token": 0.008}),
    "capacity 60": Hidden(
        {"capacity": 60, "queue_limit": 10.0, "latency": 0.6, "seconds_per_completion_token": 0.012}, rows=3_000
    ),
    "slow": Hidden({"latency": 0.5, "seconds_per_completion_token": 0.02, "jitter": 0.3}, completion=(300.0, 0.4)),
    "faults": Hidden({"requests_per_minute": 500, "latency": 0.4, "faults": {"500": 0.03, "reset": 0.02}}),
    "long tail": Hidden({"tokens_per_minute": 300_000, "latency": 0.3}, completion=(120.0, 0.9)),
    "silent refusals": Hidden({"uncached_tokens_per_minute": 200_000, "rate_headers": "answers", "latency": 0.3}),
    "many rows": Hidden({"requests_per_minute": 1_000, "tokens_per_minute": 1_500_000, "latency": 0.8}, rows=12_000),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What was foretold of a service, and what came."""

    forecast: rehearse.Forecast
    seconds: float
    cost: float

    @property
    def errors(self) -> tuple[float, float]:
        """By how much duration and cost were missed, as a share of the truth."""
        assert self.forecast.cost_usd is not None
        return abs(self.forecast.seconds / self.seconds - 1), abs(self.forecast.cost_usd / self.cost - 1)

    @property
    def holds(self) -> bool:
        """Whether the truth lies within both intervals."""
        (least, most), cost = self.forecast.seconds_interval, self.forecast.cost_interval
        assert cost is not None
        return least <= self.seconds <= most and cost[0] <= self.cost <= cost[1]


def rehearsals() -> list[Answer]:
    """All ten services."""
    found = []
    for number, (name, hidden) in enumerate(SERVICES.items()):
        began = time.monotonic()
        one = measured(hidden, seed=number)
        found.append(one)
        late, dear = one.errors
        said = f"{one.forecast.seconds:.1f} s for {one.seconds:.1f} s ({late:.1%})"
        paid = f"${one.forecast.cost_usd:.4f} for ${one.cost:.4f} ({dear:.1%})"
        holds = "holds" if one.holds else "does not hold"
        took = time.monotonic() - began
        print(f"  {name}: {said}, {paid}, the interval {holds}, {took:.0f} s", flush=True)
    near = sum(max(one.errors) <= NEAR for one in found)
    held = sum(one.holds for one in found)
    bar = f"{ENOUGH} of {len(found)} within {NEAR:.0%}, the interval holds for {ENOUGH}"
    if min(near, held) < ENOUGH:
        print(f"MISS: {near} are near, {held} intervals hold")
    return [
        Answer(
            f"duration and cost foretold from a pilot of {PILOT} rows",
            bar,
            bar,
            f"{near} of {len(found)} within {NEAR:.0%}, the interval holds for {held}",
        )
    ]


def measured(hidden: Hidden, seed: int) -> Found:
    """Pilot, forecast and truth of one service."""
    os.environ[KEY_NAME] = KEY
    draw = random.Random(seed)

    def drawn(median: float, sigma: float, most: int) -> list[int]:
        return [min(most, max(8, round(median * draw.lognormvariate(0.0, sigma)))) for _ in range(hidden.rows)]

    lengths = Lengths(drawn(*hidden.prompt, 8_000), drawn(*hidden.completion, hidden.cap))
    settings = Settings(answers=Sized(lengths.completions), seed=seed, cache_tokens=0, **{**_NONE, **hidden.settings})
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="batcher-rehearse-") as name:
        folder = Path(name)
        pq.write_table(texts(lengths), folder / "rows.parquet")
        with running(settings) as service:
            job = _job(folder, service.url, hidden.cap)
            pilot = rehearse.piloted(job, PILOT)
            batcher.run(pilot)
        forecast = rehearse.rehearse(job, rehearse.observe(str(pilot.results.folder)), rehearse.Given())
        truth = _true(folder, settings, hidden.cap, seed)
    cost = truth.totals.cost_usd
    assert cost is not None
    return Found(forecast, truth.seconds, cost)


def _job(folder: Path, url: str, cap: int) -> batcher.Job:
    path = folder / "job.toml"
    document = {
        "name": "rehearse",
        "input": {"path": "rows.parquet"},
        "request": {"model": MODEL, "prompt": "{{ text }}", "max_completion_tokens": cap},
        "service": {
            "base_url": url,
            "api_key_env": KEY_NAME,
            "dialect": "cerebras",
            "timeout": _TIMEOUT,
        },
        "output": {"path": "out", "keep": []},
    }
    path.write_bytes(msgspec.toml.encode(document))
    return batcher.load(path)


def _true(folder: Path, settings: Settings, cap: int, seed: int) -> Summary:
    loop = clock()
    random.seed(seed + 1_000)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(_run(_job(folder, "https://simulated.invalid/v1", cap), settings))


async def _run(job: batcher.Job, settings: Settings) -> Summary:
    front = Front(settings, asyncio.get_running_loop().time, 1_790_000_000.0, record=False)
    transport = ModelTransport(front, f"Bearer {KEY}", _TIMEOUT, dialects.named("cerebras").refusal)
    return await engine.run(job, transport=transport)
