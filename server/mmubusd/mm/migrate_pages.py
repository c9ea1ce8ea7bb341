"""migrate_pages(2) and move_pages(2): pages of a program go to other nodes, whatever its policies say.

Kernel: do_migrate_pages() in mm/mempolicy.c, do_pages_move() in mm/migrate.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SIZE, TASK_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.notification import Operation
from mmubusd.mm.queue_pages import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, move_pages_to, queue_pages

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def migrate_pages(mm: Mm, old: int, new: int) -> Operation[int]:
    """Move every page on a node of old to the node of new with the same rank. Args: masks of nodes, bit n: node n.

    A node that is in both masks keeps its pages, if the masks are of different size. Pages that others map too stay.
    Returns: how many pages could not be moved. Raises: MmError EINVAL: no node of new exists.
    """
    sources, targets = _nodes(mm, old), _nodes(mm, new)
    if not targets:
        raise MmError("EINVAL", f"nodes {new:#x}: there are {mm.memory.frames.nodes_nr}")
    mm.memory.lru.drain()
    busy = 0
    for source, target in _moves(sources, targets):
        busy += yield from _migrate_to_node(mm, source, target)
    return busy


def _migrate_to_node(mm: Mm, source: int, target: int) -> Operation[int]:
    queue = queue_pages(mm, 0, TASK_SIZE, lambda node: node == source, MPOL_MF_MOVE)
    return queue.failed + (yield from move_pages_to(mm, queue.pages, lambda pfn: (target,)))


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


def move_pages(mm: Mm, start: int, length: int, node: int) -> Operation[int]:
    """Move the pages in [start, start + length) to a node, as far as nobody else maps or holds them.

    Kernel: move_pages(2) with MPOL_MF_MOVE. Returns: how many pages are somewhere else still.
    Raises: MmError EINVAL (unaligned), ENODEV (no such node).
    """
    if start % PAGE_SIZE:
        raise MmError("EINVAL", f"address {start:#x} is not page-aligned")
    if node >= mm.memory.frames.nodes_nr:
        raise MmError("ENODEV", f"node {node}: there are {mm.memory.frames.nodes_nr}")
    end = start + page_align(length)
    mm.memory.lru.drain()
    queue = queue_pages(mm, start, end, lambda at: at != node, MPOL_MF_MOVE)
    yield from move_pages_to(mm, queue.pages, lambda pfn: (node,))
    return queue_pages(mm, start, end, lambda at: at != node, MPOL_MF_MOVE_ALL).pages_nr
