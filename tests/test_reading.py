"""Jobs whose answers are read: what is asked again, shown, voted on and kept; and stored answers read again."""

import json
import random
import shutil
import signal
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batcher
from batcher.errors import JobError
from batcher.records import Summary
from batcher.verify import verify
from tests import scripted, stories
from tests.scripted import Said

TICKET = json.loads((Path(__file__).parents[1] / "jobs/ticket.schema.json").read_text())
GOOD = {"category": "bug", "urgency": "low", "summary": "It: breaks.", "needs_human": False}
PRICES = {"gpt-oss-120b": {"input": 1.0, "output": 10.0}}
ONCE = (100 * 1.0 + 10 * 10.0) / 1e6
"""USD of one scripted answer with one choice."""


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_KEY", stories.KEY)


def write(folder: Path, url: str, rows: int, request: Mapping[str, object], **more: Mapping[str, object]) -> Path:
    """A job over so many rows of a scripted service."""
    stories.write_jsonl(folder / "rows.jsonl", rows)
    service = {"dialect": "openai", "prices": PRICES}
    sections = {"request": request, **more, "service": {**service, **more.get("service", {})}}
    return stories.write_job(folder, url, rows_per_part=500, more=sections)


def by_row(table: pa.Table) -> dict[int, dict[str, Any]]:
    """A table's rows by position."""
    return {row["row"]: row for row in table.to_pylist()}


# Broken answers


def broken(way: int, luck: random.Random) -> tuple[str | Said, bool]:
    """An answer that is broken in one of ten ways, and whether it can be read all the same."""
    text = json.dumps(GOOD)
    match way:
        case 0:
            return Said([text[: luck.randrange(1, len(text))]], "length"), False
        case 1:
            return f"```json\n{text}\n```", True
        case 2:
            return str(GOOD), False
        case 3:
            return f"I think that [this] fits: {text}\nDo you need more?", True
        case 4:
            return json.dumps({**GOOD, "category": "Bug"}), False
        case 5:
            return json.dumps({**GOOD, "needs_human": "no"}), False
        case 6:
            missing = luck.choice(list(GOOD))
            return json.dumps({key: value for key, value in GOOD.items() if key != missing}), False
        case 7:
            return json.dumps({**GOOD, "more": {"category": "bug"}}), False
        case 8:
            return json.dumps({**GOOD, "needs_human": float("nan")}), False
    return text.replace("{", '{"urgency": "high", ', 1), False


def test_broken_answers_end_valid_or_kept(tmp_path: Path) -> None:
    """1,319 rows, 15 % of the answers broken in ten ways: each row ends valid or failed with its text, and all paid."""
    rows, luck = 1319, random.Random(5)
    well: tuple[str | Said, bool] = json.dumps(GOOD), True
    scripts: list[list[tuple[str | Said, bool]]] = []
    for row in range(rows):
        said = [well] * 3
        if luck.random() < 0.15:
            said[0] = broken(row % 10, luck)
            said[1:] = [well if luck.random() < 0.4 else broken(luck.randrange(10), luck) for _ in range(2)]
        scripts.append(said)
    with scripted.service(lambda row, before: scripts[row][before][0]) as service:
        job = write(tmp_path, service.url, rows, {"response_format": {"schema": TICKET}})
        result = batcher.run(batcher.load(job))
    answered, failed = by_row(result.table()), by_row(result.failures())
    assert sorted([*answered, *failed]) == list(range(rows))
    ways = set()
    for row, said in enumerate(scripts):
        last = next((at for at, (_, reads) in enumerate(said) if reads), 2)  # max_invalid is 2
        text = said[last][0]
        told = answered.get(row) or failed[row]
        assert told["response"] == (text.texts[0] if isinstance(text, Said) else text)
        assert told["attempts"] == last + 1
        assert told["billed_completion_tokens"] == 10 * (last + 1)
        assert told["cost_usd"] == pytest.approx(ONCE * (last + 1))
        if said[last][1]:
            assert answered[row]["parsed"] == GOOD
        else:
            assert told["kind"] == "invalid_output"
            assert (" (the answer was cut off at its token limit)" in told["message"]) == isinstance(text, Said)
            ways.add(told["message"][:9])
    assert len(failed) > 20
    assert len(ways) >= 6
    assert result.summary.totals.failure_kinds == {"invalid_output": len(failed)}
    assert verify(tmp_path / "out").problems == []


# Asked again


