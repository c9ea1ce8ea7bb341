"""A segment: part of an address space that other processes may attach to, and the notifier of its addresses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, TypeAlias

from mmubus.drivers.dma import Entry
from mmubus.drivers.wire import Wire
from mmubus.errors import Refuse
from mmubus.linux import PAGE_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange

__all__ = ["By", "OpenFault", "Segment", "Watch", "forget"]

By: TypeAlias = Literal["rmap", "range"]


@dataclass(slots=True, eq=False)
class OpenFault:
    """A fault of pages [first, end) that is under way.

    overtaken_by: the notice that invalidated some of them last, meanwhile. A grant that is as of that notice or of a
        later one is good: the fault itself may be what the notice is about, as one that ends exclusive access is.
    """

    first: int
    end: int
    overtaken_by: float = 0


@dataclass(slots=True, eq=False)
class Segment:
    """Part of an address space that may be attached to.

    Attributes:
        table: page -> entry, what has been granted. holders: page -> who has it and may use it.
        written: pages that an importer said it wrote, until they are handed over.
        faults: those that are under way; a grant is void if its pages were invalidated after it was asked for.
    """

    number: int
    mm: int
    start: int
    pages: int
    by: By
    writable: bool
    watch: Watch
    table: dict[int, Entry] = field(default_factory=dict)
    holders: dict[int, set[Wire]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    faults: set[OpenFault] = field(default_factory=set)

    def overtake(self, start: int, end: int, seq: float = inf) -> None:
        """The addresses [start, end) are invalidated by a notice, or for good."""
        for fault in self.faults:
            if start < self.start + fault.end * PAGE_SIZE and self.start + fault.first * PAGE_SIZE < end:
                fault.overtaken_by = max(fault.overtaken_by, seq)


def forget(segment: Segment, entries: Mapping[int, Entry]) -> None:
    """Pages leave the table, unless something else has been granted there meanwhile."""
    for page, entry in entries.items():
        if segment.table.get(page) is entry:
            del segment.table[page]


Lose: TypeAlias = "Callable[[Segment, Sequence[int]], Awaitable[list[int]]]"
"""(segment, pages) -> the addresses of those that were written."""


class Watch(Notifier):
    """The notifier of one segment's addresses. Args: lose: takes pages back from the importers."""

    slips = ("age_page", "invalidate_range_end")  # no accessed bits; the server holds faults off until the end

    def __init__(self, lose: Lose) -> None:
        self._exporter_loses = lose
        self.segment: Segment | None = None

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        return self._lose(range.start, range.end, range.blockable, range.seq)

    def release(self, mm: int) -> Answer:
        return self._lose(0, 1 << 64, True)

    def invalidated_everything(self, why: str) -> Answer:
        return self._lose(0, 1 << 64, True)

    def _lose(self, start: int, end: int, blockable: bool, seq: float = inf) -> Answer:
        segment = self.segment
        if segment is None:
            return None
        segment.overtake(start, end, seq)
        pages = [page for page in segment.table if start <= segment.start + page * PAGE_SIZE < end]
        if not pages:
            return None
        if not blockable:
            raise Refuse  # others have to be asked, and that takes time
        return self._exporter_loses(segment, pages)
