"""Worlds by seed: the real engine in virtual time, a service with faults and weather, kills and resumes, one oracle.

    python -m tests.simulation SEED [SEED ...]

plays the worlds of these seeds and says how each went. A seed decides everything: the job (`SHAPES`), the service,
what happens to it (`Spell`), how each run ends (`Ending`). What must hold afterwards is in `CHECKS`. A new capability
joins with a shape and, where it promises something new, with a check.
"""

import asyncio
import contextlib
import gc
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

import batcher
from batcher import dialects, engine, killpoint
from batcher.errors import BatcherError, InterruptedRunError, PausedError, ServiceError
from batcher.ledger import open_read_only, spending_of
from batcher.records import Kind, Summary
from batcher.retry import MAX_REQUEUES, RULES
from batcher.simulator import Entry, Fault, Front, ModelTransport, Settings, VirtualLoop
from batcher.verify import verify
from tests import stories

EPOCH = 1_790_000_000.0
"""Unix time at the virtual moment 0."""
SOON = 0.25
"""Seconds after which an answer that left the service must survive a kill."""
LIVES = 80
"""Runs after which a world must have come to its end."""
LONG = 40_000.0
"""Virtual seconds that one run is given."""
POINTS = (
    *("commit.before", "commit.inside", "commit.after", "published.before", "complete.before"),
    *(f"{name}.{step}" for name in ("responses", "failures", "attempts") for step in ("written", "synced", "renamed")),
    *("responses.placed", "failures.placed", "attempts.placed"),
)
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where the worlds lie: there a sync costs nothing."""


class Spell(NamedTuple):
    """Some bad weather: from when to when, and what. A kind of fault meets all requests, a `Kind` all connections."""

    start: float
    stop: float
    what: str


class Ending(NamedTuple):
    """How a run is ended from outside: killed after some seconds or at a named point, or asked to end, or twice."""

    after: float
    how: str = "kill"  # kill, point, signal, signals
    point: str = ""
    visit: int = 1


class Life(NamedTuple):
    """One run of the program: when, and what ended it."""

    start: float
    stop: float
    ended: Summary | BatcherError | str  # killed


@dataclass
class World:
    """What a seed decided, and what became of it."""

    seed: int
    folder: Path
    draw: Random
    # The job and its input
    rows: list[dict[str, object] | str] = field(default_factory=list)
    """A text is a line that cannot be read."""
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: list[tuple[int, int | None]] = field(default_factory=list)
    """By run: how many of the rows there are, and the job's limit."""
    never: dict[int, Kind] = field(default_factory=dict)
    """Rows that cannot become requests."""
    # The service and what happens
    settings: dict[str, Any] = field(default_factory=dict)
    weather: list[Spell] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    slow_disk: float = 0.0
    twins: dict[int, int] = field(default_factory=dict)
    """Rows that have the text of an earlier one, and of which."""
    # What happened
    clock: Callable[[], float] = field(default=lambda: 0.0)
    now: float = 0.0
    lives: list[Life] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    output: Path = Path()
    content: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The rows of each published file in the end."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Their bytes."""

    @cached_property
    def front(self) -> Front:
        """The service, which outlives every run."""
        quick: dict[str, Any] = {"requests_per_minute": None, "tokens_per_minute": None, "key": stories.KEY}
        settings = Settings(**{**quick, **self.settings, "seed": self.seed})
        return Front(settings, lambda: self.clock(), EPOCH, record=True)

    @property
    def faults(self) -> dict[str, float]:
        """The faults of fair weather."""
        return dict(self.settings.get("faults", {}))

    @property
    def wanted(self) -> list[int]:
        """The rows that the job is about in the end; of a sample, those that it may have."""
        rows, limit = self.stages[-1]
        wanted = range(rows if limit is None else min(rows, limit))
        if "where" in self.sections["input"]:
            return [row for row in wanted if row % 10 == 0 and row not in self.never]
        return list(wanted)

    @property
    def selected(self) -> int:
        """How many rows that makes."""
        return int(self.sections["input"].get("sample", len(self.wanted)))

    @cached_property
    def book(self) -> dict[int, list[Entry]]:
        """What the service saw, by row, in the order of arrival."""
        rows: dict[int, list[Entry]] = defaultdict(list)
        for entry in sorted(self.front.book, key=lambda entry: entry.arrived):
            if entry.prompt:
                rows[stories.row_of(entry)].append(entry)
        return rows

    @property
    def billed(self) -> float:
        """USD that the service has on its bill: it bills what it answered, whoever heard of it."""
        book = self.front.book
        return math.fsum(0.35e-6 * entry.prompt_tokens + 0.75e-6 * entry.completion_tokens for entry in book)

    @cached_property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each folder in the end, as a reader would see them."""
        folders: dict[str, list[dict[str, Any]]] = {"responses": [], "failures": [], "attempts": []}
        for name, rows in self.content.items():
            folders[name.split("/")[0]] += rows
        return folders

    def fits(self, entry: Entry) -> bool:
        """Whether the service gave a whole answer that this job must be content with."""
        if "response_format" in self.sections["request"]:
            return stories.good(entry) and entry.fault != Fault.SURROGATE  # half a character may not fit a schema
        return stories.good(entry) or (entry.fault == Fault.INVALID and entry.answered_at is not None)


# What a seed decides


def sizes(world: World) -> None:
    """How many rows, in how many parts, how many in flight."""
    draw = world.draw
    count = int(2 ** draw.uniform(0, 7.5))
    world.rows = [{"key": f"k{row}", "text": stories.prompt(row), "extra": f"e{row}"} for row in range(count)]
    world.stages = [(count, None)]
    world.sections = {
        "input": {"path": "rows-*.jsonl", "id": "key"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 64},
        "service": {"base_url": "https://simulated.invalid/v1", "api_key_env": "STORY_KEY", "dialect": "cerebras"},
        "schedule": {"max_in_flight": draw.choice([1, 2, 4, 8, 16, 16, 32, 64])},
        "retry": {},
        "output": {"rows_per_part": max(1, math.ceil(count / draw.randint(1, 6)) + draw.randint(-1, 1))},
    }
    world.settings = {"latency": 10 ** draw.uniform(-2, 0.5), "jitter": draw.choice([0.0, 0.1, 0.9])}
    world.sections["service"]["timeout"] = f"{draw.choice([5, 20, 60])}s"
    world.slow_disk = draw.choice([0.0, 0.001, 0.04])
    if draw.random() < 0.05:
        world.sections["schedule"]["max_in_flight"] = "auto"


def columns(world: World) -> None:
    """Which columns are carried along; the raw answers; Parquet or JSON lines."""
    draw = world.draw
    world.sections["output"]["keep"] = draw.choice(["all", [], ["text"], ["extra", "text"]])
    if draw.random() < 0.2:
        del world.sections["input"]["id"]
    if draw.random() < 0.3:
        world.sections["output"]["raw"] = True
    if draw.random() < 0.4:
        world.sections["input"]["path"] = "rows-*.parquet"


def rows_that_cannot(world: World) -> None:
    """Lines that cannot be read, and nulls where a template wants a value; the first rows are in order."""
    draw = world.draw
    if draw.random() < 0.5:
        return
    for row in range(3, len(world.rows)):
        if draw.random() < 0.05:
            world.rows[row] = {"key": f"k{row}", "text": None, "extra": None}
            world.never[row] = Kind.UNSENDABLE
        elif draw.random() < 0.03 and world.sections["input"]["path"] == "rows-*.jsonl":
            world.rows[row] = f'{{"key": "k{row}", "text": '
            world.never[row] = Kind.BAD_INPUT


def schema(world: World) -> None:
    """Answers that have to fit a schema."""
    if world.draw.random() < 0.25:
        wanted = {
            "type": "object",
            "properties": {"topic": {"enum": ["tea", "rain", "other"]}, "why": {"type": "string"}},
            "required": ["topic", "why"],
            "additionalProperties": False,
        }
        world.sections["request"]["response_format"] = {"schema": wanted}
        world.sections["request"]["max_completion_tokens"] = 1024
        world.sections["retry"]["max_invalid"] = world.draw.randint(0, 3)


def completions(world: World) -> None:
    """The other endpoint."""
    request = world.sections["request"]
    if world.draw.random() < 0.15 and "response_format" not in request:
        request["endpoint"] = "completions"
        request["max_tokens"] = request.pop("max_completion_tokens")


def limits(world: World) -> None:
    """Rates that the job, the account, or the service's capacity allow."""
    draw = world.draw
    if draw.random() < 0.2:
        world.sections["schedule"]["requests_per_minute"] = draw.choice([20, 100, 1000])
    if draw.random() < 0.15:
        world.sections["schedule"]["tokens_per_minute"] = draw.choice([5_000, 100_000])
    if draw.random() < 0.25:
        world.settings["requests_per_minute"] = draw.choice([20, 100, 1000])
    if draw.random() < 0.2:
        world.settings["tokens_per_minute"] = draw.choice([10_000, 100_000])
    if draw.random() < 0.2:
        world.settings |= {"capacity": draw.randint(1, 12), "queue_limit": draw.choice([0.0, 0.5, 5.0])}
    world.settings["retry_after"] = draw.random() < 0.5


