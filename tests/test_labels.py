"""Labels out of plain text: patterns, choices, votes; and the types that a job names."""

import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.imported import imported, json_schema
from batcher.parse import AnswerSchema, Choices, Pattern, extract
from batcher.records import Misfit

CHOICES = Choices(["bug", "billing", "how to", "Dr. Who.", "it's"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bug", "bug"),
        (" bug\n", "bug"),
        ('"bug"', "bug"),
        ("**Bug.**", "bug"),
        ("`BILLING`", "billing"),
        ("“How To.”", "how to"),
        ("__dr. who__", "Dr. Who."),
        ("It's", "it's"),
    ],
)
def test_a_choice_is_known_in_any_dress(text: str, expected: str) -> None:
    """Whitespace, quotes, emphasis, a full stop and the case are no part of a label."""
    assert CHOICES.read(text) == expected


@pytest.mark.parametrize("text", ["", "a bug", "bugs", "bug, billing", "*", "Label: bug"])
def test_a_label_outside_the_choices_is_none(text: str) -> None:
    """The whole answer has to be one of the choices."""
    found = CHOICES.read(text)
    assert isinstance(found, Misfit)
    assert found.message.endswith('is none of the choices "bug", "billing", "how to", "Dr. Who.", "it\'s"')
    assert CHOICES.read(None) == Misfit("the answer has no text")


def test_case_counts_where_it_tells_choices_apart() -> None:
    """Of choices that differ by case or dress alone, only the exact one is taken."""
    choices = Choices(["US", "us", "Yes", "A.", "A"])
    assert [choices.read(text) for text in ("US", "us", "**us**", "YES", "A.", "A")] == [
        *("US", "us", "us", "Yes", "A.", "A")
    ]
    for text in ("Us", "'A'", "a"):
        assert isinstance(choices.read(text), Misfit)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True))
def test_each_choice_is_itself(choices: list[str]) -> None:
    """Whatever the labels, an answer that is exactly one of them is it."""
    known = Choices(choices)
    for choice in choices:
        if choice == choice.strip():
            assert known.read(choice) == choice


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"\([A-Z]\)", "(A) no. So the answer is (B).", "(B)"),
        (r"answer is \(?([A-Z])", "answer is A. So the answer is (B).", "B"),
        (r"#### (.+)", "is 7\n#### 1,234", "1,234"),
        (r"a.b", "a\nb", None),
        (r"(x)|(y)", "x y", None),
        (r"z*", "abc", ""),
        (r"no", "yes", None),
    ],
)
def test_the_last_match_counts(pattern: str, text: str, expected: str | None) -> None:
    """Group 1 of the last match if the pattern has one, else the whole match; no flags are set."""
    assert extract(re.compile(pattern), text) == expected


def test_what_a_pattern_finds_has_to_be_a_choice() -> None:
    """With choices, what was taken out is looked up among them; nothing found is no answer."""
    pattern = Pattern(r"Label: (.*)", Choices(["bug", "other"]))
    assert pattern.read("Label: other\nLabel: **Bug**") == "bug"
    assert pattern.read("Label: nope") == Misfit('"nope" is none of the choices "bug", "other"')
    assert pattern.read("none") == pattern.read("Label: ") == Misfit("nothing in the answer matches Label: (.*)")
    assert Pattern(r"\d+").read("1 2") == "2"
    assert Pattern(r"\d+").read(None) == Misfit("the answer has no text")


def test_labels_are_texts() -> None:
    """The column holds texts; what Arrow cannot hold is replaced and noted."""
    pattern = Pattern(".+")
    column, altered = pattern.column(["a", None, "\ud800b"])
    assert (column.to_pylist(), altered) == (["a", None, "\ufffdb"], [2])
    assert pattern.arrow_type == column.type == pa.string()


