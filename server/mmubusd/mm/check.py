"""Every invariant, recomputed from first principles. AssertionError where one does not hold."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, PTRS_PER_TABLE, TASK_SIZE
from mmubusd.mm.frame import (
    ANON,
    CACHE,
    DEVICE,
    EXCLUSIVE,
    EXTERNAL,
    HWPOISON,
    IN_BATCH,
    KEPT,
    KSM,
    PINNED,
    QUARANTINE,
    SWAPBACKED,
    SWAPCACHE,
    FrameTable,
)
from mmubusd.mm.frame import DIRTY as FRAME_DIRTY
from mmubusd.mm.frame_bytes import RESERVED, SOILED, WRITTEN
from mmubusd.mm.hugetlb import is_hugetlb
from mmubusd.mm.pgtable import DIRTY, LEAF_SHIFT, NUMA_HINT, PFN_SHIFT, PRESENT, PUD_SHIFT, WRITE, Leaf
from mmubusd.mm.swapops import (
    DEVICE_EXCLUSIVE,
    DEVICE_PRIVATE,
    ENTRY_ALONE,
    HWPOISON_ENTRY,
    MIGRATION,
    SWAP,
    kind,
    mapped_frames,
    maps_frame,
    swap_slots,
)
from mmubusd.mm.vma import VM_HUGETLB, VM_SHARED, VM_WRITE, Vma

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm

KINDS = (SWAP, MIGRATION, DEVICE_PRIVATE, DEVICE_EXCLUSIVE, HWPOISON_ENTRY)
FOLIO_FLAGS = np.uint32(FRAME_DIRTY | SWAPBACKED)
"""What is a large folio's, on all its frames alike."""


def check_mm(mm: Mm) -> None:
    """One address space: VMA order, page tables, rights, and each page's place in the reverse map."""
    _check_vmas(mm)
    for number in mm.pgtable.leaves:
        assert number << LEAF_SHIFT >> PUD_SHIFT in mm.pgtable.puds, "a leaf table has tables above it"
        leaf = mm.pgtable.leaves[number]
        if leaf.huge:
            _check_huge(mm, number, leaf)
        for at in leaf.ptes.nonzero()[0].tolist():
            vpn = (number << LEAF_SHIFT) + at
            vma = mm.vmas.find(vpn << PAGE_SHIFT)
            assert vma is not None, f"page {vpn:#x} is present, but nothing is mapped there"
            _check_pte(mm, vma, vpn, int(leaf.ptes[at]))


def _check_vmas(mm: Mm) -> None:
    before = 0
    for vma in mm.vmas:
        assert before <= vma.start < vma.end <= TASK_SIZE + PAGE_SIZE, f"{vma} is in order and not empty"
        assert vma.start % PAGE_SIZE == 0, f"{vma} is page-aligned"
        assert vma.end % PAGE_SIZE == 0, f"{vma} is page-aligned"
        assert vma.mm is mm, f"{vma} is found where it is"
        assert mm.vmas.find(vma.start) is vma, f"{vma} is found where it is"
        assert (vma.anon_vma is None) == (not vma.chain), f"{vma} has an anon_vma or no chain"
        assert vma.anon_vma is None or vma.anon_vma in vma.chain, f"{vma}: its anon_vma is in its chain"
        assert all(vma in anon_vma.rmap for anon_vma in vma.chain), f"{vma} is where its pages are looked for"
        assert vma.file is None or vma in vma.file.rmap, f"{vma} is in its file's reverse map"
        before = vma.end
    assert not mm.split_blocks, "every cut block has been told of"


