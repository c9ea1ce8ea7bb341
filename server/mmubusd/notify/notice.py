"""A notice: one call of a notifier op, as every session concerned gets it.

A notice is one object, shared by all sessions that it goes to; what is particular to a session (the seq, the targets)
stays in its outbox. So the room above encodes it once and keeps the bytes in `encoded`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, NewType

from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.notification import Reason

if TYPE_CHECKING:
    from mmubusd.notify.log import Log
    from mmubusd.notify.round import Round

SessionId = NewType("SessionId", int)
RegistrationId = NewType("RegistrationId", int)
RoundId = NewType("RoundId", int)
Seq = NewType("Seq", int)
Targets = tuple[int, ...]
"""Registrations of one session that a notice concerns, newest first."""


class Op(IntEnum):
    """The notifier ops; the numbers are those of the contract's NotifierOp."""

    RELEASE = 1
    AGE_PAGE = 2
    INVALIDATE_PAGE = 3
    INVALIDATE_RANGE = 4
    INVALIDATE_ALL = 5
    INVALIDATE_RANGE_START = 6
    INVALIDATE_RANGE_END = 7
    CLEAR_FLUSH_YOUNG = 8
    CLEAR_YOUNG = 9
    TEST_YOUNG = 10
    RMAP_INVALIDATE_PAGE = 11
    FLUSH_ALL = 12


VOIDING = frozenset(
    {
        Op.INVALIDATE_PAGE,
        Op.INVALIDATE_RANGE,
        Op.INVALIDATE_RANGE_START,
        Op.RMAP_INVALIDATE_PAGE,
        Op.INVALIDATE_ALL,
        Op.RELEASE,
        Op.FLUSH_ALL,
    }
)
"""The ops after whose ack the registration holds nothing of what they name."""
AGING = frozenset({Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG, Op.CLEAR_YOUNG, Op.TEST_YOUNG})
"""The ops that ask whether pages were used."""
_OF_EVERYTHING = frozenset({Op.RELEASE, Op.INVALIDATE_ALL, Op.FLUSH_ALL})


class Notice:
    """One call of one op; the same object for everyone who gets it.

    Attributes:
        op, mm, start, end, pages, reason, lock, nonblock, must_evict, owner: as in the contract; mm 0 and start = end
        = 0
            for RMAP_INVALIDATE_PAGE, whose pages are pfns. reason None: it has none.
        round: the number that a start and its end share.
        origin: the round that waits for its answers; None when nobody waits (INVALIDATE_RANGE_END).
        opened_at: the bus's clock when it was raised; the oldest one's for a merged notice.
        merged: the notices that this one replaces for one session, with their targets; None for an original.
        ends_left: of a merged start: how many of the rounds that it stands for have not ended. owes_end: one of those
            that have was not refused.
        encoded: the bytes that the room above has made of it; None until it has.
    """

    lock = nonblock = must_evict = False
    owner = 0
    pages: Sequence[int] = ()
    encoded: bytes | None = None
    merged: list[tuple[Notice, Targets]] | None = None
    ends_left = 0
    owes_end = False

    def __init__(
        self, op: Op, round_id: RoundId, origin: Round | None, opened_at: float, *, mm: int = 0, start: int = 0,
        end: int = 0, reason: Reason | None = None, pages: Sequence[int] = (), lock: bool = False,
        nonblock: bool = False, must_evict: bool = False, owner: int = 0,
    ) -> None:  # fmt: skip
        """What few notices have is their class's until they have it: one is made for each round."""
        self.op = op
        self.round = round_id
        self.origin = origin
        self.opened_at = opened_at
        self.mm = mm
        self.start = start
        self.end = end
        self.reason = reason
        if pages:
            self.pages = pages
        if lock:
            self.lock = True
        if nonblock:
            self.nonblock = True
        if must_evict:
            self.must_evict = True
        if owner:
            self.owner = owner

    @property
    def refusable(self) -> bool:
        """Whether a handler may refuse it."""
        return self.nonblock or (self.op is Op.RMAP_INVALIDATE_PAGE and not self.must_evict)

    def extent(self) -> tuple[int, int]:
        """The range that a handler works on: addresses, or frames of RMAP_INVALIDATE_PAGE."""
        if self.op in _OF_EVERYTHING:
            return 0, 1 << 64
        if self.pages:
            step = 1 if self.op is Op.RMAP_INVALIDATE_PAGE else PAGE_SIZE
            return min(self.pages), max(self.pages) + step
        return self.start, self.end

    def __repr__(self) -> str:
        where = f"{self.start:#x}-{self.end:#x}" if self.end else f"{len(self.pages)} pages"
        return f"Notice({self.op.name.lower()} mm={self.mm} {where} round={self.round})"


class Share(NamedTuple):
    """Notices [begin, end) of a batch, which are of a log, and have equal targets. whole: they are all of it."""

    begin: int
    end: int
    log: Log
    whole: bool


class Batch(NamedTuple):
    """Notices for one session: notices[i] has the seq first_seq + i and concerns targets[i], newest first.

    late_seq: the oldest un-acknowledged notice that has used half its budget; 0: none. A batch may be empty but for it.
    shares: what of it other sessions get, too, in order.
    """

    first_seq: Seq
    notices: list[Notice]
    targets: list[Targets]
    late_seq: int = 0
    shares: Sequence[Share] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a handler answered beside "done"; the fields are the contract's NoticeResult."""

    seq: int
    young: Sequence[int] = ()
    dirty: Sequence[int] = ()
    refused: bool = False
    refused_pages: Sequence[int] = ()
    busy: bool = False
    failed: str = ""
    slept: bool = False


@dataclass(frozen=True, slots=True)
class Ack:
    """Handlers have finished; the fields are the contract's Acknowledge."""

    through: int = 0
    also: Sequence[int] = ()
    results: Sequence[Result] = field(default=())
