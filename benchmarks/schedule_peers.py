"""What people do otherwise: workers that ask again at once until they are answered, with or without a limiter."""

import asyncio
from collections.abc import Iterator
from hashlib import blake2b

import msgspec
from aiolimiter import AsyncLimiter

from batcher.records import Failure, Kind, Reply, Request
from benchmarks.schedule_books import Seen
from benchmarks.schedule_world import MODEL, Line, World, prompt

IN_FLIGHT = 64


def refusal(reply: Reply) -> Failure:
    """They do not look why."""
    return Failure(Kind.RATE_LIMITED, "", reply.timing, reply.status)


async def fixed(world: World, line: Line) -> None:
    """64 in flight, and what is refused is asked again at once."""
    await _ask(world, line, None)


async def limited(world: World, line: Line) -> None:
    """The same, but every request first waits for aiolimiter, which has the requests a minute that the job states.

    Where the job states none, it has the account's, as who writes such a script would look it up.
    """
    per_minute = world.schedule.get("requests_per_minute") or world.settings["requests_per_minute"]
    await _ask(world, line, AsyncLimiter(float(str(per_minute)), 60.0) if per_minute else None)


async def _ask(world: World, line: Line, limiter: AsyncLimiter | None) -> None:
    now = asyncio.get_running_loop().time
    world.books.seen.append(Seen(now(), 0, IN_FLIGHT, ""))
    requests = _requests(world)

    async def work() -> None:
        for request in requests:
            ready = now()
            while True:
                if limiter is not None:
                    await limiter.acquire()
                sent = now()
                if not isinstance(await line.send(request), Failure):
                    break
            world.books.waited[request.row] = sent - ready

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def _requests(world: World) -> Iterator[Request]:
    for row, tokens in enumerate(world.lengths.prompts):
        message = {"role": "user", "content": prompt(row, tokens)}
        body = {"model": MODEL, "messages": [message], "max_completion_tokens": world.cap}
        encoded = msgspec.json.encode(body)
        yield Request(0, row, MODEL, encoded, tokens, world.cap, blake2b(encoded, digest_size=8).digest())
