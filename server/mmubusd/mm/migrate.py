"""Moving pages to other frames: between NUMA nodes, to a device's memory and back.

    unmap       every PTE of the page becomes a migration entry; who comes to one waits for the move to end
    tell        whoever may hold translations of it lets go
    move        if nobody else holds the old frame: its bytes and its state go to a new one
    remap       the migration entries become entries of the new frame, or of the old one if it could not be moved

Pages of hugetlb and large folios of private memory do so as a whole, see `migrate_hugetlb` and `migrate_large`.
Kernel: mm/migrate.c, v6.12: try_to_migrate(), move_to_new_folio(), remove_migration_ptes().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmubusd.mm import folio, migrate_hugetlb, migrate_large
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.aging import folio_places
from mmubusd.mm.errno import MmError
from mmubusd.mm.folio_split import split_page
from mmubusd.mm.frame import (
    ACTIVE,
    ANON,
    BLOCK_DIRTY,
    CACHE,
    DEVICE,
    DIRTY,
    EXCLUSIVE,
    HUGETLB,
    HWPOISON,
    KSM,
    NOT_UPTODATE,
    ORDER_MASK,
    PINNED,
    READAHEAD,
    READING,
    REFERENCED,
    SWAPBACKED,
    SWAPCACHE,
)
from mmubusd.mm.free_frames import BLOCK_FRAMES, OutOfFrames
from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.hugetlb import is_hugetlb
from mmubusd.mm.notification import LockWait, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, PFN_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.reclaim import walk_places
from mmubusd.mm.rmap_walk import Place, tell
from mmubusd.mm.swapops import DEVICE_PRIVATE, ENTRY_ALONE, ENTRY_WRITABLE, MIGRATION, kind, make
from mmubusd.mm.vma import VM_SHARED
from mmubusd.mm.zap import ask_exporters

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

KEPT = ACTIVE | ANON | BLOCK_DIRTY | CACHE | DIRTY | EXCLUSIVE | NOT_UPTODATE | ORDER_MASK | READAHEAD | REFERENCED
"""Flags that a page takes along. EXCLUSIVE comes back with the entry that has it."""
MOVE_BATCH = 64

Teller = Callable[[list[Place]], Operation[None]]
Alloc = Callable[[int], int]


def migrate(memory: Memory, pfns: list[int], alloc: Alloc, teller: Teller) -> Operation[dict[int, int]]:
    """Move these frames' pages; pages of hugetlb and large folios, each named by one frame, one after the other.

    Args: alloc: gives the new frame for an old one, without any state, or raises OutOfFrames; teller: tells of the
        places that have been unmapped. Returns: new frame by old frame, of those that were moved.
    """
    frames = memory.frames
    moved: dict[int, int] = {}
    for pfn in pfns:
        if frames.flags_at[pfn] & HUGETLB:
            new = yield from migrate_hugetlb.unmap_and_move(memory, pfn, alloc, teller)
        elif folio.is_large(frames, pfn):
            new = yield from migrate_large.unmap_and_move(memory, pfn, alloc, teller)
        else:
            continue
        if new:
            moved[pfn] = new
    moving = [pfn for pfn in pfns if pfn not in moved and _movable(memory, pfn)]
    if not moving:
        return moved
    ticket = memory.migrations.acquire(*((pfn, pfn + 1) for pfn in moving))
    for pfn in moving:
        frames.get(pfn)
    try:
        places = list(dict.fromkeys(place for pfn in moving for place in walk_places(memory, pfn)))
        for pfn in moving:
            _try_to_migrate(memory, pfn)
        yield from teller(places)
        held = yield from ask_exporters(memory, moving)
        for pfn in moving:
            known = 1 + _cached(memory, pfn) + frames.withheld.get(pfn, 0)
            if pfn not in held and frames.refcount_at[pfn] == known and not frames.mapcount_at[pfn]:
                try:
                    moved[pfn] = _move(memory, pfn, alloc(pfn))
                except MmError:
                    break
    finally:
        for pfn in moving:
            remove_migration_ptes(memory, pfn, moved.get(pfn, pfn))
            frames.put(pfn)
        memory.migrations.release(ticket)
    return moved


def alloc_target(memory: Memory, old: int, nodes: Nodes) -> int:
    """Where the page of this frame can go on these nodes. Kernel: alloc_migration_target(). Raises: OutOfFrames."""
    frames = memory.frames
    if frames.flags_at[old] & HUGETLB:
        return frames.alloc_hugetlb_to_move(nodes)
    if not folio.is_large(frames, old):
        return frames.alloc_on(nodes)
    first = frames.alloc_block(nodes)
    if not first:
        raise OutOfFrames("ENOMEM", f"nodes {list(nodes)} have no {BLOCK_FRAMES} free frames in a row")
    return first


def _movable(memory: Memory, pfn: int) -> bool:
    """Whether nobody but its mappings and caches holds the page. Kernel: folio_expected_refs()."""
    frames = memory.frames
    fixed = frames.flags_at[pfn] & (PINNED | KSM | READING | HUGETLB | HWPOISON)
    if not pfn or fixed or memory.migrations.contended(pfn, pfn + 1):
        return False
    if folio.is_large(frames, pfn):
        return False
    exports = len(frames.exports.get(pfn, ()))
    # Withheld is the frame, from whoever could have it next; its page may leave it.
    known = frames.mapcount_at[pfn] + _cached(memory, pfn) + exports + frames.withheld.get(pfn, 0)
    return 0 < frames.refcount_at[pfn] == known and pfn not in frames.unknown_sharers


def _cached(memory: Memory, pfn: int) -> int:
    flags = memory.frames.flags_at[pfn]
    return (flags & CACHE != 0) + (flags & SWAPCACHE != 0)


def _try_to_migrate(memory: Memory, pfn: int) -> None:
    """Put a migration entry in the place of each mapping. Kernel: try_to_migrate_one()."""
    frames = memory.frames
    for vma, address in folio_places(memory, pfn):
        mm, vpn = vma.mm, address >> PAGE_SHIFT
        pte = mm.pgtable.get(vpn)
        if pte >> PFN_SHIFT != pfn:
            continue  # another page of its folio
        if pte & PTE_DIRTY and pte & PRESENT:
            _set_dirty(memory, pfn)
        writable = pte & WRITE if pte & PRESENT else pte & ENTRY_WRITABLE
        flags = (ENTRY_WRITABLE if writable else 0) | (ENTRY_ALONE if frames.flags_at[pfn] & EXCLUSIVE else 0)
        mm.pgtable.set_entry(vpn, make(MIGRATION, pfn, flags | pte & (SOFT_DIRTY | UFFD_WP)))
        frames.mapcount_at[pfn] -= 1
        frames.put(pfn)
    frames.flags_at[pfn] &= ~EXCLUSIVE


def _set_dirty(memory: Memory, pfn: int) -> None:
    if memory.frames.flags_at[pfn] & CACHE:
        memory.files_by_mapping[memory.frames.mapping_at[pfn]].set_dirty(memory.frames.index_at[pfn])
    else:
        memory.frames.set_dirty(pfn)


def _move(memory: Memory, old: int, new: int) -> int:
    """The new frame, of one reference, becomes the page. Kernel: folio_migrate_mapping(), folio_migrate_copy()."""
    frames = memory.frames
    flags = frames.flags_at[old]
    device = frames.flags_at[new] & DEVICE
    frames.copy(old, new)
    frames.charges.replace(old, new)
    frames.mapping_at[new], frames.index_at[new] = frames.mapping_at[old], frames.index_at[old]
    frames.flags_at[new] |= flags & KEPT | (SWAPBACKED if device or flags & DEVICE else flags & SWAPBACKED)
    if device or flags & DEVICE:
        frames.flags_at[new] |= DIRTY
    if flags & CACHE:
        memory.files_by_mapping[frames.mapping_at[old]].cache.replace(frames.index_at[old], new)
        frames.get(new)
        frames.flags_at[old] &= ~(CACHE | ORDER_MASK)
        frames.put(old)
    if flags & SWAPCACHE:
        memory.swap.replace(old, new)
    if not device:
        memory.lru.add(new)
    return new


def remove_migration_ptes(memory: Memory, old: int, new: int) -> None:
    """The entries that stand for the old frame's page become entries of the new frame, which may be the old one.

    A new frame gives up its first reference here.
    """
    frames = memory.frames
    index, flags = frames.index_at[new], frames.flags_at[new]
    owner = (memory.anon_vmas if flags & ANON else memory.files_by_mapping).get(frames.mapping_at[new])
    for vma in owner.rmap.overlapping(index, index + 1) if owner is not None else ():
        vpn = vma.address_of(index) >> PAGE_SHIFT
        entry = vma.mm.pgtable.get(vpn)
        if kind(entry) != MIGRATION or entry >> PFN_SHIFT != old:
            continue
        if not flags & (ANON | CACHE):
            vma.mm.pgtable.set(vpn, 0)  # the file has lost the page meanwhile
            continue
        frames.get(new)
        frames.mapcount_at[new] += 1
        if entry & ENTRY_ALONE:
            frames.flags_at[new] |= EXCLUSIVE
        kept = entry & (SOFT_DIRTY | UFFD_WP)
        if flags & DEVICE and not memory.device_memory.is_coherent(new):
            vma.mm.pgtable.set_entry(vpn, make(DEVICE_PRIVATE, new, kept | entry & ENTRY_WRITABLE))
            continue
        # A shared page of a file asks again before it is written to, so that the write is seen.
        seen = not (vma.flags & VM_SHARED and vma.file is not None and vma.file.kind == "disk")
        writable = WRITE if entry & ENTRY_WRITABLE and seen and not entry & UFFD_WP else 0
        vma.mm.pgtable.set(vpn, new << PFN_SHIFT | PRESENT | ACCESSED | writable | kept)
    if new != old:
        frames.put(new)


def wait(mm: Mm, entry: int) -> Operation[None]:
    """Wait for the page of a migration entry to arrive. Kernel: migration_entry_wait()."""
    pfn = entry >> PFN_SHIFT
    ticket = mm.memory.migrations.acquire((pfn, pfn + 1))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
    finally:
        mm.memory.migrations.release(ticket)


def split_range(mm: Mm, first: int, last: int) -> Operation[None]:
    """Pages of large folios in [first, last) are moved one by one."""
    frames = mm.memory.frames
    for vpn in range(first, last):
        pte, leaf = mm.pgtable.get(vpn), mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
        if leaf is None or is_hugetlb(mm, leaf):
            continue
        if leaf.huge or (pte & PRESENT and folio.is_large(frames, pte >> PFN_SHIFT)):
            yield from split_page(mm, vpn)


def tell_clear(places: list[Place]) -> Operation[None]:
    """Pages are cleared where they were mapped."""
    return tell(places, Reason.CLEAR)
