"""What a run has seen so far, for whoever watches."""

from batcher.records import Outcome


class Counts:
    """Rows are the output's; requests, tokens and cost are this run's."""

    def __init__(self) -> None:
        self.before = self.answered_rows = self.failed_rows = 0
        self.requests = self.answers = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.cost: float | None = 0.0
        self.last_failure: str | None = None

    def resume(self, answered: int, failed: int) -> None:
        """Rows that earlier runs had done."""
        self.before += answered + failed
        self.answered_rows += answered
        self.failed_rows += failed

    def answered(self, prompt: int, completion: int, cost: float | None) -> None:
        """An answer came: its tokens, and its price where that is known."""
        self.answers += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cost = None if cost is None or self.cost is None else self.cost + cost

    def ended(self, outcome: Outcome) -> None:
        """A row is done, and durable."""
        if outcome is Outcome.ANSWERED:
            self.answered_rows += 1
        else:
            self.failed_rows += 1
