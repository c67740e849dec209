"""What the HTTP library makes of a request's cost: the engine over both bare loops, TLS, memory."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.engine import bare, engine
from benchmarks.measure import Answer, Cost, Spread, server
from benchmarks.overhead import slope
from benchmarks.tls import AUTHORITY

Side = Callable[[str, int, int], Cost]

AIOHTTP = partial(bare, "loop --library=aiohttp")
REQWEST = partial(bare, "loop --library=reqwest")


def rounds(
    number: int, sides: dict[str, Side], in_flight: int, sizes: tuple[int, int], delay: int = 0, *, tls: bool = False
) -> list[dict[str, float]]:
    """Microseconds of CPU per request of each side, in rounds whose order turns around each time."""
    measured = []
    with server(delay, tls=tls) as base_url:
        for turn in range(number):
            order = list(sides) if turn % 2 == 0 else list(reversed(sides))
            cpu = {name: slope(sides[name], base_url, in_flight, sizes) for name in order}
            measured.append(cpu)
            said = ", ".join(f"{name} {cpu[name]:.0f} µs" for name in sides)
            print(f"  {in_flight} in flight{', TLS' * tls}: {said}", flush=True)
    return measured


def ratio(measured: list[dict[str, float]], question: str, over: str, under: str, must: str, aim: str) -> Answer:
    """One side over another."""
    share = Spread.of([cpu[over] / cpu[under] for cpu in measured])
    top, base = (Spread.of([cpu[name] for cpu in measured]) for name in (over, under))
    return Answer(
        question,
        must,
        aim,
        f"{share.median:.2f} ({share.low:.2f} to {share.high:.2f}); {top.median:.0f} µs over {base.median:.0f} µs "
        f"({base.low:.0f} to {base.high:.0f})",
    )


def transport(number: int, sizes: tuple[int, int]) -> list[Answer]:
    """The engine on pyreqwest over B1 and over B2, the two libraries over TLS, and their memory."""
    answers = []
    sides: dict[str, Side] = {
        "B1": partial(bare, "b1"),
        "engine": partial(engine, library="reqwest"),
        "B2": partial(bare, "b2"),
    }
    for in_flight, musts, aims in ((64, ("1.15", "2.4"), ("0.9", "1.8")), (512, ("0.85", "2.1"), ("0.65", "1.7"))):
        measured = rounds(number, sides, in_flight, sizes)
        for under, what, must, aim in zip(("B1", "B2"), ("aiohttp", "pyreqwest"), musts, aims, strict=True):
            question = f"engine on pyreqwest over bare {what} ({under}), {in_flight} in flight"
            answers.append(ratio(measured, question, "engine", under, must, aim))
    with tempfile.TemporaryDirectory() as folder:
        authority = Path(folder) / "authority.pem"
        authority.write_text(AUTHORITY)
        secure: dict[str, Side] = {
            "aiohttp": partial(AIOHTTP, authority=authority),
            "pyreqwest": partial(REQWEST, authority=authority),
        }
        # Late enough that all are in flight, and many enough that the greetings of connections are not in the slope.
        measured = rounds(number, secure, 512, (2 * sizes[0], 2 * sizes[1]), delay=50, tls=True)
    question = "TLS, HTTP/1.1, 512 in flight (50 ms): pyreqwest over aiohttp"
    answers.append(ratio(measured, question, "pyreqwest", "aiohttp", "0.7", "0.5"))
    peaks: dict[str, list[float]] = {"aiohttp": [], "pyreqwest": []}
    with server(200) as base_url:
        for _ in range(min(number, 3)):
            for name, side in (("aiohttp", AIOHTTP), ("pyreqwest", REQWEST)):
                peaks[name].append(side(base_url, 20_000, 2000).rss)
    aio, fast = Spread.of(peaks["aiohttp"]).median, Spread.of(peaks["pyreqwest"]).median
    answers.append(
        Answer("memory, 2,000 in flight (200 ms)", "1.5", "", f"{fast / aio:.2f}; {fast:.0f} MB over {aio:.0f} MB")
    )
    return answers
