"""What a decision costs: CPU per request of the dispatcher alone, with many in flight."""

import gc
import time
from collections import deque

from batcher.records import Limit, Request, Turn, Usage
from batcher.schedule import Dispatcher, Pace, Ticket
from benchmarks.measure import Answer, Spread

IN_FLIGHT = 2_000
USAGE = Usage(150, 90, 240, 0)
LIMITS = (
    Limit("requests", 60.0, 1e9, 9e8, 1.0),
    Limit("tokens", 60.0, 1e12, 9e11, 1.0),
    Limit("uncached_tokens", 60.0, 1e12, 9e11, 1.0),
)
HEADERS_EVERY = 100
"""Requests between two looks at the headers; the engine looks ten times a second."""
BATCH = 50
"""Requests that become durable together."""


def turns(number: int) -> list[Turn]:
    """Rows that want to be asked."""
    return [Turn(Request(0, row, "gpt-oss-120b", b"", 150, 256, b""), 0.0) for row in range(number)]


def seconds(rounds: int) -> float:
    """CPU seconds for so many requests: taken, answered, landed and now and then told the limits, 2,000 in flight."""
    dispatcher = Dispatcher(Pace(IN_FLIGHT), 100_000, 0.0)
    dispatcher.offer(turns(rounds + 2 * IN_FLIGHT))
    flying: deque[Ticket] = deque()
    now = 0.0
    while len(flying) < IN_FLIGHT:
        granted = dispatcher.take(now)
        assert isinstance(granted, Ticket)
        flying.append(granted)
    dispatcher.limits(LIMITS, flying[0], now)
    began = time.process_time()
    for number in range(rounds):
        now += 0.000_1
        ticket = flying.popleft()
        dispatcher.answered(ticket, USAGE, 0.001, now)
        if number % HEADERS_EVERY == 0:
            dispatcher.limits(LIMITS, ticket, now)
        if number % BATCH == BATCH - 1:
            dispatcher.landed(BATCH)
            while isinstance(granted := dispatcher.take(now), Ticket):
                flying.append(granted)
    return time.process_time() - began


def dispatcher(rounds: int = 200_000, times: int = 7) -> list[Answer]:
    """Microseconds of CPU per request."""
    gc.collect()
    gc.disable()
    try:
        runs = [seconds(rounds) / rounds * 1e6 for _ in range(times)]
    finally:
        gc.enable()
    costs = Spread.of(runs)
    return [
        Answer(
            f"the dispatcher's own CPU per request, {IN_FLIGHT:,} in flight",
            "10 µs",
            "",
            f"{costs.median:.1f} µs ({costs.low:.1f} to {costs.high:.1f}), quickest of {times} runs {min(runs):.1f}",
        )
    ]
