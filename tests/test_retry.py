"""Again, and when? Each kind of failure has its rule, and some failures are the run's and not the row's."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher import dialects, engine
from batcher.errors import BatcherError, PausedError, ServiceError
from batcher.job import from_document
from batcher.records import Failure, Kind, Limit, Summary
from batcher.retry import MAX_REQUEUES, Again, Guard, decide
from batcher.simulator import Front, ModelTransport, Settings, VirtualLoop

EVER = 1_000_000
NEVER = 0
ROUGH = (0.05, 30.0)
"""Seconds that a row backs off, at most; the first time half a second."""
CALM = (1.0, 61.0)
"""Seconds that a row waits where the service has too much to do."""
SOON = (0.0, 0.05)

TABLE: dict[Kind, tuple[int, bool, tuple[float, float]]] = {
    Kind.BAD_INPUT: (NEVER, True, SOON),
    Kind.UNSENDABLE: (NEVER, True, SOON),
    Kind.EXCEEDS_QUOTA: (NEVER, True, SOON),
    Kind.RATE_LIMITED: (MAX_REQUEUES, False, ROUGH),
    Kind.DAY_QUOTA: (MAX_REQUEUES, False, ROUGH),
    Kind.NO_CREDIT: (MAX_REQUEUES, False, ROUGH),
    Kind.OVERLOADED: (MAX_REQUEUES, False, CALM),
    Kind.SERVER_ERROR: (3, True, ROUGH),
    Kind.UNAVAILABLE: (EVER, True, ROUGH),
    Kind.REQUEST_TIMEOUT: (EVER, True, ROUGH),
    Kind.CONFLICT: (EVER, True, ROUGH),
    Kind.DNS: (EVER, False, CALM),
    Kind.CONNECTION: (EVER, False, ROUGH),
    Kind.CONNECT_TIMEOUT: (EVER, False, ROUGH),
    Kind.STALE_CONNECTION: (EVER, True, SOON),
    Kind.DISCONNECTED: (EVER, True, ROUGH),
    Kind.TIMEOUT: (3, True, ROUGH),
    Kind.TLS: (2, True, ROUGH),
    Kind.CERTIFICATE: (NEVER, True, SOON),
    Kind.LOCAL_RESOURCES: (MAX_REQUEUES, False, ROUGH),
    Kind.PROTOCOL_ERROR: (2, True, ROUGH),
    Kind.MALFORMED_RESPONSE: (2, True, ROUGH),
    Kind.NOT_JSON: (1, True, CALM),
    Kind.RESPONSE_TOO_LARGE: (NEVER, True, SOON),
    Kind.INVALID_OUTPUT: (2, True, SOON),
    Kind.TRUNCATED: (EVER, False, SOON),
    Kind.REJECTED: (NEVER, True, SOON),
    Kind.REQUEST_TOO_LARGE: (NEVER, True, SOON),
    Kind.UNAUTHORIZED: (MAX_REQUEUES, False, CALM),
    Kind.FORBIDDEN: (NEVER, True, SOON),
    Kind.NOT_FOUND: (2, True, ROUGH),
    Kind.MODEL_NOT_FOUND: (NEVER, True, SOON),
    Kind.NOT_SERVED: (NEVER, True, SOON),
    Kind.PROXY: (NEVER, True, SOON),
    Kind.REDIRECT: (2, True, ROUGH),
    Kind.INTERRUPTED: (EVER, False, SOON),
}
"""Of each kind: how often a row may be asked again for it, whether that is charged to the row, and the waits."""


def failure(kind: Kind, **more: object) -> Failure:
    """A failure of this kind."""
    return Failure(kind, "the service's words", **more)  # type: ignore[arg-type]


def answers_to(kind: Kind, max_attempts: int = 6, max_invalid: int = 2) -> int:
    """How often a row is sent whose every attempt fails like this."""
    tried: Counter[Kind] = Counter()
    while True:
        tried[kind] += 1
        if decide(failure(kind), tried, max_attempts, max_invalid) is None or tried[kind] > 10_000:
            return tried[kind]


def test_every_kind_has_its_rule() -> None:
    """No kind of failure is without a place in the table."""
    assert set(TABLE) == set(Kind)


@pytest.mark.parametrize("kind", Kind)
def test_limits_count_retries(kind: Kind) -> None:
    """A kind that may be asked again R times gets R + 1 answers; what is charged also ends at `max_attempts`."""
    again, charged, _ = TABLE[kind]
    free = 1 if kind is Kind.STALE_CONNECTION else 0
    expected = min(again + 1, 6 + free) if charged else again + 1
    assert answers_to(kind) == min(expected, 10_001)
    if charged:
        assert answers_to(kind, max_attempts=1) == min(again + 1, 1 + free)


@pytest.mark.parametrize("kind", Kind)
def test_waits(kind: Kind) -> None:
    """Each kind waits within its bounds, longer and longer, and differently each time."""
    again, _, (least, most) = TABLE[kind]
    for number in range(1, min(again, 5) + 1):
        waits = [decide(failure(kind), {kind: number}, 100, 5) for _ in range(30)]
        seconds = [wait.wait for wait in waits if wait is not None]
        assert len(seconds) == 30
        assert least <= min(seconds) <= max(seconds) <= most
        assert len(set(seconds)) > 1
        if (least, most) == ROUGH:
            assert max(seconds) <= max(0.5 * 2 ** (number - 1), 0.05)
        if (least, most) == CALM:
            assert 2 ** (number - 1) <= min(seconds) <= max(seconds) <= 2 ** (number - 1) + 1


def test_waits_have_an_end() -> None:
    """However often a row was tried, its wait is bounded."""
    for kind in (Kind.RATE_LIMITED, Kind.OVERLOADED, Kind.CONNECTION, Kind.UNAVAILABLE):
        for number in (50, 200, 5000):
            again = decide(failure(kind), {kind: min(number, TABLE[kind][0])}, 10**6, 2)
            assert again is not None
            assert 0 < again.wait <= 61


@given(
    stated=st.floats(min_value=0, max_value=1e7),
    kind=st.sampled_from([kind for kind, (again, _, _) in TABLE.items() if again]),
)
@settings(max_examples=120, deadline=None)
def test_a_stated_wait_is_kept(stated: float, kind: Kind) -> None:
    """What the service asks for is never cut short, up to an hour, and stretched a little so that rows spread."""
    again = decide(failure(kind, retry_after=stated), {kind: 1}, 6, 2)
    assert again is not None
    asked = min(stated, 3600.0)
    assert asked <= again.wait <= asked + min(5.0, asked / 10)


def test_stated_waits_are_spread() -> None:
    """Rows that were all told to wait for ten seconds do not come back in the same moment."""
    waits = [decide(failure(Kind.RATE_LIMITED, retry_after=10.0), {Kind.RATE_LIMITED: 1}, 6, 2) for _ in range(50)]
    assert len({wait.wait for wait in waits if wait is not None}) == 50


@pytest.mark.parametrize(
    ("window", "reset", "stated", "waits"),
    [
        (60.0, 40.0, 40.0, 0.5),  # all of it is there in 40 s, enough for a row before
        (1.0, 0.9, 0.9, 0.5),
        (60.0, 40.0, 12.0, 13.2),  # Retry-After is the service's own word
        (60.0, None, 12.0, 13.2),
        (3600.0, 900.0, 900.0, 905.0),
    ],
)
def test_a_row_waits_no_longer_than_its_limit_needs(
    window: float, reset: float | None, stated: float, waits: float
) -> None:
    """A limit that fills up steadily is for the scheduler to watch: it lets the row go as soon as there is enough."""
    limits = (Limit("requests", 60.0, 100, 7, 3.0), Limit("tokens", window, 60_000, 0, reset))
    again = decide(failure(Kind.RATE_LIMITED, retry_after=stated, limits=limits), {Kind.RATE_LIMITED: 1}, 6, 2)
    assert again is not None
    assert 0.05 <= again.wait <= waits
    assert again.wait >= stated or waits < stated


def test_a_small_run_ends_when_its_limit_lets_it(tmp_path: Path) -> None:
    """The last row of a run was refused once: it goes when there are tokens for it, not when all of them are back."""
    texts = (f"{row:06}".ljust(200 + row % 300, ".") for row in range(200))
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts) + "\n")
    document = {
        "input": {"path": "rows.jsonl"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 100},
        "service": {"base_url": "https://simulated.invalid/v1", "dialect": "cerebras"},
        "output": {"path": "out"},
    }
    job = from_document(document, tmp_path, "job.toml")
    rates: dict[str, Any] = {"requests_per_minute": None, "uncached_tokens_per_minute": None, "cache_tokens": 0}
    books: list[Front] = []

    async def live() -> Summary:
        front = Front(Settings(tokens_per_minute=10_000, **rates), asyncio.get_running_loop().time, 1.79e9, record=True)
        books.append(front)
        return await engine.run(
            job, transport=ModelTransport(front, "Bearer x", 60.0, dialects.named("cerebras").refusal)
        )

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(work=lambda: 0.002)) as runner:
        summary = runner.run(live())
    [front] = books
    assert any(entry.status == 429 for entry in front.book)
    used = sum(entry.settled for entry in front.book)
    needed = (used - 10_000) / 10_000 * 60
    assert 10 < needed < summary.seconds < needed + 4


TOLD_TO = (Kind.REJECTED, Kind.REQUEST_TOO_LARGE, Kind.FORBIDDEN, Kind.NOT_SERVED)


@pytest.mark.parametrize("kind", Kind)
def test_the_service_s_word_counts_where_the_row_is_refused(kind: Kind) -> None:
    """`x-should-retry: true` has a refused row asked again, at its charge; `false` ends what would be charged."""
    tried = {kind: 1}
    plain = decide(Failure(kind, "m"), tried, 6, 2)
    told_to = decide(Failure(kind, "m", should_retry=True), tried, 6, 2)
    assert (told_to is not None) == (plain is not None or kind in TOLD_TO)
    assert decide(Failure(kind, "m", should_retry=True), {kind: 7}, 6, 2) is None or not TABLE[kind][1]
    told_not_to = decide(Failure(kind, "m", should_retry=False), tried, 6, 2)
    assert (told_not_to is not None) == (plain is not None and not TABLE[kind][1])


def test_charged_attempts_add_up() -> None:
    """A row's charged failures count together, whatever their kinds."""
    tried = {Kind.UNAVAILABLE: 2, Kind.DISCONNECTED: 2, Kind.CONFLICT: 1}
    assert decide(failure(Kind.CONFLICT), tried, 6, 2) is not None
    assert decide(failure(Kind.CONFLICT), {**tried, Kind.CONFLICT: 2}, 6, 2) is None
    assert decide(failure(Kind.CONFLICT), {**tried, Kind.CONFLICT: 2}, 7, 2) is not None


