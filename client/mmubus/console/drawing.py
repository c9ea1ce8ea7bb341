"""Pictures: an address space as bars, rounds as dots in time, frames as one bar."""

from __future__ import annotations

from collections.abc import Sequence

from mmu.v1 import inspection_pb2 as pb

from mmubus.console.markup import Html, join, note, tag
from mmubus.linux import PAGE_SIZE
from mmubus.look import LATE_S, Bar, Dot, Picture, Stretch, Timeline, describe, took
from mmubus.look.timeline import LONGEST_S, SHORTEST_S, height
from mmubus.trace.report import size

__all__ = ["address_space", "frames", "rounds"]

COLOURS = 8
"""Colours that the style sheet has for sessions."""
WIDTH, HEIGHT, LEFT, BOTTOM = 1200, 250, 64, 26
LABEL_WIDTH_MIN = 0.05
LEGEND = (
    ("anonymous", "anonymous"),
    ("file", "of a file"),
    ("zero", "zero page"),
    ("shared", "shared"),
    ("swapped", "in swap"),
    ("held", "held by a device"),
    ("exported", "exported"),
    ("round", "being taken away"),
)


def address_space(picture: Picture, mm: int) -> Html:
    """An address space: mappings above, below them a track for each thing that can be said about their pages."""
    if not picture.stretches:
        return note("Nothing is mapped here.")
    shown = [
        *(tag("span", said, class_=f"key {kind}") for kind, said in LEGEND if _drawn(picture, kind)),
        tag("span", "gap, folded", class_="key gap"),
    ]
    return tag(
        "div",
        tag("div", *shown, class_="legend"),
        _track("mappings", "", [_stretch(one, mm) for one in picture.stretches]),
        *(
            _track(
                track.name,
                f"{track.pages:,}",
                [
                    tag(
                        "i",
                        "",
                        class_=f"bar {bar.kind}",
                        style=_at(bar.left, bar.right),
                        title=_said(bar),
                    )
                    for bar in track.bars
                ],
            )
            for track in picture.tracks
        ),
        class_="picture",
    )


def _drawn(picture: Picture, kind: str) -> bool:
    return any(bar.kind == kind for track in picture.tracks for bar in track.bars)


def _stretch(stretch: Stretch, mm: int) -> Html:
    place = _at(stretch.left, stretch.right)
    if stretch.mapping is None:
        gap = size(stretch.end - stretch.start)
        return tag("i", "", class_="bar gap", style=place, title=f"{gap} are not mapped")
    mapping = stretch.mapping
    label = mapping.name.rsplit("/", 1)[-1] or mapping.protection
    wide = stretch.right - stretch.left >= LABEL_WIDTH_MIN
    where = f"/mm/{mm}?start={mapping.start:#x}&end={mapping.end:#x}"
    kind = "code" if "x" in mapping.protection else "data" if mapping.file else "plain"
    return tag(
        "a", label if wide else "", href=where, id=f"bar-{mapping.start:x}", class_=f"bar mapping {kind}", style=place,
        title=describe(mapping), aria_label=describe(mapping),
    )  # fmt: skip


def _track(name: str, pages: str, bars: Sequence[Html]) -> Html:
    title = tag("span", name, tag("small", pages and f" {pages}"), class_="name")
    return tag("div", title, tag("div", *bars, class_="bars"), class_="track")


def _said(bar: Bar) -> str:
    return f"{bar.title}, {(bar.end - bar.start) // PAGE_SIZE:,} pages from {bar.start:x}"


def _at(left: float, right: float) -> str:
    return f"left:{left:.3%};width:{right - left:.3%}"


