"""From a notice to the handler calls that it means, and to what it covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mmu.v1 import session_pb2 as pb

from mmubus.linux import PAGE_SIZE, NotifierOp, Reason
from mmubus.notifier import METHODS, NotifierRange
from mmubus.registration import Registration

__all__ = ["Call", "calls_of", "extent", "is_aging", "overtake", "takes_away"]

RANGE_MAX = 1 << 64

RELEASE = NotifierOp.RELEASE.value
AGE_PAGE = NotifierOp.AGE_PAGE.value
INVALIDATE_PAGE = NotifierOp.INVALIDATE_PAGE.value
INVALIDATE_RANGE = NotifierOp.INVALIDATE_RANGE.value
INVALIDATE_ALL = NotifierOp.INVALIDATE_ALL.value
RANGE_START = NotifierOp.INVALIDATE_RANGE_START.value
RANGE_END = NotifierOp.INVALIDATE_RANGE_END.value
RMAP_PAGE = NotifierOp.RMAP_INVALIDATE_PAGE.value
FLUSH_ALL = NotifierOp.FLUSH_ALL.value
_METHOD_OF = {op.value: name for op, name in METHODS.items()}
_OF_EVERYTHING = frozenset({RELEASE, INVALIDATE_ALL, FLUSH_ALL})
_OF_PAGES = frozenset({AGE_PAGE, INVALIDATE_PAGE})
_OF_AGING = frozenset(
    op.value
    for op in (NotifierOp.AGE_PAGE, NotifierOp.CLEAR_FLUSH_YOUNG, NotifierOp.CLEAR_YOUNG, NotifierOp.TEST_YOUNG)
)


class Call(NamedTuple):
    """One handler call: pages are what a plain True in its answer stands for."""

    registration: Registration
    method: Callable[..., Any]
    args: tuple[Any, ...]
    pages: Sequence[int]


def extent(notice: pb.Notice) -> tuple[int, int]:
    """What a notice covers: addresses, or frames for rmap notices. A registration has only one of the two kinds."""
    if notice.op in _OF_EVERYTHING:
        return 0, RANGE_MAX
    if notice.pages:
        step = 1 if notice.op == RMAP_PAGE else PAGE_SIZE
        return min(notice.pages), max(notice.pages) + step
    return notice.start, notice.end


def is_aging(notice: pb.Notice) -> bool:
    """Whether it asks if pages were used."""
    return notice.op in _OF_AGING


def takes_away(notice: pb.Notice) -> bool:
    """Whether what it covers may not be used afterwards."""
    return notice.op not in _OF_AGING and notice.op != RANGE_END


def overtake(registration: Registration, notice: pb.Notice, seq: int) -> None:
    """Faults that are under way learn what is taken away."""
    op = notice.op
    if not takes_away(notice):
        return
    if op in _OF_EVERYTHING:
        registration.overtake_everything(seq)
    elif op == RMAP_PAGE:
        registration.overtake_pages(notice.pages, seq)
    elif notice.pages:
        for page in notice.pages:
            registration.overtake(page, page + PAGE_SIZE, seq)
    else:
        registration.overtake(notice.start, notice.end, seq)


def calls_of(registration: Registration, notice: pb.Notice, seq: int) -> list[Call]:
    """The handler calls that a notice means for one registration."""
    op = notice.op
    notifier = registration.notifier
    if op == FLUSH_ALL:
        why = "the server could not keep notices apart"
        return [Call(registration, notifier.invalidated_everything, (why,), ())]
    if op == RMAP_PAGE:
        method = notifier.invalidate_page
        return [Call(registration, method, (page, notice.must_evict), (page,)) for page in notice.pages]
    method = getattr(notifier, _METHOD_OF[op])
    if op == INVALIDATE_RANGE:
        return [Call(registration, method, (notice.mm, notice.start, notice.end, notice.lock), ())]
    if op in (RANGE_START, RANGE_END):
        return [Call(registration, method, (_range(notice, seq),), ())]
    mm = notice.mm
    if op in _OF_EVERYTHING:
        return [Call(registration, method, (mm,), ())]
    pages = notice.pages or range(notice.start, notice.end, PAGE_SIZE)
    if op in _OF_PAGES:
        return [Call(registration, method, (mm, page), (page,)) for page in pages]
    if notice.pages:
        return [Call(registration, method, (mm, page, page + PAGE_SIZE), (page,)) for page in pages]
    return [Call(registration, method, (mm, notice.start, notice.end), pages)]


def _range(notice: pb.Notice, seq: int) -> NotifierRange:
    return NotifierRange(
        notice.mm,
        notice.start,
        notice.end,
        Reason(notice.reason),
        not notice.nonblock,
        notice.owner,
        notice.round,
        seq,
    )
