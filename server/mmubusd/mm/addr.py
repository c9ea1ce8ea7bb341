"""Addresses, page numbers and the identities that keep them apart.

Ranges are half-open and in bytes unless a name ends in `vpn`, `pfn` or `pages`. The layout is that of x86-64 with four
levels: 4 KiB pages, 512 entries a table, 47 bits of user addresses.
"""

from typing import NewType

Pfn = NewType("Pfn", int)
"""The number of a page frame; frame 0 is the zero page."""
Vpn = NewType("Vpn", int)
"""The number of a virtual page: address >> PAGE_SHIFT."""
MmId = NewType("MmId", int)
FileId = NewType("FileId", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)
PTRS_PER_TABLE = 512
PMD_SIZE = PAGE_SIZE * PTRS_PER_TABLE
"""What one leaf table maps: 2 MiB."""
PUD_SIZE = PMD_SIZE * PTRS_PER_TABLE
"""What one table of leaf tables maps: 1 GiB."""
PGDIR_SIZE = PUD_SIZE * PTRS_PER_TABLE
TASK_SIZE = (1 << 47) - PAGE_SIZE
MMAP_MIN_ADDR = 0x10000
"""vm.mmap_min_addr: lower addresses are never chosen and, without privilege, never mapped."""
FILE_SIZE_MAX = (1 << 44) - PAGE_SIZE
"""ext4's largest file with 4 KiB blocks."""
MAX_LFS_FILESIZE = (1 << 63) - 1
"""The largest file that there can be."""
INDEX_MAX = MAX_LFS_FILESIZE + 1 >> PAGE_SHIFT
"""Behind the last page of any file."""


def page_align(value: int) -> int:
    """Round up to a whole page. Kernel: PAGE_ALIGN(), without its wrap-around."""
    return (value + PAGE_SIZE - 1) & PAGE_MASK


def pages(length: int) -> int:
    """The number of pages that length bytes touch."""
    return (length + PAGE_SIZE - 1) >> PAGE_SHIFT
