"""The driver: what it delivers, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from mmubusd.notify import Ack, Hello, Op, Spec
from mmubusd.rpc import EmbeddedServer

PAGE = 4096
BASE = 0x7000_0000_0000
READ_WRITE, PRIVATE_ANON_FIXED = 3, 0x32


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def test_an_operation_goes_with_its_last_reference(no_collector: None) -> None:
    """Hundreds of thousands of rounds leave nothing that only the collector finds: it would stop the loop for that."""
    async with EmbeddedServer(frames_nr=1 << 10, ack_budget_s=30, lease_s=60) as embedded:
        driver, bus, memory = embedded.server.driver, embedded.server.bus, embedded.server.memory
        mm = memory.create_mm("test")
        await driver.run(bus.start, mm.mmap(BASE, PAGE, READ_WRITE, PRIVATE_ANON_FIXED))
        session = bus.open_session(Hello("driver"), driver.now(), "token")
        bus.register(session, Spec(mm.id, frozenset({Op.INVALIDATE_RANGE})), driver.now())
        unmapped = asyncio.ensure_future(driver.run(bus.start, mm.munmap(BASE, PAGE)))
        while not bus.rounds.open:  # noqa: ASYNC110 - the task begins with its first turn
            await asyncio.sleep(0)
        (round_,) = bus.rounds.open.values()
        operation, told = weakref.ref(round_.operation), weakref.ref(round_)
        del round_
        while session.take_batch() is not None:
            pass
        bus.acknowledge(session, Ack(through=session.outbox.last_seq), driver.now())
        driver.pump()
        assert await unmapped == 0
        del unmapped
        await driver.run(bus.start, mm.brk(0))  # whose step was the last one is remembered
        bus.rounds.past.clear()  # and so are the last rounds
        assert operation() is None
        assert told() is None
