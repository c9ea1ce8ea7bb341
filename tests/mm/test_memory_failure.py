"""Frames that go bad: who loses what, who is told, and that the frame is never used again."""

from __future__ import annotations

from typing import Any

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, Mirror, at, errno_of, heard, run
from mmubusd.mm import Memory, Mm, MmError, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Pfn
from mmubusd.mm.check import check_idle
from mmubusd.mm.frame import HWPOISON as FAILED
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import COLD, DONTNEED, FREE, HUGEPAGE, HWPOISON, MERGEABLE, PAGEOUT, SOFT_OFFLINE
from mmubusd.mm.notification import ANSWERED, InvalidatePage, InvalidateRange, LockWait, Reason, RmapInvalidatePage
from mmubusd.mm.pgtable import PFN_SHIFT

P = PAGE_SIZE


def machine(**options: Any) -> Mm:
    mm = Memory(frames_nr=2048, swap_slots_nr=64, **options).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    return machine()


def fill(mm: Mm, pages: int = 4, flags: int = ANON_PRIVATE) -> None:
    run(mm.mmap(at(0), pages * P, RW, flags | FIXED))
    for page in range(pages):
        run(mm.store(at(page), b"page %d" % page))
    mm.memory.lru.drain()


def map_file(mm: Mm, kind: str = "disk", flags: int = 1, pages: int = 4) -> int:
    file = mm.memory.create_file("f", kind, pages, cached=True)
    run(mm.mmap(at(0), pages * P, RW, flags | FIXED, file, 0))
    return file


def pfn_of(mm: Mm, page: int) -> int:
    return mm.pgtable.get(at(page) >> PAGE_SHIFT) >> PFN_SHIFT


def fail(mm: Mm, page: int = 0) -> int:
    """The frame of a page fails. Returns: the frame."""
    pfn = pfn_of(mm, page)
    run(mm.madvise(at(page), P, HWPOISON))
    return pfn


def use_everything(memory: Memory) -> set[int]:
    """Take every frame that can be had."""
    return {memory.frames.free.take() for _ in range(memory.frames.free_nr)}


# Hard: the bytes are lost


def test_who_comes_to_a_lost_page_gets_sigbus_and_a_device_efault(mm: Mm) -> None:
    fill(mm)
    mirror = Mirror(mm.memory)
    mirror.take(mm, at(0), run(device.fault(mm, at(0), at(4), True)))
    pfn, notes = pfn_of(mm, 1), list[object]()

    def hear(note: Any) -> None:
        notes.append(note)
        assert mm.memory.frames.refcount_at[pfn] == 2, "the mark's, and the mapping's until everyone has answered"
        mirror.hear(note)

    run(mm.madvise(at(1), P, HWPOISON), hear)
    assert notes == [InvalidatePage(mm, (at(1),), Reason.CLEAR)]
    mirror.check_current()
    assert errno_of(mm.load(at(1), 1)) == "ENXIO"
    assert errno_of(mm.store(at(1), b"x")) == "ENXIO"
    assert errno_of(device.fault(mm, at(0), at(4), False)) == "EFAULT"
    assert errno_of(device.pin(mm, at(1), at(2), False)) == "EFAULT"
    assert errno_of(mm.madvise(at(1), P, HWPOISON)) == "EFAULT"
    assert run(mm.load(at(2), 6)) == b"page 2"
    check_idle(mm.memory)


def test_the_frame_is_never_used_again(mm: Mm) -> None:
    fill(mm)
    free = mm.memory.frames.free_nr
    pfn = fail(mm)
    run(mm.munmap(at(0), 4 * P))
    check_idle(mm.memory)
    assert mm.memory.frames.hwpoison_nr == 1
    assert mm.memory.frames.free_nr == free + 3
    assert pfn not in use_everything(mm.memory)


@pytest.mark.parametrize("advice", [DONTNEED, FREE])
def test_advice_that_drops_the_entry_gives_a_new_page(mm: Mm, advice: int) -> None:
    fill(mm)
    pfn = fail(mm)
    run(mm.madvise(at(0), P, advice))
    assert run(mm.load(at(0), 6)) == bytes(6)
    run(mm.store(at(0), b"new"))
    assert pfn_of(mm, 0) != pfn
    check_idle(mm.memory)


