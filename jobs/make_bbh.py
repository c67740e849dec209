"""Makes the input of bbh.toml out of a copy of the repository of BIG-Bench Hard.

    git clone --depth 1 https://github.com/suzgunm/BIG-Bench-Hard
    python jobs/make_bbh.py BIG-Bench-Hard                  jobs/bbh.parquet
    python jobs/make_bbh.py BIG-Bench-Hard other.parquet    another place

The repository has the questions of a task in bbh/TASK.json, and its worked examples in cot-prompts/TASK.txt.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "task", "few_shot", "question", "target")])


def rows(folder: Path) -> Iterator[dict[str, str]]:
    """Every question of every task, by name of the task."""
    for path in sorted((folder / "bbh").glob("*.json")):
        # Above the dashes stands a warning to those who collect texts for training.
        few_shot = (folder / "cot-prompts" / f"{path.stem}.txt").read_text(encoding="utf-8").split("-----\n")[-1]
        for number, example in enumerate(json.loads(path.read_text(encoding="utf-8"))["examples"]):
            yield {
                "id": f"{path.stem}-{number:03d}",
                "task": path.stem,
                "few_shot": few_shot.strip(),
                "question": example["input"],
                "target": example["target"],
            }


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).with_name("bbh.parquet"))
    arguments = parser.parse_args()
    table = pa.Table.from_pylist(list(rows(arguments.folder)), COLUMNS)
    pq.write_table(table, arguments.path)
    print(f"{arguments.path}: {table.num_rows:,} questions")  # noqa: T201


if __name__ == "__main__":
    main()
