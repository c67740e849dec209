"""The command line: what it prints where, and the exit code of every way to end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow.parquet as pq
import pytest

from batcher import cli
from batcher.ledger import Lock
from batcher.simulator import Settings, Simulator, running

KEY = "sk-a-key-that-nobody-may-see"
COMMAND = [sys.executable, "-m", "batcher"]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command line, called with these words."""

    def called(*words: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        assert KEY not in out + err
        return Ended(ended.value.code, out, err)

    return called


@pytest.fixture(scope="module", autouse=True)
def _key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLI_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def service() -> Iterator[Simulator]:
    """A simulated service that notes what it is asked."""
    with running(Settings(latency=0.0, poison={"poison": 422}), record=True) as simulator:
        yield simulator


def _job(folder: Path, url: str, rows: int = 10, more: Mapping[str, Mapping[str, object]] | None = None) -> Path:
    """A job file over so many rows; `more` adds to its sections."""
    (folder / "rows.jsonl").write_bytes(b"\n".join(msgspec.json.encode({"text": f"ticket {n}"}) for n in range(rows)))
    sections: dict[str, dict[str, object]] = {
        "input": {"path": "rows.jsonl"},
        "request": {"model": "gpt-oss-120b", "prompt": "{{ text }}", "max_completion_tokens": 20},
        "service": {"base_url": url, "api_key_env": "CLI_KEY", "dialect": "cerebras"},
        "output": {"path": "out"},
    }
    for name, values in (more or {}).items():
        sections[name] = sections.get(name, {}) | dict(values)
    (folder / "job.toml").write_bytes(msgspec.toml.encode({"name": "tickets", **sections}))
    return folder / "job.toml"


# run


def test_a_run_ends_with_its_summary(call: Call, service: Simulator, tmp_path: Path) -> None:
    """Every row answered is exit code 0; the summary is on standard output, the progress on standard error."""
    ended = call("run", _job(tmp_path, service.url))
    assert ended.code == 0
    assert re.search(r"answered +10\n", ended.out)
    assert f"{tmp_path}/out/responses" in ended.out
    assert "10 of 10 rows (100 %)" in ended.err
    assert "\x1b" not in ended.err


def test_quiet_shows_no_progress(call: Call, service: Simulator, tmp_path: Path) -> None:
    """With --quiet standard error stays empty."""
    ended = call("run", _job(tmp_path, service.url), "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert "answered" in ended.out


def test_a_limit_is_a_setting(call: Call, service: Simulator, tmp_path: Path) -> None:
    """--limit N is --set input.limit=N, and both override the job file."""
    job = _job(tmp_path, service.url, more={"input": {"limit": 9}})
    assert call("run", job, "--limit", 3).code == 0
    assert pq.read_table(tmp_path / "out" / "responses")["row"].to_pylist() == [0, 1, 2]
    assert call("run", job, "--set", "input.limit=5", "--set", "output.path=other").code == 0
    assert pq.read_table(tmp_path / "other" / "responses").num_rows == 5


def test_failed_rows_are_exit_code_3(call: Call, service: Simulator, tmp_path: Path) -> None:
    """A run that finished with failures says how many, and the most common reasons."""
    job = _job(tmp_path, service.url, more={"request": {"prompt": "{{ 'poison' if '7' in text else text }}"}})
    ended = call("run", job)
    assert ended.code == 3
    assert re.search(r"failed +1  \(rejected 1\)\n", ended.out)
    assert re.search(r"most common failures:\n  1 × rejected: \w+", ended.out)


def test_foreign_text_cannot_act_on_the_terminal(call: Call, service: Simulator, tmp_path: Path) -> None:
    """What the service says of an unknown model, and the model's own name, are printed escaped; exit code 4."""
    job = _job(tmp_path, service.url, more={"request": {"model": "gpt\x1b]0;owned\x07\u202e"}})
    ended = call("run", job)
    assert ended.code == 4
    assert ended.err.count("batcher: ") == 1
    assert not {"\x1b", "\x07", "\u202e"} & set(ended.out + ended.err)
    assert re.search(r"pending +10\n", ended.out)


def test_a_wrong_key_is_exit_code_4_with_all_rows_pending(call: Call, tmp_path: Path) -> None:
    """The service's refusal of the key ends the run, and no row is called failed."""
    with running(Settings(key="another")) as simulator:
        ended = call("run", _job(tmp_path, simulator.url))
    assert ended.code == 4
    assert "batcher: the service refuses" in ended.err
    assert "CLI_KEY" in ended.err or "key" in ended.err
    assert re.search(r"tickets: stopped\n", ended.out)
    assert re.search(r"pending +10\n", ended.out)


def test_a_pause_is_exit_code_75(call: Call, tmp_path: Path) -> None:
    """When the day's quota is used up the run ends resumable, with the summary of what it has done."""
    with running(Settings(latency=0.0, requests_per_day=4)) as simulator:
        ended = call("run", _job(tmp_path, simulator.url, more={"schedule": {"max_in_flight": 1, "wait": False}}))
    assert ended.code == 75
    assert "run the same command again" in ended.err
    assert re.search(r"tickets: paused\n +answered +4\n +failed +0\n +pending +6\n", ended.out)


def test_a_signal_ends_a_run_that_the_same_command_takes_up(service: Simulator, tmp_path: Path) -> None:
    """SIGINT ends with 130 and SIGTERM with 143; rows that were done are not asked again."""
    job = _job(tmp_path, service.url, rows=30, more={"schedule": {"requests_per_minute": 200}})
    begun = len(service.book)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        asked = len(service.book)
        command = [*COMMAND, "run", str(job)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while len(service.book) == asked and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            out, err = process.communicate()
        assert process.returncode == code
        assert b"batcher: interrupted" in err
        assert b"tickets: interrupted" in out
    faster = [*COMMAND, "run", str(job), "--set", "schedule.requests_per_minute=60000"]
    ended = subprocess.run(faster, capture_output=True, check=False)
    assert ended.returncode == 0
    assert len(service.book) - begun == 30


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"input": {"path": "nothing.jsonl"}}, "nothing.jsonl"),
        ({"input": {"pth": "rows.jsonl"}}, "unknown key input.pth; did you mean path?"),
        ({"request": {"prompt": "{{ txt }}"}}, "no column txt"),
        ({"request": {"temperature": 3}}, "request.temperature"),
        ({"service": {"api_key_env": "NOT_SET"}}, "NOT_SET"),
        ({"output": {"keep": ["gone"]}}, "no column gone"),
    ],
)
def test_a_wrong_job_is_exit_code_2(
    call: Call, service: Simulator, tmp_path: Path, more: Mapping[str, Mapping[str, object]], said: str
) -> None:
    """One or two lines say what is wrong before anything is sent or written."""
    asked = len(service.book)
    job = _job(tmp_path, service.url, more=more)
    for command in ("run", "plan"):
        ended = call(command, job)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("batcher: ")
        assert said in ended.err
        assert len(ended.err.splitlines()) <= 2
    assert len(service.book) == asked
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["rum"], ["run"], ["run", "job.toml", "--fast"], ["simulator", "--port", "x"]])
def test_wrong_usage_is_exit_code_2(call: Call, words: list[str]) -> None:
    """Unknown commands and options are told apart from errors of the program."""
    ended = call(*words)
    assert ended.code == 2
    assert "Error: " in ended.err
    assert "Traceback" not in ended.err


