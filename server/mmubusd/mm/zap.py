"""Unmapping: clearing PTEs, and keeping the frames until nobody can still hold them.

zap_range(...)                        PTEs cleared, frames in the gather
yield InvalidateRange(...)            everyone lets go; meanwhile the frames are in quarantine
yield from gather.finish(memory)      exporters of frames that would go must let go too; then the frames are free
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE, Pfn
from mmubusd.mm.file import File
from mmubusd.mm.frame import ANON, CACHE, EXTERNAL, KSM, ORDER_MASK, FrameTable
from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.huge_memory import split_ends, tell_blocks
from mmubusd.mm.notification import (
    RESCHEDULE,
    SLICE_LEAVES,
    InvalidateRange,
    Operation,
    Reason,
    RmapInvalidatePage,
)
from mmubusd.mm.pgtable import DIRTY, LEAF_SHIFT, PFN_SHIFT, PRESENT, Ptes
from mmubusd.mm.swapops import SWAP, kind, maps_frame
from mmubusd.mm.vma import VM_HUGETLB, Vma

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

FEW_BYTES = 8 << PAGE_SHIFT
"""Up to here a loop over the pages of private memory costs less than setting up array operations."""


class Gather:
    """Frames that have lost a mapping, held by the reference that it had. Kernel: struct mmu_gather."""

    __slots__ = ("_apart_nr", "_batches", "_memory", "_singles")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._batches: list[Pfns] = []
        self._apart_nr = 0  # how many of the batches are in quarantine
        self._singles: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._batches or self._singles)

    def add(self, pfns: Pfns) -> None:
        """shape (n,), no frame twice."""
        self._batches.append(pfns)

    def add_one(self, pfn: int) -> None:
        """A frame that may come once for each mapping that it has lost."""
        self._singles.append(pfn)

    def quarantine(self) -> None:
        """A round opens on them."""
        frames = self._memory.frames
        for pfn in self._singles:
            frames.quarantine_one(pfn)
        for batch in self._batches[self._apart_nr :]:
            frames.quarantine(batch)
        self._apart_nr = len(self._batches)

    def finish(self) -> Operation[None]:
        """Nobody holds a translation any more: exporters let go of what would be freed, then the references go."""
        if self._memory.frames.exports:
            yield from evict_exports(self._memory, self._unheld_exports())
        while len(self._batches) > SLICE_LEAVES:
            self._put_batches(SLICE_LEAVES)
            yield RESCHEDULE
        self.free()
        if self._memory.orphans:
            yield from destroy_orphans(self._memory)

    def free(self) -> None:
        frames = self._memory.frames
        singles, self._singles = self._singles, []
        for pfn in singles:
            frames.put(pfn)
        if self._batches:
            self._put_batches(len(self._batches))

    def _put_batches(self, count: int) -> None:
        batches = self._batches[-count:]
        del self._batches[-count:]
        for batch in batches:
            self._memory.frames.put_many(batch)

    def _unheld_exports(self) -> list[int]:
        frames = self._memory.frames
        return [
            pfn
            for pfn in frames.exports
            if frames.mapcount_at[pfn] == 0
            and not frames.flags_at[pfn] & CACHE
            and (pfn in self._singles or any((batch == pfn).any() for batch in self._batches))
        ]


def evict_exports(memory: Memory, pfns: list[int]) -> Operation[None]:
    """Have every exporter let go of these frames. No exporter may refuse."""
    exported = tuple(Pfn(pfn) for pfn in pfns if memory.frames.flags_at[pfn] & EXTERNAL)
    if exported:
        yield RmapInvalidatePage(exported, must_evict=True)
        for pfn in exported:
            memory.frames.evict_exports(pfn)


def ask_exporters(memory: Memory, pfns: Iterable[int]) -> Operation[Set[Pfn]]:
    """Have the exporters of these frames let go, who may refuse. Returns: the frames that stay exported."""
    exported = tuple(Pfn(pfn) for pfn in pfns if memory.frames.flags_at[pfn] & EXTERNAL)
    if not exported:
        return frozenset()
    refused = (yield RmapInvalidatePage(exported, must_evict=False)).refused_pfns
    for pfn in exported:
        if pfn not in refused:
            memory.frames.evict_exports(pfn)
    return refused


def destroy_orphans(memory: Memory) -> Operation[None]:
    """Files without a name and without a mapping go, with all their pages."""
    orphans, memory.orphans = memory.orphans, []
    for file in orphans:
        if file.users_nr or file.linked:
            continue
        if memory.frames.exports:
            yield from evict_exports(memory, [pfn for _, pfn in file.cache.items()])
        memory.destroy_file(file)


def zap_range(mm: Mm, vma: Vma, start: int, end: int, gather: Gather, file_only: bool = False) -> None:
    """Clear the PTEs of [start, end) of one VMA. Kernel: unmap_single_vma().

    Args: file_only: private copies stay (hole punching).
    """
    frames, file = mm.memory.frames, vma.file
    if vma.flags & VM_HUGETLB:
        hugetlb.zap(mm, vma, start, end, gather)
        return
    split_ends(mm, start, end)
    if file is None and end - start <= FEW_BYTES:
        for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            pte = mm.pgtable.clear(vpn)
            if pte and not pte & PRESENT:
                _drop_entry(mm.memory, pte, gather)
                continue
            pfn = pte >> PFN_SHIFT
            if pfn:
                if pte & DIRTY and frames.flags_at[pfn] & ORDER_MASK:
                    frames.set_dirty(pfn)
                frames.mapcount_at[pfn] -= 1
                gather.add_one(pfn)
        return
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        if mm.pgtable.has_entries and not file_only:
            _drop_entries(mm.memory, ptes, gather)
        at = (ptes & np.uint64(PRESENT)).nonzero()[0] if file_only else ptes.nonzero()[0]
        if not at.size:
            continue
        old = ptes if at.size == ptes.size else ptes[at]
        pfns = (old >> np.uint64(PFN_SHIFT)).view(np.int64)
        if file_only:
            keep = frames.flags[pfns] & ANON == 0
            at, old, pfns = at[keep], old[keep], pfns[keep]
        if file is not None:
            _hand_over_dirty(file, vma, base, at, old, pfns)
            ptes[at] = 0
            if mm.pgtable.leaves[base >> LEAF_SHIFT].huge:
                mm.pgtable.drop_leaf(base >> LEAF_SHIFT)
        else:
            if frames.free.keeps_blocks:
                _hand_over_to_folios(frames, old, pfns)
            ptes[:] = 0
        if not pfns.all():
            pfns = pfns[pfns != 0]
        if frames.has_merged:  # one page may be there more than once
            merged = frames.flags[pfns] & KSM != 0
            for pfn in pfns[merged].tolist():
                frames.mapcount_at[pfn] -= 1
                gather.add_one(pfn)
            pfns = pfns[~merged]
        frames.mapcount[pfns] -= 1
        gather.add(pfns)


def _drop_entries(memory: Memory, ptes: Ptes, gather: Gather) -> None:
    """Clear the entries that are not present. ptes: shape (n,)."""
    for at in ((ptes != 0) & (ptes & np.uint64(PRESENT) == 0)).nonzero()[0].tolist():
        _drop_entry(memory, int(ptes[at]), gather)
        ptes[at] = 0


def _drop_entry(memory: Memory, entry: int, gather: Gather) -> None:
    value = entry >> PFN_SHIFT
    if kind(entry) == SWAP:
        memory.swap.free(value)
    elif maps_frame(entry):
        memory.frames.mapcount_at[value] -= 1
        gather.add_one(value)


def _hand_over_dirty(file: File, vma: Vma, base: int, at: Pfns, old: Ptes, pfns: Pfns) -> None:
    """What the PTEs know about writes goes to the file's folios."""
    frames = vma.mm.memory.frames
    dirty = old & np.uint64(DIRTY) != 0
    if dirty.any():
        first = vma.pgoff + base - (vma.start >> PAGE_SHIFT)
        for offset, pfn in zip(at[dirty].tolist(), pfns[dirty].tolist(), strict=True):
            if frames.flags_at[pfn] & CACHE:
                file.set_dirty(first + offset)


