"""The bus's clock, and its deadlines.

The bus's clock is the room above's `now` less the time in which nobody ran the bus. When the server itself was stalled
(a long garbage collection, a stopped process, a suspended machine), everyone's deadline moves by as much: what clients
said meanwhile is still in the sockets, and is read before anyone is judged.

    now    ──────┬────────── stalled ─────────┬──────►
    clock  ──────┴(stands at the deadline less the allowance)──►
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmubusd.notify.operation import Operation
    from mmubusd.notify.session import Session

NEVER = float("inf")
MOVED_MAX = 256
"""Deadlines that were moved and are still there before they are looked for."""


class Clock:
    """Bus time and the deadlines in it.

    A deadline belongs to a session or an operation, which knows in `armed_at` which one counts: moving one is pushing
    another, and the old one is passed over.

    Args: stall_allowance_s: how late the timer may be before it counts as a stall.
    Attributes: time: the latest bus time; stalled_s: how much it lies behind the room above's.
    """

    __slots__ = ("_allowance_s", "_heap", "_moved_nr", "_seen", "_serial", "stalled_s", "time")

    def __init__(self, stall_allowance_s: float) -> None:
        self._allowance_s = stall_allowance_s
        self._heap: list[tuple[float, int, Session | Operation[object]]] = []
        self._serial = 0
        self._moved_nr = 0
        self._seen = -NEVER
        self.time = -NEVER
        self.stalled_s = 0.0

    @property
    def seen(self) -> float:
        """The room above's seconds at the last input."""
        return self._seen

    def tick(self, now: float) -> float:
        """An input has come. Returns: the bus's time. Never goes back."""
        if now - self._seen > self._allowance_s:
            due = self.next_deadline()
            if due is not None and now - max(due, self._seen) > self._allowance_s:
                self.stalled_s += now - max(due, self._seen) + self._allowance_s
        if now > self._seen:
            self._seen = now
        if now - self.stalled_s > self.time:
            self.time = now - self.stalled_s
        return self.time

    def stalled(self, seconds: float) -> None:
        """The room above has noticed by itself that it did not run for so long; bus time stands still for as much."""
        self.stalled_s += seconds

    def arm(self, whose: Session | Operation[object], at: float) -> None:
        """From now on this is its deadline."""
        if whose.armed_at < NEVER:
            self._moved_nr += 1  # what is passed over keeps whom it belongs to
            if self._moved_nr > MOVED_MAX and self._moved_nr * 2 > len(self._heap):
                self._tidy()
        whose.armed_at = at
        if at < NEVER:
            self._serial += 1
            heappush(self._heap, (at, self._serial, whose))

    def _tidy(self) -> None:
        """Forget the deadlines that were moved."""
        self._heap = [entry for entry in self._heap if entry[2].armed_at == entry[0]]
        heapify(self._heap)
        self._moved_nr = 0

    def due(self) -> Session | Operation[object] | None:
        """Take the next one whose deadline has come; None when there is none (any more)."""
        heap = self._heap
        while heap and heap[0][0] <= self.time:
            at, _, whose = heappop(heap)
            if whose.armed_at == at:
                whose.armed_at = NEVER
                return whose
        return None

    def next_deadline(self) -> float | None:
        """In the room above's seconds; may be earlier than anything is really due."""
        heap = self._heap
        while heap and heap[0][2].armed_at != heap[0][0]:
            heappop(heap)
        return heap[0][0] + self.stalled_s if heap else None
