"""What the handlers of one notice have answered, and what becomes of an answer that is more than "done"."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from mmu.v1 import session_pb2 as pb

from mmubus.errors import Refuse
from mmubus.handlers import RANGE_START, RMAP_PAGE, Call, is_aging

__all__ = ["Outcome", "watch_lock"]

log = logging.getLogger("mmubus")

YOUNG_PAGES_MAX = 1 << 16  # pages that a plain True may stand for


class Outcome:
    """What the handlers of one notice have answered so far."""

    __slots__ = ("dirty", "failed", "refused", "refused_pages", "refusers", "slept", "told", "young")

    def __init__(self) -> None:
        self.told = False  # anything but "done"
        self.failed = ""

    def begin(self) -> None:
        """There is something to tell: rare enough that the lists are made only then."""
        if not self.told:
            self.told = True
            self.refused = self.slept = False
            self.young: list[int] = []
            self.dirty: list[int] = []
            self.refused_pages: list[int] = []
            self.refusers: set[int] = set()

    @property
    def refused_start(self) -> bool:
        """Whether somebody has refused the start of a range, so that those who did not must be told its end."""
        return self.told and bool(self.refusers)

    def message(self, seq: int) -> pb.NoticeResult | None:
        """None when there is nothing to tell but that it is done."""
        if not self.told or not (self.young or self.dirty or self.refused or self.slept):
            return None
        return pb.NoticeResult(
            seq=seq,
            young=self.young,
            dirty=self.dirty,
            refused=self.refused,
            refused_pages=self.refused_pages,
            slept=self.slept,
        )

    def take(self, notice: pb.Notice, call: Call, answer: Any, seq: int) -> None:
        """Put an answer that is not just "done" into the self."""
        self.begin()
        into = self.young if is_aging(notice) else self.dirty
        try:
            if answer is True:
                if not call.pages or len(call.pages) > YOUNG_PAGES_MAX:
                    raise TypeError("return the addresses of the pages; True says too little for a range")
                into.extend(call.pages)
            else:
                into.extend(answer)
        except Exception as error:
            self.fail(notice, call, error, seq)

    def refuse(self, notice: pb.Notice, call: Call, refusal: Refuse) -> None:
        """Put a refusal in, or a failure when this notice may not be refused."""
        self.begin()
        if notice.op == RMAP_PAGE and not notice.must_evict:
            self.refused = True
            self.refused_pages.extend(refusal.pages or call.pages)
            call.registration.exported.update(refusal.pages or call.pages)
        elif notice.nonblock:
            self.refused = True
            if notice.op == RANGE_START:
                self.refusers.add(call.registration.id)
        else:
            self.failed = f"{_where(call)} refused a notice that may not be refused"
            log.error("%s; it counts as not done, and this session is fenced when its budget is over", self.failed)

    def fail(self, notice: pb.Notice, call: Call, error: Exception, seq: int) -> None:
        """A handler has failed: the notice is not done."""
        self.failed = f"{_where(call)}: {type(error).__name__}: {error}"
        log.error(
            "notice %d: %s failed on [%#x, %#x). It is not acknowledged: unless the server asks again and it succeeds, "
            "this session is fenced when the budget is over",
            seq,
            _where(call),
            notice.start,
            notice.end,
            exc_info=error,
        )


def _where(call: Call) -> str:
    return f"{type(call.registration.notifier).__name__}.{getattr(call.method, '__name__', 'handler')}"


async def watch_lock(call: Call, waiting: Awaitable[Any], outcome: Outcome) -> Any:
    """Await the handler of a notice with lock=1, and say so if it waits: it would sleep under a spinlock."""

    def waited() -> None:
        call.registration.slept_under_lock += 1
        outcome.begin()
        outcome.slept = True
        log.warning(
            "%s waits although lock=1: its caller holds a spinlock. Do what must be done without waiting, "
            "and the rest later",
            _where(call),
        )

    probe = asyncio.get_running_loop().call_soon(waited)
    try:
        return await waiting
    finally:
        probe.cancel()
