"""The sanitizer: each breach is found, refused where it can be, and told with the history of its page."""

from __future__ import annotations

import pytest
from mmubusd.mm.check import check_idle
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.notify import FencedError, Limits, Op, RequestError, StaleTranslation
from mmubusd.notify.sanitizer import Breach, Offence
from notify.machine_room import AT, MachineRoom
from notify.transcript import PAGE, Client, World

FEATURES = frozenset({"within", "findings"})
RANGE = (Op.INVALIDATE_RANGE,)
SEED = (Op.RELEASE, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE)


def the_one(world: World) -> Offence:
    (offence,) = world.bus.offences()
    return offence


def told(client: Client) -> list[str]:
    return [finding.kind for finding in client.session.findings]


def taken_and_acked(room: MachineRoom, nic: Client, **hello: object) -> tuple[int, tuple[int, int]]:
    """A page that was given out, taken and acknowledged. Returns: the registration, what it held."""
    mm = room.program()
    registration = nic.register(mm, *SEED)
    (held,) = room.grant(nic, registration, AT, write=True)
    room.later(0.25)
    room.run(mm.munmap(AT, PAGE), "munmap(0x100000)")
    nic.hears()
    room.later(0.25)
    nic.acks(1)
    return registration.id, held


def test_a_stale_access_is_refused_and_tells_the_whole_story() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    registration, held = taken_and_acked(room, nic)
    room.later(0.5)
    operation = room.bus.dma_read(nic.session, registration, AT, 8, (held[0],), (held[1],), room.now)
    assert isinstance(operation.error, StaleTranslation)
    offence = the_one(room)
    assert (offence.breach, offence.refused, offence.name) == (Breach.STALE_ACCESS, True, "nic")
    assert offence.story == (
        "given out at 100.000000 s",
        "taken by munmap(0x100000) in round 1, notified at 100.250000 s",
        "acknowledged at 100.500000 s",
        "used at 101.000000 s",
    )
    assert told(nic) == ["stale-access"]


def test_a_write_into_a_freed_frame_is_found_by_its_poison_and_named() -> None:
    """Through shared memory nobody can refuse it."""
    room = MachineRoom()
    nic, other = room.client("nic", features=FEATURES), room.client("other", features=FEATURES)
    _, (pfn, generation) = taken_and_acked(room, nic)
    room.memory.frames.store[pfn * PAGE + 100] = 7
    assert not room.bus.offences()
    (offence,) = room.bus.offences(check_frames=64)
    assert (offence.breach, offence.pfn, offence.generation) == (Breach.POISON, pfn, generation)
    assert offence.name == "nic"
    assert any("acknowledged at" in line for line in offence.story)
    assert (told(nic), told(other)) == (["poison"], [])
    assert len(room.bus.offences(check_frames=64)) == 1, "told once"


def test_a_frame_that_is_used_again_is_checked_by_itself() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    _, (pfn, _) = taken_and_acked(room, nic)
    room.memory.frames.store[pfn * PAGE] = 7
    again = room.program(data=b"")
    for page in range(4):
        room.run(again.store(AT + page * PAGE, b"x")).value()
    assert the_one(room).breach is Breach.POISON


def test_an_access_after_unregister_and_one_after_release() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    mm = room.program()
    first, second = nic.register(mm, *SEED), nic.register(mm, *SEED)
    (held,) = room.grant(nic, first, AT)
    nic.unregister(first)
    with pytest.raises(RequestError, match="it was unregistered"):
        room.read(nic, first, AT, held)
    room.run(mm.exit(), "exit")
    nic.hears()
    nic.acks(1)
    with pytest.raises(RequestError, match="its address space has ended"):
        room.fault(nic, second, AT).value()
    assert [one.breach for one in room.bus.offences()] == [Breach.AFTER_UNREGISTER] * 2


def test_what_was_asked_before_the_release_was_handled_is_no_mistake() -> None:
    """Requests and acknowledgements travel on streams of their own: one may overtake the other."""
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    mm = room.program()
    registration = nic.register(mm, *SEED)
    room.run(mm.exit(), "exit")
    nic.hears()
    nic.acks(1)
    nic.session.asked_after = 0
    with pytest.raises(RequestError, match="has ended while this was under way") as caught:
        room.fault(nic, registration, AT).value()
    assert caught.value.errno == "ESRCH"
    assert not room.bus.offences()
    nic.session.asked_after = 1
    with pytest.raises(RequestError, match="its address space has ended"):
        room.fault(nic, registration, AT).value()
    assert the_one(room).breach is Breach.AFTER_UNREGISTER


