"""What a rehearsal says of a job: time and cost with their bounds, what binds, and what would change it."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from itertools import takewhile
from statistics import linear_regression
from typing import Any, NamedTuple

import msgspec

from batcher import engine
from batcher.dialects import at_home
from batcher.engine import Prepared, Selection
from batcher.errors import JobError
from batcher.job import SIMULATOR, Job, from_document, parse_document
from batcher.records import Request, Row, Totals
from batcher.rehearse.observed import Observed
from batcher.rehearse.rows import Rows, positions, read
from batcher.rehearse.stage import BLOCK, BLOCK_TOKENS, WINDOW, Model, Played, bare, beginnings, play
from batcher.report import count, duration, money, printable
from batcher.simulator import Settings

MOST, LONGEST = 3_000, 7_200.0
"""Rows that one run of a rehearsal asks, and about the seconds that it lasts by its limits: of more, it is a sample,
and the rest goes on as its middle did."""
FEW, SHORT = 400, 600.0
"""The same of a quick one, in which more are asked only where that many go at once."""
_FEWEST = 50
"""Rows of which there are answers enough to go by, though they last for an hour."""
_ROUNDS = 4
"""How often all that go at once must have been answered until it is known how fast rows go."""
SURE = 0.95
"""How often the interval is to hold, as far as the lengths of answers decide."""
MARGIN = 0.03
"""What the interval is wider by on both sides, as a share: chance in times, faults and prompts."""
SPREAD = 0.8
"""The sigma of the lognormal lengths that are taken where only their mean is given."""
_RESAMPLED = 200
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
_IDLE = ("input", "starting", "complete", "publishing", "the last rows")
_SLIGHT = 0.05
"""A share of the time of which nothing is said."""
_COMPARED = 300
"""Rows at most by which the tokens that are estimated and those that are counted are compared."""
_WHOLE = 0.8
"""A cache has at least so much of what it could have: what goes at once at the beginning finds nothing there."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says of the service, before all that was seen of it; times are seconds."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    uncached_tokens_per_minute: int | None = None
    completion_tokens: int | None = None
    """The mean of the answers' lengths, and the sigma of the lognormal that they are of."""
    spread: float = SPREAD
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
    """The rows that it is of: all that are selected, whatever earlier runs have done of them."""
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
    budget_usd: float | None
    """None where the job has no budget."""
    reached: int | None
    """Rows that are done when the budget is reached and the run pauses; None where it suffices."""
    deadline: float | None
    """Seconds until the deadline; None where the job has none."""
    tiers: Mapping[str, float]
    """The share of the rows that each service tier would answer; empty where the job names no tiers."""
    assumed: tuple[str, ...]
    """What was taken for granted."""

    @property
    def bound(self) -> str:
        """What held requests back the most; empty where nothing did."""
        return next((what for what, share in self.binds if share >= _SLIGHT and what not in _IDLE), "")


def rehearse(job: Job, seen: Observed | None, given: Given) -> Forecast:
    """Forecast a job by what was seen of its service and what is said of it. Nothing is sent.

    Raises JobError where too little is known, and whatever would end the run.
    """
    prepared = engine.prepare(job)
    selection = engine.select(prepared, lambda: False)
    assert selection is not None
    if not selection.size:
        raise JobError(f"{job.origin}: no row is selected: there is nothing to rehearse")
    return foretell(prepared, selection, seen, given)


