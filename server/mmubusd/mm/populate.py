"""Populating: faulting in a whole range at once.

A leaf of private memory that has no page yet is filled with a few array operations; everything else is page by page.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import huge_memory
from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE
from mmubusd.mm.anon import NEW_ANON, prepare_anon_vma
from mmubusd.mm.errno import MmError
from mmubusd.mm.fault import continue_fault, fault_page
from mmubusd.mm.frame import REFERENCED
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.notification import RESCHEDULE, SLICE_LEAVES, SLICE_PAGES, Operation
from mmubusd.mm.pgtable import DIRTY, LEAF_MASK, LEAF_SHIFT, NEW_PTE, PFN_SHIFT, PRESENT, PUD_SHIFT, WRITE, ZERO_PTE
from mmubusd.mm.vma import VM_ACCESS_FLAGS, VM_HUGETLB, VM_LOCKONFAULT, VM_SHARED, VM_UFFD_MISSING, VM_WRITE, Vma
from mmubusd.mm.zonelist import nodes_for, room, takes_turns

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def populate_page(mm: Mm, vma: Vma, vpn: int, write: bool) -> Operation[Vma]:
    """Fault one page in as get_user_pages(FOLL_TOUCH) does.

    Returns: the VMA that has the page now: while it waited a neighbour may have merged with vma.
    Raises: MmError ENXIO, ENOMEM.
    """
    memory = mm.memory
    pte = mm.pgtable.get(vpn)
    if not pte & PRESENT or (write and not pte & WRITE):
        while not fault_page(mm, vma, vpn, write):
            yield from continue_fault(mm, vpn)
            again = mm.vmas.find(vpn << PAGE_SHIFT)
            if again is None:
                raise MmError("EFAULT", f"nothing is mapped at {vpn << PAGE_SHIFT:#x} any more")
            vma = again
        pte = mm.pgtable.get(vpn)
    pfn = pte >> PFN_SHIFT
    if pfn and not mm.pgtable.leaves[vpn >> LEAF_SHIFT].huge:
        if write and not pte & DIRTY:
            memory.frames.set_dirty(pfn)
        memory.lru.mark_accessed(pfn)
    return vma


def _fill_leaf(mm: Mm, vma: Vma, vpn: int, end_vpn: int, write: bool) -> bool:
    """Fill [vpn, end_vpn), part of one leaf, if it is private memory without any page yet; whether it was."""
    if vpn >> LEAF_SHIFT not in mm.pgtable.leaves:
        mm.pgtable.check_room()
    ptes = mm.pgtable.leaf(vpn).ptes[vpn & LEAF_MASK : (vpn & LEAF_MASK) + end_vpn - vpn]
    first = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    if ptes.any() or (write and takes_turns(vma, first)):
        return False
    mm.pgtable.puds.add(vpn >> PUD_SHIFT)
    if not write:
        ptes[:] = ZERO_PTE
        return True
    memory, count = mm.memory, end_vpn - vpn
    anon_vma = vma.anon_vma or prepare_anon_vma(vma)
    indexes, nodes = np.arange(first, first + count), nodes_for(vma, first)
    pfns = memory.frames.alloc_many(count, NEW_ANON | REFERENCED, anon_vma.id, indexes, nodes, mm.memcg)
    memory.frames.mapcount[pfns] = 1
    memory.lru.add_many(pfns)
    ptes[:] = pfns.view(np.uint64) << np.uint64(PFN_SHIFT) | np.uint64(NEW_PTE)
    return True


def _may_have_leaf(mm: Mm) -> bool:
    """Whether who pays may have a whole leaf of pages more, and the table."""
    return mm.memcg is None or mm.memcg.room > PTRS_PER_TABLE


def populate_vma(mm: Mm, vma: Vma, start: int, end: int, write: bool) -> Operation[None]:
    """Populate [start, end) of a VMA under its range lock. Raises: as populate_page; the pages before stay."""
    vpn, last, done = start >> PAGE_SHIFT, end >> PAGE_SHIFT, 0
    while vpn < last:
        if done >= SLICE_PAGES:
            done = 0
            yield RESCHEDULE
            again = mm.vmas.find(vpn << PAGE_SHIFT)
            if again is None:
                return
            vma = again
        table_end = min(last, (vpn | LEAF_MASK) + 1)
        if vma.flags & VM_HUGETLB:
            vma = yield from populate_page(mm, vma, vpn, write)
            vpn = table_end
            done += SLICE_PAGES // SLICE_LEAVES
            continue
        supplied = vma.flags & VM_UFFD_MISSING != 0
        if not supplied and mm.thp is not Thp.NEVER and huge_memory.populate(mm, vma, vpn, write):
            vpn = table_end
            done += SLICE_PAGES // SLICE_LEAVES
            continue
        roomy = table_end - vpn > 1 and room(vma, vpn << PAGE_SHIFT) >= PTRS_PER_TABLE and _may_have_leaf(mm)
        own = vma.file is None and not supplied
        if own and roomy and _fill_leaf(mm, vma, vpn, table_end, write):
            vpn = table_end
            done += SLICE_PAGES // SLICE_LEAVES
            continue
        for page in range(vpn, table_end):
            vma = yield from populate_page(mm, vma, page, write)
        done += table_end - vpn
        vpn = table_end


def populate(mm: Mm, start: int, end: int) -> Operation[None]:
    """Populate whatever is mapped in [start, end), as MAP_POPULATE and mlock do: writable private memory by writing.

    A mapping ends where it cannot be populated. Kernel: mm_populate(). Requires: the range lock is held.
    """
    accessible = False
    at = start
    mm.memory.finish_reads()
    while at < end and (vma := mm.vmas.find_from(at)) is not None and vma.start < end:
        begin, at = max(start, vma.start), min(end, vma.end)
        if not vma.flags & VM_ACCESS_FLAGS or vma.flags & VM_LOCKONFAULT:
            continue
        accessible = True
        with suppress(MmError):
            yield from populate_vma(mm, vma, begin, at, vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE)
    if accessible:
        mm.memory.lru.drain()
