"""A log: notices that several outboxes have in common, written once for all of them and answered by counting.

    position   0  1  2  3  4  5  6
               ├──┼──┼──┼──┼──┼──┤
    A answered ───────────────► 5       the round at a position has ended when everybody is beyond it:
    B answered ──────► 2                0 and 1 have, by two numbers, however many rounds and sessions there are

Hundreds of rounds that are open at once concern the same sessions one after another, and each session acknowledges many
of them in one message. So a message costs what it moves a session's place by one step, and what it ends.

A log is read when one of its outboxes is looked at, and takes no more notices from then on. Whatever is not just "done
through here" (a registration that goes, a fence, a result, an answer out of order, too much that waits) makes its
rounds *part*: each of them counts for itself from there on, as all others do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmubusd.notify.notice import Notice, Targets

if TYPE_CHECKING:
    from mmubusd.notify.session import Session

EVERYBODY = 1 << 62


class Log:
    """Notices, each with a round of its own that waits for the same sessions and for nothing else.

    Attributes:
        deliveries: the sessions, with their targets; notices: in order.
        open: whether more may be written. parted: whether its rounds count for themselves.
        room: how many notices may be in it, so that no outbox is too full.
        ended_nr: how many rounds have ended, from the first on.
        answers: what was acknowledged, in order: who, through which position, when.
        encoded: the bytes that the room above has made of all of it; None until it has.
    """

    __slots__ = (
        "_alone", "_beyond", "_there", "answers", "deliveries", "encoded", "ended_nr", "notices", "open", "parted",
        "room", "through",
    )  # fmt: skip

    def __init__(self, deliveries: Sequence[tuple[Session, Targets]]) -> None:
        self.deliveries = deliveries
        self.notices: list[Notice] = []
        self.open = True
        self.parted = False
        self.encoded: bytes | None = None
        self.through: dict[Session, int] = dict.fromkeys([session for session, _ in deliveries], 0)
        self.answers: list[tuple[Session, int, float]] = []
        self.ended_nr = 0
        self._there = {0: len(deliveries)}  # how many sessions are at a position
        self._beyond = 0 if len(deliveries) > 1 else EVERYBODY  # all but one are at this position or beyond it
        self._alone: deque[tuple[int, float]] = deque()  # positions up to which one alone was waited for, since when
        self.room = min(session.outbox.follow(self, targets) for session, targets in deliveries)

    def write(self, notice: Notice) -> bool:
        """Requires: it is open. Returns: False when it is full; nothing is written then."""
        notices = self.notices
        if len(notices) >= self.room:
            return False
        round_ = notice.origin
        assert round_ is not None
        round_.log, round_.position = self, len(notices)
        notices.append(notice)
        return True

    def answer(self, session: Session, through: int, time: float) -> list[Notice]:
        """A session has answered everything before a position. Returns: notices that everybody has answered now."""
        before = self.through[session]
        self.through[session] = through
        self.answers.append((session, through, time))
        there = self._there
        there[through] = there.get(through, 0) + 1
        left = there[before] - 1
        if left:
            there[before] = left
            if left > 1 or before != self.ended_nr:
                return []
        else:
            del there[before]
        last, *others = sorted(there)
        beyond = last if there[last] > 1 else others[0] if others else EVERYBODY
        if beyond > self._beyond:
            self._beyond = beyond
            self._alone.append((beyond, time))
        if last == self.ended_nr:
            return []
        return self._end(session, last, time)

    def _end(self, session: Session, last: int, time: float) -> list[Notice]:
        """Everybody is at `last` or beyond it, this session since now: it was waited for alone, where it was."""
        first, self.ended_nr = self.ended_nr, last
        ended = self.notices[first:last]
        if len(self.deliveries) == 1:
            session.harm_s += sum([time - notice.opened_at for notice in ended])
        for beyond, since in self._alone:
            if first < min(beyond, last):
                session.harm_s += (min(beyond, last) - first) * (time - since)
                first = min(beyond, last)
        while self._alone and self._alone[0][0] <= last:
            self._alone.popleft()
        return ended

    def waiting(self, position: int) -> dict[Session, int]:
        """Who has not answered the notice at a position: one each."""
        return {session: 1 for session, through in self.through.items() if through <= position}

    def answered(self, position: int) -> list[tuple[Session, float, bool]]:
        """Who has answered it, in order: when, and that they were not gone."""
        found: dict[Session, float] = {}
        for session, through, time in self.answers:
            if through > position:
                found.setdefault(session, time)
        return [(session, time, False) for session, time in found.items()]

    def part(self) -> None:
        """From here on its rounds count for themselves. Idempotent."""
        if self.parted:
            return
        self.parted, self.open = True, False
        for notice in self.notices[self.ended_nr :]:
            if notice.origin is not None:
                notice.origin.part()