def test_a_setting_that_is_none_is_exit_code_2(call: Call, service: Simulator, tmp_path: Path) -> None:
    """--set wants section.key=value."""
    ended = call("run", _job(tmp_path, service.url), "--set", "input.limit")
    assert (ended.code, ended.err) == (2, "batcher: --set input.limit: section.key=value, please\n")


def test_an_output_in_use_is_exit_code_5(call: Call, service: Simulator, tmp_path: Path) -> None:
    """A second run on one output is refused, and so is a recount."""
    job = _job(tmp_path, service.url)
    assert call("run", job).code == 0
    with Lock(tmp_path / "out"):
        for words in (["run", job], ["verify", tmp_path / "out"]):
            ended = call(*words)
            assert ended.code == 5
            assert ended.err.startswith("batcher: ")


def test_an_output_that_cannot_be_written_is_exit_code_6(call: Call, service: Simulator, tmp_path: Path) -> None:
    """Where no folder can be made the disk is to blame, and the message names the place."""
    job = _job(tmp_path, service.url, more={"output": {"path": "rows.jsonl/out"}})
    ended = call("run", job)
    assert ended.code == 6
    assert "rows.jsonl/out" in ended.err


# plan


def test_a_plan_shows_the_first_request_to_the_byte(call: Call, service: Simulator, tmp_path: Path) -> None:
    """The body that the plan prints is the body that the service gets, and the plan itself sends nothing."""
    text = 'Grüße \u0007\u009b\u202e 東京 \U0001f600 "quoted" {curly}'
    job = _job(tmp_path, service.url, more={"request": {"system": text, "seed": 7, "stop": ["\n\n"]}})
    asked = len(service.book)
    planned = call("plan", job)
    assert planned.code == 0
    assert len(service.book) == asked
    assert not (tmp_path / "out").exists()
    assert call("run", job, "--limit", 1).code == 0
    hashes = {sha256(line.encode()).hexdigest() for line in planned.out.split("\n")}
    assert service.book[-1].body_sha256 in hashes
    assert f"POST {service.url}/chat/completions\n" in planned.out


