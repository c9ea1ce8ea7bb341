"""Device-exclusive access: a page that a device has to itself, for atomic operations that the CPU must not break.

The page stays where it is; an entry that is not present keeps the CPU away. Whoever touches it gets it back: the device
is told to give its exclusive access up, and only then the PTE is there again. Kernel: make_device_exclusive_range(),
remove_device_exclusive_entry(), v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.folio_split import split_page
from mmubusd.mm.frame import ANON, PINNED
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT, SOFT_DIRTY, WRITE
from mmubusd.mm.populate import populate_page
from mmubusd.mm.swapops import DEVICE_EXCLUSIVE, ENTRY_WRITABLE, kind, make
from mmubusd.mm.vma import VM_WRITE

if TYPE_CHECKING:
    from mmubusd.mm.device import Entries
    from mmubusd.mm.mm import Mm


def make_exclusive(mm: Mm, start: int, end: int, owner: int) -> Operation[Entries]:
    """Give the owner the pages of [start, end) for itself.

    Returns: for each page its frame, or 0 where it could not be had (it is shared, a file's, or held).
    Raises: MmError EINVAL (unaligned), EFAULT (not mapped, or not writable), ENOMEM.
    """
    if start % PAGE_SIZE or end % PAGE_SIZE or not start < end:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a page-aligned range")
    return (yield from mm.locked(_make_exclusive(mm, start, end, owner), (start, end)))


def _make_exclusive(mm: Mm, start: int, end: int, owner: int) -> Operation[Entries]:
    first = start >> PAGE_SHIFT
    for vpn in range(first, end >> PAGE_SHIFT):
        yield from _one(mm, vpn, owner)
    found = np.zeros((end - start) >> PAGE_SHIFT, np.uint64)
    for base, ptes in mm.pgtable.spans(first, end >> PAGE_SHIFT):
        for at, entry in enumerate(ptes.tolist(), base - first):
            found[at] = entry >> PFN_SHIFT if entry and kind(entry) == DEVICE_EXCLUSIVE else 0
    mm.memory.frames.settle(found[found != 0].astype(np.int64), True)
    return found


def _one(mm: Mm, vpn: int, owner: int) -> Operation[None]:
    address, frames = vpn << PAGE_SHIFT, mm.memory.frames
    vma = mm.vmas.find(address)
    if vma is None or not vma.flags & VM_WRITE:
        raise MmError("EFAULT", f"the mapping at {address:#x} is {vma.prot_string() if vma else 'not there'}")
    yield from populate_page(mm, vma, vpn, True)
    yield from split_page(mm, vpn)
    if mm.notified:
        yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.EXCLUSIVE, owner=owner)
    pte = mm.pgtable.get(vpn)
    pfn = pte >> PFN_SHIFT
    alone = frames.flags_at[pfn] & ANON and frames.mapcount_at[pfn] == 1 and not frames.flags_at[pfn] & PINNED
    if pte & PRESENT and pte & WRITE and alone:
        frames.set_dirty(pfn)
        mm.pgtable.set_entry(vpn, make(DEVICE_EXCLUSIVE, pfn, ENTRY_WRITABLE | pte & SOFT_DIRTY))
