"""Looking at a server again and again: a glance is all that was to be seen at one moment, two of them give rates.

none ──look──► a glance ──look──► a newer one, and rates
                   └─the server is away─► the same glance, and why there is no newer one
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mmu.v1 import inspection_pb2 as pb

from mmubus.connection import Bus
from mmubus.errors import CallFailed, ConnectionLost, MmuBusError

__all__ = ["Glance", "Watch"]

ENDED = 256
"""Ended rounds that are asked for; the server remembers as many."""
ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Glance:
    """The server at one moment.

    Attributes:
        at: monotonic seconds.
        statistics: None when this client may not see those of the whole server.
        sessions: those that others waited for most come first.
        open, ended: rounds, the oldest open one and the newest ended one first.
        address_spaces: by number.
    """

    at: float
    statistics: pb.GetStatisticsResponse | None
    sessions: Sequence[pb.Session]
    open: Sequence[pb.Round]
    ended: Sequence[pb.Round]
    address_spaces: Sequence[pb.AddressSpace]

    @property
    def late(self) -> list[str]:
        """Names of the sessions that open rounds wait for, the one waited for longest first."""
        return list(dict.fromkeys(name for one in self.open for name in one.waiting_for))


class Watch:
    """Looks at one server, no more often than makes sense, for as many as want to see it.

    Args: fresh_s: a glance that is younger is given again instead of asking the server.
    Attributes: latest, before: the last two glances. failed: why there is none newer than latest, or None.
    """

    def __init__(self, bus: Bus, *, fresh_s: float = 0.4) -> None:
        self.bus = bus
        self.latest: Glance | None = None
        self.before: Glance | None = None
        self.failed: MmuBusError | None = None
        self._fresh_s = fresh_s
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def look(self) -> Glance | None:
        """Look, unless somebody just has. Returns: the latest glance, which is an old one when `failed` says so.

        A cancelled look loses nothing.
        """
        async with self._looking:
            if time.monotonic() - self._looked_at >= self._fresh_s:
                try:
                    # Not wait_for: until Python 3.12 it passes over a cancellation that comes as the answer does, and
                    # whoever has cancelled waits for ever.
                    async with asyncio.timeout(ANSWER_TIMEOUT_S):
                        found = await _glance(self.bus)
                    self.before, self.latest, self.failed = self.latest, found, None
                except TimeoutError:
                    self.failed = ConnectionLost(f"the server has not answered within {ANSWER_TIMEOUT_S:.0f} s")
                except MmuBusError as error:
                    self.failed = error
                self._looked_at = time.monotonic()
        return self.latest

    def rate(self, counter: str) -> float | None:
        """How fast a counter of the statistics grows, per second; None before two glances, or over a restart."""
        latest, before = self.latest, self.before
        if latest is None or before is None or latest.statistics is None or before.statistics is None:
            return None
        grown = getattr(latest.statistics, counter) - getattr(before.statistics, counter)
        if latest.statistics.epoch != before.statistics.epoch or grown < 0:
            return None
        return float(grown / (latest.at - before.at))


async def _glance(bus: Bus) -> Glance:
    """Raises: MmuBusError."""
    inspection = bus.inspection
    sessions, rounds, spaces, statistics = await asyncio.gather(
        inspection.sessions(), inspection.rounds(ENDED), inspection.address_spaces(), _statistics(bus)
    )
    return Glance(
        at=time.monotonic(),
        statistics=statistics,
        sessions=sorted(sessions, key=lambda one: (-one.harm_s, -one.late, one.session)),
        open=[one for one in rounds if one.open],
        ended=[one for one in rounds if not one.open],
        address_spaces=sorted(spaces, key=lambda one: one.mm),
    )


async def _statistics(bus: Bus) -> pb.GetStatisticsResponse | None:
    try:
        return await bus.inspection.statistics()
    except CallFailed as refused:
        if refused.reason in ("EACCES", "EPERM", "PERMISSION_DENIED"):
            return None  # they are for administrators
        raise
