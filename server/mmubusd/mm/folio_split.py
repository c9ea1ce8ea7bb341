"""Splitting a large folio into small pages, as MADV_COLD, FREE and PAGEOUT do where they concern a part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.frame import DIRTY, ORDER_MASK
from mmubusd.mm.huge_memory import announce_splits, split_pmd
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, ZERO_PTE
from mmubusd.mm.rmap_walk import tell
from mmubusd.mm.vma import VM_LOCKED

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def split(memory: Memory, pfn: int) -> Operation[bool]:
    """Make small pages of a large folio; those that hold only zeros become the zero page.

    Everyone is told first, since pages are replaced. Kernel: split_huge_page_to_list_to_order(), v6.18.
    Returns: whether it was split; a folio that someone holds stays.
    """
    frames = memory.frames
    if folio.is_held(frames, pfn):
        return False
    generation = frames.generation_at[pfn]
    places = folio.walk(memory, pfn)
    yield from tell([(vma.mm, start, end) for vma, start, end in places], Reason.CLEAR)
    if frames.generation_at[pfn] != generation or not folio.is_large(frames, pfn) or folio.is_held(frames, pfn):
        return False
    told: dict[Mm, list[tuple[int, int]]] = {}
    for vma, start, end in places:
        told.setdefault(vma.mm, []).append((start, end))
    replaced = _use_zero_page(memory, pfn, told)
    folio.set_flags(frames, pfn, off=ORDER_MASK)
    for zero in replaced:
        frames.mapcount_at[zero] -= 1
        frames.put(zero)
    return True


def _use_zero_page(memory: Memory, pfn: int, told: dict[Mm, list[tuple[int, int]]]) -> list[int]:
    """Split every PMD mapping, gather what is dirty, and put the zero page where it shows the same and all know.

    Returns: the frames that have lost a mapping so. Kernel: remap_page(), try_to_map_unused_to_zeropage().
    """
    frames, dirty, replaced = memory.frames, False, []
    zeros: dict[int, bool] = {}
    for vma in folio.vmas(memory, pfn):
        for base, ptes in folio.spans(memory, vma, pfn):
            ours = folio.mapped(frames, ptes, pfn)
            if not ours.any():
                continue
            vma.mm.pgtable.leaves[base >> LEAF_SHIFT].huge = False
            dirty = dirty or bool((ptes[ours] & np.uint64(PTE_DIRTY)).any())
            for at in ours.nonzero()[0].tolist():
                address, page = base + at << PAGE_SHIFT, int(ptes[at]) >> PFN_SHIFT
                known = any(start <= address < end for start, end in told.get(vma.mm, ()))
                if known and not vma.flags & VM_LOCKED and zeros.setdefault(page, frames.is_zero(page)):
                    ptes[at] = ZERO_PTE
                    replaced.append(page)
    if dirty:
        folio.set_flags(frames, pfn, on=DIRTY)
    return replaced


def split_page(mm: Mm, vpn: int) -> Operation[None]:
    """Let the page be mapped for itself: its folio is split, if nobody holds it, and a PMD in any case."""
    pfn = mm.pgtable.get(vpn) >> PFN_SHIFT
    if pfn and folio.is_large(mm.memory.frames, pfn):
        yield from split(mm.memory, pfn)
    leaf = mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
    if leaf is not None and leaf.huge:
        split_pmd(mm, vpn << PAGE_SHIFT)
        yield from announce_splits(mm)
