"""Faults in hugetlb memory: a page out of the pool, the file's page, a copy of what others have too.

A parent that writes to a page it shares with a child takes no reserved page for the copy. If there is no other, the
child loses the page (its next access is SIGBUS), and the parent goes on with it: who reserved can rely on that.

Kernel: mm/hugetlb.c, v6.12 to v6.18: hugetlb_fault(), hugetlb_no_page(), hugetlb_wp(), unmap_ref_private().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import PMD_SIZE
from mmubusd.mm.anon import prepare_anon_vma
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, CACHE, EXCLUSIVE, HWPOISON
from mmubusd.mm.free_frames import BLOCK_FRAMES
from mmubusd.mm.hugetlb import NewPage, OutOfHugePages
from mmubusd.mm.hugetlb_pool import Reservation
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, NEW_PTE, PRESENT, UFFD_WP, WRITE, WRITTEN_PTE, Leaf
from mmubusd.mm.vma import VM_WRITE, Vma
from mmubusd.mm.zap import Gather, evict_exports

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def fault(mm: Mm, vma: Vma, address: int, write: bool) -> bool:
    """Map a page where there is none. Kernel: hugetlb_no_page().

    Returns: whether the access can be made; if not, copy_on_write() is due.
    Raises: MmError ENXIO (SIGBUS): behind the file's end, no page, or the page was taken away for the parent.
    """
    file, frames, block = vma.file, mm.memory.frames, address & -PMD_SIZE
    assert file is not None, "hugetlb memory is a file's"
    if vma.reservation is not None and not vma.reservation.owner:
        raise MmError("ENXIO", f"the page at {block:#x} was taken away for the process that this one was forked from")
    number = hugetlb.number_of(vma, block)
    first = file.cache.get(number << LEAF_SHIFT)
    if frames.flags_at[first] & HWPOISON:
        raise MmError("ENXIO", f"huge page {number} of file {file.id} is lost: it has failed")
    if not first:
        if number << LEAF_SHIFT >= file.pages:
            raise MmError("ENXIO", f"huge page {number} of file {file.id} is past its end ({file.size} bytes)")
        if not vma.shared:
            prepare_anon_vma(vma)
            page = NewPage(vma, number)
            hugetlb.become_anon(vma, page, number)
            hugetlb.set_page(mm, block, page.first, NEW_PTE if write else PRESENT | ACCESSED)
            return True
        page = NewPage(vma, number)
        hugetlb.become_cached(vma, page, number)
        first = page.first
    frames.refcount[first : first + BLOCK_FRAMES] += 1
    frames.mapcount[first : first + BLOCK_FRAMES] += 1
    writable = vma.shared and vma.flags & VM_WRITE
    hugetlb.set_page(mm, block, first, NEW_PTE if writable else PRESENT | ACCESSED)
    return bool(writable) or not write


def write_protected(mm: Mm, vma: Vma, leaf: Leaf) -> bool:
    """A write to a page that is mapped read-only. Returns: whether it can be made; if not, copy_on_write() is due."""
    if vma.shared or _take_over(mm, vma, hugetlb.first_frame(leaf)):
        leaf.ptes |= np.uint64(WRITE | WRITTEN_PTE)
        return True
    return False


def _take_over(mm: Mm, vma: Vma, first: int) -> bool:
    """Whether nobody but this mapping has the page; then it is ours alone. Held pages count as well: a copy for the
    sake of a passing reference could fail.
    """
    frames, pages = mm.memory.frames, slice(first, first + BLOCK_FRAMES)
    if not frames.flags_at[first] & ANON or frames.mapcount_at[first] != 1:
        return False
    if not frames.flags_at[first] & EXCLUSIVE:
        assert vma.anon_vma is not None, "a VMA with own pages has an anon_vma"
        frames.mapping[pages] = vma.anon_vma.id
        frames.flags[pages] |= np.uint32(EXCLUSIVE)
    return True


def copy_on_write(mm: Mm, vma: Vma, address: int) -> Operation[None]:
    """Copy the page at the address, which others have too or which is the file's. The access is to be tried again.

    Requires: the page's range lock is held. Kernel: hugetlb_wp(). Raises: MmError ENXIO: there is no page for it.
    """
    block = address & -PMD_SIZE
    leaf = mm.pgtable.leaves[block // PMD_SIZE]
    old = hugetlb.first_frame(leaf)
    if _take_over(mm, vma, old):
        return
    frames, number = mm.memory.frames, hugetlb.number_of(vma, block)
    anon = frames.flags_at[old] & ANON != 0
    owner = vma.reservation is not None and vma.reservation.owner and anon
    try:
        page = NewPage(vma, number, unreserved=owner)
    except OutOfHugePages:
        if not owner or not (yield from _take_from_children(vma, number, old)):
            raise
        return
    prepare_anon_vma(vma)  # as in the kernel only now: a mapping whose first copy fails has none
    frames.refcount[old : old + BLOCK_FRAMES] += 1
    used = False
    try:
        if mm.notified:
            yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)
        again = mm.vmas.find(block)
        if again is None or mm.pgtable.leaves.get(block // PMD_SIZE) is not leaf or hugetlb.first_frame(leaf) != old:
            return
        _replace(mm, again, block, old, page)
        used = True
        yield from _evict_unmapped(mm.memory, old)
    finally:
        frames.put_many(np.arange(old, old + BLOCK_FRAMES))
        if not used:
            page.give_back()


def _replace(mm: Mm, vma: Vma, block: int, old: int, page: NewPage) -> None:
    frames, leaf = mm.memory.frames, mm.pgtable.leaves[block // PMD_SIZE]
    hugetlb.copy_bytes(mm, old, page)
    hugetlb.become_anon(vma, page, hugetlb.number_of(vma, block))
    flags = NEW_PTE if vma.flags & VM_WRITE else NEW_PTE & ~WRITE
    hugetlb.set_page(mm, block, page.first, flags | leaf.at[0] & UFFD_WP)
    frames.mapcount[old : old + BLOCK_FRAMES] -= 1
    frames.put_many(np.arange(old, old + BLOCK_FRAMES))


def _evict_unmapped(memory: Memory, first: int) -> Operation[None]:
    """Exporters of a page that nothing maps or caches any more let go of it."""
    frames = memory.frames
    if frames.exports and frames.mapcount_at[first] == 0 and not frames.flags_at[first] & CACHE:
        yield from evict_exports(memory, list(range(first, first + BLOCK_FRAMES)))


def _take_from_children(vma: Vma, number: int, first: int) -> Operation[bool]:
    """Unmap the page wherever it is mapped without a reservation. Returns: whether it was anywhere.

    Kernel: unmap_ref_private().
    """
    file, found, index = vma.file, False, number << LEAF_SHIFT
    assert file is not None
    for other in file.rmap.overlapping(index, index + 1):
        reserved = other.reservation is not None and other.reservation.owner
        if other is vma or other.shared or reserved or other not in file.rmap:
            continue
        mm, block, gather = other.mm, other.address_of(index), Gather(vma.mm.memory)
        leaf = mm.pgtable.leaves.get(block // PMD_SIZE)
        if leaf is not None and leaf.huge and hugetlb.first_frame(leaf) == first:
            hugetlb.drop(mm, block, gather)
            other.reservation = Reservation(owner=False)
            found = True
        if mm.notified:
            gather.quarantine()
            yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)
        yield from gather.finish()
    return found
