"""Huge pages on their way into a device's private memory and back, each as a whole.

    PMD of a large folio, of the zero page, or nothing ──told once──► a table of entries for 512 frames of the device
           ▲                                                                     │
           └───────────────CPU touch, or migrate_to_system: told once────────────┘

On the device the entries are those of small pages, which name a block of its frames in their order. As long as all of
them do, it is seen as a huge page and moves as one. Whatever changes a part makes small pages of the rest, and need not
know. Where there are no 512 free frames in a row, on either side, the pages move one by one: nobody is told of a huge
page then. Kernel: migrate_vma_collect_huge_pmd(), migrate_vma_insert_huge_pmd_page(), mm/migrate_device.c, v6.19.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio, huge_memory
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE, PTRS_PER_TABLE
from mmubusd.mm.anon import prepare_anon_vma
from mmubusd.mm.frame import ANON, EXCLUSIVE, EXTERNAL, SWAPBACKED, FrameTable
from mmubusd.mm.frame import DIRTY as FRAME_DIRTY
from mmubusd.mm.frame_bytes import WRITTEN
from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.swapops import DEVICE_PRIVATE, ENTRY_WRITABLE, kind, make
from mmubusd.mm.vma import VM_WRITE, Vma

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

FRAMES = np.arange(PTRS_PER_TABLE, dtype=np.uint64)


def whole_block(mm: Mm, number: int) -> int:
    """The first of the device's frames that a leaf table maps as a huge page, or 0."""
    leaf = mm.pgtable.leaves.get(number)
    if leaf is None or leaf.huge or kind(leaf.at[0]) != DEVICE_PRIVATE:
        return 0
    first = leaf.at[0] >> PFN_SHIFT
    if not mm.memory.device_memory.is_block(first):
        return 0
    wanted = FRAMES + np.uint64(first) << np.uint64(PFN_SHIFT) | np.uint64(leaf.at[0] & (1 << PFN_SHIFT) - 1)
    return first if (leaf.ptes == wanted).all() else 0


def block_to_device(mm: Mm, block: int, owner: int) -> Operation[bool]:
    """Move what may be a huge page as a whole. Requires: the block's range lock is held.

    Returns: whether it is in the owner's memory now; if not, its pages are to be moved one by one.
    """
    source = _source(mm, block)
    if source is None:
        return False
    memory, taken = mm.memory, False
    new = memory.device_memory.alloc_block(owner, None if source else mm.memcg)
    if not new:
        return False
    try:
        if mm.notified:
            yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.MIGRATE, owner=owner)
        if _source(mm, block) == source:
            _put_on_device(mm, block, source, new)
            taken = True
    finally:
        if not taken:
            memory.frames.put_many(np.arange(new, new + PTRS_PER_TABLE))
    return taken


def _source(mm: Mm, block: int) -> int | None:
    """The folio's first frame, 0 where nothing or the zero page is; None: the block is no huge page that can move."""
    frames, vma, leaf = mm.memory.frames, mm.vmas.find(block), mm.pgtable.leaves.get(block >> PAGE_SHIFT + LEAF_SHIFT)
    if vma is None or vma.file is not None or block + PMD_SIZE > vma.end:
        return None
    if leaf is None:
        return 0 if huge_memory.suitable(mm, vma, block >> PAGE_SHIFT) else None
    if not leaf.huge:
        return None
    first = leaf.at[0] >> PFN_SHIFT
    if not first:
        return 0
    alone = folio.mapcount(frames, first) == PTRS_PER_TABLE and not folio.is_held(frames, first)
    return first if alone and not (frames.flags[first : first + PTRS_PER_TABLE] & EXTERNAL).any() else None


