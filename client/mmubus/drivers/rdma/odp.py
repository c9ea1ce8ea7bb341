"""On-demand paging: a region that holds nothing until it is used, and gives it up when it is asked to.

    transfer                                  invalidate_range_start of the region's interval
    walk the region's own page list
    missing: fault, and commit plainly        drop the pages of the range, say which were written
    through the entries
    refused: lost on the way, walk again      acknowledged: from here on the frames may be anybody's

The page list is changed in plain code only: that is the umem mutex of the kernel. A notice that must not wait is
refused, as the kernel does, since a NIC cannot promise to be off a page at once. Kernel:
drivers/infiniband/core/umem_odp.c, drivers/infiniband/hw/mlx5/odp.c, v6.12.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmubus.address_space import AddressSpace
from mmubus.connection import Bus
from mmubus.device import RIGHT_READ, RIGHT_WRITE
from mmubus.drivers.dma import RETRIES_MAX, Entry, Port, alive, entries_of, pages_of
from mmubus.drivers.rdma.mr import Access, MemoryRegion
from mmubus.errors import Refuse, RetriesExhausted
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange
from mmubus.window import FrameWindow

__all__ = ["OnDemandRegion"]


class OnDemandRegion(MemoryRegion, Notifier):
    """A region without pins. Made by `register`; then `ProtectionDomain.add` it.

    Attributes: pages: page number -> entry. faults, invalidations: so far.
    """

    slips = ("age_page", "invalidate_range_end")  # no accessed bits; the server holds faults off until the end

    def __init__(self, address: int, length: int, access: Access, window: FrameWindow | None = None) -> None:
        super().__init__(address, length, access)
        self.pages: dict[int, Entry] = {}
        self.faults = self.invalidations = 0
        self._written: set[int] = set()
        self._port = Port(window)

    @classmethod
    async def register(
        cls,
        bus: Bus,
        mm: AddressSpace | int,
        address: int,
        length: int,
        access: Access = Access.LOCAL_WRITE,
        window: FrameWindow | None = None,
    ) -> OnDemandRegion:
        """Nothing is faulted in. Kernel: ib_umem_odp_get(). Raises: MmError, ConnectionLost."""
        self = cls(address, length, access, window)
        start, end = address & -PAGE_SIZE, -(-(address + length) // PAGE_SIZE) * PAGE_SIZE
        await bus.register(self, mm, start=start, end=end, name="odp")
        return self

    async def read(self, address: int, length: int) -> bytes:
        return await self._port.read(self, self._walk, address, length)

    async def write(self, address: int, data: bytes) -> None:
        await self._port.write(self, self._walk, address, data)

    async def prefetch(self, address: int, length: int, write: bool = False) -> None:
        """Fault pages in that will be used soon. Kernel: IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH. Raises: MmError."""
        self.check(address, length, Access.LOCAL_WRITE if write else Access.LOCAL_READ)
        await self._walk(address, length, write)

    async def deregister(self) -> None:
        if self.registration is not None:
            await self.registration.unregister()
        self._zap(0, TASK_SIZE)

    async def _walk(self, address: int, length: int, write: bool) -> Sequence[Entry]:
        needed = RIGHT_WRITE if write else RIGHT_READ
        pages = pages_of(address, length)
        for _ in range(RETRIES_MAX):
            found = [self.pages.get(vpn) for vpn in pages]
            entries = [entry for entry in found if entry is not None and entry.rights & needed]
            if len(entries) == len(pages):
                if write:  # before the bytes are there: what is called dirty and is not costs nothing
                    self._written.update(pages)
                return entries
            self.faults += 1
            start, end = pages.start << PAGE_SHIFT, pages.stop << PAGE_SHIFT
            await alive(self).fault(start, end, write, commit=lambda got: self.pages.update(entries_of(got)))
        raise RetriesExhausted(f"[{address:#x}, +{length}) was invalidated {RETRIES_MAX} times in a row")

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        if not range.blockable:
            raise Refuse
        self.invalidations += 1
        return self._zap(range.start, range.end)

    def release(self, mm: int) -> Answer:
        return self._zap(0, TASK_SIZE)

    def invalidated_everything(self, why: str) -> Answer:
        return self._zap(0, TASK_SIZE)

    def _zap(self, start: int, end: int) -> list[int] | None:
        """Drop [start, end), wider than the region or not. Returns: the addresses of the pages that were written."""
        low = max(start, self.address) >> PAGE_SHIFT
        high = min(end, self.address + self.length) + PAGE_SIZE - 1 >> PAGE_SHIFT
        zapped = range(low, high)
        for vpn in [vpn for vpn in self.pages if vpn in zapped] if len(zapped) > len(self.pages) else zapped:
            self.pages.pop(vpn, None)
        written = [vpn for vpn in self._written if low <= vpn < high]
        self._written.difference_update(written)
        return [vpn << PAGE_SHIFT for vpn in sorted(written)] or None
