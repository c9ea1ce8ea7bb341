"""Changing a file's size, punching holes, and splitting the folios that are only partly concerned.

Kernel: mm/truncate.c, mm/shmem.c, fs/ext4/inode.c, v6.12 to v6.18. The order of the steps shows in the notifications:
the size first, then the mappings, then the cache, then the mappings again for what was faulted in meanwhile.
"""

from __future__ import annotations

from mmubusd.mm import hugetlb_truncate, xip
from mmubusd.mm.addr import INDEX_MAX, MAX_LFS_FILESIZE, PAGE_SHIFT, PAGE_SIZE, pages
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import HOLE, File
from mmubusd.mm.frame import BLOCK_DIRTY, DIRTY, NOT_UPTODATE, ORDER_MASK, ORDER_SHIFT
from mmubusd.mm.notification import LockWait, Operation
from mmubusd.mm.rmap_walk import drop_folio, drop_folios, unmap_folio, unmap_mapping_range


def ftruncate(file: File, size: int) -> Operation[int]:
    """ftruncate(2). Kernel: ext4_setattr(), shmem_setattr()."""
    if size < 0:
        raise MmError("EINVAL", f"size {size} is negative")
    if size > file.size_max:
        raise MmError("EFBIG", f"size {size} is above {file.size_max}")
    ticket = file.lock.acquire((0, MAX_LFS_FILESIZE + 1))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
        if file.kind == "shm":
            yield from _truncate_shm(file, size)
        elif file.kind == "xip":
            yield from xip.truncate(file, size)
        elif file.kind == "hugetlb":
            yield from hugetlb_truncate.truncate(file, size)
        else:
            yield from _truncate_disk(file, size)
    finally:
        file.lock.release(ticket)
    return 0


def _truncate_disk(file: File, size: int) -> Operation[None]:
    old = file.size
    if size > old:
        _zero_tail(file, old)
    file.size = size
    beyond = pages(size)
    yield from unmap_mapping_range(file, beyond, INDEX_MAX)
    yield from drop_range(file, size, MAX_LFS_FILESIZE + 1)
    yield from unmap_mapping_range(file, beyond, INDEX_MAX)
    if size <= old:
        _zero_tail(file, size)
        file.free_blocks(beyond, INDEX_MAX)


