"""Small, full, read-only disks for the program to run on, mounted where nobody else sees them."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import stories


def may_mount() -> bool:
    """Whether this process may mount a file system in a namespace of its own, and enter it again."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


class Disk:
    """A disk at `path`, for those whom `enter` brings to it; the test itself looks at it through `seen`."""

    def __init__(self, path: Path, holder: int) -> None:
        self.path = path
        self.enter = ("nsenter", "-t", str(holder), "-m", "-w", "--")
        self.seen = Path(f"/proc/{holder}/root{path}")
        self.begun: list[subprocess.Popen[str]] = []

    def program(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The program where the disk is, run to its end."""
        return ended(self.begin(*words, **more))

    def begin(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """The program where the disk is, started."""
        self.begun.append(begin([*self.enter, *stories.command(*words)], **more))
        return self.begun[-1]

    def remount(self, options: str) -> None:
        """Change how large the disk is, or whether it may be written."""
        subprocess.run([*self.enter, "mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def free(self) -> int:
        """Bytes that are free."""
        found = os.statvfs(self.seen)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 64 << 10) -> None:
        """Take the space but so many bytes; what the program gives free later stays free."""
        with (self.seen / "ballast").open("ab") as file:
            size = self.free() - leave
            while size > 0:  # the program writes too
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                except OSError:
                    size //= 2
                else:
                    return

    def clear(self) -> None:
        """Give back what was taken."""
        (self.seen / "ballast").unlink()


def tmpfs(path: Path, options: str) -> contextlib.AbstractContextManager[Disk]:
    """A disk in memory at this path, such as `size=40m`."""
    script = 'mount -t tmpfs -o "$1" none "$0" && echo mounted && exec cat'
    return _held(path, ["unshare", "-m", "sh", "-c", script, str(path), options])


def network(path: Path, folder: Path) -> contextlib.AbstractContextManager[Disk]:
    """A folder of this machine at this path, on what the kernel takes for a network file system."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no FUSE here")
    folder.mkdir()
    return _held(path, [sys.executable, "-m", "tests.network_disk", str(path), str(folder)])


@contextlib.contextmanager
def _held(path: Path, command: list[str]) -> Iterator[Disk]:
    """A disk that is there for as long as the command that mounts it has its standard input."""
    if not may_mount():
        pytest.skip("mounting a disk needs root")
    path.mkdir()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"no such disk can be mounted here: {holder.stderr.read().strip()[-300:]}")
        disk = Disk(path, holder.pid)
        try:
            yield disk
        finally:
            stop(disk.begun)


def begin(command: list[str], **more: str) -> subprocess.Popen[str]:
    """A program that goes on, with what it says."""
    environment, pipe = stories.environment(**more), subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def stop(begun: list[subprocess.Popen[str]]) -> None:
    """End what a test that has failed has left behind."""
    for process in begun:
        with process:
            process.kill()


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look again and again until something holds of a program that goes on."""
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """A program's end, and what it has said."""
    said = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)
