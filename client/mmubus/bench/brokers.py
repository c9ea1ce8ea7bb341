"""The third parties, started on loopback for the benchmark alone, and ended with it."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

__all__ = ["BrokerFailed", "free_port", "missing", "started"]

START_TIMEOUT_S = 10.0


class BrokerFailed(Exception):
    """A broker could not be started."""


def missing(program: str, package: str, *modules: str) -> str:
    """What must be installed, or "".

    Args: program: looked for on PATH, "" when there is none; package: Debian's for it; modules: Python's, with the name
        that pip knows after a colon where it is another one.
    """
    wanted = []
    if program and shutil.which(program) is None:
        wanted.append(f"apt-get install {package}")
    for module in modules:
        name, _, pip = module.partition(":")
        if importlib.util.find_spec(name) is None:
            wanted.append(f"pip install {pip or name}")
    return "; ".join(wanted)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def started(command: Sequence[str], address: str) -> AsyncIterator[None]:
    """A program that serves at an address: "host:port" or a path. Raises: BrokerFailed."""
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    try:
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not await _answers(address):
            if process.returncode is not None:
                raise BrokerFailed(f"{' '.join(command)} ended with status {process.returncode}")
            if asyncio.get_running_loop().time() > deadline:
                raise BrokerFailed(f"{' '.join(command)} does not serve at {address}")
            await asyncio.sleep(0.02)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        if Path(address).is_absolute():
            _reader, writer = await asyncio.open_unix_connection(address)
        else:
            _reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True
