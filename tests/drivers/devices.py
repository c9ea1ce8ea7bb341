"""The devices of the soak: each driver behind the same two questions, read a record and write one."""

from __future__ import annotations

import asyncio
import socket
import time
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from random import Random

import mmubus
from drivers.cells import UNMAPPED, Value
from drivers.program import ANON_PAGES, BASE, FILE_AT, FILE_PAGES, RECORD, STEADY_AT, STEADY_PAGES, Program
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

    Attributes: pins: it pins, which a missing right makes fail with EFAULT; exports: it exports frames, which the zero
        page has to be replaced for, and that takes the right to write.
    """

    pins = exports = False

    def __init__(self, program: Program, random: Random) -> None:
        self.program = program
        self.random = random
        self.name = type(self).__name__.lower()
        self.reads = self.writes = 0
        self.addresses = [*program.anon, *program.shared, *program.steady]

    @classmethod
    @abstractmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> Device:
        """Make one."""

    @abstractmethod
    async def read(self, address: int) -> bytes:
        """The record there. Raises: MmError."""

    @abstractmethod
    async def write(self, address: int, data: bytes) -> None:
        """Change the record there. Raises: MmError."""

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            address = self.random.choice(self.addresses)
            if self.random.random() < 0.5:
                await self._read(address)
            else:
                await self._write(address)
            await asyncio.sleep(self.random.random() * 0.004)

    async def _read(self, address: int) -> None:
        cell = self.program.cells[address]
        protected, protections = bool(cell.protected), cell.protections
        with cell.watched() as possible:
            try:
                got: Value = await self.read(address)
            except (MmError, RemoteAccessError) as error:
                if error.reason == "EPERM" and self.exports and (protected or cell.protections > protections):
                    return
                if error.reason != "EFAULT":
                    raise
                got = UNMAPPED
            except RetriesExhausted:
                return
            self.program.check(self.name, address, possible, got)
        self.reads += 1

    async def _write(self, address: int) -> None:
        data = self.program.record(self.name)
        cell = self.program.cells[address]
        protected, protections = bool(cell.protected), cell.protections
        with cell.watched() as possible, self.program.changing([address], data) as done:
            try:
                await self.write(address, data)
                self.writes += 1
            except (MmError, RemoteAccessError) as error:
                done[0] = False
                protected |= cell.protections > protections
                expected = error.reason == "EFAULT" and (UNMAPPED in possible or (protected and self.pins))
                if not expected and not (error.reason == "EPERM" and protected):
                    self.program.outcome.wrong.append(f"{self.name} could not write {address:#x}: {error}")
            except RetriesExhausted:
                done[0] = False


class Guest(Device):
    """KVM: guest physical addresses, two slots."""

    GPA = 0x8000_0000

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> Guest:
        self = cls(program, random)
        self.vm = kvm.Vm()
        await bus.register(self.vm, program.mm)
        slots = ((BASE, ANON_PAGES), (FILE_AT, FILE_PAGES), (STEADY_AT, STEADY_PAGES))
        for number, (hva, pages) in enumerate(slots):
            await self.vm.set_memory_slot(
                kvm.MemorySlot(number, cls.GPA + hva - BASE, hva, pages, log_dirty=not number)
            )
        return self

    async def read(self, address: int) -> bytes:
        return await self.vm.load(self.GPA + address - BASE, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.vm.store(self.GPA + address - BASE, data)
        if self.random.random() < 0.1:
            self.vm.dirty_log(0)


class Tlb(Device):
    """GRU, with a TLB that is smaller than the memory."""

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> Tlb:
        self = cls(program, random)
        self.context = await gru.Gru(bus, entries_max=16).get(program.mm)
        return self

    async def read(self, address: int) -> bytes:
        return await self.context.load(address, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.context.store(address, data)


class HmmDevice(Device):
    """dmirror: whole pages."""

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> HmmDevice:
        self = cls(program, random)
        self.mirror = hmm.Dmirror()
        await bus.register(self.mirror, program.mm)
        return self

    async def read(self, address: int) -> bytes:
        return (await self.mirror.read(address, 1)).data[:RECORD]

    async def write(self, address: int, data: bytes) -> None:
        await self.mirror.write(address, data.ljust(PAGE_SIZE, b"\0"))


class Sva(Device):
    """A device behind an IOMMU that shares the page table."""

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> Sva:
        self = cls(program, random)
        self.pasid = await sva.Iommu(bus).bind(program.mm)
        return self

    async def read(self, address: int) -> bytes:
        return await self.pasid.read(address, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self.pasid.write(address, data)


class _Rdma(Device):
    """A peer with memory of its own, that reads and writes the program's by its keys."""

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> _Rdma:
        self = cls(program, random)
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
        return self

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
    """All of the anonymous memory and the file, on demand."""

    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        length = STEADY_AT + STEADY_PAGES * PAGE_SIZE - BASE
        return await OnDemandRegion.register(bus, program.mm, BASE, length, REMOTE)


