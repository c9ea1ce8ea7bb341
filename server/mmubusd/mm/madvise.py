"""madvise: every advice. Kernel: mm/madvise.c, v6.18."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmubusd.mm import filemap
from mmubusd.mm.access import faulted_in
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TASK_SIZE, page_align
from mmubusd.mm.collapse import collapse
from mmubusd.mm.errno import MmError
from mmubusd.mm.fault import copy_on_write
from mmubusd.mm.folio import is_large
from mmubusd.mm.frame import HUGETLB
from mmubusd.mm.huge_memory import announce_splits
from mmubusd.mm.ksm import merged_in
from mmubusd.mm.lazyfree import free
from mmubusd.mm.memory_failure import memory_failure, soft_offline
from mmubusd.mm.notification import Operation, Reason
from mmubusd.mm.pageout import age_range
from mmubusd.mm.populate import populate_vma
from mmubusd.mm.truncate import punch
from mmubusd.mm.vma import (
    VM_DONTCOPY,
    VM_DONTDUMP,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_RAND_READ,
    VM_READ,
    VM_SEALED,
    VM_SEQ_READ,
    VM_SHARED,
    VM_WIPEONFORK,
    VM_WRITE,
    Vma,
)
from mmubusd.mm.vma_merge import modify
from mmubusd.mm.vmscan import make_room
from mmubusd.mm.zap import Gather, announce, zap_range

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm

NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED = 0, 1, 2, 3, 4
FREE, REMOVE, DONTFORK, DOFORK = 8, 9, 10, 11
MERGEABLE, UNMERGEABLE, HUGEPAGE, NOHUGEPAGE, DONTDUMP, DODUMP = 12, 13, 14, 15, 16, 17
WIPEONFORK, KEEPONFORK, COLD, PAGEOUT = 18, 19, 20, 21
POPULATE_READ, POPULATE_WRITE, DONTNEED_LOCKED, COLLAPSE = 22, 23, 24, 25
HWPOISON, SOFT_OFFLINE = 100, 101
MAX_RW_COUNT = (1 << 31) - PAGE_SIZE
"""How many bytes all ranges of one process_madvise have at most."""
REMOTE_ADVICE = (WILLNEED, COLD, PAGEOUT, COLLAPSE)
"""Advice that process_madvise() takes for another process. Kernel: process_madvise_remote_valid()."""
ADMINISTRATORS = (HWPOISON, SOFT_OFFLINE)
"""Advice for administrators (CAP_SYS_ADMIN); the room above asks who calls."""

FLAG_ADVICE: dict[int, tuple[int, int]] = {
    NORMAL: (0, VM_RAND_READ | VM_SEQ_READ),
    SEQUENTIAL: (VM_SEQ_READ, VM_RAND_READ),
    RANDOM: (VM_RAND_READ, VM_SEQ_READ),
    DONTFORK: (VM_DONTCOPY, 0),
    DOFORK: (0, VM_DONTCOPY),
    WIPEONFORK: (VM_WIPEONFORK, 0),
    KEEPONFORK: (0, VM_WIPEONFORK),
    DONTDUMP: (VM_DONTDUMP, 0),
    DODUMP: (0, VM_DONTDUMP),
    MERGEABLE: (VM_MERGEABLE, 0),
    UNMERGEABLE: (0, VM_MERGEABLE),
    HUGEPAGE: (VM_HUGEPAGE, VM_NOHUGEPAGE),
    NOHUGEPAGE: (VM_NOHUGEPAGE, VM_HUGEPAGE),
}
"""Advice that only changes the VMA's flags: (flags set, flags cleared)."""

DISCARDS = (FREE, DONTNEED, DONTNEED_LOCKED, REMOVE, DONTFORK, WIPEONFORK)
"""Advice that throws something away. Kernel: is_discard()."""
Piece = Callable[["Mm", Vma, int, int], Operation[None]]


