"""Huge pages of shared memory: a large folio in the cache that a PMD maps wherever it fits.

Faults make none by themselves (shmem_enabled is "never", as Linux has it by default): collapse_file does. What is there
is mapped by a PMD at the next fault in a block that has no table. Such a PMD is never turned into a table: what splits
it drops the whole mapping, and faults bring back what is wanted. Kernel: do_set_pmd(), mm/memory.c, v6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE, PTRS_PER_TABLE
from mmubusd.mm.frame import CACHE, ORDER_MASK, ORDER_SHIFT
from mmubusd.mm.free_frames import BLOCK_ORDER
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, PFN_SHIFT, PRESENT, WRITE
from mmubusd.mm.vma import VM_NOHUGEPAGE, VM_SHARED, VM_WRITE, Vma

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.mm import Mm

HUGE_CACHE = CACHE | BLOCK_ORDER << ORDER_SHIFT


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
    frames, pages = mm.memory.frames, slice(first, first + PTRS_PER_TABLE)
    frames.refcount[pages] += 1
    frames.mapcount[pages] += 1
    leaf = mm.pgtable.leaf(vpn)
    leaf.ptes[:] = np.arange(first, first + PTRS_PER_TABLE, dtype=np.uint64) << np.uint64(PFN_SHIFT) | np.uint64(flags)
    leaf.huge = True
    return True
