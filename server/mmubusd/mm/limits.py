"""The limits that a machine or an address space may have; None is no limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_MASK
from mmubusd.mm.errno import MmError
from mmubusd.mm.notification import Operation
from mmubusd.mm.vma import VM_ACCOUNT, VM_GROWSDOWN, VM_LOCKED, VM_SHARED, VM_WRITE

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def check_map_count(mm: Mm, more: int = 0) -> None:
    """vm.max_map_count. Args: more: than there are, which must be left free. Raises: MmError ENOMEM."""
    limit = mm.memory.max_map_count
    if len(mm.vmas) + more > limit:
        raise MmError("ENOMEM", f"{len(mm.vmas)} mappings: the limit of {limit} (max_map_count) is reached")


def are_set(mm: Mm) -> bool:
    """Whether a mapping may be too much for this address space, or for the machine."""
    return (mm.address_space_limit, mm.data_limit, mm.memory.commit_limit) != (None, None, None)


def _is_data(flags: int) -> bool:
    """Kernel: is_data_mapping()."""
    return flags & (VM_WRITE | VM_SHARED | VM_GROWSDOWN) == VM_WRITE


def may_expand(mm: Mm, flags: int, more: int) -> bool:
    """Whether RLIMIT_AS and, for a mapping with these flags, RLIMIT_DATA allow so many bytes more.

    A limit of 0 for data stands for none, since debuggers set it. Kernel: may_expand_vm().
    """
    total, data = mm.address_space_limit, mm.data_limit
    if total is not None and sum(vma.end - vma.start for vma in mm.vmas) + more > total & PAGE_MASK:
        return False
    if not data or not _is_data(flags):
        return True
    return sum(vma.end - vma.start for vma in mm.vmas if _is_data(vma.flags)) + more <= data & PAGE_MASK


def check_expand(mm: Mm, flags: int, more: int) -> None:
    """may_expand(). Raises: MmError ENOMEM."""
    if not may_expand(mm, flags, more):
        raise MmError("ENOMEM", f"{more:#x} bytes more than the limits of the address space or of its data allow")


def check_data(mm: Mm, size: int) -> None:
    """RLIMIT_DATA, for brk. Kernel: check_data_rlimit(). Raises: MmError ENOMEM."""
    if mm.data_limit is not None and size > mm.data_limit:
        raise MmError("ENOMEM", f"{size:#x} bytes of data are above the limit of {mm.data_limit:#x}")


def _locked_bytes(mm: Mm) -> int:
    """Kernel: mm->locked_vm."""
    return mm.locked_twice + sum(vma.end - vma.start for vma in mm.vmas if vma.flags & VM_LOCKED)


def check_may_lock(mm: Mm) -> None:
    """Kernel: can_do_mlock(). Raises: MmError EPERM."""
    if mm.locked_limit == 0:
        raise MmError("EPERM", "the limit of locked memory is 0")


def check_locked(mm: Mm, flags: int, more: int) -> None:
    """RLIMIT_MEMLOCK for a mapping with these flags that grows. Kernel: mlock_future_ok(). Raises: MmError EAGAIN."""
    limit = mm.locked_limit
    if limit is not None and flags & VM_LOCKED and _locked_bytes(mm) + more > limit & PAGE_MASK:
        raise MmError("EAGAIN", f"{more:#x} bytes more than the limit of locked memory, {limit:#x}, allows")


def check_locked_range(mm: Mm, start: int, end: int) -> None:
    """RLIMIT_MEMLOCK for a range of which some may be locked already. Kernel: do_mlock(). Raises: MmError ENOMEM."""
    limit = mm.locked_limit
    if limit is None or end - start + _locked_bytes(mm) <= limit & PAGE_MASK:
        return
    again = [vma for vma in mm.vmas.overlapping(start, end) if vma.flags & VM_LOCKED]
    twice = sum(min(end, vma.end) - max(start, vma.start) for vma in again)
    if end - start + _locked_bytes(mm) - twice > limit & PAGE_MASK:
        raise MmError("ENOMEM", f"[{start:#x}, {end:#x}) is more than the limit of locked memory, {limit:#x}, allows")


def check_locked_all(mm: Mm) -> None:
    """RLIMIT_MEMLOCK for everything that is mapped. Kernel: mlockall(). Raises: MmError ENOMEM."""
    limit = mm.locked_limit
    if limit is not None and sum(vma.end - vma.start for vma in mm.vmas) > limit & PAGE_MASK:
        raise MmError("ENOMEM", f"more is mapped than the limit of locked memory, {limit:#x}, allows")


RLIMITS = {2: "data_limit", 3: "stack_limit", 8: "locked_limit", 9: "address_space_limit"}
"""RLIMIT_DATA, _STACK, _MEMLOCK, _AS: where an address space keeps it."""
RLIM_INFINITY = (1 << 64) - 1


def setrlimit(mm: Mm, resource: int, size: int) -> Operation[int]:
    """Set a limit in bytes; RLIM_INFINITY: none. Raises: MmError EINVAL: it is no limit of memory."""
    if resource not in RLIMITS:
        raise MmError("EINVAL", f"resource {resource} is no limit of memory: {sorted(RLIMITS)}")
    setattr(mm, RLIMITS[resource], None if size == RLIM_INFINITY else size)
    return 0
    yield


def check_commit(memory: Memory, pages: int) -> None:
    """vm.overcommit_memory=2. Kernel: __vm_enough_memory(). Raises: MmError ENOMEM."""
    limit = memory.commit_limit
    if limit is None:
        return
    used = sum(vma.pages for mm in memory.mms.values() for vma in mm.vmas if vma.flags & VM_ACCOUNT)
    if used + pages > limit:
        raise MmError("ENOMEM", f"{pages} pages more than the commit limit of {limit} pages allows")
