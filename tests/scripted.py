"""A service over real sockets that says what a test has written for it."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Script = Callable[[int, int], "Said | str"]
"""What is said to a row, by how often it was asked before."""


class Said(NamedTuple):
    """One answer: the texts of its choices, and why they ended."""

    texts: Sequence[str | None]
    finish_reason: str = "stop"


class Service:
    """The service's address, and the requests that it was sent, by row."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[int, dict[str, Any]]] = []

    def of(self, row: int) -> list[dict[str, Any]]:
        """The requests of one row, in order."""
        return [request for asked, request in self.asked if asked == row]


def completion(said: Said) -> bytes:
    """The answer as the API has it: 100 prompt tokens, 10 for each choice."""
    choices = [
        {"index": index, "finish_reason": said.finish_reason, "message": {"role": "assistant", "content": text}}
        for index, text in enumerate(said.texts)
    ]
    usage = {"prompt_tokens": 100, "completion_tokens": 10 * len(choices), "total_tokens": 100 + 10 * len(choices)}
    made = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}
    return json.dumps(made).encode()


@contextmanager
def service(script: Script) -> Iterator[Service]:
    """A service that answers prompts of the form `[row 00001] …` by a script."""
    scripted = Service()
    times: Counter[int] = Counter()
    hands = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_GET(self) -> None:
            self._send(404, b"{}")

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = next(each["content"] for each in request["messages"] if each["role"] == "user")
            row = int(prompt[5:10])
            with hands:
                before = times[row]
                times[row] += 1
                scripted.asked.append((row, request))
            said = script(row, before)
            self._send(200, completion(said if isinstance(said, Said) else Said([said])))

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    scripted.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
