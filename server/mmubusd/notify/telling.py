"""What a round's notices say: one notice an op.

There are more where an op of ranges stands for one of pages, one a run of pages; and where huge pages are asked about,
one for each of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmubusd.mm.addr import PAGE_SIZE, PMD_SIZE, TASK_SIZE
from mmubusd.mm.notification import (
    AgePage,
    ClearYoung,
    InvalidatePage,
    InvalidateRange,
    Notification,
    Reason,
    Release,
    RmapInvalidatePage,
    TestYoung,
)
from mmubusd.notify.dispatch import Kind
from mmubusd.notify.intervals import merge_ranges
from mmubusd.notify.notice import Notice, Op
from mmubusd.notify.round import Round

KINDS: dict[type, Kind] = {
    InvalidateRange: Kind.RANGE,
    InvalidatePage: Kind.PAGE,
    AgePage: Kind.AGE,
    ClearYoung: Kind.CLEAR_YOUNG,
    TestYoung: Kind.TEST_YOUNG,
    RmapInvalidatePage: Kind.RMAP,
    Release: Kind.RELEASE,
}
WHOLE = ((0, TASK_SIZE),)


def spans_of(notification: Notification) -> Sequence[tuple[int, int]]:
    """The ranges that it is about, ascending. Requires: it is about addresses."""
    if isinstance(notification, InvalidateRange):
        return ((notification.start, notification.end),)
    if isinstance(notification, Release):
        return WHOLE
    assert not isinstance(notification, RmapInvalidatePage)
    pages = [(address, address + PAGE_SIZE) for address in notification.addresses]
    if isinstance(notification, AgePage | ClearYoung | TestYoung):
        pages += [(block, block + PMD_SIZE) for block in notification.huge]
    return merge_ranges(pages)


def notices_of(round_: Round, op: Op) -> list[Notice]:
    """The notices by which a round calls an op."""
    notification = round_.notification
    time = round_.opened_at
    if isinstance(notification, InvalidateRange):
        return [range_notice(round_, op, notification)]
    if isinstance(notification, RmapInvalidatePage):
        return [Notice(op, round_.id, round_, time, pages=notification.pfns, must_evict=notification.must_evict)]
    if isinstance(notification, Release):
        return [Notice(op, round_.id, round_, time, mm=round_.mm, start=0, end=TASK_SIZE, reason=Reason.RELEASE)]
    if op in (Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE):
        return [
            Notice(op, round_.id, round_, time, mm=round_.mm, start=start, end=end, reason=round_.reason)
            for start, end in round_.spans
        ]
    pages, blocks = notification.addresses, () if isinstance(notification, InvalidatePage) else notification.huge
    notices = [
        Notice(op, round_.id, round_, time, mm=round_.mm, start=block, end=block + PMD_SIZE, reason=round_.reason)
        for block in blocks
    ]
    if pages:
        start, end = min(pages), max(pages) + PAGE_SIZE
        notices.append(
            Notice(op, round_.id, round_, time, mm=round_.mm, start=start, end=end, pages=pages, reason=round_.reason)
        )
    return notices


def range_notice(round_: Round, op: Op, told: InvalidateRange) -> Notice:
    """The most frequent one."""
    return Notice(
        op, round_.id, round_, round_.opened_at, mm=round_.mm, start=told.start, end=told.end, reason=told.reason,
        lock=told.lock, nonblock=not told.blockable, owner=told.owner,
    )  # fmt: skip


def end_of(start: Notice, clock: float) -> Notice:
    """The end of a start, which may be a merged one."""
    return Notice(
        Op.INVALIDATE_RANGE_END, start.round, None, clock, mm=start.mm, start=start.start, end=start.end,
        reason=start.reason, owner=start.owner,
    )  # fmt: skip
