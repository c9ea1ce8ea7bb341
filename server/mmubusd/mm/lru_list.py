"""The inactive and the active list: which pages have not been asked for the longest.

Nobody keeps lists in order: each page has a stamp, the time at which it came to the head of its list, and its list is a
flag (ACTIVE). Who wants the coldest pages sorts the oldest stamps into a queue, from which many calls are served; a
page that has moved since then is passed over. So a fault pays one store, and reclaim a sort once in a while.

Kernel: struct lruvec, mm/vmscan.c, v6.12.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from mmubusd.mm.frame import ACTIVE, ANON, CACHE, LARGE, LRU, ORDER_MASK, ORDER_SHIFT, REFERENCED, FrameTable
from mmubusd.mm.free_frames import Pfns
from mmubusd.mm.free_nodes import Nodes

QUEUE_MIN = 256
STAMP_MAX = (1 << 32) - 1


class LruLists:
    """Both lists of the machine. isolated: pages that somebody has taken from them, to reclaim or to age them."""

    __slots__ = ("_frames", "_now", "_queues", "_stamp_at", "isolated", "stamp")

    def __init__(self, frames: FrameTable) -> None:
        self._frames = frames
        self.stamp = np.zeros(frames.frames_nr, np.uint32)
        self._stamp_at = self.stamp.data
        self._now = 1
        # By list, and by the group whose pages alone are in it (0: all pages).
        self._queues: dict[tuple[int, int], deque[tuple[int, int]]] = {}
        self.isolated: set[int] = set()

    def touch(self, pfn: int) -> None:
        """The page comes to the head of its list."""
        self._stamp_at[pfn] = self._now

    def touch_each(self, pfns: list[int]) -> None:
        """touch() on a few."""
        stamp_at, now = self._stamp_at, self._now
        for pfn in pfns:
            stamp_at[pfn] = now

    def touch_many(self, pfns: Pfns) -> None:
        self.stamp[pfns] = self._now

    def tick(self) -> None:
        """What comes to the head from now on is younger than what came before."""
        self._now += 1
        if self._now > STAMP_MAX:
            _, self.stamp[:] = np.unique(self.stamp, return_inverse=True)
            self._now = int(self.stamp.max()) + 1
            self._queues.clear()

    def sizes(self, memcg: int = 0) -> tuple[int, int]:
        """How many pages are inactive, and how many active. Args: memcg: of those that this group pays for."""
        untouched = self._frames.free.untouched
        flags = self._frames.flags[:untouched] & np.uint32(LRU | ACTIVE)
        if memcg:
            flags = flags[self._frames.charges.owner[:untouched] == memcg]
        return int(np.count_nonzero(flags == LRU)), int(np.count_nonzero(flags == LRU | ACTIVE))

    def isolate(self, count: int, active: bool, nodes: Nodes | None = None, memcg: int = 0) -> list[int]:
        """Take folios of up to so many pages, the coldest, from a list; give them back with putback.

        Args: nodes: only from these nodes, which no queue serves: None: from all; memcg: only those that this group
            pays for. Returns: the first frame of each, coldest first.
        """
        which = ACTIVE if active else 0
        served = self._queues.setdefault((which, memcg), deque())
        queue, taken = served if nodes is None else deque[tuple[int, int]](), list[int]()
        refilled, pages_nr = False, 0
        while pages_nr < count:
            if not queue:
                if refilled or not self._refill(queue, which, nodes, memcg):
                    break
                refilled = True
            pfn, stamp = queue.popleft()
            there = self._frames.flags_at[pfn] & (LRU | ACTIVE) == LRU | which and self._stamp_at[pfn] == stamp
            if memcg and self._frames.charges.owner_at[pfn] != memcg:
                continue
            if there and pfn not in self.isolated:
                taken.append(pfn)
                pages_nr += 1 << ((self._frames.flags_at[pfn] & ORDER_MASK) >> ORDER_SHIFT)
                self.isolated.add(pfn)
        return taken

    def _refill(self, queue: deque[tuple[int, int]], which: int, nodes: Nodes | None, memcg: int) -> bool:
        """Sort the oldest quarter of a list into a queue; whether there is any."""
        frames = self._frames
        flags = frames.flags[: frames.free.untouched]
        there = flags & np.uint32(LRU | ACTIVE) == LRU | which
        if memcg:
            there &= frames.charges.owner[: frames.free.untouched] == memcg
        pfns = np.flatnonzero(there)
        orders = (flags[pfns] & np.uint32(ORDER_MASK)) >> np.uint32(ORDER_SHIFT)
        within = (np.uint64(1) << orders.astype(np.uint64)) - np.uint64(1)
        cached = flags[pfns] & np.uint32(CACHE) != 0
        pfns = pfns[np.where(cached, frames.index[pfns], pfns.astype(np.uint64)) & within == 0]
        if nodes is not None:
            pfns = pfns[np.isin(pfns * frames.nodes_nr // frames.frames_nr, nodes)]
        if self.isolated:
            pfns = pfns[~np.isin(pfns, np.fromiter(self.isolated, np.int64))]
        stamps = self.stamp[pfns]
        wanted = max(QUEUE_MIN, len(pfns) // 4)
        if wanted < len(pfns):
            pfns = pfns[stamps <= np.partition(stamps, wanted)[wanted]]
            stamps = self.stamp[pfns]
        order = np.argsort(stamps, kind="stable")
        queue.extend(zip(pfns[order].tolist(), stamps[order].tolist(), strict=True))
        return bool(len(pfns))

    def forget(self, memcg: int) -> None:
        """The group is no more."""
        for which in (0, ACTIVE):
            self._queues.pop((which, memcg), None)

    def putback(self, pfn: int, active: bool, referenced: bool = False) -> None:
        """A folio that was isolated goes to the head of a list."""
        self.isolated.discard(pfn)
        on = (ACTIVE if active else 0) | (REFERENCED if referenced else 0)
        flags = self._frames.flags_at[pfn]
        if flags & (ANON | ORDER_MASK) == LARGE:
            pages = self._frames.partial.members(pfn)
            self._frames.flags[pages] = self._frames.flags[pages] & ~np.uint32(ACTIVE | REFERENCED) | np.uint32(on)
            self.stamp[pages] = self._now
            return
        self._frames.flags_at[pfn] = flags & ~(ACTIVE | REFERENCED) | on
        self._stamp_at[pfn] = self._now
