"""What an output tells of its service: how long answers are and take, what is allowed, what fails."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batcher.dialects import openai
from batcher.errors import JobError
from batcher.job import parse_document
from batcher.ledger import latest_attempts, note_of, open_read_only
from batcher.records import UNIT, Answer, Attempt, Kind, KnownLimit, Reply, ServiceTimes, Timing, Usage
from batcher.store import results_at

LEAST = 20
"""Answers of which something can be said."""
MOST, PARTS = 5_000, 8
"""Attempts that are looked at, and published parts that they are taken from."""
QUEUED = 0.01
"""Seconds that a request has queued at least where the service was full."""
_COLUMNS = (
    *("row", "sent_at", "status", "kind", "latency", "queue_time"),
    *("prompt_tokens", "cached_tokens", "completion_tokens"),
)
_FAULTS = {
    Kind.SERVER_ERROR: "500",
    Kind.UNAVAILABLE: "503",
    Kind.REQUEST_TIMEOUT: "408",
    Kind.CONFLICT: "409",
    Kind.DISCONNECTED: "reset",
    Kind.STALE_CONNECTION: "reset",
    Kind.TIMEOUT: "hang",
    Kind.MALFORMED_RESPONSE: "malformed",
    Kind.NOT_JSON: "html",
    Kind.INVALID_OUTPUT: "malformed",
    Kind.REJECTED: "400",
}
"""The simulator's fault that costs a run what failures of a kind do."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long an answer takes besides waiting: seconds at least, per token, and the share it varies by at most."""

    latency: float
    prompt_token: float
    completion_token: float
    jitter: float


@dataclass(frozen=True, slots=True)
class Observed:
    """What the attempts of an output say of the service."""

    prompts: dict[int, tuple[int, int]]
    """Tokens of each answered row's prompt, as the service counted them, and how many of them a cache had."""
    completions: tuple[int, ...]
    """Tokens of each answer; none where there are too few to go by, and then only limits are known."""
    cached: float
    """The share of the prompts' tokens that a cache had."""
    pace: Pace
    faults: dict[str, float]
    """The simulator's faults, and the share of the admitted requests that met each."""
    capacity: int | None
    """Requests that were served at once while others queued; None where nobody did."""
    queue_limit: float | None
    """Seconds that requests queued at most before others were refused for it; None where none was."""
    peak: int
    """Requests that were in flight at once."""
    limits: tuple[KnownLimit, ...]
    begun_at: float
    """When its first run began, in seconds of UTC."""
    noted_at: int | None
    """When its last run last said something."""
    input: object
    """The input of that job, as it names it."""


