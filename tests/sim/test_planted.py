"""The simulation finds what it is there to find: each planted bug breaks a rule within 200 seeds."""

from __future__ import annotations

import pytest
from mmubusd.sim import PLANTED
from mmubusd.sim.search import find_planted

SEEDS = 200


def test_there_are_enough() -> None:
    assert len(PLANTED) >= 20
    assert all(one.what for one in PLANTED.values())


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(name: str) -> None:
    found = find_planted(PLANTED[name], SEEDS)
    assert found is not None, f"{PLANTED[name].what}: not found in {SEEDS} seeds"
    assert found.problems
