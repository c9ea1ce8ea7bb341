"""Which pages of a range are in use: what DAMON and idle page tracking ask, outside of reclaim.

    look     is anyone young? Nothing changes (test_young)
    clear    the same, and the marks are gone, so that the next look tells what was used since (clear_young)

Everyone is asked in messages of many pages; a page that the CPU or any device has used is young. What a PMD maps is
asked about as one range, and all of it is young if anything is.
Kernel: mm/damon/vaddr.c (damon_mkold, damon_young), mm/page_idle.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.notification import ClearYoung, Operation, TestYoung
from mmubusd.mm.pgtable import ACCESSED, PFN_SHIFT, PRESENT, Leaf

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

LOOK, CLEAR = 0, 1


def scan(mm: Mm, start: int, length: int, mode: int) -> Operation[int]:
    """Returns: how many pages of the range have been used since their marks were cleared.

    Raises: MmError EINVAL: unaligned, or another mode.
    """
    if start % PAGE_SIZE or not length or start + length > TASK_SIZE or mode not in (LOOK, CLEAR):
        raise MmError("EINVAL", f"[{start:#x}, +{length:#x}), mode {mode}")
    end = start + length + PAGE_SIZE - 1 & -PAGE_SIZE
    return (yield from mm.locked(_scan(mm, start, end, mode == CLEAR), (start, end)))


def _scan(mm: Mm, start: int, end: int, clear: bool) -> Operation[int]:
    young, at = 0, start
    while at < end:
        stop = min(end, (at // PMD_SIZE + 1) * PMD_SIZE)
        leaf = mm.pgtable.leaves.get(at // PMD_SIZE)
        if leaf is not None and leaf.huge:
            young += (stop - at >> PAGE_SHIFT) * (yield from _is_young(mm, leaf, at & -PMD_SIZE, clear))
        elif leaf is not None:
            used, mapped = _marks(mm, at, stop, clear)
            if mapped and mm.notified:
                answer = yield (ClearYoung if clear else TestYoung)(mm, mapped)
                used |= answer.young & frozenset(mapped)
            young += len(used)
        at = stop
    return young


def _is_young(mm: Mm, leaf: Leaf, block: int, clear: bool) -> Operation[bool]:
    """What a PMD maps is as young as any page of it; nobody has to tell of the zero page."""
    if not leaf.at[0] >> PFN_SHIFT:
        return False
    young = bool((leaf.ptes & np.uint64(ACCESSED)).any())
    if clear:
        leaf.ptes &= ~np.uint64(ACCESSED)
    if mm.notified:
        answer = yield (ClearYoung if clear else TestYoung)(mm, (), (block,))
        young = young or block in answer.young
    return young


def _marks(mm: Mm, start: int, end: int, clear: bool) -> tuple[set[int], tuple[int, ...]]:
    """The CPU's own marks of one leaf table: the addresses of the used pages, and of all that are mapped."""
    used, mapped = set[int](), list[int]()
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        there = (ptes & np.uint64(PRESENT) != 0) & (ptes >> np.uint64(PFN_SHIFT) != 0)
        young = there & (ptes & np.uint64(ACCESSED) != 0)
        mapped += ((there.nonzero()[0] + base) << PAGE_SHIFT).tolist()
        used.update(((young.nonzero()[0] + base) << PAGE_SHIFT).tolist())
        if clear:
            ptes[young] &= ~np.uint64(ACCESSED)
    return used, tuple(mapped)
