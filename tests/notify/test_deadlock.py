"""Cross-client deadlocks: a handler that waits for what waits for it. Each test is one cycle, and who is told."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from mmubusd.mm.errno import MmError
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.notify import Op, Operation, Session
from notify.machine_room import AT, MachineRoom
from notify.transcript import PAGE, World

FEATURES = frozenset({"within", "findings"})
RANGE = (Op.INVALIDATE_RANGE,)


def takes(mm: Any, start: int, end: int) -> Generator[Any, Any, str]:
    yield InvalidateRange(mm, start, end, Reason.UNMAP)
    return "taken"


def kinds(session: Session) -> list[str]:
    return [finding.kind for finding in session.findings]


def within(world: World, generator: Generator[Any, Any, Any], client: Any, seq: int, label: str) -> Operation[Any]:
    return world.bus.start(generator, world.now, label=label, session=client.session, within=seq)


def test_a_handler_that_takes_its_own_range_is_released_and_the_frames_wait() -> None:
    """The client runs overlapping notices one after another: the second waits for the first, whose handler waits."""
    world = World()
    mm = world.memory.create_mm()
    nic = world.client("nic", features=FEATURES)
    nic.register(mm, *RANGE)
    outer = world.run(takes(mm, 0, 4 * PAGE), "munmap")
    assert nic.hears() == ["1 invalidate_range 0-4000 for 1"]
    inner = within(world, takes(mm, PAGE, 2 * PAGE), nic, 1, "munmap of a part")
    with pytest.raises(MmError, match="would wait for itself") as caught:
        inner.value()
    assert caught.value.errno == "EDEADLK"
    assert "its handler waits for munmap of a part (operation 2) of nic" in caught.value.message
    assert "waits for its turn behind notice 1" in caught.value.message
    assert kinds(nic.session) == ["deadlock"]
    assert not outer.done
    assert 2 in world.bus.running, "what it took is still to be acknowledged"
    nic.hears()
    nic.acks(2)
    assert outer.value() == "taken"
    assert not world.bus.running


def test_two_clients_in_a_cycle_are_both_told_and_bystanders_are_not() -> None:
    world = World()
    mm = world.memory.create_mm()
    a, b, c = (world.client(name, features=FEATURES) for name in "abc")
    a.register(mm, *RANGE, start=0, end=PAGE)
    b.register(mm, *RANGE, start=PAGE, end=2 * PAGE)
    c.register(mm, *RANGE, start=2 * PAGE, end=3 * PAGE)
    first = world.run(takes(mm, 0, PAGE), "first")
    a.hears()
    second = within(world, takes(mm, PAGE, 2 * PAGE), a, 1, "second")
    b.hears()
    assert not second.done, "a waits for b, which is no cycle yet"
    third = within(world, takes(mm, 0, PAGE), b, 1, "third")
    assert isinstance(third.error, MmError)
    assert third.error.errno == "EDEADLK"
    assert (kinds(a.session), kinds(b.session), kinds(c.session)) == (["deadlock"], ["deadlock"], [])
    (finding,) = a.session.findings
    assert len(finding.lines) == 5
    b.acks(1)
    assert second.value() == "taken"
    a.hears()
    a.acks(2)
    assert first.value() == "taken"


def test_work_on_a_range_that_is_locked_fails_and_has_changed_nothing() -> None:
    """The second call waits for the range lock of the first, which waits for the handler."""
    room = MachineRoom()
    mm = room.program(4)
    nic = room.client("nic", features=FEATURES)
    nic.register(mm, *RANGE)
    outer = room.run(mm.munmap(AT, 2 * PAGE), "munmap")
    nic.hears()
    inner = within(room, mm.mprotect(AT + PAGE, 2 * PAGE, 1), nic, 1, "mprotect")
    assert isinstance(inner.error, MmError)
    assert (inner.error.errno, "nothing has changed" in inner.error.message) == ("EDEADLK", True)
    assert "which works on the same range" in inner.error.message
    assert [mapping.prot for mapping in mm.mappings()] == ["rw-p"]
    nic.acks(1)
    assert outer.value() == 0


def test_a_fault_into_what_is_being_taken_does_not_wait_until_it_is_late() -> None:
    room = MachineRoom()
    mm = room.program(4)
    nic = room.client("nic", features=FEATURES)
    held = nic.register(mm, *RANGE)
    room.grant(nic, held, AT, 2)
    outer = room.run(mm.madvise(AT, PAGE, 4), "madvise")
    nic.hears()
    fault = room.bus.fault(nic.session, held.id, AT, AT + PAGE, False, room.now, within=1)
    assert isinstance(fault.error, MmError)
    assert fault.error.errno == "EDEADLK"
    nic.acks(1)
    assert outer.value() == 0


def test_what_is_not_asked_for_by_a_handler_is_no_deadlock() -> None:
    """The same process may unmap what it mirrors; its handler answers meanwhile."""
    world = World()
    mm = world.memory.create_mm()
    nic = world.client("nic", features=FEATURES)
    nic.register(mm, *RANGE)
    first = world.run(takes(mm, 0, PAGE), "first", session=nic.session)
    second = world.run(takes(mm, 0, PAGE), "second", session=nic.session)
    nic.hears()
    assert (first.done, second.done) == (False, False)
    nic.acks(2)
    assert (first.value(), second.value()) == ("taken", "taken")
    assert not nic.session.findings


def test_a_request_of_a_handler_on_something_else_just_waits() -> None:
    world = World()
    mm = world.memory.create_mm()
    a, b = world.client("a", features=FEATURES), world.client("b", features=FEATURES)
    a.register(mm, *RANGE, start=0, end=PAGE)
    b.register(mm, *RANGE, start=PAGE, end=2 * PAGE)
    first = world.run(takes(mm, 0, PAGE), "first")
    a.hears()
    second = within(world, takes(mm, PAGE, 2 * PAGE), a, 1, "second")
    b.hears()
    b.acks(1)
    assert second.value() == "taken"
    a.acks(1)
    assert first.value() == "taken"


def test_a_client_that_does_not_say_is_suspected_when_it_is_late() -> None:
    """Its own pending request, begun since, is taken for the handler's: without it, it would be fenced."""
    world = World()
    mm = world.memory.create_mm()
    nic = world.client("nic")
    nic.register(mm, *RANGE)
    outer = world.run(takes(mm, 0, 4 * PAGE), "munmap")
    nic.hears()
    inner = world.run(takes(mm, PAGE, 2 * PAGE), "part", session=nic.session)
    world.later(0.5)
    assert not inner.done
    world.later(0.6)
    assert isinstance(inner.error, MmError)
    assert inner.error.errno == "EDEADLK"
    nic.hears()
    nic.acks(2)
    assert outer.value() == "taken"
    assert nic.session.fenced is None


