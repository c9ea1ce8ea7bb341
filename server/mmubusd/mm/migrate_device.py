"""The way of pages into a device's own memory and back (see device_memory).

    CPU PTE ──migrate_to_device──► DEVICE_PRIVATE entry: the page is on the device, which has a translation of it
       ▲                     │            │
       └───CPU touch, or migrate_to_system┘
       ▲                     └───► PTE of a coherent frame, which the CPU and other devices go on using
       └──migrate_to_system, or a long-term pin────┘

The owner's registration hears MIGRATE with its own number as owner when pages move to it, and may ignore that. When a
page comes back the server moves the bytes, so the owner hears it like everyone else, with owner 0.
Kernel: mm/migrate_device.c, lib/test_hmm.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.anon import prepare_anon_vma
from mmubusd.mm.device_memory import ANY_DEVICE, Select, pages_of
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, DEVICE, EXCLUSIVE, SWAPBACKED
from mmubusd.mm.frame import DIRTY as FRAME_DIRTY
from mmubusd.mm.migrate import MOVE_BATCH, Teller, migrate, split_range, tell_clear
from mmubusd.mm.migrate_device_huge import block_to_device, block_to_system
from mmubusd.mm.notification import RESCHEDULE, InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, NEW_PTE, PFN_SHIFT, PRESENT
from mmubusd.mm.rmap_walk import Place, tell
from mmubusd.mm.swapops import DEVICE_PRIVATE, ENTRY_WRITABLE, kind, make
from mmubusd.mm.vma import VM_HUGETLB, VM_READ, VM_WRITE, Vma
from mmubusd.mm.vmscan import make_room

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

FAULTS_MAX = 4096
"""How often the CPU faults on a page that somebody holds in a device's memory before it is a bus error."""


def migrate_to_device(mm: Mm, start: int, end: int, owner: int, coherent: bool = False) -> Operation[int]:
    """Move private pages of [start, end) into the owner's memory, also those that have never been touched.

    Pages that cannot go there, because someone holds them, they are a file's or on a device already, stay.
    Args: owner: the device's number, not 0; coherent: to memory of it that the CPU reaches too.
    Returns: how many pages of the range are the owner's now.
    Raises: MmError EINVAL: unaligned, or part of the range is not mapped or not readable.
    """
    _check_range(start, end)
    yield from mm.locked(_to_device(mm, start, end, owner, coherent), (start, end))
    return len(pages_of(mm, start, end, owner))


def _check_range(start: int, end: int) -> None:
    if start % PAGE_SIZE or end % PAGE_SIZE or not start < end:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a page-aligned range")


def _to_device(mm: Mm, start: int, end: int, owner: int, coherent: bool) -> Operation[None]:
    memory = mm.memory
    memory.lru.drain()
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None or not vma.flags & VM_READ or vma.flags & VM_HUGETLB:
            what = "not there" if vma is None else "of hugetlb" if vma.flags & VM_HUGETLB else vma.prot_string()
            raise MmError("EINVAL", f"the mapping at {start:#x} is {what}")
        fits = start % PMD_SIZE == 0 and start + PMD_SIZE <= min(end, vma.end)
        if fits and not coherent and (yield from block_to_device(mm, start, owner)):
            start += PMD_SIZE
            continue
        stop = min(end, vma.end, start + MOVE_BATCH * PAGE_SIZE)
        yield from make_room(memory, (stop - start) >> PAGE_SHIFT)
        yield from _piece_to_device(mm, start, stop, owner, coherent)
        yield from _fill_holes(mm, start, stop, owner, coherent)
        start = stop


def _piece_to_device(mm: Mm, start: int, end: int, owner: int, coherent: bool) -> Operation[None]:
    """Kernel: migrate_vma_setup(), migrate_vma_pages(), migrate_vma_finalize(); it selects pages of the system."""
    frames = mm.memory.frames
    yield from split_range(mm, start >> PAGE_SHIFT, end >> PAGE_SHIFT)
    pfns = []
    for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        pte = mm.pgtable.get(vpn)
        pfn = pte >> PFN_SHIFT
        if pte & PRESENT and frames.flags_at[pfn] & (ANON | DEVICE) == ANON:
            pfns.append(pfn)
    alloc = mm.memory.device_memory.alloc
    yield from migrate(mm.memory, pfns, lambda _: alloc(owner, coherent), _teller(mm, start, end, owner))


def _teller(mm: Mm, start: int, end: int, owner: int) -> Teller:
    """One MIGRATE for the range of this address space, and CLEAR for others that map the pages too."""

    def teller(places: list[Place]) -> Operation[None]:
        if mm.notified:
            yield InvalidateRange(mm, start, end, Reason.MIGRATE, owner=owner)
        yield from tell([place for place in places if place[0] is not mm], Reason.CLEAR)

    return teller


def _fill_holes(mm: Mm, start: int, end: int, owner: int, coherent: bool) -> Operation[None]:
    """Pages that were never written to go to the device as new ones. Kernel: migrate_vma_insert_page()."""
    holes = [vpn for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT) if _is_hole(mm, vpn)]
    if not holes:
        return
    if mm.notified:
        yield InvalidateRange(mm, holes[0] << PAGE_SHIFT, end, Reason.MIGRATE, owner=owner)
    for vpn in holes:
        vma = mm.vmas.find(vpn << PAGE_SHIFT)
        if vma is not None and _is_hole(mm, vpn) and mm.memory.room(mm.memcg) > 0:
            _insert(mm, vma, vpn, owner, coherent)


