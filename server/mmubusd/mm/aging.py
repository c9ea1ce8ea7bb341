"""Has anyone used these pages? The CPU's marks and every driver's answer, along the reverse map.

A folio is as young as its youngest page. Where a PMD maps it, its one mark is looked at, and a driver is asked about
the block as a range. Kernel: folio_referenced(), mm/rmap.c, v6.18.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE, PTRS_PER_TABLE
from mmubusd.mm.file import File
from mmubusd.mm.frame import ANON, CACHE, ORDER_MASK
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


def mappings(memory: Memory, pfn: int) -> list[tuple[Vma, int, bool]]:
    """Every (VMA, address, by a PMD) at which the folio that begins with this frame is mapped."""
    if not memory.frames.flags_at[pfn] & ORDER_MASK:
        return [(vma, address, False) for vma, address in folio_places(memory, pfn)]
    first, pfns, rmap = _large(memory, pfn)
    found: list[tuple[Vma, int, bool]] = []
    for vma in rmap.overlapping(first, first + len(pfns)) if rmap is not None else ():
        start, end = vma.overlap(first, first + len(pfns))
        for base, ptes in vma.mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            index = vma.linear_index(base << PAGE_SHIFT) - first
            same = ptes >> np.uint64(PFN_SHIFT) == pfns[index : index + len(ptes)]
            ours = (same & (ptes & np.uint64(PRESENT) != 0)).nonzero()[0].tolist()
            if ours and vma.mm.pgtable.leaves[base >> LEAF_SHIFT].huge:
                found.append((vma, base << PAGE_SHIFT & -PMD_SIZE, True))
            else:
                found += [(vma, base + at << PAGE_SHIFT, False) for at in ours]
    return found


def _large(memory: Memory, pfn: int) -> tuple[int, NDArray[np.uint64], RmapList | None]:
    """A large folio's first index, its frames, and the list of VMAs in which it can be."""
    frames = memory.frames
    if folio.is_large(frames, pfn):
        head, anon_vma = folio.head(pfn), memory.anon_vmas.get(frames.mapping_at[pfn])
        pfns = np.arange(head, head + folio.FOLIO_PAGES, dtype=np.uint64)
        return folio.index_of_head(frames, pfn), pfns, anon_vma.rmap if anon_vma is not None else None
    file = memory.files_by_mapping[frames.mapping_at[pfn]]
    first, end = file.folio(frames.index_at[pfn])
    return first, file.cache.window(first, end).astype(np.uint64), file.rmap


class _Asked:
    """What an address space is asked about: pages and huge pages by their addresses, with their folios."""

    __slots__ = ("huge", "pages")

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}
        self.huge: dict[int, int] = {}


def page_referenced(memory: Memory, folios: list[int]) -> Operation[dict[int, int]]:
    """By how many mappings each folio was used since the last time; the marks are cleared.

    Everyone is asked, in one message for all pages of an address space. Kernel: folio_referenced().
    Returns: by the folio's first frame.
    """
    referenced = dict.fromkeys(folios, 0)
    asked: dict[Mm, _Asked] = {}
    for pfn in folios:
        for vma, address, huge in mappings(memory, pfn):
            referenced[pfn] += _clear_accessed(vma.mm, address, huge)
            if vma.mm.notified:
                about = asked.setdefault(vma.mm, _Asked())
                (about.huge if huge else about.pages)[address] = pfn
    for mm, about in asked.items():
        around = _look_around(mm, about)
        for address in (yield AgePage(mm, (*about.pages, *around), tuple(about.huge))).young:
            found = about.huge.get(address, about.pages.get(address))
            if found is not None:
                referenced[found] += 1
            else:
                _mark_accessed(mm, address)
    return referenced


def _clear_accessed(mm: Mm, address: int, huge: bool) -> bool:
    """Clear the mark of a page, or of a PMD. Returns: whether there was one."""
    vpn = address >> PAGE_SHIFT
    if huge:
        ptes = mm.pgtable.leaf(vpn).ptes
        marked = bool((ptes & np.uint64(ACCESSED)).any())
        if marked:
            ptes &= ~np.uint64(ACCESSED)
        return marked
    pte = mm.pgtable.get(vpn)
    if pte & ACCESSED:
        mm.pgtable.set(vpn, pte & ~ACCESSED)
    return pte & ACCESSED != 0


def _look_around(mm: Mm, about: _Asked) -> list[int]:
    """Other pages to ask about in the same message, if there are few, so that a message is worth its round trip.

    Kernel: lru_gen_look_around(). Returns: addresses of mapped pages, from the asked ones on.
    """
    pages = about.pages
    missing = MESSAGE_PAGES - len(pages) - len(about.huge) * PTRS_PER_TABLE
    if missing <= 0:
        return []
    found: list[int] = []
    first = min(pages) >> PAGE_SHIFT + LEAF_SHIFT
    numbers = sorted(mm.pgtable.leaves)
    at = bisect_left(numbers, first)
    for number in numbers[at:] + numbers[:at]:
        if mm.pgtable.leaves[number].huge:
            continue
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