def test_the_model_is_shown_what_did_not_fit(tmp_path: Path) -> None:
    """With repair the answer and the reason follow the job's own messages, those of the last answer alone."""
    said = ["blue", "green\ud800", "b"]
    with scripted.service(lambda row, before: said[before]) as service:
        request = {"choices": ["a", "b"], "system": "Sort."}
        job = write(tmp_path, service.url, 1, request, retry={"repair": True})
        result = batcher.run(batcher.load(job))
    messages = [asked["messages"] for asked in service.of(0)]
    assert [message["role"] for message in messages[0]] == ["system", "user"]
    for sent, text in zip(messages[1:], ("blue", "green?"), strict=True):
        assert sent[:2] == messages[0]
        assert sent[2] == {"role": "assistant", "content": text}
        why = sent[3]["content"]
        assert sent[3]["role"] == "user"
        assert why.startswith(f'This answer does not fit: "{text.replace("?", "")}')
        assert why.endswith('is none of the choices "a", "b"\nAnswer again, in the form that was asked for.')
        assert len(sent) == 4
    row = by_row(result.table())[0]
    assert (row["parsed"], row["attempts"]) == ("b", 3)
    assert row["cost_usd"] == pytest.approx(3 * ONCE)


def test_a_kill_does_not_hide_what_did_not_fit(tmp_path: Path) -> None:
    """A run that is killed between an answer and the next request shows it all the same when it goes on."""
    with scripted.service(lambda row, before: "blue" if before == 0 else "a") as service:
        job = write(tmp_path, service.url, 3, {"choices": ["a", "b"]}, retry={"repair": True})
        killed = stories.run(job, BATCHER_KILLPOINT="commit.after:1")
        assert killed.returncode == -signal.SIGKILL
        recorded = len(service.asked)
        ended = stories.run(job)
        assert ended.returncode == 0, ended.stderr
    again = [asked["messages"] for _, asked in service.asked[recorded:]]
    assert any(len(messages) == 3 for messages in again)
    for row in range(3):
        *_, last = service.of(row)
        assert last["messages"][1] == {"role": "assistant", "content": "blue"}
    assert [row["parsed"] for row in stories.table(tmp_path / "out", "responses").to_pylist()] == ["a"] * 3


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"endpoint": "completions"}, "retry.repair: only where the job has messages: it adds two to them"),
        ({"body": "{{ body }}", "model": None, "prompt": None, "max_completion_tokens": None}, "retry.repair: only"),
        ({}, "retry.repair: nothing reads the answers; give choices, parse or response_format"),
    ],
)
def test_repair_needs_messages_and_a_reading(tmp_path: Path, request_: dict[str, object], said: str) -> None:
    """Where nothing can be added, or nothing can be unfit, the job is refused before anything is sent."""
    if request_.get("endpoint"):
        request_ = {**request_, "max_completion_tokens": None, "choices": ["a"]}
    job = write(tmp_path, "http://127.0.0.1:9/v1", 1, request_, retry={"repair": True})
    with pytest.raises(JobError, match=said.replace(".", r"\.")):
        batcher.run(batcher.load(job))


def test_the_majority_is_the_label(tmp_path: Path) -> None:
    """Of n answers the label of most is `parsed`, with its share; a row of which none fits has failed."""
    said = [("a", "b", "B."), ("b", "a", "x"), ("x", "y", "z")]
    with scripted.service(lambda row, before: Said(said[row])) as service:
        job = write(
            tmp_path,
            service.url,
            3,
            {"choices": ["a", "b"], "n": 3, "vote": "majority"},
            retry={"max_invalid": 0},
        )
        result = batcher.run(batcher.load(job))
    rows, (failure,) = by_row(result.table()), result.failures().to_pylist()
    assert [(rows[row]["response"], rows[row]["parsed"], rows[row]["vote_share"]) for row in (0, 1)] == [
        ("a", "b", 2 / 3),
        ("b", "b", 1 / 3),
    ]
    assert [choice["text"] for choice in rows[0]["choices"]] == ["a", "b", "B."]
    assert (failure["row"], failure["response"]) == (2, "x")
    assert "parse" not in service.of(0)[0]
    assert service.of(0)[0].keys() & {"choices", "vote"} == set()


# Types of the job's own

TYPES = """
import datetime, enum
import msgspec
class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"
class Ticket(msgspec.Struct):
    mood: Mood
    day: datetime.date | None = None
"""