def foretell(
    prepared: Prepared,
    selection: Selection,
    seen: Observed | None,
    given: Given,
    spent: float = 0.0,
    idle: float = math.inf,
    since: float = 0.0,
    quick: bool = False,
) -> Forecast:
    """Forecast these rows of a job, as `rehearse` does.

    Earlier runs have `spent` so many USD, the first one began `since` so many seconds, and they have left the
    account's limits `idle` for so many. A quick forecast looks at fewer rows, and not at what would change it.
    """
    job, rows = prepared.job, selection.size
    assumed: list[str] = []
    model = _model(prepared, seen, given, assumed)
    cast = _cast(prepared, selection, FEW if quick else MOST)
    prompts = _prompts(prepared, cast, seen)
    model = replace(model, ratio=prompts.ratio)
    wanted = _size(job, model, prompts, seen, rows, quick)
    if wanted != len(cast):
        cast = _cast(prepared, selection, wanted)
    size = len(cast)
    model = replace(model, alike=_alike(prepared, cast, prompts, seen, rows))
    measured = seen is not None and bool(seen.completions) and given.completion_tokens is None
    low, high = _bounds(model.completions, rows) if measured else (model.completions,) * 2
    due = _due(job, since)
    # Of a sample, the deadline is as much nearer as it is smaller.
    aim = {} if due is None else {"schedule": {"deadline": max(1.0, due * size / rows)}}
    runs = [
        Outlook.of(play(job, replace(model, completions=lengths), cast, seed, aim), job, model, size, rows, idle)
        for seed, lengths in enumerate((model.completions, low, high))
        if measured or not quick or not seed
    ]
    middle = runs[0]
    if size < rows:
        assumed.append(f"a sample of {count(size)} rows was rehearsed; the others go on as its middle did")
    if not measured and not quick:
        assumed.append("lengths are given, not measured: the interval tells of chance alone")
    elif (
        measured and seen is not None and model.settings.get("capacity") is None and middle.played.peak > 2 * seen.peak
    ):
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
        changes=() if quick else tuple(_changes(job, model, cast, middle, rows, aim)),
        budget_usd=job.schedule.budget_usd,
        reached=_reached(job, middle, rows, spent),
        deadline=due,
        tiers={tier: number / middle.played.tiers.total() for tier, number in middle.played.tiers.items()},
        assumed=tuple(assumed),
    )


def _size(job: Job, model: Model, prompts: "Prompts", seen: Observed | None, rows: int, quick: bool) -> int:
    """How many rows a run asks: enough to see how fast they go, and no more than it takes too long to play."""
    takes = _expected(model, prompts)
    played = (flow / amount for _, amount, flow, level in _flows(job, model, takes) if level <= WINDOW * flow)
    rate = min(played, default=math.inf)
    most = min(MOST, max(1, rate * (SHORT if quick else LONGEST), min(_FEWEST, rate * _SECONDS["hour"])))
    if quick:
        own = job.schedule.max_in_flight
        at_once = own if own != "auto" else seen.peak if seen else 0
        settings = Settings(**model.settings)
        each = settings.latency + takes.uncached * settings.seconds_per_prompt_token
        each += takes.completion * settings.seconds_per_completion_token
        most = min(most, max(FEW, _ROUNDS * min(at_once, rate * each)))
    return min(rows, int(most))


def _cast(prepared: Prepared, selection: Selection, size: int) -> Rows:
    """So many of the selected rows, or all."""
    return Rows(prepared.source, positions(selection, size), prepared.composer.names)


def _due(job: Job, since: float) -> float | None:
    """Seconds until the deadline, where the first run of the output began so many seconds ago."""
    deadline = job.schedule.deadline
    if isinstance(deadline, datetime):
        return (deadline - datetime.now(UTC)).total_seconds()
    return None if deadline is None else deadline - since


def _reached(job: Job, outlook: "Outlook", rows: int, spent: float) -> int | None:
    """Rows that are done when what is left of the budget is less than a request may cost."""
    budget = job.schedule.budget_usd
    if budget is None or not outlook.cost:
        return None
    left = budget - spent - outlook.played.most
    done = int(left / (outlook.cost / rows)) + 1 if left >= 0 else 0
    return done if done < rows else None


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


def has_plan(prepared: Prepared) -> bool:
    """Whether the service has plans with limits, of which the developer's is known: Cerebras, or as it is simulated."""
    way = prepared.access
    local = prepared.job.service.base_url == SIMULATOR
    return way.dialect.name == "cerebras" and (local or at_home(way.dialect, way.url))


