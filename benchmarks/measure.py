"""Processes on cores of their own, what they cost, and the machine they ran on."""

import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0))
CLIENT_CORE = CORES[0]
SERVER_CORE = CORES[-1]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process took: seconds by the clock, CPU seconds (user and system), peak resident memory in MB."""

    wall: float
    cpu: float
    rss: float


@dataclass(slots=True)
class Seen:
    """What the mock server saw: counts, and when by its clock the first request came and the last answer left."""

    requests: int = 0
    connections: int = 0
    peak_in_flight: int = 0
    first: float = 0.0
    last: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several measurements and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Answer:
    """One question's measured value beside what it must be and what it aims at."""

    question: str
    must: str
    aim: str
    measured: str


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop: uvloop's when it is installed, asyncio's own (None) when not."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def pin(core: int) -> None:
    """Keep this process, and what it starts, on one core."""
    os.sched_setaffinity(0, {core})


def raise_open_files() -> None:
    """Allow as many open files as the system lets this process have: each request in flight holds a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(command: Sequence[str], folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command on the client's core to its end; when it fails the benchmark ends and shows what it said."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: pin(CLIENT_CORE),
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


@contextmanager
def server(delay: int, *, tls: bool = False) -> Iterator[str]:
    """The mock server on its own core, answering after `delay` milliseconds; gives its base URL."""
    command = [sys.executable, "-m", "benchmarks.server", "--delay", str(delay), "--core", str(SERVER_CORE)]
    command += ["--tls"] * tls
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def seen(base_url: str) -> Seen:
    """What the mock server at this base URL has seen so far."""
    connection = HTTPConnection(base_url.split("/")[2])
    connection.request("GET", "/stats")
    counts = Seen(**json.load(connection.getresponse()))
    connection.close()
    return counts


def machine() -> str:
    """The machine, how busy it is already, and the versions, in one line."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    versions = []
    for package in ("aiohttp", "pyreqwest", "uvloop", "msgspec", "pyarrow"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    cpu = names[0] if names else platform.machine()
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    load = os.getloadavg()[0]
    return f"{len(CORES)} cores of {cpu}, load {load:.1f}; {system}, {', '.join(versions)}"
