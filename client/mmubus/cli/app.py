"""`mmubus`: all commands together, and how an error ends them.

Exit status: 0 it worked; 1 it did not, and one line on standard error says why; 2 the command or a recording cannot be
understood; 130 interrupted. With MMUBUS_DEBUG set, errors show where they come from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from mmubus.cli import bench, demo, inspection, record, replay, serve
from mmubus.cli.embedded import ServerFailed
from mmubus.errors import MmuBusError
from mmubus.trace.crew import DriverFailed
from mmubus.trace.format import TraceError
from mmubus.trace.record.capture import RecordError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mmubus",
    help="The Linux MMU-notifier mechanism as a network service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
serve.add(app)
demo.add(app)
replay.add(app)
record.add(app)
inspection.add(app)
bench.add(app)

FAILED, MISUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns: the exit status."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="mmubus")
        return 0
    except SystemExit as ended:  # how a command, --help and a misuse end
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except TraceError as error:
        return _failed(error, MISUSED)
    except (MmuBusError, ServerFailed, DriverFailed, RecordError, OSError) as error:
        return _failed(error, FAILED)


def _failed(error: Exception, status: int) -> int:
    """One line for people, or the whole story for those who asked for it."""
    if os.environ.get("MMUBUS_DEBUG"):
        raise error
    print(f"mmubus: {' '.join(str(error).split())}", file=sys.stderr)
    return status
