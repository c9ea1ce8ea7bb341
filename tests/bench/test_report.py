"""What people are shown."""

from __future__ import annotations

from mmubus.bench.report import BEGIN, END, chart, curve_points, into_page, markdown
from mmubus.bench.row import Row, ratio_at_most

ROWS = [
    Row("one round", "us", 150.0, 100.0, "the floor", ratio_at_most(1.25)),
    Row("curve, clients = 1", "us", 100.0),
    Row("curve, clients = 10", "us", 400.0),
]


def test_curves_are_found_by_their_names() -> None:
    assert curve_points(ROWS) == {"clients": [(1, 100.0), (10, 400.0)]}


def test_a_chart_has_a_bar_a_point_and_the_longest_is_the_most() -> None:
    title, first, last, _ = chart(ROWS)
    assert title.startswith("clients")
    assert first.count("█") * 4 == last.count("█") > 0


def test_a_report_goes_between_the_marks_of_a_page() -> None:
    page = f"# Speed\n\n{BEGIN}\nold\n{END}\n\nWhy.\n"
    assert into_page("new\n", page) == f"# Speed\n\n{BEGIN}\n\nnew\n\n{END}\n\nWhy.\n"
    assert into_page("newer\n", into_page("new\n", page)) == into_page("newer\n", page)
    for other in ("", "# Notes\n", f"{BEGIN} and no end"):
        assert into_page("new\n", other) == "new\n"


def test_markdown_has_machine_command_and_figures_but_no_points_in_the_table() -> None:
    page = markdown(ROWS, {"Python": "3.11"}, "mmubus bench")
    assert "`mmubus bench`" in page
    assert "| Python | 3.11 |" in page
    assert "| one round | 150 | 100 | us | the floor | 1.5 | ratio <= 1.25 | not met |" in page
    assert "| curve" not in page
