"""Work that blocks, done beside the event loop: on its threads, or wherever the loop does such work."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def aside(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """The function's result. Whoever is cancelled meanwhile waits for its end first."""
    with anyio.CancelScope(shield=True):  # a scope might swallow errors, so nothing is returned from inside
        result = await abandonable(function, *arguments, **named)
    return result  # noqa: RET504


async def abandonable(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """The same, but who is cancelled leaves at once; the function goes on until it notices by itself."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, partial(function, *arguments, **named))
