"""Huge pages of which something is unmapped: the rest of the folio keeps it, until memory is short."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, at, run, told
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE, Pfn
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import DONTNEED, PAGEOUT
from mmubusd.mm.notification import Answer, Notification, RmapInvalidatePage
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.mm.vmscan import make_room, shrink

P = PAGE_SIZE
B = 512


@pytest.fixture
def mm() -> Mm:
    """Two blocks of huge pages without a zero in them, in a machine of six and a swap file."""
    mm = Memory(frames_nr=6 * B, swap_slots_nr=4 * B, thp=Thp.ALWAYS).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 2 * B * P, RW, ANON_PRIVATE | FIXED))
    for page in range(2 * B):
        run(mm.store(at(page), b"%d" % page))
    return mm


def frame(mm: Mm, page: int) -> int:
    return mm.pgtable.get(at(page) >> 12) >> PFN_SHIFT


def test_what_is_unmapped_stays_with_its_folio_and_goes_with_the_last_page(mm: Mm) -> None:
    frames = mm.memory.frames
    free, head = frames.free_nr, frame(mm, 0)
    run(mm.munmap(at(100), 200 * P))
    assert frames.free_nr == free
    assert list(frames.partial.queue) == [head]
    check_memory(mm.memory)
    run(mm.munmap(at(0), 100 * P))
    run(mm.madvise(at(300), 212 * P, DONTNEED))
    assert frames.free_nr == free + B
    assert not frames.partial.queue
    check_idle(mm.memory)


def test_a_whole_huge_page_is_free_at_once(mm: Mm) -> None:
    free = mm.memory.frames.free_nr
    run(mm.munmap(at(0), B * P))
    assert mm.memory.frames.free_nr == free + B
    assert not mm.memory.frames.partial.queue


def test_pressure_splits_before_anything_goes_to_swap(mm: Mm) -> None:
    memory = mm.memory
    run(mm.munmap(at(0), 100 * P))
    free = memory.frames.free_nr
    assert told(make_room(memory, free + 100)) == [(100, B)], "where the rest of the folio can be"
    assert memory.frames.free_nr == free + 100
    assert not memory.swap.used_nr
    assert run(mm.load(at(100), 3)) == b"100"
    check_idle(memory)


def test_no_more_is_split_than_is_wanted(mm: Mm) -> None:
    run(mm.munmap(at(0), 100 * P))
    run(mm.munmap(at(B), 100 * P))
    second = frame(mm, B + 100) & -B
    assert run(shrink(mm.memory, 50)) == 100
    assert list(mm.memory.frames.partial.queue) == [second], "in the order in which they lost a page"


def test_a_folio_that_somebody_holds_is_not_split_and_stays_in_the_queue(mm: Mm) -> None:
    frames, pinned = mm.memory.frames, frame(mm, 200)
    frames.pin([pinned])
    run(mm.munmap(at(0), 100 * P))
    head = pinned & -B
    run(mm.madvise(at(B), B * P, DONTNEED))
    free = frames.free_nr
    run(shrink(mm.memory, 50))
    assert frames.free_nr == free
    assert list(frames.partial.queue) == [head]
    frames.unpin([pinned])
    run(shrink(mm.memory, 50))
    assert frames.free_nr == free + 100
    check_idle(mm.memory)


def test_the_last_who_holds_anything_of_a_folio_frees_all_of_it(mm: Mm) -> None:
    frames, pinned = mm.memory.frames, frame(mm, 200)
    free = frames.free_nr
    frames.pin([pinned])
    run(mm.munmap(at(0), B * P))
    assert frames.free_nr == free
    check_memory(mm.memory)
    frames.unpin([pinned])
    assert frames.free_nr == free + B
    check_idle(mm.memory)


def test_a_frame_that_is_withheld_while_its_folio_goes(mm: Mm) -> None:
    frames, held = mm.memory.frames, frame(mm, 0)
    free = frames.free_nr
    run(mm.munmap(at(0), 10 * P))
    frames.withhold([held])
    run(mm.munmap(at(10), 502 * P))
    assert frames.free_nr == free
    frames.let_go([held])
    assert frames.free_nr == free + B
    check_idle(mm.memory)


def test_exporters_let_go_of_what_is_unmapped_and_the_frame_stays(mm: Mm) -> None:
    frames, exported = mm.memory.frames, Pfn(frame(mm, 5))
    mm.memory.export(exported, 9)
    asked: list[Notification] = []

    def hear(note: Notification) -> Answer | None:
        asked.append(note)
        return None

    run(mm.munmap(at(5), P), hear)
    assert RmapInvalidatePage((exported,), must_evict=True) in asked
    assert frames.refcount_at[exported] == 1
    check_idle(mm.memory)


def test_copies_leave_pages_behind_that_pressure_frees(mm: Mm) -> None:
    memory = mm.memory
    child = run(mm.fork())
    for page in range(30):
        run(mm.store(at(page), b"new"))
    run(child.exit())
    assert len(memory.frames.partial.queue) == 1
    free = memory.frames.free_nr
    assert run(shrink(memory, 30)) == 30
    assert memory.frames.free_nr == free + 30
    assert run(mm.load(at(31), 2)) == b"31"
    check_idle(memory)


def test_reclaim_of_the_rest_frees_what_is_unmapped_too(mm: Mm) -> None:
    free = mm.memory.frames.free_nr
    run(mm.munmap(at(0), 12 * P))
    run(mm.madvise(at(12), 500 * P, PAGEOUT))
    assert mm.memory.frames.free_nr >= free + 12
    assert run(mm.load(at(500), 3)) == b"500"
    check_idle(mm.memory)