def _model(prepared: Prepared, seen: Observed | None, given: Given, assumed: list[str]) -> Model:
    """What the service is taken to be like; notes what nobody has said."""
    job = prepared.job
    settings: dict[str, Any] = dict(_WITHOUT)
    limits = _rates(given)
    if seen is not None:
        limits = _limits(seen, given) | limits
        settings["keeps_reservation"] = any(limit.keeps for limit in seen.limits)
    answers = seen is not None and bool(seen.completions)
    if seen is not None and answers:
        settings |= {
            "latency": seen.pace.latency,
            "seconds_per_prompt_token": seen.pace.prompt_token,
            "seconds_per_completion_token": seen.pace.completion_token,
            "jitter": seen.pace.jitter,
            "faults": seen.faults,
            "capacity": seen.capacity,
        }
        if seen.cached > 0:
            del settings["cache_tokens"]
        if seen.queue_limit is not None:
            settings["queue_limit"] = seen.queue_limit
    if not limits and answers:
        assumed.append("no limit of the service was seen: none is rehearsed")
    elif not limits and has_plan(prepared):
        assumed.append("no limit of the account is known: those of a developer's plan are taken")
        settings = {key: value for key, value in settings.items() if not key.endswith("_per_minute")}
    elif not limits:
        assumed.append("no limit of the service is known: none is rehearsed")
    settings["limits"] = limits
    limited = limits or "requests_per_minute" not in settings
    if limited and "flex" in job.schedule.tiers and not any(":flex:" in name for name in limits):
        assumed.append(f"flex is taken to have {Settings().flex_limits:g} times these limits")
    for key, value in (
        ("latency", given.latency),
        ("seconds_per_completion_token", given.completion_token),
        ("capacity", given.capacity),
    ):
        if value is not None:
            settings[key] = value
    if not answers and given.latency is None and given.completion_token is None:
        known = Settings()
        assumed.append(
            f"no latency is known: an answer takes {known.latency:g} s and "
            f"{1_000 * known.seconds_per_completion_token:g} ms a token"
        )
    if given.completion_tokens is not None:
        draw = random.Random(0)
        mean = given.completion_tokens
        drawn = [draw.lognormvariate(0.0, given.spread) for _ in range(_LENGTHS)]
        completions = [max(1, round(mean * one * _LENGTHS / sum(drawn))) for one in drawn]
    elif seen is not None and answers:
        completions = list(seen.completions)
    else:
        raise JobError(
            f"{job.origin}: how long answers are is not known: --completion-tokens N says it, --pilot N asks N rows, "
            "--from OUT takes an earlier run's"
        )
    return Model(settings, completions, cached=seen.cached if seen else 0.0)


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


class Prompts(NamedTuple):
    """What the job's requests say: the tokens of a prompt as a rehearsal estimates them, and `ratio` of those that are
    counted or expected to that; the cap on answers. `alike` is how much of what begins alike a cache has, None where
    nothing does."""

    tokens: float
    ratio: float
    cap: float
    alike: float | None


def _prompts(prepared: Prepared, cast: Rows, seen: Observed | None) -> Prompts:
    """By rows that were answered, or else by the first of the cast."""
    job = prepared.job
    if seen is not None and seen.input == parse_document(job.document(), job.origin).get("input", {}).get("path"):
        rows = list(read(prepared.source, sorted(seen.prompts)[:_COMPARED], prepared.composer.names))
        made = _requests(job, cast, rows)
        counted = [seen.prompts[request.row] for request in made]
    else:
        rows = cast.first(_COMPARED)
        made = _requests(job, cast, rows)
        whole = (prepared.composer.compose(row) for row in rows)  # with what the answers have to be like
        counted = [(request.prompt_tokens, 0) for request in whole if isinstance(request, Request)]
    estimated = sum(request.prompt_tokens for request in made)
    ratio = (sum(tokens for tokens, _ in counted) / estimated if estimated else 0.0) or 1.0
    had = sum(had for _, had in counted)
    share = had / (_repeated(made, ratio) or math.inf)
    number = max(1, len(made))
    cap = sum(request.output_tokens for request in made) / number
    return Prompts(estimated / number, ratio, cap, (1.0 if share >= _WHOLE else share) or None)


