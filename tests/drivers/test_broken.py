"""Every broken variant is found out, and the report names what happened."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, suppress
from typing import Any

import mmubus
import pytest
from drivers import broken
from mmubus import MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT, PAGE_SIZE, MmError, StaleTranslation
from mmubus.drivers.gru import Gru
from mmubus.drivers.kvm import MemorySlot
from mmubus.drivers.rdma import Access, CachedRegion, OnDemandRegion
from mmubus.drivers.vfio_user import Device
from mmubus.drivers.xpmem import Importer
from mmubusd.rpc import EmbeddedServer
from patience import until

ALL = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE


def names(error: StaleTranslation, operation: str) -> None:
    """The refusal tells which operation took the page."""
    assert operation in f"{error.taken_by} {error.message}", error


async def test_kvm_samples_the_sequence_late(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    vm = broken.SamplesTheSequenceLate()
    await bus.register(vm, mm)
    await vm.set_memory_slot(MemorySlot(0, 0, at, 16))
    await mm.store(at, b"old")
    load = asyncio.create_task(vm.load(0, 3))
    await vm.slow.granted.wait()
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    await until(lambda: vm.in_progress == 0)  # its end has come, too
    vm.slow.go.set()
    with pytest.raises(StaleTranslation) as caught:
        await load
    names(caught.value, "madvise")


async def test_gru_has_a_flag_instead_of_a_count(
    server: EmbeddedServer, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int
) -> None:
    """Two ranges are being invalidated; a slow client keeps the second open when the first one's end comes."""
    gru = Gru(bus)
    context = broken.FlagInsteadOfCounter(gru, mm.id)
    context.slow = broken.Slow()
    await bus.register(context, mm)
    await mm.store(at, b"x" * (4 * PAGE_SIZE))

    class SlowClient(mmubus.Notifier):
        slips = ("age_page", "invalidate_range_end")
        may_go, told = asyncio.Event(), asyncio.Event()

        async def invalidate_range_start(self, range: mmubus.NotifierRange) -> None:
            self.told.set()
            await self.may_go.wait()

    SlowClient.may_go, SlowClient.told = asyncio.Event(), asyncio.Event()
    async with mmubus.connect(server.address, name="slow") as other:
        await other.register(SlowClient(), mm, start=at, end=at + PAGE_SIZE)
        load = asyncio.create_task(context.load(at, 1))
        await context.slow.granted.wait()
        second = asyncio.create_task(mm.madvise(at, PAGE_SIZE, MADV_DONTNEED))
        await SlowClient.told.wait()
        await mm.madvise(at + 2 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        await until(lambda: context.range_active == 0)  # the first one's end
        context.slow.go.set()
        with suppress(asyncio.TimeoutError, StaleTranslation):
            await asyncio.wait_for(asyncio.shield(load), 0.1)
        assert context.range_active == 0  # while the range is being taken away
        SlowClient.may_go.set()
        await second
        with pytest.raises(StaleTranslation) as caught:
            await context.load(at, 1)
        names(caught.value, "madvise")
        await asyncio.gather(load, return_exceptions=True)


@pytest.mark.parametrize("by", ["rmap", "range"])
async def test_xpmem_acknowledges_before_the_importers(
    bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int, by: Any
) -> None:
    async with AsyncExitStack() as stack:
        exporter = broken.AcknowledgesBeforeTheImporters(bus)
        stack.push_async_callback(exporter.close)
        importer = await Importer.connect(await exporter.serve("127.0.0.1:0"))
        stack.push_async_callback(importer.close)
        attached = await importer.attach(await exporter.make(mm, at, PAGE_SIZE, by=by))
        await attached.write(0, b"x")
        await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
        with pytest.raises(StaleTranslation, match="page 0 of segment 1 was recalled"):
            await attached.read(0, 1)


async def lazily_freed(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int, kind: type[OnDemandRegion]) -> bytes:
    """The device writes to a page that the program said it may lose, unless somebody writes to it; then it is lost."""
    first = await OnDemandRegion.register(bus, mm, at, PAGE_SIZE)
    region = await kind.register(bus, mm, at, PAGE_SIZE, ALL, bus.frame_window(writable=True))
    assert first.registration is not None
    await first.registration.unregister()
    await mm.store(at, b"program")
    await mm.madvise(at, PAGE_SIZE, MADV_FREE)
    await region.read(at, 1)
    await region.write(at, b"device!")
    await mm.madvise(at, PAGE_SIZE, MADV_PAGEOUT)
    return await mm.load(at, 7)


async def test_on_demand_forgets_dirty(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    assert await lazily_freed(bus, mm, at, OnDemandRegion) == b"device!"
    assert await lazily_freed(bus, mm, at + PAGE_SIZE, broken.ForgetsDirty) != b"device!"


async def test_on_demand_hands_dirty_over_twice(
    server: EmbeddedServer, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int
) -> None:
    region = await broken.HandsDirtyOverTwice.register(bus, mm, at, 4 * PAGE_SIZE, ALL)
    await region.write(at, b"x")
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    await region.read(at + PAGE_SIZE, 1)
    await mm.madvise(at + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    counters = server.server.driver.bus.counters
    assert counters.dirty_unheld >= 1
    counters.dirty_unheld = 0


async def test_rcache_hits_on_the_same_address(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    """Pinned frames are nobody else's, so nothing can be refused: what the device reads is simply wrong."""
    cache = await broken.HitsOnTheSameAddress.open(bus, mm)
    region = CachedRegion(cache, at, PAGE_SIZE, ALL)
    await mm.store(at, b"old")
    assert await region.read(at, 3) == b"old"
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    await mm.store(at, b"new")
    assert await region.read(at, 3) == b"old"
    assert cache.statistics.hits == 1


async def test_hmm_ignores_protection(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    device = broken.IgnoresProtection()
    await bus.register(device, mm)
    await device.write(at, b"x" * PAGE_SIZE)
    await mm.fork()
    with pytest.raises(StaleTranslation) as caught:
        await device.write(at, b"y" * PAGE_SIZE)
    names(caught.value, "fork")


async def test_hmm_ignores_the_old_place_of_a_move(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    device = broken.IgnoresTheOldPlace()
    await bus.register(device, mm)
    await device.write(at, b"x" * PAGE_SIZE)
    device.moves = True
    await mm.mremap(at, PAGE_SIZE, PAGE_SIZE, mmubus.MREMAP_MAYMOVE | mmubus.MREMAP_FIXED, at + 64 * PAGE_SIZE)
    with pytest.raises(StaleTranslation) as caught:
        await device.read(at, 1)
    names(caught.value, "mremap")


async def test_sva_lacks_an_op(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    pasid = broken.LacksAnOp(mm.id)
    with pytest.warns(RuntimeWarning, match="invalidate_range is missing: munmap"):
        await bus.register(pasid, mm)
    await pasid.write(at, b"x")
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    with pytest.raises(StaleTranslation) as caught:
        await pasid.read(at, 1)
    names(caught.value, "madvise")


async def test_vfio_user_does_not_wait_for_the_reply(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    """The device answers late, and reads on until then."""
    ours, theirs = socket.socketpair()
    vmm, device = broken.DoesNotWaitForTheReply(), Device()
    far = device.connect(*await asyncio.open_connection(sock=theirs))
    await bus.register(vmm, mm)
    near = await vmm.connect(*await asyncio.open_connection(sock=ours))
    await vmm.dma_map(0, at, PAGE_SIZE)
    assert vmm.registration is not None
    refused: list[StaleTranslation] = []
    dma_read = vmm.registration.dma_read

    async def noted(*args: Any, **options: Any) -> bytes:
        try:
            return await dma_read(*args, **options)
        except StaleTranslation as error:
            refused.append(error)
            raise

    vmm.registration.dma_read = noted  # type: ignore[method-assign]
    await device.write(0, b"old")
    device.regions[0].in_flight += 1  # it is not off the region yet
    window = device.regions[0]
    window.idle.clear()
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    device.regions[0] = window
    with pytest.raises(MmError):
        await device.read(0, 3)
    names(refused[0], "madvise")
    window.idle.set()
    for channel in (near, far):
        await channel.close()
    await asyncio.gather(vmm.sent, return_exceptions=True)
