"""NUMA balancing: hints on pages that are elsewhere, and what an access to one does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, Mirror, at, errno_of, heard, run, told
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import HUGEPAGE, MERGEABLE
from mmubusd.mm.notification import InvalidatePage, InvalidateRange, Reason
from mmubusd.mm.pgtable import PFN_SHIFT

P = PAGE_SIZE


@pytest.fixture
def mm() -> Iterator[Mm]:
    mm = Memory(frames_nr=4096, nodes_nr=2, thp=Thp.MADVISE).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 8 * P, RW, ANON_PRIVATE | FIXED))
    for page in range(4):
        run(mm.store(at(page), b"page %d" % page))
    mm.memory.lru.drain()
    yield mm
    check_idle(mm.memory)


def node_of(mm: Mm, page: int) -> int:
    return mm.memory.frames.node_of(mm.pgtable.get(at(page) >> PAGE_SHIFT) >> PFN_SHIFT)


def test_a_scan_tells_and_the_first_access_moves_the_page(mm: Mm) -> None:
    assert heard(mm.numa_scan(at(0), 8 * P, 1)) == [InvalidateRange(mm, at(0), at(8), Reason.PROTECTION_VMA)]
    assert mm.present(at(0), at(8)) == [(0, 4)], "the pages are there"
    assert heard(mm.load(at(1), 6)) == [InvalidatePage(mm, (at(1),), Reason.CLEAR)]
    assert [node_of(mm, page) for page in range(4)] == [0, 1, 0, 0]
    assert run(mm.load(at(1), 6)) == b"page 1"
    assert told(mm.store(at(2), b"written")) == [(2, 3)]
    assert node_of(mm, 2) == 1
    assert told(mm.store(at(2), b"again")) == []


def test_pages_on_the_program_s_node_are_left_alone(mm: Mm) -> None:
    assert run(mm.numa_scan(at(0), 8 * P, 0)) == 0
    assert told(mm.store(at(0), b"x")) == []
    assert run(mm.numa_scan(at(0), 8 * P, 1)) == 4
    assert told(mm.numa_scan(at(0), 8 * P, 0)) == [(0, 8)], "the range is told of, whatever is in it"
    assert told(mm.store(at(0), b"x")) == [], "the program is back where its pages are"


def test_nothing_is_told_of_where_there_are_no_tables(mm: Mm) -> None:
    run(mm.mmap(at(1 << 19), 4 * P, RW, ANON_PRIVATE | FIXED))
    assert told(mm.numa_scan(at(1 << 19), 4 * P, 1)) == []


def test_a_device_must_let_go_and_faults_like_the_program(mm: Mm) -> None:
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(4), True)))
    run(mm.numa_scan(at(0), 8 * P, 1), mirror.hear)
    assert mirror.entries == {}
    assert device.snapshot(mm, at(0), at(4)).tolist() == [0] * 4
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(4), True), mirror.hear))
    mirror.check_current()
    assert [node_of(mm, page) for page in range(4)] == [1] * 4


def test_what_is_pinned_shared_or_merged_gets_no_hint(mm: Mm) -> None:
    pins = run(device.pin(mm, at(0), at(1), True))
    for page in (2, 3):
        run(mm.store(at(page), b"the same"))
    run(mm.madvise(at(2), 2 * P, MERGEABLE))
    assert run(mm.memory.ksm_scan()) == 1
    assert run(mm.numa_scan(at(0), 8 * P, 1)) == 1, "page 1"
    device.unpin(mm, pins)
    run(mm.store(at(1), b"x"))
    child = run(mm.fork())
    assert run(child.numa_scan(at(0), 8 * P, 0)) == 0


def test_shared_memory_is_looked_at_and_stays_where_others_map_it(mm: Mm) -> None:
    run(mm.mmap(at(20), 2 * P, RW, ANON_SHARED | FIXED))
    run(mm.load(at(20), 1))
    child = run(mm.fork())
    run(child.load(at(20), 1))
    hinted = run(mm.numa_scan(at(20), 2 * P, 1))
    run(mm.load(at(20), 1))
    assert node_of(mm, 20) == 0
    assert hinted in (0, 1, 2)
    run(child.exit())


def test_mprotect_and_fork_and_munmap_of_hinted_pages(mm: Mm) -> None:
    run(mm.numa_scan(at(0), 8 * P, 1))
    run(mm.mprotect(at(0), P, 1))
    assert told(mm.load(at(0), 1)) == [], "the new rights have replaced the hint"
    child = run(mm.fork())
    assert run(child.load(at(1), 6)) == b"page 1"
    run(child.store(at(2), b"child"))
    assert run(mm.load(at(2), 6)) == b"page 2"
    run(mm.munmap(at(3), P))


def test_a_huge_page(mm: Mm) -> None:
    block = (at(0) + 16 * PMD_SIZE) & -PMD_SIZE
    run(mm.mmap(block, PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, PMD_SIZE, HUGEPAGE))
    run(mm.store(block, b"huge"))
    assert run(mm.numa_scan(block, PMD_SIZE, 1)) in (0, 512)
    assert run(mm.load(block, 4)) == b"huge"
    run(mm.store(block, b"more"))


def test_errnos(mm: Mm) -> None:
    assert errno_of(mm.numa_scan(at(0), 8 * P, 2)) == "ENODEV"
    assert errno_of(mm.numa_scan(at(0) + 1, 8 * P, 1)) == "EINVAL"
    assert errno_of(mm.numa_scan(at(0), 0, 1)) == "EINVAL"
