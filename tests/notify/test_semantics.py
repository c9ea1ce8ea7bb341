"""Semantics that are easy to get wrong; the numbers are those of the semantic reference, section 8.

Those that other files show in detail are here in one line; those of the memory manager alone are in tests/mm.
"""

from collections.abc import Generator
from typing import Any

import pytest
from mmubusd.mm.errno import MmError
from mmubusd.mm.notification import AgePage, Answer, InvalidateRange, Reason, Release, RmapInvalidatePage
from mmubusd.notify import FencedError, Op, RequestError, StaleTranslation
from notify.machine_room import AT, READ_ONLY, MachineRoom
from notify.transcript import MAINLINE, PAGE, SEED, World


def ask(notification: Any) -> Generator[Any, Answer, Answer]:
    return (yield notification)


def unmap(mm: Any, start: int, end: int, **more: Any) -> Generator[Any, Answer, Answer]:
    return ask(InvalidateRange(mm, start, end, Reason.UNMAP, **more))


def test_01_nothing_is_granted_between_start_and_the_end_of_the_operation() -> None:
    """A walk that tells two places and then changes both: neither may be given out before it has ended."""
    room = MachineRoom()
    mm = room.program()
    driver, other = room.client("driver"), room.client("other")
    registration = driver.register(mm, *MAINLINE)
    other.register(mm, *MAINLINE, start=AT + PAGE, end=AT + 2 * PAGE)
    room.grant(driver, registration, AT)

    def walk() -> Generator[Any, Answer, None]:
        yield InvalidateRange(mm, AT, AT + PAGE, Reason.CLEAR)
        yield InvalidateRange(mm, AT + PAGE, AT + 2 * PAGE, Reason.CLEAR)

    operation = room.run(walk())
    driver.hears()
    driver.acks(1)
    assert len(driver.hears()) == 1, "the second place"
    driver.acks(2)
    fault = room.fault(driver, registration, AT, wait_s=1.0)
    assert fault.waits_for == "range"
    other.hears()
    other.acks(1)
    assert operation.done
    assert fault.done
    assert not fault.value().retry


def test_01_nor_to_someone_who_comes_in_the_middle() -> None:
    """Nobody was concerned by the first place when it was told; whoever comes then waits until the walk has ended."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED, start=AT + PAGE, end=AT + 2 * PAGE)

    def walk() -> Generator[Any, Answer, None]:
        yield InvalidateRange(mm, AT, AT + PAGE, Reason.CLEAR)
        yield InvalidateRange(mm, AT + PAGE, AT + 2 * PAGE, Reason.CLEAR)

    operation = room.run(walk())
    late = room.client("late")
    fault = room.fault(late, late.register(mm, *SEED), AT)
    assert fault.waits_for == "range"
    driver.hears()
    driver.acks(1)
    assert operation.done
    assert fault.done


def test_01_nor_when_the_list_was_empty_meanwhile() -> None:
    room = MachineRoom()
    mm = room.program()
    early, late, other = room.client("early"), room.client("late"), room.client("other")
    registration = early.register(mm, *SEED)
    elsewhere = room.program()
    other.register(elsewhere, *SEED)

    def walk() -> Generator[Any, Answer, None]:
        yield InvalidateRange(mm, AT, AT + PAGE, Reason.CLEAR)
        yield InvalidateRange(elsewhere, AT, AT + PAGE, Reason.CLEAR)

    operation = room.run(walk())
    early.unregister(registration)
    assert operation.waits_for == "round"
    fault = room.fault(late, late.register(mm, *SEED), AT)
    assert fault.waits_for == "range"
    other.hears()
    other.acks(1)
    assert operation.done
    assert fault.done


def test_02_no_frame_is_free_before_every_ack() -> None:
    room = MachineRoom()
    mm = room.program()
    drivers = [room.client(f"driver {n}") for n in range(3)]
    for driver in drivers:
        room.grant(driver, driver.register(mm, *SEED), AT)
    free = room.memory.frames.free_nr
    operation = room.run(mm.munmap(AT, PAGE))
    for driver in drivers:
        assert room.memory.frames.free_nr == free
        driver.hears()
        driver.acks(1)
    assert operation.done
    assert room.memory.frames.free_nr == free + 1


def test_03_a_grant_is_void_if_a_later_notice_that_overlaps_was_handled() -> None:
    """as_of_seq is what a client compares with: a grant that crossed a notice on its way."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    granted = room.fault(driver, registration, AT).value()
    room.run(mm.madvise(AT, PAGE, 4))
    driver.hears()
    driver.acks(1)
    assert granted.as_of_seq == 0, "less than the notice's 1: void"
    assert room.fault(driver, registration, AT).value().as_of_seq == 1


