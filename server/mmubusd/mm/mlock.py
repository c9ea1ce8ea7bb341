"""mlock and munlock: memory that stays resident. Kernel: mm/mlock.c, v6.12."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import limits
from mmubusd.mm.addr import PAGE_MASK, PAGE_SIZE, TASK_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.notification import Operation
from mmubusd.mm.populate import populate_vma
from mmubusd.mm.vma import VM_ACCESS_FLAGS, VM_HUGETLB, VM_LOCKED, VM_LOCKONFAULT, VM_SHARED, VM_WRITE
from mmubusd.mm.vma_merge import modify

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def mlock(mm: Mm, start: int, length: int) -> Operation[int]:
    """mlock(2): lock the mappings and fault everything in."""
    start, end = _range(start, length)
    if end > start:
        limits.check_locked(mm, end - start, "ENOMEM")
        yield from mm.locked(_lock(mm, start, end), (start, min(end, TASK_SIZE + PAGE_SIZE)))
    return 0


def munlock(mm: Mm, start: int, length: int) -> Operation[int]:
    """munlock(2)."""
    start, end = _range(start, length)
    if end > start:
        yield from mm.locked(_apply(mm, start, end, 0), (start, min(end, TASK_SIZE + PAGE_SIZE)))
    return 0


def _range(start: int, length: int) -> tuple[int, int]:
    end = start + length
    start, end = start & PAGE_MASK, page_align(end)
    if end > 1 << 64:
        raise MmError("EINVAL", f"length {length:#x} wraps around")
    return start, end


def _lock(mm: Mm, start: int, end: int) -> Operation[None]:
    yield from _apply(mm, start, end, VM_LOCKED)
    mm.memory.lru.drain()
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None or not vma.flags & VM_ACCESS_FLAGS:
            raise MmError("ENOMEM", f"memory at {start:#x} cannot be faulted in")
        stop = min(end, vma.end)
        try:
            yield from populate_vma(mm, vma, start, stop, vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE)
        except MmError as error:
            raise MmError("EAGAIN" if error.errno == "ENOMEM" else "ENOMEM", error.message) from error
        start = stop


def _apply(mm: Mm, start: int, end: int, lock: int) -> Operation[None]:
    """Kernel: apply_vma_lock_flags(), mlock_fixup()."""
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None:
            raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
        stop = min(end, vma.end)
        flags = vma.flags & ~(VM_LOCKED | VM_LOCKONFAULT) | lock
        if flags != vma.flags and not flags & VM_HUGETLB:
            try:
                modify(vma, start, stop, flags)
            finally:
                if mm.split_blocks:
                    yield from announce_splits(mm)
        start = stop
