"""What stands above the tables, and one frame of everything for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mmu.v1 import inspection_pb2 as pb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmubus.linux import PAGE_SIZE
from mmubus.look import ROUNDS, SESSIONS, SPACES, Column, Glance, Watch, late, took
from mmubus.trace.report import size

__all__ = ["TITLES", "frame", "headline"]

T = TypeVar("T")

TITLES = {
    "rounds": "Open rounds, and whom they wait for",
    "sessions": "Sessions, by the harm they have done",
    "spaces": "Address spaces",
}
EMPTY = {
    "rounds": "nobody is waited for",
    "sessions": "no driver is connected",
    "spaces": "there are no address spaces",
}
BAR = 40
KINDS = (("used", "cyan"), ("waiting for a round", "yellow"), ("free", "bright_black"))


def headline(watch: Watch) -> RenderableType:
    """The server in a few lines: is it there, how much it does, how fast it is answered, where its frames are."""
    glance = watch.latest
    lines = [_standing(watch)]
    if glance is None:
        return lines[0]
    if glance.statistics is None:
        lines.append(Text("the figures of the whole server are for its administrators", "dim"))
    else:
        lines += [_pace(watch, glance.statistics), _frames(glance.statistics)]
    if glance.late:
        lines.append(Text.assemble(("waiting for ", ""), (", ".join(glance.late), "bold red" if _late(glance) else "")))
    else:
        lines.append(Text("nobody is waited for", "green"))
    return Group(*lines)


def frame(watch: Watch) -> RenderableType:
    """Everything at once, as it is now."""
    glance = watch.latest
    if glance is None:
        return headline(watch)
    return Group(
        headline(watch),
        *_table("rounds", ROUNDS, glance.open),
        *_table("sessions", SESSIONS, glance.sessions),
        *_table("spaces", SPACES, glance.address_spaces),
    )


def _late(glance: Glance) -> bool:
    return any(late(one) for one in glance.open)


def _standing(watch: Watch) -> Text:
    text = Text.assemble(("mmubus ", "bold"), watch.bus.address)
    statistics = None if watch.latest is None else watch.latest.statistics
    if statistics is not None:
        text.append(f"  {statistics.version}, up {took(statistics.uptime_s)}, epoch {statistics.epoch}", "dim")
    if watch.failed is not None:
        what = "what stands here is old" if watch.latest is not None else "trying again"
        text.append(f"\nnot connected, {what}: {' '.join(str(watch.failed).split())}", "bold red")
    return text


def _pace(watch: Watch, counted: pb.GetStatisticsResponse) -> Text:
    def rate(counter: str) -> str:
        found = watch.rate(counter)
        return "-" if found is None else f"{found:,.0f}"

    text = Text.assemble("rounds/s ", (rate("rounds"), "bold"), "  notices/s ", (rate("notices"), "bold"))
    text.append_text(
        Text.assemble("  acks/s ", (rate("acks"), "bold"), "  open ", (f"{counted.rounds_open:,}", "bold"))
    )
    text.append(f"  ack p50 {took(counted.ack_us_p50 / 1e6)}, p99 {took(counted.ack_us_p99 / 1e6)}")
    for word, count in (("late", counted.late), ("fenced", counted.fenced), ("stale", counted.stale_refused)):
        text.append_text(Text.assemble(f"  {word} ", (f"{count:,}", "bold yellow" if count else "bold")))
    return text


def _frames(counted: pb.GetStatisticsResponse) -> Text:
    """Frames by state: a bar, and the numbers."""
    counts = (counted.frames_used, counted.frames_quarantined, counted.frames_free)
    text = Text("frames ")
    drawn = 0
    for (_, style), count in zip(KINDS[:-1], counts, strict=False):
        width = min(BAR - drawn, -(-count * BAR // max(1, counted.frames)))
        text.append("█" * width, style)
        drawn += width
    text.append("░" * (BAR - drawn), KINDS[-1][1])
    parts = [
        f"{count:,} {name} ({size(count * PAGE_SIZE)})" for (name, _), count in zip(KINDS, counts, strict=True) if count
    ]
    parts.append(f"{counted.frames_exported:,} exported, {counted.frames_pinned:,} pinned")
    if counted.swap:
        parts.append(f"{counted.swap_used:,} of {counted.swap:,} in swap")
    return text.append(" " + ", ".join(parts))


def _table(what: str, columns: Sequence[Column[T]], rows: Sequence[T]) -> list[RenderableType]:
    title = Text(f"\n{TITLES[what]}", "bold")
    if not rows:
        return [title, Text(EMPTY[what], "dim")]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column.title, justify="right" if column.number else "left", no_wrap=column.number)
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in columns))
    return [title, table]
