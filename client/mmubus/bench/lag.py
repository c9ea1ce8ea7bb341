"""How late a loop is: what anyone who wants its attention has to wait.

A tick every millisecond. A loop that is blocked for 50 ms misses 49 ticks, and each of them stands for someone who
would have waited: they are counted with the wait that they would have had, or a long block would look like one bad
sample.
"""

from __future__ import annotations

import asyncio

__all__ = ["LagProbe"]

TICK_S = 0.001


class LagProbe:
    """An async context manager that watches the running loop."""

    def __init__(self) -> None:
        self._late_s: list[float] = []

    async def __aenter__(self) -> LagProbe:
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)
        await asyncio.sleep(TICK_S * 5)
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.sleep(TICK_S * 2)  # the tick that the last block has delayed
        self._timer.cancel()

    def quantile_ms(self, quantile: float) -> float:
        """The lag that so large a part of all ticks did not exceed."""
        ordered = sorted(self._late_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1e3

    def _tick(self) -> None:
        late_s = max(0.0, self._loop.time() - self._due)
        while late_s > TICK_S:
            self._late_s.append(late_s)
            late_s -= TICK_S
        self._late_s.append(late_s)
        self._due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)