def _check_huge(mm: Mm, number: int, leaf: Leaf) -> None:
    """A PMD: entries with the same rights, of a whole large folio or of the zero page, in one VMA."""
    frames, block = mm.memory.frames, number * PMD_SIZE
    vma = mm.vmas.find(block)
    assert vma is not None, f"block {block:#x}: a PMD lies in one VMA"
    assert block + PMD_SIZE <= vma.end, f"block {block:#x}: a PMD lies in one VMA"
    shared = vma.file is not None
    assert vma.file is None or vma.file.kind in ("shm", "hugetlb"), f"block {block:#x}: no file of a disk is huge"
    flags = leaf.ptes & np.uint64(PRESENT | WRITE | DIRTY)
    assert (flags == flags[0]).all(), f"block {block:#x}: a PMD gives the same rights everywhere"
    pfns = (leaf.ptes >> np.uint64(PFN_SHIFT)).view(np.int64)
    first = int(pfns[0])
    if not first:
        assert not pfns.any(), f"block {block:#x}: the huge zero page is zero everywhere"
        return
    assert folio.head(first) == first, f"block {block:#x}: frame {first} is the folio's first"
    assert is_hugetlb(mm, leaf) == bool(vma.flags & VM_HUGETLB), f"block {block:#x}: hugetlb has the pool's pages"
    assert (pfns == np.arange(first, first + PTRS_PER_TABLE)).all(), f"block {block:#x}: the folio is mapped in order"
    whole = len(folio.members(frames, first)) == PTRS_PER_TABLE
    assert whole or shared, f"folio {first} is whole"
    alone = frames.flags[pfns] & EXCLUSIVE
    assert (alone == alone[0]).all(), f"folio {first}: what a PMD maps is exclusive as a whole"


def _check_folio(frames: FrameTable, pfn: int) -> None:
    """A large folio of private memory: its frames are of one place and one state."""
    pfns = folio.members(frames, pfn)
    for field in (frames.mapping[pfns], frames.index[pfns] - pfns.astype(np.uint64), frames.flags[pfns] & FOLIO_FLAGS):
        assert (field == field[0]).all(), f"folio {folio.head(pfn)} is one"
    assert not (frames.flags[pfns] & (CACHE | IN_BATCH)).any(), f"folio {folio.head(pfn)} waits in no batch"
    kept = frames.flags[pfns] & KEPT != 0
    assert not frames.mapcount[pfns[kept]].any(), f"folio {folio.head(pfn)} keeps what is mapped no longer"
    assert kept.any() == (folio.head(pfn) in frames.partial.queue), f"folio {folio.head(pfn)} is to be split"


def _check_pte(mm: Mm, vma: Vma, vpn: int, pte: int) -> None:
    frames, pfn = mm.memory.frames, pte >> PFN_SHIFT
    if not pte & PRESENT:
        _check_entry(mm, vma, vpn, pte)
        return
    assert not pte & NUMA_HINT or not pte & WRITE, f"page {vpn:#x}: what has a hint is not written to"
    assert not pte & WRITE or vma.flags & VM_WRITE, f"page {vpn:#x} is writable only if {vma} is"
    index = vma.pgoff + vpn - (vma.start >> PAGE_SHIFT)
    if not pfn:
        assert not pte & (WRITE | DIRTY), f"page {vpn:#x}: the zero page is neither writable nor dirty"
        return
    flags = frames.flags_at[pfn]
    if flags & KSM:
        assert not pte & WRITE, f"page {vpn:#x}: a merged page is never writable"
        assert not flags & EXCLUSIVE, f"frame {pfn} is merged, so nobody's alone"
        return
    coherent = mm.memory.device_memory.is_coherent(pfn)
    assert not flags & DEVICE or coherent, f"page {vpn:#x}: the CPU has no device's private memory"
    assert frames.index_at[pfn] == index, f"page {vpn:#x}: frame {pfn} belongs to this index"
    if flags & ANON:
        assert not vma.flags & VM_SHARED, f"page {vpn:#x}: shared memory has no own pages"
        anon_vma = mm.memory.anon_vmas.get(frames.mapping_at[pfn])
        assert anon_vma is not None, f"page {vpn:#x}: frame {pfn} is found from its anon_vma"
        assert vma in anon_vma.rmap, f"page {vpn:#x}: frame {pfn} is found from its anon_vma"
        assert not pte & WRITE or flags & EXCLUSIVE, f"page {vpn:#x} is writable only if nobody else has it"
        assert not flags & EXCLUSIVE or frames.mapcount_at[pfn] == 1, f"frame {pfn} is exclusive, so mapped once"
    else:
        assert vma.file is not None, f"page {vpn:#x} is its file's"
        assert frames.mapping_at[pfn] == vma.file.id, f"page {vpn:#x} is its file's"
        assert flags & CACHE, f"page {vpn:#x}: frame {pfn} is what is cached"
        assert vma.file.cache.get(index) == pfn, f"page {vpn:#x}: frame {pfn} is what is cached"
        assert not pte & WRITE or vma.flags & VM_SHARED, f"page {vpn:#x}: a private mapping never writes to the file"


