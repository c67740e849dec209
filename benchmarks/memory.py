"""How much more memory a large job needs than a small one."""

from benchmarks.engine import engine
from benchmarks.measure import Answer, server
from benchmarks.workload import SHORT

SMALL = 100_000


def memory(rows: int, in_flight: int = 256) -> list[Answer]:
    """Peak resident memory of a run over `rows` rows of short prompts, against one over 100,000."""
    with server(0) as base_url:
        peaks = []
        for size in (SMALL, rows):
            cost = engine(base_url, size, in_flight, SHORT)
            peaks.append(cost.rss)
            print(f"  {size:,} rows: {cost.rss:.0f} MB, {cost.wall:.0f} s", flush=True)
    small, large = peaks
    return [
        Answer(
            f"peak memory, {rows:,} rows over {SMALL:,}",
            "+ 50 MB",
            "+ 10 MB",
            f"{large - small:+.0f} MB; {large:.0f} MB over {small:.0f} MB",
        )
    ]
