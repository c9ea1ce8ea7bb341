"""hugetlb: memory in huge pages of a pool, mapped by name (MAP_HUGETLB, or a file of hugetlbfs).

A hugetlb mapping is of a file in any case: MAP_HUGETLB makes one without a name. What a shared mapping has is the
file's; a private one gets its own copies, as with any file, but of whole huge pages. They are kept like other huge
pages, as leaf tables marked `huge` (see huge_memory), but never split, reclaimed, merged or aged, and boundaries inside
one are refused. So a block of such a mapping has a huge page or nothing.

mmap reserves: a shared mapping what the file has not reserved already, a private one all its pages. The file keeps
the numbers it has reserved, also after they have been used; a private mapping the numbers it has used. Whoever has no
reservation (a child's mapping, MAP_NORESERVE) gets what nobody has reserved, or SIGBUS.

Kernel: mm/hugetlb.c, v6.12 to v6.18. Page tables shared between mappings of 1 GiB and more, which widen what is told
(adjust_range_if_pmd_sharing_possible()), do not exist here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.frame import ANON, CACHE, EXCLUSIVE, HUGETLB, ORDER_SHIFT, PINNED
from mmubusd.mm.free_frames import BLOCK_FRAMES, BLOCK_ORDER, Pfns
from mmubusd.mm.hugetlb_pool import Reservation
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, UFFD_WP, WRITE, Leaf
from mmubusd.mm.swapops import ENTRY_ALONE, ENTRY_WRITABLE, MIGRATION, kind
from mmubusd.mm.vma import VM_HUGETLB, VM_NORESERVE, Vma
from mmubusd.mm.zonelist import bound_program, nodes_for

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.zap import Gather


class OutOfHugePages(MmError):
    """The pool has no page for a fault: SIGBUS."""


def huge_align(length: int) -> int:
    """Round up to a whole huge page."""
    return length + PMD_SIZE - 1 & -PMD_SIZE


def is_hugetlb(mm: Mm, leaf: Leaf) -> bool:
    """Whether the table stands for a page of hugetlb."""
    return leaf.huge and mm.memory.frames.flags_at[leaf.at[0] >> PFN_SHIFT] & HUGETLB != 0


# Reservations. Pages have numbers, counted from the file's start.


def number_of(vma: Vma, address: int) -> int:
    return vma.linear_index(address) >> LEAF_SHIFT


def _numbers(vma: Vma) -> range:
    first = number_of(vma, vma.start)
    return range(first, first + (vma.pages >> LEAF_SHIFT))


def reserve(vma: Vma) -> None:
    """A mapping begins. Kernel: hugetlbfs_file_mmap(), hugetlb_reserve_pages(). Raises: MmError ENOMEM."""
    file, pool = vma.file, vma.mm.memory.frames.hugetlb
    assert file is not None, "hugetlb memory is a file's"
    if vma.flags & VM_NORESERVE:
        return
    wanted = set(_numbers(vma)) - file.reserved if vma.shared else set(_numbers(vma))
    allowed = bound_program(vma.mm)
    if len(wanted) > pool.available_nr or (allowed is not None and len(wanted) > pool.free_on(allowed)):
        raise MmError("ENOMEM", f"{len(wanted)} huge pages wanted, {pool.available_nr} of {pool.nr} are available")
    pool.reserved_nr += len(wanted)
    if vma.shared:
        file.reserved |= wanted
    else:
        vma.reservation = Reservation(owner=True)


def close(vma: Vma) -> None:
    """A mapping is gone: what it has reserved and not used others may have. Kernel: hugetlb_vm_op_close()."""
    reservation = vma.reservation
    if vma.flags & VM_HUGETLB and reservation is not None and reservation.owner:
        numbers = _numbers(vma)
        vma.mm.memory.frames.hugetlb.reserved_nr -= len(numbers) - sum(
            number in reservation.consumed for number in numbers
        )
        vma.reservation = None


def unreserve(file: File, first: int, freed_nr: int) -> None:
    """The file ends at the page of this number. Args: freed_nr: how many of its pages have gone with that.

    Kernel: hugetlb_unreserve_pages().
    """
    gone = {number for number in file.reserved if number >= first}
    file.reserved -= gone
    file.memory.frames.hugetlb.reserved_nr -= len(gone) - freed_nr


def _is_reserved(vma: Vma, number: int) -> bool:
    """Whether the page has been reserved for this mapping. Kernel: vma_needs_reservation()."""
    if vma.shared:
        assert vma.file is not None
        return number in vma.file.reserved
    reservation = vma.reservation
    return reservation is not None and reservation.owner and number not in reservation.consumed


class NewPage:
    """A page out of the pool that nothing maps yet: it is mapped, or given back as if it had never been taken.

    Kernel: alloc_hugetlb_folio(), restore_reserve_on_error().
    """

    __slots__ = ("_added", "_number", "_reserved", "_vma", "first")

    def __init__(self, vma: Vma, number: int, *, unreserved: bool = False) -> None:
        """Args: unreserved: what is reserved is for something else. Raises: OutOfHugePages."""
        frames = vma.mm.memory.frames
        pool = frames.hugetlb
        reserved = not unreserved and _is_reserved(vma, number)
        nodes = nodes_for(vma, number << LEAF_SHIFT, BLOCK_ORDER)
        first = frames.alloc_hugetlb(nodes) if reserved or pool.available_nr > 0 else 0
        if not first:
            raise OutOfHugePages("ENXIO", f"no huge page is available: of {pool.nr}, {pool.free_nr} are free")
        self.first, self._vma, self._number, self._reserved = first, vma, number, reserved
        self._added = not unreserved and _use(vma, number)
        pool.reserved_nr -= reserved

    @property
    def pfns(self) -> Pfns:
        return np.arange(self.first, self.first + BLOCK_FRAMES)

    def give_back(self) -> None:
        frames = self._vma.mm.memory.frames
        if self._reserved:
            frames.hugetlb.restore.add(self.first)
        if self._added:
            _unuse(self._vma, self._number)
        frames.put_many(self.pfns)


def _use(vma: Vma, number: int) -> bool:
    """A page is taken for the number. Kernel: vma_commit_reservation(). Returns: whether that was news."""
    numbers = vma.file.reserved if vma.shared and vma.file is not None else None
    if numbers is None and vma.reservation is not None:
        numbers = vma.reservation.consumed
    if numbers is None or number in numbers:
        return False
    numbers.add(number)
    return True


def _unuse(vma: Vma, number: int) -> None:
    if not vma.shared:
        if vma.reservation is not None:
            vma.reservation.consumed.discard(number)
    elif vma.file is not None:
        vma.file.reserved.discard(number)


# Pages


def first_frame(leaf: Leaf) -> int:
    """The first frame of what the table stands for."""
    return leaf.at[0] >> PFN_SHIFT


def become_anon(vma: Vma, page: NewPage, number: int) -> None:
    """The page is this private mapping's own, counted as mapped once. Kernel: hugetlb_add_new_anon_rmap()."""
    assert vma.anon_vma is not None, "a VMA with own pages has an anon_vma"
    _place(vma, page, number, vma.anon_vma.id, ANON | EXCLUSIVE)
    vma.mm.memory.frames.mapcount[page.pfns] = 1


