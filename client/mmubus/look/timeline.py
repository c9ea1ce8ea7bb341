"""Rounds as points in time: when each was opened, how long it took, and whom it waited for last."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmu.v1 import inspection_pb2 as pb

from mmubus.look.columns import late
from mmubus.look.glance import Glance

__all__ = ["SHORTEST_S", "Dot", "Timeline"]

SHORTEST_S, LONGEST_S = 100e-6, 10.0
"""What the vertical axis reaches from and to; it is logarithmic."""
ROUNDS_MAX = 2048


@dataclass(frozen=True, slots=True)
class Dot:
    """A round. left: 0 is the window's start, 1 is now; height: 0 is quick, 1 is slow; who: whom it waited for."""

    round: pb.Round
    left: float
    height: float
    who: str
    late: bool


class Timeline:
    """The rounds of the last window_s seconds, as far as they were seen: of many in a short time, the server remembers
    only the last.

    Attributes: unseen: rounds that ended between two glances and were not seen.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self.unseen = 0
        self._rounds: dict[int, tuple[float, pb.Round]] = {}  # by number: when it was opened on our clock
        self._newest = 0
        self._epoch = 0
        self._now = 0.0

    def add(self, glance: Glance) -> None:
        """Take over what a glance has seen. Taking over the same again changes nothing."""
        epoch = 0 if glance.statistics is None else glance.statistics.epoch
        if epoch != self._epoch:
            self._rounds.clear()
            self._epoch, self._newest, self.unseen = epoch, 0, 0
        self._now = glance.at
        numbers = [one.round for one in glance.ended]
        if numbers and self._newest:
            self.unseen += max(0, min(numbers) - self._newest - 1)
        self._newest = max([self._newest, *numbers])
        for one in (*reversed(glance.ended), *glance.open):
            self._rounds.pop(one.round, None)
            self._rounds[one.round] = (glance.at - one.age_s, one)
        standing = {one.round for one in glance.open}
        begin = glance.at - self.window_s
        for number, (opened_at, one) in list(self._rounds.items()):
            if number not in standing and (one.open or opened_at < begin):  # its end was not seen, or it is long ago
                del self._rounds[number]
        for number in list(self._rounds)[: max(0, len(self._rounds) - ROUNDS_MAX)]:
            del self._rounds[number]

    def dots(self) -> list[Dot]:
        """What is to be drawn, the oldest first."""
        begin = self._now - self.window_s
        return [
            Dot(
                one,
                min(1.0, max(0.0, (at - begin) / self.window_s)),
                height(one.took_s),
                ", ".join(one.waiting_for) if one.open else one.last,
                late(one),
            )
            for at, one in sorted(self._rounds.values(), key=lambda pair: pair[0])
        ]


def height(seconds: float) -> float:
    """Where on the logarithmic axis a time stands: 0 for SHORTEST_S and less, 1 for LONGEST_S and more."""
    if seconds <= SHORTEST_S:
        return 0.0
    return min(1.0, math.log(seconds / SHORTEST_S) / math.log(LONGEST_S / SHORTEST_S))
