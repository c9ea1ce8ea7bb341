"""Rows: what a bound says, and what machines are told."""

from __future__ import annotations

import pytest
from mmubus.bench.row import Row, at_least, below, not_measured, ratio_at_least, ratio_at_most, ratio_below, rounded

KEYS = ["measure", "unit", "ours", "other", "against", "ratio", "bound", "met"]


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (Row("m", "us", 150.0, 120.0, "floor", ratio_at_most(1.25)), 1.25, True),
        (Row("m", "us", 151.0, 120.0, "floor", ratio_at_most(1.25)), 151 / 120, False),
        (Row("m", "us", 100.0, 100.0, "peer", ratio_below(1)), 1.0, False),
        (Row("m", "us", 99.0, 100.0, "peer", ratio_below(1)), 0.99, True),
        (Row("m", "rounds/s", 500.0, 100.0, "peer", ratio_at_least(5)), 5.0, True),
        (Row("m", "rounds/s", 499.0, 100.0, "peer", ratio_at_least(5)), 4.99, False),
        (Row("m", "operations/s", 20_000.0, bound=at_least(20_000)), None, True),
        (Row("m", "KiB", 64.1, bound=below(64)), None, False),
        (Row("m", "us", 10.0, 5.0, "floor"), 2.0, None),
        (Row("m", "us", 10.0, None, "floor", ratio_at_most(1)), None, None),
    ],
)
def test_bound(row: Row, ratio: float | None, met: bool | None) -> None:
    assert row.ratio == pytest.approx(ratio) if ratio is not None else row.ratio is None
    assert row.met is met


def test_json_has_these_keys_and_plain_values() -> None:
    found = Row("m", "us", 151.23456, 120.0, "floor", ratio_at_most(1.25)).as_json()
    assert list(found) == KEYS
    assert found == {
        "measure": "m",
        "unit": "us",
        "ours": 151.2,
        "other": 120.0,
        "against": "floor",
        "ratio": 1.26,
        "bound": "ratio <= 1.25",
        "met": False,
    }


def test_what_was_not_measured_has_no_figures_and_says_why() -> None:
    found = not_measured("m", "us", "NATS", "apt-get install nats-server", ratio_below(1)).as_json()
    assert (found["ours"], found["other"], found["ratio"], found["met"]) == (None, None, None, None)
    assert found["against"] == "NATS: not measured: apt-get install nats-server"


@pytest.mark.parametrize(
    ("value", "short"), [(123456.0, 123456.0), (0.123456, 0.1235), (12.3456, 12.35), (0.0, 0.0), (None, None)]
)
def test_four_digits(value: float | None, short: float | None) -> None:
    assert rounded(value) == short
