"""An application whose memory two drivers share: it maps, writes, waits for answers, unmaps, and says what happened.

python application.py [--turns N]          0: for ever

Each turn, a page a part:

    page 0   the application writes a line
    page 1   the hmm driver answers through its device        a page is unmapped when both have let go of it
    page 2   the rdma driver answers through its device
"""

import argparse
import asyncio
import sys
import time

import mmubus
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PROT_READ, PROT_WRITE

NAME = "example"
ADDRESS = 0x10000000
DRIVERS = ("hmm", "rdma")
LINE_BYTES = 64
PATIENCE_S = 60.0


def say(what: str) -> None:
    print(f"application  {what}", flush=True)


async def reachable(bus: mmubus.Bus) -> None:
    """Wait for the server. Raises: ConnectionLost when it does not come."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            await bus.inspection.address_spaces()
            return
        except mmubus.ConnectionLost:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


async def drivers_attached(bus: mmubus.Bus, mm: mmubus.AddressSpace) -> None:
    """Wait until both drivers have registered. Raises: TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            spaces = await bus.inspection.address_spaces()
            if any(one.mm == mm.id and one.registrations >= len(DRIVERS) for one in spaces):
                return
            await asyncio.sleep(0.1)


async def answered(mm: mmubus.AddressSpace, turn: int) -> list[str]:
    """Wait until each driver has written its line of this turn. Returns: the lines. Raises: TimeoutError."""
    lines = []
    async with asyncio.timeout(PATIENCE_S):
        for page, driver in enumerate(DRIVERS, 1):
            expected = f"{driver} has seen turn {turn}"
            line = ""
            while line != expected:
                await asyncio.sleep(0.02)
                line = (await mm.load(ADDRESS + page * mmubus.PAGE_SIZE, LINE_BYTES)).rstrip(b"\0").decode()
            lines.append(line)
    return lines


async def take_turn(bus: mmubus.Bus, mm: mmubus.AddressSpace, turn: int) -> None:
    """Map, write, let the drivers answer, unmap."""
    length = (1 + len(DRIVERS)) * mmubus.PAGE_SIZE
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    await mm.mmap(ADDRESS, length, PROT_READ | PROT_WRITE, flags)
    await mm.store(ADDRESS, f"turn {turn}".encode().ljust(LINE_BYTES, b"\0"))
    say(f"turn {turn}: mapped 3 pages at {ADDRESS:#x} and wrote to the first")
    for line in await answered(mm, turn):
        say(f"turn {turn}: read {line!r}")
    held = {one.registration.name: one.pages for one in await bus.inspection.holders(mm.id, ADDRESS, ADDRESS + length)}
    start = time.perf_counter()
    await mm.munmap(ADDRESS, length)
    took_ms = (time.perf_counter() - start) * 1e3
    pages = ", ".join(f"{name} {count}" for name, count in sorted(held.items()))
    say(f"turn {turn}: unmapped in {took_ms:.1f} ms, when all had let go (pages held: {pages})")


async def run(turns: int) -> None:
    """All turns."""
    async with mmubus.connect(name="application") as bus:
        await reachable(bus)
        mm = await bus.create_mm(NAME)
        say(f"address space {mm.id} made; waiting for the drivers")
        try:
            await drivers_attached(bus, mm)
            turn = 0
            while not turns or turn < turns:
                turn += 1
                await take_turn(bus, mm, turn)
                if not turns:
                    await asyncio.sleep(1)
        finally:
            await mm.exit()
        say(f"done: {turn} turns")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="0: for ever (default: 3)")
    try:
        asyncio.run(run(parser.parse_args().turns))
    except (mmubus.SessionError, TimeoutError) as error:
        sys.exit(f"application  gives up: {error or 'a driver did not answer'}")