def test_a_plan_names_secrets_and_does_not_show_them(
    call: Call, service: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key and extra headers are shown as the names of their variables."""
    monkeypatch.setenv("MORE", f"X-Team: {KEY}2")
    ended = call("plan", _job(tmp_path, service.url, more={"service": {"headers_env": "MORE"}}))
    assert "Authorization: Bearer $CLI_KEY\n" in ended.out
    assert "X-Team: (from $MORE)\n" in ended.out


def test_a_plan_estimates_what_is_to_come(call: Call, service: Simulator, tmp_path: Path) -> None:
    """Rows, tokens, cost at the job's prices and time at its rates, with what binds it."""
    more: dict[str, dict[str, object]] = {
        "service": {"prices": {"gpt-oss-120b": {"input": 0.0, "output": 1000.0}}},
        "schedule": {"requests_per_minute": 20, "max_in_flight": 4},
    }
    out = call("plan", _job(tmp_path, service.url, rows=1_500, more=more)).out
    assert re.search(r"^rows +1,500$", out, re.MULTILINE)
    assert re.search(r"^prompts +about [\d,]+ tokens, estimated from the first 1,000 rows$", out, re.MULTILINE)
    assert re.search(r"^answers +at most 30,000 tokens$", out, re.MULTILINE)
    assert re.search(r"^cost +at most \$30\.00: \$0\.00 for the prompts, .*; prices of the job$", out, re.MULTILINE)
    assert re.search(r"^time +about 1 h 16 min, bound by schedule.requests_per_minute$", out, re.MULTILINE)


def test_a_plan_calls_unknown_what_it_does_not_know(call: Call, service: Simulator, tmp_path: Path) -> None:
    """A model without a price costs no zero, and a job without rates has no duration yet."""
    out = call("plan", _job(tmp_path, service.url, more={"request": {"model": "my-own"}})).out
    assert re.search(r"^cost +unknown price$", out, re.MULTILINE)
    assert re.search(r"^time +unknown until the service has answered$", out, re.MULTILINE)


def test_a_plan_names_rows_that_cannot_be_sent(call: Call, service: Simulator, tmp_path: Path) -> None:
    """Bad lines and nulls are found in the sample before they are found in the night."""
    job = _job(tmp_path, service.url)
    (tmp_path / "rows.jsonl").write_text('{"text": null}\nnot JSON\x1b\n{"text": "a"}\n{"text": "b"}\n')
    out = call("plan", job).out
    assert re.search(r"^unsendable 2 of all rows cannot become requests, the first is row 0: .*null", out, re.MULTILINE)
    assert '"content":"a"' in out
    assert "\x1b" not in out


def test_a_plan_counts_what_is_done(call: Call, service: Simulator, tmp_path: Path) -> None:
    """An earlier run's rows are not planned again; an output that another job has begun is refused."""
    job = _job(tmp_path, service.url)
    assert call("run", job, "--limit", 4).code == 0
    ended = call("plan", job)
    assert ended.code == 0
    assert "rows       10, 4 of them done by an earlier run; what follows is for the 6 left\n" in ended.out
    assert "answers    at most 120 tokens\n" in ended.out
    refused = call("plan", job, "--set", "request.seed=2")
    assert refused.code == 2
    assert re.search("begun with another job: request.seed: was .*, is now 2", refused.err)
    assert '"seed":2' in refused.out
    with (tmp_path / "rows.jsonl").open("r+b") as file:
        file.write(b" ")
    refused = call("plan", job)
    assert refused.code == 2
    assert "the input has changed since the run began" in refused.err


# verify


def test_a_recount_says_what_it_found(call: Call, service: Simulator, tmp_path: Path) -> None:
    """Exit code 0 when all is in order, 6 with one line per problem when it is not."""
    job = _job(tmp_path, service.url)
    assert call("run", job).code == 0
    ended = call("verify", tmp_path / "out")
    assert ended.code == 0
    assert ended.out == f"{tmp_path}/out: 10 rows answered, 0 failed, 0 pending; no problem found\n"
    (tmp_path / "out" / "attempts" / "part-000000.parquet").unlink()
    ended = call("verify", tmp_path / "out")
    assert ended.code == 6
    assert "attempts/part-000000.parquet: is missing (10 rows)\n" in ended.out
    assert ended.err.startswith(f"batcher: {tmp_path}/out: 10 rows answered, 0 failed; problems found: ")
    assert call("verify", tmp_path).code == 2


# simulator, version, pipes


def test_the_simulator_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    """It says its address, answers there, with the faults it was asked for, and ends cleanly on SIGINT."""
    words = ["simulator", "--port", "0", "--fault", "500=1", "--latency", "0"]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
        assert found
        asking = urllib.request.Request(f"{found[0]}/models", headers={"Authorization": "Bearer x"})
        with urllib.request.urlopen(asking) as models:
            assert b"gpt-oss-120b" in models.read()
        asking = urllib.request.Request(
            f"{found[0]}/chat/completions",
            headers={"Authorization": "Bearer x", "Content-Type": "application/json"},
            data=b'{"model":"gpt-oss-120b","messages":[{"role":"user","content":"hi"}]}',
        )
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(asking)
        with failed.value:
            assert failed.value.code == 500
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_the_simulator_is_what_its_flags_say() -> None:
    """Limits, tiers, capacities, replicas, caches and headers can be asked for on the command line."""
    words = shlex.split(
        "simulator --port 0 --latency 0 --jitter 0 --prompt-token 0 --completion-token 0 --requests-per-minute 7"
        " --uncached-tokens-per-minute 5000 --limit requests-day=90 --limit flex:requests-minute=3 --flex-limits 2"
        " --others 0.1 --reserve-cached --keep-reservation --rate-headers answers --retry-after --capacity 8"
        " --tier-capacity flex=4 --drift 0=1 --drift flex:60=0.5 --queue-limit 1 --replicas 2"
        " --cache-tokens 5000 --cache-lifetime 60"
    )
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
        assert found

        def limits(tier: str) -> dict[str, str]:
            asked = {"model": "gpt-oss-120b", "service_tier": tier, "max_completion_tokens": 9}
            asking = urllib.request.Request(
                f"{found[0]}/chat/completions",
                headers={"Authorization": "Bearer x", "Content-Type": "application/json"},
                data=json.dumps(asked | {"messages": [{"role": "user", "content": "hi"}]}).encode(),
            )
            with urllib.request.urlopen(asking) as answer:
                start = "x-ratelimit-limit-"
                return {name.removeprefix(start): n for name, n in answer.headers.items() if name.startswith(start)}

        default = {"requests-day": "90", "requests-minute": "7", "tokens-minute": "15000"}
        assert limits("default") == {**default, "uncached-tokens-minute": "5000"}
        flex = {"requests-day": "180", "requests-minute": "3", "tokens-minute": "30000"}
        assert limits("flex") == {**flex, "uncached-tokens-minute": "10000"}
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "tea=5"], "unknown limit 'tea'"),
        (["--tier-capacity", "tea=5"], "known are priority, default, flex"),
        (["--drift", "5"], "a drift is [TIER:]SECONDS=SHARE"),
        (["--drift", "5=0.5"], "there is no capacity that could drift"),
        (["--replicas", "4", "--capacity", "2"], "capacity must be at least 1 for each of the 4 replicas"),
    ],
)
def test_a_service_that_cannot_be_is_exit_code_2(call: Call, words: list[str], said: str) -> None:
    """One line says which setting, and what is allowed."""
    ended = call("simulator", *words)
    assert ended.code == 2
    assert ended.err.startswith("batcher: simulator: ")
    assert said in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("fault", ["tea=0.5", "500=2", "500"])
