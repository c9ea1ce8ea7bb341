"""The GRU holds no page: its TLB is all, and nothing is put into it while a range is being invalidated."""

from __future__ import annotations

import asyncio
import inspect

import mmubus
import pytest
from mmubus import MADV_DONTNEED, PAGE_SIZE, NotifierRange, Reason
from mmubus.drivers.gru import Context, Gru
from patience import until


async def test_loads_and_stores(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    context = await Gru(bus).get(mm)
    await mm.store(at + 7, b"program")
    assert await context.load(at + 7, 7) == b"program"
    await context.store(at + PAGE_SIZE - 2, b"gru")
    assert await mm.load(at + PAGE_SIZE - 2, 3) == b"gru"


async def test_the_tlb_is_small_and_accesses_are_not(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    gru = Gru(bus, entries_max=4)
    context = await gru.get(mm)
    data = bytes(range(256)) * 200
    await context.store(at + 100, data)
    assert await context.load(at + 100, len(data)) == data == await mm.load(at + 100, len(data))
    assert len(gru.tlb) == 4


async def test_an_invalidated_page_is_not_in_the_tlb(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    gru = Gru(bus)
    context = await gru.get(mm)
    await context.store(at, b"old")
    await context.load(at + PAGE_SIZE, 1)
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert [vpn << 12 for _, vpn in gru.tlb] == [at + PAGE_SIZE]
    assert await context.load(at, 3) == bytes(3)
    assert context.range_active == 0


async def test_faults_wait_until_no_range_is_active(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    """A count, not a flag: the first end must not let a fault in that the second start keeps out."""
    context = await Gru(bus).get(mm)
    one, other = (NotifierRange(mm.id, at, at + n * PAGE_SIZE, Reason.CLEAR, True, 0, n, n) for n in (1, 2))
    context.invalidate_range_start(one)
    context.invalidate_range_start(other)
    load = asyncio.create_task(context.load(at, 1))
    await until(lambda: context.waits == 1)
    context.invalidate_range_end(one)
    await until(lambda: context.waits == 2)
    assert not load.done()
    context.invalidate_range_end(other)
    assert await load == b"\0"


def test_handlers_never_wait() -> None:
    for name in ("invalidate_range_start", "invalidate_range_end", "release", "invalidated_everything", "flush"):
        assert not inspect.iscoroutinefunction(getattr(Context, name))


async def test_one_notifier_for_all_users_of_an_mm(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    gru = Gru(bus)
    one, other = await asyncio.gather(gru.get(mm), gru.get(mm))
    assert one is other
    assert len(bus.session.registrations) == 1
    await gru.put(one)
    assert await other.load(at, 1) == b"\0"
    await gru.put(other)
    assert bus.session.registrations == []
    again = await gru.get(mm)
    assert again is not one
    assert await again.load(at, 1) == b"\0"


async def test_address_spaces_do_not_share_entries(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    gru = Gru(bus)
    child = await mm.fork()
    parent_s, child_s = await gru.get(mm), await gru.get(child)
    await parent_s.store(at, b"parent")
    assert await child_s.load(at, 6) == bytes(6)
    await child.exit()
    assert {number for number, _ in gru.tlb} == {mm.id}
    with pytest.raises(mmubus.MmuBusError):
        await child_s.load(at, 1)
