"""The lane as the library uses it: when there is one, when there is none, and when it breaks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mmubus
import pytest
from mmu.v1 import session_pb2 as pb
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubus.acks import AckWindow
from mmubus.lane import Lane
from patience import BUDGET_S, until

embedded = pytest.importorskip("mmubusd.rpc")


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    async with embedded.EmbeddedServer(frames_nr=4096, ack_budget_s=BUDGET_S) as running:
        yield running


class Driver(mmubus.Notifier):
    """Counts what it is told; waits first, where it is told to."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.gate: asyncio.Event | None = None

    async def _wait(self, gate: asyncio.Event) -> None:
        await gate.wait()

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Any:
        self.seen.append(start)
        return self._wait(self.gate) if self.gate is not None else None

    def age_page(self, mm: int, address: int) -> bool:
        return False

    def invalidate_page(self, mm: int, address: int) -> None:
        pass

    def release(self, mm: int) -> None:
        pass


def transport(bus: mmubus.Bus) -> Any:
    return bus.session._stream.lane._transport


async def touch_and_drop(mm: mmubus.AddressSpace, address: int, pages: int) -> None:
    await mm.store(address, b"x" * pages * PAGE_SIZE)
    for page in range(pages):
        await mm.madvise(address + page * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)


@pytest.mark.parametrize("lane", [True, False])
async def test_the_same_notices_come_either_way(server: Any, lane: bool) -> None:
    async with mmubus.connect(server.address, lane=lane) as bus:
        mm = await bus.create_mm("program")
        address = await mm.mmap(0, 8 * PAGE_SIZE)
        driver = Driver()
        await bus.register(driver, mm)
        assert bus.session.on_lane is lane
        await touch_and_drop(mm, address, 8)
        assert driver.seen == [address + page * PAGE_SIZE for page in range(8)]
        assert bus.session.notices_handled == 8


async def test_a_lane_that_cannot_be_reached_is_done_without(server: Any) -> None:
    os.unlink(server.server._lanes.path)
    async with mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("program")
        address = await mm.mmap(0, PAGE_SIZE)
        driver = Driver()
        await bus.register(driver, mm)
        assert not bus.session.on_lane
        await touch_and_drop(mm, address, 1)
        assert driver.seen == [address]


async def test_when_it_breaks_the_stream_goes_on_and_nothing_is_lost(server: Any) -> None:
    async with mmubus.connect(server.address) as bus, mmubus.connect(server.address) as other:
        mm = await other.create_mm("program")
        address = await mm.mmap(0, 16 * PAGE_SIZE)
        driver = Driver()
        await bus.register(driver, mm)
        await touch_and_drop(mm, address, 2)
        driver.gate = asyncio.Event()
        await mm.store(address, b"x" * 16 * PAGE_SIZE)
        waiting = [
            asyncio.ensure_future(mm.madvise(address + page * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)) for page in range(6)
        ]
        await until(lambda: len(driver.seen) == 8)
        transport(bus).abort()  # six handlers are running; their answers find another way
        await until(lambda: not bus.session.on_lane)
        more = asyncio.ensure_future(mm.madvise(address + 9 * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED))
        await until(lambda: len(driver.seen) == 9)
        assert not any(one.done() for one in waiting)
        driver.gate.set()
        await asyncio.gather(*waiting, more)
        assert len(driver.seen) == 9  # what came twice was handled once
        assert bus.session.state is mmubus.session.State.LIVE


async def test_acknowledgements_lost_with_it_are_said_again(server: Any) -> None:
    async with mmubus.connect(server.address) as bus, mmubus.connect(server.address) as other:
        mm = await other.create_mm("program")
        address = await mm.mmap(0, 2 * PAGE_SIZE)
        driver = Driver()
        await bus.register(driver, mm)
        lane = bus.session._stream.lane
        lane._write = lambda data: None  # it is written and never arrives
        await mm.store(address, b"x")
        dropping = asyncio.ensure_future(mm.madvise(address, PAGE_SIZE, MADV_DONTNEED))
        await until(lambda: driver.seen == [address])
        assert not dropping.done()
        transport(bus).abort()
        await dropping
        assert driver.seen == [address]


async def test_a_driver_that_faults_over_it_never_reads_what_was_taken(server: Any) -> None:
    """A mirror under fire, with its lane cut again and again by new sessions of its own."""
    async with mmubus.connect(server.address) as program:
        mm = await program.create_mm("program")
        address = await mm.mmap(0, 4 * PAGE_SIZE)
        for _ in range(5):
            async with mmubus.connect(server.address) as bus:
                mirror = await bus.mirror(mm)
                assert bus.session.on_lane
                for step in range(10):
                    await mm.store(address, bytes([step + 1]) * PAGE_SIZE)
                    dropping = asyncio.ensure_future(mm.madvise(address, PAGE_SIZE, MADV_DONTNEED))
                    data = await mirror.read(address, 1)
                    assert data in (bytes([step + 1]), b"\0")
                    if step == 5:
                        transport(bus).abort()
                    await dropping
                    assert await mirror.read(address, 1) == b"\0"
        statistics = await program.inspection.statistics()
        assert statistics.freed_before_ack == 0


@pytest.mark.parametrize(
    "answer",
    [
        (1 << 31).to_bytes(4, "big"),
        (2).to_bytes(4, "big") + pb.AttachResponse(heartbeat=pb.Heartbeat()).SerializeToString(),
        b"",
    ],
)
async def test_a_lane_that_answers_wrongly_is_none(tmp_path: Path, answer: bytes) -> None:
    class Wrong(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(answer)

    told: list[object] = []
    path = f"{tmp_path}/lane"
    listening = await asyncio.get_running_loop().create_unix_server(Wrong, path)
    async with listening:
        assert await Lane.open(path, b"secret", AckWindow(), told.append, 0.3) is None
    assert told == []


@pytest.mark.parametrize("through", [1, 127, 128, 300, 1 << 20, (1 << 63) - 1])
def test_the_bytes_of_an_acknowledgement_are_those_of_the_generated_class(through: int) -> None:
    acks = AckWindow()
    acks.begin_at(through)
    acks.received = through
    acks.done(through)
    written = acks.take_bytes()
    assert written == pb.AttachRequest(acknowledge=pb.Acknowledge(through=through)).SerializeToString()
    assert acks.take_bytes() == b""
    acks.received = through + 3
    acks.done(through + 3)
    assert pb.AttachRequest.FromString(acks.take_bytes()).acknowledge.also == [through + 3]
