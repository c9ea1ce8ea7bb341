"""A frame goes bad: its page is taken away from everybody, and the frame is never used again.

    hard    the bytes are lost. Each mapping becomes a HWPOISON entry, and who comes to one gets SIGBUS (ENXIO here, a
            device EFAULT). What has another copy is only dropped and read in again: clean pages of files and of swap.
            A dirty page of a file is lost, and whoever syncs the file next is told so, once (EIO).
    soft    the frame is still good, but not trusted: the page moves to another one first, and nobody loses anything.

The mark HWPOISON holds a reference of its own, so that no path that frees pages can give the frame out again. Whoever
holds the page otherwise, by a pin, keeps what he holds; the caller is told by EBUSY, and the frame stays marked.

While a disk file's page is on its way out, who faults it waits for that on the frame, as for a page that is moved.
Kernel: mm/memory-failure.c, v6.12.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.aging import folio_places
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import HOLE, RESERVED_BLOCK, File
from mmubusd.mm.folio_split import split
from mmubusd.mm.frame import ANON, CACHE, DEVICE, DIRTY, HUGETLB, HWPOISON, KSM, ORDER_MASK, SWAPCACHE
from mmubusd.mm.frame_bytes import RESERVED
from mmubusd.mm.free_frames import BLOCK_FRAMES
from mmubusd.mm.hugetlb_failure import fail_hugetlb
from mmubusd.mm.migrate import alloc_target, migrate, tell_clear
from mmubusd.mm.notification import LockWait, Operation, Reason
from mmubusd.mm.pgtable import DIRTY as PTE_DIRTY
from mmubusd.mm.pgtable import LEAF_SHIFT, WRITE
from mmubusd.mm.reclaim import unmap_to_swap, walk_places
from mmubusd.mm.rmap_walk import Place, tell
from mmubusd.mm.swapops import HWPOISON_ENTRY, make, mapped_frames, maps
from mmubusd.mm.truncate import split_folio
from mmubusd.mm.vmscan import make_room
from mmubusd.mm.writeback import shared_places
from mmubusd.mm.zap import Gather, evict_exports, zap_range
from mmubusd.mm.zonelist import nearest

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory


def memory_failure(memory: Memory, pfn: int) -> Operation[int]:
    """The frame's bytes are lost. Returns: 0: nobody has the frame any more.

    Kernel: memory_failure(), /sys/devices/system/memory/hard_offline_page.
    Raises: MmError ENXIO (no such frame, or a device's), EHWPOISON (it has failed before, or its large folio cannot be
        split), EBUSY (somebody keeps it: a pin, or it is the zero page); after EBUSY and EHWPOISON for a
        pin or a folio the frame is marked all the same.
    """
    _check(memory, pfn, "ENXIO")
    if memory.frames.flags_at[pfn] & HUGETLB or memory.frames.hugetlb.has_free(pfn):
        yield from _alone(memory, pfn & -BLOCK_FRAMES, _fail_huge(memory, pfn))
    else:
        yield from _alone(memory, pfn, _fail(memory, pfn))
    return 0


def soft_offline(memory: Memory, pfn: int) -> Operation[int]:
    """The page moves to another frame, and this one is taken out of use. Returns: 0, also if it is out already.

    Kernel: soft_offline_page(). Raises: MmError EIO (no such frame, or a device's), EBUSY (it cannot be moved), ENOMEM.
    """
    _check(memory, pfn, "EIO")
    frames = memory.frames
    if frames.flags_at[pfn] & HWPOISON:
        return 0
    if frames.hugetlb.has_free(pfn):
        _take_out_of_pool(memory, pfn)
        return 0
    if frames.flags_at[pfn] & HUGETLB:
        yield from _soft_offline_hugetlb(memory, pfn)
        return 0
    if frames.refcount_at[pfn]:
        memory.lru.drain()
        if not (yield from _made_small(memory, pfn)):
            raise MmError("EBUSY", f"frame {pfn} is part of a large folio that somebody holds")
        if frames.refcount_at[pfn] and not _evicted(memory, pfn):
            yield from make_room(memory)
            near = nearest(frames.node_of(pfn), (1 << frames.nodes_nr) - 1)
            moved = yield from migrate(memory, [pfn], lambda old: alloc_target(memory, old, near), tell_clear)
            if pfn not in moved:
                raise MmError("EBUSY", f"frame {pfn} cannot be moved: somebody holds its page")
    if frames.flags_at[pfn] & HWPOISON:
        return 0
    _take_out(memory, pfn)
    return 0


def _soft_offline_hugetlb(memory: Memory, pfn: int) -> Operation[None]:
    """The huge page moves; what is left of it is no huge page any more, and the other frames are free for anybody.

    Kernel: soft_offline_in_use_page(), page_handle_poison().
    """
    frames, first = memory.frames, pfn & -BLOCK_FRAMES
    near = nearest(frames.node_of(pfn), (1 << frames.nodes_nr) - 1)
    moved = yield from migrate(memory, [first], lambda old: alloc_target(memory, old, near), tell_clear)
    if first not in moved:
        raise MmError(
            "EBUSY", f"the huge page at frame {first} cannot be moved: somebody holds it, or there is no other"
        )
    if frames.hugetlb.has_free(pfn):
        _take_out_of_pool(memory, pfn)
    else:
        _take_out(memory, pfn)


def _take_out_of_pool(memory: Memory, pfn: int) -> None:
    """Mark a frame of a free huge page, which leaves the pool. Raises: MmError EBUSY: it is needed."""
    first = pfn & -BLOCK_FRAMES
    if not memory.frames.hugetlb.dissolve(first):
        raise MmError("EBUSY", f"the huge page at frame {first} is reserved, and there is no other")
    _take_out(memory, pfn)


def _check(memory: Memory, pfn: int, errno: str) -> None:
    if not 0 <= pfn < memory.frames.frames_nr or memory.frames.flags_at[pfn] & DEVICE:
        raise MmError(errno, f"frame {pfn} is not of the machine's own {memory.frames.frames_nr}")
    if memory.frames.flags_at[pfn] & RESERVED:
        raise MmError("EBUSY", f"frame {pfn} is the zero page: it stays in use")


def _alone(memory: Memory, pfn: int, operation: Operation[None]) -> Operation[None]:
    """Nobody moves the page meanwhile, and who faults it waits."""
    ticket = memory.migrations.acquire((pfn, pfn + 1))
    try:
        if not ticket.granted:
            yield LockWait(ticket)
        yield from operation
    finally:
        operation.close()
        memory.migrations.release(ticket)


def _take_out(memory: Memory, pfn: int) -> None:
    """Mark the frame; a free one leaves the free list."""
    frames = memory.frames
    if not frames.refcount_at[pfn] and not frames.free.remove(pfn):
        raise MmError("EBUSY", f"frame {pfn} is of hugetlb's pool")
    frames.hwpoison(pfn)


def _made_small(memory: Memory, pfn: int) -> Operation[bool]:
    """Split the folio that the frame is part of. Kernel: try_to_split_thp_page(). Returns: whether it is small now."""
    if not _is_small(memory, pfn):
        file = _file_of(memory, pfn)
        if file is None:
            yield from split(memory, pfn)
        else:
            yield from split_folio(file, file.folio(memory.frames.index_at[pfn])[0], None)
    return _is_small(memory, pfn)


def _is_small(memory: Memory, pfn: int) -> bool:
    return memory.frames.flags_at[pfn] & (ANON | CACHE) == 0 or not memory.frames.flags_at[pfn] & ORDER_MASK


def _file_of(memory: Memory, pfn: int) -> File | None:
    """The file that caches the frame."""
    frames = memory.frames
    return memory.files_by_mapping.get(frames.mapping_at[pfn]) if frames.flags_at[pfn] & CACHE else None


def _evicted(memory: Memory, pfn: int) -> bool:
    """A clean page of a disk that nobody maps or holds is only forgotten. Kernel: mapping_evict_folio()."""
    frames, file = memory.frames, _file_of(memory, pfn)
    if file is None or file.kind != "disk" or frames.refcount_at[pfn] != 1 or frames.flags_at[pfn] & DIRTY:
        return False
    file.delete(frames.index_at[pfn], keep_bytes=True)
    return True


def _fail_huge(memory: Memory, pfn: int) -> Operation[None]:
    """A frame of hugetlb's pool has failed; its page may have moved while others had it."""
    if memory.frames.hugetlb.has_free(pfn):
        _take_out_of_pool(memory, pfn)
    elif memory.frames.flags_at[pfn] & HUGETLB:
        yield from fail_hugetlb(memory, pfn & -BLOCK_FRAMES)
    else:
        yield from _fail(memory, pfn)


def _fail(memory: Memory, pfn: int) -> Operation[None]:
    frames = memory.frames
    if frames.flags_at[pfn] & HWPOISON:
        raise MmError("EHWPOISON", f"frame {pfn} has failed before")
    memory.lru.drain()
    if frames.refcount_at[pfn]:
        yield from _made_small(memory, pfn)
    small = not frames.refcount_at[pfn] or _is_small(memory, pfn)
    _take_out(memory, pfn)
    if not small:
        raise MmError("EHWPOISON", f"frame {pfn} is part of a large folio that cannot be split")
    file = _file_of(memory, pfn)
    if file is not None and file.kind == "xip":
        raise MmError("EBUSY", f"frame {pfn} is the medium of file {file.id}: the file has no other")
    yield from _hwpoison_user_mappings(memory, pfn, file)
    if frames.flags_at[pfn] & SWAPCACHE and not frames.flags_at[pfn] & DIRTY and not frames.mapcount_at[pfn]:
        memory.swap.drop(pfn)  # what is in the slot is good
    elif file is not None and file.cache.get(frames.index_at[pfn]) == pfn:
        _drop_from_cache(file, frames.index_at[pfn])
    frames.forget_page(pfn)
    cached = (frames.flags_at[pfn] & (CACHE | SWAPCACHE)).bit_count()
    if frames.refcount_at[pfn] > 1 + cached + frames.withheld.get(pfn, 0):
        raise MmError("EBUSY", f"frame {pfn} is taken from its mappings, but somebody holds it")


def _drop_from_cache(file: File, index: int) -> None:
    """Shared memory keeps the bad page, so that nobody takes it for a hole. Kernel: truncate_error_folio()."""
    if file.kind != "disk":
        return
    dirty = file.folio_flags(index) & DIRTY
    if dirty:
        file.failed = True
        if file.block(index) == RESERVED_BLOCK:
            file.set_block(index, HOLE)
    file.delete(index, keep_bytes=not dirty)


def _hwpoison_user_mappings(memory: Memory, pfn: int, file: File | None) -> Operation[None]:
    """Take the page from everybody who maps it, and have exporters let go. Kernel: hwpoison_user_mappings()."""
    frames = memory.frames
    lost = True
    if frames.mapcount_at[pfn] and file is not None and file.kind == "disk":
        lost = yield from _is_dirty(file, pfn)
    if frames.mapcount_at[pfn]:
        gather = Gather(memory)
        places = _places(memory, pfn)
        if not lost and file is not None:
            index = frames.index_at[pfn]
            for vma in file.rmap.overlapping(index, index + 1):
                zap_range(vma.mm, vma, *vma.overlap(index, index + 1), gather, file_only=True)
        elif frames.flags_at[pfn] & SWAPCACHE:
            index = frames.index_at[pfn]
            for vma, _ in folio_places(memory, pfn):
                unmap_to_swap(vma, index, pfn)
        else:
            _unmap_for_good(memory, pfn, places, gather)
        gather.quarantine()
        yield from tell(places, Reason.CLEAR)
        yield from gather.finish()
        if pfn in frames.unknown_sharers:
            frames.forget_sharer(pfn)
    yield from evict_exports(memory, [pfn])


def _is_dirty(file: File, pfn: int) -> Operation[bool]:
    """Whether a disk file's page has been written to; who can write to it through a shared mapping is stopped first."""
    index = file.memory.frames.index_at[pfn]
    if file.folio_flags(index) & DIRTY:
        return True
    places = shared_places(file, [(index, index + 1)])
    for mm, start, _ in places:
        pte = mm.pgtable.get(start >> PAGE_SHIFT)
        if pte & PTE_DIRTY:
            file.set_dirty(index)
        if pte & (WRITE | PTE_DIRTY):
            mm.pgtable.set(start >> PAGE_SHIFT, pte & ~(WRITE | PTE_DIRTY))
    yield from tell(places, Reason.PROTECTION_PAGE)
    return file.cache.get(index) == pfn and file.folio_flags(index) & DIRTY != 0


def _places(memory: Memory, pfn: int) -> list[Place]:
    """Where the reverse map looks for the page. A merged one has no single place: every table is looked through."""
    if not memory.frames.flags_at[pfn] & KSM:
        return walk_places(memory, pfn)
    return [
        (mm, vpn << PAGE_SHIFT, (vpn << PAGE_SHIFT) + PAGE_SIZE)
        for mm in memory.mms.values()
        for number, leaf in sorted(mm.pgtable.leaves.items())
        for vpn in (np.flatnonzero(mapped_frames(leaf.ptes) == pfn) + (number << LEAF_SHIFT)).tolist()
    ]


def _unmap_for_good(memory: Memory, pfn: int, places: list[Place], gather: Gather) -> None:
    """A HWPOISON entry takes the place of each mapping. Kernel: try_to_unmap_one(), TTU_HWPOISON."""
    frames = memory.frames
    for mm, start, end in places:
        for vpn in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
            if maps(mm.pgtable.get(vpn), pfn):
                mm.pgtable.set_entry(vpn, make(HWPOISON_ENTRY, pfn))
                frames.mapcount_at[pfn] -= 1
                gather.add_one(pfn)
