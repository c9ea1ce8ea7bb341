"""mseal: what a sealed mapping refuses, and what it lets pass. Kernel: mm/mseal.c, and the recordings sealed-*."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, at, errno_of, run, told
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.madvise import DONTNEED, PAGEOUT, RANDOM
from mmubusd.mm.syscall import call

P = PAGE_SIZE
MAYMOVE, MOVES = 1, 3


@pytest.fixture
def mm() -> Mm:
    """Pages 0 to 4, of which page 2 is sealed."""
    mm = Memory(frames_nr=2048).create_mm("test")
    mm.notified = True
    run(mm.mmap(at(0), 5 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.touch(at(0), 5 * P, "write"))
    run(mm.mseal(at(2), P))
    return mm


def shape(mm: Mm) -> list[tuple[int, int]]:
    return [((each.start - at(0)) // P, (each.end - at(0)) // P) for each in mm.mappings()]


def test_sealing_splits_and_does_nothing_twice(mm: Mm) -> None:
    assert shape(mm) == [(0, 2), (2, 3), (3, 5)]
    assert run(mm.mseal(at(2), P)) == 0
    run(mm.mseal(at(0), 5 * P))
    assert shape(mm) == [(0, 5)]
    check_idle(mm.memory)


@pytest.mark.parametrize(
    ("args", "errno"),
    [
        ((at(0), P, 1), "EINVAL"),
        ((at(0) + 1, P, 0), "EINVAL"),
        ((at(0), (1 << 64) - 1, 0), "EINVAL"),
        ((at(4), 2 * P, 0), "ENOMEM"),
        ((at(7), P, 0), "ENOMEM"),
    ],
)
def test_bad_arguments_seal_nothing(mm: Mm, args: tuple[int, ...], errno: str) -> None:
    assert errno_of(call(mm, "mseal", args)) == errno
    assert shape(mm) == [(0, 2), (2, 3), (3, 5)]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("munmap", (at(2), P)),
        ("munmap", (at(1), 3 * P)),
        ("mmap", (at(2), P, RW, ANON_PRIVATE | FIXED, 0, 0)),
        ("mprotect", (at(2), P, 1)),
        ("mprotect", (at(2), P, RW)),
        ("mremap", (at(2), P, P, MOVES, at(10))),
        ("mremap", (at(2), P, 2 * P, MAYMOVE, 0)),
        ("mremap", (at(0), P, P, MOVES, at(2))),
    ],
)
def test_it_is_neither_unmapped_nor_moved_nor_changed(mm: Mm, op: str, args: tuple[int, ...]) -> None:
    assert errno_of(call(mm, op, args)) == "EPERM"
    assert [each.prot for each in mm.mappings() if each.start <= at(2) < each.end] == ["rw-p"]
    assert mm.present(at(0), at(5)) == [(0, 5)]
    check_idle(mm.memory)


def test_a_call_ends_at_the_sealed_mapping(mm: Mm) -> None:
    assert errno_of(mm.mprotect(at(0), 5 * P, 1)) == "EPERM"
    assert [each.prot for each in mm.mappings()] == ["r--p", "rw-p", "rw-p"]


def test_only_what_can_be_written_to_may_be_thrown_away(mm: Mm) -> None:
    run(mm.mprotect(at(3), 2 * P, 1))
    run(mm.mseal(at(3), 2 * P))
    assert errno_of(mm.madvise(at(3), P, DONTNEED)) == "EPERM"
    assert errno_of(mm.madvise(at(3), P, PAGEOUT)) is None
    assert errno_of(mm.madvise(at(3), P, RANDOM)) is None
    assert told(mm.madvise(at(2), P, DONTNEED)) == [(2, 3)]
    run(mm.mmap(at(8), P, 1, ANON_SHARED | FIXED))
    run(mm.mseal(at(8), P))
    assert errno_of(mm.madvise(at(8), P, DONTNEED)) is None


def test_a_fork_is_sealed_as_well_and_both_end(mm: Mm) -> None:
    child = run(mm.fork())
    assert errno_of(child.munmap(at(2), P)) == "EPERM"
    run(child.exit())
    run(mm.exit())
    check_idle(mm.memory)