def _is_hole(mm: Mm, vpn: int) -> bool:
    """Whether nothing or the zero page is there, of private memory."""
    vma, pte = mm.vmas.find(vpn << PAGE_SHIFT), mm.pgtable.get(vpn)
    return vma is not None and vma.file is None and (not pte or (pte & PRESENT != 0 and not pte >> PFN_SHIFT))


def _insert(mm: Mm, vma: Vma, vpn: int, owner: int, coherent: bool) -> None:
    memory = mm.memory
    anon_vma = vma.anon_vma or prepare_anon_vma(vma)
    pfn = memory.device_memory.alloc(owner, coherent, mm.memcg)
    frames = memory.frames
    frames.mapping_at[pfn], frames.index_at[pfn] = anon_vma.id, vma.linear_index(vpn << PAGE_SHIFT)
    frames.flags_at[pfn] |= ANON | SWAPBACKED | EXCLUSIVE | FRAME_DIRTY
    frames.mapcount_at[pfn] = 1
    writable = vma.flags & VM_WRITE
    if coherent:
        mm.pgtable.set(vpn, pfn << PFN_SHIFT | (NEW_PTE & ~ACCESSED if writable else PRESENT))
    else:
        mm.pgtable.set_entry(vpn, make(DEVICE_PRIVATE, pfn, ENTRY_WRITABLE if writable else 0))


def owner_of(mm: Mm, vpn: int) -> int:
    """Whose memory the page is in; 0: nobody's but ours."""
    entry = mm.pgtable.get(vpn)
    mapped = entry & PRESENT or kind(entry) == DEVICE_PRIVATE
    return mm.memory.device_memory.owner(entry >> PFN_SHIFT) if mapped else 0


def migrate_to_ram(mm: Mm, vpn: int) -> Operation[None]:
    """The CPU has come to a page that it cannot reach: it comes back. Kernel: do_swap_page(), migrate_to_ram().

    Who unmaps it elsewhere holds it until its round has ended; the kernel faults again and again meanwhile.
    Raises: MmError ENXIO (SIGBUS) when somebody goes on holding it there, ENOMEM.
    """
    address, entry = vpn << PAGE_SHIFT, mm.pgtable.get(vpn)
    if (yield from block_to_system(mm, address & -PMD_SIZE, 0)):
        return
    for _ in range(FAULTS_MAX):
        yield from _to_system(mm, address, address + PAGE_SIZE, 0, Select.DEVICE_PRIVATE)
        if mm.pgtable.get(vpn) != entry or not mm.memory.frames.free_nr:
            return
        if mm.memory.frames.exports.get(entry >> PFN_SHIFT):
            break  # they have been asked, and keep it
        yield RESCHEDULE
    raise MmError("ENXIO", f"the page at {address:#x} is in a device's memory, and does not leave it: it is held")


def migrate_to_system(
    mm: Mm, start: int, end: int, owner: int, select: Select = Select.DEVICE_PRIVATE
) -> Operation[int]:
    """Bring the selected ones of the owner's pages in [start, end) back.

    Returns: how many pages of the range are in no device's memory.
    """
    _check_range(start, end)
    yield from mm.locked(_to_system(mm, start, end, owner, select), (start, end))
    return ((end - start) >> PAGE_SHIFT) - len(pages_of(mm, start, end))


def _to_system(mm: Mm, start: int, end: int, owner: int, select: Select) -> Operation[None]:
    """Args: owner: whose pages, 0: any device's."""
    memory = mm.memory
    while start < end:
        fits = start % PMD_SIZE == 0 and start + PMD_SIZE <= end
        if fits and Select.DEVICE_PRIVATE in select and (yield from block_to_system(mm, start, owner)):
            start += PMD_SIZE
            continue
        stop = min(end, start + MOVE_BATCH * PAGE_SIZE)
        pfns = [pfn for _, pfn in pages_of(mm, start, stop, owner, select)]
        if pfns:
            yield from make_room(memory, len(pfns))
            yield from migrate(memory, pfns, lambda _: memory.frames.alloc(0, 0, 0), _teller(mm, start, stop, 0))
        start = stop


def leave_coherent(mm: Mm, pfn: int) -> Operation[None]:
    """A page in coherent memory is to be held for the long term: it moves out first, if nobody else holds it.

    Kernel: migrate_longterm_unpinnable_folios(), migrate_device_coherent_folio().
    """
    memory = mm.memory
    yield from make_room(memory)
    moved = yield from migrate(memory, [pfn], lambda _: memory.frames.alloc(0, 0, 0), tell_clear)
    if not moved:
        raise MmError("EBUSY", f"frame {pfn} is a device's, and does not leave it: someone holds it")


def evict_device(memory: Memory, owner: int) -> Operation[int]:
    """The owner gives its memory up: all its pages come back, wherever they are mapped. Returns: how many."""
    total = 0
    for mm in list(memory.mms.values()):
        for vma in list(mm.vmas):
            if mm.vmas.find(vma.start) is vma and (pages := pages_of(mm, vma.start, vma.end, owner)):
                yield from mm.locked(_to_system(mm, vma.start, vma.end, owner, ANY_DEVICE), (vma.start, vma.end))
                total += len(pages)
    return total
