"""An event loop in virtual time: when nothing is left to do now, it is the moment of what comes next."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, Unpack

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class NothingLeftError(RuntimeError):
    """Everybody waits for something that nobody will do, or the simulation takes longer than it was given."""


class VirtualLoop(asyncio.BaseEventLoop):
    """One thread, no sockets, no waiting: the same calls make the same things happen in the same order.

    It begins at `now` (seconds), and where it would have to go on after `until` it raises NothingLeftError. Work that
    is given to an executor is done by the loop itself, whole and at one moment, after as many seconds as `work` says.
    Every timer takes `tick` seconds at least: who waits for the rest of a rounding error would wait for ever.
    """

    def __init__(
        self,
        now: float = 0.0,
        until: float = float("inf"),
        work: Callable[[], float] = lambda: 0.0,
        tick: float = 0.0,
    ) -> None:
        super().__init__()
        self._now = now
        self._until = until
        self._work = work
        self._tick = tick
        self._handlers: dict[int, Callable[[], object]] = {}
        self._selector = self  # whom the base class asks what happened outside: nothing ever does

    def time(self) -> float:
        """The virtual moment, seconds."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Let the time pass until the next timer."""
        if timeout is None:
            raise NothingLeftError("everybody waits, and nothing will happen")
        self._now += timeout
        if self._now > self._until:
            raise NothingLeftError(f"it is not over after {self._until:,.0f} s")
        return []

    def call_at(
        self, when: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Have something done at a moment."""
        if self._tick:
            when = max(when, self._now + self._tick)
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Do the work here, when its time has come."""
        done: asyncio.Future[_T] = self.create_future()

        def work() -> None:
            if done.cancelled():
                return
            try:
                result = func(*args)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        self.call_later(self._work(), work)
        return done

    def add_signal_handler(self, sig: int, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts) -> None:
        """Have a signal heeded that `deliver` brings."""
        self._handlers[sig] = lambda: callback(*args)

    def remove_signal_handler(self, sig: int) -> bool:
        """Heed a signal no longer; whether it was."""
        return self._handlers.pop(sig, None) is not None

    def deliver(self, sig: int) -> bool:
        """A signal comes; whether anybody heeds it."""
        handler = self._handlers.get(sig)
        if handler is not None:
            self.call_soon(handler)
        return handler is not None

    def _process_events(self, events: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""
