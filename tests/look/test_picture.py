"""An address space as a picture: what is where, worked out by hand."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from mmu.v1 import inspection_pb2 as pb
from mmubus.inspection import Mapping, PageRun
from mmubus.look import Scale, draw

PAGE = 4096


def mapping(first: int, last: int) -> Mapping:
    return Mapping(first * PAGE, last * PAGE, "rw-p", 0, 0, "", last - first)


def run(first: int, last: int, **more: object) -> PageRun:
    kind = {"anonymous": True, "exclusive": True, "zero": False, "swapped": False, "pinned": False} | more
    return PageRun(
        first * PAGE, last * PAGE, 7, True, True, True, bool(kind["anonymous"]), bool(kind["zero"]),
        bool(kind["exclusive"]), False, bool(kind["pinned"]), bool(kind["swapped"]),
    )  # fmt: skip


mappings_of_any_size = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.integers(1, 1 << 20)), min_size=1, max_size=200
).map(lambda pairs: _side_by_side(pairs))


def _side_by_side(pairs: list[tuple[int, int]]) -> list[Mapping]:
    found, at = [], 0
    for gap, pages in pairs:
        at += gap
        found.append(mapping(at, at + pages))
        at += pages
    return found


@given(mappings_of_any_size)
def test_everything_is_within_the_picture_in_order_and_to_be_seen(mappings: list[Mapping]) -> None:
    stretches = Scale(mappings).stretches
    assert stretches[0].left == 0.0
    assert abs(stretches[-1].right - 1.0) < 1e-9
    assert all(one.right > one.left for one in stretches)
    assert all(abs(one.right - two.left) < 1e-12 for one, two in pairwise(stretches))
    assert [one.mapping for one in stretches if one.mapping is not None] == mappings


@given(mappings_of_any_size)
def test_a_larger_mapping_is_never_narrower(mappings: list[Mapping]) -> None:
    drawn = [one for one in Scale(mappings).stretches if one.mapping is not None]
    drawn.sort(key=lambda one: one.end - one.start)
    assert all(one.right - one.left <= two.right - two.left + 1e-12 for one, two in pairwise(drawn))


@given(mappings_of_any_size, st.lists(st.integers(0, 1 << 42), max_size=20))
def test_addresses_keep_their_order(mappings: list[Mapping], addresses: list[int]) -> None:
    scale = Scale(mappings)
    places = [scale.at(one) for one in sorted(addresses)]
    assert places == sorted(places)
    assert all(0.0 <= one <= 1.0 for one in places)


def test_two_equal_mappings_share_the_width_and_the_gap_is_folded() -> None:
    one, gap, two = Scale([mapping(0, 10), mapping(1 << 30, (1 << 30) + 10)]).stretches
    assert abs((one.right - one.left) - (two.right - two.left)) < 1e-9
    assert gap.mapping is None
    assert gap.right - gap.left < 0.02


def test_neighbours_have_no_gap() -> None:
    assert [one.mapping is None for one in Scale([mapping(0, 1), mapping(1, 2)]).stretches] == [False, False]


def test_layers() -> None:
    mappings = [mapping(0, 100)]
    runs = [
        run(0, 10),
        run(10, 20, exclusive=False),
        run(20, 30, zero=True, exclusive=False),
        run(30, 40, swapped=True),
    ]
    holder = pb.Holder(
        session_name="nic", pages=5, run_starts=[0], run_ends=[5 * PAGE], registration=pb.Registration(mm=1)
    )
    taken = pb.Round(round=3, start=0, end=PAGE, open=True, waiting_for=["nic"])
    picture = draw(mappings, runs, [holder], [taken])
    assert {track.name: track.pages for track in picture.tracks} == {
        "resident": 30, "shared": 10, "in swap": 10, "nic": 5, "being taken": 1,
    }  # fmt: skip
    resident = picture.tracks[0]
    assert [bar.kind for bar in resident.bars] == ["anonymous", "zero"]  # two runs that touch are one bar
    (held,) = picture.tracks[3].bars
    assert (held.left, round(held.right, 3)) == (0.0, 0.05)


def test_only_the_part_that_is_shown() -> None:
    picture = draw([mapping(50, 60)], [run(0, 10), run(52, 54)], [])
    assert [track.pages for track in picture.tracks] == [2, 0]


def test_ten_thousand_runs_are_no_more_bars_than_a_screen_can_show() -> None:
    runs = [run(2 * number, 2 * number + 1) for number in range(10_000)]
    picture = draw([mapping(0, 20_000)], runs, [])
    assert picture.tracks[0].pages == 10_000
    assert len(picture.tracks[0].bars) <= 2_000


def test_nothing_mapped() -> None:
    assert draw([], [], []).stretches == ()
