"""fork: a copy of an address space that shares its private pages until either side writes. Kernel: kernel/fork.c,
mm/memory.c.

The parent's devices are told before a range is shared, so that what they still write belongs to both sides. A pinned
page is not shared: the child gets a copy, since the device must go on seeing the parent's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import hugetlb, limits, memcontrol, rmap
from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE, TASK_SIZE
from mmubusd.mm.anon import new_anon_frame
from mmubusd.mm.exit import tear_down
from mmubusd.mm.frame import ANON, CACHE, EXCLUSIVE, ORDER_MASK, PINNED
from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.huge_memory import announce_splits, split_pmd
from mmubusd.mm.notification import RESCHEDULE, SLICE_LEAVES, InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import (
    KIND_MASK,
    LEAF_MASK,
    LEAF_SHIFT,
    NEW_PTE,
    PFN_SHIFT,
    PRESENT,
    PUD_SHIFT,
    UFFD_WP,
    WRITE,
    Ptes,
)
from mmubusd.mm.swapops import DEVICE_EXCLUSIVE, ENTRY_ALONE, ENTRY_WRITABLE, mapped_frames, restored, swap_slots
from mmubusd.mm.vma import (
    UFFD_FLAGS,
    VM_ACCOUNT,
    VM_DONTCOPY,
    VM_HUGETLB,
    VM_LOCKED,
    VM_LOCKONFAULT,
    VM_WIPEONFORK,
    Vma,
)
from mmubusd.mm.vmscan import make_room, make_room_for_tables
from mmubusd.mm.zonelist import bound, room

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

NOT_INHERITED = VM_LOCKED | VM_LOCKONFAULT | UFFD_FLAGS
"""What a VMA is for its parent alone."""


def fork(mm: Mm, name: str) -> Operation[Mm]:
    """fork(2). Returns: the child. Kernel: dup_mmap()."""
    return (yield from mm.locked(_fork(mm, name), (0, TASK_SIZE)))


def _fork(mm: Mm, name: str) -> Operation[Mm]:
    limits.check_commit(mm.memory, sum(vma.pages for vma in mm.vmas if vma.flags & VM_ACCOUNT))
    yield from make_room_for_tables(mm, len(mm.pgtable.leaves))
    child = mm.memory.create_mm(name or mm.name)
    memcontrol.join(child, mm.memcg)
    child.brk_start, child.brk_end, child.mmap_base = mm.brk_start, mm.brk_end, mm.mmap_base
    for limit in ("address_space_limit", "data_limit", "locked_limit", "stack_limit"):
        setattr(child, limit, getattr(mm, limit))
    child.parent = mm.id
    child.thp, child.thp_disabled = mm.thp, mm.thp_disabled
    child.numa_node, child.numa_hinted, child.policy = mm.numa_node, mm.numa_hinted, mm.policy
    done = False
    try:
        yield from child.locked(_dup_mmap(mm, child), (0, TASK_SIZE))
        # Both go on by copying pages that are nobody's concern (their stacks, the C library's): these fill the batch.
        mm.memory.lru.drain_added()
        done = True
    finally:
        if not done:
            tear_down(child)
    return child


def _dup_mmap(mm: Mm, child: Mm) -> Operation[None]:
    for vma in list(mm.vmas):
        if not vma.flags & VM_DONTCOPY:
            copy = Vma(child, vma.start, vma.end, vma.flags & ~NOT_INHERITED, vma.pgoff, vma.file)
            copy.policy = vma.policy
            child.vmas.insert(copy, vma)
            if not vma.flags & VM_WIPEONFORK:
                rmap.fork(copy, vma)
                yield from _copy_page_range(mm, vma, copy)


def _copy_page_range(mm: Mm, vma: Vma, copy: Vma) -> Operation[None]:
    """Share the pages of a VMA that has own ones; others the child will fault in itself. Kernel: copy_page_range()."""
    if vma.anon_vma is None:
        return
    huge = vma.flags & VM_HUGETLB
    if mm.notified:
        yield InvalidateRange(mm, vma.start, vma.end, Reason.CLEAR if huge else Reason.PROTECTION_PAGE)
    child = copy.mm
    for pud in range(vma.start >> PAGE_SHIFT + PUD_SHIFT, (vma.end - 1 >> PAGE_SHIFT + PUD_SHIFT) + 1):
        if pud in mm.pgtable.puds:
            child.pgtable.puds.add(pud)
    if huge:
        hugetlb.share(mm, vma, copy)
        return
    for turn, (first, last) in enumerate(mm.pgtable.slices(vma.start, vma.end, SLICE_LEAVES)):
        if turn:
            yield RESCHEDULE
        while (wanted := _pinned_nr(mm, first, last)) and wanted > min(room(vma, first), mm.memory.room(child.memcg)):
            yield from make_room(mm.memory, wanted, child.memcg, bound(vma, first))
        _share(mm, vma, copy, first, last)
        if mm.split_blocks:
            yield from announce_splits(mm)


def _pinned_nr(mm: Mm, start: int, end: int) -> int:
    """How many pages of [start, end) must be copied at once."""
    if not mm.memory.frames.pins:
        return 0
    flags = mm.memory.frames.flags
    wanted = ANON | EXCLUSIVE | PINNED
    return sum(
        int(np.count_nonzero(flags[mapped_frames(ptes)] & np.uint32(wanted) == wanted))
        + int(np.count_nonzero(flags[mapped_frames(ptes)] & np.uint32(ORDER_MASK) != 0))
        for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
    )


def _share(mm: Mm, vma: Vma, copy: Vma, start: int, end: int) -> None:
    """The PTEs of [start, end) become the child's too. Kernel: copy_pte_range()."""
    frames, child = mm.memory.frames, copy.mm
    child.pgtable.has_entries |= mm.pgtable.has_entries
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        if mm.pgtable.leaves[base >> LEAF_SHIFT].huge and frames.flags_at[int(ptes[0]) >> PFN_SHIFT] & CACHE:
            continue  # a file's: the child faults it in itself
        target = child.pgtable.leaf(base).ptes[base & LEAF_MASK : (base & LEAF_MASK) + len(ptes)]
        if mm.pgtable.has_entries:
            _share_entries(mm, ptes)
            pfns = mapped_frames(ptes)
        else:
            pfns = (ptes >> np.uint64(PFN_SHIFT)).view(np.int64)
        flags = frames.flags[pfns]
        pinned = flags & (ANON | EXCLUSIVE | PINNED) == ANON | EXCLUSIVE | PINNED
        if pinned.any():
            large = flags & ORDER_MASK != 0
            pinned |= large & (flags & EXCLUSIVE != 0) & _folios_of(pfns, pinned & large)
        if mm.pgtable.leaves[base >> LEAF_SHIFT].huge:
            if pinned.any():
                split_pmd(mm, base << PAGE_SHIFT)
            else:
                child.pgtable.leaf(base).huge = True
        shared = pfns[~pinned & (pfns != 0)]
        np.add.at(frames.refcount, shared, 1)  # a merged page may be there more than once
        np.add.at(frames.mapcount, shared, 1)
        frames.flags[shared] &= ~np.uint32(EXCLUSIVE)
        ptes[~pinned] &= ~np.uint64(WRITE)
        target[:] = ptes & ~np.uint64(UFFD_WP)
        for at in pinned.nonzero()[0].tolist():
            new = new_anon_frame(child, copy, base + at)
            frames.copy(int(pfns[at]), new)
            target[at] = new << PFN_SHIFT | (NEW_PTE if int(ptes[at]) & WRITE else NEW_PTE & ~WRITE)


def _folios_of(pfns: Pfns, some: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the frames are in a large folio with some of them: a pin counts for its whole folio."""
    heads = pfns & -PTRS_PER_TABLE
    return np.isin(heads, heads[some])


def _share_entries(mm: Mm, ptes: Ptes) -> None:
    """Entries that are not present become the child's too, and nobody's alone. Kernel: copy_nonpresent_pte()."""
    entries = (ptes != 0) & (ptes & np.uint64(PRESENT) == 0)
    for at in (ptes & np.uint64(KIND_MASK | PRESENT) == DEVICE_EXCLUSIVE).nonzero()[0].tolist():
        ptes[at] = restored(int(ptes[at]))  # everyone has been told of the whole range
        entries[at] = False
    for slot in swap_slots(ptes):
        mm.memory.swap.duplicate(slot)
    ptes[entries] &= ~np.uint64(ENTRY_ALONE | ENTRY_WRITABLE)
