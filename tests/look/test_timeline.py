"""Rounds in time, from glances that are made by hand."""

from __future__ import annotations

import pytest
from mmu.v1 import inspection_pb2 as pb
from mmubus.look import Glance, Timeline, took
from mmubus.look.timeline import height


def glance(
    at: float, *, open: list[pb.Round] | None = None, ended: list[pb.Round] | None = None, epoch: int = 1
) -> Glance:
    """A glance; ended rounds are given oldest first."""
    statistics = pb.GetStatisticsResponse(epoch=epoch)
    return Glance(at, statistics, (), open or (), list(reversed(ended or ())), ())


def ended(number: int, age_s: float, took_s: float = 0.001, last: str = "nic") -> pb.Round:
    return pb.Round(round=number, age_s=age_s, took_s=took_s, last=last)


def standing(number: int, age_s: float) -> pb.Round:
    return pb.Round(round=number, age_s=age_s, took_s=age_s, open=True, waiting_for=["slow"])


def test_a_round_is_where_it_was_opened() -> None:
    timeline = Timeline(window_s=60.0)
    timeline.add(glance(100.0, ended=[ended(1, 30.0), ended(2, 0.0)]))
    assert [(dot.round.round, dot.left, dot.who) for dot in timeline.dots()] == [(1, 0.5, "nic"), (2, 1.0, "nic")]


def test_an_open_round_is_late_after_a_second_and_then_ends() -> None:
    timeline = Timeline()
    timeline.add(glance(100.0, open=[standing(7, 0.5)]))
    assert [(dot.who, dot.late) for dot in timeline.dots()] == [("slow", False)]
    timeline.add(glance(101.0, open=[standing(7, 1.5)]))
    assert [(dot.who, dot.late) for dot in timeline.dots()] == [("slow", True)]
    timeline.add(glance(102.0, ended=[ended(7, 2.5, 2.0, "slow")]))
    (dot,) = timeline.dots()
    assert (dot.round.open, dot.late, dot.who) == (False, False, "slow")


def test_an_open_round_whose_end_was_not_seen_goes() -> None:
    timeline = Timeline()
    timeline.add(glance(100.0, open=[standing(7, 0.5)]))
    timeline.add(glance(101.0))
    assert timeline.dots() == []


def test_what_is_older_than_the_window_goes_unless_it_is_open() -> None:
    timeline = Timeline(window_s=10.0)
    timeline.add(glance(100.0, open=[standing(2, 50.0)], ended=[ended(1, 9.0)]))
    timeline.add(glance(102.0, open=[standing(2, 52.0)]))
    assert [(dot.round.round, dot.left) for dot in timeline.dots()] == [(2, 0.0)]


def test_rounds_that_were_not_seen_are_counted() -> None:
    timeline = Timeline()
    timeline.add(glance(100.0, ended=[ended(1, 1.0), ended(2, 1.0)]))
    timeline.add(glance(101.0, ended=[ended(2, 2.0), ended(3, 0.5)]))
    assert timeline.unseen == 0
    timeline.add(glance(102.0, ended=[ended(10, 0.5), ended(11, 0.1)]))
    assert timeline.unseen == 6  # 4 to 9


def test_another_life_of_the_server_begins_anew() -> None:
    timeline = Timeline()
    timeline.add(glance(100.0, ended=[ended(500, 1.0)]))
    timeline.add(glance(101.0, ended=[ended(1, 0.5)], epoch=2))
    assert [dot.round.round for dot in timeline.dots()] == [1]


@pytest.mark.parametrize(("seconds", "at"), [(0.0, 0.0), (1e-4, 0.0), (1e-3, 0.2), (1.0, 0.8), (10.0, 1.0), (1e6, 1.0)])
def test_the_axis_is_logarithmic(seconds: float, at: float) -> None:
    assert height(seconds) == pytest.approx(at)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0.0 µs"), (611e-6, "611 µs"), (0.0009999, "1.00 ms"), (0.0125, "12.5 ms"), (0.9999, "1.00 s"),
     (90.0, "90.0 s"), (180.0, "3.00 min"), (8000.0, "2.22 h")],
)  # fmt: skip
def test_times_for_people(seconds: float, said: str) -> None:
    assert took(seconds) == said
