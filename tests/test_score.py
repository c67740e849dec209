"""Scores: what is taken out of an answer, what it is compared with, and what is said where it cannot be."""

import datetime
import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batcher
from batcher.errors import JobError
from batcher.job import Score, load
from batcher.plan import plan, render
from batcher.results import measure
from batcher.score import Scorer, labels, number
from batcher.simulator import Recorded
from batcher.sink import SCORED
from batcher.verify import verify
from tests import stories

PARSED = pa.struct(
    [("label", pa.string()), ("sure", pa.bool_()), ("size", pa.float64()), ("of", pa.struct([("unit", pa.string())]))]
)
COLUMNS = ("label", "number", "tags", "note")


def scorer(folder: Path, parsed: pa.DataType | None = PARSED, **keys: str) -> Scorer:
    """A job's section over an input with these columns."""
    return Scorer(Score(**{"target": "label", **keys}), COLUMNS, parsed, folder, "job.toml")


def score(made: Scorer, response: str | None, row: Mapping[str, Any], parsed: object = None) -> tuple[object, ...]:
    """What is said of one answer."""
    return made.score({"response": response, "parsed": parsed, "reasoning": "thought"}, row)


RIGHT = [
    ("exact", " billing\n", "billing", True),
    ("exact", "Billing", "billing", False),
    ("exact", "", "", True),
    ("number", "1,234", "1234", True),
    ("number", "#### 1,234", "It is so.\n#### 1234", True),
    ("number", "$5", "5", True),
    ("number", "-$1,234.50", "-1234.5", True),
    ("number", "$-3", "−3", True),
    ("number", "18.0", "18", True),
    ("number", "18.", "18", True),
    ("number", "It takes 12 of the 18 eggs.", "18", True),
    ("number", "18 of the 12 eggs", "18", False),
    ("number", "50 %", "50", True),
    ("number", "50%", "0.5", False),
    ("number", "1/2", "0.5", True),
    ("number", "2 1/2 cups", "2.5", True),
    ("number", ".5", "1/2", True),
    ("number", "1.5e3", "1500", True),
    ("number", r"$1{,}234$", "1234", True),
    ("number", "1\u202f234\u202f567", "1234567", True),
    ("number", "x=-3", "-3", True),
    ("number", "5-3", "3", True),
    ("number", "- 18 apples", "18", True),
    ("number", "0.1", "0.10000000000000001", False),
    ("number", "none", "18", False),
    ("number", "9" * 5000, "18", False),
    ("choice", "(B)", "B", True),
    ("choice", "B.", "(B)", True),
    ("choice", "b", "(B)", True),
    ("choice", "B) Paris", "(B)", True),
    ("choice", "B: Paris", "(B)", True),
    ("choice", "**(B)**", "(B)", True),
    ("choice", "So the answer is (B).", "(B)", True),
    ("choice", "Not (A) but (B)", "(B)", True),
    ("choice", "(C)", "(B)", False),
    ("choice", "Bob", "(B)", False),
    ("choice", "A bee", "(A)", False),
    ("choice", "yes.", "Yes", True),
    ("choice", '"Valid"', "valid", True),
    ("choice", "] ) )", "] ) )", True),
    ("choice", "Monsters,  Inc.", "monsters, inc", True),
    ("contains", "It is Paris, of course", " Paris ", True),
    ("contains", "It is paris", "Paris", False),
    ("regex", "It is grey", "gr[ae]y", True),
    ("regex", "It is GREY", "gr[ae]y", False),
    ("regex", "It is GREY", "(?i)gr[ae]y", True),
    ("json", '{"b": 1.0, "a": [1, 2]}', '{"a":[1.0,2],"b":1}', True),
    ("json", '{"a": 1, "b": null}', '{"a": 1}', True),
    ("json", "[1, 2]", "[2, 1]", False),
    ("json", "true", "1", False),
    ("json", "{'a': 1}", '{"a": 1}', False),
]
"""Method, answer, target, whether it is right. docs/labels.md says the same in words."""


@pytest.mark.parametrize(("method", "said", "target", "right"), RIGHT)
def test_each_method_compares_what_it_says(tmp_path: Path, method: str, said: str, target: str, right: bool) -> None:
    """The whole answer is taken, as it is; the method reads it."""
    found = score(scorer(tmp_path, None, method=method), said, {"label": target})
    assert found == (said, target, float(right), None)


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}", "It is {}.", "#### {}", "${}", "{}%", "**{}**"]))
def test_a_number_is_found_wherever_it_stands(value: Fraction, around: str) -> None:
    """Exactly: as a fraction, and with thousands where it is whole."""
    assert number(around.format(value)) == value
    if value.denominator == 1:
        assert number(around.format(f"{int(value):,}")) == value


