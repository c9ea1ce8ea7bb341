"""Several need a frame when none is free: they wait for who is reclaiming, and give up when nobody gets anywhere."""

from __future__ import annotations

from mm.driver import ANON_PRIVATE, FIXED, RW, at, run
from mmubusd.mm import Memory, Mm, MmError
from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.check import check_idle, check_memory
from mmubusd.mm.frame import QUARANTINE
from mmubusd.mm.madvise import DONTNEED
from mmubusd.mm.notification import ANSWERED, AgePage, InvalidatePage, InvalidateRange, LockWait, Operation
from mmubusd.mm.vmscan import make_room


def full(frames_nr: int, swap_slots_nr: int) -> Mm:
    """An address space that has every frame, and is notified."""
    mm = Memory(frames_nr=frames_nr, swap_slots_nr=swap_slots_nr).create_mm("test")
    mm.notified = True
    pages = mm.memory.frames.free_nr
    run(mm.mmap(at(0), pages * PAGE_SIZE, RW, ANON_PRIVATE | FIXED))
    run(mm.touch(at(0), pages * PAGE_SIZE, "write"))
    assert not mm.memory.frames.free_nr
    return mm


class Running:
    """An operation, step by step. Attributes: step: what it waits for; ended: whether it has, and with what errno."""

    def __init__(self, operation: Operation[None]) -> None:
        self._operation = operation
        self.step: object = None
        self.ended = False
        self.errno = ""

    @property
    def blocked(self) -> bool:
        return isinstance(self.step, LockWait) and not self.step.ticket.granted

    def resume(self) -> None:
        """One step more; whatever was told is answered, and nothing is young."""
        try:
            self.step = next(self._operation) if self.step is None else self._operation.send(ANSWERED)
        except StopIteration:
            self.ended = True
        except MmError as error:
            self.ended, self.errno = True, error.errno

    def run_until(self, kind: type) -> None:
        while not self.ended and (self.step is None or not isinstance(self.step, kind)):
            self.resume()


def test_who_finds_nothing_waits_for_who_is_reclaiming_it() -> None:
    mm = full(32, 64)
    first, second = Running(make_room(mm.memory)), Running(make_room(mm.memory))
    first.run_until(InvalidatePage)  # it has isolated all that there is
    second.run_until(LockWait)
    assert second.blocked
    while not first.ended:
        first.resume()
    assert not second.blocked
    while not second.ended:
        second.resume()
    assert not first.errno
    assert not second.errno


def test_a_page_that_is_unmapped_while_it_is_asked_if_it_is_young_goes_to_no_slot() -> None:
    """Found by the mixed soak: it stayed in the swap cache, and in quarantine, for ever."""
    mm = full(32, 64)
    reclaiming = Running(make_room(mm.memory))
    reclaiming.run_until(AgePage)
    assert isinstance(reclaiming.step, AgePage)
    asked = set(reclaiming.step.addresses)
    dropping = Running(mm.madvise(at(0), 31 * PAGE_SIZE, DONTNEED))
    dropping.run_until(InvalidateRange)
    check_memory(mm.memory)
    assert {pfn for pfn in range(1, 32) if mm.memory.frames.flags_at[pfn] & QUARANTINE}
    while not reclaiming.ended:
        reclaiming.resume()
        check_memory(mm.memory)
    while not dropping.ended:
        dropping.resume()
    assert asked
    assert not mm.memory.swap.used_nr
    check_idle(mm.memory)


def test_those_who_only_wait_for_each_other_give_up() -> None:
    mm = full(32, 0)  # without swap nothing of it can go
    running = [Running(make_room(mm.memory)) for _ in range(3)]
    for _ in range(10_000):
        for one in running:
            if not one.ended and not one.blocked:
                one.resume()
    assert [one.errno for one in running] == ["ENOMEM"] * 3
    assert not mm.memory.reclaimers
