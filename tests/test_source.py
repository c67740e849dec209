"""Input files become rows: each at its position, the same one however it is reached, and in bounded memory."""

import gzip
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.records import Row
from batcher.source import ALTERED, FileIdentity, Place, Source, changed, open_source


def never() -> bool:
    """Nobody stops the reading."""
    return False


def packed(data: bytes, suffix: str) -> bytes:
    """Data as a file of this suffix holds it."""
    if suffix == ".gz":
        return gzip.compress(data, 1)
    return bytes(pa.Codec("zstd").compress(data, asbytes=True)) if suffix == ".zst" else data


def rows(source: Source, start: int = 0, columns: Sequence[str] | None = None, size: int = 256) -> list[Row]:
    """All rows from `start` on; each list of them holds 1 to `size`."""
    batches = list(source.batches(start, columns, size))
    assert all(1 <= len(batch) <= size for batch in batches)
    return [row for batch in batches for row in batch]


def kept(source: Source, names: Sequence[str], start: int = 0, stop: int = 1 << 40) -> pa.Table:
    """The kept columns of a range as one table of the promised types."""
    schema = source.schema(names).append(pa.field(ALTERED, pa.bool_()))
    batches = list(source.kept(start, stop, names))
    assert all(0 < len(batch) <= 8192 for batch in batches)
    return pa.Table.from_batches(batches, schema)


