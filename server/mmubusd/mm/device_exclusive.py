"""Device-exclusive access: a page that a device has to itself, for atomic operations that the CPU must not break.

The page stays where it is; an entry that is not present keeps the CPU away. Whoever touches it gets it back: the device
is told to give its exclusive access up, and only then the PTE is there again. Kernel: make_device_exclusive_range(),
remove_device_exclusive_entry(), v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.device import PFN_MASK, VALID
from mmubusd.mm.device import WRITE as DEVICE_WRITE
from mmubusd.mm.errno import MmError
from mmubusd.mm.folio_split import split_page
from mmubusd.mm.frame import ANON, PINNED
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT, SOFT_DIRTY, WRITE
from mmubusd.mm.populate import populate_page
from mmubusd.mm.swapops import DEVICE_EXCLUSIVE, ENTRY_WRITABLE, kind, make
from mmubusd.mm.vma import VM_HUGETLB, VM_WRITE

if TYPE_CHECKING:
    from mmubusd.mm.device import Entries
    from mmubusd.mm.mm import Mm


def make_exclusive(mm: Mm, start: int, end: int, owner: int) -> Operation[Entries]:
    """Give the owner the pages of [start, end) for itself.

    Returns: entries as device.fault() gives them; 0 where a page could not be had (shared, a file's, or held).
    Raises: MmError EINVAL (unaligned), EFAULT (not mapped, not writable, or past the end of the file), ENOMEM.
    """
    if start % PAGE_SIZE or end % PAGE_SIZE or not start < end:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a page-aligned range")
    return (yield from mm.locked(_make_exclusive(mm, start, end, owner), (start, end)))


def _make_exclusive(mm: Mm, start: int, end: int, owner: int) -> Operation[Entries]:
    for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        yield from _one(mm, vpn, owner)
    return exclusive_entries(mm, start, end, owner)


def exclusive_entries(mm: Mm, start: int, end: int, owner: int) -> Entries:
    """What the owner has to itself now, as device.fault() gives entries: valid and writable, or 0."""
    first, memory = start >> PAGE_SHIFT, mm.memory
    found: Entries = np.zeros((end - start) >> PAGE_SHIFT, np.uint64)
    for base, ptes in mm.pgtable.spans(first, end >> PAGE_SHIFT):
        for at, entry in enumerate(ptes.tolist(), base - first):
            pfn = entry >> PFN_SHIFT
            held = memory.exclusive_owner.get(pfn)
            if entry and kind(entry) == DEVICE_EXCLUSIVE and held == (owner, memory.frames.generation_at[pfn]):
                found[at] = pfn | VALID | DEVICE_WRITE
    memory.frames.settle((found[found != 0] & np.uint64(PFN_MASK)).astype(np.int64), True)
    return found


def _one(mm: Mm, vpn: int, owner: int) -> Operation[None]:
    address, frames = vpn << PAGE_SHIFT, mm.memory.frames
    vma = mm.vmas.find(address)
    if vma is None or not vma.flags & VM_WRITE:
        raise MmError("EFAULT", f"the mapping at {address:#x} is {vma.prot_string() if vma else 'not there'}")
    try:
        vma = yield from populate_page(mm, vma, vpn, True)
    except MmError as error:  # get_user_pages() knows no SIGBUS
        raise MmError("EFAULT" if error.errno == "ENXIO" else error.errno, error.message) from error
    if vma.flags & VM_HUGETLB:
        return
    yield from split_page(mm, vpn)
    if mm.notified:
        yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.EXCLUSIVE, owner=owner)
    pte = mm.pgtable.get(vpn)
    pfn = pte >> PFN_SHIFT
    alone = frames.flags_at[pfn] & ANON and frames.mapcount_at[pfn] == 1 and not frames.flags_at[pfn] & PINNED
    if pte & PRESENT and pte & WRITE and alone:
        frames.set_dirty(pfn)
        mm.memory.exclusive_owner[pfn] = (owner, frames.generation_at[pfn])
        mm.pgtable.set_entry(vpn, make(DEVICE_EXCLUSIVE, pfn, ENTRY_WRITABLE | pte & SOFT_DIRTY))
