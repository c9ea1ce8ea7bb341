"""Huge pages of shared memory: a large folio in the cache that a PMD maps wherever it fits.

Two make them: collapse_file, and whoever is the first to want a page of a block, where the setting allows it. What is
there is mapped by a PMD at the next fault in a block that has no table. Such a PMD is never turned into a table: what
splits it drops the whole mapping, and faults bring back what is wanted.

A fault makes a huge page or a small one; a write to a file of tmpfs also takes the sizes between, where a huge one has
no room. Kernel: shmem_get_folio_gfp(), mm/shmem.c; do_set_pmd(), mm/memory.c, v6.18.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, PTRS_PER_TABLE, pages
from mmubusd.mm.frame import CACHE, ORDER_MASK, ORDER_SHIFT, SWAPBACKED
from mmubusd.mm.free_frames import BLOCK_ORDER
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, PFN_SHIFT, PRESENT, WRITE
from mmubusd.mm.vma import VM_HUGEPAGE, VM_NOHUGEPAGE, VM_SHARED, VM_WRITE, Vma
from mmubusd.mm.zonelist import nodes_for

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.mm import Mm

HUGE_CACHE = CACHE | BLOCK_ORDER << ORDER_SHIFT
PMD_ORDERS = 1 << BLOCK_ORDER
ALL_ORDERS = (2 << BLOCK_ORDER) - 2
"""Sets of orders, a bit each: that of a huge page; all but a single page's."""


class ShmemHuge(StrEnum):
    """For which shared memory the first who wants a page gets a huge one.

    Linux: transparent_hugepage/shmem_enabled, and the option huge= of a tmpfs mount, which has not the last two.
    """

    NEVER = "never"
    ADVISE = "advise"  # where MADV_HUGEPAGE asks for it
    WITHIN_SIZE = "within_size"  # likewise, and where the file does not end before the huge page
    ALWAYS = "always"
    DENY = "deny"  # none, whatever the mounts say
    FORCE = "force"  # all, whatever the mounts say


def add_folio(file: File, index: int, vma: Vma | None, write_end: int = 0) -> bool:
    """A page of shared memory is wanted that is not there: take a large folio of zeros around it into the cache.

    Kernel: shmem_alloc_and_add_folio(). Args: vma: where the fault was; write_end: up to where a write goes, in bytes.
    Returns: whether there is one now; if not, a small page is due.
    """
    orders = _allowable_orders(file, index, vma, write_end)
    for order in range(BLOCK_ORDER, 0, -1):
        first = index & -(1 << order)
        if not orders >> order & 1 or (vma is not None and not _fits(vma, index, order)) or _in_use(file, first, order):
            continue
        nodes = nodes_for(vma, first, order) if vma is not None else None
        if order < BLOCK_ORDER:
            if file.memory.room(file.memcg, nodes) > 1 << order:
                file.add(first, order, nodes=nodes)
                return True
        elif new := file.memory.frames.alloc_block(nodes, file.memcg):
            become_cached(file, first, new)
            return True
    return False


def _allowable_orders(file: File, index: int, vma: Vma | None, write_end: int) -> int:
    """The sizes that settings and advice allow. Kernel: shmem_allowable_huge_orders()."""
    machine, flags = file.memory.shmem_enabled, vma.flags if vma is not None else 0
    if machine is ShmemHuge.DENY or flags & VM_NOHUGEPAGE or (vma is not None and vma.mm.thp_disabled):
        return 0
    if machine is ShmemHuge.FORCE:
        return PMD_ORDERS
    huge = machine if file.anonymous else file.memory.tmpfs_huge
    orders = PMD_ORDERS if vma is not None else ALL_ORDERS
    if huge is ShmemHuge.NEVER:
        return 0
    if huge is ShmemHuge.ALWAYS or flags & VM_HUGEPAGE:
        return orders
    return _within_size(orders, index, max(file.pages, pages(write_end))) if huge is ShmemHuge.WITHIN_SIZE else 0


def _within_size(orders: int, index: int, file_pages: int) -> int:
    """From the largest order on whose folio does not reach beyond the file. Kernel: shmem_get_orders_within_size()."""
    while orders and (index | (1 << orders.bit_length() - 1) - 1) >= file_pages:
        orders &= (1 << orders.bit_length() - 1) - 1
    return orders


