"""The values that pass between rooms."""

from collections.abc import Mapping, Sequence
from enum import IntEnum, StrEnum
from typing import Annotated, NamedTuple

import msgspec

from batcher import bits

UNIT = 0
"""A plain job has one unit of rows; a sweep will have one per variant and sample."""


FIRST_CAP = 1024
"""The output cap that a job begins with whose caps are learned; requests have their hash with it."""

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
"""Where each endpoint lies below a service's base address."""


class Kind(StrEnum):
    """Why an attempt, or a row, has no answer. The strings stand in the `kind` columns and do not change."""

    # The row never became a request.
    BAD_INPUT = "bad_input"  # a line or value that cannot be read
    UNSENDABLE = "unsendable"  # its template met a null, or the body cannot be built
    EXCEEDS_QUOTA = "exceeds_quota"  # larger than the whole bucket
    # The service asked to wait.
    RATE_LIMITED = "rate_limited"  # a bucket of a second, minute or hour is empty
    DAY_QUOTA = "day_quota"  # a bucket of a day is empty, or its reset is more than an hour away
    NO_CREDIT = "no_credit"  # 402, or a billing code
    OVERLOADED = "overloaded"  # congestion: queue_exceeded, 498, 529, 503 with a capacity code
    # The service failed.
    SERVER_ERROR = "server_error"  # 500 and unknown 5xx
    UNAVAILABLE = "unavailable"  # 502, 503, 504 and the statuses of an edge in front
    REQUEST_TIMEOUT = "request_timeout"  # 408, 499, 524: the service gave up waiting
    CONFLICT = "conflict"  # 409, 423, 424, 425
    # The connection failed.
    DNS = "dns"
    CONNECTION = "connection"  # refused or unreachable: nothing was sent
    CONNECT_TIMEOUT = "connect_timeout"
    STALE_CONNECTION = "stale_connection"  # a kept connection was closed as we reused it
    DISCONNECTED = "disconnected"  # lost after the request was sent
    TIMEOUT = "timeout"  # no whole answer in time
    TLS = "tls"
    CERTIFICATE = "certificate"
    LOCAL_RESOURCES = "local_resources"  # our own limits: open files, memory, ports
    PROTOCOL_ERROR = "protocol_error"  # what came is not HTTP
    # The answer is unusable.
    MALFORMED_RESPONSE = "malformed_response"
    NOT_JSON = "not_json"  # an HTML page with status 200
    RESPONSE_TOO_LARGE = "response_too_large"
    INVALID_OUTPUT = "invalid_output"  # whole, but it does not fit the schema
    TRUNCATED = "truncated"  # cut off at an output cap that was learned
    # The service refused.
    REJECTED = "rejected"  # 400, 422 and other 4xx: this request, as it is
    REQUEST_TOO_LARGE = "request_too_large"  # 413
    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403
    NOT_FOUND = "not_found"  # 404, 410
    MODEL_NOT_FOUND = "model_not_found"
    NOT_SERVED = "not_served"  # 405, 406, 411, 412, 414, 415, 426, 428, 431, 501, 505: the way we speak
    PROXY = "proxy"  # 407
    REDIRECT = "redirect"
    # We did not wait for what came.
    INTERRUPTED = "interrupted"  # the run was asked to end while it was in flight


class Outcome(IntEnum):
    """What was decided about an attempt."""

    AGAIN = 0
    ANSWERED = 1
    FAILED = 2


class Row(NamedTuple):
    """One input row. `position` counts over the input's files in order; `problem` says why it cannot be read."""

    position: int
    fields: Mapping[str, object]
    problem: str | None = None


