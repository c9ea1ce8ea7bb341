"""The limits that a machine or an address space may have; None is no limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.errno import MmError
from mmubusd.mm.vma import VM_ACCOUNT, VM_LOCKED

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def check_map_count(mm: Mm, more: int = 0) -> None:
    """vm.max_map_count. Args: more: than there are, which must be left free. Raises: MmError ENOMEM."""
    limit = mm.memory.max_map_count
    if len(mm.vmas) + more > limit:
        raise MmError("ENOMEM", f"{len(mm.vmas)} mappings: the limit of {limit} (max_map_count) is reached")


def mapped_bytes(mm: Mm, start: int, end: int) -> int:
    """How much of [start, end) is mapped. Kernel: count_vma_pages_range()."""
    if mm.address_space_limit is None:
        return 0
    return sum(min(end, vma.end) - max(start, vma.start) for vma in mm.vmas.overlapping(start, end))


def check_address_space(mm: Mm, more: int) -> None:
    """RLIMIT_AS. Kernel: may_expand_vm(). Raises: MmError ENOMEM."""
    limit = mm.address_space_limit
    if limit is not None and sum(vma.end - vma.start for vma in mm.vmas) + more > limit:
        raise MmError("ENOMEM", f"{more:#x} bytes more than the address space's limit of {limit:#x} allows")


def check_data(mm: Mm, size: int) -> None:
    """RLIMIT_DATA, for brk. Raises: MmError ENOMEM."""
    if mm.data_limit is not None and size > mm.data_limit:
        raise MmError("ENOMEM", f"{size:#x} bytes of data are above the limit of {mm.data_limit:#x}")


def check_locked(mm: Mm, more: int, errno: str) -> None:
    """RLIMIT_MEMLOCK. Kernel: mlock_future_ok()."""
    limit = mm.locked_limit
    if limit is not None and sum(vma.end - vma.start for vma in mm.vmas if vma.flags & VM_LOCKED) + more > limit:
        raise MmError(errno, f"{more:#x} bytes more than the limit of locked memory, {limit:#x}, allows")


def check_commit(memory: Memory, pages: int) -> None:
    """vm.overcommit_memory=2. Kernel: __vm_enough_memory(). Raises: MmError ENOMEM."""
    limit = memory.commit_limit
    if limit is None:
        return
    used = sum(vma.pages for mm in memory.mms.values() for vma in mm.vmas if vma.flags & VM_ACCOUNT)
    if used + pages > limit:
        raise MmError("ENOMEM", f"{pages} pages more than the commit limit of {limit} pages allows")
