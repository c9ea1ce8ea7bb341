"""The benchmark: mmubus against the floors that it stands on, and against what people use instead."""

from mmubus.bench.effort import FULL, QUICK, Effort
from mmubus.bench.row import Bound, Row
from mmubus.bench.suite import PARTS, run

__all__ = ["FULL", "PARTS", "QUICK", "Bound", "Effort", "Row", "run"]