def become_cached(vma: Vma, page: NewPage, number: int) -> None:
    """The page is the file's. Kernel: hugetlb_add_to_page_cache()."""
    file = vma.file
    assert file is not None
    _place(vma, page, number, file.id, CACHE | BLOCK_ORDER << ORDER_SHIFT)
    file.cache.set_many(number << LEAF_SHIFT, page.pfns)


def _place(vma: Vma, page: NewPage, number: int, mapping: int, flags: int) -> None:
    frames, pfns, index = vma.mm.memory.frames, page.pfns, number << LEAF_SHIFT
    frames.flags[pfns] |= np.uint32(flags)
    frames.mapping[pfns] = mapping
    frames.index[pfns] = np.arange(index, index + BLOCK_FRAMES, dtype=np.uint64)


def set_page(mm: Mm, address: int, first: int, flags: int) -> None:
    """Let the block at the address map the page that begins with this frame."""
    leaf = mm.pgtable.leaf(address >> PAGE_SHIFT)
    leaf.ptes[:] = np.arange(first, first + BLOCK_FRAMES, dtype=np.uint64) << np.uint64(PFN_SHIFT) | np.uint64(flags)
    leaf.huge = True


def mapping_vmas(memory: Memory, first: int) -> list[Vma]:
    """The VMAs that map the page which begins with this frame."""
    frames, index = memory.frames, memory.frames.index_at[first]
    owner = (memory.anon_vmas if frames.flags_at[first] & ANON else memory.files_by_mapping).get(
        frames.mapping_at[first]
    )
    if owner is None or not frames.mapcount_at[first]:
        return []
    return [
        vma
        for vma in owner.rmap.overlapping(index, index + BLOCK_FRAMES)
        if any(
            first_frame(leaf) == first
            for _, leaf in mapped(vma.mm, vma.address_of(index), vma.address_of(index) + PMD_SIZE)
        )
    ]


def resident_pages(mm: Mm) -> int:
    """How many small pages of an address space hugetlb has mapped."""
    return sum(BLOCK_FRAMES for leaf in mm.pgtable.leaves.values() if is_hugetlb(mm, leaf))


