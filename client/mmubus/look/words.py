"""Numbers in words: times from microseconds to hours, and addresses short enough to be read."""

from __future__ import annotations

__all__ = ["address_range", "took"]


def took(seconds: float) -> str:
    """A time for people, three digits of it: "611 µs", "1.25 s", "3.4 min"."""
    steps = ((999.5e-6, 1e6, "µs"), (999.5e-3, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min"))
    for limit, factor, unit in steps:
        if seconds < limit:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds / 3600)} h"


def address_range(start: int, end: int) -> str:
    """[start, end) as /proc/PID/maps writes it."""
    return f"{start:x}-{end:x}"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 or not value else f"{value:.2f}"
