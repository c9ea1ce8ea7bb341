"""Large folios of private memory that move: as a whole, by whatever they are mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, Mirror, at, errno_of, heard, run
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Pfn
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import DONTNEED, HUGEPAGE
from mmubusd.mm.mbind import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT
from mmubusd.mm.mempolicy import MPOL_BIND, MPOL_DEFAULT
from mmubusd.mm.notification import ANSWERED, Answer, InvalidateRange, LockWait, Reason, RmapInvalidatePage
from mmubusd.mm.pgtable import PFN_SHIFT, WRITE

P, B = PAGE_SIZE, PMD_SIZE
BLOCK = at(0)


def machine(frames_nr: int = 8192) -> Mm:
    mm = Memory(frames_nr=frames_nr, nodes_nr=2, thp=Thp.MADVISE).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    return machine()


def fill(mm: Mm) -> None:
    run(mm.mmap(BLOCK, B, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(BLOCK, B, HUGEPAGE))
    for page in range(0, 512, 7):
        run(mm.store(BLOCK + page * P, b"page %d" % page))
    assert mm.huge(BLOCK, BLOCK + B) == [(0, 512)]


def check_bytes(mm: Mm, pages: range = range(0, 512, 7)) -> None:
    for page in pages:
        assert run(mm.load(BLOCK + page * P, 8)).rstrip(b"\0") == b"page %d" % page
    check_idle(mm.memory)


def nodes_of(mm: Mm) -> set[int]:
    frames = mm.memory.frames
    pfns = [mm.pgtable.get(BLOCK + page * P >> PAGE_SHIFT) >> PFN_SHIFT for page in range(512)]
    return {frames.node_of(pfn) for pfn in pfns if pfn}


def whole(mm: Mm) -> InvalidateRange:
    return InvalidateRange(mm, BLOCK, BLOCK + B, Reason.CLEAR)


def test_what_a_pmd_maps_is_told_of_once_and_stays_huge(mm: Mm) -> None:
    fill(mm)
    mirror = Mirror(mm.memory)
    mirror.take(mm, BLOCK, run(device.fault(mm, BLOCK, BLOCK + B, True)))
    notes: list[Any] = []

    def hear(note: Any) -> None:
        notes.append(note)
        mirror.hear(note)

    assert run(mm.move_pages(BLOCK + 5 * P, P, 1), hear) == 0, "a part stands for the whole"
    assert notes == [whole(mm)]
    assert nodes_of(mm) == {1}
    assert mm.huge(BLOCK, BLOCK + B) == [(0, 512)]
    mirror.check_alive()
    run(mm.store(BLOCK, b"page 0"))
    check_bytes(mm)
    assert run(mm.migrate_pages(0b10, 0b01)) == 0
    assert nodes_of(mm) == {0}
    assert heard(mm.mbind(BLOCK, B, MPOL_DEFAULT, 0, MPOL_MF_MOVE)) == [whole(mm)], "to other frames of its node"
    check_bytes(mm)


def test_parts_of_it_that_are_mapped_or_gone_move_with_it(mm: Mm) -> None:
    fill(mm)
    run(mm.madvise(BLOCK + 100 * P, 50 * P, DONTNEED))
    run(mm.mprotect(BLOCK + 200 * P, 100 * P, 1))
    notes = heard(mm.move_pages(BLOCK, P, 1))
    told = [((note.start - BLOCK) // P, (note.end - BLOCK) // P) for note in notes if isinstance(note, InvalidateRange)]
    assert told == [(0, 200), (200, 300), (300, 512)], "each mapping where the reverse map looks"
    assert nodes_of(mm) == {1}
    assert mm.huge(BLOCK, BLOCK + B) == []
    assert mm.present(BLOCK, BLOCK + B) == [(0, 100), (150, 512)]
    check_bytes(mm, range(154, 512, 7))
    run(mm.munmap(BLOCK, B))
    assert mm.memory.frames.free_nr == 8191


def test_parent_and_child_move_together_or_not_at_all(mm: Mm) -> None:
    fill(mm)
    child = run(mm.fork())
    child.notified = True
    assert heard(mm.mbind(BLOCK, B, MPOL_BIND, 0b10, MPOL_MF_MOVE)) == [], "it is not this program's alone"
    notes = heard(mm.mbind(BLOCK, B, MPOL_BIND, 0b10, MPOL_MF_MOVE_ALL))
    assert set(notes) == {whole(mm), whole(child)}
    assert nodes_of(mm) == nodes_of(child) == {1}
    assert not mm.pgtable.get(BLOCK >> PAGE_SHIFT) & WRITE
    run(child.store(BLOCK, b"child"))
    check_bytes(mm)


@pytest.mark.parametrize("held", [True, False])
def test_without_room_it_is_split_and_its_pages_move_and_when_it_is_held_it_stays(held: bool) -> None:
    mm = machine(4096)
    fill(mm)
    frames = mm.memory.frames
    if held:
        run(device.pin(mm, BLOCK + 9 * P, BLOCK + 10 * P, True))
    filler = mm.memory.create_mm("filler")
    run(filler.mmap(at(9000), 1200 * P, RW, ANON_PRIVATE | FIXED))
    run(filler.set_mempolicy(MPOL_BIND, 0b10))
    for page in range(1200):  # every other one stays: there are no 512 in a row on that node
        run(filler.store(at(9000 + page), b"x"))
    for page in range(0, 1200, 2):
        run(filler.munmap(at(9000 + page), P))
    free_there = frames.free.nr_on((1,))
    while (first := frames.free.take_block((1,))) and free_there > 512:
        free_there -= 512  # taken for good
    answer = errno_of(mm.mbind(BLOCK, B, MPOL_BIND, 0b10, MPOL_MF_MOVE | MPOL_MF_STRICT))
    assert not first
    assert answer == ("EIO" if held else None)
    assert nodes_of(mm) == ({0} if held else {1})
    for page in range(0, 512, 7):
        assert run(mm.load(BLOCK + page * P, 8)).rstrip(b"\0") == b"page %d" % page


def test_an_exporter_that_refuses_keeps_it_where_it_is(mm: Mm) -> None:
    fill(mm)
    exported = Pfn((mm.pgtable.get(BLOCK >> PAGE_SHIFT) >> PFN_SHIFT) + 7)
    mm.memory.export(exported, 1)

    def refusing(note: Any) -> Answer | None:
        return Answer(refused_pfns=frozenset({exported})) if isinstance(note, RmapInvalidatePage) else None

    run(mm.move_pages(BLOCK, B, 1), refusing)
    assert mm.memory.frames.exports[exported] == {1}
    for page in range(0, 512, 7):
        assert run(mm.load(BLOCK + page * P, 8)).rstrip(b"\0") == b"page %d" % page


# What else happens meanwhile


def zap(mm: Mm) -> None:
    run(mm.madvise(BLOCK + 100 * P, 50 * P, DONTNEED))


def protect(mm: Mm) -> None:
    run(mm.mprotect(BLOCK + 100 * P, 50 * P, 1))


def share(mm: Mm) -> None:
    run(mm.fork())


def carry(mm: Mm) -> None:
    run(mm.mremap(BLOCK, B, B, 3, BLOCK + 4 * B))
    run(mm.mremap(BLOCK + 4 * B, B, B, 3, BLOCK))


@pytest.mark.parametrize(("change", "huge"), [(zap, False), (protect, False), (share, True), (carry, True)])
def test_its_mappings_may_change_while_it_moves(mm: Mm, change: Callable[[Mm], None], huge: bool) -> None:
    fill(mm)
    moving = mm.move_pages(BLOCK, B, 1)
    assert next(moving) == whole(mm)
    change(mm)
    load = mm.load(BLOCK + 7 * P, 6)
    assert isinstance(next(load), LockWait)
    with pytest.raises(StopIteration):
        moving.send(ANSWERED)
    with pytest.raises(StopIteration) as ended:
        load.send(ANSWERED)
    assert ended.value.value == b"page 7"
    assert nodes_of(mm) == {1}
    assert mm.huge(BLOCK, BLOCK + B) == ([(0, 512)] if huge else [])
    check_bytes(mm, range(154, 512, 7))
    run(mm.munmap(BLOCK, B))
    check_idle(mm.memory)
