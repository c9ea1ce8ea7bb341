"""Every place of the kernel that calls its notifiers, and what is told there: the rows of docs/call-sites.md.

Each test runs one call and looks at what it yields: kind, range, reason, owner, whether it may be refused; and with
`freed_after_the_answer` that the frames were still in use when it was yielded.
"""

from __future__ import annotations

from typing import Any

import pytest
from mm.driver import ANON_PRIVATE, ANON_SHARED, FIXED, RW, at, heard, run
from mmubusd.mm import Memory, Mm, device, device_exclusive
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.huge_memory import Thp
from mmubusd.mm.madvise import (
    COLD,
    COLLAPSE,
    DONTNEED,
    FREE,
    HUGEPAGE,
    MERGEABLE,
    PAGEOUT,
    POPULATE_READ,
    POPULATE_WRITE,
    REMOVE,
)
from mmubusd.mm.notification import (
    ANSWERED,
    AgePage,
    InvalidatePage,
    InvalidateRange,
    Notification,
    Operation,
    Reason,
    Release,
    RmapInvalidatePage,
    Section,
)
from mmubusd.mm.oom import reap
from mmubusd.mm.pgtable import PFN_SHIFT
from mmubusd.mm.reclaim import reclaim
from mmubusd.mm.soft_dirty import EVERYTHING
from mmubusd.mm.vmscan import shrink

P, OWNER = PAGE_SIZE, 9


def machine(profile: str = "mainline", **options: Any) -> Mm:
    mm = Memory(frames_nr=4096, swap_slots_nr=256, nodes_nr=2, profile=profile, **options).create_mm("test")
    mm.notified = True
    return mm


@pytest.fixture
def mm() -> Mm:
    return machine()


def fill(mm: Mm, pages: int = 4, flags: int = ANON_PRIVATE) -> None:
    run(mm.mmap(at(0), pages * P, RW, flags | FIXED))
    run(mm.store(at(0), b"x" * (pages * P)))
    mm.memory.lru.drain()


def file_mapped(mm: Mm, kind: str = "disk", shared: bool = True) -> Any:
    file = mm.memory.create_file("f", kind, 4)
    run(mm.mmap(at(0), 4 * P, RW, (1 if shared else 2) | FIXED, file, 0))
    run(mm.store(at(0), b"x" * 4 * P))
    mm.memory.lru.drain()
    return file


