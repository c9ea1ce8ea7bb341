"""userfaultfd: memory whose missing pages somebody else supplies, and moving pages there (UFFDIO_MOVE).

A VMA is registered with one userfaultfd, which is a number that its owner chooses, kept in the VMA's flags beside what
it is registered for: two VMAs merge only if all of that is equal. Nobody waits for anybody here: an access that would
have to be resolved fails (SIGBUS), as with UFFD_FEATURE_SIGBUS, and is made again when that has been done. Write
protection is in `soft_dirty`.

    MISSING  a page that is nowhere is not made          MINOR  a page that only the cache has is not mapped
    WP       pages can be protected against writing      ASYNC  a write takes the protection away by itself

Kernel: mm/userfaultfd.c, fs/userfaultfd.c, v6.18 (v6.12 tells of each moved page for itself).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import migrate
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.anon import prepare_anon_vma
from mmubusd.mm.errno import MmError
from mmubusd.mm.folio import FOLIO_PAGES, is_large
from mmubusd.mm.folio_split import split_page
from mmubusd.mm.frame import ANON, EXCLUSIVE, KSM, PINNED
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import ACCESSED, DIRTY, LEAF_SHIFT, PFN_SHIFT, PRESENT, SOFT_DIRTY, UFFD_WP, WRITE, ZERO_PTE
from mmubusd.mm.swapops import ENTRY_ALONE, MIGRATION, SWAP, kind
from mmubusd.mm.vma import (
    UFFD_FLAGS,
    UFFD_NUMBER_MAX,
    UFFD_SHIFT,
    VM_ACCESS_FLAGS,
    VM_HUGETLB,
    VM_LOCKED,
    VM_SHARED,
    VM_UFFD_ASYNC,
    VM_UFFD_MINOR,
    VM_UFFD_MISSING,
    VM_UFFD_WP,
    VM_WRITE,
    Vma,
)
from mmubusd.mm.vma_merge import modify
from mmubusd.mm.vmscan import make_room_for_tables

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MISSING, WP, MINOR, ASYNC = 1, 2, 4, 8
"""UFFDIO_REGISTER_MODE_*, and UFFD_FEATURE_WP_ASYNC, which the kernel is told when the userfaultfd is made."""
MODE_FLAGS = {MISSING: VM_UFFD_MISSING, WP: VM_UFFD_WP, MINOR: VM_UFFD_MINOR, ASYNC: VM_UFFD_ASYNC}
DONTWAKE, ALLOW_SRC_HOLES = 1, 2


def _check_range(start: int, length: int) -> None:
    """Kernel: validate_range()."""
    if start % PAGE_SIZE or length % PAGE_SIZE or not length or start + length > TASK_SIZE:
        raise MmError("EINVAL", f"[{start:#x}, +{length:#x}) is not a range of whole pages")


def _check_number(uffd: int) -> None:
    if not 0 < uffd <= UFFD_NUMBER_MAX:
        raise MmError("EBADF", f"userfaultfd {uffd}: numbers are 1 to {UFFD_NUMBER_MAX}")


def number_of(vma: Vma) -> int:
    """The userfaultfd that the VMA is registered with, 0: none."""
    return vma.flags >> UFFD_SHIFT


# Registration


def register(mm: Mm, start: int, length: int, mode: int, uffd: int) -> Operation[int]:
    """UFFDIO_REGISTER of what is mapped in the range.

    Raises: MmError EINVAL (unaligned, a mode that is none or does not fit the memory, nothing is mapped), EBUSY (part
    of it is registered with another one), EBADF.
    """
    _check_number(uffd)
    if not mode & (MISSING | WP | MINOR) or mode & ~(MISSING | WP | MINOR | ASYNC):
        raise MmError("EINVAL", f"mode {mode:#x}")
    _check_range(start, length)
    flags = sum(flag for bit, flag in MODE_FLAGS.items() if mode & bit) | uffd << UFFD_SHIFT
    yield from mm.locked(_register(mm, start, start + length, mode, flags), (start, start + length))
    return 0


def _registrable(mm: Mm, start: int, end: int) -> list[Vma]:
    vmas = mm.vmas.overlapping(start, end)
    if not vmas:
        raise MmError("EINVAL", f"nothing is mapped in [{start:#x}, {end:#x})")
    return vmas


def _register(mm: Mm, start: int, end: int, mode: int, flags: int) -> Operation[None]:
    for vma in _registrable(mm, start, end):
        if not _can_userfault(vma, mode):
            raise MmError("EINVAL", f"the mapping at {vma.start:#x} cannot be registered in mode {mode:#x}")
        if number_of(vma) not in (0, flags >> UFFD_SHIFT):
            raise MmError("EBUSY", f"the mapping at {vma.start:#x} is registered with userfaultfd {number_of(vma)}")
    yield from _set_flags(mm, start, end, flags)


def _can_userfault(vma: Vma, mode: int) -> bool:
    """Kernel: vma_can_userfault()."""
    if vma.flags & VM_HUGETLB:
        return False
    if mode & MINOR and not (vma.shared and vma.file is not None and vma.file.kind == "shm"):
        return False
    return mode == WP | ASYNC or vma.file is None or vma.file.kind == "shm"


def _set_flags(mm: Mm, start: int, end: int, flags: int) -> Operation[None]:
    """Give what is mapped in [start, end) these of the flags that concern userfaultfd, unless it has more of them."""
    try:
        at = start
        while at < end and (vma := mm.vmas.find_from(at)) is not None and vma.start < end:
            low, at = max(start, vma.start), min(end, vma.end)
            if vma.flags & UFFD_FLAGS != flags and not (flags and vma.flags & flags == flags):
                modify(vma, low, at, vma.flags & ~UFFD_FLAGS | flags)
    finally:
        yield from announce_splits(mm)


def unregister(mm: Mm, start: int, length: int, uffd: int) -> Operation[int]:
    """UFFDIO_UNREGISTER: also takes the write protection away.

    Raises: MmError EINVAL (unaligned, nothing is mapped, registered with another one), EBADF.
    """
    _check_number(uffd)
    _check_range(start, length)
    yield from mm.locked(_unregister(mm, start, start + length, uffd), (start, start + length))
    return 0


def _unregister(mm: Mm, start: int, end: int, uffd: int) -> Operation[None]:
    for vma in _registrable(mm, start, end):
        if number_of(vma) not in (0, uffd):
            raise MmError("EINVAL", f"the mapping at {vma.start:#x} is registered with userfaultfd {number_of(vma)}")
    for vma in mm.vmas.overlapping(start, end):
        if vma.flags & VM_UFFD_WP:
            low, high = max(start, vma.start), min(end, vma.end)
            allow_writing(mm, low, high)
            if mm.notified:
                for first, last in mm.pgtable.ranges_with_tables(low, high):
                    yield InvalidateRange(mm, first, last, Reason.PROTECTION_VMA)
    yield from _set_flags(mm, start, end, 0)


def allow_writing(mm: Mm, start: int, end: int) -> None:
    """The protection of the pages is gone; a write asks again, and finds nothing in its way."""
    for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        ptes &= ~np.uint64(UFFD_WP)


# Moving pages


def move(mm: Mm, dst: int, src: int, length: int, mode: int, uffd: int) -> Operation[int]:
    """UFFDIO_MOVE: the pages of [src, +length), which must be this mapping's alone, become those of [dst, +length).

    Returns: how many bytes were moved; fewer than asked where the kernel says EAGAIN.
    Raises, when nothing was moved: MmError EINVAL (unaligned; the mappings do not fit, or dst is not registered),
        ENOENT (a hole in src), EEXIST (a page in dst), EBUSY (a page that others have too, or hold), EFAULT (a device
        has it).
    """
    _check_number(uffd)
    _check_range(dst, length)
    _check_range(src, length)
    if mode & ~(DONTWAKE | ALLOW_SRC_HOLES):
        raise MmError("EINVAL", f"mode {mode:#x}")
    operation = _move_pages(mm, dst, src, length, mode & ALLOW_SRC_HOLES != 0, uffd)
    return (yield from mm.locked(operation, (src, src + length), (dst, dst + length)))


def _check_areas(mm: Mm, dst: int, src: int, length: int, uffd: int) -> None:
    """Kernel: uffd_move_lock(), validate_move_areas()."""
    target, source = mm.vmas.find(dst), mm.vmas.find(src)
    if target is not None and not target.shared:
        prepare_anon_vma(target)  # whatever comes of it
    if target is None or source is None:
        raise MmError("ENOENT", f"nothing is mapped at {dst if target is None else src:#x}")
    wrong = ""
    if src + length > source.end or dst + length > target.end:
        wrong = "a range is not inside one mapping"
    elif source.file is not None or target.file is not None or (source.flags | target.flags) & VM_SHARED:
        wrong = "only private anonymous memory can be moved"
    elif (source.flags ^ target.flags) & (VM_ACCESS_FLAGS | VM_LOCKED) or not source.flags & VM_WRITE:
        wrong = "the mappings are not alike, or not writable"
    elif number_of(target) != uffd:
        wrong = f"{dst:#x} is not registered with userfaultfd {uffd}"
    if wrong:
        raise MmError("EINVAL", f"[{src:#x}, +{length:#x}) to {dst:#x}: {wrong}")


def _move_pages(mm: Mm, dst: int, src: int, length: int, holes: bool, uffd: int) -> Operation[int]:
    """Kernel: move_pages()."""
    _check_areas(mm, dst, src, length, uffd)
    moved = 0
    try:
        while moved < length:
            moved += yield from _step(mm, dst + moved, src + moved, length - moved, holes)
    except MmError:
        if not moved:
            raise
    return moved


def _step(mm: Mm, dst: int, src: int, length: int, holes: bool) -> Operation[int]:
    """Move what can be moved at once. Returns: how many bytes; 0: try again."""
    leaves = mm.pgtable.leaves
    missing = sum(address >> PAGE_SHIFT + LEAF_SHIFT not in leaves for address in (dst, src))
    if missing:
        yield from make_room_for_tables(mm, missing)
    source, target = leaves.get(src >> PAGE_SHIFT + LEAF_SHIFT), leaves.get(dst >> PAGE_SHIFT + LEAF_SHIFT)
    if source is None:
        if not holes:
            raise MmError("ENOENT", f"nothing has been touched at {src:#x}")
        source = mm.pgtable.leaf(src >> PAGE_SHIFT)
    if target is not None and target.huge:
        raise MmError("EEXIST", f"a huge page is at {dst:#x}")
    if source.huge:
        return (yield from _step_huge(mm, dst, src, length))
    if target is None:
        mm.pgtable.leaf(dst >> PAGE_SHIFT)
    if mm.notified:
        yield InvalidateRange(mm, src, src + length, Reason.CLEAR)
    entry = mm.pgtable.get(src >> PAGE_SHIFT)
    if entry & PRESENT and is_large(mm.memory.frames, entry >> PFN_SHIFT):
        yield from split_page(mm, src >> PAGE_SHIFT)
    elif entry and kind(entry) == MIGRATION:
        yield from migrate.wait(mm, entry)
        return 0
    return _move_ptes(mm, dst >> PAGE_SHIFT, src >> PAGE_SHIFT, length >> PAGE_SHIFT, holes) << PAGE_SHIFT


def _step_huge(mm: Mm, dst: int, src: int, length: int) -> Operation[int]:
    """A PMD is moved whole where there is room for it, and split where not. Kernel: move_pages_huge_pmd()."""
    frames, leaves = mm.memory.frames, mm.pgtable.leaves
    number, to = src >> PAGE_SHIFT + LEAF_SHIFT, dst >> PAGE_SHIFT + LEAF_SHIFT
    pfn = leaves[number].at[0] >> PFN_SHIFT
    if pfn and not frames.flags_at[pfn] & EXCLUSIVE:
        raise MmError("EBUSY", f"others have the huge page at {src:#x} too")
    if (dst | src) & PMD_SIZE - 1 or length < PMD_SIZE or to in leaves:
        yield from split_page(mm, src >> PAGE_SHIFT)
        return 0
    if mm.notified:
        yield InvalidateRange(mm, src, src + PMD_SIZE, Reason.CLEAR)
    leaf, target = leaves.get(number), mm.vmas.find(dst)
    if leaf is None or not leaf.huge or to in leaves or target is None:
        return 0
    pfns = np.arange(pfn, pfn + FOLIO_PAGES) if pfn else np.zeros(0, np.int64)
    if (frames.flags[pfns] & np.uint32(PINNED)).any() or (pfn and not frames.flags_at[pfn] & EXCLUSIVE):
        raise MmError("EBUSY", f"someone holds the huge page at {src:#x}")
    first = target.linear_index(dst)
    frames.mapping[pfns] = prepare_anon_vma(target).id
    frames.index[pfns] = np.arange(first, first + len(pfns), dtype=np.uint64)
    mm.pgtable.move_leaf(number, to)
    leaf.ptes &= ~np.uint64(UFFD_WP)
    if pfn:
        leaf.ptes |= np.uint64(WRITE | SOFT_DIRTY | ACCESSED)
    return PMD_SIZE


def _move_ptes(mm: Mm, to: int, vpn: int, count: int, holes: bool) -> int:
    """Move one page, or a run of them inside both tables. Returns: how many. Kernel: move_pages_ptes()."""
    table = (1 << LEAF_SHIFT) - 1
    last = min(count, table + 1 - (vpn & table), table + 1 - (to & table))
    if mm.pgtable.get(to):
        raise MmError("EEXIST", f"a page is at {to << PAGE_SHIFT:#x}")
    entry = mm.pgtable.get(vpn)
    if not entry:
        if not holes:
            raise MmError("ENOENT", f"no page is at {vpn << PAGE_SHIFT:#x}")
        return 1
    if not entry & PRESENT:
        return _move_entry(mm, to, vpn, entry)
    if not entry >> PFN_SHIFT:
        mm.pgtable.clear(vpn)
        mm.pgtable.set(to, ZERO_PTE)
        return 1
    if not _alone(mm, entry):
        raise MmError("EBUSY", f"others have the page at {vpn << PAGE_SHIFT:#x} too, or hold it")
    done = 0
    while done < last and not mm.pgtable.get(to + done) and _alone(mm, mm.pgtable.get(vpn + done)):
        _move_page(mm, to + done, vpn + done)
        done += 1
    return done


def _move_entry(mm: Mm, to: int, vpn: int, entry: int) -> int:
    """Kernel: move_swap_pte()."""
    if kind(entry) != SWAP:
        raise MmError("EFAULT", f"a device has the page at {vpn << PAGE_SHIFT:#x}")
    if not entry & ENTRY_ALONE:
        raise MmError("EBUSY", f"others have the page at {vpn << PAGE_SHIFT:#x} too")
    cached = mm.memory.swap.cached(entry >> PFN_SHIFT)
    mm.pgtable.clear(vpn)
    mm.pgtable.set_entry(to, entry & ~UFFD_WP | SOFT_DIRTY)
    if cached:
        _belongs(mm, cached, to)
    return 1


def _alone(mm: Mm, pte: int) -> bool:
    """Whether it maps a small page of private memory that is this mapping's alone, and nobody holds."""
    frames, pfn = mm.memory.frames, pte >> PFN_SHIFT
    wanted = frames.flags_at[pfn] & (ANON | EXCLUSIVE | KSM | PINNED) == ANON | EXCLUSIVE
    return pte & PRESENT != 0 and pfn != 0 and wanted and not is_large(frames, pfn)


def _move_page(mm: Mm, to: int, vpn: int) -> None:
    """Kernel: move_present_ptes()."""
    pte = mm.pgtable.clear(vpn)
    _belongs(mm, pte >> PFN_SHIFT, to)
    kept = pte >> PFN_SHIFT << PFN_SHIFT | pte & DIRTY
    mm.pgtable.set(to, kept | PRESENT | ACCESSED | WRITE | SOFT_DIRTY)


def _belongs(mm: Mm, pfn: int, vpn: int) -> None:
    """The frame is from now on looked for at this page. Kernel: folio_move_anon_rmap()."""
    target = mm.vmas.find(vpn << PAGE_SHIFT)
    assert target is not None, "both ranges are locked"
    mm.memory.frames.mapping_at[pfn] = prepare_anon_vma(target).id
    mm.memory.frames.index_at[pfn] = target.linear_index(vpn << PAGE_SHIFT)