def test_a_fault_that_cannot_be_is_exit_code_2(call: Call, fault: str) -> None:
    """The message says what a fault looks like, or which there are."""
    ended = call("simulator", "--fault", fault)
    assert ended.code == 2
    assert ended.err.startswith("batcher: simulator: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--answers", "none.jsonl"], "batcher: simulator: none.jsonl: No such file or directory"),
        (["--encodings", "zstd"], "batcher: simulator: unknown encoding 'zstd'; known are msgpack, gzip"),
    ],
)
def test_a_setting_of_the_simulator_that_cannot_be_is_exit_code_2(call: Call, words: list[str], said: str) -> None:
    """In a line that says what is wrong."""
    ended = call("simulator", *words)
    assert ended.code == 2
    assert ended.err.startswith(said)


def test_the_simulator_says_what_a_file_has(tmp_path: Path) -> None:
    """With the columns that are named, and without the encodings that are not."""
    (tmp_path / "said.jsonl").write_text('{"q": "hi", "a": "hello yourself"}\n')
    words = ["simulator", "--port", "0", "--latency", "0", "--encodings", "none", "--answers", "said.jsonl"]
    words += ["--question-column", "q", "--answer-column", "a"]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            assert process.stdout
            found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
            assert found
            headers = {"Authorization": "Bearer x", "Content-Type": "application/json"}
            body = b'{"model":"gpt-oss-120b","messages":[{"role":"user","content":"hi"}]}'
            asking = urllib.request.Request(f"{found[0]}/chat/completions", headers=headers, data=body)
            with urllib.request.urlopen(asking) as answer:
                assert b'"content":"hello yourself"' in answer.read()
            asking.add_header("Content-Encoding", "gzip")
            with pytest.raises(urllib.error.HTTPError) as failed:
                urllib.request.urlopen(asking)
            with failed.value:
                assert failed.value.code == 415
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_the_version_is_said(call: Call) -> None:
    """It is the installed package's."""
    ended = call("--version")
    assert ended.code == 0
    assert re.fullmatch(r"batcher \d+\.\d+\.\d+\S*\n", ended.out)


def test_a_reader_who_leaves_is_no_error(service: Simulator, tmp_path: Path) -> None:
    """When standard output is closed before everything is read, the exit code stays and nothing is complained about."""
    job = _job(tmp_path, service.url, more={"request": {"system": "long " * 50_000}})
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        ended = subprocess.run([*COMMAND, "plan", job], stdout=theirs, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(theirs)
    assert (ended.returncode, ended.stderr) == (0, b"")