class Request(msgspec.Struct, frozen=True, gc=False):
    """One row as it will be sent. `prompt_tokens` is an estimate, `output_tokens` the cap, 0 where there is none."""

    unit: int
    row: int
    model: str
    body: bytes
    prompt_tokens: int
    output_tokens: int
    hash: bytes
    cache_key: str | None = None
    endpoint: str = "chat"
    """chat or completions."""
    tier: str | None = None
    """The service tier that is asked for; None where the job names none."""
    stream: bool = False
    """Whether the answer comes as a stream of events."""
    repeatable: bool = False
    """Whether the same request is meant to have the same answer: at temperature 0, or with a seed."""
    prefixes: bytes = b""
    """Digests (8 bytes each) of what it begins with, up to ever later ends; only where a cache key is to be found."""

    def capped(self, tokens: int) -> "Request":
        """The same with another output cap, which stands last in its body; the hash stays."""
        if tokens == self.output_tokens:
            return self
        body = b"%b%d}" % (self.body[: self.body.rindex(b":") + 1], tokens)
        return msgspec.structs.replace(self, body=body, output_tokens=tokens)

    def on(self, tier: str) -> "Request":
        """The same for another service tier, of a list of them; the hash stays."""
        if tier == self.tier:
            return self
        before, after = (b'"service_tier":"%b"' % str(each).encode() for each in (self.tier, tier))
        at = self.body.rindex(before)
        body = self.body[:at] + after + self.body[at + len(before) :]
        return msgspec.structs.replace(self, body=body, tier=tier)


class Turn(msgspec.Struct, gc=False):
    """A request on its way: how often it was asked, and since when (monotonic seconds) it could have gone."""

    request: Request
    ready: float
    attempt: int = 1
    tried: dict[Kind, int] | None = None
    """Attempts that failed so far, by kind."""
    plain: Request | None = None
    """The request as its row has made it, where this one shows the model what did not fit."""
    floor: int = 0
    """The learned output cap at which its last answer was cut off; 0 where none was."""
    group: str | None = None
    """What it shares its prefix by with other rows, which wait for the first one's answer; None: it goes by itself."""
    leads: bool = False
    """Whether it went ahead of its group."""
    earliest: int = 0
    """The first tier of a list that it may go to before `barred`: those before it have just had no room for it."""
    barred: float = 0.0
    """Monotonic seconds."""
    shares: int = 0
    """Tokens that a cache should still have of it though its group does not go together; 0: nobody relies on that."""


class Timing(NamedTuple):
    """When an attempt was sent (UTC, microseconds) and how long it took (seconds, by our clock)."""

    sent_at: int
    latency: float
    time_to_first_token: float | None = None


class Limit(NamedTuple):
    """What the service's headers say of one bucket. `window` and `reset` are seconds."""

    resource: str  # requests, tokens, uncached_tokens
    window: float
    limit: float | None
    remaining: float | None
    reset: float | None


class KnownLimit(NamedTuple):
    """A limit of a service as one run leaves it to the next; `stated` by headers, else learned from refusals.

    `limit` is units per `window` seconds.
    """

    host: str
    model: str
    tier: str | None
    resource: str
    window: float
    limit: float
    stated: bool
    keeps: bool = False
    """Whether what was reserved and not used seems to stay charged."""


class Reply(NamedTuple):
    """A whole HTTP answer, its body read to the end and not yet looked into."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    timing: Timing


class Failure(msgspec.Struct, frozen=True, gc=False):
    """Why an attempt gave no answer. `paid` says that the service may bill it all the same."""

    kind: Kind
    message: str
    timing: Timing | None = None
    status: int | None = None
    type: str | None = None
    code: str | None = None
    retry_after: float | None = None
    """Seconds that the service asked us to wait."""
    limits: tuple[Limit, ...] = ()
    """The buckets that the refusal names or describes."""
    body: bytes | None = None
    paid: bool = False
    usage: "Usage | None" = None
    """What the service counted, where it said so all the same."""
    packing: str | None = None
    """How the body went (msgpack, gzip), where that may be why it was refused: none that went so was answered yet."""
    should_retry: bool | None = None
    """Whether the service says to ask again; None where it does not say."""

    def refills(self, limit: Limit) -> bool:
        """Whether what it says to wait for is that all of a limit is there again; a minute's has something before."""
        return limit.window <= 60 and limit.reset is not None and limit.reset == self.retry_after