def madvise(mm: Mm, start: int, length: int, advice: int) -> Operation[int]:
    """madvise(2)."""
    populates = advice in (POPULATE_READ, POPULATE_WRITE)
    if advice not in FLAG_ADVICE and advice not in PIECES and not populates and advice not in ADMINISTRATORS:
        raise MmError("EINVAL", f"advice {advice}")
    if start % PAGE_SIZE:
        raise MmError("EINVAL", f"address {start:#x} is not page-aligned")
    size = page_align(length)
    end = start + size
    if end >= 1 << 64 or (length and not size):
        raise MmError("EINVAL", f"length {length:#x} wraps around")
    if size == 0:
        return 0
    if advice in ADMINISTRATORS:
        yield from _inject_error(mm, start, end, advice)
    elif populates:
        yield from mm.locked(_populate(mm, start, end, advice == POPULATE_WRITE), (start, end))
    else:
        yield from mm.locked(_walk(mm, start, end, advice), (start, end))
    return 0


def process_madvise(mm: Mm, advice: int, flags: int, *ranges: int) -> Operation[int]:
    """process_madvise(2) of another process's address space. Args: ranges: address and length of each, in turn.

    Returns: how many bytes the advice was taken for, perhaps fewer than asked. Raises: MmError EINVAL (flags, a length,
    or advice that is not for others), EFAULT (a range outside the address space), and as madvise for the first range.
    """
    if flags:
        raise MmError("EINVAL", f"flags {flags:#x}")
    spans = _import_ranges(ranges)
    if advice not in REMOTE_ADVICE:
        raise MmError("EINVAL", f"advice {advice} is not for another process")
    done = 0
    for start, length in spans:
        try:
            yield from madvise(mm, start, length, advice)
        except MmError:
            if not done:
                raise
            break
        done += length
    return done


def _import_ranges(ranges: tuple[int, ...]) -> list[tuple[int, int]]:
    """The ranges, as many bytes of them as one call takes. Kernel: import_iovec()."""
    spans, room = [], MAX_RW_COUNT
    for start, length in zip(ranges[::2], ranges[1::2], strict=True):
        if length >= 1 << 63:
            raise MmError("EINVAL", f"length {length:#x}")
        if len(ranges) == 2:
            length = min(length, room)
        if start + length > TASK_SIZE:
            raise MmError("EFAULT", f"[{start:#x}, +{length:#x}) is outside the address space")
        spans.append((start, min(length, room)))
        room -= spans[-1][1]
    return spans


def _walk(mm: Mm, start: int, end: int, advice: int) -> Operation[None]:
    """Every mapped piece in turn; holes are an error only at the end. Kernel: madvise_walk_vmas()."""
    hole = False
    while start < end:
        vma = mm.vmas.find_from(start)
        if vma is None:
            raise MmError("ENOMEM", f"nothing is mapped from {start:#x} on")
        if start < vma.start:
            hole, start = True, vma.start
            if start >= end:
                break
        stop = min(end, vma.end)
        if vma.flags & VM_SEALED and advice in DISCARDS and vma.file is None and not vma.flags & VM_WRITE:
            raise MmError("EPERM", f"the mapping at {vma.start:#x} is sealed, and cannot be written to")
        if advice in FLAG_ADVICE:
            yield from _change_flags(mm, vma, start, stop, advice)
        else:
            yield from PIECES[advice](mm, vma, start, stop)
        start = stop
    if hole:
        raise MmError("ENOMEM", "part of the range is not mapped")


def _change_flags(mm: Mm, vma: Vma, start: int, end: int, advice: int) -> Operation[None]:
    """Kernel: madvise_vma_behavior(), madvise_update_vma()."""
    if advice == WIPEONFORK and (vma.file is not None or vma.flags & VM_SHARED):
        raise MmError("EINVAL", "only private anonymous memory can be wiped on fork")
    if advice == UNMERGEABLE:
        for vpn in merged_in(mm, start, end):
            yield from make_room(mm.memory, 1, mm.memcg)
            yield from copy_on_write(mm, vpn)
        vma = mm.vmas.find(start) or vma
    on, off = FLAG_ADVICE[advice]
    flags = vma.flags & ~off | on
    if flags == vma.flags or (advice == MERGEABLE and vma.flags & (VM_SHARED | VM_HUGETLB)):
        return
    try:
        modify(vma, start, end, flags)
    except MmError as error:
        raise MmError("EAGAIN" if error.errno == "ENOMEM" else error.errno, error.message) from error
    finally:
        if mm.split_blocks:
            yield from announce_splits(mm)


