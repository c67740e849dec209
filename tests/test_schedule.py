"""When a request may go: quotas kept and used, congestion met, outages waited out, nothing lost; in virtual time."""

import heapq
import itertools
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.dialects import named
from batcher.records import Answer, Choice, Failure, Kind, Limit, Reply, Request, ServiceTimes, Timing, Turn, Usage
from batcher.retry import decide
from batcher.schedule import Decision, Dispatcher, Pace, Ticket
from batcher.schedule.capacity import Breaker, Window
from batcher.schedule.learning import Learned
from batcher.schedule.quota import Bucket
from batcher.simulator import Settings
from batcher.simulator.model import Answer as Decided
from batcher.simulator.model import Service

MANY = 100_000


def request(row: int, prompt: int = 100, cap: int = 100, model: str = "m") -> Request:
    """A request by its size in tokens; a cap of 0 is none."""
    return Request(unit=0, row=row, model=model, body=b"", prompt_tokens=prompt, output_tokens=cap, hash=b"")


def turns(*requests: Request, ready: float = 0.0) -> list[Turn]:
    """The requests, on their way."""
    return [Turn(each, ready) for each in requests]


def usage(prompt: int, completion: int, cached: int = 0) -> Usage:
    """Tokens as a service counts them."""
    return Usage(prompt, completion, prompt + completion, cached)


def answer(used: Usage, queue_time: float | None = None) -> Answer:
    """A good answer that used so much."""
    return Answer((Choice(0, "yes", None, "stop", None),), used, ServiceTimes(queue_time))


class Came(NamedTuple):
    """What came of a request, and what the headers said."""

    outcome: Answer | Failure
    limits: tuple[Limit, ...] = ()


class Serving(Protocol):
    """A service in virtual time: how long a request takes, and what is decided as its answer leaves."""

    def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
        """Seconds until the answer, and what it will be."""


class World:
    """A dispatcher, its workers and a service, run by a heap of events: hours pass in milliseconds."""

    def __init__(self, dispatcher: Dispatcher, service: Serving, rows: Sequence[Turn], max_attempts: int = 6) -> None:
        self.dispatcher, self.service, self.max_attempts = dispatcher, service, max_attempts
        self.now = 0.0
        self.sent: list[tuple[float, Ticket]] = []
        self.answered: list[tuple[float, Ticket, Answer]] = []
        self.refused: list[tuple[float, Ticket, Failure]] = []
        self.failed: set[int] = set()
        self.peak = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._called = 0.0
        dispatcher.offer(rows)

    def run(self, until: float = 1e9) -> "World":
        """Let time pass until nothing happens any more, or so long."""
        self._grant()
        while self._events and self._events[0][0] <= until:
            self.now, _, act = heapq.heappop(self._events)
            act()
        return self

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _grant(self) -> None:
        while isinstance(granted := self.dispatcher.take(self.now), Ticket):
            self.sent.append((self.now, granted))
            self.peak = max(self.peak, self.dispatcher.in_flight)
            assert self.dispatcher.in_flight <= int(self.dispatcher.window.size)
            delay, leave = self.service.receive(granted, self.now)
            self._at(self.now + delay, lambda ticket=granted, leave=leave: self._land(ticket, leave(self.now)))  # type: ignore[misc]
        if granted is not None:
            assert granted > self.now
            if not self.now < self._called <= granted:
                self._called = granted
                self._at(granted, self._grant)

    def _land(self, ticket: Ticket, came: Came) -> None:
        turn, outcome = ticket.turn, came.outcome
        if isinstance(outcome, Answer):
            self.dispatcher.answered(ticket, outcome.usage, outcome.times.queue_time, self.now)
            self.dispatcher.limits(came.limits, ticket, self.now)
            self.answered.append((self.now, ticket, outcome))
        else:
            self.dispatcher.failed(ticket, outcome, self.now)
            self.refused.append((self.now, ticket, outcome))
            tried = {**(turn.tried or {}), outcome.kind: (turn.tried or {}).get(outcome.kind, 0) + 1}
            again = decide(outcome, tried, self.max_attempts, 2)
            if again is None:
                self.failed.add(turn.request.row)
            else:
                more = Turn(turn.request, self.now + again.wait, turn.attempt + 1, tried)
                self.dispatcher.again(more, again.cost)
        self.dispatcher.landed(1)
        self._grant()

    def check_nothing_is_lost(self, rows: int) -> None:
        """Every row was answered once or has failed, every attempt of it was granted once, and all is at rest."""
        assert self.dispatcher.idle
        answers = Counter(ticket.turn.request.row for _, ticket, _ in self.answered)
        assert set(answers) | self.failed == set(range(rows))
        assert not set(answers) & self.failed
        assert set(answers.values()) <= {1}
        grants = Counter((ticket.turn.request.row, ticket.turn.attempt) for _, ticket in self.sent)
        assert set(grants.values()) == {1}
        assert len(self.sent) == len(self.answered) + len(self.refused)

    def check_windows(self, ceiling: float, weigh: Callable[[Ticket], float], slack: float = 0.0) -> None:
        """What was sent in any minute is below the ceiling."""
        times = [when for when, _ in self.sent]
        sums = [0.0, *itertools.accumulate(weigh(ticket) for _, ticket in self.sent)]
        for first, start in enumerate(times):
            after = bisect_left(times, start + 60.0 - 1e-9)
            assert sums[after] - sums[first] <= ceiling * (1 + 1e-9) + slack


class Steady:
    """A service that answers everything after some seconds, with the tokens that were reckoned."""

    def __init__(self, latency: Callable[[], float] = lambda: 1.0, share: float = 1.0) -> None:
        self.latency, self.share = latency, share

    def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
        """An answer that uses this share of its cap."""
        asked = ticket.turn.request
        used = usage(asked.prompt_tokens, int(asked.output_tokens * self.share))
        return self.latency(), lambda _: Came(answer(used))


class Scripted:
    """A service that fails each attempt of a row as a script says, and answers when the script is over."""

    def __init__(self, script: Callable[[Turn, float], Failure | None], latency: float = 1.0) -> None:
        self.script, self.latency = script, latency

    def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
        """What the script has for this attempt as it arrives."""
        failure = self.script(ticket.turn, now)
        asked = ticket.turn.request
        return self.latency, lambda _: Came(failure or answer(usage(asked.prompt_tokens, asked.output_tokens)))


class Simulated:
    """The simulated service, read through the dialect: buckets that refill steadily, headers, refusals."""

    def __init__(self, how: Settings, prompt: str, cap: int, headers: bool = True) -> None:
        self.service, self.headers = Service(how), headers
        self.dialect = named("cerebras")
        messages = [{"role": "user", "content": prompt}]
        self.body: dict[str, object] = {
            "model": "gpt-oss-120b",
            "messages": messages,
            "max_completion_tokens": cap,
        }

    def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
        """What the service decides as the request arrives; its headers are written as the answer leaves."""
        body = msgspec.json.encode({**self.body, "user": str(ticket.turn.request.row)})
        decided = self.service.receive("POST", "/v1/chat/completions", "Bearer key", body, now)
        assert isinstance(decided, Decided)  # there is no capacity for which it could have to wait

        def leave(then: float) -> Came:
            told = self.service.settle(decided, then)
            headers: Mapping[str, str] = {**told, "content-type": "application/json"} if self.headers else {}
            reply = Reply(decided.status, headers, decided.body, Timing(0, then - now))
            outcome = self.dialect.read(reply) if decided.status == 200 else self.dialect.refusal(reply)
            return Came(outcome, self.dialect.limits(headers) if isinstance(outcome, Answer) else ())

        return decided.delay, leave


