"""Huge pages: 2 MiB that one entry of the page table maps, a PMD.

A block of 2 MiB has nothing, a leaf table, or a PMD. A PMD is kept as a leaf table that is marked `huge`: 512 entries
with the same flags that map a large folio in its order, or the zero page (the huge zero page). So whoever reads page
tables need not know of it; whoever changes a part of a block splits its PMD first, which removes the mark.

    nothing ── read ──► zero page ── write: [block] is told ──► folio, this mapping's alone
       │                                                           │ fork: both sides read-only
       └────────────── write ──────────────────────────────────────┤
                                                                   ▼ write: [block], then as small pages
    VMA boundary inside, part dropped or moved: [block] ──►   leaf table

A split is told of even though no page changes its place (`Mm.split_blocks`), and a new VMA boundary inside a block that
one VMA covered even where nothing was huge: so does the kernel. Kernel: mm/huge_memory.c, v6.18.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import folio
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE, PTRS_PER_TABLE
from mmubusd.mm.anon import NEW_ANON, prepare_anon_vma
from mmubusd.mm.frame import CACHE, EXCLUSIVE, ORDER_SHIFT
from mmubusd.mm.frame import DIRTY as FRAME_DIRTY
from mmubusd.mm.free_frames import BLOCK_ORDER
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import DIRTY, LEAF_SHIFT, NEW_PTE, PFN_SHIFT, WRITE, WRITTEN_PTE, ZERO_PTE, Leaf
from mmubusd.mm.vma import VM_HUGEPAGE, VM_NOHUGEPAGE, VM_WRITE, Vma
from mmubusd.mm.zonelist import nodes_for

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


class Thp(StrEnum):
    """Which private memory gets huge pages: none at all, where MADV_HUGEPAGE asks for them, all that has room."""

    NEVER = "never"
    MADVISE = "madvise"
    ALWAYS = "always"


def enabled(mm: Mm, vma: Vma) -> bool:
    """Whether the VMA's faults may make huge pages. Kernel: thp_vma_allowable_order()."""
    if mm.thp is Thp.NEVER or vma.file is not None or vma.flags & VM_NOHUGEPAGE:
        return False
    return mm.thp is Thp.ALWAYS or vma.flags & VM_HUGEPAGE != 0


def suitable(mm: Mm, vma: Vma, vpn: int) -> bool:
    """Whether a fault at the page, whose block has nothing, maps a huge page. Kernel: thp_vma_suitable_order()."""
    if mm.thp is Thp.NEVER or not enabled(mm, vma):
        return False
    block = vpn << PAGE_SHIFT & -PMD_SIZE
    return vma.start <= block and block + PMD_SIZE <= vma.end


def fault(mm: Mm, vma: Vma, vpn: int, write: bool) -> bool:
    """Map the whole block around the page. Kernel: do_huge_pmd_anonymous_page().

    Requires: suitable(), and that the block has nothing. Returns: whether it is mapped; if not, no 512 frames in a row
    are free.
    """
    prepare_anon_vma(vma)
    if not write:
        _map(mm, vpn, 0, ZERO_PTE)
        return True
    first = new_folio(mm, vma, vpn)
    if first:
        _map(mm, vpn, first, NEW_PTE)
    return first != 0


def new_folio(mm: Mm, vma: Vma, vpn: int) -> int:
    """A large folio of zeros for the block around the page, counted as mapped once; its first frame, or 0."""
    nodes = nodes_for(vma, vma.linear_index(vpn << PAGE_SHIFT), BLOCK_ORDER)
    first = mm.memory.frames.alloc_block(nodes, mm.memcg)
    if first:
        become_folio(mm, vma, vpn, first)
    return first


def become_folio(mm: Mm, vma: Vma, vpn: int, first: int) -> None:
    """Frames of alloc_block() become the folio of the block around the page, counted as mapped once."""
    memory, anon_vma = mm.memory, prepare_anon_vma(vma)
    index = vma.linear_index(vpn << PAGE_SHIFT & -PMD_SIZE)
    frames, pfns = memory.frames, slice(first, first + PTRS_PER_TABLE)
    frames.flags[pfns] |= np.uint32(NEW_ANON | BLOCK_ORDER << ORDER_SHIFT)
    frames.mapping[pfns] = anon_vma.id
    frames.index[pfns] = np.arange(index, index + PTRS_PER_TABLE, dtype=np.uint64)
    frames.mapcount[pfns] = 1
    memory.lru.add_large(first)


def _map(mm: Mm, vpn: int, first: int, flags: int) -> None:
    """Let a PMD map the folio that begins with this frame, or the huge zero page."""
    leaf = mm.pgtable.leaf(vpn)
    leaf.ptes[:] = flags
    if first:
        leaf.ptes |= np.arange(first, first + PTRS_PER_TABLE, dtype=np.uint64) << np.uint64(PFN_SHIFT)
    leaf.huge = True


def replace(mm: Mm, vma: Vma, vpn: int, first: int) -> None:
    """A PMD that maps the folio takes the place of the block's table, whose entries count no longer."""
    _map(mm, vpn, first, NEW_PTE if vma.flags & VM_WRITE else NEW_PTE & ~WRITE)


