"""Results in object stores: through the whole program against an S3 service on this machine, in any weather."""

import hashlib
import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
from pyarrow import fs

import batcher
from batcher.engine.run import exclusively
from batcher.errors import StorageError
from batcher.records import FileRecord
from batcher.simulator import Simulator
from batcher.store import Bucket, connect
from batcher.verify import verify
from tests import stories
from tests.s3 import BUCKET, SECRET, Weather, served


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The store; every test has its own prefix in it."""
    with served() as url:
        yield url


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's key, for runs in this process."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)


@pytest.fixture
def uri(endpoint: str) -> str:
    """A place in the store where nothing is yet."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


def job_to(folder: Path, service: Simulator, uri: str, rows: int = 90, **more: dict[str, object]) -> Path:
    """A job over so many rows whose results go to a store."""
    stories.write_jsonl(folder / "rows.jsonl", rows)
    output = {"path": uri, "ledger": "state.sqlite", **more.pop("output", {})}
    return stories.write_job(folder, service.url, rows_per_part=30, more={"output": output, **more})


def fetched(uri: str, folder: Path) -> Path:
    """All that lies under a URI, as a folder on this machine."""
    system, _ = connect(f"s3://{BUCKET}")
    prefix = uri.removeprefix("s3://") + "/"
    target = folder / f"fetched-{secrets.token_hex(4)}"
    for info in system.get_file_info(fs.FileSelector(prefix, recursive=True)):
        if info.type == fs.FileType.File:
            path = target / info.path.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            with system.open_input_file(info.path) as stream:
                path.write_bytes(stream.read())
    return target


