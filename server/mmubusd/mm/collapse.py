"""MADV_COLLAPSE: small pages become a huge page. Kernel: mm/khugepaged.c, v6.18."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import collapse_file, folio, huge_memory
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import DEVICE, SWAPCACHE
from mmubusd.mm.frame_bytes import RESERVED
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, PRESENT, Leaf
from mmubusd.mm.swapin import do_swap_page
from mmubusd.mm.swapops import SWAP, kind
from mmubusd.mm.vma import VM_HUGETLB, VM_NOHUGEPAGE, Vma
from mmubusd.mm.zap import Gather, evict_exports, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def collapse(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    """Collapse the blocks of 2 MiB in [start, end), part of one VMA under its range lock. Kernel: madvise_collapse().

    Raises: MmError EINVAL (the VMA or a block does not allow it), ENOMEM (no 512 free frames in a row), EAGAIN (someone
    holds a page).
    """
    _check(mm, vma)
    mm.memory.lru.drain()
    first, last = -(-start // PMD_SIZE), end // PMD_SIZE
    if first > last:
        raise MmError("EINVAL", f"no block of 2 MiB lies in [{start:#x}, {end:#x})")
    failed = None
    for number in range(first, last):
        leaf = mm.pgtable.leaves.get(number)
        if vma.file is not None and (leaf is None or not leaf.huge):
            yield from collapse_file.collapse_block(mm, _mapping(mm, number * PMD_SIZE), number * PMD_SIZE)
            continue
        if leaf is None:
            raise MmError("EINVAL", f"nothing has been touched at {number * PMD_SIZE:#x}")
        if not leaf.huge:
            try:
                yield from collapse_block(mm, number)
            except MmError as error:
                if error.errno == "ENOMEM":
                    raise
                failed = error
    if failed is not None:
        raise failed


def _check(mm: Mm, vma: Vma) -> None:
    """Kernel: thp_vma_allowable_order(), with TVA_FORCED_COLLAPSE: what the machine gives huge pages to by itself does
    not matter.
    """
    if mm.thp_disabled:
        raise MmError("EINVAL", "the address space has no huge pages (PR_SET_THP_DISABLE)")
    own = vma.anon_vma is not None if vma.file is None else _shared_fits(vma)
    if not own or vma.flags & (VM_NOHUGEPAGE | VM_HUGETLB):
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} cannot have huge pages, or has no page of its own")
    if vma.end // PMD_SIZE * PMD_SIZE - PMD_SIZE < vma.start:
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} is too small for a huge page")


def _shared_fits(vma: Vma) -> bool:
    """Whether blocks of shared memory lie in blocks of addresses. Other files are open for writing, and have none."""
    assert vma.file is not None
    return vma.file.kind == "shm" and (vma.pgoff - (vma.start >> PAGE_SHIFT)) % folio.FOLIO_PAGES == 0


def collapse_block(mm: Mm, number: int) -> Operation[None]:
    """Everyone lets go of the small pages of a block of private memory, then they are copied.

    Requires: the block's range lock is held, and it has a table. Raises: MmError ENOMEM, EINVAL, EAGAIN.
    Kernel: collapse_huge_page().
    """
    block = number * PMD_SIZE
    leaf = _bring_in(mm, block, exported=True)
    if mm.memory.frames.exports:
        yield from evict_exports(mm.memory, [pte >> PFN_SHIFT for pte in leaf.ptes.tolist()])
    first = mm.memory.frames.alloc_block(memcg=mm.memcg)
    if not first:
        raise MmError("ENOMEM", f"no {folio.FOLIO_PAGES} free frames in a row")
    frames, taken = mm.memory.frames, False
    try:
        if mm.notified:
            yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)
        leaf = _bring_in(mm, block)
        for at in leaf.ptes.nonzero()[0].tolist():
            frames.copy(leaf.at[at] >> PFN_SHIFT, first + at)
        vma, gather = _mapping(mm, block), Gather(mm.memory)
        zap_range(mm, vma, block, block + PMD_SIZE, gather)
        huge_memory.become_folio(mm, vma, block >> PAGE_SHIFT, first)
        huge_memory.replace(mm, vma, block >> PAGE_SHIFT, first)
        taken = True
        yield from gather.finish()
    finally:
        if not taken:
            frames.put_many(np.arange(first, first + folio.FOLIO_PAGES))


def _mapping(mm: Mm, block: int) -> Vma:
    vma = mm.vmas.find(block)
    assert vma is not None, "the block is locked, so its mapping is there"
    return vma


def _bring_in(mm: Mm, block: int, exported: bool = False) -> Leaf:
    """The block's leaf table, when all that it names is present and held by nobody.

    Args: exported: exporters do not count.
    Raises: MmError ENOMEM, EINVAL (a device has a page), EAGAIN. Kernel: __collapse_huge_page_swapin(),
    __collapse_huge_page_isolate().
    """
    frames, leaf = mm.memory.frames, mm.pgtable.leaves[block >> PAGE_SHIFT + LEAF_SHIFT]
    for at in ((leaf.ptes != 0) & (leaf.ptes & np.uint64(PRESENT) == 0)).nonzero()[0].tolist():
        if kind(leaf.at[at]) != SWAP:
            raise MmError("EINVAL", f"the page at {block + (at << PAGE_SHIFT):#x} is not in memory")
        do_swap_page(mm, _mapping(mm, block), (block >> PAGE_SHIFT) + at, leaf.at[at], False)
    mm.memory.lru.drain()
    pfns = (leaf.ptes >> np.uint64(PFN_SHIFT)).view(np.int64)
    if (frames.flags[pfns] & DEVICE).any():
        raise MmError("EINVAL", f"a page of the block at {block:#x} is in a device's memory")
    known = frames.mapcount[pfns] + (frames.flags[pfns] & SWAPCACHE != 0)
    held = (frames.refcount[pfns] > known) & (frames.flags[pfns] & RESERVED == 0)
    for pfn in pfns[held].tolist():
        exports = len(frames.exports.get(pfn, ())) if exported else 0
        if frames.refcount_at[pfn] > frames.mapcount_at[pfn] + (frames.flags_at[pfn] & SWAPCACHE != 0) + exports:
            raise MmError("EAGAIN", f"frame {pfn} is held")
    return leaf
