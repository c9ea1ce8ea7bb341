"""Pictures: the curves, and the comparisons as bars. Needs matplotlib, the `bench` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmubus.bench.measure_fanout import CURVE
from mmubus.bench.report import curve_points
from mmubus.bench.row import Row

__all__ = ["draw"]


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write curves.svg and comparisons.svg.

    Returns: the files. Raises: ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "mmubus", "svg.fonttype": "none", "font.size": 9})
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if curve_points(rows):
        drawn.append(_curves(rows, directory / "curves.svg"))
    if any(row.other is not None for row in rows):
        drawn.append(_comparisons(rows, directory / "comparisons.svg"))
    return drawn


def _curves(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib import pyplot

    curves = curve_points(rows)
    across = 3
    down = -(-len(curves) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(11, 3 * down), squeeze=False, layout="constrained")
    for panel in axes.flat[len(curves) :]:
        panel.set_visible(False)
    for panel, (axis, points) in zip(axes.flat, curves.items(), strict=False):
        panel.loglog(*zip(*points, strict=True), marker="o", linewidth=1.2)
        panel.set_title(axis)
        panel.set_ylabel("one round, p50, us")
        panel.set_ylim(bottom=min(us for _, us in points) / 3, top=max(us for _, us in points) * 3)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _comparisons(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib import pyplot

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.other is not None and not row.measure.startswith(CURVE):
            groups.setdefault((row.measure, row.unit), []).append(row)
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(9, sum(len(group) + 2 for group in groups.values()) * 0.28),
        height_ratios=[len(group) + 2 for group in groups.values()], squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, ((measure, unit), group) in zip(axes.flat, groups.items(), strict=True):
        names = ["mmubus", *(row.against for row in group)]
        values = [group[0].ours or 0.0, *(row.other or 0.0 for row in group)]
        panel.barh(names, values, color=["C3", *["C0"] * len(group)])
        panel.bar_label(panel.containers[0], fmt="{:,.4g}", padding=3)
        panel.set_title(f"{measure} ({unit})", loc="left")
        panel.invert_yaxis()
        panel.margins(x=0.12)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