def test_a_type_is_asked_for_and_read(tmp_path: Path) -> None:
    """The schema of a type beside the job file is sent and fixes the columns; a retry elsewhere needs no module."""
    (tmp_path / "kinds.py").write_text(TYPES)
    said = ['{"mood": "good", "day": "2026-01-31"}', '{"mood": "bad"}', '{"mood": "bad", "day": "2026-02-30"}']
    with scripted.service(lambda row, before: said[row]) as service:
        job = write(tmp_path, service.url, 3, {"parse": "kinds:Ticket"}, retry={"max_invalid": 0})
        result = batcher.run(batcher.load(job))
        (tmp_path / "kinds.py").unlink()
        said[2] = '{"mood": "bad", "day": "2026-02-28"}'
        sent = service.of(0)[0]["response_format"]["json_schema"]
        assert (sent["name"], sent["strict"], sent["schema"]["type"]) == ("Ticket", True, "object")
        assert sent["schema"]["additionalProperties"] is False, "as strict mode wants it, whatever the service"
        assert list(sent["schema"]["properties"]) == ["mood", "day"]
        (failure,) = result.failures().to_pylist()
        assert failure["message"] == '/day: not a date such as 2026-01-31: "2026-02-30"'
        result = batcher.retry(tmp_path / "out")
    assert result.table().schema.field("parsed").type == pa.struct({"mood": pa.string(), "day": pa.date32()})
    assert [row["parsed"] for row in result.table().to_pylist()] == [
        {"mood": "good", "day": date(2026, 1, 31)},
        {"mood": "bad", "day": None},
        {"mood": "bad", "day": date(2026, 2, 28)},
    ]


# Read again

ROWS, PART = 60, 20


