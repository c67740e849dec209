"""Labels out of plain text, for models without schemas: by a regular expression, out of a list, or both."""

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import pyarrow as pa

from batcher.parse.parser import Parser
from batcher.parse.words import SURROGATE, line, quoted
from batcher.records import Misfit

_WRAPPING = " \t\r\n\f\v\u00a0\ufeff\"'`*_~“”„‘’‚«»‹›"
"""What stands around a label and does not belong to it: whitespace, quotes, Markdown's emphasis."""


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """What a pattern takes out of a text: of its last match group 1, if it has one, else the whole match."""
    taken: str | None = None
    for last in deque(pattern.finditer(text), 1):
        taken = last[1 if pattern.groups else 0]
    return taken


class _Labels(Parser):
    """Reads texts."""

    arrow_type = pa.string()

    def column(self, values: Sequence[str | None]) -> tuple[pa.Array, list[int]]:
        """As in Parser."""
        try:
            return pa.array(values, pa.string()), []
        except UnicodeEncodeError:
            cleaned = [value and SURROGATE.sub("\ufffd", value) for value in values]
            altered = [index for index, value in enumerate(values) if value != cleaned[index]]
            return pa.array(cleaned, pa.string()), altered


class Choices(_Labels):
    """One of a few labels: the whole answer, but for what stands around it and for its case where that is plain."""

    def __init__(self, choices: Sequence[str], vote: bool = False) -> None:
        super().__init__(vote)
        self._known = dict.fromkeys(choices)
        self._bare = _unique(choices, _bare)
        self._folded = _unique(choices, _folded)
        self._all = ", ".join(map(quoted, choices))

    def read(self, text: str | None) -> str | Misfit:
        """As in Parser."""
        if text is None:
            return Misfit("the answer has no text")
        whole = text.strip()
        if whole in self._known:
            return whole
        found = self._bare.get(_bare(text)) or self._folded.get(_folded(text))
        return found or Misfit(line(f"{quoted(whole)} is none of the choices {self._all}"))


class Pattern(_Labels):
    """What a regular expression takes out of the answer, which has to be one of `choices` where there are some."""

    def __init__(self, pattern: str, choices: Choices | None = None, vote: bool = False) -> None:
        super().__init__(vote)
        self._pattern = re.compile(pattern)
        self._choices = choices

    def read(self, text: str | None) -> str | Misfit:
        """As in Parser; an empty text is no value."""
        if text is None:
            return Misfit("the answer has no text")
        found = extract(self._pattern, text)
        if not found:
            return Misfit(line(f"nothing in the answer matches {self._pattern.pattern}"))
        return found if self._choices is None else self._choices.read(found)


def _bare(text: str) -> str:
    """A label without what stands around it."""
    before = ""
    while text != before:
        before = text
        text = text.strip(_WRAPPING).removesuffix(".")
    return text


def _folded(text: str) -> str:
    return _bare(text).casefold()


def _unique(choices: Sequence[str], form: Callable[[str], str]) -> Mapping[str, str]:
    """The choices by a form of theirs, without those whose form is another one's too."""
    ordered = sorted(choices, key=form)
    groups = [(key, list(same)) for key, same in groupby(ordered, key=form)]
    return {key: same[0] for key, same in groups if len(same) == 1 and key}
