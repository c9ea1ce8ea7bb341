"""Which pages of a file have been written to through shared mappings: for drivers that keep track of that themselves.

Kernel: mm/mapping_dirty_helpers.c, v6.12. A driver first protects a range against writing, so that each write is seen,
and later collects what is dirty. Each shared mapping is told of its part of the range at once.
"""

from __future__ import annotations

import numpy as np

from mmubusd.mm.addr import INDEX_MAX, PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import DIRTY, LEAF_SHIFT, PRESENT, WRITE
from mmubusd.mm.vma import VM_HUGETLB, Vma


def wp_shared(file: File, offset: int, length: int) -> Operation[int]:
    """Protect the pages against writing. Returns: how many entries were writable.

    Kernel: wp_shared_mapping_range(). Raises: MmError EINVAL: not whole pages.
    """
    return (yield from _for_each_mapping(file, offset, length, WRITE))


def clean_record(file: File, offset: int, length: int) -> Operation[int]:
    """Collect what is dirty: the file has it then, and the entries are clean. Returns: how many entries were dirty.

    Kernel: clean_record_shared_mapping_range(). Raises: MmError EINVAL: not whole pages.
    """
    return (yield from _for_each_mapping(file, offset, length, DIRTY))


def _for_each_mapping(file: File, offset: int, length: int, flag: int) -> Operation[int]:
    if offset % PAGE_SIZE or length % PAGE_SIZE or offset + length > INDEX_MAX << PAGE_SHIFT:
        raise MmError("EINVAL", f"[{offset:#x}, +{length:#x}) is not a range of whole pages of a file")
    first, last, found = offset >> PAGE_SHIFT, offset + length >> PAGE_SHIFT, 0
    for vma in file.rmap.overlapping(first, last) if first < last else ():
        if vma.flags & VM_HUGETLB or not vma.shared or vma not in file.rmap:
            continue
        start, end = vma.overlap(first, last)
        if start >= end:
            continue
        found += _clear(vma, start, end, flag)
        if vma.mm.notified:
            yield InvalidateRange(vma.mm, start, end, Reason.PROTECTION_PAGE)
    return found


def _clear(vma: Vma, start: int, end: int, flag: int) -> int:
    """Clear a flag of the present entries of [start, end). Returns: how many had it. A PMD is one entry, left alone."""
    found, pgtable = 0, vma.mm.pgtable
    for base, ptes in pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        if pgtable.leaves[base >> LEAF_SHIFT].huge:
            continue
        wanted = np.uint64(PRESENT | flag)
        there = (ptes & wanted == wanted).nonzero()[0]
        found += len(there)
        if flag == DIRTY:
            _hand_over(vma, base, there.tolist())
        ptes[there] &= ~np.uint64(flag)
    return found


def _hand_over(vma: Vma, base: int, at: list[int]) -> None:
    assert vma.file is not None, "a shared mapping is of a file"
    if vma.file.kind == "xip":
        return
    for page in at:
        index = vma.pgoff + base + page - (vma.start >> PAGE_SHIFT)
        if vma.file.cache.get(index):
            vma.file.set_dirty(index)
