"""The pool of hugetlb: huge pages set apart when the machine starts, for those who ask for them by name.

What is in the pool is nobody's private memory and is never reclaimed. Who maps hugetlb memory reserves its pages, so
that its faults find them: of the free pages so many are spoken for. Frames come back one by one, since a device may
hold a single one of them; the page is in the pool again when it has all of them.

Kernel: mm/hugetlb.c, v6.12: struct hstate, dequeue_hugetlb_folio_vma(), free_huge_folio(), hugetlb_acct_memory().
"""

from __future__ import annotations

import numpy as np

from mmubusd.mm.free_frames import BLOCK_FRAMES, BLOCK_ORDER, FreeFrames, Pfns
from mmubusd.mm.free_nodes import FreeNodes


class Reservation:
    """What a private mapping has of the pool. Kernel: struct resv_map, with HPAGE_RESV_OWNER and _UNMAPPED.

    Attributes: owner: its pages were reserved when it was mapped; a child's were not, and one of them has been taken
    away for its parent. consumed: which of the reserved pages have been used, by number in the file.
    """

    __slots__ = ("consumed", "owner")

    def __init__(self, owner: bool) -> None:
        self.owner = owner
        self.consumed: set[int] = set()


class HugetlbPool:
    """Attributes: nr: huge pages, all together; reserved_nr: how many of the free ones are spoken for; restore: pages,
    by their first frame, whose reservation is there again once they are free.
    """

    __slots__ = ("_arrived", "_free", "nr", "reserved_nr", "restore")

    def __init__(self, frames: FreeFrames | FreeNodes, nr: int) -> None:
        """Take the pages out of the free frames. Raises: ValueError: there are not so many in a row."""
        self.nr = nr
        self.reserved_nr = 0
        self.restore: set[int] = set()
        self._free = [first for _ in range(nr) if (first := frames.take_block())]
        self._arrived: dict[int, list[int]] = {}  # frames of pages that are not whole yet, by the page's number
        if len(self._free) < nr:
            raise ValueError(f"{nr} huge pages of {BLOCK_FRAMES} frames wanted, there are {len(self._free)}")

    @property
    def free_nr(self) -> int:
        return len(self._free)

    @property
    def available_nr(self) -> int:
        """Free pages that nobody has reserved. Kernel: available_huge_pages()."""
        return len(self._free) - self.reserved_nr

    def frames(self) -> list[int]:
        """Every frame of the pool that nobody has, for checks."""
        whole = [pfn for first in self._free for pfn in range(first, first + BLOCK_FRAMES)]
        return whole + [pfn for pfns in self._arrived.values() for pfn in pfns]

    def take(self) -> int:
        """The first frame of a free page, or 0."""
        if not self._free:
            return 0
        first = self._free.pop()
        self.restore.discard(first)
        return first

    def has_free(self, pfn: int) -> bool:
        """Whether the frame is of a whole page that nobody has."""
        return pfn & -BLOCK_FRAMES in self._free

    def remove(self, first: int) -> bool:
        """A free page leaves the pool for good. Kernel: dissolve_free_hugetlb_folio(). Returns: whether it could."""
        if first not in self._free or self.available_nr <= 0:
            return False
        self._free.remove(first)
        self.restore.discard(first)
        self.nr -= 1
        return True

    def give(self, pfn: int) -> None:
        """A frame has lost its last reference."""
        self._arrive(pfn >> BLOCK_ORDER, [pfn])

    def give_many(self, pfns: Pfns) -> None:
        """shape (n,), no frame twice."""
        numbers = pfns >> BLOCK_ORDER
        for number in np.unique(numbers).tolist():
            self._arrive(number, pfns[numbers == number].tolist())

    def _arrive(self, number: int, pfns: list[int]) -> None:
        """Kernel: free_huge_folio()."""
        arrived = self._arrived.setdefault(number, [])
        arrived += pfns
        if len(arrived) == BLOCK_FRAMES:
            del self._arrived[number]
            first = number << BLOCK_ORDER
            self._free.append(first)
            if first in self.restore:
                self.restore.remove(first)
                self.reserved_nr += 1
