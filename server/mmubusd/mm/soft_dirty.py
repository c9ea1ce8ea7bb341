"""Tracking writes: soft-dirty marks, and write protection as userfaultfd asks for it.

clear_refs takes the right to write from every PTE, so that the next write is seen and marks it; everyone is told once,
of everything. userfaultfd's protection is a second lock on a page beside the mapping's rights: a write to it fails
(SIGBUS, as with UFFD_FEATURE_SIGBUS: nobody else is asked to resolve it) until the protection is taken away.

Kernel: fs/proc/task_mmu.c (clear_refs_write()), mm/userfaultfd.c (mwriteprotect_range()), v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import announce_splits, split_pmd
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.swapops import ENTRY_WRITABLE
from mmubusd.mm.vma import UFFD_FLAGS, VM_HUGETLB, VM_UFFD_WP

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

CLEAR_REFS_ALL, CLEAR_REFS_SOFT_DIRTY = 1, 4
EVERYTHING = (1 << 64) - 1
"""The kernel's end of "the whole address space"."""


def clear_refs(mm: Mm, kind: int) -> Operation[int]:
    """Write a kind to /proc/PID/clear_refs: 4 clears the soft-dirty marks, 1 the accessed ones.

    Raises: MmError EINVAL: another kind.
    """
    if kind not in (CLEAR_REFS_ALL, CLEAR_REFS_SOFT_DIRTY):
        raise MmError("EINVAL", f"clear_refs {kind}")
    yield from mm.locked(_clear_refs(mm, kind), (0, 1 << 64))
    return 0


def _clear_refs(mm: Mm, kind: int) -> Operation[None]:
    if kind == CLEAR_REFS_ALL:
        for leaf in mm.pgtable.leaves.values():
            leaf.ptes[leaf.ptes & np.uint64(PRESENT) != 0] &= ~np.uint64(ACCESSED)
        return
    mm.soft_dirty_tracked = True
    for leaf in mm.pgtable.leaves.values():
        if hugetlb.is_hugetlb(mm, leaf):
            continue
        present = leaf.ptes & np.uint64(PRESENT) != 0
        leaf.ptes[present] &= ~np.uint64(WRITE)
        leaf.ptes[~present] &= ~np.uint64(ENTRY_WRITABLE)
        leaf.ptes[:] &= ~np.uint64(SOFT_DIRTY)
    if mm.notified:
        yield InvalidateRange(mm, 0, EVERYTHING, Reason.SOFT_DIRTY)


def soft_dirty(mm: Mm, start: int, end: int) -> list[tuple[int, int]]:
    """Pages of [start, end) written to since the last clear_refs, as `Mm.present` gives runs of pages."""
    first = start >> PAGE_SHIFT
    runs = mm.pgtable.runs(first, end >> PAGE_SHIFT, SOFT_DIRTY, SOFT_DIRTY)
    return [(a - first, b - first) for a, b in runs]


def uffd_writeprotect(mm: Mm, start: int, length: int, protect: int, uffd: int = 0) -> Operation[int]:
    """UFFDIO_WRITEPROTECT: forbid (1) or allow (0) writing to the pages that are there.

    Args: uffd: a userfaultfd: only what is registered for it; 0: also what is registered with none.
    Raises: MmError EINVAL (unaligned, empty, another mode), ENOENT (part of the range is not mapped, or registered with
        a userfaultfd for something else).
    """
    if start % PAGE_SIZE or length % PAGE_SIZE or not length or start + length > TASK_SIZE or protect not in (0, 1):
        raise MmError("EINVAL", f"[{start:#x}, +{length:#x}), mode {protect}")
    operation = _writeprotect(mm, start, start + length, bool(protect), uffd != 0)
    yield from mm.locked(operation, (start, start + length))
    return 0


def _writeprotect(mm: Mm, start: int, end: int, protect: bool, registered: bool) -> Operation[None]:
    at = start
    while at < end:
        vma = mm.vmas.find_from(at) if registered else mm.vmas.find(at)
        if registered and at > start and (vma is None or vma.start >= end):
            break  # a hole at the end
        if vma is None or ((registered or vma.flags & UFFD_FLAGS) and not vma.flags & VM_UFFD_WP) or vma.start >= end:
            raise MmError("ENOENT", f"nothing that can be protected is mapped at {at:#x}")
        at = max(at, vma.start)
        stop = min(end, vma.end)
        if vma.flags & VM_HUGETLB and (start | end) % PMD_SIZE:
            raise MmError("EINVAL", f"[{start:#x}, {end:#x}) ends inside a huge page of hugetlb")
        for base, ptes in mm.pgtable.spans(at >> PAGE_SHIFT, stop >> PAGE_SHIFT):
            if mm.pgtable.leaves[base >> LEAF_SHIFT].huge and not vma.flags & VM_HUGETLB:
                split_pmd(mm, base << PAGE_SHIFT)
            if protect:
                ptes[ptes != 0] |= np.uint64(UFFD_WP)
                present = ptes & np.uint64(PRESENT) != 0
                ptes[present] &= ~np.uint64(WRITE)
                ptes[~present] &= ~np.uint64(ENTRY_WRITABLE)
            else:
                ptes &= ~np.uint64(UFFD_WP)  # a write asks again, and finds nothing in its way
        if mm.notified:
            for first, last in mm.pgtable.ranges_with_tables(at, stop):
                yield InvalidateRange(mm, first, last, Reason.PROTECTION_VMA)
        yield from announce_splits(mm)
        at = stop
