"""Out of memory: the largest address space is killed, and the reaper takes its memory without waiting for its end.

The reaper must not wait: its rounds are not blockable, and whoever cannot let go at once refuses. Then nothing of that
mapping has been touched, and it is tried again, up to ten times. What has been reaped would read as zeros, so the
address space counts as unstable before anything is taken from it: every later fault in it fails.

Kernel: mm/oom_kill.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import TASK_SIZE
from mmubusd.mm.notification import BEGIN_SECTION, END_SECTION, InvalidateRange, Operation, Reason
from mmubusd.mm.vma import VM_HUGETLB, VM_SHARED, Vma
from mmubusd.mm.zap import Gather, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.memcontrol import MemCgroup
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

ATTEMPTS_MAX = 10
"""MAX_OOM_REAP_RETRIES. The kernel sleeps 100 ms between two of them; here each takes as long as the answers do."""


def out_of_memory(memory: Memory, memcg: MemCgroup | None = None) -> Operation[bool]:
    """Kill someone and reap. Args: memcg: one of this group. Returns: whether any frame has become free for it."""
    victims = [mm for mm in memory.mms.values() if mm.alive and not mm.unstable and memcg in (None, mm.memcg)]
    victim = max(victims, key=badness, default=None)
    if victim is None or not badness(victim):
        return False
    before = memory.room(memcg)
    yield BEGIN_SECTION
    yield from reap(victim)
    yield END_SECTION
    memory.killed.append(victim)
    return memory.room(memcg) > before or victim.unstable


def badness(mm: Mm) -> int:
    """The pages that its end would free, for others than hugetlb. Kernel: oom_badness()."""
    swapped = sum(b - a for a, b in mm.pgtable.swapped(0, TASK_SIZE >> 12))
    return mm.resident_pages() - hugetlb.resident_pages(mm) + swapped


def reap(mm: Mm) -> Operation[bool]:
    """Take the private memory of a killed address space away. Kernel: oom_reap_task(), __oom_reap_task_mm().

    Returns: whether all of it is gone.
    """
    mm.unstable = True
    left = [vma for vma in mm.vmas if _reapable(vma)]
    for _ in range(ATTEMPTS_MAX):
        refused: list[Vma] = []
        for vma in left:
            if mm.vmas.find(vma.start) is not vma:
                continue  # its owner has unmapped it meanwhile
            if not (yield from _reap_vma(mm, vma)):
                refused.append(vma)
        left = refused
        if not left:
            return True
    return False


def _reapable(vma: Vma) -> bool:
    return not vma.flags & VM_HUGETLB and (vma.file is None or not vma.flags & VM_SHARED)


def _reap_vma(mm: Mm, vma: Vma) -> Operation[bool]:
    """Kernel: mmu_notifier_invalidate_range_start_nonblock(), unmap_page_range()."""
    start, end = vma.start, vma.end
    if mm.notified and (yield InvalidateRange(mm, start, end, Reason.UNMAP, blockable=False)).refused:
        return False
    gather = Gather(mm.memory)
    for each in mm.vmas.overlapping(start, end):
        if _reapable(each):
            zap_range(mm, each, max(start, each.start), min(end, each.end), gather)
    yield from gather.finish()
    return True
