"""The simulated service's model in virtual time: quotas by tier, queues and capacities, prefix caches."""

import asyncio
import contextlib
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.simulator import (
    Entry,
    Front,
    Settings,
    VirtualLoop,
    parse_capacity,
    parse_drift,
    parse_limit,
)
from batcher.simulator.cache import BLOCK, PrefixCache, chain
from batcher.simulator.model import Answer, Service, Waiting
from batcher.simulator.queues import TIERS, Average, Line, Waiter
from batcher.simulator.quota import BUCKETS, WINDOWS, Buckets
from batcher.simulator.wire import BYTES_PER_TOKEN, Completed, Question, tokens

MODEL = "gpt-oss-120b"
STILL = Settings(  # answers take one second, and nothing is limited
    requests_per_minute=None,
    tokens_per_minute=None,
    latency=1.0,
    seconds_per_prompt_token=0.0,
    seconds_per_completion_token=0.0,
    jitter=0.0,
)


def question(
    text: str = "How is the weather?",
    *,
    tier: str | None = None,
    key: str | None = None,
    threshold: float | None = None,
    cap: int | None = 10,
    model: str = MODEL,
) -> Question:
    """A chat request, as it was understood."""
    return Question(
        model=model,
        chat=True,
        text=text,
        tokens=tokens(text),
        prompts=[text],
        n=1,
        cap=cap,
        seed=None,
        tier=tier,
        threshold=threshold,
        cache_key=key,
        prefix=text,
    )


def ask(service: Service, asked: Question, now: float = 0.0) -> Answer:
    """What the service decides about a request that need not wait."""
    answer = service.admit(asked, asked.text.encode(), now)
    assert isinstance(answer, Answer)
    return answer


def queued(service: Service, asked: Question, now: float = 0.0) -> Waiting:
    """A request that has to wait."""
    waiting = service.admit(asked, asked.text.encode(), now)
    assert isinstance(waiting, Waiting)
    return waiting


def served(waiting: Waiting) -> Answer:
    """What one who has waited was answered."""
    assert waiting.answer is not None
    return waiting.answer


def read(answer: Answer) -> Completed:
    """A good answer, read as a client would."""
    assert answer.status == 200
    return msgspec.json.decode(answer.body, type=Completed)


def message(answer: Answer) -> str:
    """What a refusal says."""
    assert answer.status == 429
    return str(msgspec.json.decode(answer.body)["message"])


def code(answer: Answer) -> str:
    """A refusal in a word."""
    assert answer.status == 429
    return str(msgspec.json.decode(answer.body)["code"])