@given(st.text(), st.text(), st.sampled_from(["exact", "number", "choice", "json"]))
def test_labels_are_equal_where_the_score_is_one(said: str, target: str, method: str) -> None:
    """Nothing is raised, whatever the texts, and a text has the label that it has as a target."""
    one, other = labels(method, said, target)
    score_, error = scorer(Path(), None, method=method).score({"response": said}, {"label": target})[2:]
    assert (score_ == 1.0) == (one == other and other is not None)
    assert (error is not None) == (other is None)
    assert len(set(labels(method, target, target))) == 1


TAKEN = [
    (None, "billing"),
    ("response", "billing"),
    ("parsed.label", "bug"),
    ("parsed.sure", "true"),
    ("parsed.size", "2"),
    ("parsed.of.unit", "m"),
    ("parsed.of", '{"unit":"m"}'),
    ("reasoning", "thought"),
    ("{{ parsed.label | upper }}: {{ response }}", "BUG: billing"),
    ("{{ parsed.size }}", "2"),
    ("regex:b(.)", "i"),
    ("regex:[lin]+", "illin"),
    ("regex:l(in)g?|(x)", None),
    ("regex:(?:zz)", None),
]


@pytest.mark.parametrize(("answer", "taken"), TAKEN)
def test_an_answer_is_taken_out_of_the_response(tmp_path: Path, answer: str | None, taken: str | None) -> None:
    """The last match of an expression, its first group where it has one; a field of the parsed answer; a template."""
    keys = {} if answer is None else {"answer": answer}
    made = scorer(tmp_path, **keys)
    parsed = {"label": "bug", "sure": True, "size": 2.0, "of": {"unit": "m"}}
    response = "billing" if answer != "regex:l(in)g?|(x)" else "linx"
    assert score(made, response, {"label": "a"}, parsed)[0] == taken


def test_a_plain_value_that_was_read_is_the_answer(tmp_path: Path) -> None:
    """Where the job reads one value out of each answer, that is compared, and else the response."""
    assert score(scorer(tmp_path, pa.string()), "It is a.", {"label": "a"}, "a")[:3] == ("a", "a", 1.0)
    assert score(scorer(tmp_path, PARSED), "It is a.", {"label": "a"}, {"label": "a"})[:3] == ("It is a.", "a", 0.0)


@pytest.mark.parametrize(
    ("target", "row", "text"),
    [
        ("number", {"number": 18.0}, "18"),
        ("number", {"number": 2.5}, "2.5"),
        ("number", {"number": True}, "true"),
        ("number", {"number": datetime.date(2026, 5, 1)}, "2026-05-01"),
        ("tags", {"tags": {"b": None, "a": [1]}}, '{"a":[1]}'),
        ("{{ label.split('####')[-1] | trim }}", {"label": "2 + 3\n#### 5"}, "5"),
        ("{{ number }}", {"number": 5}, "5"),
    ],
)
def test_a_target_is_a_column_or_a_template(tmp_path: Path, target: str, row: dict[str, object], text: str) -> None:
    """Written as a text."""
    assert score(scorer(tmp_path, target=target), text, row) == (text, text, 1.0, None)


def test_a_score_is_never_null(tmp_path: Path) -> None:
    """No answer is 0. A target that is not there, or with which nothing can be compared, is 0 and says why."""
    assert score(scorer(tmp_path), None, {"label": "a"}) == (None, "a", 0.0, None)
    assert score(scorer(tmp_path), "a", {"label": None}) == ("a", None, 0.0, "target: null")
    assert score(scorer(tmp_path), "a", {}) == ("a", None, 0.0, "target: null")
    template = scorer(tmp_path, target="{{ label }}!")
    assert score(template, "a", {"label": None}) == ("a", None, 0.0, "target: label is null")
    assert score(scorer(tmp_path, method="regex"), "a", {"label": "("})[2:] == (
        0.0,
        "regex: error: missing ), unterminated subpattern at position 0",
    )
    assert score(scorer(tmp_path, method="number"), "1", {"label": "one"})[2:] == (
        0.0,
        "number: the target is none: 'one'",
    )
    assert score(scorer(tmp_path, method="contains"), "1", {"label": " "})[2] == 0.0
    unknown = scorer(tmp_path, answer="{{ parsed.label.nothing }}")
    assert score(unknown, "a", {"label": "a"}, {"label": "a"})[::2] == (None, 0.0)
    assert "nothing" in str(score(unknown, "a", {"label": "a"}, {"label": "a"})[3])


