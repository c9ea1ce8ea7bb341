"""The device's side on real memory: granting, barring, checking and explaining."""

import pytest
from mmubusd.mm.errno import MmError
from mmubusd.notify import NO_PFN, FencedError, Limits, Op, RequestError, StaleTranslation
from notify.machine_room import AT, PRIVATE, READ_ONLY, READ_WRITE, MachineRoom
from notify.transcript import MAINLINE, PAGE, SEED


def test_grant_read_write() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (held,) = room.grant(driver, registration, AT, write=True)
    assert registration.held_pages == driver.session.holding == 1
    assert room.read(driver, registration, AT, held) == b"old"
    room.write(driver, registration, AT + 1, held, b"xy")
    assert room.run(mm.load(AT, 3)).value() == b"oxy"
    again = room.grant(driver, registration, AT, pages=4)
    assert again[0] == held
    assert again[1:] == [(0, 0)] * 3, "untouched pages read as the zero page"
    assert registration.held_pages == 4


def test_stale_is_refused_and_explained() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED, name="mirror")
    (held,) = room.grant(driver, registration, AT)
    frames = room.memory.frames
    operation = room.run(mm.munmap(AT, PAGE), "munmap(0x100000, 4096) of program")
    assert frames.quarantine_nr == 1
    assert room.read(driver, registration, AT, held) == b"old", "until it has acked, the page is its own"
    room.later(0.25)
    driver.hears()
    driver.acks(1)
    assert operation.done
    assert frames.quarantine_nr == 0
    assert registration.held_pages == driver.session.holding == 0
    room.later(0.5)
    with pytest.raises(StaleTranslation) as caught:
        room.read(driver, registration, AT, held)
    assert "munmap(0x100000, 4096) of program took it in round 1" in caught.value.message
    assert "0.500000 s ago" in caught.value.message
    assert caught.value.fields["operation"] == "munmap(0x100000, 4096) of program"
    assert caught.value.fields["acked_at"] == pytest.approx(100.25)
    assert room.bus.counters.stale_refused == 1
    assert room.bus.counters.freed_before_ack == 0


def test_stale_of_other_kinds() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    with pytest.raises(StaleTranslation, match="never given out"):
        room.read(driver, registration, AT, (5, 0))
    (pfn, generation) = room.grant(driver, registration, AT)[0]
    with pytest.raises(StaleTranslation, match=f"held there is frame {pfn}"):
        room.read(driver, registration, AT, (pfn, generation + 1))
    deaf = driver.register(mm, Op.RELEASE)
    (held,) = room.grant(driver, deaf, AT)
    room.run(mm.munmap(AT, PAGE), "munmap")
    driver.hears()
    driver.acks(1)
    with pytest.raises(StaleTranslation, match="was not told: it has no op"):
        room.read(driver, deaf, AT, held)
    assert room.bus.counters.slipped == 1


def test_a_barred_fault_waits_and_gets_the_new_page() -> None:
    room = MachineRoom()
    mm = room.program()
    driver, other = room.client("driver"), room.client("other")
    mine, theirs = driver.register(mm, *SEED), other.register(mm, *SEED)
    (old,) = room.grant(driver, mine, AT)
    operation = room.run(mm.madvise(AT, PAGE, 4), "madvise(DONTNEED)")
    fault = room.fault(other, theirs, AT, write=True)
    assert fault.waits_for in ("range", "lock")
    driver.hears(), other.hears()
    driver.acks(1)
    assert not fault.done
    other.acks(1)
    assert operation.done
    assert fault.done
    granted = fault.value()
    assert granted.translations is not None
    assert granted.as_of_seq == 1
    assert (granted.translations.pfns[0], granted.translations.generations[0]) != old
    assert room.run(mm.load(AT, 3)).value() == bytes(3)


def test_a_barred_fault_is_told_to_retry_at_its_deadline() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    operation = room.run(mm.munmap(AT, PAGE))
    fault = room.fault(driver, registration, AT, wait_s=0.3)
    room.later(0.29)
    assert not fault.done
    room.later(0.02)
    assert fault.value().retry
    assert not operation.done
    elsewhere = room.fault(driver, registration, AT + PAGE)
    assert elsewhere.done, "only what is barred waits"
    driver.hears()
    driver.acks(1)
    assert operation.done
    with pytest.raises(MmError) as caught:
        room.grant(driver, registration, AT)
    assert caught.value.errno == "EFAULT"


