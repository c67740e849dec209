"""The engine keeps its promises in hundreds of small worlds, each made, run, killed and checked by its seed."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import anyio
import msgspec
import pytest

from batcher import dialects
from batcher.records import Failure, Kind, Reply, Request
from batcher.simulator import (
    Entry,
    Fault,
    Front,
    ModelTransport,
    NothingLeftError,
    Settings,
    StreamFault,
    VirtualLoop,
    running,
)
from batcher.transport import HttpTransport, Library
from tests import simulation

SEEDS = 200
MORE = int(os.environ.get("SIMULATION_SEEDS", "5000"))
"""How many worlds `make soak` plays."""
STEP = 20


@pytest.mark.parametrize("first", range(0, SEEDS, STEP))
def test_every_world_keeps_its_promises(first: int) -> None:
    """Whatever the job, the faults, the weather and the kills: what O1 to O11 say holds in the end."""
    for seed in range(first, first + STEP):
        if wrong := simulation.told(seed):
            pytest.fail(wrong, pytrace=False)


@pytest.mark.parametrize("seed", [7, 22, 31])
def test_a_seed_makes_the_same_world_each_time(seed: int) -> None:
    """The same requests at the same moments, and the same rows in the same files, but for columns of our clock."""
    first, second = simulation.play(seed), simulation.play(seed)
    assert first.kills == second.kills
    assert first.front.book
    assert in_order(first) == in_order(second)
    assert first.content.keys() == second.content.keys()
    for name, rows in first.content.items():
        assert [timeless(row) for row in rows] == [timeless(row) for row in second.content[name]], name
    if seed == 22:  # killed and never asked to end: what is cut off then has the moment of our clock
        assert {"killed"} < {str(life.ended) for life in first.lives}
        assert responses(first) == responses(second)


def in_order(world: simulation.World) -> list[Entry]:
    """The service's book; what was cut off at one moment was cut off in any order."""
    return sorted(world.front.book, key=lambda entry: (entry.arrived, entry.body_sha256))


def responses(world: simulation.World) -> dict[str, bytes]:
    """The files of answers."""
    return {name: data for name, data in world.files.items() if name.startswith("responses")}


def timeless(row: dict[str, object]) -> dict[str, object]:
    """A row without its moments: those of requests that were cut off, or never sent, are of our clock."""
    return {name: value for name, value in row.items() if name not in ("started_at", "finished_at", "sent_at")}


def test_a_world_is_the_same_in_another_process() -> None:
    """Not even the order of sets makes a difference, so a seed is all that a report needs."""
    code = "import sys; from tests import simulation; print(len(simulation.play(31).front.book), end='')"
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for hashes in ("1", "2")
    ]
    assert said[0] == said[1] == str(len(simulation.play(31).front.book))


def test_the_worlds_are_of_all_sorts() -> None:
    """The first seeds make what there is to make: else the simulation proves less than it seems to."""
    worlds = [simulation.made(seed) for seed in range(SEEDS)]
    assert {ending.how for world in worlds for ending in world.endings} == {"kill", "point", "signal", "signals"}
    assert {ending.point for world in worlds for ending in world.endings} >= set(simulation.POINTS)
    assert {kind for world in worlds for kind in world.faults} >= set(Fault)
    assert {spell.what for world in worlds for spell in world.weather} >= {"key", "503", "hang", Kind.DNS}
    assert {kind for world in worlds for kind in world.never.values()} == {Kind.BAD_INPUT, Kind.UNSENDABLE}
    assert sum(len(world.stages) > 1 for world in worlds) > SEEDS / 20


@pytest.mark.soak
def test_thousands_of_worlds() -> None:
    """The long form, over seeds that make test does not play."""
    wrong: list[str] = []
    began = time.monotonic()
    for seed in range(SEEDS, SEEDS + MORE):
        wrong += filter(None, [simulation.told(seed)])
    passed = time.monotonic() - began
    print(f"{MORE} worlds in {passed:.0f} s, {MORE / passed:.1f} in a second")  # noqa: T201
    assert not wrong, "\n".join(wrong)


# The loop in virtual time


def play(*moments: float, until: float = float("inf")) -> list[float]:
    """When by the loop's clock sleepers wake who sleep so long, all beginning at once; in the order of waking."""
    woken = []

    async def sleep(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append(asyncio.get_running_loop().time())

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for moment in moments:
                group.start_soon(sleep, moment)

    def loop() -> VirtualLoop:
        return VirtualLoop(100.0, until)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    return woken


def test_a_virtual_week_takes_no_time() -> None:
    """The clock goes from timer to timer, whatever lies between them."""
    began = time.monotonic()
    assert play(604_800, 1, 60) == pytest.approx([101, 160, 604_900])
    assert time.monotonic() - began < 60


def test_who_waits_for_nothing_is_told() -> None:
    """A standstill and a simulation without end are errors, not hangs."""

    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner, pytest.raises(NothingLeftError, match="everybody waits"):
        runner.run(forever())
    with pytest.raises(NothingLeftError, match="not over"):
        play(1000, until=500)


def test_work_for_threads_is_done_at_one_moment_and_takes_its_time() -> None:
    """An executor's work happens on the loop, after the seconds that were named; its errors come back."""

    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)
        return await loop.run_in_executor(None, loop.time), os.getpid()

    def loop() -> VirtualLoop:
        return VirtualLoop(work=lambda: 3.0)

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(main()) == (6.0, os.getpid())


