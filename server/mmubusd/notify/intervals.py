"""Intervals found by overlap, at a cost that grows with what is found.

Intervals are kept by length class: class k has those of fewer than 2^k and at least 2^(k-1) bytes, sorted by start.
Whatever of a class overlaps [s, e) starts in (s - 2^k, e), which is one slice of the list; what the slice holds too
much of are intervals that end close before s. There are at most 47 classes, and in practice one or two.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_SERIAL_BITS = 40
_SERIALS = 1 << _SERIAL_BITS


class IntervalIndex(Generic[T]):
    """Half-open intervals, each with a serial number of its own and an item.

    Finding is O(classes · log n + found); adding and removing move list entries, which memmove does.

    Attributes: by_serial: start, end and item of each, in the order in which they were added; only to be read.
    """

    __slots__ = ("_classes", "by_serial")

    def __init__(self) -> None:
        self._classes: dict[int, list[int]] = {}  # length class: sorted start << 40 | serial
        self.by_serial: dict[int, tuple[int, int, T]] = {}

    def __len__(self) -> int:
        return len(self.by_serial)

    def __contains__(self, serial: int) -> bool:
        return serial in self.by_serial

    def __iter__(self) -> Iterator[T]:
        """All items, in the order in which they were added."""
        return (item for _, _, item in self.by_serial.values())

    def add(self, start: int, end: int, serial: int, item: T) -> None:
        """Requires: start < end; serial is not in the index and less than 2^40."""
        assert start < end, "an interval is not empty"
        assert serial not in self.by_serial, "each interval has a serial of its own"
        assert serial < _SERIALS
        self.by_serial[serial] = (start, end, item)
        kind = (end - start).bit_length()
        keys = self._classes.get(kind)
        if keys is None:
            keys = self._classes[kind] = []
        key = start << _SERIAL_BITS | serial
        if not keys or key > keys[-1]:
            keys.append(key)
        else:
            insort(keys, key)

    def remove(self, serial: int) -> None:
        """Requires: serial is in the index."""
        start, end, _ = self.by_serial.pop(serial)
        kind = (end - start).bit_length()
        keys = self._classes[kind]
        if len(keys) == 1:
            del self._classes[kind]
            return
        del keys[bisect_left(keys, start << _SERIAL_BITS | serial)]

    def overlapping(self, start: int, end: int) -> list[tuple[int, T]]:
        """What overlaps [start, end), as (serial, item), in no particular order."""
        found = []
        items = self.by_serial
        for kind, keys in self._classes.items():
            low = bisect_left(keys, (start - (1 << kind) + 1) << _SERIAL_BITS)
            for at in range(low, bisect_left(keys, end << _SERIAL_BITS)):
                serial = keys[at] & (_SERIALS - 1)
                _, item_end, item = items[serial]
                if item_end > start:
                    found.append((serial, item))
        return found

    def covers_any(self, start: int, end: int) -> bool:
        """Whether anything overlaps [start, end)."""
        items = self.by_serial
        for kind, keys in self._classes.items():
            low = bisect_left(keys, (start - (1 << kind) + 1) << _SERIAL_BITS)
            for at in range(low, bisect_left(keys, end << _SERIAL_BITS)):
                if items[keys[at] & (_SERIALS - 1)][1] > start:
                    return True
        return False


def merge_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as the fewest half-open ranges, ascending; touching ones become one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
