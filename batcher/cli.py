"""The command line: what users type, what they read, and the exit codes."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from batcher.errors import BatcherError, InterruptedRunError, JobError, StorageError
from batcher.records import Snapshot
from batcher.report import Log, Progress, count, failure_lines, printable, render, status_text

if TYPE_CHECKING:
    from batcher import Result
    from batcher.job import Job
    from batcher.store import Results

# What only one command needs is imported there: starting up is a part of every command's time.

app = typer.Typer(
    name="batcher",
    help="Ask a language model once per row of a dataset, and keep every answer as a typed Parquet row.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _complete_job(incomplete: str) -> list[str]:
    return _found(incomplete, "*.toml", "*/*.toml")


def _complete_output(incomplete: str) -> list[str]:
    return [path.removesuffix("/job.toml") for path in _found(incomplete, "*/job.toml", "*/*/job.toml")]


def _found(incomplete: str, *patterns: str) -> list[str]:
    """Files whose path starts like this one, in plain letters; of others the shell knows how to write them."""
    folder, slash, start = incomplete.rpartition("/")
    base = Path(folder + slash)
    paths = [
        folder + slash + str(path.relative_to(base)) for pattern in patterns for path in base.glob(start + pattern)
    ]
    return sorted(path for path in paths if re.fullmatch(r"[\w./+-]+", path))


_JobFile = Annotated[
    Path,
    typer.Argument(metavar="JOB", help="The job file (TOML).", show_default=False, autocompletion=_complete_job),
]
_Output = Annotated[
    str,
    typer.Argument(metavar="OUT", help="Its folder or URI.", show_default=False, autocompletion=_complete_output),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the job file; may be repeated."),
]


class LogFormat(StrEnum):
    """How a run tells of itself on standard error."""

    TEXT = "text"
    JSON = "json"


_LogFormat = Annotated[
    LogFormat, typer.Option("--log-format", help="json: one JSON object per line, and nothing on standard output.")
]
_Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="The first N rows only.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, with the process's own arguments where none are given, and end with SystemExit.

    Every error that is not a bug is one or two lines on standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(arguments)
    except BatcherError as error:
        with suppress(OSError):
            sys.stderr.write(_shown(f"batcher: {error}") + "\n")
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        _say(f"batcher {version_of('batcher')}")
        raise typer.Exit


@app.command()
def run(
    job: _JobFile,
    settings: _Settings = None,
    limit: _Limit = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    log_format: _LogFormat = LogFormat.TEXT,
) -> None:
    """Run a job, or go on with one that was interrupted."""
    log = Log() if log_format is LogFormat.JSON else None
    with _telling(log):
        _run(_load(job, settings, limit), quiet, log)


def _run(job: "Job", quiet: bool, log: Log | None) -> None:
    """Run a job, tell how it goes and what it left. Ends with typer.Exit where rows have failed."""
    import batcher

    if log:
        log.tell("started", {"name": job.name, "output": str(job.results), "pid": os.getpid()})
    _watched(job.name, job.results, quiet, log, lambda watch: batcher.run(job, watch=watch))


def _watched(
    name: str,
    results: "Results",
    quiet: bool,
    log: Log | None,
    go: Callable[[Callable[[Snapshot], None] | None], "Result"],
) -> None:
    """Tell how a run goes and what it left. Ends with typer.Exit where rows have failed."""
    before = results.read("summary.json")
    watcher = None if quiet else log or Progress(name)
    try:
        result = go(watcher.show if watcher else None)
    finally:
        if watcher:
            watcher.close()
        written = before
        with suppress(StorageError):
            written = results.read("summary.json")
        if written is not None and written != before:  # it says when its run began and ended: no two are the same
            if log:
                log.tell("summary", _content(written))
            else:
                _say(_summary(results, written))
    if result.summary.totals.failed:
        raise typer.Exit(3)


@contextmanager
def _telling(log: Log | None) -> Iterator[None]:
    """With a log, the command's end and its errors are lines of it."""
    try:
        yield
    except BatcherError as error:
        if log is None:
            raise
        log.tell("error", {"message": str(error), "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from None
    except typer.Exit as ended:
        if log:
            log.tell("finished", {"exit_code": ended.exit_code})
        raise
    if log:
        log.tell("finished", {"exit_code": 0})


@app.command()
def plan(job: _JobFile, settings: _Settings = None, limit: _Limit = None) -> None:
    """Check a job, show its first request, estimate tokens, cost and time; send nothing."""
    from batcher import plan as planning

    made = planning.plan(_load(job, settings, limit))
    text = planning.render(made)
    _say(_shown(text) if sys.stdout.isatty() else text)  # elsewhere the request is to the byte what will be sent
    if made.refusal:
        raise JobError(f"{made.refusal}\nput it back, or name another output")


@app.command()
def rehearse(
    job: _JobFile,
    settings: _Settings = None,
    limit: _Limit = None,
    pilot: Annotated[
        int | None,
        typer.Option(metavar="N", help="Ask N rows first, into OUT.pilot-N: this is sent, and paid.", min=20),
    ] = None,
    earlier: Annotated[
        str | None, typer.Option("--from", metavar="OUT", help="What an earlier run saw of the service.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="The service's limit.", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="The same of all tokens.", min=1)] = None,
    uncached_tokens_per_minute: Annotated[
        int | None, typer.Option(help="The same of tokens that no cache has.", min=1)
    ] = None,
    completion_tokens: Annotated[int | None, typer.Option(help="The mean length of an answer.", min=1)] = None,
    latency: Annotated[
        float | None, typer.Option(help="Seconds that every answer takes before its tokens.", min=0)
    ] = None,
    completion_token: Annotated[float | None, typer.Option(help="Seconds that a token takes.", min=0)] = None,
    capacity: Annotated[int | None, typer.Option(help="Requests that the service serves at once.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as one JSON object.")] = False,
) -> None:
    """Forecast a job's duration and cost by running it against a model of its service; only --pilot sends anything.

    What the service is like comes from --pilot or --from, and from flags, which come first.
    """
    import msgspec

    import batcher
    from batcher import rehearse as rehearsing

    if pilot is not None and earlier is not None:
        raise JobError("rehearse: --pilot or --from, not both")
    asked = _load(job, settings, limit)
    if pilot is not None:
        first = rehearsing.piloted(asked, pilot)
        progress = Progress(first.name)
        try:
            batcher.run(first, watch=progress.show)
        finally:
            progress.close()
        earlier = str(_as_typed(first.results.folder) if first.results.folder else first.results)
        _note(f"the pilot's answers are in {earlier}")
    given = rehearsing.Given(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        uncached_tokens_per_minute=uncached_tokens_per_minute,
        completion_tokens=completion_tokens,
        latency=latency,
        completion_token=completion_token,
        capacity=capacity,
    )
    made = rehearsing.rehearse(asked, None if earlier is None else rehearsing.observe(earlier), given)
    if as_json:
        _say(msgspec.json.format(msgspec.json.encode(made), indent=2).decode())
    else:
        _say(rehearsing.render(made))


@app.command()
def status(
    output: _Output,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, as one JSON object.")] = False,
) -> None:
    """Tell what a run is doing, or has done, from another terminal; nothing is written or locked."""
    import msgspec

    from batcher.status import status as look

    found = look(output)
    if as_json:
        _say(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        _say(status_text(found))


@app.command()
def retry(
    output: _Output,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Ask the rows for which this holds, such as \"finish_reason = 'length'\"."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Ask these rows otherwise; may be repeated."),
    ] = None,
    abandon: Annotated[
        bool,
        typer.Option("--abandon", help="End an interrupted retry: rows not asked yet keep what they have."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    log_format: _LogFormat = LogFormat.TEXT,
) -> None:
    """Ask failed rows again, or those that --where picks; or go on with a retry that was interrupted.

    SQL may name the columns of responses and of failures; one that only the other has is null. An answer is replaced by
    a new answer, never by a failure.
    """
    import batcher
    from batcher.store import results_at

    log = Log() if log_format is LogFormat.JSON else None
    results = results_at(output)

    def go(watch: Callable[[Snapshot], None] | None) -> "Result":
        asked: list[int] = []

        def first(snapshot: Snapshot) -> None:
            if not asked:
                asked.append(snapshot.total or 0)
                _tell_asked(snapshot, results, log)
            if watch:
                watch(snapshot)

        result = batcher.retry(output, where, settings or (), abandon=abandon, watch=first)
        if not asked and log is None:
            _say("no row is asked again: " + ("none has failed" if where is None else "--where holds for none"))
        return result

    with _telling(log):
        _watched(results.name, results, quiet, log, go)


@app.command()
def reparse(
    output: _Output,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="request.parse, .choices, .vote or .response_format, or a key of [score]; may be repeated.",
        ),
    ] = None,
) -> None:
    """Read stored answers again, as the job's schema or type is now, or otherwise; nothing is asked or paid.

    Goes on with a reparse that was interrupted. Ends with 3 where rows have failed or do not fit.
    """
    from batcher import engine

    try:
        job, summary, done = engine.reparse(output, settings or ())
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; the same command goes on from here", signal.SIGINT) from None
    said = f"{job.results}: {count(done.rows)} answers are read again"
    if done.mended:
        said += f", {count(done.mended)} of them of rows that had failed"
    if done.unfit:
        said += f"; {count(done.unfit)} do not fit: parsed is null there"
    _say(_shown(said))
    if summary.totals.failed or done.unfit:
        if summary.totals.failed:
            _note(f"{count(summary.totals.failed)} rows have failed")
        raise typer.Exit(3)


def _tell_asked(snapshot: Snapshot, results: "Results", log: Log | None) -> None:
    """Say how many rows a retry asks, before it does."""
    if log:
        output = results.folder.resolve() if results.folder else results
        fields = {"output": str(output), "pid": os.getpid(), "rows": snapshot.total}
        log.tell("started", fields)
    else:
        done = f", {count(snapshot.before)} of them done before" if snapshot.before else ""
        _say(f"{count(snapshot.total or 0)} rows are asked again{done}")


@app.command()
def results(
    output: _Output,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as one JSON object.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line per number.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="For a page.")] = False,
) -> None:
    """Tell how good the answers of a job with [score] are: accuracy, labels, confusion, over all and by group."""
    from batcher import results as scored

    if as_json + as_csv + as_markdown > 1:
        raise JobError("results: --json, --csv or --markdown, one of them")
    scores = scored.measure(output)
    if as_json:
        _say(scored.as_json(scores))
    elif as_csv:
        _say(scored.as_csv(scores))
    elif as_markdown:
        _say(scored.as_markdown(scores))
    else:
        _say(scored.as_text(scores, get_terminal_size().columns if sys.stdout.isatty() else None))


@app.command()
def verify(output: _Output) -> None:
    """Recount an output: every row exactly once, files intact, sums equal the summary."""
    from batcher.verify import verify as recount

    verdict = recount(output)
    for problem in verdict.problems:
        _say(_shown(problem))
    totals = verdict.totals
    counted = f"{output}: {count(totals.answered)} rows answered, {count(totals.failed)} failed"
    if verdict.problems:
        raise StorageError(f"{counted}; problems found: {count(len(verdict.problems))}")
    if verdict.again:
        counted += f"; {count(verdict.again)} are being asked again: batcher retry {output} goes on with it"
    elif verdict.rereading:
        counted += f"; answers are being read again: batcher reparse {output} goes on with it"
    elif verdict.pending is None:
        counted += "; the last run did not come to its end: run the job again"
    else:
        counted += f", {count(verdict.pending)} pending"
    _say(_shown(f"{counted}; no problem found"))


@app.command()
def export(
    output: _Output,
    to: Annotated[
        Literal["openai-batch", "jsonl", "csv"],
        typer.Option("--to", help="OpenAI's batch files, a JSON object per row, or CSV for spreadsheets."),
    ],
    path: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="The file to write; beside OUT when absent.")
    ] = None,
) -> None:
    """Write an output's answers, and its failures beside them, for other tools."""
    from batcher import export as exporting

    made = exporting.export(output, to, path)
    _say(_shown(f"{_as_typed(made.answers)}: {count(made.answered)} rows answered"))
    if made.failures is not None:
        _say(_shown(f"{_as_typed(made.failures)}: {count(made.failed)} rows failed"))
    if made.pending is None:
        _note("the last run has not come to its end: rows that are pending are not exported")
    elif made.pending:
        _note(f"{count(made.pending)} rows are pending: not exported")


