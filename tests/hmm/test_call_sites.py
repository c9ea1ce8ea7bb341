"""Call sites that the kernel has no case for, over the real server: what a device hears, and what it then sees."""

from __future__ import annotations

import errno

import mmubus
import pytest
from mmubus import (
    MADV_HWPOISON,
    MADV_SOFT_OFFLINE,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_F_ADDR,
    MPOL_F_NODE,
    MPOL_F_STATIC_NODES,
    MPOL_INTERLEAVE,
    MPOL_MF_MOVE,
    PAGE_SIZE,
    PROT_EXEC,
    PROT_READ,
    Bus,
    MmError,
    Op,
)
from mmubus.drivers.hmm import Dmirror, Prot

MISSING, WP_ASYNC = 1, 2 | 8
WP_MATCHING, WRITTEN = 1, 2


async def test_pages_move_to_where_a_userfaultfd_waits_for_them(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    source, target = await mm.mmap(0, 4 * PAGE_SIZE), await mm.mmap(0, 4 * PAGE_SIZE, PROT_READ)
    await mm.mprotect(target, 4 * PAGE_SIZE, 3)
    await mm.uffd_register(target, 4 * PAGE_SIZE, MISSING)
    await device.write(source, b"moved".ljust(PAGE_SIZE, b"\0"))
    assert await mm.uffd_move(target, source, PAGE_SIZE) == PAGE_SIZE
    assert device.table == {}
    assert (await device.read(target, 1)).data[:5] == b"moved"
    assert await device.snapshot(source, 1) == [Prot.NONE]


async def test_what_a_device_has_written_is_found_by_a_scan(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, 8 * PAGE_SIZE)
    await device.write(buffer, bytes(8 * PAGE_SIZE))
    await mm.uffd_register(buffer, 8 * PAGE_SIZE, WP_ASYNC)
    found = await mm.pagemap_scan(buffer, 8 * PAGE_SIZE, WP_MATCHING, WRITTEN)
    assert [region[:2] for region in found] == [(buffer, buffer + 8 * PAGE_SIZE)]
    assert device.table == {}, "it must ask again before it writes"
    at = buffer + 3 * PAGE_SIZE
    await device.write(at, b"again".ljust(PAGE_SIZE, b"\0"))
    found = await mm.pagemap_scan(buffer, 8 * PAGE_SIZE, WP_MATCHING, WRITTEN)
    assert [region[:2] for region in found] == [(at, at + PAGE_SIZE)]


async def test_a_breakpoint_is_seen_by_devices_too(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    file = await bus.open_file("code", size=PAGE_SIZE)
    await file.pwrite(b"\x90" * PAGE_SIZE, 0)
    code = await mm.mmap(0x7000_0000_0000, PAGE_SIZE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, file)
    assert (await device.read(code, 1)).data[16:17] == b"\x90"
    async with bus.operations() as operations:
        assert await operations.run(Op.UPROBE_REGISTER, int(file), 16) == 1
        assert device.table == {}
        assert (await device.read(code, 1)).data[16:17] == b"\xcc"
        assert await operations.run(Op.UPROBE_UNREGISTER, int(file), 16) == 1
        assert device.table == {}
    assert (await device.read(code, 1)).data[16:17] == b"\x90"


async def test_a_hint_is_resolved_by_who_comes_first(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """One node here, so nothing moves; tests/mm/test_numa_balancing has two."""
    buffer = await mm.mmap(0, 4 * PAGE_SIZE)
    await device.write(buffer, bytes(4 * PAGE_SIZE))
    assert await mm.call(Op.NUMA_SCAN, buffer, 4 * PAGE_SIZE, 0) == 0
    assert device.table == {}
    assert (await device.read(buffer, 4)).faults == 1


async def test_a_page_whose_frame_fails_is_lost_to_devices_too(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, 2 * PAGE_SIZE)
    await device.write(buffer, b"x" * (2 * PAGE_SIZE))
    await mm.madvise(buffer + PAGE_SIZE, PAGE_SIZE, MADV_SOFT_OFFLINE)
    assert len(device.table) == 1
    assert (await device.read(buffer + PAGE_SIZE, 1)).data[:1] == b"x"
    await mm.madvise(buffer, PAGE_SIZE, MADV_HWPOISON)
    assert len(device.table) == 1
    with pytest.raises(MmError) as caught:
        await device.read(buffer, 1)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(MmError) as caught:
        await mm.load(buffer, 1)
    assert caught.value.errno == errno.ENXIO


async def test_a_driver_that_tracks_writes_sees_each_again(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    file = await bus.open_file("tracked", size=4 * PAGE_SIZE)
    buffer = await mm.mmap(0, 4 * PAGE_SIZE, flags=MAP_SHARED, file=file)
    await mm.store(buffer, b"x" * (2 * PAGE_SIZE))
    await device.write(buffer, b"y" * PAGE_SIZE)
    assert await file.wp_shared(0, 4 * PAGE_SIZE) == 2
    assert device.table == {}
    assert await file.clean_record(0, 4 * PAGE_SIZE) == 2
    assert await file.clean_record(0, 4 * PAGE_SIZE) == 0
    await device.write(buffer, b"z" * PAGE_SIZE)
    assert await file.clean_record(0, 4 * PAGE_SIZE) == 1
    assert (await file.pread(1, 0)) == b"z"


async def test_others_may_move_and_age_what_a_program_has(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, 2 * PAGE_SIZE)
    await device.write(buffer, b"x" * (2 * PAGE_SIZE))
    cold = mmubus.MadvFlag.MADV_COLD
    assert await mm.process_madvise([(buffer, PAGE_SIZE), (buffer + PAGE_SIZE, PAGE_SIZE)], cold) == 2 * PAGE_SIZE
    assert await mm.migrate_pages(1, 1) == 0  # there is one node
    await mm.mbind(buffer, 2 * PAGE_SIZE, 2, 1, 3)
    with pytest.raises(MmError) as caught:
        await mm.mbind(buffer, 2 * PAGE_SIZE, 2, 2, 3)
    assert caught.value.errno == errno.EINVAL


async def test_policies_are_told_and_pages_that_move_by_them_too(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, 2 * PAGE_SIZE)
    await device.write(buffer, b"x" * (2 * PAGE_SIZE))
    await mm.mbind(buffer, PAGE_SIZE, MPOL_BIND | MPOL_F_STATIC_NODES, 3)
    await mm.set_mempolicy(MPOL_INTERLEAVE, 1)
    assert await mm.get_mempolicy() == (MPOL_INTERLEAVE, 1)
    assert await mm.get_mempolicy(buffer, MPOL_F_ADDR) == (MPOL_BIND | MPOL_F_STATIC_NODES, 3)
    assert await mm.get_mempolicy(buffer, MPOL_F_ADDR | MPOL_F_NODE) == (0, 3)
    assert await mm.get_mempolicy(buffer + PAGE_SIZE, MPOL_F_ADDR) == (MPOL_DEFAULT, 0)
    assert [mapping.end - mapping.start for mapping in await mm.maps()] == [PAGE_SIZE, PAGE_SIZE]
    await mm.set_mempolicy_home_node(buffer, PAGE_SIZE, 0)
    assert device.table
    await mm.mbind(buffer, 2 * PAGE_SIZE, MPOL_DEFAULT, 0, MPOL_MF_MOVE)
    assert device.table == {}, "every page has gone to another frame"
    assert len(await mm.maps()) == 1
    assert (await device.read(buffer, 1)).data[:1] == b"x"
