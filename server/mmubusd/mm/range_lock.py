"""The range lock of an address space: our mmap_lock.

Calls on disjoint ranges hold it side by side; overlapping ones get it in order of arrival, so nobody starves. Whoever
must wait yields `LockWait(ticket)` and is resumed when the ticket has been granted.

Tickets are found by overlap, as `notify.intervals` finds registrations: by length class, sorted by start. What it costs
to queue up grows with the tickets that overlap, not with those that are held elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

Range = tuple[int, int]


class Ticket:
    """One call's place in the queue: the ranges it works on, and whether it holds them.

    Attributes:
        earlier_nr: tickets before it that overlap it and are not released; later: those that count it so.
        earlier: the tickets before it that overlapped it when it was asked for, to see whom it waits for.
        owner: who was running when it was asked for, as the driver of operations said; None: nobody did.
    """

    __slots__ = ("earlier", "earlier_nr", "granted", "later", "owner", "ranges", "released")

    def __init__(self, ranges: tuple[Range, ...]) -> None:
        self.ranges = ranges
        self.granted = self.released = False
        self.earlier_nr = 0
        self.earlier: tuple[Ticket, ...] = ()
        self.later: list[Ticket] = []
        self.owner: object = None


class Grants(list[Ticket]):
    """Tickets that became granted, for whoever drives operations; shared by every lock of a machine.

    Attributes: owner: whose step is being run; tickets remember it, so that a wait for a lock can be followed.
    """

    owner: object = None


class _Class:
    """Tickets for ranges of about the same length. starts: ascending, equal ones in order of arrival; held: for each
    the range's end and the ticket."""

    __slots__ = ("held", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.held: list[tuple[int, Ticket]] = []


class RangeLock:
    """All tickets of one address space.

    Ensures: a ticket is granted exactly when no earlier ticket that overlaps it is left.
    Args: granted: where tickets go that a release has granted; shared with the whole machine.
    """

    __slots__ = ("_classes", "_granted")

    def __init__(self, granted: Grants) -> None:
        self._classes: dict[int, _Class] = {}  # by the bit length of a range's last offset
        self._granted = granted

    def __bool__(self) -> bool:
        """Whether anyone holds or awaits any range."""
        return bool(self._classes)

    def acquire(self, *ranges: Range) -> Ticket:
        """Queue up for the ranges; the ticket says whether they are held at once."""
        ticket = Ticket(ranges)
        ticket.owner = self._granted.owner
        if len(ranges) == 1:
            found = self._overlapping(*ranges[0])
        else:
            found = [earlier for start, end in ranges for earlier in self._overlapping(start, end)]
        if found:
            ticket.earlier = tuple(dict.fromkeys(found))
            ticket.earlier_nr = len(ticket.earlier)
            for earlier in ticket.earlier:
                earlier.later.append(ticket)
        for start, end in ranges:
            self._put(start, end, ticket)
        ticket.granted = not ticket.earlier_nr
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Leave the queue, whether or not the ticket was granted; grants those that waited for nothing else."""
        ticket.released = True
        ticket.earlier = ()
        for start, end in ticket.ranges:
            length = (end - start - 1).bit_length()
            kind = self._classes[length]
            at = bisect_left(kind.starts, start)
            while kind.held[at][1] is not ticket:  # others wait for the same start, most of them behind it
                at += 1
            del kind.starts[at], kind.held[at]
            if not kind.starts:
                del self._classes[length]
        for waiting in ticket.later:
            waiting.earlier_nr -= 1
            if not waiting.earlier_nr and not waiting.released:
                waiting.granted = True
                self._granted.append(waiting)

    def contended(self, start: int, end: int) -> bool:
        """Whether a call on [start, end) would have to wait now."""
        return bool(self._overlapping(start, end))

    def held_nr(self, start: int, end: int) -> int:
        """How many calls hold a part of [start, end) now."""
        return len({ticket for ticket in self._overlapping(start, end) if ticket.granted})

    def _put(self, start: int, end: int, ticket: Ticket) -> None:
        length = (end - start - 1).bit_length()
        kind = self._classes.get(length)
        if kind is None:
            kind = self._classes[length] = _Class()
        at = bisect_right(kind.starts, start)
        kind.starts.insert(at, start)
        kind.held.insert(at, (end, ticket))

    def _overlapping(self, start: int, end: int) -> list[Ticket]:
        """Those that overlap [start, end), once for each of their ranges that does."""
        found = []
        for length, kind in self._classes.items():
            # What starts further below than this class is long ends below start.
            starts, held = kind.starts, kind.held
            at = bisect_right(starts, start - (1 << length))
            while at < len(starts) and starts[at] < end:
                last, ticket = held[at]
                if last > start:
                    found.append(ticket)
                at += 1
        return found
