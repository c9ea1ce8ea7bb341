"""A page of hugetlb moves as a whole, from 512 frames in a row to 512 others.

    unmap     each mapping's table has a migration entry in every place, and is no huge page any more; who comes to one
              waits for the move to end
    tell      whoever may hold translations of it lets go: of the whole block, wherever the reverse map looks for it
    move      if nobody else holds a frame of the old page: its bytes and its state go to the new one
    remap     each table is a huge page again, the new one or the old

Reservations stay where they are: they are numbers of the file or of the mapping, and not pages. The pool has as many
pages afterwards as before (see `hugetlb_pool`). Kernel: unmap_and_move_huge_page() in mm/migrate.c, v6.12 to v6.18.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE
from mmubusd.mm.frame import ANON, CACHE, DIRTY, EXCLUSIVE, HWPOISON, ORDER_MASK, PINNED
from mmubusd.mm.free_frames import BLOCK_FRAMES, OutOfFrames, Pfns
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, PFN_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.rmap import RmapList
from mmubusd.mm.rmap_walk import Place
from mmubusd.mm.swapops import ENTRY_ALONE, ENTRY_WRITABLE, MIGRATION, kind
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import ask_exporters

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory

KEPT = ANON | CACHE | DIRTY | ORDER_MASK
"""Flags that a page takes along. EXCLUSIVE comes back with the entry that has it."""


def unmap_and_move(
    memory: Memory, first: int, alloc: Callable[[int], int], teller: Callable[[list[Place]], Operation[None]]
) -> Operation[int]:
    """Move the page that begins with this frame.

    Args: alloc, teller: as for `migrate`. Returns: where it begins now; 0: it has not moved: there is no room, or
        somebody holds it.
    """
    frames = memory.frames
    old = np.arange(first, first + BLOCK_FRAMES)
    if not _movable(memory, old):
        return 0
    try:
        new = alloc(first)
    except OutOfFrames:
        return 0
    ticket, moved = memory.migrations.acquire((first, first + BLOCK_FRAMES)), False
    frames.refcount[old] += 1
    try:
        places = _places(memory, first)
        for vma in hugetlb.mapping_vmas(memory, first):
            _unmap(vma, vma.address_of(frames.index_at[first]), first)
        frames.flags[old] &= ~np.uint32(EXCLUSIVE)
        yield from teller(places)
        refused = yield from ask_exporters(memory, old.tolist())
        if not refused and not frames.mapcount[old].any() and (frames.refcount[old] == _known(memory, old) + 1).all():
            _move(memory, old, new)
            moved = True
    finally:
        _remove_migration_ptes(memory, first, new if moved else first)
        frames.put_many(old)
        frames.put_many(np.arange(new, new + BLOCK_FRAMES))
        memory.migrations.release(ticket)
    return new if moved else 0


def _movable(memory: Memory, pfns: Pfns) -> bool:
    """Whether nobody but its mappings and its file holds the page. Kernel: folio_isolate_hugetlb()."""
    frames = memory.frames
    if (frames.flags[pfns] & np.uint32(PINNED | HWPOISON)).any():
        return False
    if int(pfns[0]) in frames.hugetlb.stuck or memory.migrations.contended(int(pfns[0]), int(pfns[-1]) + 1):
        return False
    held = frames.refcount[pfns]
    exported = np.array([len(frames.exports.get(pfn, ())) for pfn in pfns.tolist()])
    return bool(held.all() and (held == frames.mapcount[pfns] + _known(memory, pfns) + exported).all())


def _known(memory: Memory, pfns: Pfns) -> Pfns:
    """How many references each frame has from its file, and because someone who is fenced could reach it."""
    frames = memory.frames
    withheld = np.array([frames.withheld.get(pfn, 0) for pfn in pfns.tolist()])
    known: Pfns = withheld + (frames.flags[pfns] & np.uint32(CACHE) != 0)
    return known


def _rmap(memory: Memory, first: int) -> RmapList | None:
    """In which VMAs the page can be."""
    frames = memory.frames
    flags, mapping = frames.flags_at[first], frames.mapping_at[first]
    owner = (memory.anon_vmas if flags & ANON else memory.files_by_mapping).get(mapping)
    return owner.rmap if owner is not None else None


def _places(memory: Memory, first: int) -> list[Place]:
    """Where the reverse map looks for the page, up to its last mapping."""
    index, left, places = memory.frames.index_at[first], memory.frames.mapcount_at[first], list[Place]()
    rmap, mapping = _rmap(memory, first), hugetlb.mapping_vmas(memory, first)
    for vma in rmap.overlapping(index, index + BLOCK_FRAMES) if rmap is not None and left else ():
        address = vma.address_of(index)
        places.append((vma.mm, address, address + PMD_SIZE))
        left -= vma in mapping
        if not left:
            break
    return places


def _unmap(vma: Vma, address: int, first: int) -> None:
    """Kernel: try_to_migrate_one()."""
    frames, pgtable = vma.mm.memory.frames, vma.mm.pgtable
    leaf = pgtable.leaves[address >> PAGE_SHIFT + LEAF_SHIFT]
    pfns, pte = np.arange(first, first + BLOCK_FRAMES), leaf.at[0]
    flags = MIGRATION | pte & (SOFT_DIRTY | UFFD_WP)
    flags |= (ENTRY_WRITABLE if pte & WRITE else 0) | (ENTRY_ALONE if frames.flags_at[first] & EXCLUSIVE else 0)
    leaf.ptes[:] = pfns.astype(np.uint64) << np.uint64(PFN_SHIFT) | np.uint64(flags)
    leaf.huge, pgtable.has_entries = False, True
    frames.mapcount[pfns] -= 1
    frames.refcount[pfns] -= 1


def _move(memory: Memory, old: Pfns, new: int) -> None:
    """Kernel: migrate_huge_page_move_mapping(), move_hugetlb_state()."""
    frames, first = memory.frames, int(old[0])
    pfns = slice(new, new + BLOCK_FRAMES)
    for at in range(BLOCK_FRAMES):
        frames.copy(first + at, new + at)
    frames.mapping[pfns], frames.index[pfns] = frames.mapping[old], frames.index[old]
    frames.flags[pfns] |= frames.flags[old] & np.uint32(KEPT)
    if frames.flags_at[first] & CACHE:
        cache, index = memory.files_by_mapping[frames.mapping_at[first]].cache, frames.index_at[first]
        for at in range(BLOCK_FRAMES):
            cache.replace(index + at, new + at)
        frames.refcount[pfns] += 1
        frames.flags[old] &= ~np.uint32(CACHE | ORDER_MASK)
        frames.refcount[old] -= 1
    frames.hugetlb.has_moved(first, new)


def _remove_migration_ptes(memory: Memory, old: int, new: int) -> None:
    """Tables of migration entries for the old page become the huge page, new or old. Kernel: remove_migration_pte()."""
    frames, rmap = memory.frames, _rmap(memory, new)
    index, pages = frames.index_at[new], slice(new, new + BLOCK_FRAMES)
    for vma in rmap.overlapping(index, index + BLOCK_FRAMES) if rmap is not None else ():
        number = vma.address_of(index) >> PAGE_SHIFT + LEAF_SHIFT
        leaf = vma.mm.pgtable.leaves.get(number)
        entry = leaf.at[0] if leaf is not None and not leaf.huge else 0
        if kind(entry) != MIGRATION or entry >> PFN_SHIFT != old:
            continue
        if not frames.flags_at[new] & (ANON | CACHE):
            vma.mm.pgtable.drop_leaf(number)  # the file has lost the page meanwhile
            continue
        frames.refcount[pages] += 1
        frames.mapcount[pages] += 1
        if entry & ENTRY_ALONE:
            frames.flags[pages] |= np.uint32(EXCLUSIVE)
        writable = WRITE if entry & ENTRY_WRITABLE and not entry & UFFD_WP else 0
        hugetlb.set_page(
            vma.mm, vma.address_of(index), new, PRESENT | ACCESSED | writable | entry & (SOFT_DIRTY | UFFD_WP)
        )
