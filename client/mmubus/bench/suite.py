"""The whole benchmark: its parts in order, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from mmubus.bench.brokers import BrokerFailed
from mmubus.bench.effort import Effort
from mmubus.bench.measure_core import core
from mmubus.bench.measure_fanout import curves, filtered
from mmubus.bench.measure_rounds import rounds
from mmubus.bench.measure_server import footprint, lag, operations
from mmubus.bench.row import Row, not_measured
from mmubus.bench.worker import WorkerFailed

__all__ = ["PARTS", "run"]

Say = Callable[[str], None]

PARTS = ("core", "rounds", "fanout", "operations", "memory", "lag", "curves")


@dataclass(frozen=True, slots=True)
class _Plan:
    effort: Effort
    peers: bool
    say: Say

    def part(self, name: str) -> AsyncIterator[Row]:
        match name:
            case "core":
                return core(self.effort, self.say)
            case "rounds":
                return rounds(self.effort, self.peers, self.say)
            case "fanout":
                return filtered(self.effort, self.say)
            case "operations":
                return operations(self.effort, self.say)
            case "memory":
                return footprint(self.say)
            case "lag":
                return lag(self.effort, self.say)
            case "curves":
                return curves(self.effort, self.say)
        raise ValueError(f"there is no part {name!r}; there are {', '.join(PARTS)}")


async def run(effort: Effort, *, peers: bool, say: Say, parts: Sequence[str] = PARTS) -> list[Row]:
    """Measure.

    Args: peers: also what people use instead; say: is told what is being done; parts: which ones.
    Returns: the rows. A part that fails ends early; a row says so.
    """
    plan = _Plan(effort, peers, say)
    rows: list[Row] = []
    for name in parts:
        try:
            async for row in plan.part(name):
                rows.append(row)
        except (WorkerFailed, BrokerFailed) as error:
            say(f"{name}: {error}")
            rows.append(not_measured(f"the rest of {name}", "", "", str(error)))
    return rows
