"""MADV_COLLAPSE of shared memory: what is cached of a block of 2 MiB becomes one large folio, which a PMD maps.

    unmap      folio by folio: whoever maps a page of the block lets go of it
    replace    a large folio takes the place of the small ones in the cache; holes become pages of zeros
    retract    every mapping that has a table for the block loses it, so that its next fault finds nothing but room
    install    the mapping that asked maps the folio by a PMD; others do when they fault

Private memory is collapse's business. Kernel: mm/khugepaged.c, v6.18: collapse_file(), retract_page_tables(),
collapse_pte_mapped_thp().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import shmem_huge
from mmubusd.mm.addr import PAGE_SHIFT, PMD_SIZE, PTRS_PER_TABLE
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.notification import InvalidateRange, Operation, Reason
from mmubusd.mm.pgtable import LEAF_SHIFT, PFN_SHIFT, PRESENT, Leaf
from mmubusd.mm.rmap_walk import unmap_folio
from mmubusd.mm.vma import Vma
from mmubusd.mm.zap import Gather, evict_exports, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm


def collapse_block(mm: Mm, vma: Vma, block: int) -> Operation[None]:
    """Collapse the block, which lies in the VMA and at whose start a block of the file begins.

    Raises: MmError EINVAL (nothing of it is in memory, or a private page is mapped there), ENOMEM (no 512 free frames
    in a row), EAGAIN (someone holds a page).
    """
    file, first = vma.file, vma.linear_index(block)
    assert file is not None, "shared memory is a file's"
    if not shmem_huge.folio_at(file, first):
        yield from collapse_cached(file, first)
    yield from _install(mm, vma, block, first)


def collapse_cached(file: File, first: int) -> Operation[None]:
    """What is cached of the file's block that begins at this index becomes one folio, which nobody maps.

    Raises: as collapse_block.
    """
    yield from _collapse_file(file, first)
    yield from _retract_page_tables(file, first)


def _collapse_file(file: File, first: int) -> Operation[None]:
    memory = file.memory
    frames, last = memory.frames, first + PTRS_PER_TABLE
    memory.lru.drain()
    _bring_in(file, first, last)
    if not file.cache.window(first, last).any():
        raise MmError("EINVAL", f"nothing of the pages {first} to {last} of file {file.id} is in memory")
    new = frames.alloc_block(memcg=file.memcg)
    if not new:
        raise MmError("ENOMEM", f"no {PTRS_PER_TABLE} free frames in a row")
    pfns, taken = np.arange(new, new + PTRS_PER_TABLE), False
    try:
        while mapped := _first_mapped(file, first, last):  # while one is told of, another may be mapped again
            yield from unmap_folio(file, *mapped)
        yield from evict_exports(memory, [pfn for _, pfn in file.cache.items(first, last)])
        if _first_mapped(file, first, last):
            raise MmError("EAGAIN", f"the pages {first} to {last} of file {file.id} are in use")
        _replace(file, first, new)
        taken = True
    finally:
        if not taken:
            frames.put_many(pfns)


def _bring_in(file: File, first: int, last: int) -> None:
    """Pages of the block that are in swap come back. Raises: MmError ENOMEM."""
    for index in [index for index in file.swapped if first <= index < last]:
        file.add(index)
        file.read_in(index)


def _first_mapped(file: File, first: int, last: int) -> tuple[int, int] | None:
    """The first folio of [first, last) that anyone maps. Kernel: folio_mapped()."""
    frames = file.memory.frames
    for index, pfn in file.cache.items(first, last):
        if frames.mapcount_at[pfn]:
            return file.folio(index)
    return None


def _replace(file: File, first: int, new: int) -> None:
    """The frames from new on take the place of what is cached of the block. Raises: MmError EAGAIN: it is held."""
    memory = file.memory
    frames, cached = memory.frames, list(file.cache.items(first, first + PTRS_PER_TABLE))
    if any(frames.refcount_at[pfn] != 1 for _, pfn in cached):
        raise MmError("EAGAIN", f"a page of file {file.id} is held")
    for index, pfn in cached:
        frames.copy(pfn, new + index - first)
        file.delete(index)
    shmem_huge.become_cached(file, first, new)
    file.set_dirty(first)


def _retract_page_tables(file: File, first: int) -> Operation[None]:
    for vma in file.rmap.overlapping(first, first + 1):
        block = vma.address_of(first)
        number = block >> PAGE_SHIFT + LEAF_SHIFT
        leaf = vma.mm.pgtable.leaves.get(number)
        if block % PMD_SIZE or block + PMD_SIZE > vma.end or vma.anon_vma is not None or vma not in file.rmap:
            continue
        if leaf is None or leaf.huge:
            continue
        if vma.mm.notified:
            yield InvalidateRange(vma.mm, block, block + PMD_SIZE, Reason.CLEAR)
        if vma.mm.pgtable.leaves.get(number) is leaf and not leaf.ptes.any():
            vma.mm.pgtable.drop_leaf(number)


def _install(mm: Mm, vma: Vma, block: int, first: int) -> Operation[None]:
    """Map the folio by a PMD. Kernel: collapse_pte_mapped_thp()."""
    leaf = mm.pgtable.leaves.get(block >> PAGE_SHIFT + LEAF_SHIFT)
    if leaf is not None and leaf.huge:
        return
    gather = Gather(mm.memory)
    yield from _drop_table(mm, vma, block, first, gather)
    if not shmem_huge.map_pmd(mm, vma, block >> PAGE_SHIFT, shmem_huge.clean_flags(vma)):
        raise MmError("EAGAIN", f"the folio at page {first} of the mapping at {vma.start:#x} is gone")
    yield from gather.finish()


def drop_table(mm: Mm, vma: Vma, block: int, first: int) -> Operation[bool]:
    """A table that maps the folio page by page goes, so that the next fault maps it by a PMD. Returns: whether it has.

    Raises: MmError EINVAL: it has other pages as well.
    """
    leaf = mm.pgtable.leaves.get(block >> PAGE_SHIFT + LEAF_SHIFT)
    if leaf is None or leaf.huge:
        return False
    gather = Gather(mm.memory)
    yield from _drop_table(mm, vma, block, first, gather)
    yield from gather.finish()
    return block >> PAGE_SHIFT + LEAF_SHIFT not in mm.pgtable.leaves


def _drop_table(mm: Mm, vma: Vma, block: int, first: int, gather: Gather) -> Operation[None]:
    number, file = block >> PAGE_SHIFT + LEAF_SHIFT, vma.file
    assert file is not None
    leaf = mm.pgtable.leaves.get(number)
    if leaf is None:
        return
    _check_same(leaf, block, shmem_huge.folio_at(file, first))
    if mm.notified:
        yield InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)
    leaf, new = mm.pgtable.leaves.get(number), shmem_huge.folio_at(file, first)
    if leaf is not None and new:
        _check_same(leaf, block, new)
        zap_range(mm, vma, block, block + PMD_SIZE, gather)
        mm.pgtable.drop_leaf(number)


def _check_same(leaf: Leaf, block: int, new: int) -> None:
    """Raises: MmError EINVAL: the table has other pages than those of the folio that begins with this frame."""
    ours = leaf.ptes >> np.uint64(PFN_SHIFT) == np.arange(new, new + PTRS_PER_TABLE, dtype=np.uint64)
    if not ((leaf.ptes == 0) | (ours & (leaf.ptes & np.uint64(PRESENT) != 0))).all():
        raise MmError("EINVAL", f"the block at {block:#x} has pages of its own")