def test_entries_are_copied_by_fork_and_moved_by_mremap(mm: Mm) -> None:
    fill(mm)
    fail(mm, 1)
    child = run(mm.fork())
    run(mm.mremap(at(0), 4 * P, 4 * P, 3, at(20)))
    assert errno_of(child.load(at(1), 1)) == "ENXIO"
    assert errno_of(mm.load(at(21), 1)) == "ENXIO"
    assert run(mm.load(at(20), 6)) == b"page 0"
    run(mm.mprotect(at(20), 4 * P, 1))
    run(mm.madvise(at(20), 4 * P, COLD))
    run(child.exit())
    check_idle(mm.memory)


def test_everybody_who_shares_the_page_loses_it_and_is_told(mm: Mm) -> None:
    fill(mm)
    child = run(mm.fork())
    child.notified = True
    notes = heard(mm.madvise(at(0), P, HWPOISON))
    assert sorted((note.mm.id, note.addresses) for note in notes) == [(mm.id, (at(0),)), (child.id, (at(0),))]
    assert errno_of(child.load(at(0), 1)) == "ENXIO"
    check_idle(mm.memory)


def test_a_merged_page_is_lost_wherever_it_is_mapped(mm: Mm) -> None:
    run(mm.mmap(at(0), 4 * P, RW, ANON_PRIVATE | FIXED))
    for page in range(4):
        run(mm.store(at(page), b"same"))
    run(mm.madvise(at(0), 4 * P, MERGEABLE))
    run(mm.memory.ksm_scan())
    assert heard(mm.madvise(at(1), P, HWPOISON)) == [InvalidatePage(mm, tuple(map(at, range(4))), Reason.CLEAR)]
    assert {errno_of(mm.load(at(page), 1)) for page in range(4)} == {"ENXIO"}
    check_idle(mm.memory)


def test_a_clean_page_of_a_file_is_dropped_and_read_again(mm: Mm) -> None:
    file = map_file(mm)
    run(mm.store(at(0), b"kept"))
    run(mm.memory.fsync(file))
    assert run(mm.load(at(0), 4)) == b"kept"
    assert heard(mm.madvise(at(0), P, HWPOISON)) == [
        InvalidatePage(mm, (at(0),), Reason.PROTECTION_PAGE),
        InvalidatePage(mm, (at(0),), Reason.CLEAR),
    ]
    assert run(mm.load(at(0), 4)) == b"kept"
    assert run(mm.msync(at(0), P, 4)) == 0
    check_idle(mm.memory)


def test_a_dirty_page_of_a_file_is_lost_and_msync_says_so_once(mm: Mm) -> None:
    map_file(mm)
    run(mm.store(at(0), b"lost"))
    assert heard(mm.madvise(at(0), P, HWPOISON)) == [InvalidatePage(mm, (at(0),), Reason.CLEAR)]
    assert errno_of(mm.load(at(0), 1)) == "ENXIO", "the entry stays"
    assert errno_of(mm.msync(at(0), P, 4)) == "EIO"
    assert errno_of(mm.msync(at(0), P, 4)) is None
    run(mm.madvise(at(0), P, DONTNEED))
    assert run(mm.load(at(0), 4)) == bytes(4)
    check_idle(mm.memory)


def test_what_a_device_wrote_last_is_lost_as_well_and_said(mm: Mm) -> None:
    file = map_file(mm)
    run(mm.load(at(0), 1))
    pfn = pfn_of(mm, 0)
    run(mm.madvise(at(0), P, HWPOISON), lambda note: mm.memory.set_dirty([pfn]))
    assert errno_of(mm.memory.fsync(file)) == "EIO"
    check_idle(mm.memory)


def test_who_faults_a_page_on_its_way_out_waits_and_gets_a_new_one(mm: Mm) -> None:
    map_file(mm)
    run(mm.load(at(0), 1))
    pfn, failing = pfn_of(mm, 0), mm.madvise(at(0), P, HWPOISON)
    for reason in (Reason.PROTECTION_PAGE, Reason.CLEAR):
        note = next(failing) if reason == Reason.PROTECTION_PAGE else failing.send(ANSWERED)
        assert isinstance(note, InvalidatePage)
        assert note.reason == reason
    load = mm.load(at(0), 4)
    assert isinstance(next(load), LockWait)
    with pytest.raises(StopIteration):
        failing.send(ANSWERED)
    with pytest.raises(StopIteration) as ended:
        load.send(ANSWERED)
    assert ended.value.value == bytes(4)
    assert pfn_of(mm, 0) != pfn
    check_idle(mm.memory)


