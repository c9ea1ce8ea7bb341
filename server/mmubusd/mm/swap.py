"""Swap: where pages of private and shared memory go that have no file to go to.

    mapped page ──add──► in the swap cache, with a slot ──last PTE replaced──► written, frame free: only the slot
        ▲                     │                                                        │
        └───────fault─────────┘ ◄───────────────────────fault, read in─────────────────┘

A slot is counted once for each swap entry (in page tables, and of shared memory's caches). A page in the swap cache has
one reference more. It leaves the cache when nobody maps it and no entry is left, or when it is to be written to by the
only one who has it. Kernel: mm/swapfile.c, mm/swap_state.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.frame import DIRTY, SWAPCACHE
from mmubusd.mm.frame_bytes import WRITTEN

if TYPE_CHECKING:
    from mmubusd.mm.frame import FrameTable
    from mmubusd.mm.memcontrol import MemCgroup


class SwapArea:
    """One swap file.

    Attributes: slots_nr: how many pages it holds; count: entries by slot, 0 and more for each slot in use.
    """

    def __init__(self, frames: FrameTable, slots_nr: int) -> None:
        self.slots_nr = slots_nr
        frames.swap = self
        self.count: dict[int, int] = {}
        self._frames = frames
        self._data: dict[int, bytes] = {}  # what has been written; a page of zeros needs no bytes
        self._cached: dict[int, int] = {}  # the swap cache: frame by slot
        self._slots: dict[int, int] = {}  # and slot by frame
        self._free: list[int] = []
        self._payers: dict[int, MemCgroup] = {}  # by slot
        self._untouched = 1  # slot 0 is the swap file's header

    @property
    def free_nr(self) -> int:
        return len(self._free) + self.slots_nr + 1 - self._untouched

    @property
    def full(self) -> bool:
        """Whether slots are given up as soon as that is possible. Kernel: vm_swap_full()."""
        return self.used_nr * 2 > self.slots_nr

    @property
    def used_nr(self) -> int:
        return self.slots_nr - self.free_nr

    def room(self, pfn: int) -> int:
        """How many slots there are for pages like this one: of who pays for it, too."""
        memcg = self._frames.charges.of(pfn)
        return self.free_nr if memcg is None else min(self.free_nr, memcg.swap_limit - memcg.swapped)

    def payers(self) -> dict[int, MemCgroup]:
        """Who pays for slots, for checks."""
        return self._payers

    def cached(self, slot: int) -> int:
        """The frame that holds the slot's page, or 0."""
        return self._cached.get(slot, 0)

    def slot_of(self, pfn: int) -> int | None:
        """The slot of a frame in the swap cache."""
        return self._slots.get(pfn)

    def cache(self) -> dict[int, int]:
        """The whole swap cache, for checks: frame by slot."""
        return self._cached

    # Slots

    def add(self, pfn: int) -> int:
        """The page's slot in the swap cache; a new one, and the page dirty, if it has none. 0: none is to be had.

        Kernel: add_to_swap(), mem_cgroup_try_charge_swap().
        """
        if pfn in self._slots:
            return self._slots[pfn]
        memcg = self._frames.charges.of(pfn)
        if memcg is not None and memcg.swapped >= memcg.swap_limit:
            return 0
        if self._free:
            slot = self._free.pop()
        elif self._untouched <= self.slots_nr:
            slot = self._untouched
            self._untouched += 1
        else:
            return 0
        if memcg is not None:
            memcg.swapped += 1
            self._payers[slot] = memcg
        self.count[slot] = 0
        self._insert(slot, pfn)
        self._frames.flags_at[pfn] |= DIRTY
        return slot

    def _insert(self, slot: int, pfn: int) -> None:
        self._cached[slot] = pfn
        self._slots[pfn] = slot
        self._frames.flags_at[pfn] |= SWAPCACHE
        self._frames.swapcache_nr += 1
        self._frames.get(pfn)

    def duplicate(self, slot: int) -> None:
        """One entry more. Kernel: swap_duplicate()."""
        self.count[slot] += 1

    def free(self, slot: int) -> None:
        """One entry less; with the last one the slot goes, unless a mapped page holds it.

        Kernel: free_swap_and_cache().
        """
        self.count[slot] -= 1
        if not self.count[slot]:
            pfn = self._cached.get(slot)
            if pfn is None:
                self._release(slot)
            elif not self._frames.mapcount_at[pfn]:
                self.forget(pfn)

    def give_back(self, slot: int) -> None:
        """As free, where the page has just been mapped in the entry's place: it stays cached. Kernel: swap_free()."""
        self.count[slot] -= 1

    def _release(self, slot: int) -> None:
        del self.count[slot]
        memcg = self._payers.pop(slot, None)
        if memcg is not None:
            memcg.swapped -= 1
        self._data.pop(slot, None)
        self._free.append(slot)

    # The swap cache

    def shared(self, pfn: int) -> bool:
        """Whether somebody has an entry for the page's slot. Kernel: folio_swapped()."""
        slot = self._slots.get(pfn)
        return slot is not None and self.count[slot] > 0

    def forget(self, pfn: int) -> bool:
        """Take the page out of the cache, dirty, and free its slot, unless somebody has an entry for it.

        Kernel: folio_free_swap(). Returns: whether the page is in no swap cache now.
        """
        slot = self._slots.get(pfn)
        if slot is None:
            return True
        if self.count[slot]:
            return False
        self._frames.flags_at[pfn] |= DIRTY
        self._remove(slot, pfn)
        self._release(slot)
        return True

    def forget_unmapped(self, pfn: int) -> None:
        """The page has lost a reference. Kernel: free_swap_cache()."""
        if not self._frames.mapcount_at[pfn]:
            self.forget(pfn)

    def _remove(self, slot: int, pfn: int) -> None:
        del self._cached[slot]
        del self._slots[pfn]
        self._frames.flags_at[pfn] &= ~SWAPCACHE
        self._frames.swapcache_nr -= 1
        self._frames.put(pfn)

    def replace(self, old: int, new: int) -> None:
        """The page has moved to another frame."""
        slot = self._slots.pop(old)
        self._frames.flags_at[old] &= ~SWAPCACHE
        self._frames.swapcache_nr -= 1
        self._insert(slot, new)
        self._frames.put(old)

    def write_out(self, pfn: int) -> None:
        """Put the page's bytes into its slot, if they are not there; it is clean then. Kernel: swap_writepage()."""
        frames, slot = self._frames, self._slots[pfn]
        if frames.flags_at[pfn] & DIRTY:
            if frames.flags_at[pfn] & WRITTEN:
                self._data[slot] = frames.read(pfn)
            else:
                self._data.pop(slot, None)
            frames.flags_at[pfn] &= ~DIRTY

    def drop(self, pfn: int) -> None:
        """The page, clean and unmapped, leaves the cache; the slot keeps its bytes. Kernel: __remove_mapping()."""
        self._remove(self._slots[pfn], pfn)

    def read_in(self, slot: int, pfn: int) -> None:
        """A new frame becomes the slot's page, clean. Kernel: swap_readpage()."""
        data = self._data.get(slot)
        if data is not None:
            self._frames.write(pfn, 0, data)
        self._insert(slot, pfn)

    def zero(self, slot: int, offset: int, length: int) -> None:
        """Zero part of a page that is only in its slot."""
        data = self._data.get(slot)
        if data is not None:
            self._data[slot] = data[:offset] + bytes(length) + data[offset + length :]

    def peek(self, slot: int, offset: int, length: int) -> bytes:
        """The bytes of a slot's page, wherever they are."""
        pfn = self._cached.get(slot)
        if pfn is not None:
            return self._frames.read(pfn, offset, length)
        data = self._data.get(slot)
        return data[offset : offset + length] if data is not None else bytes(length)
