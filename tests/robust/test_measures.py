"""The commands that print the figures of the promises, with small counts: they work, and nothing is far off."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fuzz
import measure_cycles
import measure_isolation
import measure_unread
import measure_unread_served


def test_unread_notices() -> None:
    put, ranges, growth, read = measure_unread.measure(10_000)
    assert (put >= 10_000, ranges <= 1024, read <= 1024, growth <= 1 << 20) == (True,) * 4


@pytest.mark.e2e
@pytest.mark.slow
def test_unread_notices_over_the_wire() -> None:
    filled, flooded, read, _ = asyncio.run(measure_unread_served.measure(20_000))
    assert (flooded.raised >= 20_000, flooded.waiting <= 1024, flooded.grown <= 1 << 20) == (True,) * 3
    assert read >= measure_unread.IN_FLIGHT
    assert filled.raised >= measure_unread_served.FILL


@pytest.mark.e2e
@pytest.mark.slow
def test_rounds_go_on_beside_stopped_clients() -> None:
    """That they are no slower is for the command to measure, on a machine of its own."""
    found = asyncio.run(measure_isolation.measure(pairs=2, block_s=0.2))
    assert len(found.well) == len(found.stopped) == 2
    assert all(len(block) for block in (*found.well, *found.stopped))
    low, high = found.interval()
    assert low <= found.ratio() <= high


@pytest.mark.e2e
@pytest.mark.slow
def test_cycles_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_cycles, "WARM", 50)
    ours = asyncio.run(measure_cycles.drive("ours", 100, settle_s=1.0))
    assert ours["tasks"] == 0
    assert ours["in_use"] < 1 << 20, "100 cycles: a leak of 10 KiB each would be more"


@pytest.mark.e2e
@pytest.mark.slow
def test_hostile_messages() -> None:
    sent, bystander = asyncio.run(fuzz.fuzz(3000, seed=5))
    assert sent >= 3000
    assert bystander.rounds > 5
