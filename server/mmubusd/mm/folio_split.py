"""Splitting a large folio into small pages, as MADV_COLD, FREE and PAGEOUT do where they concern a part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.frame import DIRTY, ORDER_MASK
from mmubusd.mm.huge_memory import announce_splits, split_pmd
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, SOFT_DIRTY, UFFD_WP, ZERO_PTE, Ptes
from mmubusd.mm.rmap_walk import tell
from mmubusd.mm.vma import VM_LOCKED
from mmubusd.mm.zap import evict_exports

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def split(memory: Memory, pfn: int) -> Operation[bool]:
    """Make small pages of a large folio; those that hold only zeros become the zero page, and unmapped ones are free.

    Who could map such a page is told before, place by place, and the page replaced while that place is still barred.
    Kernel: split_huge_page_to_list_to_order(), v6.18.
    Returns: whether it was split; a folio that someone holds stays.
    """
    frames = memory.frames
    if folio.is_held(frames, pfn):
        return False
    if frames.exports:
        generation, pages = frames.generation_at[pfn], folio.members(frames, pfn).tolist()
        yield from evict_exports(memory, [page for page in pages if page in frames.exports and frames.is_zero(page)])
        if frames.generation_at[pfn] != generation or not folio.is_large(frames, pfn):
            return False
    for vma, start, end in folio.walk(memory, pfn):
        generation = frames.generation_at[pfn]
        yield from tell([(vma.mm, start, end)], Reason.CLEAR)
        if frames.generation_at[pfn] != generation or not folio.is_large(frames, pfn) or folio.is_held(frames, pfn):
            return False
        _use_zero_page(vma.mm, start, end, pfn)
        left = folio.members(frames, pfn)
        if not left.size:
            return True
        pfn = int(left[0])
    for vma in folio.vmas(memory, pfn):
        for base, ptes in folio.spans(memory, vma, pfn):
            _split_mapping(vma.mm, base, ptes, pfn)
    pages = folio.members(frames, pfn)
    folio.set_flags(frames, pfn, off=ORDER_MASK)
    frames.put_many(frames.partial.let_go(pages))
    return True


def _split_mapping(mm: Mm, base: int, ptes: Ptes, pfn: int) -> NDArray[np.bool_]:
    """Let PTEs map what these entries of a leaf table map of the folio, and the folio know what is dirty.

    Returns: which of the entries that are.
    """
    frames = mm.memory.frames
    ours = folio.mapped(frames, ptes, pfn)
    if ours.any():
        mm.pgtable.leaves[base >> LEAF_SHIFT].huge = False
        if (ptes[ours] & np.uint64(PTE_DIRTY)).any():
            folio.set_flags(frames, pfn, on=DIRTY)
    return ours


def _use_zero_page(mm: Mm, start: int, end: int, pfn: int) -> None:
    """Map the zero page in [start, end) where a page of the folio holds the same.

    Kernel: try_to_map_unused_to_zeropage().
    """
    frames = mm.memory.frames
    for vma in mm.vmas.overlapping(start, end):
        low, high = max(start, vma.start), min(end, vma.end)
        for base, ptes in mm.pgtable.spans(low >> PAGE_SHIFT, high >> PAGE_SHIFT):
            for at in _split_mapping(mm, base, ptes, pfn).nonzero()[0].tolist():
                page = int(ptes[at]) >> PFN_SHIFT
                if not vma.flags & VM_LOCKED and page not in frames.exports and frames.is_zero(page):
                    ptes[at] = ZERO_PTE | int(ptes[at]) & (SOFT_DIRTY | UFFD_WP)
                    frames.mapcount_at[page] -= 1
                    frames.put(page)


def split_page(mm: Mm, vpn: int) -> Operation[None]:
    """Let the page be mapped for itself: its folio is split, if nobody holds it, and a PMD in any case."""
    pfn = mm.pgtable.get(vpn) >> PFN_SHIFT
    if pfn and folio.is_large(mm.memory.frames, pfn):
        yield from split(mm.memory, pfn)
    leaf = mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
    if leaf is not None and leaf.huge:
        split_pmd(mm, vpn << PAGE_SHIFT)
        yield from announce_splits(mm)
