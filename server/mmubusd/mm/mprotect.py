"""mprotect. Kernel: mm/mprotect.c, v6.18."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import hugetlb, limits
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, EXCLUSIVE
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import DIRTY, NUMA_HINT, PFN_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.populate import populate_vma
from mmubusd.mm.swapops import ENTRY_WRITABLE, mapped_frames
from mmubusd.mm.vma import (
    VM_ACCESS_FLAGS,
    VM_ACCOUNT,
    VM_GROWSDOWN,
    VM_HUGETLB,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_NORESERVE,
    VM_SHARED,
    VM_WRITE,
    Vma,
)
from mmubusd.mm.vma_merge import check_unsealed, modify

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

PROT_SEM, PROT_GROWSDOWN, PROT_GROWSUP = 0x8, 0x01000000, 0x02000000


def mprotect(mm: Mm, start: int, length: int, prot: int) -> Operation[int]:
    """mprotect(2)."""
    grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
    prot &= ~(PROT_GROWSDOWN | PROT_GROWSUP)
    if grows == PROT_GROWSDOWN | PROT_GROWSUP:
        raise MmError("EINVAL", "PROT_GROWSDOWN and PROT_GROWSUP exclude each other")
    if start % PAGE_SIZE:
        raise MmError("EINVAL", f"address {start:#x} is not page-aligned")
    if length == 0:
        return 0
    end = start + page_align(length)
    if end >= 1 << 64:
        raise MmError("ENOMEM", f"length {length:#x} wraps around")
    if prot & ~(VM_ACCESS_FLAGS | PROT_SEM):
        raise MmError("EINVAL", f"protection {prot:#x}")
    first = mm.vmas.find_from(start)
    low = min(start, first.start) if grows and first is not None else start
    yield from mm.locked(_protect(mm, start, end, prot & VM_ACCESS_FLAGS, grows), (low, end))
    return 0


def _protect(mm: Mm, start: int, end: int, prot: int, grows: int) -> Operation[None]:
    vma = mm.vmas.find_from(start)
    if vma is None:
        raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
    if grows & PROT_GROWSDOWN and vma.start < end:
        if not vma.flags & VM_GROWSDOWN:
            raise MmError("EINVAL", f"the mapping at {vma.start:#x} does not grow down")
        start = vma.start
    elif vma.start > start:
        raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
    elif grows & PROT_GROWSUP:
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} does not grow up")
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None:
            raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
        stop = min(end, vma.end)
        yield from _protect_piece(mm, vma, start, stop, prot)
        start = stop


def _protect_piece(mm: Mm, vma: Vma, start: int, end: int, prot: int) -> Operation[None]:
    """Kernel: mprotect_fixup()."""
    check_unsealed(vma)
    old = vma.flags
    flags = old & ~VM_ACCESS_FLAGS | prot
    if flags == old:
        return
    if flags & VM_WRITE:
        if not limits.may_expand(mm, flags, end - start) and limits.may_expand(mm, old, end - start):
            raise MmError("ENOMEM", f"[{start:#x}, {end:#x}) would be more data than its limit allows")
        if not old & (VM_ACCOUNT | VM_WRITE | VM_HUGETLB | VM_SHARED | VM_NORESERVE):
            limits.check_commit(mm.memory, (end - start) >> PAGE_SHIFT)
            flags |= VM_ACCOUNT
    elif old & VM_ACCOUNT and vma.file is None and vma.anon_vma is None:
        flags &= ~VM_ACCOUNT
    try:
        vma = modify(vma, start, end, flags)
        if flags & VM_HUGETLB:
            hugetlb.change_protection(mm, vma, start, end, bool(flags & VM_WRITE))
        else:
            _change_protection(mm, vma, start, end)
    finally:
        if mm.split_blocks:
            yield from announce_splits(mm)
    if mm.notified:
        for low, high in [(start, end)] if flags & VM_HUGETLB else mm.pgtable.ranges_with_tables(start, end):
            yield InvalidateRange(mm, low, high, Reason.PROTECTION_VMA)
    if old & (VM_WRITE | VM_SHARED | VM_LOCKED_MASK) == VM_LOCKED and flags & VM_WRITE:
        again = mm.vmas.find(start)
        if again is not None:
            with suppress(MmError):  # what cannot be faulted in now will be when it is touched
                yield from populate_vma(mm, again, start, end, True)


def _change_protection(mm: Mm, vma: Vma, start: int, end: int) -> None:
    """Bring the PTEs in line with the VMA's rights. Kernel: change_pte_range().

    Without the right to write all become read-only. With it, those become writable at once where a write would need
    nothing but that: private pages that nobody else has, shared ones whose writes need not be seen or have been.
    """
    frames = mm.memory.frames
    kind = vma.file.kind if vma.file is not None and vma.flags & VM_SHARED else "private"
    for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        entries = mm.pgtable.has_entries
        if mm.numa_hinted:
            ptes &= ~np.uint64(NUMA_HINT)
        if entries:
            absent = ptes & np.uint64(PRESENT) == 0
            ptes[absent] &= ~np.uint64(ENTRY_WRITABLE)
        if not vma.flags & VM_WRITE:
            ptes &= ~np.uint64(WRITE)
            continue
        pfns = mapped_frames(ptes) if entries else (ptes >> np.uint64(PFN_SHIFT)).view(np.int64)
        if kind == "private":
            able = frames.flags[pfns] & (ANON | EXCLUSIVE) == ANON | EXCLUSIVE
        elif kind == "disk":
            able = ptes & np.uint64(DIRTY) != 0
        else:
            able = pfns != 0
        able &= ptes & np.uint64(PRESENT | UFFD_WP) == PRESENT
        if mm.soft_dirty_tracked:
            able &= ptes & np.uint64(SOFT_DIRTY) != 0
        ptes[able] |= np.uint64(WRITE)
