"""The cases of tools/testing/selftests/mm/hmm-tests.c, 29 as of v6.12 and 9 since, in its order and under its names.

Buffers have 160 pages instead of 1024: more than two of the device's pieces of 64. The variant is "private";
test_coherent has the other.
"""

from __future__ import annotations

import asyncio
import errno

import mmubus
import pytest
from mmubus import (
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    Bus,
    FileKind,
    MmError,
)
from mmubus.drivers.hmm import Dmirror, Prot
from mmubusd.rpc import EmbeddedServer

PAGES = 160
SIZE = PAGES * PAGE_SIZE
RW = PROT_READ | PROT_WRITE
HUGE = 2 << 20


def pattern(pages: int = PAGES, seed: int = 0) -> bytes:
    return b"".join((seed + at).to_bytes(8, "little") * 512 for at in range(pages))


async def filled(mm: mmubus.AddressSpace, flags: int = MAP_PRIVATE | MAP_ANONYMOUS) -> int:
    """ "std": an anonymous buffer with the pattern."""
    buffer = await mm.mmap(0, SIZE, RW, flags)
    await mm.store(buffer, pattern())
    return buffer


async def opened(bus: Bus, mm: mmubus.AddressSpace) -> Dmirror:
    device = Dmirror()
    await bus.register(device, mm)
    return device


async def test_01_open_close(bus: Bus, mm: mmubus.AddressSpace) -> None:
    device = await opened(bus, mm)
    assert device.registration is not None
    await device.registration.unregister()


async def test_02_anon_read(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, SIZE)
    await mm.load(buffer + PAGE_SIZE, 1)
    await mm.store(buffer + 2 * PAGE_SIZE, pattern(PAGES - 2))
    await mm.mprotect(buffer, SIZE, PROT_READ)
    copied = await device.read(buffer, PAGES)
    assert (copied.pages, copied.faults) == (PAGES, 1)
    assert copied.data == bytes(2 * PAGE_SIZE) + pattern(PAGES - 2)


