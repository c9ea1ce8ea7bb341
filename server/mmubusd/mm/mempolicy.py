"""migrate_pages(2) and mbind(2): pages move to the nodes where they are wanted.

Both move what is there, by the same migration as move_pages(2), and only pages that nobody else maps (MPOL_MF_MOVE).
Policies themselves are not kept: where later pages come from does not follow mbind().
Kernel: mm/mempolicy.c, v6.12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import DEVICE
from mmubusd.mm.migrate import MOVE_BATCH, migrate, split_range, tell_clear
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import PFN_SHIFT, PRESENT
from mmubusd.mm.vmscan import make_room

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED_MANY = range(6)
MPOL_MF_STRICT, MPOL_MF_MOVE, MPOL_MF_MOVE_ALL = 1, 2, 4

Misplaced = Callable[[int], bool]
"""Whether a page may not stay on this node."""


def migrate_pages(mm: Mm, old: int, new: int) -> Operation[int]:
    """Move every page on a node of old to the node of new with the same rank. Args: masks of nodes, bit n: node n.

    A node that is in both masks keeps its pages, if the masks are of different size. Kernel: do_migrate_pages().
    Returns: how many pages could not be moved. Raises: MmError EINVAL: no node of new exists.
    """
    sources, targets = _nodes(mm, old), _nodes(mm, new)
    if not targets:
        raise MmError("EINVAL", f"nodes {new:#x}: there are {mm.memory.frames.nodes_nr}")
    busy = 0
    for source, target in _moves(sources, targets):
        busy += yield from _migrate_to_node(mm, source, target)
    return busy


def _migrate_to_node(mm: Mm, source: int, target: int) -> Operation[int]:
    busy = 0
    for start, end in [(vma.start, vma.end) for vma in mm.vmas]:
        busy += yield from _move_range(mm, start, end, lambda node: node == source, lambda pfn: target)
    return busy


def _nodes(mm: Mm, mask: int) -> list[int]:
    return [node for node in range(mm.memory.frames.nodes_nr) if mask >> node & 1]


def _moves(sources: list[int], targets: list[int]) -> list[tuple[int, int]]:
    """Which node's pages go to which, in an order in which none is moved twice where that can be."""
    moves, left = list[tuple[int, int]](), list(sources)
    while True:
        pairs = [
            (node, targets[sources.index(node) % len(targets)])
            for node in left
            if len(sources) == len(targets) or node not in targets
        ]
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        if not pairs:
            return moves
        pair = next((pair for pair in pairs if pair[1] not in left), pairs[-1])
        left.remove(pair[0])
        moves.append(pair)


def mbind(mm: Mm, addr: int, length: int, mode: int, mask: int, flags: int) -> Operation[int]:
    """mbind(2), as far as it moves pages or, with MPOL_MF_STRICT, looks whether they are where they should be.

    Args: mask: of nodes, bit n: node n. Returns: 0. Kernel: do_mbind().
    Raises: MmError EINVAL (mode, mask, flags, alignment), EFAULT (a hole), EPERM (MPOL_MF_MOVE_ALL), EIO (STRICT: there
        are pages elsewhere).
    """
    nodes = _nodes(mm, mask)
    if flags & ~(MPOL_MF_STRICT | MPOL_MF_MOVE | MPOL_MF_MOVE_ALL) or not MPOL_DEFAULT <= mode <= MPOL_PREFERRED_MANY:
        raise MmError("EINVAL", f"mode {mode}, flags {flags:#x}")
    if flags & MPOL_MF_MOVE_ALL:
        raise MmError("EPERM", "pages that others map too are not a program's to move")
    if addr % PAGE_SIZE or addr + page_align(length) > 1 << 64:
        raise MmError("EINVAL", f"[{addr:#x}, +{length:#x})")
    local = mode in (MPOL_DEFAULT, MPOL_LOCAL) or (mode == MPOL_PREFERRED and not mask)
    if mask if local else not nodes:
        raise MmError("EINVAL", f"mode {mode} with nodes {mask:#x}")
    if mode == MPOL_DEFAULT:
        flags &= ~MPOL_MF_STRICT
    allowed = nodes or [mm.numa_node]
    index_at = mm.memory.frames.index_at
    end = addr + page_align(length)
    _check_mapped(mm, addr, end)
    failed = 0
    if flags & MPOL_MF_MOVE:
        failed = yield from _move_range(
            mm, addr, end, lambda node: node not in allowed,
            lambda pfn: allowed[index_at[pfn] % len(allowed) if mode == MPOL_INTERLEAVE else 0],
        )  # fmt: skip
    elif flags & MPOL_MF_STRICT:
        failed = len(_misplaced(mm, addr >> PAGE_SHIFT, end >> PAGE_SHIFT, lambda node: node not in allowed, True))
    if failed and flags & MPOL_MF_STRICT:
        raise MmError("EIO", f"{failed} pages are on other nodes")
    return 0


def _check_mapped(mm: Mm, start: int, end: int) -> None:
    for vma in mm.vmas.overlapping(start, end):
        if start < vma.start:
            break
        start = vma.end
    if start < end:
        raise MmError("EFAULT", f"nothing is mapped at {start:#x}")


def _move_range(mm: Mm, start: int, end: int, misplaced: Misplaced, target: Callable[[int], int]) -> Operation[int]:
    """Move pages of [start, end). Args: target: the node for a frame's page. Returns: how many stay misplaced."""
    memory, last = mm.memory, end >> PAGE_SHIFT
    memory.lru.drain()
    for first, stop in [
        (at, min(base + len(ptes), at + MOVE_BATCH))
        for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, last)
        for at in range(base, base + len(ptes), MOVE_BATCH)
    ]:
        if _misplaced(mm, first, stop, misplaced, True):
            yield from split_range(mm, first, stop)
            yield from make_room(memory)
            pages = _misplaced(mm, first, stop, misplaced)
            yield from migrate(memory, pages, lambda old: memory.frames.alloc_on(target(old)), tell_clear)
    return len(_misplaced(mm, start >> PAGE_SHIFT, last, misplaced, True))


def _misplaced(mm: Mm, first: int, last: int, misplaced: Misplaced, shared: bool = False) -> list[int]:
    """The frames of pages that may not stay. Args: shared: also those that others map."""
    frames = mm.memory.frames
    return [
        pfn
        for _, ptes in mm.pgtable.spans(first, last)
        for pte in ptes[ptes != 0].tolist()
        if pte & PRESENT and (pfn := pte >> PFN_SHIFT) and not frames.flags_at[pfn] & DEVICE
        if misplaced(frames.node_of(pfn)) and (shared or frames.mapcount_at[pfn] == 1)
    ]
