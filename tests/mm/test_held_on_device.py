"""A page in a device's own memory that the CPU comes to, and that somebody holds: nobody waits for ever."""

from __future__ import annotations

import pytest
from mm.driver import ANON_PRIVATE, BASE, FIXED, RW, at, errno_of, run
from mmubusd.mm import Memory, Mm
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle
from mmubusd.mm.madvise import DONTNEED
from mmubusd.mm.notification import ANSWERED, RESCHEDULE, InvalidateRange
from mmubusd.mm.pgtable import PFN_SHIFT

OWNER = 7


def on_the_device() -> tuple[Memory, Mm, int]:
    """One page with bytes, in the device's memory. Returns: also its frame there."""
    memory = Memory(frames_nr=64)
    mm = memory.create_mm("program")
    run(mm.mmap(BASE, PAGE_SIZE, RW, ANON_PRIVATE | FIXED, 0, 0))
    run(mm.store(at(0), b"kept"))
    assert run(mm.migrate_to_device(at(0), at(1), OWNER)) == 1
    return memory, mm, mm.pgtable.get(BASE // PAGE_SIZE) >> PFN_SHIFT


def test_a_page_leaves_a_frame_that_is_withheld_from_a_fenced_device() -> None:
    """The frame may not be given to anybody else yet; the page may move."""
    memory, mm, frame = on_the_device()
    memory.frames.withhold([frame])
    assert run(mm.load(at(0), 4)) == b"kept"
    assert memory.frames.refcount_at[frame] == 1
    memory.frames.let_go([frame])
    assert memory.frames.refcount_at[frame] == 0


def test_a_page_that_leaves_when_a_round_has_ended_is_waited_for() -> None:
    """A forked sibling drops the page: its round holds it. Found by the mixed soak, as a bus error of a child."""
    memory, mm, _ = on_the_device()
    child = run(mm.fork("child"))
    child.notified = True
    dropping = child.madvise(at(0), PAGE_SIZE, DONTNEED)
    assert isinstance(next(dropping), InvalidateRange)
    load = mm.load(at(0), 4)
    for _ in range(3):
        assert next(load) is RESCHEDULE
    with pytest.raises(StopIteration):
        dropping.send(ANSWERED)
    assert run(load) == b"kept"
    check_idle(memory)


def test_a_page_that_does_not_leave_the_device_is_a_bus_error() -> None:
    memory, mm, frame = on_the_device()
    memory.frames.get(frame)  # a reference that nobody accounts for
    assert errno_of(mm.load(at(0), 4)) == "ENXIO"
    memory.frames.put(frame)
    assert run(mm.load(at(0), 4)) == b"kept"