def test_what_is_no_fault_of_the_row_is_not_charged() -> None:
    """Refusals for want of quota or room, and connections that were never made, use up no attempts."""
    tried = dict.fromkeys((kind for kind, (again, charged, _) in TABLE.items() if again and not charged), 100)
    assert decide(failure(Kind.RATE_LIMITED), tried, 1, 0) is not None
    assert decide(failure(Kind.UNAVAILABLE), {**tried, Kind.UNAVAILABLE: 1}, 2, 0) is not None
    assert decide(failure(Kind.UNAVAILABLE), {**tried, Kind.UNAVAILABLE: 2}, 2, 0) is None


def test_an_outage_fails_no_row() -> None:
    """A row that cannot be connected waits as long as the run does."""
    for kind in (Kind.DNS, Kind.CONNECTION, Kind.CONNECT_TIMEOUT):
        assert decide(failure(kind), {kind: 5_000}, 6, 2) is not None


def test_one_stale_connection_is_free() -> None:
    """A kept connection that was closed under our hands is asked again at once, the first time for nothing."""
    again = decide(failure(Kind.STALE_CONNECTION), {Kind.STALE_CONNECTION: 1}, 1, 2)
    assert again is not None
    assert again.wait <= 0.05
    assert decide(failure(Kind.STALE_CONNECTION), {Kind.STALE_CONNECTION: 2}, 1, 2) is None


