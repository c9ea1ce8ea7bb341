"""A driver process of a replay: `python -m mmubus.trace.driver --server ADDRESS --kind mirror`.

It is told on standard input what the program has just touched (`crew` has the messages), has its device (`devices` has
the kinds) fault those pages in, reads each by DMA, holds what it read against what must be there, and answers on
standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mmubus.connection import Bus, connect
from mmubus.errors import MmuBusError
from mmubus.linux import PAGE_SIZE
from mmubus.trace.devices import DEVICES, Device, device_of
from mmubus.trace.loop import run

__all__ = ["main"]

LINE_BYTES_MAX = 16 << 20
STALE = "stale-access"


class Checks:
    """The outcome of one check message.

    Attributes:
        reads: pages that were read; lost: pages that could not be.
        wrong: (address, why, what was read).
    """

    def __init__(self) -> None:
        self.reads = self.lost = 0
        self.wrong: list[tuple[int, str, str]] = []

    async def run(self, device: Device, mm: int, start: int, expected: Sequence[str | None]) -> None:
        """Fault a run of pages in, and read each."""
        with suppress(MmuBusError):  # one of them may not be readable; each is asked for by itself below
            await device.fault(mm, start, start + len(expected) * PAGE_SIZE)
        pages = [(start + at * PAGE_SIZE, data) for at, data in enumerate(expected)]
        await asyncio.gather(*(self._page(device, mm, address, data) for address, data in pages))

    async def _page(self, device: Device, mm: int, address: int, expected: str | None) -> None:
        try:
            got = await device.read(mm, address)
        except MmuBusError:
            self.lost += 1
            return
        self.reads += 1
        if expected is not None and got.hex() != expected:
            self.wrong.append((address, f"must be {expected}", got.hex()))


async def serve(bus: Bus, device: Device) -> None:
    """Do what is asked until told to finish, or until nobody asks any more."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        message = json.loads(line)
        answer: dict[str, Any] = {"n": message["n"]}
        if message["do"] == "attach":
            await device.attach(message["mm"])
        elif message["do"] == "check":
            checks = Checks()
            for start, expected in message["pages"]:
                await checks.run(device, message["mm"], start, expected)
            answer |= {"reads": checks.reads, "lost": checks.lost, "wrong": checks.wrong}
        answer |= {"refused": sum(finding.kind == STALE for finding in bus.session.findings)}
        sys.stdout.write(json.dumps(answer, separators=(",", ":")) + "\n")
        sys.stdout.flush()
        if message["do"] == "finish":
            return


async def drive(address: str, kind: str, name: str, ack_budget_s: float) -> None:
    """Connect, and be a driver."""
    async with connect(address, name=name, ack_budget_s=ack_budget_s) as bus:
        device = await device_of(kind, bus)
        try:
            await serve(bus, device)
        finally:
            await device.close()


def main() -> int:
    """The process."""
    parser = argparse.ArgumentParser(prog="mmubus.trace.driver", description="A driver process of a replay.")
    parser.add_argument("--server", required=True)
    parser.add_argument("--kind", required=True, choices=list(DEVICES))
    parser.add_argument("--name", required=True)
    parser.add_argument("--ack-budget", type=float, default=0.0)
    options = parser.parse_args()
    try:
        run(drive(options.server, options.kind, options.name, options.ack_budget))
    except MmuBusError as error:
        print(f"driver {options.name}: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
