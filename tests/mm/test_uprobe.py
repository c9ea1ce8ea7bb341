"""Breakpoints in a file's code: who gets them, what is told, and what is left of them.

What is told, and in which order, is what Linux 6.18.44 does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mm.driver import FIXED, Mirror, at, errno_of, run, told
from mmubusd.mm import Memory, Mm, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, FileId
from mmubusd.mm.check import check_idle
from mmubusd.mm.frame import ANON
from mmubusd.mm.pgtable import PFN_SHIFT

P, READ, EXEC, SHARED, PRIVATE = PAGE_SIZE, 1, 5, 1, 2


@pytest.fixture
def mm() -> Iterator[Mm]:
    mm = Memory(frames_nr=512).create_mm("test")
    mm.notified = True
    yield mm
    check_idle(mm.memory)


@pytest.fixture
def code(mm: Mm) -> FileId:
    """Eight pages of code, mapped four times: as code, shared, writable, and only to be read."""
    file = mm.memory.create_file("code", "disk", 8, cached=True)
    run(mm.memory.write_file(file, 0, b"\x90" * (8 * P)))
    for first, prot, flags in ((0, EXEC, PRIVATE), (8, EXEC, SHARED), (16, 7, PRIVATE), (24, READ, PRIVATE)):
        run(mm.mmap(at(first), 4 * P, prot, flags | FIXED, file, 0))
        run(mm.load(at(first), 1))
    return file


def byte(mm: Mm, page: int, offset: int = 16) -> bytes:
    return run(mm.load(at(page) + offset, 1))


def own(mm: Mm, page: int) -> bool:
    pfn = mm.pgtable.get(at(page) >> PAGE_SHIFT) >> PFN_SHIFT
    return mm.memory.frames.flags_at[pfn] & ANON != 0


def test_private_mappings_that_may_not_be_written_get_it(mm: Mm, code: FileId) -> None:
    assert told(mm.memory.uprobe_register(code, 16)) == [(24, 25), (0, 1)]
    assert [byte(mm, page) for page in (0, 8, 16, 24)] == [b"\xcc", b"\x90", b"\x90", b"\xcc"]
    assert mm.memory.read_file(code, 16, 1) == b"\x90", "the file has it not"
    assert errno_of(mm.store(at(0), b"x")) == "EFAULT", "the mapping is as writable as before"


def test_a_second_one_in_the_same_page_is_silent(mm: Mm, code: FileId) -> None:
    run(mm.memory.uprobe_register(code, 16))
    assert told(mm.memory.uprobe_register(code, 32)) == []
    assert told(mm.memory.uprobe_unregister(code, 32)) == [(24, 25), (0, 1)]
    assert own(mm, 0), "the other one is still there"
    assert (byte(mm, 0), byte(mm, 0, 32)) == (b"\xcc", b"\x90")


def test_the_copy_goes_with_the_last_one(mm: Mm, code: FileId) -> None:
    free = mm.memory.frames.free_nr
    run(mm.memory.uprobe_register(code, 16))
    assert run(mm.memory.uprobe_unregister(code, 16)) == 2
    assert mm.memory.frames.free_nr == free
    assert mm.present(at(0), at(1)) == []
    assert byte(mm, 0) == b"\x90"
    assert not own(mm, 0)


def test_code_that_is_mapped_later_has_it_from_the_start(mm: Mm, code: FileId) -> None:
    run(mm.memory.uprobe_register(code, 16))
    assert told(mm.mmap(at(32), 4 * P, EXEC, PRIVATE | FIXED, code, 0)) == []
    assert byte(mm, 32) == b"\xcc"
    assert told(mm.mmap(at(40), 4 * P, EXEC, SHARED | FIXED, code, 0)) == []
    assert byte(mm, 40) == b"\x90"


def test_a_child_has_it_and_loses_it_too(mm: Mm, code: FileId) -> None:
    run(mm.memory.uprobe_register(code, 16))
    child = run(mm.fork())
    assert byte(child, 0) == b"\xcc"
    run(mm.memory.uprobe_unregister(code, 16))
    assert (byte(child, 0), byte(mm, 0)) == (b"\x90", b"\x90")


def test_a_page_that_nobody_has_touched(mm: Mm, code: FileId) -> None:
    run(mm.memory.ftruncate(code, 4 * P))
    run(mm.memory.ftruncate(code, 8 * P))
    run(mm.mmap(at(48), P, EXEC, PRIVATE | FIXED, code, 6 * P))
    assert told(mm.memory.uprobe_register(code, 6 * P + 16)) == []
    assert byte(mm, 48) == b"\xcc"


def test_a_device_sees_the_page_that_the_program_runs(mm: Mm, code: FileId) -> None:
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(2), False)))
    run(mm.memory.uprobe_register(code, 16), mirror.hear)
    mirror.check_current()
    assert len(mirror.entries) == 1, "the page was replaced by its copy"
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(2), False)))
    run(mm.memory.uprobe_unregister(code, 16), mirror.hear)
    mirror.check_current()
    assert len(mirror.entries) == 1


def test_a_pinned_copy_stays(mm: Mm, code: FileId) -> None:
    run(mm.memory.uprobe_register(code, 16))
    pins = run(device.pin(mm, at(0), at(1), False))
    run(mm.memory.uprobe_unregister(code, 16))
    assert own(mm, 0)
    assert byte(mm, 0) == b"\x90"
    device.unpin(mm, pins)


def test_errnos(mm: Mm, code: FileId) -> None:
    assert errno_of(mm.memory.uprobe_register(code, 8 * P)) == "EINVAL"
    assert errno_of(mm.memory.uprobe_unregister(code, 16)) == "ENOENT"
    run(mm.memory.uprobe_register(code, 16))
    assert errno_of(mm.memory.uprobe_register(code, 16)) == "EEXIST"
