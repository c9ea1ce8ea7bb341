"""The devices of the soak: each driver behind the same two questions, read a record and write one."""

from __future__ import annotations

import asyncio
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import ClassVar, Literal

import mmubus
from drivers.cells import UNMAPPED, Value
from drivers.program import (
    ANON_PAGES,
    BASE,
    HUGE_AT,
    HUGE_PAGES,
    MAPPINGS,
    RECORD,
    STEADY_AT,
    STEADY_PAGES,
    Program,
)
from mmubus import PAGE_SIZE, MmError, RetriesExhausted
from mmubus.drivers import gru, hmm, kvm, sva, vfio_user
from mmubus.drivers.rdma import (
    Access,
    CachedRegion,
    MemoryRegion,
    OnDemandRegion,
    ProtectionDomain,
    QueuePair,
    QueuePairs,
    RegistrationCache,
    RemoteAccessError,
)
from mmubus.drivers.xpmem import Attachment, Exporter, Importer

REMOTE = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE


class Device(ABC):
    """One driver on one program.

    Attributes: name: the driver's, and its session's. pins: a missing right makes it fail with EFAULT. acts: what it
        does in turn with an address. retries: accesses so far that it gave up, since they were overtaken each time.
    """

    name: ClassVar[str]
    pins = False

    def __init__(self, bus: mmubus.Bus, program: Program, random: Random) -> None:
        self.bus = bus
        self.program = program
        self.random = Random(random.random())
        self.row = program.outcome.row(self.name)
        self.retries = 0
        self.addresses = list(program.cells)
        self.acts: list[Callable[[int], Awaitable[None]]] = [self.reads, self.writes]

    @classmethod
    @abstractmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> Sequence[Device]:
        """Make one, or several that share a session."""

    @abstractmethod
    async def read(self, address: int) -> bytes:
        """The record there. Raises: MmError."""

    @abstractmethod
    async def write(self, address: int, data: bytes) -> None:
        """Change the record there. Raises: MmError."""

    @property
    def pinned(self) -> int:
        """Pages that it has pinned."""
        return 0

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            await self.random.choice(self.acts)(self.random.choice(self.addresses))
            await asyncio.sleep(self.random.random() * 0.004)

    async def reads(self, address: int) -> None:
        """Read, and hold what came against what may be there."""
        with self.program.cells[address].watched() as possible:
            try:
                got: Value = await self.read(address)
            except (MmError, RemoteAccessError) as error:
                self.row.refused += 1
                if error.reason != "EFAULT":
                    self.program.outcome.wrong.append(f"{self.name} could not read {address:#x}: {error}")
                    return
                got = UNMAPPED
            except RetriesExhausted:
                self.retries += 1
                return
            self.program.check(self.name, address, possible, got)
        self.row.reads += 1

    async def writes(self, address: int) -> None:
        """Write what nobody has written yet."""
        data = self.program.record(self.name)
        cell = self.program.cells[address]
        protected, protections = bool(cell.protected), cell.protections
        with cell.watched() as possible, self.program.changing([address], data) as done:
            try:
                await self.write(address, data)
                self.row.writes += 1
            except (MmError, RemoteAccessError) as error:
                done[0] = False
                self.row.refused += 1
                protected |= cell.protections > protections
                expected = error.reason == "EFAULT" and (UNMAPPED in possible or (protected and self.pins))
                if not expected and not (error.reason == "EPERM" and protected):
                    self.program.outcome.wrong.append(f"{self.name} could not write {address:#x}: {error}")
            except RetriesExhausted:
                done[0] = False
                self.retries += 1


