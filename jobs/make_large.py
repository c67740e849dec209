"""Makes the input of large.toml: a file of short reviews, a million of them unless told otherwise.

    python jobs/make_large.py                          jobs/large.parquet, 1,000,000 rows
    python jobs/make_large.py 5000000 big.jsonl.gz     another number, another format

The same number of rows always gives the same file. The suffix decides the format: .parquet, .jsonl or .jsonl.gz.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

THINGS = ("kettle", "lamp", "backpack", "keyboard", "tent", "bicycle", "umbrella", "raincoat", "headset", "desk")
GOOD = (
    "works as it should",
    "arrived a day early",
    "is the best that I have had",
    "looks even better than in the picture",
)
BAD = "broke after a week", "came without its cable", "is louder than a lorry", "was sent to the wrong address twice"
ROWS_AT_ONCE = 100_000


def reviews(rows: int) -> Iterator[dict[str, object]]:
    """Rows with the columns review_id, language and text."""
    chance = Random(1)
    for number in range(rows):
        thing = chance.choice(THINGS)
        order = f"Order {chance.randrange(10**9):09}"
        said = f"{order}: the {thing} {chance.choice(GOOD)}, but the {chance.choice(THINGS)} {chance.choice(BAD)}."
        yield {"review_id": f"r{number:08d}", "language": chance.choice(("en", "en", "en", "de")), "text": said}


def batches(rows: int) -> Iterator[list[dict[str, object]]]:
    """The same in lists that fit into memory."""
    source = reviews(rows)
    for start in range(0, rows, ROWS_AT_ONCE):
        yield [next(source) for _ in range(min(ROWS_AT_ONCE, rows - start))]


def write_parquet(path: Path, rows: int) -> None:
    """One row group per batch: a reader that starts in the middle skips what is before it."""
    schema = pa.schema({"review_id": pa.string(), "language": pa.string(), "text": pa.string()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches(rows):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def write_jsonl(path: Path, rows: int) -> None:
    """One object a line."""
    with gzip.open(path, "wt", compresslevel=6) if path.suffix == ".gz" else path.open("w") as file:
        for batch in batches(rows):
            file.writelines(json.dumps(row) + "\n" for row in batch)


def main() -> None:
    """Make one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="?", type=int, default=1_000_000)
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).with_name("large.parquet"))
    arguments = parser.parse_args()
    write = write_parquet if arguments.path.suffix == ".parquet" else write_jsonl
    write(arguments.path, arguments.rows)
    print(f"{arguments.path}: {arguments.rows:,} rows, {arguments.path.stat().st_size / 1e6:,.0f} MB")  # noqa: T201


if __name__ == "__main__":
    main()
