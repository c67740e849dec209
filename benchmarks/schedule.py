"""How much of what the service allows the scheduler uses, case by case, in virtual time.

    python -m benchmarks schedule [--case NAME] [--seeds N] [--client NAME] [--lengths FILE] [--sockets | --plots DIR]

The client is the whole engine (`schedule_world.ours`), the service is the simulator's model with its books; only
sockets and time are missing. Lengths of prompts and answers are drawn by seed from `azure_conv_lengths.parquet` (real
token counts of a conversation service), or from a lognormal like it where that file is absent.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from batcher.records import Kind
from benchmarks import schedule_books as books
from benchmarks import schedule_plots, schedule_sockets
from benchmarks.measure import CORES, ROOT
from benchmarks.schedule_books import Books
from benchmarks.schedule_peers import fixed, limited, refusal
from benchmarks.schedule_world import Client, Event, Lengths, World, drawn, ours, play

LENGTHS = "azure_conv_lengths.parquet"
CLIENTS: Mapping[str, Client] = {"ours": ours, "fixed": fixed, "limited": limited}
OTHERS_SEEDS = 1
"""Of those who have most requests refused, whose runs take long."""
SOCKETS, SOCKETS_SECONDS = ("token-bound", "request-bound"), 300.0
UNCACHED, REQUESTS = "uncached-tokens-minute", "requests-minute"
MINUTE = 60.0
LONG_EACH, LONG_TIMES = 10, 50
"""One prompt of so many is so many times longer."""
START, STOP, SOONER = 120.0, 420.0, 1.3
"""When an outage begins and ends, and how much sooner with each seed: probes go every so many seconds."""
CHANGE = 120.5
"""When the account changes in mid-run."""
LIMITS: Mapping[str, Any] = {
    "requests_per_minute": 1_000,
    "uncached_tokens_per_minute": 1_000_000,
    "tokens_per_minute": 3_000_000,
}
HALF = {name: limit // 2 for name, limit in LIMITS.items()}
TRIPLE = {name: limit * 3 for name, limit in LIMITS.items()}
NONE = dict.fromkeys(LIMITS)
CAP_LIMIT, CAP_LEARNED = 30_000, 200
"""Tokens a minute where output caps are learned, and the rows after which that is judged."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure of a run must reach; `share` shows it in percent."""

    figure: str
    measure: Callable[[Books], float]
    bound: float
    least: bool = False
    share: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.bound if self.least else value <= self.bound

    def shown(self, value: float) -> str:
        """A value for people."""
        return f"{value:.2%}" if self.share else f"{value:.1f}".removesuffix(".0")

    def summed(self, values: Sequence[float]) -> str:
        """The median, and behind it the worst."""
        worst = min(values) if self.least else max(values)
        return f"{self.shown(statistics.median(values))} ({self.shown(worst)})"

    @property
    def must(self) -> str:
        """The bound for people."""
        bound = f"{self.bound * 100:g} %" if self.share else f"{self.bound:g}"
        return f"{'≥' if self.least else '≤'} {bound}"


@dataclass(frozen=True, slots=True)
class Case:
    """One question to the scheduler, and what must come of it."""

    name: str
    bars: Sequence[Bar]
    seconds: float = 360.0
    divisor: int = 1
    cap: int = 1_000
    learned: bool = False
    """Whether the output cap is learned; with `cap` as the longest answer."""
    rows: int = 8_000
    some_long: bool = False
    schedule: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Event] = ()
    outage: Event | None = None
    """From START to STOP."""


def _share(bucket: str, least: float, since: float = MINUTE) -> Bar:
    return Bar("share used", lambda run: books.share(run, bucket, since), least, least=True, share=True)


def _refused(most: float, since: float = MINUTE) -> Bar:
    return Bar("refused", lambda run: books.refused(run, since), most, share=True)


