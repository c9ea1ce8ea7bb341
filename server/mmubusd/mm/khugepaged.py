"""khugepaged: looks through the address spaces for blocks of 2 MiB that are worth a huge page, and makes it.

A pass goes on where the last one ended, for so many pages; whoever runs the machine says when. What a block may lack is
set by the limits: pages that nobody has touched, pages in swap, pages that others have too. Somebody must have used it
lately, the program or a device, which is asked without changing anything: TestYoung.

    looked at ──too much missing, or nobody young──► left alone
        └──► told of as a whole, and copied (collapse), or the file's pages gathered (collapse_file)

Shared memory comes to be one folio in the cache and loses its tables; faults map it. There is no compaction: a pass
ends where no 512 free frames in a row are left. Kernel: mm/khugepaged.c, v6.18.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import collapse_file, folio, huge_memory, shmem_huge
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE, PTRS_PER_TABLE, MmId
from mmubusd.mm.collapse import collapse_block
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, DEVICE, LRU, ORDER_MASK, REFERENCED
from mmubusd.mm.notification import ANSWERED, RESCHEDULE, Operation, TestYoung
from mmubusd.mm.pgtable import ACCESSED, PFN_SHIFT, PRESENT, UFFD_WP, Leaf
from mmubusd.mm.swapops import SWAP, kind
from mmubusd.mm.vma import VM_HUGETLB, VM_UFFD_MINOR, VM_UFFD_MISSING, VM_UFFD_WP, Vma

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

UFFD = VM_UFFD_MISSING | VM_UFFD_MINOR | VM_UFFD_WP


@dataclass(frozen=True, slots=True)
class Limits:
    """What a block may lack; the names are those of Linux, in transparent_hugepage/khugepaged."""

    max_ptes_none: int = PTRS_PER_TABLE - 1
    max_ptes_swap: int = PTRS_PER_TABLE // 8
    max_ptes_shared: int = PTRS_PER_TABLE // 2


DEFAULTS = Limits()


class Khugepaged:
    """How far it has come, and what it has done. mm, address: where the next pass begins."""

    __slots__ = ("address", "full_scans", "limits", "mm", "pages_collapsed", "running")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.mm, self.address = 0, 0
        self.full_scans = self.pages_collapsed = 0
        self.running = False


def scan(memory: Memory, pages: int) -> Operation[int]:
    """A pass over blocks of so many pages; 0: over everything once. Kernel: khugepaged_do_scan().

    Returns: how many huge pages it has made. Raises: MmError EBUSY: one is under way.
    """
    state, collapsed = memory.khugepaged, 0
    if state.running:
        raise MmError("EBUSY", "khugepaged is at work")
    state.running = True
    try:
        memory.lru.drain()
        if not pages:
            state.mm = state.address = 0
        left, whole = pages // PTRS_PER_TABLE, pages == 0
        while whole or left > 0:
            found = _next_block(memory)
            if found is None:
                state.mm = state.address = 0
                state.full_scans += 1
                break
            mm, block = found
            state.mm, state.address = mm.id, block + PMD_SIZE
            left -= 1
            try:
                collapsed += yield from mm.locked(_scan_block(mm, block), (block, block + PMD_SIZE))
            except MmError as error:
                if error.errno == "ENOMEM" and (mm.memcg is None or mm.memcg.room >= PTRS_PER_TABLE):
                    break  # khugepaged_alloc_sleep()
            yield RESCHEDULE
    finally:
        state.running = False
        state.pages_collapsed += collapsed
    return collapsed


def _next_block(memory: Memory) -> tuple[Mm, int] | None:
    """The next block that may become huge, from where the pass is. Kernel: khugepaged_scan_mm_slot()."""
    state = memory.khugepaged
    for number in sorted(number for number in memory.mms if number >= state.mm):
        mm, start = memory.mms[MmId(number)], state.address if number == state.mm else 0
        if not mm.alive or mm.thp_disabled:
            continue
        for vma in mm.vmas:
            block = -(-max(start, vma.start) // PMD_SIZE) * PMD_SIZE
            if block + PMD_SIZE <= vma.end and _allowable(vma):
                return mm, block
    return None


def _allowable(vma: Vma) -> bool:
    """Kernel: thp_vma_allowable_order(), TVA_KHUGEPAGED."""
    if vma.flags & VM_HUGETLB:
        return False
    if vma.file is None:
        return vma.anon_vma is not None and huge_memory.enabled(vma.mm, vma)
    return shmem_huge.collapsible(vma)


def _scan_block(mm: Mm, block: int) -> Operation[bool]:
    """Requires: the block's range lock is held. Returns: whether a huge page was made of it."""
    vma, leaf = mm.vmas.find(block), mm.pgtable.leaves.get(block // PMD_SIZE)
    if vma is None or vma.start > block or block + PMD_SIZE > vma.end or not _allowable(vma):
        return False
    if vma.file is not None:
        return (yield from _scan_file(mm, vma, block))
    if leaf is None or leaf.huge or not _worth_it(mm, vma, leaf):
        return False
    if not (yield from _used_lately(mm, leaf, block)):
        return False
    if mm.pgtable.leaves.get(block // PMD_SIZE) is not leaf or leaf.huge:
        return False
    yield from collapse_block(mm, block // PMD_SIZE)
    return True


def _worth_it(mm: Mm, vma: Vma, leaf: Leaf) -> bool:
    """Whether a block of private memory lacks no more than it may. Kernel: hpage_collapse_scan_pmd()."""
    frames, limits, ptes = mm.memory.frames, mm.memory.khugepaged.limits, leaf.ptes
    present = ptes & np.uint64(PRESENT) != 0
    pfns = (ptes[present] >> np.uint64(PFN_SHIFT)).view(np.int64)
    pfns = pfns[pfns != 0]
    elsewhere = ptes[~present & (ptes != 0)].tolist()
    none = PTRS_PER_TABLE - len(pfns) - len(elsewhere)
    if none > limits.max_ptes_none or (none and vma.flags & UFFD) or (ptes & np.uint64(UFFD_WP)).any():
        return False
    if len(elsewhere) > limits.max_ptes_swap or any(kind(entry) != SWAP for entry in elsewhere):
        return False
    flags = frames.flags[pfns]
    if (flags & np.uint32(ANON | LRU | DEVICE) != ANON | LRU).any():
        return False
    large = flags & np.uint32(ORDER_MASK) != 0
    shared = int(np.count_nonzero(frames.mapcount[pfns[~large]] > 1))
    for head in np.unique(pfns[large] & -folio.FOLIO_PAGES).tolist():
        if folio.mapped_shared(mm, head):
            shared += int(np.count_nonzero(pfns[large] & -folio.FOLIO_PAGES == head))
    return shared <= limits.max_ptes_shared


def _used_lately(mm: Mm, leaf: Leaf, block: int) -> Operation[bool]:
    """Whether any page of the block is young; where some are in swap, half of the others must be."""
    ptes, flags = leaf.ptes, mm.memory.frames.flags
    present = (ptes & np.uint64(PRESENT) != 0) & (ptes >> np.uint64(PFN_SHIFT) != 0)
    pfns = (ptes >> np.uint64(PFN_SHIFT)).view(np.int64)
    young = present & ((ptes & np.uint64(ACCESSED) != 0) | (np.where(present, flags[pfns], 0) & REFERENCED != 0))
    used = int(np.count_nonzero(young))
    wanted = PTRS_PER_TABLE // 2 if ((ptes != 0) & (ptes & np.uint64(PRESENT) == 0)).any() else 1
    asked = tuple((block + ((present & ~young).nonzero()[0] << PAGE_SHIFT)).tolist())
    if used < wanted and asked:
        answer = (yield TestYoung(mm, asked)) if mm.notified else ANSWERED
        used += len(answer.young)
    return used >= wanted


def _scan_file(mm: Mm, vma: Vma, block: int) -> Operation[bool]:
    """Kernel: hpage_collapse_scan_file()."""
    file, first, limits = vma.file, vma.linear_index(block), mm.memory.khugepaged.limits
    assert file is not None
    if shmem_huge.folio_at(file, first):
        return (yield from collapse_file.drop_table(mm, vma, block, first))
    cached = file.cache.window(first, first + PTRS_PER_TABLE)
    pfns = cached[cached != 0].astype(np.int64)
    swapped = sum(first <= index < first + PTRS_PER_TABLE for index in file.swapped)
    if not len(pfns) or swapped > limits.max_ptes_swap or len(pfns) < PTRS_PER_TABLE - limits.max_ptes_none:
        return False
    if _is_held(file, pfns.tolist()):
        return False
    yield from collapse_file.collapse_cached(file, first)
    return True


def _is_held(file: File, pfns: list[int]) -> bool:
    """Whether anybody has a reference beside the cache and the mappings; who exports a page is told when it goes."""
    frames = file.memory.frames
    return any(frames.refcount_at[pfn] > 1 + frames.mapcount_at[pfn] + len(frames.exports.get(pfn, ())) for pfn in pfns)
