"""SGI's GRU: an accelerator with a TLB of its own and no reference on any page.

Nothing keeps a page in place but the notifier: when a start is acknowledged, no TLB entry of that range is left, and
none is put in before the matching end. Kernel: drivers/misc/sgi-gru/grutlbpurge.c and grufault.c, v6.12.

    range_active   how many invalidations of the address space are under way, a count: of two that overlap the end of
                   the first must not open what the second still takes away
    a fault        waits while it is above 0, then looks the page up and drops it into the TLB, plainly
    every end      lowers the count and wakes everyone who waits; they look again

The handlers never wait: they are plain functions, as the kernel's run under a spinlock and cannot sleep. One notifier
serves all contexts of an address space: the first `get` registers it, the last `put` takes it off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mmubus.address_space import AddressSpace
from mmubus.connection import Bus
from mmubus.device import RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.drivers.dma import RETRIES_MAX, Entry, Port, alive, entries_of, pages_of
from mmubus.errors import RetriesExhausted
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange
from mmubus.window import FrameWindow

__all__ = ["Context", "Gru"]

TLB_ENTRIES_MAX = 64


class Gru:
    """One device: a TLB that the contexts of all address spaces share, and a context for each address space.

    Args:
        bus: the connection that its notifiers are registered on.
        window: reach frames through it instead of through the server.
        entries_max: of the TLB, at least 2; the oldest goes first.
    """

    def __init__(self, bus: Bus, window: FrameWindow | None = None, entries_max: int = TLB_ENTRIES_MAX) -> None:
        self._bus = bus
        self.port = Port(window, (entries_max - 1) * PAGE_SIZE)  # an access must fit, also when it is not aligned
        self.entries_max = entries_max
        self.tlb: dict[tuple[int, int], Entry] = {}  # (address space, page number), oldest first
        self._contexts: dict[int, Context] = {}
        self._registering = asyncio.Lock()

    async def get(self, mm: AddressSpace | int) -> Context:
        """The context of an address space; one notifier, however many users. Kernel: mmu_notifier_get().

        Raises: MmError, ConnectionLost.
        """
        number = mm.__index__()
        async with self._registering:
            context = self._contexts.get(number)
            if context is None or not context.alive:
                context = Context(self, number)
                await self._bus.register(context, number, name="gru")
                self._contexts[number] = context
            context.users += 1
            return context

    async def put(self, context: Context) -> None:
        """Give a context back; the last one takes the notifier off its list. Kernel: mmu_notifier_put()."""
        async with self._registering:
            context.users -= 1
            if not context.users and context.registration is not None:
                context.flush(0, TASK_SIZE)
                self._contexts.pop(context.mm, None)
                await context.registration.unregister()

    def dropin(self, mm: int, entries: dict[int, Entry]) -> None:
        """Put translations into the TLB. Kernel: gru_try_dropin()."""
        for vpn, entry in entries.items():
            self.tlb.pop((mm, vpn), None)
            self.tlb[mm, vpn] = entry
        while len(self.tlb) > self.entries_max:
            del self.tlb[next(iter(self.tlb))]


class Context(Notifier):
    """What the GRU knows of one address space. Kernel: struct gru_mm_struct. Made by `Gru.get`.

    Attributes: range_active: invalidations under way. waits: faults that waited for one. faults, flushes: so far.
    """

    slips = ("age_page",)  # a TLB has no accessed bits

    def __init__(self, gru: Gru, mm: int) -> None:
        self.mm = mm
        self.users = 0
        self.range_active = 0
        self.waits = self.faults = self.flushes = 0
        self._gru = gru
        self._ended = asyncio.Event()  # the kernel's ms_wait_queue
        self._written: set[int] = set()  # page numbers that the next invalidation hands over as dirty

    @property
    def alive(self) -> bool:
        """False when the address space has ended, or its session is over for good."""
        return self.registration is not None and self.registration.registered

    async def load(self, address: int, length: int) -> bytes:
        """Read memory through the TLB. Raises: MmError, Fenced, ..."""
        return await self._gru.port.read(self, self._walk, address, length)

    async def store(self, address: int, data: bytes) -> None:
        """Write memory through the TLB. Raises: MmError, Fenced, ..."""
        await self._gru.port.write(self, self._walk, address, data)

    async def _walk(self, address: int, length: int, write: bool) -> Sequence[Entry]:
        needed = RIGHT_WRITE if write else RIGHT_READ
        pages = pages_of(address, length)
        for _ in range(RETRIES_MAX):
            found = [self._gru.tlb.get((self.mm, vpn)) for vpn in pages]
            entries = [entry for entry in found if entry is not None and entry.rights & needed]
            if len(entries) == len(pages):
                if write:
                    self._written.update(pages)
                return entries
            await self._fault(pages.start << PAGE_SHIFT, pages.stop << PAGE_SHIFT, write)
        raise RetriesExhausted(f"the TLB lost a page of [{address:#x}, +{length}) {RETRIES_MAX} times in a row")

    async def _fault(self, start: int, end: int, write: bool) -> None:
        """A TLB miss. Kernel: gru_user_dropin()."""
        self.faults += 1
        while self.range_active:
            self.waits += 1
            self._ended.clear()
            await self._ended.wait()

        def commit(translations: Translations) -> None:
            # A start and its end that came and went while the grant was under way are the library's to notice: it has
            # thrown such a grant away already. One that is still open is seen here.
            if not self.range_active:
                self._gru.dropin(self.mm, entries_of(translations))

        await alive(self).fault(start, end, write, commit=commit)

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        self.range_active += 1
        return self.flush(range.start, range.end)

    def invalidate_range_end(self, range: NotifierRange) -> Answer:
        self.range_active -= 1
        self._ended.set()
        return None

    def release(self, mm: int) -> Answer:
        return self.flush(0, TASK_SIZE)

    def invalidated_everything(self, why: str) -> Answer:
        if self.registration is None or not self.registration.registered:
            self.range_active = 0  # the ends of what was under way are never told
            self._ended.set()
        return self.flush(0, TASK_SIZE)

    def flush(self, start: int, end: int) -> list[int] | None:
        """Purge [start, end) from the TLB. Returns: the addresses of its pages that were written."""
        self.flushes += 1
        tlb, pages = self._gru.tlb, pages_of(start, end - start)
        for key in [key for key in tlb if key[0] == self.mm and key[1] in pages]:
            del tlb[key]
        written = [vpn << PAGE_SHIFT for vpn in self._written if vpn in pages]
        self._written = {vpn for vpn in self._written if vpn not in pages}
        return written or None
