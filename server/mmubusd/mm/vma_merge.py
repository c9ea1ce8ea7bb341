"""Splitting and merging VMAs, as the kernel does it: neighbours that could be one mapping become one.

Kernel: mm/vma.c, v6.12 to v6.18 (vma_merge_new_range, vma_merge_existing_range, __split_vma, vma_modify). Every
boundary that is made or moved inside a 2 MiB block that one VMA covered announces that block (`_split_huge_pmd`), huge
page or not; the blocks are collected in `mm.split_blocks`, for the operation to yield.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import rmap
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import split_pmd
from mmubusd.mm.limits import check_map_count
from mmubusd.mm.vma import VM_HUGETLB, VM_SEALED, Vma

if TYPE_CHECKING:
    from mmubusd.mm.file import File
    from mmubusd.mm.mempolicy import Mempolicy
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.rmap import AnonVma


def _split_huge_pmd(vma: Vma, address: int) -> None:
    """A boundary comes to lie at address. Kernel: split_huge_pmd_if_needed(), mm/huge_memory.c."""
    block = address & -PMD_SIZE
    covered = vma.start <= block and block + PMD_SIZE <= vma.end
    if block != address and covered and vma.mm.pgtable.has_tables(address):
        split_pmd(vma.mm, block)


def _anon_vmas_fit(target: Vma, other: AnonVma | None, other_vma: Vma | None) -> bool:
    """Kernel: is_mergeable_anon_vma(): a side with more than one anon_vma in its chain has uncopied parents."""
    own = target.anon_vma
    if own is None and other is not None:
        return other_vma is None or len(other_vma.chain) == 1
    if own is not None and other is None:
        return len(target.chain) == 1
    return own is other


class _Range:
    """A range that wants to merge: what it would be as a VMA of its own.

    Args: source: the VMA whose pages it has, or will have; vma: the existing VMA that it is part of.
    """

    __slots__ = ("anon_vma", "end", "file", "flags", "pgoff", "policy", "start", "vma")

    def __init__(
        self, start: int, end: int, flags: int, pgoff: int, file: File | None, source: Vma | None, vma: Vma | None
    ) -> None:
        self.start, self.end, self.flags, self.pgoff = start, end, flags, pgoff
        self.file, self.vma = file, vma
        self.anon_vma = source.anon_vma if source is not None else None
        self.policy = source.policy if source is not None else None

    def _fits(self, neighbour: Vma) -> bool:
        return (
            neighbour.flags == self.flags
            and neighbour.file is self.file
            and neighbour.policy == self.policy
            and _anon_vmas_fit(neighbour, self.anon_vma, self.vma)
        )

    def fits_after(self, before: Vma | None) -> bool:
        return (
            before is not None
            and before.end == self.start
            and before.pgoff + before.pages == self.pgoff
            and self._fits(before)
        )

    def fits_before(self, after: Vma | None) -> bool:
        return (
            after is not None
            and after.start == self.end
            and self.pgoff + ((self.end - self.start) >> PAGE_SHIFT) == after.pgoff
            and self._fits(after)
        )


def _both(left: bool, before: Vma | None, after: Vma) -> bool:
    """Whether after may be merged in, given that the left side is."""
    return not left or before is None or _anon_vmas_fit(before, after.anon_vma, after)


def merge_new(
    mm: Mm, start: int, end: int, flags: int, pgoff: int, file: File | None, source: Vma | None = None
) -> Vma | None:
    """Let a neighbour grow over the free range [start, end). Kernel: vma_merge_new_range().

    Args: source: the VMA whose pages are being moved here.
    Returns: the VMA that now covers it, or None when no neighbour fits.
    """
    if flags & VM_HUGETLB:
        return None
    before, after = mm.vmas.neighbours(start, end)
    wanted = _Range(start, end, flags, pgoff, file, source, None)
    left = wanted.fits_after(before)
    right = wanted.fits_before(after) and after is not None and _both(left, before, after)
    if not left and not right:
        return None
    target = before if left else after
    assert target is not None
    if source is not None:
        rmap.duplicate(target, source)
    if left and right:
        assert after is not None
        rmap.duplicate(target, after)
        through = after.end
        mm.vmas.remove(after)
        mm.vmas.set_range(target, target.start, through, target.pgoff)
    elif left:
        mm.vmas.set_range(target, target.start, end, target.pgoff)
    else:
        mm.vmas.set_range(target, start, target.end, pgoff)
    return target


def _merge_existing(vma: Vma, start: int, end: int, flags: int, policy: Mempolicy | None) -> Vma | None:
    """Let a neighbour take over [start, end) of vma, which becomes as given. Kernel: vma_merge_existing_range()."""
    vmas = vma.mm.vmas
    left_side, right_side = start == vma.start, end == vma.end
    if (not left_side and not right_side) or flags & VM_HUGETLB:
        return None
    before, after = vmas.neighbours(vma.start, vma.end)
    wanted = _Range(start, end, flags, vma.linear_index(start), vma.file, vma, vma)
    wanted.policy = policy
    left = left_side and wanted.fits_after(before)
    right = right_side and wanted.fits_before(after) and after is not None and _both(left, before, after)
    whole = left_side and right_side
    if left and right:
        assert before is not None
        assert after is not None
        rmap.duplicate(before, after if after.anon_vma is not None else vma)
        through = after.end
        vmas.remove(vma)
        vmas.remove(after)
        vmas.set_range(before, before.start, through, before.pgoff)
        return before
    if left:
        assert before is not None
        rmap.duplicate(before, vma)
        if whole:
            vmas.remove(vma)
        else:
            _split_huge_pmd(vma, end)
            vmas.set_range(vma, end, vma.end, vma.linear_index(end))
        vmas.set_range(before, before.start, end, before.pgoff)
        return before
    if right:
        assert after is not None
        rmap.duplicate(after, vma)
        pgoff = wanted.pgoff
        if whole:
            vmas.remove(vma)
        else:
            _split_huge_pmd(vma, start)
            vmas.set_range(vma, vma.start, start, vma.pgoff)
        vmas.set_range(after, start, after.end, pgoff)
        return after
    return None


def split(vma: Vma, address: int, new_below: bool = False) -> Vma:
    """Cut the VMA in two. Kernel: __split_vma().

    Returns: the new part: the right one, or the left one with new_below.
    Raises: MmError EINVAL: inside a huge page of hugetlb.
    """
    mm = vma.mm
    if vma.flags & VM_HUGETLB and address % PMD_SIZE:
        raise MmError("EINVAL", f"{address:#x} lies inside a huge page of hugetlb")
    _split_huge_pmd(vma, address)
    start, end, middle, pgoff = vma.start, vma.end, vma.linear_index(address), vma.pgoff
    if new_below:
        new = Vma(mm, start, address, vma.flags, pgoff, vma.file)
        mm.vmas.set_range(vma, address, end, middle)
    else:
        new = Vma(mm, address, end, vma.flags, middle, vma.file)
        mm.vmas.set_range(vma, start, address, pgoff)
    new.reservation, new.policy = vma.reservation, vma.policy
    mm.vmas.insert(new)
    rmap.copy(new, vma)
    return new


def split_checked(vma: Vma, address: int, new_below: bool = False) -> Vma:
    """split() within the limit of VMAs. Kernel: split_vma(). Raises: MmError ENOMEM."""
    check_map_count(vma.mm, 1)
    return split(vma, address, new_below)


def modify(vma: Vma, start: int, end: int, flags: int) -> Vma:
    """Give [start, end) of the VMA these flags: by merging, else by splitting. Kernel: vma_modify_flags().

    Returns: the VMA that now covers the range (perhaps more). Raises: MmError ENOMEM.
    """
    return _modify(vma, start, end, flags, vma.policy)


def modify_policy(vma: Vma, start: int, end: int, policy: Mempolicy | None) -> Vma:
    """As modify, a memory policy. Kernel: vma_modify_policy()."""
    return _modify(vma, start, end, vma.flags, policy)


def _modify(vma: Vma, start: int, end: int, flags: int, policy: Mempolicy | None) -> Vma:
    """Kernel: vma_modify()."""
    merged = _merge_existing(vma, start, end, flags, policy)
    if merged is not None:
        return merged
    if vma.start < start:
        split_checked(vma, start, new_below=True)
    if vma.end > end:
        split_checked(vma, end)
    vma.flags, vma.policy = flags, policy
    return vma


def check_unsealed(vma: Vma) -> None:
    """Kernel: vma_is_sealed(). Raises: MmError EPERM."""
    if vma.flags & VM_SEALED:
        raise MmError("EPERM", f"the mapping at {vma.start:#x} is sealed")


def isolate(mm: Mm, start: int, end: int) -> list[Vma]:
    """Split at both ends; the VMAs that then lie wholly in [start, end). Kernel: vms_gather_munmap_vmas().

    Raises: MmError ENOMEM, EPERM: one of them is sealed.
    """
    found = mm.vmas.overlapping(start, end)
    if not found:
        return found
    if found[0].start < start:
        if found[0].end > end:
            check_map_count(mm, 1)
        check_unsealed(found[0])
        split_checked(found[0], start, new_below=True)
    for vma in found:
        check_unsealed(vma)
    if found[-1].end > end:
        split_checked(found[-1], end)
    return found
