"""Drivers for the conformance kit: one that is right, and some that are not."""

from __future__ import annotations

import asyncio

from mmubus import Bus, Mirror, Notifier
from mmubus.address_space import AddressSpace


async def good(bus: Bus, mm: AddressSpace) -> Mirror:
    """The library's own mirror."""
    return await bus.mirror(mm)


async def good_mainline(bus: Bus, mm: AddressSpace) -> Mirror:
    """The same in mainline's style."""
    return await bus.mirror(mm, style="mainline")


class Caching(Notifier):
    """Keeps a copy of the bytes of each page that it has read, and should drop it when told."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.cache: dict[int, bytes] = {}

    async def read(self, address: int, length: int) -> bytes:
        if address not in self.cache:
            self.cache[address] = await self.mirror.read(address, length)
        return self.cache[address]

    async def write(self, address: int, data: bytes) -> None:
        await self.mirror.write(address, data)
        self.cache[address] = data

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        """Forgets to drop anything."""


async def never_drops(bus: Bus, mm: AddressSpace) -> Caching:
    """Stale for ever."""
    return Caching(await bus.mirror(mm))


class Slow(Mirror):
    """Its handler takes longer than anybody waits."""

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:  # type: ignore[override]
        await asyncio.sleep(30)


async def too_slow(bus: Bus, mm: AddressSpace) -> Mirror:
    """Is fenced."""
    mirror = Slow()
    await bus.register(mirror, mm, ack_budget_s=0.3)
    return mirror
