"""Rows that share a prefix travel together: one goes ahead, the others follow; wherever they lie in the input."""

import asyncio
import json
import random
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher import dialects, engine
from batcher.engine.window import Window
from batcher.job import from_document
from batcher.prompt import Composer
from batcher.records import Request, Row, Turn, Usage
from batcher.schedule import Dispatcher, Pace, Ticket
from batcher.schedule.groups import LEAD, LIFETIME, Groups
from batcher.simulator import Front, ModelTransport, Settings, VirtualLoop
from batcher.verify import verify

KEY = "csk-groups-0000000000"


def turn(row: int, group: str | None) -> Turn:
    """A row of a group."""
    request = Request(unit=0, row=row, model="m", body=b"{}", prompt_tokens=1000, output_tokens=10, hash=b"")
    return Turn(request, 0.0, group=group)


def going(dispatcher: Dispatcher, now: float) -> list[Ticket]:
    """All that may go now."""
    tickets = []
    while isinstance(granted := dispatcher.take(now), Ticket):
        tickets.append(granted)
    return tickets


def rows(tickets: list[Ticket]) -> list[int]:
    """Which rows these are."""
    return [ticket.turn.request.row for ticket in tickets]


def test_one_goes_ahead_and_the_others_follow() -> None:
    """Of each group the first goes, others pass those that wait, and after its answer they are next."""
    dispatcher = Dispatcher(Pace(), 100, 0.0)
    dispatcher.offer([turn(row, group) for row, group in enumerate(["a", "a", "b", "a", "b", None])])
    ahead = going(dispatcher, 0.0)
    assert rows(ahead) == [0, 2, 5]
    assert dispatcher.waiting == 3
    dispatcher.offer([turn(6, None)])
    dispatcher.answered(ahead[0], Usage(1000, 10, 1010, 0), None, 0.5)
    assert rows(going(dispatcher, 0.5)) == [1, 3, 6]
    assert dispatcher.take(0.5) == LEAD
    assert rows(going(dispatcher, LEAD)) == [4], "one that hangs is waited for no longer"


def test_followers_are_charged_for_what_the_cache_has_not() -> None:
    """Usage tells what followers have from the cache; leaders are charged whole all the same."""
    dispatcher = Dispatcher(Pace(uncached_tokens=1e9), 1000, 0.0)
    now = 0.0
    for group in range(100):
        dispatcher.offer([turn(2 * group, f"g{group}"), turn(2 * group + 1, f"g{group}")])
        for cached in (0, 900):
            now += 0.1
            (ticket,) = going(dispatcher, now)
            dispatcher.answered(ticket, Usage(1000, 10, 1010, cached), None, now)
            dispatcher.landed(1)
            assert ticket.turn.leads is not bool(cached)
            if group == 99:
                assert ticket.uncached == pytest.approx(110 if cached else 1010, rel=0.1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 400), st.sampled_from(["sent", "lost", "hung"]))))
@settings(max_examples=100, deadline=None)
def test_nobody_is_lost_or_held_for_long(story: list[tuple[str, float, str]]) -> None:
    """Whatever becomes of leaders, every row goes, at most two seconds after it could have gone."""
    groups, fresh, now, gone = Groups(), deque[Turn](), 0.0, 0
    last: dict[str, float] = {}
    for row, (name, pause, fate) in enumerate(story):
        fresh.append(turn(row, name))
        while (first := groups.first(fresh, now)) is not None:
            follows = groups.follows(first, now)
            assert first.group is not None
            assert not follows or now - last[first.group] < LIFETIME
            last[first.group] = now
            fresh.popleft()
            groups.sent(first, now)
            gone += 1
            if fate != "hung":
                groups.ended(first, fate == "sent", fresh)
        now += pause
    for moment in (now, now + LEAD, now + 2 * LEAD):
        while groups.first(fresh, moment) is not None:
            groups.sent(fresh.popleft(), moment)
            gone += 1
    assert (gone, groups.held) == (len(story), 0)


def composed(prefixes: list[str], system: str = "") -> list[Turn]:
    """Rows that begin with these texts, as `auto` sees them."""
    document = {
        "request": {"model": "m", "system": system + "{{ a }}", "prompt": "{{ b }}", "prompt_cache_key": "auto"},
        "input": {"path": "rows.jsonl"},
        "output": {"path": "out"},
    }
    composer = Composer(from_document(document, Path(), "job").request, None, "job")
    made = [composer.compose(Row(row, {"a": text, "b": f"q{row}"})) for row, text in enumerate(prefixes)]
    assert all(isinstance(request, Request) for request in made)
    return [Turn(request, 0.0) for request in made if isinstance(request, Request)]


def taken(window: Window) -> list[Turn]:
    """All that is in it, in the order in which it goes."""
    turns: list[Turn] = []
    while len(window):
        turns += window.take()
    window.close()
    return turns