def huge(mm: Mm) -> int:
    block = (at(0) + PMD_SIZE - 1) & -PMD_SIZE
    run(mm.mmap(block - PMD_SIZE, 3 * PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.madvise(block, PMD_SIZE, HUGEPAGE))
    run(mm.store(block, b"huge"))
    return block


def pfn_at(mm: Mm, address: int) -> int:
    return mm.pgtable.get(address >> PAGE_SHIFT) >> PFN_SHIFT


def cleared(mm: Mm, start: int, end: int, reason: Reason = Reason.CLEAR, **more: Any) -> InvalidateRange:
    return InvalidateRange(mm, at(start), at(end), reason, **more)


def freed_after_the_answer(mm: Mm, operation: Operation[Any], note: Notification) -> None:
    """The first thing that is told is this, and no frame has been freed before it is answered."""
    free = mm.memory.frames.free_nr
    assert next(operation) == note
    assert mm.memory.frames.free_nr == free
    try:
        while True:
            operation.send(ANSWERED)
    except StopIteration:
        pass
    assert mm.memory.frames.free_nr > free


# The seed's part 2: invalidate_range


def test_remap_file_pages(mm: Mm) -> None:
    fill(mm, 4, ANON_SHARED)
    assert heard(mm.remap_file_pages(at(0), P, 0, 2))[0] == cleared(mm, 0, 1, Reason.UNMAP)


def test_dontneed(mm: Mm) -> None:
    fill(mm)
    freed_after_the_answer(mm, mm.madvise(at(1), 2 * P, DONTNEED), cleared(mm, 1, 3))


@pytest.mark.parametrize("profile", ["mainline", "v3"])
def test_truncate_under_a_spinlock(profile: str) -> None:
    mm = machine(profile)
    file = file_mapped(mm)
    notes = heard(mm.memory.ftruncate(file, P))
    assert notes[0] == cleared(mm, 1, 4, lock=profile == "v3")


def test_truncate_tells_each_address_space(mm: Mm) -> None:
    file = file_mapped(mm)
    child = run(mm.fork())
    child.notified = True
    assert {note.mm for note in heard(mm.memory.ftruncate(file, P))} == {mm, child}


def test_hole_punching(mm: Mm) -> None:
    file = file_mapped(mm, "shm")
    assert heard(mm.memory.punch(file, P, P))[0] == cleared(mm, 1, 2)
    assert heard(mm.madvise(at(2), P, REMOVE))[0] == cleared(mm, 2, 3)


def test_munmap(mm: Mm) -> None:
    fill(mm)
    freed_after_the_answer(mm, mm.munmap(at(0), 2 * P), cleared(mm, 0, 2, Reason.UNMAP))


def test_munmap_of_several_mappings_is_told_once(mm: Mm) -> None:
    fill(mm)
    run(mm.munmap(at(1), P))
    assert heard(mm.munmap(at(0), 4 * P)) == [cleared(mm, 0, 4, Reason.UNMAP)]


def test_mmap_over(mm: Mm) -> None:
    fill(mm)
    freed_after_the_answer(mm, mm.mmap(at(1), P, RW, ANON_PRIVATE | FIXED), cleared(mm, 1, 2, Reason.UNMAP))


def test_brk_shrinks(mm: Mm) -> None:
    run(mm.brk(mm.brk_start + 4 * P))
    run(mm.store(mm.brk_start, b"heap"))
    assert heard(mm.brk(mm.brk_start)) == [InvalidateRange(mm, mm.brk_start, mm.brk_start + 4 * P, Reason.UNMAP)]


def test_what_was_empty_is_filled_silently(mm: Mm) -> None:
    """remap_pfn_range and apply_to_page_range of the seed told of ranges where nothing had been."""
    run(mm.mmap(at(0), 8 * P, RW, ANON_PRIVATE | FIXED))
    assert heard(mm.madvise(at(0), 4 * P, POPULATE_WRITE)) == []
    assert heard(mm.madvise(at(4), 2 * P, POPULATE_READ)) == []
    file = mm.memory.create_file("medium", "xip", 2)
    run(mm.memory.write_file(file, 0, b"medium"))
    run(mm.mmap(at(10), 2 * P, 1, 1 | FIXED, file, 0))
    assert heard(mm.load(at(10), 6)) == []


def test_a_right_that_grows_and_munlock_and_cold_are_silent(mm: Mm) -> None:
    fill(mm)
    run(mm.mlock(at(0), P))
    assert heard(mm.munlock(at(0), P)) == []
    assert heard(mm.madvise(at(0), P, COLD)) == []
    run(mm.clear_refs(4))
    assert heard(mm.store(at(0), b"mine alone")) == []


def test_copy_on_write(mm: Mm) -> None:
    fill(mm)
    run(mm.fork())
    old = pfn_at(mm, at(1))
    operation = mm.store(at(1), b"new")
    assert next(operation) == cleared(mm, 1, 2)
    assert pfn_at(mm, at(1)) == old, "the new page is not visible before the answer"
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)
    assert pfn_at(mm, at(1)) != old


def test_write_over_the_zero_page(mm: Mm) -> None:
    run(mm.mmap(at(0), P, RW, ANON_PRIVATE | FIXED))
    run(mm.load(at(0), 1))
    assert heard(mm.store(at(0), b"x")) == [cleared(mm, 0, 1)]


def test_munmap_of_a_huge_page() -> None:
    mm = machine(thp=Thp.MADVISE)
    block = huge(mm)
    note = InvalidateRange(mm, block, block + PMD_SIZE, Reason.UNMAP)
    assert note in heard(mm.munmap(block, PMD_SIZE))


# Aging and reclaim


def aged(mm: Mm) -> list[Notification]:
    return [note for note in heard(shrink(mm.memory, 8)) if not isinstance(note, Section)]


def test_page_referenced(mm: Mm) -> None:
    fill(mm, 8)
    first = aged(mm)[0]
    assert isinstance(first, AgePage)
    assert set(first.addresses) == {at(page) for page in range(8)}