def retries(world: World) -> None:
    """How often a row is asked."""
    if world.draw.random() < 0.5:
        world.sections["retry"]["max_attempts"] = world.draw.randint(1, 8)


STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 501, 502, 503, 504, 520, 529)


def faults(world: World) -> None:
    """What goes wrong all the time, mixed, and rows that are always refused."""
    draw = world.draw
    if draw.random() < 0.15:
        return
    kinds = draw.sample([*map(str, Fault), *map(str, STATUSES)], draw.randint(1, 8))
    whole = draw.choice([0.02, 0.1, 0.3])
    weights = [draw.random() for _ in kinds]
    world.settings["faults"] = {
        kind: round(whole * weight / sum(weights), 5) for kind, weight in zip(kinds, weights, strict=True)
    }
    world.settings["slow"] = draw.choice([1.0, 5.0, 30.0])
    world.settings["hang"] = draw.choice([3.0, 600.0])
    if draw.random() < 0.4:
        world.settings["poison"] = {
            f"[row {row:05d}]": draw.choice([400, 413, 422, 409, 500, 500])
            for row in range(3, len(world.rows))
            if row not in world.never and draw.random() < 0.1
        }


def growth(world: World) -> None:
    """A pilot first, then more; files that are appended later. The first rows are always there."""
    draw, count = world.draw, len(world.rows)
    if count < 8 or draw.random() < 0.6:
        return
    rows = sorted({*(draw.randint(4, count) for _ in range(draw.randint(0, 2))), count})
    world.stages = [(there, None) for there in rows]
    if draw.random() < 0.5:
        limit = draw.randint(4, count)
        stages = [(there, limit) for there in rows]
        world.stages = [*stages, (count, draw.choice([None, count, count + 5, min(count, limit + 7)]))]


