"""Notifiers: what a driver subclasses. The methods have the kernel's names; the overridden ones are registered.

    class Driver(mmubus.Notifier):
        def invalidate_range(self, mm, start, end, lock):
            self.tlb.drop(start, end)

A method may be plain or async. The acknowledgement is sent when it has returned, never before: from then on the page
frames may belong to somebody else. Plain methods are the fast ones: they run where the notice is read, without a
task.

What a method returns is its answer:

    release, invalidate_all            nothing
    invalidate_page, invalidate_range,
    invalidate_range_start             nothing, True (dirty), or the addresses of the pages that the device wrote
    age_page                           bool: was the page used since the last time?
    clear_flush_young, clear_young,
    test_young                         bool, or the addresses of the pages that are young
    rmap invalidate_page               nothing, or True when the device wrote to the page
    any of them                        raise Refuse (where refusing is allowed) or Busy (call me again)

An exception is reported to the server and logged. The notice then counts as not done: when its budget is over the
session is fenced, unless the server asks again and the method succeeds. Nothing is acknowledged that was not done.

Several notices run at the same time when their methods are async and their ranges are disjoint; where they overlap,
they run in order. A method must be idempotent: a notice may come twice, and may name more than the notifier asked
for.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from mmubus.linux import TASK_SIZE, NotifierOp, Reason

if TYPE_CHECKING:
    from mmubus.registration import Registration

__all__ = ["Answer", "Notifier", "NotifierRange", "RmapNotifier", "ops_of"]

log = logging.getLogger("mmubus")

Answer: TypeAlias = "bool | Iterable[int] | Awaitable[bool | Iterable[int] | None] | None"
"""What a handler may return."""


@dataclass(frozen=True, slots=True)
class NotifierRange:
    """Mainline's struct mmu_notifier_range: what is invalidated, why, and whether the answer may wait.

    Attributes:
        mm: the address space.
        start, end: bytes, half-open; may be wider than what was registered.
        reason: why.
        blockable: False: must not wait; raise Refuse instead.
        owner: who caused a MIGRATE or EXCLUSIVE; 0: nobody.
        round: the same number in a start and its end.
        seq: the notice's number in this session.
    """

    mm: int
    start: int
    end: int
    reason: Reason
    blockable: bool
    owner: int
    round: int
    seq: int


class _Ops:
    """What both kinds of notifier have."""

    registration: Registration | None = None
    """The latest registration, set by `Bus.register`; None before."""

    slips: Collection[str] = ()
    """Ops that it lacks on purpose ("age_page": the device has no accessed bits): no warning is raised about them."""

    def invalidated_everything(self, why: str) -> Answer:
        """Everything that was held is void: after a lost session, a fence, or a flush of what could not be kept apart.

        Not an op: always called, whatever is registered. For a flush notice the acknowledgement is sent when it
        returns. Unless overridden it calls the widest op that the notifier has.
        """
        raise NotImplementedError

    def jeopardy(self, endangered: bool) -> None:
        """The connection is broken or silent (True), or well again (False). What is held must not be used while it is
        True: the server may give the frames to somebody else as soon as the session's grace period is over.
        """


class Notifier(_Ops):
    """A notifier of one address space. Override the ops you implement; see the module for what they return."""

    ops: Collection[NotifierOp] | None = None
    """Register only these of the overridden ops; None: all of them."""

    def invalidated_everything(self, why: str) -> Answer:
        mm = self.registration.mm if self.registration is not None else 0
        ops = ops_of(self)
        if NotifierOp.INVALIDATE_ALL in ops:
            return self.invalidate_all(mm)
        if NotifierOp.INVALIDATE_RANGE in ops:
            return self.invalidate_range(mm, 0, TASK_SIZE, False)
        if NotifierOp.INVALIDATE_RANGE_START in ops:
            return _start_and_end(self, NotifierRange(mm, 0, TASK_SIZE, Reason.CLEAR, True, 0, 0, 0))
        if NotifierOp.INVALIDATE_PAGE in ops:
            log.warning(
                "%s is told that everything is void (%s) and has no op for more than a page; "
                "override invalidated_everything",
                type(self).__name__,
                why,
            )
        return None

    def release(self, mm: int) -> Answer:
        """Seed: the address space ends. Asked before its first page is freed; unregistering here is legal."""

    def age_page(self, mm: int, address: int) -> Answer:
        """Seed: was the page used since the last time? Clears the mark."""

    def invalidate_page(self, mm: int, address: int) -> Answer:
        """Seed: one page is taken away or write-protected."""

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Answer:
        """Seed: a range is taken away. With lock, the caller holds a spinlock: do not wait, do not call back."""

    def invalidate_all(self, mm: int) -> Answer:
        """Seed 6/6: everything is taken away; the first thing at exit."""

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        """Mainline: drop the range, and make no new use of it until the matching end."""

    def invalidate_range_end(self, range: NotifierRange) -> Answer:
        """Mainline: the range may be used again. Needs no answer."""

    def clear_flush_young(self, mm: int, start: int, end: int) -> Answer:
        """Mainline: clear the accessed marks of the range and drop cached translations. Which pages were young?

        The range is a page, or a huge page: that is young if anything of it is.
        """

    def clear_young(self, mm: int, start: int, end: int) -> Answer:
        """Mainline: clear the accessed marks of the range. Which pages were young?"""

    def test_young(self, mm: int, start: int, end: int) -> Answer:
        """Mainline: which pages are young? Clears nothing."""


class RmapNotifier(_Ops):
    """A notifier on the global rmap list: told of pages that were exported, by frame, whatever address they have."""

    def invalidated_everything(self, why: str) -> Answer:
        pages = sorted(self.registration.exported) if self.registration is not None else []
        return _evict(self, pages) if pages else None

    def invalidate_page(self, page: int, must_evict: bool) -> Answer:
        """Seed 3/6: an exported page is taken away. The page lock is held.

        Args:
            page: its pfn.
            must_evict: True: may not be refused (write-protection, the last unmap); False: Refuse keeps it in place.
        """


METHODS = {
    NotifierOp.RELEASE: "release",
    NotifierOp.AGE_PAGE: "age_page",
    NotifierOp.INVALIDATE_PAGE: "invalidate_page",
    NotifierOp.INVALIDATE_RANGE: "invalidate_range",
    NotifierOp.INVALIDATE_ALL: "invalidate_all",
    NotifierOp.INVALIDATE_RANGE_START: "invalidate_range_start",
    NotifierOp.INVALIDATE_RANGE_END: "invalidate_range_end",
    NotifierOp.CLEAR_FLUSH_YOUNG: "clear_flush_young",
    NotifierOp.CLEAR_YOUNG: "clear_young",
    NotifierOp.TEST_YOUNG: "test_young",
}


def ops_of(notifier: Notifier) -> list[NotifierOp]:
    """The ops that a notifier implements: those that its class (or the object itself) overrides.

    Kernel: a NULL op in struct mmu_notifier_ops.
    """
    found = []
    for op, method in METHODS.items():
        if notifier.ops is not None and op not in notifier.ops:
            continue
        mine = getattr(notifier, method)
        if getattr(mine, "__func__", mine) is not getattr(Notifier, method):
            found.append(op)
    return found


async def _evict(notifier: RmapNotifier, pages: Sequence[int]) -> list[int]:
    """Take every page away, one by one. Returns: those that are dirty."""
    dirty: list[int] = []
    for page in pages:
        answer = notifier.invalidate_page(page, True)
        result = await answer if isinstance(answer, Awaitable) else answer
        if result:
            dirty.extend((page,) if result is True else result)
    if notifier.registration is not None:
        notifier.registration.exported.difference_update(pages)
    return dirty


def _start_and_end(notifier: Notifier, everything: NotifierRange) -> Answer:
    """A start with its end at once, for what will never be told in detail."""
    answer = notifier.invalidate_range_start(everything)
    if isinstance(answer, Awaitable):
        return _await_start_and_end(notifier, everything, answer)
    ended = notifier.invalidate_range_end(everything)
    return ended if isinstance(ended, Awaitable) else answer


async def _await_start_and_end(
    notifier: Notifier, everything: NotifierRange, answer: Awaitable[bool | Iterable[int] | None]
) -> bool | Iterable[int] | None:
    result = await answer
    ended = notifier.invalidate_range_end(everything)
    if isinstance(ended, Awaitable):
        await ended
    return result
