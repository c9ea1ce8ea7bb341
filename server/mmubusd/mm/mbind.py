"""mbind(2) and set_mempolicy_home_node(2): the memory policy of a range.

A range that is given a policy is cut out of its mapping, or merged with a neighbour that has the same. Pages that are
there stay where they are, unless the call asks for more:

    MPOL_MF_STRICT      a page elsewhere is EIO, before anything has changed
    MPOL_MF_MOVE        pages that nobody else maps move; with STRICT one that cannot is EIO, when all else is done
    MPOL_MF_MOVE_ALL    others' too; for administrators, the room above asks who calls

A policy that names no nodes (default, local) finds all pages misplaced, also those that are where they would be put
now: they move to another frame. Kernel: do_mbind() in mm/mempolicy.c, v6.12 to v6.18.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.mempolicy import MPOL_BIND, MPOL_PREFERRED_MANY, Mempolicy, mpol_new, sanitize, set_nodemask
from mmubusd.mm.notification import Operation
from mmubusd.mm.queue_pages import (
    MOVES,
    MPOL_MF_MOVE,
    MPOL_MF_MOVE_ALL,
    MPOL_MF_STRICT,
    Queue,
    move_pages_to,
    queue_pages,
)
from mmubusd.mm.vma import Vma
from mmubusd.mm.vma_merge import modify_policy
from mmubusd.mm.zonelist import by_policy

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

__all__ = ["MPOL_MF_MOVE", "MPOL_MF_MOVE_ALL", "MPOL_MF_STRICT", "mbind", "set_mempolicy_home_node"]


def mbind(mm: Mm, addr: int, length: int, mode: int, mask: int, flags: int) -> Operation[int]:
    """mbind(2). Args: mode: with its flags; mask: of nodes, bit n: node n. Returns: 0.

    Raises: MmError EINVAL (mode, mask, flags, alignment), EFAULT (a hole; with MPOL_DEFAULT: nothing is mapped), ENOMEM
        (max_map_count), EIO (MPOL_MF_STRICT: there are pages elsewhere).
    """
    mode, mode_flags = sanitize(mode)
    if flags & ~(MPOL_MF_STRICT | MOVES):
        raise MmError("EINVAL", f"flags {flags:#x}")
    start, end = _range(addr, length)
    if start == end:
        return 0
    asked = mpol_new(mode, mode_flags, mask)
    if asked is None:
        flags &= ~MPOL_MF_STRICT
    if flags & MOVES:
        mm.memory.lru.drain()
    policy = set_nodemask(asked, mm.memory.frames.nodes_nr)
    queue = yield from mm.locked(_mbind(mm, start, end, policy, mask, flags), (start, end))
    failed, index_at = queue.failed, mm.memory.frames.index_at
    if queue.pages:
        wanted = policy or mm.policy
        failed += yield from move_pages_to(mm, queue.pages, lambda pfn: by_policy(mm, wanted, index_at[pfn]))
    if failed and flags & MPOL_MF_STRICT:
        raise MmError("EIO", f"{failed} pages are on other nodes")
    return 0


def _range(addr: int, length: int) -> tuple[int, int]:
    """The pages from where to where. Raises: MmError EINVAL."""
    if addr % PAGE_SIZE:
        raise MmError("EINVAL", f"address {addr:#x} is not page-aligned")
    if addr + page_align(length) >= 1 << 64:
        raise MmError("EINVAL", f"length {length:#x} wraps around")
    return addr, addr + page_align(length)


def _mbind(mm: Mm, start: int, end: int, policy: Mempolicy | None, mask: int, flags: int) -> Operation[Queue]:
    """Look at the pages, then give the range its policy."""
    if not mm.vmas.intersects(start, end):
        raise MmError("EFAULT", f"nothing is mapped from {start:#x} to {end:#x}")
    queue = queue_pages(mm, start, end, lambda node: not mask >> node & 1, flags, holes=policy is None)
    try:
        for vma in mm.vmas.overlapping(start, end):
            _mbind_range(mm, vma, start, end, policy)
    finally:
        if mm.split_blocks:
            yield from announce_splits(mm)
    return queue


def _mbind_range(mm: Mm, vma: Vma, start: int, end: int, policy: Mempolicy | None) -> None:
    """Args: vma: of the range before it changed; it may have merged. Kernel: mbind_range(), vma_replace_policy()."""
    at = max(start, vma.start)
    found = mm.vmas.find(at)
    if found is None or found.policy == policy:
        return
    vma = modify_policy(found, at, min(end, found.end), policy)
    if vma.file is not None and vma.file.kind == "shm":
        vma.file.policies.set(vma.pgoff, vma.pgoff + vma.pages, policy)


def set_mempolicy_home_node(mm: Mm, addr: int, length: int, node: int, flags: int) -> Operation[int]:
    """set_mempolicy_home_node(2): where MPOL_BIND and MPOL_PREFERRED_MANY begin to look. Returns: 0.

    Raises: MmError EINVAL (alignment, flags, no such node), EOPNOTSUPP (another policy is there; what lies before has
        been done), ENOENT (no policy is there), ENOMEM.
    """
    if flags or node >= mm.memory.frames.nodes_nr:
        raise MmError("EINVAL", f"node {node}, flags {flags:#x}: there are {mm.memory.frames.nodes_nr} nodes")
    start, end = _range(addr, length)
    if start == end:
        return 0
    yield from mm.locked(_set_home_node(mm, start, end, node), (start, end))
    return 0


def _set_home_node(mm: Mm, start: int, end: int, node: int) -> Operation[None]:
    done = False
    try:
        for vma in mm.vmas.overlapping(start, end):
            policy = vma.policy
            if policy is None:
                continue
            if policy.mode not in (MPOL_BIND, MPOL_PREFERRED_MANY):
                raise MmError("EOPNOTSUPP", f"the policy at {vma.start:#x} has no home node")
            _mbind_range(mm, vma, start, end, replace(policy, home_node=node))
            done = True
    finally:
        if mm.split_blocks:
            yield from announce_splits(mm)
    if not done:
        raise MmError("ENOENT", f"no policy is set from {start:#x} to {end:#x}")
