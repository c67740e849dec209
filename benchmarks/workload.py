"""The rows that both sides ask about, and the check of what the engine wrote.

`make` and `count` run as processes of their own, so that the one that measures stays small: the kernel counts the
memory of its parent into a new process's peak.
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

MODEL = "gpt-oss-120b"
SYSTEM = "You label customer messages with care."
MAX_COMPLETION_TOKENS = 256
LONG = 560  # characters of text in a row, which make a request body of about 750 bytes
SHORT = 40
ROW_GROUP = 1_048_576  # rows, as pyarrow writes them when it is not told otherwise

VOCABULARY = (
    "invoice board timer report export calendar shortcut template project customer answer window sample owner "
    "please change before after during without between every second morning Friday account number total again "
    "open close share copy move delete restore import filter sort print a the our your their this that is was "
    "slow quick late early empty broken missing double wrong right large small new old shared private public"
)


def texts(rows: int, length: int) -> Iterator[str]:
    """`rows` different texts of exactly `length` characters, the same ones each time."""
    choices = random.Random(20).choices
    words = VOCABULARY.split()
    for _ in range(rows):
        yield " ".join(choices(words, k=length // 4))[:length].ljust(length, ".")


def make(path: Path, rows: int, length: int) -> None:
    """Write the engine's input, in the format of the suffix: the columns `id` (int64) and `text` (string)."""
    if path.suffix == ".parquet":
        make_parquet(path, rows, length)
    else:
        with opened(path, "wb") as file:
            for number, said in enumerate(texts(rows, length)):
                file.write(b'{"id": %d, "text": "%s"}\n' % (number, said.encode()))


def opened(path: Path, mode: Literal["rb", "wb"] = "rb") -> IO[bytes]:
    """A JSONL file, packed or not."""
    return gzip.open(path, mode, compresslevel=6) if path.suffix == ".gz" else path.open(mode)  # type: ignore[return-value]


def make_parquet(path: Path, rows: int, length: int) -> None:
    """Write a Parquet file as pyarrow does when it is not told otherwise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = texts(rows, length)
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, ROW_GROUP):
            ids = range(start, min(start + ROW_GROUP, rows))
            writer.write_table(pa.table({"id": ids, "text": [next(text) for _ in ids]}, schema=schema))


def count(responses: Path) -> int:
    """How many different rows the Parquet parts in the folder `responses` hold."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    return int(pc.count_distinct(ds.dataset(responses, format="parquet").to_table(["row"])["row"]).as_py())


def scan(path: Path) -> None:
    """Read the column `id` once, as plainly as its format allows."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.read_table(path, columns=["id"])
    else:
        with opened(path) as lines:
            for line in lines:
                json.loads(line)["id"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("path", type=Path)
    making.add_argument("rows", type=int)
    making.add_argument("length", type=int)
    counting = commands.add_parser("count")
    counting.add_argument("responses", type=Path)
    scanning = commands.add_parser("scan")
    scanning.add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.path, arguments.rows, arguments.length)
    elif arguments.command == "count":
        print(count(arguments.responses))
    else:
        scan(arguments.path)