def dispatcher(ceiling: int = MANY, **pace: float | None) -> Dispatcher:
    """A dispatcher at time 0."""
    return Dispatcher(Pace(**pace), ceiling, 0.0)  # type: ignore[arg-type]


def taken(made: Dispatcher, now: float, most: int = MANY) -> list[Ticket]:
    """All that may go now, up to so many."""
    tickets: list[Ticket] = []
    while len(tickets) < most and isinstance(granted := made.take(now), Ticket):
        tickets.append(granted)
    return tickets


def refused(wait: float | None = None, *limits: Limit, kind: Kind = Kind.RATE_LIMITED) -> Failure:
    """A refusal for want of quota."""
    return Failure(kind, "too many", retry_after=wait, limits=limits)


# Quota: the job's own ceilings


@given(
    requests=st.integers(min_value=1, max_value=5_000),
    in_flight=st.integers(min_value=1, max_value=300),
    latency=st.floats(min_value=0.001, max_value=30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_the_ceiling_of_requests_is_kept_in_every_minute(
    requests: int, in_flight: int, latency: float, seed: int
) -> None:
    """Whatever the latency and the window, no minute has more requests than the job allows."""
    rng = random.Random(seed)
    rows = min(3 * requests, 400)
    world = World(
        dispatcher(max_in_flight=in_flight, requests=requests),
        Steady(lambda: latency * rng.uniform(0.5, 1.5)),
        turns(*(request(row) for row in range(rows))),
    ).run()
    world.check_windows(requests, lambda _: 1.0)
    world.check_nothing_is_lost(rows)


@given(
    tokens=st.integers(min_value=1_000, max_value=2_000_000),
    sizes=st.lists(st.tuples(st.integers(1, 3_000), st.integers(1, 3_000)), min_size=40, max_size=90),
    latency=st.floats(min_value=0.001, max_value=30),
)
@settings(max_examples=30, deadline=None)
def test_the_ceiling_of_tokens_is_kept_in_every_minute(
    tokens: int, sizes: list[tuple[int, int]], latency: float
) -> None:
    """No minute has more tokens than the job allows, but for the one request that is larger than a second's worth."""
    rows = [request(row, *size) for row, size in enumerate(sizes)]
    made = dispatcher(max_in_flight=200, tokens=tokens)
    world = World(made, Steady(lambda: latency), turns(*rows)).run()
    largest = max(prompt + cap for prompt, cap in sizes)
    world.check_windows(tokens, lambda ticket: ticket.tokens, slack=max(0.0, largest - tokens / 61))
    world.check_nothing_is_lost(len(rows))


def test_what_was_not_used_is_given_back() -> None:
    """Tokens that a cap reserved and the answer did not use are there for others: the rate is met by what is used."""
    rows = [request(row, prompt=100, cap=1_900) for row in range(7_000)]
    made = dispatcher(max_in_flight=500, tokens=60_000)
    world = World(made, Steady(share=0.0), turns(*rows)).run(until=600)
    used = 100 * len(world.answered)
    assert 0.9 * 600_000 <= used <= 600_000 + 60_000


def test_uncached_tokens_have_their_own_ceiling() -> None:
    """What comes from the cache is not counted by the uncached ceiling, once answers have told how much does."""

    class Cached(Steady):
        def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
            return 1.0, lambda _: Came(answer(usage(900, 100, cached=800)))

    rows = [request(row, prompt=900, cap=100) for row in range(5_000)]
    world = World(dispatcher(max_in_flight=200, uncached_tokens=60_000), Cached(), turns(*rows)).run(until=900)
    assert (world.sent[0][1].uncached, round(world.sent[-1][1].uncached)) == (1_000, 200)
    late = [when for when, _, _ in world.answered if when >= 300]
    assert 0.9 * 60_000 <= 200 * len(late) / 10 <= 1.1 * 60_000
    plain = World(dispatcher(max_in_flight=200, tokens=60_000), Cached(), turns(*rows)).run(until=900)
    assert len(plain.answered) < len(world.answered) / 3


def test_both_ceilings_hold_together() -> None:
    """Of two ceilings the one that binds is named, and both are kept."""
    rows = [request(row, prompt=100, cap=100) for row in range(1_500)]
    made = dispatcher(max_in_flight=400, requests=600, tokens=60_000)
    world = World(made, Steady(), turns(*rows)).run(until=120)
    world.check_windows(600, lambda _: 1.0)
    world.check_windows(60_000, lambda ticket: ticket.tokens)
    assert made.pressure().binds == "schedule.tokens_per_minute"
    assert len(world.sent) >= 0.95 * 600


def test_an_estimate_learns() -> None:
    """Where requests have no cap, what answers take is learned from answers, and so is the size of a token."""
    rows = [request(row, prompt=100, cap=0) for row in range(3_000)]

    class Terse(Steady):
        def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
            return 1.0, lambda _: Came(answer(usage(50, 10)))

    world = World(dispatcher(max_in_flight=300), Terse(), turns(*rows)).run()
    assert world.sent[0][1].tokens == 600
    assert 55 <= world.sent[-1][1].tokens <= 70


# Quota: the service's buckets


@pytest.mark.parametrize("configured", [False, True], ids=["from headers", "configured"])
@pytest.mark.parametrize(
    ("prompt", "cap"), [(80, 64), (8_000, 64), (6_000, 2_048)], ids=["requests", "tokens", "tokens reserved"]
)
def test_the_quota_is_used_without_a_storm(prompt: int, cap: int, configured: bool) -> None:
    """Of 1,000 requests and 1M tokens a minute at least 95 % are used, and next to nothing is refused."""
    pace = Pace(requests=1_000, tokens=1_000_000) if configured else Pace()
    service = Simulated(Settings(), "x" * prompt, cap)
    rows = [request(row, prompt=prompt // 4, cap=cap) for row in range(6_000)]
    world = World(Dispatcher(pace, 1_024, 0.0), service, turns(*rows)).run(until=135.0)
    steady = [outcome for when, _, outcome in world.answered if when >= 60.0]
    tokens = sum(outcome.usage.total_tokens or 0 for outcome in steady)
    assert max(len(steady) / 1_250, tokens / 1_250_000) >= 0.95
    assert len(world.refused) <= 0.002 * len(world.sent)


def test_a_configured_rate_needs_no_headers() -> None:
    """A job that states the account's rates uses them where the service tells nothing."""
    service = Simulated(Settings(), "x" * 80, 64, headers=False)
    rows = [request(row, prompt=20, cap=64) for row in range(6_000)]
    world = World(Dispatcher(Pace(requests=1_000), 1_024, 0.0), service, turns(*rows)).run(until=90.0)
    assert len(world.answered) >= 0.95 * 1_500
    assert not world.refused


def test_a_wrong_rate_of_the_job_is_corrected() -> None:
    """Who configures three times what the account allows is held back by the headers, not by refusals."""
    service = Simulated(Settings(), "x" * 80, 64)
    rows = [request(row, prompt=20, cap=64) for row in range(6_000)]
    world = World(Dispatcher(Pace(requests=3_000), 1_024, 0.0), service, turns(*rows)).run(until=120.0)
    assert len(world.answered) >= 0.95 * 2_000
    assert len(world.refused) <= 0.002 * len(world.sent)


def test_a_service_that_says_nothing_is_not_stormed() -> None:
    """Without rates and headers refusals alone slow the rows, all together, and everything is answered in the end."""
    service = Simulated(Settings(requests_per_minute=300), "x" * 80, 64, headers=False)
    rows = 600
    world = World(dispatcher(), service, turns(*(request(row, 20, 64) for row in range(rows)))).run()
    world.check_nothing_is_lost(rows)
    assert not world.failed
    assert world.now <= 1.5 * 60 * rows / 300


def minute(resource: str, limit: float | None, remaining: float | None, reset: float | None = None) -> Limit:
    """What headers say of a bucket of a minute."""
    return Limit(resource, 60.0, limit, remaining, reset)


def test_uncached_tokens_are_a_bucket_of_their_own() -> None:
    """Its level goes by what is not expected from the cache; a refusal that names it closes it, under its own name."""
    made = dispatcher(max_in_flight=1_000)
    made.offer(turns(*(request(row, 100, 50) for row in range(1_000))))
    [first] = taken(made, 0.0, most=1)
    made.limits([minute("tokens", 90_000, 90_000), minute("uncached_tokens", 6_000, 600)], first, 1.0)
    assert len(taken(made, 1.0)) == 4
    assert made.pressure().binds == "uncached tokens per minute"
    refused = Failure(Kind.RATE_LIMITED, "m", retry_after=9.0, limits=(minute("uncached_tokens", None, 0.0),))
    made.failed(first, refused, 2.0)
    assert made.take(2.0) == pytest.approx(11.0)
    assert set(made.used(2.0)) == {"tokens per minute", "uncached tokens per minute"}


def test_headers_correct_the_level() -> None:
    """After a header only what it leaves goes, and then as much as refills."""
    made = dispatcher(max_in_flight=1_000)
    made.offer(turns(*(request(row) for row in range(1_000))))
    first = taken(made, 0.0, most=5)
    made.limits([minute("requests", 600, 3)], first[4], 1.0)
    assert len(taken(made, 1.0)) == 3
    until = made.take(1.0)
    assert until == pytest.approx(1.1)
    assert made.pressure().binds == "requests per minute"
    assert len(taken(made, 2.0)) == 10


def test_headers_are_read_with_what_went_since() -> None:
    """A header knows nothing of the requests that went after the one it was written for."""
    made = dispatcher(max_in_flight=1_000)
    made.offer(turns(*(request(row) for row in range(1_000))))
    first = taken(made, 0.0, most=50)
    made.limits([minute("requests", 600, 60)], first[9], 1.0)
    assert len(taken(made, 1.0)) == 60 - 40


def test_a_late_header_does_not_stop_the_rest() -> None:
    """The header of an answer that took long is passed over once a younger request's has been read."""
    made = dispatcher(max_in_flight=2_000)
    made.offer(turns(*(request(row) for row in range(2_000))))
    slow = taken(made, 0.0, most=1)[0]
    quick = taken(made, 100.0, most=900)
    made.limits([minute("requests", 1_000, 900)], quick[-1], 101.0)
    made.limits([minute("requests", 1_000, 900)], slow, 101.0)
    assert len(taken(made, 101.0)) == 900


def test_a_fuller_bucket_is_believed_by_and_by() -> None:
    """A header that promises more than was reckoned is believed in part each time."""
    made = dispatcher(max_in_flight=5_000)
    made.offer(turns(*(request(row) for row in range(5_000))))
    ticket = taken(made, 0.0, most=1)[0]
    made.limits([minute("requests", 1_000, 0)], ticket, 0.0)
    made.limits([minute("requests", 1_000, 500)], ticket, 0.0)
    assert len(taken(made, 0.0)) == 100


def test_a_changed_limit_is_followed() -> None:
    """A limit that is halved in mid-run is taken over at once."""
    made = dispatcher(max_in_flight=5_000)
    made.offer(turns(*(request(row) for row in range(5_000))))
    ticket = taken(made, 0.0, most=1)[0]
    made.limits([minute("requests", 600, 0)], ticket, 0.0)
    made.limits([minute("requests", 300, 0)], ticket, 0.0)
    assert len(taken(made, 10.0)) == 50


@given(
    st.lists(
        st.builds(
            Limit,
            st.sampled_from(["requests", "tokens"]),
            st.sampled_from([1.0, 60.0, 3600.0, 86400.0]),
            st.none() | st.floats(0, 1e15),
            st.none() | st.floats(0, 1e15),
            st.none() | st.floats(0, 2e6),
        ),
        max_size=10,
    ),
    st.none() | st.floats(0, 1e7),
)
@settings(max_examples=100, deadline=None)
def test_no_header_stops_a_run_for_good(limits: list[Limit], wait: float | None) -> None:
    """Whatever headers and refusals say, there is a moment at which something may go, within days."""
    made = dispatcher(max_in_flight=10)
    made.offer(turns(*(request(row) for row in range(30))))
    now = 0.0
    for each in limits:
        if not (tickets := taken(made, now, most=1)):
            break
        made.failed(tickets[0], refused(wait, each), now)
        made.landed(1)
        now += 0.5
    for _ in range(50):
        granted = made.take(now)
        if isinstance(granted, Ticket):
            return
        assert granted is not None
        assert granted > now
        now = granted
    raise AssertionError("nothing goes")


@pytest.mark.parametrize(
    ("window", "reset", "wait", "until"),
    [
        (3600.0, 900.0, 900.0, 901.0),  # a bucket of an hour: at its reset
        (86400.0, 5.0, 5.0, 6.0),
        (60.0, 0.5, 0.5, 1.5),  # a bucket of a minute refills steadily: a second first, its reset at most
        (60.0, 40.0, 40.0, 2.0),
        (60.0, None, None, 2.0),
        (60.0, 40.0, 12.0, 13.0),  # Retry-After is the service's own word
        (60.0, 5.0, 12.0, 13.0),
        (60.0, None, 0.5, 1.5),
        (3600.0, 900.0, 30.0, 31.0),
    ],
)
def test_a_refusal_that_names_a_bucket_blocks_all_until_its_refill(
    window: float, reset: float | None, wait: float | None, until: float
) -> None:
    """One refused request stops all, once, until the named bucket has something again; nobody else has to ask."""
    made = dispatcher(max_in_flight=50)
    made.offer(turns(*(request(row) for row in range(100))))
    ticket = taken(made, 0.0, most=1)[0]
    made.failed(ticket, refused(wait, Limit("tokens", window, 60_000, 0, reset)), 1.0)
    made.landed(1)
    assert made.take(1.0) == pytest.approx(until)
    assert made.take(until - 0.1) == pytest.approx(until)
    assert made.pressure().binds.startswith("tokens per ")
    assert taken(made, until)


def test_a_bucket_that_stays_empty_is_asked_ever_more_seldom() -> None:
    """Refused again and again, a bucket is waited for twice as long each time, up to its reset."""
    made = dispatcher(max_in_flight=50)
    made.offer(turns(*(request(row) for row in range(100))))
    now, waits = 0.0, []
    for _ in range(7):
        ticket = taken(made, now, most=1)[0]
        made.failed(ticket, refused(20.0, minute("requests", None, 0, reset=20.0)), now)
        made.landed(1)
        until = made.take(now)
        assert isinstance(until, float)
        waits.append(until - now)
        now = until
    assert waits == pytest.approx([1, 2, 4, 8, 16, 20, 20])


def test_a_refusal_that_names_nothing_slows_all() -> None:
    """Without a word about the bucket or the wait, all rows wait, twice as long each time, until one is answered."""
    made = dispatcher(max_in_flight=50)
    made.offer(turns(*(request(row) for row in range(100))))
    now, waits = 0.0, []
    for _ in range(8):
        ticket = taken(made, now, most=1)[0]
        made.failed(ticket, refused(), now)
        made.landed(1)
        until = made.take(now)
        assert isinstance(until, float)
        waits.append(until - now)
        now = until
    assert waits == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    ticket = taken(made, now, most=1)[0]
    made.answered(ticket, usage(1, 1), None, now)
    ticket = taken(made, now, most=1)[0]
    made.failed(ticket, refused(), now)
    assert made.take(now) == pytest.approx(now + 1)


def test_what_was_refused_together_counts_once() -> None:
    """A hundred refusals of what was in flight together make all wait for one second, not for thirty."""
    made = dispatcher(max_in_flight=100)
    made.offer(turns(*(request(row) for row in range(300))))
    tickets = taken(made, 0.0)
    for number, ticket in enumerate(tickets):
        made.failed(ticket, refused(), 1.0 + number / 1_000)
    made.landed(100)
    assert made.take(1.1) == pytest.approx(2.0)


def test_a_quota_never_cuts_the_window() -> None:
    """Refusals for want of quota say nothing about what the service can digest."""
    made = dispatcher(max_in_flight=64)
    made.offer(turns(*(request(row) for row in range(640))))
    for now in range(0, 100, 10):
        for ticket in taken(made, float(now)):
            made.failed(ticket, refused(1.0), now + 1.0)
            made.landed(1)
    assert made.window.size == 64


def test_what_was_refused_was_not_used() -> None:
    """A refused request gives back what it was charged."""
    made = dispatcher(max_in_flight=100, requests=6_100)
    made.offer(turns(*(request(row) for row in range(300))))
    tickets = taken(made, 0.0)
    assert len(tickets) == 100
    for ticket in tickets:
        made.failed(ticket, refused(0.0), 0.0)
    made.landed(100)
    assert len(taken(made, 0.001)) == 100


def test_a_day_quota_that_is_back_soon_is_waited_for() -> None:
    """At a day's reset one request goes to see, and its header opens the way for the others."""
    made = dispatcher(max_in_flight=10)
    made.offer(turns(*(request(row) for row in range(20))))
    ticket = taken(made, 0.0, most=1)[0]
    day = Limit("requests", 86400.0, 100, 0, 5.0)
    made.failed(ticket, refused(5.0, day, kind=Kind.DAY_QUOTA), 1.0)
    made.landed(1)
    assert made.take(1.0) == pytest.approx(6.0)
    assert made.pressure().binds == "requests per day"
    tickets = taken(made, 6.0)
    assert len(tickets) == 1
    made.limits([day._replace(remaining=99)], tickets[0], 7.0)
    assert len(taken(made, 7.0)) == 9


def test_what_is_reserved_without_a_cap_is_learned() -> None:
    """A service that reserves far more than answers take, for requests without a cap, soon refuses no more."""
    service = Simulated(Settings(latency=1.0), "x" * 800, 1)
    del service.body["max_completion_tokens"]
    rows = [request(row, prompt=200, cap=0) for row in range(6_000)]
    world = World(dispatcher(), service, turns(*rows)).run(until=120.0)
    steady = [when for when, _, _ in world.answered if when >= 60.0]
    assert len(steady) >= 0.95 * 1_000
    assert sum(when >= 60.0 for when, _, _ in world.refused) <= 0.002 * len(steady)


def test_a_large_request_is_not_starved() -> None:
    """A request that needs half a minute's tokens goes as soon as they have gathered, whatever else would fit."""
    rows = [request(row, 50, 50) for row in range(3_000)]
    rows[300] = request(300, 10_000, 20_000)
    made = dispatcher(max_in_flight=100, tokens=60_000)
    made.limits(
        [minute("tokens", 60_000, 60_000)], Ticket(turns(rows[0])[0], 0.0, 0.0, 0.0, 0.0, False, (0.0, 0.0, 0.0)), 0.0
    )
    world = World(made, Steady(), turns(*rows)).run()
    order = [ticket.turn.request.row for _, ticket in world.sent]
    assert order == list(range(3_000))
    before, after = (next(when for when, ticket in world.sent if ticket.turn.request.row == row) for row in (299, 300))
    assert after - before <= 61
    world.check_nothing_is_lost(3_000)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["charge", "settle", "give back", "block", "tell"]), st.floats(0, 2), st.floats(0, 5)
        ),
        max_size=60,
    ),
    st.floats(0.1, 100),
    st.floats(1, 500),
)
@settings(max_examples=100, deadline=None)
def test_a_bucket_never_lets_more_go_than_it_holds_and_gets(
    events: list[tuple[str, float, float]], rate: float, capacity: float
) -> None:
    """In any order of events: no more goes than it held, what flowed in and came back, and one that is larger."""
    bucket, now, went, back, promises = Bucket("b", rate, capacity, 0.0, which=1), 0.0, 0.0, 0.0, 0
    out: list[float] = []
    largest = 0.0
    for act, amount, seconds in events:
        now += seconds
        cost = amount * capacity
        if act == "charge" and bucket.ready(cost, now) <= now:
            promises += bucket.promised
            bucket.charge(cost, now)
            out.append(cost)
            went, largest = went + cost, max(largest, cost)
        elif act in ("settle", "give back") and out:
            unused = out.pop() * min(amount, 1.0)
            back += unused
            bucket.settle(unused, now) if act == "settle" else bucket.give_back(unused, now)
        elif act == "block":
            bucket.block(now + seconds)
        elif act == "tell":
            told = min(cost, max(0.0, bucket.level))
            bucket.correct(Limit("tokens", capacity / rate, capacity, told, None), now, 0.0, now)
    assert went <= (capacity + rate * now + back + largest * (1 + promises)) * (1 + 1e-6)


