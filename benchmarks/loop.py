"""One transport alone, without the engine around it: `python -m benchmarks.loop --library reqwest URL`."""

import argparse

from batcher.dialects import cerebras
from batcher.records import Reply, Request
from batcher.transport import HttpTransport
from benchmarks.bare import loop, measured


async def ask(arguments: argparse.Namespace) -> None:
    """Send the requests."""
    transport = HttpTransport(arguments.base_url, {}, cerebras, 600.0, ["benchmark"], library=arguments.library)

    async def send(body: bytes) -> bytes:
        reply = await transport.send(Request(0, 0, "m", body, 0, 0, b""))
        assert isinstance(reply, Reply), reply
        return reply.body

    await loop(send, arguments.requests, arguments.in_flight)
    await transport.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=["aiohttp", "reqwest"], required=True)
    measured(ask, parser)
