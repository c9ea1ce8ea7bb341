"""Pages of hugetlb that move: as a whole, and without a page or a reservation lost to the pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mm.driver import FIXED, RW, Mirror, at, errno_of, heard, run
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Pfn
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.madvise import SOFT_OFFLINE
from mmubusd.mm.mbind import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT
from mmubusd.mm.mempolicy import MPOL_BIND, MPOL_DEFAULT
from mmubusd.mm.mmap import MAP_HUGETLB
from mmubusd.mm.notification import ANSWERED, Answer, InvalidateRange, LockWait, Reason, RmapInvalidatePage
from mmubusd.mm.pgtable import PFN_SHIFT, WRITE

P, B = PAGE_SIZE, PMD_SIZE
PRIVATE, SHARED = 0x22 | MAP_HUGETLB | FIXED, 0x21 | MAP_HUGETLB | FIXED
BLOCK = at(0)


@pytest.fixture
def mm() -> Mm:
    mm = Memory(frames_nr=16384, nodes_nr=2, hugetlb_nr=8).create_mm("test")
    mm.notified = True
    return mm


def fill(mm: Mm, pages: int = 1, flags: int = PRIVATE) -> None:
    run(mm.mmap(BLOCK, pages * B, RW, flags))
    for page in range(pages):
        run(mm.store(BLOCK + page * B + 3 * P, b"page %d" % page))


def first_of(mm: Mm, page: int = 0) -> int:
    return mm.pgtable.get((BLOCK + page * B) >> PAGE_SHIFT) >> PFN_SHIFT


def node_of(mm: Mm, page: int = 0) -> int:
    return mm.memory.frames.node_of(first_of(mm, page))


def pool(mm: Mm) -> tuple[int, int, int]:
    hugetlb = mm.memory.frames.hugetlb
    return hugetlb.nr, hugetlb.free_nr, hugetlb.reserved_nr


def check_bytes(mm: Mm, pages: int = 1) -> None:
    for page in range(pages):
        assert run(mm.load(BLOCK + page * B + 3 * P, 6)) == b"page %d" % page
        assert mm.huge(BLOCK + page * B, BLOCK + (page + 1) * B) == [(0, 512)]
    check_idle(mm.memory)


def under_way(mm: Mm, node: int = 1) -> Iterator[Any]:
    """A move that waits for its answers."""
    moving = mm.move_pages(BLOCK, B, node)
    assert next(moving) == InvalidateRange(mm, BLOCK, BLOCK + B, Reason.CLEAR)
    return moving


def finish(moving: Any) -> int:
    with pytest.raises(StopIteration) as ended:
        moving.send(ANSWERED)
    return int(ended.value.value)


# Which page it moves to


def test_each_node_has_its_share_of_the_pool_and_a_page_moves_within_it(mm: Mm) -> None:
    hugetlb = mm.memory.frames.hugetlb
    assert (hugetlb.free_on((0,)), hugetlb.free_on((1,))) == (4, 4)
    fill(mm, 2)
    assert [node_of(mm, page) for page in range(2)] == [0, 0], "where the program runs"
    old, mirror = first_of(mm), Mirror(mm.memory)
    mirror.take(mm, BLOCK, run(device.fault(mm, BLOCK, BLOCK + B, True)))
    notes = []

    def hear(note: Any) -> None:
        notes.append(note)
        mirror.hear(note)

    assert run(mm.move_pages(BLOCK, 2 * B, 1), hear) == 0
    assert notes == [InvalidateRange(mm, BLOCK + page * B, BLOCK + (page + 1) * B, Reason.CLEAR) for page in range(2)]
    assert [node_of(mm, page) for page in range(2)] == [1, 1]
    assert (hugetlb.free_on((0,)), hugetlb.free_on((1,))) == (4, 2)
    assert mm.memory.frames.generation_at[old] > 0
    mirror.check_alive()
    assert pool(mm) == (8, 6, 0)
    check_bytes(mm, 2)
    run(mm.munmap(BLOCK, 2 * B))
    assert pool(mm) == (8, 8, 0)


def test_what_is_reserved_is_not_moved_to_but_frames_of_the_machine_are(mm: Mm) -> None:
    run(mm.mmap(BLOCK + 8 * B, 7 * B, RW, PRIVATE))
    fill(mm)
    frames = mm.memory.frames
    free_nr, old = frames.free_nr, first_of(mm)
    assert pool(mm) == (8, 7, 7)
    assert run(mm.move_pages(BLOCK, B, 1)) == 0
    assert node_of(mm) == 1
    assert pool(mm) == (8, 7, 7), "the page that was left has gone, for the one that has come"
    assert frames.free_nr == free_nr
    assert not frames.hugetlb.has_free(old)
    check_bytes(mm)
    assert run(mm.move_pages(BLOCK, B, 0)) == 0, "to another node it moves again"
    run(mm.mbind(BLOCK, B, MPOL_DEFAULT, 0, MPOL_MF_MOVE))
    assert pool(mm) == (8, 7, 7)
    assert heard(mm.mbind(BLOCK, B, MPOL_DEFAULT, 0, MPOL_MF_MOVE)) == [], "on its own node only once"
    assert errno_of(mm.mbind(BLOCK, B, MPOL_BIND, 0b10, MPOL_MF_MOVE | MPOL_MF_STRICT)) == "EIO"
    run(mm.munmap(BLOCK, B))
    fill(mm)
    assert run(mm.move_pages(BLOCK, B, 1)) == 0
    check_bytes(mm)


def test_a_page_that_finds_no_room_stays_and_nobody_is_told(mm: Mm) -> None:
    small = Memory(frames_nr=4 * 512, nodes_nr=2, hugetlb_nr=3).create_mm("small")
    small.notified = True
    fill(small, 3)
    assert heard(small.move_pages(BLOCK, B, 1 - node_of(small))) == []
    assert pool(small) == (3, 0, 0)
    check_bytes(small, 3)


# Who has it


def test_a_shared_page_moves_in_every_mapping_and_in_its_file(mm: Mm) -> None:
    memory = mm.memory
    other = memory.create_mm("other")
    other.notified = True
    file = memory.create_file("huge", "hugetlb", 1024)
    for each in (mm, other):
        run(each.mmap(BLOCK, 2 * B, RW, 1 | FIXED, file))
    run(mm.store(BLOCK + 3 * P, b"page 0"))
    run(other.load(BLOCK, 1))
    assert run(mm.move_pages(BLOCK, B, 1)) == 512, "it is not this program's alone"
    notes = heard(mm.mbind(BLOCK, B, MPOL_BIND, 0b10, MPOL_MF_MOVE_ALL))
    assert notes == [InvalidateRange(each, BLOCK, BLOCK + B, Reason.CLEAR) for each in (other, mm)]
    assert node_of(mm) == node_of(other) == memory.frames.node_of(memory.file(file).cache.get(7)) == 1
    assert pool(mm) == (8, 7, 1)
    run(other.store(BLOCK + 3 * P, b"page 0"))
    check_bytes(mm)
    run(memory.ftruncate(file, 0))
    assert pool(mm) == (8, 8, 0)


def test_a_pinned_page_stays_and_nobody_is_told(mm: Mm) -> None:
    fill(mm)
    run(device.pin(mm, BLOCK + 9 * P, BLOCK + 10 * P, True))
    assert heard(mm.move_pages(BLOCK, B, 1)) == []
    assert node_of(mm) == 0
    assert errno_of(mm.mbind(BLOCK, B, MPOL_BIND, 0b10, MPOL_MF_MOVE | MPOL_MF_STRICT)) == "EIO"
    assert errno_of(mm.madvise(BLOCK, P, SOFT_OFFLINE)) == "EBUSY"
    assert pool(mm) == (8, 7, 0)
    check_memory(mm.memory)


def test_a_page_that_is_exported_moves_only_if_the_exporter_lets_go(mm: Mm) -> None:
    fill(mm)
    exported = first_of(mm) + 5
    mm.memory.export(Pfn(exported), 1)

    def refusing(note: Any) -> Answer | None:
        return Answer(refused_pfns=frozenset({Pfn(exported)})) if isinstance(note, RmapInvalidatePage) else None

    assert run(mm.move_pages(BLOCK, B, 1), refusing) == 512
    assert node_of(mm) == 0
    assert run(mm.load(BLOCK + 3 * P, 6)) == b"page 0"
    assert run(mm.move_pages(BLOCK, B, 1)) == 0
    assert node_of(mm) == 1
    check_bytes(mm)


# What else happens meanwhile


def test_who_comes_to_it_waits(mm: Mm) -> None:
    fill(mm)
    moving = under_way(mm)
    load = mm.load(BLOCK + 3 * P, 6)
    wait = next(load)
    assert isinstance(wait, LockWait)
    assert heard(mm.move_pages(BLOCK, B, 0)) == [], "another move leaves it alone"
    assert finish(moving) == 0
    assert wait.ticket.granted
    with pytest.raises(StopIteration) as ended:
        load.send(ANSWERED)
    assert ended.value.value == b"page 0"
    check_bytes(mm)


def test_fork_shares_a_page_that_is_on_its_way(mm: Mm) -> None:
    fill(mm)
    moving = under_way(mm)
    child = run(mm.fork())
    assert finish(moving) == 0
    assert node_of(mm) == node_of(child) == 1
    assert not mm.pgtable.get(BLOCK >> PAGE_SHIFT) & WRITE
    run(mm.store(BLOCK + 3 * P, b"parent"))
    assert run(child.load(BLOCK + 3 * P, 6)) == b"page 0"
    assert run(mm.load(BLOCK + 3 * P, 6)) == b"parent"
    run(child.exit())
    run(mm.munmap(BLOCK, B))
    assert pool(mm) == (8, 8, 0)
    check_idle(mm.memory)


def test_a_mapping_may_go_change_or_move_meanwhile(mm: Mm) -> None:
    fill(mm)
    moving = under_way(mm)
    run(mm.mprotect(BLOCK, B, 1))
    run(mm.mremap(BLOCK, B, B, 3, BLOCK + 4 * B))
    finish(moving)
    assert run(mm.load(BLOCK + 4 * B + 3 * P, 6)) == b"page 0"
    assert errno_of(mm.store(BLOCK + 4 * B, b"x")) == "EFAULT"
    run(mm.mprotect(BLOCK + 4 * B, B, RW))
    run(mm.mremap(BLOCK + 4 * B, B, B, 3, BLOCK))
    run(mm.store(BLOCK, b"x"))
    check_bytes(mm)
    moving = under_way(mm, 0)
    run(mm.munmap(BLOCK, B))
    assert finish(moving) == 0
    assert pool(mm) == (8, 8, 0)
    check_idle(mm.memory)


def test_a_hole_made_while_a_files_page_moves(mm: Mm) -> None:
    memory = mm.memory
    file = memory.create_file("huge", "hugetlb", 512)
    run(mm.mmap(BLOCK, B, RW, 1 | FIXED, file))
    run(mm.store(BLOCK, b"gone"))
    moving = under_way(mm)
    run(memory.punch(file, 0, B))
    finish(moving)
    assert run(mm.load(BLOCK, 4)) == bytes(4)
    run(mm.munmap(BLOCK, B))
    run(memory.ftruncate(file, 0))
    assert pool(mm) == (8, 8, 0)
    check_idle(memory)


# Frames that are to be used no more


def test_soft_offline_moves_the_page_and_dissolves_what_is_left(mm: Mm) -> None:
    fill(mm)
    frames = mm.memory.frames
    bad, free_nr = first_of(mm), frames.free_nr
    assert heard(mm.madvise(BLOCK + 2 * P, P, SOFT_OFFLINE)) == [InvalidateRange(mm, BLOCK, BLOCK + B, Reason.CLEAR)]
    assert first_of(mm) != bad
    assert pool(mm) == (7, 6, 0)
    assert frames.free_nr == free_nr + 511, "but for the one frame they are anybody's"
    assert frames.hwpoison_nr == 1
    check_bytes(mm)
    assert run(mm.memory.offline_page(bad + 2, 1)) == 0, "it is out already"


def test_soft_offline_without_a_page_to_spare_takes_frames_of_the_machine(mm: Mm) -> None:
    run(mm.mmap(BLOCK + 8 * B, 7 * B, RW, PRIVATE))
    fill(mm)
    free_nr = mm.memory.frames.free_nr
    assert run(mm.madvise(BLOCK, P, SOFT_OFFLINE)) == 0
    assert pool(mm) == (8, 7, 7)
    assert mm.memory.frames.free_nr == free_nr - 1
    check_bytes(mm)


def test_nothing_of_it_goes_to_a_device(mm: Mm) -> None:
    fill(mm)
    assert errno_of(mm.migrate_to_device(BLOCK, BLOCK + B, 7)) == "EINVAL"
    check_bytes(mm)


def test_a_frame_that_fails_while_its_page_leaves_it_is_the_only_one_lost(mm: Mm) -> None:
    fill(mm)
    bad = first_of(mm) + 9
    moving = under_way(mm)
    failing = mm.memory.offline_page(bad, 0)
    assert isinstance(next(failing), LockWait)
    finish(moving)
    with pytest.raises(StopIteration):
        failing.send(ANSWERED)
    assert mm.memory.frames.hwpoison_nr == 1
    assert pool(mm) == (7, 6, 0)
    check_bytes(mm)
