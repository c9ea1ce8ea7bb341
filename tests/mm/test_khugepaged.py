"""khugepaged: which blocks a pass makes huge, what it asks and tells, and where it goes on."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, Mirror, at, errno_of, heard, run, told
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.idle import CLEAR
from mmubusd.mm.khugepaged import Limits
from mmubusd.mm.madvise import HUGEPAGE, NOHUGEPAGE, PAGEOUT
from mmubusd.mm.notification import Answer, InvalidateRange, Notification, Reason
from mmubusd.mm.notification import TestYoung as LookYoung
from mmubusd.mm.shmem_huge import ShmemHuge

P = PAGE_SIZE
B = 512


def machine(limits: Limits | None = None, shmem_enabled: ShmemHuge = ShmemHuge.NEVER, frames_nr: int = 12 * B) -> Mm:
    memory = Memory(
        frames_nr=frames_nr,
        swap_slots_nr=2 * B,
        thp=Thp.MADVISE,
        shmem_enabled=shmem_enabled,
        khugepaged_limits=limits or Limits(),
    )
    mm = memory.create_mm("test")
    mm.notified = True
    return mm


def small(mm: Mm, first: int, pages: int = B, touched: int = B, kind: int = ANON_PRIVATE) -> None:
    """A mapping of small pages, of which the first ones have been touched; then it asks for huge ones."""
    run(mm.mmap(at(first), pages * P, RW, kind | FIXED))
    for page in range(first, first + touched):
        run(mm.store(at(page), b"%d" % page))
    run(mm.madvise(at(first), pages * P, HUGEPAGE))


def age(mm: Mm, blocks: int = 2) -> None:
    """Every mark is cleared, of the PTEs and of the LRU lists."""
    run(mm.idle_scan(at(0), blocks * B * P, CLEAR))


def collapse(mm: Mm, pages: int = 0) -> int:
    return run(mm.memory.khugepaged_scan(pages))


def huge(mm: Mm) -> list[tuple[int, int]]:
    return mm.huge(at(0), at(16 * B))


def test_a_pass_tells_of_each_block_that_it_makes_huge() -> None:
    mm = machine()
    small(mm, 0, 3 * B, touched=B + 7)
    assert heard(mm.memory.khugepaged_scan()) == [
        InvalidateRange(mm, at(0), at(B), Reason.CLEAR),
        InvalidateRange(mm, at(B), at(2 * B), Reason.CLEAR),
    ]
    assert huge(mm) == [(0, 2 * B)], "a block without a table is left alone"
    assert run(mm.load(at(500), 3)) == b"500"
    assert run(mm.load(at(B + 9), 3)) == bytes(3)
    assert heard(mm.memory.khugepaged_scan()) == []
    check_idle(mm.memory)


def test_only_where_huge_pages_are_allowed() -> None:
    mm = machine()
    small(mm, 0)
    run(mm.mmap(at(B), B * P, RW, ANON_PRIVATE | FIXED))
    run(mm.touch(at(B), B * P, "write"))
    small(mm, 2 * B)
    run(mm.madvise(at(2 * B), P, NOHUGEPAGE))
    small(mm, 4 * B)
    run(mm.mprotect(at(4 * B), P, 1))  # no block lies in one mapping
    assert collapse(mm) == 1
    assert huge(mm) == [(0, B)]
    mm.thp_disabled = True
    small(mm, 6 * B)
    assert collapse(mm) == 0


@pytest.mark.parametrize(("touched", "collapsed"), [(12, 1), (11, 0)])
def test_pages_that_nobody_has_touched(touched: int, collapsed: int) -> None:
    mm = machine(Limits(max_ptes_none=B - 12))
    small(mm, 0, touched=touched)
    assert collapse(mm) == collapsed


@pytest.mark.parametrize(("swapped", "collapsed"), [(64, 1), (65, 0)])
def test_pages_in_swap_are_read_in(swapped: int, collapsed: int) -> None:
    mm = machine()
    small(mm, 0)
    run(mm.madvise(at(0), swapped * P, PAGEOUT))
    assert mm.swapped(at(0), at(B)) == [(0, swapped)]
    assert collapse(mm) == collapsed
    assert run(mm.load(at(5), 1)) == b"5"
    check_idle(mm.memory)


@pytest.mark.parametrize(("shared", "collapsed"), [(256, 1), (257, 0)])
def test_pages_that_a_child_has_too(shared: int, collapsed: int) -> None:
    mm = machine()
    small(mm, 0)
    child = run(mm.fork())
    run(child.munmap(at(shared), (B - shared) * P))
    for page in range(shared, B):
        run(mm.store(at(page), b"mine"))
    child.thp_disabled = True
    assert collapse(mm) == collapsed
    assert run(child.load(at(0), 1)) == b"0"
    check_idle(mm.memory)


def test_a_block_that_nobody_uses_is_left_alone_and_a_device_counts() -> None:
    mm = machine()
    small(mm, 0, touched=3)
    age(mm)
    notes: list[Notification] = []
    assert run(mm.memory.khugepaged_scan(), notes.append) == 0
    assert notes == [LookYoung(mm, (at(0), at(1), at(2)))]
    assert run(mm.memory.khugepaged_scan(), lambda _: Answer(young=frozenset({at(2)}))) == 1
    assert huge(mm) == [(0, B)]


def test_nobody_is_asked_when_the_program_has_used_it() -> None:
    mm = machine()
    small(mm, 0, touched=3)
    age(mm)
    run(mm.load(at(1), 1))
    assert told(mm.memory.khugepaged_scan()) == [(0, B)]


def test_where_pages_are_in_swap_half_of_the_block_must_be_in_use() -> None:
    mm = machine()
    small(mm, 0)
    run(mm.madvise(at(0), P, PAGEOUT))
    age(mm)
    run(mm.touch(at(1), 255 * P, "read"))
    assert collapse(mm) == 0
    run(mm.touch(at(256), P, "read"))
    assert collapse(mm) == 1


def test_pages_that_somebody_holds_stay() -> None:
    mm = machine()
    small(mm, 0)
    mm.memory.frames.pin([mm.pgtable.get(at(3) >> 12) >> 12])
    assert collapse(mm) == 0
    assert huge(mm) == []
    mm.memory.frames.unpin([mm.pgtable.get(at(3) >> 12) >> 12])
    assert collapse(mm) == 1


def test_a_pass_goes_on_where_the_last_one_ended() -> None:
    mm = machine()
    small(mm, 0, 3 * B, touched=3 * B)
    other = mm.memory.create_mm("other")
    small(other, 0)
    assert collapse(mm, 2 * B) == 2
    assert huge(mm) == [(0, 2 * B)]
    assert collapse(mm, 2 * B) == 2
    assert huge(other) == [(0, B)]
    assert mm.memory.khugepaged.full_scans == 0
    assert collapse(mm, B) == 0
    assert mm.memory.khugepaged.full_scans == 1
    assert mm.memory.khugepaged.pages_collapsed == 4
    check_idle(mm.memory)


def test_a_second_pass_beside_the_first_is_refused() -> None:
    mm = machine()
    small(mm, 0)
    first = mm.memory.khugepaged_scan()
    next(first)
    assert errno_of(mm.memory.khugepaged_scan()) == "EBUSY"
    first.close()
    assert collapse(mm) == 1


def test_a_pass_ends_where_no_room_is_left() -> None:
    mm = machine(frames_nr=3 * B)
    small(mm, 0, 2 * B, touched=B + 40)
    assert collapse(mm) == 1
    frames = mm.memory.frames
    taken = [frames.alloc(0, 0, 0) for _ in range(frames.free_nr - 100)]
    assert collapse(mm) == 0
    assert huge(mm) == [(0, B)]
    for pfn in taken:
        frames.put(pfn)
    check_idle(mm.memory)


def test_shared_memory_is_gathered_and_mapped_by_the_next_fault() -> None:
    mm = machine(shmem_enabled=ShmemHuge.ADVISE)
    small(mm, 0, kind=ANON_SHARED, touched=2)
    assert told(mm.memory.khugepaged_scan()) == [(0, 1), (1, 2), (0, B)]
    assert huge(mm) == []
    assert run(mm.load(at(1), 1)) == b"1"
    assert huge(mm) == [(0, B)]
    check_idle(mm.memory)


def test_a_table_of_small_entries_of_a_huge_page_goes() -> None:
    mm = machine(shmem_enabled=ShmemHuge.ADVISE)
    run(mm.mmap(at(0), B * P, RW, ANON_SHARED | FIXED))
    run(mm.madvise(at(0), B * P, HUGEPAGE))
    run(mm.store(at(0), b"0"))
    run(mm.mprotect(at(10), P, 1))
    run(mm.load(at(100), 1))
    run(mm.mprotect(at(10), P, 3))
    assert huge(mm) == []
    assert told(mm.memory.khugepaged_scan()) == [(0, B)]
    assert mm.present(at(0), at(B)) == []
    run(mm.load(at(0), 1))
    assert huge(mm) == [(0, B)]
    check_idle(mm.memory)


def test_shared_memory_is_left_alone_where_the_setting_says_so() -> None:
    mm = machine()
    small(mm, 0, kind=ANON_SHARED)
    assert collapse(mm) == 0


def test_a_device_never_reads_an_old_page() -> None:
    mm = machine()
    small(mm, 0)
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(B), True)))
    run(mm.memory.khugepaged_scan(), mirror.hear)
    assert huge(mm) == [(0, B)]
    assert not mirror.entries, "it was told of the whole block before its pages moved"
