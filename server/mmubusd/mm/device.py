"""The device's side: faulting, looking and pinning by address.

Entries are uint64, as hmm_range_fault gives them: VALID and WRITE in the top bits, the pfn in the low ones; 0 where
nothing is mapped, ERROR where nothing may be. The frame's generation is `memory.frames.generation[pfn]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import numa_balancing
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.device_memory import Select, pages_of
from mmubusd.mm.errno import MmError
from mmubusd.mm.fault import continue_fault, expand_stack, fault_page
from mmubusd.mm.frame import ANON, EXCLUSIVE
from mmubusd.mm.free_frames import BLOCK_ORDER
from mmubusd.mm.migrate_device import leave_coherent
from mmubusd.mm.migrate_device_huge import whole_block
from mmubusd.mm.pgtable import DIRTY, LEAF_SHIFT, NUMA_HINT, PFN_SHIFT, PRESENT
from mmubusd.mm.pgtable import WRITE as PTE_WRITE
from mmubusd.mm.populate import populate_vma
from mmubusd.mm.swapops import ENTRY_WRITABLE
from mmubusd.mm.vma import VM_READ, VM_SHARED, VM_WRITE, Vma

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.notification import Operation

VALID = 1 << 63
WRITE = 1 << 62
ERROR = 1 << 61
DEVICE = 1 << 60
"""The page is in the memory of the device that asks."""
COHERENT = 1 << 59
"""The page is in coherent memory of a device, which everybody reaches."""
ORDER_SHIFT = 53
"""From here on four bits: one entry of the page table maps 2^order pages."""
ORDER_MASK = 15 << ORDER_SHIFT
PFN_MASK = (1 << 52) - 1
ATTEMPTS_MAX = 8
"""How often a range is faulted in that is reclaimed meanwhile, because it is larger than what there is."""

Entries = NDArray[np.uint64]


def fault(mm: Mm, start: int, end: int, write: bool, owner: int = 0) -> Operation[Entries]:
    """Fault the pages in and return their entries. Kernel: hmm_range_fault() with HMM_PFN_REQ_FAULT (and _WRITE).

    The entries are the state at the moment of return: hand them out before anything else runs.
    Raises: MmError EFAULT (no mapping, or past the end of the file), EPERM (the mapping forbids the access), EBUSY
        (under pressure the range does not stay in memory long enough).
    """
    _check_range(start, end)
    return (yield from mm.locked(_fault(mm, start, end, write, owner), (start, end)))


def _fault(mm: Mm, start: int, end: int, write: bool, owner: int) -> Operation[Entries]:
    mm.memory.finish_reads()
    for _ in range(ATTEMPTS_MAX):
        if mm.numa_hinted:
            yield from numa_balancing.resolve(mm, start, end)
        for vma in _accessible(mm, start, end, write):
            try:
                for low, high in _to_populate(mm, max(start, vma.start), min(end, vma.end), write, owner):
                    yield from populate_vma(mm, mm.vmas.find(low) or vma, low, high, write)
            except MmError as error:
                raise MmError("EFAULT" if error.errno == "ENXIO" else error.errno, error.message) from error
        entries = snapshot(mm, start, end, owner)
        wanted = np.uint64(VALID | WRITE if write else VALID)
        if (entries & wanted == wanted).all():
            _settle(mm, entries)
            return entries
    raise MmError(
        "EBUSY", f"[{start:#x}, {end:#x}) does not stay in memory long enough: ask for less at a time"
    )  # fmt: skip


def _to_populate(mm: Mm, start: int, end: int, write: bool, owner: int) -> list[tuple[int, int]]:
    """What of [start, end) must be faulted in: not what is in the owner's own memory, with the right that it wants."""
    if not owner or not mm.pgtable.has_entries:
        return [(start, end)]
    wanted = VALID | WRITE if write else VALID
    ranges, at = list[tuple[int, int]](), start
    for vpn, _ in pages_of(mm, start, end, owner, Select.DEVICE_PRIVATE):
        if own_entry(mm, vpn) & wanted == wanted:
            if at < vpn << PAGE_SHIFT:
                ranges.append((at, vpn << PAGE_SHIFT))
            at = (vpn + 1) << PAGE_SHIFT
    return [*ranges, (at, end)] if at < end else ranges


def _check_range(start: int, end: int) -> None:
    if start % PAGE_SIZE or end % PAGE_SIZE or not 0 <= start < end <= TASK_SIZE:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a page-aligned range of addresses")


def _accessible(mm: Mm, start: int, end: int, write: bool) -> list[Vma]:
    """The VMAs that cover the whole range and allow the access."""
    vmas, at = [], start
    while at < end:
        vma = mm.vmas.find(at) or expand_stack(mm, at)
        if not vma.flags & VM_READ:
            raise MmError("EFAULT", f"the mapping at {at:#x} is {vma.prot_string()}")
        if write and not vma.flags & VM_WRITE:
            raise MmError("EPERM", f"the mapping at {at:#x} is {vma.prot_string()}")
        vmas.append(vma)
        at = vma.end
    return vmas