def _dontneed(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    """Kernel: madvise_dontneed_single_vma()."""
    if vma.flags & VM_LOCKED:
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} is locked in memory")
    return _drop(mm, vma, start, end)


def _drop(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    if vma.flags & VM_HUGETLB:
        if start % PMD_SIZE:
            raise MmError("EINVAL", f"{start:#x} lies inside a huge page of hugetlb")
        end = end // PMD_SIZE * PMD_SIZE
        if start == end:
            return
    gather = Gather(mm.memory)
    zap_range(mm, vma, start, end, gather)
    for number in range(-(-start // PMD_SIZE), end // PMD_SIZE):
        mm.pgtable.drop_leaf(number)
    yield from announce(mm, start, end, Reason.CLEAR, gather)


def _remove(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    """Kernel: madvise_remove()."""
    if vma.flags & VM_LOCKED:
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} is locked in memory")
    if vma.file is None:
        raise MmError("EINVAL", "there is no file to make a hole in")
    if not vma.flags & VM_SHARED:
        raise MmError("EACCES", "the mapping is private")
    yield from punch(vma.file, vma.linear_index(start) << PAGE_SHIFT, end - start)


def _willneed(mm: Mm, vma: Vma, start: int, end: int) -> Operation[None]:
    """Kernel: madvise_willneed()."""
    file = vma.file
    if file is None or file.kind == "shm":
        mm.memory.lru.drain()
    elif file.kind == "disk":
        first, last = vma.linear_index(start), min(vma.linear_index(end), file.pages)
        if first < last:
            filemap.read_pages(file, file.cache.missing(first, last), wait_for=first)
            mm.memory.finish_reads()
    return
    yield


def _age(mm: Mm, vma: Vma, start: int, end: int, pageout: bool) -> Operation[None]:
    if vma.flags & (VM_LOCKED | VM_HUGETLB):
        raise MmError("EINVAL", f"the mapping at {vma.start:#x} is locked in memory, or of hugetlb")
    yield from age_range(mm, start, end, pageout)


def _inject_error(mm: Mm, start: int, end: int, advice: int) -> Operation[None]:
    """Take the frames of these pages out of use, of a huge page one. Kernel: madvise_inject_error()."""
    memory = mm.memory
    fail = soft_offline if advice == SOFT_OFFLINE else memory_failure
    while start < end:
        pfn = yield from mm.locked(faulted_in(mm, start), (start, start + PAGE_SIZE))
        huge = is_large(memory.frames, pfn) or memory.frames.flags_at[pfn] & HUGETLB
        step = PMD_SIZE if huge else PAGE_SIZE
        yield from fail(memory, pfn)
        start += step


def _populate(mm: Mm, start: int, end: int, write: bool) -> Operation[None]:
    """Kernel: madvise_populate(), faultin_page_range()."""
    mm.memory.finish_reads()
    try:
        while start < end:
            vma = mm.vmas.find(start)
            if vma is None:
                raise MmError("ENOMEM", f"nothing is mapped at {start:#x}")
            if not vma.flags & (VM_WRITE if write else VM_READ):
                raise MmError("EINVAL", f"the mapping at {vma.start:#x} is {vma.prot_string()}")
            stop = min(end, vma.end)
            try:
                yield from populate_vma(mm, vma, start, stop, write)
            except MmError as error:
                raise MmError("EFAULT" if error.errno == "ENXIO" else error.errno, error.message) from error
            start = stop
    finally:
        mm.memory.lru.drain()


PIECES: dict[int, Piece] = {
    DONTNEED: _dontneed,
    DONTNEED_LOCKED: _drop,
    FREE: free,
    REMOVE: _remove,
    WILLNEED: _willneed,
    COLLAPSE: collapse,
    COLD: lambda mm, vma, start, end: _age(mm, vma, start, end, False),
    PAGEOUT: lambda mm, vma, start, end: _age(mm, vma, start, end, True),
}
"""Advice that acts on the pages of each piece."""