def test_shared_memory_keeps_the_bad_page_so_that_it_is_no_hole(mm: Mm) -> None:
    file = map_file(mm, "shm")
    run(mm.store(at(0), b"gone"))
    fail(mm)
    assert errno_of(mm.load(at(0), 1)) == "ENXIO"
    run(mm.madvise(at(0), P, DONTNEED))
    assert errno_of(mm.load(at(0), 1)) == "ENXIO"
    assert run(mm.load(at(1), 1)) == b"\0", "what is around it is mapped"
    assert errno_of(mm.memory.write_file(file, 0, b"x")) == "EIO"
    with pytest.raises(MmError, match="EIO"):
        mm.memory.read_file(file, 0, 1)
    run(mm.memory.punch(file, 0, P))
    assert run(mm.load(at(0), 4)) == bytes(4)
    check_idle(mm.memory)


def test_an_anonymous_shared_page_is_lost(mm: Mm) -> None:
    fill(mm, 4, ANON_SHARED)
    fail(mm)
    assert errno_of(mm.load(at(0), 1)) == "ENXIO"
    run(mm.munmap(at(0), 4 * P))
    check_idle(mm.memory)


def test_a_private_copy_is_lost_and_the_file_is_not(mm: Mm) -> None:
    file = map_file(mm, "disk", 2)
    run(mm.store(at(0), b"mine"))
    fail(mm)
    assert errno_of(mm.load(at(0), 1)) == "ENXIO"
    assert mm.memory.read_file(file, 0, 4) == bytes(4)
    check_idle(mm.memory)


def test_a_page_that_swap_has_too_comes_back(mm: Mm) -> None:
    fill(mm)
    run(mm.madvise(at(0), P, PAGEOUT))
    run(mm.fork())
    assert run(mm.load(at(0), 6)) == b"page 0"
    pfn = fail(mm)
    assert run(mm.load(at(0), 6)) == b"page 0"
    assert pfn_of(mm, 0) != pfn
    check_idle(mm.memory)


def test_a_huge_page_is_split_and_only_one_page_lost() -> None:
    mm = machine(thp=Thp.MADVISE)
    block = (at(0) + PMD_SIZE - 1) & -PMD_SIZE
    run(mm.mmap(block, PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, PMD_SIZE, HUGEPAGE))
    run(mm.store(block, b"x" * PMD_SIZE))
    assert mm.pgtable.leaves[block // PMD_SIZE].huge
    notes = heard(mm.madvise(block + 5 * P, P, HWPOISON))
    assert notes == [
        InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR),
        InvalidatePage(mm, (block + 5 * P,), Reason.CLEAR),
    ]
    assert errno_of(mm.load(block + 5 * P, 1)) == "ENXIO"
    assert run(mm.load(block + 6 * P, 1)) == b"x"
    check_idle(mm.memory)


def test_a_huge_page_that_is_pinned_cannot_be_split() -> None:
    mm = machine(thp=Thp.MADVISE)
    block = (at(0) + PMD_SIZE - 1) & -PMD_SIZE
    run(mm.mmap(block, PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, PMD_SIZE, HUGEPAGE))
    pinned = run(device.pin(mm, block, block + P, True))
    assert errno_of(mm.madvise(block + P, P, HWPOISON)) == "EHWPOISON"
    assert errno_of(mm.madvise(block + 2 * P, P, SOFT_OFFLINE)) == "EBUSY"
    device.unpin(mm, pinned)
    run(mm.munmap(block, PMD_SIZE))
    check_idle(mm.memory)
    assert mm.memory.frames.hwpoison_nr == 1


def test_whoever_pins_the_page_keeps_it_and_the_caller_hears_of_it(mm: Mm) -> None:
    fill(mm)
    pfn = pfn_of(mm, 0)
    pinned = run(device.pin(mm, at(0), at(1), True))
    assert errno_of(mm.madvise(at(0), P, HWPOISON)) == "EBUSY"
    assert errno_of(mm.load(at(0), 1)) == "ENXIO"
    device.unpin(mm, pinned, dirty=True)
    run(mm.munmap(at(0), 4 * P))
    check_idle(mm.memory)
    assert pfn not in use_everything(mm.memory)


