"""`mmubus`: all commands together, and how an error ends them.

Exit status: 0 it worked; 1 it did not, and one line on standard error says why; 2 the command or a recording cannot be
understood; 130 interrupted. With MMUBUS_DEBUG set, errors show where they come from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmubus.cli import bench, conform, demo, explain, grants, inspection, look, record, replay, serve, simulate
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
explain.add(app)
grants.add(app)
look.add(app)
bench.add(app)
simulate.add(app)
conform.add(app)

FAILED, MISUSED = 1, 2

OptionalPath = Path | None


@app.callback()
def secure(
    tls: Annotated[bool | None, typer.Option("--tls/--no-tls", help="Speak TLS to host:port. [MMUBUS_TLS]")] = None,
    ca: Annotated[OptionalPath, typer.Option(help="Whose certificates servers must have. [MMUBUS_CA]")] = None,
    cert: Annotated[OptionalPath, typer.Option(help="This client's certificate. [MMUBUS_CERT]")] = None,
    key: Annotated[OptionalPath, typer.Option(help="Its key. [MMUBUS_KEY]")] = None,
    server_name: Annotated[str, typer.Option(help="The name in the server's certificate. [MMUBUS_SERVER_NAME]")] = "",
    token_file: Annotated[OptionalPath, typer.Option(help="Where the token is. [MMUBUS_TOKEN_FILE]")] = None,
) -> None:
    """The Linux MMU-notifier mechanism as a network service."""
    # By the environment, so that processes that a command starts have it too. There is no --token: others could see it.
    given = {"TLS": tls, "CA": ca, "CERT": cert, "KEY": key, "SERVER_NAME": server_name, "TOKEN_FILE": token_file}
    for name, value in given.items():
        if value not in (None, ""):
            os.environ[f"MMUBUS_{name}"] = str(value).lower() if isinstance(value, bool) else str(value)
    if token_file is not None:
        os.environ.pop("MMUBUS_TOKEN", None)  # what is written on the line wins


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