class TestBuckets:
    """Quotas: what goes in and what goes out."""

    @given(
        limit=st.integers(10, 1_000),
        others=st.sampled_from([0.0, 0.3, 1.0]),
        steps=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 400), st.floats(0, 1)), max_size=80),
    )
    def test_no_more_is_used_than_was_there_and_flowed_in(
        self, limit: int, others: float, steps: list[tuple[float, int, float]]
    ) -> None:
        """Whatever is charged, settled and when: no bucket is above its limit, and use is within what it had."""
        names = [name for name in BUCKETS if name.endswith("minute")]
        buckets = Buckets(dict.fromkeys(names, limit), 0.0)
        used, now = dict.fromkeys(names, 0.0), 0.0
        open_charges: list[tuple[int, float]] = []
        for pause, amount, share in steps:
            now += pause
            buckets.refill(now, others)
            if amount % 3 and open_charges:
                charged, part = open_charges.pop()
                buckets.give_back(charged * part, charged * part / 2)
                used["tokens-minute"] += charged * (1 - part)
                used["uncached-tokens-minute"] += charged * (1 - part / 2)
            elif buckets.shortage(amount, amount) is None:
                buckets.charge(amount, amount)
                used["requests-minute"] += 1
                open_charges.append((amount, share))
            pending = sum(charged for charged, _ in open_charges)
            flowed = limit + now * limit / 60 * (1 - others)
            for name, level in buckets.levels().items():
                assert level <= limit
                taken = used[name] + (0 if name == "requests-minute" else pending)
                assert level <= flowed - taken + 1e-6

    @pytest.mark.parametrize("bucket", BUCKETS)
    def test_every_bucket_refuses_in_its_words(self, bucket: str) -> None:
        """Requests and tokens, total and uncached, by second, minute, hour and day; then it refills in its time."""
        limit = 40
        service = Service(replace(STILL, limits={bucket: limit}))
        most = limit if bucket.startswith("requests") else 2
        asked = question("x" * 40, cap=10)  # 20 tokens
        assert [ask(service, asked).status for _ in range(most)] == [200] * most
        refused = ask(service, asked)
        resource, _, window = bucket.rpartition("-")
        words = {"requests": "Requests", "tokens": "Tokens", "uncached-tokens": "Uncached tokens"}[resource]
        done = "requests sent" if resource == "requests" else "tokens processed"
        assert message(refused) == f"{words} per {window} limit exceeded - too many {done}."
        assert code(refused) == ("request" if resource == "requests" else "token") + "_quota_exceeded"
        wait = WINDOWS[window] / limit * (1 if resource == "requests" else 20)
        assert refused.retry_after == pytest.approx(wait)
        assert ask(service, asked, wait * 0.99).status == 429
        assert ask(service, asked, wait * 1.01).status == 200

    def test_the_plan_is_the_developers(self) -> None:
        """Without settings each model has its published limits, total tokens beside uncached ones."""
        service = Service(Settings())
        for model, limits in ((MODEL, (1_000, 3_000_000, 1_000_000)), ("qwen-3.8-27b", (300, 750_000, 150_000))):
            told = service.settle(ask(service, question(model=model)), 1_000.0)
            names = ("requests-minute", "tokens-minute", "uncached-tokens-minute")
            assert tuple(int(told[f"x-ratelimit-limit-{name}"]) for name in names) == limits
            assert len(told) == 9

    @pytest.mark.parametrize(
        ("given", "limits"),
        [
            ({"tokens_per_minute": 500}, {"requests-minute": 1_000, "tokens-minute": 500}),
            ({"tokens_per_minute": None}, {"requests-minute": 1_000}),
            (
                {"uncached_tokens_per_minute": 500, "requests_per_minute": None},
                {"tokens-minute": 1_500, "uncached-tokens-minute": 500},
            ),
            (
                {"uncached_tokens_per_minute": None, "requests_per_day": 7},
                {"requests-minute": 1_000, "requests-day": 7, "tokens-minute": 3_000_000},
            ),
            (
                {"uncached_tokens_per_minute": 500, "tokens_per_minute": 600, "limits": {"requests-minute": None}},
                {"tokens-minute": 600, "uncached-tokens-minute": 500},
            ),
            (
                {"tokens_per_minute": None, "limits": {"requests-minute": 9, f"{MODEL}:requests-minute": 8}},
                {"requests-minute": 8},
            ),
        ],
    )
    def test_limits_follow_from_each_other(self, given: dict[str, object], limits: dict[str, float]) -> None:
        """Total is three times uncached where only that is stated; a total alone leaves uncached without a limit."""
        assert Settings(**given).limits_of(MODEL, "default") == limits  # type: ignore[arg-type]

    def test_flex_has_its_own_larger_limits(self) -> None:
        """An exhausted default tier leaves flex alone, and priority shares the default tier's limits."""
        service = Service(replace(STILL, requests_per_minute=2, limits={"flex:requests-hour": 8}))
        assert [ask(service, question(tier=tier)).status for tier in (None, "priority", "default")] == [200, 200, 429]
        assert code(ask(service, question(tier="priority"))) == "request_quota_exceeded"
        assert [ask(service, question(tier="flex")).status for _ in range(9)] == [200] * 8 + [429]
        assert service.levels(MODEL, 0.0, "flex") == {"requests-hour": 0, "requests-minute": 2}
        assert service.levels(MODEL, 0.0) == {"requests-minute": 0}

    def test_auto_takes_what_has_quota_and_says_what(self) -> None:
        """The highest tier that has room serves; the answer tells which, and only then."""
        service = Service(replace(STILL, requests_per_minute=2))
        answers = [ask(service, question(tier="auto")) for _ in range(13)]
        assert [answer.tier for answer in answers] == ["priority"] * 2 + ["flex"] * 11
        assert [answer.status for answer in answers] == [200] * 12 + [429]
        assert [read(answer).service_tier_used for answer in answers[1:3]] == ["priority", "flex"]
        assert {read(answer).service_tier for answer in answers[:12]} == {"auto"}
        plain = msgspec.json.decode(ask(Service(STILL), question(tier="flex")).body)
        assert plain["service_tier"] == "flex"
        assert "service_tier_used" not in plain

    def test_total_and_uncached_are_told_apart(self) -> None:
        """The total is charged with all of a prompt, the uncached limit with what the cache has not."""
        text = "a" * BLOCK * BYTES_PER_TOKEN * 8
        service = Service(replace(STILL, tokens_per_minute=10_000, uncached_tokens_per_minute=3_000))
        first, second = ask(service, question(text)), ask(service, question(text), 10.0)
        size = 8 * BLOCK
        assert [answer.cached_tokens for answer in (first, second)] == [0, size]
        assert [answer.charged for answer in (first, second)] == [size + 10] * 2
        assert [answer.charged_uncached for answer in (first, second)] == [size + 10, 10]
        said = second.completion_tokens
        assert (second.settled, second.settled_uncached) == (size + said, said)
        for answer in (first, second):
            service.settle(answer, 10.0)
        assert "Uncached tokens per minute" in message(ask(service, question(text, cap=3_001), 10.0))
        assert service.levels(MODEL, 30.0) == {"tokens-minute": 10_000, "uncached-tokens-minute": 3_000}
        service.change(30.0, reserves_cached=True)
        assert "Uncached tokens per minute" in message(ask(service, question(text, cap=2_500), 30.0))
        third = ask(service, question(text), 30.0)
        assert (third.charged_uncached, third.settled_uncached) == (size + 10, third.completion_tokens)
        tight = Service(replace(STILL, tokens_per_minute=1_000, uncached_tokens_per_minute=1_000))
        assert message(ask(tight, question(cap=2_000))).startswith("Total tokens per minute limit exceeded")

    def test_what_can_never_fit_is_given_no_time(self) -> None:
        """A request that is larger than the whole limit is refused at any time, without a retry-after."""
        service = Service(replace(STILL, tokens_per_minute=1_000, retry_after=True))
        for now in (0.0, 3_600.0):
            refused = ask(service, question(cap=1_000), now)
            assert code(refused) == "token_quota_exceeded"
            assert "retry-after" not in service.settle(refused, now)

    def test_a_reservation_may_be_kept(self) -> None:
        """By that setting the cap is what a request costs, answered or not."""
        for faults in ({}, {"500": 1.0}):
            service = Service(replace(STILL, tokens_per_minute=1_000, keeps_reservation=True, faults=faults))
            answer = ask(service, question("x" * 40, cap=490))
            service.settle(answer, 0.0)
            assert (answer.charged, answer.settled, service.levels(MODEL, 0.0)["tokens-minute"]) == (500, 500, 500)

    @pytest.mark.parametrize(("how", "told"), [("all", (6, 6)), ("answers", (6, 0)), ("none", (0, 0))])
    def test_headers_may_be_absent(self, how: str, told: tuple[int, int]) -> None:
        """The service tells its limits always, not with refusals, or never."""
        service = Service(replace(STILL, requests_per_minute=1, tokens_per_minute=10_000, rate_headers=how))  # type: ignore[arg-type]
        answers = [ask(service, question()) for _ in range(2)]
        assert tuple(len(service.settle(answer, 0.0)) for answer in answers) == told

    def test_limits_change_in_mid_run(self) -> None:
        """What is there is cut to the new limit, and from then on the new rate flows in."""
        service = Service(replace(STILL, requests_per_minute=600))
        assert [ask(service, question()).status for _ in range(100)] == [200] * 100
        service.change(0.0, requests_per_minute=300)
        assert service.levels(MODEL, 0.0) == {"requests-minute": 300}
        service.change(0.0, requests_per_minute=600)
        assert service.levels(MODEL, 10.0) == {"requests-minute": 400}
        service.change(20.0, requests_per_minute=None, limits={"requests-second": 3})
        assert service.levels(MODEL, 20.0) == {"requests-second": 3}

    def test_another_client_takes_its_share(self) -> None:
        """Who asks all the time gets what others leave."""
        service = Service(replace(STILL, requests_per_minute=60))
        for second in range(60):
            ask(service, question(), second / 10)
        service.change(6.0, others=0.3)
        admitted = sum(ask(service, question(), 6 + tenth / 10).status == 200 for tenth in range(6_000))
        assert admitted == pytest.approx(0.7 * 600, abs=8)


