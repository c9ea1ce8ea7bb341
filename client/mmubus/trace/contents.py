"""What the program wrote: which bytes a reader must find in each page, worked out beside the server and without it.

A replay marks every page that the recorded program writes with a pattern of its own (address space, address,
operation). This module follows the patterns through everything that the program does to its mappings, so that a
device's read can be held against them: an own copy, a page of a shared file, zeros. Where that cannot be told (after
MADV_FREE, or when a call stopped half way) the answer is "unknown", and only that page is not checked.

    region   a range of addresses that is mapped alike (private or shared, of which file)
    own      page -> bytes: the private copies of this address space; a page that is not there shows the file, or zeros
    cells    (file, page of the file) -> bytes: what is in the files, for all address spaces together
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from mmubus.linux import (
    MADV_DOFORK,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_DONTNEED_LOCKED,
    MADV_FREE,
    MADV_KEEPONFORK,
    MADV_POPULATE_WRITE,
    MADV_REMOVE,
    MADV_WIPEONFORK,
    PAGE_SHIFT,
    PAGE_SIZE,
)

__all__ = ["HUGE_SIZE", "PATTERN_BYTES", "Contents", "Files", "Region", "Unknown", "pattern"]

_PATTERN = struct.Struct("<4Q")
PATTERN_BYTES = _PATTERN.size
ZERO = bytes(PATTERN_BYTES)
HUGE_SIZE = 2 << 20
MAGIC = 0x6D6D75627573  # "mmubus"


class Unknown:
    """The bytes of a page that cannot be told."""


Bytes = bytes | type[Unknown]


def pattern(mm: int, address: int, operation: int) -> bytes:
    """The bytes that a write leaves at the start of its page: no two writes leave the same."""
    return _PATTERN.pack(MAGIC, mm, address, operation)


@dataclass(frozen=True, slots=True)
class Region:
    """A range that is mapped alike; file: any name for it, None: anonymous and private; offset: bytes, of start."""

    start: int
    end: int
    shared: bool
    file: int | None = None
    offset: int = 0
    wiped: bool = False  # MADV_WIPEONFORK
    left_out: bool = False  # MADV_DONTFORK
    huge: bool = False  # of hugetlb

    @property
    def told(self) -> bool:
        """Whether its pages can be told apart. Private copies of a hugetlbfs file come and go 2 MiB at a time."""
        return self.shared or self.file is None or not self.huge

    def cell(self, address: int) -> tuple[int, int]:
        """The page of the file that is shown at the address. Requires: it has a file."""
        assert self.file is not None
        return self.file, (self.offset + address - self.start) >> PAGE_SHIFT

    def cut(self, start: int, end: int) -> Region:
        """The part of it inside [start, end)."""
        low, high = max(start, self.start), min(end, self.end)
        return replace(self, start=low, end=high, offset=self.offset + low - self.start)

    def moved(self, start: int) -> Region:
        """The same, at another address."""
        return replace(self, start=start, end=start + self.end - self.start)


@dataclass(slots=True)
class Files:
    """What is in the files, for all address spaces. A page that is not named holds zeros."""

    cells: dict[tuple[int, int], Bytes] = field(default_factory=dict)

    def truncate(self, file: int, size: int) -> None:
        """ftruncate: what is beyond the size is gone, the rest of the last page is zeros."""
        last, rest = divmod(size, PAGE_SIZE)
        for cell in [cell for cell in self.cells if cell[0] == file and cell[1] >= last]:
            if cell[1] > last or rest == 0:
                del self.cells[cell]
            elif rest < PATTERN_BYTES:
                self.cells[cell] = Unknown

    def punch(self, file: int, offset: int, length: int) -> None:
        """A hole: whole pages read as zeros."""
        first, end = offset >> PAGE_SHIFT, (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
        for page in [cell[1] for cell in self.cells if cell[0] == file and first <= cell[1] < end]:
            whole = offset <= page << PAGE_SHIFT and (page + 1) << PAGE_SHIFT <= offset + length
            self.cells[file, page] = ZERO if whole else Unknown


class Contents:
    """What one address space shows.

    Args: files: shared by all address spaces of the replay.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._regions: list[Region] = []
        self._own: dict[int, Bytes] = {}

    def region(self, address: int) -> Region | None:
        """The region of an address, or None."""
        at = bisect_right(self._regions, address, key=lambda region: region.start) - 1
        return self._regions[at] if at >= 0 and address < self._regions[at].end else None

    def regions(self, start: int, end: int) -> list[Region]:
        """The parts of regions inside [start, end), ascending."""
        at = max(0, bisect_right(self._regions, start, key=lambda region: region.start) - 1)
        found = []
        while at < len(self._regions) and self._regions[at].start < end:
            if self._regions[at].end > start:
                found.append(self._regions[at].cut(start, end))
            at += 1
        return found

    def expected(self, address: int) -> Bytes:
        """The first PATTERN_BYTES of the page at the address, as a reader must find them."""
        if (own := self._own.get(address >> PAGE_SHIFT)) is not None:
            return own
        region = self.region(address)
        if region is None or not region.told:
            return Unknown
        return ZERO if region.file is None else self._files.cells.get(region.cell(address), ZERO)

    def shared(self, start: int, end: int) -> bool:
        """Whether a file is involved in [start, end): what is written there may be seen elsewhere."""
        return any(region.file is not None for region in self.regions(start, end))

    def written(self, address: int, data: bytes) -> None:
        """The program wrote to the start of a page."""
        region = self.region(address)
        if region is None:
            return
        if region.shared:
            self._files.cells[region.cell(address)] = data
        else:
            self._own[address >> PAGE_SHIFT] = data if region.told else Unknown

    def touched(self, start: int, end: int, *, whole: bool) -> None:
        """Write faults without bytes: private pages of files become copies. whole: False: it stopped somewhere."""
        for region in self.regions(start, end):
            if region.shared or region.file is None:
                continue
            for address in range(region.start, region.end, PAGE_SIZE):
                if address >> PAGE_SHIFT not in self._own:
                    self._own[address >> PAGE_SHIFT] = self.expected(address) if whole else Unknown

    def map(self, region: Region) -> None:
        """A new mapping, over whatever was there."""
        self.unmap(region.start, region.end)
        self._insert(region)

    def unmap(self, start: int, end: int) -> None:
        """Nothing is mapped there any more."""
        self._replace(start, end, lambda region: ())
        self.drop(start, end)

    def whole_end(self, end: int) -> int:
        """Where a call ends that is to end here: hugetlb's pages are done as a whole."""
        region = self.region(end - 1)
        return end + HUGE_SIZE - 1 & -HUGE_SIZE if region is not None and region.huge else end

    def drop(self, start: int, end: int) -> None:
        """Private copies are gone: MADV_DONTNEED."""
        for page in self._own_pages(start, end):
            del self._own[page]

    def doubt(self, start: int, end: int) -> None:
        """Nothing can be told of what is mapped there, until it is written again."""
        for region in self.regions(start, end):
            for address in range(region.start, region.end, PAGE_SIZE):
                self._own[address >> PAGE_SHIFT] = Unknown

    def resize_heap(self, old: int, new: int) -> None:
        """brk moved the break from old to new; both page-aligned."""
        if new > old:
            self.map(Region(old, new, shared=False))
        elif new < old:
            self.unmap(new, old)

    def move(self, source: int, old: int, new: int, target: int, *, keep: bool) -> None:
        """mremap succeeded: [source, source + old) is now [target, target + new); keep: MREMAP_DONTUNMAP."""
        if source == target:
            self._grow_or_shrink(source, old, new)
            return
        if old == 0:  # a second mapping of shared memory
            if region := self.region(source):
                self.map(
                    Region(target, target + new, region.shared, region.file, region.cut(source, region.end).offset)
                )
            return
        moved = self.regions(source, source + min(old, new))
        own = {page: self._own[page] for page in self._own_pages(source, source + min(old, new))}
        if old != new:
            self.unmap(target, target + new)
        for region in moved:
            self.map(region.moved(region.start - source + target))
        if new > old and moved:
            last = moved[-1].moved(moved[-1].start - source + target)
            self._insert(replace(last, start=last.end, end=target + new, offset=last.offset + last.end - last.start))
        for page, data in own.items():
            self._own[page + ((target - source) >> PAGE_SHIFT)] = data
        if keep:
            self.drop(source, source + old)
        else:
            self.unmap(source, source + old)

    def carry(self, source: int, length: int, target: int) -> None:
        """UFFDIO_MOVE moved so many bytes' pages, which are private."""
        shift = (target - source) >> PAGE_SHIFT
        carried = {page: self._own.pop(page) for page in self._own_pages(source, source + length)}
        self.drop(target, target + length)
        self._own.update({page + shift: data for page, data in carried.items()})

    def advise(self, start: int, end: int, advice: int, *, whole: bool) -> None:
        """madvise ended; whole: False when it failed somewhere."""
        if advice in (MADV_DONTNEED, MADV_DONTNEED_LOCKED):
            if advice == MADV_DONTNEED and whole:
                for region in self.regions(start, end):
                    self.drop(region.start, region.end & -HUGE_SIZE if region.huge else region.end)
            else:
                self._maybe(start, end)
        elif advice == MADV_FREE:
            for page in self._own_pages(start, end):
                self._own[page] = Unknown
        elif advice == MADV_REMOVE:
            for region in self.regions(start, end):
                if region.shared and region.file is not None:
                    file, page = region.cell(region.start)
                    self._files.punch(file, page << PAGE_SHIFT, region.end - region.start)
                    if not whole:
                        self.doubt(region.start, region.end)
        elif advice == MADV_POPULATE_WRITE:
            self.touched(start, end, whole=whole)
        elif advice in (MADV_DONTFORK, MADV_DOFORK):
            self._replace(start, end, lambda region: (replace(region, left_out=advice == MADV_DONTFORK),))
        elif advice in (MADV_WIPEONFORK, MADV_KEEPONFORK):
            self._replace(start, end, lambda region: (replace(region, wiped=advice == MADV_WIPEONFORK),))

    def truncated(self, file: int, size: int) -> None:
        """A file that is mapped here was truncated: private copies beyond its end are gone too."""
        end = (size + PAGE_SIZE - 1) >> PAGE_SHIFT << PAGE_SHIFT
        for region in self._regions:
            if region.file == file and not region.shared:
                first = max(region.start, region.start + end - region.offset)
                self.drop(first, max(first, region.end))

    def fork(self) -> Contents:
        """What the child shows."""
        child = Contents(self._files)
        child._regions = [region for region in self._regions if not region.left_out]
        child._own = dict(self._own)
        for region in self._regions:
            if region.left_out or region.wiped:
                child.drop(region.start, region.end)
        return child

    def _maybe(self, start: int, end: int) -> None:
        for page in self._own_pages(start, end):
            self._own[page] = Unknown

    def _own_pages(self, start: int, end: int) -> list[int]:
        first, last = start >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
        if last - first < len(self._own):
            return [page for page in range(first, last) if page in self._own]
        return [page for page in self._own if first <= page < last]

    def _grow_or_shrink(self, source: int, old: int, new: int) -> None:
        if new < old:
            self.unmap(source + new, source + old)
        elif new > old and (last := self.region(source + old - PAGE_SIZE)):
            offset = last.offset + source + old - last.start
            self._insert(replace(last, start=source + old, end=source + new, offset=offset))

    def _insert(self, region: Region) -> None:
        at = bisect_right(self._regions, region.start, key=lambda other: other.start)
        self._regions.insert(at, region)

    def _replace(self, start: int, end: int, make: _Make) -> None:
        """Every part of a region inside [start, end) becomes what make says."""
        inside = self.regions(start, end)
        if not inside:
            return
        first = bisect_right(self._regions, inside[0].start, key=lambda region: region.start) - 1
        last = first
        kept: list[Region] = []
        while last < len(self._regions) and self._regions[last].start < end:
            region = self._regions[last]
            kept += _around(region, start, end)
            last += 1
        new = [one for region in inside for one in make(region)]
        self._regions[first:last] = sorted(kept + new, key=lambda region: region.start)


_Make = Callable[[Region], Iterable[Region]]


def _around(region: Region, start: int, end: int) -> Iterator[Region]:
    """What of a region is outside of [start, end)."""
    if region.start < start:
        yield region.cut(region.start, start)
    if end < region.end:
        yield region.cut(end, region.end)
