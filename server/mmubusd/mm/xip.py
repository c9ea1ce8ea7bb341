"""Execute-in-place files: the medium is memory, so its own frames are mapped, without a page cache in between.

A hole is mapped as the zero page, by reading, in shared mappings too. Whoever writes to a hole gets a new frame of the
medium for it; before that frame is visible, the zero page is unmapped at every place that shows the hole, since a
reader there would go on seeing zeros. (The seed's part 5: __xip_unmap, mm/filemap_xip.c of 2.6.24.)

The medium's frames are kept in the file's `cache` for want of another index; they are never clean or dirty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, pages
from mmubusd.mm.anon import new_anon_frame
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import CACHE
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pgtable import NEW_PTE, PFN_SHIFT, PRESENT, ZERO_PTE
from mmubusd.mm.rmap_walk import Place, drop_folios, tell, unmap_mapping_range
from mmubusd.mm.vma import VM_SHARED, VM_WRITE, Vma

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.mm import Mm


def fault(mm: Mm, vma: Vma, vpn: int, index: int, write: bool) -> bool:
    """Nothing is mapped at the page. Kernel: xip_file_fault(), v2.6.24.

    Returns: whether it is done; if not, fill_hole() is due first.
    Raises: MmError ENXIO.
    """
    file, frames = vma.file, mm.memory.frames
    assert file is not None
    if index >= file.pages:
        raise MmError("ENXIO", f"page {index} of file {file.id} is past its end ({file.size} bytes)")
    block = file.cache.get(index)
    if write and not vma.flags & VM_SHARED:
        pfn = new_anon_frame(mm, vma, vpn)
        if block:
            frames.copy(block, pfn)
        mm.pgtable.set(vpn, pfn << PFN_SHIFT | NEW_PTE)
        return True
    if not block:
        if write:
            return False
        mm.pgtable.set(vpn, ZERO_PTE)
        return True
    frames.refcount_at[block] += 1
    frames.mapcount_at[block] += 1
    writable = vma.flags & VM_SHARED and vma.flags & VM_WRITE
    mm.pgtable.set(vpn, block << PFN_SHIFT | (NEW_PTE if writable else ZERO_PTE))
    return True


def write_protected(mm: Mm, vma: Vma, vpn: int, index: int, pte: int) -> bool:
    """A shared mapping shows the page read-only: the zero page of a hole, or a block after a change of protection."""
    if not pte >> PFN_SHIFT:
        return False
    mm.pgtable.set(vpn, pte | NEW_PTE)
    return True


def fill_hole(file: File, index: int, grow: bool = False) -> Operation[None]:
    """Give the hole a frame: first the zero page goes from every place that shows it.

    The access is to be tried again afterwards. Args: grow: also beyond the end of the file.
    """
    frames = file.memory.frames
    while places := _zero_places(file, index):  # whoever reads meanwhile maps the zero page again
        for mm, start, _ in places:
            mm.pgtable.set(start >> PAGE_SHIFT, 0)
        yield from tell(places, Reason.CLEAR)
    if not file.cache.get(index) and file.memory.room(file.memcg) > 0 and (grow or index < file.pages):
        file.cache.set(index, frames.alloc(CACHE, file.id, index, memcg=file.memcg))


def _zero_places(file: File, index: int) -> list[Place]:
    """Where the hole is shown as the zero page. Kernel: __xip_unmap()."""
    if file.cache.get(index):
        return []
    places: list[Place] = []
    for vma in file.rmap.overlapping(index, index + 1):
        address = vma.address_of(index)
        pte = vma.mm.pgtable.get(address >> PAGE_SHIFT)
        if pte & PRESENT and not pte >> PFN_SHIFT:
            places.append((vma.mm, address, address + PAGE_SIZE))
    return places


def truncate(file: File, size: int) -> Operation[None]:
    """Set the size; what lies beyond goes from every mapping and from the medium."""
    file.size = size
    yield from unmap_mapping_range(file, pages(size), 1 << 32)
    yield from drop_folios(file, pages(size), 1 << 32)
    if size % PAGE_SIZE:
        file.zero(size, pages(size) << PAGE_SHIFT)


def punch(file: File, start: int, end: int) -> Operation[None]:
    """Make a hole: whole pages go from every mapping and from the medium, the rest is zeroed."""
    first, last = pages(start), end >> PAGE_SHIFT
    for page in range(start >> PAGE_SHIFT, pages(end)):
        if not first <= page < last:
            file.zero(max(start, page << PAGE_SHIFT), min(end, (page + 1) << PAGE_SHIFT))
    if first < last:
        yield from unmap_mapping_range(file, first, last, file_only=True)
        yield from drop_folios(file, first, last)