def test_04_a_round_elsewhere_bars_nothing_here() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    room.run(mm.munmap(AT, PAGE))
    assert room.fault(driver, registration, AT + PAGE).done


def test_05_the_end_of_one_never_opens_what_another_covers() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    first = room.run(ask(InvalidateRange(mm, AT, AT + 2 * PAGE, Reason.CLEAR)))
    second = room.run(ask(InvalidateRange(mm, AT + PAGE, AT + 3 * PAGE, Reason.CLEAR)))
    driver.hears()
    driver.acks(1)
    assert first.done
    fault = room.fault(driver, registration, AT + PAGE)
    assert not fault.done
    assert room.fault(driver, registration, AT).done
    driver.acks(2)
    assert second.done
    assert fault.done


def test_06_the_device_is_off_the_old_frame_before_the_new_pte_is_visible() -> None:
    room = MachineRoom()
    mm = room.program()
    room.run(mm.fork()).value()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (old,) = room.grant(driver, registration, AT)
    store = room.run(mm.store(AT, b"new"))
    assert not store.done
    looked = room.bus.snapshot(driver.session, mm.id, AT, AT + PAGE, room.now).value()
    assert looked.translations.pfns[0] in (old[0], 0xFFFF_FFFF_FFFF_FFFF)
    driver.hears()
    driver.acks(1)
    assert store.done
    with pytest.raises(StaleTranslation):
        room.read(driver, registration, AT, old)


def test_07_fork_takes_write_rights_and_the_childs_list_is_empty() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT, write=True)
    fork = room.run(mm.fork())
    driver.hears()
    driver.acks(1)
    assert not fork.value().notified
    with pytest.raises(StaleTranslation):
        room.write(driver, registration, AT, held, b"x")


def test_08_mremap_tells_the_old_range_only() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED)
    room.run(mm.mremap(AT, PAGE, PAGE, 3, AT + 64 * PAGE), report=True)
    lines = []
    while heard := driver.hears():
        lines += heard
        driver.acks(driver.session.outbox.last_seq)
    assert lines
    assert all(f"{AT:x}-{AT + PAGE:x}" in line for line in lines)


def test_09_release_is_idempotent_with_unregister() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    registration = driver.register(mm, *SEED)
    operation = world.run(ask(Release(mm)))
    driver.hears()
    assert driver.unregister(registration)
    assert not driver.unregister(registration)
    assert operation.done
    assert driver.hears() == []


def test_10_a_range_event_reaches_whoever_is_being_released() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    release = world.run(ask(Release(mm)))
    walk = world.run(unmap(mm, 0, PAGE))
    assert [line.split()[1] for line in driver.hears()] == ["invalidate_all", "release", "invalidate_range"]
    driver.acks(2)
    assert release.done
    assert walk.done, "with the registration its notices are gone"


def test_11_never_an_end_without_its_start() -> None:
    room = MachineRoom()
    mm = room.program()
    early, late = room.client("early"), room.client("late")
    early.register(mm, *MAINLINE)
    operation = room.run(mm.munmap(AT, PAGE))
    registration = late.register(mm, *MAINLINE)
    fault = room.fault(late, registration, AT)
    assert fault.waits_for in ("range", "lock"), "it waits like everyone"
    early.hears()
    early.acks(1)
    assert operation.done
    assert len(early.hears()) == 1
    assert late.hears() == []
    assert isinstance(fault.error, MmError)


