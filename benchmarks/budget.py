"""What a budget holds when everything goes wrong: half of a job's cost, 512 in flight, 20 kills, 1 % timeouts."""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

import batcher
from batcher import dialects, engine
from batcher.errors import PausedError
from batcher.ledger import open_read_only, spending_of
from batcher.records import Spending, Summary
from batcher.simulator import Entry, Front, ModelTransport, Settings, VirtualLoop, running
from benchmarks.measure import ROOT, Answer

ROWS = 60_000
IN_FLIGHT = 512
KILLS = 20
LEAST = 0.97
"""The share of a budget that has to be used, or held for requests of which nobody knows."""
_CAP, _SHORTEST = 400, 380
_INPUT, _OUTPUT = 0.35e-6, 0.75e-6
_EACH = 15 * _INPUT + 390 * _OUTPUT
"""USD that a row costs on average, about."""
_BUDGET = ROWS * _EACH / 2
_TIMEOUT = 20.0
_SERVICE = {
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "latency": 0.1,
    "seconds_per_completion_token": 0.000_2,
    "faults": {"hang": 0.01},
    "hang": 3600.0,
}


@dataclass(frozen=True, slots=True)
class Spent:
    """What became of a budget: USD by the service's book and by the ledger, and how often the run was killed."""

    billed: float
    noted: Spending
    kills: int

    @property
    def used(self) -> float:
        """The share of the budget that was spent or is held."""
        return self.noted.usd / _BUDGET


def budget(seeds: int) -> list[Answer]:
    """In virtual time by many seeds, and once over sockets with processes that are really killed."""
    answers = []
    for name, stories in (
        (f"in virtual time, {seeds} seeds", [_virtual] * seeds),
        ("over sockets, SIGKILL", [_sockets]),
    ):
        found: list[Spent] = []
        for seed, story in enumerate(stories):
            began = time.monotonic()
            found.append(story(seed))
            one = found[-1]
            said = f"billed ${one.billed:.4f}, noted ${one.noted.usd:.4f} (lost ${one.noted.lost:.4f})"
            took = time.monotonic() - began
            print(f"  {name}, seed {seed}: {said} of ${_BUDGET:.4f}, {one.kills} kills, {took:.0f} s", flush=True)
        most = max(one.billed for one in found) / _BUDGET
        least = min(one.used for one in found)
        answers.append(
            Answer(
                f"half of a job's cost as its budget, {IN_FLIGHT} in flight, {KILLS} kills, 1 % timeouts: {name}",
                f"billed at most 100 %, used or held at least {LEAST:.0%}",
                "the same",
                f"billed at most {most:.1%}, used or held at least {least:.2%}",
            )
        )
        for one in found:
            if not (one.billed <= one.noted.usd + 1e-9 <= _BUDGET + 2e-9 and one.used >= LEAST and one.kills == KILLS):
                raise SystemExit(f"the budget is not held, or not used: {one} of {_BUDGET}")
    return answers


def _bill(book: list[Entry]) -> float:
    """USD that the service charges: for all that it answered, whoever heard of it."""
    return sum(_INPUT * entry.prompt_tokens + _OUTPUT * entry.completion_tokens for entry in book)


def _write(folder: Path, url: str) -> Path:
    texts = pa.array([f"[row {row:05d}] Say something about the sea." for row in range(ROWS)])
    pq.write_table(pa.table({"text": texts}), folder / "rows.parquet")
    sections = {
        "input": {"path": "rows.parquet"},
        "request": {
            "model": "gpt-oss-120b",
            "prompt": "{{ text }}",
            "max_completion_tokens": _CAP,
            "min_completion_tokens": _SHORTEST,
        },
        "service": {"base_url": url, "api_key_env": "BENCHMARK_API_KEY", "dialect": "cerebras", "timeout": _TIMEOUT},
        "schedule": {"max_in_flight": IN_FLIGHT, "budget_usd": _BUDGET},
        "output": {"path": "out", "rows_per_part": 5_000, "keep": []},
    }
    path = folder / "job.toml"
    path.write_bytes(msgspec.toml.encode({"name": "budget", **sections}))
    os.environ["BENCHMARK_API_KEY"] = "benchmark"
    return path


def _noted(output: Path) -> Spending:
    with open_read_only(output / "ledger.sqlite") as ledger:
        spent = spending_of(ledger)
    assert spent is not None
    return spent


# Over sockets


def _sockets(seed: int) -> Spent:
    chance = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="batcher-benchmark-") as name,
        running(Settings(**_SERVICE, seed=seed), record=True) as service,  # type: ignore[arg-type]
    ):
        path = _write(Path(name), service.url)
        for _ in range(KILLS):
            seen = len(service.book)
            process = _start(path)
            while len(service.book) == seen:
                if process.poll() is not None:
                    raise SystemExit(f"the run ended with {process.returncode} before it was killed")
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
            process.wait()
        if (code := _start(path).wait()) != PausedError.exit_code:
            raise SystemExit(f"the run ended with {code}")
        output = path.parent / "out"
        summary = msgspec.json.decode((output / "summary.json").read_bytes(), type=Summary)
        noted = _noted(output)
        assert summary.spent == noted
        return Spent(_bill(service.book), noted, KILLS)


def _start(path: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "batcher", "run", str(path), "--quiet"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


# In virtual time


def _virtual(seed: int) -> Spent:
    """The same with a clock of its own; a kill takes a picture of the disk, from which the next run goes on."""
    chance = random.Random(seed)
    random.seed(seed)
    with tempfile.TemporaryDirectory(prefix="batcher-benchmark-") as name:
        folder = Path(name)
        path = _write(folder, "https://simulated.invalid/v1")
        clock: list[Callable[[], float]] = [lambda: 0.0]
        front = Front(Settings(**_SERVICE, seed=seed), lambda: clock[0](), 1_790_000_000.0, record=True)  # type: ignore[arg-type]
        now, output = 0.0, folder / "out0"
        for number in range(KILLS + 1):
            loop = VirtualLoop(now, work=lambda: chance.uniform(0.0, 0.004))
            clock[0] = loop.time
            after = chance.uniform(0.05, 0.3) if number < KILLS else None
            with asyncio.Runner(loop_factory=lambda made=loop: made) as runner:  # type: ignore[misc]
                runner.run(_life(path, front, output, folder / f"out{number + 1}", after))
            now = loop.time() + 1
            if after is not None:
                shutil.rmtree(output)
                output = folder / f"out{number + 1}"
        noted = _noted(output)
        return Spent(_bill(front.book), noted, KILLS)


async def _life(path: Path, front: Front, output: Path, picture: Path, after: float | None) -> None:
    """One run, killed so many seconds after its beginning."""
    line = ModelTransport(front, "Bearer benchmark", _TIMEOUT, dialects.named("cerebras").refusal)
    job = batcher.load(path, [f"output.path={output.name}"])
    task = asyncio.create_task(engine.run(job, transport=line))
    if after is None:
        try:
            await task
        except PausedError:
            return
        raise SystemExit("the budget was never reached")
    await asyncio.wait([task], timeout=after)
    if task.done():
        raise SystemExit(f"the run ended before it was killed: {task.exception()}")
    line.cut = True
    shutil.copytree(output, picture, ignore=shutil.ignore_patterns("*.reserve"))
    task.cancel()
    await asyncio.wait([task])