class TestQueues:
    """Who is served when."""

    def test_tiers_are_served_in_their_order(self) -> None:
        """Priority overtakes default and default flex; within a tier who came first is served first."""
        service = Service(replace(STILL, capacity=1, queue_limit=100))
        ask(service, question())
        came = [queued(service, question(tier=tier), 0.1 * n) for n, tier in enumerate([*TIERS[::-1], *TIERS])]
        begun = service.advance(100.0)
        assert [waiting.tier for waiting in begun] == [tier for tier in TIERS for _ in range(2)]
        assert [served(waiting).queue_time for waiting in begun] == pytest.approx(
            [number + 1 - waiting.arrived for number, waiting in enumerate(begun)]
        )
        assert set(begun) == set(came)
        assert service.next() is None

    def test_a_tier_may_have_places_of_its_own(self) -> None:
        """Flex waits for flex alone, and in a service that is full for the others too."""
        service = Service(replace(STILL, capacities={"flex": 1}))
        assert [ask(service, question(tier=tier)).status for tier in ("flex", None, "priority")] == [200] * 3
        assert [queued(service, question(tier="flex")).tier for _ in range(2)] == ["flex"] * 2
        assert [served(waiting).queue_time for waiting in service.advance(9.0)] == [1, 2]
        both = Service(replace(STILL, capacity=2, capacities={"flex": 1}))
        ask(both, question(tier="flex"))
        flex = queued(both, question(tier="flex"))
        ask(both, question())
        default = queued(both, question())
        both.advance(9.0)
        assert [served(waiting).queue_time for waiting in (default, flex)] == [1, 1]

    @given(
        places=st.integers(1, 4),
        flex=st.sampled_from([1, 2, math.inf]),
        comes=st.lists(
            st.tuples(st.floats(0, 3), st.sampled_from(TIERS), st.floats(0.1, 5), st.booleans()), max_size=60
        ),
    )
    def test_no_more_are_served_than_there_are_places(
        self, places: int, flex: float, comes: list[tuple[float, str, float, bool]]
    ) -> None:
        """Nobody waits while there is a place, nobody is forgotten, each tier keeps its order, some give up."""
        line = Line[Waiter](places, {"priority": math.inf, "default": math.inf, "flex": flex})
        ends: list[tuple[float, str]] = []
        order: dict[str, list[Waiter]] = {tier: [] for tier in TIERS}
        began: dict[str, list[Waiter]] = {tier: [] for tier in TIERS}
        now = 0.0

        def begin(tier: str, takes: float, called: bool) -> None:
            line.occupy(tier, now + takes, called)
            heapq.heappush(ends, (now + takes, tier))
            assert len(ends) <= places
            assert sum(whose == "flex" for _, whose in ends) <= flex

        def work_off(until: float) -> None:
            nonlocal now
            while ends and ends[0][0] <= until:
                now = heapq.heappop(ends)[0]
                while ends and ends[0][0] <= now:
                    heapq.heappop(ends)
                line.release(now)
                assert line.serving == len(ends)
                while (waiter := line.call()) is not None:
                    began[waiter.tier].append(waiter)
                    begin(waiter.tier, waiter.takes, True)
            now = until

        for pause, tier, takes, gives_up in comes:
            work_off(now + pause)
            line.release(now)
            if line.free(tier):
                assert line.wait(tier, now) == 0
                begin(tier, takes, False)
            else:
                assert line.wait(tier, now) >= 0
                waiter = Waiter(tier, takes)
                line.join(waiter, now)
                if gives_up:
                    line.leave(waiter)
                else:
                    order[tier].append(waiter)
        work_off(1e9)
        assert line.waiting == 0
        assert began == order

    @given(
        places=st.integers(1, 5),
        comes=st.lists(st.tuples(st.floats(0, 2), st.floats(0.1, 5)), min_size=1, max_size=150),
    )
    def test_who_is_told_his_wait_waits_so_long(self, places: int, comes: list[tuple[float, float]]) -> None:
        """Where nobody overtakes and all take as long as was thought, the expected wait is the real one."""
        line = Line[Waiter](places, dict.fromkeys(TIERS, math.inf))
        expected: dict[Waiter, float] = {}
        now = 0.0

        def work_off(until: float) -> None:
            while line.waiting and (at := line.next()) <= until:
                line.release(at)
                while (waiter := line.call()) is not None:
                    assert at == pytest.approx(expected.pop(waiter))
                    line.occupy("default", at + waiter.takes, called=True)

        for pause, takes in comes:
            now += pause
            work_off(now)
            line.release(now)
            if line.free("default"):
                line.occupy("default", now + takes)
            else:
                waiter = Waiter("default", takes)
                expected[waiter] = now + line.wait("default", now)
                line.join(waiter, now)
        work_off(1e9)
        assert not expected

    def test_beyond_the_capacity_queue_time_grows_linearly_up_to_refusal(self) -> None:
        """40 places of a second each: 60 in flight queue for half a second, and nobody for more than about one."""
        how = replace(STILL, capacity=40, queue_limit=1.0, jitter=0.1)
        for in_flight, expected in ((30, 0.0), (50, 0.25), (60, 0.5), (68, 0.7)):
            answers = self.closed(how, in_flight, 25.0)
            late = [answer for arrived, answer in answers if arrived > 5]
            assert {answer.status for answer in late} == {200}
            assert sum(answer.queue_time for answer in late) / len(late) == pytest.approx(expected, abs=0.06)
            assert len(late) / 20 == pytest.approx(min(in_flight, 40), rel=0.08)
        crowd = self.closed(how, 120, 10.0)
        refused = [answer for _, answer in crowd if answer.status == 429]
        assert {code(answer) for answer in refused} == {"queue_exceeded"}
        assert max(answer.queue_time for _, answer in crowd) <= 1.2

    def closed(self, how: Settings, in_flight: int, until: float, **asked: str) -> list[tuple[float, Answer]]:
        """So many clients who ask again as soon as they are answered: each answer and when it was asked for."""
        service, number = Service(how), itertools.count()
        comes: list[tuple[float, int]] = [(client / in_flight, client) for client in range(in_flight)]
        answers: list[tuple[float, Answer]] = []
        waits: dict[Waiting, int] = {}

        def done(arrived: float, answer: Answer, client: int) -> None:
            answers.append((arrived, answer))
            service.settle(answer, arrived)
            heapq.heappush(comes, (arrived + answer.delay, client))

        heapq.heapify(comes)
        while comes or waits:
            at = service.next()
            if at is not None and (not comes or at <= comes[0][0]):
                for waiting in service.advance(at):
                    done(waiting.arrived, served(waiting), waits.pop(waiting))
                continue
            now, client = heapq.heappop(comes)
            if now >= until:
                continue
            text = f"Question {next(number)}"
            received = service.admit(question(text, **asked), text.encode(), now)  # type: ignore[arg-type]
            if isinstance(received, Waiting):
                waits[received] = client
            else:
                done(now, received, client)
        return answers

    def test_a_threshold_is_held_against_the_queue_times_of_late(self) -> None:
        """Flex and auto may say how long they would wait; others are not asked."""
        service = Service(replace(STILL, capacity=1, queue_limit=100))
        ask(service, question())
        for number in range(4):
            queued(service, question(tier="flex"), 0.1 * number)
        service.advance(4.5)  # three have waited 1, 1.9 and 2.8 seconds
        refused = ask(service, question(tier="flex", threshold=0.5), 4.5)
        assert (code(refused), refused.tier) == ("queue_exceeded", "flex")
        assert service.settle(refused, 4.5) == {}
        assert queued(service, question(tier="flex", threshold=5.0), 4.5).tier == "flex"
        assert queued(service, question(threshold=0.5), 4.5).tier == "default"
        service.advance(60.0)
        assert ask(service, question(tier="flex", threshold=0.05), 60.0).status == 200

    def test_auto_goes_where_there_is_room(self) -> None:
        """A tier that would queue longer than the threshold has none."""
        service = Service(replace(STILL, capacities={"priority": 1, "flex": 1}))
        answers = [ask(service, question(tier="auto", threshold=0.5)) for _ in range(3)]
        assert [answer.tier for answer in answers] == ["priority", "default", "default"]
        none = Service(replace(STILL, capacity=1))
        ask(none, question())
        assert code(ask(none, question(tier="auto", threshold=0.5))) == "queue_exceeded"

    def test_the_mean_forgets(self) -> None:
        """Only what was seen in the window counts."""
        average = Average(10.0)
        for second in range(5):
            average.add(second, float(second))
        assert [average.mean(now) for now in (4.0, 12.0, 13.5, 14.0)] == [2.0, 3.5, 4.0, None]

    def test_capacity_drifts(self) -> None:
        """Between the points of its course it goes in straight lines, and the throughput with it."""
        how = replace(STILL, capacity=40, queue_limit=1.5, drift={"": ((20, 1.0), (40, 0.5), (60, 0.5), (61, 1.0))})
        assert [how.places("", second)[0] for second in (0, 20, 30, 40, 60, 61, 999)] == [40, 40, 30, 20, 20, 40, 40]
        assert how.places("flex", 30) == [math.inf]
        began = Counter(
            int((arrived + answer.queue_time) // 10)
            for arrived, answer in self.closed(how, 48, 80.0)
            if answer.status == 200
        )
        rates = [began[ten] / 10 for ten in range(8)]
        assert rates[1] == pytest.approx(40, rel=0.05)
        assert rates[3] == pytest.approx(25, rel=0.1)
        assert rates[5] == pytest.approx(20, rel=0.05)
        assert rates[7] == pytest.approx(40, rel=0.05)

    @given(first=st.floats(0.0, 1e6))
    def test_a_drift_goes_on_from_any_moment(self, first: float) -> None:
        """Whenever the first request came, and however its seconds are rounded, the next look is always later."""
        how = replace(STILL, capacity=1, latency=9.5, queue_limit=60.0, drift={"": ((0, 1.0), (20, 0.5))})
        service, now = Service(how), first
        ask(service, question(), now)
        waiting = queued(service, question("Later?"), now)
        while waiting.answer is None:
            at = service.next()
            assert at is not None
            assert at > now
            now = at
            service.advance(now)
        assert now == pytest.approx(first + 9.5)

    def test_a_tier_drifts_alone(self) -> None:
        """The course of one tier leaves the others' places as they are, and each replica has at least one."""
        how = replace(STILL, capacities={"flex": 9}, replicas=2, drift={"flex": ((0, 0.0),)})
        assert (how.places("flex", 5), how.places("", 5)) == ([1, 1], [math.inf] * 2)
        assert replace(how, drift={}).places("flex", 5) == [5, 4]

    def test_who_gives_up_in_the_queue_is_charged_nothing(self) -> None:
        """His place goes to the next, and his tokens come back."""
        service = Service(replace(STILL, capacity=1, tokens_per_minute=1_000))
        ask(service, question("x" * 40, cap=90))
        impatient, patient = (queued(service, question("x" * 40, cap=90)) for _ in range(2))
        assert service.levels(MODEL, 0.0)["tokens-minute"] == 700
        left = service.leave(impatient, 0.5)
        assert (left.status, left.prompt, left.settled, left.model) == (0, "x" * 40, 0, MODEL)
        assert service.levels(MODEL, 0.5)["tokens-minute"] == pytest.approx(800 + 1_000 / 120)
        assert service.advance(5.0) == [patient]
        assert served(patient).queue_time == 1

    def test_capacity_changes_in_mid_run(self) -> None:
        """More places are used at once, fewer as soon as they are free, and none bounded lets everybody in."""
        service = Service(replace(STILL, capacity=1, queue_limit=100))
        ask(service, question())
        first, *rest = (queued(service, question()) for _ in range(4))
        service.change(0.5, capacity=2)
        assert service.advance(0.5) == [first]
        service.change(0.6, capacity=None)
        assert service.advance(0.6) == rest
        assert service.next() is None
        with pytest.raises(ValueError, match="replicas cannot change"):
            service.change(replicas=2)


class TestCache:
    """What is known of a prompt from the ones before."""

    HOW = replace(STILL, seconds_per_prompt_token=0.001)

    @staticmethod
    def text(name: str, size: int) -> str:
        """A text of so many tokens, unlike those of other names from its first block on."""
        return (name * (size * BYTES_PER_TOKEN))[: size * BYTES_PER_TOKEN]

    @given(common=st.integers(0, 700), first=st.integers(0, 300), second=st.integers(0, 300))
    def test_a_hit_is_the_common_prefix_in_whole_blocks(self, common: int, first: int, second: int) -> None:
        """128 tokens each; what differs in a block loses that block and all after it."""
        shared = self.text("s", common)
        service = Service(self.HOW)
        ask(service, question(shared + self.text("a", first)))
        answer = ask(service, question(shared + self.text("b", second)), 10.0)
        expected = common // BLOCK * BLOCK
        assert answer.cached_tokens == expected
        usage = read(answer).usage
        assert usage.prompt_tokens_details.cached_tokens == expected
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert read(answer).time_info.prompt_time == pytest.approx((usage.prompt_tokens - expected) * 0.001)

    def test_the_chain_is_of_all_that_stands_before(self) -> None:
        """Equal blocks after unequal ones are others; bytes count, not characters; half a block is none."""
        one, two = chain("aaaabbbbcc", 4), chain("aaabbbbbcc", 4)
        assert (len(one), len(two)) == (2, 2)
        assert one[1] != two[1]
        assert len(chain("ä" * 6, 4)) == 3
        assert chain("", 4) == []

    def test_a_prefix_is_there_when_it_has_been_read(self) -> None:
        """The followers of a prompt find what its reading has made, not before."""
        service = Service(self.HOW)
        text = self.text("t", 1_000)
        sizes = [ask(service, question(text), now).cached_tokens for now in (0.0, 0.5, 0.999, 1.0, 2.0)]
        assert sizes == [0, 0, 0, 896, 896]

    def test_it_is_kept_for_its_lifetime_after_the_last_use(self) -> None:
        """Five minutes, and each use begins them anew."""
        service = Service(self.HOW)
        text = self.text("t", 256)
        sizes = [ask(service, question(text), now).cached_tokens for now in (0.0, 299.0, 598.0, 899.0, 1_200.0)]
        assert sizes == [0, 256, 256, 0, 0]

    def test_what_is_least_lately_used_leaves_first(self) -> None:
        """A full cache forgets the oldest prompt, from its end."""
        service = Service(replace(self.HOW, cache_tokens=8 * BLOCK))
        for now, name in enumerate("abab"):
            ask(service, question(self.text(name, 4 * BLOCK)), 10.0 * now)
        ask(service, question(self.text("c", 2 * BLOCK)), 50.0)
        assert ask(service, question(self.text("a", 4 * BLOCK)), 60.0).cached_tokens == 2 * BLOCK
        small = PrefixCache(2 * BLOCK, 300.0)
        blocks = chain(self.text("d", 4 * BLOCK), BLOCK * BYTES_PER_TOKEN)
        small.keep(blocks, 0, 0.0, 0.0)
        assert (len(small), small.known(blocks, 0.0)) == (2, 2)

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.floats(0, 200)), max_size=60))
    def test_it_never_keeps_more_than_its_size_nor_longer_than_its_lifetime(
        self, uses: list[tuple[int, int, float]]
    ) -> None:
        """Whatever is asked: what is known was used within the lifetime, and no more than fits is kept."""
        kept = PrefixCache(5 * BLOCK, 300.0)
        last: dict[bytes, float] = {}
        now = 0.0
        for name, size, pause in uses:
            now += pause
            blocks = chain(self.text(str(name), size * BLOCK), BLOCK * BYTES_PER_TOKEN)
            known = kept.known(blocks, now)
            assert all(now - last[block] < 300 for block in blocks[:known])
            kept.keep(blocks, known, now, now)
            last |= dict.fromkeys(blocks, now)
            assert len(kept) <= 5
            assert kept.known(blocks, now) == min(size, 5)

    def test_replicas_keep_apart_and_keys_go_together(self) -> None:
        """Requests with one key find what the first has left; without keys they are spread over all replicas."""
        service = Service(replace(self.HOW, replicas=4))
        text = self.text("t", 256)
        keyed = [ask(service, question(text, key="k"), 10.0 * number).cached_tokens for number in range(8)]
        assert keyed == [0] + [256] * 7
        other = Service(replace(self.HOW, replicas=4))
        spread = [ask(other, question(text), 10.0 * number).cached_tokens for number in range(8)]
        assert spread == [0] * 4 + [256] * 4
        used = {service._replica_for(question(key=f"key {number}"), "default", 0.0) for number in range(50)}
        assert used == {0, 1, 2, 3}

    def test_a_key_waits_for_its_replica_and_others_go_where_there_is_room(self) -> None:
        """One key for everybody has one replica's places."""
        how = replace(STILL, capacity=8, replicas=4, queue_limit=100)
        service = Service(how)
        came = [service.admit(question(key="k"), b"", 0.0) for _ in range(6)]
        assert [isinstance(one, Waiting) for one in came] == [False] * 2 + [True] * 4
        assert [ask(service, question(str(number)), 0.0).status for number in range(6)] == [200] * 6
        assert [served(waiting).queue_time for waiting in service.advance(9.0)] == [1, 1, 2, 2]

    def test_models_share_nothing_and_short_prompts_are_not_kept(self) -> None:
        """The cache is a model's; less than a block is none; 0 tokens of cache is no cache."""
        service = Service(self.HOW)
        long, short = self.text("t", 200), self.text("u", 127)
        ask(service, question(long))
        assert ask(service, question(long, model="zai-glm-4.7"), 9.0).cached_tokens == 0
        assert [ask(service, question(short), now).cached_tokens for now in (10.0, 20.0)] == [0, 0]
        off = Service(replace(self.HOW, cache_tokens=0))
        assert [ask(off, question(long), now).cached_tokens for now in (0.0, 9.0)] == [0, 0]


