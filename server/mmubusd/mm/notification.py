"""What an operation of the memory manager yields, and what is sent back into it.

An operation is a generator (`Operation`). It yields a notification where the kernel would call the notifier chain, and
is resumed by `send(Answer(...))` when everyone concerned has answered. What the notification covers must stay barred
(no translation of it handed out) until the operation has been *resumed and has yielded or ended again*: some changes,
such as a copy-on-write, are made just after the answer.

A `LockWait` asks for no answer: the operation is resumed, with any Answer, once `ticket.granted` is true; tickets that
became granted are collected in `Memory.granted`. A `Reschedule` asks for nothing but a turn for others.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mmubusd.mm.addr import PAGE_SIZE, Pfn

if TYPE_CHECKING:
    from mmubusd.mm.mm import Mm
    from mmubusd.mm.range_lock import Ticket


class Reason(StrEnum):
    """Why translations become invalid. Kernel: enum mmu_notifier_event, v6.12, and what it does not tell apart."""

    UNMAP = "unmap"  # munmap, mmap over, mremap's source, brk, exit: the VMA goes too
    CLEAR = "clear"  # the page is replaced or dropped, the VMA stays: COW, DONTNEED, truncate, reclaim
    PROTECTION_VMA = "protection_vma"  # mprotect
    PROTECTION_PAGE = "protection_page"  # fork, writeback: rights shrink page by page, the VMA's stay
    SOFT_DIRTY = "soft_dirty"
    RELEASE = "release"
    MIGRATE = "migrate"
    EXCLUSIVE = "exclusive"


class InvalidateRange(NamedTuple):
    """Translations in [start, end) of mm are or become void.

    lock: the seed's `lock=1`: raised where the seed held a spinlock. blockable: false where the caller may not wait;
    only then may the answer be `refused`. owner: whoever caused it itself and need not hear (0: nobody).
    """

    mm: Mm
    start: int
    end: int
    reason: Reason
    lock: bool = False
    blockable: bool = True
    owner: int = 0


@dataclass(frozen=True, slots=True)
class InvalidatePage:
    """Single pages of mm, in this order: reclaim (CLEAR) or write-protection for writeback (PROTECTION_PAGE)."""

    mm: Mm
    addresses: tuple[int, ...]
    reason: Reason


@dataclass(frozen=True, slots=True)
class AgePage:
    """Has anyone used these pages since the last time? Clears the mark. Kernel: clear_flush_young().

    huge: blocks of 2 MiB that a PMD maps, each asked about as one range: it is young if anything of it is.
    """

    mm: Mm
    addresses: tuple[int, ...]
    huge: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ClearYoung:
    """As AgePage without the flush. Kernel: clear_young()."""

    mm: Mm
    addresses: tuple[int, ...]
    huge: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TestYoung:
    """As AgePage without clearing. Kernel: test_young()."""

    mm: Mm
    addresses: tuple[int, ...]
    huge: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RmapInvalidatePage:
    """Exporters of these frames let go of them; with must_evict none may refuse."""

    pfns: tuple[Pfn, ...]
    must_evict: bool


@dataclass(frozen=True, slots=True)
class Release:
    """The address space ends; nothing of it has been freed yet."""

    mm: Mm


@dataclass(frozen=True, slots=True)
class LockWait:
    """The operation waits for a range lock; resume it when ticket.granted."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Reschedule:
    """Long work lets others run; resume it, with any Answer, when it is its turn again. Kernel: cond_resched()."""


RESCHEDULE = Reschedule()


@dataclass(frozen=True, slots=True)
class Section:
    """Begin or end something of its own inside an operation, such as reclaim inside a fault; resume it at once.

    What the rounds inside covered may be handed out again when the section has ended.
    """

    begins: bool


BEGIN_SECTION, END_SECTION = Section(True), Section(False)
SLICE_LEAVES = 64
SLICE_PAGES = 1024
"""What is done between two turns, one to three milliseconds: leaf tables by array operations, or pages one by one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What all who were asked said together. Each notification reads only its own field.

    refused: a non-blockable InvalidateRange was refused by someone; young: addresses (of AgePage and its kin, of
    pages and of blocks) that someone used; refused_pfns: frames of a RmapInvalidatePage that stay exported.
    """

    refused: bool = False
    young: frozenset[int] = frozenset()
    refused_pfns: frozenset[Pfn] = frozenset()


ANSWERED = Answer()
"""The answer when nobody had anything to say."""

Notification = InvalidateRange | InvalidatePage | AgePage | ClearYoung | TestYoung | RmapInvalidatePage | Release

T = TypeVar("T")
Operation = Generator[Notification | LockWait | Reschedule | Section, Answer, T]
"""A call on the memory manager: yields what others must hear, returns its value, raises MmError."""


def ranges(notification: Notification) -> list[tuple[int, int]]:
    """The [start, end) byte ranges that the recorded kernel would report for it, in order; else nothing."""
    if isinstance(notification, InvalidateRange):
        return [(notification.start, notification.end)]
    if isinstance(notification, InvalidatePage):
        return [(address, address + PAGE_SIZE) for address in notification.addresses]
    return []
