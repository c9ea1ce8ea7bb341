"""Reclaim of large folios of private memory. Kernel: mm/vmscan.c, mm/rmap.c, v6.18.

One that was freed lazily goes if nobody has written to it since; any other is split, and its pages go one by one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.folio_split import split
from mmubusd.mm.frame import ACTIVE, DIRTY, EXTERNAL, SWAPBACKED
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT
from mmubusd.mm.pgtable import WRITE as PTE_WRITE
from mmubusd.mm.reclaim import Victim, let_go_by_exporters, reclaim
from mmubusd.mm.rmap_walk import tell
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import Gather, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory


def reclaim_mixed(memory: Memory, victims: list[Victim], asks: bool) -> Operation[int]:
    """Reclaim under pressure: of large folios the small pages that they are split into, all of them.

    Args: asks: as for reclaim. Returns: how many frames became free.
    """
    frames, small, pages = memory.frames, list[Victim](), list[Victim]()
    for pfn, generation in victims:
        if frames.generation_at[pfn] != generation:
            continue
        if not folio.is_large(frames, pfn):
            small.append((pfn, generation))
            continue
        members = [(page, frames.generation_at[page]) for page in folio.members(frames, pfn).tolist()]
        pages += members
        if not frames.flags_at[pfn] & SWAPBACKED:
            yield from _discard_large(memory, pfn)
        elif memory.swap.free_nr and (yield from split(memory, pfn)):
            small += [(page, was) for page, was in members if frames.generation_at[page] == was]
    gone = {pfn for pfn, generation in pages if frames.generation_at[pfn] != generation}
    return len(gone) + (yield from reclaim(memory, small, under_pressure=True, asks=asks))


def reclaim_large(memory: Memory, pfn: int) -> Operation[None]:
    """Try to free a large folio: what is not lazily freed is split first. Kernel: shrink_folio_list()."""
    frames = memory.frames
    if not frames.flags_at[pfn] & SWAPBACKED:
        yield from _discard_large(memory, pfn)
        return
    pages = [pfn, *range(pfn + folio.FOLIO_PAGES - 1, pfn, -1)]
    generations = [frames.generation_at[page] for page in pages]
    if (yield from split(memory, pfn)):
        victims = zip(pages, generations, strict=True)
        yield from reclaim(memory, [(page, was) for page, was in victims if frames.generation_at[page] == was])


def _discard_large(memory: Memory, pfn: int) -> Operation[None]:
    """A lazily freed large folio goes, entries with the same rights at a time, up to what was written to since.

    Kernel: try_to_unmap_one(), where it splits the PMD first.
    """
    frames = memory.frames
    if frames.exports:
        pages = [(page, frames.generation_at[page]) for page in folio.members(frames, pfn).tolist()]
        if len((yield from let_go_by_exporters(memory, pages))) < len(pages):
            return
    for vma, start, end in folio.walk(memory, pfn):
        generation = frames.generation_at[pfn]
        yield from tell([(vma.mm, start, end)], Reason.CLEAR)
        if frames.generation_at[pfn] != generation or not folio.is_large(frames, pfn):
            return
        if vma in folio.vmas(memory, pfn) and _drop_clean_runs(memory, vma, pfn):
            return
        rest = folio.members(frames, pfn)
        if not rest.size:
            return
        pfn = int(rest[0])


def _drop_clean_runs(memory: Memory, vma: Vma, pfn: int) -> bool:
    """Unmap what the VMA maps of the folio; true if something stays, and with it the rest of the folio."""
    frames, gather = memory.frames, Gather(memory)
    for base, ptes in list(folio.spans(memory, vma, pfn)):
        ours = folio.mapped(frames, ptes, pfn)
        if not ours.any():
            continue
        vma.mm.pgtable.leaves[base >> LEAF_SHIFT].huge = False
        writable = ptes & np.uint64(PTE_WRITE) != 0
        edges = np.flatnonzero((ours[1:] != ours[:-1]) | (writable[1:] != writable[:-1])) + 1
        for first, last in pairwise([0, *edges.tolist(), len(ptes)]):
            if not ours[first]:
                continue
            pfn = int(ptes[first]) >> PFN_SHIFT
            if (ptes[first:last] & np.uint64(PTE_DIRTY)).any():
                folio.set_flags(frames, pfn, on=DIRTY)
            if frames.flags_at[pfn] & DIRTY:
                folio.set_flags(frames, pfn, on=SWAPBACKED | ACTIVE)
                return True
            if folio.is_held(frames, pfn) or (frames.flags[folio.members(frames, pfn)] & EXTERNAL).any():
                folio.set_flags(frames, pfn, on=ACTIVE)
                return True
            zap_range(vma.mm, vma, base + first << PAGE_SHIFT, base + last << PAGE_SHIFT, gather)
            gather.free()
    return False
