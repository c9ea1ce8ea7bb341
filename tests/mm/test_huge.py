"""Huge pages of private memory: when they come, what splits them, and what is told of it, in which order.

Blocks are 512 pages; rules and numbers as in docs/kernel/thp.md.
"""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, BASE, FIXED, RW, Mirror, at, errno_of, heard, run, told
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SIZE, Pfn
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import (
    COLD,
    COLLAPSE,
    DONTNEED,
    FREE,
    HUGEPAGE,
    NOHUGEPAGE,
    PAGEOUT,
    POPULATE_READ,
    POPULATE_WRITE,
)
from mmubusd.mm.notification import Notification, Operation, RmapInvalidatePage

P = PAGE_SIZE
B = 512


def machine(frames_nr: int = 1 << 13, thp: Thp = Thp.MADVISE) -> Mm:
    mm = Memory(frames_nr=frames_nr, thp=thp).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    """Four blocks that want huge pages."""
    mm = machine()
    run(mm.mmap(at(0), 4 * B * P, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(at(0), 4 * B * P, HUGEPAGE))
    return mm


def advise(mm: Mm, first: int, last: int, advice: int) -> list[tuple[int, int]]:
    return told(mm.madvise(at(first), (last - first) * P, advice))


def touch(mm: Mm, page: int, access: str = "write", count: int = 1) -> list[tuple[int, int]]:
    return told(mm.touch(at(page), count * P, access))


def huge(mm: Mm) -> list[tuple[int, int]]:
    return mm.huge(at(0), at(16 * B))


def present(mm: Mm) -> list[tuple[int, int]]:
    return mm.present(at(0), at(16 * B))


def load(mm: Mm, page: int) -> bytes:
    return run(mm.load(at(page), 4))


def store(mm: Mm, *pages: int) -> None:
    for page in pages:
        run(mm.store(at(page), b"%4d" % page))


# Faults


def test_a_write_into_a_block_without_anything_maps_all_of_it(mm: Mm) -> None:
    assert touch(mm, 700) == []
    assert huge(mm) == present(mm) == [(B, 2 * B)]
    check_idle(mm.memory)


def test_a_read_maps_the_huge_zero_page_and_the_first_write_is_told_of_the_block(mm: Mm) -> None:
    free = mm.memory.frames.free_nr
    assert touch(mm, 3, "read") == []
    assert huge(mm) == [(0, B)]
    assert mm.memory.frames.free_nr == free
    assert touch(mm, 5) == [(0, B)]
    assert touch(mm, 6) == []
    assert mm.memory.frames.free_nr == free - B
    check_idle(mm.memory)


@pytest.mark.parametrize("thp", list(Thp))
def test_who_gets_huge_pages(thp: Thp) -> None:
    mm = machine(thp=thp)
    run(mm.mmap(at(0), 3 * B * P, RW, ANON_PRIVATE | FIXED))
    advise(mm, 0, B, HUGEPAGE)
    advise(mm, B, 2 * B, NOHUGEPAGE)
    for block in range(3):
        touch(mm, block * B)
    wanted = {Thp.NEVER: [], Thp.MADVISE: [(0, B)], Thp.ALWAYS: [(0, B), (2 * B, 3 * B)]}
    assert huge(mm) == wanted[thp]
    check_idle(mm.memory)


def test_an_address_space_without_huge_pages_whatever_the_machine_allows(mm: Mm) -> None:
    mm.thp, mm.thp_disabled = Thp.NEVER, True
    touch(mm, 0)
    assert present(mm) == [(0, 1)]
    assert errno_of(mm.madvise(at(0), B * P, COLLAPSE)) == "EINVAL"
    child = run(mm.fork())
    touch(child, B)
    assert huge(child) == []


def test_a_block_with_a_page_table_gets_small_pages(mm: Mm) -> None:
    touch(mm, 0)
    advise(mm, 0, 100, DONTNEED)
    advise(mm, 100, B, DONTNEED)
    assert present(mm) == []
    touch(mm, 0)
    assert present(mm) == [(0, 1)]
    advise(mm, 0, B, DONTNEED)  # the whole block: its table goes too
    touch(mm, 0)
    assert huge(mm) == [(0, B)]


def test_a_block_that_two_mappings_share_gets_small_pages(mm: Mm) -> None:
    run(mm.mprotect(at(100), P, 1))
    touch(mm, 0)
    assert present(mm) == [(0, 1)]


def test_without_512_frames_in_a_row_small_pages_do() -> None:
    mm = machine(frames_nr=2 * B)  # frame 0 is taken: one block of frames is whole
    run(mm.mmap(at(0), 4 * B * P, RW, ANON_PRIVATE | FIXED))
    advise(mm, 0, 4 * B, HUGEPAGE)
    touch(mm, 0)
    touch(mm, B)
    assert present(mm) == [(0, B + 1)]
    assert huge(mm) == [(0, B)]
    touch(mm, 2 * B, "read")
    assert told(mm.touch(at(2 * B), P, "write")) == [(2 * B, 3 * B), (2 * B, 3 * B), (2 * B, 2 * B + 1)]
    assert huge(mm) == [(0, B)]
    check_idle(mm.memory)


def test_frames_in_a_row_are_found_again_among_single_ones() -> None:
    mm = machine(frames_nr=4 * B)
    run(mm.mmap(at(0), 4 * B * P, RW, ANON_PRIVATE | FIXED))
    touch(mm, 0, count=4 * B - 1)  # every frame, one by one
    run(mm.munmap(at(0), 3 * B * P))
    run(mm.mmap(at(0), 2 * B * P, RW, ANON_PRIVATE | FIXED))
    advise(mm, 0, 2 * B, HUGEPAGE)
    touch(mm, 0)
    touch(mm, B)
    assert huge(mm) == [(0, 2 * B)]
    run(mm.munmap(at(0), 4 * B * P))
    run(mm.mmap(at(0), 4 * B * P, RW, ANON_PRIVATE | FIXED))
    touch(mm, 0, count=4 * B - 1)  # and blocks are broken up for single pages
    check_idle(mm.memory)


@pytest.mark.parametrize("advice", [POPULATE_READ, POPULATE_WRITE])
def test_populating_a_part_populates_the_block(mm: Mm, advice: int) -> None:
    assert advise(mm, 100, 700, advice) == []
    assert huge(mm) == [(0, 2 * B)]
    assert advise(mm, 100, 700, POPULATE_WRITE) == ([] if advice == POPULATE_WRITE else [(0, B), (B, 2 * B)])
    check_idle(mm.memory)


# What splits a PMD


@pytest.mark.parametrize("kind", ["zero", "folio", "nothing"])
def test_a_boundary_in_a_block_is_told_of_before_the_call(mm: Mm, kind: str) -> None:
    touch(mm, 3 * B)  # there are page tables
    if kind != "nothing":
        touch(mm, 0, "read" if kind == "zero" else "write")
    assert told(mm.munmap(at(100), 10 * P)) == [(0, B), (100, 110)]
    assert huge(mm) == [(3 * B, 4 * B)]
    assert present(mm) == ([] if kind == "nothing" else [(0, 100), (110, B)]) + [(3 * B, 4 * B)]
    check_idle(mm.memory)


def test_dropping_a_part_is_told_of_first_and_the_blocks_after_it(mm: Mm) -> None:
    touch(mm, 0)
    touch(mm, B)
    assert advise(mm, 100, 900, DONTNEED) == [(100, 900), (0, B), (B, 2 * B)]
    assert present(mm) == [(0, 100), (900, 2 * B)]
    check_idle(mm.memory)


def test_protecting_a_whole_block_keeps_it_huge(mm: Mm) -> None:
    store(mm, 5)
    assert told(mm.mprotect(at(0), B * P, 1)) == [(0, B)]
    assert told(mm.mprotect(at(0), B * P, RW)) == [(0, B)]
    assert touch(mm, 5) == []
    assert huge(mm) == [(0, B)]
    assert load(mm, 5) == b"   5"
    check_idle(mm.memory)


def test_moving_a_block_moves_its_pmd_and_moving_a_part_splits_it(mm: Mm) -> None:
    store(mm, 5)
    assert told(mm.mremap(at(0), B * P, B * P, 3, at(8 * B))) == [(0, B), (0, B)]
    assert huge(mm) == [(8 * B, 9 * B)]
    inside = told(mm.mremap(at(8 * B), 100 * P, 100 * P, 3, at(6 * B)))
    assert inside[:2] == [(8 * B, 8 * B + 100), (8 * B, 9 * B)]
    assert huge(mm) == []
    assert present(mm) == [(6 * B, 6 * B + 100), (8 * B + 100, 9 * B)]
    assert load(mm, 6 * B + 5) == b"   5"
    check_idle(mm.memory)


# fork and writing


def test_a_shared_huge_page_is_split_by_the_first_write_and_copied_page_by_page(mm: Mm) -> None:
    store(mm, 5, 6)
    child = run(mm.fork())
    child.notified = True
    assert huge(mm) == huge(child) == [(0, B)]
    assert touch(mm, 5) == [(0, B), (5, 6)]
    assert touch(mm, 6) == [(6, 7)]
    store(mm, 6)
    run(mm.store(at(6), b"mine"))
    assert (load(mm, 5), load(child, 5), load(child, 6)) == (b"   5", b"   5", b"   6")
    assert (huge(mm), huge(child)) == ([], [(0, B)])
    check_idle(mm.memory)
    run(child.exit())
    assert touch(mm, 7) == []  # the rest is its own again
    check_idle(mm.memory)


def test_a_huge_page_that_the_child_has_left_is_reused(mm: Mm) -> None:
    touch(mm, 0)
    run(run(mm.fork()).exit())
    assert touch(mm, 0) == []
    assert huge(mm) == [(0, B)]
    check_idle(mm.memory)


def test_the_last_mapped_page_of_a_large_folio_is_copied(mm: Mm) -> None:
    touch(mm, 0)
    child = run(mm.fork())
    advise(mm, 1, B, DONTNEED)
    run(child.exit())
    assert touch(mm, 0) == [(0, 1)]
    check_idle(mm.memory)


def test_the_child_takes_over_what_the_parent_has_left(mm: Mm) -> None:
    store(mm, 5)
    child = run(mm.fork())
    child.notified = True
    run(mm.exit())
    assert touch(child, 5) == []
    assert load(child, 5) == b"   5"
    assert touch(child, 6, "read") == []
    assert told(child.madvise(at(0), P, COLD)) == [(0, B)]  # found from the child's own anon_vma
    check_idle(child.memory)


# The folio itself


@pytest.mark.parametrize("advice", [COLD, FREE, PAGEOUT])
def test_advice_on_a_part_makes_small_pages_and_zero_pages(mm: Mm, advice: int) -> None:
    store(mm, 1, 300)
    own = [(0, 10)] if advice == FREE else []
    assert advise(mm, 0, 10, advice)[: len(own) + 1] == [*own, (0, B)]
    assert present(mm) == [(0, B)]
    assert huge(mm) == []
    assert mm.memory.frames.free_nr == mm.memory.frames.frames_nr - 1 - 2  # the others are the zero page
    assert touch(mm, 300) == []
    assert touch(mm, 301) == [(301, 302)]
    assert (load(mm, 1), load(mm, 300), load(mm, 301)) == (b"   1", b" 300", bytes(4))
    check_idle(mm.memory)


def test_a_page_that_was_zeroed_again_counts_as_zero(mm: Mm) -> None:
    store(mm, 1)
    run(mm.store(at(1), bytes(4)))
    advise(mm, 0, 10, COLD)
    assert touch(mm, 1) == [(1, 2)]


def test_a_split_tells_every_mapping_up_to_the_last_page(mm: Mm) -> None:
    store(mm, *range(B))
    run(mm.mprotect(at(100), 10 * P, 1))
    assert advise(mm, 0, 5, COLD) == [(0, 100), (100, 110), (110, B)]
    advise(mm, B, 2 * B, HUGEPAGE)
    touch(mm, B)
    run(mm.mprotect(at(B + 100), 10 * P, 1))
    advise(mm, B + 110, 2 * B, DONTNEED)
    assert advise(mm, B, B + 5, COLD) == [(B, B + 100), (B + 100, B + 110)]
    check_idle(mm.memory)


def test_what_a_child_has_too_is_not_split(mm: Mm) -> None:
    store(mm, 1)
    child = run(mm.fork())
    for advice in (COLD, FREE, PAGEOUT):
        assert advise(mm, 0, 10, advice) == ([(0, 10)] if advice == FREE else [])
    assert huge(mm) == [(0, B)]
    run(child.exit())


def test_what_someone_holds_is_not_split(mm: Mm) -> None:
    store(mm, 1)
    pfns = run(device.pin(mm, at(7), at(8), True))
    for advice in (COLD, PAGEOUT):
        assert advise(mm, 0, 10, advice) == []
    assert huge(mm) == [(0, B)]
    device.unpin(mm, pfns)
    assert advise(mm, 0, 10, COLD) == [(0, B)]
    check_idle(mm.memory)


def test_an_exporter_lets_go_of_pages_that_become_the_zero_page(mm: Mm) -> None:
    store(mm, 1)
    first = mm.pgtable.get(at(0) >> 12) >> 12
    for page in (1, 7, 8):
        mm.memory.export(Pfn(first + page), 1)

    def hear(note: Notification) -> None:
        if isinstance(note, RmapInvalidatePage):
            assert (note.pfns, note.must_evict) == ((first + 7, first + 8), True)
            mm.memory.frames.write(first + 8, 0, b"late")  # what it wrote before it let go is not lost
            mm.memory.set_dirty([first + 8])

    run(mm.madvise(at(0), 10 * P, COLD), hear)
    assert [load(mm, page) for page in (1, 7, 8)] == [b"   1", bytes(4), b"late"]
    assert mm.memory.exporters(Pfn(first + 1)) == {1}
    assert (touch(mm, 8), touch(mm, 7)) == ([], [(7, 8)])
    mm.memory.unexport(Pfn(first + 1), 1)
    check_idle(mm.memory)


def test_a_pinned_page_stays_the_parents_and_the_child_gets_copies(mm: Mm) -> None:
    store(mm, 5, 6)
    pfns = run(device.pin(mm, at(5), at(6), True))
    notes = heard(mm.fork())
    assert [(note.start, note.end) for note in notes] == [(at(0), at(4 * B)), (at(0), at(B))]
    child = next(each for each in mm.memory.mms.values() if each is not mm)
    mm.memory.frames.write(int(pfns[0]), 0, b"pin!")
    assert (load(mm, 5), load(child, 5), load(child, 6)) == (b"pin!", b"   5", b"   6")
    assert touch(mm, 6) == []  # all that was its own stays so
    device.unpin(mm, pfns)
    check_idle(mm.memory)


# MADV_FREE and PAGEOUT of whole folios


def test_a_clean_lazily_freed_huge_page_goes_and_leaves_its_table(mm: Mm) -> None:
    touch(mm, 0)
    assert advise(mm, 0, B, FREE) == [(0, B)]
    assert huge(mm) == [(0, B)]
    assert advise(mm, 0, B, PAGEOUT) == [(0, B)]
    assert present(mm) == []
    touch(mm, 0)
    assert present(mm) == [(0, 1)]
    check_idle(mm.memory)


def test_one_that_was_written_to_stays_and_is_not_huge(mm: Mm) -> None:
    touch(mm, 0)
    advise(mm, 0, B, FREE)
    touch(mm, 3)
    assert advise(mm, 0, B, PAGEOUT) == [(0, B)]
    assert (present(mm), huge(mm)) == ([(0, B)], [])
    check_idle(mm.memory)


def test_one_that_a_device_writes_to_while_it_lets_go_stays(mm: Mm) -> None:
    touch(mm, 0)
    advise(mm, 0, B, FREE)
    pfn = mm.pgtable.get(at(9) >> 12) >> 12

    def late(_: object) -> None:
        mm.memory.frames.write(pfn, 0, b"late")
        mm.memory.set_dirty([pfn])

    run(mm.madvise(at(0), B * P, PAGEOUT), late)
    assert load(mm, 9) == b"late"
    check_idle(mm.memory)


def test_what_is_dropped_before_the_written_part_stays_dropped(mm: Mm) -> None:
    touch(mm, 0)
    run(run(mm.fork()).exit())
    run(mm.mprotect(at(100), 10 * P, 1))
    run(mm.mprotect(at(100), 10 * P, RW))
    assert advise(mm, 0, B, FREE) == [(0, B)]
    assert touch(mm, 300) == []
    assert advise(mm, 0, B, PAGEOUT) == [(0, B)]
    assert present(mm) == [(300, B)]
    check_idle(mm.memory)


def test_pageout_of_a_whole_huge_page_without_swap_splits_it(mm: Mm) -> None:
    store(mm, 1)
    assert advise(mm, 0, B, PAGEOUT) == [(0, B)]
    assert (present(mm), huge(mm)) == ([(0, B)], [])
    check_idle(mm.memory)


def test_pageout_with_swap_tells_of_page_0_and_then_from_the_last_down() -> None:
    mm = Memory(frames_nr=1 << 12, swap_slots_nr=1 << 10, thp=Thp.ALWAYS).create_mm()
    mm.notified = True
    run(mm.mmap(at(0), B * P, RW, ANON_PRIVATE | FIXED))
    store(mm, 0, 1, 2, 400)
    assert advise(mm, 0, B, PAGEOUT) == [(0, B), (0, 1), (400, 401), (2, 3), (1, 2)]
    assert mm.swapped(at(0), at(B)) == [(0, 3), (400, 401)]
    assert [load(mm, page) for page in (0, 1, 400)] == [b"   0", b"   1", b" 400"]
    check_idle(mm.memory)


# MADV_COLLAPSE


def test_collapse_makes_a_huge_page_of_small_ones(mm: Mm) -> None:
    run(mm.madvise(at(0), 4 * B * P, NOHUGEPAGE))
    store(mm, 1, B - 1)
    assert errno_of(mm.madvise(at(0), B * P, COLLAPSE)) == "EINVAL"
    run(mm.madvise(at(0), 4 * B * P, HUGEPAGE))
    assert advise(mm, 0, B, COLLAPSE) == [(0, B)]
    assert huge(mm) == [(0, B)]
    assert (load(mm, 1), load(mm, 2), load(mm, B - 1)) == (b"   1", bytes(4), b" 511")
    assert advise(mm, 0, B, COLLAPSE) == []
    check_idle(mm.memory)


def test_collapse_stops_at_a_block_without_a_table(mm: Mm) -> None:
    touch(mm, 0)
    advise(mm, 10, B, DONTNEED)
    touch(mm, 2 * B)
    advise(mm, 2 * B + 10, 3 * B, DONTNEED)
    assert errno_of(mm.madvise(at(0), 3 * B * P, COLLAPSE)) == "EINVAL"
    assert huge(mm) == [(0, B)]


@pytest.mark.parametrize(("first", "last", "errno"), [(0, 100, None), (100, B, None), (100, 200, "EINVAL")])
def test_collapse_of_less_than_a_block(mm: Mm, first: int, last: int, errno: str | None) -> None:
    touch(mm, 0)
    assert errno_of(mm.madvise(at(first), (last - first) * P, COLLAPSE)) == errno


def test_collapse_gives_a_child_nothing_and_takes_nothing(mm: Mm) -> None:
    store(mm, 1)
    child = run(mm.fork())
    run(mm.store(at(1), b"mine"))
    assert advise(mm, 0, B, COLLAPSE) == [(0, B)]
    assert (load(mm, 1), load(child, 1)) == (b"mine", b"   1")
    check_idle(mm.memory)


def test_collapse_leaves_a_pinned_page_alone(mm: Mm) -> None:
    store(mm, 1)
    advise(mm, 0, 1, COLD)
    pfns = run(device.pin(mm, at(1), at(2), True))
    assert errno_of(mm.madvise(at(0), B * P, COLLAPSE)) == "EAGAIN"
    assert mm.pgtable.get(at(1) >> 12) >> 12 == int(pfns[0])
    device.unpin(mm, pfns)
    assert errno_of(mm.madvise(at(0), B * P, COLLAPSE)) is None
    check_idle(mm.memory)


# Devices


def test_a_snapshot_tells_what_a_pmd_maps(mm: Mm) -> None:
    touch(mm, 0)
    run(mm.mprotect(at(B), 10 * P, 1))
    touch(mm, B, "read")
    orders = (device.snapshot(mm, at(0), at(2 * B)) & device.ORDER_MASK) >> device.ORDER_SHIFT
    assert orders.tolist() == [9] * B + [0] * B


def everything_that_changes_a_block(mm: Mm) -> list[Operation[object]]:
    return [
        mm.madvise(at(3), 5 * P, DONTNEED),
        mm.munmap(at(100), 5 * P),
        mm.mprotect(at(200), 5 * P, 1),
        mm.madvise(at(300), 5 * P, COLD),
        mm.madvise(at(B), B * P, PAGEOUT),
        mm.mremap(at(2 * B), 100 * P, 100 * P, 3, at(8 * B)),
        mm.madvise(at(B), B * P, COLLAPSE),
        mm.munmap(at(0), 4 * B * P),
    ]


@pytest.mark.parametrize("write", [False, True])
def test_a_mirror_is_right_whatever_happens_to_the_block(mm: Mm, write: bool) -> None:
    mirror = Mirror(mm.memory)
    for page in range(0, 4 * B, 37):
        store(mm, page)
    for operation in everything_that_changes_a_block(mm):
        for vma in list(mm.vmas):
            first, last = (vma.start - BASE) // P, (vma.end - BASE) // P
            if vma.flags & 2 or not write:
                mirror.take(mm, at(first), run(device.fault(mm, at(first), at(last), write), mirror.hear))
        run(operation, mirror.hear)
        mirror.check_current()
        check_idle(mm.memory)
    assert present(mm) == [(8 * B, 8 * B + 100)]