def _put_on_device(mm: Mm, block: int, source: int, new: int) -> None:
    memory, vma, vpn = mm.memory, mm.vmas.find(block), block >> PAGE_SHIFT
    assert vma is not None, "the block is locked"
    frames, leaf, anon_vma = memory.frames, mm.pgtable.leaf(vpn), prepare_anon_vma(vma)
    pfns, old = slice(new, new + PTRS_PER_TABLE), np.arange(source, source + PTRS_PER_TABLE)
    index = vma.linear_index(block)
    frames.mapping[pfns] = anon_vma.id
    frames.index[pfns] = np.arange(index, index + PTRS_PER_TABLE, dtype=np.uint64)
    frames.mapcount[pfns] = 1
    kept = frames.flags[old] & np.uint32(SWAPBACKED | EXCLUSIVE) if source else np.uint32(SWAPBACKED | EXCLUSIVE)
    frames.flags[pfns] |= np.uint32(ANON | FRAME_DIRTY) | kept
    writable = leaf.at[0] & WRITE if source else vma.flags & VM_WRITE
    entry = make(DEVICE_PRIVATE, new, (ENTRY_WRITABLE if writable else 0) | leaf.at[0] & (SOFT_DIRTY | UFFD_WP))
    leaf.huge = False
    leaf.ptes[:] = (FRAMES << np.uint64(PFN_SHIFT)) + np.uint64(entry)
    mm.pgtable.has_entries = True
    if source:
        _replace(frames, old, new)


def block_to_system(mm: Mm, block: int, owner: int) -> Operation[bool]:
    """Bring a huge page back as a whole, if no other call is at work on a part of it.

    Args: owner: whose memory it is in, 0: any device's. Returns: whether it is back; if not, its pages are to be
    brought back one by one.
    """
    memory = mm.memory
    first = _returnable(mm, block)
    if not first or owner not in (0, memory.device_memory.owner(first)):
        return False
    new, taken = memory.frames.alloc_block(), False
    if not new:
        return False
    try:
        if mm.notified:
            yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.MIGRATE)
        vma = mm.vmas.find(block)
        if vma is not None and _returnable(mm, block) == first:
            _put_in_system(mm, vma, block, first, new)
            taken = True
    finally:
        if not taken:
            memory.frames.put_many(np.arange(new, new + PTRS_PER_TABLE))
    return taken


def _returnable(mm: Mm, block: int) -> int:
    """The first of the device's frames, if the whole page is this mapping's alone and nobody else works on it; or 0."""
    frames, vma, first = mm.memory.frames, mm.vmas.find(block), whole_block(mm, block >> PAGE_SHIFT + LEAF_SHIFT)
    if not first or vma is None or block + PMD_SIZE > vma.end or mm.lock.held_nr(block, block + PMD_SIZE) > 1:
        return 0
    pfns = slice(first, first + PTRS_PER_TABLE)
    alone = (frames.refcount[pfns] == 1).all() and (frames.mapcount[pfns] == 1).all()
    return first if alone and not mm.pgtable.get(block >> PAGE_SHIFT) & UFFD_WP else 0


def _put_in_system(mm: Mm, vma: Vma, block: int, first: int, new: int) -> None:
    frames, vpn = mm.memory.frames, block >> PAGE_SHIFT
    old, soft_dirty = np.arange(first, first + PTRS_PER_TABLE), mm.pgtable.get(vpn) & SOFT_DIRTY
    huge_memory.become_folio(mm, vma, vpn, new)
    huge_memory.replace(mm, vma, vpn, new)
    mm.pgtable.leaf(vpn).ptes |= np.uint64(soft_dirty)
    _replace(frames, old, new)


def _replace(frames: FrameTable, old: Pfns, new: int) -> None:
    """The frames from new on get what these hold, and who paid for them pays for those; nothing maps the old ones."""
    first = int(old[0])
    for page in old[frames.flags[old] & WRITTEN != 0].tolist():
        frames.copy(page, new + page - first)
    if frames.charges.by_id:
        for page in old.tolist():
            frames.charges.replace(page, new + page - first)
    frames.mapcount[old] -= 1
    frames.put_many(old)
