"""Plots of some cases over time, for the docs: what is used of what the service allows, and what is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.schedule_books import Books, busy, used

STEP = 5
"""Seconds that a point stands for."""
LINES = {
    "ours": ("batcher", "#0b6e4f"),
    "fixed": ("64 in flight, asked again at once", "#c8553d"),
    "limited": ("the same with aiolimiter", "#4059ad"),
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "batcher",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "path.simplify_threshold": 0.5,
}


def plot(path: Path, title: str, runs: Mapping[str, Books], bucket: str | None, marks: Mapping[float, str]) -> None:
    """Draw the runs of a case: of `bucket` the use, without one the busy places; `marks` are moments with words."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for client, run in runs.items():
            name, colour = LINES[client]
            times = range(STEP, int(run.seconds) + 1, STEP)
            above.plot(times, [100 * _share(run, bucket, at) for at in times], color=colour, label=name, linewidth=1.3)
            below.plot(times, _lost(run, times), color=colour, linewidth=1.3)
        above.set_title(title, loc="left", fontsize=10)
        above.set_ylabel("used, % of inflow" if bucket else "busy places, %")
        above.set_ylim(0, 210 if bucket else 105)
        figure.legend(*above.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
        below.set_yscale("symlog", linthresh=1)
        below.set_ylim(0, 10_000)
        below.set_yticks([0, 1, 100, 10_000], ["0", "1", "100", "10,000"])
        below.set_ylabel("failed a second")
        below.set_xlabel("seconds")
        for at, word in marks.items():
            for axes in (above, below):
                axes.axvline(at, color="#888888", linewidth=0.8, linestyle=":")
            above.annotate(
                word, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points"
            )
        figure.savefig(path, format="svg", metadata={"Date": None})


def lines(path: Path, word: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Draw curves of points (seconds, figure) by name, a panel for each title; `word` says what the figures are."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 2.0 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for one, (title, curves) in zip(axes, panels.items(), strict=True):
            for (name, points), colour in zip(curves.items(), ("#0b6e4f", "#c8553d", "#4059ad"), strict=False):
                one.plot([at for at, _ in points], [y for _, y in points], color=colour, label=name, linewidth=1.3)
            one.set_title(title, loc="left", fontsize=10)
            one.set_ylabel(word)
            one.set_ylim(0)
        axes[-1].set_xlabel("seconds")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _share(run: Books, bucket: str | None, at: float) -> float:
    """Of what flowed in, or of the places, in the step that ends now."""
    if bucket is None:
        return busy(run, at - STEP, at)
    now = [level for level in run.levels if level.at <= at][-1]
    return used(run, bucket, at - STEP, at) / (now.limits[bucket] * (1 - now.others) * STEP / 60)


def _lost(run: Books, times: Sequence[int]) -> list[float]:
    """Requests a second that came back without an answer, by when they were sent."""
    counts = dict.fromkeys(times, 0)
    for one in run.sent:
        step = STEP * (int(one.at) // STEP + 1)
        if one.failure and step in counts:
            counts[step] += 1
    return [counts[at] / STEP for at in times]
