"""Scores: what is taken out of an answer, what it is compared with, and how good it is, as columns.

| method            | an answer is right when                                                                         |
|-------------------|-------------------------------------------------------------------------------------------------|
| `exact`           | it is the target, white space around both aside                                                  |
| `number`          | the last number in it is the last one in the target: `1,234`, `$5`, `18.0`, `50%`, `1/2`, `1e3`  |
| `choice`          | it names the target's letter (`(B)`, `B.`, `b`, `B) text`), or is its text, case aside           |
| `contains`        | the target stands in it                                                                         |
| `regex`           | the target, a regular expression, finds something in it                                         |
| `json`            | both are equal as JSON                                                                          |
| `module:function` | as far as the function says                                                                     |
"""

import json
import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from batcher.errors import JobError
from batcher.imported import imported
from batcher.job import ANSWER, METHODS, REGEX, Score
from batcher.parameters import is_template
from batcher.parse import extract
from batcher.prompt import Template
from batcher.sink import SCORED

_Values = Mapping[str, Any]
_Take = Callable[[_Values], object]
_Grade = Callable[[str, str, _Values], float]

_Same = Callable[[str, str], tuple[str | None, str | None]]
"""An answer and its target in the form in which they are equal or not; None where they have none."""


class Scorer:
    """The `[score]` section, ready to be used.

    `columns` are the input's; `parsed` is the type of that column of the answers, None where there is none. `inputs`
    and `answers` are the columns that it needs of either. Raises JobError.
    """

    def __init__(
        self, score: Score, columns: Sequence[str], parsed: pa.DataType | None, folder: Path, origin: str
    ) -> None:
        self._method = score.method
        self._target, wanted = _target(score.target, columns, f"{origin}: score.target")
        if score.by is not None and score.by not in columns:
            raise JobError(f"{origin}: score.by: no column {score.by} in the input; its columns are {_listed(columns)}")
        self._take, self.answers = _answer(score.answer, parsed, f"{origin}: score.answer")
        if score.method in METHODS:
            self._grade = _GRADES[score.method]
            self.inputs = frozenset(wanted)
        else:
            self._grade = _function(score.method, folder, f"{origin}: score.method")
            self.inputs = frozenset(columns)  # it is shown the whole row

    def columns(self, answers: pa.Table, inputs: pa.Table) -> pa.Table:
        """The columns `SCORED` of these answers, with the input's rows beside them.

        A pure function of its tables: scores can be made again from what is stored.
        """
        taken = zip(_rows(answers, self.answers), _rows(inputs, self.inputs), strict=True)
        made = [self.score(answer, row) for answer, row in taken]
        columns = zip(*made, strict=True) if made else [()] * len(SCORED)
        return pa.table(
            [pa.array(values, kind) for values, kind in zip(columns, SCORED.types, strict=True)], schema=SCORED
        )

    def score(self, answer: _Values, row: _Values) -> tuple[str | None, str | None, float, str | None]:
        """The values of `SCORED` for one answer to one row of the input."""
        target, wrong = self._aim(row)
        try:
            extracted = text_of(self._take(answer))
        except Exception as error:  # whatever a template of the job's author raises: it meets a null, say
            return None, target, 0.0, wrong or _said("answer", error)
        if target is None or extracted is None:
            return extracted, target, 0.0, wrong
        try:
            return extracted, target, self._grade(extracted, target, row), None
        except Exception as error:  # whatever the user's function raises, and targets that cannot be compared with
            return extracted, target, 0.0, _said(self._method, error)

    def wrong(self, rows: Sequence[_Values]) -> list[str | None]:
        """Why no answer to a row of the input could be right, for each of these; None where one could be.

        A target is compared with itself. A function of the user's is called once only, to see whether it can be.
        """
        found: list[str | None] = []
        called = False
        for row in rows:
            target, wrong = self._aim(row)
            if target is not None and not called:
                called = self._method not in METHODS
                try:
                    self._grade(target, target, row)
                except Exception as error:
                    wrong = _said(self._method, error)
            found.append(wrong)
        return found

    def _aim(self, row: _Values) -> tuple[str | None, str | None]:
        """The target of a row, or why there is none."""
        try:
            target = text_of(self._target(row))
        except Exception as error:  # whatever a template of the job's author raises
            return None, _said("target", error)
        return target, "target: null" if target is None else None


# What is compared


def _target(given: str, columns: Sequence[str], where: str) -> tuple[_Take, frozenset[str]]:
    """What gives the truth, and the columns of the input that it needs."""
    if not is_template(given):
        if given not in columns:
            raise JobError(f"{where}: no column {given} in the input; its columns are {_listed(columns)}")
        return lambda row: row.get(given), frozenset({given})  # of JSON lines, one may lack it
    template = Template(given, where)
    if missing := sorted(template.names - set(columns)):
        raise JobError(f"{where}: no column {missing[0]} in the input; its columns are {_listed(columns)}")
    return template.render, template.names