@pytest.mark.parametrize(("max_invalid", "answers"), [(0, 1), (1, 2), (2, 3), (5, 6), (50, 6)])
def test_answers_that_do_not_fit(max_invalid: int, answers: int) -> None:
    """A row whose answer does not fit is asked again `max_invalid` times, within `max_attempts`."""
    assert answers_to(Kind.INVALID_OUTPUT, max_invalid=max_invalid) == answers


def test_what_may_have_been_paid_costs_more_of_the_budget() -> None:
    """Retries draw on the job's budget: most where the first try may have been billed, none where it was refused."""

    def cost(kind: Kind) -> float:
        again = decide(failure(kind), {kind: 1}, 6, 2)
        assert isinstance(again, Again)
        return again.cost

    assert cost(Kind.TIMEOUT) == cost(Kind.DISCONNECTED) == cost(Kind.REQUEST_TIMEOUT) == 10
    assert cost(Kind.SERVER_ERROR) == cost(Kind.MALFORMED_RESPONSE) == cost(Kind.INVALID_OUTPUT) == 5
    assert cost(Kind.CONNECTION) == cost(Kind.DNS) == cost(Kind.STALE_CONNECTION) == 2
    assert cost(Kind.RATE_LIMITED) == cost(Kind.OVERLOADED) == cost(Kind.UNAUTHORIZED) == 0


