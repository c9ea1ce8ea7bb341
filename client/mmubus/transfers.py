"""Accesses that a device has begun: what they touch is given back when they have ended, and not before.

    device                                  server
    looks a page up: frame 7
    dma_read(frame 7)  ──────┐
                             │  ┌────────── notice: the page goes
    handler: drops it  ◄─────┼──┘
    not acknowledged yet     └────────────► reads frame 7, which is still the page's
    the bytes  ◄───────────────────────────
    acknowledged  ────────────────────────► the frame is free

As hardware completes an invalidation only when it is off the page, the library sends an acknowledgement only then.
Waiting for it is no sleeping: the server answers an access at once, whatever else it waits for. What a driver begins
after it has acknowledged is its own mistake, and refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Transfers"]


class Transfers:
    """The accesses of one registration that have not ended, each with the addresses, or the frames, that it touches."""

    __slots__ = ("_under_way",)

    def __init__(self) -> None:
        self._under_way: dict[asyncio.Future[None], tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def begin(self, low: int, high: int) -> Callable[[], None]:
        """An access to [low, high) begins. Returns: to be called when it has ended; once more does nothing."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way[ended] = low, high

        def end() -> None:
            if self._under_way.pop(ended, None) is not None:
                ended.set_result(None)

        return end

    def within(self, low: int, high: int) -> list[asyncio.Future[None]]:
        """The accesses under way that touch [low, high); each future is done when its access has ended."""
        return [ended for ended, (start, end) in self._under_way.items() if start < high and low < end]

    async def ended(self, low: int, high: int) -> None:
        """Wait until none of those that touch [low, high) now is under way."""
        if under_way := self.within(low, high):
            await asyncio.wait(under_way)
