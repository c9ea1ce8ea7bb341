"""Semantics that are easy to get wrong, where the memory manager has a part in them; numbers as in test_semantics."""

from typing import Any

import pytest
from mmubusd.mm import device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.errno import MmError
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import HUGEPAGE
from mmubusd.mm.memory import Memory
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.mm.oom import reap
from mmubusd.mm.reclaim import reclaim
from mmubusd.notify import Op, RequestError
from notify.machine_room import AT, READ_WRITE, MachineRoom
from notify.transcript import MAINLINE, PAGE, SEED, World


class Room(MachineRoom):
    def __init__(self, **memory: Any) -> None:
        World.__init__(self, None, Memory(**memory))


def frame_at(mm: Any, address: int) -> int:
    pfn: int = mm.pgtable.get(address >> PAGE_SHIFT) >> PAGE_SHIFT
    return pfn


def test_15_a_fork_that_fails_sends_its_end() -> None:
    """The pinned page must be copied for the child, and no frame is left for that: V7 forgot the end here."""
    room = Room(frames_nr=4)
    mm = room.program(pages=3)
    client = room.client("driver")
    registration = client.register(mm, *MAINLINE)
    room.bus.pin(client.session, registration.id, AT, AT + 3 * PAGE, True, room.now).value()
    operation = room.run(mm.fork())
    assert client.hears()[-1].startswith("1 invalidate_range_start")
    client.acks(1)
    while not operation.done:  # whether anything can be reclaimed: pinned pages cannot
        client.hears()
        client.acks(client.received[-1][0])
    assert isinstance(operation.error, MmError)
    assert operation.error.errno == "ENOMEM"
    assert client.hears()[-1].endswith(f"invalidate_range_end {AT:x}-{AT + 3 * PAGE:x} for {registration.id}")


def test_18_the_age_check_inside_try_to_unmap_but_not_for_migration() -> None:
    room = Room(frames_nr=64, swap_slots_nr=64, nodes_nr=2, profile="v3")
    mm = room.program(pages=1)
    client = room.client("driver")
    registration = client.register(mm, *SEED)
    room.grant(client, registration, AT)
    room.memory.lru.drain()
    pfn = frame_at(mm, AT)
    victims = [(pfn, int(room.memory.frames.generation[pfn]))]
    operation = room.run(reclaim(room.memory, victims, under_pressure=True, asks=True))
    assert "age_page" in client.hears()[0]
    client.acks(1, seq=1, young=(AT,))
    assert operation.done
    assert mm.present(AT, AT + PAGE) == [(0, 1)], "young: it stays"
    operation = room.run(mm.move_pages(AT, PAGE, 1))
    assert ["invalidate_page" in line for line in client.hears()] == [True], "nobody is asked for its age"
    client.acks(2)
    assert operation.value() == 0
    assert room.memory.frames.node_of(frame_at(mm, AT)) == 1


@pytest.mark.parametrize("refuses", [False, True])
def test_21_writeback_must_evict_and_reclaim_may_be_refused(refuses: bool) -> None:
    room = Room(frames_nr=64)
    file = room.memory.create_file("f", "disk", 1)
    mm = room.program()
    room.run(mm.mmap(0x2000_0000, PAGE, READ_WRITE, 1 | 0x10, file, 0)).value()
    room.run(mm.store(0x2000_0000, b"dirty")).value()
    client = room.client("exporter")
    registration = client.register(None, Op.RMAP_INVALIDATE_PAGE)
    address = 0x2000_0000
    room.bus.export(client.session, registration.id, mm.id, address, address + PAGE, True, room.now).value()
    pfn = frame_at(mm, address)
    if refuses:
        operation = room.run(mm.madvise(address, PAGE, 21))
        client.hears()
        assert not client.received[-1][1].must_evict
        client.acks(1, seq=1, refused=True)
        assert operation.done
        assert frame_at(mm, address) == pfn, "it stays, and counts as mapped"
        assert room.memory.exporters(pfn)
    else:
        operation = room.run(room.memory.fsync(file))
        client.hears()
        assert client.received[-1][1].must_evict
        client.acks(1)
        assert operation.done
        assert not room.memory.exporters(pfn)


