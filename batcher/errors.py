"""The few exceptions that end a run, one per exit code; a row's failure is never one of them."""


class BatcherError(Exception):
    """What ended a run, in one or two lines that say what to do."""

    exit_code: int = 1


class JobError(BatcherError):
    """The job, its input or the way it was called is wrong; nothing was sent."""

    exit_code = 2


class ServiceError(BatcherError):
    """The service refuses the whole run: key, model, address, certificate, or every row alike."""

    exit_code = 4


class OutputInUseError(BatcherError):
    """Another run holds the output."""

    exit_code = 5


class StorageError(BatcherError):
    """The local disk refused: full, read-only, damaged, or of a kind that cannot keep promises."""

    exit_code = 6


class PausedError(BatcherError):
    """The run cannot go on now and can later: a day's quota, credit, an outage."""

    exit_code = 75


class InterruptedRunError(BatcherError):
    """A signal ended the run; the same command resumes it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
