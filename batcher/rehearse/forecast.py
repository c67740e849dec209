"""What a rehearsal says of a job: time and cost with their bounds, what binds, and what would change it."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec

from batcher import bits, engine
from batcher.errors import JobError
from batcher.job import Job, from_document, parse_document
from batcher.records import Request, Totals
from batcher.rehearse.observed import Observed
from batcher.rehearse.stage import Model, Played, bare, play
from batcher.report import count, duration, money, printable
from batcher.simulator import Settings

MOST = 3_000
"""Rows that one run of a rehearsal asks; of more, it is a sample, and the rest goes on as its middle did."""
SURE = 0.95
"""How often the interval is to hold, as far as the lengths of answers decide."""
MARGIN = 0.03
"""What the interval is wider by on both sides, as a share: chance in times, faults and prompts."""
SPREAD = 0.8
"""The sigma of the lognormal lengths that are taken where only their mean is given."""
_RESAMPLED = 400
_LENGTHS = 1_000
_BEGUN, _ENDING = 0.3, 0.9
"""The shares of all answers between which a run goes on as it would for longer."""
_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3_600.0, "day": 86_400.0}
_WINDOWS = {seconds: name for name, seconds in _SECONDS.items()}
_RATES = {
    "requests per minute": "requests_per_minute",
    "uncached tokens per minute": "uncached_tokens_per_minute",
    "tokens per minute": "tokens_per_minute",
}
_WITHOUT: Mapping[str, Any] = {
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute", "uncached_tokens_per_minute")),
    "cache_tokens": 0,
    "hang": 1e6,
}
_IDLE = ("starting", "complete", "publishing", "the last rows")
_COMPARED = 300
"""Rows at most by which the tokens that are estimated and those that are counted are compared."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says of the service, before all that was seen of it; times are seconds."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    uncached_tokens_per_minute: int | None = None
    completion_tokens: int | None = None
    """The mean of the answers' lengths."""
    latency: float | None = None
    """Of an answer, before its tokens; and for each of them."""
    completion_token: float | None = None
    capacity: int | None = None


class Change(msgspec.Struct, frozen=True):
    """What another setting would come to."""

    what: str
    seconds: float
    cost_usd: float | None


class Forecast(msgspec.Struct, frozen=True):
    """What a job would take: times in seconds, costs in USD, None where no price is known. Intervals are of 95 %."""

    name: str
    rows: int
    """Selected rows, whatever earlier runs have done of them."""
    rehearsed: int
    """Rows that each run of the rehearsal asked."""
    seconds: float
    seconds_interval: tuple[float, float]
    cost_usd: float | None
    cost_interval: tuple[float, float] | None
    prompt_tokens: int
    completion_tokens: int
    failed: int
    """Rows that would fail for good."""
    in_flight: int
    """Requests at once, at most."""
    binds: tuple[tuple[str, float], ...]
    """What held requests back, and for which share of the time; the most first."""
    changes: tuple[Change, ...]
    assumed: tuple[str, ...]
    """What was taken for granted."""


