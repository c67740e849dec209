"""A job opened and checked: what has to be in order before anything is sent."""

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from batcher.access import Access, access
from batcher.dialects import Dialect
from batcher.dialects.prices import cost
from batcher.errors import JobError
from batcher.job import READING, Job, RequestTemplate, differences
from batcher.ledger import Ledger, open_read_only
from batcher.parameters import is_template
from batcher.parse import AnswerSchema, Choices, Parser, Pattern, format_schema
from batcher.prompt import Composer
from batcher.records import UNIT, PartRecord, Request
from batcher.redact import redactor
from batcher.score import Scorer
from batcher.sink import FILLABLE, Shape
from batcher.source import FileIdentity, Source, changed, open_source, open_table
from batcher.store import Results, is_remote
from batcher.strict import doubts, response_format
from batcher.where import Condition

_SOLE_EXPRESSION = re.compile(r"\{\{((?!\}\}).)*\}\}", re.DOTALL)
"""A text that may be one expression and keep its type: a list of prompts."""
_OWNER, _NAME = ".ledger", "name"
"""The object that says which ledger's results lie in a store, and what that ledger keeps the same word under."""

_TEMPLATE_TOKENS = 256
"""What a model's chat template may add to a prompt; between messages it adds less than their JSON has bytes."""
_IMAGE_TOKENS = 4096
"""What an image may add to its bytes, twice: the word stands in its part as type and as key."""

_UNMISTAKABLE = 16
"""Characters: a shorter secret, such as the word that a local server takes for a key, may stand in a job by chance."""


class Prepared(NamedTuple):
    """A job whose every part was found to be in order; nothing was sent."""

    job: Job
    source: Source
    condition: Condition | None
    composer: Composer
    parser: Parser | None
    """What reads the answers; None where they are plain text."""
    scorer: Scorer | None
    access: Access
    keep: tuple[str, ...]
    schema_note: str | None
    """What the job's author should know of how the schema is sent."""

    @property
    def columns(self) -> frozenset[str]:
        """The input's columns that are looked at before a request is sent."""
        return self.composer.names | (self.scorer.inputs if self.scorer else frozenset())

    def price(self, model: str, prompt: int, cached: int, completion: int, tier: str | None) -> float | None:
        """USD of these tokens in a tier, None where the model's price is not known."""
        known = self.job.service.prices.get(model) or self.access.dialect.prices.get(model)
        return None if known is None else cost(known, prompt, cached, completion, tier)

    def most(self, request: Request) -> float | None:
        """USD that a request may cost at most, None where price or output cap are not known."""
        if request.output_tokens <= 0:
            return None
        body = request.body
        # No token is shorter than a byte; an image has more to it than its bytes where it stands by its address.
        prompt = len(body) + _TEMPLATE_TOKENS + _IMAGE_TOKENS * body.count(b'"image_url"')
        # Predicted tokens that are rejected are paid beside those of the answer.
        completion = request.output_tokens + (len(body) if b'"prediction"' in body else 0)
        prices = [self.price(request.model, prompt, cached, completion, request.tier) for cached in (0, prompt)]
        return max((price for price in prices if price is not None), default=None)


def prepare(job: Job, base_url: str | None = None, table: object = None) -> Prepared:
    """Open and check everything that a run needs. Raises JobError.

    `base_url` stands in for the job's, `table` are the rows where the job names no files.
    """
    origin = job.origin
    way = access(job.service, origin, base_url, job.schedule.queue_threshold)
    _refuse_secrets(job, way.secrets)
    template = job.request
    parser = parser_of(template, origin)
    if job.retry.repair and parser is None:
        raise JobError(f"{origin}: retry.repair: nothing reads the answers; give choices, parse or response_format")
    form, note = _format(template, way.dialect)
    composer = Composer(template, form, origin, job.schedule.tiers, (job.folder, *_input_folders(job)))
    source = source_of(job, table)
    known = ", ".join(source.columns)
    if missing := sorted(composer.names - set(source.columns)):
        raise JobError(f"{origin}: request: no column {missing[0]} in the input; its columns are {known}")
    keep = _kept(job, source.columns)
    for section, name in (("input.id", job.input.id), *(("output.keep", name) for name in keep)):
        if name is not None and name not in source.columns:
            raise JobError(f"{origin}: {section}: no column {name} in the input; its columns are {known}")
    scorer = scorer_of(job, source, parser)
    source.schema(keep)
    prepared = Prepared(job, source, None, composer, parser, scorer, way, keep, note)
    _refuse_unbounded(prepared)
    _refuse_unrepeatable(job)
    condition = None
    if job.input.where is not None:
        condition = Condition(job.input.where, source.schema(source.columns), f"{origin}: input.where")
    return prepared._replace(condition=condition)


