"""The histogram: quantiles within its promise, at a constant size."""

import pytest
from mmubusd.notify.histogram import Histogram


@pytest.mark.parametrize("seconds", [1e-6, 3e-6, 77e-6, 0.0024, 0.4, 1.9, 59.0])
def test_within_nine_percent(seconds: float) -> None:
    histogram = Histogram()
    histogram.add(seconds, 10)
    assert histogram.quantile(0.5) == pytest.approx(seconds, rel=0.09)


def test_quantiles_and_bounds() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.99) == 0.0
    histogram.add(0.001, 99)
    histogram.add(1.0)
    histogram.add(0.0)
    histogram.add(1e9)
    assert histogram.count == 102
    assert histogram.quantile(0.5) == pytest.approx(0.001, rel=0.09)
    assert histogram.quantile(0.985) == pytest.approx(1.0, rel=0.09)
    assert histogram.quantile(1.0) < 1e9
    other = Histogram()
    other.merge(histogram)
    other.merge(histogram)
    assert other.count == 204
    assert other.quantile(0.5) == histogram.quantile(0.5)
