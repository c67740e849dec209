"""Inputs in object stores, against an S3 service on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batcher.errors import JobError
from batcher.source import open_source
from batcher.store import connect
from tests import stories
from tests.s3 import BUCKET, served
from tests.test_inputs import write_arrow
from tests.test_source import kept, never, packed, rows


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The store; every test has its own prefix in it."""
    with served() as url:
        yield url


def put(key: str, data: bytes) -> str:
    """An object; returns its URI."""
    uri = f"s3://{BUCKET}/{key}"
    system, path = connect(f"s3://{BUCKET}")
    with system.open_output_stream(f"{path}/{key}", compression=None) as stream:
        stream.write(data)
    return uri


def lines(numbers: range) -> bytes:
    """JSONL of these rows."""
    return b"".join(b'{"key": "k%d", "text": "%s"}\n' % (n, stories.prompt(n).encode()) for n in numbers)


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet", "a.arrow", "b.arrow"])
def test_an_object_is_read_like_a_file(tmp_path: Path, name: str) -> None:
    """Every format gives the same rows and columns from a store as from the disk, from any start."""
    table = pa.table({"key": [f"k{n}" for n in range(100)], "text": [f"text {n}" for n in range(100)]})
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=30)
    elif name.endswith(".arrow"):
        write_arrow(path, table, "file" if name[0] == "a" else "stream", size=30)
    elif name.endswith(".csv"):
        path.write_text("key,text\n" + "".join(f"k{n},text {n}\n" for n in range(100)))
    else:
        text = b"".join(b'{"key": "k%d", "text": "text %d"}\n' % (n, n) for n in range(100))
        path.write_bytes(packed(text, path.suffix))
    uri = put(f"formats/{name}", path.read_bytes())
    near, far = open_source(name, tmp_path, None, 20), open_source(uri, tmp_path, None, 20)
    assert [identity.name for identity in far.identities] == [uri]
    assert far.identities[0].sample == near.identities[0].sample
    assert rows(far) == rows(near)
    assert rows(far, 61) == rows(near, 61)
    assert kept(far, ["text"], 45, 77) == kept(near, ["text"], 45, 77)
    assert far.count(never) == 100
    far.check()


@pytest.mark.usefixtures("endpoint")
def test_prefixes_globs_and_lists_of_objects(tmp_path: Path) -> None:
    """A prefix is a folder; patterns and names mean what they mean on the disk; odd names are names."""
    for key in ("b.jsonl", "sub/c d%20ä.jsonl", "a.jsonl", "_x.jsonl", ".h.jsonl", "note.txt", "sub/_tmp/x.jsonl"):
        put(f"many/{key}", b'{"name": "%s"}\n' % key.encode())

    def found(*paths: str) -> list[object]:
        source = open_source([f"s3://{BUCKET}/{path}" for path in paths], tmp_path, None, 10)
        return [row.fields["name"] for row in rows(source)]

    everything = ["a.jsonl", "b.jsonl", "sub/c d%20ä.jsonl"]
    assert found("many") == found("many/") == everything
    assert found("many/*.jsonl") == ["_x.jsonl", "a.jsonl", "b.jsonl"]
    assert found("many/**/[bc]*.jsonl") == ["b.jsonl", "sub/c d%20ä.jsonl"]
    assert found("many/?.jsonl", "many/a.jsonl") == ["a.jsonl", "b.jsonl", "a.jsonl"]
    assert found("many/sub/c d%20ä.jsonl") == ["sub/c d%20ä.jsonl"]


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"s3://{BUCKET}/none.jsonl", f"input s3://{BUCKET}/none.jsonl does not exist"),
        ("s3://no-such-bucket/a.jsonl", "input s3://no-such-bucket/a.jsonl does not exist"),
        (f"s3://{BUCKET}/none/*.jsonl", f"input s3://{BUCKET}/none/*.jsonl matches nothing"),
        ("s3://id:secret@bucket/a.jsonl", "s3:// path: keys do not belong into a path; set them in the environment"),
        ("nope://bucket/a.jsonl", "nope://bucket: "),
    ],
)
def test_an_object_that_is_not_there_is_one_line(tmp_path: Path, uri: str, message: str) -> None:
    """What keeps an object from being read is said in one line without any key."""
    with pytest.raises(JobError) as caught:
        open_source(uri, tmp_path, None, 10)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("endpoint")
def test_a_changed_object_is_noticed(tmp_path: Path) -> None:
    """While a run reads it, another size is enough; no object is read once more for a digest of all of it."""
    uri = put("changing/a.jsonl", lines(range(5)))
    source = open_source(uri, tmp_path, None, 10)
    assert source.digest(0, never) == ""
    put("changing/a.jsonl", lines(range(6)))
    with pytest.raises(JobError, match=r"a\.jsonl was changed while the run was reading it"):
        source.check()


def test_a_run_over_objects_goes_on_with_new_ones(tmp_path: Path, endpoint: str) -> None:
    """Through the whole program: rows of a prefix, then those of an object that came to it, then a changed one."""
    put("runs/m.jsonl", lines(range(30)))
    with stories.service() as service:
        job = stories.write_job(tmp_path, service.url, source=f"s3://{BUCKET}/runs", rows_per_part=20)
        first = stories.run(job)
        assert first.returncode == 0, first.stderr
        put("runs/a.jsonl", lines(range(30, 50)))
        assert stories.run(job).returncode == 0
        stories.check_complete(tmp_path / "out", 50, service)
        assert len([entry for entry in service.book if entry.path.endswith("completions")]) == 50
        put("runs/m.jsonl", lines(range(31)))
        refused = stories.run(job)
        assert refused.returncode == 2
        assert "m.jsonl is larger" in refused.stderr
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in refused.stderr
        down = stories.run(job, AWS_ENDPOINT_URL="http://127.0.0.1:9")
        assert down.returncode == 2, down.stderr
        assert "Traceback" not in down.stderr
        assert len(down.stderr.splitlines()) <= 2
