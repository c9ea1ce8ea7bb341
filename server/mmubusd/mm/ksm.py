"""Kernel same-page merging: equal pages of memory that said so (MADV_MERGEABLE) become one, read-only.

    write-protect ──told──► nobody can change it now: compare ──equal──► the PTE maps the one page ──told──► old freed

A merged page belongs to no address space and no mapping; a write to it always copies. One scan merges whatever is
equal just then (the kernel waits until a page has not changed for a scan). Kernel: mm/ksm.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.folio_split import split_page
from mmubusd.mm.frame import ANON, DEVICE, EXCLUSIVE, KSM, PINNED, SWAPCACHE
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, PFN_SHIFT, PRESENT, WRITE
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.vma import VM_MERGEABLE

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm


def scan(memory: Memory) -> Operation[int]:
    """Merge equal pages of the whole machine. Returns: how many frames that has saved."""
    saved, stable = 0, dict[bytes, int]()
    for mm in list(memory.mms.values()):
        for vma in list(mm.vmas):
            if vma.flags & VM_MERGEABLE:
                for vpn in range(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT):
                    saved += yield from _merge(mm, vpn, stable)
    return saved


def _candidate(mm: Mm, vpn: int) -> int:
    """The frame of a page that may be merged, or 0."""
    pte, frames = mm.pgtable.get(vpn), mm.memory.frames
    vma = mm.vmas.find(vpn << PAGE_SHIFT)
    pfn = pte >> PFN_SHIFT
    if not pte & PRESENT or not pfn or vma is None or not vma.flags & VM_MERGEABLE:
        return 0
    if frames.flags_at[pfn] & (ANON | DEVICE | PINNED | SWAPCACHE) != ANON or pfn in frames.exports:
        return 0
    return pfn if frames.flags_at[pfn] & KSM or frames.refcount_at[pfn] == frames.mapcount_at[pfn] == 1 else 0


def _merge(mm: Mm, vpn: int, stable: dict[bytes, int]) -> Operation[int]:
    """Kernel: try_to_merge_one_page(), write_protect_page(), replace_page()."""
    frames, address = mm.memory.frames, vpn << PAGE_SHIFT
    if _candidate(mm, vpn):
        yield from split_page(mm, vpn)
    pfn = _candidate(mm, vpn)
    if not pfn:
        return 0
    if frames.flags_at[pfn] & KSM:
        stable.setdefault(frames.read(pfn), pfn)
        return 0
    pte = mm.pgtable.get(vpn) & ~(WRITE | PTE_DIRTY)
    mm.pgtable.set(vpn, pte)
    frames.set_dirty(pfn)
    if mm.notified:
        yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.CLEAR)
    if mm.pgtable.get(vpn) | ACCESSED != pte | ACCESSED or _candidate(mm, vpn) != pfn:
        return 0  # someone has written to it, or taken it, meanwhile
    data = frames.read(pfn)
    merged = stable.get(data)
    if merged is None or not frames.flags_at[merged] & KSM or not frames.refcount_at[merged]:
        frames.flags_at[pfn] = frames.flags_at[pfn] & ~EXCLUSIVE | KSM
        frames.has_merged = True
        stable[data] = pfn
        return 0
    if merged == pfn or frames.read(merged) != data:
        return 0
    frames.get(merged)
    frames.mapcount_at[merged] += 1
    mm.pgtable.set(vpn, merged << PFN_SHIFT | PRESENT | ACCESSED)
    frames.mapcount_at[pfn] -= 1
    if mm.notified:
        frames.quarantine_one(pfn)
        yield InvalidateRange(mm, address, address + PAGE_SIZE, Reason.CLEAR)
    frames.put(pfn)
    return 1


def merged_in(mm: Mm, start: int, end: int) -> list[int]:
    """The pages of [start, end) that are merged ones."""
    flags = mm.memory.frames.flags_at
    return [
        base + at
        for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
        for at, pte in enumerate(ptes.tolist())
        if pte & PRESENT and flags[pte >> PFN_SHIFT] & KSM
    ]
