"""Bringing a page back from swap. Kernel: do_swap_page(), mm/memory.c, v6.12.

The page comes from the swap cache, or is read into it. Who has it alone, by the entry's own word or because nobody else
is left, gets it as writable as the mapping is; to write to it, also out of the cache. Others get it read-only, and copy
it when they write. No neighbours are read ahead (page-cluster 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.anon import prepare_anon_vma
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, EXCLUSIVE, HWPOISON, LRU, SWAPBACKED
from mmubusd.mm.pgtable import ACCESSED, DIRTY, PFN_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE
from mmubusd.mm.swapops import ENTRY_ALONE
from mmubusd.mm.vma import VM_LOCKED, VM_WRITE, Vma
from mmubusd.mm.zonelist import nodes_for

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def do_swap_page(mm: Mm, vma: Vma, vpn: int, entry: int, write: bool) -> int:
    """Map the page that a swap entry stands for.

    Returns: the PTE; if it is not writable after all, a write must still copy.
    Raises: OutOfFrames; nothing has changed then.
    """
    memory, slot = mm.memory, entry >> PFN_SHIFT
    frames, swap = memory.frames, memory.swap
    anon_vma = vma.anon_vma or prepare_anon_vma(vma)
    if not entry & ENTRY_ALONE:  # others of the family may map it from the swap cache: they look for it there
        anon_vma = anon_vma.root
    index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    pfn = swap.cached(slot)
    if pfn and frames.flags_at[pfn] & HWPOISON:
        raise MmError("ENXIO", f"page {vpn << PAGE_SHIFT:#x} is lost: its frame {pfn} has failed")
    if pfn:
        frames.get(pfn)
        if not frames.mapcount_at[pfn]:
            frames.mapping_at[pfn], frames.index_at[pfn] = anon_vma.id, index
    else:
        pfn = frames.alloc(ANON | SWAPBACKED, anon_vma.id, index, nodes_for(vma, index), mm.memcg)
        swap.read_in(slot, pfn)
        memory.lru.add(pfn)
    if write and not frames.flags_at[pfn] & LRU:
        memory.lru.drain()
    frames.mapcount_at[pfn] += 1
    swap.give_back(slot)
    if swap.full or vma.flags & VM_LOCKED or (write and _references(mm, pfn) == 2):
        swap.forget(pfn)
    pte = pfn << PFN_SHIFT | PRESENT | ACCESSED | entry & (SOFT_DIRTY | UFFD_WP)
    if entry & ENTRY_ALONE or _references(mm, pfn) == 1:
        frames.flags_at[pfn] |= EXCLUSIVE
        seen = write or not mm.soft_dirty_tracked or entry & SOFT_DIRTY
        if vma.flags & VM_WRITE and seen and not entry & UFFD_WP:
            pte |= WRITE | (DIRTY | SOFT_DIRTY if write else 0)
    mm.pgtable.set(vpn, pte)
    return pte


def _references(mm: Mm, pfn: int) -> int:
    frames = mm.memory.frames
    return frames.refcount_at[pfn] + frames.extra_references(pfn)
