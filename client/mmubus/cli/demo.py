"""`mmubus demo`: the recorded life of a Redis server that saves in the background, with a driver of each kind attached.

On a terminal the drivers are seen at work; elsewhere a line says now and then how far it is. At the end comes what each
of them did, what happened, and what it means.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmubus.cli.commands import add_command
from mmubus.cli.output import standard
from mmubus.cli.replay import options_of, server_for
from mmubus.trace.devices import DEVICES
from mmubus.trace.format import Trace, read_trace
from mmubus.trace.loop import run
from mmubus.trace.replay import Spectator, Stage, replay
from mmubus.trace.report import Report, drivers_table, duration

__all__ = ["add"]

RECORDING = "program-redis-bgsave.jsonl.gz"
REFRESH_S = 0.2
DRIVERS = ("kvm", "gru", "xpmem", "rdma", "hmm", "sva", "vfio_user")
READERS = 2
WHAT = {kind: device.what for kind, device in DEVICES.items()}
HOW = """\
Each driver is a process that holds translations of the program's memory. When the memory manager takes a
page away, it sends a [bold]notice[/] to every driver that may hold it, and waits: no page is freed before all
of them have let go of it and said so, by an [bold]ack[/]. Then the program goes on, and drivers fault again."""


def add(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "demo", demo)


def demo(
    drivers: Annotated[
        str,
        typer.Option(
            "--drivers", "-d", metavar="NAME,...", help=f"Which drivers, a process each: of {', '.join(DEVICES)}."
        ),
    ] = ",".join(DRIVERS),
    trace: Annotated[
        Path | None,
        typer.Option("--trace", "-t", metavar="FILE", help="Another recording, of `mmubus record`."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="One driver reads each page, not two; nothing is shown before the end.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option("--server", "-s", metavar="ADDRESS", help="A server that runs already. Default: one of its own."),
    ] = None,
) -> None:
    """Show the drivers at work on the recording of a real program, and what it means.

    A Redis server fills itself, forks to save in the background and writes on, so that the kernel copies page after
    page; ten processes come and go. The drivers hold translations of that memory and lose each in time. It takes
    about a quarter of a minute. `mmubus replay` compares a recording with the kernel, operation by operation.

    Exit status: 0 when nothing was missed, wrong, fenced or freed early; 1 otherwise.

    Example:

        mmubus demo

        mmubus demo --drivers kvm,rdma --fast

        mmubus demo --trace recording.jsonl.gz
    """
    kinds = chosen(drivers)
    with recording(trace) as path:
        read = read_trace(path)
    console = standard()
    console.print(f"{title(read, bundled=trace is None)}\n\n{HOW}\n")
    with console.status(f"starting {len(kinds)} drivers") as status:

        async def watch(stage: Stage) -> None:
            if fast:
                status.update("replaying")
            else:
                status.stop()
                await _watch(stage, console)

        report = run(_run(read, server, kinds, 1 if fast else READERS, watch))
    console.print(drivers_table(report.drivers, WHAT), *conclusion(report, read), sep="\n")
    if not report.good:
        raise typer.Exit(1)


def chosen(names: str) -> list[str]:
    """The kinds of a list of names. Raises: BadParameter."""
    kinds = [name.strip().replace("-", "_") for name in names.split(",") if name.strip()]
    for kind in kinds:
        if kind not in DEVICES:
            raise typer.BadParameter(f"there is no driver {kind!r}; there are {', '.join(DEVICES)}")
    if not kinds:
        raise typer.BadParameter(f"name at least one of {', '.join(DEVICES)}")
    return kinds


@contextmanager
def recording(trace: Path | None) -> Iterator[Path]:
    """The recording's file: the one that was named, or the one that is installed with the package."""
    if trace is not None:
        yield trace
        return
    with as_file(files("mmubus.trace") / "data" / RECORDING) as path:
        yield path


