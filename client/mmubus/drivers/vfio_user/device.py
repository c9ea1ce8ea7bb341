"""The device: it is told what it may reach, reaches nothing else, and answers DMA_UNMAP when it is off."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from mmubus.drivers.vfio_user.channel import ACCESS, MAP, UNMAP, Channel, Command
from mmubus.errors import MmError

__all__ = ["Device"]


@dataclass(slots=True, eq=False)
class Window:
    """Device addresses [iova, iova + size). Attributes: in_flight: accesses under way; idle: there are none."""

    iova: int
    size: int
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def has(self, iova: int, count: int) -> bool:
        """Whether an access is inside of it."""
        return self.iova <= iova and iova + count <= self.iova + self.size


class Device:
    """The device: reaches what it was told of, and nothing else. Use `connect`."""

    def __init__(self) -> None:
        self.regions: dict[int, Window] = {}
        self.mapped = asyncio.Condition()
        self._channel: Channel | None = None

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        """The socket to the VMM."""
        handlers = {Command.VERSION: self._version, Command.DMA_MAP: self._map, Command.DMA_UNMAP: self._unmap}
        self._channel = Channel(reader, writer, handlers)
        return self._channel

    async def read(self, iova: int, count: int) -> bytes:
        """DMA from memory. Raises: MmError: EFAULT when it is not mapped (any more)."""
        return (await self._access(Command.DMA_READ, iova, count, b""))[ACCESS.size :]

    async def write(self, iova: int, data: bytes) -> None:
        """DMA to memory. Raises: as read."""
        await self._access(Command.DMA_WRITE, iova, len(data), data)

    async def wait_mapped(self, iova: int, count: int) -> None:
        """Wait until it may be reached. There are no faults in this model: one asks again, or waits."""
        async with self.mapped:
            await self.mapped.wait_for(lambda: any(region.has(iova, count) for region in self.regions.values()))

    async def _access(self, command: Command, iova: int, count: int, data: bytes) -> bytes:
        region = next((one for one in self.regions.values() if one.has(iova, count)), None)
        if region is None or self._channel is None:
            raise MmError("EFAULT", f"[{iova:#x}, +{count}) is not mapped for DMA")
        region.in_flight += 1
        region.idle.clear()
        try:
            return await self._channel.command(command, ACCESS.pack(iova, count) + data)
        finally:
            region.in_flight -= 1
            if not region.in_flight:
                region.idle.set()

    async def _version(self, payload: bytes) -> bytes:
        return payload

    async def _map(self, payload: bytes) -> bytes:
        *_, iova, size = MAP.unpack(payload)
        async with self.mapped:
            self.regions[iova] = Window(iova, size)
            self.mapped.notify_all()
        return b""

    async def _unmap(self, payload: bytes) -> bytes:
        """No new access from here on; those that are under way are let end before the reply is given."""
        region = self.regions.pop(UNMAP.unpack(payload)[2], None)
        if region is None:
            raise MmError("ENOENT", "no such region")
        if region.in_flight:
            await region.idle.wait()
        return payload
