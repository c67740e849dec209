"""`python -m benchmarks` asks every question; one of their names after it asks that one."""

import argparse
import sys
from pathlib import Path

from benchmarks.budget import budget
from benchmarks.deadline import deadline
from benchmarks.deadline import plots as deadline_plots
from benchmarks.dispatcher import dispatcher
from benchmarks.groups import groups
from benchmarks.large import large
from benchmarks.measure import Answer, machine, raise_open_files
from benchmarks.memory import memory
from benchmarks.overhead import latency, overhead
from benchmarks.parse import parse
from benchmarks.payload import payload
from benchmarks.rehearse import rehearsals
from benchmarks.resume import resume
from benchmarks.schedule import CASES, CLIENTS, plots, schedule, sockets
from benchmarks.transport import transport

QUESTIONS = (
    *("overhead", "latency", "memory", "large", "resume", "payload", "parse", "transport", "budget", "rehearse"),
    *("dispatcher", "groups", "deadline", "schedule"),
)


def show(answers: list[Answer]) -> None:
    """Print the answers as a Markdown table."""
    head = Answer("question", "must", "aim", "measured: median (quartiles)")
    cells = [(row.question, row.must, row.aim, row.measured) for row in (head, *answers)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    cells.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    """Ask one question, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("question", nargs="?", choices=QUESTIONS, help="all when absent")
    parser.add_argument("--pairs", type=int, default=7, help="alternating runs of B1 and the engine (7)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of memory's and large's runs (1,000,000)")
    parser.add_argument("--resumed", type=int, default=5_000_000, help="rows of the run that is resumed (5,000,000)")
    parser.add_argument("--case", action="append", choices=CASES, help="of schedule; all when absent; repeatable")
    parser.add_argument("--seeds", type=int, default=10, help="runs of budget and of each case of schedule (10)")
    parser.add_argument(
        "--client", action="append", choices=CLIENTS, help="of schedule, or what people do otherwise (ours); repeatable"
    )
    parser.add_argument(
        "--sockets", action="store_true", help="schedule: its first two cases over real sockets instead"
    )
    parser.add_argument("--plots", type=Path, help="schedule, deadline: draw some cases into this folder instead")
    parser.add_argument("--lengths", help="schedule, deadline: Parquet file of prompt_tokens and completion_tokens")
    parser.add_argument("--prefixes", type=int, default=5_000, help="of groups, with four rows each (5,000)")
    parser.add_argument("--questions", type=Path, help="of groups: Parquet file with task, few_shot and question")
    arguments = parser.parse_args()
    if min(arguments.pairs, arguments.rows, arguments.seeds) < 1:
        parser.error("--pairs, --rows and --seeds start at 1")
    if arguments.lengths is not None and not Path(arguments.lengths).is_file():
        parser.error(f"--lengths: no file {arguments.lengths}")
    raise_open_files()
    print(machine(), flush=True)
    answers: list[Answer] = []
    if arguments.question in (None, "overhead"):
        answers += overhead(arguments.pairs, sizes=(5_000, 25_000), many_sizes=(10_000, 40_000))
    if arguments.question in (None, "latency"):
        answers += latency(min(arguments.pairs, 3), waves=60)
    if arguments.question in (None, "memory"):
        answers += memory(arguments.rows)
    if arguments.question in (None, "large"):
        answers += large(arguments.rows)
    if arguments.question in (None, "resume"):
        answers += resume(arguments.resumed, arguments.pairs)
    if arguments.question in (None, "payload"):
        answers += payload()
    if arguments.question in (None, "parse"):
        answers += parse()
    if arguments.question in (None, "transport"):
        answers += transport(arguments.pairs, sizes=(5_000, 25_000))
    if arguments.question in (None, "budget"):
        answers += budget(arguments.seeds)
    if arguments.question in (None, "rehearse"):
        answers += rehearsals()
    if arguments.question in (None, "dispatcher"):
        answers += dispatcher()
    if answers:
        show(answers)
    good = arguments.question not in (None, "groups") or groups(arguments.prefixes, arguments.questions)
    if arguments.question == "deadline" and arguments.plots:
        deadline_plots(arguments.plots, arguments.lengths)
    elif arguments.question in (None, "deadline"):
        good = deadline(arguments.seeds, arguments.lengths) and good
    if arguments.question == "schedule" and arguments.plots:
        plots(arguments.plots, arguments.lengths)
    elif arguments.question == "schedule" and arguments.sockets:
        sys.exit(not sockets(arguments.lengths))
    elif arguments.question in (None, "schedule"):
        names, clients = arguments.case or list(CASES), arguments.client or ["ours"]
        good = schedule(names, arguments.seeds, arguments.lengths, clients) and good
    sys.exit(not good)


if __name__ == "__main__":
    main()