def test_a_late_client_without_a_cycle_keeps_its_requests() -> None:
    world = World()
    mm = world.memory.create_mm()
    nic, other = world.client("nic"), world.client("other", ack_budget_s=10.0)
    nic.register(mm, *RANGE, start=0, end=PAGE)
    other.register(mm, *RANGE, start=PAGE, end=2 * PAGE, ack_budget_s=10.0)
    world.run(takes(mm, 0, PAGE), "first")
    nic.hears()
    inner = world.run(takes(mm, PAGE, 2 * PAGE), "elsewhere", session=nic.session)
    world.later(1.5)
    assert not inner.done
    other.hears()
    other.acks(1)
    assert inner.value() == "taken"


def test_an_ack_before_the_handler_has_finished_is_seen_by_what_it_asks_for() -> None:
    world = World()
    mm = world.memory.create_mm()
    nic = world.client("nic", features=FEATURES)
    nic.register(mm, *RANGE)
    world.run(takes(mm, 0, PAGE), "first")
    nic.hears()
    nic.acks(1)
    within(world, takes(mm, 8 * PAGE, 9 * PAGE), nic, 1, "from its handler")
    assert kinds(nic.session) == ["early-ack"]
    assert "was acknowledged before its handler had finished" in world.bus.sanitizer.offences[-1].message