def _hand_over_to_folios(frames: FrameTable, old: Ptes, pfns: Pfns) -> None:
    """What the PTEs know about writes goes to the large folios, of which others may map the rest."""
    dirty = (old & np.uint64(DIRTY) != 0) & (frames.flags[pfns] & ORDER_MASK != 0)
    for first in np.unique(pfns[dirty] & -PTRS_PER_TABLE).tolist():
        frames.set_dirty(int(pfns[dirty & (pfns & -PTRS_PER_TABLE == first)][0]))


def zap_page(mm: Mm, vma: Vma, address: int, gather: Gather) -> None:
    """Clear one PTE, if there is one."""
    if mm.pgtable.get(address >> PAGE_SHIFT):
        zap_range(mm, vma, address, address + (1 << PAGE_SHIFT), gather)


def zap_ahead(mm: Mm, start: int, end: int, gather: Gather) -> Operation[None]:
    """Clear a large region's PTEs a slice at a time, others running between; a small one is left to unmap_region().

    Requires: the region's range lock is held.
    """
    slices = mm.pgtable.slices(start, end, SLICE_LEAVES)
    if len(slices) == 1:
        return
    for first, last in slices:
        for vma in mm.vmas.overlapping(first, last):
            zap_range(mm, vma, max(first, vma.start), min(last, vma.end), gather)
        if mm.notified:
            gather.quarantine()
        yield RESCHEDULE


def unmap_region(mm: Mm, vmas: list[Vma], start: int, end: int, gather: Gather) -> Gather:
    """Clear everything in [start, end) and take the VMAs, which lie wholly inside, out of the address space.

    Page tables that no VMA needs any more go too. Kernel: vms_clear_ptes(), unmap_region().
    """
    for vma in vmas:
        zap_range(mm, vma, vma.start, vma.end, gather)
    mm.vmas.remove_all(vmas)
    before, after = mm.vmas.neighbours(start, end)
    mm.pgtable.free_tables(before.end if before is not None else 0, after.start if after is not None else 1 << 48)
    return gather


def announce(mm: Mm, start: int, end: int, reason: Reason, gather: Gather) -> Operation[None]:
    """Tell of a range whose PTEs have been cleared, and of PMDs split for that, then let the frames go.

    Nobody there: nothing is yielded.
    """
    if mm.notified:
        gather.quarantine()
        blocks, mm.split_blocks = mm.split_blocks, []
        yield InvalidateRange(mm, start, end, reason)
        if blocks:
            yield from tell_blocks(mm, blocks)
    yield from gather.finish()
