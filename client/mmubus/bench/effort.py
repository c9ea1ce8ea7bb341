"""How much is measured, and how runs of several contenders are laid out in time."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Effort", "Sample", "in_turn"]

Sample = Callable[[], Awaitable[float]]
"""Takes one run of one contender."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Sample counts. Every figure is the median of `runs` runs.

    Attributes:
        rounds: of one run of a latency, which is their median; flights: of one run of a rate.
        chunks: of the comparison with the core without notifier calls; operations: of one run of the operation stream.
        curve: whether scaling curves are drawn with all their points.
    """

    runs: int
    rounds: int
    flights: int
    chunks: int
    operations: int
    curve: bool


QUICK = Effort(runs=3, rounds=150, flights=6_000, chunks=20, operations=15_000, curve=False)
FULL = Effort(runs=7, rounds=400, flights=16_000, chunks=60, operations=45_000, curve=True)


async def in_turn(samples: Mapping[str, Sample], runs: int) -> dict[str, float]:
    """Measure everybody once, then everybody again, in the other order: A B C, C B A, ...

    What happens to the machine meanwhile happens to all of them.
    Returns: the median of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in samples}
    for run in range(runs):
        for name in sorted(samples, reverse=run % 2 == 1):
            taken[name].append(await samples[name]())
    return {name: statistics.median(values) for name, values in taken.items()}
