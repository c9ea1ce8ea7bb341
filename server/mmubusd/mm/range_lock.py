"""The range lock of an address space: our mmap_lock.

Calls on disjoint ranges hold it side by side; overlapping ones get it in order of arrival, so nobody starves. Whoever
must wait yields `LockWait(ticket)` and is resumed when the ticket has been granted.
"""

from __future__ import annotations


class Ticket:
    """One call's place in the queue: the ranges it works on, and whether it holds them."""

    __slots__ = ("granted", "ranges")

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self.ranges = ranges
        self.granted = False

    def overlaps(self, other: Ticket) -> bool:
        return any(a < d and c < b for a, b in self.ranges for c, d in other.ranges)


class RangeLock:
    """All tickets of one address space in order of arrival.

    Ensures: a ticket is granted exactly when no earlier ticket that overlaps it is left.
    Args: granted: where tickets go that a release has granted; shared with the whole machine.
    """

    __slots__ = ("_granted", "_tickets")

    def __init__(self, granted: list[Ticket]) -> None:
        self._tickets: list[Ticket] = []
        self._granted = granted

    def __bool__(self) -> bool:
        """Whether anyone holds or awaits any range."""
        return bool(self._tickets)

    def acquire(self, *ranges: tuple[int, int]) -> Ticket:
        """Queue up for the ranges; the ticket says whether they are held at once."""
        ticket = Ticket(ranges)
        ticket.granted = not any(earlier.overlaps(ticket) for earlier in self._tickets)
        self._tickets.append(ticket)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Leave the queue, whether or not the ticket was granted; grants those that waited for nothing else."""
        at = self._tickets.index(ticket)
        del self._tickets[at]
        for place in range(at, len(self._tickets)):
            waiting = self._tickets[place]
            if waiting.granted or not waiting.overlaps(ticket):
                continue
            if not any(earlier.overlaps(waiting) for earlier in self._tickets[:place]):
                waiting.granted = True
                self._granted.append(waiting)

    def contended(self, start: int, end: int) -> bool:
        """Whether a call on [start, end) would have to wait now."""
        return any(a < end and start < b for ticket in self._tickets for a, b in ticket.ranges)
