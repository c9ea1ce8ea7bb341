"""Finding a file's page for a fault: readahead on a miss, fault-around on a hit.

Kernel: mm/filemap.c and mm/readahead.c, v6.18, with the constants of the recorded machine below. The disk answers a
read at once, except that pages on the disk which a fault did not have to wait for are seen as READING until the
operation ends, because in the kernel their reads have not ended by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import shmem_huge
from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE
from mmubusd.mm.file import ALLOCATED, File
from mmubusd.mm.frame import HWPOISON, NOT_UPTODATE, READAHEAD, READING
from mmubusd.mm.pgtable import ACCESSED, LEAF_MASK, LEAF_SHIFT, PFN_SHIFT, PRESENT, WRITE
from mmubusd.mm.vma import VM_EXEC, VM_HUGEPAGE, VM_RAND_READ, VM_SEQ_READ, VM_SHARED, VM_WRITE, Vma
from mmubusd.mm.zonelist import nodes_for

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

FAULT_AROUND_PAGES = 16
READAHEAD_PAGES = 2048
"""The recorded disk's read_ahead_kb, 8192."""
MMAP_MISSES_MAX = 100
"""MMAP_LOTSAMISS: without hits in between, read-around stops."""
ORDER_MAX = 9


def clean_pte_flags(vma: Vma) -> int:
    """The flags of a PTE that a read makes: writable at once only where no write needs to be seen."""
    assert vma.file is not None
    if vma.flags & (VM_SHARED | VM_WRITE) == VM_SHARED | VM_WRITE and vma.file.kind == "shm":
        return PRESENT | ACCESSED | WRITE
    return PRESENT | ACCESSED


def map_folio_pages(mm: Mm, vma: Vma, first: int, end: int, flags: int) -> None:
    """Map the cached pages [first, end) where nothing is mapped; they lie in one leaf table."""
    assert vma.file is not None
    frames, cache = mm.memory.frames, vma.file.cache
    vpn = vma.address_of(first) >> PAGE_SHIFT
    ptes = mm.pgtable.leaf(vpn).at
    at = vpn & LEAF_MASK
    for index in range(first, end):
        if not ptes[at]:
            pfn = cache.get(index)
            frames.refcount_at[pfn] += 1
            frames.mapcount_at[pfn] += 1
            ptes[at] = pfn << PFN_SHIFT | flags
        at += 1


def _whole_folio_fits(vma: Vma, first: int, end: int) -> bool:
    """Whether the folio lies in the VMA and in one leaf table."""
    if first < vma.pgoff or end > vma.pgoff + vma.pages:
        return False
    vpn = vma.address_of(first) >> PAGE_SHIFT
    return vpn >> LEAF_SHIFT == vpn + (end - first) - 1 >> LEAF_SHIFT


def map_pages(mm: Mm, vma: Vma, vpn: int) -> bool:
    """Fault-around: map what is cached near the page. Kernel: do_fault_around(), filemap_map_pages().

    Returns: whether the page itself is mapped now.
    """
    file = vma.file
    assert file is not None
    start_vpn, table_end = vma.start >> PAGE_SHIFT, (vpn | LEAF_MASK) + 1
    window = max(vpn & -FAULT_AROUND_PAGES, start_vpn)
    window_end = min(window + FAULT_AROUND_PAGES, vma.end >> PAGE_SHIFT, table_end)
    first, last = vma.pgoff + window - start_vpn, vma.pgoff + window_end - start_vpn
    flags, frames, file_pages = clean_pte_flags(vma), mm.memory.frames, file.pages
    shm = file.kind == "shm"
    if shm and vma.linear_index(vpn << PAGE_SHIFT) < file_pages and shmem_huge.map_pmd(mm, vma, vpn, flags):
        return True
    index = first
    while index < (last := min(last, file_pages)):
        pfn = file.cache.get(index)
        if not pfn:
            index += 1
            continue
        folio, end = file.folio(index)
        if file.folio_flags(folio) & READAHEAD or frames.flags_at[pfn] & (NOT_UPTODATE | READING | HWPOISON):
            index = end
            continue
        if vpn >> LEAF_SHIFT not in mm.pgtable.leaves:
            if not shm and end >= file_pages:
                return False  # it may not be mapped by a large entry, and there is no table for small ones
            mm.pgtable.leaf(vpn)
        if end - folio > 1 and (shm or end < file_pages) and _whole_folio_fits(vma, folio, end):
            map_folio_pages(mm, vma, folio, end, flags)
            file.ra.mmap_miss = max(0, file.ra.mmap_miss - (end - folio))
        else:
            map_folio_pages(mm, vma, index, min(end, last), flags)
            file.ra.mmap_miss = max(0, file.ra.mmap_miss - (min(end, last) - index))
        index = end
    return mm.pgtable.get(vpn) != 0