class TestRequests:
    """What requests say about tiers, queues, caches and predictions reaches the model."""

    @staticmethod
    def body(prompt: str, **parameters: object) -> bytes:
        """A chat request on the wire."""
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": "How is it?"}]
        return msgspec.json.encode({"model": MODEL, "messages": messages, "max_completion_tokens": 9, **parameters})

    def receive(self, service: Service, body: bytes, now: float = 0.0, threshold: int | None = None) -> Answer:
        """What becomes of it."""
        headers = {} if threshold is None else {"queue_threshold": str(threshold)}
        answer = service.receive("POST", "/v1/chat/completions", "Bearer key", body, now, headers)
        assert isinstance(answer, Answer)
        return answer

    def test_tier_threshold_and_key(self) -> None:
        """service_tier, prompt_cache_key and the header queue_threshold do what they are for."""
        service = Service(replace(STILL, capacities={"flex": 4}, replicas=4, queue_limit=100))
        text = "long " * 1_000
        first = self.receive(service, self.body(text, service_tier="flex", prompt_cache_key="k"), 0.0, 50)
        assert (first.tier, first.cached_tokens) == ("flex", 0)
        full = self.receive(service, self.body(text, service_tier="flex", prompt_cache_key="k"), 0.1, 500)
        assert code(full) == "queue_exceeded"
        again = self.receive(service, self.body(text, service_tier="auto", prompt_cache_key="k"), 2.0, 50)
        assert (again.tier, again.cached_tokens) == ("priority", tokens(text) // BLOCK * BLOCK)
        assert read(again).service_tier_used == "priority"
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        other = self.receive(service, self.body(text, prompt_cache_key="k", tools=tools, tool_choice="none"), 4.0)
        assert other.cached_tokens == 0

    def test_what_was_predicted_is_said_sooner(self) -> None:
        """Accepted tokens cost a part of their time, rejected ones count as completion and take a little."""
        how = replace(STILL, latency=0.0, seconds_per_completion_token=1.0)
        prediction = "The quick brown fox jumps over the lazy dog. " * 20
        parameters = {"max_completion_tokens": 5_000, "prediction": {"type": "content", "content": prediction}}
        answer = self.receive(Service(how), self.body("Correct it.", **parameters))
        usage = read(answer).usage
        details = usage.completion_tokens_details
        accepted, rejected = details.accepted_prediction_tokens, details.rejected_prediction_tokens
        assert isinstance(accepted, int)
        assert isinstance(rejected, int)
        assert accepted > 0
        assert accepted + rejected == tokens(prediction)
        assert answer.delay == pytest.approx(usage.completion_tokens - 0.75 * accepted - 0.9 * rejected)

    def test_reasoning_takes_tokens_and_time(self) -> None:
        """More effort is more reasoning tokens, which are completion tokens."""
        how = replace(STILL, latency=0.0, seconds_per_completion_token=1.0)
        sizes = []
        for effort in ("low", "medium", "high"):
            parameters = {"reasoning_effort": effort, "max_completion_tokens": 5_000}
            usage = read(answer := self.receive(Service(how), self.body("Think.", **parameters))).usage
            assert answer.delay == usage.completion_tokens
            sizes.append(usage.completion_tokens_details.reasoning_tokens)
        assert 0 < sizes[0] < sizes[1] < sizes[2]


class TestSettings:
    """What can be set, and what cannot."""

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: parse_limit("requests-day"), "a limit is .*BUCKET=N, such as flex:tokens-minute=9000000"),
            (lambda: parse_limit("requests-week=5"), "unknown limit 'requests-week'; known are requests-day,"),
            (lambda: parse_capacity("slow=5"), "TIER=N, such as flex=50, not 'slow=5'; known are priority, default"),
            (lambda: parse_drift(["600"]), r"a drift is \[TIER:\]SECONDS=SHARE, such as 600=0.5, not '600'"),
            (lambda: Settings(limits={"requests-day": 0}), "the limit requests-day must be at least 1"),
            (lambda: Settings(limits={"day": 1}), "unknown limit 'day'"),
            (lambda: Settings(capacities={"slow": 1}), "unknown tier 'slow'"),
            (lambda: Settings(capacity=3, replicas=4), "capacity must be at least 1 for each of the 4 replicas, not 3"),
            (lambda: Settings(capacities={"flex": 0}), "the capacity of flex must be at least 1"),
            (lambda: Settings(replicas=0), "replicas must be at least 1"),
            (lambda: Settings(drift={"": ((0, 1),)}), "drift of the whole: there is no capacity that could drift"),
            (lambda: Settings(capacity=1, drift={"": ((5, 1), (5, 2))}), "the seconds must go up"),
            (lambda: Settings(capacity=1, drift={"": ((5, math.nan),)}), "must be 0 or more"),
            (lambda: Settings(others=1.5), "others must be a share between 0 and 1, not 1.5"),
            (lambda: Settings(flex_limits=0), "flex_limits must be above 0, not 0"),
            (
                lambda: Settings(rate_headers="some"),  # type: ignore[arg-type]
                "rate_headers must be one of all, answers, none, not 'some'",
            ),
            (lambda: Settings(cache_tokens=-1), "cache_tokens must be 0 or more"),
            (lambda: Settings(cache_lifetime=-1), "cache_lifetime must be 0 or more seconds"),
        ],
    )
    def test_what_cannot_be_is_refused_in_words(self, make: Callable[[], object], words: str) -> None:
        """The message names the setting and what is allowed."""
        with pytest.raises(ValueError, match=words):
            make()

    def test_flags_say_it_in_words(self) -> None:
        """Limits, capacities and drifts as they are written on a command line."""
        assert parse_limit("org/model:flex:uncached-tokens-minute=7") == ("org/model:flex:uncached-tokens-minute", 7)
        assert parse_limit("requests-day=0") == ("requests-day", None)
        assert parse_capacity("flex=50") == ("flex", 50)
        assert parse_drift(["600=1", "flex:5=0.5", "0=2"]) == {"": ((0, 2), (600, 1)), "flex": ((5, 0.5),)}


