"""`mmubus serve`: a server in the foreground."""

from __future__ import annotations

import sys

import typer

from mmubus.cli import embedded
from mmubus.cli.commands import add_command

__all__ = ["add"]

HELP = """Run a server in the foreground until SIGTERM or Ctrl-C.

Each option can also be given in the environment (MMUBUS_FRAMES_NR=…) or in a TOML file (--config FILE).

Example:

    mmubus serve --listen unix:/run/user/1000/mmubus.sock,127.0.0.1:50551 --ack-budget-s 1

Prints one line "listening on ADDRESS" for each address.
"""


def add(app: typer.Typer) -> None:
    """Add the command."""
    # The server knows its options, with their help; they go through as they are.
    add_command(
        app,
        "serve",
        _serve,
        help=HELP,
        short_help="Run a server.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    )


def _serve(context: typer.Context) -> None:
    if {"-h", "--help"} & set(context.args):
        print(HELP)
        sys.stdout.flush()
    raise typer.Exit(embedded.serve(context.args))
