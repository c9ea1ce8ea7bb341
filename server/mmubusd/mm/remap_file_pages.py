"""remap_file_pages: today an mmap over a shared mapping. Kernel: mm/mmap.c, v6.12."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_MASK, PAGE_SHIFT
from mmubusd.mm.errno import MmError
from mmubusd.mm.mmap import MAP_FIXED, MAP_LOCKED, MAP_NONBLOCK, MAP_POPULATE, MAP_SHARED, map_used_file
from mmubusd.mm.notification import Operation
from mmubusd.mm.vma import VM_ACCESS_FLAGS, VM_LOCKED, VM_SHARED, Vma

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def remap_file_pages(mm: Mm, start: int, size: int, prot: int, pgoff: int, flags: int) -> Operation[int]:
    """remap_file_pages(2)."""
    start, size = start & PAGE_MASK, size & PAGE_MASK
    if prot:
        raise MmError("EINVAL", f"protection {prot:#x}: it must be 0")
    if size == 0 or start + size >= 1 << 64 or pgoff + (size >> PAGE_SHIFT) >= 1 << 64:
        raise MmError("EINVAL", f"[{start:#x}, +{size:#x}) from page {pgoff}: empty, or it wraps around")
    vma = mm.vmas.find(start)
    if vma is None or not vma.flags & VM_SHARED:
        raise MmError("EINVAL", f"there is no shared mapping at {start:#x}")
    file = vma.file
    if file is None or not _same_mapping(mm, vma, start + size):
        raise MmError("EINVAL", f"[{start:#x}, +{size:#x}) is not one mapping of one file")
    map_flags = flags & MAP_NONBLOCK | MAP_SHARED | MAP_FIXED | MAP_POPULATE
    if vma.flags & VM_LOCKED:
        map_flags |= MAP_LOCKED
    yield from map_used_file(mm, start, size, vma.flags & VM_ACCESS_FLAGS, map_flags, file, pgoff)
    return 0


def _same_mapping(mm: Mm, vma: Vma, end: int) -> bool:
    """Whether directly adjacent VMAs of this file, with these flags, reach up to end."""
    at = vma
    while at.end < end:
        after = mm.vmas.find(at.end)
        if after is None or after.file is not vma.file or after.flags != vma.flags:
            return False
        at = after
    return True
