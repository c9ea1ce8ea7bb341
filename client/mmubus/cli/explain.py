"""Asking why and what if: `mmubus explain`, `page`, `holders`, `violations`, `dry-run`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmubus.cli.commands import add_command
from mmubus.cli.inspection import ask, number
from mmubus.cli.output import AsJson, Mm, Server, print_json, print_table
from mmubus.trace.report import duration

__all__ = ["add", "span"]

WHOLE = "0-"


def add(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, "explain", explain)
    add_command(app, "page", page)
    add_command(app, "holders", holders)
    add_command(app, "violations", violations)
    add_command(app, "dry-run", dry_run)


def span(text: str) -> tuple[int, int]:
    """A range of addresses as it is written: START-END in hexadecimal as in /proc/PID/maps, or START+LENGTH; END may be
    left out for the end of the address space, which is 0."""
    for sign in "-+":
        first, found, second = text.partition(sign)
        if found:
            try:
                start = int(first, 16)
                rest = int(second, 0 if sign == "+" else 16) if second else 0
            except ValueError:
                break
            return start, start + rest if sign == "+" else rest
    raise typer.BadParameter(f"{text!r} is no range; write 7f0000000000-7f0000010000 or 7f0000000000+0x10000")


Span = Annotated[
    str, typer.Argument(metavar="RANGE", help="START-END in hexadecimal, as /proc/PID/maps has it, or START+LENGTH.")
]


def explain(
    round: Annotated[
        int, typer.Argument(metavar="ROUND", help="The round's number, from `mmubus rounds` or an error message.")
    ],
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Why a round took as long as it did: who was told, who answered when, who is to blame.

    Example:

        mmubus explain 4711
    """
    found = ask(server, lambda bus: bus.inspection.explain(round))
    if as_json:
        print_json(found)
        return
    for line in found.story:
        print(line)


def page(
    mm: Mm,
    address: Annotated[int, typer.Argument(parser=number, metavar="ADDRESS", help="Any byte of it.")],
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """What became of one page: whom it was given to, who took it away, when that was acknowledged.

    Example:

        mmubus page 3 0x7f0000001000
    """
    found = ask(server, lambda bus: bus.inspection.explain_page(mm, address))
    if as_json:
        print_json(found)
        return
    if not found.stories:
        print("nobody had it, as far as is remembered")
        return
    for one in found.stories:
        print(f"{one.session_name}, registration {one.registration}: {'holds it' if one.holds else 'holds it no more'}")
        for line in one.story:
            print(f"    {line}")
    print(f"the server's clock shows {found.now_s:.6f} s")


def holders(mm: Mm, range: Span = WHOLE, server: Server = None, as_json: AsJson = False) -> None:
    """Who holds translations of a range, or exports its frames.

    Example:

        mmubus holders 3 7f0000000000-7f0000100000
    """
    start, end = span(range)
    found = ask(server, lambda bus: bus.inspection.holders(mm, start, end))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.registration.registration,
            one.registration.name,
            one.session_name,
            one.state,
            one.pages,
            one.registration.held_pages,
        )
        for one in found
    ]
    titles = ("registration#", "name", "session", "state", "pages#", "of all#")
    print_table(titles, rows, empty="nobody holds anything there")


def violations(
    count: Annotated[int, typer.Option("--last", min=0, metavar="N", help="The last N; 0: all remembered.")] = 20,
    check: Annotated[
        int, typer.Option(min=0, metavar="FRAMES", help="Look at so many free frames for damage first.")
    ] = 0,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """What drivers did that no driver may do, with the history of the page.

    Example:

        mmubus violations --check 4096
    """
    found = ask(server, lambda bus: bus.inspection.violations(count, check_frames=check))
    if as_json:
        print_json(found)
        return
    if not found.violations:
        print("no violation is remembered")
    for one in found.violations:
        refused = ", refused" if one.refused else ""
        print(f"{one.kind}{refused}, {duration(one.age_s)} ago: {one.message}")
        for line in one.story:
            print(f"    {line}")
    if found.counts:
        print("all since the start: " + ", ".join(f"{kind} {number}" for kind, number in sorted(found.counts.items())))


def dry_run(mm: Mm, range: Span, server: Server = None, as_json: AsJson = False) -> None:
    """Who would have to answer if a range were unmapped, and what they cost lately. Nobody is told.

    Example:

        mmubus dry-run 3 7f0000000000+0x200000
    """
    start, end = span(range)
    found = ask(server, lambda bus: bus.inspection.dry_run(mm, start, end))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.session,
            one.name,
            one.state,
            one.held_pages,
            one.waiting,
            one.late,
            f"{one.ack_us_p50:,.0f} / {one.ack_us_p99:,.0f} µs",
            duration(one.harm_s),
        )
        for one in found.costs
    ]
    titles = ("session#", "name", "state", "held#", "waiting#", "late#", "ack p50 / p99", "harm")
    print_table(titles, rows, empty="nobody would have to answer")
    print(f"pages present: {found.pages:,}; frames that stay in use elsewhere: {found.shared_frames:,}")
    for operation in found.waits_for:
        print(f"it would wait for {operation}")
