"""What a job would send, cost and take, found out without sending anything."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from batcher import bits
from batcher.dialects import PRICES_AS_OF
from batcher.engine import (
    LOOKED_AT,
    UNBOUNDED,
    Prepared,
    Selection,
    first_rows,
    not_ours,
    prepare,
    refuse_unserved,
    scored_otherwise,
    select,
    unscored,
)
from batcher.errors import BatcherError, JobError
from batcher.job import SIMULATOR, Job, differences
from batcher.ledger import added_up, done_rows, open_read_only, parts_of, spending_of, timeline_of
from batcher.payload import pack
from batcher.records import PATHS, UNIT, Failure, Kind, Request, Row
from batcher.rehearse import Forecast, Given, Observed, foretell, has_plan, kept, observe, served
from batcher.report import count, duration, money, printable
from batcher.source import FileIdentity, changed

_GUESSED = 500
"""Tokens that an answer is taken to have where none was seen and the job sets no cap."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A job, looked at before it runs. Tokens, cost and time are estimates for the rows that are left."""

    name: str
    url: str
    """Where the first request goes."""
    headers: Mapping[str, str]
    """What goes with the first request; of secrets only where they come from."""
    body: bytes | None
    """The first request's as JSON, before it is packed; None where no row of the sample can become a request."""
    rows: int
    """Selected rows."""
    done: int
    """Of them, rows that an earlier run has done."""
    sampled: int
    unsendable: tuple[tuple[int, str], ...]
    """Rows of the sample that cannot become requests, and why."""
    unscored: tuple[tuple[int, str], ...]
    """Rows of the sample to which no answer could be right, and why; none where nothing is scored."""
    prompt_tokens: int
    learned_cap: bool
    """Whether the cap on answers is learned."""
    output_tokens: int | None
    """The most that the answers can have; None where the job sets no cap."""
    prompt_cost: float | None
    """USD; None where the model's price is not known."""
    output_cost: float | None
    """USD at most; None where price or cap are not known."""
    prices: str
    """Where the prices come from."""
    forecast: Forecast | None
    """The rows that are left, rehearsed; None where nothing is known that would hold them back, or none is left."""
    measured: bool
    """Whether it goes by answers that an earlier run had, so that it tells of cost too."""
    assumed: tuple[str, ...]
    """What it takes for granted."""
    ends: str | None
    """Why a rehearsal of the rows that are left ended early."""
    budget: float | None
    """USD that all runs may spend; None where the job has no budget."""
    spent: float
    """USD that earlier runs have spent."""
    twins: int | None
    """Rows of the sample that share the answer of one before them; None where each row is asked."""
    output: str
    schema: str | None
    """What is to be known of how the schema is sent."""
    refusal: str | None
    """Why the output cannot be gone on with."""


def plan(job: Job) -> Plan:
    """Look at a job. Raises JobError for everything that would keep it from running."""
    prepared = prepare(job)
    selection = select(prepared, lambda: False)
    assert selection is not None
    rows = selection.size
    ended, spent, refusal = _earlier(prepared, selection)
    done = ended.bit_count()
    looked = first_rows(prepared, selection, LOOKED_AT)
    sample = list(_composed(prepared, looked))
    refuse_unserved(prepared, looked)
    without_target = unscored(prepared, looked)
    requests = [request for request in sample if isinstance(request, Request)]
    unsendable = tuple(
        (row.position, made.message) for row, made in zip(looked, sample, strict=True) if isinstance(made, Failure)
    )
    left = (rows - done) * len(requests) / max(1, len(sample))
    prompt = _mean([request.prompt_tokens for request in requests])
    learned = job.request.learned_cap is not None
    output = None if learned else _mean([request.output_tokens for request in requests])
    capped = not learned and all(request.output_tokens for request in requests)
    prompt_cost = _mean([_dearest(prepared, each, each.prompt_tokens, 0) for each in requests])
    output_cost = _mean([_dearest(prepared, each, 0, each.output_tokens) for each in requests])
    models = {request.model for request in requests}
    seen = None if refusal else _seen(job)
    measured = seen is not None and bool(seen.completions)
    forecast, assumed, ends = None, [], None
    if requests and done < rows and (measured or (seen and seen.limits) or _is_bound(prepared)):
        given = Given()
        if not measured:
            guessed = round(output or 0.0) or _GUESSED
            given = Given(completion_tokens=guessed, spread=0.0)
            assumed.append(f"answers of {count(guessed)} tokens" + (", as long as they may be" if capped else ""))
        try:
            pending = Selection(selection.rows & ~ended, rows - done)
            forecast = foretell(prepared, pending, seen, given, spent, _idle(seen), _since(seen), quick=True)
            assumed += forecast.assumed
        except BatcherError as error:
            ends = str(error).splitlines()[0]
    return Plan(
        name=job.name,
        url=("(the embedded simulator)/v1" if job.service.base_url == SIMULATOR else prepared.access.url)
        + (PATHS[requests[0].endpoint] if requests else ""),
        headers=_headers(prepared, requests[0].body if requests else b""),
        body=requests[0].body if requests else None,
        rows=rows,
        done=done,
        sampled=len(sample),
        unsendable=unsendable,
        unscored=without_target,
        prompt_tokens=round(left * (prompt or 0.0)),
        learned_cap=learned,
        output_tokens=round(left * (output or 0.0)) if capped else None,
        prompt_cost=None if prompt_cost is None else left * prompt_cost,
        output_cost=left * output_cost if capped and output_cost is not None else None,
        prices="prices of the job" if models <= job.service.prices.keys() else f"list prices of {PRICES_AS_OF}",
        forecast=forecast,
        measured=measured,
        assumed=tuple(assumed) if forecast else (),
        ends=ends,
        budget=job.schedule.budget_usd,
        spent=spent,
        twins=_twins(requests) if job.schedule.dedupe else None,
        output=str(job.results),
        schema=prepared.schema_note,
        refusal=refusal,
    )


