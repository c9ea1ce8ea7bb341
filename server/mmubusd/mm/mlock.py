"""mlock, mlock2, mlockall and their opposites: memory that stays resident. Kernel: mm/mlock.c, v6.18."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from mmubusd.mm import limits
from mmubusd.mm.addr import PAGE_MASK, PAGE_SIZE, TASK_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.notification import Operation
from mmubusd.mm.populate import populate, populate_vma
from mmubusd.mm.vma import (
    VM_ACCESS_FLAGS,
    VM_DONTEXPAND,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_LOCKONFAULT,
    VM_SHARED,
    VM_WRITE,
    Vma,
)
from mmubusd.mm.vma_merge import modify

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MLOCK_ONFAULT = 1
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


def mlock(mm: Mm, start: int, length: int, flags: int = 0) -> Operation[int]:
    """mlock2(2): lock the mappings, and fault everything in unless flags is MLOCK_ONFAULT. Kernel: do_mlock()."""
    if flags & ~MLOCK_ONFAULT:
        raise MmError("EINVAL", f"flags {flags:#x}")
    limits.check_may_lock(mm)
    start, length = _range(start, length)
    lock = VM_LOCKED | (VM_LOCKONFAULT if flags & MLOCK_ONFAULT else 0)
    yield from mm.locked(_lock(mm, start, start + length, lock), _reach(start, start + length))
    return 0


def munlock(mm: Mm, start: int, length: int) -> Operation[int]:
    """munlock(2)."""
    start, length = _range(start, length)
    yield from mm.locked(_apply(mm, start, start + length, 0), _reach(start, start + length))
    return 0


def mlockall(mm: Mm, flags: int) -> Operation[int]:
    """mlockall(2): what is mapped (MCL_CURRENT), and what will be (MCL_FUTURE)."""
    if not flags or flags & ~(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) or flags == MCL_ONFAULT:
        raise MmError("EINVAL", f"flags {flags:#x}")
    limits.check_may_lock(mm)
    yield from mm.locked(_lock_all(mm, flags), _reach(0, TASK_SIZE))
    return 0


def munlockall(mm: Mm) -> Operation[int]:
    """munlockall(2)."""
    yield from mm.locked(_unlock_all(mm), _reach(0, TASK_SIZE))
    return 0


def _range(start: int, length: int) -> tuple[int, int]:
    """Whole pages; the length is one of a register, and wraps around when it is rounded up."""
    length = page_align(length + start % PAGE_SIZE) % (1 << 64)
    return start & PAGE_MASK, length


def _reach(start: int, end: int) -> tuple[int, int]:
    """What to lock of the address space: one page at least."""
    return start, max(min(end, TASK_SIZE + PAGE_SIZE), start + PAGE_SIZE)


def _lock(mm: Mm, start: int, end: int, lock: int) -> Operation[None]:
    limits.check_locked_range(mm, start, end)
    yield from _apply(mm, start, end, lock)
    if start == end:
        return
    mm.memory.lru.drain()
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None:
            raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
        stop = min(end, vma.end)
        if not vma.flags & VM_LOCKONFAULT:
            yield from _populate(mm, vma, start, stop)
        start = stop


def _populate(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    """Kernel: populate_vma_page_range(), __mlock_posix_error_return()."""
    if not vma.flags & VM_ACCESS_FLAGS:
        raise MmError("ENOMEM", f"the mapping at {vma.start:#x} cannot be accessed")
    try:
        yield from populate_vma(mm, vma, start, end, vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE)
    except MmError as error:
        raise MmError("EAGAIN" if error.errno == "ENOMEM" else "ENOMEM", error.message) from error


def _apply(mm: Mm, start: int, end: int, lock: int) -> Operation[None]:
    """Kernel: apply_vma_lock_flags()."""
    if end >= 1 << 64:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) wraps around")
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None:
            raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
        stop = min(end, vma.end)
        yield from _fix(mm, vma, start, stop, lock)
        start = stop


def _fix(mm: Mm, vma: Vma, start: int, end: int, lock: int) -> Operation[None]:
    """Kernel: mlock_fixup(). Memory that is always resident, as hugetlb's, is left as it is."""
    flags = vma.flags & ~VM_LOCKED_MASK | lock
    if flags == vma.flags or vma.flags & VM_DONTEXPAND:
        return
    try:
        modify(vma, start, end, flags)
    finally:
        if mm.split_blocks:
            yield from announce_splits(mm)


def _lock_all(mm: Mm, flags: int) -> Operation[None]:
    """Kernel: apply_mlockall_flags()."""
    lock = VM_LOCKED | (VM_LOCKONFAULT if flags & MCL_ONFAULT else 0)
    if flags & MCL_CURRENT:
        limits.check_locked_all(mm)
    mm.default_flags = mm.default_flags & ~VM_LOCKED_MASK | (lock if flags & MCL_FUTURE else 0)
    if flags & MCL_CURRENT:
        yield from _apply_to_all(mm, lock)
        yield from populate(mm, 0, TASK_SIZE)


def _unlock_all(mm: Mm) -> Operation[None]:
    mm.default_flags &= ~VM_LOCKED_MASK
    yield from _apply_to_all(mm, 0)


def _apply_to_all(mm: Mm, lock: int) -> Operation[None]:
    """Every mapping; one that cannot be is left as it is."""
    at = 0
    while (vma := mm.vmas.find_from(at)) is not None:
        at = vma.end
        with suppress(MmError):
            yield from _fix(mm, vma, vma.start, vma.end, lock)