def test_a_fault_that_waits_while_its_address_space_ends_is_no_mistake() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    mm = room.program()
    registration = nic.register(mm, *SEED)
    room.grant(nic, registration, AT)
    room.run(mm.exit(), "exit")
    fault = room.fault(nic, registration, AT)
    assert not fault.done
    nic.hears()
    nic.acks(1)
    assert fault.done
    with pytest.raises(RequestError) as caught:
        fault.value()
    assert caught.value.errno == "ESRCH"
    assert not room.bus.offences()


def test_an_access_after_a_fence() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    registration = nic.register(room.program(), *SEED)
    (held,) = room.grant(nic, registration, AT)
    room.bus.fence(nic.session, room.now, "a test")
    with pytest.raises(FencedError):
        room.read(nic, registration, AT, held)
    assert the_one(room).breach is Breach.AFTER_FENCE


def test_a_session_without_a_stream_may_not_reach_memory() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES, lease_s=3.0)
    registration = nic.register(room.program(), *SEED)
    (held,) = room.grant(nic, registration, AT)
    room.bus.session_lost(nic.session, room.now)
    with pytest.raises(RequestError, match="cannot hear of notices") as caught:
        room.read(nic, registration, AT, held)
    assert (caught.value.errno, caught.value.reason) == ("EAGAIN", "JEOPARDY")
    assert not room.bus.offences(), "it may have been on its way when the stream broke"
    room.later(2.5)
    with pytest.raises(RequestError, match="cannot hear of notices"):
        room.read(nic, registration, AT, held)
    assert the_one(room).breach is Breach.JEOPARDY


def test_what_slips_past_a_missing_op_is_told() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    mm = room.program()
    registration = nic.register(mm, Op.AGE_PAGE)
    room.grant(nic, registration, AT)
    room.run(mm.munmap(AT, PAGE), "munmap").value()
    offence = the_one(room)
    assert offence.breach is Breach.SLIPPED
    assert "it has no op for invalidate_range" in offence.message


def test_dirty_pages_that_are_handed_over_too_late() -> None:
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    mm = room.program(4)
    registration = nic.register(mm, *SEED)
    room.grant(nic, registration, AT, 2, write=True)
    room.run(mm.madvise(AT, PAGE, 4), "madvise")
    nic.hears()
    nic.acks(1)
    room.run(mm.madvise(AT + PAGE, PAGE, 4), "madvise")
    nic.hears()
    nic.acks(2, seq=2, dirty=(AT, AT + PAGE))
    offence = the_one(room)
    assert (offence.breach, offence.address) == (Breach.DIRTY_LOST, AT)


def test_dirty_pages_that_are_handed_over_while_the_registration_ends() -> None:
    """The server has taken it off the list already: what it could write counts as written, and nobody is to blame."""
    room = MachineRoom()
    nic = room.client("nic", features=FEATURES)
    mm = room.program(4)
    going, staying = nic.register(mm, *SEED), nic.register(mm, *SEED)
    room.grant(nic, going, AT, 1, write=True)
    room.grant(nic, staying, AT + PAGE, 1, write=True)
    room.run(mm.madvise(AT, 4 * PAGE, 4), "madvise")
    assert nic.hears() == [f"1 invalidate_range {AT:x}-{AT + 4 * PAGE:x} for {staying.id},{going.id}"]
    nic.unregister(going)
    nic.acks(1, seq=1, dirty=(AT, AT + PAGE))
    assert not room.bus.offences()


def test_lock_1_forbids_to_sleep_and_to_call_back() -> None:
    world = World()
    mm = world.memory.create_mm()
    nic = world.client("nic", features=FEATURES)
    nic.register(mm, *RANGE)

    def takes(lock: bool):
        yield InvalidateRange(mm, 0, PAGE, Reason.CLEAR, lock=lock)

    world.run(takes(True), "under a spinlock")
    nic.hears()
    world.bus.start(takes(False), world.now, label="from the handler", session=nic.session, within=1)
    nic.hears()
    nic.acks(2, seq=1, slept=True)
    breaches = [one.breach for one in world.bus.offences()]
    assert sorted(breaches) == [Breach.CALLED_UNDER_LOCK, Breach.DEADLOCK, Breach.SLEPT_UNDER_LOCK]


def test_findings_and_offences_are_bounded() -> None:
    room = MachineRoom(Limits(offences_max=8))
    nic = room.client("nic", features=FEATURES)
    registration, (pfn, generation) = taken_and_acked(room, nic)
    for _ in range(100):
        room.bus.dma_read(nic.session, registration, AT, 8, (pfn,), (generation,), room.now)
    assert len(room.bus.offences()) == 8
    assert len(nic.session.findings) == 32
    assert room.bus.sanitizer.counts[Breach.STALE_ACCESS] == 100


