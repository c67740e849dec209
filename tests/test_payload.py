"""Packed bodies and secrets through a whole run: what a service that cannot read, or repeats, makes of it."""

import base64
import gzip
import json
from pathlib import Path
from urllib.parse import quote

import anyio
import pytest

import batcher
from batcher.errors import BatcherError, JobError, ServiceError
from batcher.payload import GZIPPED_FROM, pack
from batcher.records import Failure, Kind
from batcher.retry import REFUSALS_AT_FIRST, Guard
from tests import stories
from tests.test_transport import ANSWER, Caller, answer, serving

IN_FLIGHT = 8
KEY = 'sk/story+0123"456\\789='


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every story has its key in the environment."""
    monkeypatch.setenv("STORY_KEY", KEY)


def job(folder: Path, url: str, rows: int, **service: str) -> Path:
    """A job over rows of which each fourth is long."""
    lines = [{"key": f"k{row}", "text": "long text " * (500 if row % 4 == 3 else 1)} for row in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return stories.write_job(folder, url, in_flight=IN_FLIGHT, more={"service": service})


def refused(folder: Path, status: int, rows: int, **service: str) -> tuple[str, int, int]:
    """How a run ends whose packed bodies are refused: its words, the packed requests, and the rows that failed."""
    packed = 0

    async def talk(caller: Caller) -> None:
        nonlocal packed
        while request := await caller.request():
            head = request.partition(b"\r\n\r\n")[0].lower()
            if head.startswith(b"post") and (b"content-encoding" in head or b"msgpack" in head):
                packed += 1
                await caller.say(answer(b'{"message": "cannot parse body"}', status=f"{status} No"))
            else:
                await caller.say(answer())

    async def run() -> BatcherError:
        async with serving(talk) as server:
            with pytest.raises(ServiceError) as caught:
                await batcher.arun(batcher.load(job(folder, server.url(), rows, **service)))
        return caught.value

    error = anyio.run(run)
    assert error.exit_code == 4
    assert len(str(error).splitlines()) == 1
    return str(error), packed, len(stories.column(folder / "out", "failures", "row"))


@pytest.mark.parametrize("how", [{"encoding": "msgpack"}, {"encoding": "msgpack", "compression": "gzip"}])
@pytest.mark.parametrize("status", [400, 415, 422])
def test_a_service_that_reads_no_packed_body_ends_the_run(tmp_path: Path, status: int, how: dict[str, str]) -> None:
    """One line names both keys after a few requests, and no row has failed."""
    said, sent, failed = refused(tmp_path, status, 2000, **how)
    assert "service.encoding" in said
    assert "service.compression" in said
    assert sent <= (0 if status == 415 else REFUSALS_AT_FIRST) + IN_FLIGHT
    assert failed == 0


@pytest.mark.parametrize("status", [400, 415])
def test_answers_to_small_bodies_do_not_hide_that_large_ones_are_not_read(tmp_path: Path, status: int) -> None:
    """Where small rows go unpacked and are answered, the run ends all the same, and few rows have failed."""
    said, sent, failed = refused(tmp_path, status, 2000, compression="gzip")
    assert "no body sent as gzip was answered" in said
    most = (0 if status == 415 else REFUSALS_AT_FIRST) + IN_FLIGHT
    assert sent <= most
    assert failed <= most


def test_a_packed_refusal_that_is_the_rows_own_ends_nothing() -> None:
    """A prompt that is too long is too long in every packing."""
    guard = Guard()
    own = Failure(Kind.REJECTED, "too long", status=400, code="context_length_exceeded", packing="gzip")
    assert [guard.failed(own, row, 0.0) for row in range(100)] == [None] * 100


def test_encoding_and_compression_may_change_between_runs(tmp_path: Path) -> None:
    """How bodies travel is no part of what a job means."""

    async def talk(caller: Caller) -> None:
        while await caller.request():
            await caller.say(answer())

    async def run() -> None:
        async with serving(talk) as server:
            for limit, how in enumerate(({}, {"encoding": "msgpack"}, {"compression": "gzip"}), start=1):
                path = job(tmp_path, server.url(), 12, **how)
                result = await batcher.arun(batcher.load(path, [f"input.limit={4 * limit}"]))
                assert result.summary.totals.answered == 4 * limit

    anyio.run(run)


def test_small_bodies_are_not_gzipped() -> None:
    """Below its threshold a body goes as it is; what is gzipped unpacks to what it was."""
    for size in (10, GZIPPED_FROM - 13, GZIPPED_FROM - 12, 100_000):
        body = b'{"prompt":"%s"}' % (b"x" * (size - 13))
        packed, gzipped = pack(body, "json", "gzip")
        assert gzipped is (len(body) >= GZIPPED_FROM)
        assert (gzip.decompress(packed) if gzipped else packed) == body


FORMS = (
    KEY,
    json.dumps(KEY)[1:-1],
    "".join(f"\\u{ord(letter):04x}" for letter in KEY),
    quote(KEY, safe=""),
    base64.b64encode(f"Bearer {KEY}".encode()).decode(),
)


def test_a_key_that_a_service_repeats_is_written_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers, streams, refusals and what is not JSON may hold the key in any form: no file has it, and no message."""
    plain = [form for form in FORMS if form != KEY]
    bodies = [
        *(ANSWER.replace(b"yes", form.encode()) for form in plain),
        *(b'{"message":"wrong: %s"}' % form.encode() for form in plain),
        KEY.encode(),
        b'{"choices":[{"index":0,"message":{"content":"' + KEY.encode()[:3],
    ]
    number = 0

    async def talk(caller: Caller) -> None:
        nonlocal number
        while await caller.request():
            number += 1
            body = bodies[number % len(bodies)]
            status = "200 OK" if number % 3 else "422 No"
            await caller.say(answer(body, f"X-Echo: {quote(KEY)}\r\n", status))

    async def run() -> None:
        async with serving(talk) as server:
            loaded = batcher.load(job(tmp_path, server.url(), 60), ["output.raw=true"])
            await batcher.arun(loaded)

    anyio.run(run)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    shown = capsys.readouterr()
    tables = [
        str(stories.table(tmp_path / "out", folder).to_pylist()) for folder in ("responses", "failures", "attempts")
    ]
    assert any("[redacted]" in table for table in tables)
    for text in [*written, *(text.encode() for text in (shown.out, shown.err, *tables))]:
        for form in FORMS:
            assert form.encode() not in text
            assert repr(form)[1:-1].encode() not in text


def test_a_job_that_holds_its_key_is_refused(tmp_path: Path) -> None:
    """The job is written into its output, so the key may not stand in it, nor in its prompt's file."""
    path = job(tmp_path, "http://127.0.0.1:9/v1", 1)
    (tmp_path / "prompt.txt").write_text(f"My key is {KEY}")
    for setting in (f"request.user={json.dumps(KEY)}", 'request.system={ file = "prompt.txt" }'):
        with pytest.raises(JobError) as caught:
            batcher.run(batcher.load(path, [setting]))
        assert "holds the value of a secret" in str(caught.value)
        assert KEY not in str(caught.value)
    assert not (tmp_path / "out").exists()