def jsonl(folder: Path, *values: object) -> Source:
    """A source of one JSONL file; bytes stand for themselves."""
    lines = (value if isinstance(value, bytes) else json.dumps(value).encode() for value in values)
    (folder / "rows.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return open_source("rows.jsonl", folder, None, 10)


def parquet(folder: Path, table: pa.Table, name: str = "rows.parquet") -> Source:
    """A source of one Parquet file."""
    pq.write_table(table, folder / name)
    return open_source(name, folder, None, 10)


# JSONL: positions


class Line(NamedTuple):
    """A line of a test file: the row it stands for, or None where it is a bad row, or "" where it is no row."""

    text: bytes
    fields: dict[str, object] | str | None


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
BAD = [
    b"{",
    b"[1]",
    b"\xff",
    b'{"a": NaN}',
    b"nul",
    b'"x"',
    b"{}{}",
    b'{"a": 1e999}',
    b"null",
    b"\0",
]
# Lengths around the size of the blocks in which files are read.
LENGTHS = st.sampled_from([0, 1, 100_000, 262_144]) | st.integers(524_270, 524_300)


@st.composite
def good_lines(draw: st.DrawFn) -> Line:
    """A line that is a row, now and then a very long one."""
    fields: dict[str, object] = draw(st.dictionaries(st.sampled_from("ab"), SCALARS | st.text(max_size=5)))
    if draw(st.integers(0, 4)) == 0:
        fields["long"] = "x" * draw(LENGTHS)
    return Line(draw(st.sampled_from([b"", b" "])) + msgspec.json.encode(fields), fields)


LINES = st.lists(
    good_lines()
    | st.sampled_from(BAD).map(lambda text: Line(text, None))
    | st.sampled_from([b"", b" ", b"\t \r"]).map(lambda text: Line(text, "")),
    max_size=9,
)


class File(NamedTuple):
    """A JSONL file in the making."""

    lines: list[Line]
    end: bytes
    whole: bool
    bom: bool
    suffix: str

    def data(self) -> bytes:
        """Its bytes, before compression."""
        text = self.end.join(line.text for line in self.lines)
        return b"\xef\xbb\xbf" * self.bom + text + self.end * (self.whole and bool(self.lines))


FILES = st.lists(
    st.builds(
        File,
        LINES,
        st.sampled_from([b"\n", b"\r\n"]),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["", "", ".gz", ".zst"]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=80, deadline=None)
@given(FILES, st.integers(1, 5), st.integers(1, 7), st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_row_is_the_same_however_it_is_reached(
    files: list[File], stride: int, size: int, start: int, chance: random.Random
) -> None:
    """Positions are dense, and neither start, batch size, known places nor compression change a row."""
    expected = [
        (f"{number} of {index}.jsonl{file.suffix} ", line.fields)
        for index, file in enumerate(files)
        for number, line in enumerate(file.lines, 1)
        if line.fields != ""
    ]
    with tempfile.TemporaryDirectory() as name:
        for index, file in enumerate(files):
            Path(name, f"{index}.jsonl{file.suffix}").write_bytes(packed(file.data(), file.suffix))
        source = open_source(".", Path(name), None, stride)
        found = rows(source, 0, size=size)
        assert [row.position for row in found] == list(range(len(expected)))
        for row, (where, fields) in zip(found, expected, strict=True):
            if fields is None:
                assert row.fields == {}
                assert row.problem is not None
                assert row.problem.startswith(f"line {where}")
            else:
                assert (row.fields, row.problem) == (fields, None)
        assert source.places.keys() == set(range(0, len(expected), stride))
        assert source.total is None
        assert source.count(never) == source.total == len(expected)

        again = open_source(".", Path(name), None, stride)
        again.places.update({at: place for at, place in source.places.items() if chance.random() < 0.5})
        assert rows(again, start, size=size) == found[start:]
        assert all(source.places[at] == place for at, place in again.places.items())


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_reading_starts_at_the_greatest_known_place(tmp_path: Path, suffix: str) -> None:
    """From a known place on, nothing that stands before it in its file is looked at."""
    path = tmp_path / f"rows.jsonl{suffix}"
    lines = [json.dumps({"n": n}).encode() + b"\n" for n in range(10, 90)]
    path.write_bytes(packed(b"".join(lines), suffix))
    source = open_source(path.name, tmp_path, None, 20)
    found = rows(source)
    assert source.places[40] == Place(0, 40 * len(lines[0]), 41)
    path.write_bytes(packed(b"\n" * 40 * len(lines[0]) + b"".join(lines[40:]), suffix))
    assert rows(source, 47) == found[47:]
    assert kept(source, ["n"], 60, 63)["n"].to_pylist() == [70, 71, 72]


def test_members_of_a_compressed_file_are_one_stream(tmp_path: Path) -> None:
    """Compressed files that were joined by `cat` are read to their end."""
    (tmp_path / "a.jsonl.gz").write_bytes(packed(b'{"n": 1}\n', ".gz") + packed(b'{"n": 2}\n', ".gz"))
    (tmp_path / "b.jsonl.zst").write_bytes(packed(b'{"n": 3}\n{"n"', ".zst") + packed(b": 4}", ".zst"))
    assert [row.fields for row in rows(open_source(".", tmp_path, None, 10))] == [{"n": n} for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    """A compressed file that ends too early gives its rows up to there and then one line of error."""
    noise = random.Random(1)
    lines = b"".join(b'{"n": "%d"}\n' % noise.getrandbits(256) for _ in range(60_000))
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(packed(lines, suffix)[:-9])
    source = open_source(f"rows.jsonl{suffix}", tmp_path, None, 10_000)
    seen: list[Row] = []
    with pytest.raises(JobError, match=rf"^input file rows\.jsonl{suffix} cannot be read: .+$"):
        seen.extend(row for batch in source.batches(0) for row in batch)
    assert len(seen) > 20_000
    with pytest.raises(JobError, match="cannot be read"):
        source.count(never)


# JSONL: bad lines


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1,}', "is not JSON: "),
        (b'{"a" 1}', "is not JSON: Expecting ':' delimiter at character 6"),
        (b'{"a": NaN}', "is not JSON: NaN is not a JSON value"),
        (b'{"a": -Infinity}', "is not JSON: -Infinity is not a JSON value"),
        (b'{"a": 1e999}', "is not JSON: a number is out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: "),
        (b"\xef\xbb\xbf{}", "is not JSON: "),
        (b"[1]", "is not a JSON object but a list"),
        (b"null", "is not a JSON object but null"),
        (b"12", "is not a JSON object but a number"),
        (b'{"a": "\xc3"}', "is not UTF-8: byte 8 of the line"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8: byte 8 of the line"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_bad_line_is_that_rows_problem(tmp_path: Path, text: bytes, problem: str) -> None:
    """A line that is no JSON object is a row with a problem that names line and file; its neighbours are untouched."""
    source = jsonl(tmp_path, {"n": 1}, b"", text, {"n": 2})
    before, bad, after = rows(source)
    assert (before.fields, after.fields) == ({"n": 1}, {"n": 2})
    assert bad.fields == {}
    assert bad.problem is not None
    assert bad.problem.startswith(f"line 3 of rows.jsonl {problem}")
    assert "\n" not in bad.problem
    assert kept(source, ["n"]).to_pylist() == [
        {"n": 1, ALTERED: False},
        {"n": None, ALTERED: None},
        {"n": 2, ALTERED: False},
    ]


def test_lone_surrogates_are_usable_text(tmp_path: Path) -> None:
    r"""A \ud800 escape is JSON: the row has it, and the kept column has U+FFFD in its place and says so."""
    source = jsonl(tmp_path, b'{"t": "a\\ud800b", "n": 1}', b'{"t": "\\ud83d\\ude00", "\\udfff": [2]}')
    first, second = rows(source)
    assert first == Row(0, {"t": "a\ud800b", "n": 1})
    assert second == Row(1, {"t": "\U0001f600", "\udfff": [2]})
    assert source.columns == ("t", "n")
    assert kept(source, ["t"]).to_pylist() == [{"t": "a\ufffdb", ALTERED: True}, {"t": "\U0001f600", ALTERED: False}]


def test_the_last_of_equal_keys_wins(tmp_path: Path) -> None:
    """Of a key that stands twice in a line, the last value is taken."""
    assert rows(jsonl(tmp_path, b'{"a": 1, "a": 2}')) == [Row(0, {"a": 2})]


# JSONL: kept columns

VALUES = st.recursive(
    SCALARS | st.text(st.characters(), max_size=4) | st.integers(-(10**25), 10**25),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ["a", "b.c", ""]


def same(held: object, value: object, kind: pa.DataType) -> bool:
    """A column of this type holds this JSON value, as it is or, in a text column, as JSON text."""
    if value is None or held is None:
        return value is held
    if pa.types.is_string(kind):
        assert isinstance(held, str)
        return held == value if isinstance(value, str) else bool(json.loads(held) == value)
    if isinstance(value, dict):
        assert isinstance(held, dict)
        fields = {field.name: field.type for field in kind}
        return value.keys() <= fields.keys() and all(same(held[n], value.get(n), fields[n]) for n in fields)
    if isinstance(value, list):
        assert isinstance(held, list)
        return len(held) == len(value) and all(
            same(one, other, kind.value_type) for one, other in zip(held, value, strict=True)
        )
    return held == value and isinstance(held, bool) == isinstance(value, bool)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES) | st.none(), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_kept_columns_line_up_with_the_rows(values: list[dict[str, object] | None], start: int, stop: int) -> None:
    """Kept columns hold what the rows of their range hold, in Parquet's reach, wherever they do not say `altered`."""
    with tempfile.TemporaryDirectory() as name:
        source = jsonl(Path(name), *(b"bad" if value is None else value for value in values))
        names = list(source.columns)
        table = kept(source, names, start, stop)
        expected = rows(source)[start:stop]
        assert len(table) == len(expected)
        for held, row in zip(table.to_pylist(), expected, strict=True):
            fits = [same(held[n], row.fields.get(n), table.schema.field(n).type) for n in names]
            assert all(fits) or (held[ALTERED] and row.problem is None)
        pq.write_table(table, Path(name, "out.parquet"))
        assert pq.read_table(Path(name, "out.parquet")).to_pylist() == table.to_pylist()


def test_types_are_those_of_the_first_rows(tmp_path: Path) -> None:
    """A column's type is the narrowest that holds its values; mixed, empty and very large ones are JSON text."""
    values: dict[str, list[object]] = {
        "bool": [True, None],
        "int": [1, -(2**63)],
        "float": [1, 0.5],
        "text": ["a", None],
        "null": [None, None],
        "mixed": [1, "1"],
        "bool_int": [True, 1],
        "large": [1, 2**63],
        "list": [[1], []],
        "empty": [[], []],
        "no_fields": [{}, {}],
        "object": [{"x": 1}, {"y": ["a"]}],
        "part": [{"role": "user", "content": "x"}, {"role": "user", "content": ["x"]}],
        "odd_key": [{"\ud800": 1}, None],
        "many_keys": [{str(n): n for n in range(300)}, None],
    }
    source = jsonl(tmp_path, *({name: pair[at] for name, pair in values.items()} for at in (0, 1)))
    text = pa.string()
    assert source.columns == tuple(values)
    assert source.schema(source.columns) == pa.schema(
        {
            "bool": pa.bool_(),
            "int": pa.int64(),
            "float": pa.float64(),
            "text": text,
            "null": text,
            "mixed": text,
            "bool_int": text,
            "large": text,
            "list": pa.list_(pa.int64()),
            "empty": pa.list_(text),
            "no_fields": text,
            "object": pa.struct([("x", pa.int64()), ("y", pa.list_(text))]),
            "part": pa.struct([("role", text), ("content", text)]),
            "odd_key": text,
            "many_keys": text,
        }
    )
    table = kept(source, ["mixed", "large", "no_fields", "part"])
    assert table.to_pylist() == [
        {"mixed": "1", "large": "1", "no_fields": "{}", "part": {"role": "user", "content": "x"}, ALTERED: False},
        {
            "mixed": "1",
            "large": "9223372036854775808",
            "no_fields": "{}",
            "part": {"role": "user", "content": '["x"]'},
            ALTERED: False,
        },
    ]


@pytest.mark.parametrize(
    ("column", "value", "held", "altered"),
    [
        ("int", 1.0, 1, False),
        ("int", 1.5, None, True),
        ("int", True, None, True),
        ("int", "1", None, True),
        ("int", 2**63, None, True),
        ("float", 3, 3.0, False),
        ("float", 2**53 + 1, 2.0**53, True),
        ("float", 10**400, None, True),
        ("float", True, None, True),
        ("bool", 1, None, True),
        ("text", {"a": [1]}, '{"a":[1]}', False),
        ("text", ["\ud800"], '["\\ud800"]', False),
        ("text", "a\0b", "a\0b", False),
        ("list", [1, "x", None], [1, None, None], True),
        ("list", {"a": 1}, None, True),
        ("object", {"x": 1, "new": 2}, {"x": 1}, True),
        ("object", {}, {"x": None}, False),
        ("object", {"x": "1"}, {"x": None}, True),
    ],
)
def test_a_value_that_fits_no_longer_is_marked(
    tmp_path: Path, column: str, value: object, held: object, altered: bool
) -> None:
    """A value of another type than the first rows showed is null or text, and is marked where something is lost."""
    usual = {"int": 1, "float": 0.5, "bool": True, "text": "a", "list": [1], "object": {"x": 1}}
    (tmp_path / "a.jsonl").write_bytes(msgspec.json.encode(usual))
    late = [usual] * 200 + [usual | {column: value}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, late)))
    source = open_source(["a.jsonl", "b.jsonl"], tmp_path, None, 10)
    table = kept(source, list(usual))
    assert table.schema.types == [pa.int64(), pa.float64(), pa.bool_(), pa.string(), *table.schema.types[4:]]
    assert table[ALTERED].to_pylist() == [False] * 201 + [altered]
    assert table.drop_columns([ALTERED]).to_pylist() == [usual] * 201 + [usual | {column: held}]


def test_later_files_add_columns(tmp_path: Path) -> None:
    """Columns are those of all files; the types of an earlier run can be put back when files were appended since."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"a": 0.5, "b": "x"}\n')
    source = open_source("*.jsonl", tmp_path, None, 10)
    assert source.columns == ("a", "b")
    assert source.schema(["a"]).types == [pa.float64()]
    source.types["a"] = pa.int64()
    assert kept(source, ["b", "a"]).to_pylist() == [
        {"b": None, "a": 1, ALTERED: False},
        {"b": "x", "a": None, ALTERED: True},
    ]


# Parquet


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 15)), min_size=1, max_size=3),
    st.integers(0, 30),
    st.integers(0, 40),
    st.integers(1, 12),
    st.sets(st.sampled_from(["n", "n.m", "s", "t"])),
)
def test_parquet_rows_are_the_same_however_they_are_reached(
    files: list[tuple[int, int]], start: int, stop: int, size: int, asked: set[str]
) -> None:
    """Row groups, files, start and batch size change no row, and rows hold the asked columns alone."""
    total = sum(count for count, _ in files)
    columns: dict[str, list[object]] = {
        "n": list(range(total)),
        "n.m": [str(n) for n in range(total)],
        "s": [None if n % 3 == 0 else {"m": n, "k": [n] * (n % 4)} for n in range(total)],
        "t": ["text" if n % 2 else None for n in range(total)],
    }
    kinds = {"n": pa.int64(), "n.m": pa.string(), "s": pa.struct({"m": pa.int32(), "k": pa.list_(pa.int8())})}
    table = pa.table(columns, pa.schema(kinds | {"t": pa.dictionary(pa.int8(), pa.string())}))
    with tempfile.TemporaryDirectory() as name:
        for index, (end, (count, group)) in enumerate(zip(accumulate(c for c, _ in files), files, strict=True)):
            pq.write_table(table.slice(end - count, count), Path(name, f"{index}.parquet"), row_group_size=group)
        source = open_source("*.parquet", Path(name), None, 7)
        assert source.total == source.count(never) == total
        assert source.columns == ("n", "n.m", "s", "t")
        names = sorted(asked)
        expected = [Row(n, {name: columns[name][n] for name in names}) for n in range(total)]
        assert rows(source, start, names, size) == expected[start:]
        assert rows(source, start, None, size) == [Row(n, row) for n, row in enumerate(table.to_pylist())][start:]
        held = kept(source, names, start, stop)
        assert held.drop_columns([ALTERED]).to_pylist() == [dict(row.fields) for row in expected[start:stop]]
        assert held[ALTERED].to_pylist() == [False] * len(expected[start:stop])


def test_parquet_values_are_plain_python(tmp_path: Path) -> None:
    """Every Parquet type comes as a Python value, and is kept as its own Arrow type without dictionary or extension."""
    moment = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    some = uuid.uuid4()
    encoded = pa.dictionary(pa.int32(), pa.string())
    cases: list[tuple[pa.DataType, object, object, pa.DataType]] = [
        (pa.string(), "a", "a", pa.string()),
        (pa.large_string(), "a\0", "a\0", pa.large_string()),
        (encoded, "a", "a", pa.string()),
        (pa.binary(), b"\xff", b"\xff", pa.binary()),
        (pa.int8(), 1, 1, pa.int8()),
        (pa.uint64(), 2**64 - 1, 2**64 - 1, pa.uint64()),
        (pa.float32(), 0.5, 0.5, pa.float32()),
        (pa.bool_(), True, True, pa.bool_()),
        (pa.null(), None, None, pa.null()),
        (pa.decimal128(9, 2), Decimal("1.20"), Decimal("1.20"), pa.decimal128(9, 2)),
        (pa.date32(), date(2024, 5, 6), date(2024, 5, 6), pa.date32()),
        (pa.time64("ns"), time(1, 2, 3, 4), time(1, 2, 3, 4), pa.time64("ns")),
        (pa.timestamp("ns"), 1_001, datetime(1970, 1, 1, microsecond=1), pa.timestamp("ns")),
        (pa.timestamp("us", "UTC"), moment, moment, pa.timestamp("us", "UTC")),
        (pa.duration("ns"), 1_500, timedelta(microseconds=1), pa.duration("ns")),
        (pa.list_(encoded), ["a", None], ["a", None], pa.list_(pa.string())),
        (pa.list_(pa.timestamp("ns")), [1_001], [datetime(1970, 1, 1, microsecond=1)], pa.list_(pa.timestamp("ns"))),
        (pa.struct({"x": encoded}), {"x": "a"}, {"x": "a"}, pa.struct({"x": pa.string()})),
        (pa.map_(pa.string(), encoded), [("k", "v")], [("k", "v")], pa.map_(pa.string(), pa.string())),
        (pa.list_(pa.int8(), 2), [1, 2], [1, 2], pa.list_(pa.int8(), 2)),
        (pa.uuid(), some.bytes, some, pa.binary(16)),
        (pa.json_(), '{"a": 1}', '{"a": 1}', pa.string()),
    ]
    arrays = [pa.array([value, None], kind) for kind, value, _, _ in cases]
    names = [str(index) for index in range(len(cases))]
    source = parquet(tmp_path, pa.table(arrays, names))
    first, second = rows(source)
    for name, (_, _, expected, _) in zip(names, cases, strict=True):
        assert first.fields[name] == expected
        assert type(first.fields[name]) is type(expected)
        assert second.fields[name] is None
    table = kept(source, names)
    assert [str(kind).replace("element", "item") for kind in table.schema.types[:-1]] == [
        str(kind) for *_, kind in cases
    ]
    assert all(column.null_count for column in table.columns[:-1])
    pq.write_table(table, tmp_path / "out.parquet")


def test_a_parquet_value_that_python_cannot_hold_is_that_rows_problem(tmp_path: Path) -> None:
    """A date beyond Python's calendar or text that is not UTF-8 costs its own row, never the run."""
    broken = pa.array([b"a", b"b", b"\xff!", b"d"])
    table = pa.table(
        {
            "when": pa.array([0, 10**18, 0, 0], pa.timestamp("us")),
            "text": pa.Array.from_buffers(pa.string(), 4, broken.buffers()),
            "n": [1, 2, 3, 4],
        }
    )
    source = parquet(tmp_path, table)
    first, second, third, fourth = rows(source)
    assert (first.problem, fourth.problem) == (None, None)
    assert fourth.fields["text"] == "d"
    assert second.problem is not None
    assert second.problem.startswith("row 2 of rows.parquet: column 'when' cannot be read: ")
    assert third.problem is not None
    assert third.problem.startswith("row 3 of rows.parquet: column 'text' cannot be read: ")
    assert second.fields == third.fields == {}
    assert [row.problem for row in rows(source, 0, ["n"])] == [None] * 4
    held = kept(source, ["text", "when"])
    held.validate(full=True)
    assert held["text"].to_pylist() == ["a", "b", "\ufffd!", "d"]
    assert held[ALTERED].to_pylist() == [False, False, True, False]
    assert held["when"].cast(pa.int64()).to_pylist() == [0, 10**18, 0, 0]


# Which files


def touch(folder: Path, *names: str) -> None:
    """JSONL files of one row each, which is their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(json.dumps({"name": name}).encode(), path.suffix))


@pytest.mark.parametrize(
    ("paths", "format", "expected"),
    [
        ("in/b.jsonl", None, ["in/b.jsonl"]),
        (["in/b.jsonl", "in/a.ndjson", "in/b.jsonl"], None, ["in/b.jsonl", "in/a.ndjson", "in/b.jsonl"]),
        ("in/*.jsonl", None, ["in/[x].jsonl", "in/_h.jsonl", "in/b.jsonl"]),
        ("in/**/[bc].jsonl", None, ["in/b.jsonl", "in/sub/c.jsonl"]),
        ("in/[x].jsonl", None, ["in/[x].jsonl"]),
        (
            "in",
            None,
            ["in/D.JSONL.GZ", "in/[x].jsonl", "in/a.ndjson", "in/b.jsonl", "in/sub/c.jsonl", "in/z.jsonl.zst"],
        ),
        ("in/odd.txt", "jsonl", ["in/odd.txt"]),
        (["in/odd.txt", "in/sub"], "jsonl", ["in/odd.txt", "in/sub/c.jsonl"]),
    ],
)
def test_files_lists_globs_and_folders(
    tmp_path: Path, paths: str | list[str], format: str | None, expected: list[str]
) -> None:
    """A list keeps its order and may repeat; globs and folders are sorted; folders leave out hidden and `_` names."""
    touch(tmp_path, *(f"in/{name}" for name in ("b.jsonl", "a.ndjson", "sub/c.jsonl", "z.jsonl.zst", "[x].jsonl")))
    touch(tmp_path, *(f"in/{name}" for name in ("odd.txt", ".h.jsonl", "_h.jsonl", "_tmp/x.jsonl", ".git/x.jsonl")))
    (tmp_path / "in/D.JSONL.GZ").write_bytes(packed(b'{"name": "in/D.JSONL.GZ"}', ".gz"))
    source = open_source(paths, tmp_path, format, 10)
    assert source.format == "jsonl"
    assert [identity.name for identity in source.identities] == expected
    assert [row.fields for row in rows(source)] == [{"name": name} for name in expected]


def test_names_outside_the_jobs_folder_are_absolute(tmp_path: Path) -> None:
    """A file is named relative to the job's folder when it is below it, and absolutely otherwise."""
    touch(tmp_path, "job/a.jsonl", "other/b.jsonl")
    source = open_source(["../other/b.jsonl", str(tmp_path / "job/a.jsonl")], tmp_path / "job", None, 10)
    assert [identity.name for identity in source.identities] == [(tmp_path / "other/b.jsonl").as_posix(), "a.jsonl"]


def write_parquet(*columns: dict[str, list[object]]) -> Callable[[Path], None]:
    """Files 0.parquet, 1.parquet … with these columns."""

    def write(folder: Path) -> None:
        for index, table in enumerate(columns):
            pq.write_table(pa.table(table), folder / f"{index}.parquet")

    return write


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("order", [("empty", "full"), ("full", "empty")])
def test_a_column_without_any_value_takes_the_type_that_other_files_give_it(
    tmp_path: Path, suffix: str, order: tuple[str, str]
) -> None:
    """pandas writes a column of nothing but nulls without a type; it lies beside files that know the type."""
    tables = {"empty": pa.table({"a": pa.nulls(2)}), "full": pa.table({"a": ["x", None]})}
    for name in order:
        write = pq.write_table if suffix == "parquet" else feather.write_feather
        write(tables[name], tmp_path / f"{name}.{suffix}")
    source = open_source([f"{name}.{suffix}" for name in order], tmp_path, None, 10)
    expected = [None, None, "x", None] if order[0] == "empty" else ["x", None, None, None]
    assert [row.fields["a"] for row in rows(source)] == expected
    assert kept(source, ["a"]).schema.field("a").type == pa.string()
    assert kept(source, ["a"])["a"].to_pylist() == expected


def write_truncated(folder: Path) -> None:
    """A Parquet file that lost its end."""
    write_parquet({"a": [1]})(folder)
    whole = (folder / "0.parquet").read_bytes()
    (folder / "0.parquet").write_bytes(whole[:-20])


def write_twice(folder: Path) -> None:
    """A Parquet file with two columns of one name."""
    pq.write_table(pa.table([[1], [2]], ["a", "a"]), folder / "0.parquet")


def files(*names: str) -> Callable[[Path], None]:
    """JSONL files."""
    return lambda folder: touch(folder, *names)


@pytest.mark.parametrize(
    ("write", "paths", "format", "message"),
    [
        (files(), "none.jsonl", None, "input file 'none.jsonl' does not exist in "),
        (files(), "*.jsonl", None, r"input path '\*.jsonl' matches no file in "),
        (files("in/README.md", "in/_x.jsonl"), "in", None, "input folder 'in' has no input file; "),
        (files("in/a.jsonl"), "in", "parquet", "input folder 'in' has no parquet file; "),
        (files(), [], None, "input path names no file"),
        (files(), "", None, "input path is empty"),
        (files("a.txt"), "a.txt", None, r"input file a.txt: its suffix names no format; .*parquet.*jsonl"),
        (files("a.jsonl.bz2"), "*", None, "input file a.jsonl.bz2: its suffix names no format; "),
        (files("a.feather"), "a.feather", None, "input file a.feather cannot be read: "),
        (files("a.arrow.gz"), "a.arrow.gz", None, "input file a.arrow.gz: Arrow is not compressed as a whole; "),
        (files("a.jsonl"), "a.jsonl", "xml", "input format 'xml' is unknown: "),
        (files("a.parquet.gz"), "a.parquet.gz", None, "input file a.parquet.gz: Parquet is not compressed"),
        (
            files("a.jsonl", "b.pq"),
            ["a.jsonl", "b.pq"],
            None,
            "input has mixed formats: a.jsonl is JSONL, b.pq is Parquet",
        ),
        (files("a.parquet"), "a.parquet", None, "input file a.parquet cannot be read: "),
        (write_truncated, "0.parquet", None, "input file 0.parquet cannot be read: "),
        (write_twice, "0.parquet", None, "input file 0.parquet has two columns named 'a'"),
        (
            write_parquet({"a": [1], "b": [1]}, {"a": [1], "b": ["x"]}),
            "*.parquet",
            None,
            "input files have different schemas: 1.parquet has column 'b' as string, 0.parquet as int64",
        ),
        (
            write_parquet({"a": [1], "b": [1]}, {"a": [1]}),
            "*.parquet",
            None,
            "input files have different schemas: 1.parquet has no column 'b', which 0.parquet has",
        ),
        (
            write_parquet({"a": [1]}, {"a": [1], "b": [1]}),
            ".",
            None,
            "input files have different schemas: 1.parquet has a column 'b', which 0.parquet has not",
        ),
    ],
)
def test_an_input_that_cannot_be_read_is_one_clear_line(
    tmp_path: Path, write: Callable[[Path], None], paths: str | list[str], format: str | None, message: str
) -> None:
    """What keeps the input from being read is said in one line that names the file."""
    write(tmp_path)
    with pytest.raises(JobError, match=f"^{message}") as caught:
        open_source(paths, tmp_path, format, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [write_parquet({"a": [1], "b": ["x"]}), lambda f: jsonl(f, {"a": 1, "b": "x"})])
def test_an_unknown_column_is_named_with_the_known_ones(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Asking for a column that the input has not says which it has."""
    make(tmp_path)
    source = open_source(".", tmp_path, None, 10)
    message = "^no column 'c' in the input; columns are a, b$"
    with pytest.raises(JobError, match=message):
        source.schema(["a", "c"])
    with pytest.raises(JobError, match=message):
        next(source.kept(0, 1, ["c"]))


def test_an_input_without_rows_is_an_input(tmp_path: Path) -> None:
    """Empty files have no rows and no columns, and are no error."""
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf \r\n\n")
    source = open_source(".", tmp_path, None, 10)
    assert (source.columns, rows(source), source.count(never)) == ((), [], 0)
    empty = parquet(tmp_path, pa.table({"a": pa.array([], pa.string())}))
    assert (empty.columns, rows(empty), empty.total) == (("a",), [], 0)
    assert len(kept(empty, ["a"])) == 0


# The same input again


def identities(folder: Path) -> tuple[FileIdentity, ...]:
    """The identities of a folder's files."""
    return open_source(".", folder, None, 10).identities


def test_a_changed_input_is_noticed(tmp_path: Path) -> None:
    """Content, size, order and absence of the old files count; the time of modification and appended files do not."""
    touch(tmp_path, "a.jsonl", "b.jsonl")
    before = identities(tmp_path)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert identities(tmp_path) != before
    assert changed(before, identities(tmp_path)) is None
    touch(tmp_path, "c.jsonl")
    three = identities(tmp_path)
    assert changed(before, three) is None
    assert changed(three, before) == "c.jsonl is missing"
    assert changed(three, three[1:]) == "a.jsonl is missing"
    assert changed(three, (three[1], three[0], three[2])) == "file 1 was a.jsonl, is now b.jsonl"
    assert changed(before, (three[0], three[2])) == "file 2 was b.jsonl, is now c.jsonl"
    path = tmp_path / "b.jsonl"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"b.", b"B."))
    assert changed(before, identities(tmp_path)) == "b.jsonl has the same size but other content"
    path.write_bytes(text + b"\n\n")
    assert changed(before, identities(tmp_path)) == f"b.jsonl is larger: {len(text)} bytes before, {len(text) + 2} now"
    path.write_bytes(text[:-1])
    assert changed(before, identities(tmp_path)) == f"b.jsonl is smaller: {len(text)} bytes before, {len(text) - 1} now"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1_000_000), st.floats(0, 1, exclude_max=True))
