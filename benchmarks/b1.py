"""B1, what the engine is compared with: a bare aiohttp loop that asks, decodes and keeps nothing.

Same request, event loop, garbage collection policy and core as the engine. Prints one line of JSON.
"""

import argparse
import asyncio
import gc
import json
import resource
import time
from collections.abc import Iterator

import aiohttp
import msgspec
from yarl import URL

from benchmarks import workload
from benchmarks.measure import CLIENT_CORE, loop_factory, pin, raise_open_files


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


async def ask(base_url: str, requests: int, in_flight: int) -> None:
    """Send `requests` requests by `in_flight` workers over one iterator, and see that each has its answer."""
    encode = msgspec.json.Encoder().encode
    decode = msgspec.json.Decoder(Completion).decode
    url = URL(f"{base_url}/chat/completions")
    text = next(workload.texts(1, workload.LONG))
    rows = iter(range(requests))
    characters = tokens = 0

    async def worker(session: aiohttp.ClientSession, rows: Iterator[int]) -> None:
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
            async with session.post(url, data=encode(body)) as response:
                completion = decode(await response.read())
            characters += len(completion.choices[0].message.content)
            tokens += completion.usage.total_tokens

    headers = {"Content-Type": "application/json", "Authorization": "Bearer benchmark"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session, rows) for _ in range(in_flight)))
    if not characters or not tokens or tokens % requests:
        raise SystemExit("B1: an answer was missing")


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask(arguments.base_url, arguments.requests, arguments.in_flight))
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


if __name__ == "__main__":
    main()