def check_complete(uri: str, folder: Path, rows: int, service: Simulator) -> None:
    """What the oracle says of a folder is true of the store; nothing of the run's work is left on this machine."""
    output = fetched(uri, folder)
    stories.check_complete(output, rows, service)
    for path in [*output.rglob("*"), *folder.glob("state.sqlite*")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert not (folder / "state.sqlite.publishing").exists()
    assert not (folder / "out").exists()
    verdict = verify(uri)
    assert (verdict.problems, verdict.pending, verdict.again) == ([], 0, 0)


def check_line(ended: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with this code and two lines at most, which have these words in them and no secret."""
    assert ended.returncode == code, ended.stdout + ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith(" ")]
    assert "Traceback" not in ended.stderr
    told = lines[next(number for number, line in enumerate(lines) if line.startswith("batcher: ")) :]
    assert len(told) <= 2, told
    for word in words:
        assert word in " ".join(told)
    assert not any(secret in ended.stdout + ended.stderr for secret in (SECRET, stories.KEY))


def asked(service: Simulator) -> int:
    """How many questions the service was asked."""
    return len([entry for entry in service.book if entry.prompt])


# In fair weather


def test_results_go_to_a_store(tmp_path: Path, uri: str) -> None:
    """Run, read by all the ways that are told, status, export, grown by rows, retried: all of it by the URI."""
    with stories.service(poison={"[row 00040]": 400}) as service:
        job = job_to(tmp_path, service, uri)
        planned = stories.program("plan", str(job))
        assert f"output     {uri}" in planned.stdout, planned.stderr
        pilot = stories.run(job, "--limit", "40")
        assert pilot.returncode == 0, pilot.stderr
        ended = stories.run(job)
        assert ended.returncode == 3, ended.stderr
        check_complete(uri, tmp_path, 90, service)
        assert asked(service) == 90

        told = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines() if line.startswith("  "))
        assert told["answers"] == f"{uri}/responses"
        assert len(eval(told["pandas"], {"pandas": pandas})) == 89
        assert f"from '{uri}/responses/*.parquet'" in told["DuckDB"]
        assert "1 × rejected" in ended.stdout
        status = json.loads(stories.program("status", uri, "--json").stdout)
        assert (status["output"], status["state"], status["answered"], status["failed"]) == (uri, "complete", 89, 1)

        verified = stories.program("verify", uri)
        assert verified.stdout == f"{uri}: 89 rows answered, 1 failed, 0 pending; no problem found\n", verified.stderr
        exported = stories.program("export", uri, "--to", "jsonl", "--output", str(tmp_path / "all.jsonl"))
        assert exported.returncode == 0, exported.stderr
        assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 89
        again = stories.program("retry", uri, "--set", "service.timeout=9s", "--where", "row in (3, 40, 70)")
        assert again.returncode == 3, again.stderr
        assert "3 rows are asked again" in again.stdout
        assert stories.column(fetched(uri, tmp_path), "responses", "attempts")[2:5] == [1, 2, 1]
        check_complete(uri, tmp_path, 90, service)
        assert asked(service) == 93
        result = batcher.retry(uri)
        assert (result.table().num_rows, result.failures()["row"].to_pylist()) == (89, [40])
        assert result.output == uri


def test_a_part_that_loses_its_rows_is_removed(tmp_path: Path, uri: str) -> None:
    """An object that is not made again goes; one that is not there is no error."""
    store = Bucket(uri, tmp_path / "workshop")
    store.begin()
    store.write("failures/part-000000.parquet", b"rows")
    assert store.unfinished
    assert store.parts() == {"failures/part-000000.parquet"}
    store.remove("failures/part-000000.parquet")
    store.remove("failures/part-000000.parquet")
    store.end()
    assert store.parts() == set()
    assert not store.unfinished
    assert store.read("failures/part-000000.parquet") is None


@pytest.mark.parametrize("damage", ["gone", "damaged", "foreign", "no summary"])
def test_verify_finds_what_is_wrong_in_a_store(tmp_path: Path, uri: str, damage: str) -> None:
    """A part that is missing, differs or does not belong is named."""
    with stories.service() as service:
        assert stories.run(job_to(tmp_path, service, uri)).returncode == 0
    system, path = connect(uri)
    part = f"{path}/responses/part-000001.parquet"
    if damage == "gone":
        system.delete_file(part)
    elif damage == "foreign":
        system.copy_file(part, f"{path}/responses/part-000009.parquet")
    elif damage == "damaged":
        with system.open_input_file(part) as stream:
            content = stream.read()
        with system.open_output_stream(part, compression=None) as written:
            written.write(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    else:
        system.delete_file(f"{path}/summary.json")
    found = verify(uri).problems
    expected = {
        "gone": "responses/part-000001.parquet: is missing (30 rows)",
        "damaged": "responses/part-000001.parquet: is not what was published: its sha256 differs",
        "foreign": "responses/part-000009.parquet: is not known to the ledger",
    }
    assert expected.get(damage) in [*found, None]
    assert bool(found) == (damage != "no summary")


# Kills


@pytest.mark.parametrize("point", ["responses.synced", "responses.renamed", "attempts.placed", "complete.before"])
def test_a_run_into_a_store_survives_a_kill(tmp_path: Path, uri: str, point: str) -> None:
    """Killed between making a part, putting it and noting it: the same command goes on, and no answer is lost."""
    with stories.service(latency=0.005, poison={"[row 00003]": 400, "[row 00040]": 400}) as service:
        job = job_to(tmp_path, service, uri)
        story = stories.Kills(tmp_path, service, job, in_flight=16, seed=0)
        assert story.kill_once(1_000_000, within=60, BATCHER_KILLPOINT=f"{point}:1"), "the point was never reached"
        told = stories.program("verify", uri)
        assert "did not come to its end" in told.stdout, told.stdout + told.stderr
        ended = stories.run(job)
        assert ended.returncode == 3, ended.stderr
        check_complete(uri, tmp_path, 90, service)
        story.check_repeats()


@pytest.mark.parametrize("point", ["responses.renamed", "complete.before"])
def test_a_part_in_a_store_that_is_opened_again_survives_a_kill(tmp_path: Path, uri: str, point: str) -> None:
    """A pilot, then all rows, killed where the part's newer self is in the store and not yet noted."""
    with stories.service(latency=0.005) as service:
        job = job_to(tmp_path, service, uri, rows=30)
        assert stories.run(job, "--limit", "10").returncode == 0
        story = stories.Kills(tmp_path, service, job, in_flight=16, seed=0)
        assert story.kill_once(1_000_000, within=0, BATCHER_KILLPOINT=f"{point}:1")
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
        check_complete(uri, tmp_path, 30, service)
        story.check_repeats()


def test_a_retry_into_a_store_survives_a_kill(tmp_path: Path, uri: str) -> None:
    """Killed after a part was put anew, the next retry goes on and ends with sums that are right."""
    with stories.service(latency=0.005) as service:
        job = job_to(tmp_path, service, uri)
        assert stories.run(job).returncode == 0
        words = ("retry", uri, "--where", "row % 10 = 0")
        story = stories.Kills(tmp_path, service, job, in_flight=16, seed=0, words=words)
        assert story.kill_once(1_000_000, within=60, BATCHER_KILLPOINT="responses.renamed:2")
        refused = stories.run(job)
        check_line(refused, 2, f"batcher retry {uri} goes on with it")
        ended = stories.program("retry", uri)
        assert ended.returncode == 0, ended.stderr
        check_complete(uri, tmp_path, 90, service)


def test_answers_in_a_store_are_read_again(tmp_path: Path, uri: str) -> None:
    """A reparse that was killed between two parts goes on, asks nothing, needs no key, and leaves one reading."""
    with stories.service() as service:
        job = job_to(tmp_path, service, uri, request={"parse": r"regex:\w+"})
        assert stories.run(job).returncode == 0
        words = ["reparse", uri, "--set", r"request.parse=regex:^\W*(\w+)"]
        killed = stories.program(*words, BATCHER_KILLPOINT="responses.placed:2", STORY_KEY="")
        assert killed.returncode == -9, killed.stderr
        verdict = verify(uri)
        assert (verdict.problems, verdict.rereading) == ([], True)
        ended = stories.program("reparse", uri, STORY_KEY="")
        assert (ended.returncode, ended.stdout) == (0, f"{uri}: 90 answers are read again\n"), ended.stderr
        check_complete(uri, tmp_path, 90, service)
        assert asked(service) == 90
    for row in stories.table(fetched(uri, tmp_path), "responses").to_pylist():
        assert row["parsed"] == re.findall(r"\w+", row["response"])[0]


# Bad weather


def made_of(folder: Path, content: bytes) -> tuple[Path, FileRecord]:
    """A file of the workshop, and what is to be known of it."""
    path = folder / "responses-000000"
    path.write_bytes(content)
    name = "responses/part-000000.parquet"
    return path, FileRecord(name, 1, len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("size", [1000, 12 << 20])
def test_a_put_whose_answer_is_lost_is_looked_after(tmp_path: Path, endpoint: str, uri: str, size: int) -> None:
    """The store has taken the file and the answer never came: it is found there, and the put is a success."""
    with Weather(endpoint) as weather:
        store = Bucket(uri, tmp_path, waits=())
        store.write("job.toml", b"")
        last = "PUT" if size < 5 << 20 else "POST"
        weather.of = lambda line: "lost" if line.startswith(last) and "uploads" not in line else None
        made, file = made_of(tmp_path, os.urandom(size))
        content = made.read_bytes()
        store.put(made, file)
        weather.of = lambda line: None
        assert weather.met
        assert store.read(file.name) == content
        assert not made.exists()


@pytest.mark.parametrize("fate", ["unsent", "denied"])
def test_a_put_that_fails_leaves_the_former_self(tmp_path: Path, endpoint: str, uri: str, fate: str) -> None:
    """An upload that breaks off in its second piece makes nothing, not a shorter file either; the next put does."""
    with Weather(endpoint) as weather:
        store = Bucket(uri, tmp_path, waits=())
        former, file = made_of(tmp_path, b"former self")
        store.put(former, file)
        made, file = made_of(tmp_path, os.urandom(25 << 20))
        content = made.read_bytes()
        weather.of = lambda line: fate if "partNumber=2" in line else None
        with pytest.raises(StorageError) as raised:
            store.put(made, file)
        del raised
        weather.of = lambda line: None
        assert store.read(file.name) == b"former self"
        store.put(made, file)
        assert store.read(file.name) == content


def test_a_store_that_comes_back_is_asked_again(tmp_path: Path, endpoint: str, uri: str) -> None:
    """Between its own tries the store is given time; what was put then is whole."""
    with Weather(endpoint) as weather:
        store = Bucket(uri, tmp_path, waits=(0.1, 0.1))
        store.write("job.toml", b"")
        made, file = made_of(tmp_path, b"content")
        tries = iter(range(1000))
        weather.of = lambda line: "unsent" if line.startswith("PUT") and next(tries) < 40 else None
        store.put(made, file)
        assert len(weather.met) == 40, "the S3 library has not given up once"
        assert store.read(file.name) == b"content"


def test_a_run_through_lost_answers_is_complete(tmp_path: Path, endpoint: str, uri: str) -> None:
    """Every third put loses its answer: the run does not notice."""
    with stories.service(latency=0.002) as service, Weather(endpoint) as weather:
        puts = iter(range(1_000_000))
        weather.of = lambda line: "lost" if line.startswith("PUT") and next(puts) % 3 == 0 else None
        job = job_to(tmp_path, service, uri)
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
        weather.of = lambda line: None
        assert len(weather.met) >= 3
        check_complete(uri, tmp_path, 90, service)
        assert asked(service) == 90


def test_a_store_that_refuses_later_ends_the_run_and_nothing_is_lost(tmp_path: Path, endpoint: str, uri: str) -> None:
    """Denied in the middle, the run ends with 6; when it is allowed again the same command ends it, asking nothing."""
    with stories.service(latency=0.002) as service, Weather(endpoint) as weather:
        weather.of = lambda line: "denied" if line.startswith("PUT") and "part-000001" in line else None
        job = job_to(tmp_path, service, uri)
        check_line(stories.run(job), 6, f"{uri}: ", "part-000001.parquet cannot be put", "ACCESS_DENIED")
        weather.of = lambda line: None
        seen = asked(service)
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
        check_complete(uri, tmp_path, 90, service)
        assert asked(service) == 90
        assert seen > 30


@pytest.mark.parametrize(
    ("fate", "words"), [("denied", "ACCESS_DENIED"), ("down", "NETWORK_CONNECTION"), ("bucket", "NO_SUCH_BUCKET")]
)
def test_a_store_that_cannot_take_results_is_found_before_anything_is_sent(
    tmp_path: Path, endpoint: str, uri: str, fate: str, words: str
) -> None:
    """No bucket, no right, no store: one or two lines, and the service has heard nothing."""
    with stories.service() as service, Weather(endpoint) as weather:
        if fate != "bucket":
            weather.of = lambda line: fate
        job = job_to(tmp_path, service, "s3://no-such-bucket/out" if fate == "bucket" else uri)
        check_line(stories.run(job), 6, words)
        assert asked(service) == 0
        weather.of = lambda line: None
        if fate != "bucket":
            assert stories.run(job).returncode == 0
            check_complete(uri, tmp_path, 90, service)


# Whose results they are


def test_results_of_another_ledger_are_not_touched(tmp_path: Path, uri: str) -> None:
    """Another ledger on the same place, a ledger that is gone, one that was moved: each is told what it may do."""
    with stories.service() as service:
        job = job_to(tmp_path, service, uri, rows=30)
        assert stories.run(job).returncode == 0
        other = stories.run(job, "--set", "output.ledger=other.sqlite")
        check_line(other, 2, f"{uri} belongs to another ledger than {tmp_path}/other.sqlite")
        assert (
            "belongs to another ledger"
            in stories.program("plan", str(job), "--set", "output.ledger=other.sqlite").stdout
        )

        (tmp_path / "state.sqlite").rename(tmp_path / "moved.sqlite")
        for command in ("verify", "status", "retry"):
            check_line(stories.program(command, uri), 6, f"{tmp_path}/state.sqlite", "not on this machine")
        check_line(stories.run(job), 2, "belongs to another ledger")
        exported = stories.program("export", uri, "--to", "csv", "--output", str(tmp_path / "all.csv"))
        assert exported.returncode == 0, exported.stderr

        stories.write_jsonl(tmp_path / "more.jsonl", 0)
        moved = stories.run(job, "--set", "output.ledger=moved.sqlite")
        assert moved.returncode == 0, moved.stderr
        assert asked(service) == 30
        assert stories.program("verify", uri).returncode == 0


def test_two_runs_into_one_store_exclude_each_other(tmp_path: Path, uri: str) -> None:
    """While one has the ledger, another run, a verify and a retry of the same output end with 5; status looks on."""
    with stories.service() as service:
        path = job_to(tmp_path, service, uri, rows=16)
        assert stories.run(path).returncode == 0
        job = batcher.load(path)
        with exclusively(job.results, job.ledger_path):
            for words in (("run", str(path)), ("verify", uri), ("retry", uri)):
                check_line(stories.program(*words), 5, "is in use by another run")
            assert json.loads(stories.program("status", uri, "--json").stdout)["state"] == "in use"
        check_complete(uri, tmp_path, 16, service)


# Other schemes


def test_results_go_to_what_fsspec_speaks(tmp_path: Path) -> None:
    """Through fsspec's own file systems: run, grown, read from Python, verified."""
    place = f"memory://{secrets.token_hex(4)}/out"
    with stories.service(poison={"[row 00040]": 400}) as service:
        job = job_to(tmp_path, service, place)
        assert batcher.run(batcher.load(job, ["input.limit=40"])).table().num_rows == 40
        result = batcher.run(batcher.load(job))
        assert (result.table().num_rows, result.failures()["row"].to_pylist()) == (89, [40])
        assert verify(place).problems == []
        assert asked(service) == 90
        assert batcher.retry(place, "row = 3").table().num_rows == 89


def test_a_scheme_that_nobody_speaks_is_refused(tmp_path: Path) -> None:
    """One line, and nothing is sent."""
    with stories.service() as service:
        check_line(stories.run(job_to(tmp_path, service, "nope://bucket/out")), 2, "nope://bucket/out")
        assert asked(service) == 0
