"""The model of what the program wrote: followed through mappings, copies, files and forks."""

import pytest
from mmubus.linux import (
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_POPULATE_WRITE,
    MADV_REMOVE,
    MADV_WIPEONFORK,
    PAGE_SIZE,
)
from mmubus.trace.contents import PATTERN_BYTES, Contents, Files, Region, Unknown, pattern

BASE = 0x200000000000
ZERO = bytes(PATTERN_BYTES)
FILE = 5


def page(number: int) -> int:
    return BASE + number * PAGE_SIZE


def private(first: int, last: int) -> Region:
    return Region(page(first), page(last), shared=False)


def of_file(first: int, last: int, offset_pages: int = 0, *, shared: bool) -> Region:
    return Region(page(first), page(last), shared, FILE, offset_pages * PAGE_SIZE)


@pytest.fixture
def contents() -> Contents:
    return Contents(Files())


def test_patterns_differ():
    assert len({pattern(mm, address, number) for mm in (1, 2) for address in (1, 2) for number in (1, 2)}) == 8
    assert len(pattern(1, 2, 3)) == PATTERN_BYTES


def test_new_memory_holds_zeros_and_unmapped_memory_nothing(contents: Contents):
    contents.map(private(0, 4))
    assert contents.expected(page(0)) == ZERO
    assert contents.expected(page(4)) is Unknown


def test_what_is_written_is_there_until_it_is_unmapped(contents: Contents):
    contents.map(private(0, 4))
    contents.written(page(1), b"one")
    assert contents.expected(page(1)) == b"one"
    contents.unmap(page(0), page(2))
    contents.map(private(0, 4))
    assert contents.expected(page(1)) == ZERO


def test_a_hole_in_the_middle_leaves_both_sides(contents: Contents):
    contents.map(private(0, 6))
    for number in range(6):
        contents.written(page(number), bytes([number]))
    contents.unmap(page(2), page(4))
    assert [contents.expected(page(number)) for number in (1, 2, 3, 4)] == [b"\1", Unknown, Unknown, b"\4"]


def test_private_copies_do_not_show_in_the_file(contents: Contents):
    contents.map(of_file(0, 2, shared=False))
    contents.map(of_file(4, 6, shared=True))
    contents.written(page(4), b"file")
    assert contents.expected(page(0)) == b"file"
    contents.written(page(0), b"mine")
    assert contents.expected(page(4)) == b"file"
    contents.written(page(4), b"later")
    assert contents.expected(page(0)) == b"mine"
    contents.advise(page(0), page(2), MADV_DONTNEED, whole=True)
    assert contents.expected(page(0)) == b"later"


def test_one_page_of_a_file_at_two_addresses(contents: Contents):
    contents.map(of_file(0, 4, 2, shared=True))
    contents.map(of_file(8, 9, 3, shared=True))
    contents.written(page(1), b"x")
    assert contents.expected(page(8)) == b"x"


def test_a_write_fault_without_bytes_copies_what_is_there(contents: Contents):
    contents.map(of_file(0, 1, shared=False))
    contents.map(of_file(4, 5, shared=True))
    contents.written(page(4), b"before")
    contents.advise(page(0), page(1), MADV_POPULATE_WRITE, whole=True)
    contents.written(page(4), b"after")
    assert contents.expected(page(0)) == b"before"


def test_a_call_that_stopped_half_way_makes_copies_unknown(contents: Contents):
    contents.map(of_file(0, 2, shared=False))
    contents.touched(page(0), page(2), whole=False)
    assert contents.expected(page(0)) is Unknown
    contents.written(page(0), b"again")
    assert contents.expected(page(0)) == b"again"


def test_free_may_have_freed(contents: Contents):
    contents.map(private(0, 2))
    contents.written(page(0), b"x")
    contents.advise(page(0), page(2), MADV_FREE, whole=True)
    assert contents.expected(page(0)) is Unknown
    assert contents.expected(page(1)) == ZERO


