"""What a run leaves behind, as a person wants to read it at the end."""

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from itertools import islice

from batcher.records import Summary, Totals
from batcher.report.text import budget, count, deadline, duration, money, printable

_LOOKED_AT = 100_000
"""Failures that are looked at for the most common ones: it bounds the memory."""


def render(summary: Summary, output: str) -> str:
    """The summary in aligned lines. `output` is the output's folder or URI as the reader should type it."""
    totals = summary.totals
    failed = count(totals.failed)
    if totals.failure_kinds:
        failed += f"  ({_counts(totals.failure_kinds)})"
    cached = f", {count(totals.cached_tokens)} of them cached" if totals.cached_tokens else ""
    requests = count(totals.attempts)
    if totals.attempts > totals.answered and not summary.retries:  # what a retry replaced were answers too
        requests += f" ({count(totals.attempts - totals.answered)} without an answer)"
    if summary.requests != totals.attempts:
        requests += f"; {count(summary.requests)} by this run"
    others = {reason or "none": number for reason, number in totals.finish_reasons.items() if reason != "stop"}
    lines = [
        ("answered", count(totals.answered)),
        ("failed", failed),
        ("pending", "unknown: the input was not counted" if summary.pending is None else count(summary.pending)),
        ("requests", requests),
        ("tokens", f"{count(totals.prompt_tokens)} prompt{cached}, {count(totals.completion_tokens)} completion"),
        ("cost", _cost(totals) if totals.rows else ""),
        ("budget", budget(summary.spent, summary.budget_usd)),
        ("finish", _counts(others) if others else ""),
        ("altered", f"{count(totals.altered)} rows hold text that Parquet cannot keep exactly" * bool(totals.altered)),
        (
            "unfit",
            f"{count(totals.unfit)} answers do not fit how they are read now: parsed is null" * bool(totals.unfit),
        ),
        ("deadline", _deadline(summary)),
        ("time", f"{duration(summary.seconds)}, {_rate(summary)} requests per second over {summary.transport}"),
        ("", ""),
    ]
    if totals.answered:
        lines += [
            ("answers", f"{output}/responses"),
            ("pandas", f"pandas.read_parquet({f'{output}/responses'!r})"),
            ("DuckDB", _duckdb(output)),
        ]
    if totals.failed:
        lines.append(("failures", f"{output}/failures"))
    table = [f"  {name:<10}{printable(text)}".rstrip() for name, text in lines if text or not name]
    return "\n".join([printable(f"{summary.name}: {summary.state}"), *table])


def failure_lines(failures: Iterable[tuple[str | None, str | None]], most: int = 3) -> list[str]:
    """The most common failures, each with its count, from kinds and messages of failed rows."""
    seen = Counter(islice(failures, _LOOKED_AT))
    return [
        printable(f"{count(number)} × {kind}: {message or 'no message'}"[:300])
        for (kind, message), number in seen.most_common(most)
    ]


def _cost(totals: Totals) -> str:
    """What is known of the cost: of nothing but rows that cost nothing and others of unknown price, nothing is."""
    if totals.unpriced and not totals.cost_usd:
        return money(None)
    rows = f", and {count(totals.unpriced)} rows whose price is not known" if totals.unpriced else ""
    return money(totals.cost_usd) + rows


def _deadline(summary: Summary) -> str:
    if summary.deadline is None:
        return ""
    said = deadline(datetime.fromisoformat(summary.deadline).timestamp(), None)
    if summary.late is None:
        return said
    return f"{said}, missed by {duration(summary.late)}" if summary.late > 0 else f"{said}, met"


def _counts(numbers: dict[str, int]) -> str:
    ordered = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {count(number)}" for name, number in ordered)


def _rate(summary: Summary) -> str:
    return count(summary.requests / summary.seconds) if summary.seconds > 0 else "0"


def _duckdb(output: str) -> str:
    """The command that shows the first answers; empty for stores that DuckDB does not know."""
    scheme = output.partition("://")[0] if "://" in output else ""
    if scheme not in ("", "s3", "gs", "gcs", "hf"):
        return ""
    # In S3 it looks for keys where the other tools do only when it is told to.
    secret = "create secret (type s3, provider credential_chain); " * (scheme == "s3")
    return f'duckdb -c "{secret}select * from {_literal(output)} limit 5"'


def _literal(output: str) -> str:
    """The parts as an SQL text inside a shell's double quotes."""
    text = f"{output}/responses/*.parquet".replace("'", "''")
    for character in '\\"$`':
        text = text.replace(character, "\\" + character)
    return f"'{text}'"
