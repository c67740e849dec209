"""B2, the same bare loop on pyreqwest, as its documentation shows it."""

import argparse

from pyreqwest.client import ClientBuilder
from pyreqwest.http import Url

from benchmarks.bare import HEADERS, loop, measured


async def ask(arguments: argparse.Namespace) -> None:
    """Send the requests."""
    url = Url(f"{arguments.base_url}/chat/completions")
    async with ClientBuilder().default_headers(HEADERS).http2(arguments.http2).build() as client:

        async def send(body: bytes) -> bytes:
            response = await client.post(url).body_bytes(body).build().send()
            return (await response.bytes()).to_bytes()

        await loop(send, arguments.requests, arguments.in_flight)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http2", action="store_true", help="offer HTTP/2 to a server with TLS")
    measured(ask, parser)
