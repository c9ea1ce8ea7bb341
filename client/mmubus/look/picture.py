"""An address space as a picture: its mappings side by side to scale, the gaps between them folded, and in layers below
what is resident, shared, in swap, held by each device, and being taken away.

    mappings  ██████ text ██ data ╱╱ 126 TiB ╱╱ ████████████ heap ████████
    resident  ███ ██        █                   ██████████  ███
    nic-1                                            █████   ██

Everything here is plain: messages go in, fractions of the width come out, whoever draws them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmu.v1 import inspection_pb2 as pb

from mmubus.inspection import Mapping, PageRun
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE
from mmubus.look.words import address_range

__all__ = ["Bar", "Picture", "Scale", "Stretch", "Track", "draw"]

GAP_WIDTH = 0.012
"""How wide a folded gap is, of the whole width."""
MAPPING_WIDTH_MIN = 0.008
"""How wide the smallest mapping is."""
FIXED_MAX = 0.6
"""How much of the width gaps and least widths may take together."""
GRAIN = 1 / 2000
"""Bars that are closer than this are one: no screen would show the difference."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the picture: a mapping, or a folded gap. left, right: fractions of the width."""

    start: int
    end: int
    left: float
    right: float
    mapping: Mapping | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar in a track. kind: what it is drawn as; title: what it says when it is pointed at."""

    left: float
    right: float
    kind: str
    title: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Track:
    """A row of bars. pages: what all its bars are together."""

    name: str
    pages: int
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Picture:
    """An address space, or a part of it."""

    stretches: Sequence[Stretch]
    tracks: Sequence[Track]


class Scale:
    """From addresses to fractions of the width: mappings to scale but for a least width, gaps of one width each."""

    def __init__(self, mappings: Sequence[Mapping]) -> None:
        self.stretches: list[Stretch] = []
        if not mappings:
            return
        gaps = sum(one.start != before.end for before, one in pairwise(mappings))
        shrink = min(1.0, FIXED_MAX / (gaps * GAP_WIDTH + len(mappings) * MAPPING_WIDTH_MIN))
        gap, least = GAP_WIDTH * shrink, MAPPING_WIDTH_MIN * shrink
        room = 1.0 - gaps * gap - len(mappings) * least
        total = sum(one.end - one.start for one in mappings)
        left = 0.0
        for number, one in enumerate(mappings):
            if number and mappings[number - 1].end != one.start:
                self.stretches.append(Stretch(mappings[number - 1].end, one.start, left, left + gap))
                left += gap
            right = left + least + room * (one.end - one.start) / total
            self.stretches.append(Stretch(one.start, one.end, left, right, one))
            left = right
        self._starts = [one.start for one in self.stretches]

    def at(self, address: int) -> float:
        """Where an address is; before the first mapping 0, behind the last one 1."""
        number = bisect_right(self._starts, address) - 1 if self.stretches else -1
        if number < 0:
            return 0.0
        one = self.stretches[number]
        within = min(1.0, (address - one.start) / (one.end - one.start))
        return min(1.0, one.left + within * (one.right - one.left))

    def bars(self, pieces: Iterable[tuple[int, int, str, str]]) -> tuple[Bar, ...]:
        """Bars of (start, end, kind, title), ascending; neighbours of one kind that touch on a screen become one."""
        found: list[Bar] = []
        for start, end, kind, title in pieces:
            left, right = self.at(start), self.at(end)
            last = found[-1] if found else None
            if last is not None and last.kind == kind and last.title == title and left - last.right < GRAIN:
                found[-1] = Bar(last.left, right, kind, title, last.start, end)
            else:
                found.append(Bar(left, max(right, left + GRAIN), kind, title, start, end))
        return tuple(found)


def draw(
    mappings: Sequence[Mapping],
    runs: Sequence[PageRun],
    holders: Sequence[pb.Holder],
    rounds: Sequence[pb.Round] = (),
) -> Picture:
    """Draw an address space, or a part of it.

    Args:
        mappings: those to be drawn, ascending. runs: pages that are present or in swap. holders: with their runs.
        rounds: open ones of this address space.
    """
    scale = Scale(mappings)
    if not mappings:
        return Picture((), ())
    low, high = mappings[0].start, mappings[-1].end
    runs = [one for one in runs if one.start < high and low < one.end]
    present = [one for one in runs if not one.swapped]
    tracks = [
        _track(scale, "resident", [(one.start, one.end, _kind(one), _what(one)) for one in present]),
        _track(
            scale,
            "shared",
            [(one.start, one.end, "shared", "mapped more than once") for one in present if _shared(one)],
        ),
    ]
    swapped = [(one.start, one.end, "swapped", "in swap") for one in runs if one.swapped]
    if swapped:
        tracks.append(_track(scale, "in swap", swapped))
    if any(one.pinned for one in present):
        pinned = [(one.start, one.end, "pinned", "pinned: stays until it is unpinned") for one in present if one.pinned]
        tracks.append(_track(scale, "pinned", pinned))
    tracks += [_holder(scale, one, low, high) for one in holders]
    taken = [
        (max(one.start, low), min(one.end, high), "round", f"round {one.round} waits for {', '.join(one.waiting_for)}")
        for one in sorted(rounds, key=lambda each: each.start)
        if one.start < high and low < one.end
    ]
    if taken:
        tracks.append(_track(scale, "being taken", taken))
    return Picture(tuple(scale.stretches), tuple(tracks))


def _track(scale: Scale, name: str, pieces: list[tuple[int, int, str, str]]) -> Track:
    return Track(name, sum(end - start for start, end, _, _ in pieces) >> PAGE_SHIFT, scale.bars(pieces))


def _holder(scale: Scale, one: pb.Holder, low: int, high: int) -> Track:
    title = f"held by {one.registration.name or 'a notifier'} of {one.session_name}"
    spans = [
        (max(start, low), min(end, high), "held" if one.registration.mm else "exported", title)
        for start, end in zip(one.run_starts, one.run_ends, strict=True)
        if start < high and low < end
    ]
    return Track(one.session_name or f"session {one.session}", one.pages, scale.bars(spans))


def _shared(one: PageRun) -> bool:
    return not one.exclusive and not one.zero


def _kind(one: PageRun) -> str:
    return "zero" if one.zero else "anonymous" if one.anonymous else "file"


def _what(one: PageRun) -> str:
    words = ["the zero page" if one.zero else "anonymous" if one.anonymous else "of a file"]
    words += [word for word in ("writable", "dirty", "exported") if getattr(one, word)]
    return ", ".join(words)


def describe(mapping: Mapping) -> str:
    """A mapping in one line."""
    pages = (mapping.end - mapping.start) // PAGE_SIZE
    name = mapping.name or "anonymous memory"
    where = address_range(mapping.start, mapping.end)
    return f"{where} {mapping.protection} {name}: {mapping.resident:,} of {pages:,} pages resident"
