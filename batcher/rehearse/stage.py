"""The stage: the real engine runs a job's rows against a model of its service, in virtual time."""

import asyncio
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from batcher import engine
from batcher.access import Access
from batcher.errors import JobError
from batcher.job import Job, from_document, parse_document
from batcher.ledger import added_up, open_read_only, timeline_of
from batcher.prompt import prefix_digests
from batcher.records import Failure, Reply, Request, Summary
from batcher.rehearse.rows import Rows
from batcher.simulator import Front, ModelTransport, NothingLeftError, Recorded, Settings, VirtualLoop

EPOCH = 1_790_000_000.0
"""The Unix time at which every rehearsal begins."""
DISK = 0.002
"""Seconds that work on a thread takes: mostly, that the disk does."""
TICK = 1e-6
"""Seconds that a timer takes at least."""
LONGEST = 400 * 86_400.0
"""Virtual seconds after which a rehearsal is not gone on with."""
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_NUMBER = 12
"""Digits of a row's number in its prompt."""
_SIMULATED, WINDOW = ("-second", "-minute"), 60.0
"""Limits that a rehearsal waits for, and the seconds of the longest; an hour's and a day's are reckoned afterwards."""
_TOKEN = 4
"""Bytes of a token, as the simulator counts."""
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, are spread evenly."""
BLOCK_TOKENS = 128
BLOCK = BLOCK_TOKENS * _TOKEN
"""Bytes that a cache knows whole or not at all."""
_LEFT_OUT = {
    "input": ("limit", "sample", "where", "id"),
    "request": ("parse", "choices", "vote", "response_format"),
    "schedule": ("budget_usd", "deadline"),
    "retry": ("repair",),
}
"""Keys that say which rows are asked, how answers are read, and what is kept."""


@dataclass(frozen=True, slots=True)
class Model:
    """What the service is taken to be like. `ratio` is its prompt tokens for each estimated one, `cached` their share
    that a cache has, `completions` are lengths of answers, each as likely as any other.

    With `alike` prompts begin alike where the job's own do, for so much of their length as it says, and what a cache
    has of them follows from that instead.
    """

    settings: Mapping[str, Any]
    completions: Sequence[int]
    ratio: float = 1.0
    cached: float = 0.0
    alike: float | None = None


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a rehearsal."""

    summary: Summary
    answered: tuple[float, ...]
    """When each answer came, seconds from the beginning."""
    held: Mapping[str, float]
    """The share of the time in which each thing held requests back."""
    peak: int
    """Requests that were in flight at once."""
    sent: int
    prompt: float
    """Tokens that a request took or reserved on average: of its prompt, without those that a cache had, and of its
    answer as it was, and as its cap is; None where one had no cap."""
    uncached: float
    completion: float
    cap: float | None
    most: float
    """USD that a request may cost at most, on average; 0 where the job has no budget."""
    tiers: Counter[str]
    """Answers of each tier that was asked for by name."""


