"""How late the loop is: a tick a quarter of a second, and what the health service says of it.

A loop that is stuck answers no health check at all, and the probe's own time-out tells. One that only just keeps up
still answers; then this says NOT_SERVING, so that no new work is sent here. Liveness is not touched: a restart would
lose everything and help nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Lag"]

TICK_S = 0.25
STEADY_TIMES = 5


class Lag:
    """Watches the running loop.

    Attributes:
        last_s, worst_s: how late the last tick was, and the latest since `worst_s` was last reset by `take_worst`.
        late_s, ticks_nr: all lateness together, and over how many ticks.
        over: it was later than the bound, and has not kept up for long enough since.
    """

    def __init__(self, bound_s: float, changed: Callable[[bool], None]) -> None:
        """Args: bound_s: seconds; changed: called with `over` when that changes."""
        self.bound_s = bound_s
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self.last_s = self.late_s = 0.0
        self.ticks_nr = 0
        self.over = False
        self._worst_s = 0.0
        self._steady_from = 0.0
        self._due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)

    def take_worst(self) -> float:
        """The latest tick since this was last asked, in seconds."""
        worst, self._worst_s = max(self._worst_s, self.last_s), 0.0
        return worst

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        self.last_s = max(0.0, now - self._due)
        self.late_s += self.last_s
        self.ticks_nr += 1
        self._worst_s = max(self._worst_s, self.last_s)
        if self.last_s > self.bound_s:
            self._steady_from = now
            self._set(True)
        elif self.over and now - self._steady_from > STEADY_TIMES * self.bound_s:
            self._set(False)
        self._due = now + TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)

    def _set(self, over: bool) -> None:
        if over != self.over:
            self.over = over
            self._changed(over)
