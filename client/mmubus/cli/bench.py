"""`mmubus bench`: how fast it is, against its floors and against what people use instead."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmubus.cli.commands import add_command
from mmubus.cli.output import AsJson, errors, standard

__all__ = ["add"]

HELP = """Measure how fast mmubus is on this machine.

Starts servers, drivers and programs of its own, in processes of their own, and measures them side by side with the
floors that they stand on: raw grpc.aio with bytes, raw uvloop TCP, the memory manager without notifier calls, the
real kernel. With --peers also against NATS, Redis and ZeroMQ, which it starts on loopback itself.

Exit status 0 when it ran: a bound that is not met is a result.

Examples:

    mmubus bench --quick

    mmubus bench --peers --json >results.json
"""


def add(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "bench", _bench, help=HELP, short_help="Measure how fast it is.")


def _bench(
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples: under five minutes.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also NATS, Redis and ZeroMQ.")] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part", help="Only this part; may be repeated: core, rounds, fanout, operations, memory, lag, curves."
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Write pictures (SVG) into --out; needs matplotlib.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIRECTORY", help="Where pictures go.")] = Path("mmubus-bench"),
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Write machine, versions and figures as Markdown; in a page with marks for them, only these.",
        ),
    ] = None,
) -> None:
    # The benchmark brings a server's modules along; commands that do not need them start faster without.
    from mmubus.bench import FULL, PARTS, QUICK, run
    from mmubus.bench.machine import machine
    from mmubus.bench.plot import draw
    from mmubus.bench.report import chart, into_page, markdown, table
    from mmubus.bench.worker import run_loop

    if unknown := set(part or ()) - set(PARTS):
        raise typer.BadParameter(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    on = machine()
    progress = errors()
    rows = run_loop(
        run(QUICK if quick else FULL, peers=peers, say=lambda what: progress.print(f"... {what}"), parts=part or PARTS)
    )
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        console = standard()
        console.print("; ".join(f"{name} {value}" for name, value in on.items()))
        console.print()
        console.print(table(rows))
        console.print()
        for line in chart(rows):
            console.print(line, markup=False)
    if report is not None:
        figures = markdown(rows, on, shlex.join(["mmubus", *sys.argv[1:]]))
        report.write_text(into_page(figures, report.read_text() if report.exists() else ""))
    if plot:
        try:
            for path in draw(rows, out):
                progress.print(f"wrote {path}")
        except ModuleNotFoundError as error:
            progress.print(f"no pictures: {error}; pip install 'mmubus[bench]'", markup=False)
