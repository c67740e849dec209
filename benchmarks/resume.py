"""How long a run that was stopped late takes until it asks again."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from batcher.records import PartRecord
from benchmarks import workload
from benchmarks.engine import JOB
from benchmarks.measure import CLIENT_CORE, ROOT, Answer, Spread, pin, seen, server
from benchmarks.workload import SHORT

PART = 50_000


def resume(rows: int, times: int) -> list[Answer]:
    """From the start of the process to its first request, with four fifths of the rows done; Parquet and JSONL."""
    answers = []
    for suffix in ("parquet", "jsonl", "jsonl.gz"):
        with tempfile.TemporaryDirectory(prefix="batcher-benchmark-") as name:
            folder = Path(name)
            _prepare(folder, rows, suffix)
            scan = Spread.of([_scan(folder / f"rows.{suffix}") for _ in range(times)])
            asked = Spread.of([_first_request(folder) for _ in range(times)])
            answers.append(
                Answer(
                    f"resume of {rows:,} rows, 80 % done, .{suffix}: start to first request",
                    f"{4 * scan.median + 1:.1f} s",
                    "0.5 s",
                    f"{asked.median:.2f} s ({asked.low:.2f} to {asked.high:.2f}); a scan of ids: {scan.median:.2f} s",
                )
            )
            print(f"  {answers[-1].question}: {answers[-1].measured}", flush=True)
    return answers


def _prepare(folder: Path, rows: int, suffix: str) -> None:
    """An output of which the first part was really made, and noted again for all others of the first four fifths.

    What is in a complete part nobody looks at when a run goes on, so its contents make no difference.
    """
    tool = [sys.executable, "-m", "benchmarks.workload", "make", str(folder / f"rows.{suffix}"), str(rows), str(SHORT)]
    subprocess.run(tool, cwd=ROOT, check=True)
    with server(0) as base_url:
        _write_job(folder, base_url, suffix)
        _run(folder, "--limit", str(PART))
    output = folder / "out"
    places = _places(folder / f"rows.{suffix}", rows) if suffix != "parquet" else {}
    with sqlite3.connect(output / "ledger.sqlite") as ledger:
        made = msgspec.msgpack.decode(
            ledger.execute("SELECT record FROM parts WHERE part = 0").fetchone()[0], type=PartRecord
        )
        for part in range(1, rows * 4 // 5 // PART):
            stop = (part + 1) * PART
            files = []
            for file in made.files:
                name = file.name.replace("000000", f"{part:06d}")
                os.link(output / file.name, output / name)
                files.append(msgspec.structs.replace(file, name=name))
            record = msgspec.structs.replace(made, stop=stop, settled=stop, place=places.get(part), files=tuple(files))
            ledger.execute("INSERT OR REPLACE INTO parts VALUES (0, ?, ?)", (part, msgspec.msgpack.encode(record)))
    shutil.copytree(output, folder / "kept", copy_function=os.link)
    shutil.copy(output / "ledger.sqlite", folder / "ledger")


def _first_request(folder: Path) -> float:
    """Seconds until the service sees the first request of a run that goes on."""
    shutil.rmtree(folder / "out")
    shutil.copytree(folder / "kept", folder / "out", copy_function=os.link)
    (folder / "out" / "ledger.sqlite").unlink()
    shutil.copy(folder / "ledger", folder / "out" / "ledger.sqlite")
    with server(1000) as base_url:
        _write_job(folder, base_url, next(folder.glob("rows.*")).name.partition(".")[2])
        began = time.monotonic()
        process = _start(folder)
        while not seen(base_url).peak_in_flight:
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode}")
            time.sleep(0.01)
        first = seen(base_url).first
        process.kill()
        process.wait()
    return first - began


def _scan(path: Path) -> float:
    """Seconds that a process takes to read the column `id` from the file, Python's start included."""
    began = time.monotonic()
    tool = [sys.executable, "-m", "benchmarks.workload", "scan", str(path)]
    subprocess.run(tool, cwd=ROOT, check=True, preexec_fn=lambda: pin(CLIENT_CORE))
    return time.monotonic() - began


def _places(path: Path, rows: int) -> dict[int, tuple[int, int, int]]:
    """Where each part starts in a JSONL file: file, byte of the text, line."""
    places = {}
    byte = 0
    with workload.opened(path) as lines:
        for number, line in enumerate(lines):
            if number % PART == 0:
                places[number // PART] = (0, byte, number + 1)
            byte += len(line)
    return places


def _write_job(folder: Path, base_url: str, suffix: str) -> None:
    job = JOB.format(
        model=workload.MODEL,
        system=workload.SYSTEM,
        max_completion_tokens=workload.MAX_COMPLETION_TOKENS,
        base_url=base_url,
        in_flight=256,
        library="aiohttp",
    )
    (folder / "job.toml").write_text(job.replace("rows.parquet", f"rows.{suffix}"))


def _start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "batcher", "run", "job.toml", "--quiet", *words],
        cwd=folder,
        env={**os.environ, "BENCHMARK_API_KEY": "benchmark"},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: pin(CLIENT_CORE),
    )


def _run(folder: Path, *words: str) -> None:
    if code := _start(folder, *words).wait():
        raise SystemExit(f"the run ended with {code}")
    state = json.loads((folder / "out" / "summary.json").read_text())["state"]
    if state != "complete":
        raise SystemExit(f"the run is {state}")
