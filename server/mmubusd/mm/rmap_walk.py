"""Walks along the reverse map that tell everyone who maps a page.

They take no range lock, so between telling and changing anyone may fault the page in again, and a device with him. So a
walk changes first and tells then, and when it goes on it takes nothing for granted: a page that is mapped again is
unmapped again, or left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.file import File
from mmubusd.mm.huge_memory import tell_blocks
from mmubusd.mm.notification import InvalidatePage, InvalidateRange, Operation, Reason
from mmubusd.mm.swapops import maps
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import Gather, evict_exports, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

Place = tuple["Mm", int, int]
"""An address space and a range in it, [start, end) bytes."""


def tell(places: list[Place], reason: Reason) -> Operation[None]:
    """Yield what the notified address spaces must hear: single pages of one mm in one batch, in their order."""
    by_mm: dict[Mm, list[tuple[int, int]]] = {}
    for mm, start, end in places:
        if mm.notified:
            by_mm.setdefault(mm, []).append((start, end))
    for mm, ranges in by_mm.items():
        batch: list[int] = []
        for start, end in ranges:
            if end - start == PAGE_SIZE:
                batch.append(start)
                continue
            if batch:
                yield InvalidatePage(mm, tuple(batch), reason)
                batch = []
            yield InvalidateRange(mm, start, end, reason)
        if batch:
            yield InvalidatePage(mm, tuple(batch), reason)


def unmap_mapping_range(file: File, first: int, last: int, file_only: bool = False) -> Operation[None]:
    """Clear the PTEs of the pages [first, last) in every VMA of the file. Kernel: unmap_mapping_range().

    Args: file_only: private copies stay, though they are told of.
    """
    for vma in file.rmap.overlapping(first, last):
        if vma.file is file and vma in file.rmap:
            yield from _unmap_in(vma, first, last, file_only)


def unmap_folio(file: File, first: int, end: int) -> Operation[None]:
    """Clear every PTE that maps a page of the folio [first, end). Kernel: try_to_unmap() of one folio.

    The walk ends as soon as nobody maps it, so the first VMA is told in any case.
    """
    again = True
    while again:
        for vma in file.rmap.overlapping(first, end):
            if vma in file.rmap:
                yield from _unmap_in(vma, first, end, True)
            if not file.folio_mapcount(first, end):
                return
        again = file.folio_mapcount(first, end) > 0


def _unmap_in(vma: Vma, first: int, last: int, file_only: bool) -> Operation[None]:
    mm = vma.mm
    start, end = vma.overlap(first, last)
    if start >= end:
        return
    gather = Gather(mm.memory)
    zap_range(mm, vma, start, end, gather, file_only)
    if mm.notified:
        gather.quarantine()
        blocks, mm.split_blocks = mm.split_blocks, []
        # The seed's zap_page_range() was called under i_mmap_lock here, and said so.
        yield InvalidateRange(mm, start, end, Reason.CLEAR, lock=mm.memory.profile == "v3")
        yield from tell_blocks(mm, blocks)
    yield from gather.finish()


def drop_folios(file: File, first: int, last: int) -> Operation[None]:
    """Take the folios that lie wholly in [first, last) out of the cache, unmapping what still maps them."""
    for index, _ in list(file.cache.items(first, last)):
        if file.cache.get(index):
            folio, end = file.folio(index)
            if folio == index and end <= last:
                yield from drop_folio(file, folio, end)


def drop_folio(file: File, first: int, end: int) -> Operation[None]:
    """Take a folio out of the cache, after the last mapping of it, for which there may be new ones while we wait."""
    frames = file.memory.frames
    while True:  # a fault may map it again while exporters are asked, and an export may be given while it is unmapped
        if file.folio_mapcount(first, end):
            yield from unmap_folio(file, first, end)
            continue
        exported = [pfn for index in range(first, end) if (pfn := file.cache.get(index)) in frames.exports]
        if not exported:
            break
        yield from evict_exports(file.memory, exported)
    for index in range(first, end):
        if file.cache.get(index):
            file.delete(index)


def mapped_at(vma: Vma, index: int, pfn: int) -> bool:
    """Whether the VMA maps this frame at its place for the index."""
    return maps(vma.mm.pgtable.get(vma.address_of(index) >> PAGE_SHIFT), pfn)
