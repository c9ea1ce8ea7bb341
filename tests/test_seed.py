"""The promises of the seed (the patch series of January 2008), one test each, on real frames and page tables.

docs/seed.md goes through the seed name by name and points here.
"""

from collections.abc import Generator

import pytest
from mmubusd.mm.notification import AgePage, Answer
from mmubusd.notify import Op, StaleTranslation
from notify.conftest import rules_hold  # noqa: F401 - every scenario is judged by the design's rules
from notify.machine_room import AT, READ_ONLY, MachineRoom
from notify.transcript import MAINLINE, PAGE, SEED

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED = 4
ELSEWHERE = AT + 0x10_0000


def free_frames(room: MachineRoom) -> int:
    return room.memory.frames.free_nr


def test_register_puts_at_the_head_and_dispatch_is_newest_first() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    for _ in range(3):
        driver.register(mm, *SEED)
    room.run(mm.madvise(AT, PAGE, MADV_DONTNEED))
    assert driver.hears() == [f"1 invalidate_range {AT:x}-{AT + PAGE:x} for 3,2,1"]


def test_a_registration_is_visible_when_register_returns() -> None:
    """The seed's became visible after a grace period that it left to the caller."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED)
    first = room.run(mm.madvise(AT, PAGE, MADV_DONTNEED))
    late = room.client("late")
    late.register(mm, *SEED)
    second = room.run(mm.madvise(AT + PAGE, PAGE, MADV_DONTNEED))
    assert late.hears() == [f"1 invalidate_range {AT + PAGE:x}-{AT + 2 * PAGE:x} for 2"]
    driver.hears()
    driver.acks(2)
    assert first.done
    assert not second.done
    late.acks(1)
    assert second.done


def test_registering_takes_no_lock_that_an_operation_holds() -> None:
    """What the seed's locked form is for: here it is legal while an operation on the same memory waits."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    unmapping = room.run(mm.munmap(AT, 4 * PAGE))
    assert not unmapping.done
    other = driver.register(mm, *SEED)
    assert driver.unregister(other)
    assert driver.unregister(registration)
    assert unmapping.done


def test_a_missing_op_is_skipped_and_was_warned_of() -> None:
    room = MachineRoom()
    mm = room.program()
    deaf = room.client("deaf")
    registration = deaf.register(mm, Op.RELEASE)
    assert any("invalidate" in warning for warning in registration.warnings)
    assert room.run(mm.madvise(AT, PAGE, MADV_DONTNEED)).done
    assert deaf.hears() == []


def test_nobody_registered_nothing_is_made_and_nothing_waits() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(room.memory.create_mm("another"), *SEED)
    assert not mm.notified
    assert room.run(mm.munmap(AT, 4 * PAGE)).done
    assert room.run(mm.exit()).done
    assert room.bus.counters.rounds == 0
    assert driver.hears() == []


def test_unregister_is_idempotent_and_nothing_comes_after_it() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    assert driver.unregister(registration) is True
    assert driver.unregister(registration) is False
    assert room.run(mm.munmap(AT, 4 * PAGE)).done
    assert driver.hears() == []


def test_unregister_inside_release_says_so_once() -> None:
    """The seed unlinks before it calls release, so its unregister would delete the entry a second time."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    ending = room.run(mm.exit())
    assert driver.hears() == ["1 invalidate_all all for 1", "2 release all for 1"]
    assert driver.unregister(registration) is True
    assert ending.done
    assert driver.unregister(registration) is False


def test_exit_asks_invalidate_all_and_release_before_the_first_page_is_freed() -> None:
    room = MachineRoom()
    free = free_frames(room)
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED)
    taken = free - free_frames(room)
    assert taken > 0
    ending = room.run(mm.exit())
    assert driver.hears() == ["1 invalidate_all all for 1", "2 release all for 1"]
    driver.acks(1)
    assert not ending.done
    assert free - free_frames(room) == taken
    driver.acks(2)
    assert ending.done
    assert free_frames(room) == free


@pytest.mark.parametrize("call", ["munmap", "madvise", "mremap", "mmap over it"])
def test_frames_are_freed_after_the_acknowledgement(call: str) -> None:
    """The seed frees and then tells."""
    room = MachineRoom()
    mm = room.program()
    room.run(mm.store(AT + PAGE, b"more")).value()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    held = room.grant(driver, registration, AT, pages=2, write=True)
    free = free_frames(room)
    operation = {
        "munmap": lambda: room.run(mm.munmap(AT, 2 * PAGE)),
        "madvise": lambda: room.run(mm.madvise(AT, 2 * PAGE, MADV_DONTNEED)),
        "mremap": lambda: room.run(mm.mremap(AT, 2 * PAGE, 0x1000, 0)),
        "mmap over it": lambda: room.run(mm.mmap(AT, 2 * PAGE, READ_ONLY, 0x32)),
    }[call]()
    assert not operation.done
    assert free_frames(room) == free
    driver.hears()
    driver.acks(driver.session.outbox.last_seq)
    assert operation.done
    assert free_frames(room) > free
    with pytest.raises(StaleTranslation):
        room.read(driver, registration, AT + PAGE, held[1])


def test_a_fork_s_child_has_no_notifiers_and_the_parent_s_lose_the_right_to_write() -> None:
    """The first is the seed's; the second the seed forgot."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT, write=True)
    forking = room.run(mm.fork("child"))
    assert driver.hears() == [f"1 invalidate_range {AT:x}-{AT + 4 * PAGE:x} for 1"]
    assert not forking.done
    driver.acks(1)
    child = forking.value()
    assert not child.notified
    assert room.run(child.munmap(AT, 4 * PAGE)).done
    with pytest.raises(StaleTranslation):
        room.write(driver, registration, AT, held, b"new")


