"""Reclaim as MADV_COLD and MADV_PAGEOUT ask for it. Kernel: mm/madvise.c, mm/vmscan.c, v6.18.

Every place is told of where the reverse map looks for a page, in the order of the walk, a call's pages in one batch. A
file's page and one that goes to swap are unmapped before that; who wants them meanwhile finds them in their cache, and
they stay. A lazily freed one is left mapped until the answers are there, since a device may have written to it and then
it must stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.aging import folio_of, maps_page, page_referenced
from mmubusd.mm.file import File
from mmubusd.mm.frame import (
    ACTIVE,
    ANON,
    CACHE,
    DIRTY,
    EXCLUSIVE,
    EXTERNAL,
    KSM,
    PINNED,
    QUARANTINE,
    READAHEAD,
    SWAPBACKED,
    SWAPCACHE,
)
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.pgtable import SOFT_DIRTY, UFFD_WP
from mmubusd.mm.rmap_walk import Place, mapped_at, tell
from mmubusd.mm.swapops import ENTRY_ALONE, SWAP, make
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import Gather, ask_exporters, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory

Victim = tuple[int, int]
"""A folio to be reclaimed: its first frame and that frame's generation."""


def _still_old(memory: Memory, victims: list[Victim]) -> Operation[list[Victim]]:
    """The seed's check inside try_to_unmap(): who has been used in the meantime stays."""
    referenced = yield from page_referenced(memory, [pfn for pfn, _ in victims])
    return [victim for victim in victims if not referenced[victim[0]]]


def reclaim(memory: Memory, victims: list[Victim], under_pressure: bool = False, asks: bool = False) -> Operation[int]:
    """Try to free these folios, in order. Kernel: reclaim_pages(), shrink_folio_list().

    Args: under_pressure: also dirty pages of files, which are written first; asks: with the seed's profile, whether the
        pages are young is asked once more just before they go.
    Returns: how many frames became free.
    """
    if asks and memory.profile == "v3":
        victims = yield from _still_old(memory, victims)
    frames = memory.frames
    walked, held = [], []
    for pfn, generation in victims:
        if frames.generation_at[pfn] != generation or frames.flags_at[pfn] & QUARANTINE:
            continue  # unmapped while it was asked whether it is young: whoever did that frees it
        if frames.flags_at[pfn] & (ANON | SWAPBACKED) == ANON | SWAPBACKED:
            if frames.flags_at[pfn] & (PINNED | KSM) or not memory.swap.add(pfn):
                frames.flags_at[pfn] |= ACTIVE
                continue
            frames.get(pfn)
            held.append(pfn)
        walked.append((pfn, generation))
    try:
        walked = yield from let_go_by_exporters(memory, walked)
        places = _all_places(memory, walked)
        gather = Gather(memory)
        for pfn, _ in walked:
            _unmap(memory, pfn, gather)
        yield from tell(places, Reason.CLEAR)
        yield from gather.finish()
        for pfn, generation in walked:
            if frames.generation_at[pfn] == generation:
                yield from _reclaim_one(memory, pfn, under_pressure)
    finally:
        for pfn in held:
            frames.put(pfn)
    memory.lru.victims_nr += len(victims)
    freed = sum(frames.generation_at[pfn] != generation for pfn, generation in victims)
    memory.lru.reclaimed_nr += freed
    return freed


def let_go_by_exporters(memory: Memory, victims: list[Victim]) -> Operation[list[Victim]]:
    """Frames that are exported go only if every exporter lets go of them. Returns: what may go."""
    refused = yield from ask_exporters(memory, [pfn for pfn, _ in victims])
    generation_at = memory.frames.generation_at
    return [(pfn, was) for pfn, was in victims if pfn not in refused and generation_at[pfn] == was]


def _all_places(memory: Memory, victims: list[Victim]) -> list[Place]:
    return [
        place
        for pfn, generation in victims
        if memory.frames.generation_at[pfn] == generation
        for place in walk_places(memory, pfn)
    ]


def walk_places(memory: Memory, pfn: int) -> list[Place]:
    """Where the reverse map looks for the folio that begins with this frame, up to its last mapping.

    It looks at every VMA that covers the index, whether or not the page is there. Kernel: rmap_walk() of
    try_to_unmap().
    """
    frames = memory.frames
    if not frames.mapcount_at[pfn] and not frames.flags_at[pfn] & CACHE:
        return []
    first, end, rmap = folio_of(memory, pfn)
    if rmap is None:
        return []
    file = memory.files_by_mapping.get(frames.mapping_at[pfn])
    left = file.folio_mapcount(first, end) if file is not None else frames.mapcount_at[pfn]
    places: list[Place] = []
    for vma in rmap.overlapping(first, end):
        places.append((vma.mm, *vma.overlap(first, end)))
        left -= sum(
            maps_page(vma, index, file, pfn) for index in range(max(first, vma.pgoff), min(end, vma.pgoff + vma.pages))
        )
        if left <= 0:
            break
    return places