@given(st.floats(0.05, 50), st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 200)), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_a_learned_rate_never_stays_above_what_refusals_show(
    before: float, refusals: list[tuple[float, float]]
) -> None:
    """After a refusal it is at most what went since the one before allows, or half of what it was."""
    learned, now, spent = Learned(before, 0.0, 60.0), 0.0, 0.0
    for seconds, went in refusals:
        base = learned.base or 0.0
        now, spent = now + seconds, spent + went
        assert (learned.rate(now) or 0.0) >= base
        learned.refused(1.0, spent, now)
        assert learned.base is not None
        assert learned.base <= max((went + 1.0) / seconds, base / 2) * (1 + 1e-9)
        assert learned.base >= base / 2 or learned.base >= went / (seconds + 60.0)


@pytest.mark.parametrize("limit", [30, 240])
@pytest.mark.parametrize("pace", [Pace(), Pace(requests=3_000)], ids=["nothing known", "three times too high"])
def test_a_limit_that_nobody_states_is_learned(limit: int, pace: Pace) -> None:
    """Refusals alone teach what the service allows: it is used, refusals become few, and the next run knows."""
    service = Simulated(Settings(requests_per_minute=limit), "x" * 80, 64, headers=False)
    rows = [request(row, prompt=20, cap=64) for row in range(5 * limit)]
    made = Dispatcher(pace, 1_024, 0.0)
    world = World(made, service, turns(*rows)).run(until=240.0)
    late = [when for when, _, _ in world.answered if when >= 60.0]
    assert len(late) >= 0.9 * 3 * limit
    assert sum(when >= 60.0 for when, _, _ in world.refused) <= 0.05 * len(late)
    [known] = [known for known in made.known() if known.resource == "requests"]
    assert known.stated is False
    assert known.limit == pytest.approx(limit, rel=0.1)

    again = World(
        Dispatcher(pace, 1_024, 0.0, known=made.known()),
        Simulated(Settings(requests_per_minute=limit), "x" * 80, 64, headers=False),
        turns(*rows),
    ).run(until=20.0)
    assert not again.refused
    assert len(again.answered) >= 0.9 * limit * 20 / 60


