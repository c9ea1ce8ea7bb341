"""Moving pages by policy, advice for another process, and who has written to a file."""

from __future__ import annotations

from typing import Any

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, at, errno_of, heard, run
from mmubusd.mm import Memory, Mm, MmError, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import COLD, DONTNEED, FREE, HUGEPAGE, HWPOISON, PAGEOUT, WILLNEED
from mmubusd.mm.mbind import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT
from mmubusd.mm.mempolicy import MPOL_BIND, MPOL_DEFAULT, MPOL_INTERLEAVE, MPOL_PREFERRED
from mmubusd.mm.notification import InvalidatePage, InvalidateRange, Reason
from mmubusd.mm.pgtable import DIRTY, PFN_SHIFT, WRITE
from mmubusd.mm.syscall import call

P = PAGE_SIZE


def machine(nodes_nr: int = 4, **options: Any) -> Mm:
    mm = Memory(frames_nr=4096, swap_slots_nr=64, nodes_nr=nodes_nr, **options).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    return machine()


def fill(mm: Mm, pages: int = 4) -> None:
    run(mm.mmap(at(0), pages * P, RW, ANON_PRIVATE | FIXED))
    for page in range(pages):
        run(mm.store(at(page), b"page %d" % page))


def nodes_of(mm: Mm, pages: int = 4) -> list[int]:
    frames = mm.memory.frames
    return [frames.node_of(mm.pgtable.get(at(page) >> PAGE_SHIFT) >> PFN_SHIFT) for page in range(pages)]


def check_bytes(mm: Mm, pages: int = 4) -> None:
    for page in range(pages):
        assert run(mm.load(at(page), 6)) == b"page %d" % page
    check_idle(mm.memory)


# migrate_pages(2)


def test_migrate_pages_moves_all_of_a_node_and_tells(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.migrate_pages(0b0001, 0b0100)) == [InvalidatePage(mm, tuple(map(at, range(4))), Reason.CLEAR)]
    assert nodes_of(mm) == [2] * 4
    assert heard(mm.migrate_pages(0b0001, 0b0010)) == [], "nothing is on that node"
    check_bytes(mm)


def test_nodes_are_exchanged_by_rank_and_no_page_moves_twice(mm: Mm) -> None:
    fill(mm)
    run(mm.move_pages(at(0), 2 * P, 1))
    assert nodes_of(mm) == [1, 1, 0, 0]
    assert run(mm.migrate_pages(0b0011, 0b0110)) == 0  # 1 to 2 before 0 to 1
    assert nodes_of(mm) == [2, 2, 1, 1]
    assert run(mm.migrate_pages(0b0110, 0b0100)) == 0  # masks of different size: node 2 keeps its pages
    assert nodes_of(mm) == [2] * 4
    check_bytes(mm)


def test_migrate_pages_leaves_what_others_hold(mm: Mm) -> None:
    fill(mm)
    run(device.pin(mm, at(0), at(1), True))
    assert run(mm.migrate_pages(0b0001, 0b0010)) == 1
    assert nodes_of(mm) == [0, 1, 1, 1]
    assert errno_of(mm.migrate_pages(0b0001, 1 << 4)) == "EINVAL"
    check_bytes(mm)


def test_a_huge_page_is_split_only_where_its_node_is_left() -> None:
    mm = machine(2, thp=Thp.MADVISE)
    block = (at(0) + PMD_SIZE - 1) & -PMD_SIZE
    run(mm.mmap(block, PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, PMD_SIZE, HUGEPAGE))
    run(mm.store(block, b"x" * PMD_SIZE))
    node = mm.memory.frames.node_of(mm.pgtable.get(block >> PAGE_SHIFT) >> PFN_SHIFT)
    assert heard(mm.migrate_pages(1 << 1 - node, 1 << node)) == []
    assert run(mm.migrate_pages(1 << node, 1 << 1 - node)) == 0
    assert run(mm.load(block + 9 * P, 1)) == b"x"
    check_idle(mm.memory)


# mbind(2)


def test_mbind_moves_what_is_elsewhere(mm: Mm) -> None:
    fill(mm)
    bind = mm.mbind(at(0), 2 * P, MPOL_BIND, 0b1000, MPOL_MF_MOVE | MPOL_MF_STRICT)
    assert heard(bind) == [InvalidatePage(mm, (at(0), at(1)), Reason.CLEAR)]
    assert nodes_of(mm) == [3, 3, 0, 0]
    assert heard(mm.mbind(at(0), 4 * P, MPOL_BIND, 0b1001, MPOL_MF_MOVE)) == [], "all are on nodes of the mask"
    run(mm.mbind(at(0), 4 * P, MPOL_INTERLEAVE, 0b0110, MPOL_MF_MOVE))
    assert sorted(nodes_of(mm)) == [1, 1, 2, 2]
    check_bytes(mm)


