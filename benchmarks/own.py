"""The engine's own part of a request: a whole run on a transport that answers in the next turn of the event loop.

`python -m benchmarks.own --in-flight 64` prints CPU per row, user and system, and by thread. Sum and shares have the
opening of the run in them, start-up of Python does not.
"""

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from batcher import job as jobs
from batcher.engine import run
from batcher.engine.publish import Press
from batcher.ledger import Ledger
from batcher.records import Failure, Kind, Reply, Request, Timing
from benchmarks import workload
from benchmarks.engine import JOB
from benchmarks.measure import CLIENT_CORE, ROOT, loop_factory, pin

BODY = (
    b'{"id":"chatcmpl-0123456789abcdef","choices":[{"finish_reason":"stop","index":0,"message":{"content":"'
    + b"The answer is in the words. " * 20
    + b'","role":"assistant"}}],"created":1700000000,"model":"gpt-oss-120b","system_fingerprint":"fp_0123456789",'
    b'"object":"chat.completion","usage":{"prompt_tokens":190,"completion_tokens":120,"total_tokens":310,'
    b'"prompt_tokens_details":{"cached_tokens":0}},"time_info":{"queue_time":0.0001,"prompt_time":0.001,'
    b'"completion_time":0.05,"total_time":0.06,"created":1700000000}}'
)


class AtOnce:
    """Answers every request in the next turn of the loop."""

    name = "none"

    async def send(self, request: Request) -> Reply | Failure:
        """The same answer for all."""
        began = time.perf_counter()
        await asyncio.sleep(0)
        return Reply(200, {}, bytes(bytearray(BODY)), Timing(time.time_ns() // 1000, time.perf_counter() - began))

    async def get(self, path: str) -> Reply | Failure:
        """Nothing is there."""
        return Failure(Kind.NOT_FOUND, "nothing is there", status=404)

    async def close(self) -> None:
        """Nothing is open."""


def timed(owner: type, name: str) -> list[float]:
    """Have a method's CPU time on its thread added up, in seconds."""
    method, spent = getattr(owner, name), [0.0]

    def measured(*arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return method(*arguments)
        finally:
            spent[0] += time.thread_time() - began

    setattr(owner, name, measured)
    return spent


def main() -> None:
    """One run, and what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--in-flight", type=int, default=64)
    arguments = parser.parse_args()
    pin(CLIENT_CORE)
    os.environ["BENCHMARK_API_KEY"] = "benchmark"
    publishing, committing = timed(Press, "_make"), timed(Ledger, "_commit")
    with tempfile.TemporaryDirectory(prefix="batcher-benchmark-") as name:
        folder = Path(name)
        make = [sys.executable, "-m", "benchmarks.workload", "make", str(folder / "rows.parquet")]
        subprocess.run([*make, str(arguments.rows), str(workload.LONG)], cwd=ROOT, check=True)
        (folder / "job.toml").write_text(
            JOB.format(
                model=workload.MODEL,
                system=workload.SYSTEM,
                max_completion_tokens=workload.MAX_COMPLETION_TOKENS,
                base_url="http://127.0.0.1:9/v1",
                in_flight=arguments.in_flight,
                library="aiohttp",
            )
        )
        job = jobs.load(folder / "job.toml")
        before, looping = resource.getrusage(resource.RUSAGE_SELF), time.thread_time()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            summary = runner.run(run(job, transport=AtOnce()))
        looping, after = time.thread_time() - looping, resource.getrusage(resource.RUSAGE_SELF)
    if summary.totals.answered != arguments.rows:
        raise SystemExit("an answer was missing")
    figures = {
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "event loop": looping,
        "publishing": publishing[0],
        "ledger": committing[0],
    }
    print(", ".join(f"{what} {seconds / arguments.rows * 1e6:.1f}" for what, seconds in figures.items()), "µs a row")


if __name__ == "__main__":
    main()
