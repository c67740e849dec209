"""What `batcher status` shows: an output and its run, in a screenful of plain text."""

from datetime import UTC, datetime

from batcher.records import Second, Status
from batcher.report.text import budget, count, deadline, duration, money, printable, size

DECISIONS = 6
"""How many of the scheduler's last decisions are shown."""
_LIVE = ("running", "draining", "publishing")
_HINTS = {
    "broken off": "its last run did not come to its end (killed?): run the job again",
    "in use": "verify counts, or a run is just beginning",
}


def status_text(status: Status) -> str:
    """An output's state in aligned lines, and a table of its last minutes."""
    live = status.state in _LIVE
    head = f"{status.output}: {status.state}"
    if live:
        head += f" for {duration(status.seconds)} (process {status.pid})"
    elif status.state in _HINTS:
        head += f"; {_HINTS[status.state]}"
    lines = [
        ("rows", _rows(status)),
        ("speed", _speed(status, live)),
        ("held by", status.binds if live else ""),
        ("in flight", f"{count(status.in_flight)} of {count(status.window)}" if live else ""),
        ("limits", ", ".join(f"{name} {100 * used:.0f} % used" for name, used in status.buckets.items()) * live),
        ("requests", _requests(status)),
        ("tokens", f"{count(status.prompt_tokens)} prompt, {count(status.completion_tokens)} completion"),
        ("cost", money(status.cost_usd)),
        ("budget", budget(status.spent, status.budget_usd)),
        ("deadline", deadline(status.deadline, status.late if live else None)),
        ("parts", f"{count(status.parts)} published, {count(status.complete_parts)} of them complete"),
        ("ledger", size(status.ledger_bytes)),
        ("failed", _counts(status.totals.failure_kinds) if status.totals.failed == status.failed else ""),
    ]
    text = [printable(head), *(printable(f"  {name:<10}{words}") for name, words in lines if words)]
    if status.troubles:
        text += ["", "  requests of this run without an answer:"]
        for kind, trouble in sorted(status.troubles.items(), key=lambda pair: -pair[1].attempts):
            last = f"{count(trouble.attempts)} × {kind}, last at {_clock(trouble.sent_at)}: {trouble.message}"
            text.append(printable(f"  {last}"[:200]))
    if status.decisions:
        text += ["", "  what the scheduler decided last (UTC):"]
        text += [printable(f"  {_clock(at)}  {what}") for at, what in status.decisions[-DECISIONS:]]
    if status.timeline:
        text += ["", *_table(status.timeline)]
    return "\n".join(text)


def _rows(status: Status) -> str:
    done = status.answered + status.failed
    share = f" ({100 * done // status.total} %)" if status.total else ""
    whole = f" of {count(status.total)}{share}" if status.total is not None else ""
    pending = "unknown" if status.pending is None else count(status.pending)
    return f"{count(done)}{whole} done, {count(status.failed)} of them failed, {pending} pending"


def _speed(status: Status, live: bool) -> str:
    average = f"{count(status.average_rows_per_second)} rows/s on average"
    if not live:
        return f"{average}, in {duration(status.seconds)}" if status.seconds else ""
    left = "unknown" if status.seconds_left is None else f"about {duration(status.seconds_left)}"
    now = f"{count(status.rows_per_second)} rows/s, {count(status.tokens_per_second)} tokens/s now"
    return f"{now}, {average}; time left {left}"


def _requests(status: Status) -> str:
    if not status.requests:
        return ""
    lost = sum(trouble.attempts for trouble in status.troubles.values())
    without = f", {count(lost)} without an answer ({count(status.refused)} refused)" if lost else ""
    return f"{count(status.requests)} by this run{without}"


def _counts(numbers: dict[str, int]) -> str:
    ordered = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {count(number)}" for name, number in ordered)


def _table(spans: list[Second]) -> list[str]:
    """The last minutes, one line per span."""
    head = ("from (UTC)", "rows/s", "tokens/s", "refused", "failed", "in flight", "cost", "held by")
    rows = [head, *map(_line, spans)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head) - 1)]
    return [
        printable("  " + "  ".join([*(text.rjust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))
        for row in rows
    ]


def _line(span: Second) -> tuple[str, ...]:
    seconds = span.seconds or 1.0
    whole = sum(span.held.values()) or 1.0
    held = sorted(span.held.items(), key=lambda pair: -pair[1])
    return (
        _clock(span.time),
        count(span.rows / seconds),
        count((span.prompt_tokens + span.completion_tokens) / seconds),
        count(span.refused),
        count(span.failed),
        count(round(span.in_flight)),
        money(span.cost_usd),
        ", ".join(f"{what} {100 * part / whole:.0f} %" for what, part in held[:3] if part / whole >= 0.01),
    )


def _clock(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")
