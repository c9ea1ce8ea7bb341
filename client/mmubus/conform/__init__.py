"""The conformance kit: a driver of yours, put through everything that a notifier must bear."""

from mmubus.conform.kit import Broken, Driver, Outcome, Subject, conform
from mmubus.conform.scenarios import SCENARIOS
from mmubus.conform.subject import Command, Factory, Made

__all__ = ["SCENARIOS", "Broken", "Command", "Driver", "Factory", "Made", "Outcome", "Subject", "conform"]