def rehearse(job: Job, seen: Observed | None, given: Given) -> Forecast:
    """Forecast a job by what was seen of its service and what is said of it. Nothing is sent.

    Raises JobError where too little is known, and whatever would end the run.
    """
    assumed: list[str] = []
    prepared = engine.prepare(job)
    selection = engine.select(prepared, lambda: False)
    assert selection is not None
    rows = selection.size
    if not rows:
        raise JobError(f"{job.origin}: no row is selected: there is nothing to rehearse")
    model = _model(job, prepared.access.dialect.name, seen, given, assumed)
    size = min(rows, MOST)
    sampled = 0 if size == rows else size
    low, high = (
        _bounds(model.completions, rows) if seen and given.completion_tokens is None else (model.completions,) * 2
    )
    runs = [
        Outlook.of(play(job, replace(model, completions=lengths), sampled, seed), job, model, size, rows)
        for seed, lengths in enumerate((model.completions, low, high))
    ]
    middle = runs[0]
    if size < rows:
        assumed.append(f"a sample of {count(size)} rows was rehearsed; the others go on as its middle did")
    if seen is None or given.completion_tokens is not None:
        assumed.append("lengths are given, not measured: the interval tells of chance alone")
    elif model.settings.get("capacity") is None and middle.played.peak > 2 * seen.peak:
        assumed.append(
            f"no more than {count(seen.peak)} requests at once were seen, none queued; here up to "
            f"{count(middle.played.peak)} go at once"
        )
    return Forecast(
        name=job.name,
        rows=rows,
        rehearsed=size,
        seconds=middle.seconds,
        seconds_interval=_around([run.seconds for run in runs]),
        cost_usd=middle.cost,
        cost_interval=None if middle.cost is None else _around([run.cost or 0.0 for run in runs]),
        prompt_tokens=round(middle.totals.billed_prompt_tokens * rows / size),
        completion_tokens=round(middle.totals.billed_completion_tokens * rows / size),
        failed=round(middle.totals.failed * rows / size),
        in_flight=middle.played.peak,
        binds=middle.binds,
        changes=tuple(_changes(job, model, middle, size, rows)),
        assumed=tuple(assumed),
    )


def piloted(job: Job, rows: int) -> Job:
    """The job over so many of its rows, drawn by the input's own numbers, into an output beside the job's."""
    document = parse_document(job.document(), job.origin)
    document.setdefault("input", {}).pop("limit", None)
    document["input"]["sample"] = rows
    output = document["output"]
    for key in ("path", "ledger"):
        if key in output:
            output[key] = f"{str(output[key]).rstrip('/')}.pilot-{rows}"
    document["name"] = f"{job.name}: pilot"
    return from_document(document, job.folder, job.origin, job.texts)


# The model


def _model(job: Job, dialect: str, seen: Observed | None, given: Given, assumed: list[str]) -> Model:
    """What the service is taken to be like; notes what nobody has said."""
    settings: dict[str, Any] = dict(_WITHOUT)
    if seen is not None:
        settings |= {
            "latency": seen.pace.latency,
            "seconds_per_prompt_token": seen.pace.prompt_token,
            "seconds_per_completion_token": seen.pace.completion_token,
            "jitter": seen.pace.jitter,
            "faults": seen.faults,
            "capacity": seen.capacity,
            "limits": _limits(seen, given),
            "keeps_reservation": any(limit.keeps for limit in seen.limits),
        }
        if seen.cached > 0:
            del settings["cache_tokens"]
        if seen.queue_limit is not None:
            settings["queue_limit"] = seen.queue_limit
        if not settings["limits"] and not _rates(given):
            assumed.append("no limit of the service was seen: none is rehearsed")
    elif not _rates(given) and dialect == "cerebras":
        assumed.append("no limit is given: those of a developer's plan are taken")
        settings = {key: value for key, value in settings.items() if not key.endswith("_per_minute")}
    elif not _rates(given):
        assumed.append("no limit is given: none is rehearsed")
    settings["limits"] = {**settings.get("limits", {}), **_rates(given)}
    for key, value in (
        ("latency", given.latency),
        ("seconds_per_completion_token", given.completion_token),
        ("capacity", given.capacity),
    ):
        if value is not None:
            settings[key] = value
    if seen is None and given.latency is None and given.completion_token is None:
        assumed.append("no latency is given: the simulator's own is taken")
    if given.completion_tokens is not None:
        draw = random.Random(0)
        mean = given.completion_tokens
        drawn = [draw.lognormvariate(0.0, SPREAD) for _ in range(_LENGTHS)]
        completions = [max(1, round(mean * one * _LENGTHS / sum(drawn))) for one in drawn]
    elif seen is not None:
        completions = list(seen.completions)
    else:
        raise JobError(
            f"{job.origin}: how long answers are is not known: --completion-tokens N says it, --pilot N asks N rows, "
            "--from OUT takes an earlier run's"
        )
    if seen is None:
        return Model(settings, completions)
    return Model(settings, completions, _ratio(job, seen), seen.cached)


