"""Where a run's time goes: a line for every second in which something happened, and what the run says of itself."""

import os
from collections.abc import Callable, Collection
from datetime import datetime

from batcher.engine.counts import Counts
from batcher.ledger import Ledger
from batcher.records import KnownLimit, Note, Second, Snapshot
from batcher.schedule import Decision, Dispatcher

SHORTEST = 0.1
"""Seconds that a line in which nothing happened has at least."""
QUIET = 60.0
"""Seconds in which nothing happens that may become one line."""


class Timeline:
    """Writes the timeline and the note. `why_idle` tells why there is no row to be sent."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        counts: Counts,
        why_idle: Callable[[], str],
        decisions: Collection[Decision],
        limits: Callable[[], tuple[KnownLimit, ...]],
        started: float,
        started_at: datetime,
    ) -> None:
        """`decisions` are the scheduler's last, `limits` what the next run should know.

        `started` is the event loop's time at the moment `started_at`: all other moments follow from it."""
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._counts = counts
        self._why_idle = why_idle
        self._decisions = decisions
        self._limits = limits
        self._clock = started_at.timestamp() - started
        self._started_at = started_at.isoformat(timespec="seconds")
        self._since = started
        self._seen = self._sums()
        self._cost_seen: float | None = 0.0
        self._held: dict[str, float] = {}
        self._last = ("", "")
        self.binds = "input"
        """What held requests back for most of the time since the last tick."""

    def tick(self, snapshot: Snapshot, now: float, stuck: str | None = None) -> None:
        """Write down what happened since the last line, if anything did.

        `stuck` is what holds up the whole run, whatever the dispatcher says.
        """
        held = self._dispatcher.held(now)
        if stuck is not None:
            held = {stuck: sum(held.values())}
        elif "input" in held:
            idle = held.pop("input")
            why = self._why_idle()
            held[why] = held.get(why, 0.0) + idle
        self.binds = max(held, key=held.__getitem__, default=self.binds)
        for what, seconds in held.items():
            if seconds > 0:
                self._held[what] = self._held.get(what, 0.0) + seconds
        told = (snapshot.phase, self.binds)
        moved = self._sums() != self._seen
        if moved or snapshot.in_flight or told != self._last or now - self._since >= QUIET:
            self._last = told
            second = self._second(snapshot, now) if moved or now - self._since >= SHORTEST else None
            self._ledger.note(self._note(snapshot._replace(binds=self.binds), now), second)

    def _second(self, snapshot: Snapshot, now: float) -> Second:
        """What happened since this was last asked."""
        before, self._seen = self._seen, self._sums()
        sent, answered, refused, failed, rows, prompt, completion = (
            after - earlier for after, earlier in zip(self._seen, before, strict=True)
        )
        cost = self._counts.cost
        second = Second(
            time=int(self._clock + self._since),
            seconds=round(now - self._since, 3),
            sent=sent,
            answered=answered,
            refused=refused,
            failed=failed,
            rows=rows,
            in_flight=snapshot.in_flight,
            window=snapshot.window,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost_usd=None if cost is None or self._cost_seen is None else cost - self._cost_seen,
            held={what: round(seconds, 3) for what, seconds in self._held.items()},
            buckets=dict(snapshot.buckets),
        )
        self._cost_seen, self._held, self._since = cost, {}, now
        return second

    def _note(self, snapshot: Snapshot, now: float) -> Note:
        return Note(
            time=int(self._clock + now),
            started_at=self._started_at,
            pid=os.getpid(),
            snapshot=snapshot,
            troubles=self._counts.troubles,
            decisions=tuple((int(self._clock + each.at), each.what) for each in self._decisions),
            limits=self._limits(),
        )

    def _sums(self) -> tuple[int, ...]:
        counts = self._counts
        return (
            self._dispatcher.sent,
            counts.answers,
            counts.refused,
            counts.failures,
            counts.rows,
            counts.prompt_tokens,
            counts.completion_tokens,
        )