def test_mremap_tells_of_the_old_place() -> None:
    """The seed tells nobody."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED)
    moving = room.run(mm.mremap(AT, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE))
    assert driver.hears() == [f"1 invalidate_range {AT:x}-{AT + PAGE:x} for 1"]
    driver.acks(1)
    driver.hears()
    driver.acks(driver.session.outbox.last_seq)  # moving, then unmapping the old place, as the kernel does
    assert moving.value() == ELSEWHERE
    assert room.run(mm.load(ELSEWHERE, 3)).value() == b"old"


def test_mprotect_takes_the_right_to_write() -> None:
    """The seed tells nobody."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT, write=True)
    protecting = room.run(mm.mprotect(AT, PAGE, READ_ONLY))
    assert driver.hears() == [f"1 invalidate_range {AT:x}-{AT + PAGE:x} for 1"]
    driver.acks(1)
    assert protecting.done
    with pytest.raises(StaleTranslation):
        room.write(driver, registration, AT, held, b"new")


def test_on_copy_on_write_the_device_is_off_the_old_frame_before_the_new_one_is_visible() -> None:
    """The seed tells when the new page can be seen already; and its range ends one byte early, ours on the page."""
    room = MachineRoom()
    mm = room.program()
    child = room.run(mm.fork("child")).value()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT)
    storing = room.run(mm.store(AT, b"new"))
    assert driver.hears() == [f"1 invalidate_range {AT:x}-{AT + PAGE:x} for 1"]
    assert not storing.done
    assert room.read(driver, registration, AT, held) == b"old"
    driver.acks(1)
    assert storing.done
    assert room.run(mm.load(AT, 3)).value() == b"new"
    assert room.run(child.load(AT, 3)).value() == b"old"


def test_everybody_is_asked_for_the_age_and_one_yes_is_enough() -> None:
    """The first version of the seed stopped at the first yes, so that later notifiers never cleared their marks."""
    room = MachineRoom()
    mm = room.program()

    def age() -> Generator[AgePage, Answer, frozenset[int]]:
        answer = yield AgePage(mm, (AT, AT + PAGE))
        return answer.young

    clients = [room.client(name) for name in ("no", "yes", "no again")]
    for client in clients:
        client.register(mm, *SEED)
    aging = room.run(age())
    for client, young in zip(clients, [(), (AT,), ()], strict=True):
        assert len(client.hears()) == 1
        assert not aging.done
        client.acks(1, seq=1, young=young)
    assert aging.value() == {AT}


def test_external_rmap_is_a_mark_for_each_exporter() -> None:
    """One bit of the seed's page flags stands for all exporters; here one's unexport leaves the other's mark."""
    room = MachineRoom()
    mm = room.program(pages=1)
    one, two = room.client("one"), room.client("two")
    first, second = one.register(None), two.register(None)
    pfns = set()
    for client, rmap in ((one, first), (two, second)):
        granted = room.bus.export(client.session, rmap.id, mm.id, AT, AT + PAGE, False, room.now).value()
        assert granted.translations is not None
        pfns |= set(granted.translations.pfns.tolist())
    (pfn,) = pfns
    assert room.memory.exporters(pfn) == {first.id, second.id}
    room.bus.unexport(one.session, first.id, (pfn,), (), room.now).value()
    assert room.memory.exporters(pfn) == {second.id}
    unmapping = room.run(mm.munmap(AT, PAGE))
    assert one.hears() == []
    assert two.hears() == [f"1 rmap_invalidate_page {pfn} for {second.id}"]
    assert not unmapping.done
    two.acks(1)
    assert unmapping.done


def test_a_page_without_the_mark_costs_the_rmap_list_nothing() -> None:
    room = MachineRoom()
    mm = room.program()
    room.client("exporter").register(None)
    assert room.run(mm.munmap(AT, 4 * PAGE)).done
    assert room.bus.counters.rounds == 0


def test_both_generations_of_ops_hear_of_one_change() -> None:
    room = MachineRoom()
    mm = room.program()
    seed, mainline = room.client("seed"), room.client("mainline")
    seed.register(mm, *SEED)
    mainline.register(mm, *MAINLINE)
    operation = room.run(mm.madvise(AT, PAGE, MADV_DONTNEED))
    where = f"{AT:x}-{AT + PAGE:x}"
    assert seed.hears() == [f"1 invalidate_range {where} for 1"]
    assert mainline.hears() == [f"1 invalidate_range_start {where} for 2"]
    seed.acks(1)
    mainline.acks(1)
    assert operation.done
    assert mainline.hears() == [f"2 invalidate_range_end {where} for 2"]