def populate(mm: Mm, vma: Vma, vpn: int, write: bool) -> bool:
    """Populate the whole block around the page, if a PMD maps it or shall. Returns: whether it is done."""
    leaf = mm.pgtable.leaves.get(vpn >> LEAF_SHIFT)
    if leaf is None:
        if not suitable(mm, vma, vpn) or (mm.memcg is not None and mm.memcg.room <= PTRS_PER_TABLE):
            return False
        mm.pgtable.check_room()
        return fault(mm, vma, vpn, write)
    if not leaf.huge or (write and not leaf.at[0] & WRITE):
        return False
    if write:
        touch_pmd(leaf)
    return True


def touch_pmd(leaf: Leaf) -> None:
    """Someone writes through the PMD."""
    if leaf.at[0] & WRITTEN_PTE != WRITTEN_PTE:
        leaf.ptes |= np.uint64(WRITTEN_PTE)


def reuse(mm: Mm, vma: Vma, leaf: Leaf) -> bool:
    """A write to a read-only PMD: go on with the page if nobody else has any of it. Kernel: do_huge_pmd_wp_page()."""
    frames, first = mm.memory.frames, leaf.at[0] >> PFN_SHIFT
    if vma.shared:
        leaf.ptes |= np.uint64(WRITE | WRITTEN_PTE)
        return True
    if not first:
        return False
    pages = slice(first, first + PTRS_PER_TABLE)
    if not frames.flags_at[first] & EXCLUSIVE:
        if folio.mapcount(frames, first) != PTRS_PER_TABLE or folio.is_held(frames, first):
            return False
        assert vma.anon_vma is not None, "a VMA with own pages has an anon_vma"
        frames.mapping[pages] = vma.anon_vma.id
        frames.flags[pages] |= np.uint32(EXCLUSIVE)
    leaf.ptes |= np.uint64(WRITE | WRITTEN_PTE)
    return True


def copy_on_write(mm: Mm, vma: Vma, vpn: int) -> Operation[None]:
    """A write to a PMD that maps the huge zero page, or a folio that others have too. The access is to be tried again.

    A folio is not copied at once: the PMD is split, and then page after page is copied when it is written to.
    Requires: the page's range lock is held. Kernel: do_huge_zero_wp_pmd(), do_huge_pmd_wp_page().
    """
    block, number = vpn << PAGE_SHIFT & -PMD_SIZE, vpn >> LEAF_SHIFT
    leaf = mm.pgtable.leaves[number]
    prepare_anon_vma(vma)
    if not leaf.at[0] >> PFN_SHIFT:
        if mm.notified:
            yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)
        again = mm.vmas.find(vpn << PAGE_SHIFT)
        if again is None or mm.pgtable.leaves.get(number) is not leaf or not leaf.huge or leaf.at[0] >> PFN_SHIFT:
            return
        first = new_folio(mm, again, vpn)
        if first:
            replace(mm, again, vpn, first)
            return
    split_pmd(mm, block)
    yield from announce_splits(mm)


def split_pmd(mm: Mm, address: int) -> None:
    """The block around the address comes to have a leaf table; to be told of by announce_splits(). No page changes. A
    PMD of shared memory is dropped: whoever wants a page faults it in again.

    Kernel: __split_huge_pmd(), which tells of the block whether or not a PMD maps it.
    """
    block = address & -PMD_SIZE
    if mm.notified:
        mm.split_blocks.append(block)
    leaf = mm.pgtable.leaves.get(block >> PAGE_SHIFT + LEAF_SHIFT)
    if leaf is not None and leaf.huge:
        leaf.huge = False
        first, frames = leaf.at[0] >> PFN_SHIFT, mm.memory.frames
        pages = slice(first, first + PTRS_PER_TABLE)
        if first and leaf.at[0] & DIRTY:
            frames.flags[pages] |= np.uint32(FRAME_DIRTY)
        if frames.flags_at[first] & CACHE:  # which keeps the pages
            frames.mapcount[pages] -= 1
            frames.refcount[pages] -= 1
            mm.pgtable.drop_leaf(block >> PAGE_SHIFT + LEAF_SHIFT)
    elif leaf is not None and mm.pgtable.has_entries:
        mm.memory.device_memory.split_block(leaf.at[0] >> PFN_SHIFT)


def split_ends(mm: Mm, start: int, end: int) -> None:
    """Split the PMDs that map [start, end) only in part."""
    for edge in (start, end):
        if edge & PMD_SIZE - 1:
            leaf = mm.pgtable.leaves.get(edge >> PAGE_SHIFT + LEAF_SHIFT)
            if leaf is not None and leaf.huge:
                split_pmd(mm, edge)


def announce_splits(mm: Mm) -> Operation[None]:
    """Tell of the 2 MiB blocks whose PMDs have been split, or that a new VMA boundary has cut."""
    blocks, mm.split_blocks = mm.split_blocks, []
    yield from tell_blocks(mm, blocks)


def tell_blocks(mm: Mm, blocks: list[int]) -> Operation[None]:
    """Tell of these blocks of 2 MiB, each for itself."""
    for block in blocks:
        yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)