def test_a_sample_covers_a_small_file_and_the_ends_of_a_large_one(size: int, where: float) -> None:
    """A changed byte is seen anywhere in a file of up to 368 KiB, in the first and last 64 KiB of every file."""
    edge = 64 << 10
    at = math.floor(where * size) if size <= 368 << 10 else math.floor(where * edge) + (where > 0.5) * (size - edge)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "rows.jsonl")
        path.write_bytes(b"a" * size)
        before = identities(Path(name))
        path.write_bytes(b"a" * at + b"b" + b"a" * (size - at - 1))
        assert changed(before, identities(Path(name))) == "rows.jsonl has the same size but other content"


def test_a_rewritten_large_file_is_noticed(tmp_path: Path) -> None:
    """The sample looks at blocks all over a large file: a changed stretch as long as their distance cannot hide."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 6_000_000)
    before = identities(tmp_path)
    for at in range(0, 5_900_000, 370_000):
        path.write_bytes(b"a" * at + b"b" * 100_000 + b"a" * (5_900_000 - at))
        assert changed(before, identities(tmp_path)) == "rows.jsonl has the same size but other content"


NAMES = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 1), st.sampled_from("xy")), max_size=4)


@given(NAMES, NAMES)
def test_only_a_beginning_is_unchanged(one: list[tuple[str, int, str]], two: list[tuple[str, int, str]]) -> None:
    """`changed` is silent exactly when the old files stand first among the new, and else says one line."""
    before, after = ([FileIdentity(n, s, 0, c) for n, s, c in several] for several in (one, two))
    difference = changed(before, after)
    assert (difference is None) == (two[: len(one)] == one)
    assert difference is None or (difference and "\n" not in difference)


def test_digest_and_count_can_be_stopped(tmp_path: Path) -> None:
    """The digest is the sha256 of a file's bytes, and both slow questions end early when they are told to."""
    touch(tmp_path, "a.jsonl", "b.jsonl.gz")
    source = open_source(".", tmp_path, None, 10)
    for index, name in enumerate(["a.jsonl", "b.jsonl.gz"]):
        assert source.digest(index, never) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert source.digest(0, lambda: True) is None
    assert source.count(lambda: True) is None
    assert source.total is None


