"""A server in the test's loop, a connection to it, and a program with memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import mmubus
import pytest
from mmubus import PAGE_SIZE
from mmubusd.rpc import EmbeddedServer
from patience import BUDGET_S


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(frames_nr=4096, ack_budget_s=BUDGET_S) as running:
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
