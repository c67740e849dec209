"""What the engine adds to a bare aiohttp request, and how much of what a slow service allows it uses."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.engine import b1, engine
from benchmarks.measure import Answer, Cost, Spread, seen, server

Side = Callable[[str, int, int], Cost]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides measured one after the other: microseconds of CPU per request."""

    b1: float
    engine: float


def slope(side: Side, base_url: str, in_flight: int, sizes: tuple[int, int]) -> float:
    """Microseconds of CPU per request, between two sizes: starting up and connecting are not in it."""
    small, large = (side(base_url, size, in_flight) for size in sizes)
    return (large.cpu - small.cpu) / (sizes[1] - sizes[0]) * 1e6


def pairs(number: int, in_flight: int, delay: int, sizes: tuple[int, int]) -> list[Pair]:
    """Alternating runs of both sides; who goes first changes from pair to pair."""
    measured = []
    with server(delay) as base_url:
        for turn in range(number):
            order: list[Side] = [b1, engine] if turn % 2 == 0 else [engine, b1]
            cpu = {side: slope(side, base_url, in_flight, sizes) for side in order}
            measured.append(Pair(cpu[b1], cpu[engine]))
            print(f"  {in_flight} in flight, {delay} ms: B1 {cpu[b1]:.0f} µs, engine {cpu[engine]:.0f} µs", flush=True)
    return measured


def ratio(measured: list[Pair], in_flight: int, must: str, aim: str) -> Answer:
    """CPU per request, engine over B1."""
    over = Spread.of([pair.engine / pair.b1 for pair in measured])
    bare = Spread.of([pair.b1 for pair in measured])
    whole = Spread.of([pair.engine for pair in measured])
    return Answer(
        f"CPU per request over B1, {in_flight} in flight",
        must,
        aim,
        f"{over.median:.2f} ({over.low:.2f} to {over.high:.2f}); {whole.median:.0f} µs over {bare.median:.0f} µs "
        f"({bare.low:.0f} to {bare.high:.0f})",
    )


def overhead(number: int, sizes: tuple[int, int], many_sizes: tuple[int, int]) -> list[Answer]:
    """CPU per request over B1 at 64 and 512 in flight, and how the difference grows to 2,000 in flight."""
    few, more = pairs(number, 64, 0, sizes), pairs(number, 512, 0, sizes)
    many = pairs(number, 2000, 200, many_sizes)
    base = Spread.of([pair.engine - pair.b1 for pair in few]).median
    growth = Spread.of([(pair.engine - pair.b1) / base for pair in many])
    difference = Spread.of([pair.engine - pair.b1 for pair in many]).median
    return [
        ratio(few, 64, "1.7", "1.4"),
        ratio(more, 512, "1.5", "1.3"),
        Answer(
            "engine minus B1, 2,000 in flight (200 ms) over 64",
            "1.8",
            "1.3",
            f"{growth.median:.2f} ({growth.low:.2f} to {growth.high:.2f}); {difference:.0f} µs over {base:.0f} µs",
        ),
    ]


def latency(number: int, waves: int) -> list[Answer]:
    """Requests per second over in-flight/latency at 200 ms, by the server's clock; a wave is in-flight rows."""
    answers = []
    for in_flight in (64, 512):
        possible = in_flight / 0.2
        shares = []
        peak = 0
        for _ in range(number):
            with server(200) as base_url:
                engine(base_url, waves * in_flight, in_flight)
                at = seen(base_url)
            shares.append(waves * in_flight / (at.last - at.first) / possible)
            peak = max(peak, at.peak_in_flight)
            print(f"  {in_flight} in flight, 200 ms: {shares[-1]:.3f} of {possible:,.0f} requests/s", flush=True)
        share = Spread.of(shares)
        answers.append(
            Answer(
                f"requests/s over in-flight/latency, {in_flight} in flight, 200 ms",
                "0.90",
                "0.98",
                f"{share.median:.3f} ({share.low:.3f} to {share.high:.3f}) of {possible:,.0f}/s; peak {peak} in flight",
            )
        )
    return answers