def test_own_write_fault_breaks_copy_on_write() -> None:
    """A device's write fault on a page shared by fork: everyone is off the old page first, the faulting driver too."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    (old,) = room.grant(driver, registration, AT, write=True)
    fork = room.run(mm.fork("child"))
    assert driver.hears() == [f"1 invalidate_range {AT:x}-{AT + 4 * PAGE:x} for 1"]
    driver.acks(1)
    child = fork.value()
    (shared,) = room.grant(driver, registration, AT)
    assert shared == old
    with pytest.raises(RequestError) as caught:
        room.write(driver, registration, AT, shared, b"new")
    assert caught.value.errno == "EPERM"
    fault = room.fault(driver, registration, AT, write=True)
    assert driver.hears() == [f"2 invalidate_range {AT:x}-{AT + PAGE:x} for 1"]
    assert not fault.done
    driver.acks(2)
    translations = fault.value().translations
    assert translations is not None
    new = (int(translations.pfns[0]), int(translations.generations[0]))
    assert new != old
    room.write(driver, registration, AT, new, b"new")
    assert room.run(mm.load(AT, 3)).value() == b"new"
    assert room.run(child.load(AT, 3)).value() == b"old"
    assert not child.notified, "its list starts empty"


def test_snapshot_grants_nothing() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    driver.register(mm, *SEED)
    room.run(mm.load(AT + PAGE, 1)).value()
    looked = room.bus.snapshot(driver.session, mm.id, AT - PAGE, AT + 3 * PAGE, room.now).value()
    assert looked.states.tolist() == [0xFF, 1, 2, 0]
    assert looked.translations.pfns[0] == NO_PFN
    assert looked.translations.rights.tolist() == [0, 3, 1, 0]
    assert driver.session.holding == 0


def test_pins() -> None:
    room = MachineRoom()
    mm = room.program()
    driver, other = room.client("driver"), room.client("other")
    registration = driver.register(mm, *SEED)
    pinned = room.bus.pin(driver.session, registration.id, AT, AT + PAGE, True, room.now).value()
    held = (int(pinned.translations.pfns[0]), int(pinned.translations.generations[0]))
    operation = room.run(mm.munmap(AT, PAGE))
    driver.hears()
    driver.acks(1)
    assert operation.done
    read = room.bus.dma_read(driver.session, registration.id, 0, 3, (held[0],), (held[1],), room.now, pin=pinned.pin)
    assert read.value() == b"old", "a pin outlives the mapping"
    with pytest.raises(RequestError, match="holds no pin"):
        room.bus.unpin(other.session, pinned.pin, False, room.now).value()
    free = room.memory.frames.free_nr
    room.bus.unpin(driver.session, pinned.pin, True, room.now).value()
    assert room.memory.frames.free_nr == free + 1
    with pytest.raises(RequestError, match="holds no pin"):
        room.bus.unpin(driver.session, pinned.pin, False, room.now).value()


def test_pins_of_a_fenced_session_stay_until_it_is_forgotten() -> None:
    room = MachineRoom(Limits(remember_s=50.0))
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    room.bus.pin(driver.session, registration.id, AT, AT + PAGE, True, room.now).value()
    room.bus.fence(driver.session, room.now, "it is a test")
    room.run(mm.munmap(AT, PAGE)).value()
    free = room.memory.frames.free_nr
    room.later(49.0)
    assert room.memory.frames.free_nr == free
    room.later(1.1)
    assert room.memory.frames.free_nr == free + 1


@pytest.mark.parametrize(
    ("start", "end", "errno"),
    [
        (AT + 1, AT + PAGE, "EINVAL"),
        (AT, AT, "EINVAL"),
        (AT + PAGE, AT, "EINVAL"),
        (-PAGE, PAGE, "EINVAL"),
        (0, 1 << 50, "EINVAL"),
        (0, (1 << 20) * PAGE * 2, "E2BIG"),
        (AT + 2 * PAGE, AT + 3 * PAGE, "EINVAL"),
    ],
)
def test_bad_ranges(start: int, end: int, errno: str) -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED, start=AT, end=AT + 2 * PAGE)
    with pytest.raises(RequestError) as caught:
        room.bus.fault(driver.session, registration.id, start, end, False, room.now).value()
    assert caught.value.errno == errno


def test_bad_requests() -> None:
    room = MachineRoom()
    mm = room.program(prot=READ_ONLY, data=b"")
    driver = room.client("driver")
    registration, rmap = driver.register(mm, *SEED), driver.register(None)
    bus, session, now = room.bus, driver.session, room.now
    with pytest.raises(RequestError) as caught:
        room.grant(driver, driver.register(mm, *SEED), AT) and bus.fault(session, 99, AT, AT + PAGE, False, now).value()
    assert caught.value.reason == "NO_SUCH_REGISTRATION"
    with pytest.raises(RequestError, match="exports"):
        bus.fault(session, rmap.id, AT, AT + PAGE, False, now).value()
    with pytest.raises(RequestError, match="exports"):
        bus.export(session, registration.id, mm.id, AT, AT + PAGE, False, now).value()
    with pytest.raises(RequestError, match="exports"):
        bus.unexport(session, registration.id, (), (), now).value()
    with pytest.raises(RequestError, match="pin"):
        bus.pin(session, rmap.id, AT, AT + PAGE, False, now).value()
    with pytest.raises(MmError) as denied:
        room.grant(driver, registration, AT, write=True)
    assert denied.value.errno == "EPERM"
    with pytest.raises(RequestError, match="were presented"):
        bus.dma_read(session, registration.id, AT, 2 * PAGE, (1,), (0,), now).value()
    with pytest.raises(RequestError, match="bytes"):
        bus.dma_read(session, registration.id, AT, 0, (), (), now).value()


def test_a_fence_in_the_middle_of_a_fault() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    operation = room.run(mm.munmap(AT, PAGE))
    fault = room.fault(driver, registration, AT, wait_s=5.0)
    room.later(2.1)
    assert operation.done
    with pytest.raises(FencedError):
        fault.value()


def test_unregistering_while_a_fault_waits() -> None:
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration, other = driver.register(mm, *SEED), driver.register(mm, *SEED)
    room.run(mm.munmap(AT, PAGE))
    fault = room.fault(driver, registration, AT)
    driver.unregister(registration)
    driver.hears()
    driver.acks(1)
    with pytest.raises(RequestError, match="no registration"):
        fault.value()
    assert other.alive


def test_only_held_hears_of_what_it_holds() -> None:
    room = MachineRoom()
    mm = room.program(pages=8)
    driver = room.client("driver")
    registration = driver.register(mm, *SEED, only_held=True)
    assert room.run(mm.munmap(AT + 7 * PAGE, PAGE)).done, "it holds nothing"
    room.grant(driver, registration, AT + PAGE)
    assert room.run(mm.munmap(AT + 6 * PAGE, PAGE)).done, "in the same leaf table, and not held"
    operation = room.run(mm.munmap(AT, 2 * PAGE))
    assert len(driver.hears()) == 1
    driver.acks(1)
    assert operation.done
    assert room.run(mm.munmap(AT + 2 * PAGE, PAGE)).done, "it holds nothing any more"
    release = room.run(mm.exit())
    assert driver.hears() == ["2 invalidate_all all for 1", "3 release all for 1"]
    driver.acks(3)
    assert release.done


def test_dirty_pages_are_on_the_frame_before_the_ack_counts() -> None:
    room = MachineRoom()
    file = room.memory.create_file("data", "shm", 4)
    mm = room.memory.create_mm()
    room.run(mm.mmap(AT, 4 * PAGE, READ_WRITE, 0x11, file)).value()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    ((pfn, _),) = room.grant(driver, registration, AT, write=True)
    operation = room.run(mm.madvise(AT, PAGE, 4))
    marked: list[int] = []
    set_dirty = room.memory.set_dirty

    def watch(pfns: object) -> None:
        assert not operation.done
        marked.extend(pfns)  # type: ignore[arg-type]
        set_dirty(pfns)

    room.memory.set_dirty = watch
    driver.hears()
    driver.acks(1, seq=1, dirty=(AT, AT + PAGE))
    assert operation.done
    assert marked == [pfn]
    assert room.bus.counters.dirty_unheld == 1, "the second page was never given out"


@pytest.mark.parametrize("ending", ["unregister", "leave", "fence"])
def test_what_could_be_written_counts_as_written_when_its_holder_goes(ending: str) -> None:
    room = MachineRoom()
    file = room.memory.create_file("data", "shm", 2)
    mm = room.memory.create_mm()
    room.run(mm.mmap(AT, 2 * PAGE, READ_WRITE, 0x11, file)).value()
    room.run(mm.mprotect(AT + PAGE, PAGE, READ_ONLY)).value()
    driver = room.client("driver")
    registration = driver.register(mm, *SEED)
    ((written, _),) = room.grant(driver, registration, AT, write=True)
    ((_, _),) = room.grant(driver, registration, AT + PAGE, write=False)
    marked: list[int] = []
    room.memory.set_dirty = marked.extend
    if ending == "unregister":
        driver.unregister(registration)
    elif ending == "leave":
        room.bus.leave(driver.session, room.now)
    else:
        room.bus.fence(driver.session, room.now, "a test")
    assert marked == [written]


def test_dirty_pages_of_a_flush_are_those_of_every_address_space() -> None:
    """One address, two address spaces, one acknowledgement: each frame counts as written."""
    room = MachineRoom()
    one, other = room.program(1), room.program(1)
    driver = room.client("driver")
    ((first, _),) = room.grant(driver, driver.register(one, *SEED), AT, write=True)
    ((second, _),) = room.grant(driver, driver.register(other, *SEED), AT, write=True)
    marked: list[int] = []
    room.memory.set_dirty = marked.extend
    room.bus.flush(driver.session, room.now)
    driver.hears()
    driver.acks(1, seq=1, dirty=(AT,))
    assert sorted(marked) == sorted((first, second))
    assert room.bus.counters.dirty_unheld == 0


def test_exports() -> None:
    room = MachineRoom()
    mm = room.program(pages=2)
    driver = room.client("driver")
    rmap = driver.register(None, name="exporter")
    room.run(mm.load(AT + PAGE, 1)).value()
    granted = room.bus.export(driver.session, rmap.id, mm.id, AT, AT + 2 * PAGE, False, room.now).value()
    assert granted.translations is not None
    pfns = granted.translations.pfns.tolist()
    assert 0 not in pfns, "the zero page got a frame of its own"
    assert rmap.held_pages == 2
    assert room.memory.exporters(pfns[0]) == {rmap.id}
    held = (pfns[0], int(granted.translations.generations[0]))
    assert room.read(driver, rmap, 0, held) == b"old"
    operation = room.run(mm.munmap(AT, 2 * PAGE), "munmap")
    heard = driver.hears()
    assert heard
    assert all("rmap_invalidate_page" in line for line in heard)
    driver.acks(driver.session.outbox.last_seq)
    while not operation.done:
        driver.hears()
        driver.acks(driver.session.outbox.last_seq)
    assert rmap.held_pages == 0
    with pytest.raises(StaleTranslation, match="munmap took it in round"):
        room.read(driver, rmap, 0, held)
    assert room.bus.counters.freed_before_ack == 0


def test_a_page_that_nobody_has_written_is_exported_read_only_from_a_mapping_that_is() -> None:
    room = MachineRoom()
    mm = room.program(pages=2, prot=READ_ONLY, data=b"")
    driver = room.client("driver")
    rmap = driver.register(None, name="exporter")
    with pytest.raises(MmError, match="EPERM"):
        room.bus.export(driver.session, rmap.id, mm.id, AT, AT + PAGE, True, room.now).value()
    granted = room.bus.export(driver.session, rmap.id, mm.id, AT, AT + 2 * PAGE, False, room.now).value().translations
    assert granted is not None
    pfns, generations = granted.pfns.tolist(), granted.generations.tolist()
    assert 0 not in pfns
    assert granted.rights.tolist() == [1, 1]
    room.run(mm.mprotect(AT, 2 * PAGE, READ_WRITE), "mprotect")
    driver.hears()
    driver.acks(driver.session.outbox.last_seq)
    room.run(mm.store(AT, b"new")).value()
    assert room.read(driver, rmap, 0, (pfns[0], generations[0])) == b"new", "the frame is the page's own"


def test_unexport() -> None:
    room = MachineRoom()
    mm = room.program(pages=1)
    driver = room.client("driver")
    rmap = driver.register(None)
    granted = room.bus.export(driver.session, rmap.id, mm.id, AT, AT + PAGE, True, room.now).value()
    assert granted.translations is not None
    (pfn,) = granted.translations.pfns.tolist()
    room.bus.unexport(driver.session, rmap.id, (pfn, 77), (pfn, 78), room.now).value()
    assert room.memory.exporters(pfn) == frozenset()
    assert room.bus.counters.dirty_unheld == 1
    assert rmap.held_pages == driver.session.holding == 0
    assert room.run(mm.munmap(AT, PAGE)).done
    again = room.memory.create_mm()
    room.run(again.mmap(AT, PAGE, READ_WRITE, PRIVATE | 0x10)).value()
    assert not room.bus.export(driver.session, rmap.id, again.id, AT, AT + PAGE, True, room.now).value().retry
    assert driver.unregister(rmap)
    assert not room.memory.frames.exports


def test_tables_register_for_mainline_too() -> None:
    """Start is acked, the table is empty; end goes out after the operation."""
    room = MachineRoom()
    mm = room.program()
    driver = room.client("driver")
    registration = driver.register(mm, *MAINLINE)
    room.grant(driver, registration, AT)
    operation = room.run(mm.mprotect(AT, PAGE, READ_ONLY))
    heard = driver.hears()
    driver.acks(len(heard))
    assert operation.done
    assert registration.held_pages == 0
    assert all("invalidate_range_end" in line for line in driver.hears())