def _rates(given: Given) -> dict[str, int]:
    """The limits that are said, by the names of their buckets."""
    return {
        f"{field.name.removesuffix('_per_minute').replace('_', '-')}-minute": value
        for field in fields(given)
        if field.name.endswith("_per_minute") and (value := getattr(given, field.name)) is not None
    }


def _limits(seen: Observed, given: Given) -> dict[str, int]:
    """The limits that were seen, but for those that are said otherwise."""
    limits = {}
    for limit in seen.limits:
        bucket = f"{limit.resource.replace('_', '-')}-{_WINDOWS.get(limit.window, '')}"
        if limit.window in _WINDOWS and limit.limit >= 1 and bucket not in _rates(given):
            tier = "flex" if limit.tier == "flex" else "default"
            limits[f"{limit.model}:{tier}:{bucket}"] = round(limit.limit)
    return limits


def _ratio(job: Job, seen: Observed) -> float:
    """Prompt tokens as counted for each that is estimated, over rows of which both are known; else 1."""
    if seen.input != parse_document(job.document(), job.origin).get("input", {}).get("path"):
        return 1.0
    prepared = engine.prepare(bare(job, 0, job.output.path))
    chosen = sorted(seen.prompts)[:_COMPARED]
    taken = engine.first_rows(prepared, engine.Selection(bits.of(chosen), len(chosen)), len(chosen))
    made = [request for row in taken if isinstance(request := prepared.composer.compose(row), Request)]
    estimated = sum(request.prompt_tokens for request in made)
    return sum(seen.prompts[request.row] for request in made) / estimated if estimated else 1.0


def _bounds(completions: Sequence[int], rows: int) -> tuple[list[int], list[int]]:
    """Lengths as short and as long as they are in SURE of all cases, going by those that were seen.

    The rows of the job are a draw as well, so that few of them vary by more than many.
    """
    draw, known = random.Random(1), len(completions)
    size = max(2, round(known * rows / (known + rows)))
    drawn = sorted((draw.choices(completions, k=size) for _ in range(_RESAMPLED)), key=sum)
    out = round(_RESAMPLED * (1 - SURE) / 2)
    return drawn[out], drawn[-out - 1]


def _around(values: list[float]) -> tuple[float, float]:
    return min(values) * (1 - MARGIN), max(values) * (1 + MARGIN)


