"""The run around the attempts: the rooms opened, joined, watched and closed in order."""

import asyncio
import gc
import math
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import msgspec
from anyio.abc import TaskStatus

from batcher import models
from batcher.engine.attempt import BACKLOG_BYTES, Attempts
from batcher.engine.counts import Counts
from batcher.engine.feed import Feed
from batcher.engine.prepared import Prepared, agree, claim, not_ours, prepare
from batcher.engine.publish import Press
from batcher.engine.threads import abandonable, aside
from batcher.engine.timeline import Timeline
from batcher.engine.turns import Turns
from batcher.engine.twins import Twins
from batcher.errors import BatcherError, InterruptedRunError, JobError, PausedError, ServiceError, StorageError
from batcher.job import Job
from batcher.ledger import REPARSE, Ledger, Lock, lock_beside
from batcher.parameters import is_template
from batcher.records import UNIT, Attempt, KnownLimit, Note, Outcome, Snapshot, Summary, Totals
from batcher.report import money
from batcher.retry import Guard
from batcher.schedule import Budget, Deadline, Decision, Dispatcher, Pace
from batcher.sink import Shape
from batcher.store import Results
from batcher.transport import HttpTransport, Transport

DRAIN = 30.0
"""Seconds that requests in flight are given to be answered once the run is asked to end."""
SETTLE = 10.0
"""Seconds that the disk is given to take what has arrived."""
LOOK = 5.0
"""Seconds that a run's first request waits for the service to say which models it has."""
LONGEST_WAIT = 300.0
"""Seconds: with `wait = false` a limit that takes longer until the next request may go pauses the run instead."""
PATIENCE = 6 * 3600.0
PATIENCE_AT_FIRST = 120.0
"""Seconds that an outage may last: when something has answered before, and when nothing ever has."""
LONG = 60.0
"""Seconds of waiting of which the progress tells the end."""
DECISIONS = 20
"""The last decisions of the scheduler that a run tells of."""

RARELY = 50_000
"""New objects between two looks of the garbage collector during a run."""


async def run(
    job: Job,
    *,
    base_url: str | None = None,
    table: object = None,
    transport: Transport | None = None,
    watch: Callable[[Snapshot], None] | None = None,
    signals: bool = False,
) -> Summary:
    """Run or resume a job to its end.

    `table` are the rows where the job names no files: anything with Arrow's C interface. `transport` and `base_url`
    stand in for the job's service; `watch` is told the state twice a second; with
    `signals` the first SIGINT, SIGTERM or SIGHUP drains and the second stops. Raises the errors of batcher.errors.
    """
    prepared = await aside(prepare, job, base_url, table)
    results = job.results
    with exclusively(results, job.ledger_path):
        if refusal := await aside(not_ours, job):
            raise JobError(f"{refusal}\nput it back, or name another output")
        ledger = Ledger(job.ledger_path)
        if (retries := ledger.retries()) and retries[-1].finished_at is None:
            raise JobError(
                f"a retry of {retries[-1].rows:,} rows is under way in {results}\n"
                f"batcher retry {results} goes on with it; with --abandon it leaves the rest as it is"
            )
        if refusal := reparse_under_way(ledger, results):
            raise JobError(refusal)
        shape = await aside(agree, ledger, prepared)
        origin = b"" if table is None else b"# The rows came from Python: batcher.run(job, input=table)\n"
        await aside(claim, ledger, results)
        await aside(results.write, "job.toml", origin + job.document())
        return await live(prepared, ledger, shape, Feed, transport, watch, signals)


async def live(
    prepared: Prepared,
    ledger: Ledger,
    shape: Shape,
    feed: Callable[[Prepared, Ledger, Press, Dispatcher, Turns, Counts, Twins | None], Feed],
    transport: Transport | None,
    watch: Callable[[Snapshot], None] | None,
    signals: bool,
) -> Summary:
    """Ask the rows of a feed, with all that is around it. The ledger is closed at the end."""
    service = prepared.job.service
    made = transport or HttpTransport(
        prepared.access.url,
        prepared.access.headers,
        prepared.access.dialect,
        service.timeout,
        secrets=prepared.access.secrets,
        proxy_from_environment=service.proxy,
        encoding=service.encoding,
        compression=service.compression,
        library=service.transport,
    )
    try:
        with _collecting_rarely():
            budget = await aside(_budget, prepared, ledger)
            return await _Run(prepared, ledger, shape, feed, made, watch, budget).live(signals)
    finally:
        ledger.close()
        await made.close()


