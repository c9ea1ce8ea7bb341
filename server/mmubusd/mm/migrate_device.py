"""A device's own memory: private pages that the CPU cannot reach, and their way there and back.

    CPU PTE ──migrate_to_device──► DEVICE_PRIVATE entry: the page is on the device, which has a translation of it
       ▲                                  │
       └───CPU touch, or migrate_to_system┘

A device's memory is made of frames that only its owner may be given. The owner's registration hears MIGRATE with its
own number as owner when pages move to it, and may ignore that. When a page comes back the server moves the bytes, so
the owner hears it like everyone else, with owner 0. Kernel: mm/migrate_device.c, lib/test_hmm.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.anon import prepare_anon_vma
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, DEVICE, EXCLUSIVE, SWAPBACKED
from mmubusd.mm.frame import DIRTY as FRAME_DIRTY
from mmubusd.mm.migrate import MOVE_BATCH, Teller, migrate, split_range
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT
from mmubusd.mm.rmap_walk import Place, tell
from mmubusd.mm.swapops import DEVICE_PRIVATE, ENTRY_WRITABLE, kind, make
from mmubusd.mm.vma import VM_READ, VM_WRITE, Vma
from mmubusd.mm.vmscan import make_room

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def migrate_to_device(mm: Mm, start: int, end: int, owner: int) -> Operation[int]:
    """Move private pages of [start, end) into the owner's memory, also those that have never been touched.

    Pages that cannot go there, because someone holds them or they are a file's, stay.
    Args: owner: the device's number, not 0. Returns: how many pages of the range are the owner's now.
    Raises: MmError EINVAL: unaligned, or part of the range is not mapped or not readable.
    """
    if start % PAGE_SIZE or end % PAGE_SIZE or not start < end:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a page-aligned range")
    yield from mm.locked(_to_device(mm, start, end, owner), (start, end))
    return sum(owner_of(mm, vpn) == owner for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT))


def _to_device(mm: Mm, start: int, end: int, owner: int) -> Operation[None]:
    memory = mm.memory
    memory.lru.drain()
    while start < end:
        vma = mm.vmas.find(start)
        if vma is None or not vma.flags & VM_READ:
            raise MmError("EINVAL", f"the mapping at {start:#x} is {vma.prot_string() if vma else 'not there'}")
        stop = min(end, vma.end, start + MOVE_BATCH * PAGE_SIZE)
        yield from make_room(memory, (stop - start) >> PAGE_SHIFT)
        yield from _piece_to_device(mm, start, stop, owner)
        yield from _fill_holes(mm, start, stop, owner)
        start = stop


def _piece_to_device(mm: Mm, start: int, end: int, owner: int) -> Operation[None]:
    """Kernel: migrate_vma_setup(), migrate_vma_pages(), migrate_vma_finalize()."""
    frames = mm.memory.frames
    yield from split_range(mm, start >> PAGE_SHIFT, end >> PAGE_SHIFT)
    pfns = []
    for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        pte = mm.pgtable.get(vpn)
        pfn = pte >> PFN_SHIFT
        if pte & PRESENT and frames.flags_at[pfn] & ANON:
            pfns.append(pfn)
    yield from migrate(mm.memory, pfns, lambda _: alloc_device(mm.memory, owner), _teller(mm, start, end, owner))


def _teller(mm: Mm, start: int, end: int, owner: int) -> Teller:
    """One MIGRATE for the range of this address space, and CLEAR for others that map the pages too."""

    def teller(places: list[Place]) -> Operation[None]:
        if mm.notified:
            yield InvalidateRange(mm, start, end, Reason.MIGRATE, owner=owner)
        yield from tell([place for place in places if place[0] is not mm], Reason.CLEAR)

    return teller


def alloc_device(memory: Memory, owner: int) -> int:
    """A frame of the owner's memory, without a mapping. Raises: OutOfFrames."""
    pfn = memory.frames.alloc(DEVICE, 0, 0)
    memory.device_owner[pfn] = (owner, memory.frames.generation_at[pfn])
    return pfn


