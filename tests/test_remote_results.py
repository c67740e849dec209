"""Results in an object store: the same promises as in a folder, against an S3 service on this machine."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

import batcher
from batcher.simulator import Simulator
from batcher.store import connect
from tests import stories
from tests.s3 import BUCKET, served

ROWS = 60


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The store; every test has its own prefix in it."""
    with served() as url:
        yield url


def make(folder: Path, service: Simulator, rows: int = ROWS) -> tuple[Path, str]:
    """A job whose results go into the store, and where."""
    uri = f"s3://{BUCKET}/{folder.name}/out"
    stories.write_jsonl(folder / "rows.jsonl", rows)
    output = {"path": uri, "ledger": "state/story.sqlite"}
    return stories.write_job(folder, service.url, rows_per_part=20, more={"output": output}), uri


def place(uri: str) -> tuple[fs.FileSystem, str]:
    """The store and the path in it."""
    system, bucket = connect(f"s3://{BUCKET}")
    return system, f"{bucket}/{uri.removeprefix(f's3://{BUCKET}/')}"


def table(uri: str, name: str) -> pa.Table:
    """All parts of a folder, as a reader finds them."""
    system, root = place(uri)
    found = system.get_file_info(fs.FileSelector(f"{root}/{name}", allow_not_found=True))
    paths = sorted(info.path for info in found if info.type == fs.FileType.File)
    assert paths, f"no parts in {uri}/{name}"
    return pa.concat_tables([pq.read_table(path, filesystem=system) for path in paths])


def check(uri: str, service: Simulator, rows: int = ROWS) -> None:
    """Every row exactly once, with an answer that the service gave for it."""
    found = table(uri, "responses").select(["row", "response", "id"]).to_pylist()
    assert [row["row"] for row in found] == list(range(rows))
    given: dict[int, set[str | None]] = {}
    for entry in service.book:
        if stories.good(entry):
            given.setdefault(stories.row_of(entry), set()).add(entry.content)
    assert all(row["response"] in given[row["row"]] for row in found)
    checked = stories.program("verify", uri)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.usefixtures("endpoint")
def test_a_run_and_all_that_is_asked_of_it_afterwards(tmp_path: Path) -> None:
    """Run, status, verify, export, a retry of some answers, and the results from Python."""
    with stories.service() as service:
        job, uri = make(tmp_path, service)
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
        assert f"{uri}/responses" in ended.stdout
        check(uri, service)
        status = json.loads(stories.program("status", uri, "--json").stdout)
        assert (status["state"], status["answered"], status["output"]) == ("complete", ROWS, uri)
        exported = stories.program("export", uri, "--to", "jsonl", "--output", str(tmp_path / "all.jsonl"))
        assert exported.returncode == 0, exported.stderr
        assert len((tmp_path / "all.jsonl").read_text().splitlines()) == ROWS
        again = stories.program("retry", uri, "--where", "row < 3", "--set", "request.max_completion_tokens=32")
        assert again.returncode == 0, again.stderr
        assert table(uri, "responses")["attempts"].to_pylist()[:4] == [2, 2, 2, 1]
        assert stories.program("verify", uri).returncode == 0
        stories.check_no_secret(tmp_path)


@pytest.mark.usefixtures("endpoint")
def test_results_from_python(tmp_path: Path) -> None:
    """What a run gives back reads the store."""
    with stories.service() as service:
        job, uri = make(tmp_path, service)
        result = batcher.run(batcher.load(job, ["service.api_key_env=AWS_ACCESS_KEY_ID"]))
        assert (result.output, result.table().num_rows, result.failures().num_rows) == (uri, ROWS, 0)


@pytest.mark.usefixtures("endpoint")
def test_a_pilot_grows_and_rows_that_fail_are_dead_letters(tmp_path: Path) -> None:
    """A former self is read from the store and merged; a row that is answered later leaves the failures."""
    with stories.service(poison={"[row 00005]": 400}) as service:
        job, uri = make(tmp_path, service)
        assert stories.run(job, "--limit", "30").returncode == 3
        ended = stories.run(job)
        assert ended.returncode == 3, ended.stderr
        assert table(uri, "failures")["row"].to_pylist() == [5]
        rows = table(uri, "responses")["row"].to_pylist()
        assert rows == [row for row in range(ROWS) if row != 5]
        assert stories.program("verify", uri).returncode == 0


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("point", ["responses.synced", "responses.renamed", "attempts.placed", "complete.before"])
def test_a_kill_around_a_put_loses_nothing(tmp_path: Path, point: str) -> None:
    """Killed before or after an object is put, and before the ledger hears of it, the same command goes on."""
    with stories.service() as service:
        job, uri = make(tmp_path, service)
        story = stories.Kills(tmp_path, service, job, in_flight=16, seed=0)
        assert story.kill_once(1_000_000, within=60, BATCHER_KILLPOINT=f"{point}:1"), "the point was never reached"
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
        check(uri, service)
        story.check_repeats()


