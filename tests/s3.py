"""An S3 service on this machine (moto's), and bad weather on the way to it, for tests of object stores."""

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader

from moto.server import ThreadedMotoServer
from pyarrow import fs

BUCKET = "bucket"
"""The bucket that is there from the start."""
KEY_ID = "story-id"
SECRET = "story-secret-ad41c9"
"""The store's key: it must turn up in no file and on no screen."""


@contextmanager
def served() -> Iterator[str]:
    """The service, empty but for its bucket; gives its URL. While it runs, the environment leads here."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    settings = {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with _environment(AWS_ENDPOINT_URL=url, **settings):
            query = "allow_bucket_creation=true&allow_bucket_deletion=true"
            system, bucket = fs.FileSystem.from_uri(f"s3://{BUCKET}?{query}")
            system.create_dir(bucket)
            try:
                yield url
            finally:
                system.delete_dir(bucket)
    finally:
        server.stop()


class Weather:
    """A way to the service that takes single requests or their answers. While it is open, the environment leads here.

    `of` is asked about each request's first line: "lost" answers never arrive though the service has done its part,
    "unsent" requests never reach it, "denied" ones are refused with 403, "down" is a service that is gone.
    """

    def __init__(self, url: str) -> None:
        self.of: Callable[[str], str | None] = lambda line: None
        self.met: list[tuple[str, str]] = []
        """The requests that met something, and what."""
        self._service = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Weather":
        self._leading = _environment(AWS_ENDPOINT_URL=self._address)
        self._leading.__enter__()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leading.__exit__(None, None, None)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        threads: list[threading.Thread] = []
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threads.append(threading.Thread(target=self._serve, args=(client,)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(60)
        with client, client.makefile("rb") as asking, suppress(OSError):
            while (head := _head(asking)) and self._one(client, asking, head):
                pass

    def _one(self, client: socket.socket, asking: BufferedReader, head: bytes) -> bool:
        """Hand one request on and its answer back; false when the connection ends here."""
        line = head.split(b"\r\n")[0].decode()
        fate = self.of(line)
        if fate is not None:
            self.met.append((line, fate))
        if fate in ("unsent", "down"):
            return False
        if b"\r\nexpect: 100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _body(asking, head)
        if fate == "denied":
            said = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(said))
            client.sendall(b"" if line.startswith("HEAD") else said)
            return True
        head = re.sub(rb"(?i)\r\nexpect: [^\r]*|\r\nconnection: [^\r]*", b"", head)
        head = head[:-2] + b"Connection: close\r\n\r\n"
        with socket.create_connection(self._service) as service, service.makefile("rb") as answering:
            service.sendall(head + body)
            answer = answering.read()
        if fate == "lost":
            return False
        client.sendall(answer)
        return False


def _head(stream: BufferedReader) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b""
        head += line
    return head


def _body(stream: BufferedReader, head: bytes) -> bytes:
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    if length:
        return stream.read(int(length[1]))
    if not re.search(rb"(?i)\r\ntransfer-encoding: chunked", head):
        return b""
    body = b""
    while True:
        line = stream.readline()
        size = int(line.split(b";")[0], 16)
        body += line + stream.read(size + 2)
        if not size:
            return body


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
