"""Recorded answers: a file of questions and what was said to them, which the simulated model says again."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

_SHORTEST = 8  # characters of a question that is looked for inside of a prompt


class Recorded:
    """Answers by question. A question that stands several times has several, for the choices in turn."""

    def __init__(self, answers: Mapping[str, Iterable[str]]) -> None:
        self._answers = {question: tuple(several) for question, several in answers.items()}
        self._inside = sorted((one for one in self._answers if len(one) >= _SHORTEST), key=len, reverse=True)
        self._contained = lru_cache(maxsize=1 << 14)(self._look_inside)

    def find(self, prompt: str) -> tuple[str, ...]:
        """The answers to the question that the prompt is, or else to the longest that it contains; none: not known."""
        return self._answers.get(prompt) or self._contained(prompt)

    def _look_inside(self, prompt: str) -> tuple[str, ...]:
        return next((self._answers[one] for one in self._inside if one in prompt), ())


def load(path: Path, question: str = "question", answer: str = "answer") -> Recorded:
    """The answers in a Parquet file or in JSON lines, by the names of their columns.

    An answer is a text, a list of texts, or any other value, which is said as JSON.
    Raises ValueError that says what is wrong and where.
    """
    answers: dict[str, list[str]] = {}
    for place, row in _rows(path, question, answer):
        asked, said = row.get(question), row.get(answer)
        if not isinstance(asked, str) or said is None:
            raise ValueError(f"{path}: {place} needs a text in {question!r} and a value in {answer!r}")
        several = said if isinstance(said, list) and said and all(isinstance(one, str) for one in said) else [said]
        texts = [one if isinstance(one, str) else msgspec.json.encode(one).decode() for one in several]
        answers.setdefault(asked, []).extend(texts)
    return Recorded(answers)


def _rows(path: Path, question: str, answer: str) -> Iterable[tuple[str, Mapping[str, object]]]:
    """Each row of a file, and what to call its place."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(pa.BufferReader(data), columns=[question, answer]).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
        return [(f"row {number}", row) for number, row in enumerate(rows, 1)]
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                found.append((f"line {number}", msgspec.json.decode(line, type=dict[str, object])))
            except (msgspec.MsgspecError, UnicodeError):
                raise ValueError(f"{path}: line {number} is not a JSON object") from None
    return found
