"""An IOMMU that shares the CPU's page table: nothing is mirrored, a cache is flushed.

    device ──virtual address──► IOTLB ──miss──► the CPU's own page table ──not there──► page request to the CPU

There is no shadow to keep in order. What was cached of the table must go when the table changes, and that is all: one
op, never waiting, no start and no end, no ages (the walk sets the CPU's own bits). It is the kernel's
arch_invalidate_secondary_tlbs(), which is the seed's invalidate_range. When the address space ends, release blocks the
PASID: translations and page requests fail from then on. Kernel: drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-sva.c.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mmubus.address_space import AddressSpace
from mmubus.connection import Bus
from mmubus.device import RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.drivers.dma import RETRIES_MAX, Entry, Port, alive, entries_of, pages_of
from mmubus.errors import MmError, RetriesExhausted
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubus.notifier import Answer, Notifier
from mmubus.window import FrameWindow

__all__ = ["Iommu", "Pasid"]


class Iommu:
    """The address spaces that devices are bound to, each under a number of its own, its PASID.

    Args: bus: the connection that the notifiers are registered on. window: reach frames through it.
    """

    def __init__(self, bus: Bus, window: FrameWindow | None = None) -> None:
        self._bus = bus
        self._window = window
        self._by_mm: dict[int, Pasid] = {}
        self._binding = asyncio.Lock()

    async def bind(self, mm: AddressSpace | int) -> Pasid:
        """Let devices use an address space; all of them share one notifier. Kernel: iommu_sva_bind_device().

        Raises: MmError, ConnectionLost.
        """
        number = mm.__index__()
        async with self._binding:
            pasid = self._by_mm.get(number)
            if pasid is None or pasid.blocked:
                pasid = self._by_mm[number] = Pasid(number, self._window)
                await self._bus.register(pasid, number, name="sva")
            pasid.users += 1
            return pasid

    async def unbind(self, pasid: Pasid) -> None:
        """The last device takes the notifier off its list. Kernel: iommu_sva_unbind_device()."""
        async with self._binding:
            pasid.users -= 1
            if not pasid.users:
                pasid.block()
                self._by_mm.pop(pasid.mm, None)
                if pasid.registration is not None:
                    await pasid.registration.unregister()


class Pasid(Notifier):
    """One address space as devices see it. Made by `Iommu.bind`.

    Attributes:
        iotlb: page number -> entry.
        walks, page_requests, flushes: misses of the IOTLB; those of them that the CPU had to be asked to fault in;
            invalidations.
        blocked: the address space is gone.
    """

    slips = ("age_page",)  # the walk sets the CPU's own accessed bits

    def __init__(self, mm: int, window: FrameWindow | None = None) -> None:
        self.mm = mm
        self.users = 0
        self.iotlb: dict[int, Entry] = {}
        self.walks = self.page_requests = self.flushes = 0
        self.blocked = False
        self._port = Port(window)
        self._written: set[int] = set()

    async def read(self, address: int, length: int) -> bytes:
        """A device reads by the program's own addresses. Raises: MmError (EFAULT: the request was answered INVALID)."""
        return await self._port.read(self, self._translate, address, length)

    async def write(self, address: int, data: bytes) -> None:
        """A device writes by the program's own addresses. Raises: as read."""
        await self._port.write(self, self._translate, address, data)

    async def _translate(self, address: int, length: int, write: bool) -> Sequence[Entry]:
        needed = RIGHT_WRITE if write else RIGHT_READ
        pages = pages_of(address, length)
        for _ in range(RETRIES_MAX):
            if self.blocked:
                raise MmError("EFAULT", f"the address space of PASID {self.mm} has ended")
            found = [self.iotlb.get(vpn) for vpn in pages]
            entries = [entry for entry in found if entry is not None and entry.rights & needed]
            if len(entries) == len(pages):
                if write:
                    self._written.update(pages)
                return entries
            await self._walk(pages.start << PAGE_SHIFT, pages.stop << PAGE_SHIFT, write)
        raise RetriesExhausted(f"[{address:#x}, +{length}) was flushed {RETRIES_MAX} times in a row")

    async def _walk(self, start: int, end: int, write: bool) -> None:
        """Walk the CPU's page table; what is not there is requested, and becomes a fault of the program."""
        self.walks += 1
        registration = alive(self)
        needed = RIGHT_WRITE if write else RIGHT_READ
        if not (registration_rights := (await registration.snapshot(start, end)).rights & needed).all():
            self.page_requests += int((registration_rights == 0).sum())

        def fill(translations: Translations) -> None:
            if not self.blocked:
                self.iotlb.update(entries_of(translations))

        await registration.fault(start, end, write, commit=fill)

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Answer:
        self.flushes += 1
        pages = pages_of(start, end - start)
        if len(pages) < len(self.iotlb):
            for vpn in pages:
                self.iotlb.pop(vpn, None)
        else:
            self.iotlb = {vpn: entry for vpn, entry in self.iotlb.items() if vpn not in pages}
        written = [vpn for vpn in self._written if vpn in pages]
        self._written.difference_update(written)
        return [vpn << PAGE_SHIFT for vpn in written] or None

    def release(self, mm: int) -> Answer:
        return self.block()

    def block(self) -> list[int] | None:
        """No translation and no page request from now on. Returns: the addresses of the pages that were written."""
        self.blocked = True
        self.iotlb.clear()
        written, self._written = self._written, set()
        return [vpn * PAGE_SIZE for vpn in written] or None

    def invalidated_everything(self, why: str) -> Answer:
        return self.invalidate_range(self.mm, 0, TASK_SIZE, False)