def test_a_service_that_keeps_what_it_reserved_is_noticed() -> None:
    """Headers show that nothing comes back: it is charged so, used up, and hardly ever refused."""
    decisions: list[Decision] = []
    service = Simulated(Settings(keeps_reservation=True), "x" * 4_000, 2_000)
    rows = [request(row, prompt=1_000, cap=2_000) for row in range(3_000)]
    made = Dispatcher(Pace(), 1_024, 0.0, trace=decisions.append)
    world = World(made, service, turns(*rows)).run(until=180.0)
    reserved = sum(3_000 for when, _, _ in world.answered if when >= 60.0)
    assert reserved >= 0.95 * 2_000_000
    assert len(world.refused) <= 0.01 * len(world.sent)
    assert "uncached tokens per minute: what is reserved does not come back" in [each.what for each in decisions]


def test_a_number_is_a_ceiling_that_gives_way_to_headers() -> None:
    """As long as headers say no more than the job, the service's bucket is used whole; else the job's rate is kept."""
    for limit, together in ((600, 400), (6_000, 10)):
        made = dispatcher(max_in_flight=1_000, requests=610)
        made.offer(turns(*(request(row) for row in range(1_000))))
        ticket = taken(made, 0.0, most=1)[0]
        made.limits([minute("requests", limit, 400)], ticket, 1.0)
        assert len(taken(made, 1.0)) == together


