"""How young a folio is: one question and one mark for what a PMD maps, page by page where a table does."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, at, run
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.aging import MESSAGE_PAGES, page_referenced
from mmubusd.mm.check import check_idle
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.idle import CLEAR, LOOK
from mmubusd.mm.madvise import DONTNEED
from mmubusd.mm.notification import AgePage, Answer, ClearYoung, Notification
from mmubusd.mm.notification import TestYoung as LookYoung
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.mm.shmem_huge import ShmemHuge
from mmubusd.mm.vmscan import make_room

P = PAGE_SIZE
B = 512


def machine(kind: int = ANON_PRIVATE, blocks: int = 1, frames_nr: int = 8 * B) -> Mm:
    """Blocks of huge pages without a zero in them, whose marks have been cleared."""
    memory = Memory(frames_nr=frames_nr, swap_slots_nr=4 * B, thp=Thp.ALWAYS, shmem_enabled=ShmemHuge.ALWAYS)
    mm = memory.create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), blocks * B * P, RW, kind | FIXED))
    for page in range(blocks * B):
        run(mm.store(at(page), b"%d" % page))
    run(mm.idle_scan(at(0), blocks * B * P, CLEAR))
    return mm


def head(mm: Mm, page: int) -> int:
    return mm.pgtable.get(at(page) >> 12) >> PFN_SHIFT


class Asked:
    """Hears what is asked about age; the pages at these addresses are young."""

    def __init__(self, *young: int) -> None:
        self.young = frozenset(young)
        self.notes: list[Notification] = []

    def __call__(self, note: Notification) -> Answer:
        self.notes.append(note)
        return Answer(young=self.young)


@pytest.mark.parametrize("kind", [ANON_PRIVATE, ANON_SHARED])
def test_a_huge_page_is_one_question(kind: int) -> None:
    mm = machine(kind)
    asked = Asked(at(0))
    assert run(page_referenced(mm.memory, [head(mm, 0)]), asked) == {head(mm, 0): 1}
    assert asked.notes == [AgePage(mm, (), (at(0),))]
    run(mm.load(at(77), 1))
    assert run(page_referenced(mm.memory, [head(mm, 0)]), Asked()) == {head(mm, 0): 1}, "the PMD's own mark"
    assert run(page_referenced(mm.memory, [head(mm, 0)]), Asked()) == {head(mm, 0): 0}, "which is gone then"


def test_each_mapping_of_a_huge_page_counts() -> None:
    mm = machine()
    child = run(mm.fork())
    child.notified = True
    asked = Asked(at(0))
    assert run(page_referenced(mm.memory, [head(mm, 0)]), asked) == {head(mm, 0): 2}
    assert asked.notes == [AgePage(mm, (), (at(0),)), AgePage(child, (), (at(0),))]


def test_where_a_table_maps_it_pages_are_asked_about_and_all_stand_for_the_folio() -> None:
    mm = machine()
    run(mm.madvise(at(500), 12 * P, DONTNEED))
    asked = Asked(at(3), at(4), at(505))
    assert run(page_referenced(mm.memory, [head(mm, 0)]), asked) == {head(mm, 0): 2}
    assert asked.notes == [AgePage(mm, tuple(at(page) for page in range(500)))]


def test_a_message_about_small_pages_takes_no_part_of_a_huge_one_along() -> None:
    mm = machine()
    run(mm.mmap(at(2 * B), 3 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.touch(at(2 * B), 3 * P, "write"))
    asked = Asked()
    run(page_referenced(mm.memory, [head(mm, 2 * B)]), asked)
    assert asked.notes == [AgePage(mm, (at(2 * B), at(2 * B + 1), at(2 * B + 2)))]
    assert MESSAGE_PAGES > 3


@pytest.mark.parametrize("swapped", [False, True])
def test_pressure_takes_a_huge_page_as_a_whole_or_leaves_it(swapped: bool) -> None:
    """The one that somebody uses stays, all of it; the other goes, all of it."""
    mm = machine(blocks=2, frames_nr=3 * B)
    young = at(0 if swapped else B)
    run(make_room(mm.memory, mm.memory.frames.free_nr + 300), Asked(young))
    used, unused = (0, B) if swapped else (B, 0)
    assert mm.huge(at(0), at(2 * B)) == [(used, used + B)]
    assert mm.present(at(unused), at(unused + B)) == []
    assert run(mm.load(at(unused + 7), 1)) == (b"%d" % (unused + 7))[:1]
    check_idle(mm.memory)


def test_idle_pages_are_asked_about_by_huge_pages() -> None:
    mm = machine()
    asked = Asked(at(0))
    assert run(mm.idle_scan(at(0), B * P, LOOK), asked) == B
    assert run(mm.idle_scan(at(100), 10 * P, CLEAR), asked) == 10
    assert asked.notes == [LookYoung(mm, (), (at(0),)), ClearYoung(mm, (), (at(0),))]
    assert run(mm.idle_scan(at(0), B * P, LOOK), Asked()) == 0
