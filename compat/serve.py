"""A server from the package registry on loopback: installed once, started, and stopped by its process id."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HOME = Path(__file__).parents[1] / ".compat"
"""Where the environments and the servers' logs lie; `make clean` takes it away."""
PATIENCE = 300.0
"""Seconds that a server may take to start: the first start of some compiles all their modules."""


def environment(name: str, packages: Sequence[str]) -> Path:
    """The `bin` folder of a virtual environment with these packages in these versions, made where there is none."""
    folder = HOME / name
    ready = folder / "packages.txt"
    wanted = "\n".join(packages)
    if not ready.exists() or ready.read_text() != wanted:
        print(f"{name}: installing {', '.join(packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.write_text(wanted)
    return folder / "bin"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(name: str, command: Sequence[str], folder: Path, ready: str, more: Mapping[str, str]) -> Iterator[None]:
    """The server while it runs, from the first answer at the URL `ready`; `more` is added to its environment."""
    log = HOME / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **more},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not _answers(ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start; it says in {log}:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
