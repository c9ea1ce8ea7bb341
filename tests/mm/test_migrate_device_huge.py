"""Huge pages in a device's private memory: they go and come as one, and small pages take over where that cannot be."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, at, heard, run
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.folio_split import split
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import DONTNEED
from mmubusd.mm.memcontrol import change_limits, join
from mmubusd.mm.notification import InvalidateRange, Notification, Reason
from mmubusd.mm.pgtable import PFN_SHIFT

P = PAGE_SIZE
B = 512
OWNER = 7
ORDER = 9


def machine(frames_nr: int = 6 * B) -> Mm:
    """A block that huge pages are allowed in."""
    mm = Memory(frames_nr=frames_nr, swap_slots_nr=2 * B, thp=Thp.ALWAYS).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), B * P, RW, ANON_PRIVATE | FIXED))
    return mm


def filled(frames_nr: int = 6 * B) -> Mm:
    mm = machine(frames_nr)
    for page in range(B):
        run(mm.store(at(page), b"%d" % page))
    assert mm.huge(at(0), at(B)) == [(0, B)]
    return mm


def orders(mm: Mm, first: int = 0, end: int = B) -> set[int]:
    entries = device.snapshot(mm, at(first), at(end), OWNER)
    return {int(entry) >> device.ORDER_SHIFT & 15 for entry in entries if int(entry) & device.DEVICE}


def moves(notes: list[Notification]) -> list[tuple[int, int, int]]:
    return [(note.start, note.end, note.owner) for note in notes if isinstance(note, InvalidateRange)]


def check_data(mm: Mm, first: int = 0, end: int = B) -> None:
    for page in range(first, end):
        want = b"%d" % page
        assert run(mm.load(at(page), len(want))) == want


def test_there_and_back_as_one() -> None:
    mm = filled()
    notes = heard(mm.migrate_to_device(at(0), at(B), OWNER))
    assert notes == [InvalidateRange(mm, at(0), at(B), Reason.MIGRATE, owner=OWNER)]
    assert orders(mm) == {ORDER}
    assert mm.present(at(0), at(B)) == []
    assert heard(mm.load(at(77), 1)) == [InvalidateRange(mm, at(0), at(B), Reason.MIGRATE)]
    assert mm.huge(at(0), at(B)) == [(0, B)]
    check_data(mm)
    check_idle(mm.memory)


@pytest.mark.parametrize("touched", [False, True])
def test_what_was_never_written_to_goes_there_as_a_huge_page_of_zeros(touched: bool) -> None:
    mm = machine()
    if touched:
        run(mm.load(at(0), 1))
    assert run(mm.migrate_to_device(at(0), at(B), OWNER)) == B
    assert orders(mm) == {ORDER}
    assert run(mm.load(at(5), 4)) == bytes(4)
    check_idle(mm.memory)


def test_a_part_of_a_huge_page_goes_as_small_pages() -> None:
    mm = filled()
    assert run(mm.migrate_to_device(at(0), at(100), OWNER)) == 100
    assert orders(mm) == {0}
    check_data(mm)
    check_idle(mm.memory)


def test_small_pages_stay_small_wherever_their_frames_are() -> None:
    mm = machine()
    mm.thp = Thp.NEVER
    run(mm.touch(at(0), B * P, "write"))
    assert run(mm.migrate_to_device(at(0), at(B), OWNER)) == B
    assert orders(mm) == {0}


def fragment(mm: Mm, left: int) -> list[int]:
    """Take one frame of each free block but so many."""
    frames, taken = mm.memory.frames, list[int]()
    blocks = []
    while block := frames.alloc_block():
        blocks.append(block)
    for block in blocks[left:]:
        taken.append(block + 9)
    for block in blocks:
        for pfn in range(block, block + B):
            if pfn not in taken:
                frames.put(pfn)
    return taken


def test_without_room_on_the_device_it_goes_page_by_page() -> None:
    mm = filled()
    taken = fragment(mm, 0)
    assert run(mm.migrate_to_device(at(0), at(B), OWNER)) == B
    assert orders(mm) == {0}
    check_data(mm)
    for pfn in taken:
        mm.memory.frames.put(pfn)
    check_idle(mm.memory)


def test_without_room_in_the_system_it_comes_page_by_page() -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    taken = fragment(mm, 0)
    assert moves(heard(mm.load(at(77), 1))) == [(at(77), at(78), 0)]
    assert mm.present(at(0), at(B)) == [(77, 78)]
    assert orders(mm) == {0}
    check_data(mm)
    for pfn in taken:
        mm.memory.frames.put(pfn)
    check_idle(mm.memory)


@pytest.mark.parametrize("start", [0, 128, 256])
def test_what_is_left_of_it_is_small(start: int) -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    run(mm.munmap(at(start), 64 * P))
    assert orders(mm, start + 64, B) == {0}
    check_data(mm, start + 64, B)
    check_data(mm, 0, start)
    check_idle(mm.memory)


def test_a_boundary_of_mappings_inside_it_makes_it_small_for_good() -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    run(mm.mprotect(at(0), 100 * P, 1))
    run(mm.mprotect(at(0), 100 * P, 3))
    assert len(list(mm.vmas)) == 1
    assert orders(mm) == {0}
    check_data(mm)


def test_it_moves_with_its_mapping() -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    run(mm.mremap(at(0), B * P, B * P, 3, at(4 * B)))
    assert orders(mm, 4 * B, 5 * B) == {ORDER}
    assert run(mm.load(at(4 * B + 300), 3)) == b"300"
    assert mm.huge(at(0), at(5 * B)) == [(4 * B, 5 * B)]
    check_idle(mm.memory)


def test_what_a_child_has_too_comes_back_page_by_page() -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    child = run(mm.fork())
    assert run(child.load(at(3), 1)) == b"3"
    assert child.present(at(0), at(B)) == [(3, 4)]
    check_data(mm)
    run(child.exit())
    check_idle(mm.memory)


def test_a_folio_that_is_split_while_its_move_is_told_of_goes_page_by_page() -> None:
    mm = filled()
    head = mm.pgtable.get(at(0) >> 12) >> PFN_SHIFT
    done = []

    def hear(note: Notification) -> None:
        if not done:
            done.append(note)
            run(split(mm.memory, head))

    assert run(mm.migrate_to_device(at(0), at(B), OWNER), hear) == B
    assert orders(mm) == {0}
    check_data(mm)
    check_idle(mm.memory)


def test_a_part_that_goes_while_its_return_is_told_of() -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    done = []

    def hear(note: Notification) -> None:
        if not done:
            done.append(note)
            run(mm.madvise(at(100), 10 * P, DONTNEED))

    run(mm.touch(at(5), P, "read"), hear)
    assert mm.present(at(0), at(B)) == [(5, 6)]
    assert run(mm.load(at(105), 3)) == bytes(3)
    check_data(mm, 110)
    check_idle(mm.memory)


def test_all_that_a_device_has_comes_back_huge() -> None:
    mm = filled()
    run(mm.migrate_to_device(at(0), at(B), OWNER))
    assert run(mm.migrate_to_system(at(0), at(B), OWNER)) == B
    assert mm.huge(at(0), at(B)) == [(0, B)]
    check_data(mm)


def test_whose_memory_it_is_stays_theirs() -> None:
    mm = filled()
    memcg = change_limits(mm.memory, "group", 3 * B, 0)
    join(mm, memcg)
    run(mm.mmap(at(B), B * P, RW, ANON_PRIVATE | FIXED))
    run(mm.touch(at(B), B * P, "write"))
    charged = memcg.charged
    run(mm.migrate_to_device(at(B), at(2 * B), OWNER))
    assert memcg.charged == charged
    run(mm.load(at(B), 1))
    assert memcg.charged == charged
    run(mm.munmap(at(B), B * P))
    assert memcg.charged == charged - B - 1, "and a page table"
    check_idle(mm.memory)
