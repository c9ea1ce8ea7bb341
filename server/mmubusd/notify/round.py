"""A round: one notification, from the moment it is raised until everyone concerned has answered or is fenced off.

open ──every session concerned has answered, or is gone──► ended ──so has its operation──► closed
  the range is barred ────────────────────────────────────────────────────────► lifted, ends go out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import TYPE_CHECKING

from mmubusd.mm.addr import PMD_SIZE
from mmubusd.mm.notification import ANSWERED, Answer, Notification, Reason, Release
from mmubusd.notify.dispatch import VOIDING_KINDS, Delivery, Kind, Plan
from mmubusd.notify.notice import Notice, Op, Result, RoundId

if TYPE_CHECKING:
    from mmubusd.mm.addr import Pfn
    from mmubusd.notify.chain import Chain
    from mmubusd.notify.log import Log
    from mmubusd.notify.operation import Operation
    from mmubusd.notify.session import Session


class Round:
    """One notification under way.

    Attributes:
        id, kind, notification, operation, mm, spans, reason: what is asked, for whom; mm 0 and no spans for frames.
        opened_at, ended_at: the bus's clock.
        log, position: where it counts together with others; log None: for itself.
        notices_nr: how many notices there were.
        refusers: sessions that refused, and whether it was the start: then they get no end.
        voids: afterwards nobody may hold what it names.
        traceparent: for the room above, not looked at.
    """

    ended_at = 0.0
    log: Log | None = None
    position = 0
    notices_nr = 0
    bars: Sequence[int] = ()
    starts: Sequence[tuple[Notice, tuple[Delivery, ...]]] = ()
    merged: dict[tuple[Session, Notice], Notice] | None = None
    refusers: Mapping[Session, bool] = MappingProxyType({})
    refused_pfns: Set[Pfn] = frozenset()
    traceparent = ""
    _waiting: dict[Session, int] = {}  # noqa: RUF012 - its own as soon as it counts for itself
    _answered: list[tuple[Session, float, bool]] = []  # noqa: RUF012 - likewise
    _young: Set[int] = frozenset()

    def __init__(
        self, round_id: RoundId, kind: Kind, notification: Notification, operation: Operation[object], plan: Plan,
        chain: Chain | None, spans: Sequence[tuple[int, int]], clock: float,
    ) -> None:  # fmt: skip
        """What few rounds have is their class's until they have it: one is made for each notification."""
        self.id = round_id
        self.kind = kind
        self.voids = kind in VOIDING_KINDS
        self.notification = notification
        self.operation = operation
        self.plan = plan
        self.chain = chain
        self.mm = 0 if chain is None else chain.mm.id
        self.spans = spans
        self.opened_at = clock

    @property
    def reason(self) -> Reason | None:
        """Why; None for questions about age."""
        told = self.notification
        return Reason.RELEASE if isinstance(told, Release) else getattr(told, "reason", None)

    @property
    def open(self) -> bool:
        """Whether someone has still to answer."""
        log = self.log
        return self.position >= log.ended_nr if log is not None else bool(self._waiting)

    @property
    def waiting(self) -> dict[Session, int]:
        """Sessions that have not answered, with how many notices each has to. Only without a log it may be changed."""
        return self._waiting if self.log is None else self.log.waiting(self.position)

    @property
    def answered(self) -> list[tuple[Session, float, bool]]:
        """Sessions that have answered, in order: when, and whether because they were gone."""
        return self._answered if self.log is None else self.log.answered(self.position)

    @property
    def alone_since(self) -> float:
        """Since when one alone was waited for, if it was."""
        answered = self.answered[:-1] if not self.open else self.answered
        return answered[-1][1] if answered else self.opened_at

    def count(self) -> None:
        """It counts for itself, from the beginning."""
        self._waiting, self._answered = dict(self.plan.counts), []

    def part(self) -> None:
        """It counts for itself from here on, not together with others. Idempotent."""
        if self.log is not None:
            self._waiting, self._answered, self.log = self.waiting, self.answered, None

    @property
    def start(self) -> int:
        """The first byte; 0 for frames."""
        return self.spans[0][0] if self.spans else 0

    @property
    def end(self) -> int:
        """The byte after the last; 0 for frames."""
        return self.spans[-1][1] if self.spans else 0

    def waiting_for(self) -> list[str]:
        """Names of the sessions that have not answered."""
        return [session.name for session in self.waiting]

    def age(self, clock: float) -> float:
        """Seconds that it was, or has been, open."""
        return (clock if self.open else self.ended_at) - self.opened_at

    def hear(self, session: Session, op: Op, result: Result) -> None:
        """Merge what a session answered to an op beside "done": OR over all, never a short cut."""
        if result.young:
            self._young = {*self._young, *result.young}
        if result.refused or result.refused_pages:
            start = op is Op.INVALIDATE_RANGE_START
            self.refusers = {**self.refusers, session: start or self.refusers.get(session, False)}

    def answer(self) -> Answer:
        """What all together said."""
        if not (self._young or self.refusers or self.refused_pfns):
            return ANSWERED
        asked = frozenset(getattr(self.notification, "addresses", ()))
        young = asked & self._young
        if huge := getattr(self.notification, "huge", ()):
            young |= {address & -PMD_SIZE for address in self._young} & frozenset(huge)
        return Answer(
            refused=bool(self.refusers) and self.kind is Kind.RANGE,
            young=young,
            refused_pfns=frozenset(self.refused_pfns),
        )

    def __repr__(self) -> str:
        where = f"mm={self.mm} {self.start:#x}-{self.end:#x}"
        return f"Round({self.id} {self.kind.value} {where} waiting for {self.waiting_for()})"
