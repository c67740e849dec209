"""A recount finds every damage to an output, names it, and leaves no trace itself."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batcher
from batcher.errors import JobError, OutputInUseError, StorageError
from batcher.ledger import Lock
from batcher.records import PartRecord, Summary
from batcher.simulator import Settings, running
from batcher.verify import Verdict, verify

ROWS, PART = 60, 20
RUN = "import batcher, sys; batcher.run(batcher.load(sys.argv[1], sys.argv[2:]))"


def _job(folder: Path, url: str) -> Path:
    """A job over 60 rows in three parts; every tenth prompt is refused by the service."""
    rows = [{"text": f"{'poison' if row % 10 == 7 else 'ticket'} {row}"} for row in range(ROWS)]
    (folder / "rows.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    job = {
        "input": {"path": "rows.jsonl"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 20},
        "service": {"base_url": url, "api_key_env": "TEST_KEY"},
        "output": {"path": "out", "rows_per_part": PART},
    }
    (folder / "job.toml").write_bytes(msgspec.toml.encode(job))
    return folder / "job.toml"


@pytest.fixture(scope="module", autouse=True)
def _key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_KEY", "a-key-for-tests")
        yield


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """A simulated service that refuses what is poison."""
    with running(Settings(latency=0.0, poison={"poison": 422})) as simulator:
        yield simulator.url


@pytest.fixture(scope="module")
def whole(service: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three complete parts, with answers and failures."""
    job = batcher.load(_job(tmp_path_factory.mktemp("whole"), service))
    batcher.run(job)
    return job.folder / job.output.path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of a run that paused in the middle of its second part."""
    with running(Settings(latency=0.0, requests_per_day=22)) as simulator:
        job = batcher.load(
            _job(tmp_path_factory.mktemp("interrupted"), simulator.url),
            ["schedule.max_in_flight=1", "schedule.wait=false"],
        )
        with pytest.raises(batcher.errors.PausedError):
            batcher.run(job)
    return job.folder / job.output.path


@pytest.fixture(scope="module", params=["responses.renamed:2", "complete.before:1"])
def killed(request: pytest.FixtureRequest, service: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose run was killed as it published a part."""
    job = _job(tmp_path_factory.mktemp("killed"), service)
    environment = os.environ | {"BATCHER_KILLPOINT": request.param}
    assert subprocess.run([sys.executable, "-c", RUN, job], env=environment, check=False).returncode == -signal.SIGKILL
    return job.parent / "out"


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole output, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture
def open_output(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted output, to be damaged."""
    return Path(shutil.copytree(interrupted, tmp_path / "out"))


def _rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)


def _edit_summary(output: Path, change: Callable[[Summary], None]) -> None:
    summary = msgspec.json.decode((output / "summary.json").read_bytes(), type=Summary)
    change(summary)
    (output / "summary.json").write_bytes(msgspec.json.encode(summary))


def _edit_part(output: Path, part: int, change: Callable[[PartRecord], PartRecord]) -> None:
    with closing(sqlite3.connect(output / "ledger.sqlite")) as db, db:
        (old,) = db.execute("SELECT record FROM parts WHERE part = ?", (part,)).fetchone()
        new = change(msgspec.msgpack.decode(old, type=PartRecord))
        db.execute("UPDATE parts SET record = ? WHERE part = ?", (msgspec.msgpack.encode(new), part))


def _state(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def _problems(output: Path, pattern: str) -> list[str]:
    """The problems that fit a pattern, all of them being single lines."""
    problems = verify(output).problems
    assert all("\n" not in problem for problem in problems)
    return [problem for problem in problems if re.fullmatch(pattern, problem)]


# Outputs that are as they should be


def test_a_whole_output_has_no_problem(whole: Path) -> None:
    """Every row is found once, and the sums are those of the summary."""
    verdict = verify(whole)
    assert verdict.problems == []
    assert (verdict.parts, verdict.files, verdict.pending) == (3, 9, 0)
    assert (verdict.totals.answered, verdict.totals.failed, verdict.totals.attempts) == (54, 6, 60)
    assert verdict.totals.failure_kinds == {"rejected": 6}


def test_an_interrupted_output_has_no_problem(interrupted: Path) -> None:
    """A run that paused has left parts that can be trusted, and rows that are pending."""
    verdict = verify(interrupted)
    assert verdict.problems == []
    assert verdict.pending == ROWS - verdict.totals.rows > 0
    assert verdict.files == 4


def test_what_a_kill_leaves_has_no_problem(killed: Path) -> None:
    """Wherever a run is killed, what lies in the folders is in order, and reading it leaves it as it was."""
    before = _state(killed)
    verdict = verify(killed)
    assert (verdict.problems, verdict.pending) == ([], None)
    assert verdict.parts > 0
    assert _state(killed) == before


def test_a_copied_journal_is_read(killed: Path, tmp_path: Path) -> None:
    """The ledger's journal counts also where its index was not copied, as by a sync that skips it."""
    copy = Path(shutil.copytree(killed, tmp_path / "out", ignore=shutil.ignore_patterns("*-shm")))
    assert (copy / "ledger.sqlite-wal").stat().st_size
    before = _state(copy)
    assert verify(copy) == verify(killed)
    assert _state(copy) == before


def test_a_ledger_elsewhere_is_found(service: str, tmp_path: Path) -> None:
    """The output's own copy of the job says where the ledger lies."""
    job = batcher.load(_job(tmp_path, service), ["output.ledger=elsewhere/state.sqlite"])
    batcher.run(job)
    assert not (tmp_path / "out" / "ledger.sqlite").exists()
    assert verify(tmp_path / "out").problems == []


def test_a_recount_writes_nothing(output: Path) -> None:
    """The output is the same file by file after a recount."""
    before = _state(output)
    assert verify(output).problems == []
    assert _state(output) == before


# Outputs that cannot be recounted


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    """A folder without a job, and one that is not there, are no outputs."""
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(JobError, match=r"no output of batcher"):
            verify(folder)


def test_an_output_in_use_is_not_recounted(output: Path) -> None:
    """While a run writes, a recount would find what changes under its hands."""
    with Lock(output), pytest.raises(OutputInUseError):
        verify(output)


@pytest.mark.parametrize("content", [None, b"not a database, but long enough to be looked at" * 100])
def test_a_ledger_that_is_gone_or_damaged_is_said(output: Path, content: bytes | None) -> None:
    """Without its ledger nobody knows what an output should hold."""
    (output / "ledger.sqlite").unlink()
    if content is not None:
        (output / "ledger.sqlite").write_bytes(content)
    with pytest.raises(StorageError, match=r"ledger\.sqlite"):
        verify(output)


# Damage


def test_a_missing_part_is_found(output: Path) -> None:
    """A deleted file is named, with the rows that are gone."""
    (output / "responses" / "part-000001.parquet").unlink()
    assert _problems(output, r"responses/part-000001\.parquet: is missing \(18 rows\)")
    assert _problems(output, r"part 000001: row 20 is in neither responses nor failures \(18 rows are not\)")


def test_every_flipped_byte_is_found(output: Path) -> None:
    """Wherever a byte of a published file changes, the file is named."""
    path = output / "responses" / "part-000002.parquet"
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 25):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        assert _problems(output, r"responses/part-000002\.parquet: is not what was published: its sha256 differs")