def _refuse_secrets(job: Job, secrets: Sequence[str]) -> None:
    """Whatever stands in the job is written into its output."""
    redact = redactor(secret for secret in secrets if len(secret) >= _UNMISTAKABLE)
    for text in (job.document(), *(text.encode("utf-8", "replace") for text in job.texts.values())):
        if redact(text) != text:
            raise JobError(
                f"{job.origin}: the job, or a file that it names, holds the value of a secret in the environment; "
                "take it out: the job is written into its output"
            )


UNBOUNDED = "what it may cost has no bound, so schedule.budget_usd cannot hold"
"""Of a request without a known price, or without an output cap."""


def _refuse_unbounded(prepared: Prepared) -> None:
    """A budget is for a job of which it is known what a request may cost; what rows decide is found out row by row."""
    job = prepared.job
    asked = job.request.parameters
    if job.schedule.budget_usd is None or job.request.body is not None:
        return
    if (asked.get("max_completion_tokens") or asked.get("max_tokens") or -1) == -1:
        key = "max_completion_tokens" if job.request.endpoint == "chat" else "max_tokens"
        raise JobError(f"{job.origin}: schedule.budget_usd: only with request.{key}: without it an answer has no bound")
    model = asked.get("model")
    if isinstance(model, str) and not is_template(model) and prepared.price(model, 0, 0, 0, None) is None:
        raise JobError(f"{job.origin}: schedule.budget_usd: no price of {model} is known; give it in [service] prices")


def _refuse_unrepeatable(job: Job) -> None:
    """Answers are shared where the same request is meant to have the same answer; what rows decide, they decide."""
    asked = job.request.parameters
    if not job.schedule.dedupe or job.request.body is not None or asked.get("seed") is not None:
        return
    temperature = asked.get("temperature")
    if not (temperature == 0 or isinstance(temperature, str)):
        raise JobError(
            f"{job.origin}: schedule.dedupe: only with request.temperature = 0 or a request.seed: "
            "else the same request is meant to have different answers"
        )


def source_of(job: Job, table: object) -> Source:
    """The job's rows; the files that an earlier run knew stand first. A source that is there already is taken."""
    if isinstance(table, Source):
        return table
    given = job.input
    if table is not None:
        if given.path is not None or given.format is not None:
            key = "path" if given.path is not None else "format"
            raise JobError(f"{job.origin}: input.{key}: not with a table from Python; give one of the two")
        return open_table(table)
    if given.path is None:
        raise JobError(f"{job.origin}: input.path is missing; only batcher.run(job, input=table) can do without")
    known = msgspec.json.decode(_known(job, "input") or b"[]", type=list[FileIdentity])
    names = [identity.name for identity in known]
    return open_source(given.path, job.folder, given.format, job.output.rows_per_part, names)


def _known(job: Job, key: str) -> bytes | None:
    """What the job's ledger, if there is one, keeps under this key; it is left as it is."""
    if not job.ledger_path.exists():
        return None
    with open_read_only(job.ledger_path) as ledger:
        if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            return None
        found = ledger.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None


def not_ours(job: Job) -> str | None:
    """Why the results that lie in the job's place are not its ledger's, None where they are or there are none."""
    results, ledger = job.results, job.ledger_path
    owner = None if results.folder is not None else results.read(_OWNER)
    if owner is not None and owner != _known(job, _NAME):
        return f"{results} belongs to another ledger than {ledger}, on this or another machine"
    if owner is None and not ledger.exists() and any(name.endswith(".parquet") for name in results.parts()):
        return f"{results} holds parts, but their ledger {ledger} is gone"
    return None


def claim(ledger: Ledger, results: Results) -> None:
    """Note in a store whose results lie there: a folder needs no note, it is locked."""
    if results.folder is not None:
        return
    name = ledger.meta(_NAME)
    if name is None:
        name = secrets.token_hex(16).encode()
        ledger.set_meta({_NAME: name})
    if results.read(_OWNER) is None:
        results.write(_OWNER, name)
    if results.read(_OWNER) != name:
        raise JobError(f"{results} was taken by another run just now; name another output")


def parser_of(template: RequestTemplate, origin: str) -> Parser | None:
    """What reads the answers' texts, where the job asks for more than text. Raises JobError."""
    reading = template.reading
    choices = None if reading.choices is None else Choices(reading.choices, reading.vote)
    if reading.pattern is not None:
        return Pattern(reading.pattern, choices, reading.vote)
    if choices is not None:
        return choices
    schema: Mapping[str, object] | None = reading.schema
    if schema is None:
        wanted = template.parameters.get("response_format")
        schema = format_schema(wanted) if isinstance(wanted, Mapping) else None
    if schema is None:
        if reading.vote:
            raise JobError(f"{origin}: request.vote: nothing reads the answers; give choices, parse or response_format")
        return None
    try:
        return AnswerSchema(schema, reading.schema_name, reading.vote)
    except JobError as error:
        key = "response_format" if reading.parse is None else "parse"
        raise JobError(f"{origin}: request.{key}: {error}") from None