def test_move_takes_the_bytes_along(contents: Contents):
    contents.map(private(0, 2))
    contents.map(private(10, 14))
    contents.written(page(1), b"x")
    contents.written(page(11), b"gone")
    contents.move(page(0), 2 * PAGE_SIZE, 4 * PAGE_SIZE, page(10), keep=False)
    assert contents.expected(page(1)) is Unknown
    assert [contents.expected(page(number)) for number in (10, 11, 12, 13)] == [ZERO, b"x", ZERO, ZERO]


def test_dontunmap_leaves_the_mapping_empty(contents: Contents):
    contents.map(private(0, 1))
    contents.written(page(0), b"x")
    contents.move(page(0), PAGE_SIZE, PAGE_SIZE, page(4), keep=True)
    assert (contents.expected(page(0)), contents.expected(page(4))) == (ZERO, b"x")


def test_a_second_mapping_of_shared_memory(contents: Contents):
    contents.map(of_file(0, 4, shared=True))
    contents.written(page(1), b"x")
    contents.move(page(1), 0, 2 * PAGE_SIZE, page(8), keep=False)
    assert (contents.expected(page(1)), contents.expected(page(8))) == (b"x", b"x")


def test_growing_in_place_continues_the_file(contents: Contents):
    contents.map(of_file(0, 2, 3, shared=True))
    contents.map(of_file(10, 11, 5, shared=True))
    contents.written(page(10), b"five")
    contents.move(page(0), 2 * PAGE_SIZE, 3 * PAGE_SIZE, page(0), keep=False)
    assert contents.expected(page(2)) == b"five"


def test_the_heap_grows_and_shrinks(contents: Contents):
    contents.resize_heap(page(0), page(2))
    contents.written(page(1), b"x")
    contents.resize_heap(page(2), page(1))
    contents.resize_heap(page(1), page(3))
    assert [contents.expected(page(number)) for number in range(4)] == [ZERO, ZERO, ZERO, Unknown]


def test_fork_copies_and_parts(contents: Contents):
    contents.map(private(0, 4))
    contents.map(of_file(8, 9, shared=True))
    for number in range(4):
        contents.written(page(number), b"parent")
    contents.advise(page(1), page(2), MADV_WIPEONFORK, whole=True)
    contents.advise(page(2), page(3), MADV_DONTFORK, whole=True)
    child = contents.fork()
    assert [child.expected(page(number)) for number in range(4)] == [b"parent", ZERO, Unknown, b"parent"]
    contents.written(page(0), b"later")
    child.written(page(8), b"shared")
    assert child.expected(page(0)) == b"parent"
    assert contents.expected(page(8)) == b"shared"


def test_truncate_and_holes_are_zeros(contents: Contents):
    files = Files()
    contents = Contents(files)
    contents.map(of_file(0, 8, shared=True))
    contents.map(of_file(10, 18, shared=False))
    for number in range(8):
        contents.written(page(number), b"x")
    contents.written(page(16), b"own")
    files.truncate(FILE, 5 * PAGE_SIZE + 100)
    contents.truncated(FILE, 5 * PAGE_SIZE + 100)
    assert [contents.expected(page(number)) for number in (4, 5, 6)] == [b"x", b"x", ZERO]
    assert contents.expected(page(16)) == ZERO
    files.truncate(FILE, 5 * PAGE_SIZE + 3)
    assert contents.expected(page(5)) is Unknown
    files.punch(FILE, PAGE_SIZE, 2 * PAGE_SIZE)
    assert [contents.expected(page(number)) for number in (0, 1, 2, 3)] == [b"x", ZERO, ZERO, b"x"]
    contents.advise(page(3), page(4), MADV_REMOVE, whole=True)
    assert contents.expected(page(13)) == ZERO


def test_pages_that_a_userfaultfd_moves_take_their_bytes_along():
    contents = Contents(Files())
    contents.map(private(0, 8))
    contents.written(page(1), b"one")
    contents.written(page(5), b"five")
    contents.carry(page(0), 2 * PAGE_SIZE, page(4))
    assert [contents.expected(page(number)) for number in (0, 1, 4, 5)] == [ZERO, ZERO, ZERO, b"one"]