@given(
    st.dictionaries(st.sampled_from(Kind), st.integers(min_value=1, max_value=300), min_size=1),
    st.integers(min_value=1, max_value=100),
    st.integers(min_value=0, max_value=100),
    st.data(),
)
@settings(max_examples=120, deadline=None)
def test_a_row_comes_to_an_end(
    tried: dict[Kind, int], max_attempts: int, max_invalid: int, data: st.DataObject
) -> None:
    """No row is asked again once it has used up its attempts, and every wait is a number of seconds."""
    kind = data.draw(st.sampled_from(sorted(tried)))
    again = decide(failure(kind), tried, max_attempts, max_invalid)
    charged = sum(count for each, count in tried.items() if TABLE[each][1]) - (Kind.STALE_CONNECTION in tried)
    if again is None:
        limit = max_invalid if kind is Kind.INVALID_OUTPUT else TABLE[kind][0]
        assert charged >= max_attempts or tried[kind] > limit
    else:
        assert charged < max_attempts
        assert 0 <= again.wait <= 61


# What ends a run


def ends(guard: Guard, failed: Failure, times: int, row: int = 0, now: float = 0.0) -> BatcherError | None:
    """What the guard says to the last of so many such failures, of different rows; it says nothing before."""
    for number in range(times - 1):
        assert guard.failed(failed, row + number, now) is None
    return guard.failed(failed, row + times - 1, now)


def after_an_answer() -> Guard:
    """The guard of a run that has had an answer."""
    guard = Guard()
    guard.answered()
    return guard


def plain(ended: BatcherError | None, kind: type[BatcherError]) -> str:
    """The text of an error that ends a run: a line or two."""
    assert type(ended) is kind
    assert len(str(ended).splitlines()) <= 2
    return str(ended)


def test_a_wrong_key_ends_the_run_at_the_third_refusal() -> None:
    """Where nothing was ever answered, three refused keys end the run; no row has failed."""
    said = plain(ends(Guard(), failure(Kind.UNAUTHORIZED, status=401), 3), ServiceError)
    assert "(401)" in said
    assert "check the key" in said


def test_a_wrong_key_ends_a_resumed_run_as_soon() -> None:
    """That an earlier run had answers says nothing of today's key."""
    guard = Guard()
    guard.answered_before()
    plain(ends(guard, failure(Kind.UNAUTHORIZED, status=401), 3), ServiceError)


def test_a_key_that_worked_is_tried_again() -> None:
    """A key that stops working pauses the run for 1, 10 and 60 seconds; then the run ends."""
    guard, refused = after_an_answer(), failure(Kind.UNAUTHORIZED)
    now = 100.0
    for pause in (1.0, 10.0, 60.0):
        assert ends(guard, refused, 50, now=now) is None  # all that were in flight count once
        assert guard.key_paused_until == now + pause
        now += pause
    plain(guard.failed(refused, 1, now), ServiceError)


def test_a_key_that_works_again_is_forgiven() -> None:
    """After an answer the count of refused keys starts anew."""
    guard, refused = after_an_answer(), failure(Kind.UNAUTHORIZED)
    now = 0.0
    for _ in range(20):
        assert guard.failed(refused, 1, now) is None
        assert guard.key_paused_until == now + 1.0
        guard.answered()
        now += 100


