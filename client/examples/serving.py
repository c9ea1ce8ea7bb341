"""What the examples share: `--server ADDRESS` on the command line, or a server of one's own for as long as it takes."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mmubus.cli.embedded import embedded_server


@asynccontextmanager
async def server(what: str | None) -> AsyncIterator[str]:
    """The address of a server."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--server", metavar="ADDRESS", help="one that runs already; default: one of its own")
    address = parser.parse_args().server
    if address:
        yield address
        return
    async with embedded_server() as own:
        yield own