def weather(world: World) -> None:
    """Outages that begin and end, a key that is revoked for a while."""
    draw = world.draw
    if draw.random() < 0.55:
        return
    in_flight = world.sections["schedule"]["max_in_flight"]
    expected = 1 + len(world.rows) * (world.settings["latency"] + 0.1) / (32 if in_flight == "auto" else in_flight)
    kinds = [Kind.CONNECTION, Kind.DNS, Kind.CONNECT_TIMEOUT, "503", "500", "529", "reset", "hang", "cut", "429", "key"]
    for _ in range(draw.randint(1, 3)):
        start = draw.uniform(0, 2 * expected)
        long = 10 ** draw.uniform(-0.5, 2.8) if draw.random() < 0.999 else 7 * 3600.0
        world.weather.append(Spell(start, start + long, draw.choice(kinds)))


def endings(world: World) -> None:
    """Kills at any moment or at a named point, signals, two signals."""
    draw = world.draw
    for _ in range(draw.choice([0, 1, 2, 3, 5])):
        how = draw.choice(["kill", "kill", "kill", "point", "point", "signal", "signals"])
        visit = draw.randint(1, 12) if how == "point" else 1
        point = draw.choice(POINTS) if how == "point" else ""
        visit = visit if point.startswith("commit") else math.ceil(visit / 6)
        world.endings.append(Ending(10 ** draw.uniform(-2, 1.3), how, point, visit))


def some_rows(world: World) -> None:
    """A condition over the rows, or a sample of them."""
    draw, count = world.draw, len(world.rows)
    if draw.random() < 0.85 or len(world.stages) > 1 or Kind.BAD_INPUT in world.never.values():
        return
    if draw.random() < 0.5:
        world.sections["input"]["where"] = "extra LIKE 'e%0'"
    elif "poison" not in world.settings:
        world.sections["input"]["sample"] = draw.randint(1, count)


