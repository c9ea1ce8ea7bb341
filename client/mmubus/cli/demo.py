"""`mmubus demo`: the recorded life of a Redis server that saves in the background, with three drivers attached,
live."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from importlib.resources import as_file, files
from typing import Annotated

import typer
from mmu.v1 import inspection_pb2
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmubus.cli.output import standard
from mmubus.cli.replay import server_for
from mmubus.errors import MmuBusError
from mmubus.trace.format import Trace, read_trace
from mmubus.trace.loop import run
from mmubus.trace.replay import Stage, replay
from mmubus.trace.report import Report, duration

__all__ = ["add"]

RECORDING = "program-redis-bgsave.jsonl.gz"
REFRESH_S = 0.2
WHAT = {
    "mirror": "the seed's invalidate_range, through the server",
    "range": "mainline's start and end, through shared memory",
    "rmap": "exported pages, by frame",
}


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    server: Annotated[
        str | None,
        typer.Option("--server", "-s", metavar="ADDRESS", help="A server that runs already. Default: one of its own."),
    ] = None,
) -> None:
    """Replay the recording of a real program with three driver processes, and show what happens.

    A Redis server fills itself, forks to save in the background and writes on, so that the kernel copies page after
    page; ten processes come and go. Three drivers hold translations of that memory and lose each in time.

    Example:

        mmubus demo
    """
    with as_file(files("mmubus.trace") / "data" / RECORDING) as path:
        trace = read_trace(path)
    console = standard()
    console.print(
        f"A recording of the real kernel: [bold]{' '.join(trace.header.command)}[/] (Redis saving in the background), "
        f"{len(trace.operations):,} operations, Linux {trace.header.kernel}.\n"
    )
    report = run(_run(trace, server, console))
    report.show(console)
    console.print(conclusion(report))
    if not report.good:
        raise typer.Exit(1)


async def _run(trace: Trace, server: str | None, console: Console) -> Report:
    async with server_for(server) as address:
        return await replay(trace, address, drivers=3, spectator=lambda stage: _watch(stage, console))


async def _watch(stage: Stage, console: Console) -> None:
    """Show the drivers while the replay runs: on a terminal in place, elsewhere a line now and then."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            while True:
                live.update(await _view(stage))
                await asyncio.sleep(REFRESH_S)
    while True:
        await asyncio.sleep(1.0)
        held = sum(driver.held for driver in stage.crew.drivers)
        reads = sum(driver.reads for driver in stage.crew.drivers)
        console.print(f"{stage.played:,} operations, {held:,} pages held by drivers, {reads:,} DMA reads checked")


async def _view(stage: Stage) -> RenderableType:
    sessions: dict[str, inspection_pb2.Session] = {}
    with suppress(MmuBusError):  # a view that cannot be had is no reason to stop the replay
        sessions = {one.name: one for one in await stage.bus.inspection.sessions()}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("driver", "how", "pages held", "notices", "acks", "ack p50", "p99", "DMA reads", "wrong"):
        table.add_column(title, justify="left" if title in ("driver", "how") else "right")
    for driver in stage.crew.drivers:
        seen = sessions.get(driver.name, inspection_pb2.Session())
        table.add_row(
            driver.name,
            WHAT[driver.kind],
            f"{driver.held:,}",
            f"{seen.notices:,}",
            f"{seen.acknowledged:,}",
            f"{seen.ack_us_p50:,.0f} µs",
            f"{seen.ack_us_p99:,.0f} µs",
            f"{driver.reads:,}",
            Text(f"{driver.wrong:,}", "bold red" if driver.wrong else "green"),
        )
    total = len(stage.trace.operations)
    line = Text(f"{stage.played:,} of {total:,} operations, {duration(time.monotonic() - stage.started)}", "dim")
    return Group(ProgressBar(total=total, completed=stage.played, width=60), line, Text(), table)


def conclusion(report: Report) -> str:
    """What was to be seen, one sentence each."""
    books = report.books
    reads = sum(driver.reads for driver in report.drivers)
    told = "every one of them" if not books.missed else f"all but {books.missed:,} of them"
    lines = [
        f"The kernel notified its secondary MMUs {books.kernel:,} times while this ran; the bus notified {told} too.",
        f"{report.rounds:,} times the memory manager waited until {report.acks:,} acknowledgements were there; "
        f"{report.freed_before_ack or 'no'} page frame was freed before.",
        f"The drivers read {reads:,} pages by DMA; {report.stale_reads or 'none'} of them held anything else than "
        "the program wrote.",
    ]
    return "\n" + "\n".join(f"  • {line}" for line in lines)
