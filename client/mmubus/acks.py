"""What has been handled and what has been told: the client's half of the acknowledgement window. Plain data, no I/O.

    seq:   1 2 3 4 5 6 7 8
           ───────┐ ·   · ·      done: 1-4, 6; running: 5, 7, 8
                  through = 4    also = [6]

A notice is acknowledged when it is done, never when it arrives. Everything that was done since the last message goes
into one `Acknowledge`. Results are kept for a while after they were sent: when the stream breaks nobody knows what
arrived, and a dirty page must not be lost.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

from mmu.v1 import session_pb2 as pb

__all__ = ["AckWindow", "Arrival"]

RESULTS_KEPT_MAX = 4096


class Arrival(Enum):
    """What to do with a notice that arrives."""

    NEW = "handle it"
    RUNNING = "it is being handled; it came twice"
    DONE = "it was handled before; it is acknowledged again"
    GAP = "notices before it are missing"


class AckWindow:
    """One session's window.

    Attributes:
        through: every notice up to this one is done.
        received: the latest notice that has arrived.
        handled: notices that were done, all together.
    """

    def __init__(self) -> None:
        self.through = 0
        self.received = 0
        self.handled = 0
        self._beyond: set[int] = set()
        self._failed: set[int] = set()
        self._told_through = 0
        self._also: list[int] = []
        self._results: list[pb.NoticeResult] = []
        self._kept: OrderedDict[int, pb.NoticeResult] = OrderedDict()

    def arrive(self, seq: int) -> Arrival:
        """A notice has arrived. GAP changes nothing; after `begin_at` it would be NEW."""
        if seq == self.received + 1:
            self.received = seq
            return Arrival.NEW
        if seq > self.received:
            return Arrival.GAP
        if seq in self._failed:
            self._failed.discard(seq)
            return Arrival.NEW
        if seq <= self.through or seq in self._beyond:
            self._tell_again(seq)
            return Arrival.DONE
        return Arrival.RUNNING

    def begin_at(self, seq: int) -> None:
        """The next notice is seq: notices before it are missing, and everything that was held has been dropped."""
        if seq > self.received:
            self.through = self.received = seq - 1
            self._beyond.clear()
            self._failed.clear()

    def done(self, seq: int, result: pb.NoticeResult | None = None) -> None:
        """The handlers of a notice have finished."""
        self.handled += 1
        if result is not None:
            self._results.append(result)
            self._kept[seq] = result
            if len(self._kept) > RESULTS_KEPT_MAX:
                self._kept.popitem(last=False)
        if seq == self.through + 1:
            self.through = seq
            if self._beyond:
                self._absorb()
        elif seq > self.through:
            self._beyond.add(seq)
            self._also.append(seq)

    def run_done(self, first: int, count: int) -> None:
        """So many notices from the next one on have arrived and are done, and nothing was said but that.

        Requires: first is the one after the last that has arrived.
        """
        self.received += count
        if self.through == first - 1:
            self.through += count
            self.handled += count
        else:
            for seq in range(first, first + count):
                self.done(seq)

    def busy(self, seq: int) -> None:
        """A notice needs more time."""
        self._results.append(pb.NoticeResult(seq=seq, busy=True))

    def failed(self, seq: int, what: str) -> None:
        """The handlers of a notice have failed: it stays open, and is handled again if it arrives again."""
        self._failed.add(seq)
        self._results.append(pb.NoticeResult(seq=seq, failed=what))

    def resume(self) -> int:
        """The stream is a new one: everything that may not have arrived is told again.

        Returns: the notice through which nothing need be sent again, for Hello.
        """
        self._told_through = 0
        self._also = sorted(self._beyond)
        self._results = list(self._kept.values())
        return min(self.through, next(iter(self._kept)) - 1) if self._kept else self.through

    @property
    def pending(self) -> bool:
        """True when there is something to tell."""
        return self._told_through != self.through or bool(self._also) or bool(self._results)

    def take(self) -> pb.Acknowledge | None:
        """Everything that has not been told, in one message; None when there is nothing."""
        if not self.pending:
            return None
        message = pb.Acknowledge(through=self.through)
        if self._also:
            message.also.extend(seq for seq in self._also if seq > self.through)
            self._also = []
        if self._results:
            message.results.extend(self._results)
            self._results = []
        self._told_through = self.through
        return message

    def take_bytes(self) -> bytes:
        """As `take`, as the bytes of an AttachRequest. Nearly all of them say through and nothing else: by hand."""
        if self._also or self._results:
            return pb.AttachRequest(acknowledge=self.take()).SerializeToString()
        through = self.through
        if self._told_through == through:
            return b""
        self._told_through = through
        if through < 128:
            return bytes((0x32, 2, 0x08, through))  # acknowledge = 6, its length; through = 1
        number = bytearray()
        while through > 127:
            number.append(through & 127 | 128)
            through >>= 7
        number.append(through)
        return bytes((0x32, len(number) + 1, 0x08)) + number

    def _absorb(self) -> None:
        while self.through + 1 in self._beyond:
            self.through += 1
            self._beyond.discard(self.through)

    def _tell_again(self, seq: int) -> None:
        """The server does not know that seq is done."""
        self._told_through = 0
        if seq > self.through:
            self._also.append(seq)
        if (result := self._kept.get(seq)) is not None:
            self._results.append(result)
