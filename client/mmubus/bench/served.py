"""The owner's side of mmubus: a whole server, with the benchmark's hand on its memory.

What the benchmark times is begun here, inside the server, as the peers' owners begin theirs: there is nobody between
the memory and those who must be told. A round is one madvise(MADV_DONTNEED) of one resident page: the PTE goes, the
range is barred, every registration concerned is told and has answered, the frame is free again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from typing import Any

from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.mm import Mm
from mmubusd.rpc import EmbeddedServer
from mmubusd.rpc.collector import calm_collector

from mmubus.bench.lag import LagProbe
from mmubus.bench.machine import own_bytes
from mmubus.bench.rounds import callers
from mmubus.bench.worker import serve
from mmubus.channel import grpc

__all__ = ["owner"]

assert grpc  # its switches are set before the server imports it

BASE = 0x10_0000_0000
PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_FIXED = 3, 0x32
DONTNEED, POPULATE_WRITE = 4, 23
WINDOW_PAGES = 1 << 15


class _Owner:
    """One server. Address spaces have `pages` pages mapped at BASE."""

    def __init__(self, embedded: EmbeddedServer) -> None:
        server = embedded.server
        self._driver, self._bus, self._memory = server.driver, server.bus, server.memory
        self._default = 0

    async def start(self) -> int:
        """Returns: the address space that the arena's rounds are about."""
        self._default = await self.create(WINDOW_PAGES)
        return self._default

    async def expect(self, responders: int, streams: int) -> None:
        """The command; the server counts for itself."""

    async def create(self, pages: int, pieces: int = 1) -> int:
        """The command: an address space with so many pages mapped, in so many mappings. Returns: its number."""
        mm = self._memory.create_mm("bench")
        size = pages // pieces * PAGE_SIZE
        for piece in range(pieces):
            # Neighbours differ in their rights, so that the mappings stay apart.
            prot = PROT_READ_WRITE if piece % 2 == 0 else PROT_READ_WRITE | 4
            await self._run(mm.mmap(BASE + piece * size, size, prot, MAP_PRIVATE_ANONYMOUS_FIXED))
        return int(mm.id)

    async def populate(self, mm: int, pages: int) -> None:
        """The command: make the first pages resident."""
        await self._run(self._mm(mm).madvise(BASE, pages * PAGE_SIZE, POPULATE_WRITE))

    async def gather(self, rounds: int, mm: int = 0, at: int = 0, pages: int = 1) -> list[float]:
        """The command: one round after another. Returns: µs of each.

        Args: mm: 0: the arena's; at: the first page of each round; pages: that are taken away by one.
        """
        space = self._mm(mm)
        took = []
        fresh = at == 0 and pages == 1  # each round takes the next page
        window = min(rounds, WINDOW_PAGES)
        for number in range(rounds):
            first = number % window if fresh else at
            if not fresh or first == 0:
                extent = window if fresh else pages
                await self._run(space.madvise(BASE + first * PAGE_SIZE, extent * PAGE_SIZE, POPULATE_WRITE))
            begun = time.perf_counter()
            await self._run(space.madvise(BASE + first * PAGE_SIZE, pages * PAGE_SIZE, DONTNEED))
            took.append((time.perf_counter() - begun) * 1e6)
        return took

    async def pipelined(self, rounds: int, in_flight: int, mm: int = 0) -> float:
        """The command: rounds on pages of their own, in_flight at a time. Returns: rounds a second."""
        space = self._mm(mm)
        rounds = min(rounds, WINDOW_PAGES)
        await self.populate(mm, rounds)
        pages = iter(range(BASE, BASE + rounds * PAGE_SIZE, PAGE_SIZE))
        return await callers(lambda: self._run(space.madvise(next(pages), PAGE_SIZE, DONTNEED)), rounds, in_flight)

    async def exit(self, mm: int) -> dict[str, float]:
        """The command: end an address space while the loop's lag is watched. Returns: ms."""
        space = self._mm(mm)
        async with LagProbe() as probe:
            begun = time.perf_counter()
            await self._run(space.exit())
            took = time.perf_counter() - begun
        return {"p99_ms": probe.quantile_ms(0.99), "worst_ms": probe.quantile_ms(1.0), "took_ms": took * 1e3}

    async def memory(self) -> int:
        """The command. Returns: bytes of this process that are its own: not the frames' contents, not code."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is not what a session costs
        return own_bytes()

    def _mm(self, mm: int) -> Mm:
        return self._memory.mm(mm or self._default)  # type: ignore[arg-type]

    async def _run(self, work: Any) -> Any:
        return await self._driver.run(self._bus.start, work, label="bench")


async def owner(address: str, frames_nr: int = 1 << 20) -> None:
    """The role: a server at an address."""
    lane = address.startswith("unix:")  # over TCP it is gRPC that is measured
    async with EmbeddedServer(
        listen=(address,), frames_nr=frames_nr, lease_s=300.0, ack_budget_s=30.0, lane=lane
    ) as embedded:
        state = _Owner(embedded)
        mm = await state.start()
        calm_collector()  # as mmubusd does
        names = ("expect", "create", "populate", "gather", "pipelined", "exit", "memory")
        await serve({name: getattr(state, name) for name in names}, {"address": embedded.address, "mm": mm})