class Misfit(NamedTuple):
    """Why a text is no answer: the JSON pointer and the reason, at most 300 printable characters."""

    message: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """One call that the model asks for; `arguments` is JSON text as the model wrote it."""

    id: str | None
    type: str | None
    name: str | None
    arguments: str | None


_Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
_Logprob = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


class Alternative(msgspec.Struct, frozen=True, gc=False):
    """A token and how likely it was: natural logarithm; `bytes` are those of its text, or of its part of a character.

    This and `Token` are read straight from an answer, of which there may be thousands in a row.
    """

    token: str | None = None
    logprob: _Logprob | None = None
    bytes: tuple[_Byte, ...] | None = None


class Token(Alternative, frozen=True, gc=False):
    """A token of an answer, and what else could have stood in its place."""

    top_logprobs: list[Alternative] | None = None
    text_offset: int | None = None
    """Where it begins in the text, in characters; the completions endpoint says it."""


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One choice of an answer. `logprobs` are those of the text and then of a refusal; `tokens` are ids."""

    index: int
    text: str | None
    reasoning: str | None
    finish_reason: str | None
    tool_calls: tuple[ToolCall, ...] | None = None
    refusal: str | None = None
    logprobs: Sequence[Token] | None = None
    reasoning_logprobs: Sequence[Token] | None = None
    tokens: Sequence[int | None] | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens as the service counted them; what it did not say is None."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None
    image_tokens: int | None = None


class ServiceTimes(NamedTuple):
    """Times as the service measured them, seconds."""

    queue_time: float | None = None
    prompt_time: float | None = None
    completion_time: float | None = None
    total_time: float | None = None


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A service's answer in our words. `choices` has at least one member; several prompts' follow one another.

    `service_tier` is the tier that was asked for, `service_tier_used` the one that served, each where it is said.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    times: ServiceTimes
    id: str | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    service_tier_used: str | None = None

    def tier(self, asked: str | None) -> str | None:
        """The tier that served it: as the service says, else the one that was asked for."""
        return self.service_tier_used or self.service_tier or asked


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """One request that was sent and what came of it: the line of the ledger.

    `body` is the raw answer. `outcome` is None until it was decided. `attempt` counts from 1; a row for which nothing
    was sent has the one attempt 0: it never became a request, or it shares what came of another row's.
    """

    unit: int
    row: int
    attempt: int
    outcome: Outcome | None
    sent_at: int
    """UTC, microseconds."""
    waited: float
    """Seconds between being ready and being sent."""
    latency: float
    time_to_first_token: float | None
    prompt_tokens: int
    output_tokens: int
    request_hash: bytes
    model: str
    cache_key: str | None
    body: bytes | None
    status: int | None = None
    kind: Kind | None = None
    type: str | None = None
    code: str | None = None
    message: str | None = None
    retry_after: float | None = None
    paid: bool = False
    tier: str | None = None
    spent: float | None = None
    """USD that the budget is charged for it; None for all that was leased."""


class Rates(msgspec.Struct, frozen=True):
    """USD per million tokens."""

    input: float
    output: float
    cached: float | None = None
    """Input tokens from the cache; as `input` where it is not given."""


class Price(Rates, frozen=True):
    """What a model's tokens cost. A tier that is not named costs as all others do."""

    flex: Rates | None = None
    priority: Rates | None = None


class Totals(msgspec.Struct, kw_only=True):
    """Sums over rows: of one part, or of a whole output. Durations are seconds."""

    rows: int = 0
    answered: int = 0
    failed: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    billed_prompt_tokens: int = 0
    billed_completion_tokens: int = 0
    cost_usd: float | None = None
    unpriced: int = 0
    """Rows whose cost is not known, and is not in the sum."""
    altered: int = 0
    unfit: int = 0
    """Answered rows of which no value could be read: what reads them has changed since."""
    finish_reasons: dict[str, int] = {}
    failure_kinds: dict[str, int] = {}
    latency: float = 0.0

    def add(self, other: "Totals") -> None:
        """Add another's sums to these."""
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            elif theirs is not None:
                setattr(self, name, theirs if mine is None else mine + theirs)