def title(trace: Trace, *, bundled: bool) -> str:
    """What is replayed."""
    what = "a Redis server that saves in the background" if bundled else f"[bold]{escape(trace.name)}[/]"
    processes = len({operation.pid for operation in trace.operations})
    return (
        f"[bold]mmubus demo[/]: {what}, recorded on Linux {trace.header.kernel}: "
        f"{len(trace.operations):,} operations of {processes} processes"
    )


async def _run(trace: Trace, server: str | None, kinds: list[str], readers: int, spectator: Spectator) -> Report:
    async with server_for(server, options_of(trace)) as address:
        return await replay(
            trace, address, drivers=kinds, readers_max=readers, spectator=spectator, equipped=server is None
        )


async def _watch(stage: Stage, console: Console) -> None:
    """Show the drivers while the replay runs: on a terminal in place, elsewhere a line at each quarter."""
    if not console.is_terminal:
        await _tell(stage, console)
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while True:
            live.update(view(stage))
            await asyncio.sleep(REFRESH_S)


async def _tell(stage: Stage, console: Console) -> None:
    told, total = 0, len(stage.trace.operations)
    while told < 3:
        await asyncio.sleep(REFRESH_S)
        if stage.played < total * (told + 1) // 4:
            continue
        told += 1
        held = sum(driver.held for driver in stage.crew.drivers)
        acks = sum(driver.seen.acknowledged for driver in stage.crew.drivers)
        console.print(
            f"{stage.played:,} operations: drivers hold {held:,} pages and have acknowledged {acks:,} notices"
        )
    console.print()


def view(stage: Stage) -> RenderableType:
    """The drivers now, and how far the program is."""
    total = len(stage.trace.operations)
    seconds = duration(time.monotonic() - stage.started)
    progress = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=total, completed=stage.played, width=50)
    progress.add_row(bar, Text(f"{stage.played:,} of {total:,} operations, {seconds}", "dim"))
    return Group(drivers_table(stage.crew.drivers, WHAT, over=False), Text(), progress)


def conclusion(report: Report, trace: Trace) -> list[RenderableType]:
    """What was to be seen, and what it means."""
    books = report.books
    calls = Counter(operation.op for operation in trace.operations)
    often = ", ".join(f"{count:,} {op}" for op, count in calls.most_common(5))
    told = "each of these, too" if not books.missed else f"all but {books.missed:,} of these"
    more = f", and {books.bus - books.kernel:,} times more" if books.bus > books.kernel else ""
    reads = sum(driver.reads for driver in report.drivers)
    happened = [
        f"The program made {books.operations:,} operations ({often}, …) in {duration(report.seconds)}.",
        f"The real kernel notified its secondary MMUs {books.kernel:,} times; the bus notified {told}{more}.",
        f"The memory manager waited {report.rounds:,} times, for {report.acks:,} acks: half of them within "
        f"{report.ack_us['p50'] / 1000:.1f} ms, 99 % within {report.ack_us['p99'] / 1000:.1f} ms.",
        f"{report.freed_before_ack or 'No'} page was freed before the last ack was there.",
        f"The drivers read {reads:,} pages by DMA; {report.stale_reads or 'none'} of them held anything else than the "
        "program wrote.",
    ]
    if report.fenced:
        happened.append(f"Fenced, since they did not answer in time: {', '.join(report.fenced)}.")
    means = ["Something went wrong: a driver, or the bus, broke a promise."]
    if report.good:
        means = [
            "Drivers that pin nothing used a program's memory while it changed, as they would beside a kernel;",
            "and none of them ever reached a page that was not theirs any more.",
        ]
    return [
        Text("\nWhat happened", "bold"),
        *(Text(f"  • {line}") for line in happened),
        Text("\nWhat it means", "bold"),
        *(Text(f"  {line}", "green" if report.good else "bold red") for line in means),
        Text("  Next: your own driver in ten minutes, docs/tutorial.md; how these are made, docs/drivers.", "dim"),
    ]
