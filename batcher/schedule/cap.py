"""The output cap that finishes most rows, learned from the lengths of answers: those that ended, and those cut off."""

import itertools
from bisect import bisect_left, bisect_right
from math import inf
from typing import NamedTuple

from batcher.records import FIRST_CAP

MOST = 32_768
"""The largest cap, where the service does not say that its model writes less."""
_LEAST, _STEP = 4, 1.1
"""Caps are chosen from these steps: the smallest, and how much larger each is than the one before, if not by one."""
_LEAP = 5
"""Steps from the cap that cut an answer off to the next one at least: half as much again, so that attempts are few."""
_ENOUGH = 10
"""Answers before anything is chosen."""
_MORE = 0.1
"""How much more must have been seen before it is chosen anew: that takes some milliseconds."""
_MEMORY = 4_000
"""Answers after which all that was seen counts half."""
_DOUBT, _USUAL = 2.0, 256.0
"""Before any is seen, answers are thought to be about so long; this counts as so many that were seen.

It also says how answers go on that are longer than all that were seen: half of them end before they are twice as long.
"""
_AS_GOOD = 1.005
"""Of caps that are this close to the best the smallest is taken: less is held while an answer is out."""


class Load(NamedTuple):
    """What an attempt takes of the quota that is scarcest. Without a known limit of tokens, all is 0."""

    kept: float = 0.0
    """The share of what was reserved and not used that does not come back."""
    held: float = 0.0
    """Of a limit's span, the share that one second is: what is reserved is gone as long as an answer is out."""
    request: float = 0.0
    """Tokens that flow in while one request does: an attempt of fewer takes as much."""
    uncached: bool = False
    """Whether what is scarce are the tokens that no cache has."""


class Caps:
    """The caps of one model and tier: pure state, told how long answers were, and asked for the next cap.

    A row is asked with one cap after the other until its answer ends. Which caps these are is found by going through
    all of them from the largest down (dynamic programming): what a row costs that is longer than one of them, is what
    the next attempt costs, and what remains where that is cut off, too. How likely that is, is the product-limit
    estimate of Kaplan and Meier (1958), which counts answers that were cut off as far as they came.
    """

    def __init__(self) -> None:
        self.most = MOST
        """The largest cap there is."""
        self.context = inf
        """Tokens of prompt and answer for which the model has room."""
        self._steps = _steps()
        size = len(self._steps)
        before = [1.0, *(1.0 / (1.0 + step / _USUAL) for step in self._steps)]
        self._doubt = [_DOUBT * (one - other) for one, other in itertools.pairwise(before)]
        self._ended = [0.0] * size
        """Answers that ended at most at this step, and after the one before."""
        self._cut = [0.0] * size
        """Rows whose last answer was cut off at this step, or between it and the next one."""
        self._seen = self._since = 0.0
        self._sums = (0.0, 0.0, 0.0)
        """Of all seen: prompt tokens, those that no cache had, seconds."""
        self._first = 0
        self._after: list[int] = []

    def bound(self, output: int | None, context: int | None) -> None:
        """What the service says of its model: the longest answer, and the room for prompt and answer together."""
        self.most = min(MOST, output or MOST)
        self.context = context or inf

    @property
    def due(self) -> bool:
        """Whether so much more was seen that the caps are to be chosen again."""
        return self._seen >= _ENOUGH and self._since >= max(8.0, _MORE * self._seen)

    def next(self, floor: int) -> int:
        """The cap for a row that was cut off at `floor` last; 0 for one that never was."""
        if not self._after:
            return min(self.most, 4 * floor or FIRST_CAP)
        step = bisect_right(self._steps, floor) - 1
        return min(self.most, self._steps[self._first if step < 0 else self._after[step]])

    def ended(self, length: int, floor: int) -> None:
        """An answer ended after so many tokens, of a row that was cut off at `floor` before, or 0."""
        self._forget_cut(floor)
        self._ended[min(bisect_left(self._steps, length), len(self._steps) - 1)] += 1

    def cut(self, cap: int, floor: int) -> None:
        """An answer was cut off at this cap."""
        self._forget_cut(floor)
        step = bisect_right(self._steps, cap) - 1
        if step >= 0:
            self._cut[step] += 1

    def took(self, prompt: int, uncached: int, seconds: float) -> None:
        """What any of these answers took: tokens of its prompt, of them those that no cache had, and time."""
        self._seen += 1
        self._since += 1
        prompts, fresh, time = self._sums
        self._sums = (prompts + prompt, fresh + uncached, time + seconds)
        if self._seen >= _MEMORY:
            self._seen /= 2
            self._sums = (self._sums[0] / 2, self._sums[1] / 2, self._sums[2] / 2)
            self._ended = [count / 2 for count in self._ended]
            self._cut = [count / 2 for count in self._cut]

    def choose(self, load: Load) -> None:
        """Choose the caps anew, by all that was seen."""
        self._since = 0.0
        prompt = self._sums[load.uncached] / self._seen
        held = load.held * self._sums[2] / self._seen
        steps, last = self._steps, len(self._steps) - 1
        # Of those that are longer than the step before, the share that is longer than this one; and all that ended.
        longer, tokens = [1.0], [0.0]
        at_risk = sum(self._ended) + sum(self._cut) + _DOUBT
        for step, size in enumerate(steps):
            ends = self._ended[step] + self._doubt[step]
            share = longer[-1]
            longer.append(share * max(0.0, 1.0 - ends / at_risk) if at_risk > 1e-9 else 0.0)
            between = (size + (steps[step - 1] if step else 0)) / 2
            tokens.append(tokens[-1] + (share - longer[-1]) * between)
            at_risk -= ends + self._cut[step]
        # Index 0 is a row that was never asked, index n + 1 one that is longer than step n.
        costs = [0.0] * (last + 2)
        nexts = [last] * (last + 2)
        for floor in range(last, -1, -1):
            share = longer[floor]
            if share <= 1e-12:
                continue  # nothing was ever as long: the largest one
            options: list[float] = []
            best = inf
            least = min(floor + _LEAP - 1, last) if floor else 0
            for step in range(least, last + 1):
                size = steps[step]
                told = (tokens[step + 1] - tokens[floor] + longer[step + 1] * size) / share
                reserved = prompt + size
                used = max(prompt + told + load.kept * (size - told), held * reserved, load.request)
                if used > best:
                    break  # a larger one takes more
                options.append(used + longer[step + 1] / share * costs[step + 1])
                best = min(best, options[-1])
            costs[floor] = best
            nexts[floor] = least + next(index for index, cost in enumerate(options) if cost <= best * _AS_GOOD)
        self._first = nexts[0]
        self._after = nexts[1:]

    def _forget_cut(self, floor: int) -> None:
        """What is known of a row now, is more than that it was cut off here."""
        step = bisect_right(self._steps, floor) - 1
        if step >= 0:
            self._cut[step] = max(0.0, self._cut[step] - 1)


def _steps() -> list[int]:
    """The caps to choose from, the largest one included."""
    steps, size = [], float(_LEAST)
    while size < MOST:
        steps.append(round(size))
        size = max(size + 1, size * _STEP)
    return [*steps, MOST]
