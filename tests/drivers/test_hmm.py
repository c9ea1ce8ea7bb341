"""The cases of tools/testing/selftests/mm/hmm-tests.c that need neither migration, exclusive access nor huge pages."""

from __future__ import annotations

import asyncio
import errno

import mmubus
import pytest
from mmubus import MAP_SHARED, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, MmError
from mmubus.drivers.hmm import Dmirror, Prot

PAGES = 160
RW = PROT_READ | PROT_WRITE


def pattern(pages: int = PAGES, seed: int = 0) -> bytes:
    return b"".join((seed + at).to_bytes(8, "little") * 512 for at in range(pages))


async def opened(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> Dmirror:
    device = Dmirror()
    await bus.register(device, mm)
    return device


@pytest.fixture
async def buffer(mm: mmubus.AddressSpace) -> int:
    return await mm.mmap(0, PAGES * PAGE_SIZE)


@pytest.fixture
async def device(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> Dmirror:
    return await opened(bus, mm)


async def test_anon_read(mm: mmubus.AddressSpace, buffer: int, device: Dmirror) -> None:
    await mm.load(buffer + PAGE_SIZE, 1)
    await mm.store(buffer + 2 * PAGE_SIZE, pattern(PAGES - 2))
    await mm.mprotect(buffer, PAGES * PAGE_SIZE, PROT_READ)
    copied = await device.read(buffer, PAGES)
    assert (copied.pages, copied.faults) == (PAGES, 1)
    assert copied.data == bytes(2 * PAGE_SIZE) + pattern(PAGES - 2)


async def test_anon_read_prot(mm: mmubus.AddressSpace, buffer: int, device: Dmirror) -> None:
    await mm.store(buffer, pattern())
    await mm.mprotect(buffer, PAGES * PAGE_SIZE, PROT_NONE)
    with pytest.raises(MmError) as caught:
        await device.read(buffer, PAGES)
    assert (caught.value.errno, device.table) == (errno.EFAULT, {})
    await mm.mprotect(buffer, PAGES * PAGE_SIZE, RW)
    assert await mm.load(buffer, PAGES * PAGE_SIZE) == pattern()


async def test_anon_write(mm: mmubus.AddressSpace, buffer: int, device: Dmirror) -> None:
    copied = await device.write(buffer, pattern())
    assert (copied.pages, copied.faults) == (PAGES, 1)
    assert await mm.load(buffer, PAGES * PAGE_SIZE) == pattern()


async def test_anon_write_prot(mm: mmubus.AddressSpace, buffer: int, device: Dmirror) -> None:
    await mm.mprotect(buffer, PAGES * PAGE_SIZE, PROT_READ)
    assert (await device.read(buffer, 1)).faults == 1
    with pytest.raises(MmError) as caught:
        await device.write(buffer, pattern())
    assert caught.value.errno == errno.EPERM
    assert await mm.load(buffer, PAGES * PAGE_SIZE) == bytes(PAGES * PAGE_SIZE)
    await mm.mprotect(buffer, PAGES * PAGE_SIZE, RW)
    assert (await device.write(buffer, pattern())).faults == 1
    assert await mm.load(buffer, PAGES * PAGE_SIZE) == pattern()


@pytest.mark.parametrize("shared", [False, True])
async def test_anon_write_child(bus: mmubus.Bus, mm: mmubus.AddressSpace, device: Dmirror, shared: bool) -> None:
    flags = mmubus.MAP_ANONYMOUS | (MAP_SHARED if shared else mmubus.MAP_PRIVATE)
    buffer = await mm.mmap(0, PAGES * PAGE_SIZE, RW, flags)
    await mm.store(buffer, pattern())
    await device.read(buffer, PAGES)
    child = await mm.fork()
    await (await opened(bus, child)).write(buffer, pattern(seed=1000))
    assert await child.load(buffer, PAGES * PAGE_SIZE) == pattern(seed=1000)
    seen = pattern(seed=1000) if shared else pattern()
    assert await mm.load(buffer, PAGES * PAGE_SIZE) == seen
    assert (await device.read(buffer, PAGES)).data == seen


async def test_file_read_and_write(bus: mmubus.Bus, mm: mmubus.AddressSpace, device: Dmirror) -> None:
    file = await bus.open_file("f", size=PAGES * PAGE_SIZE)
    await file.pwrite(pattern(), 0)
    buffer = await mm.mmap(0, PAGES * PAGE_SIZE, RW, MAP_SHARED, file)
    copied = await device.read(buffer, PAGES)
    assert (copied.data, copied.faults) == (pattern(), 1)
    assert (await device.write(buffer, pattern(seed=7))).faults == 1
    assert await file.pread(PAGES * PAGE_SIZE, 0) == pattern(seed=7)


async def test_anon_read_multiple(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """New mappings at the same address: nothing of the old ones is left in the mirror."""
    for turn in range(10):
        buffer = await mm.mmap(0, 16 * PAGE_SIZE)
        await mm.store(buffer, pattern(16, turn))
        copied = await device.read(buffer, 16)
        assert (copied.data, copied.faults) == (pattern(16, turn), 1)
        await mm.munmap(buffer, 16 * PAGE_SIZE)
        assert device.table == {}


async def test_anon_teardown(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    """munmap of half of it during a READ: an error, or all of the right data."""
    for turn in range(10):
        buffer = await mm.mmap(0, 32 * PAGE_SIZE)
        await mm.store(buffer, pattern(32, turn))
        reading = asyncio.create_task(device.read(buffer, 32))
        for _ in range(turn):
            await asyncio.sleep(0)
        await mm.munmap(buffer + 16 * PAGE_SIZE, 16 * PAGE_SIZE)
        (outcome,) = await asyncio.gather(reading, return_exceptions=True)
        if isinstance(outcome, MmError):
            assert outcome.errno == errno.EFAULT
        else:
            assert outcome.data == pattern(32, turn)  # type: ignore[union-attr]
        await mm.munmap(buffer, 16 * PAGE_SIZE)


async def test_snapshot(mm: mmubus.AddressSpace, device: Dmirror) -> None:
    buffer = await mm.mmap(0, 5 * PAGE_SIZE)
    await mm.munmap(buffer, PAGE_SIZE)
    await mm.mprotect(buffer + PAGE_SIZE, PAGE_SIZE, PROT_NONE)
    await mm.load(buffer + 2 * PAGE_SIZE, 1)
    for page in (3, 4):
        await mm.store(buffer + page * PAGE_SIZE, b"x")
    await mm.mprotect(buffer + 3 * PAGE_SIZE, PAGE_SIZE, PROT_READ)
    expected = [Prot.ERROR, Prot.ERROR, Prot.ZERO | Prot.READ, Prot.READ, Prot.WRITE]
    assert await device.snapshot(buffer, 5) == expected
    untouched = await mm.mmap(0, PAGE_SIZE)
    assert await device.snapshot(untouched, 1) == [Prot.NONE]
    assert await mm.pagemap(untouched, untouched + PAGE_SIZE) == []
    assert device.table == {}


async def test_double_map(bus: mmubus.Bus, mm: mmubus.AddressSpace, buffer: int, device: Dmirror) -> None:
    await mm.store(buffer, pattern())
    await mm.mprotect(buffer, PAGES * PAGE_SIZE, PROT_READ)
    other = await opened(bus, mm)
    for one in (device, other):
        copied = await one.read(buffer, PAGES)
        assert (copied.data, copied.faults) == (pattern(), 1)