def test_the_majority_is_chosen() -> None:
    """Most votes win; of as many the first to appear; what does not fit has no vote and counts in the share."""
    vote = Choices(["a", "b"], vote=True)
    assert vote.choose(["b", "A", "a"]) == ("a", 2 / 3)
    assert vote.choose(["b", "a"]) == ("b", 1 / 2)
    assert vote.choose(["x", None, "b", "a"]) == ("b", 1 / 4)
    assert vote.choose(["x", "y"]) == Misfit('none of 2 choices fits; the first: "x" is none of the choices "a", "b"')
    assert Choices(["a", "b"]).choose(["b", "a", "a"]) == ("b", None)
    objects = AnswerSchema({"type": "object", "properties": {"x": {"type": "integer"}}}, "x", vote=True)
    assert objects.choose(['{"x": 1}', '{"x": 2}', '{"x": 2.0}']) == ({"x": 2}, 2 / 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a module of types."""
    (tmp_path / "labels_here.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses, datetime, enum, typing\n"
        "import msgspec\nfrom pydantic import BaseModel\nfrom kinds_here import Mood\n"
        "class Ticket(msgspec.Struct):\n    mood: Mood\n    day: datetime.date | None = None\n"
        "@dataclasses.dataclass\nclass Plain:\n    mood: Mood\n    day: typing.Optional[datetime.date] = None\n"
        "class Model(BaseModel):\n    mood: Mood\n    day: datetime.date | None = None\n"
        "    class Inner(BaseModel):\n        x: int\n"
        "class Hours(msgspec.Struct, rename='camel'):\n    opens_at: datetime.time\n    closed: list[Plan] = []\n"
        "@dataclasses.dataclass\nclass Plan:\n    name: str\n    mood: Mood\n    then: Plan | None = None\n"
        "    seen: typing.Optional[list[datetime.datetime]] = None\n    at: datetime.datetime | int = 0\n"
        "class Odd:\n    x: complex\n"
    )
    (tmp_path / "kinds_here.py").write_text("import enum\nclass Mood(enum.Enum):\n    GOOD = 'good'\n    BAD = 'bad'\n")
    return tmp_path


@pytest.mark.parametrize("name", ["Ticket", "Plain", "Model"])
def test_types_have_schemas(folder: Path, name: str) -> None:
    """A msgspec Struct, a dataclass and a pydantic model of the same fields are the same column."""
    parser = AnswerSchema(json_schema(f"labels_here:{name}", folder), name)
    assert parser.arrow_type == pa.struct({"mood": pa.string(), "day": pa.date32()})
    assert parser.read('{"mood": "good"}') == {"mood": "good", "day": None}
    assert isinstance(parser.read('{"mood": "glad"}'), Misfit)
    assert "labels_here" not in sys.modules
    assert str(folder) not in sys.path


def test_times_of_types_are_times(folder: Path) -> None:
    """Also where Python's type says nothing about an offset: nested, in lists, optional, by another name."""
    schema = json_schema("labels_here:Hours", folder)
    parser = AnswerSchema(schema, "Hours")
    moment = pa.timestamp("us", tz="UTC")
    texts = {name: pa.string() for name in ("name", "mood", "then")}
    closed = pa.struct({**texts, "seen": pa.list_(moment), "at": pa.string()})
    assert parser.arrow_type == pa.struct({"opensAt": pa.time64("us"), "closed": pa.list_(closed)})
    assert str(schema).count("'format': 'date-time'") == 1
    assert isinstance(parser.read('{"opensAt": "noon"}'), Misfit)


def test_a_module_is_read_anew(folder: Path) -> None:
    """A module beside the job is what it is now; one of the same name that was imported elsewhere stays."""
    (folder / "json.py").write_text("class T:\n    a: int\n")
    module = sys.modules["json"]
    with imported("json:T", folder) as kind:
        assert kind is not module
        assert sys.modules["json"] is not module
    assert sys.modules["json"] is module
    assert json_schema("labels_here:Model.Inner", folder)["properties"] == {"x": {"title": "X", "type": "integer"}}


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (
            "nowhere_at_all:T",
            "nowhere_at_all cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("broken_here:T", "broken_here cannot be imported: ZeroDivisionError: division by zero"),
        ("ending_here:T", "ending_here cannot be imported: SystemExit: 3"),
        ("labels_here:Nope", "the module labels_here has no Nope"),
        ("labels_here:Odd", "labels_here:Odd has no JSON Schema: TypeError: "),
    ],
)
def test_what_is_no_type_is_said(folder: Path, reference: str, expected: str) -> None:
    """Whatever is wrong with a type, it is one line."""
    (folder / "broken_here.py").write_text("1 / 0\n")
    (folder / "ending_here.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(JobError) as refused:
        json_schema(reference, folder)
    assert str(refused.value)[: len(expected)] == expected
    assert "\n" not in str(refused.value)
