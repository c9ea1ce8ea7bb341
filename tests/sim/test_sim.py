"""Seeded whole-system runs. A failing seed is printed and replays: Simulation(seed).run()."""

import pytest
from sim.simulation import Simulation


@pytest.mark.parametrize("seed", range(50))
def test_rules_hold(seed: int) -> None:
    problems = Simulation(seed).run()
    assert not problems, "\n".join(problems)


def test_a_seed_replays_exactly() -> None:
    first, second = Simulation(7), Simulation(7)
    assert first.run() == second.run()
    assert first.bus.history.events == second.bus.history.events
    assert len(first.bus.history.events) > 200
