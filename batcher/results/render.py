"""Scores as a person or a program wants them: tables for the terminal, Markdown, CSV, JSON."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batcher.export import harmless
from batcher.report import count, printable
from batcher.results.measure import Measured, Scores

_NULL, _EMPTY = "(null)", "(empty)"


class _Table(NamedTuple):
    """The first `texts` columns are texts, the others numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


def as_text(scores: Scores, width: int | None) -> str:
    """Lines and tables for a terminal of so many columns; None for as many as they need."""
    text = io.StringIO()
    console = Console(file=text, width=width or 10_000, color_system=None, highlight=False)
    console.print(Text(_headline(scores)))
    for name, said in _facts(scores):
        console.print(Text(f"  {name:<14}{said}"))
    for table in _tables(scores):
        console.print(Text(f"\n{table.title}"))
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, name in enumerate(table.head):
            made.add_column(Text(name), justify="left" if index < table.texts else "right", overflow="fold")
        for row in table.rows:
            made.add_row(*map(Text, row))
        console.print(made)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def as_markdown(scores: Scores) -> str:
    """The same for a page."""
    lines = [f"# {_escaped(_headline(scores))}", ""]
    lines += [f"- {name}: {_escaped(said)}" for name, said in _facts(scores)]
    for table in _tables(scores):
        marks = ["---" if index < table.texts else "---:" for index in range(len(table.head))]
        lines += ["", f"## {_escaped(table.title)}", ""]
        lines += [f"| {' | '.join(map(_escaped, row))} |" for row in (table.head, *table.rows)]
        lines.insert(len(lines) - len(table.rows), f"| {' | '.join(marks)} |")
    return "\n".join(lines)


def as_json(scores: Scores) -> str:
    """All of it, to the last digit."""
    return msgspec.json.format(msgspec.json.encode(scores), indent=2).decode()


def as_csv(scores: Scores) -> str:
    """One line per number, to the last digit. An empty group stands for all rows, an empty label for all of them.

    In lines of the measure `confusion`, `answer` is the label that the answers had.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("group", "label", "answer", "measure", "value"))
    groups = [("", scores.overall), *((_named(each.group), each) for each in scores.groups)]
    for group, measured in groups:
        for label, answer, name, value in _numbers(measured):
            writer.writerow((harmless(group), harmless(label), harmless(answer), name, value))
    return text.getvalue().removesuffix("\r\n")


def _numbers(measured: Measured) -> Iterator[tuple[str, str, str, float | str | None]]:
    for name in Measured.__struct_fields__:
        if name not in ("labels", "confusion"):
            yield "", "", name, getattr(measured, name)
    for label in measured.labels or ():
        for name in ("targets", "answers", "precision", "recall", "f1"):
            yield _named(label.label), "", name, getattr(label, name)
    for target, row in (measured.confusion or {}).items():
        for answer, rows in row.items():
            yield _named(target), _named(answer), "confusion", rows


def _headline(scores: Scores) -> str:
    return printable(f"{scores.output}: {count(scores.overall.answered)} answers, scored by {scores.method}")


def _facts(scores: Scores) -> Iterator[tuple[str, str]]:
    """What is to be said over all, by name."""
    overall = scores.overall
    yield "accuracy", f"{_rate(overall.accuracy)}{_between(overall)}"
    if overall.kappa is not None:
        yield "Cohen's kappa", _rate(overall.kappa)
    if overall.macro_f1 is not None:
        yield "macro F1", _rate(overall.macro_f1)
    if overall.failed:
        yield (
            "failed",
            f"{count(overall.failed)} rows; accuracy {_rate(overall.accuracy_with_failed)} with them as wrong",
        )
    if overall.without_answer:
        yield "no answer", f"found in {count(overall.without_answer)} responses, which count as 0"
    if overall.unscored:
        yield "not scored", f"{count(overall.unscored)} responses, which count as 0; the column score_error says why"
    if scores.pending:
        yield "pending", f"{count(scores.pending)} rows"
    elif scores.pending is None:
        yield "pending", "the last run has not come to its end"
    if scores.no_labels is not None:
        yield "labels", f"no tables, for {scores.no_labels}"


def _between(measured: Measured) -> str:
    if measured.interval is None:
        return ""
    name = "Wilson" if measured.interval == "wilson" else "Student's t"
    return f", 95 % interval {_rate(measured.low)} to {_rate(measured.high)} ({name})"


def _tables(scores: Scores) -> Iterator[_Table]:
    yield from _label_tables("", scores.overall)
    if scores.by is None:
        return
    yield _Table(
        f"by {printable(scores.by)}",
        (printable(scores.by), "answers", "failed", "accuracy", "from", "to", "with failed", "kappa", "macro F1"),
        [
            (
                printable(_named(each.group)),
                count(each.answered),
                count(each.failed),
                *map(_rate, (each.accuracy, each.low, each.high, each.accuracy_with_failed, each.kappa, each.macro_f1)),
            )
            for each in scores.groups
        ],
    )
    for each in scores.groups:
        yield from _label_tables(f"{printable(scores.by)} {printable(_named(each.group))}: ", each)


def _label_tables(of: str, measured: Measured) -> Iterator[_Table]:
    """How each label fares, and what is taken for what."""
    if measured.labels is None or measured.confusion is None:
        return
    yield _Table(
        f"{of}labels",
        ("label", "targets", "answers", "precision", "recall", "F1"),
        [
            (
                printable(_named(each.label)),
                count(each.targets),
                count(each.answers),
                *map(_rate, (each.precision, each.recall, each.f1)),
            )
            for each in measured.labels
        ],
    )
    answers = next(iter(measured.confusion.values()))
    yield _Table(
        f"{of}confusion, targets by answers",
        ("target", *(printable(_named(answer)) for answer in answers)),
        [(printable(_named(target)), *map(count, row.values())) for target, row in measured.confusion.items()],
    )


def _named(value: str | None) -> str:
    """A group or a label as something to see; in CSV an empty one stands for all."""
    return _NULL if value is None else value or _EMPTY


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:z.4f}"  # a kappa of -1e-17 has no sign


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|~" else sign for sign in text)
