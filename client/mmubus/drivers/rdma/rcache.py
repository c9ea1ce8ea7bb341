"""A registration cache: pinned regions kept for the next transfer, and a notifier that sees to it that they are still
what the address means.

    get      a region that covers the range and allows the access, referenced: a hit; else one is registered, merged
             with those that it overlaps when the memory allows all that they allow
    put      the reference back; a region without one stays, until it is the least recently used and there are too many
             of them, by number or by bytes
    a page   is taken from the program, or its rights are: every region over it leaves the table at once. Nobody gets
             it any more; who has it finishes with the frames that were there, and the last put gives them back.

The mistake that this exists to avoid: memory is freed and mapped again at the same address, and the cache hits. In user
space that takes hooks in every way to free memory; here the memory manager tells. Seen in UCX (src/ucs/memory/rcache.c)
and libfabric (prov/util/src/util_mr_cache.c), whose tests are the model of ours.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from mmubus.address_space import AddressSpace
from mmubus.connection import Bus
from mmubus.drivers.dma import RETRIES_MAX, afterwards, stand_back
from mmubus.drivers.rdma.mr import Access, MemoryRegion, PinnedRegion, pinned
from mmubus.errors import MmError, RetriesExhausted
from mmubus.linux import PAGE_SIZE, TASK_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange

__all__ = ["CacheStatistics", "Cached", "CachedRegion", "RegistrationCache"]


@dataclass(slots=True)
class CacheStatistics:
    """What a cache has done so far; the names are UCX's."""

    gets: int = 0
    hits: int = 0
    misses: int = 0
    merges: int = 0
    unmap_invalidates: int = 0
    puts: int = 0
    regs: int = 0
    deregs: int = 0
    evictions: int = 0


@dataclass(slots=True, eq=False)
class Cached:
    """A region of the cache: whole pages [start, end).

    Attributes: references: those who got it and have not put it. valid: in the table; false for good once it is not.
    """

    start: int
    end: int
    writable: bool
    pinned: PinnedRegion
    references: int = 0
    valid: bool = True

    def covers(self, start: int, end: int, write: bool) -> bool:
        """Whether it can be used for an access."""
        return self.start <= start and end <= self.end and (self.writable or not write)