def play(how: Settings, clients: int, until: float, draw: Random) -> list[Entry]:
    """The book of so many clients who ask in virtual time, after a pause where they were refused."""

    async def main() -> list[Entry]:
        loop = asyncio.get_running_loop()
        front = Front(how, loop.time, 0.0, record=True)

        async def deliver(answer: Answer, headers: dict[str, str]) -> int:
            return answer.status

        async def client(name: int) -> None:
            for number in itertools.count():
                if loop.time() >= until:
                    return
                tier = draw.choice(["flex", "default"])
                text = f"Question {number} of {name}, which is a long one. " * draw.randint(1, 30)
                request = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": text}],
                    "max_completion_tokens": draw.choice([50, 500]),
                    "service_tier": tier,
                }
                body = msgspec.json.encode(request)
                try:
                    async with asyncio.timeout(30 if draw.random() < 0.9 else 0.3):
                        status = await front.ask("POST", "/v1/chat/completions", "Bearer key", body, deliver, {})
                except TimeoutError:
                    continue
                if status != 200:
                    await asyncio.sleep(draw.uniform(1, 5))

        async with asyncio.TaskGroup() as group:
            for name in range(clients):
                group.create_task(client(name))
        assert front.in_flight == 0
        assert front.service.next() is None
        return front.book

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def test_who_gives_up_on_a_stream_pays_for_it_once() -> None:
    """Whether before it begins or in the middle, its charge is settled to what it took."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        how = replace(STILL, tokens_per_minute=1_000, seconds_per_completion_token=0.1, others=1.0)
        front = Front(how, loop.time, 0.0, record=True)
        messages = [{"role": "user", "content": "Tell me all of it."}]
        body = msgspec.json.encode({"model": MODEL, "messages": messages, "max_completion_tokens": 100, "stream": True})

        async def deliver(answer: Answer, headers: dict[str, str]) -> None:
            await asyncio.sleep(answer.pieces[-1].at)

        for patience in (0.5, 1.5, 60.0):
            level = front.service.levels(MODEL, loop.time())["tokens-minute"]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await front.ask("POST", "/v1/chat/completions", "Bearer key", body, deliver, {})
            used = level - front.service.levels(MODEL, loop.time())["tokens-minute"]
            entry = front.book[-1]
            assert 0 < used == entry.settled == entry.prompt_tokens + entry.completion_tokens < entry.charged

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


@settings(max_examples=1, deadline=None)
@given(st.integers(0, 2**32))
def test_an_hour_keeps_all_limits(seed: int) -> None:
    """Clients without any sense: what was settled never passes what the buckets had, nor the served the places."""
    how = Settings(
        limits={"requests-minute": 200, "uncached-tokens-minute": 30_000},
        uncached_tokens_per_minute=30_000,
        flex_limits=1.0,
        latency=1.0,
        capacity=6,
        queue_limit=2.0,
        faults={"500": 0.01, "reset": 0.01},
        seed=seed,
    )
    book = play(how, 12, 3_600.0, Random(seed))
    early = [entry for entry in play(how, 12, 200.0, Random(seed)) if entry.arrived < 100]
    assert early == [entry for entry in play(how, 12, 200.0, Random(seed)) if entry.arrived < 100]
    assert len(book) > 5_000
    assert {entry.status for entry in book} >= {200, 429, 500, None}
    settled = sum(entry.settled_uncached for entry in book)
    for tier in {entry.tier for entry in book}:
        used = sum(entry.settled_uncached for entry in book if entry.tier == tier)
        admitted = sum(entry.charged > 0 for entry in book if entry.tier == tier)
        assert used <= 30_000 * 61.1
        assert admitted <= 200 * 61.1
    assert settled > 0
    moments = sorted(
        (moment, change)
        for entry in book
        if entry.served_at is not None and entry.answered_at is not None
        for moment, change in ((entry.served_at, 1), (entry.answered_at - 1e-6, -1))
    )
    assert max(itertools.accumulate(change for _, change in moments)) <= 6
