"""Swap: bytes survive it, slots are bounded and given back, and what a device holds is told of first."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, Mirror, at, heard, run, told
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.madvise import COLD, DONTNEED, FREE, PAGEOUT
from mmubusd.mm.notification import ANSWERED, InvalidatePage, Reason

P = PAGE_SIZE


@pytest.fixture
def mm() -> Mm:
    mm = Memory(frames_nr=256, swap_slots_nr=64).create_mm("test")
    mm.notified = True
    return mm


def fill(mm: Mm, pages: int, kind: int = ANON_PRIVATE) -> None:
    run(mm.mmap(at(0), pages * P, RW, kind | FIXED))
    for page in range(pages):
        run(mm.store(at(page), b"page %d" % page))


def pageout(mm: Mm, pages: int) -> None:
    mm.memory.lru.drain()
    run(mm.madvise(at(0), pages * P, PAGEOUT))


def check_bytes(mm: Mm, pages: int, base: int = 0) -> None:
    for page in range(pages):
        assert run(mm.load(at(base + page), 8)).rstrip(b"\0") == b"page %d" % page


def test_private_pages_leave_their_frames_and_come_back(mm: Mm) -> None:
    fill(mm, 8)
    free = mm.memory.frames.free_nr
    pageout(mm, 8)
    assert mm.swapped(at(0), at(8)) == [(0, 8)]
    assert mm.present(at(0), at(8)) == []
    assert mm.memory.frames.free_nr == free + 8
    check_idle(mm.memory)
    check_bytes(mm, 8)
    assert mm.swapped(at(0), at(8)) == []
    run(mm.munmap(at(0), 8 * P))
    assert mm.memory.swap.used_nr == 0
    check_idle(mm.memory)


def test_a_page_is_told_of_before_its_frame_is_free(mm: Mm) -> None:
    fill(mm, 2)
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(2), True)))
    mm.memory.lru.drain()
    operation = mm.madvise(at(0), 2 * P, PAGEOUT)
    note = next(operation)
    assert note == InvalidatePage(mm, (at(0), at(1)), Reason.CLEAR)
    mirror.check_alive()  # nobody has answered
    mirror.hear(note)
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)
    assert mm.swapped(at(0), at(2)) == [(0, 2)]


def test_what_a_device_wrote_before_its_answer_is_swapped_out(mm: Mm) -> None:
    fill(mm, 1)
    pfn = int(run(device.fault(mm, at(0), at(1), True))[0]) & device.PFN_MASK
    mm.memory.lru.drain()
    operation = mm.madvise(at(0), P, PAGEOUT)
    next(operation)
    mm.memory.frames.write(pfn, 0, b"device")
    mm.memory.set_dirty([pfn])
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)
    assert mm.swapped(at(0), at(1)) == [(0, 1)]
    assert run(mm.load(at(0), 6)) == b"device"


def test_a_page_wanted_while_it_is_told_of_stays(mm: Mm) -> None:
    fill(mm, 1)
    mm.memory.lru.drain()
    operation = mm.madvise(at(0), P, PAGEOUT)
    next(operation)
    # Our own PAGEOUT holds the range; another path, an rmap walk, may bring it back.
    from mmubusd.mm.fault import fault_page

    assert fault_page(mm, next(iter(mm.vmas)), at(0) // P, True)
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)
    assert mm.present(at(0), at(1)) == [(0, 1)]
    check_bytes(mm, 1)
    check_idle(mm.memory)


def test_fork_shares_what_is_in_swap(mm: Mm) -> None:
    fill(mm, 4)
    pageout(mm, 4)
    child = run(mm.fork())
    run(child.store(at(0), b"child 0"))
    assert told(mm.store(at(1), b"parent1")) == [(1, 2)]  # the child has an entry for it: copied
    assert run(child.load(at(1), 6)) == b"page 1"
    assert run(mm.load(at(0), 6)) == b"page 0"
    run(child.exit())
    check_bytes(mm, 1)
    run(mm.exit())
    assert mm.memory.swap.used_nr == 0


def test_moved_and_dropped_entries(mm: Mm) -> None:
    fill(mm, 6)
    pageout(mm, 6)
    run(mm.mremap(at(0), 2 * P, 2 * P, 3, at(20)))
    check_bytes(mm, 2, 20)
    run(mm.madvise(at(2), P, DONTNEED))
    run(mm.madvise(at(3), P, FREE))
    assert run(mm.load(at(2), 6)) == bytes(6)
    assert run(mm.load(at(3), 6)) == bytes(6)
    run(mm.mprotect(at(4), P, 1))
    assert run(mm.load(at(4), 6)) == b"page 4"
    check_idle(mm.memory)


def test_shared_memory_goes_to_swap_and_a_hole_may_cut_it(mm: Mm) -> None:
    file = mm.memory.create_file("shared", "shm", 4)
    run(mm.mmap(at(0), 4 * P, RW, 1 | FIXED, file, 0))
    for page in range(4):
        run(mm.store(at(page), b"page %d" % page * 100))
    pageout(mm, 4)
    assert mm.present(at(0), at(4)) == []
    assert mm.memory.swap.used_nr == 4
    assert mm.memory.read_file(file, 3 * P, 6) == b"page 3"
    run(mm.memory.punch(file, P + 3, P))  # the end of page 1, the beginning of page 2
    check_idle(mm.memory)
    assert run(mm.load(at(1), 6)) == b"pag" + bytes(3)
    assert run(mm.load(at(2), 6)) == bytes(3) + b"e 2"
    assert run(mm.load(at(0), 6)) == b"page 0"
    run(mm.memory.write_file(file, 3 * P + 5, b"9"))
    assert run(mm.load(at(3), 8)) == b"page 9pa"
    run(mm.memory.ftruncate(file, 0))
    assert mm.memory.swap.used_nr == 0


def test_a_full_swap_file_leaves_pages_where_they_are() -> None:
    mm = Memory(frames_nr=256, swap_slots_nr=3).create_mm("small")
    fill(mm, 8)
    pageout(mm, 8)
    assert mm.memory.swap.free_nr == 0
    assert mm.swapped(at(0), at(8)) == [(0, 3)]
    check_bytes(mm, 8)
    assert mm.memory.swap.free_nr == 2  # more than half full: a slot is given up when its page is read
    check_idle(mm.memory)


def test_without_a_swap_file_private_pages_stay() -> None:
    mm = Memory(frames_nr=64).create_mm("none")
    mm.notified = True
    fill(mm, 4, ANON_SHARED)
    assert [note for note in heard(mm.madvise(at(0), 4 * P, PAGEOUT)) if isinstance(note, InvalidatePage)]
    check_bytes(mm, 4)


def test_a_pinned_page_stays(mm: Mm) -> None:
    fill(mm, 2)
    run(device.pin(mm, at(0), at(1), True))
    pageout(mm, 2)
    assert mm.swapped(at(0), at(2)) == [(1, 2)]


def test_a_file_without_a_cache_has_no_page_to_spare(mm: Mm) -> None:
    """Its pages are the medium, of which there is no other copy."""
    memory = mm.memory
    file = memory.create_file("xip", "xip", 2)
    run(memory.write_file(file, 0, b"page 0"))
    for flags in (1, 2):
        run(mm.mmap(at(0), 2 * P, RW, flags | FIXED, file, 0))
        run(mm.load(at(0), 1))
        assert heard(mm.madvise(at(0), 2 * P, PAGEOUT)) == []
        run(mm.madvise(at(0), 2 * P, COLD))
        assert run(mm.load(at(0), 6)) == b"page 0"
    check_idle(memory)
