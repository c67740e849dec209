"""An output that is there already, held so that nobody else changes it meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from batcher.engine.prepared import not_ours
from batcher.engine.run import exclusively, reparse_under_way
from batcher.errors import JobError, StorageError
from batcher.job import Job, from_document, parse_document
from batcher.ledger import GONE, Ledger
from batcher.records import UNIT, Summary
from batcher.store import Folder, Results, not_here, results_at

__all__ = ["finished_summary", "held", "reparse_under_way", "summary_of"]


@contextmanager
def held(output: str | Path) -> Iterator[tuple[Job, Ledger]]:
    """Hold an output: the job that it was begun with, and its ledger.

    Raises JobError, OutputInUseError, StorageError.
    """
    results = results_at(output)
    if results.folder is not None:
        results = Folder(Path(os.path.abspath(results.folder)))
    written = results.read("job.toml")
    if written is None:
        raise JobError(f"{output}: no output of batcher, for it has no job.toml")
    document = parse_document(written, "job.toml")
    section = document.get("output")
    if not isinstance(section, dict):
        raise JobError(f"{results}/job.toml: is damaged: the section [output] is missing")
    section["path"] = str(results)
    path = Path(results.folder or "", str(section.get("ledger") or "ledger.sqlite"))
    if not path.is_file():
        raise StorageError(f"{path}: {GONE if results.folder else not_here(results)}")
    with exclusively(results, path):
        ledger = Ledger(path)
        folder, texts = ledger.meta("folder"), ledger.meta("texts")
        if folder is None or texts is None:
            raise JobError(f"{output}: nothing has been asked yet: run the job to its end first")
        base = from_document(
            document, Path(os.fsdecode(folder)), "job.toml", msgspec.json.decode(texts, type=dict[str, str])
        )
        if refusal := not_ours(base):
            raise JobError(refusal)
        yield base, ledger


def summary_of(results: Results) -> Summary | None:
    """What the last run left, if it came to its end."""
    try:
        return msgspec.json.decode(results.read("summary.json") or b"", type=Summary)
    except msgspec.MsgspecError:
        return None


def finished_summary(results: Results, summary: Summary | None, ledger: Ledger) -> Summary:
    """The summary of an output in which nothing is pending. Raises JobError where something is."""
    if summary is None or (summary.pending == 0 and ledger.pending(UNIT)):
        raise JobError(f"{results}: the last run did not come to its end: run the job to its end first")
    if summary.pending != 0:
        rows = "rows" if summary.pending is None else f"{summary.pending:,} rows"
        raise JobError(f"{results}: {rows} are pending: run the job to its end first")
    return summary