def _check_entry(mm: Mm, vma: Vma, vpn: int, entry: int) -> None:
    value, frames = entry >> PFN_SHIFT, mm.memory.frames
    assert mm.pgtable.has_entries, f"page {vpn:#x}: the table knows that it has entries"
    assert kind(entry) in KINDS, f"page {vpn:#x}: an entry has a kind"
    if kind(entry) == SWAP:
        assert not vma.flags & VM_SHARED, f"page {vpn:#x}: shared memory has no swap entries"
        assert mm.memory.swap.count.get(value, 0) > 0, f"page {vpn:#x}: slot {value} is in use"
        assert not entry & ENTRY_ALONE or mm.memory.swap.count[value] == 1, f"slot {value} is one entry's alone"
    elif kind(entry) == HWPOISON_ENTRY:
        assert frames.flags_at[value] & HWPOISON, f"page {vpn:#x}: frame {value} has failed"
        assert frames.refcount_at[value], f"frame {value}, which has failed, is never given out"
    elif maps_frame(entry):
        assert frames.flags_at[value] & ANON, f"page {vpn:#x}: a device has private pages only"
        assert frames.index_at[value] == vma.pgoff + vpn - (vma.start >> PAGE_SHIFT), f"frame {value} knows its place"


def _check_swap(memory: Memory, entries: Counter[int]) -> None:
    """Slots are counted, and the swap cache holds what it says."""
    swap, frames = memory.swap, memory.frames
    for file in memory.files_by_mapping.values():
        entries.update(file.swapped.values())
    assert {slot: nr for slot, nr in swap.count.items() if nr} == dict(entries), "swap entries are counted"
    assert len(swap.count) == swap.used_nr, "slots are in use or free"
    for slot, pfn in swap.cache().items():
        assert swap.slot_of(pfn) == slot, f"slot {slot} and frame {pfn} know each other"
        assert frames.flags_at[pfn] & SWAPCACHE, f"frame {pfn} is in the swap cache"
        assert frames.refcount_at[pfn], f"frame {pfn} is in use"
    for slot, nr in swap.count.items():
        assert nr or swap.cached(slot), f"slot {slot} is somebody's"
    assert frames.swapcache_nr == len(swap.cache()), "the swap cache is counted"


