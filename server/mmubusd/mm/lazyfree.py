"""MADV_FREE: pages that may go when memory is short, unless they are written to before.

Kernel: madvise_free_single_vma(), mm/madvise.c, v6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.errno import MmError
from mmubusd.mm.folio_split import split
from mmubusd.mm.frame import DEVICE, SWAPCACHE
from mmubusd.mm.frame import DIRTY as FRAME_DIRTY
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, DIRTY, LEAF_MASK, LEAF_SHIFT, PFN_SHIFT, PRESENT, Leaf
from mmubusd.mm.swapops import HWPOISON_ENTRY, SWAP, kind
from mmubusd.mm.vma import VM_LOCKED, Vma

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def free(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    """MADV_FREE of [start, end), part of one VMA under its range lock."""
    if vma.flags & VM_LOCKED:
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} is locked in memory")
    if vma.file is not None:
        raise MmError("EINVAL", "only private anonymous memory can be freed lazily")
    mm.memory.lru.drain()
    if mm.notified:
        yield InvalidateRange(mm, start, end, Reason.CLEAR)
    vpn, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    while vpn < last:
        leaf = mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
        table_end = min(last, (vpn | LEAF_MASK) + 1)
        if leaf is None:
            vpn = table_end
        elif leaf.huge:
            vpn += yield from _free_huge(mm, leaf, table_end - vpn)
        else:
            vpn = yield from _free_ptes(mm, leaf, vpn, table_end)


def _free_huge(mm: Mm, leaf: Leaf, count: int) -> Operation[int]:
    """Count pages of what a PMD maps. Returns: how many pages to go on by; 0: they are small pages now.

    Kernel: madvise_free_huge_pmd().
    """
    frames, first = mm.memory.frames, leaf.at[0] >> PFN_SHIFT
    if not first or folio.mapcount(frames, first) != folio.FOLIO_PAGES:
        return count
    if count < folio.FOLIO_PAGES:
        return 0 if (yield from split(mm.memory, first)) else count
    folio.set_flags(frames, first, off=FRAME_DIRTY)
    leaf.ptes &= ~np.uint64(DIRTY | ACCESSED)
    mm.memory.lru.lazyfree_large(first)
    return count


def _free_ptes(mm: Mm, leaf: Leaf, vpn: int, last: int) -> Operation[int]:
    """The pages [vpn, last) of one leaf table. Returns: where to go on. Kernel: madvise_free_pte_range()."""
    frames, swap, base = mm.memory.frames, mm.memory.swap, vpn & ~LEAF_MASK
    for page in (leaf.ptes[vpn - base : last - base].nonzero()[0] + vpn).tolist():
        pte = leaf.at[page - base]
        pfn = pte >> PFN_SHIFT
        if not pte & PRESENT:
            if kind(pte) == SWAP:
                swap.free(pfn)
                leaf.at[page - base] = 0
            elif kind(pte) == HWPOISON_ENTRY:
                leaf.at[page - base] = 0
            continue
        if not pfn or frames.flags_at[pfn] & DEVICE:
            continue
        if folio.is_large(frames, pfn):
            return page + (yield from _free_large(mm, leaf, page, last, pfn))
        if frames.flags_at[pfn] & (FRAME_DIRTY | SWAPCACHE):
            if frames.mapcount_at[pfn] != 1 or not swap.forget(pfn):
                continue
            frames.flags_at[pfn] &= ~FRAME_DIRTY
        leaf.at[page - base] = pte & ~(DIRTY | ACCESSED)
        mm.memory.lru.lazyfree(pfn)
    return last


def _free_large(mm: Mm, leaf: Leaf, vpn: int, last: int, pfn: int) -> Operation[int]:
    """A page of a large folio that PTEs map. Returns: how many pages to go on by; 0: it is a small page now."""
    frames = mm.memory.frames
    run = folio.run(mm, vpn, last, pfn)
    if run < folio.FOLIO_PAGES:
        if folio.mapped_shared(mm, pfn):
            return run
        return 0 if (yield from split(mm.memory, pfn)) else run
    if frames.flags_at[pfn] & FRAME_DIRTY and folio.mapcount(frames, pfn) != run:
        return run
    folio.set_flags(frames, pfn, off=FRAME_DIRTY)
    leaf.ptes &= ~np.uint64(DIRTY | ACCESSED)
    mm.memory.lru.lazyfree_large(pfn)
    return run
