"""The few exceptions that end a run, one per exit code; a row's failure is never one of them."""

import errno
import os


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


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "let it be written, or name another output,"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}


class StorageError(BatcherError):
    """The local disk refused: full, read-only, damaged, or of a kind that cannot keep promises."""

    exit_code = 6

    @classmethod
    def of(cls, place: str | os.PathLike[str], error: OSError) -> "StorageError":
        """What the system said of a file or folder that it does not write, and what to do."""
        why = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        what = _ADVICE.get(error.errno or 0, "look after the disk")
        return cls(f"{place} cannot be written: {why}; {what} and run the same command again")


class PausedError(BatcherError):
    """The run cannot go on now and can later: a day's quota, credit, an outage."""

    exit_code = 75


class InterruptedRunError(BatcherError):
    """A signal ended the run; the same command resumes it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