def test_what_can_never_fit_is_not_sent() -> None:
    """A row that is larger than a whole limit of the service is told at once, and takes neither quota nor a place."""
    made = dispatcher(max_in_flight=10)
    made.offer(turns(request(0), request(1, prompt=50_000), request(2, prompt=32_000), request(3)))
    first = taken(made, 0.0, most=1)[0]
    made.limits([minute("uncached_tokens", 30_000, 29_000)], first, 1.0)
    large = made.take(1.0)
    assert isinstance(large, Ticket)
    assert (large.turn.request.row, large.exceeds) == (1, "30,000 uncached tokens per minute")
    assert (made.in_flight, made.sent) == (1, 1)
    until = made.take(1.0)  # this one may be smaller than it seems: it goes when the bucket is full
    assert until == pytest.approx(3.0)
    going = made.take(3.0)
    assert isinstance(going, Ticket)
    assert going.exceeds is None
    named = minute("uncached_tokens", 30_000, 0)
    made.failed(going, refused(1.0, named), 3.5)
    made.again(Turn(going.turn.request, 4.0, 2), 0.0)
    told = made.take(4.5)
    assert isinstance(told, Ticket)
    assert (told.turn.request.row, told.exceeds) == (2, "30,000 uncached tokens per minute")


def test_a_stated_limit_that_refuses_all_the_same_is_not_emptied() -> None:
    """Where headers come too late for others who draw from the same limit, a quarter of a second's worth stays."""
    made = dispatcher(max_in_flight=2_000)
    made.offer(turns(*(request(row) for row in range(2_000))))
    first, _ = taken(made, 0.0, most=2)
    made.failed(first, refused(0.0, minute("requests", 600, 0)), 1.0)
    made.landed(1)
    assert len(taken(made, 21.0)) == 200 - 1 - 3  # one had gone before, and two and a half stay


# Models


def test_models_keep_apart() -> None:
    """Quota, window and outage of one model hold back its own rows only; what holds says whose it is."""
    made = dispatcher(max_in_flight=50)
    made.offer(turns(*(request(row, model="ab"[row % 2]) for row in range(200))))
    tickets = taken(made, 0.0, most=10)
    assert [ticket.turn.request.model for ticket in tickets] == ["a", "b"] * 5
    made.failed(tickets[0], refused(30.0, minute("tokens", 1_000, 0)), 1.0)
    for ticket in tickets[2::2]:
        made.failed(ticket, refused(30.0, minute("tokens", 1_000, 0)), 1.0)
    made.landed(5)
    assert {ticket.turn.request.model for ticket in taken(made, 1.0)} == {"b"}
    assert made.pressure().binds == "schedule.max_in_flight"
    assert set(made.used(1.0)) == {"tokens per minute of a"}
    for ticket in tickets[1::2]:
        made.failed(ticket, Failure(Kind.UNAVAILABLE, "x"), 31.5)
    made.landed(45)
    assert {ticket.turn.request.model for ticket in taken(made, 31.5)} == {"a"}


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=120), st.integers(1, 9), st.floats(0.1, 9.0))
@settings(max_examples=50, deadline=None)
def test_no_model_starves(models: list[str], in_flight: int, slow: float) -> None:
    """Whatever stands first, each model's rows go in their order, and take turns with the others' while they last."""

    class Uneven(Steady):
        def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
            return (slow if ticket.turn.request.model == "a" else 1.0), lambda _: Came(answer(usage(1, 1)))

    rows = [request(row, model=model) for row, model in enumerate(models)]
    world = World(dispatcher(max_in_flight=in_flight), Uneven(), turns(*rows)).run()
    world.check_nothing_is_lost(len(rows))
    order = [ticket.turn.request for _, ticket in world.sent]
    for model in "abc":
        own = [number for number, each in enumerate(order) if each.model == model]
        assert [order[number].row for number in own] == [row for row, name in enumerate(models) if name == model]
        assert all(after - before <= 3 for before, after in itertools.pairwise(own))


