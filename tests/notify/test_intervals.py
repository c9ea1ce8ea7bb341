"""Intervals by overlap, against a plain scan."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from mmubusd.notify.intervals import IntervalIndex, merge_ranges

spans = st.tuples(st.integers(0, 300), st.integers(1, 120)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(spans, max_size=40), st.lists(st.integers(0, 39), max_size=20), spans)
def test_finds_exactly_what_overlaps(added: list[tuple[int, int]], removed: list[int], asked: tuple[int, int]) -> None:
    index: IntervalIndex[int] = IntervalIndex()
    there = dict(enumerate(added))
    for serial, (start, end) in there.items():
        index.add(start, end, serial, serial * 10)
    for serial in removed:
        if serial in there:
            del there[serial]
            index.remove(serial)
            assert serial not in index
    start, end = asked
    expected = sorted((serial, serial * 10) for serial, (a, b) in there.items() if a < end and start < b)
    assert sorted(index.overlapping(start, end)) == expected
    assert index.covers_any(start, end) == bool(expected)
    assert len(index) == len(there)
    assert list(index) == [serial * 10 for serial in there]


@given(st.lists(spans, max_size=30))
def test_merged_ranges_are_the_same_bytes(ranges: list[tuple[int, int]]) -> None:
    merged = merge_ranges(ranges)
    assert {at for a, b in ranges for at in range(a, b)} == {at for a, b in merged for at in range(a, b)}
    assert all(left[1] < right[0] for left, right in pairwise(merged)), "ascending, and none touch"