def map_fault(mm: Mm, vma: Vma, vpn: int, index: int, flags: int) -> None:
    """Map the page that a fault has brought, with its whole folio where that is possible. Kernel: finish_fault()."""
    file = vma.file
    assert file is not None
    if file.kind == "shm" and shmem_huge.map_pmd(mm, vma, vpn, flags):
        return
    folio, end = file.folio(index)
    if end - folio > 1 and (end <= file.pages or file.kind == "shm") and _whole_folio_fits(vma, folio, end):
        base = vma.address_of(folio) >> PAGE_SHIFT
        ptes = mm.pgtable.leaf(vpn).at
        at = base & LEAF_MASK
        if not any(ptes[at : at + end - folio]):
            map_folio_pages(mm, vma, folio, end, flags)
            return
    map_folio_pages(mm, vma, index, index + 1, flags)


def get_page(vma: Vma, index: int, tried: bool) -> bool:
    """Bring the page at index, which lies within the file, into the cache. Kernel: filemap_fault().

    Args: tried: the fault has been here before.
    Returns: whether the fault must start again, because in the kernel it would have let go of the mmap_lock.
    """
    file = vma.file
    assert file is not None
    if file.kind == "shm":
        if not file.cache.get(index) and (index in file.swapped or not shmem_huge.add_folio(file, index, vma)):
            file.add(index, nodes=nodes_for(vma, index))
            file.read_in(index)
        return False
    frames = file.memory.frames
    pfn = file.cache.get(index)
    if not pfn:
        return _miss(file, vma, index)
    retry = False
    folio, _ = file.folio(index)
    if not tried and file.folio_flags(folio) & READAHEAD and not vma.flags & VM_RAND_READ:
        _async_readahead(file, index, folio)
        retry = True
    if frames.flags_at[pfn] & NOT_UPTODATE:
        frames.flags_at[pfn] &= ~NOT_UPTODATE
        retry = True
    if frames.flags_at[pfn] & READING:
        file.memory.finish_reads()
        retry = True
    return retry and not tried


