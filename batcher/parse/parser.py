"""What reads answers: one object per run, the same for every row."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batcher.records import Misfit


class Parser(ABC):
    """Reads the value out of an answer's text: a dict for a schema, a text for a pattern or choices."""

    arrow_type: pa.DataType

    def __init__(self, vote: bool = False) -> None:
        self.vote = vote
        """Whether all choices of an answer vote; otherwise the first one is read."""

    @abstractmethod
    def read(self, text: str | None) -> Any:
        """The value in a text, in the form that `column` takes, or the Misfit that says why there is none.

        Raises nothing.
        """

    @abstractmethod
    def column(self, values: Sequence[Any]) -> tuple[pa.Array, list[int]]:
        """The Arrow array of what `read` gave, None being null, and the indices of values that had to be altered.

        Altered means that a lone surrogate, which Arrow cannot hold, became U+FFFD. An array holds up to 2 GiB of text.
        """

    def choose(self, texts: Sequence[str | None]) -> tuple[Any, float | None] | Misfit:
        """The value of an answer with these choices and, by vote, the share of all choices that have it.

        Of values with as many votes the first to appear is taken; a choice that does not fit has no vote.
        """
        if not self.vote:
            value = self.read(texts[0])
            return value if isinstance(value, Misfit) else (value, None)
        values = [self.read(text) for text in texts]
        votes: dict[str, list[Any]] = {}
        for value in values:
            if not isinstance(value, Misfit):
                votes.setdefault(value if isinstance(value, str) else repr(value), []).append(value)
        if not votes:
            first: Misfit = values[0]
            return Misfit(f"none of {len(values)} choices fits; the first: {first.message}"[:300])
        most = max(votes.values(), key=len)
        return most[0], len(most) / len(texts)
