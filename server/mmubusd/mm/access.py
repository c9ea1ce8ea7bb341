"""Accesses of the CPU: touching pages, loading and storing bytes.

A page that needs no waiting costs no generator; one that does is accessed under its range lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.fault import RIGHTS, access_nowait, access_page
from mmubusd.mm.notification import RESCHEDULE, SLICE_PAGES, Operation
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.mm.vma import VM_READ

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def touch(mm: Mm, addr: int, length: int, access: str) -> Operation[int]:
    """One access a page ("read", "write", "execute"); stops at the first that fails.

    Raises: MmError EFAULT (SIGSEGV), ENXIO (SIGBUS), ENOMEM; the accesses before it have had their effects.
    """
    if access not in RIGHTS:
        raise MmError("EINVAL", f"access {access!r}")
    mm.memory.finish_reads()
    first, alone = addr >> PAGE_SHIFT, not mm.lock  # nobody else comes while we do not yield
    for vpn in range(first, (addr + length + PAGE_SIZE - 1) >> PAGE_SHIFT):
        if vpn - first & (SLICE_PAGES - 1) == SLICE_PAGES - 1:
            yield RESCHEDULE
            alone = not mm.lock
        address = vpn << PAGE_SHIFT
        waits = not alone and mm.lock.contended(address, address + PAGE_SIZE)
        if waits or not access_nowait(mm, vpn, access):
            yield from mm.locked(access_page(mm, vpn, access), (address, address + PAGE_SIZE))
            alone = not mm.lock
    return 0


def _frame(mm: Mm, vpn: int, access: str) -> Operation[int]:
    """Access the page and say which frame it is; nothing has run since."""
    address = vpn << PAGE_SHIFT
    if (mm.lock and mm.lock.contended(address, address + PAGE_SIZE)) or not access_nowait(mm, vpn, access):
        yield from mm.locked(access_page(mm, vpn, access), (address, address + PAGE_SIZE))
    return mm.pgtable.get(vpn) >> PFN_SHIFT


def faulted_in(mm: Mm, start: int) -> Operation[int]:
    """The frame of a page that is read, as the kernel reads it. Requires: its range lock is held.

    Kernel: get_user_pages(). Raises: MmError EFAULT.
    """
    vma = mm.vmas.find(start)
    if vma is None or not vma.flags & VM_READ:
        raise MmError("EFAULT", f"nothing that can be read is mapped at {start:#x}")
    try:
        yield from access_page(mm, start >> PAGE_SHIFT, "read")
    except MmError as error:
        raise MmError("EFAULT" if error.errno == "ENXIO" else error.errno, error.message) from error
    return mm.pgtable.get(start >> PAGE_SHIFT) >> PFN_SHIFT


def load(mm: Mm, addr: int, length: int) -> Operation[bytes]:
    """Read bytes. Raises: MmError as touch."""
    mm.memory.finish_reads()
    parts, end = [], addr + length
    while addr < end:
        offset = addr & (PAGE_SIZE - 1)
        size = min(PAGE_SIZE - offset, end - addr)
        pfn = yield from _frame(mm, addr >> PAGE_SHIFT, "read")
        parts.append(mm.memory.frames.read(pfn, offset, size))
        addr += size
    return b"".join(parts)


def store(mm: Mm, addr: int, data: bytes) -> Operation[int]:
    """Write bytes. Raises: MmError as touch; the pages before the failing one are written. Returns: 0."""
    mm.memory.finish_reads()
    view, at = memoryview(data), 0
    while at < len(data):
        offset = addr + at & (PAGE_SIZE - 1)
        part = view[at : at + PAGE_SIZE - offset]
        pfn = yield from _frame(mm, addr + at >> PAGE_SHIFT, "write")
        mm.memory.frames.write(pfn, offset, part)
        at += len(part)
    return 0