def scorer_of(job: Job, source: Source, parser: Parser | None) -> Scorer | None:
    """What scores the answers, where the job says what they should be. Raises JobError."""
    if job.score is None:
        return None
    return Scorer(job.score, source.columns, parser.arrow_type if parser else None, job.folder, job.origin)


def _format(template: RequestTemplate, dialect: Dialect) -> tuple[Mapping[str, object] | None, str | None]:
    """The `response_format` of the job's schema, and what is to be said of how a schema is sent."""
    note = doubts(template.parameters) if dialect.strict_subset else None
    if template.schema is None:
        return None, note
    reading = template.reading
    # What is made from a type of Python nobody wrote for a service that takes more than strict mode.
    made = reading.parse is not None and template.schema is reading.schema
    form, left = response_format(template.schema, template.schema_name, dialect.strict_subset or made)
    return form, "; ".join(filter(None, (left, note))) or None


def _input_folders(job: Job) -> Iterator[Path]:
    """The folders on this machine that the input lies in: of a glob, what stands before its first wildcard."""
    paths = [job.input.path] if isinstance(job.input.path, str) else job.input.path or []
    for path in paths:
        if not is_remote(path):
            place = job.folder / re.split(r"[^/]*[*?[]", path)[0]
            yield place if place.is_dir() else place.parent


