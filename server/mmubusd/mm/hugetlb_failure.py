"""A huge page of hugetlb's pool goes bad: it goes as a whole, since it is never split.

Each mapping's table gets a HWPOISON entry in every place and is no huge page any more. A file keeps the bad page, so
that nobody takes it for a hole: who faults it gets SIGBUS, until it is truncated or punched. The pool has one less.
Kernel: try_memory_failure_hugetlb(), me_huge_page(), mm/memory-failure.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import CACHE, HWPOISON
from mmubusd.mm.free_frames import BLOCK_FRAMES, Pfns
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pgtable import LEAF_SHIFT
from mmubusd.mm.rmap_walk import Place, tell
from mmubusd.mm.swapops import HWPOISON_ENTRY, make
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import Gather, evict_exports

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory


def fail_hugetlb(memory: Memory, first: int) -> Operation[None]:
    """Take the huge page that begins with this frame from everybody, and out of the pool.

    Requires: it is in use.
    Raises: MmError EHWPOISON (it has failed before), EBUSY (somebody keeps it, and it is out all the same).
    """
    frames = memory.frames
    if frames.flags_at[first] & HWPOISON:
        raise MmError("EHWPOISON", f"the huge page at frame {first} has failed before")
    pfns = np.arange(first, first + BLOCK_FRAMES)
    frames.hugetlb.nr -= 1
    for pfn in pfns.tolist():
        frames.hwpoison(pfn)
    gather, places = Gather(memory), list[Place]()
    for vma in hugetlb.mapping_vmas(memory, first):
        address = vma.address_of(frames.index_at[first])
        _unmap_for_good(vma, address, pfns, gather)
        places.append((vma.mm, address, address + PMD_SIZE))
    gather.quarantine()
    yield from tell(places, Reason.CLEAR)
    yield from gather.finish()
    yield from evict_exports(memory, pfns.tolist())
    for pfn in pfns.tolist():
        frames.forget_page(pfn)
    cached = frames.flags[pfns] & np.uint32(CACHE) != 0
    withheld = np.array([frames.withheld.get(pfn, 0) for pfn in pfns.tolist()])
    if (frames.refcount[pfns] > 1 + cached + withheld).any():
        raise MmError("EBUSY", f"the huge page at frame {first} is taken from its mappings, but somebody holds it")


def _unmap_for_good(vma: Vma, address: int, pfns: Pfns, gather: Gather) -> None:
    pgtable, vpn = vma.mm.pgtable, address >> PAGE_SHIFT
    pgtable.leaves[vpn >> LEAF_SHIFT].huge = False
    for at, pfn in enumerate(pfns.tolist()):
        pgtable.set_entry(vpn + at, make(HWPOISON_ENTRY, pfn))
    vma.mm.memory.frames.mapcount[pfns] -= 1
    gather.add(pfns)
