"""Whose memory it is: groups of address spaces and files that together may have only so many frames.

A frame is charged to a group when it is taken, and uncharged when it is free: what is unmapped but waits for a round,
is pinned, or is held back from someone who was fenced still counts, so nobody gains by not letting go.

    taken for                                             charged to the group of
    private memory: new, copied, back from swap           the address space
    a page of a file or of shared memory, whoever         the file, which is that of whoever made it; shared anonymous
      reads it in or writes it                              memory: of the address space that mapped it first
    a leaf page table                                     the address space
    a page that moves to another frame                    whoever paid for it before; this is never refused
    a slot in swap, apart from frames                     whoever paid for the page

At its limit a group has pages of its own reclaimed, whoever asks, and nobody else's; when that is in vain, who asked
gets ENOMEM, or the largest of the group's address spaces is killed. What belongs to no group is not counted. Huge pages
of hugetlb's pool are never charged, as in Linux without memory_hugetlb_accounting.

Kernel: mm/memcontrol.c, v6.12, without a hierarchy and without memory.high; there a file's page is charged to whoever
is the first to read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.errno import MmError
from mmubusd.mm.free_frames import OutOfFrames, Pfns

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


FORGET_AT = 64
"""With so many groups, and each time that there are twice as many, those that are not used any more are looked for."""


class MemCgroup:
    """One group. Kernel: struct mem_cgroup.

    Attributes: limit, swap_limit: frames and slots it may have (memory.max, memory.swap.max). charged, swapped: those
    it has, page tables among the frames. limit_hits: times that it was refused a frame before its own pages were
    reclaimed; ooms: times that this was in vain (memory.events: max, oom).
    """

    __slots__ = ("charged", "id", "limit", "limit_hits", "name", "ooms", "swap_limit", "swapped")

    def __init__(self, memcg_id: int, name: str, limit: int, swap_limit: int) -> None:
        self.id = memcg_id
        self.name = name
        self.limit, self.swap_limit = limit, swap_limit
        self.charged = self.swapped = 0
        self.limit_hits = self.ooms = 0

    def __repr__(self) -> str:
        return f"MemCgroup({self.name!r}, {self.charged} of {self.limit})"

    @property
    def room(self) -> int:
        """How many frames more it may have; below 0 when its limit was lowered."""
        return self.limit - self.charged

    def check(self, count: int) -> None:
        """Before taking so many frames. Kernel: try_charge_memcg(). Raises: OutOfFrames, which names the group."""
        if self.charged + count > self.limit:
            self.limit_hits += 1
            message = f"{self.name} has {self.charged} of its {self.limit} frames in use"
            raise OutOfFrames("ENOMEM", message, self, count)


class Charges:
    """Which group each frame is charged to.

    Attributes: owner, owner_at: a group's id for each frame, 0: none's; by_id: the groups.
    """

    __slots__ = ("by_id", "owner", "owner_at")

    def __init__(self, frames_nr: int) -> None:
        self.owner = np.zeros(frames_nr, np.uint32)
        self.owner_at = self.owner.data
        self.by_id: dict[int, MemCgroup] = {}

    def of(self, pfn: int) -> MemCgroup | None:
        """Who pays for the frame."""
        return self.by_id.get(self.owner_at[pfn])

    def charge(self, memcg: MemCgroup, pfn: int) -> None:
        """Requires: memcg.check()."""
        memcg.charged += 1
        self.owner_at[pfn] = memcg.id

    def charge_many(self, memcg: MemCgroup, pfns: Pfns | slice, count: int) -> None:
        """Requires: memcg.check()."""
        memcg.charged += count
        self.owner[pfns] = memcg.id

    def uncharge(self, pfn: int) -> None:
        """The frame is free. Kernel: mem_cgroup_uncharge()."""
        number = self.owner_at[pfn]
        if number:
            self.by_id[number].charged -= 1
            self.owner_at[pfn] = 0

    def uncharge_many(self, pfns: Pfns) -> None:
        owners = self.owner[pfns]
        if not owners.any():
            return
        for number, count in zip(*np.unique(owners, return_counts=True), strict=True):
            if number:
                self.by_id[int(number)].charged -= int(count)
        self.owner[pfns] = 0

    def replace(self, old: int, new: int) -> None:
        """The old frame's page moves to the new one, which is charged like it. Kernel: mem_cgroup_migrate()."""
        memcg = self.of(old)
        if memcg is not None:
            self.charge(memcg, new)


def change_limits(memory: Memory, name: str, limit: int, swap_limit: int) -> MemCgroup:
    """Give the group of this name these limits; it is made if there is none. Raises: MmError EINVAL."""
    if limit < 1 or swap_limit < 0 or not name:
        raise MmError("EINVAL", f"a group {name!r} of {limit} frames and {swap_limit} slots in swap")
    memcg = memory.memcgs.get(name)
    if memcg is None:
        _forget_unused(memory)
        memcg = memory.memcgs[name] = MemCgroup(memory.next_memcg(), name, limit, swap_limit)
        memory.frames.charges.by_id[memcg.id] = memcg
    memcg.limit, memcg.swap_limit = limit, swap_limit
    return memcg


def _forget_unused(memory: Memory) -> None:
    """When there are many groups, those that nothing belongs to go."""
    count = len(memory.memcgs)
    if count < FORGET_AT or count & (count - 1):
        return
    used = {mm.memcg for mm in memory.mms.values()} | {file.memcg for file in memory.files_by_mapping.values()}
    for memcg in list(memory.memcgs.values()):
        if memcg not in used and not memcg.charged and not memcg.swapped:
            del memory.memcgs[memcg.name], memory.frames.charges.by_id[memcg.id]
            memory.lru.lists.forget(memcg.id)


def join(mm: Mm, memcg: MemCgroup | None) -> None:
    """What the address space takes from now on is charged to this group, and so are its page tables.

    What it has been charged for stays where it is. Kernel: cgroup v2 moves no charges.
    """
    tables_nr = len(mm.pgtable.leaves)
    if mm.memcg is not None:
        mm.memcg.charged -= tables_nr
    if memcg is not None:
        memcg.charged += tables_nr
    mm.memcg = mm.pgtable.memcg = memcg
