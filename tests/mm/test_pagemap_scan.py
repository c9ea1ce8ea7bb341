"""PAGEMAP_SCAN: finding written pages and protecting them again in one step; what is told is the kernel's, 6.18.44."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mm.driver import ANON_PRIVATE, BASE, FIXED, RW, at, errno_of, heard, run, told
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.madvise import PAGEOUT
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.mm.pagemap_scan import (
    CHECK_WPASYNC,
    FILE,
    PFNZERO,
    PRESENT_PAGE,
    REGION,
    SWAPPED,
    WP_MATCHING,
    WPALLOWED,
    WRITTEN,
)
from mmubusd.mm.userfaultfd import ASYNC, WP

P = PAGE_SIZE


@pytest.fixture
def mm() -> Iterator[Mm]:
    mm = Memory(frames_nr=512, swap_slots_nr=16).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 16 * P, RW, ANON_PRIVATE | FIXED))
    for page in range(8):
        run(mm.store(at(page), b"page"))
    yield mm
    check_idle(mm.memory)


def scan(mm: Mm, first: int, pages: int, flags: int, mask: int) -> list[tuple[int, int, int]]:
    data = run(mm.pagemap_scan(at(first), pages * P, flags, mask))
    return [((start - BASE) // P, (end - BASE) // P, what) for start, end, what in REGION.iter_unpack(data)]


def test_written_pages_are_found_and_protected_in_one_step(mm: Mm) -> None:
    run(mm.uffd_register(at(0), 12 * P, WP | ASYNC, 1))
    written = WPALLOWED | WRITTEN | PRESENT_PAGE
    assert [(a, b, what & written) for a, b, what in scan(mm, 0, 16, WP_MATCHING, WRITTEN)] == [(0, 8, written)]
    assert scan(mm, 0, 16, WP_MATCHING, WRITTEN) == []
    assert told(mm.store(at(3), b"again")) == []
    assert [(a, b) for a, b, _ in scan(mm, 0, 16, 0, WRITTEN)] == [(3, 4)]
    assert [(a, b) for a, b, _ in scan(mm, 2, 9, WP_MATCHING | CHECK_WPASYNC, WRITTEN)] == [(3, 4)]
    assert scan(mm, 0, 16, WP_MATCHING, WRITTEN) == []


def test_the_whole_range_is_told_of_whatever_is_in_it(mm: Mm) -> None:
    whole = [InvalidateRange(mm, at(0), at(16), Reason.PROTECTION_VMA)]
    assert heard(mm.pagemap_scan(at(0), 16 * P, WP_MATCHING, WRITTEN)) == whole
    assert told(mm.pagemap_scan(at(2000), 9 * P, WP_MATCHING, WRITTEN)) == [(2000, 2009)]
    assert told(mm.pagemap_scan(at(0), 16 * P, 0, WRITTEN)) == []
    assert told(mm.store(at(0), b"x")) == [], "nothing is protected where nobody has registered"


def test_where_it_is_not_allowed_it_can_fail(mm: Mm) -> None:
    assert errno_of(mm.pagemap_scan(at(0), 16 * P, WP_MATCHING | CHECK_WPASYNC, WRITTEN)) == "EPERM"
    run(mm.uffd_register(at(0), 12 * P, WP, 1))
    assert errno_of(mm.pagemap_scan(at(0), 12 * P, CHECK_WPASYNC, WRITTEN)) == "EPERM", "not asynchronous"


def test_categories(mm: Mm) -> None:
    run(mm.load(at(8), 1))
    run(mm.madvise(at(0), 2 * P, PAGEOUT))
    file = mm.memory.create_file("f", "disk", 2, cached=True)
    run(mm.mmap(at(20), 2 * P, 1, 1 | FIXED, file, 0))
    run(mm.load(at(20), 1))
    assert [(a, b) for a, b, _ in scan(mm, 0, 30, 0, SWAPPED)] == [(0, 2)]
    assert [(a, b) for a, b, _ in scan(mm, 0, 30, 0, PRESENT_PAGE)] == [(2, 8), (8, 9), (20, 22)]
    assert [(a, b) for a, b, _ in scan(mm, 0, 30, 0, PFNZERO)] == [(8, 9)]
    assert [(a, b) for a, b, _ in scan(mm, 0, 30, 0, FILE)] == [(20, 22)]


def test_errnos(mm: Mm) -> None:
    assert errno_of(mm.pagemap_scan(at(0) + 1, P, 0, WRITTEN)) == "EINVAL"
    assert errno_of(mm.pagemap_scan(at(0), P, 4, WRITTEN)) == "EINVAL"
    assert errno_of(mm.pagemap_scan(at(0), P, 0, 1 << 8)) == "EINVAL"
