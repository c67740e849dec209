"""The scores of an output, counted in one pass, and what scipy and scikit-learn make of them."""

import math
import tomllib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import msgspec
import pyarrow as pa

from batcher.errors import JobError
from batcher.export import batches, pending
from batcher.job import Score
from batcher.score import COMPARING, labels, plain, text_of
from batcher.sink import NAMES, SCORED
from batcher.store import Results, results_at

MOST_LABELS = 20
"""Different targets up to which they are labels, with a table of their own."""
ANOTHER, NONE = "(another)", "(none)"
"""In the place of a label: an answer that is none of the targets, and no answer."""
_CONFIDENCE = 0.95


class Label(msgspec.Struct):
    """One label: rows that have it as their target, answers that name it, and the rates of the two."""

    label: str
    targets: int
    answers: int
    precision: float
    recall: float
    f1: float


class Measured(msgspec.Struct):
    """All answers, or those of a group. `low` and `high` bound the interval in which the accuracy lies with 95 %."""

    answered: int
    failed: int
    accuracy: float | None
    """The mean score of the answered rows; None where there are none."""
    low: float | None
    high: float | None
    interval: Literal["wilson", "t"] | None
    """How the bounds were found: Wilson's, where all scores are 0 or 1, else Student's t; None where none were."""
    accuracy_with_failed: float | None
    """The same when failed rows count as wrong."""
    without_answer: int
    """Answered rows in which no answer was found."""
    unscored: int
    """Answered rows that have a `score_error`. These and those without an answer count as 0."""
    kappa: float | None = None
    """Cohen's; as the following ones None where the targets are not labels."""
    macro_f1: float | None = None
    """The mean over the labels."""
    labels: list[Label] | None = None
    confusion: dict[str, dict[str, int]] | None = None
    """Rows by target and answer."""


class Group(Measured, kw_only=True):
    """The rows that have one value of the column in `by`; None is null."""

    group: str | None


class Scores(msgspec.Struct):
    """How good the answers of an output are."""

    output: str
    method: str
    by: str | None
    pending: int | None
    """Rows that have come to no end yet; None while the run goes on, or when the last one did not come to its end."""
    overall: Measured
    groups: list[Group]
    no_labels: str | None
    """Why there are no labels over all; None where there are."""


def measure(output: str | Path) -> Scores:
    """The scores of an output, as far as it is published. Raises JobError, StorageError."""
    results = results_at(output)
    score = _section(results)
    _need_statistics()
    compared = score.method in COMPARING
    overall = _Count(compared)
    groups: dict[str | None, _Count] = {}
    by = _stored_as(score.by) if score.by is not None else []
    rows = 0
    for folder, batch in batches(results, {"responses": {*SCORED.names, *by}, "failures": {*by}}):
        rows += batch.num_rows
        counts = [[overall] for _ in range(batch.num_rows)]
        if by:
            name = max((name for name in by if name in batch.schema.names), key=len)
            for several, value in zip(counts, map(text_of, plain(batch.column(name))), strict=True):
                several.append(groups.setdefault(value, _Count(compared)))
        if folder == "failures":
            for several in counts:
                for count in several:
                    count.failed += 1
            continue
        if "score" not in batch.schema.names:
            raise JobError(f"{results}: its answers are not scored yet: they have no column score")
        for several, one in zip(counts, _answers(batch, score.method if compared else None), strict=True):
            for count in several:
                count.add(one)
    why = None
    if not compared:
        why = f"with {score.method} an answer is no label"
    elif overall.pairs is None:
        why = f"there are more than {MOST_LABELS} different targets"
    return Scores(
        str(results),
        score.method,
        score.by,
        pending(results, rows),
        Measured(**overall.measured()),
        [
            Group(group=group, **count.measured())
            for group, count in sorted(groups.items(), key=lambda pair: (pair[0] is None, pair[0] or ""))
        ],
        why,
    )


def _section(results: Results) -> Score:
    """What the output's job says of scores."""
    written = results.read("job.toml")
    if written is None:
        raise JobError(f"{results}: no output of batcher, for it has no job.toml")
    try:
        section = tomllib.loads(written.decode()).get("score")
        score = None if section is None else msgspec.convert(section, Score)
    except (ValueError, msgspec.ValidationError):
        raise JobError(f"{results}/job.toml: is damaged, so the output cannot be read") from None
    if score is None:
        raise JobError(f"{results}: its job has no section [score], so nobody knows what its answers should be")
    return score


def _need_statistics() -> None:
    for name in ("scipy", "sklearn"):
        if find_spec(name) is None:
            raise JobError(f"results needs {name}, which is not installed: pip install 'batcher[results]'")


