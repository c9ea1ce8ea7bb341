"""Handlers that run in a thread pool, for those that take time or call back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from mmubus.notifier import METHODS, Notifier, RmapNotifier, ops_of

__all__ = ["InWorker", "RmapInWorker"]


def _elsewhere(pool: ThreadPoolExecutor, method: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(*args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(method, *args))

    handler.__name__ = method.__name__
    return handler


class InWorker(Notifier):
    """A notifier whose handlers run in a thread pool. It has the ops that the one inside has."""

    def __init__(self, inside: Notifier, pool: ThreadPoolExecutor) -> None:
        for op in ops_of(inside):
            setattr(self, METHODS[op], _elsewhere(pool, getattr(inside, METHODS[op])))
        self.invalidated_everything = _elsewhere(pool, inside.invalidated_everything)  # type: ignore[method-assign]
        self.jeopardy = inside.jeopardy  # type: ignore[method-assign]


class RmapInWorker(RmapNotifier):
    """The same for the rmap list."""

    def __init__(self, inside: RmapNotifier, pool: ThreadPoolExecutor) -> None:
        self.invalidate_page = _elsewhere(pool, inside.invalidate_page)  # type: ignore[method-assign]
        self.invalidated_everything = _elsewhere(pool, inside.invalidated_everything)  # type: ignore[method-assign]
        self.jeopardy = inside.jeopardy  # type: ignore[method-assign]