def test_a_truncated_file_is_found(output: Path) -> None:
    """A file of another size is named with both sizes, and that it cannot be read."""
    path = output / "failures" / "part-000000.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    assert _problems(output, r"failures/part-000000\.parquet: has [\d,]+ bytes, and [\d,]+ were published")
    assert _problems(output, r"failures/part-000000\.parquet: cannot be read: .*")


def test_a_damaged_page_of_an_open_part_is_found(open_output: Path) -> None:
    """Pages carry checksums of their own: an open part's file is not trusted blindly either."""
    (open_output / ".publishing").mkdir()  # as if the next run had been killed: the file's own sum is out of date
    path = open_output / "responses" / "part-000001.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 0x10
    path.write_bytes(content)
    assert _problems(open_output, r"responses/part-000001\.parquet: cannot be read: .*")


def test_a_row_that_stands_twice_in_a_part_is_found(output: Path) -> None:
    """The file and the row are named."""
    _rewrite(
        output / "responses" / "part-000001.parquet",
        lambda table: pa.concat_tables([table.slice(0, 5), table.slice(4)]),
    )
    assert _problems(output, r"responses/part-000001\.parquet: row 24 stands twice")


def test_a_row_that_stands_in_another_part_is_found(output: Path) -> None:
    """A part holds rows of its own range only."""
    other = pq.read_table(output / "responses" / "part-000000.parquet").slice(0, 1)
    _rewrite(output / "responses" / "part-000001.parquet", lambda table: pa.concat_tables([other, table]))
    assert _problems(output, r"responses/part-000001\.parquet: row 0 is outside of 20 to 39")


def test_rows_out_of_order_are_found(open_output: Path) -> None:
    """Rows are sorted inside a part, whether it is complete or not."""
    for part in (0, 1):
        path = open_output / "responses" / f"part-00000{part}.parquet"
        _rewrite(path, lambda table: table.sort_by([("row", "descending")]))
        assert _problems(open_output, rf"responses/part-00000{part}\.parquet: row \d+ stands after row \d+")