def _answer(given: str | None, parsed: pa.DataType | None, where: str) -> tuple[_Take, frozenset[str]]:
    """What takes the answer out of a response, and the columns of the response that it needs."""
    plain = parsed is not None and not pa.types.is_nested(parsed)
    there = [name for name in ANSWER if name != "parsed" or parsed is not None]
    if given is None or given.startswith(REGEX):
        name = "parsed" if plain and given is None else "response"
        if given is None:
            return lambda answer: answer[name], frozenset({name})
        pattern = re.compile(given.removeprefix(REGEX))
        return lambda answer: extract(pattern, answer[name] or ""), frozenset({name})
    if is_template(given):
        template = Template(given, where)
        if missing := sorted(template.names - set(there)):
            raise JobError(f"{where}: no column {missing[0]} in the answers; there are {', '.join(there)}")
        return template.render, template.names
    name, *fields = given.split(".")
    if name not in there:
        raise JobError(f"{where}: the job has no schema and reads nothing out of its answers: no column {name}")
    kind: Any = parsed if name == "parsed" else pa.string()
    for number, field in enumerate(fields):
        known = [each.name for each in kind] if pa.types.is_struct(kind) else []
        if field not in known:
            place = ".".join([name, *fields[:number]])
            has = f"{place} has {', '.join(known)}" if known else f"{place} has no fields"
            raise JobError(f"{where}: no column {given} in the answers; {has}")
        kind = kind.field(field).type

    def take(answer: _Values) -> object:
        value: Any = answer[name]
        for field in fields:
            value = None if value is None else value[field]
        return value

    return take, frozenset({name})


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), 1)), None)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns)


def _rows(table: pa.Table, names: frozenset[str]) -> list[dict[str, Any]]:
    """The rows of a table with these columns alone, in plain Python: nanoseconds are cut to microseconds."""
    if not names:
        return [{}] * table.num_rows
    chosen = [name for name in table.column_names if name in names]
    values = zip(*(plain(table[name]) for name in chosen), strict=True)
    return [dict(zip(chosen, row, strict=True)) for row in values]