@given(st.lists(st.sampled_from([50, 2_500]), min_size=20, max_size=200), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_long_prompts_are_not_starved(prompts: list[int], in_flight: int) -> None:
    """Where tokens bind, nothing shorter overtakes."""
    made = dispatcher(max_in_flight=in_flight, tokens=30_000)
    rows = [request(row, prompt, 10) for row, prompt in enumerate(prompts)]
    world = World(made, Steady(), turns(*rows)).run()
    assert [ticket.turn.request.row for _, ticket in world.sent] == list(range(len(rows)))


# Capacity


def test_a_number_is_the_start_and_the_ceiling() -> None:
    """A configured window is used at once, and never passed."""
    rows = 2_000
    world = World(dispatcher(max_in_flight=64), Steady(), turns(*(request(row) for row in range(rows)))).run()
    assert sum(when == 0.0 for when, _ in world.sent) == 64
    assert world.peak == 64
    assert world.now == pytest.approx(rows / 64, rel=0.05)


def test_the_machines_ceiling_holds() -> None:
    """Open files bound the window, whatever the job says."""
    for number in (500, None):
        made = dispatcher(10, max_in_flight=number)
        world = World(made, Steady(), turns(*(request(row) for row in range(100)))).run()
        assert world.peak == 10


def test_auto_finds_the_window_by_slow_start() -> None:
    """Without a number the window starts small and doubles with each round trip while answers come."""
    world = World(dispatcher(), Steady(), turns(*(request(row) for row in range(20_000)))).run(until=9.5)
    assert [sum(int(when) == second for when, _ in world.sent) for second in range(8)] == [
        *(8, 16, 32, 64, 128, 256, 512, 1024),
    ]
    assert world.peak == 1024


def test_the_window_grows_only_when_it_is_used() -> None:
    """A window that quota or input keeps half empty says nothing about what the service can digest."""
    world = World(dispatcher(requests=60), Steady(), turns(*(request(row) for row in range(300)))).run()
    assert world.dispatcher.window.size == 8


CONGESTION = [Kind.OVERLOADED, Kind.UNAVAILABLE, Kind.DISCONNECTED, Kind.TIMEOUT, Kind.REQUEST_TIMEOUT]


@pytest.mark.parametrize("kind", Kind)
def test_only_congestion_cuts_the_window(kind: Kind) -> None:
    """Overload and lost answers cut the window, our own limits halve it, and nothing else touches it."""
    made = dispatcher(max_in_flight=10)
    made.offer(turns(request(0)))
    made.failed(taken(made, 0.0)[0], Failure(kind, "x"), 1.0)
    expected = 7.0 if kind in CONGESTION else 5.0 if kind is Kind.LOCAL_RESOURCES else 10.0
    assert made.window.size == expected


def test_the_window_is_cut_once_a_second() -> None:
    """What was in flight together fails together, and is one sign of congestion."""
    window = Window(100, 100, 0.0)
    for number in range(50):
        window.congested(4.5, 5.0 + number / 51)
    assert window.size == pytest.approx(70)
    window.congested(4.5, 6.0)
    assert window.size == pytest.approx(49)
    for second in range(7, 60):
        window.congested(4.5, float(second))
    assert window.size == 1


def test_a_window_that_is_far_too_large_is_cut_at_once_again() -> None:
    """Where most of what went after a cut is refused as well, the next cut does not wait for its second."""
    window = Window(1_000, 1_000, 0.0)
    window.congested(0.0, 5.0)
    for number in range(19):
        window.congested(5.1, 5.2 + number / 1_000)
    assert window.size == pytest.approx(700)
    window.congested(5.1, 5.3)
    assert window.size == pytest.approx(490)
    for number in range(50):
        window.answered(100, None, 5.4)
        window.congested(5.35, 5.4 + number / 1_000)
    assert window.size == pytest.approx(490)


@pytest.mark.parametrize("latency", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("number", [2, 3, 16, 64, 512])
def test_a_cut_window_grows_back(number: int, latency: float) -> None:
    """However large it is, a window that was cut is back in a quarter of a minute, and its ceiling is not passed."""
    window = Window(number, number, 0.0)
    window.congested(9.0, 10.0)
    now = 10.0
    while window.size < number:
        now += latency
        assert now <= 10.0 + 15.0 + latency
        for _ in range(int(window.size)):
            window.answered(int(window.size), None, now)
    assert window.size == number


@pytest.mark.parametrize("number", [None, 64, 200])
@pytest.mark.parametrize("refusal", [0.1, 1.0])
def test_the_window_fits_itself_to_the_service(number: int | None, refusal: float) -> None:
    """Where 40 are served at once and more are refused, about 40 are in flight, and refusals soon become few."""
    busy = 0

    class Narrow:
        def receive(self, ticket: Ticket, now: float) -> tuple[float, Callable[[float], Came]]:
            nonlocal busy
            busy += 1
            full = busy > 40

            def leave(_: float) -> Came:
                nonlocal busy
                busy -= 1
                return Came(Failure(Kind.OVERLOADED, "queue") if full else answer(usage(1, 1)))

            return (refusal if full else 1.0), leave

    rows = 4_000
    world = World(dispatcher(max_in_flight=number), Narrow(), turns(*(request(row) for row in range(rows)))).run()
    world.check_nothing_is_lost(rows)
    assert not world.failed
    assert world.now <= 1.5 * rows / 40
    assert sum(when > 10 for when, _, _ in world.refused) <= 0.1 * rows


def test_a_queue_that_grows_is_congestion() -> None:
    """Queue times that rise to a multiple of what is usual cut the window before anything is refused."""

    def size_after(queue_time: Callable[[int], float]) -> float:
        window = Window(50, 50, 0.0)
        for number in range(500):
            window.answered(50, queue_time(number), number / 50)
        return window.size

    assert size_after(lambda _: 0.01) == 50
    assert size_after(lambda _: 2.0) == 50
    assert size_after(lambda number: 0.01 if number < 100 else 2.0) < 50
    assert size_after(lambda number: 3.0 if number == 200 else 0.01) == 50


def test_a_queue_that_others_make_is_no_congestion_of_ours() -> None:
    """Where a smaller window does not shorten the queue, it is what is usual now, and the window grows back."""
    window = Window(64, 64, 0.0)
    sizes = []
    for tick in range(4_000):
        window.answered(int(window.size), 0.01 if tick < 400 else 2.0, tick / 20, 3.0)
        sizes.append(window.size)
    assert min(sizes) >= 64 * 0.3
    assert sizes[-1] == 64


def test_a_queue_that_fills_is_met_by_a_window_that_grows_no_more() -> None:
    """As in TCP Vegas: the window stops where requests begin to queue, long before any is refused."""
    window = Window(8, 1_024, 0.0)
    now = 0.0
    for _ in range(60):
        size = int(window.size)
        queue = max(0.0, size - 200) / 200
        now += 1.0 + queue
        for _ in range(size):
            window.answered(size, queue, now, 1.0 + queue)
    assert 195 <= window.size <= 260


def test_bodies_in_flight_are_bounded() -> None:
    """Requests with images in them wait for one another where they would fill the memory; one goes always."""
    made = Dispatcher(Pace(100), MANY, 0.0, memory=25)
    bodies = [msgspec.structs.replace(request(row), body=b"x" * size) for row, size in enumerate([10, 10, 10, 99])]
    made.offer(turns(*bodies))
    tickets = taken(made, 0.0)
    assert len(tickets) == 2
    assert made.pressure().binds == "memory"
    for ticket in tickets:
        made.answered(ticket, usage(1, 1), None, 1.0)
    made.landed(2)
    [third] = taken(made, 1.0)
    made.answered(third, usage(1, 1), None, 2.0)
    made.landed(1)
    assert [ticket.turn.request.row for ticket in taken(made, 2.0)] == [3]


# Outages


def test_the_breaker_opens_and_probes() -> None:
    """When half of many attempts break, or ten connections in a row fail, one probe goes every 12 seconds."""
    breaker = Breaker()
    for number in range(19):
        breaker.observe(number % 3 > 0, 100, number / 10)
    assert breaker.open_since is None
    breaker.observe(True, 100, 2.0)
    assert breaker.open_since == 2.0
    assert breaker.ready(3.0) == 14.0
    breaker.sent(14.0)
    assert breaker.ready(15.0) == 26.0
    assert breaker.observe(False, 100, 15.5)
    assert breaker.open_since is None
    assert breaker.ready(15.6) == 15.6


@pytest.mark.parametrize(("in_flight", "needed"), [(0, 10), (1, 10), (10, 10), (15, 15)])
def test_failures_in_a_row_open_the_breaker(in_flight: int, needed: int) -> None:
    """Ten in a row, or all that are in flight, are an outage; of connections that were never made, ten."""
    breaker = Breaker()
    breaker.observe(False, in_flight, 0.0)
    for number in range(needed - 1):
        breaker.observe(True, in_flight, 1.0 + number)
    assert breaker.open_since is None
    breaker.observe(True, in_flight, 100.0)
    assert breaker.open_since == 100.0


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.CONNECTION])
@pytest.mark.parametrize("in_flight", [2, 8, 200])
def test_a_service_that_is_doubted_is_asked_little(kind: Kind, in_flight: int) -> None:
    """Five minutes of nothing but quick failures cost 30 requests after the first of them has come back."""
    rows, start, end = 4_000, 30.0, 330.0
    service = Scripted(lambda _, now: Failure(kind, "down") if start <= now < end else None, latency=0.05)
    pace = Pace(in_flight, requests=1_000)
    world = World(Dispatcher(pace, MANY, 0.0), service, turns(*(request(row) for row in range(rows)))).run()
    first = world.refused[0][0]
    assert sum(first < when < end for when, _ in world.sent) <= 30
    assert not world.failed
    assert sum(end + 15 <= when < end + 25 for when, _ in world.sent) >= 0.95 * 160


