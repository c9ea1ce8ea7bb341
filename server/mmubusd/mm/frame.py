"""Page frames: the machine's memory, its state and its real bytes.

State is one numpy array a field, so that a range of pages costs a few array operations; for single pages each array has
a memoryview of the same memory (`…_at`), which is several times cheaper to index. The arrays span all frames from the
start; the operating system commits them as they are touched.

A frame's life, and what holds it (`refcount` counts mappings, the page cache, gathers, pins and exports):

    free ──alloc──► mapped and/or cached ──zap──► quarantine (unmapped, its round is open) ──put──► free
                          │    ▲                                                             generation + 1
                          └────┘ pinned or exported: unmapped, but held

Its bytes are in `frame_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.frame_bytes import POISON, RESERVED, SOILED, WRITTEN, FrameBytes
from mmubusd.mm.free_frames import BLOCK_FRAMES, BLOCK_ORDER, FreeFrames, OutOfFrames, Pfns
from mmubusd.mm.free_nodes import FreeNodes, Nodes
from mmubusd.mm.hugetlb_pool import HugetlbPool
from mmubusd.mm.memcontrol import Charges, MemCgroup
from mmubusd.mm.partially_mapped import PartiallyMapped

if TYPE_CHECKING:
    from mmubusd.mm.swap import SwapArea


# Frame flags. Kernel names are those of enum pageflags, v6.12.
# 0: RESERVED, the zero page
ANON = 1 << 1  # mapping is an anon_vma's id; not so: a file's
CACHE = 1 << 2  # in a page cache
EXCLUSIVE = 1 << 3  # PG_anon_exclusive
SWAPBACKED = 1 << 4  # anonymous without it: lazily freed (MADV_FREE)
DIRTY = 1 << 5  # PG_dirty, of the folio
BLOCK_DIRTY = 1 << 6  # this page of a dirty folio is to be written
READAHEAD = 1 << 7  # PG_readahead, which is PG_reclaim: on the folio's first page
NOT_UPTODATE = 1 << 8
READING = 1 << 9  # its read from the disk has not ended
REFERENCED = 1 << 10
ACTIVE = 1 << 11
LRU = 1 << 12
IN_ADD = 1 << 13  # waits in a per-CPU batch: one more reference, see lru
IN_LAZYFREE = 1 << 14
IN_DEACTIVATE = 1 << 15
IN_BATCH = IN_ADD | IN_LAZYFREE | IN_DEACTIVATE
QUARANTINE = 1 << 16  # unmapped and held by an open round
PINNED = 1 << 17
EXTERNAL = 1 << 18  # PG_external_rmap
# 19 and 20: WRITTEN and SOILED, of frame_bytes
SWAPCACHE = 1 << 21  # PG_swapcache
DEVICE = 1 << 22  # a device's own memory, see migrate_device
KSM = 1 << 23  # merged with equal pages, see ksm
HUGETLB = 1 << 24  # of hugetlb's pool, see hugetlb
HWPOISON = 1 << 25  # PG_hwpoison: it has failed, and the mark holds a reference for good, see memory_failure
KEPT = 1 << 26  # unmapped, held by its large folio, which is still in use, see partially_mapped
ORDER_SHIFT = 28  # the folio's order, on each of its pages
ORDER_MASK = 15 << ORDER_SHIFT
LARGE = ANON | BLOCK_ORDER << ORDER_SHIFT
"""Of a large folio of private memory: these flags under ANON and ORDER_MASK."""


class FrameTable(FrameBytes):
    """All frames of the machine. Frame 0 is the zero page.

    Args: frames_nr: how many; store: their bytes, zero-filled, or None for anonymous memory of our own;
        nodes_nr: how many NUMA nodes share them, each a range of frames; hugetlb_nr: huge pages in hugetlb's pool.
    Attributes: swap: the swap file that its pages go to. free: those that nobody has. charges: who pays for the others.
    Raises: ValueError: there is no room for the pool.
    """

    swap: SwapArea

    def __init__(self, frames_nr: int, store: memoryview | None = None, nodes_nr: int = 1, hugetlb_nr: int = 0) -> None:
        super().__init__(frames_nr, store)
        self.refcount = np.zeros(frames_nr, np.int32)
        self.mapcount = np.zeros(frames_nr, np.int32)
        self.mapping = np.zeros(frames_nr, np.uint32)
        self.index = np.zeros(frames_nr, np.uint64)
        self.refcount_at = self.refcount.data
        self.mapcount_at = self.mapcount.data
        self.mapping_at = self.mapping.data
        self.index_at = self.index.data
        self.quarantine_nr = self.swapcache_nr = self.hwpoison_nr = 0
        self.has_merged = False  # there are, or have been, frames that are mapped more than once in one place, see ksm
        self.pins: dict[int, int] = {}
        self.exports: dict[int, set[int]] = {}
        self.withheld: dict[int, int] = {}  # held back from whoever is fenced and could still reach them
        self.unknown_sharers: set[int] = set()  # frames with one mapping more than there are PTEs, see adopt
        self.nodes_nr = nodes_nr
        self.free: FreeFrames | FreeNodes = (
            FreeFrames(1, frames_nr) if nodes_nr == 1 else FreeNodes(frames_nr, nodes_nr)
        )
        self.partial = PartiallyMapped(
            self, mask=ANON | ORDER_MASK, member=LARGE, kept=KEPT, apart=QUARANTINE, failed=HWPOISON
        )
        self.hugetlb = HugetlbPool(self.free, hugetlb_nr)
        self.charges = Charges(frames_nr)
        self.flags_at[0] = RESERVED
        self.refcount_at[0] = 1

    # Allocation

    @property
    def free_nr(self) -> int:
        return self.free.nr

    def alloc(
        self, flags: int, mapping: int, index: int, nodes: Nodes | None = None, memcg: MemCgroup | None = None
    ) -> int:
        """Take a frame that reads as zeros, with one reference and no mapping.

        Args: nodes: where from, in this order; None: from anywhere; memcg: who pays for it. Raises: OutOfFrames.
        """
        if memcg is not None:
            memcg.check(1)
        pfn = self.free.take() if nodes is None else self.free.take_on(nodes)
        if memcg is not None:
            self.charges.charge(memcg, pfn)
        self.flags_at[pfn] |= flags
        self.refcount_at[pfn] = 1
        self.mapping_at[pfn] = mapping
        self.index_at[pfn] = index
        return pfn

    def node_of(self, pfn: int) -> int:
        """The NUMA node of a frame."""
        return pfn * self.nodes_nr // self.frames_nr

    def alloc_on(self, nodes: Nodes) -> int:
        """As alloc, without any state. Raises: OutOfFrames."""
        pfn = self.free.take_on(nodes)
        self.refcount_at[pfn] = 1
        self.mapping_at[pfn] = self.index_at[pfn] = 0
        return pfn

    def alloc_many(
        self, count: int, flags: int, mapping: int, index: NDArray[np.int64], nodes: Nodes | None = None,
        memcg: MemCgroup | None = None,
    ) -> Pfns:  # fmt: skip
        """As alloc, for frames of consecutive or given indexes. All or nothing."""
        if memcg is not None:
            memcg.check(count)
        pfns = self.free.take_many(count, nodes)
        if memcg is not None:
            self.charges.charge_many(memcg, pfns, count)
        self.flags[pfns] |= np.uint32(flags)
        self.refcount[pfns] = 1
        self.mapping[pfns] = mapping
        self.index[pfns] = index
        return pfns

    def alloc_block(self, nodes: Nodes | None = None, memcg: MemCgroup | None = None) -> int:
        """BLOCK_FRAMES frames in a row that read as zeros, each with one reference and no mapping.

        Args: nodes, memcg: as for alloc. Returns: the first of them, or 0 if none are to be had.
        """
        if memcg is not None and memcg.room < BLOCK_FRAMES:
            return 0
        first = self.free.take_block(nodes)
        if first:
            self.refcount[first : first + BLOCK_FRAMES] = 1
            if memcg is not None:
                self.charges.charge_many(memcg, slice(first, first + BLOCK_FRAMES), BLOCK_FRAMES)
        return first

    def alloc_hugetlb(self, nodes: Nodes | None = None) -> int:
        """As alloc_block, of hugetlb's pool."""
        return self._become_hugetlb(self.hugetlb.take(nodes))

    def alloc_hugetlb_to_move(self, nodes: Nodes) -> int:
        """As alloc_hugetlb, for a page that moves. Raises: OutOfFrames."""
        first = self._become_hugetlb(self.hugetlb.take_to_move(nodes))
        if not first:
            raise OutOfFrames("ENOMEM", f"nodes {list(nodes)} have no huge page")
        return first

    def _become_hugetlb(self, first: int) -> int:
        if first:
            self.refcount[first : first + BLOCK_FRAMES] = 1
            self.flags[first : first + BLOCK_FRAMES] |= np.uint32(HUGETLB)
        return first

    def get(self, pfn: int) -> None:
        self.refcount_at[pfn] += 1

    def put(self, pfn: int) -> None:
        """Give one reference back; the last one frees the frame."""
        left = self.refcount_at[pfn] - 1
        self.refcount_at[pfn] = left
        if left == 0:
            self._free_one(pfn)
        elif self.flags_at[pfn] & QUARANTINE:
            self._leave_quarantine_if_held(pfn)
        elif self.flags_at[pfn] & SWAPCACHE:
            self.swap.forget_unmapped(pfn)
        elif self.flags_at[pfn] & KEPT:
            self._settle_kept(pfn)
        elif left == 1 and pfn in self.unknown_sharers:
            self.forget_sharer(pfn)

    def put_many(self, pfns: Pfns) -> None:
        """put() on each; pfns: shape (n,), int64, no frame twice."""
        left = self.refcount[pfns] - 1
        self.refcount[pfns] = left
        if not left.any():
            self._free_all(pfns)
            return
        dead = left == 0
        self._free_all(pfns[dead])
        for pfn in pfns[~dead & (self.flags[pfns] & QUARANTINE != 0)].tolist():
            self._leave_quarantine_if_held(pfn)
        if self.swapcache_nr:
            for pfn in pfns[~dead & (self.flags[pfns] & SWAPCACHE != 0)].tolist():
                self.swap.forget_unmapped(pfn)
        if self.partial.queue:
            for pfn in pfns[~dead & (self.flags[pfns] & KEPT != 0)].tolist():
                self._settle_kept(pfn)
        if self.unknown_sharers:
            for pfn in pfns[left == 1].tolist():
                if pfn in self.unknown_sharers:
                    self.forget_sharer(pfn)

    def forget_sharer(self, pfn: int) -> None:
        """A mapping that was only counted, because nobody knows whose it is, counts no longer."""
        self.unknown_sharers.discard(pfn)
        self.mapcount_at[pfn] -= 1
        self.put(pfn)

    def _settle_kept(self, pfn: int) -> None:
        """Somebody else has let go of a frame that its folio keeps, perhaps as the last who had any of it."""
        if self.refcount_at[pfn] == 1:
            self.refcount_at[pfn] = 0
            self.flags_at[pfn] &= ~KEPT
            self._free_one(pfn)

    def _free_one(self, pfn: int) -> None:
        flags = self.flags_at[pfn]
        if flags & (ANON | ORDER_MASK) == LARGE:
            self._free_all(np.array([pfn]))
            return
        if flags & QUARANTINE:
            self.quarantine_nr -= 1
        if flags & WRITTEN:
            self.data[pfn] = POISON
        self.flags_at[pfn] = flags & SOILED
        self.generation_at[pfn] = (self.generation_at[pfn] + 1) & 0xFFFFFFFF
        if self.charges.by_id:
            self.charges.uncharge(pfn)
        if flags & HUGETLB:
            self.hugetlb.give(pfn)
        else:
            self.free.give(pfn)

    def _free_all(self, pfns: Pfns) -> None:
        if self.free.keeps_blocks:
            pfns = self.partial.settle(pfns)
        flags = self.flags[pfns]
        if self.quarantine_nr:
            self.quarantine_nr -= int(np.count_nonzero(flags & QUARANTINE))
        written = flags & WRITTEN != 0
        if written.any():
            self.data[pfns[written]] = POISON
        self.flags[pfns] = flags & SOILED
        self.generation[pfns] += 1
        if self.charges.by_id:
            self.charges.uncharge_many(pfns)
        if self.hugetlb.nr:
            pooled = flags & HUGETLB != 0
            self.hugetlb.give_many(pfns[pooled])
            pfns = pfns[~pooled]
        self.free.give_many(pfns)

    # Quarantine

    def quarantine(self, pfns: Pfns) -> None:
        """Their round opens: those of pfns that nothing maps or caches any more are set apart until they are put."""
        flags = self.flags[pfns]
        apart = pfns[(self.mapcount[pfns] == 0) & (flags & (CACHE | SWAPCACHE | QUARANTINE) == 0)]
        self.flags[apart] |= QUARANTINE
        self.quarantine_nr += len(apart)

    def quarantine_one(self, pfn: int) -> None:
        """As quarantine, for one frame; no harm in calling it twice."""
        flags = self.flags_at[pfn]
        if not self.mapcount_at[pfn] and not flags & (CACHE | SWAPCACHE | QUARANTINE):
            self.flags_at[pfn] = flags | QUARANTINE
            self.quarantine_nr += 1

    def _leave_quarantine_if_held(self, pfn: int) -> None:
        """The last gather has let go of a frame that pins or exports keep: nothing waits for it any more."""
        marked = self.flags_at[pfn] & HWPOISON != 0
        if self.refcount_at[pfn] == self.pins.get(pfn, 0) + len(self.exports.get(pfn, ())) + marked:
            self.flags_at[pfn] &= ~QUARANTINE
            self.quarantine_nr -= 1

    # Long-term holders

    def pin(self, pfns: Iterable[int]) -> None:
        for pfn in pfns:
            self.refcount_at[pfn] += 1
            self.pins[pfn] = self.pins.get(pfn, 0) + 1
            self.flags_at[pfn] |= PINNED

    def unpin(self, pfns: Iterable[int]) -> None:
        for pfn in pfns:
            held = self.pins[pfn] - 1
            if held:
                self.pins[pfn] = held
            else:
                del self.pins[pfn]
                self.flags_at[pfn] &= ~PINNED
            self.put(pfn)

    def export(self, pfn: int, exporter: int) -> None:
        exporters = self.exports.setdefault(pfn, set())
        if exporter not in exporters:
            exporters.add(exporter)
            self.refcount_at[pfn] += 1
            self.flags_at[pfn] |= EXTERNAL

    def unexport(self, pfn: int, exporter: int) -> None:
        exporters = self.exports.get(pfn)
        if exporters is None or exporter not in exporters:
            return
        exporters.remove(exporter)
        if not exporters:
            del self.exports[pfn]
            self.flags_at[pfn] &= ~EXTERNAL
        self.put(pfn)

    def withhold(self, pfns: Iterable[int]) -> None:
        """Someone whose rights are void could still reach these frames: they are not used again before `let_go`."""
        for pfn in pfns:
            self.refcount_at[pfn] += 1
            self.withheld[pfn] = self.withheld.get(pfn, 0) + 1

    def let_go(self, pfns: Iterable[int]) -> None:
        """Undo withhold."""
        for pfn in pfns:
            left = self.withheld[pfn] - 1
            if left:
                self.withheld[pfn] = left
            else:
                del self.withheld[pfn]
            self.put(pfn)

    # Frames that have failed

    def hwpoison(self, pfn: int) -> None:
        """The frame has failed: nobody gets it any more. Requires: it is in use, or has left the free list."""
        self.refcount_at[pfn] += 1
        self.flags_at[pfn] |= HWPOISON
        self.hwpoison_nr += 1
        self.charges.uncharge(pfn)

    def forget_page(self, pfn: int) -> None:
        """Reclaim passes the failed frame over; unless a cache or a mapping has its page still, it has none."""
        flags = self.flags_at[pfn] & ~(LRU | ACTIVE | REFERENCED | EXCLUSIVE)
        if not flags & (CACHE | SWAPCACHE) and not self.mapcount_at[pfn]:
            flags &= HWPOISON | PINNED | EXTERNAL | QUARANTINE | WRITTEN | SOILED
            if self.refcount_at[pfn] == 1:
                self.generation_at[pfn] = (self.generation_at[pfn] + 1) & 0xFFFFFFFF
        self.flags_at[pfn] = flags

    def evict_exports(self, pfn: int) -> None:
        """Every exporter has let go of it."""
        for exporter in tuple(self.exports.get(pfn, ())):
            self.unexport(pfn, exporter)

    def set_dirty(self, pfn: int) -> None:
        """The page of private memory has been written to by someone who has no PTE; its whole folio is dirty then."""
        if self.flags_at[pfn] & ORDER_MASK and self.flags_at[pfn] & ANON:
            first = pfn & -BLOCK_FRAMES
            flags = self.flags[first : first + BLOCK_FRAMES]
            large = flags & np.uint32(ANON | ORDER_MASK) == ANON | BLOCK_ORDER << ORDER_SHIFT
            flags[large] |= np.uint32(DIRTY)
        else:
            self.flags_at[pfn] |= DIRTY

    def extra_references(self, pfn: int) -> int:
        """What the kernel's reference count would say more than ours: waiting in LRU batches adds to it. Exports do not
        count: an exporter is told when the frame goes, so it need not keep a page from being reused in place."""
        return (self.flags_at[pfn] & IN_BATCH).bit_count() - len(self.exports.get(pfn, ()))

    def check_poison(self, frames_max: int) -> None:
        """Look at free frames that hold poison, those freed last first; what is damaged is poisoned again."""
        free = self.free.latest(frames_max)
        for pfn in free[self.flags[free] & SOILED != 0].tolist():
            damaged = len(self.damaged)
            self._check_poison(pfn)
            if len(self.damaged) > damaged:
                self.data[pfn] = POISON
