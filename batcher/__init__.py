"""One request per input row, one typed Parquet row per answer, nothing lost.

The rooms, in the order that a row passes them: `job` (what is to be done), `source` (input files to rows), `prompt`
(row to request), `schedule` (when it may go), `transport` (the request over HTTP) with `dialects` (how a service
speaks), `parse` (an answer's text to a typed value), `retry` (again, and when), `ledger` (what is recorded), `sink`
(recorded answers to Parquet), `report` (what a person wants to know). `engine` joins them.
"""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pyarrow as pa

from batcher import engine, errors, simulator
from batcher.job import SIMULATOR, Job, load
from batcher.records import Snapshot, Summary
from batcher.store import Results

if TYPE_CHECKING:
    from batcher.results import Scores

__all__ = ["Job", "Result", "Snapshot", "Summary", "aretry", "arun", "errors", "load", "reparse", "retry", "run"]


class Result:
    """What a finished run left: its summary, and its rows as Arrow tables."""

    def __init__(self, results: Results, summary: Summary) -> None:
        self.output: Path | str = results.folder or str(results)
        """The output's folder, or its URI in an object store."""
        self.summary = summary
        self._results = results

    def __repr__(self) -> str:
        totals = self.summary.totals
        return f"Result({str(self.output)!r}, answered={totals.answered}, failed={totals.failed})"

    def table(self) -> pa.Table:
        """The answered rows, in the input's order."""
        return self._read("responses")

    def scores(self) -> "Scores":
        """How good the answers are, for a job with `[score]`. Needs `batcher[results]`; raises batcher.errors."""
        from batcher.results import measure

        return measure(self.output)

    def failures(self) -> pa.Table:
        """The rows that ended without an answer; an empty table without columns when there are none."""
        return self._read("failures")

    def _read(self, name: str) -> pa.Table:
        from pyarrow import dataset  # brings half a second of start-up with it, which a run need not pay

        system, root = self._results.arrow()
        files = sorted(f"{root}/{part}" for part in self._results.parts() if part.startswith(f"{name}/"))
        return dataset.dataset(files, filesystem=system, format="parquet").to_table() if files else pa.table({})


async def arun(job: Job, *, input: object = None, watch: Callable[[Snapshot], None] | None = None) -> Result:
    """Run or resume a job on this event loop; cancelling it keeps all that is recorded.

    `input` is a table or a DataFrame (pyarrow, pandas, Polars, DuckDB) for a job without `[input] path`. Raises
    batcher.errors.
    """
    return await _arun(job, input, watch, signals=False)


def run(job: Job, *, input: object = None, watch: Callable[[Snapshot], None] | None = None) -> Result:
    """Run or resume a job; the first Ctrl-C lets requests in flight end, the second stops.

    `input` is a table or a DataFrame (pyarrow, pandas, Polars, DuckDB) for a job without `[input] path`. Raises
    batcher.errors.
    """
    return anyio.run(_arun, job, input, watch, True, backend_options=_fast())


async def aretry(
    output: str | Path,
    where: str | None = None,
    settings: Sequence[str] = (),
    *,
    abandon: bool = False,
    input: object = None,
    watch: Callable[[Snapshot], None] | None = None,
) -> Result:
    """Like `retry`, on this event loop; cancelling it keeps all that is recorded. Raises batcher.errors."""
    return await _aretry(output, where, settings, abandon, input, watch, signals=False)


def retry(
    output: str | Path,
    where: str | None = None,
    settings: Sequence[str] = (),
    *,
    abandon: bool = False,
    input: object = None,
    watch: Callable[[Snapshot], None] | None = None,
) -> Result:
    """Ask the failed rows of an output again, or those for which the SQL condition `where` holds.

    `settings` are `section.key=value` changes for these rows. A retry that was interrupted goes on when it is called
    again; `abandon` ends it instead. `input` is the table that the rows came from, if they did. `watch` is never called
    where there is no such row. Raises batcher.errors.
    """
    return anyio.run(_aretry, output, where, settings, abandon, input, watch, True, backend_options=_fast())


def reparse(output: str | Path, settings: Sequence[str] = (), *, input: object = None) -> Result:
    """Read the stored answers of a finished output again and write its parts anew; nothing is asked.

    `settings` say how: `request.parse=…`, `request.choices=…`, `request.vote=…`, `request.response_format=…`, and the
    keys of `[score]`; files and types that the job names for it are read anew. What is scored needs the input again:
    `input` is the table that the rows came from, if they did. A reparse that was interrupted goes on when it is called
    again.
    Raises batcher.errors.
    """
    job, summary, _ = engine.reparse(output, settings, input)
    return Result(job.results, summary)


async def _aretry(
    output: str | Path,
    where: str | None,
    settings: Sequence[str],
    abandon: bool,
    table: object,
    watch: Callable[[Snapshot], None] | None,
    signals: bool,
) -> Result:
    with ExitStack() as stack:
        retrial = stack.enter_context(engine.reopened(output, where, settings))
        url = None
        if retrial.job.service.base_url == SIMULATOR:
            url = stack.enter_context(simulator.running(simulator.Settings())).url
        summary = await engine.retry(retrial, abandon=abandon, base_url=url, table=table, watch=watch, signals=signals)
    return Result(retrial.job.results, summary)


def _fast() -> dict[str, bool]:
    return {"use_uvloop": importlib.util.find_spec("uvloop") is not None}


async def _arun(job: Job, table: object, watch: Callable[[Snapshot], None] | None, signals: bool) -> Result:
    if job.service.base_url == SIMULATOR:
        with simulator.running(simulator.Settings()) as service:
            summary = await engine.run(job, base_url=service.url, table=table, watch=watch, signals=signals)
    else:
        summary = await engine.run(job, table=table, watch=watch, signals=signals)
    return Result(job.results, summary)
