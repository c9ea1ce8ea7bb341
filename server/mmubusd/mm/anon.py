"""Anonymous pages: how they begin to exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import rmap
from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.frame import ANON, EXCLUSIVE, SWAPBACKED
from mmubusd.mm.vma import Vma
from mmubusd.mm.zonelist import nodes_for

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

NEW_ANON = ANON | EXCLUSIVE | SWAPBACKED
"""The flags of a page that one VMA alone has."""


def new_anon_frame(mm: Mm, vma: Vma, vpn: int) -> int:
    """A zero page of this VMA alone, counted as mapped once."""
    memory = mm.memory
    anon_vma = vma.anon_vma or prepare_anon_vma(vma)
    index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    pfn = memory.frames.alloc(NEW_ANON, anon_vma.id, index, nodes_for(vma, index), mm.memcg)
    memory.frames.mapcount_at[pfn] = 1
    memory.lru.add(pfn)
    return pfn


def prepare_anon_vma(vma: Vma) -> rmap.AnonVma:
    """The VMA's anon_vma, given to it now if it has none. Kernel: anon_vma_prepare()."""
    if vma.anon_vma is None:
        before, after = vma.mm.vmas.neighbours(vma.start, vma.end)
        return rmap.prepare(vma, before, after)
    return vma.anon_vma
