"""Writing dirty pages back: fsync and msync.

A page is written only after everyone who can write to it has been made to ask again (page_mkclean): devices lose the
right to write and hand over what they know, CPU mappings become read-only and clean. Only then does it count as clean.
Memory that has no disk behind it is never written back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import shmem_huge, xip
from mmubusd.mm.addr import MAX_LFS_FILESIZE, PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, PTRS_PER_TABLE, page_align
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import File
from mmubusd.mm.frame import DIRTY, HWPOISON
from mmubusd.mm.notification import LockWait, Operation, Reason
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.pgtable import WRITE
from mmubusd.mm.rmap_walk import Place, tell
from mmubusd.mm.vma import VM_LOCKED, VM_SHARED
from mmubusd.mm.vmscan import make_room
from mmubusd.mm.zap import evict_exports

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4

Folio = tuple[int, int]


def write_range(file: File, first: int, last: int) -> Operation[None]:
    """Write back the dirty folios that overlap [first, last), in order. Kernel: filemap_write_and_wait_range()."""
    if file.kind != "disk":
        return
    folios = _dirty_folios(file, first, last)
    if not folios:
        return
    places = shared_places(file, folios)
    for mm, start, end in places:
        for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            ptes &= ~np.uint64(WRITE | PTE_DIRTY)
    yield from tell(places, Reason.PROTECTION_PAGE)
    if file.memory.frames.exports:
        yield from evict_exports(file.memory, [file.cache.get(index) for folio in folios for index in range(*folio)])
    for folio in folios:
        if file.cache.get(folio[0]) and file.folio(folio[0]) == folio and not _written_again(file, folio):
            file.clean(*folio)


def _dirty_folios(file: File, first: int, last: int) -> list[Folio]:
    folios = []
    at = file.folio(first)[0] if file.cache.get(first) else first
    for index, pfn in file.cache.items(at, last):
        if file.memory.frames.flags_at[pfn] & DIRTY:
            folio = file.folio(index)
            if folio[0] == index:
                folios.append(folio)
    return folios


def shared_places(file: File, folios: list[Folio]) -> list[Place]:
    """Where each folio that anyone maps may be written through. Kernel: folio_mkclean()."""
    places: list[Place] = []
    for first, end in folios:
        if file.folio_mapcount(first, end):
            for vma in file.rmap.overlapping(first, end):
                if vma.flags & VM_SHARED:
                    places.append((vma.mm, *vma.overlap(first, end)))
    return places


def _written_again(file: File, folio: Folio) -> bool:
    """Whether someone has got the right to write to it while others were told: then it stays dirty."""
    return any(
        (ptes & np.uint64(WRITE | PTE_DIRTY)).any()
        for mm, start, end in shared_places(file, [folio])
        for _, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
    )


def write(file: File, offset: int, data: bytes) -> Operation[int]:
    """pwrite(2), page by page through the cache. Returns: the number of bytes. Kernel: generic_perform_write()."""
    if file.kind == "hugetlb":
        raise MmError("EINVAL", f"file {file.id} is of hugetlbfs: it is written to by mapping it")
    if offset + len(data) > file.size_max:
        raise MmError("EFBIG", f"offset {offset} + {len(data)} bytes is above {file.size_max}")
    ticket = file.lock.acquire((0, MAX_LFS_FILESIZE + 1))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
        view, at = memoryview(data), 0
        while at < len(data):
            index, start = offset + at >> PAGE_SHIFT, offset + at & (PAGE_SIZE - 1)
            part = view[at : at + PAGE_SIZE - start]
            if file.kind == "xip":
                while not file.cache.get(index):
                    yield from make_room(file.memory, 1, file.memcg)
                    yield from xip.fill_hole(file, index, grow=True)
            elif not file.cache.get(index):
                yield from make_room(file.memory, 1, file.memcg)
                if not file.cache.get(index) and not _begin_large(file, index, offset + len(data)):
                    file.add(index)
                    file.read_in(index)
            if file.memory.frames.flags_at[file.cache.get(index)] & HWPOISON:
                yield from wait_for_failed(file, index)
                continue
            file.memory.frames.write(file.cache.get(index), start, part)
            at += len(part)
            file.size = max(file.size, offset + at)
            if file.kind != "xip":
                file.set_dirty(index)
    finally:
        file.lock.release(ticket)
    return len(data)


def _begin_large(file: File, index: int, end: int) -> bool:
    """Whether shared memory gets a large folio for a write up to the byte end. Kernel: shmem_write_begin()."""
    if file.kind != "shm" or index in file.swapped:
        return False
    return shmem_huge.add_folio(file, index, None, min(end, (index // PTRS_PER_TABLE + 1) * PMD_SIZE))


def wait_for_failed(file: File, index: int) -> Operation[None]:
    """A cached page's frame has failed: wait until it has been dropped. Raises: MmError EIO: shared memory keeps it."""
    pfn, migrations = file.cache.get(index), file.memory.migrations
    if not migrations.contended(pfn, pfn + 1):
        raise MmError("EIO", f"page {index} of file {file.id} is lost: its frame {pfn} has failed")
    ticket = migrations.acquire((pfn, pfn + 1))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
    finally:
        migrations.release(ticket)


def fsync(file: File) -> Operation[int]:
    """fsync(2)."""
    yield from write_range(file, 0, max(file.pages, 1))
    _check_lost(file)
    return 0


def _check_lost(file: File) -> None:
    """Say once that a page that was written to has been lost. Kernel: file_check_and_advance_wb_err()."""
    failed, file.failed = file.failed, False
    if failed:
        raise MmError("EIO", f"file {file.id} has lost a page that had not been written back: its frame has failed")


def msync(mm: Mm, start: int, length: int, flags: int) -> Operation[int]:
    """msync(2). Kernel: mm/msync.c."""
    if flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC):
        raise MmError("EINVAL", f"flags {flags:#x}")
    if start % PAGE_SIZE:
        raise MmError("EINVAL", f"address {start:#x} is not page-aligned")
    if flags & MS_ASYNC and flags & MS_SYNC:
        raise MmError("EINVAL", "MS_ASYNC and MS_SYNC exclude each other")
    end = start + page_align(length) % (1 << 64)
    if end >= 1 << 64:
        raise MmError("ENOMEM", f"length {length:#x} wraps around")
    if end == start:
        return 0
    yield from mm.locked(_sync_pieces(mm, start, end, flags), (start, end))
    return 0


def _sync_pieces(mm: Mm, start: int, end: int, flags: int) -> Operation[None]:
    hole = False
    while True:
        vma = mm.vmas.find_from(start)
        if vma is None:
            raise MmError("ENOMEM", f"nothing is mapped from {start:#x} on")
        if start < vma.start:
            if flags == MS_ASYNC:
                raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
            hole, start = True, vma.start
            if start >= end:
                raise MmError("ENOMEM", "part of the range is not mapped")
        if flags & MS_INVALIDATE and vma.flags & VM_LOCKED:
            raise MmError("EBUSY", f"the mapping at {vma.start:#x} is locked in memory")
        stop = min(end, vma.end)
        first, last = vma.linear_index(start), vma.linear_index(stop)
        if flags & MS_SYNC and vma.flags & VM_SHARED and vma.file is not None:
            yield from write_range(vma.file, first, last)
            _check_lost(vma.file)
        start = stop
        if start >= end:
            if hole:
                raise MmError("ENOMEM", "part of the range is not mapped")
            return