@app.command()
def init(
    path: Annotated[
        str | None, typer.Argument(metavar="INPUT", help="The input: a file, a folder or a glob.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask, as a template over the columns.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="A column to show the model, in place of --prompt; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model to ask.")] = None,
    identity: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="The column with the rows' ids.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", metavar="URL", help='The service; "simulator" needs no key.')
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", metavar="JOB", help="The job file to write; named after INPUT when absent."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="No questions: the defaults.")] = False,
) -> None:
    """Write a first job file for an input, by flags or by a few questions."""
    from batcher import init as beginning

    asked = not yes and sys.stdin.isatty()
    if path is None:
        if not asked:
            raise JobError("init: name the input, such as batcher init rows.jsonl")
        path = str(typer.prompt("Input (a file, a folder or a glob)"))
    if prompt is not None and columns:
        raise JobError("init: --prompt or --column, not both")
    target = target or beginning.default_target(path)
    if target.exists():
        raise beginning.taken(target)
    seen = beginning.look(path, target.absolute().parent)

    def answer(question: str, given: str | None, default: str) -> str:
        if given is not None or not asked:
            return default if given is None else given
        return str(typer.prompt(question, default=default, show_default=bool(default)))

    whole = seen.whole and not (prompt or columns or system or model or identity)
    if prompt is None and not columns and asked and not whole:
        _say(_shown(f"Columns: {', '.join(seen.usable)}"))
        chosen = answer("Columns to show the model", None, ",".join(seen.prompt))
        columns = [name.strip() for name in chosen.split(",") if name.strip()]
    if whole:
        service = answer("Service", base_url, "simulator")
        answers = beginning.Answers(prompt=None, system=None, model=beginning.MODEL, id=None, base_url=service)
    else:
        answers = beginning.Answers(
            prompt=beginning.prompt_of(seen, columns or seen.prompt) if prompt is None else prompt,
            system=answer("What the model is told before (Enter for nothing)", system, "") or None,
            model=answer("Model", model, beginning.MODEL),
            id=answer("Column with the rows' ids", identity, seen.id or "") or None,
            base_url=answer("Service", base_url, "simulator"),
        )
    beginning.write(seen, answers, target)
    _say(_shown(f"{target} is written\nbatcher plan {shlex.quote(str(target))}"))


@app.command()
def models(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB.toml", help="Whose service; Cerebras when absent.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Show this one only.", show_default=False)
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", metavar="URL", help="The service, in place of a job's.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="The variable that holds its key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, as JSON.")] = False,
) -> None:
    """List the models that the key may use, or show one: context, price and limits where the service tells them."""
    import anyio
    import msgspec

    from batcher import models as known
    from batcher import simulator as simulated
    from batcher.access import access
    from batcher.job import SIMULATOR, read_service

    if job is not None and model is None and not job.endswith(".toml"):
        job, model = None, job
    if job is not None:
        if base_url is not None or api_key_env is not None:
            raise JobError("models: a job file, or --base-url and --api-key-env, not both")
        asked = _load(Path(job), None, None)
        service, origin = asked.service, asked.origin
    else:
        given = {"base_url": base_url, "api_key_env": api_key_env}
        origin = "models"
        service = read_service({key: value for key, value in given.items() if value is not None}, origin)
    with ExitStack() as stack:
        url = None
        if service.base_url == SIMULATOR:
            url = stack.enter_context(simulated.running(simulated.Settings())).url
        found = anyio.run(known.look, service, access(service, origin, url), model)
    if as_json:
        _say(msgspec.json.format(msgspec.json.encode(found if model is None else found[0]), indent=2).decode())
    else:
        _say(known.render(found) if model is None else known.render_one(found[0]))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    import msgspec

    from batcher.schema import schema as written

    _say(msgspec.json.format(msgspec.json.encode(written()), indent=2).decode())


@app.command()
def simulator(
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    key: Annotated[str | None, typer.Option(help="The only key that is accepted; any when absent.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="The request limit of each model, else by plan; 0 is none.", min=0)
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="The token limit of each model, else by plan; 0 is none.", min=0)
    ] = None,
    uncached_tokens_per_minute: Annotated[
        int | None, typer.Option(help="The limit of tokens that no cache had, else by plan; 0 is none.", min=0)
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="[MODEL:][TIER:]BUCKET=N",
            help="Any limit, such as requests-day=5000 or flex:tokens-minute=9000000; repeatable.",
        ),
    ] = None,
    flex_limits: Annotated[float, typer.Option(help="How many times the others' limits flex has.")] = 5.0,
    others: Annotated[float, typer.Option(help="The share of every limit that other clients use.", min=0, max=1)] = 0.0,
    reserve_cached: Annotated[
        bool, typer.Option("--reserve-cached", help="Uncached tokens are reserved for what the cache has, too.")
    ] = False,
    keep_reservation: Annotated[
        bool, typer.Option("--keep-reservation", help="Tokens charged beforehand and not used are not given back.")
    ] = False,
    rate_headers: Annotated[
        Literal["all", "answers", "none"], typer.Option(help="Which answers tell the limits; answers: all but 429s.")
    ] = "all",
    retry_after: Annotated[bool, typer.Option("--retry-after", help="Send that header with refusals.")] = False,
    latency: Annotated[float, typer.Option(help="Seconds that every answer takes before its tokens.", min=0)] = 0.05,
    prompt_token: Annotated[float, typer.Option(help="Seconds to read a token of the prompt.", min=0)] = 0.000_03,
    completion_token: Annotated[float, typer.Option(help="Seconds to say a token.", min=0)] = 0.000_8,
    jitter: Annotated[
        float, typer.Option(help="The share by which answers take longer or shorter.", min=0, max=1)
    ] = 0.1,
    capacity: Annotated[int, typer.Option(help="Requests served at once, the others queue; 0 is no bound.", min=0)] = 0,
    tier_capacity: Annotated[
        list[str] | None, typer.Option(metavar="TIER=N", help="The same of one tier, such as flex=50; repeatable.")
    ] = None,
    drift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TIER:]SECONDS=SHARE",
            help="The share of a capacity so long after the first request, such as 600=0.5; repeatable.",
        ),
    ] = None,
    queue_limit: Annotated[float, typer.Option(help="Who would queue for more seconds is refused.", min=0)] = 5.0,
    replicas: Annotated[int, typer.Option(help="Among which the capacity is divided, each with a cache.", min=1)] = 1,
    cache_tokens: Annotated[
        int, typer.Option(help="Of prompts, that a replica keeps of a model; 0: no caching.", min=0)
    ] = 2_000_000,
    cache_lifetime: Annotated[float, typer.Option(help="Seconds to keep them after their last use.", min=0)] = 300.0,
    faults: Annotated[
        list[str] | None,
        typer.Option("--fault", metavar="KIND=SHARE", help="A share of faulty answers, such as 500=0.05; repeatable."),
    ] = None,
    encodings: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Of request bodies, besides plain JSON: msgpack,gzip or fewer, or none."),
    ] = "msgpack,gzip",
    final_chunk: Annotated[
        Literal["asked", "together", "apart"],
        typer.Option(help="Where a stream tells its usage: with the end, in a chunk of its own, or as asked."),
    ] = "asked",
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recorded answers to say, as JSON lines or Parquet.")
    ] = None,
    question_column: Annotated[str, typer.Option(help="The column of its questions.")] = "question",
    answer_column: Annotated[str, typer.Option(help="The column of its answers.")] = "answer",
    seed: Annotated[int, typer.Option(help="Decides which requests meet a fault.")] = 0,
) -> None:
    """Serve a simulated service, to try jobs against without a key."""
    from batcher import simulator as service

    def rate(given: int | None) -> int | Literal["plan"] | None:
        return "plan" if given is None else given or None

    try:
        simulated = service.Settings(
            key=key,
            requests_per_minute=rate(requests_per_minute),
            tokens_per_minute=rate(tokens_per_minute),
            uncached_tokens_per_minute=rate(uncached_tokens_per_minute),
            limits=dict(map(service.parse_limit, limits or [])),
            flex_limits=flex_limits,
            others=others,
            reserves_cached=reserve_cached,
            keeps_reservation=keep_reservation,
            rate_headers=rate_headers,
            retry_after=retry_after,
            latency=latency,
            seconds_per_prompt_token=prompt_token,
            seconds_per_completion_token=completion_token,
            jitter=jitter,
            capacity=capacity or None,
            capacities=dict(map(service.parse_capacity, tier_capacity or [])),
            drift=service.parse_drift(drift or []),
            queue_limit=queue_limit,
            replicas=replicas,
            cache_tokens=cache_tokens,
            cache_lifetime=cache_lifetime,
            faults=dict(map(service.parse_fault, faults or [])),
            encodings=() if encodings == "none" else tuple(encodings.split(",")),
            final_chunk=final_chunk,
            answers=None if answers is None else service.load_answers(answers, question_column, answer_column),
            seed=seed,
        )
    except ValueError as error:
        raise JobError(f"simulator: {error}") from None
    service.run(simulated, host, port, lambda url: _say(f"base_url = {url!r}; Ctrl-C ends it"))


