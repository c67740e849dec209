"""What people bring: CSV, Arrow, OpenAI batch files, types, tables from Python, and files that are added later."""

import csv
import io
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb
import msgspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher.errors import JobError
from batcher.job import RequestTemplate
from batcher.prompt import Composer
from batcher.records import Request, Row
from batcher.source import ALTERED, Place, Source, changed, open_source, open_table
from tests import stories
from tests.test_source import kept, never, packed, rows


def one(folder: Path, name: str, data: bytes, format: str | None = None) -> Source:
    """A source of one file."""
    (folder / name).write_bytes(packed(data, Path(name).suffix))
    return open_source(name, folder, format, 2)


# CSV

CELLS = st.text(st.sampled_from('ab",\t\n\r é'), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=12)),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["rows.csv", "rows.tsv", "rows.csv.gz", "rows.csv.zst"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 12),
)
def test_csv_is_read_as_it_was_written(
    table: list[list[str]], end: str, name: str, all_quoted: bool, bom: bool, start: int
) -> None:
    """Whatever a CSV writer writes comes back cell by cell, from every start, and places lead to the same rows."""
    if not all_quoted:  # Python's writer leaves a carriage return without quotes
        table = [[cell.replace("\r", "") for cell in cells] for cells in table]
    header = [f"c{index}" for index in range(len(table[0]) if table else 2)]
    text = io.StringIO()
    mark = "\t" if name.endswith(".tsv") else ","
    writer = csv.writer(text, delimiter=mark, lineterminator=end, quoting=1 if all_quoted else 0)
    writer.writerow(header)
    writer.writerows(table)
    expected = [dict(zip(header, cells, strict=True)) for cells in table]
    with tempfile.TemporaryDirectory() as folder:
        source = one(Path(folder), name, b"\xef\xbb\xbf" * bom + text.getvalue().encode())
        found = rows(source)
        assert [row.problem for row in found] == [None] * len(table)
        assert [row.fields for row in found] == expected
        assert source.columns == tuple(header)
        assert source.count(never) == len(table)
        again = open_source(name, Path(folder), None, 2)
        again.places.update(source.places)
        assert rows(again, start) == found[start:]
        assert kept(again, header, start).drop_columns([ALTERED]).to_pylist() == expected[start:]


def test_csv_cells_are_text(tmp_path: Path) -> None:
    """Nothing is guessed: numbers stay text, an empty cell is an empty text, a blank line is no row."""
    source = one(tmp_path, "rows.csv", b'a,b\n007,\n\n"",null\r\n\r\n  ,1e3')
    assert [row.fields for row in rows(source)] == [
        {"a": "007", "b": ""},
        {"a": "", "b": "null"},
        {"a": "  ", "b": "1e3"},
    ]
    assert source.schema(["a"]).types == [pa.string()]
    assert source.places == {0: Place(0, 4, 2), 2: Place(0, 21, 6)}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"1,2,3", "has 3 cells, the header 2"),
        (b"1", "has 1 cell, the header 2"),
        (b'"1"x,2', "has text after a closing quote, at character 4"),
        (b"1,\xff", "is not UTF-8: byte 3 of the row"),
        (b'1,"\n\n2,"3', "has text after a closing quote, at character 9"),
    ],
)
def test_a_bad_csv_row_is_that_rows_problem(tmp_path: Path, text: bytes, problem: str) -> None:
    """A row that does not fit costs itself alone, and is named by file and line."""
    first, bad, last = rows(one(tmp_path, "rows.csv", b"a,b\n0,0\n" + text + b"\n9,9\n"))
    assert (first.fields, last.fields) == ({"a": "0", "b": "0"}, {"a": "9", "b": "9"})
    assert bad == Row(1, {}, f"line 3 of rows.csv {problem}")


