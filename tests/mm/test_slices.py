"""Long work is done in slices, and what runs between two of them finds everything in order."""

from __future__ import annotations

from mm.driver import ANON_PRIVATE, BASE, FIXED, RW, errno_of, run
from mmubusd.mm import Memory, check
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from mmubusd.mm.mm import Mm
from mmubusd.mm.notification import ANSWERED, SLICE_LEAVES, InvalidateRange, LockWait, Operation, Release, Reschedule

LENGTH = 3 * SLICE_LEAVES * PMD_SIZE
POPULATE = 0x8000


def large(memory: Memory, notified: bool = False) -> Mm:
    """An address space with one mapping of three slices, each page of it there."""
    mm = memory.create_mm("large")
    run(mm.mmap(BASE, LENGTH, RW, ANON_PRIVATE | FIXED | POPULATE))
    mm.notified = notified
    return mm


def steps(operation: Operation[object], memory: Memory) -> list[object]:
    """Run to the end, everything checked at each yield; what was yielded."""
    seen: list[object] = []
    answer = None
    try:
        while True:
            seen.append(operation.send(answer))  # type: ignore[arg-type]
            check.check_memory(memory)
            answer = ANSWERED
    except StopIteration:
        return seen


def turns(seen: list[object]) -> int:
    return sum(isinstance(step, Reschedule) for step in seen)


def test_populate_lets_others_run() -> None:
    memory = Memory(frames_nr=1 << 18)
    mm = memory.create_mm("large")
    seen = steps(mm.mmap(BASE, LENGTH, RW, ANON_PRIVATE | FIXED | POPULATE), memory)
    assert turns(seen) == len(seen) >= 2
    assert mm.present(BASE, BASE + LENGTH) == [(0, LENGTH >> PAGE_SHIFT)]


def test_munmap_tells_once_and_frees_after_it() -> None:
    memory = Memory(frames_nr=1 << 18)
    mm = large(memory, notified=True)
    free = memory.frames.free_nr
    operation = mm.munmap(BASE, LENGTH)
    told = False
    step = next(operation)
    try:
        while True:
            if isinstance(step, InvalidateRange):
                assert (step.start, step.end) == (BASE, BASE + LENGTH)
                assert memory.frames.free_nr == free, "nothing is freed before it was answered"
                assert memory.frames.quarantine_nr == LENGTH >> PAGE_SHIFT
                told = True
            else:
                assert isinstance(step, Reschedule)
            step = operation.send(ANSWERED)
    except StopIteration:
        assert told
    assert memory.frames.free_nr == free + (LENGTH >> PAGE_SHIFT)
    assert memory.frames.quarantine_nr == 0
    check.check_memory(memory)


def test_an_access_between_two_slices_waits_for_the_end() -> None:
    memory = Memory(frames_nr=1 << 18)
    mm = large(memory)
    unmap = mm.munmap(BASE, LENGTH)
    assert isinstance(next(unmap), Reschedule)
    access = mm.touch(BASE, PAGE_SIZE, "write")
    assert isinstance(next(access), LockWait)
    access.close()
    steps(unmap, memory)


def test_a_neighbour_that_merges_meanwhile_stays() -> None:
    """mprotect of the next mapping, between two slices, makes it mergeable with the one that is being unmapped."""
    memory = Memory(frames_nr=1 << 18)
    mm = memory.create_mm("large")
    run(mm.mmap(BASE, LENGTH, RW, ANON_PRIVATE | FIXED | POPULATE))
    run(mm.mmap(BASE + LENGTH, 16 * PAGE_SIZE, 1, ANON_PRIVATE | FIXED))
    unmap = mm.munmap(BASE, LENGTH)
    assert isinstance(next(unmap), Reschedule)
    run(mm.mprotect(BASE + LENGTH, 16 * PAGE_SIZE, RW))
    steps(unmap, memory)
    assert [(vma.start, vma.end) for vma in mm.mappings()] == [(BASE + LENGTH, BASE + LENGTH + 16 * PAGE_SIZE)]


def test_fork_and_exit_let_others_run() -> None:
    memory = Memory(frames_nr=1 << 18)
    mm = large(memory, notified=True)
    seen = steps(mm.fork("child"), memory)
    assert turns(seen) == 2
    child = next(other for other in memory.mms.values() if other is not mm)
    seen = steps(child.exit(), memory)
    assert turns(seen) >= 2
    seen = steps(mm.exit(), memory)
    assert turns(seen) >= 4
    assert isinstance(seen[0], Release)
    assert not memory.mms
    assert memory.frames.free_nr == memory.frames.frames_nr - 1


def test_touching_without_end_is_refused_when_the_tables_are_used_up() -> None:
    """Reading maps the zero page, which takes no frame; what it takes is tables."""
    memory = Memory(frames_nr=64)
    mm = memory.create_mm("sparse")
    length = 4 * memory.tables.max * PMD_SIZE
    run(mm.mmap(BASE, length, 1, ANON_PRIVATE | FIXED | POPULATE))  # errors of populating are ignored
    assert memory.tables.nr == memory.tables.max
    assert errno_of(mm.touch(BASE + length - PAGE_SIZE, PAGE_SIZE, "read")) == "ENOMEM"
    assert errno_of(mm.fork("child")) == "ENOMEM"
    assert len(memory.mms) == 1
    run(mm.munmap(BASE, length))
    assert memory.tables.nr == 0
    run(mm.mmap(BASE, PAGE_SIZE, 1, ANON_PRIVATE | FIXED))
    run(mm.touch(BASE, PAGE_SIZE, "read"))
    check.check_memory(memory)