def check_memory(memory: Memory) -> None:
    """The machine: reference and mapping counts, free list, quarantine, page caches, both ways of the reverse map."""
    frames = memory.frames
    mapped: Counter[int] = Counter()
    entries: Counter[int] = Counter()
    for mm in memory.mms.values():
        check_mm(mm)
        for leaf in mm.pgtable.leaves.values():
            mapped.update(mapped_frames(leaf.ptes[leaf.ptes != 0]).tolist())
            entries.update(swap_slots(leaf.ptes))
    del mapped[0]
    _check_swap(memory, entries)
    tables_nr = sum(len(mm.pgtable.leaves) for mm in memory.mms.values())
    assert memory.tables.nr == tables_nr, "page tables are counted"
    mapped.update(frames.unknown_sharers)
    cached: Counter[int] = Counter()
    for file in memory.files_by_mapping.values():
        cached.update(_check_file(memory, file))
    _check_anon_vmas(memory)
    check_charges(memory)
    free = frames.free.list() + frames.hugetlb.frames()
    assert len(free) == len(set(free)), "no frame is free twice"
    quarantined = 0
    for pfn in range(1, frames.free.untouched):
        flags, held = frames.flags_at[pfn], frames.refcount_at[pfn]
        known = (
            mapped[pfn]
            + cached[pfn]
            + bool(flags & SWAPCACHE)
            + bool(flags & HWPOISON)
            + bool(flags & KEPT)
            + frames.pins.get(pfn, 0)
            + len(frames.exports.get(pfn, ()))
        )
        assert frames.mapcount_at[pfn] == mapped[pfn], f"frame {pfn} is mapped {mapped[pfn]} times"
        assert bool(flags & CACHE) == bool(cached[pfn]), f"frame {pfn} is cached or not"
        assert bool(flags & PINNED) == (pfn in frames.pins), f"frame {pfn} is pinned or not"
        assert bool(flags & EXTERNAL) == (pfn in frames.exports), f"frame {pfn} is exported or not"
        if folio.is_large(frames, pfn) and (not folio.is_large(frames, pfn - 1) or folio.head(pfn) == pfn):
            _check_folio(frames, pfn)
        assert held >= known, f"frame {pfn} has {held} references, {known} are known"
        assert not flags & WRITTEN or flags & SOILED, f"frame {pfn}: its bytes are in the store"
        if flags & QUARANTINE:
            quarantined += 1
            assert held > known, f"frame {pfn} waits for a round"
            assert not mapped[pfn] + cached[pfn], f"frame {pfn} waits for nothing else"
            assert not flags & SWAPCACHE, f"frame {pfn}, which waits for a round, has no slot"
        if pfn in frames.exports or pfn in frames.pins:
            assert held, f"frame {pfn} is held"
    for pfn in np.flatnonzero(frames.flags & np.uint32(KEPT)).tolist():
        assert folio.is_large(frames, pfn), f"frame {pfn} is kept by a large folio"
    assert all(folio.is_large(frames, pfn) for pfn in frames.partial.queue), "what is to be split is large"
    marked = int(np.count_nonzero(frames.flags & np.uint32(HWPOISON)))
    assert marked == frames.hwpoison_nr, "frames that have failed are counted"
    assert quarantined == frames.quarantine_nr, "the quarantine is counted"
    in_use = {pfn for pfn in range(1, frames.free.untouched) if frames.refcount_at[pfn]}
    assert in_use.isdisjoint(free), "a free frame has no references"
    assert len(in_use) + len(free) == frames.free.untouched - 1, "every frame is free or in use"
    assert all(frames.flags_at[pfn] & ~SOILED == 0 for pfn in free), "a free frame has no state"
    assert frames.flags_at[0] & ~IN_BATCH == RESERVED, "the zero page is never freed"
    assert frames.refcount_at[0] >= 1, "the zero page is never freed"


def check_charges(memory: Memory) -> None:
    """Every group has been charged for what it has, and for nothing else."""
    frames = memory.frames
    owners = Counter(frames.charges.owner[: frames.free.untouched].tolist())
    slots = Counter(memcg.id for memcg in memory.swap.payers().values())
    tables: Counter[int] = Counter()
    for mm in memory.mms.values():
        assert mm.memcg is mm.pgtable.memcg, f"{mm} has its memory and its page tables from one group"
        if mm.memcg is not None:
            tables[mm.memcg.id] += len(mm.pgtable.leaves)
    del owners[0]
    known = {memcg.id for memcg in memory.memcgs.values()}
    assert known == set(frames.charges.by_id), "every group has a name"
    payers = owners.keys() | slots.keys() | tables.keys()
    assert payers <= known, f"who pays exists: {payers} of {known}"
    for memcg in memory.memcgs.values():
        charged = owners[memcg.id] + tables[memcg.id]
        assert memcg.charged == charged, f"{memcg} is charged for {charged} frames"
        assert memcg.swapped == slots[memcg.id], f"{memcg} is charged for {slots[memcg.id]} slots"
    free = np.array(frames.free.list() + frames.hugetlb.frames(), np.int64)
    assert not frames.charges.owner[free].any(), "nobody pays for a free frame"
    assert memory.swap.payers().keys() <= memory.swap.count.keys(), "nobody pays for a free slot"


