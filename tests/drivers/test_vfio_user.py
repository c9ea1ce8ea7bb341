"""DMA_MAP, DMA_UNMAP, and the reply as the guarantee."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator

import mmubus
import pytest
from mmubus import MADV_DONTNEED, PAGE_SIZE, PROT_READ, MmError
from mmubus.drivers.vfio_user import Channel, Device, Vmm
from patience import BUDGET_S

IOVA = 0x1000_0000


class Machine:
    """A VMM and a device on the two ends of a socket."""

    def __init__(self, vmm: Vmm, device: Device, channels: list[Channel]) -> None:
        self.vmm, self.device, self.channels = vmm, device, channels


@pytest.fixture
async def machine(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> AsyncIterator[Machine]:
    ours, theirs = socket.socketpair()
    vmm, device = Vmm(), Device()
    far = device.connect(*await asyncio.open_connection(sock=theirs))
    await bus.register(vmm, mm)
    near = await vmm.connect(*await asyncio.open_connection(sock=ours))
    yield Machine(vmm, device, [near, far])
    for channel in (near, far):
        await channel.close()


async def test_the_device_reaches_what_is_mapped(machine: Machine, mm: mmubus.AddressSpace, at: int) -> None:
    await machine.vmm.dma_map(IOVA, at, 4 * PAGE_SIZE)
    await mm.store(at + 4090, b"from the program")
    assert await machine.device.read(IOVA + 4090, 16) == b"from the program"
    await machine.device.write(IOVA + 5, b"from the device")
    assert await mm.load(at + 5, 15) == b"from the device"
    with pytest.raises(MmError) as caught:
        await machine.device.read(IOVA + 4 * PAGE_SIZE - 1, 2)
    assert caught.value.errno == errno.EFAULT


async def test_nothing_is_reached_after_dma_unmap(machine: Machine, at: int) -> None:
    await machine.vmm.dma_map(IOVA, at, PAGE_SIZE)
    await machine.vmm.dma_unmap(IOVA)
    assert machine.device.regions == {}
    with pytest.raises(MmError):
        await machine.device.read(IOVA, 1)


async def test_one_page_that_goes_costs_the_region_and_comes_back(
    machine: Machine, mm: mmubus.AddressSpace, at: int
) -> None:
    await machine.vmm.dma_map(IOVA, at, 4 * PAGE_SIZE)
    await machine.device.write(IOVA, b"old")
    await machine.device.write(IOVA + PAGE_SIZE, b"kept")
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert machine.vmm.unmaps == 1
    await machine.device.wait_mapped(IOVA, 4 * PAGE_SIZE)
    assert await machine.device.read(IOVA, 3) == bytes(3)
    assert await machine.device.read(IOVA + PAGE_SIZE, 4) == b"kept"


async def test_what_the_program_unmaps_stays_unmapped(machine: Machine, mm: mmubus.AddressSpace, at: int) -> None:
    await machine.vmm.dma_map(IOVA, at, PAGE_SIZE)
    await mm.munmap(at, PAGE_SIZE)
    assert machine.device.regions == {}
    await asyncio.sleep(0.05)
    assert (machine.device.regions, machine.vmm.regions) == ({}, {})


async def test_rights(machine: Machine, mm: mmubus.AddressSpace, at: int) -> None:
    await machine.vmm.dma_map(IOVA, at, PAGE_SIZE, write=False)
    await machine.device.read(IOVA, 1)
    with pytest.raises(MmError):
        await machine.device.write(IOVA, b"x")
    await mm.mprotect(at + PAGE_SIZE, PAGE_SIZE, PROT_READ)
    with pytest.raises(MmError):
        await machine.vmm.dma_map(IOVA + PAGE_SIZE, at + PAGE_SIZE, PAGE_SIZE)


async def test_accesses_under_way_end_before_the_reply(machine: Machine, mm: mmubus.AddressSpace, at: int) -> None:
    """The device answers DMA_UNMAP when it is off the region, and not before; nothing is lost on the way."""
    await machine.vmm.dma_map(IOVA, at, 4 * PAGE_SIZE)
    for turn in range(10):
        await machine.device.wait_mapped(IOVA, 4 * PAGE_SIZE)
        writes = [asyncio.create_task(machine.device.write(IOVA + n * 64, b"%02d" % turn)) for n in range(64)]
        await asyncio.sleep(0)
        child = await mm.fork()
        for done in await asyncio.gather(*writes, return_exceptions=True):
            assert done is None or isinstance(done, MmError), done
        await child.exit()
    assert machine.vmm.unmaps >= 10


async def test_two_invalidations_of_one_region_send_one_command(
    machine: Machine, mm: mmubus.AddressSpace, at: int
) -> None:
    await machine.vmm.dma_map(IOVA, at, 8 * PAGE_SIZE)
    await machine.device.write(IOVA, b"x" * (8 * PAGE_SIZE))
    await asyncio.gather(*(mm.madvise(at + n * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED) for n in range(8)))
    await machine.device.wait_mapped(IOVA, 8 * PAGE_SIZE)
    assert await machine.device.read(IOVA, 8 * PAGE_SIZE) == bytes(8 * PAGE_SIZE)


async def test_a_device_that_has_gone_holds_nothing_up(machine: Machine, mm: mmubus.AddressSpace, at: int) -> None:
    await machine.vmm.dma_map(IOVA, at, PAGE_SIZE)
    await machine.channels[1].close()
    await asyncio.wait_for(mm.munmap(at, PAGE_SIZE), BUDGET_S * 0.8)


async def test_exit(machine: Machine, mm: mmubus.AddressSpace, at: int) -> None:
    await machine.vmm.dma_map(IOVA, at, PAGE_SIZE)
    await mm.exit()
    assert machine.device.regions == {}
