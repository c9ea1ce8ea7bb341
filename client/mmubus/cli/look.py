"""Looking at a server while it runs: `mmubus top` in a terminal, `mmubus console` in a browser."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from mmubus.cli.commands import add_command
from mmubus.cli.output import Server, standard
from mmubus.connection import connect
from mmubus.look import Watch
from mmubus.trace.loop import run

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, "top", top)
    add_command(app, "console", console)


def top(
    server: Server = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end, for scripts.")] = False,
    interval: Annotated[float, typer.Option(min=0.25, metavar="SECONDS", help="Between two looks.")] = 1.0,
) -> None:
    """Who is waited for: rounds in flight, sessions by the harm that they have done, address spaces, frames.

    Keys: s sorts by the next column, r turns the order round, / filters, p pauses, Tab changes the table, Enter opens
    a row, q ends. Needs the extra [top], --once does not.

    Example:

        mmubus top --server 127.0.0.1:50551
    """
    if not once:
        _needs("textual", "top")
    run(_top(server, once, interval))


async def _top(server: str | None, once: bool, interval_s: float) -> None:
    async with connect(server, name="mmubus top") as bus:
        watch = Watch(bus)
        if not once:
            from mmubus.top.app import Top

            await Top(watch, interval_s=interval_s).run_async()
            return
        from mmubus.top.frame import frame

        await watch.look()
        if watch.failed is not None:
            raise watch.failed
        standard().print(frame(watch))


def console(
    server: Server = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where browsers find it; port 0: any that is free.")
    ] = "127.0.0.1:8080",
    public: Annotated[
        bool, typer.Option("--public", help="Listen on an address that other machines reach, without a password.")
    ] = False,
) -> None:
    """A web console: address spaces as pictures, a timeline of rounds, one page's history, violations.

    Prints "listening on http://HOST:PORT" when it is there. Whoever reaches that address sees what this client may see
    of the server, so an address that others reach is refused without --public. Needs the extra [console].

    Example:

        mmubus console --server 127.0.0.1:50551 --listen 127.0.0.1:8080
    """
    _needs("nicegui", "console")
    from mmubus.console.serve import serve

    serve(server, listen, public=public)


def _needs(module: str, extra: str) -> None:
    """Raises: typer.Exit after saying what to install."""
    if find_spec(module) is None:
        typer.echo(f"mmubus: {module} is not installed; install it with: pip install 'mmubus[{extra}]'", err=True)
        raise typer.Exit(1)
