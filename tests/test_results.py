"""Results: what the statistics of an output say, held against closed forms and examples worked out by hand."""

import csv
import io
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.cli import main
from batcher.errors import JobError
from batcher.results import Scores, as_csv, as_json, as_markdown, as_text, measure

Row = tuple[str | None, str | None, float]
"""What was taken out of an answer, its target, its score."""

COLUMNS = [("extracted", pa.string()), ("target", pa.string()), ("score", pa.float64()), ("score_error", pa.string())]


def write(
    folder: Path, rows: Sequence[Row], groups: Sequence[object] = (), failed: Sequence[object] = (), **score: str
) -> Path:
    """An output of these answers, of the groups that they are in, and of those that failed rows are in."""
    output = folder / "out"
    (output / "responses").mkdir(parents=True, exist_ok=True)
    (output / "failures").mkdir(exist_ok=True)
    columns = dict(zip(("extracted", "target", "score"), zip(*rows, strict=True), strict=False))
    errors = [None if target is not None else "target: null" for _, target, _ in rows]
    made = {name: pa.array({**columns, "score_error": errors}[name], kind) for name, kind in COLUMNS}
    by = {"task": pa.array(groups)} if groups else {}
    half = len(rows) // 2
    table = pa.table({**by, **made})
    for part, some in enumerate((table.slice(0, half), table.slice(half))):  # scores are counted over parts
        pq.write_table(some, output / f"responses/part-{part:06d}.parquet")
    if failed:
        pq.write_table(pa.table({"task": pa.array(failed)}), output / "failures/part-000000.parquet")
    (output / "job.toml").write_bytes(msgspec.toml.encode({"score": {"target": "truth", **score}}))
    return output


def right(number: int, of: int) -> list[Row]:
    """So many right answers out of so many."""
    hit, miss = ("a", "a", 1.0), ("b", "a", 0.0)
    return [*[hit] * number, *[miss] * (of - number)]


def labelled(confusion: Mapping[tuple[str | None, str], int]) -> list[Row]:
    """Rows by answer and target."""
    made: list[Row] = []
    for (said, true), rows in confusion.items():
        made += [(said, true, float(said == true))] * rows
    return made


def wilson(right: int, of: int) -> tuple[float, float]:
    """The interval by its formula, with the 97.5 % quantile of the normal distribution."""
    z = 1.959963984540054
    share = right / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return centre - half, centre + half


@pytest.mark.parametrize(("hits", "of"), [(0, 1), (1, 1), (7, 10), (127, 150), (1003, 1319), (0, 40), (40, 40)])
def test_the_interval_of_zeros_and_ones_is_wilsons(tmp_path: Path, hits: int, of: int) -> None:
    """By its closed form."""
    overall = measure(write(tmp_path, right(hits, of))).overall
    assert overall.accuracy == hits / of
    assert (overall.low, overall.high) == pytest.approx(wilson(hits, of), abs=1e-12)
    assert overall.interval == "wilson"


def test_the_interval_of_other_scores_is_students(tmp_path: Path) -> None:
    """Worked out by hand: the mean of five is 0.5, their standard error 0.15811, and t at 97.5 % and 4 is 2.77645."""
    rows: list[Row] = [("a", "a", score) for score in (0.0, 0.25, 0.5, 0.75, 1.0)]
    overall = measure(write(tmp_path, rows, method="mine:grade")).overall
    assert (overall.accuracy, overall.interval) == (0.5, "t")
    half = 2.7764451051977987 * math.sqrt(0.15625 / 5)
    assert (overall.low, overall.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)
    for few in (rows[1:2], rows[1:2] * 3):
        alike = measure(write(tmp_path, few, method="mine:grade")).overall
        assert (alike.accuracy, alike.low, alike.high, alike.interval) == (0.25, None, None, None)
    wide = measure(write(tmp_path, [("a", "a", 0.0), ("a", "a", 0.9)], method="mine:grade")).overall
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_two_labels_worked_out_by_hand(tmp_path: Path) -> None:
    """The textbook's example of kappa: 20 times both yes, 15 times both no, 5 and 10 times one of each; 0.4."""
    rows = labelled({("yes", "yes"): 20, ("no", "yes"): 5, ("yes", "no"): 10, ("no", "no"): 15})
    overall = measure(write(tmp_path, rows)).overall
    assert overall.kappa == pytest.approx(0.4, abs=1e-12)
    assert overall.labels is not None
    no, yes = overall.labels
    assert (no.label, no.targets, no.answers) == ("no", 25, 20)
    assert (no.precision, no.recall, no.f1) == pytest.approx((15 / 20, 15 / 25, 30 / 45), abs=1e-12)
    assert (yes.precision, yes.recall, yes.f1) == pytest.approx((20 / 30, 20 / 25, 40 / 55), abs=1e-12)
    assert overall.macro_f1 == pytest.approx((30 / 45 + 40 / 55) / 2, abs=1e-12)
    assert overall.confusion == {"no": {"no": 15, "yes": 10}, "yes": {"no": 5, "yes": 20}}