def reparse_under_way(ledger: Ledger, results: Results) -> str | None:
    """What to say of an output whose answers are just being read again, None where they are not."""
    if ledger.meta(REPARSE) is None:
        return None
    return f"a reparse is under way in {results}\nbatcher reparse {results} goes on with it"


@contextmanager
def exclusively(results: Results, ledger: Path) -> Iterator[None]:
    """Keep other runs away from an output and its ledger. Raises OutputInUseError."""
    with ExitStack() as stack:
        if ledger.parent != results.folder:
            _make(ledger.parent)
            beside = lock_beside(ledger)
            try:
                beside.open("ab").close()  # never a new file in its place: who holds the former one would hold nothing
            except OSError as error:
                raise StorageError.of(beside, error) from None
            stack.enter_context(Lock(beside))
        if results.folder is not None:
            _make(results.folder)
            stack.enter_context(Lock(results.folder))
        yield


class _Run:
    """One run, from the first row to the summary."""

    def __init__(
        self,
        prepared: Prepared,
        ledger: Ledger,
        shape: Shape,
        feed: Callable[[Prepared, Ledger, Press, Dispatcher, Turns, Counts, Twins | None], Feed],
        transport: Transport,
        watch: Callable[[Snapshot], None] | None,
        budget: Budget | None,
    ) -> None:
        schedule = prepared.job.schedule
        numbers = (schedule.requests_per_minute, schedule.tokens_per_minute, schedule.uncached_tokens_per_minute)
        pace = Pace(
            None if schedule.max_in_flight == "auto" else schedule.max_in_flight,
            *(None if number == "auto" else number for number in numbers),
        )
        self._now = asyncio.get_running_loop().time
        self._started, self._started_at = self._now(), datetime.now(UTC)
        self._prepared, self._ledger, self._transport, self._watcher = prepared, ledger, transport, watch
        self._budget = budget
        self._deadline: Deadline | None = None
        self._due = _due(schedule.deadline, ledger)
        if self._due is not None:
            at = self._started + (self._due - self._started_at).total_seconds()
            self._deadline = Deadline(at, len(schedule.tiers), self._started)
        self._decisions: deque[Decision] = deque(maxlen=DECISIONS)
        self._before = _known_before(ledger)
        self._host = urlsplit(prepared.access.url).netloc
        self._dispatcher = Dispatcher(
            pace,
            _open_files(),
            self._started,
            budget=budget,
            memory=_memory(),
            known=[limit for limit in self._before if limit.host == self._host],
            learns_caps=prepared.job.request.learned_cap is not None,
            tiers=schedule.tiers,
            deadline=self._deadline,
            trace=self._decisions.append,
        )
        self._turns = Turns(self._dispatcher)
        self._counts = Counts()
        self._press = Press(prepared, shape, ledger, self._end)
        self._twins = Twins(ledger, self._press.asks) if schedule.dedupe else None
        self._feed = feed(prepared, ledger, self._press, self._dispatcher, self._turns, self._counts, self._twins)
        self._guard = Guard(schedule.wait)
        self._attempts = Attempts(
            prepared, transport, self._dispatcher, self._turns, ledger, self._guard, self._counts, budget, self._end
        )
        self._timeline = Timeline(
            ledger,
            self._dispatcher,
            self._counts,
            self._why_idle,
            self._decisions,
            self._limits,
            self._started,
            self._started_at,
        )
        self._sending = anyio.CancelScope()
        self._ending: BatcherError | None = None
        self._hasty = False
        self._phase = "starting"

    async def live(self, signals: bool) -> Summary:
        """Open the rooms, let the workers work, publish what is recorded, say what was done."""
        self._ledger.start(self._durable, self._end)
        self._tick()
        for attempt in self._ledger.undecided():
            self._attempts.decide_late(attempt)
        try:
            await self._settle()
            if self._ending is not None:
                raise self._ending
            self._enter("running")
            if await aside(self._feed.take_up):
                self._guard.answered_before()
            async with anyio.create_task_group() as rooms:
                if signals:
                    await rooms.start(self._heed_signals)
                rooms.start_soon(self._press.work)
                rooms.start_soon(self._count)
                rooms.start_soon(self._watch)
                with self._sending:
                    async with anyio.create_task_group() as crew:
                        crew.start_soon(self._offer)
                        await self._turns.called()
                        await self._check_models()
                        for _ in range(self._dispatcher.ceiling):
                            crew.start_soon(self._attempts.work)
                await self._settle()
                if not self._hasty:
                    await self._feed.reopen()
                    await self._press.publish_open()
                rooms.cancel_scope.cancel()
        finally:
            self._ledger.give_up()
        return await self._conclude()

    async def _check_models(self) -> None:
        """Before the first request: end the run where the service has no such model, and learn what it can."""
        model = self._prepared.job.request.parameters.get("model")
        if not self._turns.closed and isinstance(model, str) and not is_template(model):
            told: models.Model | ServiceError | None = None
            with anyio.move_on_after(LOOK):
                told = await models.described(self._transport, model)
            if isinstance(told, ServiceError):
                self._end(told)
            elif told is not None:
                self._dispatcher.bound(told.max_output, told.context)

    async def _offer(self) -> None:
        try:
            await self._feed.work()
        except BatcherError as error:
            self._end(error)
        self._close_if_done()

    def _durable(self, attempts: Sequence[Attempt]) -> None:
        """These attempts are on the disk: only now are their rows done and their turns given back."""
        landed = 0
        for attempt in attempts:
            if self._budget is not None:
                self._budget.settle(attempt)
            opened = self._press.of(attempt.row)
            if opened is None:
                continue  # decided late, before anything was fed
            opened.changed = True
            if attempt.row in self._attempts.revised:
                self._attempts.revised.remove(attempt.row)
            elif attempt.attempt:
                landed += 1
            if attempt.outcome in (Outcome.ANSWERED, Outcome.FAILED):
                self._counts.ended(attempt.outcome)
                opened.left -= 1
                self._press.publish_if_complete(opened)
                if self._twins is not None:
                    self._twins.ended(attempt)
        self._counts.requests += landed
        self._dispatcher.landed(landed)
        self._attempts.disk.set()
        self._turns.wake()
        self._close_if_done()

    def _close_if_done(self) -> None:
        if short := self._short():
            self._end(short)
        elif self._feed.ended and self._dispatcher.idle:
            self._turns.close()

    def _end(self, error: BatcherError) -> None:
        """Stop sending; what is in flight may still be answered. The first reason given is the run's."""
        if self._ending is None:
            self._ending = error
            self._enter("draining")
            self._turns.close()
            self._press.close()
            self._attempts.disk.set()
            self._sending.deadline = self._now() + DRAIN

    async def _settle(self) -> None:
        """Everything that arrived becomes durable, or the run ends without it."""
        if self._ending is None:
            self._enter("publishing")
            self._decide_held()
        while await self._flushed() and self._twins is not None and self._twins.recorded and not self._hasty:
            pass  # rows that share what has just become durable have their turn

    async def _flushed(self) -> bool:
        """Everything that was recorded is durable; false, and the run ends, where the disk does not take it."""
        with anyio.move_on_after(SETTLE, shield=True) as patience:
            try:
                await self._ledger.flush()
                return True
            except StorageError as error:
                self._end(error)
        if patience.cancelled_caught:
            self._ledger.give_up()
            self._end(StorageError(f"{self._ledger.path}: the disk takes nothing; run the same command again"))
        return False

    def _decide_held(self) -> None:
        """No answer can come any more that would tell a bad job from bad rows."""
        if not self._attempts.held:
            return
        if refused := self._guard.give_up_on_held():
            self._end(refused)
        else:
            self._attempts.release_held()

    async def _heed_signals(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if self._ending is None:
                    self._end(InterruptedRunError("interrupted; the same command goes on from here", number))
                else:
                    self._hasty = True
                    self._press.stop()
                    self._sending.cancel()

    async def _watch(self) -> None:
        """Tell whoever watches, note where time goes, and end a run that waits for too long."""
        for ticks in count():
            if ticks % 2 == 0:
                self._tick()
            self._look_at_deadline()
            if self._watcher is not None:
                self._watcher(self._snapshot())
            await anyio.sleep(0.5)
            if overdue := self._overdue():
                self._end(overdue)
            elif self._press.full and self._dispatcher.idle:
                self._decide_held()

    def _look_at_deadline(self) -> None:
        """Let the scheduler decide which tiers are needed for what is left, once it is known how much that is."""
        asked, counts = self._feed.asked, self._counts
        if self._deadline is not None and asked is not None:
            self._dispatcher.left(asked - counts.answered_rows - counts.failed_rows, self._now())
            self._turns.wake()

    def _enter(self, phase: str) -> None:
        self._tick()
        self._phase = phase

    def _tick(self) -> None:
        """Let the timeline have what happened up to now."""
        stuck = None
        if self._phase != "running":
            stuck = self._phase
        elif self._ledger.backlog > BACKLOG_BYTES:
            stuck = "the disk"
        self._timeline.tick(self._snapshot(), self._now(), stuck)

    def _why_idle(self) -> str:
        """Why there is no row that could be sent."""
        if self._press.full:
            return "publishing" if self._press.behind else "open parts"
        return "the last rows" if self._feed.ended else "input"

    def _short(self) -> PausedError | None:
        """Say so where what is left of the budget is too little for the rows that are left."""
        budget = self._budget
        if budget is None or not budget.set_aside or not self._dispatcher.out_of_rows:
            return None
        if not (budget.reached or self._feed.ended or self._press.full):
            return None
        asked, counts = self._feed.asked, self._counts
        pending = None if asked is None else max(0, asked - counts.answered_rows - counts.failed_rows)
        rows = (
            "an unknown number of rows is"
            if pending is None
            else "1 row is"
            if pending == 1
            else f"{pending:,} rows are"
        )
        lost = f" ({money(budget.lost)} of it maybe, by requests that timed out or were cut off)" if budget.lost else ""
        said = (
            f"the budget is reached: {money(budget.spent)} of {money(budget.limit)} is spent{lost}, "
            f"{money(max(0.0, budget.left))} is left, and the next request may cost {money(budget.dearest_left)}\n"
            f"{rows} pending"
        )
        spent, done = (counts.cost, counts.rows) if counts.rows else (budget.spent - budget.lost, counts.before)
        if pending is not None and spent and done:
            said += f" and would cost about {money(spent / done * pending)}, going by those before them"
        return PausedError(f"{said}: raise schedule.budget_usd and run the same command again")

    def _overdue(self) -> PausedError | None:
        if short := self._short():
            return short
        since, now = self._dispatcher.down_since, self._now()
        patience = PATIENCE if self._counts.answers or self._counts.before else PATIENCE_AT_FIRST
        if since is not None and now - since > patience:
            why = f": {self._counts.last_failure}" if self._counts.last_failure else ""
            return PausedError(
                f"{self._prepared.access.url} has not answered for {patience / 60:.0f} minutes{why}\n"
                "run the same command again when it does"
            )
        wait = self._turns.until - now if self._turns.until is not None and not self._dispatcher.in_flight else 0.0
        if wait > LONGEST_WAIT and not self._prepared.job.schedule.wait:
            if self._dispatcher.opens():
                self._turns.wake()
                return None
            until = f"until {datetime.fromtimestamp(self._clock(now + wait), UTC):%Y-%m-%d %H:%M} UTC"
            return PausedError(
                f"{self._dispatcher.pressure().binds}: used up for {wait / 3600:.1f} h, {until}\n"
                "run the same command again then"
            )
        return None

    def _clock(self, moment: float) -> float:
        """The Unix time of a moment of the event loop."""
        return self._started_at.timestamp() + moment - self._started

    async def _count(self) -> None:
        """Count the input while the first rows are on their way."""
        over = False
        try:
            await abandonable(self._feed.count, lambda: over)
        except BatcherError as error:
            self._end(error)
        finally:
            over = True

    def _snapshot(self) -> Snapshot:
        pressure, counts = self._dispatcher.pressure(), self._counts
        until = self._waits_until()
        return Snapshot(
            total=self._feed.asked,
            answered=counts.answered_rows,
            failed=counts.failed_rows,
            before=counts.before,
            in_flight=pressure.in_flight,
            window=pressure.window,
            waiting=pressure.fresh + pressure.retrying,
            binds=self._timeline.binds if until is None else pressure.binds,
            buckets=self._dispatcher.used(self._now()),
            requests=self._dispatcher.sent,
            refused=counts.refused,
            prompt_tokens=counts.prompt_tokens,
            completion_tokens=counts.completion_tokens,
            cost_usd=counts.cost,
            seconds=self._now() - self._started,
            phase=self._phase,
            budget_usd=self._prepared.job.schedule.budget_usd,
            spent_usd=None if self._budget is None else self._budget.spent,
            until=until,
            deadline=None if self._due is None else self._due.timestamp(),
            late=None if self._deadline is None else self._deadline.late,
        )

    def _waits_until(self) -> float | None:
        """The Unix time until which nothing goes, where that is a minute or more away."""
        until = self._turns.until
        if until is None or until - self._now() < LONG or self._dispatcher.in_flight:
            return None
        return self._clock(until)

    def _limits(self) -> tuple[KnownLimit, ...]:
        """What is known of services' limits: of this one by this run, of others by earlier ones."""
        mine = {limit[:5]: limit for limit in (one._replace(host=self._host) for one in self._dispatcher.known())}
        return (*(limit for limit in self._before if limit[:5] not in mine), *mine.values())

    async def _conclude(self) -> Summary:
        """Write the summary; raise what ended the run, if it was not its end."""
        totals = Totals()
        for record in self._ledger.parts(UNIT).values():
            totals.add(record.totals)
        expected = self._feed.total_in_output
        pending = None if expected is None else max(0, expected - totals.rows)
        if self._ending is None and pending:
            self._ending = StorageError(f"{pending} rows have no outcome; run the same command again")
        finished_at = datetime.now(UTC).isoformat(timespec="seconds")
        retries = self._ledger.retries()
        if self._ending is None and retries and retries[-1].finished_at is None:
            retries = (*retries[:-1], msgspec.structs.replace(retries[-1], finished_at=finished_at))
        states = {InterruptedRunError: "interrupted", PausedError: "paused"}
        summary = Summary(
            name=self._prepared.job.name,
            state="complete" if self._ending is None else states.get(type(self._ending), "stopped"),
            selected=self._feed.selected,
            pending=pending,
            totals=totals,
            started_at=self._started_at.isoformat(timespec="seconds"),
            finished_at=finished_at,
            seconds=round(self._now() - self._started, 3),
            requests=self._counts.requests,
            transport=self._transport.name,
            version=version("batcher"),
            retries=retries,
            budget_usd=self._prepared.job.schedule.budget_usd,
            spent=self._ledger.spending(),
            deadline=None if self._due is None else self._due.isoformat(timespec="seconds"),
            late=await aside(self._late),
        )
        self._enter(summary.state)
        if not self._hasty:
            text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
            try:
                await aside(self._prepared.job.results.write, "summary.json", text)
                if self._ending is None:
                    self._ledger.end_retry(finished_at)  # last: whatever fails before, the same command goes on with it
                await aside(self._press.finish)
            except StorageError as error:
                self._ending = self._ending or error
        self._tick()
        if self._watcher is not None:
            self._watcher(self._snapshot())
        if self._ending is not None:
            raise self._ending
        return summary

    def _late(self) -> float | None:
        """Seconds after the deadline at which all was done, below 0: before it; None where it is not, or there is none.

        Where nothing was left to do, it is what the run before has said.
        """
        if self._deadline is None or self._due is None or self._ending is not None:
            return None
        late = round(self._now() - self._deadline.at, 3)
        with suppress(StorageError, msgspec.MsgspecError):
            if not self._counts.rows and (former := self._prepared.job.results.read("summary.json")) is not None:
                said = msgspec.json.decode(former, type=Summary)
                if said.late is not None and said.deadline == self._due.isoformat(timespec="seconds"):
                    return said.late
        return late


def _budget(prepared: Prepared, ledger: Ledger) -> Budget | None:
    """What may still be spent. An output that once had a budget is counted on, so that it may have one again."""
    limit, known = prepared.job.schedule.budget_usd, ledger.spending()
    if limit is None and known is None:
        return None
    before = 0.0 if known is not None else ledger.spent_uncounted()
    if before is None:
        raise JobError(
            f"{prepared.job.origin}: schedule.budget_usd: what earlier runs have spent is not known, for no price was; "
            "name another output"
        )
    return Budget(math.inf if limit is None else limit, ledger.take_up_spending(before), prepared.most)


def _due(given: float | datetime | None, ledger: Ledger) -> datetime | None:
    """When all rows should be done: a span counts from the output's first start, or from that of a retry."""
    if given is None or isinstance(given, datetime):
        return given
    retries = ledger.retries()
    under_way = retries[-1].started_at if retries and retries[-1].finished_at is None else None
    begun = under_way or (ledger.meta("begun") or b"").decode()
    return datetime.fromisoformat(begun) + timedelta(seconds=given)


def _known_before(ledger: Ledger) -> tuple[KnownLimit, ...]:
    """The limits that earlier runs found out."""
    try:
        return msgspec.msgpack.decode(ledger.meta("note") or b"", type=Note).limits
    except msgspec.MsgspecError:
        return ()  # no run came to say anything


def _memory() -> int:
    """Bytes of requests that may be in flight: an eighth of what the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def _open_files() -> int:
    """How many connections this process may have, after asking for as many as it is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 100_000 if soft == resource.RLIM_INFINITY else max(1, int((soft - 64) / 1.2))


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Spare the run Python's cyclic garbage collector, which walks thousands of live requests for nothing.

    Request objects die by reference counts; with the usual thresholds a run at 512 in flight costs 1.7 times the CPU.
    """
    thresholds = gc.get_threshold()
    if thresholds[0] >= RARELY:
        yield  # whoever runs us has seen to it, for all runs together
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(RARELY, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError.of(folder, error) from None