WRONG = [
    ({"target": "lable"}, "score.target: no column lable in the input; its columns are label, number, tags, note"),
    ({"target": "{{ lable }}"}, "score.target: no column lable in the input"),
    ({"target": "{{ label"}, "score.target: not a Jinja template"),
    ({"by": "task"}, "score.by: no column task in the input; its columns are label"),
    (
        {"answer": "parsed.lable"},
        "score.answer: no column parsed.lable in the answers; parsed has label, sure, size, of",
    ),
    ({"answer": "parsed.label.x"}, "score.answer: no column parsed.label.x in the answers; parsed.label has no fields"),
    ({"answer": "response.x"}, "score.answer: no column response.x in the answers; response has no fields"),
    ({"answer": "{{ label }}"}, "score.answer: no column label in the answers; there are response, parsed, reasoning"),
    (
        {"method": "no_such_module_of_mine:grade"},
        "score.method: no_such_module_of_mine cannot be imported: ModuleNotFoundError",
    ),
    ({"method": "json:nothing"}, "score.method: the module json has no nothing"),
    ({"method": "json:decoder"}, "score.method: json:decoder is no function"),
    ({"method": "score_breaks:grade"}, "score.method: score_breaks cannot be imported: ZeroDivisionError: division"),
    (
        {"method": "score_lacks:grade"},
        "score.method: score_lacks cannot be imported: ModuleNotFoundError: No module named",
    ),
]


@pytest.mark.parametrize(("keys", "said"), WRONG)
def test_what_cannot_be_scored_is_refused(tmp_path: Path, keys: dict[str, str], said: str) -> None:
    """Before anything is sent, with the names that there are."""
    (tmp_path / "score_breaks.py").write_text("1 / 0\n")
    (tmp_path / "score_lacks.py").write_text("import no_such_thing\n")
    with pytest.raises(JobError) as refused:
        scorer(tmp_path, **keys)
    assert str(refused.value).startswith(f"job.toml: {said}")
    assert "\n" not in str(refused.value)


def test_parsed_is_refused_where_nothing_is_parsed(tmp_path: Path) -> None:
    """A job without a schema has no such column."""
    with pytest.raises(JobError, match=r"no column parsed$"):
        scorer(tmp_path, None, answer="parsed.label")


def test_a_function_of_ones_own_scores(tmp_path: Path) -> None:
    """It is called with answer, target and row; what it raises, or says beyond 0 to 1, is a score of 0 that says so."""
    (tmp_path / "score_near.py").write_text(
        "def near(said, target, row):\n"
        "    if said == 'beyond': return 7\n"
        "    if said == 'text': return '1'\n"
        "    if said == 'truth': return True\n"
        "    return max(0.0, 1 - abs(float(said) - float(target)) / row['number'])\n"
    )
    made = scorer(tmp_path, method="score_near:near")
    assert made.inputs == {*COLUMNS}
    row = {"label": "10", "number": 4}
    assert score(made, "9", row) == ("9", "10", 0.75, None)
    assert score(made, "truth", row)[2:] == (1.0, None)
    assert score(made, "x", row)[2:] == (0.0, "score_near:near: could not convert string to float: 'x'")
    assert score(made, "9", {"label": "10"})[2:] == (0.0, "score_near:near: KeyError: 'number'")
    for said in ("beyond", "text"):
        assert str(score(made, said, row)[3]).startswith("score_near:near: true, false or a number from 0 to 1, not '")
    assert made.wrong([row, {"label": None}]) == [None, "target: null"]
    assert made.wrong([{"label": "10"}]) == ["score_near:near: KeyError: 'number'"]


def test_scores_are_a_function_of_columns(tmp_path: Path) -> None:
    """They can be made again from what is stored, whatever else stands there; moments beyond Python's are none."""
    made = scorer(tmp_path, target="number", answer="parsed.label")
    answers = pa.table({"parsed": pa.array([{"label": "1"}, None], PARSED), "response": ["x", "y"], "row": [4, 7]})
    inputs = pa.table({"number": [1, 2], "label": ["a", "b"]})
    found = made.columns(answers, inputs)
    assert found.schema == SCORED
    assert found.to_pylist() == [
        {"extracted": "1", "target": "1", "score": 1.0, "score_error": None},
        {"extracted": None, "target": "2", "score": 0.0, "score_error": None},
    ]
    assert made.columns(answers.slice(0, 0), inputs.slice(0, 0)).schema == SCORED
    moments = pa.table({"number": pa.array([1_700_000_000_000_000_001, 2**62], pa.timestamp("ns"))})
    assert made.columns(answers, moments)["target"].to_pylist() == [
        "2023-11-14T22:13:20",
        "2116-02-20T23:53:38.427387",
    ]
    far = pa.table({"number": pa.array([None, 2**62], pa.timestamp("s"))})
    assert made.columns(answers, far)["score_error"].to_pylist() == ["target: null", "target: null"]


