"""Pages that are on other nodes than they should be: finding them, and moving them there.

What is found is taken before anything is moved, as the kernel isolates its pages from the lists: a page that comes
later has its place by the policy of its time. A page that others map too is not a program's to move, and counts as
being in its place; one that cannot be moved, because somebody holds it, is counted.

Kernel: queue_pages_range() in mm/mempolicy.c, v6.12 to v6.18.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import DEVICE, HUGETLB
from mmubusd.mm.free_frames import BLOCK_FRAMES
from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.migrate import MOVE_BATCH, alloc_target, migrate, split_range, tell_clear
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT
from mmubusd.mm.swapops import MIGRATION, kind
from mmubusd.mm.vma import VM_HUGETLB, Vma
from mmubusd.mm.vmscan import make_room

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

MPOL_MF_STRICT, MPOL_MF_MOVE, MPOL_MF_MOVE_ALL = 1, 2, 4
MOVES = MPOL_MF_MOVE | MPOL_MF_MOVE_ALL

Target = Callable[[int], Nodes]
"""Where the page of a frame is to go."""


@dataclass(slots=True)
class Queue:
    """What was found: pages to be moved, and how many are misplaced and stay."""

    pages: list[tuple[int, int]] = field(default_factory=list)  # virtual page number, and frame or first frame
    failed: int = 0
    pages_nr: int = 0  # to be moved, in small pages
    large: set[int] = field(default_factory=set)  # first frames of large folios among them, each of which is there once


def queue_pages(
    mm: Mm, start: int, end: int, misplaced: Callable[[int], bool], flags: int, *, holes: bool = True
) -> Queue:
    """Look for pages in [start, end).

    Args: misplaced: whether a page may not stay on this node; holes: whether parts may be unmapped.
    Raises: MmError EFAULT: a hole, EIO: with MPOL_MF_STRICT alone, a page elsewhere; whichever comes first.
    """
    queue, at = Queue(), start
    for vma in mm.vmas.overlapping(start, end):
        beyond = mm.vmas.find_from(vma.end) if vma.end < end else None
        hole = at < vma.start or (vma.end < end and (beyond is None or vma.end < beyond.start))
        if hole and not holes:
            raise MmError("EFAULT", f"nothing is mapped at {at if at < vma.start else vma.end:#x}")
        migratable = vma.file is None or vma.file.kind != "xip"
        if migratable or flags & MPOL_MF_STRICT:
            low, high = max(start, vma.start), min(end, vma.end)
            _queue_in(vma, low, high, misplaced, flags if migratable else flags & ~MOVES, queue)
        if queue.failed and flags & (MPOL_MF_STRICT | MOVES) == MPOL_MF_STRICT:
            raise MmError("EIO", f"{queue.failed} pages are on other nodes")
        at = vma.end
    return queue


def _queue_in(vma: Vma, start: int, end: int, misplaced: Callable[[int], bool], flags: int, queue: Queue) -> None:
    frames = vma.mm.memory.frames
    for base, ptes in vma.mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        huge = vma.flags & VM_HUGETLB
        for at in ptes.nonzero()[0].tolist() if not huge else (0,):
            pte = int(ptes[at])
            pfn = pte >> PFN_SHIFT
            if pte and kind(pte) == MIGRATION:
                queue.failed += 1
                continue
            if not pfn or not pte & PRESENT or frames.flags_at[pfn] & DEVICE or not misplaced(frames.node_of(pfn)):
                continue
            pfn = pfn & -BLOCK_FRAMES if huge else pfn
            if not flags & MOVES:
                queue.failed += 1
            elif flags & MPOL_MF_MOVE_ALL or not _is_shared(vma.mm, pfn):
                queue.pages_nr += BLOCK_FRAMES if huge else 1
                if not folio.is_large(frames, pfn):
                    queue.pages.append((base + at, pfn))
                elif folio.head(pfn) not in queue.large:
                    queue.large.add(folio.head(pfn))
                    queue.pages.append((base + at, pfn))


def _is_shared(mm: Mm, pfn: int) -> bool:
    """Kernel: folio_maybe_mapped_shared()."""
    frames = mm.memory.frames
    return folio.mapped_shared(mm, pfn) if folio.is_large(frames, pfn) else frames.mapcount_at[pfn] > 1


def move_pages_to(mm: Mm, pages: list[tuple[int, int]], target: Target) -> Operation[int]:
    """Move pages that were found, in their order, those of hugetlb first. Returns: how many could not be moved.

    Kernel: migrate_pages() in mm/migrate.c.
    """
    memory, failed = mm.memory, 0
    frames, batch = memory.frames, list[int]()
    found = [(vpn, pfn, frames.generation_at[pfn]) for vpn, pfn in pages]
    found.sort(key=lambda page: not frames.flags_at[page[1]] & HUGETLB)
    for vpn, pfn, generation in found:
        if frames.generation_at[pfn] != generation:
            continue  # it has gone meanwhile
        if folio.is_large(frames, pfn):
            failed += yield from _move(memory, batch, target)
            batch.clear()
            if (yield from _move(memory, [pfn], target)):
                batch += yield from _split(mm, vpn, pfn)
            continue
        yield from split_range(mm, vpn, vpn + 1)
        batch += [pfn] if frames.generation_at[pfn] == generation else []
        if len(batch) >= MOVE_BATCH:
            failed += yield from _move(memory, batch, target)
            batch.clear()
    failed += yield from _move(memory, batch, target)
    memory.lru.drain()
    return failed


def _move(memory: Memory, pfns: list[int], target: Target) -> Operation[int]:
    """Returns: how many of the frames' pages have not moved."""
    if not pfns:
        return 0
    try:
        yield from make_room(memory)
    except MmError:
        return len(pfns)
    moved = yield from migrate(memory, pfns, lambda old: alloc_target(memory, old, target(old)), tell_clear)
    return len(pfns) - len(moved)


def _split(mm: Mm, vpn: int, pfn: int) -> Operation[list[int]]:
    """A large folio does not move as a whole. Returns: what is to be moved of it then."""
    frames, pages = mm.memory.frames, folio.members(mm.memory.frames, pfn).tolist()
    generations = [frames.generation_at[page] for page in pages]
    yield from split_range(mm, vpn, vpn + 1)
    if frames.generation_at[pfn] == generations[pages.index(pfn)] and folio.is_large(frames, pfn):
        return [pfn]  # somebody holds it
    there = zip(pages, generations, strict=True)
    return [page for page, generation in there if frames.generation_at[page] == generation and frames.mapcount_at[page]]
