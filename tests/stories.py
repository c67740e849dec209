"""What the stories share: an input, a job, the program as a process, and the oracle that checks what it left."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import anyio
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

import batcher
from batcher.simulator import Entry, Settings, Simulator, running

KEY = "sk-canary-5f0c1b7d"
"""The key of all stories: it must turn up in no file and on no screen."""
FAULTS = {"500": 0.02, "503": 0.01, "429": 0.02, "reset": 0.01, "cut": 0.01, "malformed": 0.01, "empty": 0.01}
"""About a tenth of all answers, by what is wrong with them."""

_LINE = "[row {row:05d}] Say something about {thing}."
_THINGS = ("tea", "rain", "a late train", "a kind letter", "the sea", "an old bicycle")


def prompt(row: int) -> str:
    """The text of a row; it tells the row's number, so that the service's book can be read by row."""
    return _LINE.format(row=row, thing=_THINGS[row % len(_THINGS)])


def row_of(entry: Entry) -> int:
    """The row that a request in the service's book was about."""
    return int(entry.prompt[5:10])


def write_jsonl(path: Path, rows: int) -> None:
    """An input of so many rows."""
    with path.open("w") as file:
        for row in range(rows):
            file.write(json.dumps({"key": f"k{row}", "text": prompt(row)}) + "\n")


