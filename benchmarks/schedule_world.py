"""A run in virtual time: the service, what happens to it, a client, and the books of both.

The client is the real engine, whole: `engine.run` with its feed, dispatcher, attempts, retries, ledger and Parquet.
Only the sockets are missing (`ModelTransport`), and time is the event loop's (`VirtualLoop`).
"""

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batcher import dialects, engine
from batcher.errors import BatcherError
from batcher.job import from_document
from batcher.records import Failure, Kind, Reply, Request, Snapshot
from batcher.simulator import Entry, Front, ModelTransport, Recorded, Settings, VirtualLoop
from benchmarks.schedule_books import Booked, Books, Level, Seen, Sent

MODEL = "gpt-oss-120b"
CEREBRAS = dialects.named("cerebras")
KEY = "csk-benchmark-0000000000"
KEY_NAME = "BATCHER_BENCHMARK_KEY"
ROUND_TRIP = 0.05
"""Seconds that a refused connection takes, as every other refusal."""
DISK = 0.002
"""Seconds that work on a thread takes: mostly, that the disk does."""
TICK = 1e-6
"""Seconds that a timer takes at least."""
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and completion tokens of rows, and which of them are the long ones."""

    prompts: Sequence[int]
    completions: Sequence[int]
    long: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Event:
    """At a moment the service becomes otherwise, or, with a `Kind`, nobody can connect to it; None: one can again."""

    at: float
    settings: Mapping[str, object] = field(default_factory=dict)
    unreachable: Kind | None = None


class Sized(Recorded):
    """Answers as long as is said for each row, whose number every prompt begins with."""

    def __init__(self, completions: Sequence[int]) -> None:
        super().__init__({})
        self._completions = completions

    def find(self, prompt: str) -> tuple[str, ...]:
        """The answer to a row's prompt."""
        return ("yes " * self._completions[int(prompt[:8])],)


def prompt(row: int, tokens: int) -> str:
    """A text of so many tokens that begins with the row's number; nothing of it is like another's."""
    return f"{row:08d}".ljust(tokens * 4, ".")


class Line:
    """The client's way to the service, which notes what goes over it."""

    def __init__(self, inner: ModelTransport, sent: list[Sent]) -> None:
        self.inner = inner
        self.name = inner.name
        self._sent = sent
        self._now = asyncio.get_running_loop().time

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once."""
        sent = Sent(request.row, self._now())
        self._sent.append(sent)
        result = await self.inner.send(request)
        if isinstance(result, Failure):
            sent.failure = result.kind
            if result.kind is self.inner.unreachable:
                await asyncio.sleep(ROUND_TRIP)
        sent.ended = self._now()
        return result

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path."""
        return await self.inner.get(path)

    async def close(self) -> None:
        """Close every connection."""
        await self.inner.close()


@dataclass(slots=True)
class World:
    """A service with its weather, and a client's run of `seconds` against it."""

    seconds: float
    lengths: Lengths
    cap: int
    settings: Mapping[str, Any]
    events: Sequence[Event]
    schedule: Mapping[str, object]
    timeout: float
    seed: int
    outage: tuple[float, float] = (0.0, 0.0)
    learned: bool = False
    """Whether our own client learns the output cap; others send `cap`."""
    books: Books = field(init=False)

    def __post_init__(self) -> None:
        self.books = Books(self.seconds, outage=self.outage)


def clock(until: float = inf) -> VirtualLoop:
    """Virtual time in which work on a thread and every timer take some."""
    return VirtualLoop(until=until, work=lambda: DISK, tick=TICK)


Client = Callable[[World, Line], Awaitable[None]]
"""Asks until it is told to end by the end of the run: by SIGTERM, or by being cancelled."""


def play(world: World, client: Client, refusal: Callable[[Reply], Failure] = CEREBRAS.refusal) -> Books:
    """Let a client run against a world, in virtual time; the same seed gives the same books.

    `refusal` is what the client makes of an answer with another status than 200.
    """
    loop = clock(until=world.seconds + 3600.0)
    state = random.getstate()
    random.seed(world.seed)  # the jitter of waits
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_play(world, client, refusal, loop))
    finally:
        random.setstate(state)
    return world.books