def _miss(file: File, vma: Vma, index: int) -> bool:
    """Kernel: do_sync_mmap_readahead()."""
    ra, executable = file.ra, vma.flags & VM_EXEC
    random = vma.flags & VM_RAND_READ and not executable
    if vma.flags & VM_HUGEPAGE:
        start = index & -PTRS_PER_TABLE
        ra.size = PTRS_PER_TABLE if vma.flags & VM_RAND_READ else 2 * PTRS_PER_TABLE
        ra.async_size, ra.order = PTRS_PER_TABLE, ORDER_MAX
        _read_folios(file, start, ra.size, ra.order, mark=start + ra.size - ra.async_size, wait_for=index)
        return True
    if vma.flags & VM_SEQ_READ and not random:
        _add_window(file, index, index + READAHEAD_PAGES, 0, wait_for=index)
        return True
    ra.mmap_miss = min(ra.mmap_miss + 1, 10 * MMAP_MISSES_MAX)
    if random or ra.mmap_miss > MMAP_MISSES_MAX:
        read_pages(file, [index], wait_for=index)
        return False
    if executable:
        first, last = index, min(vma.pgoff + vma.pages, index + READAHEAD_PAGES)
        ra.async_size = 0
    else:
        first = max(0, index - READAHEAD_PAGES // 2)
        last = first + READAHEAD_PAGES
        ra.async_size = READAHEAD_PAGES // 4
    ra.start, ra.size, ra.order = first, last - first, 0
    _add_window(file, first, last, ra.async_size, wait_for=index)
    return True


def _add_window(file: File, first: int, last: int, lookahead: int, wait_for: int) -> None:
    """Read what is missing of a window, page by page. Kernel: page_cache_ra_unbounded()."""
    last = min(last, file.pages)
    mark = last - lookahead if 0 < lookahead <= last - first else -1
    read_pages(file, file.cache.missing(first, last), wait_for, mark)


def read_pages(file: File, indexes: list[int], wait_for: int, mark: int = -1) -> None:
    """Take the pages into the cache with their bytes.

    Args: wait_for: the page that the reader waits for: if it is a hole, nobody waits for the others; mark: the one page
        that asks for more readahead when it is reached.
    """
    memory = file.memory
    waits = file.block(wait_for) == ALLOCATED
    for index in indexes:
        if index != wait_for and (memory.frames.free_nr <= max(1, memory.low_watermark) or _short(file, 2)):
            continue  # nobody reclaims for what nobody waits for
        pfn = file.add(index, flags=READAHEAD if index == mark else 0)
        file.read_in(index)
        if not waits and file.block(index) == ALLOCATED:
            memory.frames.flags_at[pfn] |= READING
            memory.reading.append((pfn, memory.frames.generation_at[pfn]))


def _short(file: File, count: int) -> bool:
    """Whether who pays for the file's pages may have no more than so many: what is to be read, and a copy of a page."""
    return file.memcg is not None and file.memcg.room <= count


def _next_miss(file: File, index: int) -> int:
    """The first index from here on that is not cached. Kernel: page_cache_next_miss().

    Begun inside a large folio, the kernel's search comes out too far by the distance from that folio's start.
    """
    beyond = 0
    if file.cache.get(index):
        beyond = index - file.folio(index)[0]
    while file.cache.get(index):
        index = file.folio(index)[1]
    return index + beyond


def _async_readahead(file: File, index: int, folio: int) -> None:
    """A marked folio was reached: read on behind it, in larger folios each time. Kernel: page_cache_async_ra()."""
    ra = file.ra
    ra.mmap_miss = max(0, ra.mmap_miss - 1)
    file.set_folio_flags(folio, off=READAHEAD)
    count = file.folio(folio)[1] - folio
    if index == (ra.start + ra.size - ra.async_size) & -count:
        ra.start += ra.size
    else:
        start = _next_miss(file, index + 1)
        if start - index > READAHEAD_PAGES:
            return
        ra.start = start
    ra.size = ra.async_size = READAHEAD_PAGES
    ra.order = min(ra.order + 2, ORDER_MAX)
    _read_folios(file, ra.start, ra.size, ra.order, mark=ra.start, wait_for=index)


def _read_folios(file: File, start: int, size: int, order: int, mark: int, wait_for: int) -> None:
    """Read a window in the largest aligned folios up to the order, and page by page from the first cached page on.

    Kernel: page_cache_ra_order(). Args: mark: the index whose folio asks for more readahead when it is reached.
    """
    memory, at, last = file.memory, start, min(file.pages, start + size)
    while at < last:
        fitting = order
        if at & (1 << fitting) - 1:
            fitting = (at & -at).bit_length() - 1
        while fitting and at + (1 << fitting) > last:
            fitting -= 1
        end = at + (1 << fitting)
        if any(file.cache.get(page) for page in range(at, end)):
            _add_window(file, at, last, 0, wait_for)
            return
        if memory.frames.free_nr - (1 << fitting) <= memory.low_watermark or _short(file, (1 << fitting) + 1):
            read_pages(file, file.cache.missing(wait_for, wait_for + 1), wait_for)
            return
        file.add(at, fitting, READAHEAD if at <= mark < end else 0)
        for page in range(at, end):
            file.read_in(page)
        at = end


assert PTRS_PER_TABLE % FAULT_AROUND_PAGES == 0