@pytest.mark.parametrize("kind", [Kind.MODEL_NOT_FOUND, Kind.NOT_FOUND, Kind.FORBIDDEN, Kind.NOT_SERVED, Kind.REDIRECT])
def test_what_the_job_got_wrong_ends_the_run_at_once(kind: Kind) -> None:
    """Before any answer, an unknown model or a wrong address ends the run at the first refusal."""
    assert "the service's words" in plain(Guard().failed(failure(kind), 0, 0.0), ServiceError)
    assert after_an_answer().failed(failure(kind), 0, 0.0) is None


@pytest.mark.parametrize("kind", [Kind.CERTIFICATE, Kind.PROXY])
def test_what_cannot_get_better_ends_the_run_always(kind: Kind) -> None:
    """A certificate that is wrong, or a proxy that wants a password, ends the run whatever was answered before."""
    plain(Guard().failed(failure(kind), 0, 0.0), ServiceError)
    plain(after_an_answer().failed(failure(kind), 0, 0.0), ServiceError)


def test_twenty_like_refusals_before_any_answer_end_the_run() -> None:
    """A template that is always rejected ends the run at the twentieth row, and all of them are held, not failed."""
    guard, rejected = Guard(), failure(Kind.REJECTED, code="wrong_parameter", status=400)
    assert "20 rows" in plain(ends(guard, rejected, 20), ServiceError)
    assert guard.holds(rejected)


def test_after_an_answer_it_takes_five_hundred() -> None:
    """A run that has answers ends only when 500 rows in a row were refused alike."""
    guard, rejected = after_an_answer(), failure(Kind.REJECTED, code="wrong_parameter")
    assert "500 rows" in plain(ends(guard, rejected, 500), ServiceError)


def test_one_answer_releases_the_refused() -> None:
    """One answer says that the refusals are the rows' own: the count starts anew."""
    guard, rejected = Guard(), failure(Kind.REJECTED, code="wrong_parameter")
    assert ends(guard, rejected, 19) is None
    guard.answered()
    assert ends(guard, rejected, 499) is None
    guard.answered()
    assert ends(guard, rejected, 499) is None


def test_refusals_that_differ_add_up() -> None:
    """Before anything was answered, refusals count whatever their codes: a bad job has many ways to be refused."""
    guard = Guard()
    for number in range(19):
        assert guard.failed(failure(Kind.REJECTED, code=f"c{number % 2}"), number, 0.0) is None
    plain(guard.failed(failure(Kind.REJECTED, code="c1"), 19, 0.0), ServiceError)


def test_held_rows_of_a_run_without_answers_stay_pending() -> None:
    """Where no answer ever came the run ends for its refused rows, however few; where one came they have failed."""
    guard = Guard()
    guard.failed(failure(Kind.REJECTED, code="c1"), 0, 0.0)
    plain(guard.give_up_on_held(), ServiceError)
    guard.answered()
    assert guard.give_up_on_held() is None


@pytest.mark.parametrize(
    "other", [Kind.RATE_LIMITED, Kind.SERVER_ERROR, Kind.TIMEOUT, Kind.CONNECTION, Kind.OVERLOADED, Kind.INVALID_OUTPUT]
)
def test_other_troubles_do_not_hide_a_systematic_refusal(other: Kind) -> None:
    """Failures that are tried again in between do not interrupt the count of refusals."""
    guard, rejected = Guard(), failure(Kind.REJECTED, code="wrong_parameter")
    for number in range(19):
        assert guard.failed(rejected, number, 0.0) is None
        assert guard.failed(failure(other), 100 + number, 0.0) is None
    plain(guard.failed(rejected, 19, 0.0), ServiceError)


@pytest.mark.parametrize("code", ["context_length_exceeded", "content_filter", "content_policy_violation"])
def test_what_is_the_rows_own_is_never_systematic(code: str) -> None:
    """A text that is too long, or that a filter refuses, is that row's failure at once, however many there are."""
    guard, rejected = Guard(), failure(Kind.REJECTED, code=code)
    assert not guard.holds(rejected)
    assert ends(guard, rejected, 2000) is None