def test_a_quote_that_is_never_closed_takes_the_rest(tmp_path: Path) -> None:
    """What follows an open quote is its cell: one bad row, named by the line at which it begins."""
    found = rows(one(tmp_path, "rows.csv", b'a,b\n1,2\n3,"4\n5,6\n7,8\n'))
    assert [row.problem for row in found] == [
        None,
        "line 3 of rows.csv has a quote that is never closed, at character 3",
    ]


def test_a_csv_row_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    """64 MiB in one quoted cell of many lines are too much; what follows the cell is read again."""
    with (tmp_path / "rows.csv").open("wb") as stream:
        stream.write(b'a,b\n1,"')
        stream.writelines([b"x" * 999_999 + b"\n"] * 70)
        stream.write(b'"\n3,4\n')
    first, second = rows(open_source("rows.csv", tmp_path, None, 10))
    assert first.problem == "line 2 of rows.csv is longer than 64 MiB"
    assert second.fields == {"a": "3", "b": "4"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no header"),
        (b"\n\r\n", "has no header"),
        (b"a,b,a\n", "names two columns 'a'"),
        (b"a,,b\n", "has no name for column 2"),
        (b"a,\xff\n", "is not UTF-8"),
        (b'a,"b\n1,2\n', "has a quote that is never closed"),
    ],
)
def test_a_csv_header_has_a_name_for_each_column(tmp_path: Path, data: bytes, message: str) -> None:
    """Without sound names there are no columns, and no run."""
    with pytest.raises(JobError, match=message) as caught:
        one(tmp_path, "rows.csv", data)
    assert "rows.csv" in str(caught.value)


def test_csv_files_of_one_job_have_the_same_columns(tmp_path: Path) -> None:
    """Each file has its own header: the order of columns may differ, their names may not."""
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("y,x\n3,4\n")
    assert [row.fields for row in rows(open_source(".", tmp_path, None, 10))] == [
        {"x": "1", "y": "2"},
        {"x": "4", "y": "3"},
    ]
    (tmp_path / "c.csv").write_text("x,z\n")
    with pytest.raises(JobError, match=r"c\.csv has no column 'y', which a\.csv has"):
        open_source(".", tmp_path, None, 10)


# Arrow

TABLE = pa.table(
    {
        "n": pa.array(range(50)),
        "text": [None if n % 5 == 0 else f"text {n}" for n in range(50)],
        "word": pa.array([f"w{n % 3}" for n in range(50)]).dictionary_encode(),
        "items": [[{"a": n}] * (n % 3) for n in range(50)],
    }
)


def write_arrow(path: Path, table: pa.Table, form: str, compression: str | None = None, size: int = 8) -> None:
    """An Arrow file or stream."""
    opened = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with opened(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=size)


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_rows_are_the_same_however_they_are_reached(tmp_path: Path, form: str, compression: str | None) -> None:
    """Files and streams, packed or not: starts, columns and record batches change no row."""
    write_arrow(tmp_path / "a.arrow", TABLE.slice(0, 30), form, compression)
    write_arrow(tmp_path / "b.feather", TABLE.slice(30), form, compression, 7)
    source = open_source(".", tmp_path, None, 10)
    assert (source.format, source.total, source.columns) == ("arrow", 50, ("n", "text", "word", "items"))
    expected = [Row(n, fields) for n, fields in enumerate(TABLE.to_pylist())]
    for start in (0, 7, 29, 30, 49, 50):
        assert rows(source, start) == expected[start:]
    assert [row.fields for row in rows(source, 31, ["word", "n"])] == [
        {"word": row.fields["word"], "n": row.fields["n"]} for row in expected[31:]
    ]
    held = kept(source, ["items", "word"], 25, 36)
    assert held["word"].type == pa.string()
    assert held["items"].to_pylist() == TABLE["items"].to_pylist()[25:36]


def test_feather_version_1_is_refused(tmp_path: Path) -> None:
    """The old format of the same name is named, with the way out."""
    (tmp_path / "old.feather").write_bytes(b"FEA1" + b"\0" * 60 + b"FEA1")
    with pytest.raises(JobError, match=r"^input file old\.feather cannot be read: this is Feather version 1; write it"):
        open_source("old.feather", tmp_path, None, 10)