class Spending(msgspec.Struct, frozen=True):
    """USD that all runs of an output have spent, or may have: the budget's side of it."""

    usd: float
    lost: float
    """Of it, the most that requests can have cost of which nobody knows what they did: timed out, or cut off."""


class Former(NamedTuple):
    """What a row that is asked again had come to before; `started_at` is UTC, microseconds."""

    answered: bool
    attempts: int
    started_at: int
    billed_prompt_tokens: int | None
    billed_completion_tokens: int | None
    cost_usd: float | None


class Retried(msgspec.Struct, kw_only=True):
    """One retry of an output: which rows were asked again, with what changes, and how many got an answer."""

    started_at: str
    finished_at: str | None = None
    """None while it is under way."""
    where: str | None
    settings: tuple[str, ...]
    rows: int = 0
    answered: int = 0


class Reparse(msgspec.Struct, kw_only=True):
    """How far the stored answers of an output are read again."""

    settings: tuple[str, ...]
    meaning: str
    """A digest of what the answers are read by: with another, all begins anew."""
    part: int = -1
    """The last part that is done: parts are read in order."""
    rows: int = 0
    """Answered rows, now."""
    mended: int = 0
    """Of them, rows that had failed because their answer did not fit."""
    unfit: int = 0
    """Of them, rows of which no value could be read."""


class FileRecord(msgspec.Struct, frozen=True):
    """A published file: its name below the output, and what it must look like."""

    name: str
    rows: int
    bytes: int
    sha256: str


class PartRecord(msgspec.Struct, frozen=True):
    """What the ledger knows of one range of rows.

    The range's selected rows end before `stop`. Of the rows before `settled` those in `rows` are done and dropped from
    the ledger: they stand in `files` alone. `place` is where the range starts in a JSONL input: file, byte, line.
    """

    stop: int
    settled: int
    place: tuple[int, int, int] | None = None
    totals: Totals = msgspec.field(default_factory=Totals)
    files: tuple[FileRecord, ...] = ()
    rows: bytes | None = None
    """A packed set, counted from the range's start; None for all rows before `settled`."""

    def done(self, start: int) -> int:
        """The set of rows that stand in `files` alone, of the range that begins at row `start`."""
        return bits.first(self.settled - start) if self.rows is None else bits.unpack(self.rows)

    @property
    def complete(self) -> bool:
        """Whether all selected rows are done and published."""
        return self.settled >= self.stop


class Snapshot(NamedTuple):
    """A run at one moment, for whoever watches it. Tokens, cost and seconds are this run's; rows are the output's."""

    total: int | None
    """Selected rows; None while the input is still being counted."""
    answered: int
    failed: int
    before: int
    """Rows that earlier runs had done."""
    in_flight: int
    window: int
    waiting: int
    binds: str
    """What held the run back for most of the last second: a word of docs/scheduling.md."""
    buckets: Mapping[str, float]
    """By name: the share of each limit that is used up, 0 to 1."""
    requests: int
    """Sent, answered or not."""
    refused: int
    """Of them, those that the service refused for want of quota, credit or room."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    seconds: float
    phase: str
    """starting, running, draining, publishing; at the end the summary's state."""
    budget_usd: float | None = None
    """What all runs of the output may spend, and have spent; both None where the job has no budget."""
    spent_usd: float | None = None
    until: float | None = None
    """The Unix time until which nothing goes, where it is known and a minute or more away."""
    deadline: float | None = None
    """The Unix time by which all rows should be done; None where the job has no deadline."""
    late: float | None = None
    """Seconds after the deadline at which they will be, with all tiers; below 0: before it; None: not known."""


class Second(msgspec.Struct, kw_only=True):
    """What happened in a span of a run, a second as a rule; `time` is when it began, in seconds of UTC.

    Old seconds are added up into longer spans: counts are sums then, `in_flight`, `window` and `buckets` means.
    """

    time: int
    seconds: float
    """How much of a run is in it."""
    sent: int = 0
    answered: int = 0
    """Answers that came."""
    refused: int = 0
    """Requests that were refused for want of quota, credit or room."""
    failed: int = 0
    """Requests that failed in another way."""
    rows: int = 0
    """Rows that became done, answered or failed, and durable."""
    in_flight: float = 0
    window: float = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = 0.0
    """Of what was or may have been paid; None where a price is not known."""
    held: dict[str, float] = {}
    """Seconds by what held requests back."""
    buckets: dict[str, float] = {}
    """The share of each limit that was used up, 0 to 1."""

    @property
    def binds(self) -> str:
        """What held requests back for most of the time."""
        return max(self.held, key=self.held.__getitem__, default="")


