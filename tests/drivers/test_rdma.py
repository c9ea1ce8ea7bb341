"""Queue pairs between two programs, through regions of all three kinds."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import mmubus
import pytest
from mmubus import MADV_DONTNEED, MADV_PAGEOUT, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE, NotifierRange, Reason
from mmubus.drivers.rdma import (
    Access,
    CachedRegion,
    MemoryRegion,
    OnDemandRegion,
    ProtectionDomain,
    QueuePair,
    QueuePairs,
    RegistrationCache,
    RemoteAccessError,
)
from mmubusd.rpc import EmbeddedServer

ALL = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE
PAGES = 40
LENGTH = PAGES * PAGE_SIZE


class End:
    """One program with its NIC."""

    def __init__(self, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int, domain: ProtectionDomain) -> None:
        self.bus, self.mm, self.at, self.domain = bus, mm, at, domain

    @classmethod
    async def open(cls, bus: mmubus.Bus, name: str) -> End:
        mm = await bus.create_mm(name)
        return cls(bus, mm, await mm.mmap(0, LENGTH), await ProtectionDomain.open(bus, mm))

    async def region(self, kind: str, access: Access = ALL) -> MemoryRegion:
        if kind == "pinned":
            return await self.domain.pin(self.at, LENGTH, access)
        if kind == "on demand":
            region: MemoryRegion = await OnDemandRegion.register(self.bus, self.mm, self.at, LENGTH, access)
        else:
            region = CachedRegion(await RegistrationCache.open(self.bus, self.mm), self.at, LENGTH, access)
        self.domain.add(region)
        return region


class Link:
    """Two ends, connected."""

    def __init__(self, near: End, far: End, pair: QueuePair, pairs: QueuePairs) -> None:
        self.near, self.far, self.pair, self.pairs = near, far, pair, pairs


@pytest.fixture
async def link(server: EmbeddedServer, bus: mmubus.Bus) -> AsyncIterator[Link]:
    async with mmubus.connect(server.address, name="far") as other:
        near, far = await End.open(bus, "near"), await End.open(other, "far")
        pairs = await QueuePairs.listen(far.domain, "127.0.0.1:0")
        pair = await QueuePair.connect(near.domain, pairs.address)
        yield Link(near, far, pair, pairs)
        await pair.close()
        await pairs.close()


@pytest.fixture(params=["pinned", "on demand", "cached"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_bytes_move_in_both_directions(link: Link, kind: str) -> None:
    near, far = link.near, link.far
    local, remote = await near.region("on demand"), await far.region(kind)
    data = random.Random(1).randbytes(20 * PAGE_SIZE)
    await near.mm.store(near.at + 100, data)
    await link.pair.rdma_write(local, near.at + 100, len(data), remote.key, far.at + 77)
    assert await far.mm.load(far.at + 77, len(data)) == data
    await far.mm.store(far.at, b"changed by the far program")
    await link.pair.rdma_read(local, near.at + 5, 26, remote.key, far.at)
    assert await near.mm.load(near.at + 5, 26) == b"changed by the far program"


async def test_send_fills_the_buffers_in_order(link: Link, kind: str) -> None:
    local, remote = await link.near.region("on demand"), await link.far.region(kind)
    accepted = await link.pairs.accept()
    for number in range(3):
        await link.near.mm.store(link.near.at + number * 100, b"message %d" % number)
    sends = [asyncio.create_task(link.pair.send(local, link.near.at + number * 100, 9)) for number in range(3)]
    for number in range(3):
        assert await accepted.receive(remote, link.far.at + number * 100, 100) == 9
    await asyncio.gather(*sends)
    got = [await link.far.mm.load(link.far.at + number * 100, 9) for number in range(3)]
    assert got == [b"message 0", b"message 1", b"message 2"]


async def test_what_may_not_be_done(link: Link, kind: str) -> None:
    local = await link.near.region("on demand")
    remote = await link.far.region(kind, Access.REMOTE_READ)
    far = link.far.at
    for key, address, length, reason in (
        (99, far, 1, "NO_SUCH_REGION"),
        (remote.key, far + LENGTH - 1, 2, "EFAULT"),
        (remote.key, far, 1, "EPERM"),
    ):
        with pytest.raises(RemoteAccessError) as caught:
            await link.pair.rdma_write(local, link.near.at, length, key, address)
        assert caught.value.reason == reason
    with pytest.raises(mmubus.MmError):
        await link.pair.rdma_write(local, link.near.at - 1, 1, remote.key, far)
    await link.pair.rdma_read(local, link.near.at, 10, remote.key, far)


@pytest.mark.parametrize("kind", ["on demand", "cached"])
async def test_unmapped_memory_ends_a_transfer_with_an_error(link: Link, kind: str) -> None:
    local, remote = await link.near.region("on demand"), await link.far.region(kind)
    await link.far.mm.munmap(link.far.at + 20 * PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(RemoteAccessError) as caught:
        await link.pair.rdma_write(local, link.near.at, LENGTH, remote.key, link.far.at)
    assert caught.value.reason == "EFAULT"


@pytest.mark.parametrize("kind", ["on demand", "cached"])
async def test_losing_pages_in_mid_transfer_never_makes_wrong_data(link: Link, kind: str) -> None:
    """Both programs fork, and write back, while bytes move; each frame may be replaced at any moment."""
    near, far = link.near, link.far
    local, remote = await near.region("on demand"), await far.region(kind)
    running = True

    async def churn(end: End) -> None:
        while running:
            child = await end.mm.fork()
            await end.mm.touch(end.at, LENGTH, write=True)  # copies every page: another frame at each address
            await child.exit()

    churning = [asyncio.create_task(churn(end)) for end in (near, far)]
    for turn in range(12):
        data = random.Random(turn).randbytes(LENGTH)
        await near.mm.store(near.at, data)
        await link.pair.rdma_write(local, near.at, LENGTH, remote.key, far.at)
        assert await far.mm.load(far.at, LENGTH) == data
        await near.mm.madvise(near.at, LENGTH, MADV_DONTNEED)
        await link.pair.rdma_read(local, near.at, LENGTH, remote.key, far.at)
        assert await near.mm.load(near.at, LENGTH) == data
    running = False
    await asyncio.gather(*churning)


async def test_a_pinned_region_outlives_its_address(link: Link) -> None:
    """The price of pinning: after a munmap the region still reaches what used to be there."""
    local, remote = await link.near.region("on demand"), await link.far.region("pinned")
    await link.far.mm.store(link.far.at, b"pinned")
    await link.far.mm.munmap(link.far.at, LENGTH)
    assert await link.far.mm.mmap(link.far.at, LENGTH, flags=0x32) == link.far.at
    await link.pair.rdma_read(local, link.near.at, 6, remote.key, link.far.at)
    assert await link.near.mm.load(link.near.at, 6) == b"pinned"
    assert await link.far.mm.load(link.far.at, 6) == bytes(6)


async def test_on_demand_faults_what_is_used_and_refuses_what_must_not_wait(link: Link) -> None:
    region = await OnDemandRegion.register(link.near.bus, link.near.mm, link.near.at, LENGTH, ALL)
    assert await region.read(link.near.at + PAGE_SIZE, 10) == bytes(10)
    assert (len(region.pages), region.faults) == (1, 1)
    await region.prefetch(link.near.at, LENGTH, write=True)
    assert len(region.pages) == PAGES
    await link.near.mm.munmap(link.near.at, PAGE_SIZE)
    assert (len(region.pages), region.invalidations) == (PAGES - 1, 2)  # the zero page was replaced before
    at_once = NotifierRange(1, link.near.at, link.near.at + LENGTH, Reason.UNMAP, False, 0, 1, 1)
    with pytest.raises(mmubus.Refuse):
        region.invalidate_range_start(at_once)
    assert len(region.pages) == PAGES - 1


async def test_on_demand_hands_dirty_pages_over(link: Link) -> None:
    """Written through the window, which nobody sees: the answer to the notice is all there is."""
    file = await link.near.bus.open_file("disk", size=4 * PAGE_SIZE)
    mm = link.near.mm
    at = await mm.mmap(0, 4 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file)
    window = link.near.bus.frame_window(writable=True)
    region = await OnDemandRegion.register(link.near.bus, mm, at, 4 * PAGE_SIZE, ALL, window)
    await region.write(at + 3, b"by the NIC")
    await file.fsync()
    assert region.pages == {}
    await mm.madvise(at, 4 * PAGE_SIZE, MADV_PAGEOUT)
    assert await file.pread(10, 3) == b"by the NIC"


PEER = """
import asyncio, sys, mmubus
from mmubus.drivers.rdma import Access, OnDemandRegion, ProtectionDomain, QueuePairs