class _Lengths(Recorded):
    """An answer to every row, as long as the next of the lengths; the row's number ends its prompt."""

    def __init__(self, completions: Sequence[int], rows: int, seed: int) -> None:
        super().__init__({})
        # As many as there are rows, and spread as the given ones are: fewer would be shorter or longer by chance.
        known = sorted(completions)
        self._completions = [known[(2 * at + 1) * len(known) // (2 * rows)] for at in range(rows)]
        random.Random(seed).shuffle(self._completions)
        self._of: dict[int, int] = {}

    def find(self, prompt: str) -> tuple[str, ...]:
        """The answer to a row's prompt."""
        place = self._of.setdefault(int(prompt[-_NUMBER:]), len(self._of))
        return ("yes " * max(1, self._completions[place % len(self._completions)]),)


class _Read(msgspec.Struct):
    """What a model reads of a request."""

    tools: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


class _Line:
    """The way to the model: each request as one that takes as many tokens, of which only the sizes are real."""

    name = "none"

    def __init__(
        self, inner: ModelTransport, front: Front, model: Model, most: Callable[[Request], float | None]
    ) -> None:
        """`most` tells what a request may cost."""
        self._inner, self._front, self._model, self._most = inner, front, model, most
        self._now = asyncio.get_running_loop().time
        self.answered: list[float] = []
        self.tiers = Counter[str]()
        self.prompts = self.caps = self.sent = 0
        self.most = 0.0
        self.capped = True

    async def send(self, request: Request) -> Reply | Failure:
        """Ask once."""
        tokens = max(_NUMBER, round(self._model.ratio * request.prompt_tokens))
        if request.model not in self._front.service.settings.models:
            self._front.service.change(models=(*self._front.service.settings.models, request.model))
        self.sent += 1
        self.prompts += tokens
        self.caps += request.output_tokens
        self.most += self._most(request) or 0.0
        self.capped = self.capped and request.output_tokens > 0
        result = await self._inner.send(msgspec.structs.replace(request, body=self._body(request, tokens)))
        if isinstance(result, Reply):
            self.answered.append(self._now())
            if request.tier is not None and result.status == 200:
                self.tiers[request.tier] += 1
        return result

    def _body(self, request: Request, tokens: int) -> bytes:
        number = f"{request.row:0{_NUMBER}d}"
        if self._model.alike is None:
            # Whole blocks are cached: now one more, now one less, so that it is the share on average.
            share = self._model.cached * tokens / BLOCK_TOKENS
            shared = "." * (BLOCK * int(share + request.row * _GOLDEN % 1))
        else:
            blocks = beginnings(request.body, BLOCK / (self._model.ratio * self._model.alike))
            shared = "".join(block.ljust(BLOCK, ".") for block in blocks)
        shared = shared[: _TOKEN * tokens - 2 * _NUMBER]
        text = (shared + number).ljust(_TOKEN * tokens - _NUMBER, "-") + number
        body: dict[str, object] = {"model": request.model}
        if request.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if request.output_tokens > 0:
            body["max_completion_tokens" if request.endpoint == "chat" else "max_tokens"] = request.output_tokens
        if request.tier is not None:
            body["service_tier"] = request.tier
        return msgspec.json.encode(body)

    async def get(self, path: str) -> Reply | Failure:
        """Read what lies at a path."""
        return await self._inner.get(path)

    async def close(self) -> None:
        """Close every connection."""
        await self._inner.close()


def beginnings(body: bytes, size: float) -> list[str]:
    """A digest of what the model reads up to the end of each whole block of `size` bytes: tools first."""
    read = msgspec.json.decode(body, type=_Read)
    said = b"".join(bytes(part) for part in (read.tools, read.messages, read.prompt) if part)
    ends = [int(number * size) for number in range(1, int(len(said) / size) + 1)]
    return [digest.hex() for digest in prefix_digests(said, ends)]


def bare(job: Job, output: str, more: Mapping[str, Mapping[str, object]] | None = None) -> Job:
    """The job over rows that are given to it, whose answers are only counted; `more` changes its sections."""
    document = parse_document(job.document(), job.origin)
    document.pop("score", None)
    for section, keys in _LEFT_OUT.items():
        for key in keys:
            document.setdefault(section, {}).pop(key, None)
    document["output"] = {"path": output, "keep": [], "rows_per_part": 5_000}
    for section, values in (more or {}).items():
        document.setdefault(section, {}).update(values)
    return from_document(document, job.folder, job.origin, job.texts)


def play(
    job: Job,
    model: Model,
    rows: Rows,
    seed: int,
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> Played:
    """Run a job over these rows of its input against a model; the same seed gives the same. Nothing is sent.

    Raises what ends such a run: the errors of batcher.errors.
    """
    most = engine.prepare(job, table=rows).most if job.schedule.budget_usd is not None else _nothing
    loop = VirtualLoop(until=LONGEST, work=lambda: DISK, tick=TICK)
    state = random.getstate()
    random.seed(seed)  # the jitter of waits
    try:
        with (
            tempfile.TemporaryDirectory(dir=_MEMORY, prefix="batcher-rehearse-") as folder,
            asyncio.Runner(loop_factory=lambda: loop) as runner,
        ):
            return runner.run(_play(bare(job, str(Path(folder, "out")), more), rows, model, seed, most))
    except NothingLeftError as error:
        raise JobError(f"{job.origin}: rehearsed, {error}") from None
    finally:
        random.setstate(state)


def _nothing(_: Request) -> None:
    """Nobody asks what a request may cost."""


async def _play(job: Job, rows: Rows, model: Model, seed: int, most: Callable[[Request], float | None]) -> Played:
    now = asyncio.get_running_loop().time
    way: Access = engine.prepare(job, table=rows).access
    answers = _Lengths(model.completions, len(rows), seed)
    settings = dict(model.settings)
    limits = settings.get("limits", {})
    settings["limits"] = {name: limit for name, limit in limits.items() if name.endswith(_SIMULATED)}
    front = Front(Settings(answers=answers, seed=seed, **settings), now, EPOCH, record=False)
    headers = {name.lower(): value for name, value in way.headers.items()}
    transport = ModelTransport(front, "Bearer rehearsal", job.service.timeout, way.dialect.refusal, headers)
    line = _Line(transport, front, model, most)
    summary = await engine.run(job, table=rows, transport=line)
    with open_read_only(job.ledger_path) as ledger:
        held = added_up(0, list(timeline_of(ledger))).held
    totals, seconds = summary.totals, sum(held.values()) or 1.0
    sent, done = max(1, line.sent), max(1, totals.answered)
    return Played(
        summary,
        tuple(line.answered),
        {what: took / seconds for what, took in held.items()},
        front.peak_in_flight,
        line.sent,
        line.prompts / sent,
        line.prompts / sent - totals.cached_tokens / done,
        totals.completion_tokens / done,
        line.caps / sent if line.capped else None,
        line.most / sent,
        line.tiers,
    )