class TestWithheld:
    """Frames that a fenced client could reach through shared memory."""

    def fenced(self, **hello: object) -> tuple[MachineRoom, Client]:
        room = MachineRoom()
        nic = room.client("nic", window=True, **hello)
        mm = room.program()
        registration = nic.register(mm, *SEED)
        room.grant(nic, registration, AT, 2, write=True)
        room.run(mm.munmap(AT, 4 * PAGE), "munmap")
        nic.hears()
        self.free = room.memory.frames.free_nr
        room.later(2.5)
        assert nic.session.fenced is not None
        assert not room.bus.running
        return room, nic

    def test_they_stay_until_its_process_has_ended(self) -> None:
        room, nic = self.fenced()
        assert room.memory.frames.quarantine_nr == 2
        assert room.memory.frames.free_nr == self.free
        room.later(700.0)
        assert nic.session.id in room.bus.sessions, "it is remembered for as long as anything is withheld"
        room.bus.process_died(nic.session, room.now)
        assert room.memory.frames.free_nr == self.free + 2
        check_idle(room.memory)

    def test_or_until_it_comes_back_and_says_that_it_uses_them_no_more(self) -> None:
        room, nic = self.fenced()
        room.client("nic again", confirms="somebody else")
        assert room.memory.frames.quarantine_nr == 2
        room.client("nic again", confirms=nic.session.token)
        check_idle(room.memory)

    def test_a_process_that_ends_is_not_waited_for(self) -> None:
        room = MachineRoom()
        nic = room.client("nic", window=True)
        mm = room.program()
        room.grant(nic, nic.register(mm, *SEED), AT, 2)
        operation = room.run(mm.munmap(AT, PAGE), "munmap")
        room.bus.process_died(nic.session, room.now)
        assert operation.value() == 0
        check_idle(room.memory)

    def test_a_page_that_the_program_keeps_is_only_held(self) -> None:
        room = MachineRoom()
        nic = room.client("nic", window=True)
        mm = room.program()
        room.grant(nic, nic.register(mm, *SEED), AT, 1)
        room.bus.fence(nic.session, room.now, "a test")
        assert room.run(mm.load(AT, 3)).value() == b"old"
        room.run(mm.munmap(AT, 4 * PAGE)).value()
        free = room.memory.frames.free_nr
        room.bus.process_died(nic.session, room.now)
        assert room.memory.frames.free_nr == free + 1
        check_idle(room.memory)


class TestDemotion:
    """`uncached`: a registration that is too slow loses its translations, and its session nothing else."""

    def late(self) -> tuple[MachineRoom, Client, object, object, object]:
        room = MachineRoom(Limits(promote_s=5.0))
        nic = room.client("nic", lease_s=100.0)
        mm = room.program(8)
        flaky, steady = nic.register(mm, *RANGE, demotable=True), nic.register(mm, *RANGE, only_held=True)
        room.grant(nic, flaky, AT, 2)
        operation = room.run(mm.munmap(AT, PAGE), "munmap")
        nic.hears()
        room.later(2.1)
        return room, nic, flaky, steady, operation

    def test_instead_of_a_fence(self) -> None:
        room, nic, flaky, _, operation = self.late()
        assert operation.done
        assert nic.session.fenced is None
        assert flaky.uncached
        assert flaky.held_pages == 0
        assert [line.split()[1] for line in nic.hears() if not line.startswith("late")] == ["flush_all"]
        with pytest.raises(RequestError, match="is demoted for being slow") as caught:
            room.fault(nic, flaky, AT + PAGE).value()
        assert caught.value.reason == "UNCACHED"

    def test_nobody_waits_for_it_until_it_has_behaved_well(self) -> None:
        room, nic, flaky, _, _ = self.late()
        mm = room.memory.mm(1)
        assert room.run(mm.munmap(AT + PAGE, PAGE), "munmap").value() == 0
        nic.hears()
        room.later(60.0)
        with pytest.raises(RequestError):
            room.fault(nic, flaky, AT + 2 * PAGE).value()
        nic.acks(2)
        room.later(5.1)
        room.grant(nic, flaky, AT + 2 * PAGE)
        assert not flaky.uncached
        operation = room.run(mm.munmap(AT + 2 * PAGE, PAGE), "munmap")
        assert not operation.done
        nic.hears()
        nic.acks(3)
        assert operation.value() == 0

    def test_others_of_its_session_keep_what_they_hold(self) -> None:
        room, nic, _, steady, _ = self.late()
        room.grant(nic, steady, AT + 4 * PAGE)
        assert steady.held_pages == 1
        assert not steady.uncached

    def test_it_ends_with_its_address_space(self) -> None:
        room, nic, _, _, _ = self.late()
        operation = room.run(room.memory.mm(1).exit(), "exit")
        nic.hears()
        nic.acks(nic.session.as_of_seq)
        assert operation.done
        assert not nic.session.registrations
