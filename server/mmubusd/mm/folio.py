"""Large folios of private memory: 512 frames allocated together, mapped together or page by page, and split at last.

A frame knows its folio by its flags (the order) and by its place: the aligned 512 frames around it that are of the same
order. A frame whose last mapping goes stays with its folio, see partially_mapped.

What belongs to the folio (dirty, swapbacked) is on all its frames alike; whose alone a page is (EXCLUSIVE), and under
pressure how young it is, is on each. A mapping by a PMD counts as one of every frame.

Kernel: include/linux/mm.h, mm/rmap.c, mm/huge_memory.c, v6.18.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE
from mmubusd.mm.frame import ANON, KEPT, LARGE, ORDER_MASK, FrameTable
from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT, Ptes
from mmubusd.mm.vma import Vma

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

FOLIO_PAGES = PTRS_PER_TABLE


def is_large(frames: FrameTable, pfn: int) -> bool:
    """Whether the frame is part of a large folio of private memory."""
    return frames.flags_at[pfn] & (ANON | ORDER_MASK) == LARGE


def head(pfn: int) -> int:
    """Where the folio of a frame begins, whether or not that frame is still part of it."""
    return pfn & -FOLIO_PAGES


def members(frames: FrameTable, pfn: int) -> Pfns:
    """The frames that are part of the folio, ascending: shape (n,), int64."""
    return frames.partial.members(head(pfn))


def set_flags(frames: FrameTable, pfn: int, *, on: int = 0, off: int = 0) -> None:
    """Change what belongs to the whole folio."""
    pfns = members(frames, pfn)
    frames.flags[pfns] = frames.flags[pfns] & np.uint32(~off & 0xFFFFFFFF) | np.uint32(on)


def mapcount(frames: FrameTable, pfn: int) -> int:
    """How many mappings of its pages there are; a PMD counts 512 times. Kernel: folio_large_mapcount(), else alike."""
    return int(frames.mapcount[members(frames, pfn)].sum())


def is_held(frames: FrameTable, pfn: int) -> bool:
    """Whether anyone has a reference beside the mappings: a pin, an open round. Exporters do not count: they are told
    when a frame goes.
    """
    pfns = members(frames, pfn)
    known = frames.mapcount[pfns] + (frames.flags[pfns] & KEPT != 0)
    beyond = frames.refcount[pfns] != known
    found = zip(pfns[beyond].tolist(), known[beyond].tolist(), strict=True)
    return any(frames.refcount_at[at] > nr + len(frames.exports.get(at, ())) for at, nr in found)


def index_of_head(frames: FrameTable, pfn: int) -> int:
    """The page offset at which the folio begins."""
    return frames.index_at[pfn] - (pfn - head(pfn))


def mapped(frames: FrameTable, ptes: Ptes, pfn: int) -> NDArray[np.bool_]:
    """Which of the entries map a page of the folio: shape as ptes."""
    inside = (ptes >> np.uint64(PFN_SHIFT)) - np.uint64(head(pfn)) < FOLIO_PAGES
    ours: NDArray[np.bool_] = inside & (ptes & np.uint64(PRESENT) != 0)
    flags = frames.flags[(ptes[ours] >> np.uint64(PFN_SHIFT)).view(np.int64)]
    ours[ours] = flags & np.uint32(ANON | ORDER_MASK) == LARGE
    return ours


def vmas(memory: Memory, pfn: int) -> list[Vma]:
    """The VMAs in which pages of the folio can be, in the order in which the reverse map is walked."""
    anon_vma = memory.anon_vmas.get(memory.frames.mapping_at[pfn])
    if anon_vma is None:
        return []
    first = index_of_head(memory.frames, pfn)
    return anon_vma.rmap.overlapping(first, first + FOLIO_PAGES)


def spans(memory: Memory, vma: Vma, pfn: int) -> Iterator[tuple[int, Ptes]]:
    """The page table entries at which the VMA may map pages of the folio, as PageTable.spans()."""
    first = index_of_head(memory.frames, pfn)
    start, end = vma.overlap(first, first + FOLIO_PAGES)
    return vma.mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT)


def mapcount_in(memory: Memory, vma: Vma, pfn: int) -> int:
    """How many of the VMA's entries map pages of the folio."""
    return sum(int(np.count_nonzero(mapped(memory.frames, ptes, pfn))) for _, ptes in spans(memory, vma, pfn))


def mapped_shared(mm: Mm, pfn: int) -> bool:
    """Whether others than mm map a page of the folio. Kernel: folio_maybe_mapped_shared(), exactly."""
    own = sum(mapcount_in(mm.memory, vma, pfn) for vma in vmas(mm.memory, pfn) if vma.mm is mm)
    return mapcount(mm.memory.frames, pfn) != own


def run(mm: Mm, vpn: int, last: int, pfn: int) -> int:
    """How many entries from vpn on, in its leaf table and before last, map the folio's pages in their order."""
    last = min(last, (vpn | FOLIO_PAGES - 1) + 1)
    _, ptes = next(mm.pgtable.spans(vpn, last))
    wanted = np.arange(pfn, pfn + last - vpn, dtype=np.uint64)
    same = (ptes >> np.uint64(PFN_SHIFT) == wanted) & mapped(mm.memory.frames, ptes, pfn)
    return int(same.argmin()) if not same.all() else last - vpn


def walk(memory: Memory, pfn: int) -> list[tuple[Vma, int, int]]:
    """Where the reverse map looks for the folio, up to its last mapping: whether or not a VMA maps any of it."""
    left, places = mapcount(memory.frames, pfn), []
    first = index_of_head(memory.frames, pfn)
    for vma in vmas(memory, pfn):
        places.append((vma, *vma.overlap(first, first + FOLIO_PAGES)))
        left -= mapcount_in(memory, vma, pfn)
        if left <= 0:
            break
    return places
