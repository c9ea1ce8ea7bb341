"""Requests on a lane: when it is taken, in which order they arrive, and what becomes of them when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import mmubus
import pytest
from mmubus import Op, pipeline
from mmubus.lane import Lane
from mmubusd.rpc import EmbeddedServer
from patience import BUDGET_S, until

PAGE = 4096
BASE = 0x7000_0000_0000
ANONYMOUS = mmubus.MAP_PRIVATE | mmubus.MAP_ANONYMOUS | mmubus.MAP_FIXED
DONTNEED = 4


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(frames_nr=1 << 12, ack_budget_s=BUDGET_S) as server:
        yield server


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[mmubus.Bus]:
    async with mmubus.connect(server.address) as bus:
        yield bus


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Lanes open when it is set, and not before."""
    opened = asyncio.Event()

    class Late:
        @staticmethod
        async def open(*args: Any) -> Lane | None:
            lane = await Lane.open(*args)
            await opened.wait()
            return lane

    monkeypatch.setattr(pipeline, "Lane", Late)  # a session's lane opens as ever
    return opened


class Slow(mmubus.Notifier):
    """Lets go of nothing before it is told to."""

    def __init__(self, holding: asyncio.Event) -> None:
        self._holding = holding

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        await self._holding.wait()

    def invalidate_page(self, mm: int, address: int) -> None:
        pass

    def age_page(self, mm: int, address: int) -> None:
        pass

    def release(self, mm: int) -> None:
        pass


async def mapped(bus: mmubus.Bus) -> mmubus.AddressSpace:
    mm = await bus.create_mm("program")
    await mm.mmap(BASE, 16 * PAGE, flags=ANONYMOUS)
    await mm.touch(BASE, 16 * PAGE)
    return mm


async def test_calls_go_by_the_lane(bus: mmubus.Bus) -> None:
    mm = await mapped(bus)
    async with mm.operations() as operations:
        await until(lambda: operations.on_lane)
        assert await operations.run(Op.MADVISE, BASE, PAGE, DONTNEED) == 0
        with pytest.raises(mmubus.MmError, match="EINVAL"):
            await operations.run(Op.MADVISE, BASE, PAGE, 12345)


async def test_a_device_s_requests_go_by_the_lane(bus: mmubus.Bus) -> None:
    mm = await mapped(bus)
    mirror = await bus.mirror(mm)
    for page in range(4):
        await mirror.write(BASE + page * PAGE, b"written")
    await until(lambda: bus.access.on_lane)
    assert await mirror.read(BASE, 7) == b"written"


async def test_without_lanes_everything_goes_by_the_stream(server: EmbeddedServer) -> None:
    async with mmubus.connect(server.address, lane=False) as bus:
        mm = await mapped(bus)
        async with mm.operations() as operations:
            assert await operations.run(Op.MADVISE, BASE, PAGE, DONTNEED) == 0
            assert not operations.on_lane


async def test_what_was_queued_when_the_lane_opened_is_sent(bus: mmubus.Bus, gate: asyncio.Event) -> None:
    """In the same turn of the loop: the writer has been woken for it, and finds that the lane takes it."""
    mm = await mapped(bus)
    async with mm.operations() as operations:
        gate.set()
        called = operations.submit_nowait(Op.MADVISE, BASE, PAGE, DONTNEED)
        async with asyncio.timeout(BUDGET_S):
            assert (await called).value() == 0


async def test_the_lane_is_not_taken_while_anything_is_under_way(bus: mmubus.Bus, gate: asyncio.Event) -> None:
    """A thread's second call would overtake its first one, which is on its way on the stream."""
    mm = await mapped(bus)
    holding = asyncio.Event()
    await bus.register(Slow(holding), mm)
    async with mm.operations() as operations:
        first = operations.submit_nowait(Op.MADVISE, BASE, PAGE, DONTNEED, thread=1)
        await until(lambda: operations.sent_nr == 1)
        gate.set()
        second = operations.submit_nowait(Op.MUNMAP, BASE, PAGE, thread=1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not operations.on_lane
        holding.set()
        assert [(await one).value() for one in (first, second)] == [0, 0]
        assert (await (await operations.submit(Op.BRK, 0))).value() > 0
        assert operations.on_lane


async def test_whoever_waits_when_the_lane_breaks_is_told(bus: mmubus.Bus) -> None:
    mm = await mapped(bus)
    holding = asyncio.Event()
    await bus.register(Slow(holding), mm)
    try:
        async with mm.operations() as operations:
            await until(lambda: operations.on_lane)
            called = operations.submit_nowait(Op.MADVISE, BASE, PAGE, DONTNEED)
            await until(lambda: operations.sent_nr == 1)
            lane = operations._pipeline._lane
            assert lane is not None
            assert lane._transport is not None
            lane._transport.abort()
            with pytest.raises(mmubus.ConnectionLost):
                await called
    finally:
        holding.set()
    async with mm.operations() as operations:  # and another one goes on
        assert await operations.run(Op.BRK, 0) > 0


async def test_many_calls_at_once_by_the_lane(bus: mmubus.Bus) -> None:
    mm = await mapped(bus)
    async with mm.operations(in_flight_max=2000) as operations:
        await until(lambda: operations.on_lane)
        calls = [operations.submit_nowait(Op.MADVISE, BASE, PAGE, DONTNEED, thread=n % 7) for n in range(5000)]
        assert [(await call).value() for call in calls] == [0] * 5000
