"""What a run has seen so far, for whoever watches."""

from batcher.records import Failure, Kind, Outcome, Trouble

REFUSALS = {Kind.RATE_LIMITED, Kind.DAY_QUOTA, Kind.NO_CREDIT, Kind.OVERLOADED}
"""Failures by which the service says that it is too much, or too early."""


class Counts:
    """Rows are the output's; requests, tokens and cost are this run's."""

    def __init__(self) -> None:
        self.before = self.answered_rows = self.failed_rows = 0
        self.requests = self.answers = self.refused = self.failures = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.cost: float | None = 0.0
        self.last_failure: str | None = None
        self.troubles: dict[str, Trouble] = {}

    @property
    def rows(self) -> int:
        """Rows that this run has ended."""
        return self.answered_rows + self.failed_rows - self.before

    def resume(self, answered: int, failed: int) -> None:
        """Rows that earlier runs had done."""
        self.before += answered + failed
        self.answered_rows += answered
        self.failed_rows += failed

    def answered(self, prompt: int, completion: int, cost: float | None) -> None:
        """An answer came: its tokens, and its price where that is known."""
        self.answers += 1
        self.paid(prompt, completion, cost)

    def failed(self, failure: Failure, sent_at: int) -> None:
        """An attempt gave no answer; it was sent at this time (UTC, microseconds)."""
        if failure.kind in REFUSALS:
            self.refused += 1
        else:
            self.failures += 1
        self.last_failure = failure.message
        before = self.troubles.get(failure.kind)
        attempts = 1 + (before.attempts if before else 0)
        self.troubles[failure.kind] = Trouble(attempts, failure.message, sent_at // 1_000_000)

    def paid(self, prompt: int, completion: int, cost: float | None) -> None:
        """Tokens that are on the bill, or may be."""
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cost = None if cost is None or self.cost is None else self.cost + cost

    def ended(self, outcome: Outcome) -> None:
        """A row is done, and durable."""
        if outcome is Outcome.ANSWERED:
            self.answered_rows += 1
        else:
            self.failed_rows += 1
