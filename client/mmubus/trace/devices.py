"""The devices of a replay: drivers of the library, each behind the same few questions.

A replay asks a device to follow an address space, to get pages that are present, and to read one by DMA. What each does
for that is its driver's business: a guest loads, a peer reads across the wire, an importer asks its exporter.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import ClassVar, Generic, TypeVar

from mmubus.connection import Bus
from mmubus.drivers import vfio_user
from mmubus.drivers.gru import Context, Gru
from mmubus.drivers.hmm import Dmirror
from mmubus.drivers.kvm import MemorySlot, Vm
from mmubus.drivers.rdma import Access, BufferRegion, OnDemandRegion, ProtectionDomain, QueuePair, QueuePairs
from mmubus.drivers.sva import Iommu, Pasid
from mmubus.drivers.xpmem import Attachment, Exporter, Importer
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubus.mirror import Mirror, Style
from mmubus.trace.contents import PATTERN_BYTES
from mmubus.trace.rmap_device import Frames
from mmubus.window import FrameWindow

__all__ = ["DEVICES", "Device", "device_of"]

LOCAL = "127.0.0.1:0"
TLB_ENTRIES_MAX = 512
T = TypeVar("T")


class Device:
    """One device, on a connection of its own. what: it is, for people. Subclasses override what they need."""

    what: ClassVar[str]

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.stack = AsyncExitStack()

    async def open(self) -> None:
        """Make what it has beside the connection."""

    async def close(self) -> None:
        """End what it has beside the connection."""
        await self.stack.aclose()

    async def attach(self, mm: int) -> None:
        """Follow an address space from now on."""
        raise NotImplementedError

    async def fault(self, mm: int, start: int, end: int) -> None:
        """Get translations of pages that are present, if it can do so for many at once. Raises: MmuBusError."""

    async def read(self, mm: int, address: int) -> bytes:
        """The first PATTERN_BYTES of a page, by DMA. Raises: MmuBusError."""
        raise NotImplementedError


class PerSpace(Device, Generic[T]):
    """A device with something for each address space."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self.of: dict[int, T] = {}

    async def attach(self, mm: int) -> None:
        self.of[mm] = await self.make(mm)

    async def make(self, mm: int) -> T:
        """What it has for one."""
        raise NotImplementedError


class Mirrors(PerSpace[Mirror]):
    """Whole address spaces, with the seed's ops, through the server."""

    what = "a mirror, the seed's ops"
    style: ClassVar[Style] = "seed"
    window: FrameWindow | None = None

    async def make(self, mm: int) -> Mirror:
        mirror = Mirror(style=self.style, window=self.window)
        await self.bus.register(mirror, mm, name=self.bus.name)
        return mirror

    async def fault(self, mm: int, start: int, end: int) -> None:
        await self.of[mm].fault(start, end)

    async def read(self, mm: int, address: int) -> bytes:
        return await self.of[mm].read(address, PATTERN_BYTES)


class Ranges(Mirrors):
    """With mainline's start and end, through the frames' window where there is one: nobody checks such an access."""

    what = "a mirror, start and end"
    style = "mainline"

    async def make(self, mm: int) -> Mirror:
        if not self.of:
            await self._open_window(mm)
        return await super().make(mm)

    async def _open_window(self, mm: int) -> None:
        """The server tells where its frames are when a session begins: with the first registration."""
        first = await self.bus.register(Mirror(style=self.style), mm)
        try:
            self.window = self.bus.frame_window()
        except OSError:
            self.window = None  # another machine, or not offered: through the server, then
        finally:
            await first.unregister()


class Rmap(Device):
    """Exported frames, told of by frame through the global rmap list."""

    what = "exported frames"

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self._frames = Frames()

    async def attach(self, mm: int) -> None:
        if self._frames.registration is None:
            await self.bus.register_rmap(self._frames, name=self.bus.name)

    async def fault(self, mm: int, start: int, end: int) -> None:
        await self._frames.export(mm, start, end)

    async def read(self, mm: int, address: int) -> bytes:
        return await self._frames.read(mm, address, PATTERN_BYTES)


class Guest(PerSpace[Vm]):
    """A virtual machine whose memory is all that the program has."""

    what = "a guest's shadow page table"

    async def make(self, mm: int) -> Vm:
        vm = Vm()
        await self.bus.register(vm, mm, name="kvm")
        await vm.set_memory_slot(MemorySlot(0, 0, 0, TASK_SIZE >> PAGE_SHIFT))
        return vm

    async def read(self, mm: int, address: int) -> bytes:
        return await self.of[mm].load(address, PATTERN_BYTES)


class Accelerator(PerSpace[Context]):
    """A TLB that all address spaces share."""

    what = "an accelerator's TLB"

    async def open(self) -> None:
        self._gru = Gru(self.bus, entries_max=TLB_ENTRIES_MAX)

    async def make(self, mm: int) -> Context:
        return await self._gru.get(mm)

    async def read(self, mm: int, address: int) -> bytes:
        return await self.of[mm].load(address, PATTERN_BYTES)