def test_12_a_refused_start_is_rolled_back_for_everyone_else() -> None:
    world = World()
    mm = world.memory.create_mm()
    clients = [world.client(name) for name in "abc"]
    for client in clients:
        client.register(mm, *MAINLINE)
    operation = world.run(unmap(mm, 0, PAGE, blockable=False))
    for client in clients:
        client.hears()
        client.acks(1, **({"seq": 1, "refused": True} if client is clients[1] else {}))
    assert operation.value().refused
    assert [len(client.hears()) for client in clients] == [1, 0, 1]


def test_13_refusing_a_blockable_start_is_not_an_answer() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *MAINLINE)
    operation = world.run(unmap(mm, 0, PAGE))
    driver.hears()
    driver.acks(1, seq=1, refused=True)
    assert not operation.done
    world.later(2.1)
    assert operation.done
    assert driver.session.fenced is not None


@pytest.mark.parametrize("fails", [False, True])
def test_14_15_a_start_has_its_end_whatever_the_operation_does(fails: bool) -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *MAINLINE)

    def operation() -> Generator[Any, Answer, None]:
        yield InvalidateRange(mm, 0, PAGE, Reason.CLEAR)
        if fails:
            raise MmError("ENOMEM", "no frame for the copy")

    running = world.run(operation())
    driver.hears()
    driver.acks(1)
    assert running.done
    assert (running.error is not None) == fails
    assert driver.hears() == ["2 invalidate_range_end 0-1000 for 1"]


def test_16_ranges_are_not_clipped_to_the_interval() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED, start=PAGE, end=2 * PAGE)
    world.run(unmap(mm, 0, 8 * PAGE))
    assert driver.hears() == ["1 invalidate_range 0-8000 for 1"], "one notice for all; clipping is the client's"
    assert world.run(unmap(mm, 2 * PAGE, 8 * PAGE)).done


def test_17_everyone_is_asked_for_age_and_the_absent_are_not_young() -> None:
    world = World()
    mm = world.memory.create_mm()
    young, old, silent = world.client("young"), world.client("old"), world.client("silent")
    for client in (young, old, silent):
        client.register(mm, *SEED)
    operation = world.run(ask(AgePage(mm, (0, PAGE, 2 * PAGE))))
    young.hears()
    young.acks(1, seq=1, young=(0,))
    assert not operation.done, "no short cut"
    old.hears()
    old.acks(1, seq=1, young=(2 * PAGE,))
    world.later(2.1)
    assert operation.value().young == {0, 2 * PAGE}


def test_19_dirty_is_on_the_frame_though_overlapping_notices_are_acked_the_other_way_round() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    ((pfn, _),) = room.grant(driver, registration, AT, write=True)
    first = room.run(ask(InvalidateRange(mm, AT, AT + PAGE, Reason.CLEAR)))
    second = room.run(ask(InvalidateRange(mm, AT, AT + 2 * PAGE, Reason.CLEAR)))
    driver.hears()
    seen: list[int] = []
    set_dirty = room.memory.set_dirty
    room.memory.set_dirty = lambda pfns: (seen.extend(pfns), set_dirty(pfns))
    driver.acks(2, seq=2, dirty=(AT,))
    assert first.done
    assert second.done
    assert seen == [pfn]
    assert room.bus.counters.dirty_unheld == 0


