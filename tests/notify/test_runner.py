"""The runner: locks, deadlines, what may go on beside what."""

from collections.abc import Generator
from typing import Any

import pytest
from mmubusd.mm.notification import Answer, InvalidateRange, Reason
from mmubusd.notify import Limits
from notify.machine_room import AT, MachineRoom
from notify.transcript import PAGE, SEED, World


def test_overlapping_calls_run_in_order_disjoint_ones_side_by_side() -> None:
    room = MachineRoom(Limits(ack_budget_s=10.0))
    mm = room.program(pages=8)
    driver = room.client("driver")
    driver.register(mm, *SEED)
    first = room.run(mm.munmap(AT, 2 * PAGE), "first")
    second = room.run(mm.munmap(AT + PAGE, 2 * PAGE), "second")
    third = room.run(mm.munmap(AT + 4 * PAGE, PAGE), "third")
    assert [one.waits_for for one in (first, second, third)] == ["round", "lock", "round"]
    assert set(room.bus.running) == {first.id, second.id, third.id}
    assert len(driver.hears()) == 2
    driver.acks(also=(2,))
    assert third.done
    driver.acks(1)
    assert first.done
    assert second.waits_for == "round"
    driver.hears()
    driver.acks(3)
    assert second.done
    assert not room.bus.running
    assert [one.label for one in room.bus.finished if one.label in ("first", "second", "third")] == [
        "third",
        "first",
        "second",
    ]


def test_a_fault_that_waits_for_a_lock_gives_up_at_its_deadline_and_leaves_the_queue() -> None:
    """Two faults of one driver on a page that is write-protected: the second waits for the first one's range lock."""
    room = MachineRoom(Limits(ack_budget_s=10.0))
    mm = room.program()
    room.run(mm.fork()).value()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    first = room.fault(driver, registration, AT, write=True)
    assert first.waits_for == "round"
    store = room.run(mm.store(AT, b"x"))
    assert store.waits_for == "lock"
    waiting = room.fault(driver, registration, AT, write=True, wait_s=0.2)
    assert waiting.waits_for in ("lock", "range")
    room.later(0.3)
    assert waiting.value().retry
    driver.hears()
    driver.acks(1)
    while not (first.done and store.done):
        assert driver.hears(), "something is under way"
        driver.acks(driver.session.outbox.last_seq)
    assert not first.value().retry
    assert not room.bus.running


def test_a_device_request_waits_for_a_lock_and_gives_up() -> None:
    room = MachineRoom(Limits(ack_budget_s=10.0))
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED, start=AT + 2 * PAGE, end=AT + 4 * PAGE)
    far = room.client("far")
    far.register(mm, *SEED, start=AT, end=AT + PAGE)
    ticket = mm.lock.acquire((AT + 2 * PAGE, AT + 4 * PAGE))
    waiting = room.fault(driver, registration, AT + 2 * PAGE, wait_s=0.2)
    assert waiting.waits_for == "lock"
    room.later(0.3)
    assert waiting.value().retry
    mm.lock.release(ticket)
    assert room.fault(driver, registration, AT + 2 * PAGE).done, "it has left no ticket behind"


def test_an_assertion_of_ours_is_not_swallowed() -> None:
    world = World()

    def broken() -> Generator[Any, Answer, None]:
        raise AssertionError("an invariant")
        yield

    with pytest.raises(AssertionError):
        world.run(broken())


def test_reports_of_one_address_space() -> None:
    room = MachineRoom()
    mine, other = room.program(), room.program()
    seen = []

    def look() -> Generator[Any, Answer, None]:
        seen.append((mine.notified, other.notified))
        yield InvalidateRange(mine, AT, AT + PAGE, Reason.CLEAR)

    room.run(look(), report=True, mm=mine)
    room.run(look(), report=True)
    assert seen == [(True, False), (True, True)]
    assert not mine.notified
    assert not other.notified
    operation = room.run(mine.munmap(AT, 2 * PAGE), report=True)
    assert [(one.call, one.start, one.end) for one in operation.reported] == [("invalidate_range", AT, AT + 2 * PAGE)]


def test_holders() -> None:
    room = MachineRoom()
    mm = room.program()
    driver, other = room.client("driver"), room.client("other")
    a, b = driver.register(mm, *SEED), other.register(mm, *SEED)
    room.grant(driver, a, AT, pages=2)
    room.grant(other, b, AT + PAGE)
    chain = room.bus.registry.chains[mm.id]
    assert chain.holders(AT, AT + 4 * PAGE) == [(b, 1), (a, 2)]
    assert chain.holders(AT, AT + PAGE) == [(a, 1)]
    assert "driver" in repr(a)
    assert (driver.session.notices_nr, driver.session.acknowledged_nr, driver.session.waiting_nr) == (0, 0, 0)
    assert repr(driver.session) == "Session(1 'driver' live)"
    room.run(mm.munmap(AT, PAGE))
    (round_,) = room.bus.rounds.open.values()
    assert (round_.start, round_.end, round_.open, round_.age(room.now + 1)) == (AT, AT + PAGE, True, 1.0)
    assert "waiting for ['other', 'driver']" in repr(round_)
    assert room.bus.ready
