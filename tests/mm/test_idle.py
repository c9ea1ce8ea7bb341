"""Looking for pages in use, as DAMON and idle page tracking do: everyone is asked, and asking may change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mm.driver import ANON_PRIVATE, FIXED, RW, at, errno_of, heard, run
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.idle import CLEAR, LOOK
from mmubusd.mm.notification import Answer, ClearYoung, Notification
from mmubusd.mm.notification import TestYoung as LookYoung

P = PAGE_SIZE


@pytest.fixture
def mm() -> Iterator[Mm]:
    mm = Memory(frames_nr=2048).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 16 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"x" * 4 * P))
    yield mm
    check_idle(mm.memory)


def test_a_look_changes_nothing(mm: Mm) -> None:
    pages = tuple(at(page) for page in range(4))
    assert heard(mm.idle_scan(at(0), 16 * P, LOOK)) == [LookYoung(mm, pages)]
    assert run(mm.idle_scan(at(0), 16 * P, LOOK)) == 4


def test_what_is_cleared_is_young_again_when_it_is_used(mm: Mm) -> None:
    pages = tuple(at(page) for page in range(4))
    assert heard(mm.idle_scan(at(0), 16 * P, CLEAR)) == [ClearYoung(mm, pages)]
    assert run(mm.idle_scan(at(0), 16 * P, LOOK)) == 0
    run(mm.load(at(2), 1))
    assert run(mm.idle_scan(at(0), 16 * P, CLEAR)) == 1
    assert run(mm.idle_scan(at(0), 16 * P, CLEAR)) == 0


def test_a_page_that_only_a_device_uses_is_young(mm: Mm) -> None:
    run(mm.idle_scan(at(0), 16 * P, CLEAR))

    def device(note: Notification) -> Answer:
        return Answer(young=frozenset({at(1), at(9)}))

    assert run(mm.idle_scan(at(0), 16 * P, LOOK), device) == 1, "page 9 is not there"


def test_one_message_for_each_table_of_pages(mm: Mm) -> None:
    run(mm.mmap(at(1024), 1024 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(at(1024), 1024 * P, 23))
    notes = heard(mm.idle_scan(at(1024), 1024 * P, CLEAR))
    assert sum(len(note.addresses) for note in notes if isinstance(note, ClearYoung)) == 1024
    assert len(notes) <= 3


def test_nobody_there(mm: Mm) -> None:
    mm.notified = False
    assert heard(mm.idle_scan(at(0), 16 * P, CLEAR)) == []
    assert errno_of(mm.idle_scan(at(0), 16 * P, 2)) == "EINVAL"
    assert errno_of(mm.idle_scan(at(0) + 1, P, LOOK)) == "EINVAL"
