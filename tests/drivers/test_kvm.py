"""The guest sees its memory through the shadow, and loses each page with the program."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import mmubus
import pytest
from mmubus import MADV_DONTNEED, MAP_SHARED, PAGE_SIZE, PROT_READ, PROT_WRITE, NotifierRange, Op, Reason
from mmubus.drivers.kvm import MemorySlot, MmioExit, Vm
from mmubusd.mm.idle import CLEAR, LOOK
from mmubusd.rpc import EmbeddedServer

GPA = 0x100_0000


@pytest.fixture
async def vm(bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> Vm:
    machine = Vm()
    await bus.register(machine, mm)
    await machine.set_memory_slot(MemorySlot(0, GPA, at, 16))
    return machine


async def test_loads_and_stores_go_to_the_program_s_memory(vm: Vm, mm: mmubus.AddressSpace, at: int) -> None:
    await mm.store(at + PAGE_SIZE - 3, b"from the program")
    assert await vm.load(GPA + PAGE_SIZE - 3, 16) == b"from the program"
    await vm.store(GPA + 3 * PAGE_SIZE - 2, b"from the guest")
    assert await mm.load(at + 3 * PAGE_SIZE - 2, 14) == b"from the guest"
    assert sorted(vm.shadow) == [GPA // PAGE_SIZE + n for n in range(4)]


async def test_a_page_is_lost_with_the_program_and_faulted_in_again(vm: Vm, mm: mmubus.AddressSpace, at: int) -> None:
    await vm.store(GPA, b"old")
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert vm.shadow == {}
    assert await vm.load(GPA, 3) == bytes(3)
    await mm.munmap(at, 16 * PAGE_SIZE)
    with pytest.raises(mmubus.MmError) as caught:
        await vm.load(GPA, 1)
    assert caught.value.errno == errno.EFAULT


async def test_fork_takes_the_right_to_write(vm: Vm, mm: mmubus.AddressSpace) -> None:
    await vm.store(GPA, b"before")
    child = await mm.fork()
    await vm.store(GPA, b"after!")
    assert await child.load(vm.slots[0].hva, 6) == b"before"


async def test_what_no_slot_backs_leaves_the_guest(vm: Vm, at: int) -> None:
    with pytest.raises(MmioExit) as caught:
        await vm.store(GPA + 16 * PAGE_SIZE - 2, b"over the end")
    assert (caught.value.gpa, caught.value.write) == (GPA + 16 * PAGE_SIZE, True)
    await vm.set_memory_slot(MemorySlot(1, 0, at, 1, readonly=True))
    await vm.load(0, 1)
    with pytest.raises(MmioExit):
        await vm.store(0, b"x")


async def test_one_host_page_may_be_two_guest_pages(vm: Vm, mm: mmubus.AddressSpace, at: int) -> None:
    await vm.set_memory_slot(MemorySlot(1, 0, at, 4))
    await vm.store(GPA, b"alias")
    assert await vm.load(0, 5) == b"alias"
    await mm.madvise(at, PAGE_SIZE, MADV_DONTNEED)
    assert vm.shadow == {}


async def test_a_slot_that_is_removed_or_replaced_takes_its_shadow_along(vm: Vm, at: int) -> None:
    await vm.load(GPA, 2 * PAGE_SIZE)
    await vm.set_memory_slot(MemorySlot(0, GPA, at + PAGE_SIZE, 1))
    assert vm.shadow == {}
    await vm.set_memory_slot(MemorySlot(0, 0, 0, 0))
    with pytest.raises(MmioExit):
        await vm.load(GPA, 1)


async def test_slots_change_only_while_no_invalidation_is_under_way(vm: Vm, at: int) -> None:
    away = NotifierRange(1, at, at + PAGE_SIZE, Reason.CLEAR, True, 0, 1, 1)
    vm.invalidate_range_start(away)
    change = asyncio.create_task(vm.set_memory_slot(MemorySlot(0, 0, 0, 0)))
    await asyncio.sleep(0.01)
    assert not change.done()
    vm.invalidate_range_end(away)
    await change
    assert (vm.in_progress, vm.slots) == (0, {})


async def test_the_end_of_one_invalidation_does_not_open_what_another_covers(vm: Vm, at: int) -> None:
    one = NotifierRange(1, at, at + 4 * PAGE_SIZE, Reason.CLEAR, True, 0, 1, 1)
    other = NotifierRange(1, at + 2 * PAGE_SIZE, at + 6 * PAGE_SIZE, Reason.CLEAR, True, 0, 2, 2)
    vm.invalidate_range_start(one)
    vm.invalidate_range_start(other)
    vm.invalidate_range_end(one)
    load = asyncio.create_task(vm.load(GPA + 5 * PAGE_SIZE, 1))
    await asyncio.sleep(0.05)
    assert not load.done()
    vm.invalidate_range_end(other)
    assert await load == b"\0"


async def test_an_invalidation_between_lookup_and_commit_is_noticed(vm: Vm, at: int) -> None:
    """The sequence alone must do: the count has dropped again when the fault looks."""
    away = NotifierRange(1, at, at + PAGE_SIZE, Reason.CLEAR, True, 0, 1, 1)
    registration: Any = vm.registration
    fault, asked = registration.fault, 0

    async def overtaken(*args: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            vm.invalidate_range_start(away)
            vm.invalidate_range_end(away)
        return await fault(*args, **options)

    registration.fault = overtaken
    await vm.load(GPA, 1)
    assert asked == 2


async def test_the_guest_s_use_counts_when_the_program_s_idle_pages_are_looked_for(
    vm: Vm, mm: mmubus.AddressSpace, at: int
) -> None:
    """test_young and clear_young, as DAMON and idle page tracking ask: neither flushes the guest's TLB."""
    await vm.store(GPA, bytes(4 * PAGE_SIZE))
    assert await mm.call(Op.IDLE_SCAN, at, 4 * PAGE_SIZE, CLEAR) == 4
    assert await mm.call(Op.IDLE_SCAN, at, 4 * PAGE_SIZE, LOOK) == 0
    flushes = vm.flushes
    await vm.load(GPA + PAGE_SIZE, 2 * PAGE_SIZE)
    assert await mm.call(Op.IDLE_SCAN, at, 4 * PAGE_SIZE, LOOK) == 2
    assert await mm.call(Op.IDLE_SCAN, at, 2 * PAGE_SIZE, CLEAR) == 1
    assert await mm.call(Op.IDLE_SCAN, at, 4 * PAGE_SIZE, LOOK) == 1
    assert vm.flushes == flushes