def test_mbind_that_is_strict_says_what_is_elsewhere(mm: Mm) -> None:
    fill(mm)
    run(device.pin(mm, at(0), at(1), True))
    assert errno_of(mm.mbind(at(0), 4 * P, MPOL_BIND, 0b0010, MPOL_MF_STRICT)) == "EIO"
    assert errno_of(mm.mbind(at(0), 4 * P, MPOL_BIND, 0b0001, MPOL_MF_STRICT)) is None
    assert errno_of(mm.mbind(at(0), 4 * P, MPOL_BIND, 0b0010, MPOL_MF_STRICT | MPOL_MF_MOVE)) == "EIO"
    assert nodes_of(mm) == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "errno"),
    [
        ((at(0) + 1, P, MPOL_BIND, 1, 0), "EINVAL"),
        ((at(0), P, MPOL_BIND, 0, 0), "EINVAL"),
        ((at(0), P, MPOL_BIND, 1 << 9, 0), "EINVAL"),
        ((at(0), P, MPOL_DEFAULT, 1, 0), "EINVAL"),
        ((at(0), P, 99, 1, 0), "EINVAL"),
        ((at(0), P, MPOL_BIND, 1, 8), "EINVAL"),
        ((at(0), P, MPOL_BIND, 1, MPOL_MF_MOVE_ALL), None),
        ((at(0), 9 * P, MPOL_BIND, 1, 0), "EFAULT"),
        ((at(0), P, MPOL_PREFERRED, 0, 0), None),
        ((at(0), P, MPOL_DEFAULT, 0, MPOL_MF_MOVE), None),
        ((at(0), 0, MPOL_BIND, 1, 0), None),
    ],
)
def test_mbind_refuses(mm: Mm, arguments: tuple[int, int, int, int, int], errno: str | None) -> None:
    fill(mm)
    assert errno_of(mm.mbind(*arguments)) == errno


# process_madvise(2)


def test_another_process_may_age_and_reclaim(mm: Mm) -> None:
    fill(mm)
    assert run(mm.process_madvise(COLD, 0, at(0), 4 * P)) == 4 * P
    notes = heard(call(mm, "process_madvise", (PAGEOUT, 0, at(0), P, at(2), P)))
    assert notes == [InvalidatePage(mm, (at(0),), Reason.CLEAR), InvalidatePage(mm, (at(2),), Reason.CLEAR)]
    assert mm.swapped(at(0), at(4)) == [(0, 1), (2, 3)]
    check_bytes(mm)


def test_other_advice_is_not_for_others_and_what_was_done_counts(mm: Mm) -> None:
    fill(mm)
    for advice in (DONTNEED, FREE, HWPOISON, HUGEPAGE, 99):
        assert errno_of(mm.process_madvise(advice, 0, at(0), P)) == "EINVAL"
    assert errno_of(mm.process_madvise(COLD, 1, at(0), P)) == "EINVAL"
    assert errno_of(mm.process_madvise(WILLNEED, 0, at(9), P)) == "ENOMEM"
    assert run(mm.process_madvise(COLD, 0, at(0), P, at(9), P, at(1), P)) == P
    with pytest.raises(MmError, match="arguments"):
        call(mm, "process_madvise", (COLD, 0, at(0)))


# Who has written to a file


def test_writes_are_seen_again_after_a_range_is_protected(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "disk", 4, cached=True)
    run(mm.mmap(at(0), 4 * P, RW, 1 | FIXED, file, 0))
    run(mm.mmap(at(8), 4 * P, RW, 2 | FIXED, file, 0))
    run(mm.store(at(0), b"x"))
    run(mm.store(at(2), b"x"))
    notes: list[Any] = []
    assert run(call(mm, "wp_shared", (file, 0, 2 * P)), notes.append) == 1
    assert notes == [InvalidateRange(mm, at(0), at(2), Reason.PROTECTION_PAGE)], "private mappings are passed over"
    assert not mm.pgtable.get(at(0) >> PAGE_SHIFT) & WRITE
    notes.clear()
    assert run(call(mm, "clean_record", (file, 0, 4 * P)), notes.append) == 2
    assert notes == [InvalidateRange(mm, at(0), at(4), Reason.PROTECTION_PAGE)]
    assert not mm.pgtable.get(at(0) >> PAGE_SHIFT) & DIRTY
    assert run(memory.clean_record(file, 0, 4 * P)) == 0
    run(mm.store(at(0), b"y"))
    assert run(memory.clean_record(file, 0, 4 * P)) == 1
    assert errno_of(memory.wp_shared(file, 1, P)) == "EINVAL"
    assert run(memory.wp_shared(file, 0, 0)) == 0
    run(memory.fsync(file))
    assert memory.read_file(file, 0, 1) == b"y"
    check_idle(memory)


def test_what_was_dirty_is_the_files_to_write(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("f", "shm", 4)
    run(mm.mmap(at(0), 4 * P, RW, 1 | FIXED, file, 0))
    run(mm.store(at(0), b"kept"))
    assert run(memory.clean_record(file, 0, 4 * P)) == 1
    run(memory.wp_shared(file, 0, 4 * P))
    run(mm.process_madvise(PAGEOUT, 0, at(0), P))
    assert run(mm.load(at(0), 4)) == b"kept"
    check_idle(memory)
