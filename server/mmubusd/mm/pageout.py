"""MADV_COLD and MADV_PAGEOUT: pages that will not be wanted soon. Kernel: mm/madvise.c, v6.18."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.file import File
from mmubusd.mm.folio_split import split
from mmubusd.mm.frame import ACTIVE, CACHE, DEVICE, REFERENCED
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import LEAF_MASK, LEAF_SHIFT, PFN_SHIFT, PRESENT
from mmubusd.mm.reclaim import Victim, reclaim
from mmubusd.mm.reclaim_large import reclaim_large
from mmubusd.mm.rmap_walk import mapped_at
from mmubusd.mm.swapops import maps
from mmubusd.mm.truncate import split_folio

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def age_range(mm: Mm, start: int, end: int, pageout: bool) -> Operation[None]:
    """MADV_COLD or, with pageout, MADV_PAGEOUT of [start, end), part of one VMA under its range lock."""
    memory = mm.memory
    memory.lru.drain()
    vpn, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    while vpn < last:
        leaf = mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
        table_end = min(last, (vpn | LEAF_MASK) + 1)
        if leaf is None:
            vpn = table_end
        elif leaf.huge:
            age = _age_huge_shared if mm.memory.frames.flags_at[leaf.at[0] >> PFN_SHIFT] & CACHE else _age_huge
            vpn += yield from age(mm, leaf.at[0] >> PFN_SHIFT, table_end - vpn, pageout)
        else:
            yield from _age_ptes(mm, vpn, table_end, pageout)
            vpn = table_end


def _age_huge(mm: Mm, pfn: int, count: int, pageout: bool) -> Operation[int]:
    """Count pages of what a PMD maps. Returns: how many pages to go on by; 0: they are small pages now."""
    memory = mm.memory
    if not pfn or folio.mapcount(memory.frames, pfn) != folio.FOLIO_PAGES:
        return count
    if count < folio.FOLIO_PAGES:
        return 0 if (yield from split(memory, pfn)) else count
    if pageout:
        yield from reclaim_large(memory, pfn)
    return count


def _age_huge_shared(mm: Mm, pfn: int, count: int, pageout: bool) -> Operation[int]:
    """As _age_huge, of shared memory. What has been split is mapped no longer."""
    memory = mm.memory
    frames = memory.frames
    file, first = memory.files_by_mapping[frames.mapping_at[pfn]], frames.index_at[pfn]
    if _others_map(mm, file, first, first + folio.FOLIO_PAGES):
        return count
    if count < folio.FOLIO_PAGES:
        return 0 if (yield from split_folio(file, first, None)) else count
    if pageout:
        yield from reclaim(memory, [(pfn, frames.generation_at[pfn])])
    return count


def _age_ptes(mm: Mm, vpn: int, last: int, pageout: bool) -> Operation[None]:
    """The pages [vpn, last) of one leaf table. Kernel: madvise_cold_or_pageout_pte_range()."""
    memory, victims = mm.memory, list[Victim]()
    while vpn < last:
        pte = mm.pgtable.get(vpn)
        pfn = pte >> PFN_SHIFT
        if not pte & PRESENT or not pfn or memory.frames.flags_at[pfn] & DEVICE:
            vpn += 1
        elif folio.is_large(memory.frames, pfn):
            vpn += yield from _take_large(mm, vpn, last, pfn, pageout)
        else:
            vpn += yield from _take(mm, vpn, last, pfn, pageout, victims)
    if victims:
        yield from reclaim(memory, victims)


def _take_large(mm: Mm, vpn: int, last: int, pfn: int, pageout: bool) -> Operation[int]:
    """As _take, for a page of a large folio of private memory: if the whole folio is here, it is all that is."""
    memory, frames = mm.memory, mm.memory.frames
    run = folio.run(mm, vpn, last, pfn)
    if run < folio.FOLIO_PAGES:
        if folio.mapped_shared(mm, pfn):
            return run
        return 0 if (yield from split(memory, pfn)) else run
    if folio.mapcount(frames, pfn) == run:
        folio.set_flags(frames, pfn, off=REFERENCED)
        if pageout:
            yield from reclaim_large(memory, pfn)
        else:
            folio.set_flags(frames, pfn, off=ACTIVE)
    return run


def _take(mm: Mm, vpn: int, last: int, pfn: int, pageout: bool, victims: list[Victim]) -> Operation[int]:
    """Look at the page at vpn, and its folio: it becomes colder, or a victim. Returns: how many pages to go on by."""
    memory, frames = mm.memory, mm.memory.frames
    file = memory.files_by_mapping.get(frames.mapping_at[pfn]) if frames.flags_at[pfn] & CACHE else None
    pages, mapcount = 1, frames.mapcount_at[pfn]
    if file is not None and file.kind == "xip":
        return 1  # the medium itself, of which there is no other copy
    if file is not None:
        index = frames.index_at[pfn]
        first, folio_end = file.folio(index)
        pages, mapcount = folio_end - first, file.folio_mapcount(first, folio_end)
        if pages > 1:
            run = _run(mm, vpn, min(last, vpn + folio_end - index), file, index)
            if run < pages:
                if _others_map(mm, file, first, folio_end):
                    return 1
                return 0 if (yield from split_folio(file, first, None)) else run
        pfn = file.cache.get(first)
    if mapcount != pages:
        return pages
    frames.flags_at[pfn] &= ~REFERENCED
    if pageout:
        victims.append((pfn, frames.generation_at[pfn]))
    else:
        memory.lru.deactivate(pfn)
    return pages


def _run(mm: Mm, vpn: int, last: int, file: File, index: int) -> int:
    """How many consecutive PTEs from here on map consecutive pages of the folio."""
    count = 0
    while vpn + count < last and maps(mm.pgtable.get(vpn + count), file.cache.get(index + count)):
        count += 1
    return count


def _others_map(mm: Mm, file: File, first: int, end: int) -> bool:
    """Whether another address space maps the folio. Kernel: folio_maybe_mapped_shared()."""
    return any(
        mapped_at(vma, index, file.cache.get(index))
        for vma in file.rmap.overlapping(first, end)
        if vma.mm is not mm
        for index in range(max(first, vma.pgoff), min(end, vma.pgoff + vma.pages))
    )
