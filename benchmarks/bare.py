"""What the bare loops have in common: the request, what is read of its answer, and the measuring of a whole run.

`python -m benchmarks.b1` is the loop on aiohttp, `python -m benchmarks.b2` the one on pyreqwest. Same request, event
loop, garbage collection policy and core as the engine. Each prints one line of JSON.
"""

import argparse
import asyncio
import gc
import json
import resource
import time
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from benchmarks import workload
from benchmarks.measure import CLIENT_CORE, loop_factory, pin, raise_open_files

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer benchmark"}


class Message(msgspec.Struct, gc=False):
    """The answer's text."""

    content: str


class Choice(msgspec.Struct, gc=False):
    """One of the answers, of which there is one."""

    message: Message
    finish_reason: str


class Usage(msgspec.Struct, gc=False):
    """Tokens that are counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct, gc=False):
    """What is read of a chat completion."""

    id: str
    choices: list[Choice]
    usage: Usage


async def loop(send: Callable[[bytes], Awaitable[bytes]], requests: int, in_flight: int) -> None:
    """Send `requests` requests by `in_flight` workers over one iterator, and see that each has its answer."""
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder(Completion).decode
    text = next(workload.texts(1, workload.LONG))
    rows = iter(range(requests))
    characters = tokens = 0

    async def worker(rows: Iterator[int]) -> None:
        nonlocal characters, tokens
        for row in rows:
            body = {
                "model": workload.MODEL,
                "messages": [
                    {"role": "system", "content": workload.SYSTEM},
                    {"role": "user", "content": f"[row {row}] {text}"},
                ],
                "max_completion_tokens": workload.MAX_COMPLETION_TOKENS,
                "temperature": 0,
            }
            completion = decode(await send(encode(body)))
            characters += len(completion.choices[0].message.content)
            tokens += completion.usage.total_tokens

    await asyncio.gather(*(worker(rows) for _ in range(in_flight)))
    if not characters or not tokens or tokens % requests:
        raise SystemExit("an answer was missing")


def measured(ask: Callable[[argparse.Namespace], Awaitable[None]], parser: argparse.ArgumentParser) -> None:
    """Run a bare loop as its command line says, and print what it took."""
    parser.add_argument("base_url", help="http://127.0.0.1:PORT/v1")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--core", type=int, default=CLIENT_CORE)
    arguments = parser.parse_args()
    pin(arguments.core)
    raise_open_files()
    new_loop = loop_factory()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()

    async def run() -> None:
        await ask(arguments)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            {
                "requests": arguments.requests,
                "in_flight": arguments.in_flight,
                "wall_s": round(wall, 3),
                "cpu_s": round(cpu, 3),
                "cpu_us_per_request": round(cpu / arguments.requests * 1e6, 1),
                "requests_per_s": round(arguments.requests / wall, 1),
                "peak_rss_mb": round(after.ru_maxrss / 1024, 1),
            }
        )
    )