def render(plan: Plan) -> str:
    """The plan as text: the first request to the byte, then the estimates."""
    if plan.body is None:
        request = ["No row of the sample can become a request."]
    else:
        headers = [f"{name}: {value}" for name, value in plan.headers.items()]
        request = [printable(f"POST {plan.url}"), *map(printable, headers), "", plan.body.decode()]
    left = plan.rows - plan.done
    rows = count(plan.rows)
    if plan.done:
        rows += f", {count(plan.done)} of them done by an earlier run; what follows is for the {count(left)} left"
    sample = f"the first {count(plan.sampled)} rows" if plan.sampled < plan.rows else "all rows"
    output = "their cap is learned" if plan.learned_cap else "no cap in the job"
    if plan.output_tokens is not None:
        output = f"at most {count(plan.output_tokens)}"
    if plan.prompt_cost is None:
        cost = money(None)
    elif plan.output_cost is None:
        answers = "the cap of answers is learned" if plan.learned_cap else "the answers have no cap"
        cost = f"{money(plan.prompt_cost)} for the prompts, and {answers}; {plan.prices}"
    else:
        cost = (
            f"at most {money(plan.prompt_cost + plan.output_cost)}: "
            f"{money(plan.prompt_cost)} for the prompts, up to {money(plan.output_cost)} for the answers; {plan.prices}"
        )
    if plan.measured and plan.forecast is not None and plan.forecast.cost_interval is not None:
        low, high = plan.forecast.cost_interval
        cost = f"about {money(plan.forecast.cost_usd)}, between {money(low)} and {money(high)}; {cost}"
    lines = [
        ("rows", rows),
        ("prompts", f"about {count(plan.prompt_tokens)} tokens, estimated from {sample}"),
        ("answers", f"{output} tokens" if plan.output_tokens is not None else output),
        ("cost", cost),
        *([("budget", _reach(plan))] if plan.budget is not None else []),
        ("time", _time(plan)),
        *([("deadline", kept(plan.forecast))] if plan.forecast and plan.forecast.deadline is not None else []),
        *([("tiers", served(plan.forecast))] if plan.forecast and len(plan.forecast.tiers) > 1 else []),
        *(("assumed", text) for text in plan.assumed),
        ("output", plan.output),
    ]
    if plan.unsendable:
        position, why = plan.unsendable[0]
        share = f"{count(len(plan.unsendable))} of {sample} cannot become requests, the first is row {position}: {why}"
        lines.insert(1, ("unsendable", share))
    if plan.unscored:
        position, why = plan.unscored[0]
        share = f"{count(len(plan.unscored))} of {sample} cannot be scored, the first is row {position}: {why}"
        lines.append(("score", share))
    if plan.twins is not None:
        lines.append(("dedupe", f"{count(plan.twins)} of {sample} make the request of a row before them: asked once"))
    if plan.schema:
        lines.append(("schema", plan.schema))
    if plan.refusal:
        lines.append(("refused", plan.refusal))
    return "\n".join([*request, "", *(printable(f"{name:<11}{text}") for name, text in lines)])


def _time(plan: Plan) -> str:
    """How long the rows that are left take, and what holds them back."""
    forecast = plan.forecast
    if plan.ends is not None:
        return f"unknown: rehearsed, the run ends early: {plan.ends}"
    if forecast is None:
        return "unknown until the service has answered" if plan.done < plan.rows else duration(0)
    said = f"about {duration(forecast.seconds)}"
    if plan.measured:
        said += f", between {' and '.join(map(duration, forecast.seconds_interval))}"
    return f"{said}, bound by {forecast.bound}" if forecast.bound else said


