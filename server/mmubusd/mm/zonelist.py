"""From which nodes a page comes: the ones that an allocation tries, in order.

A machine of one node has no such question, and nobody asks it. A program's pages are otherwise looked for on the node
on which it runs, then on the nearest; a policy says where to begin, or what to do without. Only MPOL_BIND does without:
who is bound waits for these nodes to be reclaimed, and goes out of memory when that is in vain.

Two nodes are as far apart as their numbers. Kernel: policy_nodemask() in mm/mempolicy.c, build_zonelists(), v6.12.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.mempolicy import (
    INTERLEAVING,
    MPOL_BIND,
    MPOL_LOCAL,
    MPOL_PREFERRED,
    MPOL_PREFERRED_MANY,
    Mempolicy,
    policy_at,
)

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.vma import Vma


@cache
def nearest(nid: int, mask: int) -> Nodes:
    """The nodes of the mask, those nearest to a node first. Args: mask: bit n: node n."""
    nodes = [node for node in range(mask.bit_length()) if mask >> node & 1]
    return tuple(sorted(nodes, key=lambda node: abs(node - nid)))


def all_nodes(mm: Mm, nid: int) -> Nodes:
    """Every node, this one first."""
    return nearest(nid, (1 << mm.memory.frames.nodes_nr) - 1)


def nodes_for(vma: Vma, index: int, order: int = 0) -> Nodes | None:
    """Where a page of the mapping comes from, by its index, or a huge page of that order; None: there is one node.

    Kernel: vma_alloc_folio(), shmem_get_pgoff_policy().
    """
    mm = vma.mm
    if mm.memory.frames.nodes_nr == 1:
        return None
    place = index >> order
    if vma.file is not None and vma.file.kind == "shm":
        place += vma.file.id
    return by_policy(mm, policy_at(vma, index) or mm.policy, place)


def by_policy(mm: Mm, policy: Mempolicy | None, place: int) -> Nodes:
    """Where a page comes from for a program on its node. Args: place: of the page, for policies that take turns."""
    local = mm.numa_node
    if policy is None or policy.mode == MPOL_LOCAL:
        return all_nodes(mm, local)
    if policy.mode in INTERLEAVING:
        turn = nearest(0, policy.nodes)
        return all_nodes(mm, turn[place % len(turn)])
    if policy.mode == MPOL_PREFERRED:
        return all_nodes(mm, policy.nodes.bit_length() - 1)
    wanted = nearest(local if policy.home_node < 0 else policy.home_node, policy.nodes)
    if policy.mode == MPOL_PREFERRED_MANY:
        return wanted + tuple(node for node in all_nodes(mm, local) if not policy.nodes >> node & 1)
    return wanted


def takes_turns(vma: Vma, index: int) -> bool:
    """Whether pages of the mapping that lie side by side come from different nodes."""
    if vma.mm.memory.frames.nodes_nr == 1:
        return False
    policy = policy_at(vma, index) or vma.mm.policy
    return policy is not None and policy.mode in INTERLEAVING


def room(vma: Vma, address: int) -> int:
    """How many frames are free where a page of the mapping may come from."""
    return vma.mm.memory.frames.free.nr_on(bound(vma, address))


def bound(vma: Vma, address: int) -> Nodes | None:
    """The nodes beyond which a page of the mapping is not looked for; None: it may come from anywhere."""
    mm = vma.mm
    if mm.memory.frames.nodes_nr == 1:
        return None
    return _bound(policy_at(vma, vma.linear_index(address)) or mm.policy)


def bound_program(mm: Mm) -> Nodes | None:
    """The nodes beyond which nothing of the program is looked for. Kernel: policy_mbind_nodemask()."""
    return _bound(mm.policy) if mm.memory.frames.nodes_nr > 1 else None


def _bound(policy: Mempolicy | None) -> Nodes | None:
    return nearest(0, policy.nodes) if policy is not None and policy.mode == MPOL_BIND else None