def test_a_signal_reaches_who_heeds_it() -> None:
    """Signals come at virtual moments, through the loop's own interface."""
    made = VirtualLoop()

    async def main() -> int:
        assert not made.deliver(signal.SIGTERM)
        made.call_later(5, made.deliver, signal.SIGTERM)
        with anyio.open_signal_receiver(signal.SIGTERM) as received:
            async for number in received:
                return number
        return 0

    def loop() -> VirtualLoop:
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(main()) == signal.SIGTERM
        assert made.time() == 5


# The service in process


def request(text: str = "Say something.", stream: bool = False) -> Request:
    """A request as the engine makes it."""
    messages = [{"role": "user", "content": text}]
    body = msgspec.json.encode({"model": "gpt-oss-120b", "messages": messages, "max_tokens": 64, "stream": stream})
    return Request(0, 0, "gpt-oss-120b", body, 10, 64, b"", stream=stream)


def plain(told: Reply | Failure) -> tuple[object, ...]:
    """What a client makes of an attempt, without words and moments."""
    if isinstance(told, Reply):
        names = {name.lower() for name in told.headers if name.lower().startswith("x-ratelimit")}
        try:
            said = msgspec.json.decode(told.body)
        except msgspec.DecodeError:
            return told.status, told.body[:30], names
        return told.status, said.get("choices"), said.get("error"), names
    return told.kind, told.status, told.type, told.code, told.paid, told.retry_after, told.body


def in_process(settings: Settings, timeout: float, times: int, stream: bool) -> list[tuple[object, ...]]:
    """What requests one after the other end with, without a network."""

    async def main() -> list[tuple[object, ...]]:
        front = Front(settings, asyncio.get_running_loop().time, 1_790_000_000.0, record=True)
        refusal = dialects.named("cerebras").refusal
        transport = ModelTransport(front, "Bearer key", timeout, refusal)
        return [plain(await transport.send(request(stream=stream))) for _ in range(times)]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def over_sockets(
    settings: Settings, timeout: float, times: int, stream: bool, library: Library
) -> list[tuple[object, ...]]:
    """The same over HTTP."""

    async def main(url: str) -> list[tuple[object, ...]]:
        headers = {"Authorization": "Bearer key"}
        transport = HttpTransport(url, headers, dialects.named("cerebras"), timeout, library=library)
        try:
            return [plain(await transport.send(request(stream=stream))) for _ in range(times)]
        finally:
            await transport.close()

    with running(settings) as service:
        return asyncio.run(main(service.url))


@pytest.mark.parametrize("library", ["aiohttp", "reqwest"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [None, *Fault, *StreamFault, "400", "401", "404", "429", "500", "503", "529"])
def test_what_breaks_in_process_breaks_as_over_sockets(kind: str | None, stream: bool, library: Library) -> None:
    """Each fault gives the same kind, status, words and body on both ways, on a new connection and on a kept one."""
    faults = {} if kind is None else {str(kind): 0.6}
    settings = Settings(faults=faults, latency=0.001, slow=0.01, hang=30.0, seed=4, retry_after=True)
    timeout = 0.3
    expected = in_process(settings, timeout, 6, stream)
    if library == "reqwest":  # it does not say whether a connection had been kept
        expected = [
            (Kind.DISCONNECTED if ended is Kind.STALE_CONNECTION else ended, *more) for ended, *more in expected
        ]
    assert expected == over_sockets(settings, timeout, 6, stream, library)


def test_who_cannot_connect_is_told_so() -> None:
    """While the service is unreachable nothing is sent to it, and what it answers is lost."""

    async def main() -> None:
        front = Front(Settings(), asyncio.get_running_loop().time, 0.0, record=True)
        refusal = dialects.named("cerebras").refusal
        transport = ModelTransport(front, "Bearer key", 5.0, refusal)
        on_its_way = asyncio.create_task(transport.send(request()))
        await anyio.sleep(0.01)
        transport.unreachable = Kind.DNS
        ends = [await on_its_way, await transport.send(request())]
        assert [end.kind for end in ends if isinstance(end, Failure)] == [Kind.DISCONNECTED, Kind.DNS]
        transport.unreachable = None
        assert isinstance(await transport.send(request()), Reply)
        assert [entry.answered_at is None for entry in front.book] == [True, False]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