def _reach(plan: Plan) -> str:
    """How far the budget goes."""
    assert plan.budget is not None
    said, rest = money(plan.budget), max(0.0, plan.budget - plan.spent)
    if plan.spent:
        said += f", {money(plan.spent)} of it spent by earlier runs"
    if plan.prompt_cost is None or plan.output_cost is None:
        return said
    most, left = plan.prompt_cost + plan.output_cost, plan.rows - plan.done
    if most <= rest:
        return f"{said}; it reaches for all rows"
    reached = count(int(left * rest / most))
    said += f"; it reaches for about {reached} of {count(left)} rows if answers are as long as they may be"
    if plan.measured and plan.forecast is not None:
        foretold = plan.forecast.reached
        said += f", for {'all' if foretold is None else f'about {count(foretold)}'} if they are as before"
    return said


def _twins(requests: Sequence[Request]) -> int:
    """How many requests are the same as one before them, and are meant to have the same answer."""
    hashes = [request.hash for request in requests if request.repeatable]
    return len(hashes) - len(set(hashes))


def _composed(prepared: Prepared, rows: Sequence[Row]) -> Iterator[Request | Failure]:
    """What becomes of the rows; only the first request keeps its body, for with images these are large."""
    first = True
    for row in rows:
        made = prepared.composer.compose(row)
        if prepared.job.schedule.budget_usd is not None and isinstance(made, Request) and prepared.most(made) is None:
            made = Failure(Kind.UNSENDABLE, UNBOUNDED)
        if isinstance(made, Request):
            yield made if first else msgspec.structs.replace(made, body=b"")
            first = False
        else:
            yield made


def _headers(prepared: Prepared, body: bytes) -> dict[str, str]:
    """The headers of a request, with every secret replaced by the name of its variable."""
    shown = dict(prepared.access.headers)
    service = prepared.job.service
    with suppress(ValueError, OverflowError):  # a number that msgpack cannot hold: its row's failure, not the plan's
        if body and pack(body, service.encoding, service.compression)[1]:
            shown["Content-Encoding"] = "gzip"
    for name in prepared.access.extra:
        shown[name] = f"(from ${prepared.job.service.headers_env})"
    if prepared.access.key_env is not None:
        shown["Authorization"] = f"Bearer ${prepared.access.key_env}"
    return shown


def _earlier(prepared: Prepared, selection: Selection) -> tuple[int, float, str | None]:
    """Which of the selected rows earlier runs have done, what they spent, and why it cannot be gone on with."""
    job = prepared.job
    refusal = not_ours(job)
    if refusal or not job.ledger_path.exists():
        return 0, 0.0, refusal
    with open_read_only(job.ledger_path) as ledger:
        size = job.output.rows_per_part
        done = 0
        parts = dict(parts_of(ledger, UNIT))
        for part, record in parts.items():
            start, stop = part * size, (part + 1) * size
            ended = record.done(start) | bits.of(done_rows(ledger, UNIT, start, stop), start)
            done |= (ended & selection.part(start, stop)) << start
        known = dict(ledger.execute("SELECT key, value FROM meta"))
        counted = spending_of(ledger)
        spent = counted.usd if counted else added_up(0, list(timeline_of(ledger))).cost_usd or 0.0
    begun = msgspec.json.decode(known.get("meaning", b"{}"))
    meaning = msgspec.json.decode(msgspec.json.encode(job.meaning()))
    if begun and (different := list(differences(begun, meaning))):
        return done, spent, f"{job.results} was begun with another job: {'; '.join(different)}"
    if begun and (scored := scored_otherwise(job, known.get("scoring"), parts.values())):
        return done, spent, scored
    files = msgspec.json.decode(known.get("input", b"[]"), type=list[FileIdentity])
    if difference := changed(files, prepared.source.identities):
        return done, spent, f"the input has changed since the run began: {difference}"
    return done, spent, None


def _seen(job: Job) -> Observed | None:
    """What earlier runs into the job's output saw of the service; None where there was none."""
    if not job.ledger_path.exists():
        return None
    try:
        return observe(str(job.results.folder or job.results), least=0)
    except JobError:
        return None  # what is damaged, a run says


def _idle(seen: Observed | None) -> float:
    """Seconds since the last run ended, in which its limits have refilled."""
    return math.inf if seen is None or seen.noted_at is None else max(0.0, time.time() - seen.noted_at)


def _since(seen: Observed | None) -> float:
    """Seconds since the first run began, from which a deadline may count."""
    return 0.0 if seen is None else time.time() - seen.begun_at


def _is_bound(prepared: Prepared) -> bool:
    """Whether something is known that holds requests back, though none was answered."""
    own = prepared.job.schedule
    rates = (own.max_in_flight, own.requests_per_minute, own.tokens_per_minute, own.uncached_tokens_per_minute)
    return has_plan(prepared) or any(rate != "auto" for rate in rates)


def _dearest(prepared: Prepared, request: Request, prompt: int, completion: int) -> float | None:
    """The price of so many tokens in the dearest tier that a request may go to."""
    tiers = prepared.job.schedule.tiers or (request.tier,)
    prices = [prepared.price(request.model, prompt, 0, completion, tier) for tier in tiers]
    return None if None in prices else max(price for price in prices if price is not None)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is not known, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
