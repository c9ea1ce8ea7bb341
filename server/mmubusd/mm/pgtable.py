"""Page tables: leaf tables of 512 entries, found by number.

An entry is a uint64 as on x86-64: the pfn from bit 12 up and the flags below. Each leaf has a numpy array, for ranges,
and a memoryview of the same memory, for single entries. Of the upper levels only existence matters, and it does:
mprotect notifies where a 1 GiB block has tables, fault-around where a 2 MiB block has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PGDIR_SIZE, PMD_SIZE, PTRS_PER_TABLE, PUD_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.memcontrol import MemCgroup

PRESENT = 1 << 0
WRITE = 1 << 1
ACCESSED = 1 << 5
DIRTY = 1 << 6
SOFT_DIRTY = 1 << 9  # written to since the last clear_refs
UFFD_WP = 1 << 10  # write-protected by userfaultfd's word
NUMA_HINT = 1 << 11  # present, and not to be used before it is known from which node, see numa_balancing
KIND_MASK = 7 << 2  # of an entry that is not present: what it stands for, see swapops
SWAP = 1 << 2
PFN_SHIFT = 12
ZERO_PTE = PRESENT | ACCESSED
"""The flags of a page just read."""
NEW_PTE = PRESENT | ACCESSED | WRITE | DIRTY | SOFT_DIRTY
"""The flags of a page just written to."""

WRITTEN_PTE = ACCESSED | DIRTY | SOFT_DIRTY
"""What a write leaves behind."""

Ptes = NDArray[np.uint64]

LEAF_SHIFT = 9
LEAF_MASK = PTRS_PER_TABLE - 1
PUD_SHIFT = 18


class Leaf:
    """One leaf table: 2 MiB of addresses. huge: it stands for one large entry (a PMD), see huge_memory."""

    __slots__ = ("at", "huge", "ptes")

    def __init__(self) -> None:
        self.ptes: Ptes = np.zeros(PTRS_PER_TABLE, np.uint64)
        self.at = self.ptes.data
        self.huge = False


class Tables:
    """How many leaf tables the whole machine has, and may have: a mapping costs nothing, touching it costs tables."""

    __slots__ = ("max", "nr")

    def __init__(self, tables_max: int) -> None:
        self.nr = 0
        self.max = tables_max


class PageTable:
    """The page table of one address space. Pages are named by virtual page number.

    leaves: leaf tables by vpn >> 9; puds: the 1 GiB blocks (vpn >> 18) that have tables; has_entries: there are, or
    have been, entries that are not present (see swapops); memcg: who pays for the leaf tables.
    """

    __slots__ = ("_tables", "has_entries", "leaves", "memcg", "puds")

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.leaves: dict[int, Leaf] = {}
        self.puds: set[int] = set()
        self.has_entries = False
        self.memcg: MemCgroup | None = None

    def _count(self, more: int) -> None:
        """So many leaf tables more."""
        self._tables.nr += more
        if self.memcg is not None:
            self.memcg.charged += more

    def get(self, vpn: int) -> int:
        leaf = self.leaves.get(vpn >> LEAF_SHIFT)
        return leaf.at[vpn & LEAF_MASK] if leaf is not None else 0

    def set(self, vpn: int, pte: int) -> None:
        """Set an entry, making the tables that it needs."""
        self.leaf(vpn).at[vpn & LEAF_MASK] = pte

    def set_entry(self, vpn: int, entry: int) -> None:
        """Set an entry that is not present."""
        self.has_entries = True
        self.leaf(vpn).at[vpn & LEAF_MASK] = entry

    def clear(self, vpn: int) -> int:
        """Clear an entry. Returns: what it was, 0 when there was none."""
        leaf = self.leaves.get(vpn >> LEAF_SHIFT)
        if leaf is None:
            return 0
        at = vpn & LEAF_MASK
        pte: int = leaf.at[at]
        if pte:
            leaf.at[at] = 0
        return pte

    def leaf(self, vpn: int) -> Leaf:
        """The leaf table for vpn, made if it is not there."""
        number = vpn >> LEAF_SHIFT
        leaf = self.leaves.get(number)
        if leaf is None:
            leaf = self.leaves[number] = Leaf()
            self.puds.add(vpn >> PUD_SHIFT)
            self._count(1)
        return leaf

    def move_leaf(self, number: int, to: int) -> None:
        """A whole leaf table comes to map another block, which has nothing."""
        self.leaves[to] = self.leaves.pop(number)
        self.puds.add(to >> PUD_SHIFT - LEAF_SHIFT)

    def check_room(self, leaves_nr: int = 1) -> None:
        """Before making so many leaf tables. Raises: MmError ENOMEM, OutOfFrames: who pays may not have so many."""
        if self.memcg is not None:
            self.memcg.check(leaves_nr)
        tables = self._tables
        if tables.nr + leaves_nr > tables.max:
            raise MmError("ENOMEM", f"{tables.nr} page tables of 2 MiB each are in use, of at most {tables.max}")

    def spans(self, first: int, last: int) -> Iterator[tuple[int, Ptes]]:
        """Every part of [first, last) that has a leaf table, ascending, as (its first vpn, its entries)."""
        low, high = first >> LEAF_SHIFT, (last - 1) >> LEAF_SHIFT
        leaves = self.leaves
        if high - low < len(leaves):
            numbers = [number for number in range(low, high + 1) if number in leaves]
        else:
            numbers = sorted(number for number in leaves if low <= number <= high)
        for number in numbers:
            base = number << LEAF_SHIFT
            a, b = max(first, base), min(last, base + PTRS_PER_TABLE)
            yield a, leaves[number].ptes[a - base : b - base]

    def slices(self, start: int, end: int, leaves_nr: int) -> list[tuple[int, int]]:
        """[start, end) in bytes, cut so that no part has more than leaves_nr leaf tables as they are now."""
        if len(self.leaves) <= leaves_nr:
            return [(start, end)]
        low, high = start // PMD_SIZE, -(-end // PMD_SIZE)
        numbers = sorted(number for number in self.leaves if low <= number < high)
        cuts = [start, *(number * PMD_SIZE for number in numbers[leaves_nr::leaves_nr]), end]
        return list(pairwise(cuts))

    def has_tables(self, address: int) -> bool:
        """Whether the 1 GiB block around the address has tables."""
        return address // PUD_SIZE in self.puds

    def ranges_with_tables(self, start: int, end: int) -> list[tuple[int, int]]:
        """What is told of when rights change: in each 512 GiB, from the first 1 GiB block that has tables.

        Kernel: change_pud_range().
        """
        found = []
        while start < end:
            stop = min(end, (start // PGDIR_SIZE + 1) * PGDIR_SIZE)
            at = start
            while at < stop and not self.has_tables(at):
                at = (at // PUD_SIZE + 1) * PUD_SIZE
            if at < stop:
                found.append((at, stop))
            start = stop
        return found

    def free_tables(self, floor: int, ceiling: int) -> None:
        """Nothing is mapped in [floor, ceiling): tables wholly inside it go. Kernel: free_pgtables()."""
        low, high = -(-floor // PMD_SIZE), ceiling // PMD_SIZE
        if high - low < len(self.leaves):
            numbers = [number for number in range(low, high) if number in self.leaves]
        else:
            numbers = [number for number in self.leaves if low <= number < high]
        for number in numbers:
            del self.leaves[number]
        self._count(-len(numbers))
        low, high = -(-floor // PUD_SIZE), ceiling // PUD_SIZE
        for pud in [pud for pud in self.puds if low <= pud < high]:
            self.puds.remove(pud)

    def drop_leaf(self, number: int) -> None:
        """An empty leaf goes, the tables above it stay. Kernel: try_get_and_clear_pmd(), mm/pt_reclaim.c, v6.14."""
        if self.leaves.pop(number, None) is not None:
            self._count(-1)

    def huge(self, first: int, last: int) -> list[tuple[int, int]]:
        """What PMDs map of [first, last), as maximal [from, to) runs of page numbers."""
        runs: list[tuple[int, int]] = []
        for number in sorted(number for number, leaf in self.leaves.items() if leaf.huge):
            a, b = max(first, number << LEAF_SHIFT), min(last, (number + 1) << LEAF_SHIFT)
            if a < b:
                if runs and runs[-1][1] == a:
                    a = runs.pop()[0]
                runs.append((a, b))
        return runs

    def present(self, first: int, last: int) -> list[tuple[int, int]]:
        """Resident pages of [first, last) as maximal [from, to) runs of page numbers."""
        return self.runs(first, last, PRESENT, PRESENT)

    def swapped(self, first: int, last: int) -> list[tuple[int, int]]:
        """Pages of [first, last) that have a swap entry, likewise."""
        return self.runs(first, last, PRESENT | KIND_MASK, SWAP)

    def runs(self, first: int, last: int, mask: int, value: int) -> list[tuple[int, int]]:
        """Entries of [first, last) that equal value under the mask, as maximal [from, to) runs of page numbers."""
        runs: list[tuple[int, int]] = []
        for base, ptes in self.spans(first, last):
            matching = (ptes & np.uint64(mask) == value).astype(np.int8)
            edges = np.flatnonzero(np.diff(matching, prepend=0, append=0))
            for a, b in edges.reshape(-1, 2).tolist():
                if runs and runs[-1][1] == base + a:
                    runs[-1] = (runs[-1][0], base + b)
                else:
                    runs.append((base + a, base + b))
        return runs

    def present_nr(self) -> int:
        return sum(int(np.count_nonzero(leaf.ptes & np.uint64(PRESENT))) for leaf in self.leaves.values())
