"""One attempt: send a request, keep what came, decide what follows. A row's life is one of these, or several."""

import asyncio
import time
from collections.abc import Callable

import msgspec

from batcher.engine.counts import Counts
from batcher.engine.prepared import Prepared
from batcher.engine.turns import Turns
from batcher.errors import BatcherError
from batcher.ledger import Ledger
from batcher.parse import Parser
from batcher.prompt import repaired
from batcher.records import FIRST_CAP, Answer, Attempt, Failure, Kind, Misfit, Outcome, Reply, Request, Timing, Turn
from batcher.retry import Again, Guard, decide
from batcher.schedule import Budget, Dispatcher, Ticket
from batcher.transport import Transport

BACKLOG_BYTES = 64 << 20
"""Answers that may wait for a slow disk before sending waits for it."""
HEADERS_EVERY = 0.1
"""Seconds between looks at the service's limits: they change slowly, and reading them costs a row 20 µs."""


class Attempts:
    """The attempt, and the rooms it passes through. `end` is told what ends the run."""

    def __init__(
        self,
        prepared: Prepared,
        transport: Transport,
        dispatcher: Dispatcher,
        turns: Turns,
        ledger: Ledger,
        guard: Guard,
        counts: Counts,
        budget: Budget | None,
        end: Callable[[BatcherError], None],
    ) -> None:
        self._budget = budget
        self._prepared = prepared
        self._transport = transport
        self._dispatcher = dispatcher
        self._turns = turns
        self._ledger = ledger
        self._guard = guard
        self._counts = counts
        self._end = end
        self._now = asyncio.get_running_loop().time
        self._headers_read = 0.0
        self._learns_cap = prepared.job.request.learned_cap is not None
        self.held: list[Attempt] = []
        """Refused rows that are failures only if another row is answered."""
        self.disk = asyncio.Event()
        """Set whenever answers became durable, or nothing will be sent any more."""
        self.revised: set[int] = set()
        """Rows whose attempt was recorded a second time: their turn was given back with the first."""

    async def work(self) -> None:
        """One of the run's workers: attempt after attempt until nothing more is to be sent."""
        while (ticket := await self._turns.take()) is not None:
            if ticket.exceeds is not None:
                self._never_fits(ticket, ticket.exceeds)
                continue
            await self.attempt(ticket)
            while self._ledger.backlog > BACKLOG_BYTES and not self._turns.closed:
                self.disk.clear()
                await self.disk.wait()

    async def attempt(self, ticket: Ticket) -> None:
        """Send one request, keep what came of it, decide. The turn is given back when the disk has it."""
        if self._budget is not None and not await self._leased(ticket, self._budget):
            return  # the disk takes nothing more, which ends the run
        try:
            result = await self._transport.send(ticket.turn.request)
        except asyncio.CancelledError:
            self._interrupted(ticket)
            raise
        attempt = _recorded(ticket, result)
        self._ledger.record(attempt)  # on its way to the disk before anything looks into it
        outcome = self.judge(result)
        if isinstance(outcome, Answer):
            self._answered(ticket, attempt, outcome)
            self._heed_headers(ticket, result)
        else:
            self._failed(ticket, attempt, outcome)
        if 4 * self._ledger.gathered >= 3 * self._dispatcher.in_flight:
            self._ledger.hand_over()  # most of the window waits for the disk: what is left keeps the service busy

    def judge(self, result: Reply | Failure) -> Answer | Failure:
        """What came: an answer that fits, or why it is none."""
        if isinstance(result, Failure):
            return result
        answer = self._prepared.access.dialect.read(result)
        if isinstance(answer, Failure):
            return answer
        if self._learns_cap and any(choice.finish_reason == "length" for choice in answer.choices):
            cut = "the answer was cut off at the learned output cap"
            return Failure(Kind.TRUNCATED, cut, result.timing, result.status, paid=True, usage=answer.usage)
        if self._prepared.parser is None:
            return answer
        message = misfit(self._prepared.parser, answer)
        if message is None:
            return answer
        return Failure(Kind.INVALID_OUTPUT, message, result.timing, result.status, paid=True, usage=answer.usage)

    def decide_late(self, attempt: Attempt) -> None:
        """Decide what a run that died had recorded and not decided."""
        if attempt.status == 200:
            judged = self.judge(reply(attempt))
        elif attempt.status is not None:
            judged = self._prepared.access.dialect.refusal(reply(attempt))
        else:
            judged = _INTERRUPTED
        if isinstance(judged, Answer):
            attempt.outcome = Outcome.ANSWERED
        else:
            _explain(attempt, judged)
        self._ledger.record(attempt)

    def release_held(self) -> None:
        """Rows that were refused are failures after all: others are answered."""
        for attempt in self.held:
            self.revised.add(attempt.row)
            self._ledger.record(msgspec.structs.replace(attempt, outcome=Outcome.FAILED))
        self.held.clear()

    def _answered(self, ticket: Ticket, attempt: Attempt, answer: Answer) -> None:
        attempt.outcome = Outcome.ANSWERED
        usage = answer.usage
        queued = answer.times.queue_time
        if queued is None and ticket.turn.request.stream:
            queued = attempt.time_to_first_token  # without streaming it is the whole answer's time
        self._dispatcher.answered(ticket, usage, queued, self._now())
        self._guard.answered()
        if self.held:
            self.release_held()
        prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
        cached, tier = usage.cached_tokens or 0, answer.tier(attempt.tier)
        price = self._prepared.price(attempt.model, prompt, cached, completion, tier)
        if usage.prompt_tokens is not None and usage.completion_tokens is not None:
            attempt.spent = price
        self._counts.answered(prompt, completion, price)

    def _failed(self, ticket: Ticket, attempt: Attempt, failure: Failure) -> None:
        if _is_free(attempt, failure):
            attempt.spent = 0.0
        _explain(attempt, failure)
        self._count_failed(attempt, failure)
        now = self._now()
        self._dispatcher.failed(ticket, failure, now)
        spared = failure.kind is Kind.DAY_QUOTA and self._dispatcher.has_quota(ticket.turn, now)
        if not spared and (ended := self._guard.failed(failure, attempt.row, now)):
            self._end(ended)
            return
        self._dispatcher.pause(self._guard.key_paused_until, "the key")
        turn, settings = ticket.turn, self._prepared.job.retry
        tried = dict(turn.tried or {})
        again: Again | None
        if ticket.probe and self._dispatcher.is_down(turn):
            again = Again(0.0, 0.0)  # it was sent to see whether the outage is over: no fault of the row
        else:
            tried[failure.kind] = tried.get(failure.kind, 0) + 1
            again = decide(failure, tried, settings.max_attempts, settings.max_invalid)
        if failure.kind is Kind.TRUNCATED and not self._dispatcher.may_be_longer(ticket, failure.usage):
            attempt.message = (
                f"the answer was cut off at {attempt.output_tokens:,} tokens, and no larger cap would help"
            )
            again = None
        if again is not None:
            request, plain, floor = turn.request, turn.plain, turn.floor
            if failure.kind is Kind.INVALID_OUTPUT and settings.repair:
                plain = plain or (request.capped(FIRST_CAP) if self._learns_cap else request)
                request = repair(self._prepared, plain, attempt)
            if failure.kind is Kind.TRUNCATED:
                floor = request.output_tokens
            ready, elsewhere = now + again.wait, self._dispatcher.elsewhere(turn, failure)
            more = Turn(
                request,
                now if elsewhere else ready,
                turn.attempt + 1,
                tried,
                plain,
                floor,
                turn.group,
                earliest=elsewhere,
                barred=ready,
            )
            self._dispatcher.again(more, again.cost)
            self._turns.wake()
        elif self._guard.holds(failure):
            self.held.append(attempt)
        else:
            attempt.outcome = Outcome.FAILED

    def _never_fits(self, ticket: Ticket, limit: str) -> None:
        """The row is larger than a whole limit: it fails without being sent, or sent again."""
        message = f"it needs about {ticket.tokens:,.0f} tokens at once, and the service allows {limit}"
        failure = Failure(Kind.EXCEEDS_QUOTA, message)
        attempt = _recorded(ticket, failure)
        if ticket.turn.attempt == 1:
            attempt.attempt = 0  # it never became a request
        _explain(attempt, failure)
        attempt.outcome = Outcome.FAILED
        self._ledger.record(attempt)

    def _interrupted(self, ticket: Ticket) -> None:
        """The run ends without waiting for what comes: the request was sent, and may be paid."""
        seconds = self._now() - ticket.sent
        timing = Timing(int((time.time() - seconds) * 1e6), seconds)
        failure = msgspec.structs.replace(_INTERRUPTED, timing=timing)
        attempt = _recorded(ticket, failure)
        _explain(attempt, failure)
        self._count_failed(attempt, failure)
        self._ledger.record(attempt)

    async def _leased(self, ticket: Ticket, budget: Budget) -> bool:
        """Have what the request may cost noted on the disk before it goes; false where the disk refuses."""
        turn = ticket.turn
        return await self._ledger.lease(turn.request.unit, turn.request.row, turn.attempt, budget.leased(turn))

    def _count_failed(self, attempt: Attempt, failure: Failure) -> None:
        self._counts.failed(failure, attempt.sent_at)
        used = failure.usage
        if used is not None:
            prompt, cached, completion = used.prompt_tokens, used.cached_tokens or 0, used.completion_tokens
        elif failure.paid:
            prompt, cached, completion = attempt.prompt_tokens, 0, attempt.output_tokens or None
        else:
            return
        if prompt is not None and completion is not None:
            price = self._prepared.price(attempt.model, prompt, cached, completion, attempt.tier)
            if used is not None:
                attempt.spent = price
            self._counts.paid(prompt, completion, price)

    def _heed_headers(self, ticket: Ticket, result: Reply | Failure) -> None:
        now = self._now()
        if isinstance(result, Reply) and now - self._headers_read >= HEADERS_EVERY:
            self._headers_read = now
            self._dispatcher.limits(self._prepared.access.dialect.limits(result.headers), ticket, now)


