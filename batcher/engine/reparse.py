"""Stored answers read again in another way: their parts are written again, and nothing is asked."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa

from batcher.access import dialect_of
from batcher.engine.attempt import misfit, reply
from batcher.engine.held import finished_summary, held, summary_of
from batcher.engine.prepared import parser_of, same_input, scorer_of, shape_of, source_of
from batcher.errors import JobError
from batcher.job import Job, parse_document
from batcher.killpoint import killpoint
from batcher.ledger import REPARSE, Ledger
from batcher.records import UNIT, Answer, Failure, Reparse, Reply, Summary, Timing, Totals
from batcher.sink import Sink
from batcher.source import Place


def reparse(output: str | Path, settings: Sequence[str] = (), table: object = None) -> tuple[Job, Summary, Reparse]:
    """Read a finished output's answers again, as its job says with these settings, and rewrite its parts.

    Files and types that say how answers are read are read anew, too. Goes on with a reparse that was interrupted, where
    it is the same one. What is scored needs the input again: its files, or the `table` that it was.
    Raises JobError, OutputInUseError, StorageError.
    """
    with held(output) as (base, ledger):
        retries = ledger.retries()
        if retries and retries[-1].finished_at is None:
            raise JobError(f"a retry is under way in {base.results}\nbatcher retry {base.results} goes on with it")
        before = finished_summary(base.results, summary_of(base.results), ledger)
        told = ledger.meta(REPARSE)
        begun = None if told is None else msgspec.json.decode(told, type=Reparse)
        settings = tuple(settings) or (begun.settings if begun else ())
        job = base.reread(settings)
        if job.keep != base.keep:
            raise JobError("--set score.by: the columns of the output are fixed; name one that is carried along")
        meaning, scoring = msgspec.json.encode(job.meaning()), msgspec.json.encode(job.scoring())
        mark = Reparse(settings=settings, meaning=hashlib.sha256(meaning + scoring).hexdigest())
        if begun is not None and begun.meaning == mark.meaning:
            mark = begun
        summary, mark = _rewrite(job, ledger, before, mark, table)
        _write(job, summary)
        ledger.end_reparse({"meaning": meaning, "scoring": scoring, "texts": msgspec.json.encode(job.texts)})
        killpoint("reparse.ended")
        job.results.end()
        return job, summary, mark


def _rewrite(job: Job, ledger: Ledger, before: Summary, mark: Reparse, table: object) -> tuple[Summary, Reparse]:
    """Write every part that is left again; what the output and the reparse have come to."""
    parser = parser_of(job.request, job.origin)
    dialect = dialect_of(job.service)

    def judge(body: bytes) -> Answer | str:
        answer = dialect.read(Reply(200, {}, body, Timing(0, 0.0)))
        if isinstance(answer, Failure):
            return answer.message
        return answer if parser is None else misfit(parser, answer) or answer

    kept = pa.ipc.read_schema(pa.py_buffer(ledger.meta("kept")))
    source = scorer = scored = None
    if job.score is not None:
        source = source_of(job, table)
        same_input(ledger, source)
        scorer = scorer_of(job, source, parser)
        scored = source.schema(sorted(scorer.inputs if scorer else ()))
    shape = shape_of(job, kept, parser, scorer, scored)
    sink = Sink(job.results, shape, lambda attempt: dialect.read(reply(attempt)), lambda *_: None)
    ledger.set_meta({REPARSE: msgspec.json.encode(mark)})
    killpoint("reparse.begun")
    sink.prepare()
    totals = Totals()
    for part, record in ledger.parts(UNIT).items():
        if part > mark.part:
            start = part * job.output.rows_per_part
            if source is not None and record.place is not None:
                source.places[start] = Place(*record.place)
            inputs = None if source is None else partial(source.kept, start, record.stop, shape.kept.names)
            record, came = sink.reread(record, part, judge, start, inputs)
            mark = msgspec.structs.replace(
                mark,
                part=part,
                rows=mark.rows + record.totals.answered,
                mended=mark.mended + came.rows,
                unfit=mark.unfit + came.unfit,
            )
            ledger.reread(mark, UNIT, part, record)
        totals.add(record.totals)
    return msgspec.structs.replace(before, totals=totals), mark


def _write(job: Job, summary: Summary) -> None:
    """The job as it reads answers now, and the sums of what it has read."""
    written = job.results.read("job.toml") or b""
    document = parse_document(written, "job.toml")
    now = parse_document(job.document(), "job.toml")
    document |= {section: now[section] for section in ("request", "score") if section in now}
    comment = written[: written.index(b"\n") + 1] if written.startswith(b"#") else b""
    job.results.write("summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2))
    job.results.write("job.toml", comment + msgspec.toml.encode(document))
