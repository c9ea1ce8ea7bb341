"""Which notification becomes which op for whom.

| notification | ops, in this order, each a notice of its own |
|---|---|
| InvalidateRange | INVALIDATE_RANGE_START, INVALIDATE_RANGE: whichever it has, also both [1] |
| InvalidatePage | INVALIDATE_PAGE; without it START or RANGE, one for each run of pages [2] |
| AgePage | AGE_PAGE, CLEAR_FLUSH_YOUNG |
| ClearYoung | CLEAR_YOUNG; without it AGE_PAGE, which is the seed's only word for it |
| TestYoung | TEST_YOUNG |
| RmapInvalidatePage | RMAP_INVALIDATE_PAGE, to those who export one of the frames |
| Release | INVALIDATE_ALL, RELEASE; without either START or RANGE over everything, reason RELEASE [3] |

[1] mainline called its later invalidate_range between start and end. [2] mainline has no invalidate_page since v4.14.
[3] as mainline does for interval notifiers.

A start is followed by INVALIDATE_RANGE_END, without waiting, when the operation has gone on. What a registration has
no op for slips through, as with a NULL op in the kernel; it is told so when it registers, and what it holds there is
void.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from mmubusd.notify.notice import Op, Targets
from mmubusd.notify.registration import Registration
from mmubusd.notify.session import Session


class Kind(Enum):
    """The notifications, as far as who is told what differs."""

    __hash__ = object.__hash__  # an enum's own hashes the name, each time

    RANGE = "invalidate_range"
    PAGE = "invalidate_page"
    AGE = "age_page"
    CLEAR_YOUNG = "clear_young"
    TEST_YOUNG = "test_young"
    RMAP = "rmap_invalidate_page"
    RELEASE = "release"


VOIDING_KINDS = frozenset({Kind.RANGE, Kind.PAGE, Kind.RMAP, Kind.RELEASE})
"""Kinds after which nobody may hold what they name."""

MM_OPS = frozenset(Op) - {Op.RMAP_INVALIDATE_PAGE, Op.FLUSH_ALL}
"""What a registration on an address space may implement."""
RMAP_OPS = frozenset({Op.RMAP_INVALIDATE_PAGE})

_RANGE = (Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE)


def ops_for(kind: Kind, has: frozenset[Op]) -> Sequence[Op]:
    """The ops that a notification calls on a registration that has these; empty when it slips through."""
    match kind:
        case Kind.RANGE:
            return _those(has, *_RANGE)
        case Kind.PAGE:
            return _those(has, Op.INVALIDATE_PAGE) or _those(has, *_RANGE)[:1]
        case Kind.AGE:
            return _those(has, Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG)
        case Kind.CLEAR_YOUNG:
            return _those(has, Op.CLEAR_YOUNG) or _those(has, Op.AGE_PAGE)
        case Kind.TEST_YOUNG:
            return _those(has, Op.TEST_YOUNG)
        case Kind.RMAP:
            return _those(has, Op.RMAP_INVALIDATE_PAGE)
        case Kind.RELEASE:
            return _those(has, Op.INVALIDATE_ALL, Op.RELEASE) or _those(has, *_RANGE)[:1]


def _those(has: frozenset[Op], *ops: Op) -> tuple[Op, ...]:
    return tuple(op for op in ops if op in has)


_SLIPS: tuple[tuple[Kind, str, str], ...] = (
    (Kind.RANGE, "invalidate_range", "munmap, mprotect, fork, copy-on-write and truncate will not be told"),
    (Kind.PAGE, "invalidate_page", "reclaim and writeback will not be told"),
    (Kind.AGE, "age_page", "pages that only the device uses will look old, and be reclaimed first"),
    (Kind.RELEASE, "release", "the end of the address space will not be told"),
)


def warnings(ops: frozenset[Op]) -> tuple[str, ...]:
    """What will slip through a registration on an address space that has these ops, one sentence each."""
    found = [f"{name} is missing: {slips}" for kind, name, slips in _SLIPS if not ops_for(kind, ops)]
    if Op.INVALIDATE_RANGE_END in ops and Op.INVALIDATE_RANGE_START not in ops:
        found.append("invalidate_range_start is missing: invalidate_range_end will never be called")
    if Op.INVALIDATE_RANGE_START in ops and Op.INVALIDATE_RANGE_END not in ops:
        found.append("invalidate_range_end is missing: when a range may be used again will not be told")
    return tuple(found)


class Delivery(NamedTuple):
    """One notice's way to one session."""

    session: Session
    targets: Targets


class Plan(NamedTuple):
    """Who is told what, for one kind and one set of registrations.

    Attributes:
        steps: ops in the order of their notices, each with its deliveries, newest registration first.
        counts: how many notices each session gets.
        deaf: registrations that have no op for it.
    """

    steps: tuple[tuple[Op, tuple[Delivery, ...]], ...]
    counts: dict[Session, int]
    deaf: tuple[Registration, ...]


NOBODY = Plan((), {}, ())

_ORDER = {
    op: at
    for at, op in enumerate(
        (
            Op.INVALIDATE_ALL,
            Op.RELEASE,
            Op.INVALIDATE_RANGE_START,
            Op.INVALIDATE_RANGE,
            Op.INVALIDATE_PAGE,
            Op.AGE_PAGE,
            Op.CLEAR_FLUSH_YOUNG,
            Op.CLEAR_YOUNG,
            Op.TEST_YOUNG,
            Op.RMAP_INVALIDATE_PAGE,
        )
    )
}


def make_plan(kind: Kind, concerned: Iterable[Registration]) -> Plan:
    """Args: concerned: newest first."""
    by_op: dict[Op, dict[Session, list[int]]] = {}
    deaf: list[Registration] = []
    counts: dict[Session, int] = {}
    for registration in concerned:
        ops = ops_for(kind, registration.ops)
        if not ops:
            deaf.append(registration)
        session = registration.session
        for op in ops:
            sessions = by_op.setdefault(op, {})
            targets = sessions.get(session)
            if targets is None:
                sessions[session] = [registration.id]
                counts[session] = counts.get(session, 0) + 1
            else:
                targets.append(registration.id)
    steps = tuple(
        (op, tuple(Delivery(session, tuple(targets)) for session, targets in by_op[op].items()))
        for op in sorted(by_op, key=_ORDER.__getitem__)
    )
    return Plan(steps, counts, tuple(deaf))