def test_reclaim_tells_of_single_pages(mm: Mm) -> None:
    fill(mm)
    free = mm.memory.frames.free_nr
    assert heard(mm.madvise(at(0), 4 * P, PAGEOUT)) == [
        InvalidatePage(mm, tuple(at(page) for page in range(4)), Reason.CLEAR)
    ]
    assert mm.memory.frames.free_nr == free + 4


def test_the_seed_asks_for_the_age_again_inside_try_to_unmap() -> None:
    kinds = {}
    for profile in ("mainline", "v3"):
        mm = machine(profile)
        fill(mm, 1)
        pfn = pfn_at(mm, at(0))
        victims = [(pfn, int(mm.memory.frames.generation[pfn]))]
        kinds[profile] = [type(note) for note in heard(reclaim(mm.memory, victims, under_pressure=True, asks=True))]
    assert kinds["mainline"] == [InvalidatePage]
    assert kinds["v3"][0] is AgePage


def test_page_mkclean(mm: Mm) -> None:
    file = file_mapped(mm)
    operation = mm.memory.fsync(file)
    assert next(operation) == InvalidatePage(mm, tuple(at(page) for page in range(4)), Reason.PROTECTION_PAGE)
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)


@pytest.mark.parametrize(("call", "must_evict"), [("fsync", True), ("pageout", False)])
def test_exporters_are_asked(mm: Mm, call: str, must_evict: bool) -> None:
    file = file_mapped(mm)
    pfn = pfn_at(mm, at(0))
    mm.memory.export(pfn, OWNER)  # type: ignore[arg-type]
    operation = mm.memory.fsync(file) if call == "fsync" else mm.madvise(at(0), P, PAGEOUT)
    assert RmapInvalidatePage((pfn,), must_evict) in heard(operation)  # type: ignore[arg-type]


def test_the_last_unmap_asks_exporters(mm: Mm) -> None:
    fill(mm)
    pfn = pfn_at(mm, at(0))
    mm.memory.export(pfn, OWNER)  # type: ignore[arg-type]
    assert RmapInvalidatePage((pfn,), True) in heard(mm.munmap(at(0), P))  # type: ignore[arg-type]


def test_a_hole_of_an_execute_in_place_file_is_filled(mm: Mm) -> None:
    file = mm.memory.create_file("medium", "xip", 1)
    run(mm.mmap(at(0), P, RW, 1 | FIXED, file, 0))
    run(mm.load(at(0), 1))
    assert heard(mm.store(at(0), b"x")) == [InvalidatePage(mm, (at(0),), Reason.CLEAR)]


def test_oom_reaper_may_be_refused(mm: Mm) -> None:
    fill(mm)
    run(mm.mmap(at(8), P, RW, ANON_SHARED | FIXED))
    assert heard(reap(mm)) == [cleared(mm, 0, 4, Reason.UNMAP, blockable=False)]


# Exit


def test_exit(mm: Mm) -> None:
    fill(mm)
    operation = mm.exit()
    free = mm.memory.frames.free_nr
    assert next(operation) == Release(mm)
    assert mm.present(at(0), at(4)) == [(0, 4)]
    assert operation.send(ANSWERED) == InvalidateRange(mm, 0, TASK_SIZE, Reason.UNMAP)
    assert mm.memory.frames.free_nr == free
    with pytest.raises(StopIteration):
        operation.send(ANSWERED)


# Mainline


def test_lazy_free(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.madvise(at(0), 2 * P, FREE)) == [cleared(mm, 0, 2)]


def test_mprotect(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.mprotect(at(0), 4 * P, 1)) == [cleared(mm, 0, 4, Reason.PROTECTION_VMA)]
    run(mm.mmap(at(1 << 19), P, RW, ANON_PRIVATE | FIXED))
    assert heard(mm.mprotect(at(1 << 19), P, 1)) == [], "no table there"


def test_mremap_tells_of_the_old_range(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.mremap(at(0), P, P, 3, at(20)))[0] == cleared(mm, 0, 1, Reason.UNMAP)


