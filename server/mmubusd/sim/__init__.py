"""Seeded whole-system runs: the real cores on a simulated network and clock."""

from mmubusd.sim.planted import PLANTED, Planted
from mmubusd.sim.simulation import CALM, Faults, Simulation

__all__ = ["CALM", "PLANTED", "Faults", "Planted", "Simulation"]