def _fits(vma: Vma, index: int, order: int) -> bool:
    """Whether the folio would lie in the VMA, as aligned as in the file. Kernel: thp_vma_suitable_order()."""
    start, size = vma.address_of(index) & -(PAGE_SIZE << order), PAGE_SIZE << order
    aligned = (vma.pgoff - (vma.start >> PAGE_SHIFT)) % (1 << order) == 0
    return aligned and vma.start <= start and start + size <= vma.end


def _in_use(file: File, first: int, order: int) -> bool:
    """Whether a page of the folio's place is cached or in swap. Kernel: shmem_suitable_orders()."""
    end = first + (1 << order)
    return bool(file.cache.window(first, end).any()) or any(first <= index < end for index in file.swapped)


def become_cached(file: File, first: int, new: int) -> None:
    """The frames of alloc_block() become the large folio that begins at index first, clean and mapped by nobody."""
    frames, pfns = file.memory.frames, np.arange(new, new + PTRS_PER_TABLE)
    frames.flags[pfns] |= np.uint32(HUGE_CACHE | SWAPBACKED)
    frames.mapping[pfns] = file.id
    frames.index[pfns] = np.arange(first, first + PTRS_PER_TABLE, dtype=np.uint64)
    file.cache.set_many(first, pfns)
    file.memory.lru.add_large(new)


def folio_at(file: File, first: int) -> int:
    """The first frame of the large folio of 512 pages that begins at this index, in a row; 0: there is none."""
    pfn = file.cache.get(first)
    if not pfn or file.memory.frames.flags_at[pfn] & (CACHE | ORDER_MASK) != HUGE_CACHE or pfn % PTRS_PER_TABLE:
        return 0
    window = file.cache.window(first, first + PTRS_PER_TABLE)
    return pfn if (window == np.arange(pfn, pfn + PTRS_PER_TABLE, dtype=np.uint32)).all() else 0


def suitable(mm: Mm, vma: Vma, block: int) -> bool:
    """Whether a PMD may map the block at this address. Kernel: thp_vma_suitable_order(), vma_thp_disabled()."""
    if mm.thp_disabled or vma.flags & VM_NOHUGEPAGE or vma.file is None or vma.file.kind != "shm":
        return False
    fits = vma.start <= block and block + PMD_SIZE <= vma.end
    return fits and vma.linear_index(block) % PTRS_PER_TABLE == 0


def collapsible(vma: Vma) -> bool:
    """Whether khugepaged may make huge pages of what the VMA maps. Kernel: shmem_allowable_huge_orders()."""
    file = vma.file
    if file is None or file.kind != "shm" or (vma.pgoff - (vma.start >> PAGE_SHIFT)) % PTRS_PER_TABLE:
        return False
    return _allowable_orders(file, vma.pgoff, vma, 0) & PMD_ORDERS != 0


def clean_flags(vma: Vma) -> int:
    """The flags of what a read maps."""
    writable = vma.flags & (VM_SHARED | VM_WRITE) == VM_SHARED | VM_WRITE
    return PRESENT | ACCESSED | (WRITE if writable else 0)


def map_pmd(mm: Mm, vma: Vma, vpn: int, flags: int) -> bool:
    """Map the block around the page by a PMD, if it has no table and the file has a large folio for it."""
    block = vpn << PAGE_SHIFT & -PMD_SIZE
    if vpn >> LEAF_SHIFT in mm.pgtable.leaves or not suitable(mm, vma, block):
        return False
    assert vma.file is not None
    first = folio_at(vma.file, vma.linear_index(block))
    if not first:
        return False
    frames, pfns = mm.memory.frames, slice(first, first + PTRS_PER_TABLE)
    frames.refcount[pfns] += 1
    frames.mapcount[pfns] += 1
    leaf = mm.pgtable.leaf(vpn)
    leaf.ptes[:] = np.arange(first, first + PTRS_PER_TABLE, dtype=np.uint64) << np.uint64(PFN_SHIFT) | np.uint64(flags)
    leaf.huge = True
    return True