async def test_reclaim_asks_the_guest_with_a_flush() -> None:
    """clear_flush_young: what the guest uses stays as long as something else is colder."""
    async with EmbeddedServer(frames_nr=64, swap_slots_nr=256) as server, mmubus.connect(server.address) as bus:
        program, other = await bus.create_mm("program"), await bus.create_mm("other")
        at, cold = await program.mmap(0, 4 * PAGE_SIZE), await other.mmap(0, 80 * PAGE_SIZE)
        vm, aged = Vm(), dict[int, bool]()
        clear_flush_young = vm.clear_flush_young

        def ask(mm: int, start: int, end: int) -> Any:
            flushes, young = vm.flushes, clear_flush_young(mm, start, end)
            aged.update(dict.fromkeys(young or (), vm.flushes == flushes + 1))
            return young

        vm.clear_flush_young = ask  # type: ignore[method-assign]
        await bus.register(vm, program)
        await vm.set_memory_slot(MemorySlot(0, GPA, at, 4))
        await vm.store(GPA, bytes(4 * PAGE_SIZE))
        for page in range(80):
            await other.store(cold + page * PAGE_SIZE, b"cold")
        assert aged == dict.fromkeys(range(at, at + 4 * PAGE_SIZE, PAGE_SIZE), True)


async def test_dirty_logging(vm: Vm, at: int) -> None:
    first = GPA // PAGE_SIZE
    await vm.set_memory_slot(MemorySlot(0, GPA, at, 16, log_dirty=True))
    await vm.load(GPA, 4 * PAGE_SIZE)
    assert vm.dirty_log(0) == []
    await vm.store(GPA + PAGE_SIZE, b"x")
    await vm.store(GPA + PAGE_SIZE, b"y")
    await vm.store(GPA + 3 * PAGE_SIZE - 1, b"zz")
    assert vm.dirty_log(0) == [first + 1, first + 2, first + 3]
    assert vm.dirty_log(0) == []
    await vm.store(GPA + PAGE_SIZE, b"again")
    assert vm.dirty_log(0) == [first + 1]


async def test_what_is_written_through_the_window_reaches_the_file(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> None:
    """Nobody but the guest knows that it wrote; the acknowledgement says so, and the page is written back."""
    file = await bus.open_file("disk", size=4 * PAGE_SIZE)
    at = await mm.mmap(0, 4 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file)
    first = Vm()
    await bus.register(first, mm)
    vm = Vm(bus.frame_window(writable=True))
    await bus.register(vm, mm)
    await vm.set_memory_slot(MemorySlot(0, GPA, at, 4))
    await vm.store(GPA + 5, b"guest")
    await file.fsync()
    assert vm.shadow == {}
    await mm.madvise(at, 4 * PAGE_SIZE, mmubus.MADV_PAGEOUT)
    assert await file.pread(5, 5) == b"guest"


async def test_exit_empties_the_shadow(vm: Vm, mm: mmubus.AddressSpace) -> None:
    await vm.load(GPA, PAGE_SIZE)
    await mm.exit()
    assert vm.shadow == {}
    with pytest.raises(mmubus.MmuBusError):
        await vm.load(GPA, 1)
