"""mremap. Kernel: mm/mremap.c, v6.18, where one call may also move several mappings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import hugetlb, limits, rmap
from mmubusd.mm.addr import MMAP_MIN_ADDR, PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, PTRS_PER_TABLE, TASK_SIZE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import announce_splits, split_pmd
from mmubusd.mm.hugetlb import huge_align
from mmubusd.mm.mmap import MAP_SHARED, get_unmapped_area, unmap
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import LEAF_MASK, LEAF_SHIFT
from mmubusd.mm.populate import populate
from mmubusd.mm.userfaultfd import allow_writing
from mmubusd.mm.vma import (
    UFFD_FLAGS,
    VM_ACCOUNT,
    VM_DONTEXPAND,
    VM_HUGETLB,
    VM_LOCKED,
    VM_LOCKED_MASK,
    VM_SHARED,
    VM_UFFD_WP,
    Vma,
)
from mmubusd.mm.vma_merge import check_unsealed, merge_new
from mmubusd.mm.vmscan import make_room_for_tables

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4


def mremap(mm: Mm, addr: int, old: int, new: int, flags: int, new_addr: int) -> Operation[int]:
    """mremap(2): old and new are the lengths. Returns: the address. Kernel: do_mremap(), check_mremap_params()."""
    if flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP):
        raise MmError("EINVAL", f"flags {flags:#x}")
    if addr % PAGE_SIZE:
        raise MmError("EINVAL", f"address {addr:#x} is not page-aligned")
    old, new = page_align(old) % (1 << 64), page_align(new) % (1 << 64)
    if not 0 < new <= TASK_SIZE:
        raise MmError("EINVAL", f"new length {new:#x}")
    moves = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)
    if moves:
        _check_target(mm, addr, old, new, flags, new_addr)
    reach = _whole(mm, addr, max(old, new))
    if flags & MREMAP_FIXED:
        there = (new_addr, new_addr + reach[1] - addr)
        return (yield from mm.locked(_fixed(mm, addr, old, new, flags, new_addr), reach, there))
    if not moves and new_addr % PMD_SIZE and _is_hugetlb(mm, addr):
        raise MmError("EINVAL", f"new address {new_addr:#x} is not aligned to huge pages")
    if not moves:
        in_place = yield from mm.locked(_in_place(mm, addr, old, new, flags), reach)
        if in_place:
            return addr
    while True:
        target = _choose(mm, addr, old, new, flags, new_addr if moves else 0)
        room = (target, target + reach[1] - addr)
        done = yield from mm.locked(_move_to_free(mm, addr, old, new, flags, target), reach, room)
        if done:
            return target


def _check_target(mm: Mm, addr: int, old: int, new: int, flags: int, new_addr: int) -> None:
    if new_addr % PAGE_SIZE or new_addr > TASK_SIZE - new:
        raise MmError("EINVAL", f"new address {new_addr:#x}")
    if not flags & MREMAP_MAYMOVE:
        raise MmError("EINVAL", "MREMAP_FIXED and MREMAP_DONTUNMAP need MREMAP_MAYMOVE")
    if flags & MREMAP_DONTUNMAP and old != new:
        raise MmError("EINVAL", "MREMAP_DONTUNMAP keeps the length")
    if (addr + old) % (1 << 64) > new_addr and new_addr + new > addr:
        raise MmError("EINVAL", "the old and the new range overlap")
    limits.check_map_count(mm, 2 + 3 + 1)


def _is_hugetlb(mm: Mm, addr: int) -> bool:
    vma = mm.vmas.find(addr)
    return vma is not None and vma.flags & VM_HUGETLB != 0


def _whole(mm: Mm, addr: int, length: int) -> tuple[int, int]:
    """The range that a call from addr on concerns: whole huge pages, where it is of hugetlb."""
    return addr, addr + (huge_align(length) if _is_hugetlb(mm, addr) else max(length, PAGE_SIZE))


def _check_hugetlb(vma: Vma, addr: int, old: int, new: int, new_addr: int) -> tuple[int, int]:
    """Both lengths, as whole huge pages where the mapping is of hugetlb. Kernel: align_hugetlb()."""
    if not vma.flags & VM_HUGETLB:
        return old, new
    old, new = huge_align(old) % (1 << 64), huge_align(new)
    if addr % PMD_SIZE or new_addr % PMD_SIZE:
        raise MmError("EINVAL", f"{addr:#x} or {new_addr:#x} is not aligned to huge pages")
    if new > old:
        raise MmError("EINVAL", "a mapping of hugetlb does not grow")
    return old, new


def _source(mm: Mm, addr: int, old: int, new: int) -> Vma:
    """The VMA to be resized or moved. Kernel: check_prep_vma()."""
    vma = mm.vmas.find(addr)
    if vma is None:
        raise MmError("EFAULT", f"nothing is mapped at {addr:#x}")
    check_unsealed(vma)
    if not old and not vma.flags & VM_SHARED:
        raise MmError("EINVAL", "only a shared mapping can be mapped a second time (old length 0)")
    return vma


def _check_growth(mm: Mm, vma: Vma, old: int, new: int) -> None:
    if new > old:
        limits.check_locked(mm, vma.flags, new - old)
        limits.check_expand(mm, vma.flags, new - old)
        if vma.flags & VM_ACCOUNT:
            limits.check_commit(mm.memory, (new - old) >> PAGE_SHIFT)


def _in_place(mm: Mm, addr: int, old: int, new: int, flags: int) -> Operation[bool]:
    """Resize without moving; false if it must move. Kernel: mremap_at()."""
    vma = _source(mm, addr, old, new)
    old, new = _check_hugetlb(vma, addr, old, new, 0)
    if new == old:
        return True
    if new < old:
        yield from _shrink(mm, addr + new, addr + old)
        return True
    if old > vma.end - addr:
        raise MmError("EFAULT", f"[{addr:#x}, +{old:#x}) is not one mapping")
    _check_growth(mm, vma, old, new)
    if addr + old == vma.end and addr + new <= TASK_SIZE and not mm.vmas.intersects(vma.end, addr + new):
        start, end = vma.end, addr + new
        locked = vma.flags & VM_LOCKED
        merged = merge_new(mm, start, end, vma.flags, vma.linear_index(start), vma.file, vma)
        if merged is not None:
            if locked:
                yield from populate(mm, start, end)
            return True
    if not flags & MREMAP_MAYMOVE:
        raise MmError("ENOMEM", f"there is no room to grow at {addr:#x}")
    return False


def _choose(mm: Mm, addr: int, old: int, new: int, flags: int, hint: int) -> int:
    """Where the kernel would put it. Kernel: vrm_set_new_addr()."""
    vma, _, length = _movable(mm, addr, old, new, flags, hint)
    shared = MAP_SHARED if vma.flags & VM_SHARED else 0
    found = get_unmapped_area(mm, hint, length, shared, vma.file, vma.linear_index(addr))
    if found < MMAP_MIN_ADDR:
        raise MmError("EPERM", f"address {found:#x} is below {MMAP_MIN_ADDR:#x}")
    return found


def _movable(mm: Mm, addr: int, old: int, new: int, flags: int, target: int) -> tuple[Vma, int, int]:
    """The VMA to be moved, and both lengths. Kernel: check_prep_vma()."""
    vma = _source(mm, addr, old, new)
    old, new = _check_hugetlb(vma, addr, old, new, target)
    if flags & MREMAP_DONTUNMAP and vma.flags & VM_DONTEXPAND:
        raise MmError("EINVAL", "a mapping of hugetlb moves as a whole")
    if old > vma.end - addr:
        raise MmError("EFAULT", f"[{addr:#x}, +{old:#x}) is not one mapping")
    _check_growth(mm, vma, old, new)
    _check_keeping(mm, addr, old, flags)
    return vma, old, new


def _move_to_free(mm: Mm, addr: int, old: int, new: int, flags: int, target: int) -> Operation[bool]:
    """Move to a range that was free when it was chosen; false if it no longer is."""
    _, old, new = _movable(mm, addr, old, new, flags, target)
    if mm.vmas.intersects(target, target + new):
        return False
    yield from _move(mm, addr, old, new, flags, target)
    return True


def _fixed(mm: Mm, addr: int, old: int, new: int, flags: int, new_addr: int) -> Operation[int]:
    """MREMAP_FIXED. With equal lengths every mapping is moved in turn. Kernel: remap_move(), mremap_to()."""
    if old != new:
        vma = _source(mm, addr, old, new)
        old, new = _check_hugetlb(vma, addr, old, new, new_addr)
        if min(old, new) > vma.end - addr:
            raise MmError("EFAULT", f"[{addr:#x}, +{min(old, new):#x}) is not one mapping")
        _check_growth(mm, vma, old, new)
        yield from _move_over(mm, addr, old, new, flags, new_addr)
        return new_addr
    end, at, shift = addr + old, addr, new_addr - addr
    while at < end and (piece := mm.vmas.find_from(at)) is not None and piece.start < end:
        start, stop, next_at = max(at, piece.start), min(end, piece.end), piece.end
        if at == addr and start > addr:
            break
        check_unsealed(piece)
        if piece.flags & UFFD_FLAGS and (at > addr or next_at < end):
            raise MmError("EFAULT", "a mapping that is registered with a userfaultfd moves alone")
        length, _ = _check_hugetlb(piece, start, stop - start, stop - start, start + shift)
        if flags & MREMAP_DONTUNMAP and piece.flags & VM_DONTEXPAND:
            raise MmError("EINVAL", "a mapping of hugetlb moves as a whole")
        yield from _move_over(mm, start, length, length, flags, start + shift)
        at = next_at
    if at == addr:
        raise MmError("EFAULT", f"nothing is mapped at {addr:#x}")
    return new_addr


def _shrink(mm: Mm, start: int, end: int) -> Operation[None]:
    """Unmap what is behind the new length. Kernel: shrink_vma()."""
    if end > TASK_SIZE:
        raise MmError("EINVAL", f"[{start:#x}, {end:#x}) is outside the address space")
    yield from unmap(mm, start, end)


def _check_keeping(mm: Mm, addr: int, length: int, flags: int) -> None:
    """Whether the old mapping may be there as well. Kernel: mremap_to()."""
    if flags & MREMAP_DONTUNMAP and (vma := mm.vmas.find(addr)) is not None:
        limits.check_expand(mm, vma.flags, length)


def _move_over(mm: Mm, addr: int, old: int, new: int, flags: int, new_addr: int) -> Operation[None]:
    """Move to a range, unmapping what is there. Kernel: mremap_to()."""
    yield from unmap(mm, new_addr, new_addr + new)
    if mm.vmas.find(addr) is None:
        raise MmError("EFAULT", f"nothing is mapped at {addr:#x} any more")
    if old > new:
        yield from _shrink(mm, addr + new, addr + old)
        old = new
    _check_keeping(mm, addr, old, flags)
    if new_addr < MMAP_MIN_ADDR:
        raise MmError("EPERM", f"address {new_addr:#x} is below {MMAP_MIN_ADDR:#x}")
    yield from _move(mm, addr, old, new, flags, new_addr)


def _move(mm: Mm, addr: int, old: int, new: int, flags: int, new_addr: int) -> Operation[None]:
    """Move [addr, addr + old), part of one VMA, to a free range of new bytes. Kernel: move_vma()."""
    yield from make_room_for_tables(mm)
    vma = mm.vmas.find(addr)
    if vma is None:
        raise MmError("EFAULT", f"nothing is mapped at {addr:#x}")
    limits.check_map_count(mm, 3 + 1)
    locked, whole = vma.flags & VM_LOCKED, (vma.start, vma.end) == (addr, addr + old)
    target = _copy_vma(mm, vma, addr, new, new_addr)
    if vma.flags & VM_HUGETLB:
        yield from _move_hugetlb(mm, vma, target, addr, old, new_addr)
    elif old:
        if mm.notified:
            ahead = _realignment(mm, addr, old, new_addr)
            yield InvalidateRange(mm, addr - ahead, addr + old, Reason.UNMAP)
        ahead = _realignment(mm, addr, old, new_addr)
        move_page_tables(mm, addr - ahead, old + ahead, new_addr - ahead)
        if vma.flags & VM_UFFD_WP:
            allow_writing(mm, new_addr, new_addr + old)
        if mm.split_blocks:
            yield from announce_splits(mm)
    if flags & MREMAP_DONTUNMAP:
        source = mm.vmas.find(addr)
        if source is not None:
            mm.locked_twice += source.end - source.start if source.flags & VM_LOCKED else 0
            source.flags &= ~VM_LOCKED_MASK
            if whole and source is not target:
                rmap.unlink(source)
    elif old:
        yield from unmap(mm, addr, addr + old)
    if locked and new > old:
        yield from populate(mm, new_addr + old, new_addr + new)


def _copy_vma(mm: Mm, vma: Vma, addr: int, length: int, new_addr: int) -> Vma:
    """Make the target's VMA, merged with its neighbours if they fit. Kernel: copy_vma()."""
    pgoff = vma.linear_index(addr)
    if vma.file is None and vma.anon_vma is None:
        pgoff = new_addr >> PAGE_SHIFT
    target = merge_new(mm, new_addr, new_addr + length, vma.flags, pgoff, vma.file, vma)
    if target is None:
        target = Vma(mm, new_addr, new_addr + length, vma.flags, pgoff, vma.file)
        target.policy = vma.policy
        mm.vmas.insert(target)
        rmap.copy(target, vma)
    target.flags &= ~UFFD_FLAGS  # nobody is told that it has moved, so it is registered with nobody
    return target