class Cached(_Rdma):
    """The anonymous memory, through a cache that is too small for it."""

    pins = True

    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        cache = await RegistrationCache.open(bus, program.mm, regions_max=6)
        return CachedRegion(cache, BASE, ANON_PAGES * PAGE_SIZE, REMOTE)


class Pinned(_Rdma):
    """Memory that is never unmapped, pinned: forks copy it for the child."""

    async def register(self, bus: mmubus.Bus, domain: ProtectionDomain, program: Program) -> MemoryRegion:
        return await domain.pin(STEADY_AT, STEADY_PAGES * PAGE_SIZE, REMOTE)


class VfioUser(Device):
    """A device that is told by DMA_MAP: it can only reach what is mapped at the moment."""

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> VfioUser:
        self = cls(program, random)
        ours, theirs = socket.socketpair()
        self.device, self.vmm = vfio_user.Device(), vfio_user.Vmm()
        stack.push_async_callback(self.device.connect(*await asyncio.open_connection(sock=theirs)).close)
        await bus.register(self.vmm, program.mm)
        stack.push_async_callback((await self.vmm.connect(*await asyncio.open_connection(sock=ours))).close)
        self.addresses = [*program.anon[:8], *program.shared[:4]]
        return self

    async def read(self, address: int) -> bytes:
        await self._map(address)
        return await self.device.read(address, RECORD)

    async def write(self, address: int, data: bytes) -> None:
        await self._map(address)
        await self.device.write(address, data)

    async def _map(self, address: int) -> None:
        if address not in self.vmm.regions:
            await self.vmm.dma_map(address, address, PAGE_SIZE)

    async def _read(self, address: int) -> None:
        """A page that is not mapped at the moment is no statement about the program's memory."""
        with self.program.cells[address].watched() as possible:
            try:
                got = await self.read(address)
            except (MmError, RetriesExhausted):
                return
            self.program.check(self.name, address, possible, got)
        self.reads += 1

    async def _write(self, address: int) -> None:
        data = self.program.record(self.name)
        with self.program.changing([address], data) as done:
            try:
                await self.write(address, data)
                self.writes += 1
            except (MmError, RetriesExhausted):
                done[0] = False


class Importing(Device):
    """An importer of another process's memory, by ranges or by frames."""

    def __init__(self, program: Program, random: Random, by: str) -> None:
        super().__init__(program, random)
        self.name = f"importer by {by}"
        self.exports = by == "rmap"
        self.attachments: list[tuple[int, int, Attachment]] = []

    @classmethod
    async def attach(cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random) -> Importing:
        raise NotImplementedError("see attach_all")

    @classmethod
    async def attach_all(
        cls, stack: AsyncExitStack, bus: mmubus.Bus, program: Program, random: Random
    ) -> list[Importing]:
        """Two importers for each way to hear of what is taken away."""
        exporter = Exporter(bus, recall_s=5.0)
        stack.push_async_callback(exporter.close)
        address = await exporter.serve("127.0.0.1:0")
        importers = []
        for by in ("range", "rmap"):
            segments = [
                (BASE, ANON_PAGES, await exporter.make(program.mm, BASE, ANON_PAGES * PAGE_SIZE, by=by)),  # type: ignore[arg-type]
                (FILE_AT, FILE_PAGES, await exporter.make(program.mm, FILE_AT, FILE_PAGES * PAGE_SIZE, by=by)),  # type: ignore[arg-type]
            ]
            for _ in range(2):
                self = cls(program, Random(random.random()), by)
                self.addresses = [*program.anon, *program.shared]
                importer = await Importer.connect(address)
                stack.push_async_callback(importer.close)
                for start, pages, number in segments:
                    attached = await importer.attach(number)
                    self.attachments.append((start, start + pages * PAGE_SIZE, attached))
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
