"""A driver process of a replay: `python -m mmubus.trace.driver --server ADDRESS --kind mirror`.

Three kinds, one for each way in which a device can follow an address space:

    mirror   mirrors whole address spaces with the seed's ops, and reaches memory through the server
    range    mirrors them with mainline's start and end and its aging ops, and reaches memory through the frames' window
             where that is possible: nobody checks such an access, as nobody checks DMA
    rmap     exports pages and is told of them by frame, through the global rmap list

It is told on standard input what the program has just touched (`crew` has the messages), faults those pages in, reads
each by DMA, holds what it read against what must be there, and answers on standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mmubus.connection import Bus, connect
from mmubus.device import NO_PFN, Translations
from mmubus.errors import MmuBusError, RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SIZE
from mmubus.mirror import Mirror, Style
from mmubus.notifier import RmapNotifier
from mmubus.registration import Registration
from mmubus.trace.contents import PATTERN_BYTES
from mmubus.trace.crew import KINDS
from mmubus.trace.loop import run
from mmubus.window import FrameWindow

__all__ = ["main"]

LINE_BYTES_MAX = 16 << 20
STALE_RETRIES = 3


class Device(ABC):
    """What the three kinds have in common."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    @abstractmethod
    async def attach(self, mm: int) -> None:
        """Follow an address space from now on."""

    @abstractmethod
    async def fault(self, mm: int, start: int, end: int) -> None:
        """Get translations of pages that are present. Raises: MmuBusError."""

    @abstractmethod
    async def read(self, mm: int, address: int) -> bytes:
        """The first PATTERN_BYTES of a page, by DMA. Raises: MmuBusError; StaleTranslation when it was refused."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Pages of which it holds translations."""

    @property
    @abstractmethod
    def refused(self) -> int:
        """Accesses that the server refused because the translation was stale."""


class MirrorDevice(Device):
    """One `Mirror` for each address space: the library does the rest.

    Args: style: whose ops; through_window: reach memory without the server, where it is on the same machine.
    """

    def __init__(self, bus: Bus, style: Style, *, through_window: bool) -> None:
        super().__init__(bus)
        self._style = style
        self._through_window = through_window
        self._window: FrameWindow | None = None
        self._mirrors: dict[int, Mirror] = {}

    async def attach(self, mm: int) -> None:
        if self._through_window and self._window is None:
            self._window = await self._open_window(mm)
        mirror = Mirror(style=self._style, window=self._window)
        await self.bus.register(mirror, mm, name=self.bus.name)
        self._mirrors[mm] = mirror

    async def _open_window(self, mm: int) -> FrameWindow | None:
        """The server tells where its frames are when a session begins: with the first registration."""
        first = await self.bus.register(Mirror(style=self._style), mm)
        try:
            return self.bus.frame_window()
        except OSError:
            return None  # another machine, or not offered: through the server, then
        finally:
            await first.unregister()

    async def fault(self, mm: int, start: int, end: int) -> None:
        await self._mirrors[mm].fault(start, end)

    async def read(self, mm: int, address: int) -> bytes:
        return await self._mirrors[mm].read(address, PATTERN_BYTES)

    @property
    def held(self) -> int:
        return sum(len(mirror.held) for mirror in self._mirrors.values())

    @property
    def refused(self) -> int:
        return sum(mirror.statistics.stale for mirror in self._mirrors.values())


class RmapDevice(Device, RmapNotifier):
    """Exports pages; knows frames, not addresses. What an address shows may change while the frame stays exported."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self._frames: dict[int, int] = {}  # pfn -> generation
        self._at: dict[tuple[int, int], int] = {}  # (mm, address) -> pfn, of the latest export
        self._rmap: Registration | None = None
        self._refused = 0

    def invalidate_page(self, page: int, must_evict: bool) -> None:
        self._frames.pop(page, None)

    def invalidated_everything(self, why: str) -> None:
        self._frames.clear()

    async def attach(self, mm: int) -> None:
        if self._rmap is None:
            self._rmap = await self.bus.register_rmap(self, name=self.bus.name)

    async def fault(self, mm: int, start: int, end: int) -> None:
        assert self._rmap is not None

        def commit(translations: Translations) -> None:
            for address, pfn, generation, _ in translations:
                self._frames[pfn] = generation
                self._at[mm, address] = pfn

        await self._rmap.export(mm, start, end, commit=commit)

    async def read(self, mm: int, address: int) -> bytes:
        assert self._rmap is not None
        for _ in range(STALE_RETRIES):
            pfn = self._at.get((mm, address), NO_PFN)
            if pfn not in self._frames:
                await self.fault(mm, address, address + PAGE_SIZE)
                pfn = self._at[mm, address]
            try:
                return await self._rmap.dma_read(0, PATTERN_BYTES, [pfn], [self._frames[pfn]])
            except StaleTranslation:
                self._refused += 1
                self._frames.pop(pfn, None)
        raise RetriesExhausted(f"{address:#x} was stale {STALE_RETRIES} times in a row")

    @property
    def held(self) -> int:
        return len(self._frames)

    @property
    def refused(self) -> int:
        return self._refused


def device_of(kind: str, bus: Bus) -> Device:
    """The device of a kind."""
    if kind == "rmap":
        return RmapDevice(bus)
    if kind == "range":
        return MirrorDevice(bus, "mainline", through_window=True)
    return MirrorDevice(bus, "seed", through_window=False)


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
        answer |= {"held": device.held, "refused": device.refused, "notices": bus.session.notices_handled}
        sys.stdout.write(json.dumps(answer, separators=(",", ":")) + "\n")
        sys.stdout.flush()
        if message["do"] == "finish":
            return


async def drive(address: str, kind: str, name: str, ack_budget_s: float) -> None:
    """Connect, and be a driver."""
    async with connect(address, name=name, ack_budget_s=ack_budget_s) as bus:
        await serve(bus, device_of(kind, bus))


def main() -> int:
    """The process."""
    parser = argparse.ArgumentParser(prog="mmubus.trace.driver", description="A driver process of a replay.")
    parser.add_argument("--server", required=True)
    parser.add_argument("--kind", required=True, choices=KINDS)
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
