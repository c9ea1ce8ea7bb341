"""khugepaged on the real server: by itself and when it is called, with a mirror on the pages."""

from __future__ import annotations

import mmubus
from mmubus import PAGE_SIZE, Op
from mmubus.linux import MADV_HUGEPAGE
from mmubusd.mm.check import check_memory
from mmubusd.rpc import EmbeddedServer
from patience import until

BLOCK = 512 * PAGE_SIZE
BASE = 0x2000_0000_0000
FIXED_PRIVATE = 0x32


async def small_pages(bus: mmubus.Bus) -> tuple[mmubus.AddressSpace, mmubus.Mirror]:
    """Two pages of a block, written through a mirror, that want to be huge."""
    mm = await bus.create_mm("program")
    await mm.mmap(BASE, BLOCK, flags=FIXED_PRIVATE)
    mirror = await bus.mirror(mm)
    for page in (3, 400):
        await mirror.write(BASE + page * PAGE_SIZE, b"page %d" % page)
    await mm.madvise(BASE, BLOCK, MADV_HUGEPAGE)
    return mm, mirror


async def test_passes_come_by_themselves() -> None:
    async with EmbeddedServer(frames_nr=8192, thp="madvise", khugepaged_scan_sleep_s=0.01) as running:
        memory = running.server.driver.memory
        async with mmubus.connect(running.address, name="program") as bus:
            mm, mirror = await small_pages(bus)
            await until(lambda: memory.khugepaged.pages_collapsed == 1)
            assert memory.mm(mm.id).huge(BASE, BASE + BLOCK) == [(0, 512)]
            assert await mirror.read(BASE + 400 * PAGE_SIZE, 8) == b"page 400"
            assert mirror.statistics.pages_dropped == 2
        check_memory(memory)
        assert running.server.driver.bus.counters.freed_before_ack == 0


async def test_a_pass_is_called_for_and_otherwise_there_is_none() -> None:
    async with EmbeddedServer(frames_nr=8192, thp="madvise", khugepaged_max_ptes_none=510) as running:
        async with mmubus.connect(running.address, name="program") as bus:
            mm, mirror = await small_pages(bus)
            async with bus.operations() as operations:
                assert await operations.run(Op.KHUGEPAGED_SCAN, 512) == 1
                assert await operations.run(Op.KHUGEPAGED_SCAN, 0) == 0
            assert await mm.load(BASE + 3 * PAGE_SIZE, 6) == b"page 3"
            assert await mirror.read(BASE + 3 * PAGE_SIZE, 6) == b"page 3"
        assert running.server.driver.memory.khugepaged.full_scans == 1