def mapped(mm: Mm, start: int, end: int) -> Iterator[tuple[int, Leaf]]:
    """The huge pages in [start, end), ascending: address and table."""
    for base, _ in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        leaf = mm.pgtable.leaves[base >> LEAF_SHIFT]
        if leaf.huge:
            yield base << PAGE_SHIFT, leaf


def gone(mm: Mm, start: int, end: int) -> Iterator[tuple[int, Leaf]]:
    """As mapped, where an entry in each place says that the page has failed, or is being moved."""
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        leaf = mm.pgtable.leaves[base >> LEAF_SHIFT]
        if not leaf.huge and ptes[0]:
            yield base << PAGE_SHIFT, leaf


def zap(mm: Mm, vma: Vma, start: int, end: int, gather: Gather) -> None:
    """Unmap [start, end) of one VMA, private copies as well. Kernel: __unmap_hugepage_range()."""
    frames, reservation = mm.memory.frames, vma.reservation
    for address, leaf in list(mapped(mm, start, end)):
        first = first_frame(leaf)
        if not vma.shared and reservation is not None and reservation.owner and frames.flags_at[first] & ANON:
            frames.hugetlb.restore.add(first)
            reservation.consumed.discard(number_of(vma, address))
        drop(mm, address, gather)
    for address, _ in list(gone(mm, start, end)):
        mm.pgtable.drop_leaf(address >> PAGE_SHIFT + LEAF_SHIFT)


def drop(mm: Mm, address: int, gather: Gather) -> None:
    """The block at the address, which has a page, comes to have nothing."""
    number = address >> PAGE_SHIFT + LEAF_SHIFT
    first = first_frame(mm.pgtable.leaves[number])
    pfns = np.arange(first, first + BLOCK_FRAMES)
    mm.memory.frames.mapcount[pfns] -= 1
    mm.pgtable.drop_leaf(number)
    gather.add(pfns)


def share(mm: Mm, vma: Vma, copy: Vma) -> None:
    """The pages of a private mapping become a forked child's too; a pinned one it gets a copy of.

    Kernel: copy_hugetlb_page_range(). Raises: MmError ENOMEM: there is no page for a copy.
    """
    frames = mm.memory.frames
    for address, leaf in gone(mm, vma.start, vma.end):
        if kind(leaf.at[0]) == MIGRATION:
            leaf.ptes &= ~np.uint64(ENTRY_ALONE | ENTRY_WRITABLE)
        copy.mm.pgtable.leaf(address >> PAGE_SHIFT).ptes[:] = leaf.ptes
        copy.mm.pgtable.has_entries = True
    for address, leaf in mapped(mm, vma.start, vma.end):
        first, flags = first_frame(leaf), leaf.at[0] & ~(-1 << PFN_SHIFT)
        pages = slice(first, first + BLOCK_FRAMES)
        own = frames.flags_at[first] & (ANON | EXCLUSIVE) == ANON | EXCLUSIVE
        if own and (frames.flags[pages] & PINNED).any():
            _copy_to_child(copy, address, first, flags)
            continue
        frames.refcount[pages] += 1
        frames.mapcount[pages] += 1
        frames.flags[pages] &= ~np.uint32(EXCLUSIVE)
        leaf.ptes &= ~np.uint64(WRITE)
        set_page(copy.mm, address, first, flags & ~(WRITE | UFFD_WP))


def _copy_to_child(copy: Vma, address: int, first: int, flags: int) -> None:
    number = number_of(copy, address)
    try:
        page = NewPage(copy, number)
    except OutOfHugePages as error:
        raise MmError("ENOMEM", error.message) from error
    copy_bytes(copy.mm, first, page)
    become_anon(copy, page, number)
    set_page(copy.mm, address, page.first, flags & ~UFFD_WP)


def copy_bytes(mm: Mm, first: int, page: NewPage) -> None:
    for at in range(BLOCK_FRAMES):
        mm.memory.frames.copy(first + at, page.first + at)


def change_protection(mm: Mm, vma: Vma, start: int, end: int, writable: bool) -> None:
    """Bring the pages of [start, end) in line with the VMA's rights: shared ones become writable at once, private ones
    when they are written to. Kernel: hugetlb_change_protection().
    """
    for _, leaf in mapped(mm, start, end):
        if writable and vma.shared and not leaf.at[0] & UFFD_WP:
            leaf.ptes |= np.uint64(WRITE)
        else:
            leaf.ptes &= ~np.uint64(WRITE)
    for _, leaf in gone(mm, start, end):
        if kind(leaf.at[0]) == MIGRATION and not writable:
            leaf.ptes &= ~np.uint64(ENTRY_WRITABLE)
