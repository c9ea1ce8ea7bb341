"""The commands that print the figures of the promises, with small counts: they work, and nothing is far off."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fuzz
import measure_cycles
import measure_unread


def test_unread_notices() -> None:
    put, ranges, growth, read = measure_unread.measure(10_000)
    assert (put >= 10_000, ranges <= 1024, read <= 1024, growth <= 1 << 20) == (True,) * 4


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
