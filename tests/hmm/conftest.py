"""A server, a program, and up to two devices: the fixtures hmm and hmm2 of the kernel's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import mmubus
import pytest
from mmubus.drivers.hmm import Dmirror
from mmubusd.mm.check import check_memory
from mmubusd.rpc import EmbeddedServer
from patience import BUDGET_S


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(frames_nr=8192, ack_budget_s=BUDGET_S, thp="madvise", hugetlb_nr=2) as running:
        yield running
        driver = running.server.driver
        assert (driver.bus.counters.freed_before_ack, driver.bus.counters.dirty_unheld) == (0, 0)
        check_memory(driver.memory)


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[mmubus.Bus]:
    async with mmubus.connect(server.address, name="hmm-tests") as connected:
        yield connected


@pytest.fixture
async def mm(bus: mmubus.Bus) -> mmubus.AddressSpace:
    return await bus.create_mm("hmm-tests")


@pytest.fixture
async def device(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> Dmirror:
    opened = Dmirror()
    await bus.register(opened, mm)
    return opened


@pytest.fixture
async def second(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> Dmirror:
    opened = Dmirror()
    await bus.register(opened, mm)
    return opened