def test_stopping_is_heard_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """`stopped` is asked again and again within one file, even within one line that never ends."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b" " * (40 << 20))
    source = open_source("rows.jsonl", tmp_path, None, 10)
    for question in (source.count, lambda stopped: source.digest(0, stopped)):
        answers = iter([False, False, True])
        assert question(lambda answers=answers: next(answers)) is None  # type: ignore[misc]


# Size


def test_a_line_that_is_too_long_is_that_rows_problem(tmp_path: Path) -> None:
    """64 MiB are a line, one byte more is a problem, and blanks of any length are no row, wherever reading starts."""
    limit = 64 << 20
    pieces: Iterable[bytes] = (
        b'{"n": 1}\n',
        b'{"n": "' + b"x" * (limit - 9) + b'"}\n',
        b'{"n": "' + b"x" * (limit - 8) + b'"}\n',
        b" " * (limit + 5) + b"\n",
        b" " * (limit + 5) + b"{}\n",
        b'{"n": 2}\n',
    )
    with open(tmp_path / "rows.jsonl", "wb") as stream:
        stream.writelines(pieces)
    source = open_source("rows.jsonl", tmp_path, None, 1)
    problem = "line {} of rows.jsonl is longer than 64 MiB"
    for start in (0, 2, 4):
        shape = [
            (row.position, row.problem, {name: str(value)[:1] for name, value in row.fields.items()})
            for batch in source.batches(start)
            for row in batch
        ]
        assert (
            shape
            == [
                (0, None, {"n": "1"}),
                (1, None, {"n": "x"}),
                (2, problem.format(3), {}),
                (3, problem.format(5), {}),
                (4, None, {"n": "2"}),
            ][start:]
        )
    assert source.count(never) == 5


def test_a_batch_is_bounded_in_bytes(tmp_path: Path) -> None:
    """Large rows come in short batches: no more than about 4 MiB of input at a time."""
    texts = [f"{n}" + "x" * (1 << 20) for n in range(20)]
    for source in (jsonl(tmp_path, *({"text": text} for text in texts)), parquet(tmp_path, pa.table({"text": texts}))):
        sizes = [len(batch) for batch in source.batches(0)]
        assert sum(sizes) == 20
        assert max(sizes) <= 5
        assert max(len(batch) for batch in source.kept(0, 20, ["text"])) <= 5


MEASURE = """
import sys, tracemalloc
from pathlib import Path
import pyarrow as pa
from batcher.source import open_source
tracemalloc.start()
source = open_source(sys.argv[1], Path(sys.argv[2]), None, 1000)
rows = sum(len(batch) for batch in source.batches(0))
last = sum(len(batch) for batch in source.kept(rows - 10, rows, ["text"]))
print(rows, last, tracemalloc.get_traced_memory()[1] >> 20, pa.default_memory_pool().max_memory() >> 20)
"""


def measured(folder: Path, name: str) -> list[int]:
    """Rows read, rows kept, the peak of Python's memory and of Arrow's (MiB), in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(word) for word in run.stdout.split()]


def test_memory_does_not_follow_the_input(tmp_path: Path) -> None:
    """A large file, even one of a single row group or with one endless line, is read in the memory of a few batches."""
    text = "".join(random.Random(1).choices("abcdefgh", k=2_000))
    with open(tmp_path / "rows.jsonl", "wb") as stream:
        for index in range(30):
            stream.writelines(b'{"text": "%d %s"}\n' % (index * 1000 + n, text.encode()) for n in range(1000))
        stream.write(b"x" * (160 << 20) + b'\n{"text": "last"}\n')
    count, last, python, arrow = measured(tmp_path, "rows.jsonl")
    assert (count, last) == (30_002, 10)
    assert python < 100
    assert arrow < 32
    table = pa.table({"text": [f"{n} {text}" for n in range(50_000)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=len(table), use_dictionary=False, compression=None)
    assert (tmp_path / "rows.parquet").stat().st_size > 100_000_000
    count, last, python, arrow = measured(tmp_path, "rows.parquet")
    assert (count, last) == (50_000, 10)
    assert python < 32
    assert arrow < 32