def rounds(timeline: Timeline, names: Sequence[str]) -> Html:
    """Rounds in time: to the right is now, above is slow, the colour is whom it waited for last.

    Args: names: of the sessions, in the order in which they have their colours.
    """
    dots = timeline.dots()
    if not dots:
        return note("No round in the last minute: nothing was taken away from anybody.")
    said = (
        f"{len(dots)} rounds of the last {timeline.window_s:.0f} s, {sum(dot.round.open for dot in dots)} of them open"
    )
    named = {dot.who: dot for dot in reversed(dots) if dot.round.open}  # the oldest open one of each
    svg = tag(
        "svg", *_axes(timeline.window_s), *(_dot(dot, names, dot is named.get(dot.who)) for dot in dots),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said, class_="timeline",
    )  # fmt: skip
    who = [name for name in names if any(dot.who == name for dot in dots)]
    legend = [tag("span", name, class_=f"key {_colour(name, names)}") for name in who]
    if any(dot.round.open for dot in dots):
        legend.append(tag("span", "open", class_="key open"))
    if timeline.unseen:
        legend.append(
            tag("span", f"{timeline.unseen:,} more ended between two looks and are not drawn", class_="about")
        )
    return join([tag("div", *legend, class_="legend"), svg])


def _axes(window_s: float) -> list[Html]:
    lines = []
    seconds = SHORTEST_S
    while seconds <= LONGEST_S * 1.01:
        y = _y(height(seconds))
        lines.append(tag("line", x1=LEFT, x2=WIDTH, y1=y, y2=y, class_="grid"))
        lines.append(tag("text", took(seconds).replace(".00", ""), x=LEFT - 8, y=y + 4, class_="axis end"))
        seconds *= 10
    y = _y(height(LATE_S))
    lines.append(tag("line", x1=LEFT, x2=WIDTH, y1=y, y2=y, class_="late"))
    for part in range(7):
        x = LEFT + (WIDTH - LEFT) * part / 6
        ago = window_s * (1 - part / 6)
        anchor = "end" if part == 6 else "start" if part == 0 else "middle"
        lines.append(tag("text", f"{ago:.0f} s ago" if ago else "now", x=x, y=HEIGHT - 6, class_=f"axis {anchor}"))
    return lines


def _dot(dot: Dot, names: Sequence[str], named: bool) -> Html:
    one = dot.round
    x, y = LEFT + dot.left * (WIDTH - LEFT - 8), _y(dot.height)
    who = _colour(dot.who, names)
    doing = (
        f"open for {took(one.took_s)}, waits for {dot.who}" if one.open else f"took {took(one.took_s)}, last {dot.who}"
    )
    title = tag("title", f"round {one.round}: {one.operation or one.notification}; {doing}")
    circle = tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=7 if one.open else 4.5,
                 class_=f"{who}{' open' if one.open else ''}{' is-late' if dot.late else ''}")  # fmt: skip
    label = tag("text", dot.who, x=f"{x - 12:.1f}", y=f"{y + 4:.1f}", class_="axis end waits") if named else ""
    return tag("a", circle, label, href=f"/round/{one.round}", tabindex=-1)


def _colour(name: str, names: Sequence[str]) -> str:
    return f"who-{names.index(name) % COLOURS}" if name in names else "who-none"


def _y(part: float) -> float:
    return round(HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - 14), 1)


def frames(counted: pb.GetStatisticsResponse) -> Html:
    """Frames by state, as one bar."""
    parts = (
        ("used", counted.frames_used, "used"),
        ("waiting", counted.frames_quarantined, "waiting for a round"),
        ("free", counted.frames_free, "free"),
    )
    bars, left = [], 0.0
    for kind, count, said in parts:
        width = count / max(1, counted.frames)
        title = f"{count:,} frames {said} ({size(count * PAGE_SIZE)})"
        bars.append(tag("i", "", class_=f"bar frames-{kind}", style=_at(left, left + width), title=title))
        left += width
    keys = [tag("span", f"{count:,} {said}", class_=f"key frames-{kind}") for kind, count, said in parts]
    more = [f"{counted.frames_exported:,} exported", f"{counted.frames_pinned:,} pinned"]
    if counted.swap:
        more.append(f"{counted.swap_used:,} of {counted.swap:,} pages of swap used")
    keys.append(tag("span", ", ".join(more), class_="about"))
    return join([tag("div", *keys, class_="legend"), tag("div", *bars, class_="bars frames")])
