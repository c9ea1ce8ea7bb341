"""Huge pages of shared memory: MADV_COLLAPSE and faults make them, faults map them, splitting drops them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mm.driver import ANON_SHARED, FIXED, RW, heard, run, told
from mmubusd.mm import Memory, Mm, MmError
from mmubusd.mm.addr import PAGE_SIZE, FileId
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import COLD, COLLAPSE, DONTNEED, HUGEPAGE, NOHUGEPAGE, PAGEOUT, REMOVE
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.mm.shmem_huge import ShmemHuge

BASE = 0x200000000000
B = 512


def at(page: int) -> int:
    return BASE + page * PAGE_SIZE


@pytest.fixture
def mm() -> Mm:
    mm = Memory(frames_nr=8192, swap_slots_nr=0).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 2 * B * PAGE_SIZE, RW, ANON_SHARED | FIXED))
    return mm


def touch(mm: Mm, page: int, data: bytes = b"x") -> None:
    run(mm.store(at(page), data))


def advise(mm: Mm, first: int, end: int, advice: int) -> list[tuple[int, int]]:
    return told(mm.madvise(at(first), (end - first) * PAGE_SIZE, advice))


def huge(mm: Mm) -> list[tuple[int, int]]:
    return mm.huge(at(0), at(8 * B))


def errno_of(call: Callable[[], Any]) -> str:
    with pytest.raises(MmError) as caught:
        call()
    return caught.value.errno


def test_collapse_tells_of_each_page_and_then_of_the_block(mm: Mm) -> None:
    touch(mm, 3, b"three")
    touch(mm, 5)
    assert advise(mm, 0, B, COLLAPSE) == [(3, 4), (5, 6), (0, B)]
    assert huge(mm) == [(0, B)]
    assert run(mm.load(at(3), 5)) == b"three"
    assert run(mm.load(at(4), 5)) == bytes(5)
    check_idle(mm.memory)


def test_it_needs_no_permission_of_the_machine_but_the_address_spaces(mm: Mm) -> None:
    assert mm.thp is Thp.NEVER
    touch(mm, 0)
    mm.thp_disabled = True
    assert errno_of(lambda: advise(mm, 0, B, COLLAPSE)) == "EINVAL"
    mm.thp_disabled = False
    advise(mm, 0, B, COLLAPSE)
    assert huge(mm) == [(0, B)]


def test_a_block_of_which_nothing_is_in_memory_is_refused(mm: Mm) -> None:
    touch(mm, 0)
    assert errno_of(lambda: advise(mm, 0, 2 * B, COLLAPSE)) == "EINVAL"
    assert huge(mm) == [(0, B)], "the block before it is done"


def test_where_it_is_not_allowed(mm: Mm) -> None:
    touch(mm, 0)
    advise(mm, 0, B, NOHUGEPAGE)
    assert errno_of(lambda: advise(mm, 0, B, COLLAPSE)) == "EINVAL"
    file = mm.memory.create_file("f", "shm", 2 * B)
    run(mm.mmap(at(4 * B), B * PAGE_SIZE, RW, 1 | FIXED, file, PAGE_SIZE))
    touch(mm, 4 * B)
    assert errno_of(lambda: advise(mm, 4 * B, 5 * B, COLLAPSE)) == "EINVAL", "the file's blocks lie otherwise"
    disk = mm.memory.create_file("g", "disk", B, cached=True)
    run(mm.mmap(at(4 * B), B * PAGE_SIZE, RW, 1 | FIXED, disk, 0))
    touch(mm, 4 * B)
    assert errno_of(lambda: advise(mm, 4 * B, 5 * B, COLLAPSE)) == "EINVAL", "it is open for writing"


def test_other_mappings_lose_their_tables_and_fault_the_huge_page(mm: Mm) -> None:
    run(mm.mremap(at(0), 0, B * PAGE_SIZE, 3, at(4 * B)))
    touch(mm, 1)
    touch(mm, 4 * B + 1)
    assert advise(mm, 0, B, COLLAPSE) == [(1, 2), (4 * B + 1, 4 * B + 2), (0, B), (4 * B, 5 * B)]
    assert huge(mm) == [(0, B)]
    assert heard(mm.load(at(4 * B + 9), 1)) == []
    assert huge(mm) == [(0, B), (4 * B, 5 * B)]


def test_a_table_that_is_there_again_is_told_of_when_it_goes(mm: Mm) -> None:
    touch(mm, 0)
    advise(mm, 0, B, COLLAPSE)
    run(mm.mprotect(at(10), PAGE_SIZE, 1))
    run(mm.load(at(100), 1))
    run(mm.mprotect(at(10), PAGE_SIZE, 3))
    assert huge(mm) == []
    assert advise(mm, 0, B, COLLAPSE) == [(0, B)]
    assert huge(mm) == [(0, B)]


def test_a_cut_drops_the_whole_mapping(mm: Mm) -> None:
    touch(mm, 3, b"three")
    advise(mm, 0, B, COLLAPSE)
    notes = heard(mm.mprotect(at(10), PAGE_SIZE, 1))
    assert notes[0] == InvalidateRange(mm, at(0), at(B), Reason.CLEAR)
    assert mm.present(at(0), at(B)) == []
    assert run(mm.load(at(3), 5)) == b"three"
    check_idle(mm.memory)


def test_a_part_that_is_dropped_drops_the_mapping_and_keeps_the_page(mm: Mm) -> None:
    touch(mm, 3, b"three")
    advise(mm, 0, B, COLLAPSE)
    assert advise(mm, 100, 110, DONTNEED) == [(100, 110), (0, B)]
    assert run(mm.load(at(3), 5)) == b"three"
    assert huge(mm) == [(0, B)]


def test_a_hole_splits_the_page(mm: Mm) -> None:
    touch(mm, 3, b"three")
    touch(mm, 100)
    advise(mm, 0, B, COLLAPSE)
    assert advise(mm, 88, 98, REMOVE) == [(88, 98), (0, B), (0, B), (96, 128)]
    assert run(mm.load(at(3), 5)) == b"three"
    assert run(mm.load(at(100), 1)) == b"x"
    assert huge(mm) == []
    check_idle(mm.memory)


def test_cold_and_pageout_of_a_part_split_it_of_all_unmap_it(mm: Mm) -> None:
    touch(mm, 3, b"three")
    advise(mm, 0, B, COLLAPSE)
    assert advise(mm, 0, B, COLD) == []
    assert advise(mm, 0, B, PAGEOUT) == [(0, B)]
    assert run(mm.load(at(3), 5)) == b"three"
    assert huge(mm) == [(0, B)]
    assert advise(mm, 5, 9, COLD) == [(0, B)]
    assert run(mm.load(at(3), 5)) == b"three"
    assert huge(mm) == []


def test_a_child_faults_it_in_itself(mm: Mm) -> None:
    touch(mm, 3, b"three")
    advise(mm, 0, B, COLLAPSE)
    child = run(mm.fork())
    assert huge(child) == []
    assert run(child.load(at(3), 5)) == b"three"
    assert huge(child) == [(0, B)]
    assert advise(mm, 5, 9, COLD) == [], "what another address space maps stays"
    run(child.exit())
    run(mm.exit())
    check_idle(mm.memory)


def test_advice_alone_makes_none(mm: Mm) -> None:
    advise(mm, 0, B, HUGEPAGE)
    touch(mm, 0)
    assert mm.present(at(0), at(B)) == [(0, 1)]


def test_a_held_page_is_in_the_way(mm: Mm) -> None:
    touch(mm, 3)
    mm.memory.pin([mm.pgtable.get(at(3) >> 12) >> 12])
    assert errno_of(lambda: advise(mm, 0, B, COLLAPSE)) == "EAGAIN"
    assert run(mm.load(at(3), 1)) == b"x"


def machine(shmem_enabled: ShmemHuge = ShmemHuge.NEVER, tmpfs_huge: ShmemHuge = ShmemHuge.NEVER) -> Mm:
    memory = Memory(frames_nr=16384, shmem_enabled=shmem_enabled, tmpfs_huge=tmpfs_huge)
    mm = memory.create_mm("test")
    mm.notified = True
    return mm


def map_file(mm: Mm, pages: int, first: int = 0, kind: int = 1) -> FileId:
    """A new file of tmpfs, mapped from the block at page first on."""
    file = mm.memory.create_file("f", "shm", pages)
    run(mm.mmap(at(first), pages * PAGE_SIZE, RW, kind | FIXED, file, 0))
    return file


def test_a_fault_makes_a_huge_page_where_advice_asks_for_it() -> None:
    mm = machine(ShmemHuge.ADVISE)
    run(mm.mmap(at(0), 2 * B * PAGE_SIZE, RW, ANON_SHARED | FIXED))
    touch(mm, 3)
    assert huge(mm) == []
    advise(mm, 0, 2 * B, HUGEPAGE)
    assert heard(mm.load(at(B + 3), 1)) == [], "nothing was there that anyone could hold"
    assert huge(mm) == [(B, 2 * B)]
    touch(mm, 4)
    assert huge(mm) == [(B, 2 * B)], "a block that has small pages gets no huge one"
    check_idle(mm.memory)


def test_a_block_that_reaches_beyond_the_end_is_no_huge_page_within_size() -> None:
    mm = machine(tmpfs_huge=ShmemHuge.WITHIN_SIZE)
    run(mm.memory.ftruncate(map_file(mm, 2 * B), (B + 100) * PAGE_SIZE))
    touch(mm, 9)
    touch(mm, B + 9)
    assert huge(mm) == [(0, B)]
    advise(mm, B, 2 * B, HUGEPAGE)
    run(mm.madvise(at(B), B * PAGE_SIZE, REMOVE))
    run(mm.madvise(at(B), B * PAGE_SIZE, DONTNEED))  # and with it the table
    touch(mm, B + 9)
    assert huge(mm) == [(0, 2 * B)], "advice asks for it"
    check_idle(mm.memory)


@pytest.mark.parametrize(
    ("shmem_enabled", "tmpfs_huge", "expected"),
    [
        (ShmemHuge.NEVER, ShmemHuge.ALWAYS, [(B, 2 * B)]),
        (ShmemHuge.ALWAYS, ShmemHuge.NEVER, [(0, B)]),
        (ShmemHuge.DENY, ShmemHuge.ALWAYS, []),
        (ShmemHuge.FORCE, ShmemHuge.NEVER, [(0, 2 * B)]),
    ],
)
def test_anonymous_memory_and_files_have_settings_of_their_own(
    shmem_enabled: ShmemHuge, tmpfs_huge: ShmemHuge, expected: list[tuple[int, int]]
) -> None:
    mm = machine(shmem_enabled, tmpfs_huge)
    run(mm.mmap(at(0), B * PAGE_SIZE, RW, ANON_SHARED | FIXED))
    map_file(mm, B, B)
    touch(mm, 7)
    touch(mm, B + 7)
    assert huge(mm) == expected
    check_idle(mm.memory)


def test_a_private_copy_is_small_and_the_page_below_it_huge() -> None:
    mm = machine(tmpfs_huge=ShmemHuge.ALWAYS)
    file = map_file(mm, B, kind=2)
    touch(mm, 5, b"mine")
    assert huge(mm) == []
    run(mm.mmap(at(B), B * PAGE_SIZE, RW, 1 | FIXED, file, 0))
    assert run(mm.load(at(B + 5), 4)) == bytes(4)
    assert huge(mm) == [(B, 2 * B)]
    assert told(mm.memory.punch(file, 0, B * PAGE_SIZE)) == [(0, B), (B, 2 * B)]
    assert run(mm.load(at(5), 4)) == b"mine"
    check_idle(mm.memory)


@pytest.mark.parametrize(
    ("setting", "offset", "length", "pages"),
    [
        (ShmemHuge.ALWAYS, 5, 1, B),
        (ShmemHuge.WITHIN_SIZE, 0, 16 * PAGE_SIZE, 16),
        (ShmemHuge.WITHIN_SIZE, 0, 3 * B // 2 * PAGE_SIZE, 3 * B // 2),
        (ShmemHuge.WITHIN_SIZE, PAGE_SIZE, 16 * PAGE_SIZE, 17),
        (ShmemHuge.ADVISE, 0, B * PAGE_SIZE, B),
        (ShmemHuge.ADVISE, 5, 1, 1),
    ],
)
def test_what_a_write_takes(setting: ShmemHuge, offset: int, length: int, pages: int) -> None:
    """Numbers of pages as st_blocks of the recorded kernel tells them."""
    memory = machine(tmpfs_huge=setting).memory
    file = memory.create_file("f", "shm", 0)
    run(memory.write_file(file, offset, b"x" * length))
    assert memory.file(file).cache.nr == pages
    assert memory.read_file(file, offset, length) == b"x" * length
    check_idle(memory)


def test_a_folio_that_was_written_to_in_one_place_is_dirty_when_it_is_split() -> None:
    mm = machine(tmpfs_huge=ShmemHuge.ALWAYS)
    file = mm.memory.file(map_file(mm, B))
    touch(mm, 300, b"kept")
    run(mm.memory.punch(file.id, 0, PAGE_SIZE))
    run(mm.madvise(at(0), B * PAGE_SIZE, PAGEOUT))
    assert run(mm.load(at(300), 4)) == b"kept"
    assert run(mm.load(at(0), 4)) == bytes(4)
    check_idle(mm.memory)


def test_a_block_with_private_pages_is_refused_in_silence() -> None:
    mm = machine(tmpfs_huge=ShmemHuge.ALWAYS)
    map_file(mm, B, kind=2)
    touch(mm, 5)
    notes: list[Any] = []
    with pytest.raises(MmError) as caught:
        run(mm.madvise(at(0), B * PAGE_SIZE, COLLAPSE), notes.append)
    assert caught.value.errno == "EINVAL"
    assert notes == []
    check_idle(mm.memory)
