"""Has anyone used these pages? The CPU's marks and every driver's answer, along the reverse map. Kernel: mm/rmap.c."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.file import File
from mmubusd.mm.frame import ANON, CACHE
from mmubusd.mm.notification import AgePage, Operation
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, NUMA_HINT, PFN_SHIFT, PRESENT
from mmubusd.mm.rmap import RmapList
from mmubusd.mm.rmap_walk import mapped_at
from mmubusd.mm.vma import Vma

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

MESSAGE_PAGES = 64
"""So many pages of an address space are asked about in one message, if there are as many."""


def folio_of(memory: Memory, pfn: int) -> tuple[int, int, RmapList | None]:
    """The folio's indexes and the list of VMAs in which it can be."""
    frames = memory.frames
    index, mapping = frames.index_at[pfn], frames.mapping_at[pfn]
    if frames.flags_at[pfn] & ANON:
        anon_vma = memory.anon_vmas.get(mapping)
        return index, index + 1, anon_vma.rmap if anon_vma is not None else None
    file = memory.files_by_mapping.get(mapping)
    if file is None or not frames.flags_at[pfn] & CACHE:
        return index, index + 1, None
    return *file.folio(index), file.rmap


def folio_places(memory: Memory, pfn: int) -> list[tuple[Vma, int]]:
    """Every (VMA, address) that maps a page of the folio which begins with this frame."""
    first, end, rmap = folio_of(memory, pfn)
    if rmap is None:
        return []
    file = memory.files_by_mapping.get(memory.frames.mapping_at[pfn]) if end - first > 1 else None
    return [
        (vma, vma.address_of(index))
        for vma in rmap.overlapping(first, end)
        for index in range(max(first, vma.pgoff), min(end, vma.pgoff + vma.pages))
        if maps_page(vma, index, file, pfn)
    ]


def maps_page(vma: Vma, index: int, file: File | None, pfn: int) -> bool:
    return mapped_at(vma, index, file.cache.get(index) if file is not None else pfn)


def page_referenced(memory: Memory, folios: list[int]) -> Operation[dict[int, int]]:
    """By how many mappings each folio was used since the last time; the marks are cleared.

    Everyone is asked, in one message for all pages of an address space. Kernel: folio_referenced().
    Returns: by the folio's first frame.
    """
    referenced = dict.fromkeys(folios, 0)
    asked: dict[Mm, dict[int, int]] = {}
    for pfn in folios:
        for vma, address in folio_places(memory, pfn):
            mm, vpn = vma.mm, address >> PAGE_SHIFT
            pte = mm.pgtable.get(vpn)
            if pte & ACCESSED:
                mm.pgtable.set(vpn, pte & ~ACCESSED)
                referenced[pfn] += 1
            if mm.notified:
                asked.setdefault(mm, {})[address] = pfn
    for mm, pages in asked.items():
        around = _look_around(mm, pages)
        for address in (yield AgePage(mm, (*pages, *around))).young:
            if address in pages:
                referenced[pages[address]] += 1
            else:
                _mark_accessed(mm, address)
    return referenced


def _look_around(mm: Mm, pages: Mapping[int, int]) -> list[int]:
    """Other pages to ask about in the same message, if there are few, so that a message is worth its round trip.

    Kernel: lru_gen_look_around(). Returns: addresses of mapped pages, from the asked ones on.
    """
    missing = MESSAGE_PAGES - len(pages)
    if missing <= 0:
        return []
    found: list[int] = []
    first = min(pages) >> PAGE_SHIFT + LEAF_SHIFT
    numbers = sorted(mm.pgtable.leaves)
    at = bisect_left(numbers, first)
    for number in numbers[at:] + numbers[:at]:
        ptes = mm.pgtable.leaves[number].ptes
        mapped = ((ptes & np.uint64(PRESENT) != 0) & (ptes >> np.uint64(PFN_SHIFT) != 0)).nonzero()[0]
        addresses = (((number << LEAF_SHIFT) + mapped) << PAGE_SHIFT).tolist()
        found += [address for address in addresses if address not in pages][: missing - len(found)]
        if len(found) == missing:
            break
    return found


def _mark_accessed(mm: Mm, address: int) -> None:
    """A driver has used the page: its mark is kept in the PTE, for whoever looks at it next."""
    pte = mm.pgtable.get(address >> PAGE_SHIFT)
    if pte & (PRESENT | NUMA_HINT) == PRESENT:
        mm.pgtable.set(address >> PAGE_SHIFT, pte | ACCESSED)
