"""PAGEMAP_SCAN: what the pages of a range are, and, in the same step, protecting those that match against writing.

With asynchronous write protection (see userfaultfd) this tells, again and again, which pages have been written to since
the last time. Pages that are nowhere are never protected: the first write to one is not seen.

Kernel: do_pagemap_scan(), fs/proc/task_mmu.c, v6.12.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON
from mmubusd.mm.huge_memory import announce_splits, split_pmd
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.swapops import ENTRY_WRITABLE, SWAP, kind
from mmubusd.mm.vma import VM_UFFD_ASYNC, VM_UFFD_WP, Vma

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

WP_MATCHING, CHECK_WPASYNC = 1, 2
WPALLOWED, WRITTEN, FILE, PRESENT_PAGE, SWAPPED, PFNZERO, HUGE, SOFT_DIRTY_PAGE = (1 << bit for bit in range(8))
"""PAGE_IS_*."""
CATEGORIES = (1 << 8) - 1
REGION = struct.Struct("<QQQ")
"""struct page_region: start, end, categories."""


def scan(mm: Mm, start: int, length: int, flags: int, mask: int) -> Operation[bytes]:
    """The pages of the range that have every category of the mask.

    Args: flags: WP_MATCHING: protect them; CHECK_WPASYNC: fail where that is not allowed, instead of passing over it.
    Returns: regions of pages that are alike, each as struct page_region.
    Raises: MmError EINVAL (unaligned, unknown flags or categories), EPERM (as CHECK_WPASYNC asks).
    """
    if start % PAGE_SIZE or not length or start + length > TASK_SIZE:
        raise MmError("EINVAL", f"[{start:#x}, +{length:#x})")
    if flags & ~(WP_MATCHING | CHECK_WPASYNC) or mask & ~CATEGORIES:
        raise MmError("EINVAL", f"flags {flags:#x}, categories {mask:#x}")
    end = start + length + PAGE_SIZE - 1 & -PAGE_SIZE
    return (yield from mm.locked(_scan(mm, start, end, flags, mask), (start, end)))


def _scan(mm: Mm, start: int, end: int, flags: int, mask: int) -> Operation[bytes]:
    protect, found, refused = flags & WP_MATCHING != 0, list[tuple[int, int, int]](), False
    for vma in mm.vmas.overlapping(start, end):
        allowed = vma.flags & (VM_UFFD_WP | VM_UFFD_ASYNC) == VM_UFFD_WP | VM_UFFD_ASYNC
        if not allowed and flags & CHECK_WPASYNC:
            refused = True
            break
        if allowed or not protect:
            _scan_mapping(mm, vma, max(start, vma.start), min(end, vma.end), protect, mask, found)
    if protect and mm.notified:
        yield InvalidateRange(mm, start, end, Reason.PROTECTION_VMA)
    yield from announce_splits(mm)
    if refused:
        raise MmError("EPERM", "a mapping of the range is not registered for asynchronous write protection")
    return b"".join(REGION.pack(*region) for region in found)


def _scan_mapping(
    mm: Mm, vma: Vma, start: int, end: int, protect: bool, mask: int, found: list[tuple[int, int, int]]
) -> None:
    allowed = WPALLOWED if vma.flags & VM_UFFD_ASYNC else 0
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        huge = mm.pgtable.leaves[base >> LEAF_SHIFT].huge
        for vpn, pte in enumerate(ptes.tolist(), base):
            what = allowed | _categories(mm, pte, huge) if pte else 0
            if not pte or what & mask != mask:
                continue
            address = vpn << PAGE_SHIFT
            if found and found[-1][1:] == (address, what):
                address = found.pop()[0]
            found.append((address, (vpn + 1) << PAGE_SHIFT, what))
            if protect and what & WRITTEN:
                if mm.pgtable.leaves[base >> LEAF_SHIFT].huge:
                    split_pmd(mm, vpn << PAGE_SHIFT)
                ptes[vpn - base] = (pte & ~(WRITE if pte & PRESENT else ENTRY_WRITABLE)) | UFFD_WP


def _categories(mm: Mm, pte: int, huge: bool) -> int:
    """Kernel: pagemap_page_category()."""
    what = (0 if pte & UFFD_WP else WRITTEN) | (SOFT_DIRTY_PAGE if pte & SOFT_DIRTY else 0)
    if not pte & PRESENT:
        return what | (SWAPPED if kind(pte) == SWAP else 0)
    pfn = pte >> PFN_SHIFT
    file = pfn and not mm.memory.frames.flags_at[pfn] & ANON
    return what | PRESENT_PAGE | (0 if pfn else PFNZERO) | (FILE if file else 0) | (HUGE if huge else 0)
