"""What only this room sees happen, counted where it is rare: failures, and notices too long for a message."""

from __future__ import annotations

from collections import Counter

__all__ = ["Tally"]


class Tally:
    """Counters since the start.

    Attributes:
        failed_rpcs: calls and streams that ended with a status, by its name.
        failed_calls: memory calls that failed, by errno's name.
        unauthenticated: callers who were turned away.
        oversized: notices that were sent as FLUSH_ALL because no message holds them.
    """

    def __init__(self) -> None:
        self.failed_rpcs: Counter[str] = Counter()
        self.failed_calls: Counter[str] = Counter()
        self.unauthenticated = 0
        self.oversized = 0