# What a run comes to


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a rehearsed run says of all rows."""

    played: Played
    seconds: float
    cost: float | None

    @classmethod
    def of(cls, played: Played, job: Job, model: Model, size: int, rows: int) -> "Outlook":
        """What became of `size` rows, gone on with to all of them."""
        seconds = played.summary.seconds
        flows = list(_flows(played, job, model, size))
        if size < rows:
            came = sorted(played.answered)
            first, last = (came[int(share * (len(came) - 1))] for share in (_BEGUN, _ENDING))
            rate = (_ENDING - _BEGUN) * size / max(1e-3, last - first)
            seconds += (rows - size) / rate
        # A sample may live on what is in full buckets, and a day's are not simulated at all.
        seconds = max([seconds, *((rows * amount - level) / flow for amount, flow, level in flows)])
        cost = played.summary.totals.cost_usd
        return cls(played, seconds, None if cost is None else cost * rows / size)

    @property
    def totals(self) -> Totals:
        """Sums over the rehearsed rows."""
        return self.played.summary.totals

    @property
    def binds(self) -> tuple[tuple[str, float], ...]:
        """What held requests back, the most first."""
        return tuple(sorted(self.played.held.items(), key=lambda one: -one[1]))


def _flows(played: Played, job: Job, model: Model, size: int) -> Iterator[tuple[float, float, float]]:
    """Of each limit: what a row takes of it, what flows in each second, and what it holds at first."""
    settings = Settings(**model.settings)
    kept = settings.keeps_reservation
    answer = played.completion if not kept else played.cap or float(settings.assumed_completion_tokens)
    each = played.sent / size
    amounts = {
        "requests": each,
        "tokens": each * (played.prompt + answer),
        "uncached-tokens": each * (played.uncached + answer),
    }
    asked = job.request.parameters.get("model")
    tier = "flex" if job.schedule.service_tier == "flex" else "default"
    for bucket, limit in settings.limits_of(asked if isinstance(asked, str) else "", tier).items():
        resource, _, window = bucket.rpartition("-")
        yield amounts[resource], limit / _SECONDS[window], limit
    for key, amount in (
        ("requests", each),
        ("tokens", amounts["tokens"]),
        ("uncached_tokens", amounts["uncached-tokens"]),
    ):
        own = getattr(job.schedule, f"{key}_per_minute")
        if own != "auto":
            yield amount, own / 60, 0.0


def _changes(job: Job, model: Model, middle: Outlook, size: int, rows: int) -> Iterator[Change]:
    """What the one or two settings that could matter would come to, by rehearsing them too."""
    binds = next((what for what, _ in middle.binds if what not in _IDLE), "")
    sampled = 0 if size == rows else size

    def changed(what: str, model: Model, more: Mapping[str, Mapping[str, object]] | None = None) -> Change:
        other = bare(job, 0, job.output.path, more) if more else job
        outlook = Outlook.of(play(job, model, sampled, 0, more=more), other, model, size, rows)
        return Change(what, outlook.seconds, outlook.cost)

    rate = next((name for word, name in _RATES.items() if binds.startswith(word)), None)
    if rate is not None:
        bucket = f"{rate.removesuffix('_per_minute').replace('_', '-')}-minute"
        twice = {key: value * 2 for key, value in model.settings["limits"].items() if key.endswith(bucket)}
        if twice:
            limits = {**model.settings["limits"], **twice}
            yield changed(f"twice the {binds}", replace(model, settings={**model.settings, "limits": limits}))
    elif binds.startswith("schedule.") and binds.endswith(("per_minute", "max_in_flight")):
        key = binds.removeprefix("schedule.")
        own = getattr(job.schedule, key)
        yield changed(f"{key} = {2 * own}", model, {"schedule": {key: 2 * own}})
    elif binds == "capacity" and model.settings.get("capacity"):
        twice = {**model.settings, "capacity": 2 * model.settings["capacity"]}
        yield changed("twice the capacity of the service", replace(model, settings=twice))
    cap, longest = middle.played.cap, max(model.completions)
    key = "max_completion_tokens" if job.request.endpoint == "chat" else "max_tokens"
    if (
        "tokens" in binds
        and cap is not None
        and isinstance(job.request.parameters.get(key), int)
        and cap > 1.25 * longest
    ):
        smaller = round(1.1 * longest)
        yield changed(f"{key} = {smaller}", model, {"request": {key: smaller}})


def render(forecast: Forecast) -> str:
    """The forecast as text."""
    low, high = forecast.seconds_interval
    cost = money(forecast.cost_usd)
    if forecast.cost_interval is not None:
        cost += f", between {' and '.join(map(money, forecast.cost_interval))}"
    tokens = f"{count(forecast.prompt_tokens)} of prompts, {count(forecast.completion_tokens)} of answers"
    held = [f"{what} {share:.0%}" for what, share in forecast.binds if share >= 0.05 and what not in _IDLE]
    lines = [
        ("rows", count(forecast.rows) + (f", {count(forecast.failed)} of them would fail" if forecast.failed else "")),
        ("time", f"{duration(forecast.seconds)}, between {duration(low)} and {duration(high)}"),
        ("cost", cost),
        ("tokens", tokens),
        ("at once", f"at most {count(forecast.in_flight)} requests"),
        ("held by", ", ".join(held) or "nothing"),
        *(("with", f"{one.what}: {duration(one.seconds)}, {money(one.cost_usd)}") for one in forecast.changes),
        *(("assumed", text) for text in forecast.assumed),
    ]
    return "\n".join(printable(f"{name:<9}{text}") for name, text in lines)