def test_rows_that_begin_alike_are_brought_together(tmp_path: Path) -> None:
    """The longest shared prefix counts, below that of all; who shares less than a block has no key."""
    texts = [letter * 3000 if letter != "-" else f"{row}" for row, letter in enumerate("abcab-c")]
    window = Window(tmp_path)
    window.put(composed(texts))
    turns = taken(window)
    assert [one.request.row for one in turns] == [0, 3, 1, 4, 2, 6, 5]
    keys = [one.request.cache_key for one in turns]
    assert keys[0] == keys[1] != keys[2] == keys[3] != keys[4] == keys[5] is not None
    assert keys[6] is None
    assert json.loads(turns[0].request.body)["prompt_cache_key"] == keys[0]
    assert list(tmp_path.iterdir()) == []


def test_a_large_group_has_several_keys(tmp_path: Path) -> None:
    """One for every 64 rows, so that other replicas serve it too; each begins with a row that goes ahead."""
    texts = [("a" if row % 3 == 0 else str(row)) * 3000 for row in range(390)]
    window = Window(tmp_path)
    window.put(composed(texts))
    keys = [one.request.cache_key for one in taken(window) if one.request.row % 3 == 0]
    assert [keys.count(key) for key in dict.fromkeys(keys)] == [64, 64, 2]
    assert None not in keys


def test_a_large_group_goes_together_where_caches_are_too_small_for_the_order(tmp_path: Path) -> None:
    """In the input's order while the cache is thought to have it still; together once answers tell otherwise."""
    texts = [("abc"[row % 3]) * 3000 for row in range(300)]
    window = Window(tmp_path)
    window.put(composed(texts))
    before = window.take()
    assert [one.request.row for one in before] == list(range(64))
    assert {one.shares for one in before} == {4 * 128}
    after = window.take(reuse=0.4)
    assert len({one.request.cache_key for one in after}) <= 2  # 64 rows of one prefix, under two of its keys
    assert {one.request.row % 3 for one in after} == {64 % 3}
    assert {one.shares for one in after} == {0}
    window.close()


def test_what_a_cache_had_of_what_was_relied_on_is_known() -> None:
    """Only where rows that are not brought together should have found something."""
    dispatcher = Dispatcher(Pace(), 1000, 0.0)
    for number in range(60):
        dispatcher.offer([Turn(turn(number, "a").request, 0.0, group="a", shares=900)])
        (ticket,) = going(dispatcher, number / 10)
        assert dispatcher.reuse == pytest.approx(1.0) or number > 20
        dispatcher.answered(ticket, Usage(1000, 10, 1010, 900 if number < 20 else 0), None, number / 10)
        dispatcher.landed(1)
    assert dispatcher.reuse < 0.5


def test_a_prefix_of_most_rows_ties_nobody(tmp_path: Path) -> None:
    """One system prompt for all: the input's order, no key, nobody waits for another."""
    window = Window(tmp_path)
    window.put(composed(["x"] * 200, system="be kind " * 200))
    turns = taken(window)
    assert [one.request.row for one in turns] == list(range(200))
    assert {(one.group, one.request.cache_key) for one in turns} == {(None, None)}


def told(folder: Path) -> pa.Table:
    """All responses of an output."""
    return pa.concat_tables([pq.read_table(path) for path in folder.glob("*.parquet")])


@pytest.mark.parametrize("key", ["auto", "{{ a[:5] }}"])
def test_shuffled_rows_find_their_prefix_in_the_cache(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: three of four rows of each prefix are read from the cache, which the input's order outlives."""
    monkeypatch.setenv("GROUPS_KEY", KEY)
    order = [number for number in range(100) for _ in range(4)]
    random.Random(1).shuffle(order)
    texts = [f"{number:05d}".ljust(4000, ".") for number in order]
    table = pa.table({"a": texts, "b": [f"q{row}" for row in range(400)]})

    async def whole(name: str, more: dict[str, str]) -> float:
        now = asyncio.get_running_loop().time
        front = Front(Settings(replicas=2, cache_tokens=20_000), now, 1_790_000_000.0, record=False)
        transport = ModelTransport(front, f"Bearer {KEY}", 60.0, dialects.named("cerebras").refusal)
        request = {"model": "gpt-oss-120b", "system": "{{ a }}", "prompt": "{{ b }}", "max_completion_tokens": 50}
        service = {"base_url": "https://simulated.invalid/v1", "api_key_env": "GROUPS_KEY", "dialect": "cerebras"}
        document = {
            "request": request | more,
            "service": service,
            "schedule": {"max_in_flight": 8},
            "output": {"path": name, "keep": [], "rows_per_part": 20},
        }
        job = from_document(document, tmp_path, "job.toml")
        summary = await engine.run(job, table=table, transport=transport)
        assert summary.totals.answered == 400
        assert not verify(tmp_path / name).problems
        answers = told(tmp_path / name / "responses")
        assert (answers["prompt_cache_key"].null_count == 0) is bool(more)
        cached, prompt = (sum(answers[column].to_pylist()) for column in ("cached_tokens", "prompt_tokens"))
        return float(cached / prompt)

    shares = []
    for name, more in (("grouped", {"prompt_cache_key": key}), ("plain", {})):
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(until=1e5)) as runner:
            shares.append(runner.run(whole(name, more)))
    assert shares[0] > 0.6
    assert shares[1] < 0.2