def test_answers_from_before_an_outage_do_not_end_it() -> None:
    """What went before the first loss and is answered late says nothing of the time after."""
    breaker = Breaker()
    for number in range(10):
        breaker.observe(True, 10, 5.0 + number / 10, lost=True, sent=4.0 + number / 10)
    assert breaker.open_since == pytest.approx(5.9)
    assert not breaker.observe(False, 10, 7.0, sent=3.9)
    assert breaker.open_since is not None
    assert breaker.observe(False, 10, 8.0, sent=4.5)


def test_failures_among_answers_do_not_open_the_breaker() -> None:
    """A share of failures below half, or failures long ago, is no outage."""
    breaker = Breaker()
    for number in range(1_000):
        breaker.observe(number % 3 == 0, 0, number / 10)
        assert breaker.open_since is None
    sparse = Breaker()
    for number in range(100):
        sparse.observe(True, 200, number * 2.0)
    assert sparse.open_since is None


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.CONNECTION, Kind.SERVER_ERROR])
@pytest.mark.parametrize("in_flight", [4, 64])
def test_an_outage_is_waited_out(kind: Kind, in_flight: int) -> None:
    """In ten minutes without an answer hardly anything is sent, no row fails, and afterwards the pace comes back."""
    rows, start, end = 60 * in_flight, 10.0, 610.0
    service = Scripted(lambda _, now: Failure(kind, "down") if start <= now < end else None)
    world = World(dispatcher(max_in_flight=in_flight), service, turns(*(request(row) for row in range(rows)))).run()
    assert not world.failed
    world.check_nothing_is_lost(rows)
    opened = next(number for number, (when, _) in enumerate(world.sent) if when > start + 25)
    during = sum(when < end for when, _ in world.sent[opened:])
    assert during <= (end - start) / 12
    after = [when for when, _ in world.sent if when >= end]
    assert after[0] <= end + 12
    per_second = Counter(int(when - after[0]) for when in after)
    assert per_second[0] == 1
    assert max(per_second.values()) <= in_flight
    assert sum(per_second[second] for second in range(20, 30)) >= 0.7 * 10 * in_flight


def test_probes_are_made_by_rows_that_have_not_failed() -> None:
    """While the breaker is open, rows that failed before are spared: an outage uses up nobody's attempts."""
    service = Scripted(lambda _, now: Failure(Kind.UNAVAILABLE, "down") if now < 3_600 else None)
    world = World(dispatcher(max_in_flight=8), service, turns(*(request(row) for row in range(1_000)))).run()
    assert not world.failed
    probes = [ticket for when, ticket in world.sent if 60 < when < 3_600]
    assert len(probes) > 200
    assert {ticket.turn.attempt for ticket in probes} == {1}


@pytest.mark.parametrize("kind", [Kind.STALE_CONNECTION, Kind.LOCAL_RESOURCES])
def test_our_own_troubles_tell_nothing_of_the_service(kind: Kind) -> None:
    """A kept connection that was closed, or a lack of open files, neither ends an outage nor interrupts its signs."""
    made = dispatcher(max_in_flight=30)
    made.offer(turns(*(request(row) for row in range(60))))
    for number, ticket in enumerate(taken(made, 0.0, most=20)):
        made.failed(ticket, Failure(Kind.CONNECTION if number % 2 else kind, "x"), 1.0)
        made.landed(1)
    assert made.breaker.open_since == 1.0
    probe = taken(made, 13.0)
    assert len(probe) == 1
    made.failed(probe[0], Failure(kind, "x"), 13.5)
    assert made.breaker.open_since == 1.0


def test_after_an_outage_the_window_starts_small() -> None:
    """The first answer lets one go, then two, then four: no storm meets a service that has just come back."""
    service = Scripted(lambda _, now: Failure(Kind.UNAVAILABLE, "x") if now < 100 else None)
    world = World(dispatcher(max_in_flight=64), service, turns(*(request(row) for row in range(1_000)))).run()
    back = next(when for when, _ in world.sent if when >= 100)
    per_second = Counter(int(when - back + 1e-6) for when, _ in world.sent if when >= back)
    assert [per_second[second] for second in range(7)] == [1, 1, 2, 4, 8, 16, 32]
    assert max(per_second.values()) <= 64


# Retries


def test_retries_go_before_fresh_rows_when_they_are_ready() -> None:
    """A row that is to be asked again waits its time, and then goes first."""
    made = dispatcher(max_in_flight=10)
    made.offer(turns(*(request(row) for row in range(5))))
    made.again(Turn(request(100), 5.0, 2), 5.0)
    assert [ticket.turn.request.row for ticket in taken(made, 4.9, most=2)] == [0, 1]
    assert [ticket.turn.request.row for ticket in taken(made, 5.0)] == [100, 2, 3, 4]


def test_a_row_that_waits_is_called_in_time() -> None:
    """Where nothing else is to do, the dispatcher names the moment at which the next row is ready."""
    made = dispatcher(max_in_flight=10)
    made.again(Turn(request(1), 9.0, 2), 5.0)
    made.again(Turn(request(0), 7.0, 2), 5.0)
    assert made.take(1.0) == 7.0
    assert made.pressure().binds == "retries"
    assert [ticket.turn.request.row for ticket in taken(made, 9.0)] == [0, 1]
    assert made.take(9.0) is None


def test_the_retry_budget_parks_but_never_stops() -> None:
    """Where nothing but failures comes, retries go slower and slower, to one token a second, and never end."""
    made = dispatcher(max_in_flight=1_000)
    for row in range(200):
        made.again(Turn(request(row), 0.0, 2), 5.0)
    assert len(taken(made, 0.0)) == 100
    assert made.take(0.0) == pytest.approx(5.0)
    now, gaps = 0.0, []
    for _ in range(100):
        until = made.take(now)
        assert isinstance(until, float)
        gaps.append(until - now)
        now = until
        assert len(taken(made, now)) == 1
    assert gaps == pytest.approx([5.0] * 100)


def test_a_parked_retry_does_not_hold_up_fresh_rows() -> None:
    """While retries are parked, rows that were never asked go on."""
    made = dispatcher(max_in_flight=1_000)
    for row in range(101):
        made.again(Turn(request(row), 0.0, 2), 5.0)
    made.offer(turns(*(request(row) for row in range(200, 210))))
    assert [ticket.turn.request.row for ticket in taken(made, 0.0)] == [*range(100), *range(200, 210)]


def test_a_retry_that_is_answered_costs_nothing() -> None:
    """A steady share of failures that the second try heals is no reason to park anybody."""
    rows = 4_000
    service = Scripted(
        lambda turn, _: Failure(Kind.DISCONNECTED, "x") if turn.attempt == 1 and turn.request.row % 5 == 0 else None,
        latency=0.1,
    )
    world = World(dispatcher(max_in_flight=64), service, turns(*(request(row) for row in range(rows)))).run()
    world.check_nothing_is_lost(rows)
    assert len(world.refused) == rows / 5
    assert world.now < 60


