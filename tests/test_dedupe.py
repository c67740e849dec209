"""Requests that are the same are asked once, and every row has its answer: across parts, kills, resumes and retries."""

import asyncio
import os
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batcher
from batcher import dialects, engine
from batcher.errors import JobError
from batcher.plan import plan, render
from batcher.simulator import Front, ModelTransport, Settings, Simulator, VirtualLoop
from batcher.verify import verify
from tests import stories

More = Mapping[str, Mapping[str, object]]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
PAID = ("billed_prompt_tokens", "billed_completion_tokens", "cost_usd")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


def job(folder: Path, url: str, texts: list[int], part: int = 10, more: More | None = None) -> Path:
    """A job over rows with the texts of these numbers."""
    rows = [{"key": f"k{row}", "text": stories.prompt(number), "own": row} for row, number in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    sections: dict[str, dict[str, object]] = {
        "request": {"temperature": 0},
        "schedule": {"dedupe": True, "max_in_flight": 8},
        "output": {"keep": ["text", "own"]},
    }
    for name, values in (more or {}).items():
        sections.setdefault(name, {}).update(values)
    return stories.write_job(folder, url, source="rows.parquet", rows_per_part=part, more=sections)


def rows_of(output: Path, folder: str) -> dict[int, dict[str, Any]]:
    """All rows of a folder by position."""
    parts = sorted((output / folder).glob("*.parquet"))
    return {row["row"]: row for part in parts for row in pq.read_table(part).to_pylist()}


def asked(service: Simulator) -> Counter[int]:
    """How often the service was asked each text."""
    return Counter(stories.row_of(entry) for entry in service.book)


def check(output: Path, texts: list[int]) -> dict[int, dict[str, Any]]:
    """Every row has the outcome of the row of its text that was asked, and its own columns; nothing counts twice."""
    answers, failures = rows_of(output, "responses"), rows_of(output, "failures")
    assert sorted([*answers, *failures]) == list(range(len(texts)))
    every = answers | failures
    leaders = {texts[row]: row for row, stored in every.items() if stored["attempts"]}
    assert len(leaders) == sum(bool(stored["attempts"]) for stored in every.values())
    for row, stored in every.items():
        leader = every[leaders[texts[row]]]
        assert (stored["id"], stored["text"], stored["own"]) == (f"k{row}", stories.prompt(texts[row]), row)
        same = stored.keys() - {"row", "id", "own", "attempts", *PAID}
        if leader["attempts"] > 1:
            same -= {"started_at"}  # its twins tell of the answer alone
        assert {name: stored[name] for name in same} == {name: leader[name] for name in same}
        if stored is not leader:
            assert [stored[name] for name in PAID] == [0, 0, 0.0]
    assert verify(output).problems == []
    return every


def test_requests_that_are_the_same_are_asked_once(tmp_path: Path) -> None:
    """Within a part and across parts; the sums count what was asked, and a copied row has no attempts."""
    texts = [row % 7 for row in range(45)]
    with stories.service(latency=0.002) as service:
        result = batcher.run(batcher.load(job(tmp_path, service.url, texts)))
        assert asked(service) == Counter(range(7))
        every = check(tmp_path / "out", texts)
        totals = result.summary.totals
        assert [row for row, stored in every.items() if stored["attempts"]] == list(range(7))
        assert (totals.answered, totals.attempts, result.summary.requests) == (45, 7, 7)
        assert totals.billed_prompt_tokens == sum(entry.prompt_tokens for entry in service.book)
        assert totals.billed_completion_tokens == sum(entry.completion_tokens for entry in service.book)
        assert totals.cost_usd == pytest.approx(sum(every[row]["cost_usd"] for row in range(7)))


def test_a_later_run_knows_what_parts_that_are_gone_have_answered(tmp_path: Path) -> None:
    """A pilot, published and dropped from the ledger; then all rows, and rows that are appended."""
    texts = [row % 13 for row in range(40)]
    with stories.service(latency=0.002) as service:
        loaded = job(tmp_path, service.url, texts)
        batcher.run(batcher.load(loaded, ["input.limit=10"]))
        assert asked(service) == Counter(range(10))
        batcher.run(batcher.load(loaded))
        assert asked(service) == Counter(range(13))
        check(tmp_path / "out", texts)


def test_rows_share_a_failure_and_a_retry_asks_once_more(tmp_path: Path) -> None:
    """What one row could not have its twins have not either; a retry asks one of them, and all have its answer."""
    texts = [row % 5 for row in range(30)]
    with stories.service(latency=0.002, poison={"[row 00003]": 422}) as service:
        batcher.run(batcher.load(job(tmp_path, service.url, texts)))
        assert asked(service) == Counter(range(5))
        check(tmp_path / "out", texts)
        assert sorted(rows_of(tmp_path / "out", "failures")) == [3, 8, 13, 18, 23, 28]
    with stories.service(latency=0.002) as service:
        result = batcher.retry(tmp_path / "out", None, [f"service.base_url={service.url}"])
        assert asked(service) == Counter([3])
        assert (result.summary.totals.answered, result.summary.totals.attempts) == (30, 6)
        answers = rows_of(tmp_path / "out", "responses")
        assert {answers[row]["response"] for row in range(3, 30, 5)} == {answers[3]["response"]}
        assert [answers[row]["attempts"] for row in range(3, 30, 5)] == [2, 0, 0, 0, 0, 0]
        assert verify(tmp_path / "out").problems == []
        # Another retry forgets what the rows shared: who is asked again is asked.
        batcher.retry(tmp_path / "out", "row in (8, 13)", [f"service.base_url={service.url}"])
        assert asked(service) == Counter({3: 2})
        answers = rows_of(tmp_path / "out", "responses")
        assert [answers[row]["attempts"] for row in (3, 8, 13)] == [2, 1, 0]


def test_rows_that_are_asked_with_other_parameters_do_not_lead_those_of_before(tmp_path: Path) -> None:
    """A retry with another cap leaves the answers that later rows of the job may share."""
    texts = [0, 1, 0, 1]
    with stories.service(latency=0.002) as service:
        loaded = job(tmp_path, service.url, texts)
        batcher.run(batcher.load(loaded, ["input.limit=2"]))
        first = rows_of(tmp_path / "out", "responses")
        batcher.retry(tmp_path / "out", "row = 0", ["request.max_completion_tokens=4"])
        assert rows_of(tmp_path / "out", "responses")[0]["completion_tokens"] <= 4
        batcher.run(batcher.load(loaded))
        answers = rows_of(tmp_path / "out", "responses")
        assert len(service.book) == 3
        assert (answers[2]["response"], answers[3]["response"]) == (first[0]["response"], first[1]["response"])


def test_only_requests_that_are_meant_to_have_one_answer_are_shared(tmp_path: Path) -> None:
    """A job that has neither temperature 0 nor a seed is refused; where rows decide, each does."""
    with stories.service(latency=0.002) as service:
        hot = batcher.load(job(tmp_path, service.url, [0, 0], more={"request": {"temperature": 0.7}}))
        for look in (plan, batcher.run):
            with pytest.raises(JobError, match=r"schedule.dedupe: only with request.temperature = 0 or a request.seed"):
                look(hot)
        own = {"temperature": "{{ 0 if own < 4 else 1 }}"}
        loaded = batcher.load(job(tmp_path, service.url, [0, 0, 1, 0, 0, 0], more={"request": own}))
        assert "2 of all rows make the request of a row before them: asked once" in render(plan(loaded))
        batcher.run(loaded)
        assert asked(service) == Counter({0: 3, 1: 1})
        assert [row["attempts"] for row in rows_of(tmp_path / "out", "responses").values()] == [1, 0, 1, 0, 1, 1]


def test_kills_change_nothing_of_it(tmp_path: Path) -> None:
    """Killed again and again, no request is asked twice that was answered, and every row has its twin's answer."""
    chance = random.Random(5)
    texts = [chance.randrange(150) for _ in range(300)]
    with stories.service(
        latency=0.02, seconds_per_completion_token=0.0, faults=stories.FAULTS, poison={"[row 00013]": 422}
    ) as service:
        path = job(tmp_path, service.url, texts, part=100)
        story = stories.Kills(tmp_path, service, path, in_flight=8, seed=5)
        for _ in range(3):
            assert story.kill_once(chance.randrange(30), within=0.05)
        ended = stories.run(path)
        assert ended.returncode in (0, 3), ended.stderr
        story.check_repeats()
        check(tmp_path / "out", texts)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.integers(1, 15),
    st.lists(st.integers(1, 40), max_size=2),
    st.sampled_from([1, 3, 16]),
)
@settings(max_examples=10, deadline=None)
def test_whatever_repeats_is_asked_once(texts: list[int], part: int, pilots: list[int], in_flight: int) -> None:
    """Random repetitions, parts and pilots: one request for each text, one outcome for all its rows."""
    os.environ["STORY_KEY"] = stories.KEY
    texts = [0, *texts]  # it is answered, so that refusals are the rows' own
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        more: More = {"schedule": {"max_in_flight": in_flight}}
        path = job(folder, "https://simulated.invalid/v1", texts, part, more)
        loops: list[VirtualLoop] = []
        front = Front(
            Settings(poison={"[row 00002]": 422}, requests_per_minute=None, tokens_per_minute=None, seed=1),
            lambda: loops[-1].time(),
            1_790_000_000.0,
            record=True,
        )

        async def live(settings: list[str]) -> None:
            transport = ModelTransport(front, f"Bearer {stories.KEY}", 60.0, dialects.named("cerebras").refusal)
            await engine.run(batcher.load(path, settings), transport=transport)

        for limit in (*sorted(pilots), None):
            loops.append(VirtualLoop(loops[-1].time() if loops else 0.0))
            with asyncio.Runner(loop_factory=lambda: loops[-1]) as runner:
                runner.run(live([] if limit is None else [f"input.limit={limit}"]))
        counted = Counter(stories.row_of(entry) for entry in front.book)
        assert counted == Counter(set(texts))
        check(folder / "out", texts)
