"""The VMM: a notifier on the program's side, a vfio-user client on the device's."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from dataclasses import dataclass

from mmubus.device import RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.drivers.dma import Entry, afterwards, alive, entries_of, pages_of
from mmubus.drivers.vfio_user.channel import ACCESS, DMA_BYTES_MAX, MAP, UNMAP, Channel, Command
from mmubus.errors import ConnectionLost, MmError, Refuse, RetriesExhausted, SessionError
from mmubus.linux import PAGE_SHIFT, TASK_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange

__all__ = ["Region", "Vmm"]

log = logging.getLogger("mmubus.drivers")


@dataclass(slots=True, eq=False)
class Region:
    """[address, address + size) of the program, at [iova, iova + size) of the device.

    Attributes: entries: what backs it, while the device may reach it. unmapping: the reply that is waited for.
    """

    iova: int
    size: int
    rights: int
    address: int
    entries: dict[int, Entry] | None = None
    unmapping: asyncio.Future[bytes] | None = None

    def has(self, iova: int, count: int) -> bool:
        """Whether an access is inside of it."""
        return self.iova <= iova and iova + count <= self.iova + self.size


class Vmm(Notifier):
    """The VMM: maps parts of a program's memory for a device. Register it on the program's address space.

    Args: maps_again: what a notice took is mapped again when it is over; else the region is given up.
    Attributes: regions: by device address. unmaps, remaps: that notices made necessary, so far.
    """

    slips = ("age_page",)  # what is mapped for a device is in use

    def __init__(self, *, maps_again: bool = True) -> None:
        self.regions: dict[int, Region] = {}
        self._maps_again = maps_again
        self.unmaps = self.remaps = 0
        self._channel: Channel | None = None
        self._mapping: set[asyncio.Task[None]] = set()
        self._written: set[int] = set()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        """The socket to the device; agrees on the version. Raises: ConnectionLost."""
        channel = Channel(reader, writer, {Command.DMA_READ: self._read, Command.DMA_WRITE: self._write})
        self._channel = channel
        capabilities = {"capabilities": {"max_data_xfer_size": DMA_BYTES_MAX}}
        await channel.command(Command.VERSION, struct.pack("<HH", 0, 1) + json.dumps(capabilities).encode() + b"\0")
        return channel

    async def dma_map(self, iova: int, address: int, size: int, *, write: bool = True) -> None:
        """Let the device reach [address, +size) at iova, for as long as the program has it. Raises: MmError."""
        region = Region(iova, size, RIGHT_READ | (RIGHT_WRITE if write else 0), address)
        self.regions[iova] = region
        await self._map(region)

    async def dma_unmap(self, iova: int) -> None:
        """The device does not reach it any more when this returns. Raises: ConnectionLost."""
        region = self.regions.pop(iova)
        await self._unmap(region)

    async def _map(self, region: Region) -> None:
        reply: list[asyncio.Future[bytes]] = []

        def commit(translations: Translations) -> None:
            """Into the table and onto the socket in one plain stretch: DMA_UNMAP can only come after it."""
            if self._channel is not None and self.regions.get(region.iova) is region and region.entries is None:
                region.entries = entries_of(translations)
                payload = MAP.pack(MAP.size, region.rights, 0, region.iova, region.size)
                reply.append(self._channel.command(Command.DMA_MAP, payload))

        end = region.address + region.size
        await alive(self).fault(region.address, end, bool(region.rights & RIGHT_WRITE), commit=commit)
        for one in reply:
            await one

    async def _unmap(self, region: Region) -> None:
        """The device is off the region when this returns; several may ask for it at once, and one command is sent."""
        if region.entries is None or self._channel is None:
            return
        try:
            if region.unmapping is None:
                payload = UNMAP.pack(UNMAP.size, 0, region.iova, region.size)
                region.unmapping = self._channel.command(Command.DMA_UNMAP, payload)
            reply = region.unmapping
            await asyncio.shield(reply)
        except ConnectionLost:
            region.entries = None  # a device without a socket reaches nothing
        else:
            if region.unmapping is reply:  # and not mapped again already
                region.entries = region.unmapping = None

    # What the device asks.

    async def _read(self, payload: bytes) -> bytes:
        iova, count = ACCESS.unpack(payload)
        address, pfns, generations = self._frames(iova, count, RIGHT_READ)
        return payload + await alive(self).dma_read(address, count, pfns, generations)

    async def _write(self, payload: bytes) -> bytes:
        iova, count = ACCESS.unpack_from(payload)
        address, pfns, generations = self._frames(iova, count, RIGHT_WRITE)
        self._written.update(pages_of(address, count))
        await alive(self).dma_write(address, payload[ACCESS.size :], pfns, generations)
        return payload[: ACCESS.size]

    def _frames(self, iova: int, count: int, needed: int) -> tuple[int, list[int], list[int]]:
        for region in self.regions.values():
            if region.has(iova, count) and region.entries is not None and region.rights & needed:
                address = region.address + iova - region.iova
                entries = [region.entries[vpn] for vpn in pages_of(address, count)]
                return address, [one.pfn for one in entries], [one.generation for one in entries]
        raise MmError("EFAULT", f"[{iova:#x}, +{count}) is not mapped for DMA")

    # What the bus tells.

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        hit = [one for one in self._overlapping(range.start, range.end) if one.entries is not None]
        if not hit:
            return self._hand_over(range.start, range.end)
        if not range.blockable:
            raise Refuse
        return self._take(hit, range.start, range.end)

    async def _take(self, regions: list[Region], start: int = 0, end: int = TASK_SIZE) -> list[int] | None:
        await asyncio.gather(*(self._unmap(region) for region in regions))
        self.unmaps += len(regions)
        if not self._maps_again:
            for region in regions:
                if self.regions.get(region.iova) is region:
                    del self.regions[region.iova]
        return self._hand_over(start, end)

    def _hand_over(self, start: int, end: int) -> list[int] | None:
        """What was written in [start, end), and nothing beside it: another notice that is being answered takes that."""
        taken = [vpn for vpn in self._written if start <= vpn << PAGE_SHIFT < end]
        self._written.difference_update(taken)
        return [vpn << PAGE_SHIFT for vpn in taken] or None

    def invalidate_range_end(self, range: NotifierRange) -> Answer:
        for region in self._overlapping(range.start, range.end):
            if region.entries is None:
                task = afterwards(self._map_again(region))
                self._mapping.add(task)
                task.add_done_callback(self._mapping.discard)
        return None

    async def _map_again(self, region: Region) -> None:
        while self.regions.get(region.iova) is region and region.entries is None:
            try:
                await self._map(region)
                self.remaps += 1
            except RetriesExhausted:
                continue  # its next end has come meanwhile, or will
            except MmError:  # the program does not have it any more
                if self.regions.get(region.iova) is region:
                    del self.regions[region.iova]
            except SessionError as error:
                log.info("region %#x stays unmapped: %s", region.iova, error)
                return

    def release(self, mm: int) -> Answer:
        return self._take([region for region in self.regions.values() if region.entries is not None])

    def invalidated_everything(self, why: str) -> Answer:
        return self._take([region for region in self.regions.values() if region.entries is not None])

    def _overlapping(self, start: int, end: int) -> list[Region]:
        return [one for one in self.regions.values() if start < one.address + one.size and one.address < end]
