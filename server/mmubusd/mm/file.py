"""Files: their size, their page cache with its folios, and who maps them.

Four kinds. disk: a file system that writes back (dirty pages, blocks, readahead, large folios). shm: tmpfs, and with
it all shared anonymous memory, each mmap an unlinked file of its own. xip: the pages are the medium's own frames,
without a cache in between; a hole is mapped as the zero page. hugetlb: of hugetlbfs, in huge pages of the pool.

A folio is an aligned run of 2^order pages, all cached; its order is kept on each of its frames, its flags on the first.
On disk, DIRTY is the folio's and BLOCK_DIRTY says which of its pages are to be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmubusd.mm import hugetlb
from mmubusd.mm.addr import FILE_SIZE_MAX, MAX_LFS_FILESIZE, PAGE_SHIFT, PAGE_SIZE, FileId, pages
from mmubusd.mm.frame import BLOCK_DIRTY, CACHE, DIRTY, NOT_UPTODATE, ORDER_MASK, ORDER_SHIFT, READAHEAD, SWAPBACKED
from mmubusd.mm.frame_bytes import WRITTEN
from mmubusd.mm.free_frames import OutOfFrames
from mmubusd.mm.free_nodes import Nodes
from mmubusd.mm.mempolicy import SharedPolicy
from mmubusd.mm.page_cache import PageCache
from mmubusd.mm.range_lock import RangeLock
from mmubusd.mm.rmap import RmapList

if TYPE_CHECKING:
    from mmubusd.mm.memcontrol import MemCgroup
    from mmubusd.mm.memory import Memory
    from mmubusd.mm.vma import Vma

KINDS = ("disk", "shm", "xip", "hugetlb")

HOLE, RESERVED_BLOCK, ALLOCATED = 0, 1, 2
"""What a page of a disk file has on the disk: nothing, a promise (delayed allocation), a block."""


class Readahead:
    """Kernel: struct file_ra_state, in pages."""

    __slots__ = ("async_size", "mmap_miss", "order", "size", "start")

    def __init__(self) -> None:
        self.start = self.size = self.async_size = self.order = self.mmap_miss = 0


class File:
    """One file. name is for people; linked: it can still be opened by its id; anonymous: it never could."""

    __slots__ = (
        "anonymous",
        "blocks",
        "cache",
        "failed",
        "id",
        "kind",
        "linked",
        "lock",
        "medium",
        "memcg",
        "memory",
        "name",
        "policies",
        "ra",
        "reserved",
        "rmap",
        "size",
        "swapped",
        "users_nr",
    )

    def __init__(
        self, memory: Memory, file_id: FileId, name: str, kind: str, size: int, linked: bool = True,
        memcg: MemCgroup | None = None,
    ) -> None:  # fmt: skip
        self.memory = memory
        self.memcg = memcg  # who pays for its pages
        self.id = file_id
        self.name = name
        self.kind = kind
        self.size = size
        self.linked = linked
        self.anonymous = not linked
        self.cache = PageCache()
        self.rmap = RmapList()
        self.users_nr = 0
        self.failed = False  # a page that was to be written is lost, and nobody has been told yet (AS_EIO)
        self.lock = RangeLock(memory.granted)
        self.ra = Readahead()
        self.blocks = bytearray()
        self.medium: dict[int, bytes] = {}  # disk: the bytes of pages that were written and have left the cache
        self.policies = SharedPolicy()  # shm: set through mappings of it
        self.swapped: dict[int, int] = {}  # shm: slots of pages that are in swap, by index
        self.reserved: set[int] = set()  # hugetlb: huge pages that shared mappings have reserved, by number

    @property
    def size_max(self) -> int:
        """How large the kind's files can be, in bytes. Kernel: s_maxbytes."""
        return FILE_SIZE_MAX if self.kind in ("disk", "xip") else MAX_LFS_FILESIZE

    @property
    def pages(self) -> int:
        return pages(self.size)

    # Who maps it

    def map(self, vma: Vma, original: Vma | None = None) -> None:
        """A VMA of this file begins to exist."""
        self.users_nr += 1
        if original is not None:
            self.rmap.insert_after(vma, original)
        else:
            self.rmap.insert(vma)

    def unmap(self, vma: Vma) -> None:
        """A VMA of this file is gone; without a name and a mapping the file goes too, once its pages are unmapped."""
        self.rmap.remove(vma)
        if self.kind == "hugetlb":
            hugetlb.close(vma)
        self.release_user()

    def release_user(self) -> None:
        """One reason less to exist."""
        self.users_nr -= 1
        if not self.linked and not self.users_nr:
            self.memory.orphans.append(self)

    # Blocks on the disk

    def block(self, index: int) -> int:
        return self.blocks[index] if index < len(self.blocks) else HOLE

    def set_block(self, index: int, state: int) -> None:
        if index >= len(self.blocks):
            self.blocks.extend(bytes(index + 1 - len(self.blocks)))
        self.blocks[index] = state

    def free_blocks(self, first: int, last: int) -> None:
        """The pages [first, last) have nothing on the disk any more."""
        last = min(last, len(self.blocks))
        if first < last:
            self.blocks[first:last] = bytes(last - first)
        for index in [index for index in self.medium if first <= index < last]:
            del self.medium[index]

    # Pages and folios

    def add(self, index: int, order: int = 0, flags: int = 0, nodes: Nodes | None = None) -> int:
        """Take zero pages into the cache as one folio that begins at index. Args: nodes: where from, None: anywhere.

        Returns: the first frame. Raises: OutOfFrames.
        """
        memory = self.memory
        if self.memcg is not None:
            self.memcg.check(1 << order)
        if memory.frames.free.nr_on(nodes) < 1 << order:
            raise OutOfFrames("ENOMEM", f"{1 << order} frames wanted, {memory.frames.free_nr} are free")
        wanted = CACHE | order << ORDER_SHIFT | flags | (SWAPBACKED if self.kind == "shm" else 0)
        first = 0
        for page in range(index, index + (1 << order)):
            pfn = memory.frames.alloc(wanted, self.id, page, nodes, self.memcg)
            self.cache.set(page, pfn)
            first = first or pfn
            memory.lru.add(pfn)
            wanted &= ~READAHEAD
        return first

    def read_in(self, index: int) -> None:
        """The bytes of a page just added come from the medium."""
        data = self.medium.pop(index, None)
        slot = self.swapped.pop(index, None)
        if slot is not None:
            data = self.memory.swap.peek(slot, 0, PAGE_SIZE)
            self.memory.swap.free(slot)
            self.set_dirty(index)
        if data is not None:
            self.memory.frames.write(self.cache.get(index), 0, data)

    def swap_out(self, index: int) -> bool:
        """An unmapped page of shared memory goes to swap; false if there is no slot. Kernel: shmem_writepage()."""
        memory, pfn = self.memory, self.cache.get(index)
        if not memory.swap.room(pfn):
            return False
        memory.frames.get(pfn)
        self.delete(index)
        slot = memory.swap.add(pfn)
        memory.swap.duplicate(slot)
        self.swapped[index] = slot
        memory.swap.write_out(pfn)
        memory.swap.drop(pfn)
        memory.frames.put(pfn)
        return True

    def drop_swapped(self, first: int, last: int) -> None:
        """Pages of [first, last) that are in swap are forgotten."""
        for index in [index for index in self.swapped if first <= index < last]:
            self.memory.swap.free(self.swapped.pop(index))

    def folio(self, index: int) -> tuple[int, int]:
        """The folio that holds a cached index, as [first, end) indexes."""
        flags = self.memory.frames.flags_at[self.cache.get(index)]
        count = 1 << ((flags & ORDER_MASK) >> ORDER_SHIFT)
        first = index & -count
        return first, first + count

    def folio_flags(self, first: int) -> int:
        """The flags of the folio that begins at index first."""
        return self.memory.frames.flags_at[self.cache.get(first)]

    def set_folio_flags(self, first: int, *, on: int = 0, off: int = 0) -> None:
        pfn = self.cache.get(first)
        self.memory.frames.flags_at[pfn] = self.memory.frames.flags_at[pfn] & ~off | on

    def folio_mapcount(self, first: int, end: int) -> int:
        """How many PTEs map pages of the folio."""
        frames = self.memory.frames
        return sum(frames.mapcount_at[self.cache.get(index)] for index in range(first, end))

    def set_dirty(self, index: int) -> None:
        """The page has been written to, so its whole folio is dirty; on disk its holes want blocks."""
        frames = self.memory.frames
        if self.kind != "disk":
            pfn = self.cache.get(index)
            if frames.flags_at[pfn] & ORDER_MASK:
                pfn = self.cache.get(self.folio(index)[0])
            frames.flags_at[pfn] |= DIRTY
            return
        first, end = self.folio(index)
        self.set_folio_flags(first, on=DIRTY, off=READAHEAD)
        for page in range(first, end):
            frames.flags_at[self.cache.get(page)] |= BLOCK_DIRTY
            if page < self.pages and self.block(page) == HOLE:
                self.set_block(page, RESERVED_BLOCK)

    def set_page_dirty(self, index: int) -> None:
        """Only this page of its folio: the tail that a change of size zeroed."""
        first, _ = self.folio(index)
        self.set_folio_flags(first, on=DIRTY)
        self.memory.frames.flags_at[self.cache.get(index)] |= BLOCK_DIRTY

    def clean(self, first: int, end: int) -> None:
        """The folio, which nobody can write to now, is on the disk."""
        frames = self.memory.frames
        self.set_folio_flags(first, off=DIRTY | READAHEAD)
        for index in range(first, end):
            frames.flags_at[self.cache.get(index)] &= ~BLOCK_DIRTY
            if self.block(index) == RESERVED_BLOCK:
                self.set_block(index, ALLOCATED)

    def delete(self, index: int, keep_bytes: bool = False) -> None:
        """Take one unmapped page out of the cache and let go of its frame.

        Args: keep_bytes: the page is only forgotten (reclaim); on disk its bytes stay.
        """
        frames = self.memory.frames
        pfn = self.cache.delete(index)
        flags = frames.flags_at[pfn]
        assert frames.mapcount_at[pfn] == 0, "a page leaves the cache after its last mapping"
        if keep_bytes and self.kind == "disk" and flags & WRITTEN:
            self.medium[index] = frames.read(pfn)
        frames.flags_at[pfn] = flags & ~(CACHE | DIRTY | BLOCK_DIRTY | READAHEAD | NOT_UPTODATE | ORDER_MASK)
        frames.put(pfn)

    def zero(self, start: int, end: int) -> None:
        """Zero the bytes [start, end) of one page, cached or on the medium."""
        index, offset = start >> PAGE_SHIFT, start & (PAGE_SIZE - 1)
        pfn = self.cache.get(index)
        if pfn:
            self.memory.frames.zero(pfn, offset, end - start)
        elif index in self.medium:
            data = self.medium[index]
            self.medium[index] = data[:offset] + bytes(end - start) + data[offset + end - start :]
        elif index in self.swapped:
            self.memory.swap.zero(self.swapped[index], offset, end - start)