def snapshot(mm: Mm, start: int, end: int, owner: int = 0) -> Entries:
    """The same array without faulting; changes nothing that a program could see.

    Raises: MmError EINVAL for a bad range.
    """
    _check_range(start, end)
    first = start >> PAGE_SHIFT
    entries: Entries = np.zeros((end - start) >> PAGE_SHIFT, np.uint64)
    for base, ptes in mm.pgtable.spans(first, end >> PAGE_SHIFT):
        present = ptes & np.uint64(PRESENT | NUMA_HINT) == PRESENT
        found = ptes >> np.uint64(PFN_SHIFT) | np.uint64(VALID)
        found |= np.where(ptes & np.uint64(PTE_WRITE) != 0, np.uint64(WRITE), np.uint64(0))
        if mm.pgtable.leaves[base >> LEAF_SHIFT].huge:
            found |= np.uint64(BLOCK_ORDER << ORDER_SHIFT)
        entries[base - first : base - first + len(ptes)] = np.where(present, found, np.uint64(0))
    if mm.memory.device_memory.has_coherent or (owner and mm.pgtable.has_entries):
        _show_devices(mm, start, end, owner, entries)
    at = start
    for vma in [*mm.vmas.overlapping(start, end), None]:
        hole_end = max(at, vma.start) if vma is not None else end
        entries[(at - start) >> PAGE_SHIFT : (hole_end - start) >> PAGE_SHIFT] = ERROR
        if vma is not None:
            at = min(end, vma.end)
            if not vma.flags & VM_READ:
                entries[(max(start, vma.start) - start) >> PAGE_SHIFT : (at - start) >> PAGE_SHIFT] = ERROR
    return entries


def _show_devices(mm: Mm, start: int, end: int, owner: int, entries: Entries) -> None:
    """Pages in private memory are valid for their owner alone; those in coherent memory are marked."""
    memory = mm.memory.device_memory
    for vpn, pfn in pages_of(mm, start, end):
        at, own = vpn - (start >> PAGE_SHIFT), owner != 0 and memory.owner(pfn) == owner
        if memory.is_coherent(pfn):
            entries[at] |= np.uint64(COHERENT | (DEVICE if own else 0))
        elif own:
            entries[at] = own_entry(mm, vpn)
    if owner:
        _show_order(mm, start, end, entries)


def own_entry(mm: Mm, vpn: int) -> int:
    """What the owner sees of a page in its private memory."""
    entry = mm.pgtable.get(vpn)
    return entry >> PFN_SHIFT | VALID | DEVICE | (WRITE if entry & ENTRY_WRITABLE else 0)


def _show_order(mm: Mm, start: int, end: int, entries: Entries) -> None:
    """What is in the owner's private memory as a huge page is marked as such."""
    for number in {address // PMD_SIZE for address in range(start & -PMD_SIZE, end, PMD_SIZE)}:
        if whole_block(mm, number):
            low, high = max(start, number * PMD_SIZE), min(end, (number + 1) * PMD_SIZE)
            pages = entries[low - start >> PAGE_SHIFT : high - start >> PAGE_SHIFT]
            pages[pages & np.uint64(DEVICE) != 0] |= np.uint64(BLOCK_ORDER << ORDER_SHIFT)


def _settle(mm: Mm, entries: Entries) -> None:
    """What is given out is reached through the store itself, and with a right to write it may be written any time."""
    frames = mm.memory.frames
    pfns = (entries & np.uint64(PFN_MASK)).view(np.int64)
    writable = entries & np.uint64(WRITE) != 0
    frames.settle(pfns[~writable], False)
    frames.settle(pfns[writable], True)


def pin(mm: Mm, start: int, end: int, write: bool) -> Operation[Entries]:
    """Fault in and take a long-term reference on each page. Kernel: pin_user_pages(FOLL_LONGTERM).

    A private page that others have too is copied first, also for reading, so that the pin and the address stay one;
    one in coherent memory of a device moves out of it. Returns: the pfns; give them back with unpin.
    Raises: MmError EFAULT, ENOMEM.
    """
    _check_range(start, end)
    return (yield from mm.locked(_pin(mm, start, end, write), (start, end)))


def _pin(mm: Mm, start: int, end: int, write: bool) -> Operation[Entries]:
    frames, pinned = mm.memory.frames, []
    mm.memory.finish_reads()
    try:
        for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            pfn = yield from _pinnable(mm, vpn, write)
            frames.pin((pfn,))
            pinned.append(pfn)
    except BaseException:
        frames.unpin(pinned)
        raise
    frames.settle(np.array(pinned, np.int64), write)
    return np.array(pinned, np.uint64)


def _pinnable(mm: Mm, vpn: int, write: bool) -> Operation[int]:
    """The frame of a page that may be pinned. Kernel: follow_page_pte(), gup_must_unshare()."""
    address = vpn << PAGE_SHIFT
    frames = mm.memory.frames
    while True:
        vma = mm.vmas.find(address) or expand_stack(mm, address)
        if not vma.flags & (VM_WRITE if write else VM_READ):
            raise MmError("EFAULT", f"the mapping at {address:#x} is {vma.prot_string()}")
        try:
            done = fault_page(mm, vma, vpn, write)
        except MmError as error:
            raise MmError("EFAULT" if error.errno == "ENXIO" else error.errno, error.message) from error
        if done:
            pte = mm.pgtable.get(vpn)
            pfn = pte >> PFN_SHIFT
            own = frames.flags_at[pfn] & (ANON | EXCLUSIVE) == ANON | EXCLUSIVE
            if mm.memory.device_memory.is_coherent(pfn):
                yield from leave_coherent(mm, pfn)
                continue
            if own or (vma.flags & VM_SHARED and pfn):
                if write and not pte & DIRTY:
                    frames.set_dirty(pfn)
                return pfn
        yield from continue_fault(mm, vpn)


def unpin(mm: Mm, pfns: Entries, dirty: bool = False) -> None:
    """Give the references of pin back; with dirty the frames become dirty."""
    if dirty:
        mm.memory.set_dirty(pfns.tolist())
    mm.memory.frames.unpin(pfns.tolist())
