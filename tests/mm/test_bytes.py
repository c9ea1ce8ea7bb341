"""Real bytes: copy-on-write, files, truncation, execute in place, devices, exports and pins."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, at, errno_of, heard, run, told
from mmubusd.mm import Mapping, Memory, Mm, device
from mmubusd.mm.addr import PAGE_SIZE, Pfn
from mmubusd.mm.check import check_idle
from mmubusd.mm.frame_bytes import POISON
from mmubusd.mm.madvise import FREE, PAGEOUT
from mmubusd.mm.notification import Answer, InvalidatePage, InvalidateRange, Reason, RmapInvalidatePage

P = PAGE_SIZE


@pytest.fixture
def mm() -> Mm:
    mm = Memory(frames_nr=1024).create_mm("test")
    mm.notified = True
    return mm


def map_file(mm: Mm, page: int, count: int, file: int, shared: bool, prot: int = RW, offset: int = 0) -> None:
    run(mm.mmap(at(page), count * P, prot, (1 if shared else 2) | FIXED, file, offset * P))


def test_store_and_load_span_pages(mm: Mm) -> None:
    run(mm.mmap(at(0), 3 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0) + P - 3, b"spanning" * 600))
    assert run(mm.load(at(0) + P - 3, 4800)) == b"spanning" * 600
    assert run(mm.load(at(0), 2)) == b"\0\0"
    assert errno_of(mm.store(at(2) + P - 2, b"over the end")) == "EFAULT"
    assert run(mm.load(at(2) + P - 2, 2)) == b"ov"  # what came before stays


def test_a_fork_copies_on_write_after_the_answer(mm: Mm) -> None:
    run(mm.mmap(at(0), P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"before"))
    child = run(mm.fork())
    frames = mm.memory.frames
    old = int(device.snapshot(mm, at(0), at(1))[0]) & device.PFN_MASK
    operation = mm.store(at(0), b"parent")
    note = next(operation)
    assert note == InvalidateRange(mm, at(0), at(1), Reason.CLEAR)
    assert int(device.snapshot(mm, at(0), at(1))[0]) & device.PFN_MASK == old  # the old page until the answer
    with pytest.raises(StopIteration):
        operation.send(Answer())
    assert run(child.load(at(0), 6)) == b"before"
    assert run(mm.load(at(0), 6)) == b"parent"
    assert frames.mapcount[old] == 1
    assert told(child.store(at(0), b"alone!")) == []  # nobody else has it now


def test_private_file_pages_are_copies(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "disk", 4)
    run(memory.write_file(file, P, b"from the file"))
    map_file(mm, 0, 4, file, shared=False)
    map_file(mm, 8, 4, file, shared=True)
    assert run(mm.load(at(1), 13)) == b"from the file"
    run(mm.store(at(1), b"mine"))
    run(mm.store(at(9) + 5, b"THE"))
    assert run(mm.load(at(1), 13)) == b"mine the file"
    assert memory.read_file(file, P, 13) == b"from THE file"


def test_truncation_zeroes_the_tail_and_reads_beyond_are_sigbus(mm: Mm) -> None:
    memory = mm.memory
    for kind in ("disk", "shm", "xip"):
        file = memory.create_file(kind, kind, 4)
        map_file(mm, 0, 4, file, shared=True)
        run(mm.store(at(0), b"\xff" * 3 * P))
        run(memory.ftruncate(file, P + 100))
        assert run(mm.load(at(1), 200)) == b"\xff" * 100 + bytes(100), kind
        assert errno_of(mm.load(at(2), 1)) == "ENXIO"
        run(memory.ftruncate(file, 3 * P))
        assert run(mm.load(at(1), 2 * P)) == b"\xff" * 100 + bytes(2 * P - 100), kind
        check_idle(memory)


def test_a_hole_is_zeros_also_in_part(mm: Mm) -> None:
    memory = mm.memory
    for kind in ("disk", "shm", "xip"):
        file = memory.create_file(kind, kind, 4)
        run(memory.write_file(file, 0, b"\xee" * 4 * P))
        run(memory.punch(file, 100, 2 * P))
        wanted = b"\xee" * 100 + bytes(2 * P) + b"\xee" * (2 * P - 100)
        assert memory.read_file(file, 0, 9 * P) == wanted, kind


def test_clean_pages_come_back_from_the_disk(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "disk", 2)
    map_file(mm, 0, 2, file, shared=True)
    run(mm.store(at(0), b"kept"))
    assert told(memory.fsync(file)) == [(0, 1)]
    run(mm.madvise(at(0), P, PAGEOUT))
    assert mm.present(at(0), at(1)) == []
    assert memory.file(file).cache.get(0) == 0
    assert run(mm.load(at(0), 4)) == b"kept"
    assert memory.read_file(file, 0, 4) == b"kept"


def test_writeback_takes_what_a_device_wrote(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "disk", 1)
    map_file(mm, 0, 1, file, shared=True)
    run(mm.touch(at(0), 1, "write"))
    pfn = int(run(device.fault(mm, at(0), at(1), True))[0]) & device.PFN_MASK

    def ack(note: object) -> None:
        assert isinstance(note, InvalidatePage)
        memory.frames.write(pfn, 0, b"device")
        memory.set_dirty([pfn])

    run(memory.fsync(file), ack)
    assert not int(device.snapshot(mm, at(0), at(1))[0]) & device.WRITE
    run(mm.madvise(at(0), P, PAGEOUT))
    assert memory.read_file(file, 0, 6) == b"device"


def test_lazily_freed_memory_stays_if_a_device_wrote(mm: Mm) -> None:
    memory = mm.memory
    run(mm.mmap(at(0), 2 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"a" * 2 * P))
    entries = run(device.fault(mm, at(0), at(2), True))
    run(mm.madvise(at(0), 2 * P, FREE))

    def ack(note: object) -> None:
        memory.set_dirty([int(entries[0]) & device.PFN_MASK])

    run(mm.madvise(at(0), 2 * P, PAGEOUT), ack)
    assert mm.present(at(0), at(2)) == [(0, 1)]
    assert run(mm.load(at(0), 2)) == b"aa"
    assert run(mm.load(at(1), 2)) == b"\0\0"


def test_execute_in_place_holes_give_way_before_the_first_write(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("x", "xip", 2)
    other = memory.create_mm("other")
    other.notified = True
    map_file(mm, 0, 2, file, shared=True)
    map_file(other, 5, 2, file, shared=True, prot=1)
    assert run(mm.load(at(0), 1)) == run(other.load(at(5), 1)) == b"\0"
    notes = heard(mm.store(at(0), b"code"))
    assert [(note.mm, note.addresses) for note in notes] == [(mm, (at(0),)), (other, (at(5),))]
    assert other.present(at(5), at(6)) == []
    assert run(other.load(at(5), 4)) == b"code"
    pfn = memory.file(file).cache.get(0)
    assert memory.frames.mapcount[pfn] == 2  # the medium's own frame, mapped by both
    assert memory.read_file(file, 0, 4) == b"code"


def test_a_freed_frame_is_poisoned_and_a_new_life_reads_zeros(mm: Mm) -> None:
    frames = mm.memory.frames
    run(mm.mmap(at(0), P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"secret"))
    pfn = int(device.snapshot(mm, at(0), at(1))[0]) & device.PFN_MASK
    generation = frames.generation_at[pfn]
    run(mm.munmap(at(0), P))
    assert bytes(frames.store[pfn * P : pfn * P + 6]) == bytes([POISON]) * 6
    assert frames.generation_at[pfn] == generation + 1
    run(mm.mmap(at(0), P, RW, ANON_PRIVATE | FIXED))
    assert int(run(device.fault(mm, at(0), at(1), True))[0]) & device.PFN_MASK == pfn
    assert bytes(frames.store[pfn * P : pfn * P + 6]) == bytes(6)


def test_an_exported_frame_is_freed_only_after_its_exporters(mm: Mm) -> None:
    frames = mm.memory.frames
    run(mm.mmap(at(0), P, RW, ANON_PRIVATE | FIXED))
    pfn = Pfn(int(run(device.fault(mm, at(0), at(1), True))[0]) & device.PFN_MASK)
    mm.memory.export(pfn, 7)
    mm.memory.export(pfn, 8)
    generation = frames.generation_at[pfn]
    operation = mm.munmap(at(0), P)
    assert isinstance(next(operation), InvalidateRange)
    assert operation.send(Answer()) == RmapInvalidatePage((pfn,), must_evict=True)
    assert frames.generation_at[pfn] == generation
    with pytest.raises(StopIteration):
        operation.send(Answer())
    assert frames.generation_at[pfn] == generation + 1
    assert mm.memory.exporters(pfn) == frozenset()
    check_idle(mm.memory)


def test_an_exporter_may_refuse_reclaim(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "disk", 1)
    map_file(mm, 0, 1, file, shared=True)
    pfn = Pfn(int(run(device.fault(mm, at(0), at(1), False))[0]) & device.PFN_MASK)
    memory.export(pfn, 7)

    def refuse(note: object) -> Answer | None:
        return Answer(refused_pfns=frozenset({pfn})) if isinstance(note, RmapInvalidatePage) else None

    run(mm.madvise(at(0), P, PAGEOUT), refuse)
    assert mm.present(at(0), at(1)) == [(0, 1)]
    run(mm.madvise(at(0), P, PAGEOUT))
    assert mm.present(at(0), at(1)) == []
    assert memory.exporters(pfn) == frozenset()
    check_idle(memory)


def test_a_pinned_page_is_copied_for_the_child(mm: Mm) -> None:
    run(mm.mmap(at(0), 2 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"pinned"))
    pfns = run(device.pin(mm, at(0), at(1), True))
    child = run(mm.fork())
    mm.memory.frames.write(int(pfns[0]), 0, b"device")
    assert run(mm.load(at(0), 6)) == b"device"
    assert run(child.load(at(0), 6)) == b"pinned"
    assert told(mm.store(at(0), b"parent")) == []  # it is still the parent's own
    run(mm.munmap(at(0), P))
    assert mm.memory.frames.quarantine_nr == 0
    assert mm.memory.frames.read(int(pfns[0]), 0, 6) == b"parent"
    device.unpin(mm, pfns, dirty=True)
    check_idle(mm.memory)


def test_device_fault_errors(mm: Mm) -> None:
    run(mm.mmap(at(0), P, 1, ANON_PRIVATE | FIXED))
    run(mm.mmap(at(1), P, 0, ANON_PRIVATE | FIXED))
    assert errno_of(device.fault(mm, at(0), at(1), True)) == "EPERM"
    assert errno_of(device.fault(mm, at(1), at(2), False)) == "EFAULT"
    assert errno_of(device.fault(mm, at(2), at(3), False)) == "EFAULT"
    assert errno_of(device.fault(mm, at(0) + 1, at(1), False)) == "EINVAL"
    assert run(device.fault(mm, at(0), at(1), False)).tolist() == [device.VALID]
    assert device.snapshot(mm, at(0), at(3)).tolist() == [device.VALID, device.ERROR, device.ERROR]


def test_an_adopted_mapping_has_the_pages_of_the_snapshot(mm: Mm) -> None:
    file = mm.memory.create_file("lib", "disk", 8)
    mm.adopt(Mapping(at(0), at(4), "r-xp", 2 * P, file), [(0, 2, "f")])
    mm.adopt(Mapping(at(4), at(8), "rw-p", 0, None), [(0, 1, "a"), (2, 3, "s")])
    mm.adopt(Mapping(at(8), at(9), "rw-s", 0, None), [(0, 1, "f")])
    assert mm.present(at(0), at(9)) == [(0, 2), (4, 5), (6, 7), (8, 9)]
    assert told(mm.touch(at(4), 1, "write")) == []
    assert told(mm.touch(at(6), 1, "write")) == [(6, 7)]
    run(mm.munmap(at(4), 4 * P))
    check_idle(mm.memory)


def test_an_unknown_sharer_can_be_forgotten(mm: Mm) -> None:
    mm.adopt(Mapping(at(0), at(2), "rw-p", 0, None), [(0, 2, "s")])
    mm.forget_sharers(at(0), at(1))
    assert told(mm.touch(at(0), 2 * P, "write")) == [(1, 2)]
    check_idle(mm.memory)


def test_shared_memory_goes_with_its_last_mapping(mm: Mm) -> None:
    free = mm.memory.frames.free_nr
    run(mm.mmap(at(0), 4 * P, RW, ANON_SHARED | FIXED))
    run(mm.store(at(0), b"x" * 4 * P))
    child = run(mm.fork())
    run(mm.munmap(at(0), 4 * P))
    assert run(child.load(at(3), 1)) == b"x"
    run(child.exit())
    assert mm.memory.frames.free_nr == free
    assert not mm.memory.files_by_mapping
    check_idle(mm.memory)