def plain(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A column in plain Python; what that cannot hold is null."""
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)
    elif pa.types.is_duration(kind) and kind.unit == "ns":
        column = column.cast(pa.duration("us"), safe=False)
    elif pa.types.is_time64(kind) and kind.unit == "ns":
        column = column.cast(pa.time64("us"), safe=False)
    try:
        return list(column.to_pylist())
    except _UNHELD:
        return [_value(each) for each in column]


def _value(held: pa.Scalar) -> Any:
    try:
        return held.as_py()
    except _UNHELD:
        return None


_UNHELD = (ValueError, OverflowError)
"""What is raised for a value beyond Python's: nanoseconds within a struct, a date in the year 30,000."""


def text_of(value: object) -> str | None:
    """A value as a column of texts holds it: a text as it is, all else as JSON has it; null is none."""
    match value:
        case None:
            return None
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case bytes():
            return value.decode("utf-8", "replace")
        case float() if (
            value.is_integer() and abs(value) < 1 << 53
        ):  # a column of whole numbers with nulls is one of floats, too often
            return str(int(value))
        case Decimal():
            return format(value, "f")
        case datetime() | date() | time():
            return value.isoformat()
    if isinstance(value, Mapping):
        value = _without_nulls(value)
    return _JSON.encode(value).decode()


def _without_nulls(value: object) -> object:
    """The same without members that are null: in a column, absent and null are the same."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON = msgspec.json.Encoder(decimal_format="number", enc_hook=str)


# How it is compared


def labels(method: str, extracted: str, target: str) -> tuple[str | None, str | None]:
    """An answer and its target as labels: equal where the method finds them so. None where one is no label."""
    return _SAME[method](extracted, target)


def _exact(extracted: str, target: str) -> tuple[str, str]:
    return extracted.strip(), target.strip()


_NUMBER = re.compile(
    r"""
    (?=[-+−$€£¥₹.\d])                          # most places are passed over at once
    (?:(?<![\w.,)])(?P<sign>[-+−]))?           # of "5-3" and "- 5" the line is no sign
    (?:[$€£¥₹]\s?)?
    (?:(?<=[$€£¥₹])(?P<inner>[-−]))?            # $-5
    (?:
        (?:(?P<whole>\d+)[ ])?(?P<over>\d+)\s?[/⁄]\s?(?P<under>\d+)(?![\d.,]*\d)
      | (?P<digits>\d{1,3}(?:[,\u00a0\u2009\u202f]\d{3})+(?!\d) | \d+)
        (?P<decimals>\.\d+)?
        (?P<exponent>[eE][-+]?\d{1,3}(?!\d))?
      | (?<!\d)(?P<fraction>\.\d+)
    )
    """,
    re.VERBOSE | re.ASCII,
)


_MOST_DIGITS = 1_000


def number(text: str) -> Fraction | None:
    """The last number in a text, exactly; signs of currency and percent say nothing."""
    found = _last(_NUMBER, text.replace("{,}", ","))  # as TeX writes thousands
    if found is None:
        return None
    try:
        if found["under"]:
            value = int(found["whole"] or 0) + Fraction(int(found["over"]), int(found["under"]))
        else:
            digits = re.sub("[^0-9]", "", found["digits"] or "0")
            decimals = found["decimals"] or found["fraction"] or ""
            if len(digits) + len(decimals) > _MOST_DIGITS:
                return None
            value = Fraction(digits + decimals + (found["exponent"] or ""))
    except (ValueError, ZeroDivisionError):  # a fraction of thousands of digits, and 1/0
        return None
    return -value if (found["sign"] or found["inner"] or "+") != "+" else value


def _number(extracted: str, target: str) -> tuple[str | None, str | None]:
    return _written(number(extracted)), _written(number(target))


def _written(value: Fraction | None) -> str | None:
    """A number as people write it; equal numbers alike."""
    if value is None or value.denominator == 1:
        return None if value is None else str(value)
    try:
        text = format(Decimal(repr(float(value))), "f")
        return text if Fraction(text) == value else str(value)
    except (OverflowError, ValueError):
        return str(value)


_LETTER = re.compile(r"\W*?(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])(?:\s*[.):]|\W*\Z))", re.ASCII)
_IN_BRACKETS = re.compile(r"\(\s*([A-Za-z])\s*\)", re.ASCII)
_AROUND = " \t\r\n*_`\"'“”‘’"


def _choice(extracted: str, target: str) -> tuple[str, str]:
    letter = _LETTER.match(target.strip())
    if letter is None:
        return _plain(extracted), _plain(target)
    wanted = (letter[1] or letter[2]).upper()
    named = _LETTER.match(extracted.strip())
    if named is not None:
        return (named[1] or named[2]).upper(), wanted
    bracketed = extract(_IN_BRACKETS, extracted)
    return (bracketed.upper() if bracketed else _plain(extracted)), wanted


def _plain(text: str) -> str:
    """A text without case, and without the marks that may stand around an answer."""
    return " ".join(text.strip(_AROUND).removesuffix(".").strip(_AROUND).casefold().split())


def _json(extracted: str, target: str) -> tuple[str | None, str | None]:
    return _canonical(extracted), _canonical(target)


def _canonical(text: str) -> str | None:
    """A JSON text in the one form that all equal ones have: keys sorted, 1.0 is 1, absent is null."""
    try:
        value = _without_nulls(_whole_numbers(msgspec.json.decode(text)))
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _whole_numbers(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    return [_whole_numbers(inner) for inner in value] if isinstance(value, list) else value


_SAME: Mapping[str, _Same] = {"exact": _exact, "number": _number, "choice": _choice, "json": _json}
COMPARING = frozenset(_SAME)
"""The methods by which an answer is one of some labels, as its target is."""


def _equal(same: _Same) -> _Grade:
    def grade(extracted: str, target: str, _: _Values) -> float:
        said, wanted = same(extracted, target)
        if wanted is None:
            raise ValueError(f"the target is none: {target!r:.60}")
        return float(said == wanted)

    return grade


def _contains(extracted: str, target: str, _: _Values) -> float:
    if not target.strip():
        raise ValueError("the target is empty, and so in every text")
    return float(target.strip() in extracted)


def _regex(extracted: str, target: str, _: _Values) -> float:
    return float(re.search(target, extracted) is not None)


_GRADES: Mapping[str, _Grade] = {
    **{method: _equal(same) for method, same in _SAME.items()},
    "contains": _contains,
    "regex": _regex,
}


def _function(reference: str, folder: Path, where: str) -> _Grade:
    """The user's own function."""
    try:
        with imported(reference, folder) as function:
            pass
    except JobError as error:
        raise JobError(f"{where}: {error}") from None
    if not callable(function):
        raise JobError(f"{where}: {reference} is no function")

    def grade(extracted: str, target: str, row: _Values) -> float:
        said = function(extracted, target, dict(row))
        try:
            score = float(said)
        except (TypeError, ValueError):
            score = math.nan
        if isinstance(said, str) or not 0 <= score <= 1:
            raise ValueError(f"true, false or a number from 0 to 1, not {str(said)!r:.60}")
        return score

    return grade


def _said(what: str, error: Exception) -> str:
    """What went wrong with a row's score, in a line."""
    name = "" if type(error).__name__ in ("ValueError", "UndefinedError") else f"{type(error).__name__}: "
    return _SURROGATE.sub("\ufffd", " ".join(f"{what}: {name}{error}".split()))[:300]
