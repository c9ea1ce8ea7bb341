"""set_mempolicy(2) and get_mempolicy(2): a program's own policy, and which one holds where.

Kernel: mm/mempolicy.c, v6.12 to v6.18.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from mmubusd.mm.access import faulted_in
from mmubusd.mm.addr import PAGE_MASK, PAGE_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.mempolicy import INTERLEAVING, MPOL_DEFAULT, Mempolicy, mpol_new, policy_at, sanitize, set_nodemask
from mmubusd.mm.notification import Operation

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MPOL_F_NODE, MPOL_F_ADDR, MPOL_F_MEMS_ALLOWED = 1, 2, 4
POLICY = Struct("<QQ")
"""What get_mempolicy() answers: the mode or a node, and a mask of nodes."""


def set_mempolicy(mm: Mm, mode: int, nodes: int) -> Operation[int]:
    """set_mempolicy(2): the program's own policy, which its children inherit. Args: nodes: a mask. Returns: 0.

    Raises: MmError EINVAL.
    """
    mm.policy = set_nodemask(mpol_new(*sanitize(mode), nodes), mm.memory.frames.nodes_nr)
    return 0
    yield


def get_mempolicy(mm: Mm, addr: int, flags: int) -> Operation[bytes]:
    """get_mempolicy(2). Kernel: do_get_mempolicy(). Returns: as POLICY has it.

    Raises: MmError EINVAL (flags; an address without MPOL_F_ADDR), EFAULT: nothing is mapped there, or nothing that can
        be read.
    """
    if flags & ~(MPOL_F_NODE | MPOL_F_ADDR | MPOL_F_MEMS_ALLOWED):
        raise MmError("EINVAL", f"flags {flags:#x}")
    if flags & MPOL_F_MEMS_ALLOWED:
        if flags != MPOL_F_MEMS_ALLOWED:
            raise MmError("EINVAL", "MPOL_F_MEMS_ALLOWED stands alone")
        return POLICY.pack(0, (1 << mm.memory.frames.nodes_nr) - 1)
    if addr and not flags & MPOL_F_ADDR:
        raise MmError("EINVAL", f"address {addr:#x} without MPOL_F_ADDR")
    policy = _policy_at(mm, addr) if flags & MPOL_F_ADDR else mm.policy
    if flags & MPOL_F_NODE:
        mode = (yield from _node_at(mm, addr)) if flags & MPOL_F_ADDR else _next_node(policy)
    else:
        mode = MPOL_DEFAULT if policy is None else policy.mode | policy.flags
    return POLICY.pack(mode, 0 if policy is None else policy.user_nodes or policy.nodes)


def _policy_at(mm: Mm, addr: int) -> Mempolicy | None:
    vma = mm.vmas.find(addr)
    if vma is None:
        raise MmError("EFAULT", f"nothing is mapped at {addr:#x}")
    return policy_at(vma, vma.linear_index(addr))


def _node_at(mm: Mm, addr: int) -> Operation[int]:
    """The node of the page at the address, which is brought in for that. Kernel: lookup_node()."""
    page = addr & PAGE_MASK
    pfn = yield from mm.locked(faulted_in(mm, page), (page, page + PAGE_SIZE))
    return mm.memory.frames.node_of(pfn)


def _next_node(policy: Mempolicy | None) -> int:
    """The node from which an interleaving program's next page comes that has no place in a mapping."""
    if policy is None or policy.mode not in INTERLEAVING:
        raise MmError("EINVAL", "MPOL_F_NODE is for an address, or a program that interleaves")
    return (policy.nodes & -policy.nodes).bit_length() - 1
