"""hugetlb: the pool, who has reserved of it, who gets a copy and who SIGBUS, and what is told at its call sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mm.driver import FIXED, RW, heard, run
from mmubusd.mm import Memory, Mm, MmError, device, device_exclusive
from mmubusd.mm.addr import PAGE_SIZE, PMD_SIZE, FileId
from mmubusd.mm.check import check_idle
from mmubusd.mm.device import ORDER_MASK, ORDER_SHIFT, WRITE
from mmubusd.mm.madvise import COLD, DONTNEED, FREE, HWPOISON, POPULATE_WRITE, REMOVE
from mmubusd.mm.mmap import MAP_HUGETLB, MAP_NORESERVE
from mmubusd.mm.notification import ANSWERED, InvalidateRange, Reason
from mmubusd.mm.oom import badness, reap

PRIVATE, SHARED = 0x22 | MAP_HUGETLB, 0x21 | MAP_HUGETLB
BASE = 0x200000000000


def block(number: int) -> int:
    return BASE + number * PMD_SIZE


def machine(pages: int = 4) -> Mm:
    mm = Memory(frames_nr=8192, nodes_nr=1, hugetlb_nr=pages).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    return machine()


def map_huge(mm: Mm, pages: int = 2, flags: int = PRIVATE, at: int = 0) -> int:
    return run(mm.mmap(block(at), pages * PMD_SIZE, RW, flags | FIXED))


def pool(mm: Mm) -> tuple[int, int]:
    """Free pages, and how many of them are reserved."""
    return mm.memory.frames.hugetlb.free_nr, mm.memory.frames.hugetlb.reserved_nr


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(MmError) as caught:
        call()
    return caught.value.errno


def told(operation: Any) -> list[tuple[int, int, Reason]]:
    notes = heard(operation)
    assert all(isinstance(note, InvalidateRange) for note in notes)
    return [
        ((note.start - BASE) // PMD_SIZE, (note.end - BASE) // PMD_SIZE, note.reason)
        for note in notes
        if isinstance(note, InvalidateRange)
    ]


# The pool


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_mmap_reserves_a_fault_uses_and_munmap_gives_back(mm: Mm, flags: int) -> None:
    map_huge(mm, 3, flags)
    assert pool(mm) == (4, 3)
    assert refused(lambda: map_huge(mm, 2, flags, 8)) == "ENOMEM"
    run(mm.store(block(0), b"x"))
    assert pool(mm) == (3, 2)
    assert mm.present(block(0), block(3)) == [(0, 512)]
    run(mm.munmap(block(0), 3 * PMD_SIZE))
    assert pool(mm) == (4, 0)
    check_idle(mm.memory)


def test_without_a_reservation_there_is_a_page_or_sigbus(mm: Mm) -> None:
    map_huge(mm, 3)
    map_huge(mm, 2, PRIVATE | MAP_NORESERVE, 8)
    assert pool(mm) == (4, 3)
    run(mm.touch(block(8), 1, "read"))
    assert pool(mm) == (3, 3)
    assert refused(lambda: run(mm.touch(block(9), 1, "read"))) == "ENXIO"
    run(mm.touch(block(0), 3 * PMD_SIZE, "write"))
    assert pool(mm) == (0, 0)


def test_a_reading_private_fault_takes_a_page_of_its_own_too(mm: Mm) -> None:
    map_huge(mm, 1)
    assert run(mm.load(block(0), 4)) == bytes(4)
    assert pool(mm) == (3, 0)
    assert heard(mm.store(block(0), b"x")) == [], "it is this mapping's alone"


def test_the_pool_is_nobody_elses(mm: Mm) -> None:
    free = mm.memory.frames.free_nr
    assert free == 8192 - 1 - 4 * 512
    assert mm.memory.low_watermark == (8192 - 4 * 512) // 64
    map_huge(mm, 4)
    run(mm.touch(block(0), 4 * PMD_SIZE, "write"))
    assert mm.memory.frames.free_nr == free


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="16 huge pages of 512 frames"):
        Memory(frames_nr=8192, hugetlb_nr=16)


def test_a_pinned_frame_keeps_its_page_from_the_pool(mm: Mm) -> None:
    map_huge(mm, 1)
    pfns = run(device.pin(mm, block(0) + PAGE_SIZE, block(0) + 2 * PAGE_SIZE, True))
    run(mm.munmap(block(0), PMD_SIZE))
    assert pool(mm) == (3, -1), "the reservation comes back with the page, as in the kernel"
    device.unpin(mm, pfns)
    assert pool(mm) == (4, 0)
    check_idle(mm.memory)


def test_an_address_is_chosen_at_the_alignment_of_huge_pages(mm: Mm) -> None:
    run(mm.mmap(0, PAGE_SIZE, RW, 0x22))
    first = run(mm.mmap(0, PMD_SIZE, RW, PRIVATE))
    assert first % PMD_SIZE == 0
    second = run(mm.mmap(0, 1, RW, PRIVATE))
    assert second == first - PMD_SIZE, "the length is rounded up"


# What is refused


def test_nothing_ends_inside_a_huge_page(mm: Mm) -> None:
    map_huge(mm)
    inside = block(0) + PAGE_SIZE
    assert refused(lambda: run(mm.mmap(inside, PMD_SIZE, RW, PRIVATE | FIXED))) == "EINVAL"
    assert refused(lambda: run(mm.munmap(block(0), PAGE_SIZE))) == "EINVAL"
    assert refused(lambda: run(mm.mprotect(inside, PMD_SIZE, 1))) == "EINVAL"
    assert refused(lambda: run(mm.madvise(inside, PMD_SIZE, DONTNEED))) == "EINVAL"
    assert refused(lambda: run(mm.mremap(inside, PMD_SIZE, PMD_SIZE, 3, block(8)))) == "EINVAL"
    assert refused(lambda: run(mm.mremap(block(0), PMD_SIZE, 2 * PMD_SIZE, 1))) == "EINVAL", "it does not grow"
    assert refused(lambda: run(mm.uffd_writeprotect(inside, PAGE_SIZE, 1))) == "EINVAL"
    assert len(mm.vmas) == 1


def test_advice_about_small_pages_is_refused(mm: Mm) -> None:
    map_huge(mm)
    for advice in (FREE, COLD):
        assert refused(lambda advice=advice: run(mm.madvise(block(0), PMD_SIZE, advice))) == "EINVAL"
    assert refused(lambda: run(mm.madvise(block(0), PMD_SIZE, REMOVE))) == "EACCES"


def test_other_sizes_are_refused(mm: Mm) -> None:
    for order, errno in ((16, "EINVAL"), (30, "ENOMEM")):
        assert refused(lambda order=order: run(mm.mmap(0, PMD_SIZE, RW, PRIVATE | order << 26))) == errno
    assert run(mm.mmap(block(0), PMD_SIZE, RW, PRIVATE | FIXED | 21 << 26)) == block(0)


def test_a_file_has_whole_huge_pages_and_is_not_written_to() -> None:
    memory = machine().memory
    assert refused(lambda: memory.create_file("f", "hugetlb", 513)) == "EINVAL"
    file = memory.create_file("f", "hugetlb", 512)
    assert refused(lambda: run(memory.write_file(file, 0, b"x"))) == "EINVAL"
    assert refused(lambda: run(memory.ftruncate(file, PAGE_SIZE))) == "EINVAL"


# Call sites


def test_munmap_tells_of_the_range_and_frees_after_the_answer(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(0), b"x"))
    operation = mm.munmap(block(0), 2 * PMD_SIZE)
    note = next(operation)
    assert note == InvalidateRange(mm, block(0), block(2), Reason.UNMAP)
    assert pool(mm)[0] == 3
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)
    assert pool(mm) == (4, 0)


def test_dontneed_drops_whole_pages_only(mm: Mm) -> None:
    map_huge(mm)
    run(mm.touch(block(0), 2 * PMD_SIZE, "write"))
    assert told(mm.madvise(block(0), PMD_SIZE + PAGE_SIZE, DONTNEED)) == [(0, 1, Reason.CLEAR)]
    assert pool(mm) == (3, 1), "the reservation is there again"
    assert told(mm.madvise(block(1), PAGE_SIZE, DONTNEED)) == []


def test_mprotect_tells_of_the_range_even_where_nothing_is(mm: Mm) -> None:
    map_huge(mm, 4)
    assert told(mm.mprotect(block(1), 2 * PMD_SIZE, 1)) == [(1, 3, Reason.PROTECTION_VMA)]


def test_fork_tells_of_the_mapping_and_a_write_copies_the_page(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(0), b"parent"))
    notes = heard(mm.fork())
    assert notes == [InvalidateRange(mm, block(0), block(2), Reason.CLEAR)]
    assert told(mm.store(block(0) + 5 * PAGE_SIZE, b"more")) == [(0, 1, Reason.CLEAR)]
    child = next(each for each in mm.memory.mms.values() if each is not mm)
    assert run(child.load(block(0), 6)) == b"parent"
    assert run(child.load(block(0) + 5 * PAGE_SIZE, 4)) == bytes(4)
    assert run(mm.load(block(0), 6)) == b"parent"
    assert pool(mm) == (2, 1), "the copy took no reserved page"


def test_fork_is_silent_about_shared_memory(mm: Mm) -> None:
    map_huge(mm, 2, SHARED)
    run(mm.store(block(0), b"x"))
    assert heard(mm.fork()) == []


def test_a_child_loses_the_page_when_its_parent_finds_no_other() -> None:
    mm = machine(1)
    map_huge(mm, 1)
    run(mm.store(block(0), b"parent"))
    child = run(mm.fork())
    child.notified = True
    notes = heard(mm.store(block(0), b"again!"))
    assert notes == [InvalidateRange(child, block(0), block(1), Reason.CLEAR)]
    assert run(mm.load(block(0), 6)) == b"again!"
    assert refused(lambda: run(child.load(block(0), 1))) == "ENXIO"
    run(child.exit())
    run(mm.exit())
    assert pool(mm) == (1, 0)
    check_idle(mm.memory)


def test_a_child_that_finds_no_page_gets_sigbus() -> None:
    mm = machine(1)
    map_huge(mm, 1)
    run(mm.store(block(0), b"parent"))
    child = run(mm.fork())
    assert refused(lambda: run(child.store(block(0), b"child"))) == "ENXIO"
    assert run(child.load(block(0), 6)) == b"parent"


def test_a_pinned_page_is_copied_for_the_child(mm: Mm) -> None:
    map_huge(mm, 1)
    run(mm.store(block(0), b"parent"))
    run(device.pin(mm, block(0), block(0) + PAGE_SIZE, True))
    before = mm.pgtable.get(block(0) >> 12)
    child = run(mm.fork())
    assert heard(mm.store(block(0), b"PARENT")) == []
    assert mm.pgtable.get(block(0) >> 12) == before
    assert run(child.load(block(0), 6)) == b"parent"


def test_mremap_tells_of_what_moves_and_then_of_what_is_unmapped(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(1), b"x"))
    expected = [(0, 2, Reason.CLEAR), (0, 2, Reason.UNMAP)]
    assert told(mm.mremap(block(0), 2 * PMD_SIZE, 2 * PMD_SIZE, 3, block(8))) == expected
    assert run(mm.load(block(9), 1)) == b"x"
    assert pool(mm) == (3, 1)
    run(mm.munmap(block(8), 2 * PMD_SIZE))
    assert pool(mm) == (4, 0)


def test_a_failed_mmap_over_leaves_a_gap_and_tells_twice(mm: Mm) -> None:
    map_huge(mm, 2)
    operation = mm.mmap(block(0), 5 * PMD_SIZE, RW, PRIVATE | FIXED)
    notes = []
    with pytest.raises(MmError, match="5 huge pages wanted"):
        run(operation, lambda note: notes.append(note))
    assert notes == [InvalidateRange(mm, block(0), block(5), Reason.UNMAP)] * 2
    assert len(mm.vmas) == 0
    assert pool(mm) == (4, 0)
    check_idle(mm.memory)


def file_mapped(mm: Mm, flags: int) -> FileId:
    file = mm.memory.create_file("f", "hugetlb", 2 * 512)
    run(mm.mmap(block(0), 2 * PMD_SIZE, RW, flags | FIXED, file, 0))
    run(mm.touch(block(0), 2 * PMD_SIZE, "write"))
    return file


@pytest.mark.parametrize("flags", [1, 2])
def test_truncate_takes_private_copies_as_well(mm: Mm, flags: int) -> None:
    file = file_mapped(mm, flags)
    assert told(mm.memory.ftruncate(file, PMD_SIZE)) == [(1, 2, Reason.CLEAR)]
    assert mm.present(block(0), block(2)) == [(0, 512)]
    assert refused(lambda: run(mm.touch(block(1), 1, "read"))) == "ENXIO"
    run(mm.exit())
    mm.memory.unlink(file)
    assert pool(mm) == (4, 0)
    check_idle(mm.memory)


def test_hole_punching_takes_whole_pages_and_zeroes_the_rest(mm: Mm) -> None:
    file = file_mapped(mm, 1)
    run(mm.store(block(0) + PMD_SIZE - 8, b"x" * 16))
    assert told(mm.memory.punch(file, PMD_SIZE - 4, PMD_SIZE + 4)) == [(1, 2, Reason.CLEAR)]
    assert run(mm.load(block(0) + PMD_SIZE - 8, 8)) == b"xxxx" + bytes(4)
    assert run(mm.load(block(1), 8)) == bytes(8)


def test_a_private_mapping_shows_the_file_until_it_writes(mm: Mm) -> None:
    file = file_mapped(mm, 1)
    run(mm.store(block(0), b"file"))
    run(mm.mmap(block(8), PMD_SIZE, RW, 2 | FIXED, file, 0))
    assert run(mm.load(block(8), 4)) == b"file"
    assert told(mm.store(block(8) + 8, b"own")) == [(8, 9, Reason.CLEAR)]
    assert run(mm.load(block(0) + 8, 3)) == bytes(3)
    assert run(mm.load(block(8), 4)) == b"file"


def test_the_reaper_leaves_it_alone(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(0), b"x"))
    assert badness(mm) == 0, "its end would free nothing for those who ran out of memory"
    assert heard(reap(mm)) == []
    assert mm.present(block(0), block(1)) == [(0, 512)]


# The device's side


def test_a_device_faults_the_whole_page_and_sees_its_order(mm: Mm) -> None:
    map_huge(mm)
    run(device.fault(mm, block(0) + PAGE_SIZE, block(0) + 2 * PAGE_SIZE, True))
    assert mm.present(block(0), block(2)) == [(0, 512)]
    entries = device.snapshot(mm, block(0), block(1))
    assert (entries & np.uint64(ORDER_MASK) == 9 << ORDER_SHIFT).all()
    assert (entries & np.uint64(WRITE) != 0).all()


def test_populating_takes_one_fault_a_page(mm: Mm) -> None:
    map_huge(mm, 3)
    run(mm.madvise(block(0), 3 * PMD_SIZE, POPULATE_WRITE))
    assert mm.present(block(0), block(3)) == [(0, 3 * 512)]
    assert mm.huge(block(0), block(3)) == [(0, 3 * 512)]


def test_no_device_has_a_page_for_itself_or_in_its_memory(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(0), b"x"))
    assert not run(device_exclusive.make_exclusive(mm, block(0), block(0) + 2 * PAGE_SIZE, 9)).any()
    assert refused(lambda: run(mm.migrate_to_device(block(0), block(1), 9))) == "EINVAL"
    assert run(mm.move_pages(block(0), PMD_SIZE, 0)) == 0
    assert mm.huge(block(0), block(1)) == [(0, 512)]


def test_soft_dirty_does_not_concern_it(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(0), b"x"))
    run(mm.clear_refs(4))
    assert heard(mm.store(block(0), b"y")) == []


# Pages that fail


def test_a_private_page_that_fails_goes_as_a_whole_and_out_of_the_pool(mm: Mm) -> None:
    map_huge(mm)
    run(mm.store(block(0), b"one"))
    run(mm.store(block(1), b"two"))
    assert told(mm.madvise(block(0) + 5 * PAGE_SIZE, PAGE_SIZE, HWPOISON)) == [(0, 1, Reason.CLEAR)]
    assert refused(lambda: run(mm.load(block(0), 3))) == "ENXIO"
    assert refused(lambda: run(mm.store(block(0) + PAGE_SIZE, b"x"))) == "ENXIO"
    assert refused(lambda: run(device.fault(mm, block(0), block(1), False))) == "EFAULT"
    child = run(mm.fork())
    run(mm.mremap(block(0), 2 * PMD_SIZE, 2 * PMD_SIZE, 3, block(8)))
    assert refused(lambda: run(child.load(block(0), 3))) == "ENXIO"
    assert refused(lambda: run(mm.load(block(8), 3))) == "ENXIO"
    assert run(mm.load(block(9), 3)) == b"two"
    check_idle(mm.memory)
    run(child.exit())
    run(mm.munmap(block(8), 2 * PMD_SIZE))
    check_idle(mm.memory)
    assert (mm.memory.frames.hugetlb.nr, pool(mm)) == (3, (3, 0))


def test_a_files_page_that_fails_stays_bad_until_it_is_punched(mm: Mm) -> None:
    file = mm.memory.create_file("f", "hugetlb", 1024)
    run(mm.mmap(block(0), 2 * PMD_SIZE, RW, 1 | FIXED, file, 0))
    run(mm.store(block(0), b"lost"))
    assert told(mm.madvise(block(0), PAGE_SIZE, HWPOISON)) == [(0, 1, Reason.CLEAR)]
    run(mm.madvise(block(0), PMD_SIZE, DONTNEED))
    assert refused(lambda: run(mm.load(block(0), 4))) == "ENXIO"
    check_idle(mm.memory)
    run(mm.memory.punch(file, 0, PMD_SIZE))
    assert run(mm.load(block(0), 4)) == bytes(4)
    check_idle(mm.memory)


def test_a_free_page_leaves_the_pool_unless_it_is_reserved(mm: Mm) -> None:
    """It is no huge page any more: one frame is out of use, the other 511 are anybody's."""
    frames = mm.memory.frames
    free, free_nr = frames.hugetlb.frames(), frames.free_nr
    assert run(mm.memory.offline_page(free[700], 0)) == 0
    assert refused(lambda: run(mm.memory.offline_page(free[700], 0))) == "EHWPOISON"
    assert (pool(mm), frames.hugetlb.nr, frames.free_nr) == ((3, 0), 3, free_nr + 511)
    assert run(mm.memory.offline_page(free[701], 0)) == 0
    assert run(mm.memory.offline_page(free[1536], 1)) == 0
    assert (pool(mm), frames.free_nr) == ((2, 0), free_nr + 510 + 511)
    map_huge(mm, 2)
    assert refused(lambda: run(mm.memory.offline_page(free[0], 0))) == "EBUSY"
    check_idle(mm.memory)


def test_a_pinned_page_that_fails_is_taken_from_its_mapping(mm: Mm) -> None:
    map_huge(mm)
    pinned = run(device.pin(mm, block(0), block(0) + PAGE_SIZE, True))
    assert refused(lambda: run(mm.madvise(block(0), PAGE_SIZE, HWPOISON))) == "EBUSY"
    device.unpin(mm, pinned)
    assert refused(lambda: run(mm.load(block(0), 1))) == "ENXIO"
    check_idle(mm.memory)
