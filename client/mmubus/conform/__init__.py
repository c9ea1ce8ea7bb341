"""The conformance kit: a driver of yours, put through everything that a notifier must bear."""

from mmubus.conform.kit import Broken, Driver, Factory, Outcome, conform
from mmubus.conform.scenarios import SCENARIOS

__all__ = ["SCENARIOS", "Broken", "Driver", "Factory", "Outcome", "conform"]