async def _play(world: World, client: Client, refusal: Callable[[Reply], Failure], loop: VirtualLoop) -> None:
    front = Front(settings_of(world), loop.time, 1_790_000_000.0, record=True)
    transport = ModelTransport(front, f"Bearer {KEY}", world.timeout, refusal)
    line = Line(transport, world.books.sent)

    def look() -> None:
        world.books.levels.append(level(front, loop.time(), loop.time()))

    def happen(event: Event) -> None:
        transport.unreachable = event.unreachable
        front.service.change(loop.time(), **event.settings)
        look()

    for second in range(int(world.seconds) + 1):
        loop.call_at(float(second), look)
    for event in world.events:
        loop.call_at(event.at, happen, event)
    task = asyncio.ensure_future(client(world, line))
    loop.call_at(world.seconds, lambda: loop.deliver(signal.SIGTERM) or task.cancel())
    with suppress(asyncio.CancelledError):
        await task
    assert loop.time() > world.seconds - 1e-3, "the client had no more to ask before the end: too few rows"
    world.books.booked = booked(front.book, 0.0)


def settings_of(world: World) -> Settings:
    """The service of a world."""
    return Settings(answers=Sized(world.lengths.completions), seed=world.seed, cache_tokens=0, **world.settings)


def level(front: Front, now: float, at: float) -> Level:
    """What is in the buckets at a moment of the service's clock, which the books call `at`."""
    settings = front.service.settings
    there, limits = front.service.levels(MODEL, now), settings.limits_of(MODEL, "default")
    return Level(at, there, limits, settings.others, sum(settings.places("", at)))


def booked(book: Sequence[Entry], origin: float) -> list[Booked]:
    """The service's book, with times from an origin of its clock."""
    return [
        Booked(
            entry.arrived - origin,
            None if entry.answered_at is None else entry.answered_at - origin,
            entry.status,
            None if entry.served_at is None else entry.served_at - origin,
            entry.charged > 0,
            (1.0, float(entry.settled), float(entry.settled_uncached)) if entry.charged else (0.0, 0.0, 0.0),
        )
        for entry in book
    ]


async def ours(world: World, line: Line) -> None:
    """The real engine, over rows in memory and an output in memory."""
    os.environ[KEY_NAME] = KEY
    table, books, now = texts(world.lengths), world.books, asyncio.get_running_loop().time

    def watch(snapshot: Snapshot) -> None:
        books.seen.append(Seen(now(), snapshot.in_flight, snapshot.window, snapshot.binds))
        books.failed = snapshot.failed

    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="batcher-schedule-") as folder:
        document = job_of(world, "https://simulated.invalid/v1")
        job = from_document(document, Path(folder), "job.toml")
        with suppress(BatcherError):  # it is asked to end
            await engine.run(job, table=table, transport=line, watch=watch, signals=True)
        books.waited.update(waits(Path(folder, "out", "responses")))
        books.truncated = truncated(Path(folder, "out", "responses"))


def texts(lengths: Lengths) -> pa.Table:
    """The rows, in the column `text`."""
    return pa.table({"text": [prompt(row, tokens) for row, tokens in enumerate(lengths.prompts)]})


def job_of(world: World, base_url: str) -> dict[str, dict[str, object]]:
    """The job that the engine runs in a world, but for its input."""
    return {
        "request": {
            "model": MODEL,
            "prompt": "{{ text }}",
            "max_completion_tokens": "auto" if world.learned else world.cap,
        },
        "service": {
            "base_url": base_url,
            "api_key_env": KEY_NAME,
            "dialect": "cerebras",
            "timeout": f"{world.timeout:g}s",
        },
        "schedule": dict(world.schedule),
        "output": {"path": "out", "keep": [], "rows_per_part": 1_000},
    }


def waits(responses: Path) -> dict[int, float]:
    """How long each answered row waited for its turn, by the output."""
    tables = [pq.read_table(path, columns=["row", "waited"]) for path in responses.glob("*.parquet")]
    return {row: wait for table in tables for row, wait in zip(*table.to_pydict().values(), strict=True)}


def truncated(responses: Path) -> int:
    """How many of the answers in the output were cut off."""
    tables = [pq.read_table(path, columns=["finish_reason"]) for path in responses.glob("*.parquet")]
    return sum(table["finish_reason"].to_pylist().count("length") for table in tables)


def drawn(source: tuple[Sequence[int], Sequence[int]], rows: int, divisor: int, cap: int, seed: int) -> Lengths:
    """So many rows' lengths out of those of `source`, divided, no completion longer than the cap."""
    draw = Random(seed)
    prompts, completions = source
    chosen = draw.choices(range(len(prompts)), k=rows)
    return Lengths(
        [max(4, round(prompts[one] / divisor)) for one in chosen],
        [min(cap, max(1, round(completions[one] / divisor))) for one in chosen],
    )
