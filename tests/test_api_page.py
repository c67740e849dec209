"""docs/api.md names everything that the API has, and only tests that exist."""

import re
from pathlib import Path

import pyarrow as pa

from batcher.parameters import CHAT, COMPLETIONS
from batcher.sink import FILLABLE, Shape

HOME = Path(__file__).parent
PAGE = (HOME.parent / "docs" / "api.md").read_text(encoding="utf-8")
WORDS = set(re.findall(r"`([\w.]+)`", PAGE))


def test_no_parameter_and_no_column_is_missing() -> None:
    """What a job may ask for, and what a row may have come to, stands on the page."""
    columns = Shape(pa.schema([]), None, (), None, frozenset(FILLABLE), True).responses().names
    assert {*CHAT, *COMPLETIONS, *columns, "parsed"} - WORDS == set()


def test_every_named_test_is_there() -> None:
    """A row's test can be run by the name that the page gives."""
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 60
    for file, test in named:
        assert f"def {test or 'test_'}" in (HOME / file).read_text(encoding="utf-8"), (file, test)
