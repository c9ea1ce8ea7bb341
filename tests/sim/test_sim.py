"""Seeded whole-system runs. A failing seed is printed and replays: `mmubus sim --seeds N:N+1`."""

from __future__ import annotations

import pytest
from mmubusd.sim import Simulation

SEEDS, CHUNK = 200, 10


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_rules_hold(first: int) -> None:
    for seed in range(first, first + CHUNK):
        simulation = Simulation(seed)
        problems = simulation.run()
        assert not problems, "\n".join([*problems, *simulation.transcript()])


def test_a_seed_replays_exactly() -> None:
    first, second = Simulation(7), Simulation(7)
    assert first.run() == second.run()
    assert first.bus.history.events == second.bus.history.events
    assert len(first.bus.history.events) > 200