def _alike(prepared: Prepared, cast: Rows, prompts: Prompts, seen: Observed | None, rows: int) -> float | None:
    """How much of what begins alike a cache has; None where so many of the rows that share are not of the cast that
    the share that was seen is nearer."""
    if prompts.alike is None or seen is None or len(cast) == rows:
        return prompts.alike
    made = _requests(prepared.job, cast, cast.first(len(cast)))
    tokens = prompts.ratio * sum(request.prompt_tokens for request in made)
    return prompts.alike if prompts.alike * _repeated(made, prompts.ratio) >= seen.cached * tokens else None


def _requests(job: Job, cast: Rows, rows: Sequence[Row]) -> list[Request]:
    """What is asked for these rows when it is played."""
    composer = engine.prepare(bare(job, job.output.path), table=cast).composer
    return [request for row in rows if isinstance(request := composer.compose(row), Request)]


def _repeated(made: Sequence[Request], ratio: float) -> int:
    """Tokens of requests, in whole blocks, that one before them began with too."""
    known: set[str] = set()
    repeated = 0
    for request in made:
        begins = beginnings(request.body, BLOCK / ratio)
        repeated += BLOCK_TOKENS * sum(1 for _ in takewhile(known.__contains__, begins))
        known.update(begins)
    return repeated


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