def write(folder: Path, url: str, rows: list[dict[str, object]], **score_: str) -> Path:
    """A job with a section [score], and its input."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more: dict[str, Mapping[str, object]] = {"output": {"keep": []}, "score": score_}
    return stories.write_job(folder, url, more=more)


ROWS: list[dict[str, object]] = [
    {"key": f"k{row}", "text": stories.prompt(row), "score": row % 3, "truth": "x" if row % 4 else None}
    for row in range(40)
]


def test_a_run_scores_and_carries_the_group_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is read of the input, kept or not; a column of the input that is called as ours is renamed."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    with stories.service(latency=0.0) as service:
        keys = {"target": "truth", "method": "contains", "answer": "{{ response }}", "by": "score"}
        path = write(tmp_path, service.url, ROWS, **keys)
        found = batcher.run(load(path)).scores()
        table = stories.table(tmp_path / "out", "responses")
        assert table.column_names[:7] == ["row", "id", "input_score", "response", "extracted", "target", "score"]
        assert table["input_score"].to_pylist() == [row % 3 for row in range(40)]
        assert table["extracted"] == table["response"]
        assert table["target"].to_pylist() == [row["truth"] for row in ROWS]
        texts = zip(ROWS, table["response"].to_pylist(), strict=True)
        right = [float(bool(row["truth"]) and "x" in text) for row, text in texts]
        assert table["score"].to_pylist() == right
        assert table["score_error"].to_pylist() == [None if row["truth"] else "target: null" for row in ROWS]
        assert (found.overall.accuracy, found.overall.unscored, found.pending) == (sum(right) / 40, 10, 0)
        assert [(each.group, each.answered) for each in found.groups] == [("0", 14), ("1", 13), ("2", 13)]
        # How answers are scored is settled with the first; by what they are grouped is not.
        otherwise = "was begun with other scores: score.method: was 'contains', is now 'exact'"
        with pytest.raises(JobError, match=otherwise):
            batcher.run(load(path, ["score.method=exact"]))
        assert otherwise in str(plan(load(path, ["score.method=exact"])).refusal)
        assert batcher.run(load(path)).summary.requests == 0
        with pytest.raises(JobError, match="the columns of the output are fixed"):
            batcher.reparse(tmp_path / "out", ["score.by=truth"])
        # The stored answers can be scored otherwise, with the input's columns beside them.
        settings = ["score.method=exact", "score.target={{ text[5:10] }}", r"score.answer=regex:\[row (\d+)"]
        again = batcher.reparse(tmp_path / "out", settings).table()
        assert again["target"].to_pylist() == [f"{row:05d}" for row in range(40)]
        places = [re.findall(r"\[row (\d+)", text) for text in again["response"].to_pylist()]
        assert again["extracted"].to_pylist() == [each[-1] if each else None for each in places]
        assert again.drop_columns(SCORED.names) == table.drop_columns(SCORED.names)
        assert measure(tmp_path / "out").method == "exact"
        assert batcher.run(load(path, settings)).summary.requests == 0
        assert verify(tmp_path / "out").problems == []


def test_rows_that_are_answered_once_they_are_read_otherwise_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the target of its own row, among those that were answered before."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    said = {stories.prompt(row): (f"label {row % 3}" if row % 4 else f"something else {row}",) for row in range(40)}
    with stories.service(latency=0.0, answers=Recorded(said)) as service:
        path = write(tmp_path, service.url, ROWS, target="{{ 'label ' ~ score }}")
        words = ['request.choices=["label 0", "label 1", "label 2"]', "retry.max_invalid=0", "output.rows_per_part=16"]
        before = batcher.run(load(path, words))
        assert (before.table().num_rows, before.failures().num_rows) == (30, 10)
        assert set(before.table()["score"].to_pylist()) == {1.0}
        after = batcher.reparse(tmp_path / "out", ["request.choices="]).table()
        assert after["row"].to_pylist() == [*range(40)]
        assert after["extracted"] == after["response"]
        assert after["target"].to_pylist() == [f"label {row % 3}" for row in range(40)]
        assert after["score"].to_pylist() == [float(row % 4 > 0) for row in range(40)]
        assert verify(tmp_path / "out").problems == []


def test_the_plan_tells_of_rows_without_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some may lack one; where all of them do, nothing is sent, and the job may be put right."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    with stories.service(latency=0.0) as service:
        planned = render(plan(load(write(tmp_path, service.url, ROWS, target="truth"))))
        assert "score      10 of all rows cannot be scored, the first is row 0: target: null" in planned
        rows = [{**row, "truth": "?"} for row in ROWS]
        hopeless = write(tmp_path, service.url, rows, target="truth", method="number")
        said = r"score: no answer could be right: line 1 of .*rows.jsonl: number: the target is none: '\?'$"
        with pytest.raises(JobError, match=said):
            plan(load(hopeless))
        with pytest.raises(JobError, match=said):
            batcher.run(load(hopeless))
        assert service.book == []
        assert set(batcher.run(load(hopeless, ["score.method=exact"])).table()["score"].to_pylist()) == {0.0}
