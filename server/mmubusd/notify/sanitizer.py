"""The sanitizer: what a driver did that no driver may do, found, refused where that is possible, and explained.

| breach | how it is seen | refused |
|---|---|---|
| stale-access | a pfn and generation that are not (any more) held, on a DMA access | yes |
| poison | a freed frame does not hold its poison any more when it is used again, or is checked | no |
| dirty-lost | a page reported dirty by who does not hold it: told too late, or it is the wrong page | no |
| early-ack | a request from inside a handler whose notice is acknowledged already | no |
| after-unregister | a request through a registration that has ended | yes |
| after-fence | a request of a session whose rights are void | yes |
| jeopardy | an access when the stream has been lost for so long that the session must know: it hears no notice | yes |
| slipped | pages that went away without a word, for want of an op | no |
| slept-under-lock | a handler of a notice with lock=1 waited (the client says so) | no |
| called-under-lock | a request from inside a handler of a notice with lock=1 | no |
| deadlock | a request that would wait for itself | yes |

Each one is kept with the history of its page, counted, and told to the session at fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from mmubusd.notify.finding import Finding
from mmubusd.notify.notice import SessionId

if TYPE_CHECKING:
    from mmubusd.mm.memory import Memory
    from mmubusd.notify.clock import Clock
    from mmubusd.notify.notice import Notice
    from mmubusd.notify.operation import Operation
    from mmubusd.notify.page_history import PageHistory
    from mmubusd.notify.session import Session


class Breach(StrEnum):
    """What was done."""

    STALE_ACCESS = "stale-access"
    POISON = "poison"
    DIRTY_LOST = "dirty-lost"
    EARLY_ACK = "early-ack"
    AFTER_UNREGISTER = "after-unregister"
    AFTER_FENCE = "after-fence"
    JEOPARDY = "jeopardy"
    SLIPPED = "slipped"
    SLEPT_UNDER_LOCK = "slept-under-lock"
    CALLED_UNDER_LOCK = "called-under-lock"
    DEADLOCK = "deadlock"


@dataclass(frozen=True, slots=True)
class Offence:
    """One breach.

    Attributes:
        number: counts up from 1; at: the bus's clock.
        session, name: whose it was; 0 and "" when nobody can be named.
        registration, mm, address, pfn, generation: where; 0 where it does not apply.
        refused: the request failed, so nothing came of it.
        message: what was done, for people. story: the page's history, one sentence a line, or a deadlock's cycle.
    """

    number: int
    at: float
    breach: Breach
    session: int
    name: str
    registration: int
    mm: int
    address: int
    pfn: int
    generation: int
    refused: bool
    message: str
    story: tuple[str, ...]


class Sanitizer:
    """Every offence that is remembered. Args: kept_max: how many.

    Attributes: offences: oldest first; counts: all there were, by breach.
    """

    def __init__(self, memory: Memory, pages: PageHistory, clock: Clock, kept_max: int) -> None:
        self._memory = memory
        self.pages = pages
        self._clock = clock
        self.offences: deque[Offence] = deque(maxlen=kept_max)
        self.counts: dict[Breach, int] = {}
        self._last = 0

    def note(
        self, breach: Breach, session: Session | None, message: str, *, registration: int = 0, mm: int = 0, address:
        int = 0, pfn: int = 0, generation: int = 0, refused: bool = False, story: Sequence[str] = (),
    ) -> Offence:  # fmt: skip
        """Keep it, count it, and tell the session at fault."""
        self._last += 1
        self.counts[breach] = self.counts.get(breach, 0) + 1
        offence = Offence(
            self._last, self._clock.time, breach, 0 if session is None else session.id,
            "" if session is None else session.name, registration, mm, address, pfn, generation, refused, message,
            tuple(story),
        )  # fmt: skip
        self.offences.append(offence)
        if session is not None:
            session.tell(Finding(breach.value, message, offence.story))
        return offence

    def page(
        self, breach: Breach, session: Session, message: str, registration: int, address: int, *, mm: int = 0,
        pfn: int = 0, generation: int = 0, refused: bool = False,
    ) -> Offence:  # fmt: skip
        """An offence on one page: its history is the story. Args: address: or the pfn, on the rmap list."""
        story = [*self.pages.story(registration, address), f"used at {self._clock.time:.6f} s"]
        return self.note(
            breach, session, message, registration=registration, mm=mm, address=address, pfn=pfn,
            generation=generation, refused=refused, story=story,
        )  # fmt: skip

    # What is seen in the frames themselves.

    def look_at_frames(self, sessions: Mapping[SessionId, Session]) -> int:
        """Explain the damage that was found since the last time. Returns: how many frames."""
        damaged = self._memory.frames.damaged
        if not damaged:
            return 0
        found, damaged[:] = damaged[:], []
        for pfn, generation in found:
            self._poison(pfn, generation, sessions)
        return len(found)

    def _poison(self, pfn: int, generation: int, sessions: Mapping[SessionId, Session]) -> None:
        writers = self.pages.writers(pfn, generation)
        what = f"frame {pfn} generation {generation} was written after it had been freed"
        if not writers:
            self.note(
                Breach.POISON, None, f"{what}; nobody is remembered who could", pfn=pfn, generation=generation
            )  # fmt: skip
            return
        for taken in writers:
            gone = self.pages.gone(taken.registration)
            session = next((one for one in sessions.values() if taken.registration in one.registrations), None)
            if session is None and gone is not None:
                session = sessions.get(SessionId(gone.session))
            name = session.name if session is not None else gone.name if gone is not None else "somebody forgotten"
            at = taken.start if taken.end < 1 << 63 else 0
            self.note(
                Breach.POISON, session, f"{what}; {name} had the right to write it until it was taken away",
                registration=taken.registration, address=at, pfn=pfn, generation=generation,
                story=[*self.pages.story(taken.registration, at), f"found at {self._clock.time:.6f} s"],
            )  # fmt: skip

    # What is seen in the order of things.

    def early_ack(self, session: Session, seq: int, operation: Operation[object]) -> None:
        """A handler asks for something, and what it is for is acknowledged already."""
        if seq <= session.outbox.told_through:
            self.note(
                Breach.EARLY_ACK, session,
                f"notice {seq} was acknowledged before its handler had finished: {operation.name()} comes from it",
            )  # fmt: skip

    def called_back(self, session: Session, notice: Notice, operation: Operation[object]) -> None:
        """A handler of a notice with lock=1 called back."""
        self.note(
            Breach.CALLED_UNDER_LOCK, session,
            f"the handler of {notice.op.name.lower()} (round {notice.round}, lock=1) has called {operation.name()}: "
            "its caller holds a spinlock, under which nothing may wait",
            mm=notice.mm, address=notice.start,
        )  # fmt: skip

    def slept(self, session: Session, notice: Notice) -> None:
        """The client says that a handler of a notice with lock=1 waited."""
        self.note(
            Breach.SLEPT_UNDER_LOCK, session,
            f"the handler of {notice.op.name.lower()} (round {notice.round}, lock=1) has waited: "
            "its caller holds a spinlock, under which nothing may sleep",
            mm=notice.mm, address=notice.start,
        )  # fmt: skip

    def deadlock(self, victim: Operation[object], everyone: list[Session], lines: list[str], message: str) -> None:
        """A cycle was broken: kept once, told to everyone in it."""
        session = victim.session
        self.note(Breach.DEADLOCK, session, message, refused=True, story=lines)
        for other in everyone:
            if other is not session:
                other.tell(Finding(Breach.DEADLOCK.value, message, tuple(lines)))