def misfit(parser: Parser, answer: Answer) -> str | None:
    """Why an answer does not fit; None where it does."""
    value = parser.choose([choice.text for choice in answer.choices])
    if not isinstance(value, Misfit):
        return None
    first, message = answer.choices[0], value.message
    if first.text is None and first.refusal is not None:
        message = f"the model refused: {first.refusal[:300].encode('utf-8', 'replace').decode()}"
    if first.finish_reason == "length":
        message += " (the answer was cut off at its token limit)"
    return message


_INTERRUPTED = Failure(Kind.INTERRUPTED, "the run ended while this was in flight", paid=True)


def repair(prepared: Prepared, plain: Request, attempt: Attempt) -> Request:
    """The request that shows the model what did not fit in this attempt; without a text there is nothing to show."""
    answer = prepared.access.dialect.read(reply(attempt))
    text = answer.choices[0].text if isinstance(answer, Answer) else None
    return plain if text is None else repaired(plain, text, attempt.message or "")


_NEVER_GOT_THERE = {Kind.DNS, Kind.CONNECTION, Kind.CONNECT_TIMEOUT, Kind.TLS, Kind.CERTIFICATE, Kind.PROXY}
_NEVER_SENT = {Kind.LOCAL_RESOURCES, Kind.UNSENDABLE}
_GAVE_UP = {408, 499, 504, 524}
"""Statuses of who has stopped waiting: behind them the answer may have been made."""


