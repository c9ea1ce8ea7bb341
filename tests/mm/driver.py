"""What the tests of the core share: driving operations, and a device that mirrors what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mmubusd.mm import Memory, Mm, MmError, device
from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.notification import (
    ANSWERED,
    Answer,
    InvalidatePage,
    InvalidateRange,
    LockWait,
    Notification,
    Operation,
    Release,
    Reschedule,
    ranges,
)
from mmubusd.mm.pgtable import PFN_SHIFT, WRITE

T = TypeVar("T")

RW, ANON_PRIVATE, ANON_SHARED, FIXED = 3, 0x22, 0x21, 0x10
BASE = 0x200000000000


def at(page: int) -> int:
    """The address of a page of the arena."""
    return BASE + page * PAGE_SIZE


def run(operation: Operation[T], hear: Callable[[Notification], Answer | None] = lambda _: None) -> T:
    """Run an operation that nothing else contends with; hear() sees each notification and may answer it."""
    answer = None
    try:
        while True:
            step = operation.send(answer) if answer is not None else next(operation)
            assert not isinstance(step, LockWait), "nobody else holds a lock"
            answer = ANSWERED if isinstance(step, Reschedule) else hear(step) or ANSWERED
    except StopIteration as stop:
        return stop.value


def heard(operation: Operation[Any]) -> list[Notification]:
    """Run an operation; what it told."""
    notes: list[Notification] = []
    run(operation, lambda note: notes.append(note))
    return notes


def told(operation: Operation[Any]) -> list[tuple[int, int]]:
    """Run an operation; the ranges that it told of, in pages of the arena."""
    return [
        ((start - BASE) >> PAGE_SHIFT, (end - BASE) >> PAGE_SHIFT)
        for note in heard(operation)
        for start, end in ranges(note)
    ]


def errno_of(operation: Operation[Any]) -> str | None:
    try:
        run(operation)
    except MmError as error:
        return error.errno
    return None


class Mirror:
    """A device's shadow page table over every address space: (mm, vpn) to (pfn, generation, may write)."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.entries: dict[tuple[Mm, int], tuple[int, int, bool]] = {}

    def take(self, mm: Mm, start: int, entries: Any) -> None:
        """Keep what device.fault gave."""
        for page, entry in enumerate(entries.tolist()):
            pfn = entry & device.PFN_MASK
            held = pfn, self.memory.frames.generation_at[pfn], bool(entry & device.WRITE)
            self.entries[mm, (start >> PAGE_SHIFT) + page] = held

    def hear(self, note: Notification) -> Answer | None:
        """Let go of what a notification names."""
        if isinstance(note, Release):
            self._drop(note.mm, 0, 1 << 64)
        elif isinstance(note, InvalidateRange | InvalidatePage):
            for start, end in ranges(note):
                self._drop(note.mm, start, end)
        return None

    def _drop(self, mm: Mm, start: int, end: int) -> None:
        for key in [key for key in self.entries if key[0] is mm and start <= key[1] << PAGE_SHIFT < end]:
            del self.entries[key]

    def check_alive(self) -> None:
        """No frame that the device still has has been given to anyone else (NoUseAfterFree)."""
        for (mm, vpn), (pfn, generation, _) in self.entries.items():
            assert self.memory.frames.generation_at[pfn] == generation, f"{mm} page {vpn:#x}: frame {pfn} was freed"

    def check_current(self, unsettled: Callable[[Mm, int], bool] = lambda mm, vpn: False) -> None:
        """What the device has is what the page table says, apart from pages that it has yet to hear of."""
        self.check_alive()
        for (mm, vpn), (pfn, _, write) in self.entries.items():
            if not unsettled(mm, vpn):
                pte = mm.pgtable.get(vpn)
                assert pte >> PFN_SHIFT == pfn, f"{mm} page {vpn:#x}: the device has frame {pfn}"
                assert pte, f"{mm} page {vpn:#x}: the device has a page that is not there"
                assert not write or pte & WRITE, f"{mm} page {vpn:#x}: the device may write, the CPU not"