def _outage(within: float) -> Iterator[Bar]:
    yield Bar("seconds to full rate", lambda run: books.full_rate_after(run, UNCACHED, run.outage[1]), within)
    yield Bar("rows failed", lambda run: float(run.failed), 0)


_AFTER_REFUSAL = Bar("sent after the first refusal", lambda run: books.sent_after_refusal(run, *run.outage), 30)
_BEYOND_WINDOW = Bar("sent beyond the window", lambda run: books.sent_beyond_window(run, *run.outage), 30)

_KEPT = {"keeps_reservation": True}
_PLACES = 200
_SLOW = {"capacity": _PLACES, "queue_limit": 1.0, "seconds_per_completion_token": 0.06, **NONE}


def _capacity(since: float, least: float) -> Sequence[Bar]:
    """A share of the best on the whole, and half of it in every ten seconds: no collapse."""
    return (
        Bar("share of best", lambda run: books.busy(run, since, run.seconds), least, least=True, share=True),
        Bar(
            "share of best, worst 10 s",
            lambda run: min(books.busy(run, at, at + 10) for at in range(int(since), int(run.seconds) - 9, 10)),
            0.5,
            least=True,
            share=True,
        ),
    )


CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("token-bound", (_share(UNCACHED, 0.99), _refused(0.005))),
        Case("request-bound", (_share(REQUESTS, 0.99), _refused(0.005)), divisor=8, cap=125),
        Case("too-high-headers", (_share(UNCACHED, 0.97), _refused(0.005)), schedule=TRIPLE),
        Case(
            "too-high-no-headers",
            (_share(UNCACHED, 0.95), _refused(0.03)),
            schedule=TRIPLE,
            settings={"rate_headers": "none"},
        ),
        Case("nothing-known", (_share(UNCACHED, 0.90), _refused(0.05)), settings={"rate_headers": "none"}),
        Case(
            "nothing-known-requests",
            (_share(REQUESTS, 0.90), _refused(0.05)),
            divisor=8,
            cap=125,
            settings={"rate_headers": "none"},
        ),
        Case(
            "limit-halved",
            (_share(UNCACHED, 0.95, CHANGE), _refused(0.01, CHANGE)),
            events=(Event(CHANGE, HALF),),
        ),
        Case(
            "others",
            (_share(UNCACHED, 0.95, CHANGE), _refused(0.01, CHANGE)),
            events=(Event(CHANGE, {"others": 0.3}),),
        ),
        Case(
            "limit-halved-no-headers",
            (_share(UNCACHED, 0.95, CHANGE), _refused(0.03, CHANGE)),
            events=(Event(CHANGE, HALF),),
            settings={"rate_headers": "none"},
        ),
        Case(
            "others-no-headers",
            (_share(UNCACHED, 0.95, CHANGE), _refused(0.03, CHANGE)),
            events=(Event(CHANGE, {"others": 0.3}),),
            settings={"rate_headers": "none"},
        ),
        Case("keeps-reservation", (_share(UNCACHED, 0.97), _refused(0.01)), settings=_KEPT),
        Case(
            "capacity",
            _capacity(MINUTE, 0.95),
            seconds=180.0,
            divisor=8,
            cap=125,
            rows=28_000,
            settings=_SLOW,
        ),
        Case(
            "capacity-halved",
            _capacity(CHANGE + 30, 0.90),
            seconds=270.0,
            divisor=8,
            cap=125,
            rows=28_000,
            settings=_SLOW,
            events=(Event(CHANGE, {"capacity": _PLACES // 2}),),
        ),
        Case(
            "capacity-drifts",
            _capacity(MINUTE, 0.90),
            seconds=240.0,
            divisor=8,
            cap=125,
            rows=28_000,
            settings={**_SLOW, "drift": {"": ((MINUTE, 1.0), (4 * MINUTE, 0.5))}},
        ),
        Case(
            "outage-503",
            (_AFTER_REFUSAL, *_outage(30)),
            seconds=STOP + 90,
            outage=Event(START, {"faults": {"503": 1.0}}),
        ),
        Case(
            "outage-refused",
            (_AFTER_REFUSAL, *_outage(30)),
            seconds=STOP + 90,
            outage=Event(START, unreachable=Kind.CONNECTION),
        ),
        Case(
            "outage-silence",
            (_BEYOND_WINDOW, *_outage(60)),
            seconds=STOP + 90,
            outage=Event(START, {"faults": {"hang": 1.0}}),
        ),
        Case(
            "cap-auto",
            (),
            seconds=3_600.0,
            learned=True,
            rows=3_600,
            settings={**NONE, "tokens_per_minute": CAP_LIMIT, "uncached_tokens_per_minute": CAP_LIMIT, **_KEPT},
        ),
        Case("some-long", (), divisor=4, cap=250, some_long=True),
    )
}


PLOTS: Mapping[str, tuple[str, str | None, Mapping[float, str]]] = {
    "token-bound": ("Token-bound: 1M uncached tokens a minute", UNCACHED, {}),
    "limit-halved": ("All limits halved in mid-run", UNCACHED, {CHANGE: "halved"}),
    "outage-refused": ("Five minutes without connections", UNCACHED, {START: "refused", STOP: "well again"}),
    "capacity": ("Room for 200 at once, no quota", None, {}),
}
"""Title, bucket, and marks in time."""


@cache
def source(path: str | None) -> tuple[list[int], list[int]]:
    """Prompt and completion tokens to draw from."""
    if path is None:
        draw = random.Random(1)
        prompts = [min(14_000, max(8, int(draw.lognormvariate(6.6, 1.05)))) for _ in range(20_000)]
        return prompts, [min(1_000, max(7, int(draw.lognormvariate(5.0, 0.83)))) for _ in range(20_000)]
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return table["prompt_tokens"].to_pylist(), table["completion_tokens"].to_pylist()


def lengths_of(case: Case, path: str | None, seed: int) -> Lengths:
    """The rows of a case."""
    lengths = drawn(source(path), case.rows, case.divisor, case.cap, seed)
    if not case.some_long:
        return lengths
    long = frozenset(range(seed % LONG_EACH, case.rows, LONG_EACH))
    longer = [tokens * LONG_TIMES if row in long else tokens for row, tokens in enumerate(lengths.prompts)]
    return Lengths(longer, lengths.completions, long)


def world_of(case: Case, path: str | None, seed: int) -> World:
    """A case's world for one seed."""
    events, stop = case.events, STOP - SOONER * (seed % 10)
    if case.outage is not None:
        events = (case.outage, Event(stop, {"faults": {}}))
    return World(
        seconds=case.seconds,
        lengths=lengths_of(case, path, seed),
        cap=case.cap,
        settings={**LIMITS, **case.settings},
        events=events,
        schedule=case.schedule,
        timeout=60.0,
        seed=seed,
        outage=(START, stop) if case.outage is not None else (0.0, 0.0),
        learned=case.learned,
    )


def bars_of(case: Case, world: World) -> Sequence[Bar]:
    """What must come of it."""
    if world.lengths.long:
        return (
            Bar("median wait of the long over the others", lambda run: books.wait_ratio(run, world.lengths.long), 2),
        )
    if case.learned:
        pairs = list(zip(world.lengths.prompts, world.lengths.completions, strict=True))
        return (
            Bar(
                "rows over best two caps",
                lambda run: books.best_two_caps(run, pairs, CAP_LIMIT, CAP_LEARNED),
                0.9,
                least=True,
                share=True,
            ),
            Bar("answers cut off", lambda run: float(run.truncated), 0),
            Bar("rows failed", lambda run: float(run.failed), 0),
        )
    return case.bars


def measured(name: str, path: str | None, seed: int, client: str) -> list[float]:
    """One seed's figures, in the order of the bars."""
    case = CASES[name] if client == "ours" else sooner(CASES[name])
    world = world_of(case, path, seed)
    run = play(world, ours) if client == "ours" else play(world, CLIENTS[client], refusal)
    return [bar.measure(run) for bar in bars_of(case, world)]


def sooner(case: Case) -> Case:
    """The same in less time: who has most requests refused sends a hundred times as many."""
    if case.outage is not None or "capacity" in case.settings:
        return case
    return replace(case, seconds=(CHANGE if case.events else MINUTE) + 30)


def played(name: str, path: str | None, seed: int, client: str) -> Books:
    """The books of a case in little time, for whom they are drawn."""
    world = world_of(sooner(CASES[name]), path, seed)
    return play(world, ours) if client == "ours" else play(world, CLIENTS[client], refusal)


def sockets_world(name: str, path: str | None) -> World:
    """A case for five minutes in real time."""
    case = replace(CASES[name], seconds=SOCKETS_SECONDS)
    return world_of(case, path, 0)


def sockets(path: str | None) -> bool:
    """Play the first two cases over real sockets; whether every bar is met."""
    path, good = found(path), True
    for name in SOCKETS:
        world = sockets_world(name, path)
        run = schedule_sockets.play(name, path, world)
        for bar in bars_of(CASES[name], world):
            value = bar.measure(run)
            good = good and bar.holds(value)
            told = "pass" if bar.holds(value) else "MISS"
            print(f"  {name} over sockets: {bar.figure} {bar.shown(value)}, must be {bar.must}: {told}", flush=True)
    return good


def plots(folder: Path, path: str | None) -> None:
    """Draw some cases for all clients into a folder."""
    path = found(path)
    with ProcessPoolExecutor(len(CORES)) as pool:
        runs = {name: {client: pool.submit(played, name, path, 0, client) for client in CLIENTS} for name in PLOTS}
        for name, (title, bucket, marks) in PLOTS.items():
            books_of = {client: future.result() for client, future in runs[name].items()}
            schedule_plots.plot(folder / f"schedule-{name}.svg", title, books_of, bucket, marks)
            print(f"  {folder}/schedule-{name}.svg", flush=True)


def found(path: str | None) -> str | None:
    """The file of lengths: the one that was named, or the one beside the project."""
    if path is not None:
        return path
    beside = ROOT.parent / "shared" / "data" / LENGTHS
    return str(beside) if beside.exists() else None


def schedule(names: Sequence[str], seeds: int, path: str | None, clients: Sequence[str]) -> bool:
    """Print what each case comes to for each of the clients; whether the worst seed of ours meets every bar."""
    path = found(path)
    print(f"lengths: {Path(path).name if path else f'generated, for {LENGTHS} is absent'}; {seeds} seeds", flush=True)
    row = "| " + " | ".join(["{:23}", "{:39}", "{:>7}", "{:4}", *["{:>17}"] * len(clients)]) + " |"
    print(row.format("case", "figure", "must", "", *clients))
    print(row.format("-" * 23, "-" * 39, "-" * 7, "-" * 4, *["-" * 17] * len(clients)), flush=True)
    good = True
    with ProcessPoolExecutor(len(CORES)) as pool:
        runs = {
            (name, client): [
                pool.submit(measured, name, path, seed, client)
                for seed in range(seeds if client == "ours" else min(seeds, OTHERS_SEEDS))
            ]
            for name in names
            for client in clients
        }
        for name in names:
            figures = {client: [future.result() for future in runs[name, client]] for client in clients}
            for number, bar in enumerate(bars_of(CASES[name], world_of(CASES[name], path, 0))):
                values = {client: [one[number] for one in figures[client]] for client in clients}
                met = all(map(bar.holds, values[clients[0]]))
                good = good and (met or clients[0] != "ours")
                cells = [bar.summed(values[client]) for client in clients]
                print(row.format(name, bar.figure, bar.must, "pass" if met else "MISS", *cells), flush=True)
    return good
