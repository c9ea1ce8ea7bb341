"""`mmubus sim`, `judge` and `export-trace`: runs of the whole system, simulated or recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

from mmubus.cli import embedded
from mmubus.cli.commands import add_command

__all__ = ["add"]

HELP = """Run the server's cores on a simulated network and clock: loss, delay, replay, pauses, crashes, partitions.

Each seed is one run, always the same. A seed that breaks a rule is printed with the end of its recording.

Example:

    mmubus sim --seeds 0:10000 --jobs 2

    mmubus sim --planted all
"""

JUDGE_HELP = """Judge a recorded run by the rules that always hold. Exit status 1 when one was broken.

Example:

    mmubus serve --record run.jsonl

    mmubus judge run.jsonl
"""
EXPORT_HELP = """Draw a recorded run: Chrome's trace JSON, which ui.perfetto.dev opens.

Example:

    mmubus export-trace run.jsonl --out run.trace.json
"""


def add(app: typer.Typer) -> None:
    """Add the commands."""
    for name, text, short, command in (
        ("sim", HELP, "Seeded runs of the whole system.", _simulate),
        ("judge", JUDGE_HELP, "Judge a recorded run by the rules.", _judge),
        ("export-trace", EXPORT_HELP, "Draw a recorded run for ui.perfetto.dev.", _export_trace),
    ):
        add_command(
            app,
            name,
            command,
            help=text,
            short_help=short,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
        )


def _judge(context: typer.Context) -> None:
    _pass_on(context, JUDGE_HELP, embedded.judge)


def _export_trace(context: typer.Context) -> None:
    _pass_on(context, EXPORT_HELP, embedded.export_trace)


def _simulate(context: typer.Context) -> None:
    _pass_on(context, HELP, embedded.simulate)


def _pass_on(context: typer.Context, text: str, run: Callable[[Sequence[str]], int]) -> None:
    """The server's side knows the options; they go through as they are."""
    if {"-h", "--help"} & set(context.args):
        print(text)
        sys.stdout.flush()
    raise typer.Exit(run(context.args))