def write_job(
    folder: Path,
    url: str,
    *,
    source: str = "rows.jsonl",
    in_flight: int | str = 16,
    rows_per_part: int = 500,
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    """A job file over the input in this folder; `more` adds keys, and takes away those that it sets to None."""
    sections: dict[str, dict[str, object]] = {
        "input": {"path": source, "id": "key"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 64},
        "service": {"base_url": url, "api_key_env": "STORY_KEY", "dialect": "cerebras", "timeout": "5s"},
        "schedule": {"max_in_flight": in_flight},
        "output": {"path": "out", "rows_per_part": rows_per_part, "keep": ["text"]},
    }
    for name, values in (more or {}).items():
        sections.setdefault(name, {}).update(values)
    path = folder / "job.toml"
    given = {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}
    path.write_bytes(msgspec.toml.encode({"name": "story", **given}))
    return path


def command(*words: str) -> list[str]:
    """The program's command line."""
    return [sys.executable, "-m", "batcher", *words]


def environment(**more: str) -> dict[str, str]:
    """The program's environment; the key is in it and nowhere else."""
    return {**os.environ, "STORY_KEY": KEY, "PYTHONWARNINGS": "error::ResourceWarning", **more}


def run(job: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A job, run to its end."""
    return program("run", str(job), *words, **more)


def program(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The program, run to its end."""
    return subprocess.run(
        command(*words),
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def column(output: Path, folder: str, name: str) -> list[object]:
    """One column over all parts of a folder, as a reader would see it who globs now."""
    values: list[object] = []
    for part in sorted((output / folder).glob("*.parquet")):
        with contextlib.suppress(FileNotFoundError):
            values += pq.read_table(part, columns=[name]).column(0).to_pylist()
    return values


def table(output: Path, folder: str) -> pa.Table:
    """All parts of a folder."""
    return pa.concat_tables([pq.read_table(part) for part in sorted((output / folder).glob("*.parquet"))])


def good(entry: Entry) -> bool:
    """Whether the service gave a whole answer that a client should be content with."""
    return entry.status == 200 and entry.answered_at is not None and entry.fault in (None, "slow", "surrogate")


class Kills:
    """A run that is killed again and again, and what each kill cost."""

    def __init__(
        self, folder: Path, service: Simulator, job: Path, in_flight: int, seed: int, words: Sequence[str] = ()
    ) -> None:
        """`words` are the command to kill, the job's run where there are none."""
        self.service = service
        self.words = words or ("run", str(job))
        self.output = folder / "out"
        self.in_flight = in_flight
        self.random = random.Random(seed)
        self.at: list[float] = []
        self.repeated: list[int] = []

    def kill_once(self, after_requests: int, within: float, drained: bool = False, **more: str) -> bool:
        """Start the program, kill it some moments after it has sent so many requests; false when it ended before.

        `drained` asks it to end first, so that a named point of the draining can be what kills it.
        """
        seen = len(self.service.book)
        process = subprocess.Popen(
            command(*self.words, "--quiet"),
            env=environment(**more),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            deadline = time.monotonic() + 60
            while len(self.service.book) - seen < after_requests and process.poll() is None:
                if time.monotonic() >= deadline:
                    process.kill()
                    raise AssertionError("the run does not get on")
                time.sleep(0.002)
            if drained:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.random.uniform(0, within))
            if process.poll() is not None and process.returncode != -signal.SIGKILL:
                assert process.stderr is not None
                assert process.returncode in (0, 3), process.stderr.read()
                return False
            process.kill()
            process.wait()
        self.at.append(time.monotonic())
        self.check_glob()
        return True

    def check_glob(self) -> None:
        """At no moment does a reader see a row twice."""
        rows = column(self.output, "responses", "row")
        assert len(rows) == len(set(rows))

    def check_repeats(self) -> None:
        """No answer is asked for again that left 250 ms before a kill; a kill repeats no more than was in flight."""
        requests: dict[int, list[Entry]] = {}
        for entry in self.service.book:
            if entry.prompt:  # a key that is refused hides the question
                requests.setdefault(row_of(entry), []).append(entry)
        repeated: Counter[float] = Counter()
        for row, entries in requests.items():
            entries.sort(key=lambda entry: entry.arrived)
            for earlier, later in itertools.pairwise(entries):
                kill = next((at for at in self.at if earlier.arrived < at < later.arrived), None)
                if kill is not None and earlier.answered_at is None and earlier.fault is None:
                    repeated[kill] += 1  # it was in flight
                if not good(earlier):
                    continue
                assert kill is not None, f"row {row} was answered and asked again without a kill"
                assert earlier.answered_at is not None
                assert earlier.answered_at > kill - 0.25, f"row {row}: an answer was lost that had long arrived"
                repeated[kill] += 1
        self.repeated = [repeated[at] for at in self.at]
        assert max(self.repeated, default=0) <= self.in_flight


@contextlib.contextmanager
def service(**settings: object) -> Iterator[Simulator]:
    """The simulated service with its book, quick and without limits unless told otherwise."""
    quick: dict[str, object] = {"requests_per_minute": None, "tokens_per_minute": None, "latency": 0.02}
    with running(Settings(**{**quick, **settings}), record=True) as simulator:  # type: ignore[arg-type]
        yield simulator


async def cancelled(job: batcher.Job, service: Simulator, answers: int) -> None:
    """Run a job, and cancel it once the service has given so many answers."""
    async with anyio.create_task_group() as group:
        group.start_soon(batcher.arun, job)
        while sum(map(good, list(service.book))) < answers:  # noqa: ASYNC110 (the service is on another thread)
            await anyio.sleep(0.005)
        group.cancel_scope.cancel()


def check_complete(output: Path, rows: int, service: Simulator) -> None:
    """The oracle: every row exactly once, each answer one that the service gave for it, the books equal."""
    responses, failures = column(output, "responses", "row"), column(output, "failures", "row")
    assert sorted([*responses, *failures]) == list(range(rows))  # type: ignore[type-var]
    assert responses == sorted(responses)  # type: ignore[type-var]
    given: dict[int, set[str | None]] = {}
    for entry in service.book:
        if good(entry):
            given.setdefault(row_of(entry), set()).add(entry.content and storable(entry.content))
    kept = table(output, "responses").select(["row", "response", "text", "id"]).to_pylist()
    for row in kept:
        assert row["response"] in given[row["row"]]
        assert row["text"] == prompt(row["row"])
        assert row["id"] == f"k{row['row']}"
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["state"], summary["pending"]) == ("complete", 0)
    assert summary["totals"]["answered"] == len(responses)
    assert not (output / ".publishing").exists()
    check_no_secret(output)


def check_no_secret(output: Path) -> None:
    """The key stands in no file of the output."""
    for path in output.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def storable(text: str) -> str:
    """A text as Parquet can hold it."""
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)


@contextlib.contextmanager
def at(port: int) -> Iterator[Simulator]:
    """The service, now listening where nobody listened before."""
    with running(Settings(requests_per_minute=None, tokens_per_minute=None), port=port, record=True) as simulator:
        yield simulator