def test_a_broken_arrow_value_costs_its_row(tmp_path: Path) -> None:
    """Text that is not UTF-8 is its row's problem, and is kept mended and marked."""
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff!", b"c"]).buffers())
    write_arrow(tmp_path / "rows.arrow", pa.table({"t": broken}), "file")
    source = open_source("rows.arrow", tmp_path, None, 10)
    first, second, third = rows(source)
    assert (first.fields, third.fields) == ({"t": "a"}, {"t": "c"})
    assert second.problem is not None
    assert second.problem.startswith("row 2 of rows.arrow: column 't' cannot be read: ")
    assert kept(source, ["t"]).to_pylist()[1] == {"t": "\ufffd!", ALTERED: True}


# OpenAI batch files


def test_a_batch_file_gives_requests_as_they_were_written(tmp_path: Path) -> None:
    """`custom_id`, `url`, and the body byte for byte; kept, the body is JSON text."""
    body = '{"model": "m",  "messages":[{"role":"user","content":"\\u00e4"}], "temperature":1.50}'
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ' + body + "}\n"
    plain = '{"body": {}, "url": "/x", "method": "POST", "custom_id": "a", "more": 1}\n'
    source = one(tmp_path, "requests.jsonl", (line + "\n" + plain).encode(), "openai-batch")
    first, second = rows(source)
    assert isinstance(first.fields["body"], msgspec.Raw)
    assert bytes(first.fields["body"]) == body.encode()
    assert msgspec.json.encode(first.fields["body"]) == body.encode()
    assert (first.fields["custom_id"], first.fields["url"]) == ("a", "/v1/chat/completions")
    assert (second.fields["custom_id"], second.problem) == ("a", None)
    assert source.columns == ("custom_id", "url", "body")
    assert kept(source, ["body", "custom_id"]).to_pylist() == [
        {"body": body, "custom_id": "a", ALTERED: False},
        {"body": "{}", "custom_id": "a", ALTERED: False},
    ]
    assert open_source("requests.jsonl", tmp_path, None, 10).format == "jsonl"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"custom_id": None}, "is no request: its custom_id is None, not a text"),
        ({"custom_id": 5}, "is no request: its custom_id is 5, not a text"),
        ({"method": "GET"}, "is no request: its method is 'GET', not 'POST'"),
        ({"url": ...}, "is no request: its url is missing, not a text"),
        ({"body": "{}"}, "is no request: its body is '{}', not an object"),
        ({"body": ...}, "is no request: its body is missing, not an object"),
        ({"body": {"x": msgspec.Raw(b'"\\ud800"')}}, "holds a lone surrogate, which UTF-8 cannot carry"),
    ],
)
def test_a_bad_batch_line_is_that_rows_problem(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    """What is no request says what is wrong with it."""
    good: dict[str, object] = {"custom_id": "a", "method": "POST", "url": "/x", "body": {}}
    bad = {name: value for name, value in {**good, **change}.items() if value is not ...}
    source = one(tmp_path, "r.jsonl", b"\n".join(map(msgspec.json.encode, (good, bad, good))), "openai-batch")
    assert [row.problem for row in rows(source)] == [None, f"line 2 of r.jsonl {problem}", None]


# Types

MOMENT = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
TYPES: list[tuple[pa.DataType, object, pa.DataType, str | None]] = [
    (pa.bool_(), True, pa.bool_(), "True"),
    (pa.int8(), -1, pa.int8(), "-1"),
    (pa.uint64(), 2**64 - 1, pa.uint64(), "18446744073709551615"),
    (pa.float16(), 0.5, pa.float16(), "0.5"),
    (pa.float32(), 0.25, pa.float32(), "0.25"),
    (pa.float64(), 1e30, pa.float64(), "1e+30"),
    (pa.decimal128(9, 2), Decimal("1.20"), pa.decimal128(9, 2), "1.20"),
    (pa.decimal256(50, 10), Decimal("1E-9"), pa.decimal256(50, 10), "0.0000000010"),
    (pa.string(), "a", pa.string(), "a"),
    (pa.large_string(), "a", pa.large_string(), "a"),
    (pa.string_view(), "a", pa.string(), "a"),
    (pa.binary(), b"a", pa.binary(), "b'a'"),
    (pa.large_binary(), b"a", pa.large_binary(), "b'a'"),
    (pa.binary_view(), b"a", pa.binary(), "b'a'"),
    (pa.binary(2), b"ab", pa.binary(2), "b'ab'"),
    (pa.date32(), date(2024, 1, 2), pa.date32(), "2024-01-02"),
    (pa.date64(), date(2024, 1, 2), pa.date32(), "2024-01-02"),
    (pa.time32("s"), time(1, 2, 3), pa.time32("ms"), "01:02:03"),
    (pa.time64("us"), time(1, 2, 3, 4), pa.time64("us"), "01:02:03.000004"),
    (pa.timestamp("s"), MOMENT.replace(tzinfo=None), pa.timestamp("ms"), "2024-01-02 03:04:05"),
    (pa.timestamp("ns", "Europe/Berlin"), MOMENT, pa.timestamp("ns", "Europe/Berlin"), "2024-01-02 04:04:05+01:00"),
    (pa.duration("s"), timedelta(seconds=90), pa.duration("ms"), "0:01:30"),
    (pa.duration("ns"), timedelta(seconds=90), pa.duration("ns"), "0:01:30"),
    (pa.null(), None, pa.null(), None),
    (pa.dictionary(pa.int8(), pa.large_string()), "a", pa.large_string(), "a"),
    (pa.list_(pa.dictionary(pa.int8(), pa.string())), ["a"], pa.list_(pa.string()), "['a']"),
    (pa.large_list(pa.int8()), [1], pa.large_list(pa.int8()), "[1]"),
    (pa.list_view(pa.int8()), [1], pa.list_(pa.int8()), "[1]"),
    (pa.list_(pa.int8(), 2), [1, 2], pa.list_(pa.int8(), 2), "[1, 2]"),
    (pa.struct({"a": pa.int8()}), {"a": 1}, pa.struct({"a": pa.int8()}), "{'a': 1}"),
    (
        pa.list_(pa.struct({"a": pa.list_(pa.string_view())})),
        [{"a": ["x"]}],
        pa.list_(pa.struct({"a": pa.list_(pa.string())})),
        "[{'a': ['x']}]",
    ),
    (pa.map_(pa.string(), pa.int8()), [("k", 1)], pa.map_(pa.string(), pa.int8()), "[('k', 1)]"),
    (pa.uuid(), b"0123456789abcdef", pa.binary(16), "30313233-3435-3637-3839-616263646566"),
    (pa.json_(), '{"a": 1}', pa.string(), '{"a": 1}'),
    (pa.bool8(), 1, pa.int8(), "True"),
]
"""Every row of the table of types in docs/inputs.md: the type, a value, the type it is kept with, how it prints."""


def column_of(kind: pa.DataType, value: object) -> pa.Array:
    """A value and a null in a column of this type."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array([value, None], kind.storage_type))
    return pa.array([value, None], kind)


@pytest.mark.parametrize("where", ["parquet", "arrow", "table"])
@pytest.mark.parametrize(("kind", "value", "held", "printed"), TYPES, ids=lambda case: str(case)[:40])
def test_types_are_kept_and_printed(
    tmp_path: Path, kind: pa.DataType, value: object, held: pa.DataType, printed: str | None, where: str
) -> None:
    """A type comes out of Parquet as it was kept, and a template prints its values as the docs say."""
    table = pa.table({"c": column_of(kind, value)})
    if where == "parquet":
        pq.write_table(table, tmp_path / "rows.parquet")
        if pa.types.is_dictionary(kind):
            held = pa.string()  # Parquet itself forgets that a dictionary's texts were large
    elif where == "arrow":
        write_arrow(tmp_path / "rows.arrow", table, "file")
    source = open_table(table) if where == "table" else open_source(".", tmp_path, None, 10)
    made = kept(source, ["c"])
    assert made["c"].type == held
    assert made["c"].null_count == (2 if value is None else 1)
    assert made[ALTERED].to_pylist() == [False, False]
    pq.write_table(made, tmp_path / "part")
    assert pq.read_table(tmp_path / "part").schema.types == made.schema.types
    assert pq.read_table(tmp_path / "part")["c"].to_pylist() == made["c"].to_pylist()
    first, second = rows(source)
    assert (first.problem, second.problem, second.fields) == (None, None, {"c": None})
    template = {"model": "m", "messages": [{"role": "user", "content": "<{{ c }}>"}]}
    request = Composer(RequestTemplate(endpoint="chat", parameters=dict(template)), None, "").compose(first)
    if printed is not None:
        assert isinstance(request, Request)
        assert json.loads(request.body)["messages"][0]["content"] == f"<{printed}>"


def test_a_decimal_is_a_number_in_a_body() -> None:
    """Alone in its expression a decimal stays a number, with the digits that it has."""
    template = RequestTemplate(
        endpoint="chat",
        parameters={
            "model": "m",
            "temperature": "{{ t }}",
            "messages": [{"role": "user", "content": "{{ t }}!"}],
        },
    )
    made = Composer(template, None, "").compose(Row(0, {"t": Decimal("0.50")}))
    assert isinstance(made, Request)
    assert b'"temperature":0.50' in made.body
    assert b'"content":"0.50!"' in made.body


@pytest.mark.parametrize(
    "column",
    [
        pa.array([pa.MonthDayNano([1, 2, 3])], pa.month_day_nano_interval()),
        pa.array([{}], pa.struct([])),
        pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]),
    ],
    ids=["interval", "empty struct", "union"],
)
def test_a_type_that_parquet_cannot_hold_is_refused_where_it_is_kept(tmp_path: Path, column: pa.Array) -> None:
    """Such a column may be used and may not be kept; the message says where to leave it out."""
    write_arrow(tmp_path / "rows.arrow", pa.table({"n": [1], "c": column}), "file")
    source = open_source("rows.arrow", tmp_path, None, 10)
    assert rows(source)[0].problem is None
    assert source.schema(["n"]).names == ["n"]
    with pytest.raises(JobError, match=r"^column 'c' is of type .*, which Parquet cannot hold; .*output\.keep$"):
        source.schema(["n", "c"])


# Tables from Python

LINES = {"key": [f"k{n}" for n in range(30)], "text": [stories.prompt(n) for n in range(30)]}
GIVEN: dict[str, Callable[[], object]] = {
    "pyarrow": lambda: pa.table(LINES),
    "batch": lambda: pa.record_batch(LINES),
    "reader": lambda: pa.table(LINES).to_reader(7),
    "pandas": lambda: pd.DataFrame(LINES),
    "polars": lambda: pl.DataFrame(LINES),
    "duckdb": lambda: duckdb.sql("SELECT 'k' || range AS key, 'say ' || range AS text FROM range(30)"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_every_table_gives_its_rows(name: str) -> None:
    """Anything with Arrow's C interface is an input."""
    source = open_table(GIVEN[name]())
    assert (source.total, source.columns) == (30, ("key", "text"))
    assert [row.fields["key"] for row in rows(source, 5, ["key"])] == LINES["key"][5:]
    assert kept(source, ["key"], 5, 9)["key"].to_pylist() == LINES["key"][5:9]
    assert rows(source, 29)[0].position == 29


@pytest.mark.parametrize("given_", [[{"a": 1}], "rows.csv", 5, pa.array([1])])
def test_what_is_no_table_is_refused(given_: object) -> None:
    """One line says what was expected."""
    with pytest.raises(JobError, match=r"^input: "):
        open_table(given_)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none() | st.text(max_size=3),
            st.none() | st.lists(st.none() | st.integers(-5, 5), max_size=3),
            st.none() | st.fixed_dictionaries({"a": st.none() | st.booleans()}),
            st.none() | st.dictionaries(st.text(max_size=2), st.floats(allow_nan=False), max_size=2),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
    st.integers(0, 11),
)
def test_the_same_rows_are_the_same_table(
    values: list[tuple[object, object, object, dict[str, float] | None]], size: int, at: int
) -> None:
    """Chunks, offsets, dictionaries and what lies under nulls are no part of a table's identity; values are."""
    schema = pa.schema(
        {
            "t": pa.string(),
            "l": pa.list_(pa.int64()),
            "s": pa.struct({"a": pa.bool_()}),
            "m": pa.map_(pa.string(), pa.float64()),
        }
    )

    def made(lines: list[tuple[object, object, object, dict[str, float] | None]]) -> pa.Table:
        return pa.table(
            [
                pa.array([line[0] for line in lines], schema.types[0]),
                pa.array([line[1] for line in lines], schema.types[1]),
                pa.array([line[2] for line in lines], schema.types[2]),
                pa.array([None if line[3] is None else list(line[3].items()) for line in lines], schema.types[3]),
            ],
            schema=schema,
        )

    table = made(values)
    before = open_table(table).identities
    again = pa.Table.from_batches(table.to_batches(max_chunksize=size))
    shifted = made([values[0], *values]).slice(1)
    encoded = table.set_column(0, "t", table["t"].dictionary_encode())
    for other in (again, shifted, encoded):
        assert open_table(other).identities == before
    at %= len(values)
    for column, value in ((0, "new text"), (1, [99]), (2, {"a": None}), (3, {"new": 1.0})):
        line = list(values[at])
        if line[column] != value:
            line[column] = value
            different = [*values[:at], tuple(line), *values[at + 1 :]]
            assert changed(before, open_table(made(different)).identities) == "the table from Python has other rows"  # type: ignore[arg-type]


