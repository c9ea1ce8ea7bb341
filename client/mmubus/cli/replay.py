"""`mmubus replay`: recordings on the bus, with driver processes attached."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmubus.cli.commands import add_command
from mmubus.cli.embedded import embedded_server
from mmubus.cli.output import AsJson, errors, standard
from mmubus.trace.crew import kinds_of
from mmubus.trace.format import Trace, read_trace
from mmubus.trace.loop import run
from mmubus.trace.replay import replay
from mmubus.trace.report import Report

__all__ = ["add", "server_for"]

BAD = 1

SWAP_SLOTS = (64 << 20) >> 12
"""The recorder's swap file."""


def add(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "replay", replay_command)


def replay_command(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE", help="Recordings of `mmubus record`.")],
    drivers: Annotated[
        int, typer.Option(min=0, max=64, metavar="N", help="Driver processes, of three kinds in turn.")
    ] = 3,
    only_state: Annotated[
        bool, typer.Option("--only-state", help="No drivers: compare state and notifications only.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option("--server", "-s", metavar="ADDRESS", help="A server that runs already. Default: one of its own."),
    ] = None,
    ack_budget: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Time the drivers may take to answer; 0: the server's default."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Replay recordings of real programs on the bus, and hold it against the real kernel.

    Driver processes attach to every address space of the recording, fault in what the program touches, and check on
    each DMA that they read what the program wrote. With --json, one object is printed for one recording, an array for
    several; everything else goes to standard error.

    Exit status: 0 when nothing was missed, stale, fenced or freed early, and when, for a random recording, the whole
    state was the kernel's after each operation. 1 otherwise. 2 when a recording cannot be read.

    Example:

        mmubus replay recording.jsonl.gz --drivers 3
    """
    read = [read_trace(path) for path in traces]
    reports = run(_replay_all(read, server, 0 if only_state else drivers, ack_budget, quiet=as_json))
    if as_json:
        objects = [report.as_json() for report in reports]
        print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
    if not all(report.good for report in reports):
        raise typer.Exit(BAD)


async def _replay_all(
    traces: list[Trace], server: str | None, drivers: int, ack_budget: float, *, quiet: bool
) -> list[Report]:
    reports = []
    shown = errors() if quiet else standard()
    for trace in traces:
        with progress_of(trace, errors()) as progress:
            async with server_for(server, options_of(trace)) as address:
                report = await replay(
                    trace,
                    address,
                    drivers=kinds_of(drivers),
                    ack_budget_s=ack_budget,
                    progress=progress,
                    equipped=server is None,
                )
        report.show(shown)
        reports.append(report)
    return reports


@asynccontextmanager
async def server_for(server: str | None, options: Sequence[str] = ()) -> AsyncIterator[str]:
    """The address of the server that was named, or of one of our own with these options of `mmubus serve`."""
    if server is not None:
        yield server
        return
    async with embedded_server(options) as address:
        yield address


def options_of(trace: Trace) -> list[str]:
    """A server of our own has what the machine had that the recording is of."""
    options = []
    if trace.header.swap:
        options += ["--swap-slots-nr", str(SWAP_SLOTS)]
    if trace.header.maps:  # a recording of bad calls, also of files that are as large as they can be
        options += ["--file-bytes-max", str(1 << 44)]
    if trace.header.thp:
        options += ["--thp", "madvise"]
    if trace.header.hugetlb_nr:
        options += ["--hugetlb-nr", str(trace.header.hugetlb_nr)]
    if trace.header.shmem_enabled != "never":
        options += ["--shmem-enabled", trace.header.shmem_enabled, "--tmpfs-huge", trace.header.shmem_enabled]
    return options


@contextmanager
def progress_of(trace: Trace, console: Console) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields what is to be called with the number of operations."""
    if not console.is_terminal:
        yield lambda played: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(trace.name, total=len(trace.operations))
        yield lambda played: progress.update(task, completed=played)