def _move_hugetlb(mm: Mm, vma: Vma, target: Vma, addr: int, length: int, new_addr: int) -> Operation[None]:
    """Move the huge pages. The new mapping has the reservation, the old one none, and where only a part of it moves
    what the rest had reserved is never given back. Kernel: move_hugetlb_page_tables(), fixup_hugetlb_reservations().
    """
    if mm.notified:
        yield InvalidateRange(mm, addr, addr + length, Reason.CLEAR)
    for address, _ in [*hugetlb.mapped(mm, addr, addr + length), *hugetlb.gone(mm, addr, addr + length)]:
        mm.pgtable.move_leaf(address // PMD_SIZE, (address - addr + new_addr) // PMD_SIZE)
    target.reservation, vma.reservation = vma.reservation, None


def _realignment(mm: Mm, addr: int, length: int, new_addr: int) -> int:
    """How far before both addresses the move of the page tables may begin: at the 2 MiB boundary, so that the first
    table moves whole, where nothing else lies between the boundary and the mappings. Kernel: can_realign_addr().
    """
    ahead = addr & PMD_SIZE - 1
    if ahead != new_addr & PMD_SIZE - 1 or length < PMD_SIZE - ahead:
        return 0
    for start in (addr, new_addr):
        vma = mm.vmas.find(start)
        if vma is None or vma.start != start or mm.vmas.intersects(start - ahead, start):
            return 0
    return ahead


def move_page_tables(mm: Mm, addr: int, length: int, new_addr: int) -> None:
    """Move every PTE as it is; a table or a PMD as a whole where both places are the whole block.

    Target tables are made where the source has tables. A PMD of which a part moves is split, to be told of.
    Kernel: move_page_tables().
    """
    pgtable, shift = mm.pgtable, (new_addr - addr) >> PAGE_SHIFT
    for base, ptes in list(pgtable.spans(addr >> PAGE_SHIFT, (addr + length) >> PAGE_SHIFT)):
        number, done = base >> LEAF_SHIFT, 0
        while done < len(ptes):
            vpn = base + done + shift
            count = min(len(ptes) - done, PTRS_PER_TABLE - (vpn & LEAF_MASK))
            if count == PTRS_PER_TABLE and vpn >> LEAF_SHIFT not in pgtable.leaves:
                pgtable.move_leaf(number, vpn >> LEAF_SHIFT)
            else:
                if pgtable.leaves[number].huge:
                    split_pmd(mm, base << PAGE_SHIFT)
                if number not in pgtable.leaves:
                    break  # a file's is dropped
                at = vpn & LEAF_MASK
                pgtable.leaf(vpn).ptes[at : at + count] = ptes[done : done + count]
                ptes[done : done + count] = 0
            done += count