class Import(PerSpace[Attachment]):
    """An importer on the other side of a socket, which knows nothing of the bus."""

    what = "memory lent to a process"

    async def open(self) -> None:
        self._exporter = Exporter(self.bus)
        self.stack.push_async_callback(self._exporter.close)
        self._importer = await Importer.connect(await self._exporter.serve(LOCAL))
        self.stack.push_async_callback(self._importer.close)

    async def make(self, mm: int) -> Attachment:
        return await self._importer.attach(await self._exporter.make(mm, 0, TASK_SIZE))

    async def read(self, mm: int, address: int) -> bytes:
        return await self.of[mm].read(address, PATTERN_BYTES)


class Peer(PerSpace[OnDemandRegion]):
    """A peer on the other side of a socket, that reads by RDMA what is paged in on demand."""

    what = "RDMA, paging on demand"

    async def open(self) -> None:
        self._domain = ProtectionDomain(self.bus, 0)
        pairs = await QueuePairs.listen(self._domain, LOCAL)
        self.stack.push_async_callback(pairs.close)
        self._pair = await QueuePair.connect(ProtectionDomain(self.bus, 0), pairs.address)
        self.stack.push_async_callback(self._pair.close)

    async def make(self, mm: int) -> OnDemandRegion:
        region = await OnDemandRegion.register(self.bus, mm, 0, TASK_SIZE, Access.REMOTE_READ)
        self._domain.add(region)
        return region

    async def fault(self, mm: int, start: int, end: int) -> None:
        await self.of[mm].prefetch(start, end - start)

    async def read(self, mm: int, address: int) -> bytes:
        near = BufferRegion(PATTERN_BYTES)
        await self._pair.rdma_read(near, 0, PATTERN_BYTES, self.of[mm].key, address)
        return bytes(near.buffer)


class Gpu(PerSpace[Dmirror]):
    """A device with a page table of its own, which copies whole pages."""

    what = "a GPU that mirrors"

    async def make(self, mm: int) -> Dmirror:
        device = Dmirror()
        await self.bus.register(device, mm, name="hmm")
        return device

    async def read(self, mm: int, address: int) -> bytes:
        return (await self.of[mm].read(address, 1)).data[:PATTERN_BYTES]


class Shared(PerSpace[Pasid]):
    """A device behind an IOMMU that walks the program's own page table."""

    what = "an IOMMU's cache (SVA)"

    async def open(self) -> None:
        self._iommu = Iommu(self.bus)

    async def make(self, mm: int) -> Pasid:
        return await self._iommu.bind(mm)

    async def read(self, mm: int, address: int) -> bytes:
        return await self.of[mm].read(address, PATTERN_BYTES)


class Emulated(PerSpace[tuple[vfio_user.Vmm, vfio_user.Device]]):
    """A device in another process, told by DMA_MAP: what it is to read is mapped for it, and not again when it goes."""

    what = "a device told by DMA_MAP"

    async def make(self, mm: int) -> tuple[vfio_user.Vmm, vfio_user.Device]:
        ours, theirs = socket.socketpair()
        vmm, device = vfio_user.Vmm(maps_again=False), vfio_user.Device()
        self.stack.push_async_callback(device.connect(*await asyncio.open_connection(sock=theirs)).close)
        await self.bus.register(vmm, mm, name="vfio-user")
        self.stack.push_async_callback((await vmm.connect(*await asyncio.open_connection(sock=ours))).close)
        return vmm, device

    async def fault(self, mm: int, start: int, end: int) -> None:
        """Map what of it is not mapped, in as few regions as may be."""
        vmm, _ = self.of[mm]
        low = start
        for at in range(start, end + PAGE_SIZE, PAGE_SIZE):
            if at == end or any(region.has(at, 1) for region in vmm.regions.values()):
                if low < at:
                    await vmm.dma_map(low, low, at - low, write=False)
                low = at + PAGE_SIZE

    async def read(self, mm: int, address: int) -> bytes:
        vmm, device = self.of[mm]
        if not any(region.has(address, 1) for region in vmm.regions.values()):
            await vmm.dma_map(address, address, PAGE_SIZE, write=False)
        return await device.read(address, PATTERN_BYTES)


DEVICES: dict[str, type[Device]] = {
    "mirror": Mirrors,
    "range": Ranges,
    "rmap": Rmap,
    "kvm": Guest,
    "gru": Accelerator,
    "xpmem": Import,
    "rdma": Peer,
    "hmm": Gpu,
    "sva": Shared,
    "vfio_user": Emulated,
}


async def device_of(kind: str, bus: Bus) -> Device:
    """A device of a kind, ready to be asked."""
    device = DEVICES[kind](bus)
    await device.open()
    return device
