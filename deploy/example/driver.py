"""A driver of the example application: it reads the application's line through its device, and answers through it.

python driver.py hmm|rdma [--once]

    hmm    mirrors the whole address space, as lib/test_hmm.c does
    rdma   an on-demand memory region of three pages, as a NIC has
"""

import argparse
import asyncio
import time
from typing import Protocol

import mmubus
from mmubus.drivers.hmm import Dmirror
from mmubus.drivers.rdma.mr import Access
from mmubus.drivers.rdma.odp import OnDemandRegion

NAME = "example"
ADDRESS = 0x10000000
PAGES = 3
LINE_BYTES = 64
PAUSE_S = 0.05


class Device(Protocol):
    """What both kinds can do. invalidations: pages were taken so many times."""

    invalidations: int

    async def line(self) -> str:
        """The application's line. Raises: MmError while nothing is mapped."""
        ...

    async def answer(self, line: str) -> None:
        """Write to this driver's own page. Raises: MmError."""
        ...


class Hmm(Dmirror):
    """Whole pages, through a mirror of the address space. Answers on page 1."""

    async def line(self) -> str:
        return text((await self.read(ADDRESS, 1)).data)

    async def answer(self, line: str) -> None:
        await self.write(ADDRESS + mmubus.PAGE_SIZE, line.encode().ljust(mmubus.PAGE_SIZE, b"\0"))


class Rdma(OnDemandRegion):
    """A few bytes, through a memory region. Answers on page 2."""

    async def line(self) -> str:
        return text(await self.read(ADDRESS, LINE_BYTES))

    async def answer(self, line: str) -> None:
        await self.write(ADDRESS + 2 * mmubus.PAGE_SIZE, line.encode().ljust(LINE_BYTES, b"\0"))


def text(data: bytes) -> str:
    return data[:LINE_BYTES].rstrip(b"\0").decode()


async def attach(bus: mmubus.Bus, kind: str, mm: int) -> Device:
    """Register a device of that kind."""
    if kind == "rdma":
        return await Rdma.register(bus, mm, ADDRESS, PAGES * mmubus.PAGE_SIZE, Access.LOCAL_WRITE)
    device = Hmm()
    await bus.register(device, mm, name=kind)
    return device


async def serve(bus: mmubus.Bus, kind: str, mm: int) -> None:
    """Answer line after line until the address space is gone."""
    device = await attach(bus, kind, mm)
    say(kind, f"registered on address space {mm}")
    seen = ""
    while any(one.mm == mm for one in await bus.inspection.address_spaces()):
        try:
            line = await device.line()
            if line.startswith("turn") and line != seen:
                await device.answer(f"{kind} has seen {line}")
                seen = line
                say(kind, f"read {line!r} by DMA and answered")
        except mmubus.MmError as error:  # nothing is mapped between two turns
            if error.errno_name not in ("EFAULT", "ESRCH"):
                raise
        except (mmubus.StaleTranslation, mmubus.Unregistered):  # taken on the way; the next look finds what is there
            pass
        await asyncio.sleep(PAUSE_S)
    say(kind, f"the address space is gone; pages were taken {device.invalidations} times")


async def find(bus: mmubus.Bus, ignored: set[int]) -> int:
    """Wait for an address space of the example. Returns: its number."""
    while True:
        try:
            for one in await bus.inspection.address_spaces():
                if one.name == NAME and one.mm not in ignored:
                    return one.mm
        except mmubus.ConnectionLost:
            pass  # the server is not there yet, or not any more
        await asyncio.sleep(0.2)


async def run(kind: str, once: bool) -> None:
    """Serve one application after the other, over restarts of the server too."""
    served: set[int] = set()
    while True:
        async with mmubus.connect(name=kind) as bus:
            start = time.monotonic()
            mm = await find(bus, served)
            try:
                await serve(bus, kind, mm)
                served.add(mm)
            except mmubus.MmError as error:
                if error.errno_name != "ESRCH":
                    raise
                served.add(mm)  # gone before we were registered
                continue
            except mmubus.SessionError as error:
                served.clear()
                say(kind, f"{error}; beginning anew after {time.monotonic() - start:.0f} s")
                continue
        if once:
            return


def say(kind: str, what: str) -> None:
    print(f"{kind:12} {what}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("hmm", "rdma"))
    parser.add_argument("--once", action="store_true", help="end when the application has ended")
    given = parser.parse_args()
    asyncio.run(run(given.kind, given.once))