class Guest(Device):
    """Guest physical addresses, a slot for each of the program's mappings."""

    name = "kvm"
    GPA = 0x8000_0000

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[Guest]:
        self = cls(bus, program, random)
        self.vm = kvm.Vm()
        await bus.register(self.vm, program.mm)
        for number, (hva, pages) in enumerate(MAPPINGS):
            await self.vm.set_memory_slot(
                kvm.MemorySlot(number, cls.GPA + hva - BASE, hva, pages, log_dirty=not number)
            )
        return [self]

    async def read(self, address: int) -> bytes:
        return await self.vm.load(self.GPA + address - BASE, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.vm.store(self.GPA + address - BASE, data)
        if self.random.random() < 0.1:
            self.vm.dirty_log(0)


class Tlb(Device):
    """A TLB that is smaller than the memory."""

    name = "gru"

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[Tlb]:
        self = cls(bus, program, random)
        self.context = await gru.Gru(bus, entries_max=16).get(program.mm)
        return [self]

    async def read(self, address: int) -> bytes:
        return await self.context.load(address, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.context.store(address, data)


class HmmDevice(Device):
    """dmirror: whole pages, which move to the device's own memory and back, or are had exclusively."""

    name = "hmm"

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[HmmDevice]:
        self = cls(bus, program, random)
        self.mirror = hmm.Dmirror()
        await bus.register(self.mirror, program.mm)
        self.acts = [self.reads, self.writes, self.reads, self.writes, self.to_device, self.to_system, self.exclusive]
        return [self]

    async def to_device(self, address: int) -> None:
        """The page into the device's memory, and read there."""
        await self._moved("to device", self.mirror.migrate_to_dev, address)

    async def exclusive(self, address: int) -> None:
        """The page for the device alone, and read."""
        await self._moved("exclusive", self.mirror.exclusive, address)

    async def to_system(self, address: int) -> None:
        """The page and its neighbours back into memory that everyone reaches."""
        try:
            await self.mirror.migrate_to_sys(address, 4)
        except MmError as error:
            self._refused("to system", address, error)
        self.program.outcome.acts["to system"] += 1

    async def _moved(self, what: str, command: Callable[[int, int], Awaitable[hmm.Copied]], address: int) -> None:
        with self.program.cells[address].watched() as possible:
            try:
                copied = await command(address, 1)
            except MmError as error:  # unmapped, a file's, or taken again before it could be read
                self._refused(what, address, error)
                return
            except RetriesExhausted:
                self.retries += 1
                return
            self.program.check(self.name, address, possible, copied.data[:RECORD])
        self.program.outcome.acts[what] += 1
        self.row.moves += 1

    def _refused(self, what: str, address: int, error: MmError) -> None:
        self.row.refused += 1
        if error.reason not in ("EINVAL", "ENOENT", "EFAULT", "EPERM"):
            self.program.outcome.wrong.append(f"{self.name}: {what} of {address:#x}: {error}")

    async def read(self, address: int) -> bytes:
        return (await self.mirror.read(address, 1)).data[:RECORD]

    async def write(self, address: int, data: bytes) -> None:
        await self.mirror.write(address, data.ljust(PAGE_SIZE, b"\0"))


class Sva(Device):
    """A device behind an IOMMU that shares the page table."""

    name = "sva"

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[Sva]:
        self = cls(bus, program, random)
        self.pasid = await sva.Iommu(bus).bind(program.mm)
        return [self]

    async def read(self, address: int) -> bytes:
        return await self.pasid.read(address, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.pasid.write(address, data)


class _Rdma(Device):
    """A peer with memory of its own, that reads and writes the program's by its keys."""

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[_Rdma]:
        self = cls(bus, program, random)
        domain = await ProtectionDomain.open(bus, program.mm)
        self.region = await self.register(bus, domain, program)
        if self.region.key == 0:
            domain.add(self.region)
        low, high = self.region.address, self.region.address + self.region.length
        self.addresses = [address for address in self.addresses if low <= address < high]
        peer = await bus.create_mm("peer")
        self.peer = peer
        self.buffer = await peer.mmap(0, PAGE_SIZE)
        peer_domain = await ProtectionDomain.open(bus, peer)
        self.local = await peer_domain.pin(self.buffer, PAGE_SIZE)
        pairs = await QueuePairs.listen(domain, "127.0.0.1:0")
        stack.push_async_callback(pairs.close)
        self.pair = await QueuePair.connect(peer_domain, pairs.address)
        stack.push_async_callback(self.pair.close)
        return [self]

    @abstractmethod
    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        """The region on the program's side."""

    async def read(self, address: int) -> bytes:
        await self.pair.rdma_read(self.local, self.buffer, RECORD, self.region.key, address)
        return await self.local.read(self.buffer, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.local.write(self.buffer, data)
        await self.pair.rdma_write(self.local, self.buffer, RECORD, self.region.key, address)


class OnDemand(_Rdma):
    """All that the program has, on demand."""

    name = "rdma on demand"

    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        length = HUGE_AT + HUGE_PAGES * PAGE_SIZE - BASE
        return await OnDemandRegion.register(bus, program.mm, BASE, length, REMOTE)


class Cached(_Rdma):
    """The anonymous memory, through a cache that is too small for it."""

    name = "rdma cached"
    pins = True

    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        self.cache = await RegistrationCache.open(bus, program.mm, regions_max=6)
        return CachedRegion(self.cache, BASE, ANON_PAGES * PAGE_SIZE, REMOTE)

    @property
    def pinned(self) -> int:
        return self.cache.bytes // PAGE_SIZE


class Pinned(_Rdma):
    """Memory that is never unmapped, pinned: forks copy it for the child."""

    name = "rdma pinned"

    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        return await domain.pin(STEADY_AT, STEADY_PAGES * PAGE_SIZE, REMOTE)

    @property
    def pinned(self) -> int:
        return STEADY_PAGES


class VfioUser(Device):
    """A device that is told by DMA_MAP: it can only reach what is mapped at the moment."""

    name = "vfio-user"

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[VfioUser]:
        self = cls(bus, program, random)
        ours, theirs = socket.socketpair()
        self.device, self.vmm = vfio_user.Device(), vfio_user.Vmm()
        stack.push_async_callback(self.device.connect(*await asyncio.open_connection(sock=theirs)).close)
        await bus.register(self.vmm, program.mm)
        stack.push_async_callback((await self.vmm.connect(*await asyncio.open_connection(sock=ours))).close)
        self.addresses = [*program.anon[:8], *program.shared[:4], *program.huge[:3]]
        return [self]

    async def read(self, address: int) -> bytes:
        await self._map(address)
        return await self.device.read(address, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self._map(address)
        await self.device.write(address, data)

    async def _map(self, address: int) -> None:
        if address not in self.vmm.regions:
            await self.vmm.dma_map(address, address, PAGE_SIZE)

    async def reads(self, address: int) -> None:
        """A page that is not mapped at the moment is no statement about the program's memory."""
        with self.program.cells[address].watched() as possible:
            try:
                got = await self.read(address)
            except (MmError, RetriesExhausted):
                self.row.refused += 1
                return
            self.program.check(self.name, address, possible, got)
        self.row.reads += 1

    async def writes(self, address: int) -> None:
        """As reads."""
        data = self.program.record(self.name)
        with self.program.changing([address], data) as done:
            try:
                await self.write(address, data)
                self.row.writes += 1
            except (MmError, RetriesExhausted):
                done[0] = False
                self.row.refused += 1


class _Importing(Device):
    """Importers of another process's memory, two of one exporter."""

    by: ClassVar[Literal["rmap", "range"]]

    def __init__(self, bus: mmubus.Bus, program: Program, random: Random) -> None:
        super().__init__(bus, program, random)
        self.attachments: list[tuple[int, int, Attachment]] = []

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> list[_Importing]:
        exporter = Exporter(bus, recall_s=10.0)
        stack.push_async_callback(exporter.close)
        address = await exporter.serve("127.0.0.1:0")
        segments = [
            (at, pages, await exporter.make(program.mm, at, pages * PAGE_SIZE, by=cls.by)) for at, pages in MAPPINGS
        ]
        importers = []
        for _ in range(2):
            self = cls(bus, program, random)
            importer = await Importer.connect(address)
            stack.push_async_callback(importer.close)
            for start, pages, number in segments:
                self.attachments.append((start, start + pages * PAGE_SIZE, await importer.attach(number)))
            importers.append(self)
        return importers

    async def read(self, address: int) -> bytes:
        attachment, offset = self._at(address)
        return await attachment.read(offset, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        attachment, offset = self._at(address)
        await attachment.write(offset, data)

    def _at(self, address: int) -> tuple[Attachment, int]:
        return next((at, address - start) for start, end, at in self.attachments if start <= address < end)


class ByFrames(_Importing):
    """Told by frame, through the rmap list."""

    name = "xpmem by frames"
    by = "rmap"


class ByRanges(_Importing):
    """Told by address."""

    name = "xpmem by ranges"
    by = "range"


KINDS: tuple[type[Device], ...] = (
    Guest, Tlb, ByFrames, ByRanges, Pinned, OnDemand, Cached, HmmDevice, Sva, VfioUser
)  # fmt: skip