def test_answers_that_are_no_target_have_a_place(tmp_path: Path) -> None:
    """Beside the labels: answers that name another, and responses without one."""
    rows = labelled({("a", "a"): 2, ("c", "a"): 1, ("d", "b"): 1, (None, "b"): 2, ("b", "b"): 1})
    overall = measure(write(tmp_path, [*rows, ("a", None, 0.0)])).overall
    assert overall.confusion == {
        "a": {"a": 2, "b": 0, "(another)": 1, "(none)": 0},
        "b": {"a": 0, "b": 1, "(another)": 1, "(none)": 2},
    }
    assert (overall.answered, overall.without_answer, overall.unscored, overall.accuracy) == (8, 2, 1, 3 / 8)
    # 3 of 7 agree; by chance (3 × 2 + 4 × 1) of 49 would.
    assert overall.kappa == pytest.approx((3 / 7 - 10 / 49) / (1 - 10 / 49), abs=1e-12)
    # What a method finds equal is one label.
    letters = labelled({("(B)", "B"): 1, ("b.", "(B)"): 1, ("So (A).", "B"): 1, ("A", "(A)"): 1})
    assert measure(write(tmp_path, letters, method="choice")).overall.confusion == {
        "A": {"A": 1, "B": 0},
        "B": {"A": 1, "B": 2},
    }


def test_one_label_has_no_kappa(tmp_path: Path) -> None:
    """Where everything is the same, chance agrees as well. A label that no answer names has precision 0."""
    overall = measure(write(tmp_path, right(3, 3))).overall
    assert (overall.kappa, overall.macro_f1) == (None, 1.0)
    wrong = measure(write(tmp_path, [("b", "a", 0.0), ("b", "b", 1.0)])).overall
    assert wrong.labels is not None
    assert (wrong.labels[0].precision, wrong.labels[0].recall, wrong.labels[0].f1) == (0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=60))
