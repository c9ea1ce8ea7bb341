"""`mmubus sim`: the real cores on a simulated network and clock, one run a seed."""

from __future__ import annotations

import sys

import typer

from mmubus.cli import embedded

__all__ = ["add"]

HELP = """Run the server's cores on a simulated network and clock: loss, delay, replay, pauses, crashes, partitions.

Each seed is one run, always the same. A seed that breaks a rule is printed with the end of its recording.

Example:

    mmubus sim --seeds 0:10000 --jobs 2

    mmubus sim --planted all
"""


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "sim",
        help=HELP,
        short_help="Seeded runs of the whole system.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    )(_simulate)


def _simulate(context: typer.Context) -> None:
    if {"-h", "--help"} & set(context.args):
        print(HELP)
        sys.stdout.flush()
    raise typer.Exit(embedded.simulate(context.args))
