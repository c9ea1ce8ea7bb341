"""The process `mmubusd`: a server, the signals that end it, and its exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from mmubusd.rpc.collector import calm_collector
from mmubusd.rpc.config import ConfigError, Settings, load
from mmubusd.rpc.identity import SecurityFileError
from mmubusd.rpc.server import Server
from mmubusd.rpc.supervisor import READY, STOPPING, tell
from mmubusd.rpc.tracing import TracingUnavailable
from mmubusd.rpc.transport import raise_descriptor_limit
from mmubusd.state import StateError

__all__ = ["main", "serve"]

EX_SOFTWARE = 70
LAST_CALLS_S, LAST_CALLS_TURNS = 0.25, 8
"""Calls are still told that the server stops until none has come for so long; at most so often."""


async def serve(settings: Settings, again: Callable[[], Settings] | None = None) -> int:
    """Run a server until a signal or a broken invariant ends it.

    Prints each bound address on standard output, one `listening on ADDRESS` a line. The first SIGTERM or SIGINT drains,
    the second stops at once; SIGHUP reads the configuration again.
    Args: again: reads it.
    Returns: the exit status.
    """
    raise_descriptor_limit()
    server = Server(settings, again=again)
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        for address in await server.start():
            print(f"listening on {address}", flush=True)
        tell(READY, f"STATUS=listening on {', '.join(server.addresses)}")
    except (OSError, SecurityFileError, StateError, TracingUnavailable) as error:
        server.log.error("cannot start", because=str(error))
        return 1
    calm_collector()
    loop.add_signal_handler(signal.SIGHUP, server.read_again)
    broken = server.alarm.broken
    await _first(broken, signals.get())
    tell(STOPPING)
    if not broken.done():
        await _first(broken, signals.get(), _wind_down(server))
    await server.stop()
    if broken.done():
        server.log.critical("an invariant is broken; stopped", exc_info=broken.result())
        return EX_SOFTWARE
    return 0


async def _wind_down(server: Server) -> None:
    """Drain, and tell those whose calls are on their way: gRPC would cancel them with no word why."""
    await server.drain()
    refused = server.driver.tally.failed_rpcs
    for _ in range(LAST_CALLS_TURNS):
        before = refused.total()
        await asyncio.sleep(LAST_CALLS_S)
        if refused.total() == before:
            return


async def _first(broken: asyncio.Future[BaseException], *others: Coroutine[object, object, object]) -> None:
    """Wait until one of them is done or the alarm has rung; cancel the rest."""
    tasks = [asyncio.ensure_future(other) for other in others]
    waited: list[asyncio.Future[Any]] = [broken, *tasks]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


def main(argv: Sequence[str] | None = None) -> int:
    """`mmubusd`: read the configuration and serve."""
    given = tuple(sys.argv[1:] if argv is None else argv)
    try:
        settings = load(given)
    except ConfigError as error:
        print(f"mmubusd: {error}", file=sys.stderr)
        return 2
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serve(settings, lambda: load(given)))
    return uvloop.run(serve(settings, lambda: load(given)))
