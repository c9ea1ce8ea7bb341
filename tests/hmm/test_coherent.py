"""The kernel's HMM cases again, in the variant "coherent": the device's own memory is reached by the CPU, too.

Cases that do not depend on the variant are those of test_cases, with coherent devices. Kernel:
tools/testing/selftests/mm/hmm-tests.c, FIXTURE_VARIANT(hmm_device_coherent), v6.12.
"""

from __future__ import annotations

import errno

import mmubus
import pytest
from hmm.test_cases import (
    HUGE,
    PAGES,
    SIZE,
    filled,
    huge_buffer,
    one_of_each,
    pattern,
    test_12_migrate,
    test_13_migrate_file_private,
    test_14_migrate_fault,
    test_15_migrate_release,
    test_16_migrate_shared,
    test_17_migrate_mixed,
    test_24_double_map,
    test_25_exclusive,
    test_27_exclusive_cow,
    test_29_hmm_cow_in_device,
    test_30_migrate_anon_huge_empty,
    test_31_migrate_anon_huge_zero,
    test_34_migrate_partial_unmap_fault,
    test_35_migrate_remap_fault,
)
from mmubus import MADV_COLD, MADV_FREE, MADV_PAGEOUT, PAGE_SIZE, Bus, MmError, Op
from mmubus.drivers.hmm import Dmirror, Prot

__all__ = [
    "test_12_migrate",
    "test_13_migrate_file_private",
    "test_14_migrate_fault",
    "test_15_migrate_release",
    "test_16_migrate_shared",
    "test_17_migrate_mixed",
    "test_24_double_map",
    "test_25_exclusive",
    "test_27_exclusive_cow",
    "test_29_hmm_cow_in_device",
    "test_30_migrate_anon_huge_empty",
    "test_31_migrate_anon_huge_zero",
    "test_34_migrate_partial_unmap_fault",
    "test_35_migrate_remap_fault",
]


@pytest.fixture
async def device(bus: Bus, mm: mmubus.AddressSpace) -> Dmirror:
    opened = Dmirror(coherent=True)
    await bus.register(opened, mm)
    return opened


@pytest.fixture
async def second(bus: Bus, mm: mmubus.AddressSpace) -> Dmirror:
    opened = Dmirror(coherent=True)
    await bus.register(opened, mm)
    return opened


async def test_18_migrate_multiple(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    for turn in range(10):
        buffer = await mm.mmap(0, SIZE)
        await mm.store(buffer, pattern(seed=turn))
        assert (await device.migrate_to_dev(buffer, PAGES)).data == pattern(seed=turn)
        assert await mm.load(buffer, SIZE) == pattern(seed=turn), "the CPU reaches it there"
        assert await device.migrate_to_sys(buffer, PAGES) == PAGES
        assert await device.snapshot(buffer, PAGES) == [Prot.WRITE] * PAGES
        assert await mm.load(buffer, SIZE) == pattern(seed=turn)
        await mm.munmap(buffer, SIZE)


async def test_22_snapshot(mm: mmubus.AddressSpace, device: Dmirror, second: Dmirror) -> None:
    buffer = await one_of_each(mm, device, second)
    assert await device.snapshot(buffer, 7) == [
        Prot.ERROR,
        Prot.ERROR,
        Prot.ZERO | Prot.READ,
        Prot.READ,
        Prot.WRITE,
        Prot.COH_LOCAL | Prot.WRITE,
        Prot.COH_REMOTE | Prot.WRITE,
    ]
    assert await second.snapshot(buffer + 6 * PAGE_SIZE, 1) == [Prot.COH_LOCAL | Prot.WRITE]


async def test_28_hmm_gup_test(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """A load, which is what a short get_user_pages ends in, leaves the first two on the device; a long pin does not."""
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    await mm.load(buffer, 2 * PAGE_SIZE)
    assert device.registration is not None
    pin = await device.registration.pin(buffer + 2 * PAGE_SIZE, buffer + 4 * PAGE_SIZE, True)
    on_device, in_system = Prot.COH_LOCAL | Prot.WRITE, Prot.WRITE
    assert await device.snapshot(buffer, 5) == [on_device, on_device, in_system, in_system, on_device]
    with pytest.raises(MmError) as caught:
        await device.migrate_to_dev(buffer + 2 * PAGE_SIZE, 2)
    assert caught.value.errno == errno.ENOENT, "a pinned page does not move"
    await pin.unpin()
    assert await mm.load(buffer, SIZE) == pattern()


async def test_a_touched_page_stays_on_the_device(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    before = device.invalidations
    await mm.store(buffer, b"by the CPU")
    assert (await device.read(buffer, 1)).data[:10] == b"by the CPU"
    await device.write(buffer, b"by the device".ljust(PAGE_SIZE, b"\0"))
    assert await mm.load(buffer, 13) == b"by the device"
    assert device.invalidations == before, "nobody had to let go of anything"
    assert await device.snapshot(buffer, PAGES) == [Prot.COH_LOCAL | Prot.WRITE] * PAGES


async def test_another_device_reaches_it_there(mm: mmubus.AddressSpace, device: Dmirror, second: Dmirror) -> None:
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    copied = await second.read(buffer, PAGES)
    assert (copied.data, copied.faults) == (pattern(), 1)
    assert await second.snapshot(buffer, 1) == [Prot.COH_REMOTE | Prot.WRITE]


async def test_what_is_selected_comes_back(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """One device with both kinds of memory: only the kind that is named comes back."""
    buffer = await filled(mm)
    registration = device.registration
    assert registration is not None
    middle, end = buffer + 10 * PAGE_SIZE, buffer + 20 * PAGE_SIZE
    await registration.migrate_to_device(buffer, middle, coherent=True)
    await registration.migrate_to_device(middle, end)
    assert await registration.migrate_to_system(buffer, end) == 10, "the private ones"
    assert await device.snapshot(buffer, 20) == [Prot.COH_LOCAL | Prot.WRITE] * 10 + [Prot.WRITE] * 10
    assert await registration.migrate_to_system(buffer, end, coherent=True) == 20


async def test_the_machine_leaves_it_alone(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """A page of a device is not aged, put into swap, freed lazily or moved to another node."""
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    before = device.invalidations
    for advice in (MADV_COLD, MADV_PAGEOUT):
        await mm.madvise(buffer, SIZE, advice)
    assert await mm.call(Op.MOVE_PAGES, buffer, SIZE, 0) == 0
    assert device.invalidations == before
    await mm.madvise(buffer, SIZE, MADV_FREE)  # tells of the range as ever
    assert await device.snapshot(buffer, PAGES) == [Prot.COH_LOCAL | Prot.WRITE] * PAGES
    assert await mm.load(buffer, SIZE) == pattern()


async def test_33_migrate_anon_huge_fault(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await huge_buffer(mm)
    await mm.store(buffer, pattern(512))
    assert (await device.migrate_to_dev(buffer, 512)).data == pattern(512)
    assert await device.snapshot(buffer, 512) == [Prot.COH_LOCAL | Prot.WRITE] * 512
    assert sum(run.end - run.start for run in await mm.pagemap(buffer, buffer + HUGE)) == HUGE, "the CPU has them"
    assert await mm.load(buffer, HUGE) == pattern(512)
