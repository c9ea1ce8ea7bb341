"""Importers of another process's memory: they fault through the exporter, and lose each page together."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncIterator
from typing import Any

import mmubus
import pytest
from mmubus import MADV_DONTNEED, MADV_PAGEOUT, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE
from mmubus.drivers.xpmem import Attachment, Exporter, Importer
from patience import BUDGET_S, until

RW = PROT_READ | PROT_WRITE


class Scene:
    """An exporter with two importers, each attached to the same segment."""

    def __init__(self, exporter: Exporter, address: str, importers: list[Importer]) -> None:
        self.exporter, self.address, self.importers = exporter, address, importers

    async def attach(self, number: int) -> list[Attachment]:
        return [await importer.attach(number) for importer in self.importers]


@pytest.fixture
async def scene(bus: mmubus.Bus) -> AsyncIterator[Scene]:
    exporter = Exporter(bus, recall_s=BUDGET_S)
    address = await exporter.serve("127.0.0.1:0")
    importers = [await Importer.connect(address), await Importer.connect(address)]
    yield Scene(exporter, address, importers)
    for importer in importers:
        await importer.close()
    await exporter.close()


@pytest.fixture(params=["rmap", "range"])
def by(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_importers_share_the_program_s_memory(scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any) -> None:
    one, other = await scene.attach(await scene.exporter.make(mm, at, 16 * PAGE_SIZE, by=by))
    await mm.store(at + 4000, b"from the program")
    assert await one.read(4000, 16) == b"from the program"
    await one.write(4090, b"from an importer")
    assert await other.read(4090, 16) == await mm.load(at + 4090, 16) == b"from an importer"


async def test_a_page_is_lost_by_all_together(scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any) -> None:
    one, other = await scene.attach(await scene.exporter.make(mm, at, 16 * PAGE_SIZE, by=by))
    await one.write(0, b"old")
    await other.read(0, 2 * PAGE_SIZE)
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert (list(one.table), list(other.table)) == ([], [1])
    assert await other.read(0, 3) == bytes(3)
    await mm.munmap(at, 16 * PAGE_SIZE)
    assert other.table == {}
    with pytest.raises(mmubus.MmError) as caught:
        await one.read(0, 1)
    assert caught.value.errno == errno.EFAULT


async def test_what_is_lost_elsewhere_does_not_void_a_fault(
    scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When memory is short, each fault has another page of the same segment reclaimed, for as long as it is tried."""
    number = await scene.exporter.make(mm, at, 16 * PAGE_SIZE, by=by)
    one, _ = await scene.attach(number)
    lost = at + 8 * PAGE_SIZE

    async def lose_another() -> None:
        await mm.store(lost, b"lost")
        await mm.madvise(lost, PAGE_SIZE, MADV_DONTNEED)

    segment = scene.exporter.segments[number]
    asked = segment.watch.registration if by == "range" else scene.exporter.frames.registration
    assert asked is not None
    fault = asked.fault if by == "range" else asked.export

    async def overtaken(*args: Any, **options: Any) -> Any:
        await lose_another()
        return await fault(*args, **options)

    monkeypatch.setattr(asked, "fault" if by == "range" else "export", overtaken)
    await mm.store(at, b"here")
    assert await one.read(0, 4) == b"here"