def _is_free(attempt: Attempt, failure: Failure) -> bool:
    """Whether a failed attempt can have cost nothing, for a budget: whatever may have been answered may be billed."""
    if attempt.status is None:
        return failure.kind in _NEVER_GOT_THERE | _NEVER_SENT
    return attempt.status >= 300 and attempt.status not in _GAVE_UP and not failure.paid


def _explain(attempt: Attempt, failure: Failure) -> None:
    """Write down why an attempt gave no answer; its row is to be asked again unless more is said."""
    attempt.outcome = Outcome.AGAIN
    attempt.kind, attempt.status = failure.kind, failure.status
    attempt.type, attempt.code, attempt.message = failure.type, failure.code, failure.message
    attempt.retry_after, attempt.paid = failure.retry_after, failure.paid


def _recorded(ticket: Ticket, result: Reply | Failure) -> Attempt:
    """The line of the ledger for what came, before anybody has looked into it."""
    turn = ticket.turn
    request, timing = turn.request, result.timing or Timing(0, 0.0)
    return Attempt(
        unit=request.unit,
        row=request.row,
        attempt=turn.attempt,
        outcome=None,
        sent_at=timing.sent_at,
        waited=ticket.sent - turn.ready,
        latency=timing.latency,
        time_to_first_token=timing.time_to_first_token,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        request_hash=request.hash,
        model=request.model,
        cache_key=request.cache_key,
        body=result.body,
        status=result.status,
        tier=request.tier,
    )


def reply(attempt: Attempt) -> Reply:
    """A recorded answer as it came."""
    timing = Timing(attempt.sent_at, attempt.latency, attempt.time_to_first_token)
    return Reply(attempt.status or 200, {}, attempt.body or b"", timing)
