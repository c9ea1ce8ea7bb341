"""The library against the real server, in this process."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from typing import Any

import mmubus
import pytest
from mmubus import MADV_DONTNEED, MAP_ANONYMOUS, MAP_SHARED, PAGE_SIZE, PROT_READ, Op
from patience import BUDGET_S, until

embedded = pytest.importorskip("mmubusd.rpc")


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    async with embedded.EmbeddedServer(frames_nr=4096, ack_budget_s=BUDGET_S) as running:
        yield running


@pytest.fixture
async def bus(server: Any) -> AsyncIterator[mmubus.Bus]:
    async with mmubus.connect(server.address, name="test") as connected:
        yield connected


async def test_an_address_space(bus: mmubus.Bus) -> None:
    mm = await bus.create_mm("program")
    address = await mm.mmap(0, 4 * PAGE_SIZE)
    await mm.store(address + 5, b"hello")
    assert await mm.load(address + 4, 7) == b"\0hello\0"
    await mm.mprotect(address, PAGE_SIZE, PROT_READ)
    with pytest.raises(mmubus.MmError) as caught:
        await mm.store(address, b"x")
    assert caught.value.errno == errno.EFAULT
    maps = await mm.maps()
    assert (maps[0].start, maps[-1].end) == (address, address + 4 * PAGE_SIZE)
    assert [(run.start, run.end) for run in await mm.pagemap()] == [(address, address + PAGE_SIZE)]
    child = await mm.fork("child")
    await mm.munmap(address, 4 * PAGE_SIZE)
    assert await child.load(address + 5, 5) == b"hello"
    await child.exit()
    with pytest.raises(mmubus.MmError):
        await child.load(address, 1)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda mm: mm.munmap(1, PAGE_SIZE), errno.EINVAL),
        (lambda mm: mm.mmap(0, 0), errno.EINVAL),
        (lambda mm: mm.load(0x1000, 1), errno.EFAULT),
        (lambda mm: mm.mremap(0x1000, PAGE_SIZE, 2 * PAGE_SIZE), errno.EFAULT),
        (lambda mm: mm.madvise(0x1000, PAGE_SIZE, 999), errno.EINVAL),
    ],
)
async def test_bad_calls_have_linux_s_errno(bus: mmubus.Bus, call: Any, number: int) -> None:
    with pytest.raises(mmubus.MmError) as caught:
        await call(await bus.create_mm("program"))
    assert caught.value.errno == number


async def test_a_mirror_sees_what_the_program_writes_and_loses_what_it_unmaps(bus: mmubus.Bus) -> None:
    mm = await bus.create_mm("program")
    address = await mm.mmap(0, 16 * PAGE_SIZE)
    await mm.store(address, b"from the program")
    mirror = await bus.mirror(mm)
    assert await mirror.read(address, 16) == b"from the program"
    await mirror.write(address + 3 * PAGE_SIZE - 4, b"from the device")
    assert await mm.load(address + 3 * PAGE_SIZE - 4, 15) == b"from the device"
    assert len(mirror.held) == 3
    await mm.madvise(address + 2 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    assert len(mirror.held) == 2
    assert await mirror.read(address + 2 * PAGE_SIZE, 4) == bytes(4)
    await mm.munmap(address, 16 * PAGE_SIZE)
    assert mirror.held == {}
    with pytest.raises(mmubus.MmError) as caught:
        await mirror.read(address, 1)
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("style", ["seed", "mainline"])
async def test_racing_accesses_never_see_another_s_bytes(bus: mmubus.Bus, style: Any) -> None:
    """A program that writes, unmaps and maps again, and a mirror that reads as fast as it can."""
    mm = await bus.create_mm("program")
    address = await mm.mmap(0, 2 * PAGE_SIZE)
    other = await bus.create_mm("other")  # takes the frames that become free
    elsewhere = await other.mmap(0, 64 * PAGE_SIZE)
    mirror = await bus.mirror(mm, style=style, only_held=True)
    reads = 0
    running = True

    async def device() -> None:
        nonlocal reads
        while running:
            data = await mirror.read(address, 8)
            assert data in (b"ourbytes", bytes(8))
            reads += 1

    reader = asyncio.create_task(device())
    turn = 0
    while turn < 20 or (reads < 4 and not reader.done()):
        await mm.store(address, b"ourbytes")
        await mm.madvise(address, PAGE_SIZE, MADV_DONTNEED)
        await other.store(elsewhere + turn % 64 * PAGE_SIZE, b"secret!!")
        turn += 1
    running = False
    await reader


async def test_a_stale_translation_is_refused_and_explained(bus: mmubus.Bus) -> None:
    class Careless(mmubus.Notifier):
        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            pass

    mm = await bus.create_mm("program")
    address = await mm.mmap(0, PAGE_SIZE)
    with pytest.warns(RuntimeWarning):
        registration = await bus.register(Careless(), mm)
    held = await registration.fault(address, address + PAGE_SIZE, write=True)
    pfns, generations = held.pfns.tolist(), held.generations.tolist()
    await registration.dma_write(address, b"fine", pfns, generations)
    await mm.munmap(address, PAGE_SIZE)
    with pytest.raises(mmubus.StaleTranslation) as caught:
        await registration.dma_read(address, 4, pfns, generations)
    assert "munmap" in str(caught.value)
    assert caught.value.address == address


async def test_pins_survive_what_takes_the_address(bus: mmubus.Bus) -> None:
    mm = await bus.create_mm("program")
    address = await mm.mmap(0, 2 * PAGE_SIZE)
    await mm.store(address, b"pinned")
    mirror = await bus.mirror(mm)
    assert mirror.registration is not None
    pin = await mirror.registration.pin(address, address + 2 * PAGE_SIZE, write=True)
    await mm.munmap(address, 2 * PAGE_SIZE)
    assert await pin.read(0, 6) == b"pinned"
    await pin.write(PAGE_SIZE - 2, b"both")
    assert await pin.read(PAGE_SIZE - 2, 4) == b"both"
    await pin.unpin(dirty=True)
    with pytest.raises(mmubus.CallFailed):
        await pin.unpin()


async def test_exports_are_taken_back_by_frame(bus: mmubus.Bus) -> None:
    class Exporter(mmubus.RmapNotifier):
        def __init__(self) -> None:
            self.table: dict[int, int] = {}
            self.taken: list[int] = []

        def invalidate_page(self, page: int, must_evict: bool) -> None:
            self.taken.append(page)
            self.table.pop(page, None)

        def commit(self, granted: mmubus.Translations) -> None:
            self.table.update({pfn: address for address, pfn, *_ in granted})

    mm = await bus.create_mm("program")
    address = await mm.mmap(0, 4 * PAGE_SIZE, flags=MAP_SHARED | MAP_ANONYMOUS)
    exporter = Exporter()
    registration = await bus.register_rmap(exporter)
    granted = await registration.export(mm.id, address, address + 4 * PAGE_SIZE, write=True, commit=exporter.commit)
    assert len(exporter.table) == 4
    await registration.dma_write(0, b"exported", granted.pfns[:1].tolist(), granted.generations[:1].tolist())
    assert await mm.load(address, 8) == b"exported"
    first = granted.pfns[:1].tolist()
    await registration.unexport(first, first)
    await mm.munmap(address, 4 * PAGE_SIZE)
    assert sorted(exporter.taken) == sorted(granted.pfns[1:].tolist())


async def test_exit_releases_and_unregistering_there_is_legal(bus: mmubus.Bus) -> None:
    seen = []

    class Leaving(mmubus.Mirror):
        async def release(self, mm: int) -> None:  # type: ignore[override]
            seen.append("release")
            self.drop(0, mmubus.TASK_SIZE)
            assert self.registration is not None
            await self.registration.unregister()

    mm = await bus.create_mm("program")
    address = await mm.mmap(0, PAGE_SIZE)
    leaving = Leaving()
    await bus.register(leaving, mm)
    await leaving.read(address, 1)
    await mm.exit()
    assert seen == ["release"]
    assert not leaving.valid


async def test_the_frame_window_reads_and_writes_without_the_server(bus: mmubus.Bus) -> None:
    mm = await bus.create_mm("program")
    address = await mm.mmap(0, 4 * PAGE_SIZE)
    await mm.store(address + PAGE_SIZE - 3, b"window")
    await bus.register(mmubus.Mirror(), mm)
    window = bus.frame_window(writable=True)
    mirror = await bus.mirror(mm, window=window)
    assert await mirror.read(address + PAGE_SIZE - 3, 6) == b"window"
    await mirror.write(address + PAGE_SIZE - 3, b"shared")
    assert await mm.load(address + PAGE_SIZE - 3, 6) == b"shared"
    await mm.munmap(address, 4 * PAGE_SIZE)
    assert mirror.held == {}
    window.close()


async def test_a_file(bus: mmubus.Bus) -> None:
    file = await bus.open_file("data", size=3 * PAGE_SIZE)
    assert await file.pwrite(b"contents", 5) == 8
    assert await file.pread(100, 5) == b"contents" + bytes(92)
    mm = await bus.create_mm("program")
    address = await mm.mmap(0, PAGE_SIZE, PROT_READ, MAP_SHARED, file)
    assert await mm.load(address + 5, 8) == b"contents"
    assert [(one.name, one.size) for one in await bus.list_files()] == [("data", 3 * PAGE_SIZE)]
    await file.unlink()


async def test_operations_report_what_they_raise(bus: mmubus.Bus) -> None:
    mm = await bus.create_mm("program")
    mirror = await bus.mirror(mm)
    async with mm.operations() as operations:
        address = await operations.run(Op.MMAP, 0, 8 * PAGE_SIZE, 3, 0x22, 0, 0)
        await operations.run(Op.WRITE, address, 8 * PAGE_SIZE)
        await mirror.read(address, 8 * PAGE_SIZE)
        window = (address, address + 8 * PAGE_SIZE)
        future = await operations.submit(Op.MUNMAP, address, 2 * PAGE_SIZE, notifications=True, window=window)
        result = await future
        assert [(one.start, one.end) for one in result.notifications] == [(address, address + 2 * PAGE_SIZE)]
        assert list(result.present) == [(2, 8)]
        assert len(mirror.held) == 6
        futures = [await operations.submit(Op.MUNMAP, 1, 1, thread=thread) for thread in range(100)]
        assert {(await future).errno_name for future in futures} == {"EINVAL"}


async def test_a_broken_handler_is_fenced_and_told_what_it_lost(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(mmubus.Mirror):
        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:  # type: ignore[override]
            raise ValueError("a bug")

    told: list[mmubus.Fenced] = []
    async with (
        mmubus.connect(server.address, name="cpu") as cpu,
        mmubus.connect(server.address, name="broken", ack_budget_s=0.1, on_fenced=told.append) as bus,
    ):
        mm = await cpu.create_mm("program")
        address = await mm.mmap(0, 3 * PAGE_SIZE)
        broken = Broken()
        await bus.register(broken, mm.id)
        await broken.read(address, 3 * PAGE_SIZE)
        await mm.munmap(address, 3 * PAGE_SIZE)
        await until(lambda: told)
        assert told[0].seq == 1
        assert sum(told[0].lost.values()) == 3
        assert broken.held == {}
        with pytest.raises(mmubus.Fenced):
            await broken.read(address, 1)


async def test_a_restarted_server_is_another_epoch(tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/bus.sock"
    async with mmubus.connect(address, reattach=True) as bus:
        async with embedded.EmbeddedServer(listen=(address,)):
            mm = await bus.create_mm("program")
            mirror = await bus.mirror(mm)
            at = await mm.mmap(0, PAGE_SIZE)
            await mirror.read(at, 1)
        await until(lambda: not mirror.valid)
        async with embedded.EmbeddedServer(listen=(address,)):
            await until(lambda: not mirror.held and bus.session.state == "live")
