"""Inputs as they should not be: sound files of every format, cut, mixed up and mutated; and what reading them may do.

`python -m tests.malformed_inputs FOLDER` reads every file in a folder, in the order of names, and names each before it
starts: whoever called sees which one a crash was about.
"""

import gzip
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.source import Source, open_source


class Case(NamedTuple):
    """A file's name, its bytes, and the format that the job names."""

    name: str
    data: bytes
    format: str | None


def _table() -> pa.Table:
    texts = [f"row {n} says something" if n % 7 else None for n in range(60)]
    return pa.table(
        {
            "id": [f"k{n}" for n in range(60)],
            "text": texts,
            "word": pa.array(texts).dictionary_encode(),
            "n": pa.array(range(60), pa.int64()),
            "items": [[str(n)] * (n % 3) for n in range(60)],
            "fields": [{"a": n, "b": {"c": [n]}} for n in range(60)],
            "view": pa.array(texts, pa.string_view()),
            "when": pa.array(range(60), pa.timestamp("ns", "UTC")),
        }
    )


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(_table(), stream, row_group_size=25, compression="zstd")
    return stream.getvalue()


def _arrow(form: str, compression: str | None) -> bytes:
    stream = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    table = _table()
    opened = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with opened(stream, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=25)
    return stream.getvalue()


_JSONL = b"".join(b'{"id": "k%d", "text": "a \\u00e4 %d", "list": [1, {"x": null}]}\n' % (n, n) for n in range(40))
_CSV = b"id,text,n\r\n" + b"".join(b'k%d,"say ""%d"",\nand more",%d\r\n' % (n, n, n) for n in range(40))
_BATCH = b"".join(
    b'{"custom_id": "r%d", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "n": %d}}\n' % (n, n)
    for n in range(40)
)
SOUND: dict[str, tuple[bytes, str | None]] = {
    "rows.parquet": (_parquet(), None),
    "file.arrow": (_arrow("file", None), None),
    "packed.feather": (_arrow("file", "lz4"), None),
    "stream.ipc": (_arrow("stream", None), None),
    "packed-stream.arrow": (_arrow("stream", "zstd"), None),
    "rows.jsonl": (_JSONL, None),
    "rows.jsonl.gz": (gzip.compress(_JSONL, mtime=0), None),
    "rows.jsonl.zst": (bytes(pa.Codec("zstd").compress(_JSONL, asbytes=True)), None),
    "rows.csv": (_CSV, None),
    "rows.tsv": (_CSV.replace(b",", b"\t"), None),
    "rows.csv.gz": (gzip.compress(_CSV, mtime=0), None),
    "batch.jsonl": (_BATCH, "openai-batch"),
}
_HOSTILE = [
    *(b"", b"\n", b"\0", b'"', b'"\n"', b",", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf", b"PAR1", b"ARROW1"),
    *(b"ARROW1\0\0", b"FEA1", b"PAR1" * 4, b"\x1f\x8b", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff" * 64),
    *(b"\x28\xb5\x2f\xfd", b'{"a":' * 3000, b"[" * 3000, b'"' * 999, b"a,a\n1,2", b"a,\n1,2", b'a,"b\n1,2\n3,4'),
    *(b'{"custom_id":1}', b'{"custom_id":"x","method":"GET","url":"","body":{}}', b'{"\\ud800":1}', b"a\r\r\n\n1\r"),
    *(b'{"custom_id":"x","method":"POST","url":"u","body":[]}', b"1e999", b'{"a":1e999}', b"9" * 5000, b"\x80" * 99),
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A file that something is wrong with; now and then it is still sound."""
    name = draw(st.sampled_from(sorted(SOUND)))
    data, format = SOUND[name]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "flip", "cut", "head", "insert", "drop", "hostile", "splice", "name"])):
            case "flip":
                changed = draw(st.binary(min_size=1, max_size=8))
                data = data[:at] + changed + data[at + len(changed) :]
            case "cut":
                data = data[:at]
            case "head":
                data = data[at:]
            case "insert":
                data = data[:at] + draw(st.binary(max_size=40)) + data[at:]
            case "drop":
                data = data[:at] + data[at + draw(st.integers(1, 200)) :]
            case "hostile":
                data = draw(st.sampled_from(_HOSTILE)) + draw(st.sampled_from([b"", data[at:]]))
            case "splice":
                other, _ = SOUND[draw(st.sampled_from(sorted(SOUND)))]
                data = data[:at] + other[draw(st.integers(0, len(other))) :]
            case "name":
                name = draw(st.sampled_from([*sorted(SOUND), "rows.txt", "rows.parquet.gz", "rows.csv.zst"]))
                format = draw(st.sampled_from([None, "csv", "jsonl", "arrow", "parquet", "openai-batch"]))
    return Case(name, data, format)


def examine(folder: Path, case: Case) -> str:
    """Read a file as a run does; what came of it. Raises AssertionError, or what should never be raised."""
    (folder / case.name).write_bytes(case.data)
    try:
        source = open_source(case.name, folder, case.format, 10)
        rows = bad = 0
        for batch in source.batches(0):
            for row in batch:
                assert row.position == rows
                rows += 1
                if row.problem is not None:
                    bad += 1
                    assert f" of {case.name}" in row.problem
                    assert "\n" not in row.problem
        assert source.count(lambda: False) == rows
        held = sum(len(batch) for batch in _kept(source, rows))
        assert held == rows
    except JobError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        return "refused"
    return f"{rows} rows, {bad} of them bad"


def _kept(source: Source, rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, rows, 10):
        for batch in source.kept(start, start + 10, source.columns):
            batch.validate(full=True)
            batch.to_pylist()
            yield batch


def save(folder: Path, number: int, case: Case) -> None:
    """Lay a case down for `main`."""
    place = folder / f"{number:06d}"
    place.mkdir()
    (place / "format").write_text(case.format or "")
    (place / "name").write_text(case.name)
    (place / "data").write_bytes(case.data)


def load(place: Path) -> Case:
    """A case that was laid down."""
    return Case((place / "name").read_text(), (place / "data").read_bytes(), (place / "format").read_text() or None)


def main(folder: Path) -> None:
    """Read every case that lies in a folder."""
    for place in sorted(folder.iterdir()):
        sys.stdout.write(f"{place.name} ")
        sys.stdout.flush()
        sys.stdout.write(f"{examine(place, load(place))}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
