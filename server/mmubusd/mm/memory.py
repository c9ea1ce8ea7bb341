"""The machine: page frames, files and the address spaces that share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

from mmubusd.mm import (
    hugetlb,
    khugepaged,
    ksm,
    mapping_dirty_helpers,
    memory_failure,
    truncate,
    uprobe,
    vmscan,
    writeback,
)
from mmubusd.mm.addr import FILE_SIZE_MAX, PAGE_SHIFT, PAGE_SIZE, PTRS_PER_TABLE, FileId, MmId, Pfn
from mmubusd.mm.device_memory import DeviceMemory
from mmubusd.mm.errno import MmError
from mmubusd.mm.file import ALLOCATED, KINDS, File
from mmubusd.mm.frame import ANON, CACHE, HWPOISON, READING, FrameTable
from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.lru import Lru
from mmubusd.mm.memcontrol import MemCgroup
from mmubusd.mm.mm import Mm
from mmubusd.mm.notification import Operation
from mmubusd.mm.pgtable import Tables
from mmubusd.mm.range_lock import Grants, RangeLock
from mmubusd.mm.rmap import AnonVma
from mmubusd.mm.shmem_huge import ShmemHuge
from mmubusd.mm.swap import SwapArea

TABLES_MIN = 1024
MAX_MAP_COUNT = 65530
"""vm.max_map_count."""


MAINLINE, V3 = "mainline", "v3"
KSWAPD_FAILURES_MAX = 16
"""MAX_RECLAIM_RETRIES: after so many attempts in vain kswapd gives up until someone else has freed something."""


class Memory:
    """One simulated machine.

    Attributes:
        frames: the frame table (`frames.generation[pfn]`, `frames.free_nr`, `frames.quarantine_nr`,
        `frames.page(pfn)`). mms, files: everything that exists and has an id to call it by.
        granted: range-lock tickets that became granted; the driver of operations drains it after every step.
        tables: how many leaf page tables there are and may be: a sixteenth of the frames' memory, and 1,024 at least.
        swap: the swap file. low_watermark, high_watermark: with fewer free frames than the first kswapd is wanted, and
        it reclaims up to the second. killed: address spaces that ran out of memory and must end.
        max_map_count, commit_limit: limits of the machine; commit_limit in pages, None: overcommit at will.
        memcgs: groups whose memory is limited, by name; see memcontrol.
    """

    def __init__(
        self,
        *,
        frames_nr: int = 1 << 20,
        store: memoryview | None = None,
        swap_slots_nr: int = 0,
        nodes_nr: int = 1,
        profile: str = MAINLINE,
        oom_kill: bool = False,
        thp: Thp = Thp.NEVER,
        shmem_enabled: ShmemHuge = ShmemHuge.NEVER,
        tmpfs_huge: ShmemHuge = ShmemHuge.NEVER,
        khugepaged_limits: khugepaged.Limits = khugepaged.DEFAULTS,
        hugetlb_nr: int = 0,
        max_map_count: int = MAX_MAP_COUNT,
        frame_table: type[FrameTable] = FrameTable,
    ) -> None:
        """
        Args: frames_nr: the number of page frames; store: a writable buffer of frames_nr pages, zero-filled, which
            holds the real bytes (frame n at n * PAGE_SIZE); None: anonymous memory of our own, taken as it is touched;
            swap_slots_nr: how many pages the swap file holds, 0: there is none; nodes_nr: NUMA nodes; profile: whose
            call sites it has, the kernel's of today ("mainline") or the seed's ("v3").
        oom_kill: when memory runs out the largest address space is killed; without it who asked gets ENOMEM.
        thp: which private memory gets huge pages, in address spaces that say nothing of it themselves.
        shmem_enabled: which shared anonymous memory gets huge pages; tmpfs_huge: which files of tmpfs do.
        khugepaged_limits: what a block may lack of which khugepaged makes a huge page.
        hugetlb_nr: huge pages in hugetlb's pool (vm.nr_hugepages); they are taken out of the frames.
        max_map_count: mappings of one address space (vm.max_map_count).
        frame_table: the kind of its frame table, for a room that wants to see what happens to frames.
        Raises: ValueError: there is no such profile, or no room for hugetlb's pool.
        """
        if profile not in (MAINLINE, V3):
            raise ValueError(f"profile {profile!r} is neither {MAINLINE!r} nor {V3!r}")
        self.profile = profile
        self.frames = frame_table(frames_nr, store, nodes_nr, hugetlb_nr)
        self.swap = SwapArea(self.frames, swap_slots_nr)
        self.lru = Lru(self.frames)
        reclaimable_nr = frames_nr - hugetlb_nr * PTRS_PER_TABLE
        self.low_watermark, self.high_watermark = reclaimable_nr // 64, reclaimable_nr // 32
        self.kswapd_running = False
        self.kswapd_failures = 0
        self.oom_kill = oom_kill
        self.killed: list[Mm] = []
        self.thp = thp
        self.shmem_enabled, self.tmpfs_huge = shmem_enabled, tmpfs_huge
        self.khugepaged = khugepaged.Khugepaged(khugepaged_limits)
        self.mms: dict[MmId, Mm] = {}
        self.files: dict[FileId, File] = {}
        self.granted = Grants()
        self.max_map_count = max_map_count
        self.tables = Tables(max(TABLES_MIN, frames_nr // 16))
        self.commit_limit: int | None = None
        self.files_by_mapping: dict[int, File] = {}  # a frame's `mapping`, where it is a file
        self.anon_vmas: dict[int, AnonVma] = {}  # and where it is an anon_vma
        self.orphans: list[File] = []  # files that have lost their last mapping, and have no name
        self.reading: list[tuple[int, int]] = []  # frames whose reads have not ended, with their generations
        self.migrations = RangeLock(self.granted)  # by frame: pages that are being moved
        self.exclusive_owner: dict[int, tuple[int, int]] = {}  # who has a frame for itself, and its generation
        self.device_memory = DeviceMemory(self.frames)
        self.reclaimers = RangeLock(self.granted)  # who reclaims just now, each in a place of its own
        self.uprobes: dict[int, dict[int, bytes]] = {}  # breakpoints: file, offset, the byte that was there
        self.memcgs: dict[str, MemCgroup] = {}
        self._memcg_ids = count(1)
        self._reclaimer_ids = count(1)
        self._mm_ids = count(1)
        self._mapping_ids = count(1)

    # Pressure

    def next_reclaimer(self) -> int:
        return next(self._reclaimer_ids)

    def next_memcg(self) -> int:
        return next(self._memcg_ids)

    def memcg(self, name: str) -> MemCgroup | None:
        """The group of this name; "": none. Raises: MmError ESRCH."""
        if not name:
            return None
        try:
            return self.memcgs[name]
        except KeyError:
            raise MmError("ESRCH", f"there is no group {name!r}") from None

    def room(self, memcg: MemCgroup | None, nodes: Nodes | None = None) -> int:
        """How many frames may be taken without reclaim, for this group. Args: nodes: from these; None: from any."""
        free_nr = self.frames.free.nr_on(nodes)
        return free_nr if memcg is None else min(free_nr, memcg.room)

    def wanted(self) -> list[tuple[str, Operation[int]]]:
        """Operations that the machine itself wants to run now, each with its name: the caller must drive them.

        kswapd when little is free, and the end of what was killed because memory had run out.
        """
        wanted = [(f"exit of {mm.name or mm.id}, killed", mm.exit()) for mm in self.killed if mm.alive]
        self.killed.clear()
        if (
            self.frames.free_nr < self.low_watermark
            and not self.kswapd_running
            and self.kswapd_failures < KSWAPD_FAILURES_MAX
        ):
            self.kswapd_running = True
            wanted.append(("kswapd", vmscan.kswapd(self)))
        return wanted

    def ksm_scan(self) -> Operation[int]:
        """Merge equal pages of memory that is MADV_MERGEABLE. Returns: how many frames that has saved."""
        return ksm.scan(self)

    def khugepaged_scan(self, pages: int = 0) -> Operation[int]:
        """A pass of khugepaged over so many pages, 0: over everything. Returns: how many huge pages it has made."""
        return khugepaged.scan(self, pages)

    def offline_page(self, pfn: int, soft: int) -> Operation[int]:
        """Take a frame out of use for good: soft 0: its bytes are lost, 1: its page moves away first. Returns: 0."""
        return (memory_failure.soft_offline if soft else memory_failure.memory_failure)(self, pfn)

    # Address spaces

    def create_mm(self, name: str = "") -> Mm:
        """Make an empty address space."""
        mm = Mm(self, MmId(next(self._mm_ids)), name)
        self.mms[mm.id] = mm
        return mm

    def mm(self, mm_id: MmId) -> Mm:
        """Raises: MmError ESRCH."""
        try:
            return self.mms[mm_id]
        except KeyError:
            raise MmError("ESRCH", f"there is no address space {mm_id}") from None

    # Files

    def create_file(
        self, name: str, kind: str, pages: int, *, cached: bool = False, memcg: MemCgroup | None = None
    ) -> FileId:
        """Make a zero-filled file of so many pages; kind is "disk", "shm" or "xip".

        cached: every page is in the page cache and in single pages, as if the file had just been written page by page,
        each followed by fsync: on disk clean and with its blocks, in shm dirty. Otherwise the whole file is a hole.
        memcg: who pays for its pages. Raises: MmError EINVAL, ENOMEM.
        """
        if kind not in KINDS or pages < 0 or pages > FILE_SIZE_MAX >> PAGE_SHIFT:
            raise MmError("EINVAL", f"a file of kind {kind!r} with {pages} pages")
        if kind == "hugetlb" and (pages % PTRS_PER_TABLE or cached):
            raise MmError("EINVAL", f"{pages} pages: a file of hugetlbfs has huge ones of {PTRS_PER_TABLE}, not cached")
        file = self._new_file(name, kind, pages << PAGE_SHIFT, linked=True, memcg=memcg)
        self.files[file.id] = file
        if cached:
            for index in range(pages):
                if kind == "xip":
                    file.cache.set(index, self.frames.alloc(CACHE, file.id, index, memcg=memcg))
                    continue
                file.add(index)
                if kind == "disk":
                    file.set_block(index, ALLOCATED)
                else:
                    file.set_dirty(index)
            self.lru.drain()
        return file.id

    def new_shared_memory(self, length: int, kind: str = "shm", memcg: MemCgroup | None = None) -> File:
        """The file behind an anonymous mapping that is shared or of hugetlb: without a name, it goes with the last."""
        return self._new_file("", kind, length, linked=False, memcg=memcg)

    def _new_file(self, name: str, kind: str, size: int, linked: bool, memcg: MemCgroup | None) -> File:
        file = File(self, FileId(next(self._mapping_ids)), name, kind, size, linked, memcg)
        self.files_by_mapping[file.id] = file
        return file

    def file(self, file_id: FileId) -> File:
        """Raises: MmError EBADF."""
        try:
            return self.files[file_id]
        except KeyError:
            raise MmError("EBADF", f"there is no file {file_id}") from None

    def unlink(self, file_id: FileId) -> None:
        """Take the file's name away: no more calls by its id; its contents go with the last mapping."""
        file = self.file(file_id)
        del self.files[file_id]
        file.linked = False
        if file.users_nr:
            return
        if any(pfn in self.frames.exports for _, pfn in file.cache.items()):
            self.orphans.append(file)  # the next operation that frees frames has the exporters let go
        else:
            self.destroy_file(file)

    def destroy_file(self, file: File) -> None:
        """Let go of a file that nobody maps or names. Kernel: iput_final()."""
        if file.kind == "shm" and file.cache.nr:
            self.lru.drain()
        if file.kind == "hugetlb":
            hugetlb.unreserve(file, 0, file.cache.nr // PTRS_PER_TABLE)
        for index, _ in list(file.cache.items()):
            file.delete(index)
        file.drop_swapped(0, file.pages)
        del self.files_by_mapping[file.id]

    def read_file(self, file_id: FileId, offset: int, length: int) -> bytes:
        """pread(2); shorter at the end of the file."""
        file = self.file(file_id)
        if offset < 0 or length < 0:
            raise MmError("EINVAL", f"offset {offset}, length {length}")
        end = min(offset + length, file.size)
        parts = []
        while offset < end:
            index, at = offset >> PAGE_SHIFT, offset & (PAGE_SIZE - 1)
            size = min(PAGE_SIZE - at, end - offset)
            parts.append(self._page_bytes(file, index, at, size))
            offset += size
        return b"".join(parts)

    def _page_bytes(self, file: File, index: int, at: int, size: int) -> bytes:
        pfn = file.cache.get(index)
        if self.frames.flags_at[pfn] & HWPOISON:
            raise MmError("EIO", f"page {index} of file {file.id} is lost: its frame has failed")
        if pfn:
            return self.frames.read(pfn, at, size)
        if index in file.swapped:
            return self.swap.peek(file.swapped[index], at, size)
        return file.medium.get(index, bytes(PAGE_SIZE))[at : at + size]

    def write_file(self, file_id: FileId, offset: int, data: bytes) -> Operation[int]:
        """pwrite(2); grows the file as needed. Returns: the number of bytes."""
        file = self.file(file_id)
        if offset < 0:
            raise MmError("EINVAL", f"offset {offset}")
        return (yield from writeback.write(file, offset, data))

    def fsync(self, file_id: FileId) -> Operation[int]:
        """fsync(2)."""
        return (yield from writeback.fsync(self.file(file_id)))

    def ftruncate(self, file_id: FileId, size: int) -> Operation[int]:
        """ftruncate(2); size in bytes."""
        return (yield from truncate.ftruncate(self.file(file_id), size))

    def punch(self, file_id: FileId, offset: int, length: int) -> Operation[int]:
        """fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
        return (yield from truncate.punch(self.file(file_id), offset, length))

    def wp_shared(self, file_id: FileId, offset: int, length: int) -> Operation[int]:
        """Protect a file's pages against writing through shared mappings. Returns: how many entries were writable."""
        return mapping_dirty_helpers.wp_shared(self.file(file_id), offset, length)

    def clean_record(self, file_id: FileId, offset: int, length: int) -> Operation[int]:
        """Collect what has been written to through shared mappings. Returns: how many entries were dirty."""
        return mapping_dirty_helpers.clean_record(self.file(file_id), offset, length)

    def uprobe_register(self, file_id: FileId, offset: int) -> Operation[int]:
        """A breakpoint at this byte of the file's code. Returns: how many mappings have it now."""
        return uprobe.register(self.file(file_id), offset)

    def uprobe_unregister(self, file_id: FileId, offset: int) -> Operation[int]:
        """Returns: how many mappings had it."""
        return uprobe.unregister(self.file(file_id), offset)

    # The reverse map's names

    def new_anon_vma(self, parent: AnonVma | None) -> AnonVma:
        anon_vma = AnonVma(next(self._mapping_ids), parent)
        self.anon_vmas[anon_vma.id] = anon_vma
        return anon_vma

    def forget_mapping(self, mapping_id: int) -> None:
        """An anon_vma has lost its last VMA."""
        del self.anon_vmas[mapping_id]

    def finish_reads(self) -> None:
        """Reads from the disk that were under way have ended."""
        for pfn, generation in self.reading:
            if self.frames.generation_at[pfn] == generation:
                self.frames.flags_at[pfn] &= ~READING
        self.reading.clear()

    # What the rooms above hand in about devices. All plain, all atomic.

    def set_dirty(self, pfns: Iterable[int]) -> None:
        """A device wrote to these frames; must be called before its ack counts."""
        frames = np.fromiter(pfns, np.int64)
        self.frames.settle(frames, True)
        for pfn in frames.tolist():
            flags = self.frames.flags_at[pfn]
            if flags & CACHE:
                file = self.files_by_mapping[self.frames.mapping_at[pfn]]
                if file.kind != "xip":
                    file.set_dirty(self.frames.index_at[pfn])
            elif flags & ANON:
                self.frames.set_dirty(pfn)

    def export(self, pfn: Pfn, exporter: int) -> None:
        """Mark the frame external-rmap for this exporter and hold a reference for it. Idempotent."""
        self.frames.export(pfn, exporter)

    def unexport(self, pfn: Pfn, exporter: int) -> None:
        """Undo export; no effect if this exporter does not hold the frame."""
        self.frames.unexport(pfn, exporter)

    def exporters(self, pfn: Pfn) -> frozenset[int]:
        """Who exports the frame."""
        return frozenset(self.frames.exports.get(pfn, ()))

    def pin(self, pfns: Sequence[int]) -> None:
        """Take one more long-term reference on each frame (device.pin is the way by address)."""
        self.frames.pin(pfns)

    def unpin(self, pfns: Sequence[int]) -> None:
        """Give references of pin back."""
        self.frames.unpin(pfns)
