"""The one door from the client to the server: starting one, in this process or beside it."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

__all__ = ["ServerFailed", "embedded_server", "export_trace", "judge", "serve", "simulate"]

START = "import sys; from mmubus.cli.embedded import serve; sys.exit(serve(sys.argv[1:]))"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class ServerFailed(Exception):
    """A server of our own could not be started."""


def serve(arguments: Sequence[str]) -> int:
    """Run a server in this process until a signal ends it. Returns: the exit status."""
    from mmubusd.rpc import main

    return main(arguments)


def judge(arguments: Sequence[str]) -> int:
    """Judge a recording. Returns: the exit status."""
    from mmubusd.rpc.record import judge_file

    return judge_file(arguments)


def export_trace(arguments: Sequence[str]) -> int:
    """Draw a recording. Returns: the exit status."""
    from mmubusd.rpc.record import export

    return export(arguments)


def simulate(arguments: Sequence[str]) -> int:
    """Run simulations in this process. Returns: the exit status."""
    from mmubusd.sim.search import main

    return main(arguments)


@asynccontextmanager
async def embedded_server(options: Sequence[str] = ()) -> AsyncIterator[str]:
    """A server in a process of its own, on a Unix socket in a directory of its own; yields its address.

    Args: options: of `mmubus serve`.
    Raises: ServerFailed.
    """
    with tempfile.TemporaryDirectory(prefix="mmubus-") as directory:
        address = f"unix:{directory}/mmubus.sock"
        command = (sys.executable, "-c", START, "--listen", address, "--log-level", "error", *options)
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        try:
            await _listening(process)
            yield address
        finally:
            await _stop(process)


async def _listening(process: Process) -> None:
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
    except TimeoutError:
        raise ServerFailed(f"the server did not listen within {START_TIMEOUT_S:.0f} s") from None
    if not line.startswith(b"listening on "):
        raise ServerFailed("the server could not be started; what went wrong stands above")


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