class Takes(NamedTuple):
    """What a row takes on average: requests, and of each the tokens of its prompt, those of them that no cache has,
    and those of its answer, as it is and as its cap is."""

    requests: float
    prompt: float
    uncached: float
    completion: float
    cap: float | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a rehearsed run says of all rows."""

    played: Played
    seconds: float
    cost: float | None
    binds: tuple[tuple[str, float], ...]
    """What held requests back, the most first."""

    @classmethod
    def of(cls, played: Played, job: Job, model: Model, size: int, rows: int, idle: float = math.inf) -> "Outlook":
        """What became of `size` rows, gone on with to all of them, where limits had so many seconds to refill."""
        seconds = played.summary.seconds
        if size < rows and job.schedule.deadline is not None and len(job.schedule.tiers) > 1:
            seconds *= rows / size  # as the deadline was nearer: a later tier begins late, so no part is like the whole
        elif size < rows:
            came = sorted(played.answered)
            middle = range(int(_BEGUN * len(came)), int(_ENDING * len(came)))
            each = seconds / size
            if len(middle) > 1:
                # What goes at once comes at once: a line through all of it does not mind where a wave begins.
                each = linear_regression(middle, came[middle.start : middle.stop]).slope
            seconds += (rows - size) * each
        takes = Takes(played.sent / size, played.prompt, played.uncached, played.completion, played.cap)
        held = dict(played.held)
        # A sample may live on what is in full buckets, and a day's are not simulated at all.
        for bucket, amount, flow, level in _flows(job, model, takes):
            least = (rows * amount) / flow - min(idle, level / flow)
            if least > seconds:
                held = {what: share * seconds / least for what, share in held.items()}
                held[bucket] = held.get(bucket, 0.0) + 1 - seconds / least
                seconds = least
        cost = played.summary.totals.cost_usd
        binds = tuple(sorted(held.items(), key=lambda one: -one[1]))
        return cls(played, seconds, None if cost is None else cost * rows / size, binds)

    @property
    def totals(self) -> Totals:
        """Sums over the rehearsed rows."""
        return self.played.summary.totals


def _expected(model: Model, prompts: Prompts) -> Takes:
    """What a row will take about."""
    prompt, answer = prompts.tokens * prompts.ratio, sum(model.completions) / len(model.completions)
    return Takes(1.0, prompt, prompt * (1 - model.cached), answer, prompts.cap or None)


def _flows(job: Job, model: Model, takes: Takes) -> Iterator[tuple[str, float, float, float]]:
    """Of each limit: its name, what a row takes of it, what flows in each second, and what it holds at first."""
    settings = Settings(**model.settings)
    kept = settings.keeps_reservation
    answer = takes.completion if not kept else takes.cap or float(settings.assumed_completion_tokens)
    amounts = {
        "requests": takes.requests,
        "tokens": takes.requests * (takes.prompt + answer),
        "uncached tokens": takes.requests * (takes.uncached + answer),
    }
    asked = job.request.parameters.get("model")
    tiers = {"flex" if tier == "flex" else "default" for tier in job.schedule.tiers or ("default",)}
    limits = [settings.limits_of(asked if isinstance(asked, str) else "", tier) for tier in tiers]
    for bucket in limits[0]:
        if all(bucket in each for each in limits):
            resource, _, window = bucket.replace("-", " ").rpartition(" ")
            limit = sum(each[bucket] for each in limits)
            yield f"{resource} per {window}", amounts[resource], limit / _SECONDS[window], limit
    for resource, amount in amounts.items():
        key = f"{resource.replace(' ', '_')}_per_minute"
        own = getattr(job.schedule, key)
        if own != "auto":
            yield f"schedule.{key}", amount, own / 60 * max(1, len(job.schedule.tiers)), 0.0


def _changes(
    job: Job, model: Model, cast: Rows, middle: Outlook, rows: int, aim: Mapping[str, Mapping[str, object]]
) -> Iterator[Change]:
    """What the one or two settings that could matter would come to, by rehearsing them too; with `aim` as it is."""
    binds = next((what for what, _ in middle.binds if what not in _IDLE), "")

    def changed(what: str, model: Model, more: Mapping[str, Mapping[str, object]] | None = None) -> Change:
        more = {name: {**aim.get(name, {}), **(more or {}).get(name, {})} for name in {*aim, *(more or {})}}
        other = bare(job, job.output.path, more) if more else job
        outlook = Outlook.of(play(job, model, cast, 0, more), other, model, len(cast), rows)
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
    held = [f"{what} {share:.0%}" for what, share in forecast.binds if share >= _SLIGHT and what not in _IDLE]
    lines = [
        ("rows", count(forecast.rows) + (f", {count(forecast.failed)} of them would fail" if forecast.failed else "")),
        ("time", f"{duration(forecast.seconds)}, between {duration(low)} and {duration(high)}"),
        ("cost", cost),
        ("tokens", tokens),
        *([("budget", _paused(forecast))] if forecast.budget_usd is not None else []),
        *([("deadline", kept(forecast))] if forecast.deadline is not None else []),
        *([("tiers", served(forecast))] if len(forecast.tiers) > 1 else []),
        ("at once", f"at most {count(forecast.in_flight)} requests"),
        ("held by", ", ".join(held) or "nothing"),
        *(("with", f"{one.what}: {duration(one.seconds)}, {money(one.cost_usd)}") for one in forecast.changes),
        *(("assumed", text) for text in forecast.assumed),
    ]
    return "\n".join(printable(f"{name:<9}{text}") for name, text in lines)


def served(forecast: Forecast) -> str:
    """Which service tier answers how much."""
    return ", ".join(f"{name} {share:.0%}" for name, share in forecast.tiers.items())


def kept(forecast: Forecast) -> str:
    """Whether the deadline is kept; empty where there is none."""
    if forecast.deadline is None:
        return ""
    if forecast.deadline <= 0:
        return f"{duration(-forecast.deadline)} ago"
    late = forecast.seconds - forecast.deadline
    return f"in {duration(forecast.deadline)}: " + (f"missed by {duration(late)}" if late > 0 else "kept")


def _paused(forecast: Forecast) -> str:
    """How far the budget goes."""
    said = money(forecast.budget_usd)
    if forecast.reached is None:
        return f"{said}; it suffices"
    when = duration(forecast.seconds * forecast.reached / forecast.rows)
    return f"{said}; it is reached after about {count(forecast.reached)} rows and {when}: there the run pauses"
