"""What a measurement says: one row for people and machines, with its bound where it has one."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

__all__ = ["Bound", "Row", "at_least", "below", "not_measured", "ratio_at_least", "ratio_at_most", "ratio_below"]

RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Bound:
    """What must hold: of "ratio" or of "ours", for example `ratio <= 1.25`."""

    of: str
    relation: str
    value: float

    def __str__(self) -> str:
        return f"{self.of} {self.relation} {self.value:g}"

    def met(self, ours: float, ratio: float | None) -> bool | None:
        """None when there is nothing to compare with."""
        subject = ours if self.of == "ours" else ratio
        return None if subject is None else bool(RELATIONS[self.relation](subject, self.value))


def ratio_at_most(value: float) -> Bound:
    return Bound("ratio", "<=", value)


def ratio_below(value: float) -> Bound:
    return Bound("ratio", "<", value)


def ratio_at_least(value: float) -> Bound:
    return Bound("ratio", ">=", value)


def at_least(value: float) -> Bound:
    return Bound("ours", ">=", value)


def below(value: float) -> Bound:
    return Bound("ours", "<=", value)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        measure: what was measured; unit: of both figures.
        ours: mmubus's figure; other: the one of `against`, or None when it stands alone. None: not measured.
        against: who or what it is compared with; when nothing was measured, why.
    """

    measure: str
    unit: str
    ours: float | None
    other: float | None = None
    against: str = ""
    bound: Bound | None = None

    @property
    def ratio(self) -> float | None:
        """Ours divided by the other's."""
        if self.ours is None or not self.other:
            return None
        return self.ours / self.other

    @property
    def met(self) -> bool | None:
        """Whether the bound holds; None without a bound, or when it was not measured."""
        if self.bound is None or self.ours is None:
            return None
        return self.bound.met(self.ours, self.ratio)

    def as_json(self) -> dict[str, Any]:
        """The row as `mmubus bench --json` prints it."""
        return {
            "measure": self.measure,
            "unit": self.unit,
            "ours": rounded(self.ours),
            "other": rounded(self.other),
            "against": self.against,
            "ratio": rounded(self.ratio),
            "bound": None if self.bound is None else str(self.bound),
            "met": self.met,
        }


def not_measured(measure: str, unit: str, against: str, why: str, bound: Bound | None = None) -> Row:
    """A row that says why there is no figure."""
    return Row(measure, unit, None, None, f"{against}: not measured: {why}".lstrip(": "), bound)


def rounded(value: float | None) -> float | None:
    """Four significant digits: more would claim a precision that nobody has."""
    if value is None or value == 0 or not math.isfinite(value):
        return value
    return round(value, max(0, 3 - math.floor(math.log10(abs(value)))))
