"""The per-CPU batches in which pages wait on their way to and between the LRU lists.

Only one thing about them is visible, but it is: a page in a batch has one reference more, so a write to a page that was
shared copies it where it could have been reused (rules for recordings: `do_wp_page`). A batch is emptied when it is
full and by `drain` (lru_add_drain); a freed page leaves it silently.

Kernel: struct cpu_fbatches, mm/swap.c, v6.12. The simulation has one CPU.
"""

from __future__ import annotations

import numpy as np

from mmubusd.mm.addr import PTRS_PER_TABLE
from mmubusd.mm.folio import set_flags
from mmubusd.mm.frame import (
    ACTIVE,
    ANON,
    EXTERNAL,
    IN_ADD,
    IN_DEACTIVATE,
    IN_LAZYFREE,
    LRU,
    ORDER_MASK,
    PINNED,
    REFERENCED,
    SWAPBACKED,
    FrameTable,
)
from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.lru_list import LruLists

BATCH_MAX = 31
"""PAGEVEC_SIZE."""

Entry = tuple[int, int]


class Lru:
    """The batches of the machine's one CPU. An entry is (pfn, generation): a frame freed meanwhile no longer counts.

    Attributes: lists: where the pages go from here.
    """

    __slots__ = ("_add", "_deactivate", "_frames", "_lazyfree", "lists", "reclaimed_nr", "victims_nr")

    def __init__(self, frames: FrameTable) -> None:
        self._frames = frames
        self.lists = LruLists(frames)
        self.victims_nr = self.reclaimed_nr = 0  # folios that reclaim tried to free, and did
        self._add: list[Entry] = []
        self._lazyfree: list[Entry] = []
        self._deactivate: list[Entry] = []

    def add(self, pfn: int) -> None:
        """A new page. Kernel: folio_add_lru()."""
        frames = self._frames
        frames.flags_at[pfn] |= IN_ADD
        self._add.append((pfn, frames.generation_at[pfn]))
        if len(self._add) >= BATCH_MAX:
            self.drain_added()

    def add_many(self, pfns: Pfns) -> None:
        """add() on each in turn."""
        last = (len(self._add) + len(pfns)) % BATCH_MAX
        through = max(0, len(pfns) - last)
        if len(self._add) + len(pfns) >= BATCH_MAX:
            self.drain_added()
            self._frames.flags[pfns[:through]] |= np.uint32(LRU)
            self.lists.touch_many(pfns[:through])
            pfns = pfns[through:]
        for pfn in pfns.tolist():
            self.add(pfn)

    def add_large(self, first: int) -> None:
        """A new large folio, which begins with this frame: it does not wait, and nobody who waits does any longer."""
        self.drain_added()
        self._frames.flags[first : first + PTRS_PER_TABLE] |= np.uint32(LRU)
        self.lists.touch_many(np.arange(first, first + PTRS_PER_TABLE))

    def lazyfree_large(self, pfn: int) -> None:
        """As lazyfree, for a large folio."""
        set_flags(self._frames, pfn, off=SWAPBACKED | ACTIVE | REFERENCED)
        self._drain_lazyfree()

    def lazyfree(self, pfn: int) -> None:
        """Kernel: folio_mark_lazyfree()."""
        flags = self._frames.flags_at[pfn]
        if flags & ANON and flags & SWAPBACKED and not flags & IN_LAZYFREE:
            self._frames.flags_at[pfn] = flags | IN_LAZYFREE
            self._lazyfree.append((pfn, self._frames.generation_at[pfn]))
            if len(self._lazyfree) >= BATCH_MAX:
                self._drain_lazyfree()

    def deactivate(self, pfn: int) -> None:
        """Kernel: folio_deactivate()."""
        flags = self._frames.flags_at[pfn]
        if flags & ACTIVE and not flags & IN_DEACTIVATE:
            self._frames.flags_at[pfn] = flags | IN_DEACTIVATE
            self._deactivate.append((pfn, self._frames.generation_at[pfn]))
            if len(self._deactivate) >= BATCH_MAX:
                self._drain_deactivate()

    def mark_accessed(self, pfn: int) -> None:
        """First touch: referenced; second: active. Kernel: folio_mark_accessed()."""
        flags = self._frames.flags_at[pfn]
        if flags & ORDER_MASK and flags & ANON:
            if not flags & REFERENCED:
                set_flags(self._frames, pfn, on=REFERENCED)
            elif not flags & ACTIVE:
                set_flags(self._frames, pfn, on=ACTIVE, off=REFERENCED)
        elif not flags & REFERENCED:
            self._frames.flags_at[pfn] = flags | REFERENCED
        elif not flags & ACTIVE:
            self._frames.flags_at[pfn] = (flags | ACTIVE) & ~REFERENCED
            self.lists.touch(pfn)

    def mark_accessed_many(self, pfns: Pfns) -> None:
        flags = self._frames.flags[pfns]
        second = (flags & REFERENCED != 0) & (flags & ACTIVE == 0)
        self._frames.flags[pfns] = np.where(second, (flags | ACTIVE) & ~np.uint32(REFERENCED), flags | REFERENCED)

    def drain(self) -> None:
        """Empty every batch. Kernel: lru_add_drain()."""
        if self._add:
            self.drain_added()
        if self._lazyfree:
            self._drain_lazyfree()
        if self._deactivate:
            self._drain_deactivate()

    def drain_added(self) -> None:
        """Empty the batch of new pages."""
        self.lists.touch_each(self._live(self._add, IN_ADD, LRU))
        self._add.clear()

    def _drain_lazyfree(self) -> None:
        for pfn in self._live(self._lazyfree, IN_LAZYFREE):
            self._frames.flags_at[pfn] &= ~(SWAPBACKED | ACTIVE | REFERENCED)
        self._lazyfree.clear()

    def _drain_deactivate(self) -> None:
        for pfn in self._live(self._deactivate, IN_DEACTIVATE):
            self._frames.flags_at[pfn] &= ~(ACTIVE | REFERENCED)
        self._deactivate.clear()

    def _live(self, batch: list[Entry], waiting: int, become: int = 0) -> list[int]:
        """The frames of the batch that still wait in it; they stop waiting. Args: become: flags that they get."""
        flags_at, generation_at = self._frames.flags_at, self._frames.generation_at
        live = [pfn for pfn, generation in batch if generation_at[pfn] == generation]
        for pfn in live:
            flags_at[pfn] = flags_at[pfn] & ~waiting | become
        return live


UNRECLAIMABLE = PINNED | EXTERNAL
"""Frames that someone holds beside their mappings."""