def check_idle(memory: Memory) -> None:
    """Nothing is under way: no lock is held, nothing is in quarantine, and every reference is accounted for."""
    check_memory(memory)
    frames = memory.frames
    assert frames.quarantine_nr == 0, "no round is open"
    assert not memory.orphans, "no file waits to be destroyed"
    for lock in [mm.lock for mm in memory.mms.values()] + [file.lock for file in memory.files_by_mapping.values()]:
        assert not lock, "no lock is held"
    for pfn in range(1, frames.free.untouched):
        known = (
            frames.mapcount_at[pfn]
            + bool(frames.flags_at[pfn] & CACHE)
            + bool(frames.flags_at[pfn] & SWAPCACHE)
            + bool(frames.flags_at[pfn] & HWPOISON)
            + bool(frames.flags_at[pfn] & KEPT)
            + frames.pins.get(pfn, 0)
            + len(frames.exports.get(pfn, ()))
            + frames.withheld.get(pfn, 0)
        )
        assert frames.refcount_at[pfn] == known, (
            f"frame {pfn} has {frames.refcount_at[pfn]} references, {known} are known"
        )


def _check_file(memory: Memory, file: File) -> list[int]:
    """One file's cache and reverse map; the frames that it caches."""
    frames, pfns = memory.frames, []
    for index, pfn in file.cache.items():
        pfns.append(pfn)
        assert (frames.mapping_at[pfn], frames.index_at[pfn]) == (file.id, index), f"frame {pfn} knows its place"
        first, end = file.folio(index)
        if index > first and file.cache.get(first):
            continue  # looked at with its first page
        assert all(file.cache.get(page) for page in range(first, end)), f"folio {first} to {end} is whole"
        assert all(file.folio(page) == (first, end) for page in range(first, end)), f"folio {first} to {end} is one"
    assert len(pfns) == file.cache.nr, "the cached pages are counted"
    assert [vma.pgoff for vma in file.rmap.vmas] == sorted(vma.pgoff for vma in file.rmap.vmas), "walked in order"
    for vma in file.rmap.vmas:
        assert vma.file is file, f"{vma} of the reverse map exists"
        assert vma.mm.vmas.find(vma.start) is vma, f"{vma} of the reverse map exists"
    return pfns


def _check_anon_vmas(memory: Memory) -> None:
    active: Counter[int] = Counter()
    children: Counter[int] = Counter()
    for mm in memory.mms.values():
        active.update(vma.anon_vma.id for vma in mm.vmas if vma.anon_vma is not None)
    for anon_vma in memory.anon_vmas.values():
        if anon_vma.parent is not None:
            children[anon_vma.parent.id] += 1
    for mapping, anon_vma in memory.anon_vmas.items():
        assert anon_vma.id == mapping, f"anon_vma {mapping} is in use"
        assert anon_vma.rmap.vmas, f"anon_vma {mapping} is in use"
        assert anon_vma.active_nr == active[mapping], f"anon_vma {mapping} is the own one of {active[mapping]} VMAs"
        assert anon_vma.children_nr == children[mapping] + (anon_vma.parent is None), (
            f"anon_vma {mapping}: its children"
        )
        for vma in anon_vma.rmap.vmas:
            assert anon_vma in vma.chain, f"{vma} of the reverse map exists"
            assert vma.mm.vmas.find(vma.start) is vma, f"{vma} of the reverse map exists"