def _unmap(memory: Memory, pfn: int, gather: Gather) -> None:
    """Clear every PTE of a folio that stays in a cache, where whoever wants it finds it again."""
    first, end, rmap = folio_of(memory, pfn)
    if rmap is None:
        return
    flags = memory.frames.flags_at[pfn]
    for vma in rmap.overlapping(first, end):
        if not flags & ANON:
            zap_range(vma.mm, vma, *vma.overlap(first, end), gather, file_only=True)
        elif flags & SWAPCACHE and mapped_at(vma, first, pfn):
            unmap_to_swap(vma, first, pfn)


def unmap_to_swap(vma: Vma, index: int, pfn: int) -> None:
    """A swap entry takes the PTE's place. Kernel: try_to_unmap_one()."""
    memory, vpn = vma.mm.memory, vma.address_of(index) >> PAGE_SHIFT
    frames, pte = memory.frames, vma.mm.pgtable.get(vpn)
    slot, flags = memory.swap.add(pfn), frames.flags_at[pfn]
    memory.swap.duplicate(slot)
    if pte & PTE_DIRTY:
        flags |= DIRTY
    alone = ENTRY_ALONE if flags & EXCLUSIVE else 0
    vma.mm.pgtable.set_entry(vpn, make(SWAP, slot, alone | pte & (SOFT_DIRTY | UFFD_WP)))
    frames.flags_at[pfn] = flags & ~EXCLUSIVE
    frames.mapcount_at[pfn] -= 1
    frames.put(pfn)


def _reclaim_one(memory: Memory, pfn: int, under_pressure: bool) -> Operation[None]:
    """Everyone has been told: free the folio, if it is clean, not held and not mapped again."""
    frames = memory.frames
    first, end, rmap = folio_of(memory, pfn)
    if rmap is None:
        return
    if frames.flags_at[pfn] & SWAPCACHE:
        _write_to_swap(memory, pfn)
        return
    if frames.flags_at[pfn] & ANON:
        vma = next((vma for vma in rmap.overlapping(first, end) if mapped_at(vma, first, pfn)), None)
        if vma is not None:
            yield from _discard_lazyfree(vma, first, pfn)
        return
    file = memory.files_by_mapping[frames.mapping_at[pfn]]
    if file.folio_mapcount(first, end):
        return
    if under_pressure and file.kind == "disk" and file.folio_flags(first) & DIRTY:
        file.clean(first, end)
    if file.folio_flags(first) & DIRTY and not (file.kind == "shm" and _shared_to_swap(file, first, end)):
        file.set_folio_flags(first, on=ACTIVE | (READAHEAD if file.kind == "disk" else 0))
    elif file.cache.get(first) and not any(
        frames.flags_at[file.cache.get(index)] & (PINNED | EXTERNAL) for index in range(first, end)
    ):
        for index in range(first, end):
            file.delete(index, keep_bytes=True)


def _write_to_swap(memory: Memory, pfn: int) -> None:
    """Nobody maps the page any more, and only we and the swap cache hold it: its slot is enough."""
    frames = memory.frames
    if frames.mapcount_at[pfn] or frames.refcount_at[pfn] != 2:
        frames.flags_at[pfn] |= ACTIVE
    elif memory.swap.shared(pfn):
        memory.swap.write_out(pfn)
        memory.swap.drop(pfn)


def _shared_to_swap(file: File, first: int, end: int) -> bool:
    """Put an unmapped folio of shared memory into swap; false: there is no room, or someone holds it."""
    frames = file.memory.frames
    if any(frames.flags_at[file.cache.get(index)] & (PINNED | EXTERNAL) for index in range(first, end)):
        return False
    if file.memory.swap.room(file.cache.get(first)) < end - first:
        return False
    moved = [file.swap_out(index) for index in range(first, end)]
    return all(moved)


def _discard_lazyfree(vma: Vma, index: int, pfn: int) -> Operation[None]:
    """A lazily freed page goes unless it was written to or is held. Kernel: try_to_unmap_one()."""
    frames, mm = vma.mm.memory.frames, vma.mm
    address = vma.address_of(index)
    if mm.pgtable.get(address >> PAGE_SHIFT) & PTE_DIRTY:
        frames.flags_at[pfn] |= DIRTY
    if frames.flags_at[pfn] & DIRTY:
        frames.flags_at[pfn] |= SWAPBACKED | ACTIVE
    elif frames.refcount_at[pfn] == 1:
        gather = Gather(mm.memory)
        zap_range(mm, vma, address, address + (1 << PAGE_SHIFT), gather)
        yield from gather.finish()
    else:
        frames.flags_at[pfn] |= ACTIVE