async def test_a_fault_that_ends_a_device_s_exclusive_access_is_not_void_by_that(
    scene: Scene, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int, by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its notice comes while the fault is under way, and is of the fault's own making. A device that takes the page
    again at once would otherwise have it for ever."""
    number = await scene.exporter.make(mm, at, 16 * PAGE_SIZE, by=by)
    one, _ = await scene.attach(number)
    await mm.store(at, b"here")
    device = await bus.mirror(mm)
    assert device.registration is not None
    taking = device.registration
    segment = scene.exporter.segments[number]
    asked = segment.watch.registration if by == "range" else scene.exporter.frames.registration
    assert asked is not None
    fault = asked.fault if by == "range" else asked.export

    async def contended(*args: Any, **options: Any) -> Any:
        await taking.exclusive(at, at + PAGE_SIZE)
        return await fault(*args, **options)

    monkeypatch.setattr(asked, "fault" if by == "range" else "export", contended)
    assert await one.read(0, 4) == b"here"


async def test_copy_on_write_gives_the_address_another_frame(
    scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any
) -> None:
    """The old frame lives on in the child: no event of the frame, and still the importers must not use it."""
    one, _ = await scene.attach(await scene.exporter.make(mm, at, PAGE_SIZE, by=by))
    await mm.store(at, b"before")
    assert await one.read(0, 6) == b"before"
    child = await mm.fork()
    await mm.store(at, b"after!")
    assert await one.read(0, 6) == b"after!"
    await one.write(0, b"import")
    assert await child.load(at, 6) == b"before"
    assert await mm.load(at, 6) == b"import"


async def test_frames_are_given_back(scene: Scene, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    number = await scene.exporter.make(mm, at, 16 * PAGE_SIZE)
    one, _ = await scene.attach(number)
    await one.write(0, b"x" * (4 * PAGE_SIZE))
    assert (await bus.inspection.statistics()).frames_exported == 4
    await mm.munmap(at, PAGE_SIZE)
    assert (await bus.inspection.statistics()).frames_exported == 3
    await scene.exporter.remove(number)

    async def given_back() -> bool:
        return (await bus.inspection.statistics()).frames_exported == 0

    await until(given_back)
    await until(lambda: one.table == {})


async def test_what_an_importer_wrote_reaches_the_file(
    scene: Scene, bus: mmubus.Bus, mm: mmubus.AddressSpace, by: Any
) -> None:
    file = await bus.open_file("shared", size=4 * PAGE_SIZE)
    at = await mm.mmap(0, 4 * PAGE_SIZE, RW, MAP_SHARED, file)
    one, other = await scene.attach(await scene.exporter.make(mm, at, 4 * PAGE_SIZE, by=by))
    await one.write(10, b"importer")
    await other.read(10, 8)
    await file.fsync()
    assert (one.table, other.table) == ({}, {})
    await mm.madvise(at, 4 * PAGE_SIZE, MADV_PAGEOUT)
    assert await file.pread(8, 10) == b"importer"
    assert await other.read(10, 8) == b"importer"


async def test_a_page_in_use_is_not_reclaimed(scene: Scene, bus: mmubus.Bus, mm: mmubus.AddressSpace) -> None:
    """Reclaim may be refused, and then the page stays; what must evict is not refused."""
    file = await bus.open_file("shared", size=PAGE_SIZE)
    at = await mm.mmap(0, PAGE_SIZE, RW, MAP_SHARED, file)
    one, other = await scene.attach(await scene.exporter.make(mm, at, PAGE_SIZE))
    await one.read(0, 1)
    await other.read(0, 1)
    one.in_use[0] += 1
    frame = one.table[0]
    await mm.madvise(at, PAGE_SIZE, MADV_PAGEOUT)
    assert one.table == {0: frame}
    assert await one.read(0, 1) == b"\0"
    await mm.munmap(at, PAGE_SIZE)
    assert one.table == {}


async def test_an_importer_that_does_not_answer_is_cut_off(
    scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any
) -> None:
    one, other = await scene.attach(await scene.exporter.make(mm, at, PAGE_SIZE, by=by))
    await one.read(0, 1)
    await other.read(0, 1)
    scene.importers[0].wire._handlers = {"recall": lambda message: None}  # type: ignore[assignment]
    scene.exporter._recall_s = 0.5
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert scene.exporter.cut_off == 1
    with pytest.raises(mmubus.ConnectionLost):
        await one.read(0, 1)
    assert await other.read(0, 1) == b"\0"


async def test_limits_and_rights(scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any) -> None:
    one, _ = await scene.attach(await scene.exporter.make(mm, at, PAGE_SIZE, by=by, writable=False))
    with pytest.raises(mmubus.MmError) as caught:
        await one.write(0, b"x")
    assert caught.value.errno == errno.EPERM
    with pytest.raises(mmubus.MmError) as caught:
        await one.read(PAGE_SIZE, 1)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(mmubus.CallFailed, match="no segment 99"):
        await scene.importers[0].attach(99)


async def test_exit_takes_everything_back(scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any) -> None:
    one, _ = await scene.attach(await scene.exporter.make(mm, at, PAGE_SIZE, by=by))
    await one.write(0, b"x")
    await mm.exit()
    assert one.table == {}
    with pytest.raises(mmubus.MmuBusError):
        await one.read(0, 1)


IMPORTER = """
import asyncio, sys
from mmubus.drivers.xpmem import Importer

async def main(address, number):
    importer = await Importer.connect(address)
    attached = await importer.attach(number)
    print((await attached.read(0, 7)).decode(), flush=True)
    await attached.write(0, b"another")
    sys.stdin.readline()
    print(len(attached.table), flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.e2e
async def test_an_importer_in_a_process_of_its_own(scene: Scene, mm: mmubus.AddressSpace, at: int, by: Any) -> None:
    number = await scene.exporter.make(mm, at, PAGE_SIZE, by=by)
    await mm.store(at, b"program")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", IMPORTER, scene.address, str(number), stdin=-1, stdout=-1
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"program\n"

    async def written() -> bool:
        return await mm.load(at, 7) == b"another"

    await until(written)
    process.kill()  # it never hands anything back
    await process.wait()
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert await mm.load(at, 7) == bytes(7)