class Trouble(msgspec.Struct):
    """Failed attempts of one kind: how many, and the last one's message and time of sending (seconds of UTC)."""

    attempts: int
    message: str
    sent_at: int


class Note(msgspec.Struct, kw_only=True):
    """What a run leaves in the ledger about itself once a second, for whoever looks in from outside."""

    time: int
    """When this was noted, in seconds of UTC."""
    started_at: str
    pid: int
    snapshot: Snapshot
    troubles: dict[str, Trouble]
    """By kind, of this run."""
    decisions: tuple[tuple[int, str], ...] = ()
    """The last that the scheduler decided, and why, each with its second of UTC."""
    limits: tuple[KnownLimit, ...] = ()
    """What is known of services' limits, for the next run."""


class Summary(msgspec.Struct, kw_only=True):
    """What a run leaves behind: the content of summary.json. `totals` are the sums over the output's folders."""

    name: str
    state: str
    """complete, or why not: paused, interrupted, stopped."""
    selected: int | None
    pending: int | None
    totals: Totals
    started_at: str
    finished_at: str
    seconds: float
    """This run's, as are the requests it sent."""
    requests: int
    transport: str
    """The HTTP library: aiohttp or reqwest."""
    version: str
    retries: tuple[Retried, ...] = ()
    budget_usd: float | None = None
    """None where the job has no budget, as `spent`."""
    spent: Spending | None = None
    deadline: str | None = None
    """None where the job has no deadline."""
    late: float | None = None
    """Seconds after the deadline at which the run was complete, below 0: before it; None where it is not complete."""


class Status(msgspec.Struct, kw_only=True):
    """An output and its run as seen from outside; what is not known is None. Speeds are per second."""

    output: str
    state: str
    """starting, running, draining, publishing; complete, paused, interrupted, stopped; broken off: it was killed;
    in use: by `verify`, or by a run that has said nothing yet."""
    pid: int | None = None
    started_at: str | None = None
    noted_at: int | None = None
    """When the run last said something, in seconds of UTC."""
    seconds: float = 0.0
    """How long the run has taken by then."""
    total: int | None = None
    answered: int = 0
    failed: int = 0
    pending: int | None = None
    rows_per_second: float = 0.0
    """Over the last ten seconds, as `tokens_per_second`."""
    tokens_per_second: float = 0.0
    average_rows_per_second: float = 0.0
    """Over the whole run."""
    seconds_left: float | None = None
    binds: str = ""
    in_flight: int = 0
    window: int = 0
    waiting: int = 0
    buckets: dict[str, float] = {}
    requests: int = 0
    """Sent by this run, as `refused` and `troubles`."""
    refused: int = 0
    troubles: dict[str, Trouble] = {}
    decisions: tuple[tuple[int, str], ...] = ()
    """The last that its scheduler decided, each with its second of UTC."""
    prompt_tokens: int = 0
    """Billed, or maybe billed, by all runs, as `completion_tokens` and `cost_usd`."""
    completion_tokens: int = 0
    cost_usd: float | None = 0.0
    budget_usd: float | None = None
    """None where the last run had no budget, as `spent`."""
    deadline: float | None = None
    """Unix time; None where the last run had none."""
    late: float | None = None
    """Seconds after it at which all rows will be done, as a live run sees it; below 0: before it."""
    spent: Spending | None = None
    parts: int = 0
    complete_parts: int = 0
    ledger_bytes: int = 0
    totals: Totals = msgspec.field(default_factory=Totals)
    """Sums over the published parts."""
    timeline: list[Second] = []
    """The last minutes, in spans."""
