"""What may not be handed out now: a counted set of ranges, and of frames.

While a round covers a range, no translation of it is given out (rule BarredWhileActive). Each round bars for itself,
so the end of one never opens what another still covers. Requests that run into a bar park here and are woken when it
lifts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mmubusd.notify.intervals import IntervalIndex

if TYPE_CHECKING:
    from mmubusd.notify.operation import Operation

_NOBODY: Sequence[Operation[object]] = ()


class BarredRanges:
    """The bars of one address space and the operations that wait for them.

    A bar is put in its place among the others when somebody looks: most are lifted before anybody does.

    Attributes: changes: goes up whenever a bar is put; a walk that saw it unchanged has not been overtaken.
    """

    __slots__ = ("_bars", "_new", "_parked", "_serial", "changes")

    def __init__(self) -> None:
        self._bars: IntervalIndex[None] = IntervalIndex()
        self._parked: IntervalIndex[Operation[object]] = IntervalIndex()
        self._new: dict[int, tuple[int, int]] = {}  # by serial: not looked at yet
        self._serial = 0
        self.changes = 0

    def __len__(self) -> int:
        """How many bars there are; one round may have put several."""
        return len(self._bars) + len(self._new)

    def bar(self, start: int, end: int) -> int:
        """Returns: a number to lift it by."""
        self._serial += 1
        self.changes += 1
        self._new[self._serial] = start, end
        return self._serial

    def lift(self, serial: int, start: int, end: int) -> Sequence[Operation[object]]:
        """Returns: the parked operations that are no longer in anyone's way; they are no longer parked."""
        if self._new.pop(serial, None) is None:
            self._bars.remove(serial)
        if not self._parked.by_serial:
            return _NOBODY
        free = []
        for operation_id, operation in sorted(self._parked.overlapping(start, end)):
            if not self.covers(*operation.parked_on):
                self._parked.remove(operation_id)
                free.append(operation)
        return free

    def covers(self, start: int, end: int) -> bool:
        """Whether any of [start, end) is barred."""
        if self._new:
            for serial, (first, last) in self._new.items():
                self._bars.add(first, last, serial, None)
            self._new.clear()
        return len(self._bars) > 0 and self._bars.covers_any(start, end)

    def park(self, operation: Operation[object]) -> None:
        """Requires: operation.parked_on is a barred range."""
        self._parked.add(*operation.parked_on, operation.id, operation)

    def unpark(self, operation: Operation[object]) -> None:
        """Its time is up, or it is no longer wanted."""
        if operation.id in self._parked:
            self._parked.remove(operation.id)


class BarredFrames:
    """Frames that are being taken from their exporters; no new export of them is given out."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def bar(self, pfns: Iterable[int]) -> None:
        for pfn in pfns:
            self._counts[pfn] = self._counts.get(pfn, 0) + 1

    def lift(self, pfns: Iterable[int]) -> None:
        for pfn in pfns:
            left = self._counts[pfn] - 1
            if left:
                self._counts[pfn] = left
            else:
                del self._counts[pfn]

    def covers(self, pfns: Iterable[int]) -> bool:
        """Whether any of the frames is barred."""
        counts = self._counts
        return bool(counts) and any(pfn in counts for pfn in pfns)
