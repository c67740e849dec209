"""One job against a server: killed once, gone on with, recounted, and its rows looked at."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 200
KEY_ENV = "COMPAT_KEY"
_NAMES = ("Tom", "Ada", "Ravi", "Mei", "Olu", "Ines")
_THINGS = ("apples", "marbles", "stickers", "pencils", "coins")


def question(row: int) -> str:
    """A sum in words, as in grade-school maths; the same for the same row."""
    draw = random.Random(row)
    bags, each, given = draw.randint(2, 9), draw.randint(3, 20), draw.randint(1, 5)
    name, things = draw.choice(_NAMES), draw.choice(_THINGS)
    return f"{name} has {bags} bags with {each} {things} each and gives {given} away. How many {things} are left?"


def write_job(folder: Path, name: str, url: str, request: Mapping[str, object]) -> Path:
    """A job over the questions; its output lies beside it."""
    lines = [msgspec.json.encode({"id": f"q{row}", "question": question(row)}) for row in range(ROWS)]
    (folder / "questions.jsonl").write_bytes(b"\n".join(lines))
    job = {
        "name": name,
        "input": {"path": "questions.jsonl", "id": "id"},
        "request": {"prompt": "{{ question }}", **request},
        "service": {"base_url": url, "api_key_env": KEY_ENV, "timeout": "2m"},
        "schedule": {"max_in_flight": 4},
        "output": {"path": name, "rows_per_part": 80},
    }
    path = folder / f"{name}.toml"
    path.write_bytes(msgspec.toml.encode(job))
    return path


def batcher(*words: str | Path, key: str) -> subprocess.CompletedProcess[str]:
    """The program with these words, to its end."""
    return subprocess.run(
        _command(*words), env={**os.environ, KEY_ENV: key}, capture_output=True, text=True, check=False
    )


def killed_and_gone_on_with(job: Path, key: str) -> pa.Table:
    """Run a job, kill it in its middle, run it again, recount it. Its answers; AssertionError where one is lacking."""
    output = job.with_suffix("")
    process = subprocess.Popen(
        _command("run", job, "--quiet"), env={**os.environ, KEY_ENV: key}, stdout=subprocess.DEVNULL
    )
    with process:
        while _recorded(output) < ROWS // 4:
            assert process.poll() is None, f"{job.stem}: the run ended with {process.returncode} before it was killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = _recorded(output)
    again = batcher("run", job, "--quiet", key=key)
    assert again.returncode == 0, f"{job.stem}: {again.stderr}{again.stdout}"
    verified = batcher("verify", output, key=key)
    assert verified.returncode == 0, f"{job.stem}: {verified.stderr}{verified.stdout}"
    answers = pa.concat_tables([pq.read_table(part) for part in sorted((output / "responses").glob("*.parquet"))])
    assert answers["row"].to_pylist() == list(range(ROWS))
    attempts = sum(pq.read_metadata(part).num_rows for part in (output / "attempts").glob("*.parquet"))
    print(f"  {job.stem}: {ROWS} rows answered, killed after {kept} of them, {attempts} attempts", flush=True)
    return answers


def filled(answers: pa.Table, *names: str) -> None:
    """Every row has a value in each of these columns."""
    for name in names:
        assert answers[name].null_count == 0, f"{name} is null in {answers[name].null_count} rows"


def refused(job: Path, key: str, settings: Mapping[str, str], said: str) -> None:
    """With these settings the run ends with exit code 4, says this, and leaves every row pending."""
    words = [f"--set={name}={value}" for name, value in settings.items()]
    ended = batcher("run", job, "--quiet", f"--set=output.path={job.stem}-refused-{len(said)}", *words, key=key)
    assert ended.returncode == 4, ended.stderr + ended.stdout
    assert said in ended.stderr, ended.stderr
    print(f"  {ended.stderr.strip()}", flush=True)


def listed(url: str, key: str) -> list[Any]:
    """What `batcher models` lists."""
    shown = batcher("models", "--base-url", url, "--api-key-env", KEY_ENV, "--json", key=key)
    assert shown.returncode == 0, shown.stderr
    found: list[Any] = msgspec.json.decode(shown.stdout)
    return found


def _command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "batcher", *map(str, words)]


def _recorded(output: Path) -> int:
    """Rows whose answers are in the ledger."""
    ledger = output / "ledger.sqlite"
    if not ledger.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT count(*) FROM attempts WHERE outcome = 1").fetchone()[0])
    except sqlite3.OperationalError:  # it is being made
        return 0
