"""What was measured, for machines, for people at a terminal, and for a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from mmubus.bench.measure_fanout import CURVE
from mmubus.bench.row import Row, rounded

__all__ = ["chart", "curve_points", "into_page", "markdown", "table"]

BEGIN, END = "<!-- figures of `mmubus bench` -->", "<!-- end of the figures -->"
"""In a page, what a report goes between."""

BAR = 48
SAID = {True: "met", False: "not met", None: ""}


def table(rows: Iterable[Row]) -> Table:
    """Everything but the points of curves."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title, number in (
        ("measure", 0), ("ours", 1), ("other", 1), ("unit", 0), ("against", 0), ("ratio", 1), ("bound", 0), ("", 0)
    ):  # fmt: skip
        made.add_column(title, justify="right" if number else "left", overflow="fold")
    style = {True: "green", False: "red", None: ""}
    for row in rows:
        if not row.measure.startswith(CURVE):
            *cells, verdict = _cells(row)
            made.add_row(*cells, Text(verdict, style[row.met]))
    return made


def _cells(row: Row) -> tuple[str, ...]:
    bound = "" if row.bound is None else str(row.bound)
    against = row.against if row.ours is not None else f"[{row.against}]"
    return (
        row.measure,
        _figure(row.ours),
        _figure(row.other),
        row.unit,
        against,
        _figure(row.ratio),
        bound,
        SAID[row.met],
    )


def _figure(value: float | None) -> str:
    short = rounded(value)
    if short is None:
        return ""
    return f"{short:,.0f}" if abs(short) >= 1000 or short == int(short) else f"{short:g}"


def curve_points(rows: Iterable[Row]) -> dict[str, list[tuple[int, float]]]:
    """The curves by their axis, each with its points (value, µs)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        match = re.fullmatch(rf"{CURVE}(.*) = (\d+)", row.measure)
        if match and row.ours is not None:
            curves.setdefault(match[1], []).append((int(match[2]), row.ours))
    return curves


def chart(rows: Iterable[Row]) -> Iterator[str]:
    """The curves as bars, a line a point: for a terminal, and for a page without pictures."""
    for axis, points in curve_points(rows).items():
        yield f"{axis}: one round, p50 in us"
        longest = max(us for _, us in points)
        for value, us in points:
            yield f"{value:>10,} {'█' * max(1, round(us / longest * BAR))} {us:,.0f}"
        yield ""


def into_page(report: str, page: str) -> str:
    """A page with a report in it: between its two marks, or as all of it when it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{report}\n{END}{after}" if begin and end else report


def markdown(rows: Sequence[Row], machine: Mapping[str, str], command: str) -> str:
    """A page's section: the machine, the command, the figures, the curves."""
    lines = [f"Command: `{command}`", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine.items()), ""]
    lines += ["| measure | ours | other | unit | against | ratio | bound | |", "|---|--:|--:|---|---|--:|---|---|"]
    for row in rows:
        if not row.measure.startswith(CURVE):
            cells = [cell.replace("|", "\\|") for cell in _cells(row)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "```", *chart(rows), "```"]
    return "\n".join(lines) + "\n"