def account(world: World) -> None:
    """What else the service may do with quota and places: keep it, hide it, share it, divide it, have less of it."""
    draw, settings = world.draw, world.settings
    if draw.random() < 0.2:
        settings["keeps_reservation"] = True
    settings["reserves_cached"] = draw.random() < 0.5
    if draw.random() < 0.2:
        settings["rate_headers"] = draw.choice(["answers", "none"])
    if draw.random() < 0.2:
        settings["others"] = draw.choice([0.1, 0.5])
    if "capacity" in settings and draw.random() < 0.5:
        settings["replicas"] = draw.randint(1, min(4, settings["capacity"]))
        settings["drift"] = {"": ((draw.uniform(0, 10), 1.0), (draw.uniform(11, 60), draw.choice([0.2, 2.0])))}


def twins(world: World) -> None:
    """Rows that make the request of an earlier row, and share its answer."""
    draw, request = world.draw, world.sections["request"]
    if draw.random() < 0.75:
        return
    request["temperature"] = 0
    world.sections["schedule"]["dedupe"] = True
    for row, given in enumerate(world.rows):
        earlier = draw.randrange(row) if row and draw.random() < 0.5 else row
        if earlier != row and isinstance(given, dict) and row not in world.never and earlier not in world.never:
            world.twins[row] = world.twins.get(earlier, earlier)
            given["text"] = stories.prompt(world.twins[row])


def money(world: World) -> None:
    """A budget that may be too small, and is raised then."""
    if world.draw.random() < 0.25:
        dearest = 0.0006 if "response_format" not in world.sections["request"] else 0.002
        world.slow_disk = world.draw.choice([world.slow_disk, 0.04])
        world.sections["schedule"]["budget_usd"] = dearest + len(world.rows) * 10 ** world.draw.uniform(-5, -3.5)


def groups(world: World) -> None:
    """Rows that begin alike and go together, by a key that is found or given."""
    if world.draw.random() < 0.75:
        return
    world.sections["request"]["prompt_cache_key"] = world.draw.choice(["auto", "{{ text[:4] }}"])


def tiers(world: World) -> None:
    """Several tiers, in any order, some with a deadline that may be missed."""
    draw = world.draw
    if draw.random() < 0.75 or "endpoint" in world.sections["request"]:
        return
    schedule, some = world.sections["schedule"], draw.sample(["flex", "default", "auto"], draw.randint(1, 3))
    schedule["service_tier"] = some if len(some) > 1 else some[0]
    if draw.random() < 0.5:
        schedule["deadline"] = draw.choice(["5s", "1m", "1h"])
    if draw.random() < 0.5:
        world.settings["capacities"] = {draw.choice(["flex", "default"]): draw.randint(4, 20)}


SHAPES: tuple[Callable[[World], None], ...] = (
    *(sizes, columns, rows_that_cannot, schema, completions, limits, retries, faults, growth, weather, endings),
    *(some_rows, account, twins, money, groups, tiers),
)
"""Each changes the world a little; all draw from the one seed, so a new one belongs at the end."""


# What happens