def _stored_as(name: str) -> list[str]:
    """The names that a column of the input may have in an output; of those that are there, the longest is its own."""
    return [f"{'input_' * times}{name}" for times in range(5 if name in NAMES else 1)]


class _Answer(NamedTuple):
    """What counts of an answer. `pair` are its label and its target's."""

    score: float
    pair: tuple[str, str] | None
    found: bool
    scored: bool


def _answers(batch: pa.RecordBatch, method: str | None) -> Iterator[_Answer]:
    """The answers of a batch, with labels where a method is given that has some."""
    found = batch.column("extracted").is_valid().to_pylist()
    scored = batch.column("score_error").is_null().to_pylist()
    pairs: Iterable[tuple[str, str] | None] = repeat(None, batch.num_rows)
    if method is not None:
        texts = zip(batch.column("extracted").to_pylist(), batch.column("target").to_pylist(), strict=True)
        pairs = (_pair(method, extracted, target) for extracted, target in texts)
    return map(_Answer, batch.column("score").to_pylist(), pairs, found, scored)


def _pair(method: str, extracted: str | None, target: str | None) -> tuple[str, str] | None:
    if target is None:
        return None
    said, wanted = labels(method, extracted or "", target)
    return None if wanted is None else (NONE if extracted is None or said is None else said, wanted)


class _Count:
    """Answers in the counting."""

    def __init__(self, compared: bool) -> None:
        self.failed = self.without_answer = self.unscored = 0
        self.scores = array("d")
        self.pairs: Counter[tuple[str, str]] | None = Counter() if compared else None
        """Rows by label and target; None where these are no labels."""
        self._targets: set[str] = set()

    def add(self, answer: _Answer) -> None:
        """Count one more."""
        self.scores.append(answer.score)
        self.without_answer += not answer.found
        self.unscored += not answer.scored
        if self.pairs is not None and answer.pair is not None:
            self.pairs[answer.pair] += 1
            self._targets.add(answer.pair[1])
            if len(self._targets) > MOST_LABELS:
                self.pairs = None

    def measured(self) -> dict[str, Any]:
        """The fields of `Measured`."""
        answered = len(self.scores)
        total = math.fsum(self.scores)
        low, high, interval = _interval(self.scores)
        return {
            "answered": answered,
            "failed": self.failed,
            "accuracy": total / answered if answered else None,
            "low": low,
            "high": high,
            "interval": interval,
            "accuracy_with_failed": total / (answered + self.failed) if answered + self.failed else None,
            "without_answer": self.without_answer,
            "unscored": self.unscored,
            **(_agreement(self.pairs, sorted(self._targets)) if self.pairs else {}),
        }


def _interval(scores: Sequence[float]) -> tuple[float | None, float | None, Literal["wilson", "t"] | None]:
    """The bounds of a mean score, and how they were found."""
    from scipy import stats

    if not scores:
        return None, None, None
    if all(score in (0, 1) for score in scores):
        found = stats.binomtest(int(sum(scores)), len(scores)).proportion_ci(_CONFIDENCE, method="wilson")
        return float(found.low), float(found.high), "wilson"
    if len(scores) < 2 or min(scores) == max(scores):
        return None, None, None
    bounds = stats.t.interval(_CONFIDENCE, len(scores) - 1, loc=fmean(scores), scale=stats.sem(scores))
    return max(0.0, float(bounds[0])), min(1.0, float(bounds[1])), "t"


def _agreement(pairs: Counter[tuple[str, str]], targets: list[str]) -> dict[str, Any]:
    """What label and target have to do with each other. An answer that is no target is one more label."""
    from sklearn import metrics

    known = {*targets, NONE}
    said = [label if label in known else ANOTHER for label, _ in pairs]
    true = [target for _, target in pairs]
    rows = list(pairs.values())
    names = [*targets, ANOTHER, NONE]
    confusion = metrics.confusion_matrix(true, said, labels=names, sample_weight=rows).tolist()
    rates = metrics.precision_recall_fscore_support(true, said, labels=targets, sample_weight=rows, zero_division=0)
    kappa = None
    if len({*said, *true}) > 1:  # where there is but one label, agreement by chance is perfect too
        kappa = float(metrics.cohen_kappa_score(true, said, labels=names, sample_weight=rows))
    found = [
        Label(name, sum(confusion[index]), sum(row[index] for row in confusion), *map(float, numbers))
        for index, (name, *numbers) in enumerate(zip(targets, *rates[:3], strict=True))
    ]
    return {
        "kappa": kappa,
        "macro_f1": fmean(label.f1 for label in found),
        "labels": found,
        "confusion": {
            target: {name: int(rows) for name, rows in zip(names, row, strict=True) if name in targets or name in said}
            for target, row in zip(targets, confusion, strict=False)  # what follows is no target
        },
    }
