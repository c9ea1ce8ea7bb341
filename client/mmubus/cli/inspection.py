"""Looking at a server: `mmubus mm list|maps|pagemap`, `sessions`, `rounds`, `memory`, `stats`, `version`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Annotated, TypeVar

import typer

from mmubus.cli.commands import add_command
from mmubus.cli.output import AsJson, Mm, Server, plain, print_json, print_table
from mmubus.connection import Bus, connect
from mmubus.inspection import PageRun
from mmubus.linux import Reason
from mmubus.trace.loop import run
from mmubus.trace.report import duration, size

__all__ = ["add"]

T = TypeVar("T")

mm = typer.Typer(no_args_is_help=True, help="Address spaces, as /proc would show them.")


def add(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(mm, name="mm")
    add_command(mm, "list", list_mms)
    add_command(mm, "maps", maps)
    add_command(mm, "pagemap", pagemap)
    add_command(app, "sessions", sessions)
    add_command(app, "rounds", rounds)
    add_command(app, "memory", memory)
    add_command(app, "stats", stats)
    add_command(app, "version", show_version)


def ask(server: str | None, question: Callable[[Bus], Awaitable[T]]) -> T:
    """Connect and ask one thing."""

    async def asked() -> T:
        async with connect(server, name="mmubus") as bus:
            return await question(bus)

    return run(asked())


def number(text: str | int) -> int:
    """An address or a number, in any base that Python writes; a default comes as the number that it is."""
    try:
        return text if isinstance(text, int) else int(text, 0)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; write 4096 or 0x1000") from None


def list_mms(server: Server = None, as_json: AsJson = False) -> None:
    """Every address space.

    Example:

        mmubus mm list --server 127.0.0.1:50551
    """
    found = ask(server, lambda bus: bus.inspection.address_spaces())
    if as_json:
        print_json(found)
        return
    rows = [
        (one.mm, one.name, one.parent or "", one.mappings, one.total_pages, one.resident_pages, one.registrations)
        for one in found
    ]
    titles = ("mm#", "name", "parent#", "mappings#", "pages#", "resident#", "notifiers#")
    print_table(titles, rows, empty="there are no address spaces")


def maps(
    mm: Mm,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """The mappings of an address space, as /proc/PID/maps shows them.

    Example:

        mmubus mm maps 3
    """
    found = ask(server, lambda bus: bus.inspection.maps(mm))
    if as_json:
        print_json(found)
        return
    for mapping in found:
        print(mapping)


def pagemap(
    mm: Mm,
    start: Annotated[int, typer.Option(parser=number, metavar="ADDRESS", help="First address.")] = 0,
    end: Annotated[int, typer.Option(parser=number, metavar="ADDRESS", help="End; 0: to the end.")] = 0,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """The pages that are present, as /proc/PID/pagemap would tell: runs of pages that are alike.

    Example:

        mmubus mm pagemap 3 --start 0x7f0000000000 --end 0x7f0000100000
    """
    found = ask(server, lambda bus: bus.inspection.pagemap(mm, start, end))
    if as_json:
        print_json(found)
        return
    rows = [(f"{run.start:x}-{run.end:x}", (run.end - run.start) >> 12, f"{run.pfn:#x}", _kind(run)) for run in found]
    print_table(("range", "pages#", "pfn#", "what"), rows, empty="no page is present")


def _kind(run: PageRun) -> str:
    kind = "zero page" if run.zero else "anonymous" if run.anonymous else "file"
    words = {
        "writable": run.writable,
        "dirty": run.dirty,
        "shared": not run.exclusive and not run.zero,
        "exported": run.exported,
        "pinned": run.pinned,
    }
    return " ".join([kind, *(word for word, applies in words.items() if applies)])


def sessions(server: Server = None, as_json: AsJson = False) -> None:
    """Every client session: its notifiers, how fast it answers, and whom it kept waiting.

    Example:

        mmubus sessions --json | jq '.[] | select(.state == "fenced") | .name'
    """
    found = ask(server, lambda bus: bus.inspection.sessions())
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.session,
            one.name,
            f"{one.state}: {one.fenced_because}" if one.fenced_because else one.state,
            len(one.registrations),
            sum(registration.held_pages for registration in one.registrations),
            one.notices,
            one.waiting,
            one.late,
            f"{one.ack_us_p50:,.0f} / {one.ack_us_p99:,.0f} µs",
            duration(one.harm_s),
        )
        for one in found
    ]
    titles = (
        "session#",
        "name",
        "state",
        "notifiers#",
        "held#",
        "notices#",
        "waiting#",
        "late#",
        "ack p50 / p99",
        "harm",
    )
    print_table(titles, rows, empty="there are no sessions")


def rounds(
    ended: Annotated[int, typer.Option(min=0, metavar="N", help="Show the last N that have ended, too.")] = 0,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Open rounds: which operation waits for whom, and for how long.

    Example:

        mmubus rounds --ended 20
    """
    found = ask(server, lambda bus: bus.inspection.rounds(ended))
    if as_json:
        print_json([plain(one) | {"reason": Reason(one.reason).name} for one in found])
        return
    rows = [
        (
            one.round,
            one.mm or "rmap",
            f"{one.start:x}-{one.end:x}",
            one.notification,
            Reason(one.reason).name.lower(),
            one.operation,
            duration(one.age_s),
            ", ".join(one.waiting_for) if one.open else f"ended, {one.notices} notices",
        )
        for one in found
    ]
    titles = ("round#", "mm", "range", "notification", "reason", "operation", "age", "waits for")
    print_table(titles, rows, empty="no round is open")