async def test_03_anon_read_prot(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await mm.mprotect(buffer, SIZE, PROT_NONE)
    with pytest.raises(MmError) as caught:
        await device.read(buffer, PAGES)
    assert caught.value.errno == errno.EFAULT
    assert device.table == {}
    await mm.mprotect(buffer, SIZE, RW)
    assert await mm.load(buffer, SIZE) == pattern()


async def test_04_anon_write(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, SIZE)
    copied = await device.write(buffer, pattern())
    assert (copied.pages, copied.faults) == (PAGES, 1)
    assert await mm.load(buffer, SIZE) == pattern()


async def test_05_anon_write_prot(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, SIZE, PROT_READ)
    assert (await device.read(buffer, 1)).faults == 1
    with pytest.raises(MmError) as caught:
        await device.write(buffer, pattern())
    assert caught.value.errno == errno.EPERM
    assert await mm.load(buffer, SIZE) == bytes(SIZE)
    await mm.mprotect(buffer, SIZE, RW)
    assert (await device.write(buffer, pattern())).faults == 1
    assert await mm.load(buffer, SIZE) == pattern()


async def test_06_anon_write_child(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    child = await mm.fork()
    await (await opened(bus, child)).write(buffer, pattern(seed=1000))
    assert await child.load(buffer, SIZE) == pattern(seed=1000)
    assert await mm.load(buffer, SIZE) == pattern()


async def test_07_anon_write_child_shared(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm, MAP_SHARED | MAP_ANONYMOUS)
    child = await mm.fork()
    await (await opened(bus, child)).write(buffer, pattern(seed=1000))
    assert await mm.load(buffer, SIZE) == pattern(seed=1000)


async def huge_buffer(mm: mmubus.AddressSpace) -> int:
    """A huge page's worth of memory, aligned, that asks for one."""
    area = await mm.mmap(0, 2 * HUGE)
    aligned = (area + HUGE - 1) & -HUGE
    await mm.madvise(aligned, HUGE, MADV_HUGEPAGE)
    return aligned


async def test_08_anon_write_huge(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await huge_buffer(mm)
    copied = await device.write(buffer, pattern(512))
    assert (copied.pages, copied.faults) == (512, 1)
    assert await mm.load(buffer, HUGE) == pattern(512)


async def test_09_anon_write_hugetlbfs(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, HUGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    copied = await device.write(buffer, pattern(512))
    assert (copied.pages, copied.faults) == (512, 1)
    assert await mm.load(buffer, HUGE) == pattern(512)


async def test_10_file_read(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    file = await bus.open_file("f", size=SIZE)
    await file.pwrite(pattern(), 0)
    buffer = await mm.mmap(0, SIZE, PROT_READ, MAP_SHARED, file)
    copied = await device.read(buffer, PAGES)
    assert (copied.data, copied.faults) == (pattern(), 1)


async def test_11_file_write(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    file = await bus.open_file("f", size=SIZE)
    buffer = await mm.mmap(0, SIZE, RW, MAP_SHARED, file)
    assert (await device.write(buffer, pattern())).faults == 1
    assert await file.pread(SIZE, 0) == pattern()


async def test_12_migrate(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    copied = await device.migrate_to_dev(buffer, PAGES)
    assert (copied.pages, copied.data) == (PAGES, pattern())


async def test_13_migrate_file_private(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    file = await bus.open_file("f", size=SIZE)
    buffer = await mm.mmap(0, SIZE, RW, MAP_PRIVATE, file)
    await mm.store(buffer, pattern())
    copied = await device.migrate_to_dev(buffer, PAGES)
    assert (copied.pages, copied.data) == (PAGES, pattern())


async def test_14_migrate_fault(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    assert await mm.load(buffer, SIZE // 2) == pattern()[: SIZE // 2]
    copied = await device.migrate_to_dev(buffer, PAGES)
    assert (copied.pages, copied.data) == (PAGES, pattern())


async def test_15_migrate_release(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    assert await device.release_device() == PAGES
    assert await device.snapshot(buffer, PAGES) == [Prot.WRITE] * PAGES
    assert await mm.load(buffer, SIZE) == pattern()


async def test_16_migrate_shared(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, SIZE, RW, MAP_SHARED | MAP_ANONYMOUS)
    with pytest.raises(MmError) as caught:
        await device.migrate_to_dev(buffer, PAGES)
    assert caught.value.errno == errno.ENOENT


async def test_17_migrate_mixed(mm: mmubus.AddressSpace, device: Dmirror, second: Dmirror) -> None:
    """Device 1 of the kernel's case is `device`, device 0 is `second`."""
    buffer = await mm.mmap(0, 6 * PAGE_SIZE, PROT_NONE)
    with pytest.raises(MmError) as caught:
        await device.migrate_to_dev(buffer, 6)
    assert caught.value.errno == errno.EINVAL
    await mm.munmap(buffer + PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(MmError) as caught:
        await device.migrate_to_dev(buffer, 3)
    assert caught.value.errno == errno.EINVAL
    await mm.mprotect(buffer + 2 * PAGE_SIZE, PAGE_SIZE, PROT_READ)
    await mm.load(buffer + 2 * PAGE_SIZE, 1)  # the zero page
    await mm.mprotect(buffer + 3 * PAGE_SIZE, 3 * PAGE_SIZE, RW)
    await mm.store(buffer + 3 * PAGE_SIZE, pattern(3))
    await mm.mprotect(buffer + 3 * PAGE_SIZE, PAGE_SIZE, PROT_READ)
    copied = await device.migrate_to_dev(buffer + 2 * PAGE_SIZE, 4)
    assert copied.pages == 4
    with pytest.raises(MmError) as caught:
        await second.migrate_to_dev(buffer + 5 * PAGE_SIZE, 1)
    assert caught.value.errno == errno.ENOENT
    assert await mm.load(buffer + 3 * PAGE_SIZE, 3 * PAGE_SIZE) == pattern(3)


async def test_18_migrate_multiple(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    for turn in range(10):
        buffer = await mm.mmap(0, SIZE)
        await mm.store(buffer, pattern(seed=turn))
        assert (await device.migrate_to_dev(buffer, PAGES)).data == pattern(seed=turn)
        assert await mm.load(buffer, SIZE) == pattern(seed=turn)
        await mm.munmap(buffer, SIZE)


async def test_19_anon_read_multiple(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    for turn in range(10):
        buffer = await mm.mmap(0, SIZE)
        await mm.store(buffer, pattern(seed=turn))
        assert (await device.read(buffer, PAGES)).data == pattern(seed=turn)
        await mm.munmap(buffer, SIZE)
        assert device.table == {}


async def test_20_anon_teardown(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    for turn in range(10):
        buffer = await filled(mm)
        unmapping = asyncio.ensure_future(mm.munmap(buffer + SIZE // 2, SIZE // 2))
        read, _ = await asyncio.gather(device.read(buffer, PAGES), unmapping, return_exceptions=True)
        if isinstance(read, MmError):
            assert read.errno == errno.EFAULT
        else:
            assert not isinstance(read, BaseException)
            assert read.data == pattern(), f"turn {turn}: all of it, and right"
        await mm.munmap(buffer, SIZE // 2)
        assert device.table == {}


async def test_21_mixedmap(bus: Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """A page that a driver inserted: here the frame of an execute-in-place medium, which is in no page cache."""
    file = await bus.open_file("medium", kind=FileKind.XIP, size=PAGE_SIZE)
    await file.pwrite(b"medium", 0)
    buffer = await mm.mmap(0, PAGE_SIZE, PROT_READ, MAP_PRIVATE, file)
    await mm.load(buffer, 1)
    assert await device.snapshot(buffer, 1) == [Prot.READ]


async def one_of_each(mm: mmubus.AddressSpace, device: Dmirror, second: Dmirror) -> int:
    """Seven pages: no right, a hole, the zero page, to be read, to be written, on the device, on the second one."""
    buffer = await mm.mmap(0, 7 * PAGE_SIZE, PROT_NONE)
    await mm.munmap(buffer + PAGE_SIZE, PAGE_SIZE)
    await mm.mprotect(buffer + 2 * PAGE_SIZE, PAGE_SIZE, PROT_READ)
    await mm.load(buffer + 2 * PAGE_SIZE, 1)
    await mm.mprotect(buffer + 3 * PAGE_SIZE, 4 * PAGE_SIZE, RW)
    await mm.store(buffer + 3 * PAGE_SIZE, pattern(4))
    await mm.mprotect(buffer + 3 * PAGE_SIZE, PAGE_SIZE, PROT_READ)
    await device.migrate_to_dev(buffer + 5 * PAGE_SIZE, 1)
    await second.migrate_to_dev(buffer + 6 * PAGE_SIZE, 1)
    return buffer


async def test_22_snapshot(mm: mmubus.AddressSpace, device: Dmirror, second: Dmirror) -> None:
    buffer = await one_of_each(mm, device, second)
    assert await device.snapshot(buffer, 7) == [
        Prot.ERROR,
        Prot.ERROR,
        Prot.ZERO | Prot.READ,
        Prot.READ,
        Prot.WRITE,
        Prot.PRIV_LOCAL | Prot.WRITE,
        Prot.NONE,
    ]
    assert await second.snapshot(buffer + 6 * PAGE_SIZE, 1) == [Prot.PRIV_LOCAL | Prot.WRITE]


async def test_23_compound(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, HUGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    await mm.store(buffer, pattern(512))
    assert await device.snapshot(buffer, 512) == [Prot.WRITE | Prot.PMD] * 512
    await mm.mprotect(buffer, HUGE, PROT_READ)
    assert await device.snapshot(buffer, 512) == [Prot.READ | Prot.PMD] * 512


async def test_24_double_map(mm: mmubus.AddressSpace, device: Dmirror, second: Dmirror) -> None:
    buffer = await filled(mm)
    await mm.mprotect(buffer, SIZE, PROT_READ)
    for each in (device, second):
        copied = await each.read(buffer, PAGES)
        assert (copied.data, copied.faults) == (pattern(), 1)
    assert (await device.migrate_to_dev(buffer, PAGES)).pages == PAGES
    copied = await second.read(buffer, PAGES)
    assert (copied.data, copied.faults) == (pattern(), 1), "its mapping had been invalidated"
    assert await mm.load(buffer, SIZE) == pattern()


async def test_25_exclusive(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    copied = await device.exclusive(buffer, PAGES)
    assert (copied.pages, copied.data) == (PAGES, pattern())
    with pytest.raises(MmError) as caught:
        device.check_exclusive(buffer, PAGES)
    assert caught.value.errno == errno.EPERM
    for page in range(PAGES):
        await mm.store(buffer + page * PAGE_SIZE, (page + 1).to_bytes(8, "little"))
    device.check_exclusive(buffer, PAGES)


async def test_26_exclusive_mprotect(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await device.exclusive(buffer, PAGES)
    await mm.mprotect(buffer, SIZE, PROT_READ)
    with pytest.raises(MmError) as caught:
        await device.write(buffer, pattern(seed=9))
    assert caught.value.errno == errno.EPERM


async def test_27_exclusive_cow(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await device.exclusive(buffer, PAGES)
    child = await mm.fork()
    for page in (0, PAGES - 1):
        at = buffer + page * PAGE_SIZE
        await mm.store(at, b"parent!!")
        assert await child.load(at, 8) == page.to_bytes(8, "little")
        await child.store(at, b"child!!!")
        assert await mm.load(at, 8) == b"parent!!"


async def test_28_hmm_gup_test(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """Pins of migrated pages; basic and fast get_user_pages end in the same fault as a load."""
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    await mm.load(buffer, 2 * PAGE_SIZE)
    assert device.registration is not None
    pin = await device.registration.pin(buffer + 2 * PAGE_SIZE, buffer + 4 * PAGE_SIZE, True)
    assert await device.snapshot(buffer, 4) == [Prot.WRITE] * 4, "all are system memory"
    assert (await device.snapshot(buffer + 4 * PAGE_SIZE, 1)) == [Prot.PRIV_LOCAL | Prot.WRITE]
    with pytest.raises(MmError) as caught:
        await device.migrate_to_dev(buffer + 2 * PAGE_SIZE, 2)
    assert caught.value.errno == errno.ENOENT, "a pinned page does not move"
    await pin.unpin()
    assert await mm.load(buffer, SIZE) == pattern()


async def test_29_hmm_cow_in_device(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await filled(mm)
    await device.migrate_to_dev(buffer, PAGES)
    child = await mm.fork()
    for page in range(PAGES):
        await mm.store(buffer + page * PAGE_SIZE, b"parent!!")
    assert await device.snapshot(buffer, PAGES) == [Prot.WRITE] * PAGES
    assert await child.load(buffer, SIZE) == pattern()


async def test_30_migrate_anon_huge_empty(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await huge_buffer(mm)
    await mm.mprotect(buffer, HUGE, PROT_READ)
    assert (await device.migrate_to_dev(buffer, 512)).data == bytes(HUGE)


async def test_31_migrate_anon_huge_zero(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await huge_buffer(mm)
    await mm.load(buffer, 1)
    assert (await device.migrate_to_dev(buffer, 512)).data == bytes(HUGE)
    await device.write(buffer, pattern(512))
    assert await mm.load(buffer, HUGE) == pattern(512)


async def test_32_migrate_anon_huge_free(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await huge_buffer(mm)
    await mm.store(buffer, pattern(512))
    await device.migrate_to_dev(buffer, 512)
    await mm.madvise(buffer, HUGE, 8)
    assert await mm.load(buffer, HUGE) in (pattern(512), bytes(HUGE))


async def test_33_migrate_anon_huge_fault(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await huge_buffer(mm)
    await mm.store(buffer, pattern(512))
    assert (await device.migrate_to_dev(buffer, 512)).data == pattern(512)
    assert await device.snapshot(buffer, 512) == [Prot.PRIV_LOCAL | Prot.WRITE | Prot.PMD] * 512
    assert await mm.pagemap(buffer, buffer + HUGE) == []
    assert await mm.load(buffer, HUGE) == pattern(512)
    assert await device.snapshot(buffer, 512) == [Prot.WRITE | Prot.PMD] * 512


@pytest.mark.parametrize("at", [0, 128, 256])
async def test_34_migrate_partial_unmap_fault(mm: mmubus.AddressSpace, device: Dmirror, at: int) -> None:
    buffer = await huge_buffer(mm)
    await mm.store(buffer, pattern(512))
    await device.migrate_to_dev(buffer, 512)
    start, end = at * PAGE_SIZE, (at + 128) * PAGE_SIZE
    await mm.munmap(buffer + start, end - start)
    want = pattern(512)
    if start:
        assert await mm.load(buffer, start) == want[:start]
    assert await mm.load(buffer + end, HUGE - end) == want[end:]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("before", [False, True])
async def test_35_migrate_remap_fault(mm: mmubus.AddressSpace, device: Dmirror, keep: bool, before: bool) -> None:
    buffer = await huge_buffer(mm)
    await mm.store(buffer, pattern(512))
    target = await mm.mmap(0, HUGE, PROT_NONE)
    flags = 1 | 2 | (4 if keep else 0)
    if before:
        await mm.mremap(buffer, HUGE, HUGE, flags, target)
        await device.migrate_to_dev(target, 512)
    else:
        await device.migrate_to_dev(buffer, 512)
        await mm.mremap(buffer, HUGE, HUGE, flags, target)
    assert await mm.load(target, HUGE) == pattern(512)


async def leave_no_room(server: EmbeddedServer, bus: Bus) -> None:
    """Another program has a page of each block of 2 MiB: no huge page can be had, though most frames are free."""
    free = server.server.driver.memory.frames.free_nr
    other = await bus.create_mm("other")
    base = await other.mmap(0, free * PAGE_SIZE)
    await other.madvise(base, free * PAGE_SIZE, MADV_POPULATE_WRITE)
    for page in range(0, free, 256):
        await other.munmap(base + (page + 1) * PAGE_SIZE, 255 * PAGE_SIZE)


@pytest.mark.parametrize("returning", [False, True])
async def test_36_migrate_anon_huge_err(
    server: EmbeddedServer, bus: Bus, mm: mmubus.AddressSpace, device: Dmirror, returning: bool
) -> None:
    buffer = await huge_buffer(mm)
    await mm.store(buffer, pattern(512))
    if returning:
        await device.migrate_to_dev(buffer, 512)
    await leave_no_room(server, bus)
    if not returning:
        assert (await device.migrate_to_dev(buffer, 512)).data == pattern(512)
        assert await device.snapshot(buffer, 512) == [Prot.PRIV_LOCAL | Prot.WRITE] * 512
    assert await mm.load(buffer, HUGE) == pattern(512)
    assert await device.snapshot(buffer, 512) == [Prot.WRITE] * 512


async def test_37_migrate_anon_huge_zero_err(
    server: EmbeddedServer, bus: Bus, mm: mmubus.AddressSpace, device: Dmirror
) -> None:
    buffer = await huge_buffer(mm)
    await mm.load(buffer, 1)
    await leave_no_room(server, bus)
    assert (await device.migrate_to_dev(buffer, 512)).data == bytes(HUGE)
    assert await device.snapshot(buffer, 512) == [Prot.PRIV_LOCAL | Prot.WRITE] * 512
    await device.write(buffer, pattern(512))
    assert await mm.load(buffer, HUGE) == pattern(512)


async def test_38_benchmark_thp_migration(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """What it times is in tests/benchmarks/bench_mm.py; here is what it moves, and how often it is told of that."""
    told = []
    for advice in (MADV_NOHUGEPAGE, MADV_HUGEPAGE):
        buffer = await huge_buffer(mm)
        await mm.madvise(buffer, HUGE, advice)
        await mm.store(buffer, pattern(512))
        before = device.invalidations
        for _ in range(3):
            assert (await device.migrate_to_dev(buffer, 512)).data == pattern(512)
            assert await device.migrate_to_sys(buffer, 512) == 512
        told.append(device.invalidations - before)
        assert await mm.load(buffer, HUGE) == pattern(512)
    small, huge = told
    assert huge == 3 * 2
    assert small == huge * 512 // 64
