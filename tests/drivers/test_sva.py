"""The IOMMU walks the CPU's table and is flushed; nothing else."""

from __future__ import annotations

import errno

import mmubus
import pytest
from mmubus import MADV_DONTNEED, PAGE_SIZE, PROT_READ, NotifierOp
from mmubus.drivers.sva import Iommu, Pasid
from mmubus.notifier import ops_of


async def test_misses_walk_and_absent_pages_are_requested(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    pasid = await Iommu(bus).bind(mm)
    await mm.store(at, b"there")
    assert await pasid.read(at, 5) == b"there"
    assert (pasid.walks, pasid.page_requests) == (1, 0)
    await pasid.write(at + PAGE_SIZE, b"not there yet")
    assert (pasid.walks, pasid.page_requests) == (2, 1)
    assert await mm.load(at + PAGE_SIZE, 13) == b"not there yet"
    await pasid.read(at, 5)
    assert pasid.walks == 2


async def test_the_iotlb_is_flushed(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    pasid = await Iommu(bus).bind(mm)
    await pasid.write(at, b"old")
    await pasid.read(at + 2 * PAGE_SIZE, 1)
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert list(pasid.iotlb) == [(at >> 12) + 2]
    assert await pasid.read(at, 3) == bytes(3)
    await mm.mprotect(at, PAGE_SIZE, PROT_READ)
    with pytest.raises(mmubus.MmError) as caught:
        await pasid.write(at, b"x")
    assert caught.value.errno == errno.EPERM


def test_flush_only() -> None:
    assert set(ops_of(Pasid(1))) == {NotifierOp.INVALIDATE_RANGE, NotifierOp.RELEASE}


async def test_release_blocks_translation_and_page_requests(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    iommu = Iommu(bus)
    pasid = await iommu.bind(mm)
    await pasid.read(at, 1)
    await mm.exit()
    assert (pasid.blocked, pasid.iotlb) == (True, {})
    with pytest.raises(mmubus.MmError) as caught:
        await pasid.read(at, 1)
    assert caught.value.errno == errno.EFAULT
    await iommu.unbind(pasid)


async def test_devices_share_a_pasid(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    iommu = Iommu(bus)
    one, other = await iommu.bind(mm), await iommu.bind(mm)
    assert one is other
    await iommu.unbind(one)
    assert await other.read(at, 1) == b"\0"
    await iommu.unbind(other)
    assert bus.session.registrations == []
