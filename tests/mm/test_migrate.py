"""Moving pages: between NUMA nodes, to a device's memory and back; merging them; exclusive access; tracking writes."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, Mirror, at, errno_of, heard, run, told
from mmubusd.mm import Memory, Mm, device, device_exclusive, migrate_device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.madvise import MERGEABLE, PAGEOUT, UNMERGEABLE
from mmubusd.mm.notification import ANSWERED, InvalidatePage, InvalidateRange, LockWait, Reason
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.mm.soft_dirty import EVERYTHING

P, OWNER, OTHER = PAGE_SIZE, 7, 8
SHARED = 1


@pytest.fixture
def mm() -> Mm:
    mm = Memory(frames_nr=512, swap_slots_nr=64, nodes_nr=2).create_mm("test")
    mm.notified = True
    return mm


def fill(mm: Mm, pages: int, same: bool = False) -> None:
    run(mm.mmap(at(0), pages * P, RW, ANON_PRIVATE | FIXED))
    for page in range(pages):
        run(mm.store(at(page), b"same" if same else b"page %d" % page))


def pfn_of(mm: Mm, page: int) -> int:
    return mm.pgtable.get(at(page) >> PAGE_SHIFT) >> PFN_SHIFT


def check_bytes(mm: Mm, pages: int) -> None:
    for page in range(pages):
        assert run(mm.load(at(page), 8)).rstrip(b"\0") == b"page %d" % page


# NUMA nodes


def test_pages_move_to_the_other_node_and_back(mm: Mm) -> None:
    fill(mm, 8)
    frames = mm.memory.frames
    assert {frames.node_of(pfn_of(mm, page)) for page in range(8)} == {0}
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(8), True)))
    notes = []

    def hear(note: object) -> None:
        notes.append(note)
        mirror.hear(note)

    assert run(mm.move_pages(at(0), 8 * P, 1), hear) == 0
    assert notes == [InvalidatePage(mm, tuple(at(page) for page in range(8)), Reason.CLEAR)]
    assert {frames.node_of(pfn_of(mm, page)) for page in range(8)} == {1}
    check_bytes(mm, 8)
    assert run(mm.move_pages(at(0), 8 * P, 0)) == 0
    check_bytes(mm, 8)
    check_idle(mm.memory)


def test_who_comes_to_a_page_on_its_way_waits_for_it(mm: Mm) -> None:
    fill(mm, 1)
    moving = mm.move_pages(at(0), P, 1)
    note = next(moving)
    assert isinstance(note, InvalidatePage)
    load = mm.load(at(0), 6)
    wait = next(load)
    assert isinstance(wait, LockWait)
    with pytest.raises(StopIteration):
        moving.send(ANSWERED)
    assert wait.ticket.granted
    with pytest.raises(StopIteration) as ended:
        load.send(ANSWERED)
    assert ended.value.value == b"page 0"
    check_idle(mm.memory)


def test_an_address_space_may_change_while_its_pages_move(mm: Mm) -> None:
    fill(mm, 4)
    moving = mm.move_pages(at(0), 4 * P, 1)
    next(moving)
    run(mm.munmap(at(0), P))
    run(mm.mremap(at(1), P, P, 3, at(20)))
    child = run(mm.fork())
    with pytest.raises(StopIteration):
        moving.send(ANSWERED)
    assert run(mm.load(at(20), 6)) == b"page 1"
    assert run(child.load(at(2), 6)) == b"page 2"
    run(child.store(at(3), b"child"))
    assert run(mm.load(at(3), 6)) == b"page 3"
    check_idle(mm.memory)


def test_shared_pinned_and_unknown_pages_stay(mm: Mm) -> None:
    fill(mm, 3)
    run(device.pin(mm, at(0), at(1), True))
    assert run(mm.move_pages(at(0), 3 * P, 1)) == 1
    run(mm.fork())
    assert run(mm.move_pages(at(0), 3 * P, 0)) == 2  # the child maps them too; the pinned one was copied for it
    assert errno_of(mm.move_pages(at(0), P, 2)) == "ENODEV"
    assert errno_of(mm.move_pages(at(0) + 1, P, 1)) == "EINVAL"


def test_a_files_page_moves_within_the_cache(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "disk", 2)
    run(mm.mmap(at(0), 2 * P, RW, 1 | FIXED, file, 0))
    run(mm.store(at(0), b"dirty"))
    assert run(mm.move_pages(at(0), P, 1)) == 0
    assert memory.frames.node_of(memory.file(file).cache.get(0)) == 1
    assert memory.read_file(file, 0, 5) == b"dirty"
    run(mm.store(at(0), b"again"))
    assert told(memory.fsync(file)) == [(0, 1)]
    check_idle(memory)


def test_a_hole_made_while_a_files_page_moves(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "shm", 2)
    run(mm.mmap(at(0), 2 * P, RW, 1 | FIXED, file, 0))
    run(mm.store(at(0), b"gone"))
    moving = mm.move_pages(at(0), P, 1)
    next(moving)
    run(memory.punch(file, 0, P))
    with pytest.raises(StopIteration):
        moving.send(ANSWERED)
    assert run(mm.load(at(0), 4)) == bytes(4)
    check_idle(memory)


# Merging


def test_equal_pages_become_one_and_part_again(mm: Mm) -> None:
    fill(mm, 4, same=True)
    other = mm.memory.create_mm("other")
    fill(other, 2, same=True)
    for each in (mm, other):
        run(each.madvise(at(0), 4 * P if each is mm else 2 * P, MERGEABLE))
    free = mm.memory.frames.free_nr
    assert run(mm.memory.ksm_scan()) == 5
    assert mm.memory.frames.free_nr == free + 5
    assert len({pfn_of(mm, page) for page in range(4)} | {pfn_of(other, page) for page in range(2)}) == 1
    check_idle(mm.memory)
    assert told(mm.store(at(1), b"own")) == [(1, 2)]
    assert run(mm.load(at(0), 4)) == b"same"
    assert run(mm.memory.ksm_scan()) == 0
    run(mm.madvise(at(0), 4 * P, UNMERGEABLE))
    assert len({pfn_of(mm, page) for page in range(4)}) == 4
    run(other.exit())
    check_idle(mm.memory)


def test_each_merge_is_told_twice_and_a_write_in_between_prevents_it(mm: Mm) -> None:
    fill(mm, 2, same=True)
    run(mm.madvise(at(0), 2 * P, MERGEABLE))
    scan = mm.memory.ksm_scan()
    assert next(scan) == InvalidateRange(mm, at(0), at(1), Reason.CLEAR)  # write-protected
    assert scan.send(ANSWERED) == InvalidateRange(mm, at(1), at(2), Reason.CLEAR)
    run(mm.store(at(1), b"else"))
    with pytest.raises(StopIteration) as ended:
        scan.send(ANSWERED)
    assert ended.value.value == 0
    run(mm.store(at(1), b"same"))
    assert [note.start for note in heard(mm.memory.ksm_scan())] == [at(1), at(1)]  # protected, replaced


# A device's own memory


def test_pages_go_to_a_device_and_come_back_when_they_are_touched(mm: Mm) -> None:
    fill(mm, 4)
    notes = heard(mm.migrate_to_device(at(0), at(4), OWNER))
    assert notes == [InvalidateRange(mm, at(0), at(4), Reason.MIGRATE, owner=OWNER)]
    assert mm.present(at(0), at(4)) == []
    entries = device.snapshot(mm, at(0), at(4), OWNER).tolist()
    assert all(entry & device.VALID and entry & device.WRITE and entry & device.DEVICE for entry in entries)
    assert device.snapshot(mm, at(0), at(4), OTHER).tolist() == [0] * 4
    check_idle(mm.memory)
    assert heard(mm.load(at(1), 6)) == [InvalidateRange(mm, at(1), at(2), Reason.MIGRATE)]
    check_bytes(mm, 4)
    check_idle(mm.memory)


def test_holes_and_the_zero_page_go_too_and_files_do_not(mm: Mm) -> None:
    run(mm.mmap(at(0), 3 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.load(at(1), 1))
    notes = heard(mm.migrate_to_device(at(0), at(3), OWNER))
    assert notes == [InvalidateRange(mm, at(0), at(3), Reason.MIGRATE, owner=OWNER)]  # from the first hole on
    assert all(migrate_device.owner_of(mm, (at(page)) >> PAGE_SHIFT) == OWNER for page in range(3))
    assert run(mm.load(at(1), 4)) == bytes(4)
    file = mm.memory.create_file("f", "shm", 1)
    run(mm.mmap(at(8), P, RW, 1 | FIXED, file, 0))
    run(mm.store(at(8), b"file"))
    assert run(mm.migrate_to_device(at(8), at(9), OWNER)) == 0
    assert run(mm.load(at(8), 4)) == b"file"
    assert errno_of(mm.migrate_to_device(at(8), at(10), OWNER)) == "EINVAL"  # a hole in the address space
    check_idle(mm.memory)


def test_a_device_page_is_shared_by_fork_and_unmapped_like_any_other(mm: Mm) -> None:
    fill(mm, 3)
    run(mm.migrate_to_device(at(0), at(3), OWNER))
    child = run(mm.fork())
    run(mm.store(at(0), b"parent"))
    assert run(child.load(at(0), 6)) == b"page 0"
    run(child.munmap(at(1), P))
    run(mm.mprotect(at(1), P, 1))
    entry = int(device.snapshot(mm, at(1), at(2), OWNER)[0])
    assert entry & device.VALID
    assert not entry & device.WRITE
    run(child.exit())
    run(mm.munmap(at(0), 3 * P))
    assert mm.memory.frames.free_nr == 511
    check_idle(mm.memory)


def test_a_device_gives_its_memory_up(mm: Mm) -> None:
    fill(mm, 4)
    run(mm.migrate_to_device(at(0), at(2), OWNER))
    run(mm.migrate_to_device(at(2), at(4), OTHER))
    assert run(mm.migrate_to_system(at(0), at(4), OWNER)) == 2
    assert mm.present(at(0), at(4)) == [(0, 2)]
    assert run(migrate_device.evict_device(mm.memory, OTHER)) == 2
    assert mm.present(at(0), at(4)) == [(0, 4)]
    check_bytes(mm, 4)


# Exclusive access


def test_exclusive_access_ends_when_the_cpu_comes(mm: Mm) -> None:
    fill(mm, 2)
    operation = device_exclusive.make_exclusive(mm, at(0), at(2), OWNER)
    assert next(operation) == InvalidateRange(mm, at(0), at(1), Reason.EXCLUSIVE, owner=OWNER)
    assert mm.present(at(0), at(1)) == [(0, 1)]
    operation.send(ANSWERED)
    with pytest.raises(StopIteration) as ended:
        operation.send(ANSWERED)
    assert (ended.value.value & device.PFN_MASK).tolist() == [pfn_of(mm, 0), pfn_of(mm, 1)]
    assert mm.present(at(0), at(2)) == []
    check_idle(mm.memory)
    assert heard(mm.store(at(0), b"cpu")) == [InvalidateRange(mm, at(0), at(1), Reason.EXCLUSIVE)]
    child = run(mm.fork())  # told of as a whole; the page is there again on both sides
    assert run(child.load(at(1), 6)) == b"page 1"
    check_idle(mm.memory)


def test_exclusive_access_past_the_end_of_a_file_is_efault(mm: Mm) -> None:
    file = mm.memory.create_file("file", "shm", 1)
    run(mm.mmap(at(0), 2 * P, RW, SHARED | FIXED, file, 0))
    operation = device_exclusive.make_exclusive(mm, at(1), at(2), OWNER)
    assert errno_of(operation) == "EFAULT"


# Tracking writes


def test_soft_dirty(mm: Mm) -> None:
    fill(mm, 4)
    assert mm.soft_dirty(at(0), at(4)) == [(0, 4)]
    assert heard(mm.clear_refs(4)) == [InvalidateRange(mm, 0, EVERYTHING, Reason.SOFT_DIRTY)]
    assert mm.soft_dirty(at(0), at(4)) == []
    assert told(mm.store(at(2), b"new")) == []  # nobody else has it: no copy
    run(mm.load(at(1), 4))
    assert mm.soft_dirty(at(0), at(4)) == [(2, 3)]
    run(mm.mprotect(at(0), 4 * P, 1))
    run(mm.mprotect(at(0), 4 * P, RW))
    run(mm.store(at(3), b"seen"))
    assert mm.soft_dirty(at(0), at(4)) == [(2, 4)]
    assert errno_of(mm.clear_refs(9)) == "EINVAL"


def test_userfaultfd_write_protection(mm: Mm) -> None:
    fill(mm, 3)
    assert heard(mm.uffd_writeprotect(at(1), P, 1)) == [InvalidateRange(mm, at(1), at(2), Reason.PROTECTION_VMA)]
    assert errno_of(mm.store(at(1), b"no")) == "ENXIO"
    assert run(mm.load(at(1), 6)) == b"page 1"
    run(mm.mprotect(at(0), 3 * P, 1))
    run(mm.mprotect(at(0), 3 * P, RW))
    assert errno_of(mm.store(at(1), b"no")) == "ENXIO"  # mprotect is another lock
    run(mm.uffd_writeprotect(at(1), P, 0))
    run(mm.store(at(1), b"yes"))
    assert errno_of(mm.uffd_writeprotect(at(9), P, 1)) == "ENOENT"
    assert errno_of(mm.uffd_writeprotect(at(0), P, 2)) == "EINVAL"
    check_memory(mm.memory)


def test_a_page_that_goes_to_swap_while_there_is_made_room_for_it() -> None:
    memory = Memory(frames_nr=26, swap_slots_nr=64, nodes_nr=2)
    mm = memory.create_mm()
    run(mm.mmap(at(0), 25 * PAGE_SIZE, RW, ANON_PRIVATE | FIXED))
    for page in range(25):
        run(mm.store(at(page), b"%4d" % page))
    for page in range(25):
        run(mm.move_pages(at(page), PAGE_SIZE, page % 2))
        check_idle(memory)
    assert [run(mm.load(at(page), 4)) for page in range(25)] == [b"%4d" % page for page in range(25)]


def test_a_merged_page_that_a_mapping_shows_more_than_once_is_counted_each_time(mm: Mm) -> None:
    fill(mm, 16, same=True)
    run(mm.madvise(at(0), 16 * P, MERGEABLE))
    assert run(mm.memory.ksm_scan()) == 15
    child = run(mm.fork())
    check_idle(mm.memory)
    run(mm.munmap(at(0), 16 * P))
    check_idle(mm.memory)
    assert run(child.load(at(15), 4)) == b"same"
    run(child.exit())
    check_idle(mm.memory)


def test_parent_and_child_find_what_either_brought_back_from_swap(mm: Mm) -> None:
    fill(mm, 2)
    run(mm.madvise(at(0), 2 * P, PAGEOUT))
    child = run(mm.fork())
    child.notified = True
    assert run(child.load(at(0), 6)) == run(mm.load(at(0), 6)) == b"page 0"
    check_idle(mm.memory)
