"""What a page may hold, when programs and devices write to it at the same time.

An operation that changes a page begins, and ends; between the two its outcome may or may not be there. Several that
overlap form a cluster: when the last of them has ended, the outcome of any one of them may be what is there. A reader
sees one of the values that were possible at some moment between its beginning and its end. Nothing else is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

UNMAPPED = None
Value = bytes | None


class Cell:
    """One page. Attributes: candidates: what it may hold now; UNMAPPED: nothing, an access fails."""

    def __init__(self, value: Value = UNMAPPED) -> None:
        self.candidates: set[Value] = {value}
        self._cluster: set[Value] = set()
        self._changed = False
        self._under_way = 0
        self._readers: dict[int, set[Value]] = {}  # by identity: equal sets are still two readers'
        self.follower: Cell | None = None  # where the page is being moved to: what is written here may be there
        self.protected = 0  # times that the right to write was taken and not yet given back
        self.protections = 0  # times that it was taken so far

    @property
    def quiet(self) -> bool:
        """No operation is under way."""
        return not self._under_way

    def begin(self, *outcomes: Value) -> None:
        """An operation begins that may leave one of these."""
        if not self._under_way:
            self._cluster, self._changed = set(), False
        self._under_way += 1
        self._admit(outcomes)
        if self.follower is not None:
            self.follower._admit(outcomes)

    def _admit(self, outcomes: Iterable[Value]) -> None:
        self._cluster.update(outcomes)
        self.candidates.update(outcomes)
        for reader in self._readers.values():
            reader.update(outcomes)

    def end(self, *, done: bool = True) -> None:
        """It has ended. Args: done: it certainly had its effect; False: perhaps not."""
        self._under_way -= 1
        self._changed |= done
        if not self._under_way and self._changed:
            self.candidates = set(self._cluster)

    @contextmanager
    def watched(self) -> Iterator[set[Value]]:
        """Everything that is possible at some moment from here on to the end of the block."""
        seen = set(self.candidates)
        self._readers[id(seen)] = seen
        try:
            yield seen
        finally:
            del self._readers[id(seen)]

    def learn(self, value: Value) -> None:
        """The value was read while nothing was under way: it is that one."""
        if self.quiet:
            self.candidates = {value}