async def main(server):
    async with mmubus.connect(server, name="peer") as bus:
        mm = await bus.create_mm("peer")
        at = await mm.mmap(0, 16 * mmubus.PAGE_SIZE)
        domain = await ProtectionDomain.open(bus, mm)
        region = await OnDemandRegion.register(bus, mm, at, 16 * mmubus.PAGE_SIZE, Access(7))
        domain.add(region)
        pairs = await QueuePairs.listen(domain, "127.0.0.1:0")
        print(pairs.address, region.key, at, flush=True)
        while True:
            await mm.madvise(at, 16 * mmubus.PAGE_SIZE, mmubus.MADV_COLD)
            await (await mm.fork()).exit()
            await asyncio.sleep(0.01)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.e2e
async def test_between_two_processes(server: EmbeddedServer, bus: mmubus.Bus) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, server.address, stdout=-1)
    try:
        assert process.stdout is not None
        address, key, remote = (await process.stdout.readline()).decode().split()
        near = await End.open(bus, "near")
        local = await near.region("on demand")
        pair = await QueuePair.connect(near.domain, address)
        data = random.Random(2).randbytes(16 * PAGE_SIZE)
        await near.mm.store(near.at, data)
        await pair.rdma_write(local, near.at, len(data), int(key), int(remote))
        await near.mm.madvise(near.at, len(data), MADV_DONTNEED)
        await pair.rdma_read(local, near.at, len(data), int(key), int(remote))
        assert await near.mm.load(near.at, len(data)) == data
        await pair.close()
    finally:
        process.kill()
        await process.wait()
