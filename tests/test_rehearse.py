"""A rehearsal tells what a run would take: nothing is sent, nothing of the job's output is touched, and it is near."""

import asyncio
import json
import math
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher import bits, dialects, engine, rehearse
from batcher.cli import main
from batcher.errors import JobError, PausedError
from batcher.plan import plan, render
from batcher.records import Summary
from batcher.rehearse.forecast import Outlook
from batcher.rehearse.observed import paced
from batcher.rehearse.rows import Rows, positions
from batcher.rehearse.stage import Model, play
from batcher.simulator import Front, ModelTransport, NothingLeftError, Recorded, Settings, VirtualLoop, running
from batcher.status import status

KEY = "csk-rehearse-0000000000"
NOTHING: Mapping[str, Any] = {
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute", "uncached_tokens_per_minute")),
    "cache_tokens": 0,
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REHEARSE_KEY", KEY)


class Drawn(Recorded):
    """Answers whose length hangs on the row."""

    def __init__(self) -> None:
        super().__init__({})

    def find(self, prompt: str) -> tuple[str, ...]:
        """The answer to a row's prompt."""
        return ("yes " * random.Random(int(prompt[:6])).randint(20, 60),)


def made(folder: Path, rows: int, url: str = "https://simulated.invalid/v1", **sections: Mapping[str, object]) -> Path:
    """A job file over so many rows."""
    lines = [{"text": f"{row:06d}".ljust(200 + row % 300, ".")} for row in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    document: dict[str, Any] = {
        "name": "rehearsed",
        "input": {"path": "rows.jsonl"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 100},
        "service": {"base_url": url, "api_key_env": "REHEARSE_KEY", "dialect": "cerebras"},
        "output": {"path": "out", "keep": []},
    }
    for section, values in sections.items():
        document[section] = {**document.get(section, {}), **values}
    path = folder / "job.toml"
    path.write_bytes(msgspec.toml.encode(document))
    return path


def run(job: batcher.Job, settings: Settings, until: float = math.inf) -> Summary:
    """The real engine in virtual time; after `until` seconds it breaks off where it is."""

    async def live() -> Summary:
        front = Front(settings, asyncio.get_running_loop().time, 1_790_000_000.0, record=False)
        transport = ModelTransport(front, f"Bearer {KEY}", 60.0, dialects.named("cerebras").refusal)
        return await engine.run(job, transport=transport)

    random.seed(7)  # the jitter of waits
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(until=until, work=lambda: 0.002)) as runner:
        return runner.run(live())


def drawn(job: batcher.Job, size: int) -> Rows:
    """So many of the job's rows."""
    prepared = engine.prepare(job)
    selection = engine.select(prepared, lambda: False)
    assert selection is not None
    return Rows(prepared.source, positions(selection, size), prepared.composer.names)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code and what was said."""
    with pytest.raises(SystemExit) as ended:
        main(["rehearse", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_by_flags_it_tells_what_the_limits_leave_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 rows at 60 a minute, of which 60 may go at once: 40 seconds; twice the limit is rehearsed too."""
    path = made(tmp_path, 100)
    before = sorted(tmp_path.iterdir())
    flags = ("--requests-per-minute", "60", "--completion-tokens", "30", "--json")
    code, out, _ = told(capsys, str(path), *flags)
    forecast = msgspec.json.decode(out, type=rehearse.Forecast)
    assert code == 0
    assert (forecast.rows, forecast.rehearsed, forecast.failed) == (100, 100, 0)
    assert forecast.seconds == pytest.approx(40, abs=3)
    assert forecast.seconds_interval[0] < forecast.seconds < forecast.seconds_interval[1]
    assert forecast.cost_usd == pytest.approx(
        (0.35 * forecast.prompt_tokens + 0.75 * forecast.completion_tokens) / 1e6, rel=1e-3
    )
    assert forecast.completion_tokens == pytest.approx(100 * 30, rel=0.3)
    assert max(dict(forecast.binds), key=dict(forecast.binds).__getitem__) == "requests per minute"
    [twice] = forecast.changes
    assert twice.what == "twice the requests per minute"
    assert twice.seconds == pytest.approx(2, abs=2)
    assert sorted(tmp_path.iterdir()) == before


def test_a_pilot_goes_beside_the_output_and_says_what_an_earlier_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So many rows are asked and no more; asked for again, or named with --from, they are not asked again."""
    settings = Settings(**{**NOTHING, "requests_per_minute": 30}, answers=Drawn())
    with running(settings, record=True) as service:
        path = made(tmp_path, 40, service.url)
        code, out, err = told(capsys, str(path), "--pilot", "20", "--json")
        assert code == 0
        assert "the pilot's answers are in" in err
        assert len(service.book) == 20
        assert not (tmp_path / "out").exists()
        pilot = tmp_path / "out.pilot-20"
        assert batcher.load(path).results.read("summary.json") is None
        assert batcher.load(path, ["output.path=out.pilot-20"]).results.read("summary.json") is not None
        again, same, _ = told(capsys, str(path), "--from", str(pilot), "--json")
        assert (again, json.loads(same)) == (0, json.loads(out))
        batcher.run(rehearse.piloted(batcher.load(path), 20))
        assert len(service.book) == 20
    assert json.loads(out)["seconds"] == pytest.approx(20, abs=3)


def test_what_a_run_saw_of_its_service_is_found_in_its_output(tmp_path: Path) -> None:
    """Limits, room, pace, faults, lengths: from attempts and the ledger's note."""
    settings = Settings(
        **{**NOTHING, "tokens_per_minute": 90_000},
        answers=Drawn(),
        capacity=5,
        queue_limit=60.0,
        latency=0.4,
        seconds_per_prompt_token=0.0,
        seconds_per_completion_token=0.01,
        keeps_reservation=True,
        faults={"500": 0.1},
    )
    job = batcher.load(made(tmp_path, 200))
    summary = run(job, settings)
    seen = rehearse.observe(str(tmp_path / "out"))
    assert seen.capacity == 5
    assert [(limit.resource, limit.window, limit.limit) for limit in seen.limits] == [("tokens", 60.0, 90_000)]
    assert seen.pace.latency + 0.01 * 40 == pytest.approx(0.8, rel=0.05)
    assert seen.pace.completion_token == pytest.approx(0.01, rel=0.15)
    assert seen.faults["500"] == pytest.approx(0.1, abs=0.06)
    answered = batcher.Result(job.results, summary).table()
    assert sorted(seen.completions) == sorted(answered["completion_tokens"].to_pylist())
    counted = zip(answered["prompt_tokens"].to_pylist(), answered["cached_tokens"].to_pylist(), strict=True)
    assert seen.prompts == dict(zip(answered["row"].to_pylist(), counted, strict=True))


def test_a_rehearsal_from_some_rows_is_near_what_all_come_to(tmp_path: Path) -> None:
    """The truth is the engine over all rows, against a service of which the rehearsal saw an output only."""
    settings = Settings(
        **{**NOTHING, "requests_per_minute": 100},
        answers=Drawn(),
        latency=0.3,
        seconds_per_completion_token=0.005,
    )
    job = batcher.load(made(tmp_path, 240))
    run(rehearse.piloted(job, 60), settings)
    forecast = rehearse.rehearse(job, rehearse.observe(str(tmp_path / "out.pilot-60")), rehearse.Given())
    truth = run(job, settings)
    assert truth.totals.cost_usd is not None
    assert forecast.seconds == pytest.approx(truth.seconds, rel=0.1)
    assert forecast.cost_usd == pytest.approx(truth.totals.cost_usd, rel=0.1)
    assert forecast.seconds_interval[0] <= truth.seconds <= forecast.seconds_interval[1]


SLOW = Settings(**NOTHING, answers=Drawn(), capacity=4, latency=0.5, seconds_per_completion_token=0.005, queue_limit=60)


def test_a_plan_goes_by_what_a_killed_run_saw(tmp_path: Path) -> None:
    """Time and cost of the rows that are left, as they come to be; what is known of the service is in the ledger."""
    job = batcher.load(made(tmp_path, 250))
    with pytest.raises(NothingLeftError):
        run(job, SLOW, until=10)
    (tmp_path / "out").rename(tmp_path / "locked")  # the run that broke off is still in this process, and its lock too
    shutil.copytree(tmp_path / "locked", tmp_path / "out")
    looked = plan(job)
    left, forecast = looked.rows - looked.done, looked.forecast
    assert 30 < looked.done < 120
    assert looked.measured
    assert forecast is not None
    assert (forecast.rows, forecast.bound) == (left, "capacity")
    before = status(tmp_path / "out").cost_usd
    truth = run(job, SLOW)
    assert truth.totals.cost_usd is not None
    assert before is not None
    assert forecast.cost_interval is not None
    assert forecast.seconds == pytest.approx(truth.seconds, rel=0.1)
    assert forecast.cost_interval[0] <= truth.totals.cost_usd - before <= forecast.cost_interval[1]
    told = render(looked)
    assert re.search(r"^cost +about \$0\.\d+, between \$0\.\d+ and \$0\.\d+; at most \$", told, re.MULTILINE)
    assert re.search(r"^time +about .+ s, between .+ s and .+ s, bound by capacity$", told, re.MULTILINE)
    assert plan(job).forecast is None


def test_a_plan_knows_the_limits_that_an_earlier_run_met(tmp_path: Path) -> None:
    """A few answers say nothing of lengths, but what headers said of limits counts."""
    job = batcher.load(made(tmp_path, 400, schedule={"max_in_flight": 4}))
    assert "bound by schedule.max_in_flight" in render(plan(job))
    limited = batcher.load(tmp_path / "job.toml", ["input.limit=5"])
    run(limited, Settings(**{**NOTHING, "requests_per_minute": 30}, answers=Drawn()))
    looked = plan(job)
    assert not looked.measured
    assert looked.forecast is not None
    assert looked.forecast.seconds == pytest.approx(395 * 2, rel=0.05)
    assert looked.forecast.bound == "requests per minute"
    assert "assumed    answers of 100 tokens, as long as they may be" in render(looked)


def test_what_a_cache_has_follows_from_the_rows(tmp_path: Path) -> None:
    """A pilot meets a prefix once, the job four times: the forecast is of the job."""
    prices = {"gpt-oss-120b": {"input": 1.0, "output": 1.0, "cached": 0.0}}
    path = made(tmp_path, 1, request={"prompt": "{{ text[6:] }} {{ text[0:6] }}"}, service={"prices": prices})
    order = [*range(400)]
    random.Random(5).shuffle(order)
    lines = (json.dumps({"text": f"{row:06d}" + f"{row % 100:04d}".ljust(1_500, ".")}) for row in order)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = batcher.load(path)
    settings = Settings(
        **{**NOTHING, "uncached_tokens_per_minute": 60_000, "cache_tokens": 100_000}, answers=Recorded({}), latency=0.3
    )
    run(rehearse.piloted(job, 100), settings)
    seen = rehearse.observe(str(tmp_path / "out.pilot-100"))
    forecast = rehearse.rehearse(job, seen, rehearse.Given())
    truth = run(job, settings)
    assert truth.totals.cost_usd is not None
    assert truth.totals.cached_tokens > 2 * seen.cached * truth.totals.prompt_tokens
    assert forecast.seconds == pytest.approx(truth.seconds, rel=0.1)
    assert forecast.cost_usd == pytest.approx(truth.totals.cost_usd, rel=0.1)


@pytest.mark.parametrize("share", [0.4, 1.2])
def test_a_budget_is_foretold_to_be_reached(tmp_path: Path, share: float) -> None:
    """So many rows are done when the run pauses, or all."""
    whole = batcher.load(made(tmp_path, 200))
    run(rehearse.piloted(whole, 60), SLOW)
    seen = rehearse.observe(str(tmp_path / "out.pilot-60"))
    cost = rehearse.rehearse(whole, seen, rehearse.Given()).cost_usd
    assert cost is not None
    job = batcher.load(tmp_path / "job.toml", [f"schedule.budget_usd={share * cost}"])
    forecast = rehearse.rehearse(job, seen, rehearse.Given())
    told = rehearse.render(forecast)
    if share > 1:
        assert forecast.reached is None
        assert "it suffices" in told
        assert run(job, SLOW).totals.answered == 200
        return
    with pytest.raises(PausedError, match="the budget is reached"):
        run(job, SLOW)
    done = status(tmp_path / "out").answered
    assert forecast.reached == pytest.approx(done, rel=0.1)
    assert f"it is reached after about {forecast.reached} rows and " in told


def test_a_deadline_is_foretold_to_be_kept(tmp_path: Path) -> None:
    """What flex cannot do by then goes to default, hardly more; without one both do all they can; or it is missed."""
    limits = rehearse.Given(requests_per_minute=12, completion_tokens=30)  # flex has five times as many
    kept, plain, missed = (
        rehearse.rehearse(
            batcher.load(made(tmp_path, 360, schedule={"service_tier": ["flex", "default"], **more})), None, limits
        )
        for more in ({"deadline": "270s"}, {}, {"deadline": "2m"})
    )
    assert kept.deadline == 270
    assert 250 < kept.seconds <= 270
    assert 0.08 < kept.tiers["default"] < 0.15
    assert "kept" in rehearse.render(kept)
    assert 235 < plain.seconds < 250
    assert plain.tiers["default"] == pytest.approx(1 / 6, abs=0.01)
    assert missed.seconds == pytest.approx(plain.seconds, rel=0.05)
    assert "missed by 2 min" in rehearse.render(missed)


def test_a_sample_is_gone_on_with_as_its_middle_and_within_what_limits_leave(tmp_path: Path) -> None:
    """A third of the rows says what all take, also where these live on full buckets; a day's limit lasts for days."""
    job = batcher.load(made(tmp_path, 450))
    cast = {size: drawn(job, size) for size in (50, 150, 450)}
    rates: tuple[dict[str, int], ...] = ({"requests-minute": 60}, {"tokens-minute": 60_000}, {})
    for limits in rates:
        model = Model({**NOTHING, "limits": limits, "latency": 0.5, "capacity": None if limits else 4}, [40])
        whole = play(job, model, cast[450], 0).summary.seconds
        outlook = Outlook.of(play(job, model, cast[150], 0), job, model, 150, 450)
        assert outlook.seconds == pytest.approx(whole, rel=0.1, abs=3), limits  # it may end while the window grows
    model = Model({**NOTHING, "limits": {"requests-day": 100}}, [40])
    days = Outlook.of(play(job, model, cast[50], 0), job, model, 50, 450).seconds / 86_400
    assert days == pytest.approx(3.5)


@given(rows=st.sets(st.integers(0, 3_000), min_size=1), size=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_a_sample_is_of_the_whole_input(rows: set[int], size: int) -> None:
    """As many as are wanted, each once, in order, and of each part of the input its share."""
    drawn = positions(engine.Selection(bits.of(rows), len(rows)), size)
    assert len(drawn) == min(size, len(rows))
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= rows
    half = max(rows) // 2
    share = sum(row <= half for row in rows) / len(rows)
    assert abs(sum(row <= half for row in drawn) - share * len(drawn)) <= 1 + len(drawn) / 8


def test_the_pace_is_what_answers_took() -> None:
    """Base and seconds per token are told apart; what would be below nothing is nothing."""
    draw = random.Random(3)
    sizes = [(draw.randint(10, 3000), draw.randint(5, 400)) for _ in range(200)]
    exact = paced([(prompt, said, 0.2 + 0.0001 * prompt + 0.01 * said) for prompt, said in sizes])
    assert (exact.latency, exact.prompt_token, exact.completion_token) == pytest.approx((0.2, 0.0001, 0.01))
    assert exact.jitter == pytest.approx(0, abs=1e-6)
    blurred = paced([(prompt, said, (0.2 + 0.01 * said) * draw.uniform(0.8, 1.2)) for prompt, said in sizes])
    assert blurred.jitter == pytest.approx(0.2, rel=0.15)
    assert blurred.prompt_token >= 0
    flat = paced([(100, 20, 0.5)] * 30)
    assert flat.latency + 100 * flat.prompt_token + 20 * flat.completion_token == pytest.approx(0.5)
    assert math.isfinite(flat.jitter)


def test_too_little_to_go_by_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and what to do."""
    path = made(tmp_path, 5)
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((), "--pilot N asks N rows"),
        (("--from", str(tmp_path / "empty")), "no output of a run"),
        (("--from", "x", "--pilot", "30"), "not both"),
    ):
        code, out, err = told(capsys, str(path), *words)
        assert (code, out) == (2, "")
        assert said in err
    run(batcher.load(path), Settings(answers=Drawn(), **NOTHING))
    with pytest.raises(JobError, match="5 answers with their usage are too few"):
        rehearse.observe(str(tmp_path / "out"))