def _fill_holes(mm: Mm, start: int, end: int, owner: int) -> Operation[None]:
    """Pages that were never written to go to the device as new ones. Kernel: migrate_vma_insert_page()."""
    holes = [vpn for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT) if _is_hole(mm, vpn)]
    if not holes:
        return
    if mm.notified:
        yield InvalidateRange(mm, holes[0] << PAGE_SHIFT, end, Reason.MIGRATE, owner=owner)
    for vpn in holes:
        vma = mm.vmas.find(vpn << PAGE_SHIFT)
        if vma is not None and _is_hole(mm, vpn) and mm.memory.frames.free_nr:
            _insert(mm, vma, vpn, owner)


def _is_hole(mm: Mm, vpn: int) -> bool:
    """Whether nothing or the zero page is there, of private memory."""
    vma, pte = mm.vmas.find(vpn << PAGE_SHIFT), mm.pgtable.get(vpn)
    return vma is not None and vma.file is None and (not pte or (pte & PRESENT != 0 and not pte >> PFN_SHIFT))


def _insert(mm: Mm, vma: Vma, vpn: int, owner: int) -> None:
    memory = mm.memory
    anon_vma = vma.anon_vma or prepare_anon_vma(vma)
    pfn = alloc_device(memory, owner)
    frames = memory.frames
    frames.mapping_at[pfn], frames.index_at[pfn] = anon_vma.id, vma.linear_index(vpn << PAGE_SHIFT)
    frames.flags_at[pfn] |= ANON | SWAPBACKED | EXCLUSIVE | FRAME_DIRTY
    frames.mapcount_at[pfn] = 1
    mm.pgtable.set_entry(vpn, make(DEVICE_PRIVATE, pfn, ENTRY_WRITABLE if vma.flags & VM_WRITE else 0))


def owner_of(mm: Mm, vpn: int) -> int:
    """Whose memory the page is in; 0: nobody's but ours."""
    entry = mm.pgtable.get(vpn)
    return owner_of_frame(mm.memory, entry >> PFN_SHIFT) if entry and kind(entry) == DEVICE_PRIVATE else 0


def owner_of_frame(memory: Memory, pfn: int) -> int:
    owner, generation = memory.device_owner.get(pfn, (0, 0))
    return owner if generation == memory.frames.generation_at[pfn] else 0


def migrate_to_ram(mm: Mm, vpn: int) -> Operation[None]:
    """The CPU has come to a page that is on a device: it comes back. Kernel: do_swap_page(), migrate_to_ram()."""
    address = vpn << PAGE_SHIFT
    yield from _to_system(mm, address, address + PAGE_SIZE, 0)


def migrate_to_system(mm: Mm, start: int, end: int, owner: int) -> Operation[int]:
    """Bring the owner's pages of [start, end) back. Returns: how many pages of the range are in no device's memory."""
    if start % PAGE_SIZE or end % PAGE_SIZE or not start < end:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is not a page-aligned range")
    yield from mm.locked(_to_system(mm, start, end, owner), (start, end))
    return sum(not owner_of(mm, vpn) for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT))


def _to_system(mm: Mm, start: int, end: int, owner: int) -> Operation[None]:
    """Args: owner: whose pages, 0: any device's."""
    memory = mm.memory
    vpn, last = start >> PAGE_SHIFT, end >> PAGE_SHIFT
    while vpn < last:
        stop = min(last, vpn + MOVE_BATCH)
        pfns = [
            mm.pgtable.get(page) >> PFN_SHIFT
            for page in range(vpn, stop)
            if owner_of(mm, page) and owner_of(mm, page) == (owner or owner_of(mm, page))
        ]
        if pfns:
            yield from make_room(memory, len(pfns))
            teller = _teller(mm, vpn << PAGE_SHIFT, stop << PAGE_SHIFT, 0)
            yield from migrate(memory, pfns, lambda _: memory.frames.alloc(0, 0, 0), teller)
        vpn = stop


def evict_device(memory: Memory, owner: int) -> Operation[int]:
    """The owner gives its memory up: all its pages come back, wherever they are mapped. Returns: how many."""
    total = 0
    for mm in list(memory.mms.values()):
        if not mm.pgtable.has_entries:
            continue
        for vma in list(mm.vmas):
            if mm.vmas.find(vma.start) is vma and any(
                owner_of(mm, vpn) == owner for vpn in range(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT)
            ):
                before = sum(
                    owner_of(mm, vpn) == owner for vpn in range(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT)
                )
                yield from mm.locked(_to_system(mm, vma.start, vma.end, owner), (vma.start, vma.end))
                total += before
    return total