@pytest.mark.usefixtures("endpoint")
def test_objects_that_are_damaged_or_gone_are_found(tmp_path: Path) -> None:
    """`verify` names them, with exit code 6."""
    with stories.service() as service:
        job, uri = make(tmp_path, service)
        assert stories.run(job).returncode == 0
        system, root = place(uri)
        with system.open_output_stream(f"{root}/responses/part-000001.parquet", compression=None) as stream:
            stream.write(b"no Parquet")
        system.delete_file(f"{root}/attempts/part-000002.parquet")
        checked = stories.program("verify", uri)
        assert checked.returncode == 6
        assert "responses/part-000001.parquet" in checked.stdout
        assert "attempts/part-000002.parquet: is missing" in checked.stdout


def test_a_store_that_refuses_is_said_before_anything_is_sent(tmp_path: Path, endpoint: str) -> None:
    """A bucket that is not there, a store that does not answer: exit code 6, a line or two, and nothing is sent."""
    with stories.service() as service:
        job, _ = make(tmp_path, service)
        for words, more in (
            (("--set", "output.path=s3://no-such-bucket/out"), {}),
            ((), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
        ):
            ended = stories.run(job, *words, **more)
            assert ended.returncode == 6, ended.stderr
            assert len(ended.stderr.splitlines()) <= 2
            assert "Traceback" not in ended.stderr
            assert "story-secret" not in ended.stderr
        assert not [entry for entry in service.book if entry.prompt]
        assert stories.run(job).returncode == 0, endpoint


@pytest.mark.usefixtures("endpoint")
def test_one_ledger_for_one_output(tmp_path: Path) -> None:
    """Another ledger's results are not written over, and a ledger that is not here is said to be elsewhere."""
    with stories.service() as service:
        job, uri = make(tmp_path, service)
        assert stories.run(job).returncode == 0
        other = stories.run(job, "--set", "output.ledger=other/story.sqlite")
        assert other.returncode == 2
        assert "another ledger" in other.stderr
        (tmp_path / "state").rename(tmp_path / "moved")
        for command in ("verify", "status", "retry"):
            ended = stories.program(command, uri)
            assert ended.returncode == 6, (command, ended.stderr)
            assert "not on this machine" in ended.stderr
        assert stories.run(job).returncode == 2
        shutil.rmtree(tmp_path / "state")
        (tmp_path / "moved").rename(tmp_path / "state")
        assert stories.run(job).returncode == 0


@contextmanager
def cutting(endpoint: str, times: int) -> Iterator[tuple[str, list[int]]]:
    """A way to the store that takes puts of answers there and loses what the store says to the first of them."""
    target = urlsplit(endpoint)
    cut: list[int] = []

    def serve(client: socket.socket) -> None:
        upstream = socket.create_connection((target.hostname or "", target.port or 0))
        put = threading.Event()

        def back() -> None:
            with suppress(OSError):
                while data := upstream.recv(65536):
                    if put.is_set() and not data.startswith(b"HTTP/1.1 100") and len(cut) < times:
                        cut.append(len(data))
                        break
                    client.sendall(data)
            for one in (client, upstream):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

        threading.Thread(target=back, daemon=True).start()
        with suppress(OSError):
            while data := client.recv(65536):
                if data.startswith(b"PUT ") and b"/responses/part-" in data.split(b"\r\n", 1)[0]:
                    put.set()
                upstream.sendall(data)

    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", cut
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_a_put_whose_answer_is_lost_is_put_again(tmp_path: Path, endpoint: str) -> None:
    """The store has the part and its word is lost: nothing stands twice, nothing is asked again."""
    with stories.service() as service, cutting(endpoint, 2) as (way, cut):
        job, uri = make(tmp_path, service)
        ended = stories.run(job, AWS_ENDPOINT_URL=way)
        assert ended.returncode == 0, ended.stderr
        assert len(cut) == 2, "no answer was lost"
        check(uri, service)
        assert len([entry for entry in service.book if entry.prompt]) == ROWS