class Run:
    """One life of the program in a world, and its ending.

    A kill takes a picture of the output as it is on the disk at that instant. The next life goes on from the picture;
    the corpse may tidy up where nobody looks any more.
    """

    def __init__(self, world: World, number: int, ending: Ending | None) -> None:
        self._world = world
        self._number = number
        self._ending = ending
        self._draw = Random(f"{world.seed} {number}")
        until = world.now + LONG + max((spell.stop for spell in world.weather), default=0.0)
        self.loop = VirtualLoop(world.now, until, lambda: self._draw.uniform(0, world.slow_disk))
        self._killed_at: float | None = None
        self._visits = ending.visit if ending is not None else 0
        self._signalled = False

    def its_loop(self) -> VirtualLoop:
        """The run's event loop, whose clock is the world's for now."""
        self._world.clock = self.loop.time
        return self.loop

    async def live(self) -> Life:
        """The run, from its start to whatever ends it."""
        world, loop = self._world, self.loop
        loop.set_exception_handler(lambda _, context: world.troubles.append(str(context)))
        start = loop.time()
        job = batcher.load(world.folder / "job.toml", [f"output.path={world.output.name}"])
        refusal = dialects.named("cerebras").refusal
        self._line = ModelTransport(world.front, f"Bearer {stories.KEY}", job.service.timeout, refusal)
        self._weather()
        for moment in sorted({at for spell in world.weather for at in spell[:2] if at > start}):
            loop.call_at(moment, self._weather)
        self._task = loop.create_task(engine.run(job, transport=self._line, signals=True))
        if self._ending is not None and self._ending.how != "point":
            loop.call_later(self._ending.after, self._end)
        ended: Summary | BatcherError | str
        try:
            ended = await self._task
        except asyncio.CancelledError:
            ended = "cancelled"
        except BatcherError as error:
            ended = error
        if self._killed_at is not None:
            return Life(start, self._killed_at, "killed")
        assert ended != "cancelled", "the run was cancelled by nobody"
        if isinstance(ended, BatcherError):
            assert self._expects(ended), f"a run ended with {type(ended).__name__}: {ended}"
        return Life(start, loop.time(), ended)

    def visit(self, name: str) -> None:
        """The program comes by a named point."""
        if self._ending is not None and self._ending.point == name and self._killed_at is None:
            self._visits -= 1
            if not self._visits:
                self._kill()

    def _weather(self) -> None:
        """Make it what it is now."""
        world, now = self._world, self.loop.time()
        spells = [spell.what for spell in world.weather if spell.start <= now < spell.stop]
        broken = [Kind(what) for what in spells if what in set(Kind)]
        self._line.unreachable = broken[-1] if broken else None
        spoiled = [what for what in spells if what not in set(Kind) and what != "key"]
        world.front.service.change(
            faults={spoiled[-1]: 1.0} if spoiled else world.faults,
            key="another key" if "key" in spells else stories.KEY,
        )

    def _end(self) -> None:
        assert self._ending is not None
        if self._ending.how == "kill":
            self._kill()
        elif self.loop.deliver(signal.SIGTERM):
            self._signalled = True
            if self._ending.how == "signals":
                self.loop.call_later(self._draw.uniform(0, 2), self.loop.deliver, signal.SIGTERM)

    def _kill(self) -> None:
        if self._task.done() or self._killed_at is not None:
            return
        world = self._world
        self._killed_at = self.loop.time()
        world.kills.append(self._killed_at)
        self._line.cut = True
        picture = world.folder / f"out{self._number + 1}"
        if world.output.exists():
            shutil.copytree(world.output, picture, ignore=shutil.ignore_patterns("*.reserve"))
        world.output = picture
        check_glob(picture)
        self.loop.call_soon(self._task.cancel)

    def _expects(self, error: BatcherError) -> bool:
        """Whether this world may end a run so."""
        world = self._world
        spells = {spell.what for spell in world.weather}
        match error:
            case InterruptedRunError():
                return self._signalled
            case PausedError() if str(error).startswith("the budget is reached"):
                return "budget_usd" in world.sections["schedule"]
            case PausedError():
                return bool(spells - {"key"}) or bool({"html", "402"} & set(world.faults))
            case ServiceError():
                statuses = {int(kind) for kind in world.faults if kind.isdigit()} | set(
                    world.settings.get("poison", {}).values()
                )
                return "key" in spells or any(400 <= status < 500 or status == 501 for status in statuses)
        return False


def live(world: World) -> None:
    """Run after run, until nothing is left to do and nothing more is to come."""
    world.output = world.folder / "out0"
    endings = iter(world.endings)
    stage = -1
    for number in range(LIVES):
        if stage + 1 < len(world.stages):
            stage += 1
            write_input(world, stage)
            write_job(world, world.stages[stage][1])
        one = Run(world, number, next(endings, None))
        killpoint.watchers.append(one.visit)
        try:
            with asyncio.Runner(loop_factory=one.its_loop) as runner:
                world.lives.append(runner.run(one.live()))
        finally:
            killpoint.watchers.remove(one.visit)
        last = world.lives[-1]
        check_whatever_ended(world)
        if isinstance(last.ended, PausedError) and str(last.ended).startswith("the budget is reached"):
            world.sections["schedule"]["budget_usd"] *= world.draw.uniform(1.5, 4)
            write_job(world, world.stages[stage][1])
        gap = (-2, 1) if last.ended == "killed" or isinstance(last.ended, Summary) else (0, 3)
        world.now = last.stop + 10 ** world.draw.uniform(*gap)
        if isinstance(last.ended, Summary) and stage + 1 == len(world.stages):
            return
    raise AssertionError(f"not done after {LIVES} runs: {world.lives[-1].ended}")


