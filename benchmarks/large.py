"""Many rows, killed again and again: is all there at the end, and what did it take?"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import workload
from benchmarks.engine import JOB
from benchmarks.measure import CLIENT_CORE, ROOT, Answer, pin, seen, server
from benchmarks.workload import SHORT

IN_FLIGHT = 256


@dataclass(slots=True)
class Lives:
    """What all lives of one run took together. Seconds, megabytes."""

    cpu: float = 0.0
    peaks: list[float] = field(default_factory=list)
    ledger: float = 0.0
    """The most that the ledger and its journal took on the disk."""
    said: str = ""


def large(rows: int, kills: int = 10) -> list[Answer]:
    """A run over `rows` rows, killed `kills` times at random moments, then left to its end and verified."""
    with tempfile.TemporaryDirectory(prefix="batcher-benchmark-") as name, server(0) as base_url:
        folder = Path(name)
        tool = [
            sys.executable,
            "-m",
            "benchmarks.workload",
            "make",
            str(folder / "rows.parquet"),
            str(rows),
            str(SHORT),
        ]
        subprocess.run(tool, cwd=ROOT, check=True)
        job = JOB.format(
            model=workload.MODEL,
            system=workload.SYSTEM,
            max_completion_tokens=workload.MAX_COMPLETION_TOKENS,
            base_url=base_url,
            in_flight=IN_FLIGHT,
            library="aiohttp",
        )
        (folder / "job.toml").write_text(job)
        chance = random.Random(rows)
        lives = Lives()
        began = time.perf_counter()
        for at in sorted(chance.sample(range(rows // 50, rows - rows // 50), kills)):
            _live(folder, base_url, lives, at)
        _live(folder, base_url, lives, None)
        wall = time.perf_counter() - began
        requests = seen(base_url).requests
        began = time.perf_counter()
        verified = _batcher(folder, "verify", "out")
        verify_wall = time.perf_counter() - began
        summary = json.loads((folder / "out" / "summary.json").read_text())
        if (summary["state"], summary["totals"]["answered"], verified.returncode) != ("complete", rows, 0):
            raise SystemExit(f"not complete: {summary}\n{verified.stdout}{verified.stderr}")
        output = sum(path.stat().st_size for path in (folder / "out").rglob("*.parquet")) / 1e6
        left = (folder / "out" / "ledger.sqlite").stat().st_size / 1e6
    first, last = lives.peaks[0], max(lives.peaks[1:])
    what = f"{rows:,} rows, killed {kills} times"
    return [
        Answer(what, "complete, verified", "", f"complete, verified in {verify_wall:.0f} s: {verified.stdout.strip()}"),
        Answer("requests that were repeated", f"≤ {kills * IN_FLIGHT:,}", "", f"{requests - rows:,}"),
        Answer("wall time; CPU per row", "", "", f"{wall:.0f} s; {lives.cpu / rows * 1e6:.0f} µs"),
        Answer("peak memory of the first life; of any later", "flat", "", f"{first:.0f} MB; {last:.0f} MB"),
        Answer("ledger at most; at the end; parts", "", "", f"{lives.ledger:.0f}; {left:.1f}; {output:.0f} MB"),
    ]


def _batcher(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batcher", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _live(folder: Path, base_url: str, lives: Lives, kill_at: int | None) -> None:
    """One life of the run, killed when the server has seen so many requests; to its end where none is named."""
    ended = threading.Event()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "batcher", "run", "job.toml", "--quiet"],
            cwd=folder,
            env={**os.environ, "BENCHMARK_API_KEY": "benchmark"},
            stdout=said,
            stderr=said,
            preexec_fn=lambda: pin(CLIENT_CORE),
        )

        def watch() -> None:
            while not ended.wait(0.1):
                size = sum(file.stat().st_size for file in (folder / "out").glob("ledger.sqlite*") if file.exists())
                lives.ledger = max(lives.ledger, size / 1e6)
                if kill_at is not None and seen(base_url).requests >= kill_at:
                    process.send_signal(signal.SIGKILL)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
        said.seek(0)
        if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
            raise SystemExit(f"a run ended with {process.returncode}:\n{said.read().decode(errors='replace')[-2000:]}")
    lives.cpu += used.ru_utime + used.ru_stime
    lives.peaks.append(used.ru_maxrss / 1024)
    print(f"  life {len(lives.peaks)}: {used.ru_maxrss / 1024:.0f} MB, ledger so far {lives.ledger:.0f} MB", flush=True)
