"""NUMA balancing: finding out which node a program uses its pages from, and moving them there.

    scan     pages of the range get a hint: they stay present, and nobody may use them, devices included
    access   [the page, if it is elsewhere] is told: it moves to the node on which the program runs; the hint is gone

There is no clock that scans: whoever runs the program says on which node it does, and what is to be looked at.
Kernel: task_numa_work() in kernel/sched/fair.c, change_prot_numa(), do_numa_page() in mm/memory.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, CACHE, DEVICE, DIRTY, EXCLUSIVE, KSM, PINNED
from mmubusd.mm.migrate import alloc_target, migrate, split_range, tell_clear
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, LEAF_SHIFT, NUMA_HINT, PFN_SHIFT, PRESENT, WRITE, Ptes
from mmubusd.mm.vma import VM_ACCESS_FLAGS, VM_HUGETLB, VM_READ, VM_SHARED, VM_WRITE, Vma

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def scan(mm: Mm, start: int, length: int, node: int) -> Operation[int]:
    """The program runs on this node: find out which pages of the range it uses. Returns: how many pages have a hint.

    Raises: MmError EINVAL (unaligned), ENODEV (no such node).
    """
    if start % PAGE_SIZE or length % PAGE_SIZE or not length or start + length > TASK_SIZE:
        raise MmError("EINVAL", f"[{start:#x}, +{length:#x}) is not a range of whole pages")
    if node >= mm.memory.frames.nodes_nr:
        raise MmError("ENODEV", f"node {node}: there are {mm.memory.frames.nodes_nr}")
    mm.numa_node, mm.numa_hinted = node, True
    return (yield from mm.locked(_scan(mm, start, start + length), (start, start + length)))


def _scan(mm: Mm, start: int, end: int) -> Operation[int]:
    hinted = 0
    for vma in mm.vmas.overlapping(start, end):
        if _is_scanned(vma):
            low, high = max(start, vma.start), min(end, vma.end)
            hinted += _change_prot_numa(mm, vma, low, high)
            if mm.notified:
                for first, last in mm.pgtable.ranges_with_tables(low, high):
                    yield InvalidateRange(mm, first, last, Reason.PROTECTION_VMA)
    return hinted


def _is_scanned(vma: Vma) -> bool:
    """Code that many programs share is expected to be in many places; what nobody may use needs no looking after."""
    if vma.flags & VM_HUGETLB or not vma.flags & VM_ACCESS_FLAGS:
        return False
    return vma.file is None or vma.flags & (VM_READ | VM_WRITE) != VM_READ


def _change_prot_numa(mm: Mm, vma: Vma, start: int, end: int) -> int:
    """Kernel: change_pte_range() with MM_CP_PROT_NUMA."""
    hinted = 0
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        wanted = _hintable(mm, vma, ptes)
        if mm.pgtable.leaves[base >> LEAF_SHIFT].huge and not (wanted.all() and len(wanted) == 1 << LEAF_SHIFT):
            continue  # a part of a huge page
        ptes[wanted] = ptes[wanted] & ~np.uint64(WRITE | ACCESSED) | np.uint64(NUMA_HINT)
        hinted += int(np.count_nonzero(wanted))
    return hinted


def _hintable(mm: Mm, vma: Vma, ptes: Ptes) -> NDArray[np.bool_]:
    """Which pages are looked at: those on another node that could be moved. The program is taken for single-threaded,
    so what is on its own node already is left alone.
    """
    frames = mm.memory.frames
    pfns = (ptes >> np.uint64(PFN_SHIFT)).view(np.int64)
    present = (ptes & np.uint64(PRESENT | NUMA_HINT) == PRESENT) & (pfns != 0)
    pfns = np.where(present, pfns, 0)
    flags = frames.flags[pfns]
    elsewhere = pfns * frames.nodes_nr // frames.frames_nr != mm.numa_node
    wanted: NDArray[np.bool_] = present & elsewhere & (flags & np.uint32(DEVICE | KSM | PINNED) == 0)
    if not vma.flags & VM_SHARED:
        wanted &= (flags & np.uint32(ANON) == 0) | (flags & np.uint32(EXCLUSIVE) != 0) | (frames.mapcount[pfns] == 1)
    wanted &= flags & np.uint32(CACHE | DIRTY) != CACHE | DIRTY
    return wanted


def settle(mm: Mm, vpn: int) -> bool:
    """The program, or a device for it, has come to a page with a hint. Returns: whether it is where it should be; the
    hint is gone then. If not, move() is due. Kernel: do_numa_page().
    """
    frames, pte = mm.memory.frames, mm.pgtable.get(vpn)
    if frames.node_of(pte >> PFN_SHIFT) != mm.numa_node:
        return False
    _clear(mm, vpn)
    return True


def move(mm: Mm, vpn: int) -> Operation[None]:
    """Bring the page to the program's node, if it can be moved. Kernel: migrate_misplaced_folio()."""
    memory, node = mm.memory, mm.numa_node
    yield from split_range(mm, vpn, vpn + 1)
    pte = mm.pgtable.get(vpn)
    if pte & PRESENT and pte & NUMA_HINT and memory.frames.mapcount_at[pte >> PFN_SHIFT] == 1:
        yield from migrate(memory, [pte >> PFN_SHIFT], lambda old: alloc_target(memory, old, (node,)), tell_clear)
    if mm.pgtable.get(vpn) & (PRESENT | NUMA_HINT) == PRESENT | NUMA_HINT:
        _clear(mm, vpn)


def resolve(mm: Mm, start: int, end: int) -> Operation[None]:
    """A device faults the range in: hints are dealt with as for the program."""
    hinted = NUMA_HINT | PRESENT
    for first, last in mm.pgtable.runs(start >> PAGE_SHIFT, end >> PAGE_SHIFT, hinted, hinted):
        for vpn in range(first, last):
            if mm.pgtable.get(vpn) & NUMA_HINT and not settle(mm, vpn):
                yield from move(mm, vpn)


def _clear(mm: Mm, vpn: int) -> None:
    leaf = mm.pgtable.leaves[vpn >> LEAF_SHIFT]
    ptes = leaf.ptes if leaf.huge else leaf.ptes[vpn & (1 << LEAF_SHIFT) - 1 :][:1]
    ptes[:] = ptes & ~np.uint64(NUMA_HINT) | np.uint64(ACCESSED)
