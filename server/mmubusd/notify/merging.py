"""Overload: what waits too long in an outbox is merged, so that a client that does not read costs a bounded amount.

Three steps, each taken only when the one before did not make it few enough:
1. ranges of the same op, address space and targets become an interval set (touching ones one range);
2. every such set becomes everything of its address space;
3. all of it becomes one FLUSH_ALL.

A merged notice answers all rounds whose notices it replaces. It takes the place of the oldest of its parts, so that
what waits stays in the order in which it was opened, by which it is judged: every round that it stands for is open and
bars its range already. A superset is always legal.
Questions about age are not asked at all; whoever is not asked counts as "not young", as an absent client does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mmubusd.mm.addr import PAGE_SIZE, TASK_SIZE
from mmubusd.notify.intervals import merge_ranges
from mmubusd.notify.notice import AGING, Notice, Op, RoundId, Targets

_MERGED = frozenset({Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_RANGE_START, Op.RMAP_INVALIDATE_PAGE})

Pending = list[tuple[Notice, Targets]]


class Merged(NamedTuple):
    """waiting: what is to be sent instead; unasked: what need not be asked any more and counts as answered."""

    waiting: Pending
    unasked: Pending


def merge(pending: Pending, ranges_max: int) -> Merged:
    """Make few of many. Args: pending: oldest first; ranges_max: at most so many merged notices remain."""
    groups: dict[tuple[object, ...], Pending] = {}
    rest: Pending = []
    unasked: Pending = []
    for notice, targets in pending:
        if notice.op in _MERGED or notice.op is Op.FLUSH_ALL:
            groups.setdefault(_key(notice, targets), []).append((notice, targets))
        elif notice.op in AGING:
            unasked.append((notice, targets))
        else:
            rest.append((notice, targets))
    merged = [one for group in groups.values() for one in _as_interval_set(group)]
    if len(merged) > ranges_max:
        merged = [_as_everything(group) for group in groups.values()]
    if len(merged) > ranges_max:
        merged = [_as_flush([one for group in groups.values() for one in group])]
    return Merged(sorted(merged + rest, key=_opened_at), unasked)


def _opened_at(one: tuple[Notice, Targets]) -> float:
    return one[0].opened_at


def _key(notice: Notice, targets: Targets) -> tuple[object, ...]:
    """What must be equal to be told as one."""
    return (notice.op, notice.mm, targets, notice.reason, notice.lock, notice.nonblock, notice.must_evict, notice.owner)


def _originals(group: Iterable[tuple[Notice, Targets]]) -> Pending:
    return [one for notice, targets in group for one in (notice.merged or ((notice, targets),))]


def _as_interval_set(group: Pending) -> Pending:
    """One notice for each maximal range; a notice of pages stays one of pages."""
    first, targets = group[0]
    if len(group) == 1:
        return group
    if first.op is Op.FLUSH_ALL:
        return [_as_flush(group)]
    if first.op is Op.RMAP_INVALIDATE_PAGE:
        pages = tuple(dict.fromkeys(pfn for notice, _ in group for pfn in notice.pages))
        return [(_replace(first, group, 0, 0, pages), targets)]
    spans = merge_ranges([(notice.start, notice.end) for notice, _ in group])
    parts: dict[int, Pending] = {start: [] for start, _ in spans}
    starts = sorted(group, key=lambda one: one[0].start)
    at = 0
    for one in starts:
        while one[0].start >= spans[at][1]:
            at += 1
        parts[spans[at][0]].append(one)
    result: Pending = []
    for start, end in spans:
        part = parts[start]
        if len(part) == 1:
            result.append(part[0])
            continue
        pages = tuple(sorted({page for notice, _ in part for page in notice.pages}))
        result.append((_replace(first, part, start, end, pages), targets))
    return result


def _as_everything(group: Pending) -> tuple[Notice, Targets]:
    first, targets = group[0]
    if first.op in (Op.RMAP_INVALIDATE_PAGE, Op.FLUSH_ALL):
        return _as_flush(group)
    pages: tuple[int, ...] = ()
    if first.op is Op.INVALIDATE_PAGE:  # a page op cannot name a whole address space: it names all the pages
        pages = tuple(sorted({page for notice, _ in group for page in notice.pages}))
        return _replace(first, group, pages[0], pages[-1] + PAGE_SIZE, pages), targets
    return _replace(first, group, 0, TASK_SIZE, pages), targets


def _as_flush(group: Pending) -> tuple[Notice, Targets]:
    """Everything that the registrations hold is void."""
    targets = tuple(sorted({target for _, several in group for target in several}, reverse=True))
    flush = Notice(Op.FLUSH_ALL, _newest(group), None, min(notice.opened_at for notice, _ in group))
    return _stand_for(flush, group), targets


def _replace(first: Notice, group: Pending, start: int, end: int, pages: tuple[int, ...]) -> Notice:
    merged = Notice(
        first.op,
        _newest(group),
        None,
        min(notice.opened_at for notice, _ in group),
        mm=first.mm,
        start=start,
        end=end,
        pages=pages,
        reason=first.reason,
        lock=first.lock,
        nonblock=first.nonblock,
        must_evict=first.must_evict,
        owner=first.owner,
    )
    return _stand_for(merged, group)


def _newest(group: Pending) -> RoundId:
    return max(notice.round for notice, _ in group)


def _stand_for(merged: Notice, group: Pending) -> Notice:
    merged.merged = _originals(group)
    merged.ends_left = sum(notice.op is Op.INVALIDATE_RANGE_START for notice, _ in merged.merged)
    return merged