def test_agreement_is_as_its_formulas_say(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    """Precision, recall, F1 and kappa of any answers, counted one by one."""
    output = write(tmp_path_factory.mktemp("any"), [(said, true, float(said == true)) for said, true in pairs])
    overall = measure(output).overall
    counted, said, true = Counter(pairs), Counter(one for one, _ in pairs), Counter(one for _, one in pairs)
    assert overall.labels is not None
    assert [label.label for label in overall.labels] == sorted(true)
    for label in overall.labels:
        both = counted[label.label, label.label]
        assert label.precision == pytest.approx(both / max(1, said[label.label]), abs=1e-12)
        assert label.recall == pytest.approx(both / true[label.label], abs=1e-12)
        assert label.f1 == pytest.approx(2 * both / (said[label.label] + true[label.label]), abs=1e-12)
    agree = sum(one == other for one, other in pairs) / len(pairs)
    chance = sum(said[name] * true[name] for name in said) / len(pairs) ** 2
    expected = None if chance == 1 else pytest.approx((agree - chance) / (1 - chance), abs=1e-12)
    assert overall.kappa == expected


def test_labels_are_few(tmp_path: Path) -> None:
    """Over twenty different targets are no labels, in a group as over all; nor are those of other methods."""
    few: list[Row] = [(str(row), str(row), 1.0) for row in range(20)]
    many: list[Row] = [(str(row), str(row), 1.0) for row in range(21)]
    found = measure(write(tmp_path, [*few, *many], ["few"] * 20 + ["many"] * 21, by="task"))
    assert (found.overall.labels, found.overall.kappa) == (None, None)
    assert found.no_labels == "there are more than 20 different targets"
    assert [(each.group, each.labels is not None, each.kappa) for each in found.groups] == [
        ("few", True, 1.0),
        ("many", False, None),
    ]
    inside = measure(write(tmp_path, right(3, 4), method="contains"))
    assert (inside.overall.labels, inside.no_labels) == (None, "with contains an answer is no label")
    assert inside.overall.accuracy == 0.75


def grouped(folder: Path) -> Path:
    """Two groups and rows of none, some of them failed."""
    rows = [*right(3, 4), *right(1, 2), ("b", "a", 0.0)]
    return write(folder, rows, [2, 2, 2, 2, 10, 10, None], [2, 30], by="task")


def test_groups_have_their_own_results(tmp_path: Path) -> None:
    """Failed rows are in them too: a group may have nothing else. Pending rows are said."""
    output = grouped(tmp_path)
    found = measure(output)
    assert found.pending is None
    assert (found.overall.answered, found.overall.failed) == (7, 2)
    assert (found.overall.accuracy, found.overall.accuracy_with_failed) == (4 / 7, 4 / 9)
    assert [(each.group, each.answered, each.failed, each.accuracy) for each in found.groups] == [
        ("10", 2, 0, 0.5),
        ("2", 4, 1, 0.75),
        ("30", 0, 1, None),
        (None, 1, 0, 0.0),
    ]
    assert [each.accuracy_with_failed for each in found.groups] == [0.5, 0.6, 0.0, 0.0]
    assert (found.groups[2].low, found.groups[2].labels) == (None, None)


def test_an_empty_text_is_seen(tmp_path: Path) -> None:
    """A group or label that is an empty text is told from all rows, and from a column without a name."""
    found = measure(
        write(tmp_path, labelled({("", ""): 2, ("a", ""): 1, ("a", "a"): 1}), ["", "", "x", None], by="task")
    )
    told = [line[:4] for line in csv.reader(io.StringIO(as_csv(found)))]
    assert len(told) == len({*map(tuple, told)})
    assert ["(empty)", "(empty)", "(empty)", "confusion"] in told
    assert "task (empty): labels" in as_text(found, 80)
    assert "(null)" in as_markdown(found)


def test_every_form_says_the_same(tmp_path: Path) -> None:
    """JSON and CSV to the last digit; tables as people read them, whatever the labels hold."""
    rows = labelled({("a|b", "a|b"): 3, ("=1+1", "a|b"): 1, ("=1+1", "=1+1"): 2, ("\x1b[1m", "=1+1"): 1})
    found = measure(write(tmp_path, rows, ["x"] * 3 + ["[y]"] * 4, by="task"))
    assert msgspec.json.decode(as_json(found), type=Scores) == found
    lines = list(csv.reader(io.StringIO(as_csv(found))))
    assert lines[0] == ["group", "label", "answer", "measure", "value"]
    told = {tuple(line[:4]): line[4] for line in lines[1:]}
    assert float(told["", "", "", "accuracy"]) == 5 / 7
    assert float(told["", "", "", "kappa"]) == found.overall.kappa
    assert told["", "a|b", "'=1+1", "confusion"] == "1"
    assert told["[y]", "'=1+1", "", "targets"] == "3"
    signless = msgspec.structs.replace(found, overall=msgspec.structs.replace(found.overall, kappa=-1e-17))
    assert "Cohen's kappa 0.0000" in as_text(signless, 80)
    text = as_text(found, 80)
    assert "accuracy      0.7143, 95 % interval 0.3589 to 0.9178 (Wilson)" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "by task" in text
    assert "task [y]: labels" in text
    page = as_markdown(found)
    assert "| a\\|b | 4 | 3 | 1.0000 | 0.7500 | 0.8571 |" in page
    assert "| label | targets | answers | precision | recall | F1 |\n| --- | ---: |" in page
    assert "\x1b" not in text + page


REFUSED = [
    ({}, "no output of batcher, for it has no job.toml"),
    ({"name": "x"}, "its job has no section [score], so nobody knows what its answers should be"),
    ({"score": {"method": "exact"}}, "job.toml: is damaged"),
    ({"score": {"target": "a"}}, "its answers are not scored yet: they have no column score"),
]


@pytest.mark.parametrize(("job", "said"), REFUSED)
def test_what_has_no_scores_is_told_in_a_line(tmp_path: Path, job: dict[str, object], said: str) -> None:
    """And so is what has them and lacks scipy."""
    output = write(tmp_path, right(1, 2))
    pq.write_table(pa.table({"row": [0]}), output / "responses/part-000000.parquet")
    (output / "job.toml").unlink()
    if job:
        (output / "job.toml").write_bytes(msgspec.toml.encode(job))
    with pytest.raises(JobError) as refused:
        measure(output)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    """Nothing but this command needs it."""
    output = write(tmp_path, right(1, 2))
    without = "import sys; sys.modules['sklearn'] = None; from batcher.cli import main; main(sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-c", without, "results", str(output)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "batcher: results needs sklearn, which is not installed: pip install 'batcher[results]'\n"


def test_the_command_has_one_form_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table unless told otherwise."""
    output = str(grouped(tmp_path))

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["results", output, *words])
        return int(ended.value.code or 0), *capsys.readouterr()

    found = measure(output)
    assert call() == (0, as_text(found, None) + "\n", "")
    assert "failed        2 rows; accuracy 0.4444 with them as wrong" in as_text(found, None)
    assert call("--json") == (0, as_json(found) + "\n", "")
    assert json.loads(call("--json")[1])["overall"]["failed"] == 2
    assert call("--csv")[1].splitlines() == as_csv(found).splitlines()
    assert call("--markdown") == (0, as_markdown(found) + "\n", "")
    assert call("--csv", "--json") == (2, "", "batcher: results: --json, --csv or --markdown, one of them\n")


def test_results_in_a_store_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ledger and without the input."""
    import fsspec

    output = grouped(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(output), "/results-test/out", recursive=True)
    try:
        found, here = measure("memory://results-test/out"), measure(output)
        assert (found.overall, found.groups) == (here.overall, here.groups)
    finally:
        memory.rm("/results-test", recursive=True)
