"""A broken variant of each driver: one classic mistake each, of those that the kernel's own users have made.

Each class says what it does wrong. What they share is that they look right: all of them pass a test that changes
nothing while they look. `test_broken` shows how each is found out, and that the report names the operation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from mmu.v1 import device_pb2
from mmubus.device import Translations, translations_of
from mmubus.drivers.dma import Entry, entries_of
from mmubus.drivers.gru import Context
from mmubus.drivers.hmm import Dmirror
from mmubus.drivers.kvm import MemorySlot, Vm
from mmubus.drivers.rdma import OnDemandRegion, RegistrationCache
from mmubus.drivers.sva import Pasid
from mmubus.drivers.vfio_user import Vmm
from mmubus.drivers.vfio_user.vmm import Region
from mmubus.drivers.xpmem import Exporter
from mmubus.drivers.xpmem.segment import Segment
from mmubus.linux import PAGE_SIZE
from mmubus.notifier import Answer, NotifierRange, Reason
from mmubus.registration import Registration


class Slow:
    """A device that takes its time between being granted a page and putting it into its table.

    Attributes: granted: set when a grant has come; go: put it in when this is set.
    """

    def __init__(self) -> None:
        self.granted, self.go = asyncio.Event(), asyncio.Event()

    async def fault(self, registration: Registration, start: int, end: int, write: bool) -> Translations:
        """A fault without the library's check of what has overtaken it: what raw hardware does."""
        request = device_pb2.FaultRequest(registration=registration.id, start=start, end=end, write=write)
        response = (await registration._bus.access.ask(device_pb2.AccessRequest(fault=request))).fault
        self.granted.set()
        await self.go.wait()
        return translations_of(response.translations, response.as_of_seq)


class SamplesTheSequenceLate(Vm):
    """KVM: the sequence is sampled after the lookup, so what ended during it is not noticed (easy mistake 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Slow()

    async def _fault(self, slot: MemorySlot, gfn: int, write: bool) -> None:
        assert self.registration is not None
        hva = slot.hva_of(gfn)
        translations = await self.slow.fault(self.registration, hva, hva + PAGE_SIZE, write)
        seq = self.seq
        if not self._must_retry(seq, hva):
            self._map(slot, gfn, entries_of(translations), write)


class FlagInsteadOfCounter(Context):
    """GRU: a flag instead of a count, so the end of one range opens what another still covers (easy mistake 5)."""

    slow: Slow

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        self.range_active = 1
        return self.flush(range.start, range.end)

    def invalidate_range_end(self, range: NotifierRange) -> Answer:
        self.range_active = 0
        self._ended.set()
        return None

    async def _fault(self, start: int, end: int, write: bool) -> None:
        assert self.registration is not None
        translations = await self.slow.fault(self.registration, start, end, write)
        while self.range_active:
            self._ended.clear()
            await self._ended.wait()
        self._gru.dropin(self.mm, entries_of(translations))


class AcknowledgesBeforeTheImporters(Exporter):
    """XPMEM: the notice is acknowledged at once, and the importers let go when they come to it (easy mistake 2)."""

    async def _recall(self, segment: Segment, entries: dict[int, Entry], must: bool) -> bool:
        return False


class ForgetsDirty(OnDemandRegion):
    """On-demand paging: what was written is not handed over before the page goes (easy mistake 19)."""

    def _zap(self, start: int, end: int) -> list[int] | None:
        super()._zap(start, end)
        return None


class HandsDirtyOverTwice(OnDemandRegion):
    """On-demand paging: what was written once is told at every notice, also for pages that others have by now (19)."""

    def _zap(self, start: int, end: int) -> list[int] | None:
        written = set(self._written)
        super()._zap(start, end)
        self._written = written
        return [vpn * PAGE_SIZE for vpn in written] or None


class HitsOnTheSameAddress(RegistrationCache):
    """Registration cache: drops on munmap, and believes that everything else leaves the frames where they are."""

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        return super().invalidate_range_start(range) if range.reason is Reason.UNMAP else None


class IgnoresProtection(Dmirror):
    """HMM: drops what is unmapped, keeps what is only write-protected; fork is such a case (easy mistakes 7 and 32)."""

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        if range.reason in (Reason.PROTECTION_VMA, Reason.PROTECTION_PAGE):
            return None
        return super().invalidate_range_start(range)


class IgnoresTheOldPlace(Dmirror):
    """HMM: a page that mremap moves keeps its frame, so why drop it? Because the address does not (easy mistake 8)."""

    moves = False

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        return None if self.moves else super().invalidate_range_start(range)


class LacksAnOp(Pasid):
    """SVA: flushes single pages and not ranges; a NULL op is skipped in silence."""

    invalidate_range = Pasid.__mro__[1].invalidate_range  # type: ignore[attr-defined]  # not overridden: not registered

    def invalidate_page(self, mm: int, address: int) -> Answer:
        self.iotlb.pop(address // PAGE_SIZE, None)
        return None

    def invalidated_everything(self, why: str) -> Answer:
        self.iotlb.clear()
        return None


class DoesNotWaitForTheReply(Vmm):
    """vfio-user: DMA_UNMAP is sent and the notice acknowledged; but the reply is the guarantee, not the sending."""

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        super_take: Any = super()._take

        async def take(regions: Sequence[Region], start: int, end: int) -> None:
            self.sent = asyncio.ensure_future(super_take(regions, start, end))

        self._take = take  # type: ignore[method-assign,assignment]
        return super().invalidate_range_start(range)
