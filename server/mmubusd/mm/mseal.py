"""mseal: mappings that stay as they are until the address space ends. Kernel: mm/mseal.c, v6.18.

A sealed mapping cannot be unmapped, moved, mapped over, or given other rights, nor may advice throw away what can only
be read in it. Its pages come and go as others' do, so notifications of them do not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.notification import Operation
from mmubusd.mm.vma import VM_SEALED
from mmubusd.mm.vma_merge import modify

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def mseal(mm: Mm, start: int, length: int, flags: int) -> Operation[int]:
    """mseal(2). Raises: MmError EINVAL, ENOMEM: something is not mapped, and nothing has been sealed."""
    if flags:
        raise MmError("EINVAL", f"flags {flags:#x}")
    if start % PAGE_SIZE:
        raise MmError("EINVAL", f"address {start:#x} is not page-aligned")
    end = start + page_align(length)
    if end >= 1 << 64:
        raise MmError("EINVAL", f"length {length:#x} wraps around")
    if end > start:
        yield from mm.locked(_seal(mm, start, end), (start, end))
    return 0


def _seal(mm: Mm, start: int, end: int) -> Operation[None]:
    at = start
    for vma in mm.vmas.overlapping(start, end):
        if vma.start > at:
            break
        at = vma.end
    if at < end:
        raise MmError("ENOMEM", f"nothing is mapped at {at:#x}")
    while start < end:
        sealed = mm.vmas.find(start)
        assert sealed is not None, "everything is mapped, and the range is locked"
        stop = min(end, sealed.end)
        if not sealed.flags & VM_SEALED:
            try:
                modify(sealed, start, stop, sealed.flags | VM_SEALED)
            finally:
                if mm.split_blocks:
                    yield from announce_splits(mm)
        start = stop
