"""Conditions over rows: which hold, which columns they need, and what is said of those that cannot be."""

import pyarrow as pa
import pytest

from batcher.errors import JobError
from batcher.where import Condition

SCHEMA = pa.schema({"lang": pa.string(), "n": pa.int64(), "s": pa.struct({"a": pa.int64()}), "Odd Name": pa.string()})
ROWS = pa.RecordBatch.from_pylist([{"lang": "en", "n": 2, "s": {"a": 1}, "Odd Name": "x"}, {"lang": "de"}], SCHEMA)


@pytest.mark.parametrize(
    ("sql", "columns", "holds"),
    [
        ("lang = 'en'", ("lang",), [True, False]),
        ("n > 1", ("n",), [True, False]),
        ("n is null", ("n",), [False, True]),
        ("s.a = 1 and lang <> 'de' -- both", ("lang", "s"), [True, False]),
        ("\"odd name\" = 'x'", ("Odd Name",), [True, False]),
        ("1 = 1", ("lang",), [True, True]),
    ],
)
def test_a_condition_says_which_rows_it_holds_for(sql: str, columns: tuple[str, ...], holds: list[bool]) -> None:
    """A null is no truth; a condition needs the columns that it names, and no others."""
    condition = Condition(sql, SCHEMA, "job.toml: input.where")
    assert condition.columns == columns
    assert condition.mask(ROWS.select(columns)).to_pylist() == holds


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("lang = ", "not an SQL condition: syntax error"),
        ("n > 1); drop table x; select (1", "not an SQL condition: syntax error"),
        ("lang > 3", "Cannot compare values of type VARCHAR"),
        ("nope = 3", 'Referenced column "nope" not found in FROM clause; the columns are '),
        ("sum(n) > 3", "one truth for each row"),
        ("exists (select 1 from read_csv('/etc/hostname'))", "file system operations are disabled"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(sql: str, said: str) -> None:
    """Wrong words, wrong types, unknown columns, and whatever would look elsewhere than at the row."""
    with pytest.raises(JobError) as error:
        Condition(sql, SCHEMA, "job.toml: input.where")
    assert str(error.value).startswith("job.toml: input.where: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_that_are_not_needed_may_be_of_any_type() -> None:
    """DuckDB does not know every type of Arrow's: that is said of columns that the condition names alone."""
    schema = pa.schema({"lang": pa.string(), "half": pa.float16()})
    assert Condition("lang = 'en'", schema, "job.toml: input.where").columns == ("lang",)
    with pytest.raises(JobError, match=r"input\.where: Not implemented Error"):
        Condition("half > 1", schema, "job.toml: input.where")


def test_a_value_that_cannot_be_cast_is_told_in_one_line() -> None:
    """Wherever in a batch it stands."""
    condition = Condition("lang::integer > 3", SCHEMA, "job.toml: input.where")
    rows = pa.RecordBatch.from_pydict({"lang": ["4"] * 5000 + ["four"]})
    with pytest.raises(JobError, match=r"^job\.toml: input\.where: Conversion Error: Could not convert string 'four'"):
        condition.mask(rows)
