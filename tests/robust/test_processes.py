"""Clients that misbehave, in real processes: every operation ends within its ack budget."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure_processes import KINDS, can_partition, ends

GRACE_S = 5.0
"""The server's default: what ends by that has not ended by its budget. The figure itself is for the command."""


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_operations_end_within_the_budget(kind: str) -> None:
    if kind == "partition" and not can_partition():
        pytest.skip("a network namespace needs root and iproute2")
    budget_s = 20.0 if kind == "killed" else 0.4
    taken = asyncio.run(ends(kind, count=3, budget_s=budget_s))
    assert max(taken) < GRACE_S, "a process that has ended is not waited for, any other for its budget"
    if kind != "killed":
        assert min(taken) >= 0.39, "nobody is fenced before the budget is over"
