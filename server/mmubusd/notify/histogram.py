"""A bounded histogram of seconds: 8 buckets an octave from 1 µs to 1 h, so that a quantile is right within 9 %."""

from __future__ import annotations

from collections.abc import Iterator
from math import frexp

_SUB = 8
_SMALLEST_S = 1e-6
_BUCKETS = 32 * _SUB


class Histogram:
    """Counts of durations; adding is O(1) and the size never changes.

    Attributes: count: all that were added.
    """

    __slots__ = ("_buckets", "count")

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self.count = 0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one duration so many times."""
        if seconds <= _SMALLEST_S:
            at = 0
        else:
            mantissa, exponent = frexp(seconds / _SMALLEST_S)  # mantissa in [0.5, 1), exponent >= 1
            at = min((exponent - 1) * _SUB + int((mantissa - 0.5) * 2 * _SUB), _BUCKETS - 1)
        self._buckets[at] += times
        self.count += times

    def merge(self, other: Histogram) -> None:
        """Add everything that the other has counted."""
        self._buckets = [a + b for a, b in zip(self._buckets, other._buckets, strict=True)]
        self.count += other.count

    def octaves(self) -> Iterator[tuple[float, int, float]]:
        """For each octave: its upper bound in seconds, how many durations it holds, and their sum by middles."""
        for octave in range(len(self._buckets) // _SUB):
            part = self._buckets[octave * _SUB : (octave + 1) * _SUB]
            first = _SMALLEST_S * 2**octave
            total = sum(times * first * (1 + (step + 0.5) / _SUB) for step, times in enumerate(part) if times)
            yield first * 2, sum(part), total

    def quantile(self, fraction: float) -> float:
        """The duration in seconds that this fraction stays at or below; 0.0 when nothing was counted."""
        left = fraction * self.count
        for at, times in enumerate(self._buckets):
            left -= times
            if times and left <= 0:
                octave, step = divmod(at, _SUB)
                return float(_SMALLEST_S * 2**octave * (1 + (step + 0.5) / _SUB))
        return 0.0
