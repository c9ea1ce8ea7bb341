"""What became of the pages that a registration was given: to explain an access that should not have been.

    given out ──► held ──► taken by an operation: notified, acknowledged ──► used all the same

The last takings and grants of each registration are remembered, also of those that are gone: a driver that goes on
after unregister or release is told what it did. Everything here is bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmubusd.notify.translation import WRITE, Dropped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mmubusd.notify.notice import RegistrationId
    from mmubusd.notify.registration import Registration

GONE_MAX = 256
"""Registrations that are remembered after their end."""


@dataclass(frozen=True, slots=True)
class Given:
    """Translations that were granted. start, end: bytes, or pfn and pfn + 1; at: the bus's clock."""

    start: int
    end: int
    at: float


@dataclass(frozen=True, slots=True)
class Taken:
    """Pages that a registration held and lost.

    start, end: bytes, or pfn and pfn + 1 on the rmap list; notified_at, acked_at: the bus's clock, None: was not told.
    because: why it was not told, or how it lost them without an operation. entries, generations: what was held there
    (pfn << 2 | rights), shape (pages,), or None where they were too many to be kept.
    """

    registration: RegistrationId
    start: int
    end: int
    operation: str
    round: int
    notified_at: float | None
    acked_at: float | None
    because: str = ""
    entries: NDArray[np.uint64] | None = None
    generations: NDArray[np.uint32] | None = None

    def wrote(self, pfn: int, generation: int) -> bool:
        """Whether it held this life of the frame with the right to write."""
        if self.entries is None or self.generations is None:
            return False
        held = (self.entries >> 2 == pfn) & (self.generations == generation) & (self.entries & WRITE != 0)
        return bool(held.any())


MM_ENDED = "its address space has ended"


@dataclass(frozen=True, slots=True)
class Gone:
    """A registration that has ended.

    because: "it was unregistered", MM_ENDED, ...; heard: the last notice that its session had
    acknowledged by then.
    """

    session: int
    name: str
    mm: int
    at: float
    because: str
    heard: int

    @property
    def mm_ended(self) -> bool:
        """Whether it ended by a release, which the driver did not choose."""
        return self.because == MM_ENDED


class PageHistory:
    """Grants and takings of every registration. Args: kept_max: of each, a registration."""

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self._given: dict[int, deque[Given]] = {}
        self._taken: dict[int, deque[Taken]] = {}
        self._gone: OrderedDict[int, Gone] = OrderedDict()

    def give(self, registration: int, start: int, end: int, at: float) -> None:
        """Translations of [start, end) were granted."""
        given = self._given.get(registration)
        if given is None:
            given = self._given[registration] = deque(maxlen=self._kept_max)
        given.append(Given(start, end, at))

    def take(self, taken: Taken) -> None:
        """Pages were taken away."""
        kept = self._taken.get(taken.registration)
        if kept is None:
            kept = self._taken[taken.registration] = deque(maxlen=self._kept_max)
        kept.append(taken)

    def end(self, registration: Registration, at: float, because: str, pages: Dropped) -> None:
        """The registration is no more; what it held is void."""
        if pages.pages:
            self.take(
                Taken(
                    registration.id, 0, 1 << 64, "", 0, None, None, because, pages.entries, pages.generations,
                )
            )  # fmt: skip
        self._gone[registration.id] = Gone(
            registration.session.id, registration.session.name, registration.mm, at, because,
            registration.session.outbox.heard,
        )  # fmt: skip
        while len(self._gone) > GONE_MAX:
            oldest, _ = self._gone.popitem(last=False)
            self._given.pop(oldest, None)
            self._taken.pop(oldest, None)

    def gone(self, registration: int) -> Gone | None:
        """How the registration ended; None when it has not, or longer ago than is remembered."""
        return self._gone.get(registration)

    def ended_since(self, session: int, at: float) -> bool:
        """Whether a registration of the session has ended at that time or later."""
        return any(gone.session == session and gone.at >= at for gone in self._gone.values())

    def gone_from(self, mm: int) -> list[tuple[int, Gone]]:
        """Registrations on an address space that have ended, latest first."""
        return [(number, gone) for number, gone in reversed(self._gone.items()) if gone.mm == mm]

    def taken(self, registration: int, at: int) -> Taken | None:
        """Who took the page at this address (or this frame) last, as far as it is remembered."""
        for taken in reversed(self._taken.get(registration, ())):
            if taken.start <= at < taken.end:
                return taken
        return None

    def writers(self, pfn: int, generation: int) -> list[Taken]:
        """Everyone who held this life of the frame with the right to write, latest first."""
        found = [taken for kept in self._taken.values() for taken in kept if taken.wrote(pfn, generation)]
        return sorted(found, key=lambda taken: taken.acked_at or 0.0, reverse=True)

    def story(self, registration: int, at: int) -> list[str]:
        """The page's history with this registration, in order of time, one sentence a line."""
        taken = self.taken(registration, at)
        told = None if taken is None else taken.notified_at
        lines = []
        for given in reversed(self._given.get(registration, ())):
            if given.start <= at < given.end and (told is None or given.at <= told):
                lines.append(f"given out at {given.at:.6f} s")
                break
        if taken is not None:
            by = f"taken by {taken.operation or 'an operation'} in round {taken.round}" if taken.round else "void"
            if taken.notified_at is None or taken.acked_at is None:
                lines.append(f"{by}: {taken.because}")
            else:
                lines.append(f"{by}, notified at {taken.notified_at:.6f} s")
                lines.append(f"acknowledged at {taken.acked_at:.6f} s")
        gone = self._gone.get(registration)
        if gone is not None:
            lines.append(f"the registration ended at {gone.at:.6f} s: {gone.because}")
        return lines
