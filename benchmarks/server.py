"""A server that answers every chat request alike and costs next to nothing, so that the client is what is measured.

`python -m benchmarks.server --delay 200 --core 1` prints its base URL and serves until it is told to stop. POST is
answered after the delay with a completion as Cerebras sends it; GET /stats tells what was seen, as JSON.
"""

import argparse
import asyncio
import email.utils
import gc
import json
import re
import signal
from dataclasses import asdict
from typing import cast

from benchmarks.measure import Seen, loop_factory, pin, raise_open_files
from benchmarks.tls import context

CONTENT = (
    "The customer was charged twice for one month and asks for the second payment back. This is a billing matter: "
    "the invoice number is named, the amount is plain, and nothing points to a fault of the product itself. "
    "Someone in finance should compare both charges, return one of them, and write when the money will arrive. "
    'It is not urgent, but the tone suggests that a quick answer would be welcome.\nLabel: "billing".'
)
ID = "chatcmpl-%016x"
BODY = json.dumps(
    {
        "id": ID,
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"content": CONTENT, "role": "assistant"}}],
        "created": 1_767_225_600,
        "model": "gpt-oss-120b",
        "system_fingerprint": "fp_0123456789abcdef0123",
        "object": "chat.completion",
        "usage": {
            "prompt_tokens": 151,
            "completion_tokens": 93,
            "total_tokens": 244,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "time_info": {
            "queue_time": 0.000214,
            "prompt_time": 0.004128,
            "completion_time": 0.041235,
            "total_time": 0.047852,
            "created": 1_767_225_600.25,
        },
    },
    separators=(",", ":"),
)
HEADERS = {
    "Date": email.utils.formatdate(usegmt=True),
    "Content-Type": "application/json",
    "Content-Length": str(len(BODY) - len(ID) + len(ID % 0)),
    "Connection": "keep-alive",
    "Server": "mock",
    "x-request-id": "0123456789abcdef",
    "x-ratelimit-limit-requests-day": "900000000",
    "x-ratelimit-limit-tokens-minute": "900000000",
    "x-ratelimit-remaining-requests-day": "900000000",
    "x-ratelimit-remaining-tokens-minute": "900000000",
    "x-ratelimit-reset-requests-day": "33011.382867097855",
    "x-ratelimit-reset-tokens-minute": "11.382867097854614",
    "cf-cache-status": "DYNAMIC",
    "CF-RAY": "0123456789abcdef-AMS",
}
ANSWER = ("HTTP/1.1 200 OK\r\n" + "".join(f"{k}: {v}\r\n" for k, v in HEADERS.items()) + "\r\n" + BODY).encode()
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Server:
    """What all connections share: the delay in seconds and what was seen."""

    def __init__(self, delay: float, loop: asyncio.AbstractEventLoop) -> None:
        self.delay = delay
        self.loop = loop
        self.in_flight = 0
        self.seen = Seen()

    def stats(self) -> bytes:
        """What was seen, as a whole HTTP answer."""
        body = json.dumps(asdict(self.seen)).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Connection(asyncio.Protocol):
    """One client connection: requests with a Content-Length, whole, in pieces or several at once."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        self.transport = cast(asyncio.Transport, transport)
        self.server.seen.connections += 1

    def data_received(self, data: bytes) -> None:
        """Take every request that is complete, keep the rest."""
        data = self.rest + data if self.rest else data
        start = 0
        while (end := data.find(b"\r\n\r\n", start)) >= 0:
            length = LENGTH.search(data, start, end)
            after = end + 4 + (int(length[1]) if length else 0)
            if len(data) < after:
                break
            if data.startswith(b"POST", start):
                self.asked()
            else:
                self.transport.write(self.server.stats())
            start = after
        self.rest = data[start:]

    def asked(self) -> None:
        """Answer one request, now or after the delay."""
        server, seen = self.server, self.server.seen
        server.in_flight += 1
        if server.in_flight > seen.peak_in_flight:
            seen.peak_in_flight = server.in_flight
        if not seen.first:
            seen.first = server.loop.time()
        if server.delay:
            server.loop.call_later(server.delay, self.answer)
        else:
            self.answer()

    def answer(self) -> None:
        """Send the answer under an id of its own."""
        server, seen = self.server, self.server.seen
        server.in_flight -= 1
        seen.requests += 1
        seen.last = server.loop.time()
        if not self.transport.is_closing():
            self.transport.write(ANSWER % seen.requests)


async def serve(port: int, delay: float, secure: bool) -> None:
    """Serve on the loopback address until SIGTERM or Ctrl-C."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    shared = Server(delay, loop)
    tls = context() if secure else None
    listening = await loop.create_server(lambda: Connection(shared), "127.0.0.1", port, backlog=16_384, ssl=tls)
    print(f"http{'s' * secure}://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    gc.freeze()
    gc.disable()
    await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--delay", type=int, default=0, help="milliseconds before an answer")
    parser.add_argument("--core", type=int, help="the core to stay on")
    parser.add_argument("--tls", action="store_true", help="with the certificate of benchmarks/tls.py")
    arguments = parser.parse_args()
    if arguments.core is not None:
        pin(arguments.core)
    raise_open_files()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(arguments.port, arguments.delay / 1000, arguments.tls))
