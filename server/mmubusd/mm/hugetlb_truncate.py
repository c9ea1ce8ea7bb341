"""Changing the size of a hugetlbfs file, and punching holes into it: whole huge pages at a time.

Private copies go with the file's pages. A page that goes takes its reservation with it; what was reserved and never
used stays reserved where a hole is punched, and does not behind a new end.

Kernel: fs/hugetlbfs/inode.c, v6.12: hugetlb_vmtruncate(), hugetlbfs_punch_hole(), remove_inode_hugepages().
"""

from __future__ import annotations

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import INDEX_MAX, PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, PTRS_PER_TABLE
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.notification import Operation
from mmubusd.mm.rmap_walk import drop_folios, unmap_mapping_range


def truncate(file: File, size: int) -> Operation[None]:
    """Requires: the file's lock is held. Raises: MmError EINVAL: not a whole number of huge pages."""
    if size % PMD_SIZE:
        raise MmError("EINVAL", f"size {size} is not one of whole huge pages")
    file.size = size
    first = size >> PAGE_SHIFT
    yield from unmap_mapping_range(file, first, INDEX_MAX)
    before = file.cache.nr
    yield from drop_folios(file, first, INDEX_MAX)
    hugetlb.unreserve(file, first // PTRS_PER_TABLE, (before - file.cache.nr) // PTRS_PER_TABLE)


def punch(file: File, start: int, end: int) -> Operation[None]:
    """The bytes [start, end) become a hole: whole huge pages go, the ends are zeroed. Requires: as truncate."""
    low, high = hugetlb.huge_align(start), end // PMD_SIZE * PMD_SIZE
    for a, b in ((start, min(low, end)), (max(high, start), end)) if low <= high else ((start, end),):
        for at in range(a // PAGE_SIZE * PAGE_SIZE, b, PAGE_SIZE):
            file.zero(max(a, at), min(b, at + PAGE_SIZE))
    if low >= high:
        return
    first, last = low >> PAGE_SHIFT, high >> PAGE_SHIFT
    yield from unmap_mapping_range(file, first, last)
    cached = {index // PTRS_PER_TABLE for index, _ in file.cache.items(first, last)}
    yield from drop_folios(file, first, last)
    file.reserved -= cached