def observe(output: str, least: int = LEAST) -> Observed:
    """Read an output's attempts, published or not, and what its last run has noted. Raises JobError and StorageError.

    Of many attempts it takes some from each of a few parts. With fewer answers than `least` it raises; of fewer than
    LEAST nothing is said but what limits are known.
    """
    results = results_at(output)
    told = results.read("job.toml")
    if told is None:
        raise JobError(f"{output}: no output of a run: it has no job.toml")
    job = parse_document(told, f"{output}/job.toml")
    ledger = Path(job["output"].get("ledger") or f"{output}/ledger.sqlite")
    with open_read_only(ledger) as db:
        note, held = note_of(db), latest_attempts(db, UNIT, MOST // 2)
        ((begun,),) = db.execute("SELECT value FROM meta WHERE key = 'begun'")
    attempts = [_told(one) for one in held if one.attempt]
    parts = sorted(name for name in results.parts() if name.startswith("attempts/"))
    number = min(PARTS, len(parts))
    for name in (parts[-1 - at * len(parts) // number] for at in range(number)):
        with results.local(name) as path:
            try:
                table = pq.read_table(path, columns=list(_COLUMNS))
            except (OSError, pa.ArrowException) as error:
                raise JobError(f"{output}/{name} cannot be read: {str(error).splitlines()[0]}") from None
        table = table.take(pc.sort_indices(table, [("sent_at", "ascending")]))
        some = table.slice(max(0, len(table) - (MOST - len(held)) // number))
        attempts += [{**one, "sent_at": one["sent_at"].timestamp()} for one in some.to_pylist()]
    answers = [one for one in attempts if one["kind"] is None and one["completion_tokens"] is not None]
    if len(answers) < least:
        raise JobError(f"{output}: {len(answers)} answers with their usage are too few to rehearse by; {LEAST}, please")
    if len(answers) < LEAST:
        answers = attempts = []
    prompts = [one["prompt_tokens"] or 0 for one in answers]
    cached = [one["cached_tokens"] or 0 for one in answers]
    spans = [
        (read - had, one["completion_tokens"], one["latency"] - (one["queue_time"] or 0.0))
        for read, had, one in zip(prompts, cached, answers, strict=True)
    ]
    return Observed(
        prompts={one["row"]: (tokens, had) for one, tokens, had in zip(answers, prompts, cached, strict=True)},
        completions=tuple(one["completion_tokens"] for one in answers),
        cached=sum(cached) / max(1, sum(prompts)),
        pace=paced(spans),
        faults=_faults(attempts, len(answers)),
        capacity=_capacity(answers),
        queue_limit=_queue_limit(attempts),
        peak=_together(attempts),
        limits=note.limits if note else (),
        begun_at=datetime.fromisoformat(begun.decode()).timestamp(),
        noted_at=note.time if note else None,
        input=job.get("input", {}).get("path"),
    )


def _told(attempt: Attempt) -> dict[str, Any]:
    """An attempt that the ledger still holds, as the columns that a published one has."""
    answer = None
    if attempt.body is not None and attempt.status == 200:
        answer = openai.read(Reply(200, {}, attempt.body, Timing(0, 0.0)))
    usage, times = (answer.usage, answer.times) if isinstance(answer, Answer) else (Usage(), ServiceTimes())
    return {
        "row": attempt.row,
        "sent_at": attempt.sent_at / 1e6,
        "status": attempt.status,
        "kind": attempt.kind,
        "latency": attempt.latency,
        "queue_time": times.queue_time,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def paced(spans: Sequence[tuple[float, float, float]]) -> Pace:
    """The pace that explains best what (uncached prompt tokens, completion tokens, seconds) say: nothing is below 0.

    Errors count by their share of the seconds, as an answer that takes longer also varies by more.
    """
    best, error = (0.0, 0.0, 0.0), math.inf
    lines = [(1 / took, prompt / took, said / took) for prompt, said, took in spans if took > 0]
    if not lines:
        return Pace(*best, jitter=0.0)
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            found = _least_squares([[line[at] for at in chosen] for line in lines])
            if found is None or min(found) < 0:
                continue
            weights = [0.0, 0.0, 0.0]
            for at, value in zip(chosen, found, strict=True):
                weights[at] = value
            wrong = sum((sum(map(_times, weights, line)) - 1) ** 2 for line in lines)
            if wrong < error * (1 - 1e-9):
                best, error = (weights[0], weights[1], weights[2]), wrong
    spread = math.sqrt(error / len(lines))
    return Pace(*best, jitter=min(1.0, math.sqrt(3) * spread))  # what is even between -j and j has this deviation


def _times(one: float, other: float) -> float:
    return one * other


def _least_squares(lines: Sequence[Sequence[float]]) -> list[float] | None:
    """The weights by which each line adds up to 1 as nearly as may be; None where the lines do not decide."""
    size = len(lines[0]) if lines else 0
    matrix = [
        [*(sum(line[i] * line[j] for line in lines) for j in range(size)), sum(line[i] for line in lines)]
        for i in range(size)
    ]
    for at in range(size):
        pivot = max(range(at, size), key=lambda row: abs(matrix[row][at]))
        matrix[at], matrix[pivot] = matrix[pivot], matrix[at]
        if abs(matrix[at][at]) < 1e-12:
            return None
        for row in range(size):
            if row != at:
                share = matrix[row][at] / matrix[at][at]
                matrix[row] = [one - share * other for one, other in zip(matrix[row], matrix[at], strict=True)]
    return [matrix[at][size] / matrix[at][at] for at in range(size)]


def _faults(attempts: Sequence[dict[str, Any]], answers: int) -> dict[str, float]:
    """Refusals for want of quota or room are none: limits and capacity say them."""
    counted = Counter(_FAULTS[kind] for one in attempts if (kind := one["kind"]) in _FAULTS)
    return {fault: number / (answers + counted.total()) for fault, number in counted.items()}


def _capacity(answers: Sequence[dict[str, Any]]) -> int | None:
    """How many were served at once for most of the time in which others queued: what sockets add blurs the edges."""
    changes: list[tuple[float, int, int]] = []
    queued = 0
    for one in answers:
        sent, waited = one["sent_at"], one["queue_time"] or 0.0
        if waited > QUEUED:
            changes += [(sent, 0, 1), (sent + waited, 1, -1)]
            queued += 1
        else:
            changes.append((sent, 1, 0))
        changes.append((sent + one["latency"], -1, 0))
    if queued < LEAST / 4:
        return None
    changes.sort()
    serving = waiting = 0
    times: Counter[int] = Counter()
    for (at, served, began), (then, _, _) in pairwise(changes):
        serving, waiting = serving + served, waiting + began
        if waiting:
            times[serving] += round((then - at) * 1e6)
    return max(1, max(times, key=times.__getitem__, default=1))


def _queue_limit(attempts: Sequence[dict[str, Any]]) -> float | None:
    if not any(one["kind"] == Kind.OVERLOADED for one in attempts):
        return None
    return max((one["queue_time"] or 0.0 for one in attempts), default=0.0)


def _together(attempts: Sequence[dict[str, Any]]) -> int:
    """How many were under way at once."""
    changes = [(one["sent_at"], 1) for one in attempts]
    changes += [(one["sent_at"] + one["latency"], -1) for one in attempts]
    return max(accumulate(step for _, step in sorted(changes)), default=0)
