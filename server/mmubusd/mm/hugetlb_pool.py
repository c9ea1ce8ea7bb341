"""The pool of hugetlb: huge pages set apart when the machine starts, for those who ask for them by name.

What is in the pool is nobody's private memory and is never reclaimed. Who maps hugetlb memory reserves its pages, so
that its faults find them: of the free pages so many are spoken for. Frames come back one by one, since a device may
hold a single one of them; the page is in the pool again when it has all of them.

Every NUMA node has its share of the pages, taken in turn. A page that moves goes to a free one which nobody has
reserved; where there is none, to frames of the machine that join the pool while the page that was left leaves it
(`temporary`), so that moving never costs the pool a page.

Kernel: mm/hugetlb.c, v6.12: struct hstate, dequeue_hugetlb_folio_vma(), free_huge_folio(), hugetlb_acct_memory(),
alloc_hugetlb_folio_nodemask().
"""

from __future__ import annotations

import numpy as np

from mmubusd.mm.free_frames import BLOCK_FRAMES, BLOCK_ORDER, FreeFrames, Pfns
from mmubusd.mm.free_nodes import FreeNodes, Nodes


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
    by their first frame, whose reservation is there again once they are free; temporary: those that then leave it;
    stuck: those that do not move until then.
    """

    __slots__ = ("_arrived", "_frames", "_free", "nr", "reserved_nr", "restore", "stuck", "temporary")

    def __init__(self, frames: FreeFrames | FreeNodes, nr: int) -> None:
        """Take the pages out of the free frames. Raises: ValueError: there are not so many in a row."""
        self.nr = nr
        self.reserved_nr = 0
        self.restore: set[int] = set()
        self.temporary: set[int] = set()
        self.stuck: set[int] = set()
        self._frames = frames
        self._free: list[int] = []
        for number in range(nr):
            turn = number % frames.nodes_nr
            first = frames.take_block((turn, *(node for node in range(frames.nodes_nr) if node != turn)))
            if not first:
                raise ValueError(f"{nr} huge pages of {BLOCK_FRAMES} frames wanted, there are {number}")
            self._free.append(first)
        self._arrived: dict[int, list[int]] = {}  # frames of pages that are not whole yet, by the page's number

    @property
    def free_nr(self) -> int:
        return len(self._free)

    @property
    def available_nr(self) -> int:
        """Free pages that nobody has reserved. Kernel: available_huge_pages()."""
        return len(self._free) - self.reserved_nr

    def free_on(self, nodes: Nodes) -> int:
        """How many pages of these nodes are free."""
        return sum(self._frames.node_of(first) in nodes for first in self._free)

    def frames(self) -> list[int]:
        """Every frame of the pool that nobody has, for checks."""
        whole = [pfn for first in self._free for pfn in range(first, first + BLOCK_FRAMES)]
        return whole + [pfn for pfns in self._arrived.values() for pfn in pfns]

    def take(self, nodes: Nodes | None = None) -> int:
        """The first frame of a free page, of the first of these nodes that has one, or 0."""
        if nodes is None:
            return self._leave(len(self._free) - 1) if self._free else 0
        for node in nodes:
            for at in range(len(self._free) - 1, -1, -1):
                if self._frames.node_of(self._free[at]) == node:
                    return self._leave(at)
        return 0

    def take_to_move(self, nodes: Nodes) -> int:
        """As take, for a page that moves: nothing that is reserved, but also what is not of the pool yet."""
        first = self.take(nodes) if self.available_nr > 0 else 0
        if not first:
            first = self._frames.take_block(nodes)
            if first:
                self.nr += 1
                self.temporary.add(first)
        return first

    def has_moved(self, old: int, new: int) -> None:
        """A page has gone from one place to the other. Kernel: move_hugetlb_state().

        One that has come to frames of the machine on the node where it was does not move again: the recorded kernel
        (v6.18) does not mark it as migratable then.
        """
        if new in self.temporary:
            self.temporary.remove(new)
            self.temporary.add(old)
            if self._frames.node_of(new) == self._frames.node_of(old):
                self.stuck.add(new)

    def _leave(self, at: int) -> int:
        first = self._free.pop(at)
        self.restore.discard(first)
        return first

    def has_free(self, pfn: int) -> bool:
        """Whether the frame is of a whole page that nobody has."""
        return pfn & -BLOCK_FRAMES in self._free

    def dissolve(self, first: int) -> bool:
        """A free page leaves the pool for good, and its frames are anybody's.

        Kernel: dissolve_free_hugetlb_folio(). Returns: whether it could: none of the free ones may be needed.
        """
        if first not in self._free or self.available_nr <= 0:
            return False
        self._leave(self._free.index(first))
        self._release(first)
        return True

    def _release(self, first: int) -> None:
        self.nr -= 1
        self._frames.give_many(np.arange(first, first + BLOCK_FRAMES))

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
        if len(arrived) < BLOCK_FRAMES:
            return
        del self._arrived[number]
        first = number << BLOCK_ORDER
        self.stuck.discard(first)
        if first in self.restore:
            self.restore.remove(first)
            self.reserved_nr += 1
        if first in self.temporary:
            self.temporary.remove(first)
            self._release(first)
        else:
            self._free.append(first)