@pytest.mark.parametrize(
    "words",
    [
        "Please reduce the length of the messages or completion. Current length is 9000 while limit is 8192",
        "This model's maximum context length is 8192 tokens.",
    ],
)
def test_a_prompt_that_is_too_long_is_the_rows_own(words: str) -> None:
    """Not every service sends a code with it."""
    guard = Guard()
    failure = Failure(Kind.REJECTED, words, status=400)
    assert [guard.failed(failure, row, 0.0) for row in range(1_000)] == [None] * 1_000
    assert not guard.holds(failure)


@pytest.mark.parametrize("kind", Kind)
def test_only_refusals_are_held(kind: Kind) -> None:
    """A row that the service refused waits to be called failed; one that failed otherwise does not."""
    refusals = {Kind.REJECTED, Kind.FORBIDDEN, Kind.NOT_FOUND, Kind.MODEL_NOT_FOUND, Kind.NOT_SERVED}
    assert Guard().holds(failure(kind)) == (kind in refusals)


@pytest.mark.parametrize("kind", [Kind.NOT_JSON, Kind.TLS])
def test_pages_in_place_of_answers_pause_the_run(kind: Kind) -> None:
    """Five rows in a row that meet a login page, or a broken TLS, pause the run; one row alone does not."""
    guard = Guard()
    for _ in range(20):
        assert guard.failed(failure(kind), 7, 0.0) is None
    assert ends(guard, failure(kind), 3, row=100) is None
    assert guard.failed(failure(Kind.SERVER_ERROR), 5, 0.0) is None
    plain(guard.failed(failure(kind), 200, 0.0), PausedError)


def test_an_answer_between_pages_goes_on() -> None:
    """An answer in between says that the way to the service is open."""
    guard = Guard()
    for start in range(0, 100, 4):
        assert ends(guard, failure(Kind.NOT_JSON), 4, row=start) is None
        guard.answered()


def test_redirects_pause_a_run_that_worked() -> None:
    """A service that begins to redirect is not followed: five rows, and the run pauses with the address."""
    guard = after_an_answer()
    said = plain(ends(guard, failure(Kind.REDIRECT, status=307), 5), PausedError)
    assert "service.base_url" in said


def test_no_credit_pauses_the_run() -> None:
    """An account without credit pauses the run at once."""
    assert "credit" in plain(after_an_answer().failed(failure(Kind.NO_CREDIT), 0, 0.0), PausedError)


def test_a_quota_of_the_day_pauses_the_run() -> None:
    """A day's quota pauses the run with the hours it takes; where it is back within an hour, the run waits."""
    guard = after_an_answer()
    assert "for 30.0 h" in plain(guard.failed(failure(Kind.DAY_QUOTA, retry_after=108_000.0), 0, 0.0), PausedError)
    plain(guard.failed(failure(Kind.DAY_QUOTA), 0, 0.0), PausedError)
    soon = failure(Kind.DAY_QUOTA, retry_after=5.0)
    assert guard.failed(soon, 0, 0.0) is None
    again = decide(soon, {Kind.DAY_QUOTA: 1}, 6, 2)
    assert again is not None
    assert again.wait >= 5.0


@pytest.mark.parametrize(
    "kind", [Kind.UNAUTHORIZED, Kind.MODEL_NOT_FOUND, Kind.CERTIFICATE, Kind.NO_CREDIT, Kind.DAY_QUOTA, Kind.REJECTED]
)
def test_the_services_words_are_put_into_a_line(kind: Kind) -> None:
    """What ends a run is said in one or two lines, however long and many-lined the service's own words are."""
    guard, ended = Guard(), None
    for row in range(20):
        ended = ended or guard.failed(Failure(kind, "line\n\tafter line\r\n" * 500), row, 0.0)
    assert ended is not None
    assert len(str(ended).splitlines()) <= 2
    assert len(str(ended)) < 600


@given(st.lists(st.tuples(st.sampled_from([*Kind, None]), st.integers(0, 30), st.floats(0, 1e5)), max_size=60))
@settings(max_examples=120, deadline=None)
def test_the_guard_never_breaks(events: list[tuple[Kind | None, int, float]]) -> None:
    """Whatever happens, the guard says nothing, or one of the errors that end a run."""
    guard = Guard()
    for kind, row, now in events:
        if kind is None:
            guard.answered()
        elif ended := guard.failed(failure(kind), row, now):
            assert type(ended) in (ServiceError, PausedError)
            assert ended.exit_code in (4, 75)
