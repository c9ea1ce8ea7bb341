"""exit: the end of an address space. Kernel: exit_mmap(), mmu_notifier_release().

Everyone hears Release while every page is still there; the seed freed them first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import TASK_SIZE
from mmubusd.mm.notification import InvalidateRange, Operation, Reason, Release
from mmubusd.mm.zap import Gather, unmap_region, zap_ahead

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def exit(mm: Mm) -> Operation[int]:  # the call's name
    """End the address space: release, unmap everything, free everything."""
    yield from mm.locked(_exit(mm), (0, 1 << 64))
    return 0


def _exit(mm: Mm) -> Operation[None]:
    if mm.notified:
        yield Release(mm)
    gather = Gather(mm.memory)
    yield from zap_ahead(mm, 0, TASK_SIZE, gather)
    unmap_region(mm, list(mm.vmas), 0, TASK_SIZE, gather)
    mm.alive = False
    if mm.notified:
        gather.quarantine()
        yield InvalidateRange(mm, 0, TASK_SIZE, Reason.UNMAP)
    yield from gather.finish()
    del mm.memory.mms[mm.id]


def tear_down(mm: Mm) -> None:
    """Undo an address space that never ran, and of which no device knows."""
    unmap_region(mm, list(mm.vmas), 0, TASK_SIZE, Gather(mm.memory)).free()
    mm.alive = False
    del mm.memory.mms[mm.id]