def _load(path: Path, settings: list[str] | None, limit: int | None) -> "Job":
    from batcher.job import load

    return load(path, [*(settings or []), *([] if limit is None else [f"input.limit={limit}"])])


def _summary(results: "Results", written: bytes) -> str:
    """The summary that a run has just written, and the failures behind it."""
    import msgspec

    from batcher.records import Summary

    summary = msgspec.json.decode(written, type=Summary)
    text = render(summary, str(_as_typed(results.folder) if results.folder else results))
    if summary.totals.failed:
        text += "\n\n  most common failures:\n" + "\n".join(f"  {line}" for line in failure_lines(_failures(results)))
    return text


def _content(written: bytes) -> dict[str, object]:
    import msgspec

    return msgspec.json.decode(written, type=dict[str, object])


def _failures(results: "Results") -> Iterator[tuple[str | None, str | None]]:
    """Kind and message of every failed row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in sorted(name for name in results.parts() if name.startswith("failures/")):
        with (
            suppress(OSError, pa.ArrowException, StorageError),
            results.local(name) as path,
            pq.ParquetFile(path) as file,
        ):
            for batch in file.iter_batches(columns=["kind", "message"]):
                yield from zip(batch.column("kind").to_pylist(), batch.column("message").to_pylist(), strict=True)


def _as_typed(path: Path) -> Path:
    """The path from the folder that the user is in, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _shown(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _say(text: str) -> None:
    """Write to standard output; a reader who has left is no error."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note(text: str) -> None:
    """Write a line to standard error."""
    with suppress(OSError):
        sys.stderr.write(_shown(f"batcher: {text}") + "\n")