def write_input(world: World, stage: int) -> None:
    """The rows of a stage, those that are new in a file of their own."""
    before = world.stages[stage - 1][0] if stage else 0
    rows = world.rows[before : world.stages[stage][0]]
    if not rows:
        return
    if world.sections["input"]["path"] == "rows-*.parquet":
        pq.write_table(pa.Table.from_pylist(rows), world.folder / f"rows-{stage}.parquet")
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (world.folder / f"rows-{stage}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def write_job(world: World, limit: int | None) -> None:
    """The job file of a stage."""
    sections = {name: values for name, values in world.sections.items() if values}
    if limit is not None:
        sections["input"] = {**sections["input"], "limit": limit}
    sections["output"] = {"path": "out", **sections["output"]}
    (world.folder / "job.toml").write_bytes(msgspec.toml.encode({"name": "world", **sections}))


def read(path: Path) -> list[dict[str, Any]]:
    """A published file's rows."""
    with pq.ParquetFile(path) as file:
        rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
        return rows


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """A run spares itself the garbage collector; hundreds of them do so together."""
    thresholds = gc.get_threshold()
    gc.set_threshold(engine.RARELY, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def open_files() -> dict[str, str]:
    """This process's open files."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            found[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")
    return found


# What must hold


def check_glob(output: Path) -> None:
    """O2: at no moment does a reader see a row twice."""
    rows = stories.column(output, "responses", "row")
    assert len(rows) == len(set(rows)), f"O2: a row stands twice in {output.name}"


def check_whatever_ended(world: World) -> None:
    """O7, after each run: a recount finds nothing wrong, however the run ended."""
    if (world.output / "job.toml").exists() and (world.output / "ledger.sqlite").exists():
        assert not (found := verify(world.output)).problems, f"O7: after {world.lives[-1].ended}: {found.problems}"
    check_budget(world)


def check_budget(world: World) -> None:
    """O12, after each run: the service has billed no more than is noted as spent, and that is within the budget."""
    budget = world.sections["schedule"].get("budget_usd")
    if budget is not None and (world.output / "ledger.sqlite").exists():
        with open_read_only(world.output / "ledger.sqlite") as ledger:
            spent = spending_of(ledger)
        noted = spent.usd if spent else 0.0
        assert world.billed <= noted + 1e-12 <= budget + 2e-12, f"O12: {world.billed} of {noted} of {budget}"


def every_row_once(world: World) -> None:
    """O1, O2: every selected row is in exactly one of responses and failures, in order."""
    for name in ("responses", "failures"):
        rows = [row["row"] for row in world.tables[name]]
        assert rows == sorted(set(rows)), f"O2: {name} are out of order or twice: {rows}"
    rows = sorted(row["row"] for name in ("responses", "failures") for row in world.tables[name])
    if "sample" in world.sections["input"]:
        assert len(set(rows)) == len(rows) == world.selected, f"O1: not every row of the sample once: {rows}"
        assert set(rows) <= set(world.wanted), f"O1: rows that there are not: {rows}"
    else:
        assert rows == world.wanted, f"O1: not every row once: {rows}"


def answers_are_the_rows_own(world: World) -> None:
    """O3: every stored answer is one that the service gave for that row; id and kept columns are the row's."""
    for stored in world.tables["responses"]:
        row = stored["row"]
        given = {
            (stories.storable(entry.content or ""), entry.prompt_tokens, entry.completion_tokens)
            for entry in world.book[world.twins.get(row, row)]
            if stories.good(entry) or world.fits(entry)
        }
        answer = (stored["response"], stored["prompt_tokens"], stored["completion_tokens"])
        assert answer in given, f"O3: row {row} has an answer that was not given for it: {answer}"
        assert stored.get("raw", "") is not None, f"O3: row {row} has no raw answer"
    for stored in (*world.tables["responses"], *world.tables["failures"]):
        given_row = world.rows[stored["row"]]
        for name, key in (("id", "key"), ("text", "text"), ("extra", "extra")):
            if name in stored:
                wanted = None if isinstance(given_row, str) else given_row[key]
                if name == "id" and "id" not in world.sections["input"]:
                    wanted = stored["id"]
                assert stored[name] == wanted, f"O3: row {stored['row']} has another {name}: {stored[name]}"


def nothing_is_asked_again(world: World) -> None:
    """O4: no row is asked again that had its answer, unless a kill came within `SOON` of it."""
    for row, entries in world.book.items():
        for entry in entries:
            if not world.fits(entry):
                continue
            assert entry.answered_at is not None
            for later in entries:
                if later.arrived < entry.answered_at:
                    continue
                lost = any(entry.answered_at <= kill < later.arrived for kill in world.kills)
                lost = lost and any(kill - SOON < entry.answered_at <= kill for kill in world.kills)
                assert lost, f"O4: row {row} was answered at {entry.answered_at} and asked again at {later.arrived}"


def twins_are_asked_once(world: World) -> None:
    """O13: of rows that make the same request one is asked, and all have its outcome; the others cost nothing."""
    alike: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in (*world.tables["responses"], *world.tables["failures"]) if world.twins else ():
        if row["request_hash"] is not None:
            alike[world.twins.get(row["row"], row["row"])].append(row)
    for rows in alike.values():
        asked = [row for row in rows if row["attempts"]]
        assert len(asked) == 1, f"O13: rows {[row['row'] for row in asked]} make one request"
        for row in rows:
            same = ("response", "kind", "message", "completion_tokens", "latency", "request_hash")
            assert [row.get(name) for name in same] == [asked[0].get(name) for name in same], f"O13: row {row['row']}"
            if row is not asked[0]:
                paid = [row[name] for name in ("billed_prompt_tokens", "billed_completion_tokens", "cost_usd")]
                assert paid == [0, 0, 0.0], f"O13: row {row['row']} cost {paid}"


def no_more_than_allowed(world: World) -> None:
    """O5: attempts by row and kind within their rules, requests in flight and per minute within the job's limits."""
    most = world.sections["retry"].get("max_attempts", 6)
    invalid = world.sections["retry"].get("max_invalid", 2)
    tried: dict[int, dict[Kind, int]] = defaultdict(lambda: defaultdict(int))
    for attempt in world.tables["attempts"]:
        if attempt["kind"] is not None and attempt["attempt"]:
            tried[attempt["row"]][Kind(attempt["kind"])] += 1
    broken = sum(share for kind, share in world.faults.items() if kind in BROKEN)
    probed = world.weather or broken > 0.12  # it may look like an outage, and its probes are no fault of their row
    for row, kinds in tried.items() if not probed else ():
        # What is refused is no failure before another row is answered: the next run may find it undecided.
        more = (Kind.STALE_CONNECTION in kinds) + (len(world.lives) - 1) * bool(REFUSED & kinds.keys())
        charged = sum(count for kind, count in kinds.items() if kind not in RULES or RULES[kind].charged)
        assert charged <= most + more, f"O5: row {row} had {dict(kinds)}"
        for kind, count in kinds.items():
            again = invalid if kind is Kind.INVALID_OUTPUT else RULES[kind].again if kind in RULES else 0
            assert count <= min(again, MAX_REQUEUES) + 1 + more, f"O5: row {row} had {dict(kinds)}"
    in_flight = world.sections["schedule"]["max_in_flight"]
    if in_flight != "auto":
        assert world.front.peak_in_flight <= in_flight, f"O5: {world.front.peak_in_flight} in flight"
    tiers = world.sections["schedule"].get("service_tier")
    limit = world.sections["schedule"].get("requests_per_minute", 0) * (len(tiers) if isinstance(tiers, list) else 1)
    theirs = world.settings.get("requests_per_minute")
    if theirs is not None and theirs <= limit:
        return  # the service's own, smaller limit takes its place, and the service sees to that
    unsent = any(spell.what in UNSENT for spell in world.weather)  # what did not get through is given back, unseen here
    for life in world.lives if limit and not unsent else ():
        mine = [entry for entry in world.front.book if life.start <= entry.arrived <= life.stop]
        back = [entry.arrived for entry in mine if entry.status in GIVEN_BACK]
        sent = sorted(entry.arrived for entry in mine if entry.status not in GIVEN_BACK)
        for number, first in enumerate(sent):
            minute = sum(first <= moment < first + 60 - 1e-6 for moment in sent[number:])
            refused = sum(first - 120 <= moment < first + 60 for moment in back)
            assert minute <= limit + refused, f"O5: {minute} requests in the minute from {first}, {refused} given back"


def the_key_is_nowhere(world: World) -> None:
    """O6: the key stands in no file, not even in what the dead left."""
    for output in world.folder.glob("out*"):
        stories.check_no_secret(output)


def sums_are_equal(world: World) -> None:
    """O7: the summary, the folders and the ledger say the same, and what they say is in the service's book."""
    summary = world.lives[-1].ended
    assert isinstance(summary, Summary)
    assert (summary.state, summary.selected, summary.pending) == ("complete", world.selected, 0), f"O7: {summary}"
    assert msgspec.json.decode((world.output / "summary.json").read_bytes(), type=Summary) == summary
    if not world.kills:
        asked = len(world.front.book)
        connected = sum(a["attempt"] > 0 and a["kind"] not in UNSENT for a in world.tables["attempts"])
        hasty = any(isinstance(life.ended, BatcherError) for life in world.lives)  # what was cut off is not recorded
        assert connected == asked or (hasty and connected < asked), f"O7: {connected} attempts of {asked} requests"


REFUSED = {Kind.REJECTED, Kind.FORBIDDEN, Kind.NOT_FOUND, Kind.MODEL_NOT_FOUND, Kind.NOT_SERVED}
BROKEN = {"500", "502", "503", "504", "520", "408", "reset", "cut", "hang", "slow"}
GIVEN_BACK = {429, 498, 503, 529}
UNSENT = {Kind.CONNECTION, Kind.DNS, Kind.CONNECT_TIMEOUT}


def failures_have_reasons(world: World) -> None:
    """O8: rows that cannot be sent have failed as such; nothing fails without a fault, a limit or bad weather."""
    failed = {row["row"]: row["kind"] for row in world.tables["failures"]}
    wanted = set(world.wanted) if "sample" not in world.sections["input"] else set(failed)
    for row, kind in world.never.items():
        if row in wanted:
            assert failed.get(row) == kind, f"O8: row {row} is {failed.get(row)} and not {kind}"
    if not (world.weather or world.faults or "poison" in world.settings or "capacity" in world.settings):
        assert failed.keys() <= world.never.keys(), f"O8: rows failed without a reason: {failed}"


def nothing_unexpected(world: World) -> None:
    """O9: nobody raised into the empty."""
    assert not world.troubles, f"O9: {world.troubles}"


def nothing_is_left(world: World) -> None:
    """O10: in the output stands what belongs there."""
    stray = {
        name
        for path in world.output.rglob("*")
        if path.is_file()
        and (name := path.relative_to(world.output).as_posix()) not in ("job.toml", "summary.json", "ledger.sqlite")
        and name not in world.content
    }
    assert not stray, f"O10: left behind: {stray}"
    assert not (world.output / ".publishing").exists(), "O10: .publishing was left behind"


CHECKS: tuple[Callable[[World], None], ...] = (
    *(every_row_once, answers_are_the_rows_own, nothing_is_asked_again, no_more_than_allowed, the_key_is_nowhere),
    *(sums_are_equal, failures_have_reasons, nothing_unexpected, nothing_is_left, twins_are_asked_once),
)


# A whole world


def made(seed: int, folder: Path = Path(os.devnull)) -> World:
    """A seed's world before anything happens in it."""
    world = World(seed, folder, Random(seed))
    for shape in SHAPES:
        shape(world)
    return world


def play(seed: int) -> World:
    """Make a seed's world, let it run to its end, check it. AssertionError, or whatever else went wrong in it."""
    os.environ["STORY_KEY"] = stories.KEY
    state, descriptors = random.getstate(), open_files()
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="batcher-world-") as folder, collecting_rarely():
        world = made(seed, Path(folder))
        random.seed(seed)  # the jitter of waits
        try:
            live(world)
        finally:
            random.setstate(state)
        for path in sorted(world.output.glob("*/*.parquet")):
            name = path.relative_to(world.output).as_posix()
            world.content[name], world.files[name] = read(path), path.read_bytes()
        for check in CHECKS:
            check(world)
    left = {number: name for number, name in open_files().items() if descriptors.get(number) != name}
    assert not left, f"O11: left open: {left}"
    return world


def told(seed: int) -> str | None:
    """What is wrong with a seed's world and how to see it again; None where nothing is."""
    try:
        play(seed)
    except Exception:
        return f"{traceback.format_exc()}\nseed {seed} fails; to play it again: python -m tests.simulation {seed}"
    return None


def main(words: list[str]) -> int:
    """Play the worlds of these seeds; the exit code."""
    bad = 0
    for seed in map(int, words):
        began = time.monotonic()
        wrong = told(seed)
        bad += wrong is not None
        sys.stdout.write(f"seed {seed}: {wrong or 'well'} ({time.monotonic() - began:.2f} s)\n")
        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