def test_22_no_lock_is_held_that_an_answer_needs() -> None:
    """While a round waits for it, the handler may call the memory manager anywhere else in the same address space."""
    room = MachineRoom()
    mm = room.program(pages=4)
    client = room.client("driver")
    registration = client.register(mm, *SEED)
    room.grant(client, registration, AT, pages=4)
    unmapping = room.run(mm.munmap(AT, PAGE))
    client.hears()
    inner = room.run(mm.mprotect(AT + 2 * PAGE, PAGE, 1), session=client.session)
    client.hears()
    client.acks(also=(2,))
    assert inner.done
    assert not unmapping.done
    client.acks(1)
    assert unmapping.done


def test_24_answering_takes_no_frame() -> None:
    """Not one frame is free while the answers are awaited that make some free; dirty pages are taken over too."""
    room = Room(frames_nr=64, swap_slots_nr=64)
    mm = room.program(pages=100)
    client = room.client("driver")
    registration = client.register(mm, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE)
    room.memory.low_watermark = 0  # nobody reclaims in advance
    room.grant(client, registration, AT, pages=63, write=True)
    assert room.memory.frames.free_nr == 0
    operation = room.run(mm.store(AT + 80 * PAGE, b"more"))
    for _ in range(20):
        client.received.clear()
        client.hears()
        for seq, notice, _ in client.received:
            assert room.memory.frames.free_nr == 0
            client.acks(seq, seq=seq, dirty=notice.pages)
    operation.value()


def test_26_registering_and_unregistering_inside_a_round() -> None:
    room = MachineRoom()
    mm = room.program()
    client, other = room.client("driver"), room.client("other")
    first = client.register(mm, *MAINLINE)
    room.grant(client, first, AT)
    other.register(mm, *SEED)
    operation = room.run(mm.madvise(AT, PAGE, 4))
    client.hears()
    second = client.register(mm, *MAINLINE)  # in the handler: it joins, and its first fault waits
    fault = room.fault(client, second, AT, wait_s=1.0)
    assert fault.waits_for in ("range", "lock")
    assert client.unregister(first), "in the handler: done at once, and counts as the answer"
    other.hears()
    other.acks(1)
    assert operation.done
    assert not fault.value().retry
    with pytest.raises(RequestError):
        client.register(mm, *MAINLINE, start=AT, end=AT)  # length 0
    room.run(mm.exit())
    for one in (client, other):
        one.hears()
        one.acks(max(seq for seq, *_ in one.received))
    with pytest.raises((RequestError, MmError)):
        client.register(mm, *MAINLINE)  # the address space has ended


def test_29_after_exit_nothing_is_served_and_unregistering_is_harmless() -> None:
    room = MachineRoom()
    mm = room.program()
    client = room.client("driver")
    registration = client.register(mm, Op.RELEASE, Op.INVALIDATE_RANGE)
    operation = room.run(mm.exit())
    client.hears()
    client.acks(1)
    assert operation.done
    assert not client.unregister(registration), "already gone"
    assert room.bus.snapshot(client.session, mm.id, AT, AT + PAGE, room.now).error is not None
    with pytest.raises((RequestError, MmError)):
        room.grant(client, registration, AT)


def test_30_newest_first_in_starts_and_in_ends() -> None:
    room = MachineRoom()
    mm = room.program()
    client = room.client("driver")
    ids = [client.register(mm, *MAINLINE).id for _ in range(3)]
    operation = room.run(mm.munmap(AT, PAGE))
    newest_first = ",".join(map(str, reversed(ids)))
    assert client.hears()[0].endswith(f" for {newest_first}")
    client.acks(1)
    assert operation.done
    assert client.hears()[0].endswith(f" for {newest_first}")