def label(row: int) -> str:
    """What is said to a row: an answer in one of three forms."""
    return (f"So the label is {'ab'[row % 2]}.", f'{{"label": "{"ab"[row % 2]}", "score": {row}}}', "none")[row % 3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job whose answers are read by a pattern that fits a third of them; it is in a folder of its own."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "kinds.py").write_text("import msgspec\nclass Label(msgspec.Struct):\n    label: str\n    score: int\n")
    with pytest.MonkeyPatch.context() as patch, scripted.service(lambda row, before: label(row)) as service:
        patch.setenv("STORY_KEY", stories.KEY)
        job = write(
            folder,
            service.url,
            ROWS,
            {"parse": "regex:label is (a|b)"},
            retry={"max_invalid": 0},
            output={"rows_per_part": PART},
        )
        batcher.run(batcher.load(job))
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """The output of that job, moved away from it."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


AS_JSON = ("--set", "request.parse=kinds:Label", "--set", "request.response_format={type='json_object'}")
BY_EITHER = ("--set", 'request.parse=regex:label(?:" *:| is) "?(a|b)')


def check(output: Path, expected: Mapping[int, object]) -> dict[int, dict[str, Any]]:
    """What holds after a reparse: every row once, with these values, and sums and files as the ledger has them."""
    verdict = verify(output)
    assert (verdict.problems, verdict.pending, verdict.rereading) == ([], 0, False)
    responses, failures = by_row(stories.table(output, "responses")), by_row(stories.table(output, "failures"))
    assert sorted([*responses, *failures]) == list(range(ROWS))
    assert {row: told["parsed"] for row, told in responses.items()} == expected
    schemas = {pq.read_schema(part) for part in (output / "responses").iterdir()}
    assert len(schemas) == 1
    for row, told in {**responses, **failures}.items():
        assert (told["id"], told["text"], told["attempts"]) == (f"k{row}", stories.prompt(row), 1)
        assert told["response"] == label(row)
        assert told["cost_usd"] == pytest.approx(ONCE)
    assert not (output / ".publishing").exists()
    summary = msgspec.json.decode((output / "summary.json").read_bytes(), type=Summary)
    assert summary.totals.unfit == sum(value is None for value in expected.values())
    assert summary.totals.cost_usd == pytest.approx(ROWS * ONCE)
    return failures


def test_a_failure_that_fits_now_is_an_answer(output: Path, finished: Path) -> None:
    """Failures of answers that did not fit become answers with all their columns; the others say why they do not."""
    before = by_row(stories.table(output, "responses"))
    ended = stories.program("reparse", str(output), *BY_EITHER)
    assert (ended.returncode, ended.stderr) == (3, "batcher: 20 rows have failed\n")
    assert ended.stdout == f"{output}: 40 answers are read again, 20 of them of rows that had failed\n"
    failures = check(output, {row: "ab"[row % 2] for row in range(ROWS) if row % 3 < 2})
    assert {told["message"] for told in failures.values()} == {
        'nothing in the answer matches label(?:" *:| is) "?(a|b)'
    }
    after = by_row(stories.table(output, "responses"))
    assert {row: after[row] for row in before} == before
    missing = {name for row in after.values() for name, value in row.items() if value is None}
    known = {name for row in before.values() for name, value in row.items() if value is None}
    assert missing - known <= {"time_to_first_token", "prompt_cache_key"}

    job = finished / "job.toml"
    settings = [f"output.path={output}"]
    with pytest.raises(JobError) as refused:
        batcher.run(batcher.load(job, settings))
    assert f"put it back, or let batcher reparse {output} --set … read the stored answers so" in str(refused.value)
    result = batcher.run(batcher.load(job, [*settings, BY_EITHER[1]]))  # nothing is left to ask
    assert (result.summary.requests, result.summary.totals.answered) == (0, 40)


def test_a_retry_does_not_read_otherwise(output: Path) -> None:
    """Some rows read in one way and others in another would make one column of two meanings."""
    with pytest.raises(JobError) as refused:
        batcher.retry(output, settings=["request.parse=regex:label is (a)"])
    assert str(refused.value) == f"--set request.parse: how answers are read is changed by batcher reparse {output}"


def test_an_answer_is_never_thrown_away(output: Path) -> None:
    """The columns become those of a type; an answer that does not fit it stays, without a value; and back again."""
    batcher.reparse(output, AS_JSON[1::2])
    read = {row: {"label": "ab"[row % 2], "score": row} if row % 3 else None for row in range(ROWS) if row % 3 < 2}
    check(output, read)
    result = batcher.reparse(output, ["request.parse=regex:label is (a|b)", "request.response_format="])
    check(output, {row: None if row % 3 else "ab"[row % 2] for row in range(ROWS) if row % 3 < 2})
    assert result.summary.totals.answered == 40


def test_a_schema_file_is_read_anew(tmp_path: Path) -> None:
    """Without settings answers are read by the schema as it lies there now."""
    file = tmp_path / "label.json"
    file.write_text('{"type": "object", "properties": {"label": {"type": "string"}}}')
    said = '{"label": "a", "day": "2026-01-31"}'
    with scripted.service(lambda row, before: said) as service:
        job = write(tmp_path, service.url, 2, {"response_format": {"schema": "label.json"}})
        batcher.run(batcher.load(job))
        file.write_text(
            '{"type": "object", "properties": {"label": {"enum": ["a"]}, "day": {"type": "string", "format": "date"}}}'
        )
        with pytest.raises(JobError, match="batcher reparse"):
            batcher.run(batcher.load(job))
        result = batcher.reparse(tmp_path / "out")
        assert batcher.run(batcher.load(job)).summary.totals == result.summary.totals
        assert len(service.asked) == 2
    assert [row["parsed"] for row in result.table().to_pylist()] == [{"label": "a", "day": date(2026, 1, 31)}] * 2


@pytest.mark.parametrize(
    "point", ["reparse.begun:1", "responses.placed:2", "failures.placed:2", "reparse.noted:3", "reparse.ended:1"]
)
def test_a_kill_in_a_reparse_changes_nothing_of_it(output: Path, point: str) -> None:
    """Killed anywhere: no row stands twice among the answers, nothing else may begin, and the next one ends it."""
    killed = stories.program("reparse", str(output), *BY_EITHER, BATCHER_KILLPOINT=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    rows = stories.column(output, "responses", "row")
    assert len(rows) == len({*rows})
    assert {*rows, *stories.column(output, "failures", "row")} == {*range(ROWS)}
    verdict = verify(output)
    assert (verdict.problems, verdict.rereading) == ([], point != "reparse.ended:1")
    if verdict.rereading:
        with pytest.raises(JobError) as refused:
            batcher.retry(output)
        assert str(refused.value) == f"a reparse is under way in {output}\nbatcher reparse {output} goes on with it"
    batcher.reparse(output)
    check(output, {row: "ab"[row % 2] for row in range(ROWS) if row % 3 < 2})


def test_another_reparse_takes_the_place_of_one_that_was_killed(output: Path) -> None:
    """It costs nothing to begin anew: with other settings all parts are read by them."""
    killed = stories.program("reparse", str(output), *BY_EITHER, BATCHER_KILLPOINT="reparse.noted:1")
    assert killed.returncode == -signal.SIGKILL
    batcher.reparse(output, ["request.parse=regex:label is (b)"])
    check(output, {row: "b" if row % 2 and not row % 3 else None for row in {*range(0, ROWS, 3), *range(1, PART, 3)}})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("request.model=other", "a reparse may change request.response_format, request.parse, request.choices and"),
        ("schedule.max_in_flight=1", "a reparse may change request.response_format"),
        ("request.parse=regex:(", "job.toml: request.parse: not a regular expression: missing )"),
        ("request.parse=nowhere:T", "job.toml: request.parse: nowhere cannot be imported: ModuleNotFoundError"),
        ("request.parse=", None),
    ],
)
def test_what_a_reparse_may_change(output: Path, setting: str, said: str | None) -> None:
    """How answers are read, and nothing else; without a reading all answers are texts."""
    if said is None:
        result = batcher.reparse(output, [setting])
        assert "parsed" not in result.table().column_names
        assert (result.summary.totals.answered, verify(output).problems) == (ROWS, [])
        return
    with pytest.raises(JobError) as refused:
        batcher.reparse(output, [setting])
    assert said in str(refused.value)
    assert verify(output).problems == []