class RegistrationCache(Notifier):
    """The registration cache of one address space. Made by `open`.

    Args: regions_max, bytes_max: of regions that nobody uses and that are kept; regions_max 0 keeps none.
    Attributes: regions: the table, ascending, disjoint. bytes: in it. statistics: counters.
    """

    slips = ("age_page", "invalidate_range_end")  # pinned pages have no age; nothing waits for the end

    def __init__(self, regions_max: int = 1024, bytes_max: int = 1 << 30) -> None:
        self.regions_max = regions_max
        self.bytes_max = bytes_max
        self.regions: list[Cached] = []
        self.statistics = CacheStatistics()
        self._unused: dict[Cached, None] = {}  # in the table and without a reference, least recently used first
        self._registering = asyncio.Lock()
        self._overtaken: list[tuple[int, int]] | None = None  # invalidated while a registration is under way
        self._freeing: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, bus: Bus, mm: AddressSpace | int, *, regions_max: int = 1024, bytes_max: int = 1 << 30
    ) -> RegistrationCache:
        """Raises: MmError, ConnectionLost."""
        self = cls(regions_max, bytes_max)
        await bus.register(self, mm, name="rcache")
        return self

    @property
    def bytes(self) -> int:
        """Bytes of all regions in the table."""
        return sum(region.end - region.start for region in self.regions)

    async def get(self, address: int, length: int, write: bool = False) -> Cached:
        """A region for an access, referenced: give it back by `put`. Raises: MmError when the memory is not there."""
        start, end = address & -PAGE_SIZE, -(-(address + length) // PAGE_SIZE) * PAGE_SIZE
        self.statistics.gets += 1
        if (found := self._find(start, end, write)) is None:
            async with self._registering:
                found = self._find(start, end, write) or await self._miss(start, end, write)
        return found

    def put(self, region: Cached) -> None:
        """Give a region back."""
        self.statistics.puts += 1
        region.references -= 1
        if region.references:
            return
        if region.valid:
            self._unused[region] = None
            self._evict()
        else:
            self._free(region)

    def _find(self, start: int, end: int, write: bool) -> Cached | None:
        for region in self._overlapping(start, end):
            if region.covers(start, end, write):
                region.references += 1
                self._unused.pop(region, None)
                self.statistics.hits += 1
                return region
        return None

    def _overlapping(self, start: int, end: int) -> Iterator[Cached]:
        """Regions of the table that overlap [start, end), ascending."""
        at = bisect_left(self.regions, start + 1, key=lambda region: region.end)
        while at < len(self.regions) and self.regions[at].start < end:
            yield self.regions[at]
            at += 1

    async def _miss(self, start: int, end: int, write: bool) -> Cached:
        self.statistics.misses += 1
        low, high, merged_write = start, end, write
        merging = list(self._overlapping(start, end))
        for region in merging:
            low, high, merged_write = min(low, region.start), max(high, region.end), merged_write or region.writable
        if merging:
            try:
                made = await self._register(low, high, merged_write)
            except MmError:  # not all of it allows what all of them do: then those that are in the way go
                made = await self._register(start, end, write)
            else:
                self.statistics.merges += 1
        else:
            made = await self._register(start, end, write)
        for region in list(self._overlapping(made.start, made.end)):
            self._remove(region)
        made.references = 1
        insort(self.regions, made, key=lambda region: region.start)
        self._evict()
        return made

    async def _register(self, start: int, end: int, write: bool) -> Cached:
        """Pin, and again when the range was invalidated meanwhile: the frames may be the old ones."""
        for attempt in range(RETRIES_MAX):
            await stand_back(attempt)
            overtaken = self._overtaken = []
            try:
                region = await pinned(self, start, end - start, Access.LOCAL_WRITE if write else Access.LOCAL_READ)
            finally:
                self._overtaken = None
            self.statistics.regs += 1
            if not any(low < end and start < high for low, high in overtaken):
                return Cached(start, end, write, region)
            self.statistics.deregs += 1
            await region.deregister()
        raise RetriesExhausted(f"[{start:#x}, {end:#x}) was invalidated during each of {RETRIES_MAX} registrations")

    def _evict(self) -> None:
        """Least recently used regions go while there are too many; those in use stay."""
        total = self.bytes
        while self._unused and (len(self.regions) > self.regions_max or total > self.bytes_max):
            region = next(iter(self._unused))
            total -= region.end - region.start
            self.statistics.evictions += 1
            self._remove(region)

    def _remove(self, region: Cached) -> None:
        """Out of the table, for good."""
        if region.valid:
            region.valid = False
            self.regions.remove(region)
            self._unused.pop(region, None)
            if not region.references:
                self._free(region)

    def _free(self, region: Cached) -> None:
        """Unpin now and not at the next get: a cache that is not used must not keep memory that is not used either."""
        self.statistics.deregs += 1
        task = afterwards(region.pinned.deregister())
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def flush(self) -> None:
        """Give back every region that nobody uses, and wait until it is."""
        for region in list(self._unused):
            self._remove(region)
        await asyncio.gather(*self._freeing)

    async def close(self) -> None:
        """Take the notifier off. Regions that are in use are given back by their last put."""
        await self.flush()
        if self.registration is not None:
            await self.registration.unregister()

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        self._invalidate(range.start, range.end)
        return None  # nothing is dirty that giving the pins back does not tell

    def release(self, mm: int) -> Answer:
        self._invalidate(0, TASK_SIZE)
        return None

    def invalidated_everything(self, why: str) -> Answer:
        self._invalidate(0, TASK_SIZE)
        return None

    def _invalidate(self, start: int, end: int) -> None:
        if self._overtaken is not None:
            self._overtaken.append((start, end))
        for region in list(self._overlapping(start, end)):
            self.statistics.unmap_invalidates += 1
            self._remove(region)


class CachedRegion(MemoryRegion):
    """A region that goes through the cache at each transfer. `ProtectionDomain.add` it to make it reachable."""

    def __init__(self, cache: RegistrationCache, address: int, length: int, access: Access) -> None:
        super().__init__(address, length, access)
        self._cache = cache

    async def read(self, address: int, length: int) -> bytes:
        for _ in range(RETRIES_MAX):
            region = await self._cache.get(address, length)
            try:
                data = await region.pinned.read(address, length)
                if region.valid:  # else what was read may be what used to be there
                    return data
            finally:
                self._cache.put(region)
        raise RetriesExhausted(f"[{address:#x}, +{length}) was invalidated {RETRIES_MAX} times in a row")

    async def write(self, address: int, data: bytes) -> None:
        for _ in range(RETRIES_MAX):
            region = await self._cache.get(address, len(data), write=True)
            try:
                await region.pinned.write(address, data)
                if region.valid:
                    return
            finally:
                self._cache.put(region)
        raise RetriesExhausted(f"[{address:#x}, +{len(data)}) was invalidated {RETRIES_MAX} times in a row")

    async def deregister(self) -> None:
        """Nothing to do: the cache keeps what it kept."""