def test_31_a_split_is_told_within_the_change_of_protection() -> None:
    room = Room(frames_nr=2048, thp=Thp.MADVISE)
    mm = room.program(pages=1024)
    block = (AT + (2 << 20) - 1) & -(2 << 20)
    room.run(mm.madvise(block, 2 << 20, HUGEPAGE)).value()
    room.run(mm.store(block, b"huge")).value()
    mm.notified = True
    operation = room.run(mm.mprotect(block, PAGE, 1), report=True)
    told = [(one.reason, one.start, one.end) for one in operation.reported]
    assert (Reason.CLEAR, block, block + (2 << 20)) in told
    assert told[-1] == (Reason.PROTECTION_VMA, block, block + PAGE)


def test_34_the_end_does_not_mean_that_nothing_was_free_before() -> None:
    """Frames are free once the start is acknowledged by all; the end comes after, and nobody waits for it."""
    room = MachineRoom()
    mm = room.program()
    client = room.client("driver")
    registration = client.register(mm, *MAINLINE)
    pfn, generation = room.grant(client, registration, AT)[0]
    operation = room.run(mm.munmap(AT, PAGE))
    client.hears()
    assert room.memory.frames.generation[pfn] == generation
    client.acks(1)
    assert operation.done
    assert room.memory.frames.generation[pfn] != generation, "free, and the end is not even sent"
    assert "invalidate_range_end" in client.hears()[0]


def test_35_protection_passes_run_side_by_side_in_one_address_space() -> None:
    room = MachineRoom()
    mm = room.program(pages=4)
    client = room.client("driver")
    registration = client.register(mm, *MAINLINE)
    room.grant(client, registration, AT, pages=4)
    first = room.run(mm.uffd_writeprotect(AT, PAGE, 1))
    second = room.run(mm.uffd_writeprotect(AT + 2 * PAGE, PAGE, 1))
    assert [line.split()[1] for line in client.hears()] == ["invalidate_range_start"] * 2, "both are open"
    client.acks(also=(2,))
    assert second.done
    assert not first.done
    client.acks(1)
    assert first.done


def test_36_the_reaper_makes_faults_fail_before_it_touches_anything() -> None:
    room = MachineRoom()
    mm = room.program(pages=2)
    client = room.client("driver")
    registration = client.register(mm, *MAINLINE)
    pfn, generation = room.grant(client, registration, AT)[0]
    operation = room.run(reap(mm))
    client.hears()
    assert client.received[-1][1].nonblock
    assert room.memory.frames.generation[pfn] == generation, "nothing has been touched"
    fault = room.fault(client, registration, AT + PAGE, wait_s=0.5)
    client.acks(1)
    assert operation.value()
    assert room.memory.frames.generation[pfn] != generation
    room.later(1.0)
    assert fault.error is not None
    assert getattr(fault.error, "errno", "") == "EFAULT"
    assert device.snapshot(mm, AT, AT + PAGE_SIZE).tolist() == [0]


def test_37_the_last_reference_goes_without_a_release() -> None:
    """Giving a registration up does not call release; what the driver holds is its own business before that."""
    room = MachineRoom()
    mm = room.program()
    client = room.client("driver")
    first, second = client.register(mm, *SEED), client.register(mm, *SEED)
    assert client.unregister(first)
    assert client.hears() == []
    operation = room.run(mm.munmap(AT, PAGE))
    assert client.hears() == [f"1 invalidate_range {AT:x}-{AT + PAGE:x} for {second.id}"]
    client.acks(1)
    assert operation.done
    assert client.unregister(second)
    room.run(mm.exit()).value()
    assert client.hears() == []


def test_39_all_are_told_before_any_answer_is_awaited_and_an_ack_means_done() -> None:
    """What mainline's second pass is for; and a refusal ends nobody else's start."""
    room = MachineRoom()
    mm = room.program()
    one, two = room.client("one"), room.client("two")
    for client in (one, two):
        client.register(mm, *MAINLINE)

    def nonblock() -> Any:
        return (yield InvalidateRange(mm, AT, AT + PAGE, Reason.UNMAP, blockable=False))

    operation = room.run(nonblock())
    assert len(one.hears()) == len(two.hears()) == 1, "side by side"
    one.acks(seq=1, refused=True, also=(1,))
    assert not operation.done, "the other's answer is awaited nevertheless"
    two.acks(1)
    assert operation.value().refused
    assert one.hears() == []
    assert "invalidate_range_end" in two.hears()[0]