def test_20_21_exporters_may_refuse_reclaim_and_must_evict_for_the_rest() -> None:
    world = World()
    driver, other = world.client("driver"), world.client("other")
    mine, theirs = driver.register(None), other.register(None)
    for registration in (mine, theirs):
        for pfn in (4, 5):
            world.memory.export(pfn, registration.id)
            registration.table.grant(pfn, 0, 3)  # type: ignore[union-attr, arg-type]
            registration.session.holding += 1
    reclaim = world.run(ask(RmapInvalidatePage((4, 5), must_evict=False)))  # type: ignore[arg-type]
    driver.hears(), other.hears()
    driver.acks(1, seq=1, refused_pages=(4,), dirty=(5,))
    other.acks(1)
    assert reclaim.value().refused_pfns == {4}
    assert world.memory.exporters(4) == {mine.id}
    assert world.memory.exporters(5) == frozenset()
    assert world.memory.dirty == {5}
    evict = world.run(ask(RmapInvalidatePage((4,), must_evict=True)))  # type: ignore[arg-type]
    driver.hears()
    driver.acks(2, seq=2, refused=True)
    assert not evict.done, "it may not be refused"
    driver.acks(also=(2,))
    assert evict.value().refused_pfns == frozenset()


def test_23_a_handler_that_faults_into_its_own_round_is_told_to_retry() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    operation = room.run(ask(InvalidateRange(mm, AT, AT + PAGE, Reason.CLEAR)))
    driver.hears()
    inside = room.fault(driver, registration, AT, wait_s=0.1)
    room.later(0.2)
    assert inside.value().retry
    driver.acks(1)
    assert operation.done


def test_25_the_owner_is_told_and_filters_for_itself() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *MAINLINE, owner=7)
    world.run(ask(InvalidateRange(mm, 0, PAGE, Reason.MIGRATE, owner=7)))
    driver.hears()
    assert driver.received[0][1].owner == 7


def test_27_granting_raises_nothing() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED)
    assert room.run(mm.store(AT + PAGE, b"first touch")).done
    assert driver.hears() == []


def test_28_29_after_exit_faults_fail_and_unregistering_works() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    room.grant(driver, registration, AT)
    operation = room.run(mm.exit())
    assert room.memory.frames.free_nr < room.memory.frames.frames_nr - 1, "nothing is free before release is acked"
    driver.hears()
    driver.acks(2)
    assert operation.done
    with pytest.raises(RequestError):
        room.grant(driver, registration, AT)
    assert driver.unregister(registration) is False
    with pytest.raises(RequestError) as caught:
        driver.register(mm, *SEED)
    assert caught.value.errno == "ESRCH"


def test_32_protection_voids_translations() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT, write=True)
    operation = room.run(mm.mprotect(AT, PAGE, READ_ONLY))
    driver.hears()
    driver.acks(driver.session.outbox.last_seq)
    assert operation.done
    with pytest.raises(StaleTranslation):
        room.write(driver, registration, AT, held, b"x")
    with pytest.raises(MmError):
        room.grant(driver, registration, AT, write=True)
    assert room.grant(driver, registration, AT) == [held], "the same frame, for reading"


def test_33_the_same_page_twice_is_harmless() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    rounds = [world.run(unmap(mm, 0, PAGE)) for _ in range(3)]
    driver.hears()
    driver.acks(3)
    assert all(one.done for one in rounds)


def test_38_a_token_of_a_registration_that_is_gone_is_gone() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT)
    driver.unregister(registration)
    with pytest.raises(RequestError) as caught:
        room.read(driver, registration, AT, held)
    assert caught.value.reason == "NO_SUCH_REGISTRATION"


def test_40_the_fence_comes_before_the_free() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT, write=True)
    free = room.memory.frames.free_nr
    operation = room.run(mm.munmap(AT, PAGE))
    room.later(1.99)
    assert room.memory.frames.free_nr == free
    assert room.memory.frames.quarantine_nr == 1
    room.later(0.02)
    assert operation.done
    assert room.memory.frames.free_nr == free + 1
    with pytest.raises(FencedError) as caught:
        room.write(driver, registration, AT, held, b"late")
    assert caught.value.held_pages == (1,)
    assert room.bus.counters.freed_before_ack == 0


def test_a_missing_op_is_skipped_as_a_null_op_is() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, Op.AGE_PAGE)
    assert world.run(unmap(mm, 0, PAGE)).done
    assert world.run(ask(Release(mm))).done
    assert driver.session.registrations == {}