def job_of(folder: Path, url: str, **input: object) -> batcher.Job:
    """A job in Python whose input is whatever is given to `run`."""
    return batcher.Job(
        input=input,
        request={"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 64},
        service={"base_url": url, "api_key_env": "STORY_KEY", "dialect": "cerebras"},
        output={"path": "out", "rows_per_part": 10},
        folder=folder,
    )


def test_a_table_is_run_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over a table goes on with the same rows, however they are held, and refuses others."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    with stories.service() as service:
        job = job_of(tmp_path, service.url, id="key", limit=12)
        assert batcher.run(job, input=GIVEN["pyarrow"]()).table()["id"].to_pylist() == LINES["key"][:12]
        job = job_of(tmp_path, service.url, id="key")
        result = batcher.run(job, input=pa.table(LINES).to_reader(4))
        assert result.table()["text"].to_pylist() == LINES["text"]
        assert len([entry for entry in service.book if entry.path.endswith("completions")]) == 30
        with pytest.raises(JobError, match="since the run began: the table from Python has other"):
            batcher.run(job, input=pa.table(LINES).slice(1))
    assert "batcher.run(job, input=table)" in (tmp_path / "out/job.toml").read_text()


def test_a_job_has_files_or_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither and both are said clearly."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    with pytest.raises(JobError, match=r"input\.path: not with a table from Python; give one of the two"):
        batcher.run(job_of(tmp_path, "simulator", path="rows.jsonl"), input=pa.table(LINES))
    with pytest.raises(JobError, match=r"input.path is missing; only batcher\.run"):
        batcher.run(job_of(tmp_path, "simulator"))


# Files that are added, and files that are packed


def write_rows(folder: Path, name: str, numbers: range) -> None:
    """A file of these rows, in the format of its suffix."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"key": f"k{n}", "text": stories.prompt(n)} for n in numbers]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(lines), path)
    elif path.suffix == ".arrow":
        write_arrow(path, pa.Table.from_pylist(lines), "stream")
    elif path.suffix == ".csv":
        path.write_text("key,text\n" + "".join(f"{line['key']},{line['text']}\n" for line in lines))
    else:
        path.write_bytes(packed(b"".join(msgspec.json.encode(line) + b"\n" for line in lines), path.suffix))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("paths", ["in", "in/*{0}", ["in/m{0}", "in"]])
def test_files_of_an_earlier_run_stand_first(tmp_path: Path, suffix: str, paths: str | list[str]) -> None:
    """A new file is appended, also where its name sorts before the old ones."""
    asked = paths.format(suffix) if isinstance(paths, str) else [path.format(suffix) for path in paths]
    write_rows(tmp_path, f"in/m{suffix}", range(3))
    before = open_source(asked, tmp_path, None, 10)
    known = [identity.name for identity in before.identities]
    write_rows(tmp_path, f"in/a{suffix}", range(3, 5))
    write_rows(tmp_path, f"in/z{suffix}", range(5, 7))
    after = open_source(asked, tmp_path, None, 10, known)
    assert changed(before.identities, after.identities) is None
    assert [row.fields["key"] for row in rows(after, len(known) * 3 - 3)] == [f"k{n}" for n in range(7)]


def test_the_next_run_asks_the_rows_of_new_files(tmp_path: Path) -> None:
    """Through the whole program: a file put beside the old ones adds its rows and no others are asked."""
    with stories.service() as service:
        write_rows(tmp_path, "in/m.csv", range(40))
        job = stories.write_job(tmp_path, service.url, source="in", rows_per_part=15)
        assert stories.run(job).returncode == 0
        write_rows(tmp_path, "in/a.csv", range(40, 70))
        done = stories.run(job)
        assert done.returncode == 0, done.stderr
        asked = [stories.row_of(entry) for entry in service.book if entry.path.endswith("completions")]
        assert sorted(asked) == list(range(70))
        stories.check_complete(tmp_path / "out", 70, service)


def test_a_packed_file_is_read_on_where_the_last_range_ended(tmp_path: Path) -> None:
    """Range after range, a compressed file is unpacked once: what was read of it may even be overwritten."""
    lines = [json.dumps({"n": n, "pad": "x" * 100}).encode() + b"\n" for n in range(20_000)]
    for name in ("rows.jsonl.gz", "rows.jsonl.zst"):
        path = tmp_path / name
        path.write_bytes(packed(b"".join(lines), path.suffix))
        source = open_source(name, tmp_path, None, 1000)
        found = kept(source, ["n"], 0, 1000)["n"].to_pylist()
        path.rename(tmp_path / "elsewhere")  # only an open file can be read on
        for start in range(1000, 20_000, 1000):
            found += kept(source, ["n"], start, start + 1000)["n"].to_pylist()
        assert found == list(range(20_000))
        (tmp_path / "elsewhere").rename(path)
        assert kept(source, ["n"], 3000, 3002)["n"].to_pylist() == [3000, 3001]


def test_rows_that_are_longer_than_a_block_are_read_on_too(tmp_path: Path) -> None:
    """A range that ends within a long line goes on with that line."""
    lines = [json.dumps({"n": n, "pad": "x" * 700_000}).encode() + b"\n" for n in range(12)]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed(b"".join(lines), ".gz"))
    source = open_source(path.name, tmp_path, None, 2)
    found = kept(source, ["n"], 0, 2)["n"].to_pylist()
    path.unlink()
    for start in range(2, 12, 2):
        found += kept(source, ["n"], start, start + 2)["n"].to_pylist()
    assert found == list(range(12))


def test_trailing_garbage_of_a_packed_file_is_named(tmp_path: Path) -> None:
    """Members that were joined are one file; what follows them and is none ends the reading."""
    data = packed(b'{"n": 1}\n', ".gz")
    (tmp_path / "rows.jsonl.gz").write_bytes(data + data + b"garbage")
    with pytest.raises(JobError, match=r"^input file rows\.jsonl\.gz cannot be read: "):
        open_source("rows.jsonl.gz", tmp_path, None, 10)
