"""The registration cache, by the behaviours that UCX's and libfabric's tests check."""

from __future__ import annotations

import asyncio

import mmubus
import pytest
from mmubus import MADV_DONTNEED, PAGE_SIZE, PROT_READ, PROT_WRITE, MmError
from mmubus.drivers.rdma import CachedRegion, RegistrationCache
from mmubus.drivers.rdma.mr import Access
from mmubus.drivers.rdma.rcache import Cached
from patience import until

P = PAGE_SIZE
FIXED = mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED


@pytest.fixture
async def cache(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> RegistrationCache:
    return await RegistrationCache.open(bus, mm)


async def get_put(cache: RegistrationCache, address: int, length: int, write: bool = False) -> Cached:
    region = await cache.get(address, length, write)
    cache.put(region)
    return region


async def pinned_pages(bus: mmubus.Bus) -> int:
    return (await bus.inspection.statistics()).frames_pinned


async def test_basic(cache: RegistrationCache, mm: mmubus.AddressSpace, at: int) -> None:
    await mm.store(at, b"x")
    one, other = await cache.get(at, 10), await cache.get(at + 20, 30)
    assert one is other
    seen = cache.statistics
    assert (seen.gets, seen.hits, seen.misses, seen.regs) == (2, 1, 1, 1)
    cache.put(one)
    cache.put(other)
    assert (seen.puts, seen.deregs, seen.unmap_invalidates) == (2, 0, 0)


async def test_same_address_reuse_does_not_hit(
    bus: mmubus.Bus, cache: RegistrationCache, mm: mmubus.AddressSpace, at: int
) -> None:
    """The mistake that registration caches are known for."""
    await mm.store(at, b"old")
    region = await get_put(cache, at, P)
    assert await region.pinned.read(at, 3) == b"old"
    await mm.munmap(at, P)
    assert await mm.mmap(at, P, flags=FIXED) == at
    await mm.store(at, b"new")
    again = await get_put(cache, at, P)
    assert again is not region
    assert await again.pinned.read(at, 3) == b"new"
    await cache.flush()
    assert await pinned_pages(bus) == 0


async def test_dontneed_mprotect_and_mremap_invalidate(
    cache: RegistrationCache, mm: mmubus.AddressSpace, at: int
) -> None:
    regions = [await get_put(cache, at + n * P, P, write=True) for n in range(3)]
    await mm.madvise(at, P, MADV_DONTNEED)
    await mm.mprotect(at + P, P, PROT_READ)
    await mm.mremap(at + 2 * P, P, P, mmubus.MREMAP_MAYMOVE | mmubus.MREMAP_FIXED, at + 64 * P)
    assert [region.valid for region in regions] == [False] * 3
    assert cache.regions == []


async def test_merge(cache: RegistrationCache, at: int) -> None:
    first, second = await cache.get(at, 4 * P), await cache.get(at + 6 * P, 4 * P)
    both = await cache.get(at + 2 * P, 6 * P)
    assert (both.start, both.end, cache.regions) == (at, at + 10 * P, [both])
    assert await cache.get(at, 4 * P) is both
    assert (cache.statistics.merges, first.valid, second.valid) == (1, False, False)
    assert await first.pinned.read(at, 1) == b"\0"  # who has it may go on


async def test_merge_destroys_a_region_that_nobody_uses(bus: mmubus.Bus, cache: RegistrationCache, at: int) -> None:
    first = await get_put(cache, at, 4 * P)
    second = await cache.get(at + 2 * P, 4 * P)
    assert not first.valid
    await cache.flush()
    assert await pinned_pages(bus) == 6
    cache.put(second)


async def test_release_in_use(bus: mmubus.Bus, cache: RegistrationCache, mm: mmubus.AddressSpace, at: int) -> None:
    await mm.store(at, b"mine")
    region = await cache.get(at, P)
    await mm.munmap(at, P)
    assert await region.pinned.read(at, 4) == b"mine"
    assert await pinned_pages(bus) == 1
    cache.put(region)
    await cache.flush()
    assert await pinned_pages(bus) == 0


async def test_not_merged_with_what_may_not_be_written(
    cache: RegistrationCache, mm: mmubus.AddressSpace, at: int
) -> None:
    await mm.mprotect(at, 4 * P, PROT_READ)
    first = await get_put(cache, at, 6 * P)
    second = await cache.get(at + 4 * P, 4 * P, write=True)
    assert (second.start, second.end, second.writable) == (at + 4 * P, at + 8 * P, True)
    assert not first.valid
    cache.put(second)


async def test_merging_expands_the_rights(cache: RegistrationCache, at: int) -> None:
    await get_put(cache, at, 4 * P, write=True)
    merged = await get_put(cache, at + 2 * P, 4 * P)
    assert (merged.start, merged.end, merged.writable) == (at, at + 6 * P, True)


async def test_a_read_only_region_does_not_serve_a_write(cache: RegistrationCache, at: int) -> None:
    first = await get_put(cache, at, P)
    second = await get_put(cache, at, P, write=True)
    assert (first.valid, second.writable) == (False, True)
    assert await get_put(cache, at, P) is second


async def test_registration_failure_leaves_nothing(
    bus: mmubus.Bus, cache: RegistrationCache, mm: mmubus.AddressSpace, at: int
) -> None:
    await mm.mprotect(at, P, PROT_READ)
    with pytest.raises(MmError):
        await cache.get(at, P, write=True)
    with pytest.raises(MmError):
        await cache.get(at + 1024 * P, P)
    assert (cache.regions, await pinned_pages(bus)) == ([], 0)
    await mm.mprotect(at, P, PROT_READ | PROT_WRITE)
    await get_put(cache, at, P, write=True)


async def test_limit_by_count_is_least_recently_used(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    cache = await RegistrationCache.open(bus, mm, regions_max=2)
    first, second, third = [await get_put(cache, at + 2 * n * P, P) for n in range(3)]
    assert len(cache.regions) == 2
    assert await get_put(cache, at + 2 * P, P) is second
    assert await get_put(cache, at + 4 * P, P) is third
    assert await get_put(cache, at, P) is not first
    assert not second.valid
    assert cache.statistics.evictions == 2


async def test_limit_by_bytes(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    cache = await RegistrationCache.open(bus, mm, bytes_max=3 * P)
    await get_put(cache, at, 2 * P)
    await get_put(cache, at + 4 * P, 2 * P)
    assert (len(cache.regions), cache.bytes) == (1, 2 * P)


async def test_a_region_in_use_is_not_evicted(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    cache = await RegistrationCache.open(bus, mm, bytes_max=3 * P)
    first = await cache.get(at, 2 * P)
    second = await get_put(cache, at + 4 * P, 2 * P)
    assert first.valid
    assert not second.valid
    cache.put(first)
    assert cache.regions == [first]


async def test_a_cache_that_is_off_keeps_nothing(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    cache = await RegistrationCache.open(bus, mm, regions_max=0)
    region = await cache.get(at, P)
    assert await region.pinned.read(at, 1) == b"\0"
    cache.put(region)
    await cache.flush()
    assert (cache.regions, await pinned_pages(bus)) == ([], 0)


async def test_many_at_once_register_once(cache: RegistrationCache, mm: mmubus.AddressSpace, at: int) -> None:
    await mm.store(at, b"x")
    regions = await asyncio.gather(*(cache.get(at + n * 100, 100) for n in range(20)))
    assert len(set(map(id, regions))) == 1
    assert (cache.statistics.regs, cache.statistics.hits, cache.statistics.misses) == (1, 19, 1)


async def test_unmapping_during_registration(cache: RegistrationCache, mm: mmubus.AddressSpace, at: int) -> None:
    """Whatever comes first: what the cache keeps afterwards is what the address means."""
    for turn in range(20):
        await mm.store(at, b"old")
        getting = asyncio.create_task(cache.get(at, P))
        for _ in range(turn % 7):
            await asyncio.sleep(0)
        await mm.madvise(at, P, MADV_DONTNEED)
        cache.put(await getting)
        await mm.store(at, b"%03d" % turn)
        region = await get_put(cache, at, P)
        assert await region.pinned.read(at, 3) == b"%03d" % turn


async def test_unread_unmaps_do_not_pile_up(
    bus: mmubus.Bus, cache: RegistrationCache, mm: mmubus.AddressSpace, at: int
) -> None:
    """UCX once kept one entry for each unmap until the next get, and the memory with it."""
    region = CachedRegion(cache, at, 16 * P, Access.LOCAL_WRITE)
    for _ in range(50):
        await region.write(at, b"x" * (4 * P))
        await mm.madvise(at, 4 * P, MADV_DONTNEED)

    async def nothing_left() -> bool:
        return (cache.regions, await pinned_pages(bus)) == ([], 0)

    await until(nothing_left)
