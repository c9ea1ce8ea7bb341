"""A large folio of private memory moves as a whole, to 512 frames in a row, however it is mapped.

As a small page does (see `migrate`): every entry that maps a page of it, of a PMD or by itself, becomes a migration
entry; everyone is told of the folio's place wherever the reverse map looks for it; then the entries become those of the
new frames, or of the old ones. What a PMD mapped is mapped by a PMD again, if it is still in one piece. Pages that
nobody maps go along, for the folio's sake.

Where there are no 512 frames in a row, or somebody holds a page, it stays; who wants its pages moved all the same
splits it. Kernel: try_to_migrate(), remove_migration_ptes() of a THP, mm/migrate.c, v6.12 to v6.18.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE
from mmubusd.mm.frame import (
    ACTIVE,
    ANON,
    DIRTY,
    EXCLUSIVE,
    HWPOISON,
    KSM,
    ORDER_MASK,
    PINNED,
    REFERENCED,
    SWAPBACKED,
    SWAPCACHE,
)
from mmubusd.mm.frame import KEPT as FRAME_KEPT
from mmubusd.mm.frame_bytes import WRITTEN
from mmubusd.mm.free_frames import OutOfFrames, Pfns
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import (
    ACCESSED,
    KIND_MASK,
    LEAF_SHIFT,
    PFN_SHIFT,
    PRESENT,
    SOFT_DIRTY,
    UFFD_WP,
    WRITE,
    Leaf,
    Ptes,
)
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.rmap_walk import Place
from mmubusd.mm.swapops import ENTRY_ALONE, ENTRY_WRITABLE, MIGRATION
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import ask_exporters

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory

KEPT = ACTIVE | ANON | DIRTY | ORDER_MASK | REFERENCED | SWAPBACKED
"""Flags that a page takes along. EXCLUSIVE comes back with the entry that has it."""
STAYS = PINNED | KSM | HWPOISON | SWAPCACHE
FRAMES = np.arange(PTRS_PER_TABLE, dtype=np.uint64)


def unmap_and_move(
    memory: Memory, pfn: int, alloc: Callable[[int], int], teller: Callable[[list[Place]], Operation[None]]
) -> Operation[int]:
    """Move the large folio that the frame is part of.

    Args: alloc, teller: as for `migrate`. Returns: the page's new frame; 0: it has not moved.
    """
    frames, head = memory.frames, folio.head(pfn)
    pages = folio.members(frames, pfn)
    if not _movable(memory, pages):
        return 0
    try:
        new = alloc(pfn)
    except OutOfFrames:
        return 0
    ticket, moved = memory.migrations.acquire((head, head + PTRS_PER_TABLE)), False
    frames.refcount[pages] += 1
    were_huge: list[Leaf] = []
    try:
        places = [(vma.mm, start, end) for vma, start, end in folio.walk(memory, pfn)]
        for vma in folio.vmas(memory, pfn):
            for base, ptes in folio.spans(memory, vma, pfn):
                _unmap(vma, base, ptes, pfn, were_huge)
        frames.flags[pages] &= ~np.uint32(EXCLUSIVE)
        yield from teller(places)
        refused = yield from ask_exporters(memory, pages.tolist())
        if not refused and (frames.refcount[pages] == _known(memory, pages) + 1).all():
            _move(memory, pages, new)
            moved = True
    finally:
        _remove_migration_ptes(memory, head, new if moved else head, int(pages[0]) - head, were_huge)
        frames.put_many(pages)
        frames.put_many(np.arange(new, new + PTRS_PER_TABLE))
        memory.migrations.release(ticket)
    return new + pfn - head if moved else 0


def _movable(memory: Memory, pages: Pfns) -> bool:
    """Whether nobody but its mappings holds any of it."""
    frames, head = memory.frames, folio.head(int(pages[0]))
    if (frames.flags[pages] & np.uint32(STAYS)).any() or memory.migrations.contended(head, head + PTRS_PER_TABLE):
        return False
    exported = np.array([len(frames.exports.get(pfn, ())) for pfn in pages.tolist()])
    return bool((frames.refcount[pages] == frames.mapcount[pages] + _known(memory, pages) + exported).all())


def _known(memory: Memory, pages: Pfns) -> Pfns:
    """How many references each has because its folio keeps it, or because someone who is fenced could reach it."""
    frames = memory.frames
    withheld = np.array([frames.withheld.get(pfn, 0) for pfn in pages.tolist()])
    known: Pfns = withheld + (frames.flags[pages] & np.uint32(FRAME_KEPT) != 0)
    return known


def _unmap(vma: Vma, base: int, ptes: Ptes, pfn: int, were_huge: list[Leaf]) -> None:
    """Kernel: try_to_migrate_one()."""
    frames, pgtable = vma.mm.memory.frames, vma.mm.pgtable
    ours = folio.mapped(frames, ptes, pfn)
    if not ours.any():
        return
    leaf, old = pgtable.leaves[base >> LEAF_SHIFT], ptes[ours]
    if leaf.huge:
        leaf.huge = False
        were_huge.append(leaf)
    if (old & np.uint64(PTE_DIRTY)).any():
        folio.set_flags(frames, pfn, on=DIRTY)
    pages = (old >> np.uint64(PFN_SHIFT)).view(np.int64)
    entries = old & ~np.uint64((1 << PFN_SHIFT) - 1) | np.uint64(MIGRATION) | old & np.uint64(SOFT_DIRTY | UFFD_WP)
    entries |= np.where(old & np.uint64(WRITE) != 0, np.uint64(ENTRY_WRITABLE), np.uint64(0))
    entries |= np.where(frames.flags[pages] & np.uint32(EXCLUSIVE) != 0, np.uint64(ENTRY_ALONE), np.uint64(0))
    ptes[ours] = entries
    pgtable.has_entries = True
    frames.mapcount[pages] -= 1
    frames.refcount[pages] -= 1


def _move(memory: Memory, pages: Pfns, new: int) -> None:
    """The frames from new on become the folio. Kernel: folio_migrate_mapping(), folio_migrate_copy()."""
    frames, head = memory.frames, folio.head(int(pages[0]))
    targets = pages - head + new
    for page in pages[frames.flags[pages] & np.uint32(WRITTEN) != 0].tolist():
        frames.copy(page, page - head + new)
    if frames.charges.by_id:
        for page in pages.tolist():
            frames.charges.replace(page, page - head + new)
    frames.mapping[targets], frames.index[targets] = frames.mapping[pages], frames.index[pages]
    frames.flags[targets] |= frames.flags[pages] & np.uint32(KEPT)
    memory.lru.add_large(new)


def _remove_migration_ptes(memory: Memory, old: int, new: int, member: int, were_huge: list[Leaf]) -> None:
    """Migration entries for the folio's frames from old on become entries of those from new on.

    Args: member: which page certainly is one of the folio's.
    """
    frames = memory.frames
    first = frames.index_at[new + member] - member
    anon_vma = memory.anon_vmas.get(frames.mapping_at[new + member])
    for vma in anon_vma.rmap.overlapping(first, first + PTRS_PER_TABLE) if anon_vma is not None else ():
        start, end = vma.overlap(first, first + PTRS_PER_TABLE)
        for base, ptes in vma.mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            _restore(memory, ptes, old, new)
            leaf = vma.mm.pgtable.leaves[base >> LEAF_SHIFT]
            if leaf in were_huge and len(ptes) == PTRS_PER_TABLE:
                leaf.huge = _is_whole(ptes, new)


def _restore(memory: Memory, ptes: Ptes, old: int, new: int) -> None:
    """Kernel: remove_migration_pte()."""
    frames = memory.frames
    inside = (ptes >> np.uint64(PFN_SHIFT)) - np.uint64(old) < PTRS_PER_TABLE
    ours = inside & (ptes & np.uint64(KIND_MASK | PRESENT) == MIGRATION)
    if not ours.any():
        return
    entries = ptes[ours]
    pages = (entries >> np.uint64(PFN_SHIFT)).view(np.int64) - old + new
    frames.refcount[pages] += 1
    frames.mapcount[pages] += 1
    frames.flags[pages[entries & np.uint64(ENTRY_ALONE) != 0]] |= np.uint32(EXCLUSIVE)
    writable = entries & np.uint64(ENTRY_WRITABLE | UFFD_WP) == ENTRY_WRITABLE
    flags = np.uint64(PRESENT | ACCESSED) | entries & np.uint64(SOFT_DIRTY | UFFD_WP)
    ptes[ours] = (
        pages.view(np.uint64) << np.uint64(PFN_SHIFT) | flags | np.where(writable, np.uint64(WRITE), np.uint64(0))
    )


def _is_whole(ptes: Ptes, first: int) -> bool:
    """Whether a table maps the folio that begins with this frame in order, with the same rights everywhere."""
    wanted = (FRAMES + np.uint64(first)) << np.uint64(PFN_SHIFT) | ptes[0] & np.uint64((1 << PFN_SHIFT) - 1)
    return bool((ptes == wanted).all())