def test_a_row_with_answer_and_failure_is_found(output: Path) -> None:
    """A row is in exactly one of the two folders."""
    _rewrite(
        output / "failures" / "part-000000.parquet",
        lambda table: table.set_column(0, "row", pa.array([8, 17], pa.int64())),
    )
    assert _problems(output, r"failures/part-000000\.parquet: row 8 stands in responses too")
    assert _problems(output, r"part 000000: row 7 is in neither responses nor failures \(1 rows are not\)")


def test_a_recorded_answer_that_is_in_no_part_is_found(open_output: Path) -> None:
    """Once a run has ended, every row that its ledger calls done lies in its part."""
    _rewrite(open_output / "responses" / "part-000001.parquet", lambda table: table.slice(1))
    assert _problems(open_output, r"part 000001: row 20 is in neither responses nor failures \(1 rows are not\)")


def test_other_columns_are_found(output: Path) -> None:
    """All parts of a folder have one schema; the columns that differ are named."""
    _rewrite(
        output / "responses" / "part-000002.parquet",
        lambda table: table.drop_columns(["raw"] if "raw" in table.column_names else ["response"]),
    )
    assert _problems(
        output, r"responses/part-000002\.parquet: has other columns than responses/part-000000\.parquet: response"
    )


def test_a_file_without_our_columns_is_found(output: Path) -> None:
    """What is no table of ours is named, not stumbled over."""
    _rewrite(output / "failures" / "part-000001.parquet", lambda table: pa.table({"a": [1]}))
    assert _problems(output, r"failures/part-000001\.parquet: cannot be read: .*row.*")


def test_attempts_are_recounted(output: Path) -> None:
    """An attempt that is told twice is found like a row."""
    _rewrite(
        output / "attempts" / "part-000000.parquet",
        lambda table: pa.concat_tables([table.slice(0, 1), table]),
    )
    assert _problems(output, r"attempts/part-000000\.parquet: row 0 stands twice")
    assert _problems(output, r"summary\.json: attempts is 60, and 61 in the folders")


@pytest.mark.parametrize("name", ["answered", "completion_tokens", "billed_prompt_tokens", "latency"])
def test_an_altered_summary_is_found(output: Path, name: str) -> None:
    """Each sum of the summary is held against the folders and against the ledger."""

    def alter(summary: Summary) -> None:
        setattr(summary.totals, name, getattr(summary.totals, name) + 1)

    _edit_summary(output, alter)
    assert _problems(output, rf"summary\.json: {name} is .*, and .* in the folders")
    assert _problems(output, rf"summary\.json: {name} is .*, and .* in the ledger")


def test_a_summary_that_says_too_much_is_found(open_output: Path) -> None:
    """A run is not called complete while rows are pending."""

    def alter(summary: Summary) -> None:
        summary.state = "complete"

    _edit_summary(open_output, alter)
    assert _problems(open_output, r"summary\.json: calls 60 rows complete, and row 20 is not")


def test_an_altered_ledger_is_found(output: Path) -> None:
    """A part's sums in the ledger are held against its files."""

    def alter(record: PartRecord) -> PartRecord:
        record.totals.prompt_tokens += 5
        return record

    _edit_part(output, 1, alter)
    assert _problems(output, r"part 000001: prompt_tokens is \d+, and \d+ in the ledger")


def test_a_file_that_nobody_published_is_found(output: Path) -> None:
    """A folder of parts holds parts: readers take in whatever lies there."""
    shutil.copy(output / "responses" / "part-000000.parquet", output / "responses" / "part-000007.parquet")
    shutil.copy(output / "responses" / "part-000000.parquet", output / "responses" / "copy.parquet")
    assert _problems(output, r"responses/part-000007\.parquet: is not known to the ledger")
    assert _problems(output, r"responses/copy\.parquet: is no part of the output")


def test_leftovers_of_publishing_are_found(output: Path) -> None:
    """When all is complete nothing is left in the workshop."""
    (output / ".publishing").mkdir()
    (output / ".publishing" / "responses-000001").write_bytes(b"half")
    assert _problems(output, r"\.publishing/responses-000001: was left behind; .*")


def test_a_damaged_summary_is_found(output: Path) -> None:
    """A summary that is not JSON is named; the rest is recounted all the same."""
    (output / "summary.json").write_bytes(b"{")
    verdict: Verdict = verify(output)
    assert [problem.split(":")[0] for problem in verdict.problems] == ["summary.json"]
    assert verdict.totals.rows == ROWS