def _zero_tail(file: File, size: int) -> None:
    """The last page of a disk file of this size is cleared behind its end. Kernel: ext4_block_truncate_page()."""
    if size % PAGE_SIZE:
        _zero_partial(file, size, (size // PAGE_SIZE + 1) * PAGE_SIZE)


def _zero_partial(file: File, start: int, end: int) -> None:
    """Zero part of one page of a disk file: it enters the cache for that, though not as one that is up to date."""
    index = start >> PAGE_SHIFT
    if not file.cache.get(index) and file.memory.room(file.memcg) > 0:
        file.add(index, flags=NOT_UPTODATE)
        file.read_in(index)
    file.zero(start, end)
    if not file.cache.get(index):
        return  # no frame is free: its bytes on the disk have been zeroed
    if file.block(index) != HOLE:
        file.set_page_dirty(index)


def _truncate_shm(file: File, size: int) -> Operation[None]:
    old, beyond = file.size, pages(size)
    file.size = size
    if size > old:
        return
    inner = old > beyond << PAGE_SHIFT
    if inner:
        yield from unmap_mapping_range(file, beyond, INDEX_MAX)
    yield from drop_range(file, size, MAX_LFS_FILESIZE + 1)
    if inner:
        yield from unmap_mapping_range(file, beyond, INDEX_MAX)


def punch(file: File, offset: int, length: int) -> Operation[int]:
    """fallocate(PUNCH_HOLE | KEEP_SIZE): the bytes become a hole. Kernel: ext4_punch_hole(), shmem_fallocate()."""
    if offset < 0 or length <= 0:
        raise MmError("EINVAL", f"offset {offset}, length {length}: not a range")
    if offset + length > file.size_max:
        raise MmError("EFBIG", f"offset {offset} + length {length} is above {file.size_max}")
    end = offset + length
    ticket = file.lock.acquire((0, MAX_LFS_FILESIZE + 1))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
        if file.kind == "hugetlb":
            yield from hugetlb_truncate.punch(file, offset, end)
            return 0
        if file.kind != "shm":
            if offset >= file.size:
                return 0
            end = min(end, file.pages << PAGE_SHIFT)
        first, last = pages(offset), end >> PAGE_SHIFT
        if file.kind == "xip":
            yield from xip.punch(file, offset, end)
            return 0
        if first < last:
            yield from unmap_mapping_range(file, first, last, file_only=True)
        if file.kind == "disk":
            _zero_partial_ends(file, offset, end, first, last)
            if first < last:
                yield from drop_range(file, first << PAGE_SHIFT, last << PAGE_SHIFT)
            file.free_blocks(first, last)
        else:
            yield from drop_range(file, offset, end)
    finally:
        file.lock.release(ticket)
    return 0


def _zero_partial_ends(file: File, start: int, end: int, first: int, last: int) -> None:
    """Kernel: ext4_zero_partial_blocks()."""
    if first > last:
        _zero_partial(file, start, end)
        return
    if start < first << PAGE_SHIFT:
        _zero_partial(file, start, first << PAGE_SHIFT)
    if last << PAGE_SHIFT < end:
        _zero_partial(file, last << PAGE_SHIFT, end)


def drop_range(file: File, start: int, end: int) -> Operation[None]:
    """Take the bytes [start, end) out of the cache: whole folios go, others are zeroed in part and split.

    Kernel: truncate_inode_pages_range(), shmem_undo_range().
    """
    first, last = pages(start), end >> PAGE_SHIFT
    if file.swapped:
        _drop_swapped(file, start, end)
    yield from drop_folios(file, first, last)
    head, tail = start >> PAGE_SHIFT, (end - 1) >> PAGE_SHIFT
    same = False
    if file.cache.get(head):
        same = end <= file.folio(head)[1] << PAGE_SHIFT
        yield from _drop_partial(file, head, start, end)
    if not same and tail != head and file.cache.get(tail):
        yield from _drop_partial(file, tail, start, end)
    yield from drop_folios(file, first, last)


def _drop_swapped(file: File, start: int, end: int) -> None:
    """Whole pages that are in swap go; the ends of the range are zeroed there."""
    first, last = pages(start), end >> PAGE_SHIFT
    file.drop_swapped(first, last)
    for page in {start >> PAGE_SHIFT, end >> PAGE_SHIFT} & file.swapped.keys():
        low, high = max(start, page << PAGE_SHIFT), min(end, (page + 1) << PAGE_SHIFT)
        if low < high:
            file.zero(low, high)


def _drop_partial(file: File, index: int, start: int, end: int) -> Operation[None]:
    """The folio at index lies partly in [start, end). Kernel: truncate_inode_partial_folio()."""
    first, last = file.folio(index)
    start, end = max(start, first << PAGE_SHIFT), min(end, last << PAGE_SHIFT)
    if start == first << PAGE_SHIFT and end == last << PAGE_SHIFT:
        yield from drop_folio(file, first, last)
        return
    if file.kind == "shm":
        file.set_dirty(index)
    for page in range(start >> PAGE_SHIFT, pages(end)):
        file.zero(max(start, page << PAGE_SHIFT), min(end, (page + 1) << PAGE_SHIFT))
    if last - first == 1:
        return
    for page in range(pages(start), end >> PAGE_SHIFT):
        file.memory.frames.flags_at[file.cache.get(page)] &= ~BLOCK_DIRTY
    if (yield from split_folio(file, first, start >> PAGE_SHIFT)):
        edge = end >> PAGE_SHIFT
        if end < last << PAGE_SHIFT and file.cache.get(edge):
            second, second_end = file.folio(edge)
            if second_end - second > 1:
                yield from split_folio(file, second, edge)
    elif not file.folio_flags(first) & DIRTY:
        yield from drop_folio(file, first, last)


def split_folio(file: File, first: int, at: int | None) -> Operation[bool]:
    """Split the folio that begins at index first. Kernel: split_huge_page_to_list_to_order(), __folio_split().

    Unmaps it first, whether or not it can be split: a folio with pages to be written cannot.
    Args: at: halve again and again only the part that holds this index; None: split everything to single pages.
    Returns: whether it was split.
    """
    frames, cache = file.memory.frames, file.cache
    _, end = file.folio(first)
    yield from unmap_folio(file, first, end)
    if not cache.get(first) or file.folio(first) != (first, end):
        return False
    if any(frames.flags_at[cache.get(index)] & BLOCK_DIRTY for index in range(first, end)):
        return False
    dirty = file.folio_flags(first) & DIRTY if file.kind == "shm" else 0
    file.set_folio_flags(first, off=DIRTY)
    parts = [(index, index + 1) for index in range(first, end)] if at is None else _halves(first, end, at)
    file_pages = file.pages
    for part, part_end in parts:
        order = (part_end - part).bit_length() - 1
        for index in range(part, part_end):
            pfn = cache.get(index)
            frames.flags_at[pfn] = frames.flags_at[pfn] & ~ORDER_MASK | order << ORDER_SHIFT | dirty
        if part >= file_pages and part != first:
            yield from drop_folio(file, part, part_end)
    return True


def _halves(first: int, end: int, at: int) -> list[tuple[int, int]]:
    parts: list[tuple[int, int]] = []
    while end - first > 1:
        middle = (first + end) // 2
        if at < middle:
            parts.append((middle, end))
            end = middle
        else:
            parts.append((first, middle))
            first = middle
    return sorted([*parts, (first, end)])
