"""userfaultfd: who may register what, what a registered page does, and UFFDIO_MOVE.

What is told, and each errno, is what Linux 6.18.44 does, call by call.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, Mirror, at, errno_of, heard, run, told
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import COLLAPSE, DONTNEED, HUGEPAGE, MERGEABLE, PAGEOUT, POPULATE_WRITE
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.mm.userfaultfd import ALLOW_SRC_HOLES, ASYNC, MINOR, MISSING, WP

P, ONE, TWO = PAGE_SIZE, 1, 2


@pytest.fixture
def mm() -> Iterator[Mm]:
    mm = Memory(frames_nr=4096, swap_slots_nr=64, thp=Thp.MADVISE).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 32 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.mmap(at(32), 32 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.uffd_register(at(32), 32 * P, MISSING, ONE))
    yield mm
    check_idle(mm.memory)


def fill(mm: Mm, *pages: int) -> None:
    for page in pages:
        run(mm.store(at(page), b"page %d" % page))
    mm.memory.lru.drain()


def bytes_at(mm: Mm, page: int) -> bytes:
    return run(mm.load(at(page), 8)).rstrip(b"\0")


def spans(mm: Mm) -> list[tuple[int, int]]:
    return [((one.start - at(0)) // P, (one.end - at(0)) // P) for one in mm.mappings()]


# Registration


def test_a_registered_range_is_a_mapping_of_its_own_until_it_is_given_back(mm: Mm) -> None:
    assert spans(mm) == [(0, 32), (32, 64)]
    run(mm.uffd_register(at(0), 32 * P, MISSING, ONE))
    assert spans(mm) == [(0, 64)]
    run(mm.uffd_unregister(at(8), 8 * P, ONE))
    assert spans(mm) == [(0, 8), (8, 16), (16, 64)]
    run(mm.uffd_unregister(at(0), 64 * P, ONE))
    assert spans(mm) == [(0, 64)]


def test_a_mapping_has_one_userfaultfd(mm: Mm) -> None:
    assert errno_of(mm.uffd_register(at(40), 2 * P, MISSING, TWO)) == "EBUSY"
    assert errno_of(mm.uffd_register(at(30), 4 * P, MISSING, TWO)) == "EBUSY", "a part of it"
    assert errno_of(mm.uffd_register(at(40), 2 * P, MISSING, ONE)) is None
    assert errno_of(mm.uffd_unregister(at(40), 2 * P, TWO)) == "EINVAL"
    run(mm.uffd_register(at(0), 32 * P, MISSING, TWO))
    assert spans(mm) == [(0, 32), (32, 64)], "mappings of two userfaultfds do not merge"


@pytest.mark.parametrize(
    ("first", "pages", "mode", "error"),
    [
        (0, 4, 0, "EINVAL"),
        (0, 4, 16, "EINVAL"),
        (0, 4, ASYNC, "EINVAL"),
        (0, 4, MINOR, "EINVAL"),
        (0, 0, MISSING, "EINVAL"),
        (500, 4, MISSING, "EINVAL"),
        (30, 200, WP, None),
    ],
)
def test_what_can_be_registered(mm: Mm, first: int, pages: int, mode: int, error: str | None) -> None:
    assert errno_of(mm.uffd_register(at(first), pages * P, mode, ONE)) == error
    assert errno_of(mm.uffd_register(at(first) + 1, P, MISSING, ONE)) == "EINVAL"
    assert errno_of(mm.uffd_register(at(first), P, MISSING, 0)) == "EBADF"


@pytest.mark.parametrize(("kind", "error"), [("disk", "EINVAL"), ("shm", None)])
def test_files_of_a_disk_cannot_be_registered(mm: Mm, kind: str, error: str | None) -> None:
    file = mm.memory.create_file("f", kind, 4, cached=True)
    run(mm.mmap(at(100), 4 * P, RW, 1 | FIXED, file, 0))
    assert errno_of(mm.uffd_register(at(100), 4 * P, MISSING, ONE)) == error
    assert errno_of(mm.uffd_register(at(100), 4 * P, WP | ASYNC, ONE)) is None, "any memory"


def test_a_missing_page_is_not_made(mm: Mm) -> None:
    assert errno_of(mm.load(at(32), 1)) == "ENXIO"
    assert errno_of(mm.store(at(33), b"x")) == "ENXIO"
    assert errno_of(device.fault(mm, at(34), at(35), False)) == "EFAULT"
    assert errno_of(mm.madvise(at(32), 4 * P, POPULATE_WRITE)) == "EFAULT"
    assert mm.present(at(32), at(64)) == []
    run(mm.uffd_unregister(at(32), 32 * P, ONE))
    assert errno_of(mm.store(at(33), b"x")) is None


def test_of_shared_memory_what_the_cache_has_is_minor(mm: Mm) -> None:
    run(mm.mmap(at(100), 4 * P, RW, ANON_SHARED | FIXED))
    run(mm.store(at(100), b"cached"))
    run(mm.madvise(at(100), 4 * P, DONTNEED))
    run(mm.uffd_register(at(100), 4 * P, MISSING, ONE))
    assert bytes_at(mm, 100) == b"cached"
    assert errno_of(mm.load(at(101), 1)) == "ENXIO"
    run(mm.madvise(at(100), 4 * P, DONTNEED))
    run(mm.uffd_register(at(100), 4 * P, MINOR, ONE))
    assert errno_of(mm.load(at(100), 1)) == "ENXIO"
    assert errno_of(mm.load(at(101), 1)) is None


def test_a_child_and_a_moved_mapping_are_registered_with_nobody(mm: Mm) -> None:
    child = run(mm.fork())
    assert errno_of(child.load(at(32), 1)) is None
    run(mm.mremap(at(40), 2 * P, 2 * P, 3, at(600)))
    assert errno_of(mm.store(at(600), b"x")) is None
    assert errno_of(mm.load(at(39), 1)) == "ENXIO"


# Write protection


def test_protection_of_a_registered_range(mm: Mm) -> None:
    fill(mm, 0, 1, 2)
    assert errno_of(mm.uffd_writeprotect(at(32), P, 1)) == "ENOENT", "registered for something else"
    run(mm.uffd_register(at(0), 6 * P, WP, TWO))
    assert told(mm.uffd_writeprotect(at(0), 2 * P, 1)) == [(0, 2)]
    assert errno_of(mm.store(at(0), b"x")) == "ENXIO"
    assert heard(mm.uffd_unregister(at(0), 6 * P, TWO)) == [InvalidateRange(mm, at(0), at(6), Reason.PROTECTION_VMA)]
    assert errno_of(mm.store(at(0), b"x")) is None


def test_asynchronous_protection_is_taken_away_by_the_write(mm: Mm) -> None:
    fill(mm, 0, 1)
    run(mm.uffd_register(at(0), 6 * P, WP | ASYNC, TWO))
    run(mm.uffd_writeprotect(at(0), 2 * P, 1))
    assert told(mm.store(at(0), b"x")) == []
    assert bytes_at(mm, 0)[:1] == b"x"


# UFFDIO_MOVE


def test_a_run_of_pages_moves_at_once(mm: Mm) -> None:
    fill(mm, 0, 1, 2)
    free = mm.memory.frames.free_nr
    assert heard(mm.uffd_move(at(32), at(0), 3 * P, 0, ONE)) == [InvalidateRange(mm, at(0), at(3), Reason.CLEAR)]
    assert mm.memory.frames.free_nr == free
    assert [bytes_at(mm, 32 + page) for page in range(3)] == [b"page 0", b"page 1", b"page 2"]
    assert mm.present(at(0), at(32)) == []
    assert told(mm.store(at(33), b"mine")) == [], "it is writable, and nobody else's"


def test_a_device_lets_go_of_a_page_before_it_moves(mm: Mm) -> None:
    fill(mm, 0)
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(1), True)))
    run(mm.uffd_move(at(32), at(0), P, 0, ONE), mirror.hear)
    mirror.check_current()
    assert mirror.entries == {}
    assert device.snapshot(mm, at(0), at(1)).tolist() == [0]
    assert bytes_at(mm, 32) == b"page 0"


@pytest.mark.parametrize(
    ("dst", "src", "pages", "mode", "error", "ranges"),
    [
        (40, 3, 1, 0, "EEXIST", [(3, 4)]),
        (31, 3, 2, 0, "EINVAL", []),  # not inside one mapping
        (20, 3, 1, 0, "EINVAL", []),  # not registered
        (36, 10, 1, 0, "ENOENT", [(10, 11)]),
        (36, 10, 1, ALLOW_SRC_HOLES, None, [(10, 11)]),
        (36, 1000, 1, 0, "ENOENT", []),
        (1000, 3, 1, 0, "ENOENT", []),
        (36, 3, 0, 0, "EINVAL", []),
        (36, 3, 1, 8, "EINVAL", []),
        (50, 30, 4, 0, "EINVAL", []),
    ],
)
def test_errnos(
    mm: Mm, dst: int, src: int, pages: int, mode: int, error: str | None, ranges: list[tuple[int, int]]
) -> None:
    fill(mm, 3, 4)
    run(mm.uffd_move(at(40), at(4), P, 0, ONE))
    told_of: list[InvalidateRange] = []
    try:
        run(mm.uffd_move(at(dst), at(src), pages * P, mode, ONE), told_of.append)  # type: ignore[arg-type]
        failed = None
    except Exception as raised:
        failed = raised.errno  # type: ignore[attr-defined]
    assert failed == error
    assert [((note.start - at(0)) // P, (note.end - at(0)) // P) for note in told_of] == ranges


def test_it_stops_at_a_hole_and_says_how_far_it_came(mm: Mm) -> None:
    fill(mm, 3, 4, 5, 6, 7)
    assert run(mm.uffd_move(at(36), at(3), 9 * P, 0, ONE)) == 5 * P
    assert mm.present(at(32), at(64)) == [(4, 9)]
    fill(mm, 20, 22)
    assert told(mm.uffd_move(at(50), at(20), 3 * P, ALLOW_SRC_HOLES, ONE)) == [(20, 23), (21, 23), (22, 23)]
    assert mm.present(at(32), at(64)) == [(4, 9), (18, 19), (20, 21)]


def test_the_zero_page_moves_alone(mm: Mm) -> None:
    fill(mm, 10, 12)
    run(mm.load(at(11), 1))
    assert told(mm.uffd_move(at(40), at(10), 3 * P, 0, ONE)) == [(10, 13), (11, 13), (12, 13)]
    assert told(mm.store(at(41), b"x")) == [(41, 42)]


def test_pages_of_others_stay(mm: Mm) -> None:
    fill(mm, 11, 12, 13)
    child = run(mm.fork())
    assert errno_of(mm.uffd_move(at(51), at(11), P, 0, ONE)) == "EBUSY"
    run(mm.store(at(11), b"page 11"))
    assert run(mm.uffd_move(at(51), at(11), 2 * P, 0, ONE)) == P
    run(child.exit())
    assert errno_of(mm.uffd_move(at(55), at(12), P, 0, ONE)) == "EBUSY", "until it is written to"
    run(mm.store(at(12), b"page 12"))
    assert run(mm.uffd_move(at(55), at(12), P, 0, ONE)) == P


def test_pinned_and_merged_pages_stay(mm: Mm) -> None:
    fill(mm, 0)
    pins = run(device.pin(mm, at(0), at(1), True))
    assert errno_of(mm.uffd_move(at(32), at(0), P, 0, ONE)) == "EBUSY"
    device.unpin(mm, pins)
    run(mm.store(at(1), b"same"))
    run(mm.store(at(2), b"same"))
    run(mm.madvise(at(1), 2 * P, MERGEABLE))
    assert run(mm.memory.ksm_scan()) == 1
    assert errno_of(mm.uffd_move(at(32), at(1), P, 0, ONE)) == "EBUSY"


@pytest.mark.parametrize("how", ["read-only", "locked", "shared"])
def test_mappings_must_be_alike(mm: Mm, how: str) -> None:
    fill(mm, 0)
    if how == "read-only":
        run(mm.mprotect(at(0), P, 1))
    elif how == "locked":
        run(mm.mlock(at(0), P))
    else:
        run(mm.mmap(at(0), P, RW, ANON_SHARED | FIXED))
    assert errno_of(mm.uffd_move(at(32), at(0), P, 0, ONE)) == "EINVAL"


def test_swapped_pages_move_with_their_slots(mm: Mm) -> None:
    fill(mm, 0, 1)
    run(mm.madvise(at(0), 2 * P, PAGEOUT))
    assert mm.swapped(at(0), at(2)) == [(0, 2)]
    assert told(mm.uffd_move(at(32), at(0), 2 * P, 0, ONE)) == [(0, 2), (1, 2)]
    assert mm.swapped(at(0), at(64)) == [(32, 34)]
    assert (bytes_at(mm, 32), bytes_at(mm, 33)) == (b"page 0", b"page 1")


def test_a_page_of_a_device_stays(mm: Mm) -> None:
    fill(mm, 0)
    run(mm.migrate_to_device(at(0), at(1), 7))
    assert errno_of(mm.uffd_move(at(32), at(0), P, 0, ONE)) == "EFAULT"


def test_runs_end_at_page_tables(mm: Mm) -> None:
    base = (at(0) + 16 * PMD_SIZE) & -PMD_SIZE
    other = base + 8 * PMD_SIZE
    run(mm.mmap(base, 4 * PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.mmap(other, 4 * PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(base, 4 * PMD_SIZE, 15))
    run(mm.madvise(base, 4 * PMD_SIZE, POPULATE_WRITE))
    run(mm.uffd_register(other, 4 * PMD_SIZE, MISSING, ONE))

    def moved(to: int, page: int, count: int) -> list[tuple[int, int]]:
        notes = heard(mm.uffd_move(other + to * P, base + page * P, count * P, 0, ONE))
        return [((note.start - base) // P, (note.end - base) // P) for note in notes]  # type: ignore[union-attr]

    assert moved(300, 500, 30) == [(500, 530), (512, 530)]
    assert moved(1000, 600, 100) == [(600, 700), (624, 700)]
    assert moved(1530, 1500, 100) == [(1500, 1600), (1506, 1600), (1536, 1600)]


def huge_area(mm: Mm, offset: int) -> int:
    block = ((at(0) >> PAGE_SHIFT << PAGE_SHIFT) + offset * PMD_SIZE) & -PMD_SIZE
    run(mm.mmap(block, 2 * PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, 2 * PMD_SIZE, HUGEPAGE))
    return block


@pytest.mark.parametrize("written", [True, False])
def test_a_huge_page_moves_whole(mm: Mm, written: bool) -> None:
    source, target = huge_area(mm, 16), huge_area(mm, 24)
    run(mm.store(source, b"huge") if written else mm.load(source, 1))
    run(mm.uffd_register(target, PMD_SIZE, MISSING, ONE))
    assert heard(mm.uffd_move(target, source, PMD_SIZE, 0, ONE)) == [
        InvalidateRange(mm, source, source + PMD_SIZE, Reason.CLEAR)
    ]
    assert mm.huge(target, target + PMD_SIZE) == [(0, 512)]
    assert run(mm.load(target, 4)) == (b"huge" if written else bytes(4))


def test_a_part_of_a_huge_page_is_split_off(mm: Mm) -> None:
    source, target = huge_area(mm, 16), huge_area(mm, 24)
    run(mm.store(source, b"x" * PMD_SIZE))
    run(mm.uffd_register(target, PMD_SIZE, MISSING, ONE))
    notes = heard(mm.uffd_move(target, source, P, 0, ONE))
    assert notes[-1] == InvalidateRange(mm, source, source + P, Reason.CLEAR)
    assert mm.huge(source, source + PMD_SIZE) == []
    assert run(mm.load(target, 4)) == b"xxxx"
    assert errno_of(mm.madvise(target, PMD_SIZE, COLLAPSE)) in (None, "EINVAL", "EAGAIN")
