"""B1, what the engine is compared with: a bare aiohttp loop that asks, decodes and keeps nothing."""

import argparse

import aiohttp
from yarl import URL

from benchmarks.bare import HEADERS, loop, measured


async def ask(arguments: argparse.Namespace) -> None:
    """Send the requests."""
    url = URL(f"{arguments.base_url}/chat/completions")
    async with aiohttp.ClientSession(headers=HEADERS, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def send(body: bytes) -> bytes:
            async with session.post(url, data=body) as response:
                return await response.read()

        await loop(send, arguments.requests, arguments.in_flight)


if __name__ == "__main__":
    measured(ask, argparse.ArgumentParser(description=__doc__))
