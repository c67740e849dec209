"""The evaluations among the jobs, from the question to the accuracy: what a model said is read right."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batcher.results import Scores, measure
from batcher.simulator import Recorded
from tests import stories

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
"""Whole data sets, where somebody has put them."""

Said = tuple[str, bool]
"""What the model said, and whether it is right."""


def gsm8k(number: str, row: int) -> Said:
    """An answer whose last number is this one, in one of the forms that models have, and now and then a wrong one."""
    forms = (
        (f"She has 2 + 3 of them.\n#### {number}", True),
        (f"#### {int(number.replace(',', '')):,}", True),
        (f"It costs that much.\n**#### ${int(number.replace(',', ''))}.00**", True),
        (f"So the answer is **{number}**.", True),
        (f"#### 17.5\nNo, that was the price.\n#### {number} of the 99 eggs", True),
        (f"#### {number}%", True),
        (f"#### {number}1", False),
        ("#### none of these", False),
        (f"It is {number}, I think.", False),
    )
    return forms[row % len(forms)]


def bbh(target: str, row: int) -> Said:
    """The same for a letter in brackets or a text."""
    bare = target[1] if re.fullmatch(r"\([A-Z]\)", target) else target
    forms = (
        (f"First, (A) and (B) differ. So the answer is {target}.", True),
        (f"So the answer is {target.lower()}", True),
        (f"So the answer is **{bare}**.\n", True),
        (f"The answer is (Z). No. So the answer is: {target}. That is all.", True),
        ("So the answer is unclear.", False),
        (f"So the answer is {'(Z)' if target != '(Z)' else '(Y)'}.", False),
        (f"{target}, perhaps", False),
    )
    return forms[row % len(forms)]


def scores(job: str, source: Path, output: Path, answers: Mapping[str, str], *words: str) -> Scores:
    """What `results` says of a job of the project, run over this input while the service says these answers."""
    free = {"latency": 0.0, "requests_per_minute": None, "tokens_per_minute": None}
    recorded = Recorded({prompt: (said,) for prompt, said in answers.items()})
    with stories.service(answers=recorded, **free) as service:
        settings = [
            *("--set", f"input.path={source}", "--set", f"output.path={output}"),
            *("--set", f"service.base_url={service.url}", "--set", "service.api_key_env=STORY_KEY"),
        ]
        ended = stories.program("run", str(ROOT / "jobs" / job), "--quiet", *settings, *words)
        assert ended.returncode == 0, ended.stderr
    return measure(output)


def asked_gsm8k(question: str) -> str:
    """The prompt of the job file."""
    closing = "Think step by step. Then give the answer on a line of its own: #### and the number, nothing else."
    return f"{question}\n\n{closing}"


def check_gsm8k(source: Path, output: Path) -> None:
    """Every row is scored as its answer deserves, and the accuracy is their share."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    said = [gsm8k(row["answer"].split("#### ")[-1], index) for index, row in enumerate(rows)]
    answers = {asked_gsm8k(row["question"]): text for row, (text, _) in zip(rows, said, strict=True)}
    found = scores("gsm8k.toml", source, output, answers)
    table = stories.table(output, "responses")
    right = [each for _, each in said]
    assert [(text, bool(score)) for text, score in zip(*texts_and_scores(table), strict=True)] == said
    assert table["target"].to_pylist() == [row["answer"].split("#### ")[-1] for row in rows]
    assert (found.overall.answered, found.overall.accuracy) == (len(rows), sum(right) / len(rows))
    assert table["score_error"].null_count == len(rows)


def texts_and_scores(table: pa.Table) -> tuple[list[str], list[float]]:
    """What was said in each row, and its score."""
    return table["response"].to_pylist(), table["score"].to_pylist()


def check_bbh(source: Path, output: Path, *words: str) -> None:
    """The same, by task."""
    rows = {row["id"]: (index, row) for index, row in enumerate(pq.read_table(source).to_pylist())}
    said = {key: bbh(row["target"], index) for key, (index, row) in rows.items()}
    answers = {
        f"{row['few_shot']}\n\nQ: {row['question']}\nA: Let's think step by step.": said[key][0]
        for key, (_, row) in rows.items()
    }
    found = scores("bbh.toml", source, output, answers, *words)
    table = stories.table(output, "responses")
    asked = table["id"].to_pylist()
    assert [(text, bool(score)) for text, score in zip(*texts_and_scores(table), strict=True)] == [
        said[key] for key in asked
    ]
    by_task: dict[str, list[bool]] = {}
    for key in asked:
        by_task.setdefault(rows[key][1]["task"], []).append(said[key][1])
    assert {each.group: each.accuracy for each in found.groups} == {
        task: sum(right) / len(right) for task, right in by_task.items()
    }


def test_gsm8k_is_read_right(tmp_path: Path) -> None:
    """Numbers with thousands, currency, percent, marks and words around; the last one that is said counts."""
    source = tmp_path / "questions.jsonl"
    numbers = ("18", "1,234", "-5", "70000", "1,000,000", "0", "3")
    lines = [
        {"question": f"Question {row} of 63: how many?", "answer": f"It is <<2+3=5>>5.\n#### {numbers[row % 7]}"}
        for row in range(63)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    check_gsm8k(source, tmp_path / "out")


def test_bbh_is_read_right(tmp_path: Path) -> None:
    """Letters, words, numbers and brackets after "So the answer is", each task with its accuracy.

    The input is made by the script beside the job, out of files as the repository of the questions has them.
    """
    tasks = {
        "choices": ["(B)", "(A)", "(F)"],
        "facts": ["Yes", "No"],
        "validity": ["valid", "invalid"],
        "arithmetic": ["-5", "217", "3"],
        "brackets": ["] } ]", ") >"],
        "films": ["Monsters, Inc", "(C)"],
    }
    (tmp_path / "bbh").mkdir()
    (tmp_path / "cot-prompts").mkdir()
    for task, targets in tasks.items():
        examples = [{"input": f"Question {row} of {task}?", "target": targets[row % len(targets)]} for row in range(21)]
        (tmp_path / "bbh" / f"{task}.json").write_text(json.dumps({"canary": "x", "examples": examples}))
        worked = f"canary\n-----\nOf {task}.\n\nQ: One?\nA: Let's think step by step. So the answer is (A).\n"
        (tmp_path / "cot-prompts" / f"{task}.txt").write_text(worked)
    script = [sys.executable, str(ROOT / "jobs" / "make_bbh.py"), str(tmp_path), str(tmp_path / "bbh.parquet")]
    subprocess.run(script, check=True, capture_output=True)
    first = pq.read_table(tmp_path / "bbh.parquet").slice(0, 1).to_pylist()[0]
    assert first["id"] == "arithmetic-000"
    assert first["few_shot"].startswith("Of arithmetic.")
    check_bbh(tmp_path / "bbh.parquet", tmp_path / "out")


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not there")
@pytest.mark.parametrize(
    ("check", "name", "words"),
    [(check_gsm8k, "gsm8k_test.jsonl", ()), (check_bbh, "bbh.parquet", ("--set", "input.sample=1000"))],
)
def test_the_data_sets_themselves_are_read_right(
    tmp_path: Path, check: Callable[..., None], name: str, words: tuple[str, ...]
) -> None:
    """Every target that stands in them is met by an answer that says it, and by no other."""
    check(DATA / name, tmp_path / "out", *words)