def test_fork_tells_the_parent(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.fork()) == [cleared(mm, 0, 4, Reason.PROTECTION_PAGE)]
    shared = machine()
    fill(shared, 4, ANON_SHARED)
    assert heard(shared.fork()) == [], "not a copy-on-write mapping"


def test_migration(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.move_pages(at(0), P, 1)) == [InvalidatePage(mm, (at(0),), Reason.CLEAR)]


def test_ksm(mm: Mm) -> None:
    fill(mm, 2)
    run(mm.madvise(at(0), 2 * P, MERGEABLE))
    protected, again, replaced = heard(mm.memory.ksm_scan())
    assert (protected, again, replaced) == (cleared(mm, 0, 1), cleared(mm, 1, 2), cleared(mm, 1, 2))


def test_huge_page_split() -> None:
    mm = machine(thp=Thp.MADVISE)
    block = huge(mm)
    notes = heard(mm.mprotect(block, P, 1))
    assert InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR) in notes
    assert notes[-1] == InvalidateRange(mm, block, block + P, Reason.PROTECTION_VMA)


def test_huge_page_collapse() -> None:
    mm = machine(thp=Thp.MADVISE)
    block = (at(0) + PMD_SIZE - 1) & -PMD_SIZE
    run(mm.mmap(block, PMD_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.store(block, b"small"))
    assert InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR) in heard(mm.madvise(block, PMD_SIZE, COLLAPSE))


def test_write_to_a_shared_huge_page_splits_it() -> None:
    mm = machine(thp=Thp.MADVISE)
    block = huge(mm)
    run(mm.fork())
    notes = heard(mm.store(block, b"mine"))
    assert notes[0] == InvalidateRange(mm, block, block + PMD_SIZE, Reason.CLEAR)


def test_soft_dirty(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.clear_refs(4)) == [InvalidateRange(mm, 0, EVERYTHING, Reason.SOFT_DIRTY)]


def test_userfaultfd_write_protection(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.uffd_writeprotect(at(0), P, 1)) == [cleared(mm, 0, 1, Reason.PROTECTION_VMA)]


def test_migrate_vma(mm: Mm) -> None:
    fill(mm)
    assert heard(mm.migrate_to_device(at(0), at(2), OWNER)) == [cleared(mm, 0, 2, Reason.MIGRATE, owner=OWNER)]


def test_migrate_vma_into_holes(mm: Mm) -> None:
    run(mm.mmap(at(0), 4 * P, RW, ANON_PRIVATE | FIXED))
    run(mm.store(at(0), b"x"))
    notes = heard(mm.migrate_to_device(at(0), at(4), OWNER))
    assert notes == [cleared(mm, 0, 4, Reason.MIGRATE, owner=OWNER), cleared(mm, 1, 4, Reason.MIGRATE, owner=OWNER)]


def test_a_long_term_pin_of_coherent_memory(mm: Mm) -> None:
    fill(mm)
    notes = heard(mm.migrate_to_device(at(0), at(2), OWNER, coherent=True))
    assert notes == [cleared(mm, 0, 2, Reason.MIGRATE, owner=OWNER)]
    assert heard(mm.store(at(0), b"by the CPU")) == []
    assert heard(device.pin(mm, at(0), at(1), True)) == [InvalidatePage(mm, (at(0),), Reason.CLEAR)]


def test_cpu_fault_on_a_device_page(mm: Mm) -> None:
    fill(mm)
    run(mm.migrate_to_device(at(0), at(1), OWNER))
    assert heard(mm.load(at(0), 1)) == [cleared(mm, 0, 1, Reason.MIGRATE)]


def test_make_exclusive_and_take_it_back(mm: Mm) -> None:
    fill(mm)
    assert heard(device_exclusive.make_exclusive(mm, at(0), at(1), OWNER)) == [
        cleared(mm, 0, 1, Reason.EXCLUSIVE, owner=OWNER)
    ]
    assert heard(mm.store(at(0), b"x")) == [cleared(mm, 0, 1, Reason.EXCLUSIVE)]


def test_pins_unshare(mm: Mm) -> None:
    fill(mm, 1)
    run(mm.fork())
    assert heard(device.pin(mm, at(0), at(1), False)) == [cleared(mm, 0, 1)]