def test_a_locked_page_goes_as_well(mm: Mm) -> None:
    fill(mm)
    run(mm.mlock(at(0), 4 * P))
    fail(mm)
    assert errno_of(mm.load(at(0), 1)) == "ENXIO"
    check_idle(mm.memory)


def test_exporters_must_let_go(mm: Mm) -> None:
    fill(mm)
    pfn = Pfn(pfn_of(mm, 0))
    mm.memory.export(pfn, 5)
    assert heard(mm.madvise(at(0), P, HWPOISON)) == [
        InvalidatePage(mm, (at(0),), Reason.CLEAR),
        RmapInvalidatePage((pfn,), must_evict=True),
    ]
    assert not mm.memory.exporters(pfn)
    check_idle(mm.memory)


def test_frames_that_cannot_fail(mm: Mm) -> None:
    run(mm.mmap(at(0), 4 * P, RW, ANON_PRIVATE | FIXED))
    assert errno_of(mm.madvise(at(0), P, HWPOISON)) == "EBUSY", "the zero page"
    assert errno_of(mm.madvise(at(8), P, HWPOISON)) == "EFAULT"
    assert errno_of(mm.madvise(at(0) + 1, P, HWPOISON)) == "EINVAL"
    assert run(mm.madvise(at(0), 0, HWPOISON)) == 0
    assert errno_of(mm.memory.offline_page(1 << 40, 0)) == "ENXIO"
    assert errno_of(mm.memory.offline_page(1 << 40, 1)) == "EIO"


# By frame


@pytest.mark.parametrize("soft", [0, 1])
@pytest.mark.parametrize("nodes_nr", [1, 2])
def test_a_free_frame_is_taken_out(nodes_nr: int, soft: int) -> None:
    mm = machine(nodes_nr=nodes_nr)
    fill(mm)
    run(mm.munmap(at(0), 2 * P))
    frames = mm.memory.frames
    free, used_before, fresh = frames.free_nr, frames.free.latest(1)[0], frames.frames_nr - 7
    for pfn in (int(used_before), fresh):
        assert run(mm.memory.offline_page(pfn, soft)) == 0
    assert errno_of(mm.memory.offline_page(fresh, 0)) == "EHWPOISON"
    assert run(mm.memory.offline_page(fresh, 1)) == 0
    check_idle(mm.memory)
    assert frames.free_nr == free - 2
    assert use_everything(mm.memory).isdisjoint({used_before, fresh})


# Soft: the page moves first


def test_soft_offline_loses_nothing(mm: Mm) -> None:
    fill(mm)
    pfn = pfn_of(mm, 1)
    assert heard(mm.madvise(at(1), P, SOFT_OFFLINE)) == [InvalidatePage(mm, (at(1),), Reason.CLEAR)]
    assert run(mm.load(at(1), 6)) == b"page 1"
    assert pfn_of(mm, 1) != pfn
    assert mm.memory.frames.flags_at[pfn] & FAILED
    check_idle(mm.memory)
    assert pfn not in use_everything(mm.memory)


def test_soft_offline_of_pages_of_files(mm: Mm) -> None:
    file = map_file(mm)
    run(mm.store(at(0), b"dirty"))
    mapped, clean = pfn_of(mm, 0), mm.memory.file(file).cache.get(3)
    run(mm.memory.offline_page(mapped, 1))
    assert heard(mm.memory.offline_page(clean, 1)) == [], "nobody maps it: it is only forgotten"
    assert run(mm.load(at(0), 5)) == b"dirty"
    assert mm.memory.file(file).cache.get(3) == 0
    check_idle(mm.memory)


def test_soft_offline_of_what_cannot_move(mm: Mm) -> None:
    fill(mm)
    run(device.pin(mm, at(0), at(1), True))
    assert errno_of(mm.madvise(at(0), P, SOFT_OFFLINE)) == "EBUSY"
    assert run(mm.load(at(0), 6)) == b"page 0"
    assert mm.memory.frames.hwpoison_nr == 0
    check_idle(mm.memory)