# Nothing is lost

SCRIPTS = st.dictionaries(
    st.integers(0, 79),
    st.lists(st.sampled_from(sorted(Kind)), min_size=1, max_size=8),
    max_size=80,
)


@given(
    scripts=SCRIPTS,
    rows=st.integers(0, 80),
    in_flight=st.none() | st.integers(1, 50),
    requests=st.none() | st.floats(1, 1e5),
    tokens=st.none() | st.floats(1, 1e6),
    wait=st.none() | st.floats(0, 100),
    latency=st.floats(0.001, 20),
)
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost(
    scripts: dict[int, list[Kind]],
    rows: int,
    in_flight: int | None,
    requests: float | None,
    tokens: float | None,
    wait: float | None,
    latency: float,
) -> None:
    """Whatever fails, and however slowly it must go: each row ends once, each attempt is granted once, in order."""

    def script(turn: Turn, _: float) -> Failure | None:
        kinds = scripts.get(turn.request.row, [])
        if turn.attempt > len(kinds):
            return None
        return Failure(kinds[turn.attempt - 1], "x", retry_after=wait)

    made = Dispatcher(Pace(in_flight, requests, tokens), 1_000, 0.0)
    world = World(made, Scripted(script, latency), turns(*(request(row) for row in range(rows)))).run()
    if rows:
        world.check_nothing_is_lost(rows)
    first = [ticket.turn.request.row for _, ticket in world.sent if ticket.turn.attempt == 1]
    assert first == sorted(first)
    for when, ticket in world.sent:
        assert ticket.turn.ready <= when == ticket.sent


@given(st.lists(st.sampled_from(["offer", "take", "answer", "fail", "pause", "wait"]), max_size=80), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_the_window_is_never_passed(acts: list[str], number: int) -> None:
    """In whatever order things happen, there is never more in flight than the window, and never a wait that is over."""
    made = dispatcher(max_in_flight=number)
    now, row = 0.0, itertools.count()
    out: list[Ticket] = []
    for act in acts:
        if act == "offer":
            made.offer(turns(*(request(next(row)) for _ in range(3))))
        elif act == "take":
            granted = made.take(now)
            if isinstance(granted, Ticket):
                out.append(granted)
                assert made.in_flight <= int(made.window.size)
            else:
                assert granted is None or granted > now
        elif act == "pause":
            made.pause(now + 1.0, "x")
        elif act == "wait":
            now += 0.4
        elif out:
            ticket = out.pop(0)
            if act == "answer":
                made.answered(ticket, usage(10, 10), 0.01, now)
            else:
                made.failed(ticket, Failure(Kind.UNAVAILABLE, "x"), now)
                made.again(Turn(ticket.turn.request, now + 1.0, ticket.turn.attempt + 1), 5.0)
            made.landed(1)
        assert made.in_flight == len(out) <= number


def test_a_turn_is_held_until_its_answer_has_landed() -> None:
    """An answer that is not on the disk yet still fills its place in the window."""
    made = dispatcher(max_in_flight=2)
    made.offer(turns(*(request(row) for row in range(5))))
    tickets = taken(made, 0.0)
    assert len(tickets) == 2
    made.answered(tickets[0], usage(1, 1), None, 1.0)
    assert made.take(1.0) is None
    assert made.pressure().binds == "schedule.max_in_flight"
    made.landed(1)
    assert len(taken(made, 1.0)) == 1


def test_what_binds_is_said() -> None:
    """The dispatcher has a word for what holds it back, and counts of what waits."""
    made = dispatcher(max_in_flight=2)
    assert made.take(0.0) is None
    assert (made.pressure().binds, made.idle) == ("input", True)
    made.offer(turns(*(request(row) for row in range(5))))
    made.again(Turn(request(9), 50.0, 2), 0.0)
    made.pause(10.0, "the key")
    assert made.take(0.0) == 10.0
    assert made.pressure() == (0, 2, 5, 1, "the key")
    assert (made.waiting, made.idle) == (5, False)
    made.pause(5.0, "nothing")
    assert made.take(0.0) == 10.0


def test_what_held_a_run_back_is_told_in_seconds() -> None:
    """Not the last word counts but how long each one held, however often it was asked meanwhile."""
    made = dispatcher(max_in_flight=2)
    assert made.take(0.0) is None
    assert made.take(1.0) is None
    made.offer(turns(*(request(row) for row in range(5))))
    assert len(taken(made, 1.5)) == 2
    assert made.held(4.0) == {"input": 1.5, "schedule.max_in_flight": 2.5}
    made.window.congested(1.9, 4.0)
    made.landed(1)
    assert made.take(4.5) is None
    assert made.held(5.0) == {"schedule.max_in_flight": 0.5, "capacity": 0.5}
    assert made.held(5.0) == {"capacity": 0.0}
    assert made.sent == 2


def test_nobody_has_to_ask_to_know_that_all_places_are_taken() -> None:
    """When as many are out as ever may be, no worker is left that would be refused."""
    made = dispatcher(max_in_flight=2)
    made.offer(turns(request(0), request(1)))
    assert isinstance(made.take(0.0), Ticket)
    assert isinstance(made.take(0.0), Ticket)
    assert made.pressure().binds == "schedule.max_in_flight"
    few = dispatcher(ceiling=1, max_in_flight=2)
    few.offer(turns(request(0)))
    assert isinstance(few.take(0.0), Ticket)
    assert few.pressure().binds == "open files"


def test_the_share_of_each_bucket_that_is_used_is_told() -> None:
    """A bucket that is drained is used up; it refills with time; a refusal closes one whose size nobody has said."""
    made = dispatcher(max_in_flight=100, tokens=6_100)
    assert made.used(0.0) == {"schedule.tokens_per_minute": 0.0}
    made.offer(turns(request(0, prompt=25, cap=25), *(request(row) for row in range(1, 50))))
    ticket = taken(made, 0.0)[0]
    assert made.used(0.0) == {"schedule.tokens_per_minute": pytest.approx(0.5)}
    assert made.used(0.25) == {"schedule.tokens_per_minute": pytest.approx(0.25)}
    made.limits([minute("requests", 600, 60)], ticket, 1.0)
    made.failed(ticket, refused(5.0, Limit("tokens", 1.0, None, None, None)), 1.0)
    used = made.used(2.0)
    assert used["requests per minute"] == pytest.approx(0.9, abs=0.05)
    assert used["tokens per second"] == 1.0
    assert made.used(6.5)["tokens per second"] == 0.0


def test_what_is_decided_can_be_read() -> None:
    """A trace has each cut, limit and outage with its moment and its reason, and no line per request."""
    decisions: list[Decision] = []
    made = Dispatcher(Pace(10), MANY, 0.0, trace=decisions.append)
    made.offer(turns(*(request(row) for row in range(100))))
    tickets = taken(made, 0.0)
    made.limits([minute("requests", 600, 500)], tickets[9], 0.5)
    for ticket in tickets:
        made.failed(ticket, Failure(Kind.UNAVAILABLE, "x"), 1.0)
    made.landed(10)
    [probe] = taken(made, 13.0)
    made.answered(probe, usage(1, 1), None, 14.0)
    assert decisions == [
        (0.5, "requests per minute: 600, by headers"),
        (1.0, "window 10 to 7: unavailable"),
        (1.0, "an outage begins: unavailable"),
        (14.0, "the outage is over"),
    ]
