"""A case over real sockets and in real time: the simulator and `batcher run`, each a process of its own.

`python -m benchmarks.schedule_sockets CASE SECONDS BOOKS [--lengths FILE]` is the service: it prints its address, and
writes its books to a file when it is asked to end.
"""

import argparse
import asyncio
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow.parquet as pq

from batcher.simulator import serve
from benchmarks.measure import ROOT, loop_factory
from benchmarks.schedule_books import Books, Level
from benchmarks.schedule_world import KEY, KEY_NAME, World, booked, job_of, level, settings_of, texts

LOOK = 0.2
"""Seconds between looks into the buckets."""
START_UP = 120.0
"""Seconds that a run is given until its first request."""
LATER = 2.0
"""Seconds that it goes on after the measure ended."""
SERVICE = "benchmarks.schedule_sockets"


async def service(world: World) -> Books:
    """Serve a world until SIGTERM; gives its books, whose time begins with the first request."""
    stop = asyncio.Event()
    loop, now = asyncio.get_running_loop(), time.monotonic
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with serve(settings_of(world), record=True) as simulated:
        print(simulated.url, flush=True)
        levels: list[Level] = []
        asked = False
        while not stop.is_set():
            if not asked and (simulated.book or simulated.in_flight):
                asked = True
                print("asked", flush=True)
            at = now()
            levels.append(level(simulated, at, at))
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK)
        origin = min(entry.arrived for entry in simulated.book)
        world.books.booked = booked(simulated.book, origin)
        world.books.levels = [replace(one, at=one.at - origin) for one in levels]
    return world.books


def play(name: str, lengths: str | None, world: World) -> Books:
    """Run the engine against a case's service for so many seconds, then ask it to end; gives the service's books."""
    with tempfile.TemporaryDirectory(prefix="batcher-sockets-") as made:
        folder = Path(made)
        pq.write_table(texts(world.lengths), folder / "rows.parquet")
        command = [sys.executable, "-m", SERVICE, name, f"{world.seconds:g}", str(folder / "books")]
        command += ["--lengths", lengths] if lengths else []
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout is not None
            url = serving.stdout.readline().strip()
            job = {"name": name, "input": {"path": "rows.parquet"}, **job_of(world, url)}
            (folder / "job.toml").write_bytes(msgspec.toml.encode(job))
            run = [sys.executable, "-m", "batcher", "run", str(folder / "job.toml"), "--quiet"]
            environment = {**os.environ, KEY_NAME: KEY}
            with subprocess.Popen(
                run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as running:
                if not select.select([serving.stdout], [], [], START_UP)[0]:
                    running.terminate()
                try:
                    said, _ = running.communicate(timeout=world.seconds + LATER)
                    serving.terminate()
                    raise SystemExit(f"the run was over too soon ({running.returncode}): {said}")
                except subprocess.TimeoutExpired:
                    running.terminate()
                    running.communicate()
            serving.terminate()
        books: Books = pickle.loads((folder / "books").read_bytes())
    return books


def main(world_of: Callable[[str, str | None], World], words: Sequence[str]) -> None:
    """Be the service."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("seconds", type=float)
    parser.add_argument("books", type=Path)
    parser.add_argument("--lengths")
    asked = parser.parse_args(words)
    world = replace(world_of(asked.case, asked.lengths), seconds=asked.seconds)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        books = runner.run(service(world))
    asked.books.write_bytes(pickle.dumps(books))


if __name__ == "__main__":
    from benchmarks.schedule import sockets_world

    main(sockets_world, sys.argv[1:])