def _kept(job: Job, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that are carried along; of all of them, the one that is the id already is left out."""
    if job.keep != "all":
        return tuple(job.keep)
    return tuple(name for name in columns if name != job.input.id)


def agree(ledger: Ledger, prepared: Prepared) -> Shape:
    """Hold job and input against what the output was begun with; returns its columns. Raises JobError."""
    job, source = prepared.job, prepared.source
    names = [name for name in dict.fromkeys((job.input.id, *prepared.keep)) if name is not None]
    begun = ledger.meta("meaning")
    if begun is None:
        kept = source.schema(names)
        ledger.set_meta(
            {
                "meaning": msgspec.json.encode(job.meaning()),
                "kept": kept.serialize().to_pybytes(),
                "begun": datetime.now(UTC).isoformat().encode(),
            }
        )
    else:
        _same_job(begun, job)
        if refusal := scored_otherwise(job, ledger.meta("scoring"), ledger.parts(UNIT).values()):
            hint = f"put it back, or let batcher reparse {job.results} --set … score the stored answers so"
            raise JobError(f"{job.origin}: {refusal}\n{hint}")
        kept = same_input(ledger, source)
    ledger.set_meta(
        {
            "input": msgspec.json.encode(source.identities),
            "scoring": msgspec.json.encode(job.scoring()),
            # What a retry needs, from wherever it is called: job.toml in the output has neither.
            "folder": os.fsencode(job.folder),
            "texts": msgspec.json.encode(job.texts),
        }
    )
    return shape_of(job, kept, prepared.parser, prepared.scorer, _scored(prepared))


def agree_again(ledger: Ledger, base: Job, prepared: Prepared) -> Shape:
    """Hold a retry against what the output was begun with, `base`; returns its columns. Raises JobError."""
    _same_job(ledger.meta("meaning") or b"{}", base)
    begun = ledger.meta("input") or b"[]"
    kept = same_input(ledger, prepared.source)
    if len(msgspec.json.decode(begun)) != len(prepared.source.identities):
        raise JobError("the input has new files, so rows are pending: run the job to its end first")
    changed = _changed(base.meaning(), prepared.job.meaning())
    if key := next((key for key in _READ_BY if key in changed), None):
        raise JobError(f"--set {key}: how answers are read is changed by batcher reparse {base.results}")
    types = [parser and parser.arrow_type for parser in (parser_of(base.request, base.origin), prepared.parser)]
    if types[0] != types[1]:
        raise JobError("--set request.response_format: the columns of the output are fixed; name another output")
    if new := sorted(fillable(prepared.job.request) - fillable(base.request)):
        key = "body" if prepared.job.request.body is not None else _FILLED_BY[new[0]]
        raise JobError(
            f"--set request.{key}: the columns of the output are fixed, and {new[0]} is none of them; "
            "name another output"
        )
    return shape_of(base, kept, prepared.parser, prepared.scorer, _scored(prepared))


def _scored(prepared: Prepared) -> pa.Schema | None:
    return None if prepared.scorer is None else prepared.source.schema(sorted(prepared.scorer.inputs))


def _same_job(begun: bytes, job: Job) -> None:
    meaning, before = msgspec.json.decode(msgspec.json.encode(job.meaning())), msgspec.json.decode(begun)
    if different := list(differences(before, meaning)):
        hint = "put it back, or name another output"
        if all(key.startswith(_REREAD) for key in _changed(before, meaning)):
            hint = f"put it back, or let batcher reparse {job.results} --set … read the stored answers so"
        raise JobError(f"{job.origin}: {job.results} was begun with another job: {'; '.join(different)}\n{hint}")


_READ_BY = tuple(f"request.{key}" for key in READING)
_REREAD = (*_READ_BY, "request.response_format")
"""What a meaning has about how answers are read."""


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> set[str]:
    return {key for key in {*before, *after} if before.get(key) != after.get(key)}


def scored_otherwise(job: Job, begun: bytes | None, parts: Iterable[PartRecord]) -> str | None:
    """Why a job cannot go on with an output in which answers are scored as `begun` says; None where it can.

    Scores stand in the parts: until the first is published nothing is settled.
    """
    scoring = msgspec.json.decode(begun or b"{}")
    different = list(differences(scoring, job.scoring()))
    if different and any(part.files for part in parts):
        return f"{job.results} was begun with other scores: {'; '.join(different)}"
    return None


def same_input(ledger: Ledger, source: Source) -> pa.Schema:
    """The types of the columns that are carried along, when the input is what it was."""
    files = msgspec.json.decode(ledger.meta("input") or b"[]", type=list[FileIdentity])
    digests = msgspec.json.decode(ledger.meta("digests") or b"[]", type=list[str])
    if difference := changed(files, source.identities) or _rewritten(files, digests, source):
        raise JobError(f"the input has changed since the run began: {difference}\nput it back, or name another output")
    kept = pa.ipc.read_schema(pa.py_buffer(ledger.meta("kept")))
    # Files appended since must not change what a column is.
    source.types.update({field.name: field.type for field in kept})
    return kept


def shape_of(
    begun: Job, kept: pa.Schema, parser: Parser | None, scorer: Scorer | None, scored: pa.Schema | None = None
) -> Shape:
    """The columns of an output, by the job that it was begun with; `scored` are those that the scorer needs."""
    columns = fillable(begun.request)
    names = {*kept.names}
    more = [field for field in scored or () if field.name not in names]
    return Shape(
        pa.schema([*kept, *more]), begun.input.id, _kept(begun, kept.names), parser, columns, begun.output.raw, scorer
    )


_FILLED_BY: Mapping[str, str] = {
    "refusal": "response_format",
    "tool_calls": "tools",
    "choices": "n",
    "logprobs": "logprobs",
    "reasoning_logprobs": "logprobs",
    "tokens": "return_raw_tokens",
}
"""What has to be asked for so that a column of FILLABLE can be filled."""


def fillable(template: RequestTemplate) -> frozenset[str]:
    """The columns of FILLABLE that answers can fill. What each row's template decides, it may."""
    if template.body is not None:
        return frozenset(FILLABLE)
    asked = template.parameters
    found = {name for name, key in _FILLED_BY.items() if _asks(asked.get(key))}
    if asked.get("n", 1) == 1 and _one_prompt(asked.get("prompt", "")):
        found.discard("choices")
    else:
        found.add("choices")
    if template.endpoint != "chat" or asked.get("reasoning_format") in ("text_parsed", "raw", "hidden"):
        found.discard("reasoning_logprobs")
    if template.schema is not None:
        found.add("refusal")
    return frozenset(found)


def _asks(value: object) -> bool:
    """Whether a parameter is set; a number of log probabilities may be 0 and still asks for some."""
    return not (value is None or value is False or value == [])


def _one_prompt(prompt: object) -> bool:
    """Whether a completion is asked about one text or one list of token ids, whatever the row."""
    if isinstance(prompt, list):
        return len(prompt) < 2 or all(isinstance(token, int) for token in prompt)
    return not (isinstance(prompt, str) and _SOLE_EXPRESSION.fullmatch(prompt.strip()))


def _rewritten(files: list[FileIdentity], digests: list[str], source: Source) -> str | None:
    """Look closely at files that were written since: the same size and samples may hide a change between them."""
    for index, (before, after, digest) in enumerate(zip(files, source.identities, digests, strict=False)):
        if before.mtime_ns != after.mtime_ns and source.digest(index, lambda: False) != digest:
            return f"{after.name} has the same size but other content"
    return None
