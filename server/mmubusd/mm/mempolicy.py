"""Memory policies: from which nodes a program, a mapping or a file wants its pages.

A policy is a value. A program has one, and so may each mapping, which then goes before the program's; two mappings
merge only if theirs are equal. Shared memory keeps the policies that were set through its mappings with the file, for
whoever maps it (`SharedPolicy`). Which nodes an allocation then tries, and in what order, is `zonelist`'s business.

    default      none: the program's own, else local
    local        the node on which the program runs, then the nearest
    preferred    this node, then the nearest             preferred many: these nodes, then the others
    bind         these nodes and no other                interleave: these in turn, by the page's place in its object

Kernel: mm/mempolicy.c, v6.12 to v6.18.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mmubusd.mm.errno import MmError

if TYPE_CHECKING:
    from mmubusd.mm.vma import Vma

MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED_MANY = range(6)
MPOL_WEIGHTED_INTERLEAVE, MPOL_MAX = 6, 7
MPOL_F_NUMA_BALANCING, MPOL_F_RELATIVE_NODES, MPOL_F_STATIC_NODES = 1 << 13, 1 << 14, 1 << 15
MODE_FLAGS = MPOL_F_NUMA_BALANCING | MPOL_F_RELATIVE_NODES | MPOL_F_STATIC_NODES

INTERLEAVING = (MPOL_INTERLEAVE, MPOL_WEIGHTED_INTERLEAVE)
"""All nodes weigh the same, so that the second is as the first."""


@dataclass(frozen=True, slots=True)
class Mempolicy:
    """One policy; equal ones let mappings merge. Kernel: struct mempolicy, mpol_equal().

    nodes: those that it uses, bit n: node n; user_nodes: those that were asked for, where the flags say that it
    matters; home_node: where to begin, -1: where the program runs.
    """

    mode: int
    flags: int
    nodes: int
    user_nodes: int = 0
    home_node: int = -1


def sanitize(mode: int) -> tuple[int, int]:
    """A mode and its flags, apart. Kernel: sanitize_mpol_flags(). Raises: MmError EINVAL."""
    flags, mode = mode & MODE_FLAGS, mode & ~MODE_FLAGS
    static = flags & (MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES)
    if not MPOL_DEFAULT <= mode < MPOL_MAX or static == MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES:
        raise MmError("EINVAL", f"mode {mode}, flags {flags:#x}")
    if flags & MPOL_F_NUMA_BALANCING and mode not in (MPOL_BIND, MPOL_PREFERRED_MANY):
        raise MmError("EINVAL", f"mode {mode} has no MPOL_F_NUMA_BALANCING")
    return mode, flags


def mpol_new(mode: int, flags: int, nodes: int) -> Mempolicy | None:
    """A policy as a call asks for it, with the nodes as they were named. Kernel: mpol_new().

    Returns: None: MPOL_DEFAULT. Raises: MmError EINVAL.
    """
    static = flags & (MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES)
    local = mode == MPOL_LOCAL or (mode == MPOL_PREFERRED and not nodes)
    if (nodes and mode in (MPOL_DEFAULT, MPOL_LOCAL)) or (local and static):
        raise MmError("EINVAL", f"mode {mode} with nodes {nodes:#x} and flags {flags:#x}")
    if not nodes and mode != MPOL_DEFAULT and not local:
        raise MmError("EINVAL", f"mode {mode} with no nodes")
    if mode == MPOL_DEFAULT:
        return None
    return Mempolicy(MPOL_LOCAL if local else mode, flags, nodes)


def set_nodemask(policy: Mempolicy | None, nodes_nr: int) -> Mempolicy | None:
    """The policy with the nodes that there are. Kernel: mpol_set_nodemask(). Raises: MmError EINVAL: there are none."""
    if policy is None or policy.mode == MPOL_LOCAL:
        return policy
    asked, there = policy.nodes, (1 << nodes_nr) - 1
    if policy.flags & MPOL_F_RELATIVE_NODES:
        nodes = 0
        while asked:
            nodes, asked = nodes | asked & there, asked >> nodes_nr
    else:
        nodes = asked & there
    if not nodes:
        raise MmError("EINVAL", f"nodes {policy.nodes:#x}: there are {nodes_nr}")
    if policy.mode == MPOL_PREFERRED:
        nodes &= -nodes
    return replace(policy, nodes=nodes, user_nodes=policy.nodes if policy.flags else 0)


class SharedPolicy:
    """The policies of a file of shared memory, by page. Kernel: struct shared_policy."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, Mempolicy]] = []  # [first, end), ascending, none overlapping

    def lookup(self, index: int) -> Mempolicy | None:
        """Kernel: mpol_shared_policy_lookup()."""
        return next((policy for first, end, policy in self._ranges if first <= index < end), None)

    def set(self, first: int, end: int, policy: Mempolicy | None) -> None:
        """Pages [first, end) have this policy from now on. Kernel: mpol_set_shared_policy()."""
        kept: list[tuple[int, int, Mempolicy]] = []
        for low, high, old in self._ranges:
            kept += [(a, b, old) for a, b in ((low, min(high, first)), (max(low, end), high)) if a < b]
        if policy is not None:
            kept.append((first, end, policy))
        self._ranges = sorted(kept, key=lambda each: each[0])


def policy_at(vma: Vma, index: int) -> Mempolicy | None:
    """What the mapping or its file says about the page of this index. Kernel: __get_vma_policy()."""
    if vma.file is not None and vma.file.kind == "shm":
        return vma.file.policies.lookup(index)
    return vma.policy
