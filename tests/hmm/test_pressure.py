"""Pressure on the real server: two mirrors and a program want three times the frames; every byte is checked."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import mmubus
import pytest
from mmubus import PAGE_SIZE, Op
from mmubusd.mm.check import check_memory
from mmubusd.rpc import EmbeddedServer
from patience import BUDGET_S

PAGES = 384


@pytest.fixture
async def small() -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(frames_nr=256, ack_budget_s=BUDGET_S, swap_slots_nr=4096, nodes_nr=2) as running:
        yield running
        driver = running.server.driver
        assert driver.bus.counters.freed_before_ack == 0
        check_memory(driver.memory)


async def test_every_byte_survives(small: EmbeddedServer) -> None:
    draw = random.Random(5)
    async with mmubus.connect(small.address, name="program") as bus:
        spaces = []
        for name in ("one", "two"):
            mm = await bus.create_mm(name)
            spaces.append((mm, await mm.mmap(0, PAGES * PAGE_SIZE), await bus.mirror(mm)))
        model: dict[tuple[int, int], bytes] = {}
        for step in range(600):
            which, page = draw.randrange(2), draw.randrange(PAGES)
            mm, base, mirror = spaces[which]
            address = base + page * PAGE_SIZE
            want = model.get((which, page), bytes(8))
            match draw.randrange(4):
                case 0:
                    model[which, page] = step.to_bytes(8, "little")
                    await mm.store(address, model[which, page])
                case 1:
                    model[which, page] = step.to_bytes(8, "big")
                    await mirror.write(address, model[which, page])
                case 2:
                    assert await mm.load(address, 8) == want
                case _:
                    assert await mirror.read(address, 8) == want
        for (which, page), want in model.items():
            mm, base, _ = spaces[which]
            assert await mm.load(base + page * PAGE_SIZE, 8) == want
        assert small.server.driver.memory.swap.used_nr > 0


async def test_calls_without_a_message_of_their_own(small: EmbeddedServer) -> None:
    async with mmubus.connect(small.address, name="program") as bus:
        mm = await bus.create_mm("program")
        base = await mm.mmap(0, 4 * PAGE_SIZE)
        await mm.store(base, b"same" * 1024 + b"same" * 1024)
        assert await mm.call(Op.MOVE_PAGES, base, 2 * PAGE_SIZE, 1) == 0
        await mm.madvise(base, 2 * PAGE_SIZE, 12)
        async with bus.operations() as operations:
            assert await operations.run(Op.KSM_SCAN) == 1
            await operations.drain()
        await mm.call(Op.CLEAR_REFS, 4)
        await mm.call(Op.UFFD_WRITEPROTECT, base, PAGE_SIZE, 1)
        with pytest.raises(mmubus.MmError) as caught:
            await mm.store(base, b"no")
        assert caught.value.errno_name == "ENXIO"
