"""What happened, as a list of events that validators judge.

Unless it is recording, nothing is kept here and noting costs one test. A recording grows without bound: it is for
tests, simulations and runs that someone asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class What(StrEnum):
    """Kinds of events. Those of the client are noted by whoever plays it."""

    REGISTERED = "registered"  # registration, session, mm, [start, end); text: names of its ops
    UNREGISTERED = "unregistered"  # registration, session
    ROUND_OPENED = "round opened"  # round, mm, spans in ranges, text: kind; barred until LIFTED
    ROUND_ENDED = "round ended"  # round
    LIFTED = "lifted"  # round: its bar
    PUT = "put"  # round, session, registration: a notice that voids; text: the op
    END_PUT = "end put"  # round, session, registration
    MERGED = "merged"  # round, session: its start; number: the round under whose number its end will come, 0: none will
    DEAF = "deaf"  # round, registration, ranges: has no op for it
    ACKED = "acked"  # round, session, registration
    REFUSED = "refused"  # round, session, registration; text: "invalidate_range_start" when it was that
    GRANTED = "granted"  # session, registration, start (0 and no end for exports), pfns, generations
    RETURNED = "returned"  # session, registration, pfns: exports that it gave back
    WITHDRAWN = "withdrawn"  # registration: all that it holds is void (fence, unregister, release, leave)
    FENCED = "fenced"  # session
    DEMOTED = "demoted"  # session, text: why; each registration is withdrawn for it
    DIRTIED = "dirtied"  # session, registration, start, pfns: on the frames now
    DMA_READ = "dma read"  # session, registration, start, pfns, generations
    DMA_WRITTEN = "dma written"
    STALE = "stale"  # session, registration: refused
    FREED = "freed"  # pfns, generations that have ended
    CLIENT_RECEIVED = "client received"  # session, round: number is the seq
    CLIENT_WROTE = "client wrote"  # registration, start, pfns: through shared memory, not yet reported
    CLIENT_USES = "client uses"  # session, registration, start, pfns, generations: it believes that it may


class Event(NamedTuple):
    """One event; which fields mean something depends on its kind. at: the bus's clock; ranges: bytes."""

    at: float
    what: What
    session: int = 0
    registration: int = 0
    round: int = 0
    mm: int = 0
    start: int = 0
    end: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    pfns: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    number: int = 0
    text: str = ""


class History:
    """A recording.

    Attributes:
        recording: whether events are kept; events: oldest first; clock: the time that is noted, kept by the bus.
        sink: where events go instead of being kept.
    """

    def __init__(self) -> None:
        self.recording = False
        self.events: list[Event] = []
        self.clock = 0.0
        self.sink: Callable[[Event], None] | None = None
        self._generation: NDArray[np.uint32] | None = None

    def note(
        self, what: What, *, session: int = 0, registration: int = 0, round_id: int = 0, mm: int = 0, start: int = 0,
        end: int = 0, ranges: Sequence[tuple[int, int]] = (), pfns: Sequence[int] = (), generations: Sequence[int] = (),
        number: int = 0, text: str = "",
    ) -> None:  # fmt: skip
        """Keep an event. Callers on busy paths test `recording` first."""
        if self.recording:
            event = Event(
                self.clock, what, session, registration, round_id, mm, start, end, tuple(ranges), tuple(pfns),
                tuple(generations), number, text,
            )  # fmt: skip
            if self.sink is None:
                self.events.append(event)
            else:
                self.sink(event)

    def note_freed(self, generation: NDArray[np.uint32]) -> None:
        """Find the frames that were freed since the last time: they have another generation. O(frames).

        Args: generation: shape (frames,), uint32.
        """
        if not self.recording:
            return
        if self._generation is not None:
            changed = np.flatnonzero(self._generation != generation)
            if len(changed):
                self.note(What.FREED, pfns=changed.tolist(), generations=self._generation[changed].tolist())
                self._generation[changed] = generation[changed]
        else:
            self._generation = generation.copy()
