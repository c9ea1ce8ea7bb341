"""A server in the test's loop, a connection to it, and a program with memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import mmubus
import pytest
from mmubus import PAGE_SIZE
from mmubusd.mm.addr import MmId
from mmubusd.mm.notification import Answer, Notification
from mmubusd.rpc.server import EmbeddedServer


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(frames_nr=4096) as running:
        yield running
        counters = running.server.driver.bus.counters
        assert (counters.freed_before_ack, counters.dirty_unheld) == (0, 0)


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[mmubus.Bus]:
    async with mmubus.connect(server.address, name="driver") as connected:
        yield connected


@pytest.fixture
async def mm(bus: mmubus.Bus) -> mmubus.AddressSpace:
    return await bus.create_mm("program")


@pytest.fixture
async def at(mm: mmubus.AddressSpace) -> int:
    """Sixteen anonymous pages."""
    return await mm.mmap(0, 16 * PAGE_SIZE)


Raise = Callable[[Callable[[Any], Notification]], Any]


@pytest.fixture
def notify(server: EmbeddedServer, mm: mmubus.AddressSpace) -> Raise:
    """Raise a notification that no call raises by itself, and wait for what everybody answers."""

    async def raise_it(make: Callable[[Any], Notification]) -> Answer:
        driver = server.server.driver

        def operation() -> Any:
            return (yield make(driver.memory.mm(MmId(mm.id))))

        answer: Answer = await driver.run(driver.bus.start, operation(), label="test")
        return answer

    return raise_it