def memory(server: Server = None, as_json: AsJson = False) -> None:
    """Whose memory it is: what each principal has of the server's frames and swap, and may have.

    Who is no administrator sees only itself.

    Example:

        mmubus memory --json | jq '.[] | select(.ooms > 0) | .name'
    """
    found = ask(server, lambda bus: bus.inspection.memory_groups())
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.name,
            f"{one.frames:,} of {one.frames_max:,}",
            f"{one.swap:,} of {one.swap_max:,}",
            one.limit_hits,
            one.ooms,
        )
        for one in found
    ]
    print_table(("principal", "frames", "swap", "at its limit#", "in vain#"), rows, empty="no principal is counted")


def stats(server: Server = None, as_json: AsJson = False) -> None:
    """What the server has counted since it started, and how its frames are used.

    Example:

        mmubus stats --json
    """
    found = ask(server, lambda bus: bus.inspection.statistics())
    if as_json:
        print_json(found)
        return
    page = 4096
    rows: list[tuple[str, str]] = [
        ("version", f"{found.version}, epoch {found.epoch}, up {duration(found.uptime_s)}"),
        ("address spaces", f"{found.address_spaces:,}"),
        ("sessions", f"{found.sessions:,} with {found.registrations:,} notifiers"),
        ("operations", f"{found.operations:,}"),
        ("rounds", f"{found.rounds:,}, {found.rounds_open:,} open"),
        ("notices", f"{found.notices:,}, {found.acks:,} acknowledged, {found.late:,} late"),
        ("ack", f"p50 {found.ack_us_p50:,.0f} µs, p99 {found.ack_us_p99:,.0f} µs"),
        ("fenced", f"{found.fenced:,}"),
        ("frames", f"{found.frames:,} ({size(found.frames * page)}), {found.frames_free:,} free"),
        ("frames used", f"{found.frames_used:,} ({size(found.frames_used * page)})"),
        ("frames waiting for a round", f"{found.frames_quarantined:,}"),
        ("frames that have failed", f"{found.frames_failed:,}"),
        ("frames exported, pinned", f"{found.frames_exported:,}, {found.frames_pinned:,}"),
        ("stale accesses refused", f"{found.stale_refused:,}"),
        ("freed before ack", f"{found.freed_before_ack:,}"),
    ]
    print_table(("", ""), rows, empty="")


def show_version(as_json: AsJson = False) -> None:
    """The version of this program.

    Example:

        mmubus version
    """
    found = version("mmubus")
    if as_json:
        print_json({"version": found, "contract": 1})
    else:
        print(f"mmubus {found}, contract version 1")
