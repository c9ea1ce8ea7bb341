"""A registration: one notifier on one list, and what a device may do through it.

The race that everybody gets wrong, and where it ends:

    device                                 memory manager
    fault() asked
                                           grant put together: pages P, as_of_seq = 7
                                           munmap(P): notice 8
    notice 8 handled, acknowledged         frames freed
    grant arrives: P is void, and looks good

Grant and notice travel on different streams, so the order of arrival says nothing. Each registration therefore
remembers, for every fault that is under way, the highest notice handled meanwhile that overlaps. A grant with a
smaller as_of_seq is dropped and asked for again: mmu_interval_read_retry() across a network. `fault(commit=…)` calls
commit in the same plain stretch of code as this check, so nothing comes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmu.v1 import device_pb2 as pb

from mmubus.device import Pin, Translations, translations_of
from mmubus.errors import MmuBusError, RetriesExhausted, Unregistered
from mmubus.notifier import Notifier, RmapNotifier
from mmubus.transfers import Transfers

if TYPE_CHECKING:
    from mmubus.connection import Bus

__all__ = ["Registration"]

FAULT_RETRIES_MAX = 64
RANGE_MAX = 1 << 64
EVERYTHING_SEQ = RANGE_MAX - 1  # later than any notice: what is under way now is void


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Spec:
    """What a registration asks for; kept to ask for it again under a new session. mm 0: the rmap list."""

    mm: int
    start: int
    end: int
    only_held: bool
    ack_budget_s: float
    name: str
    owner: int
    demotable: bool = False


@dataclass(slots=True, eq=False)
class _OpenFault:
    """A fault or export that is under way, and the latest notice that was handled meanwhile and concerns it."""

    start: int
    end: int
    overtaken_by: int = 0
    pages: dict[int, int] = field(default_factory=dict)  # exports: pfn -> the latest notice of that frame


class Registration:
    """A notifier that is registered. Made by `Bus.register` and `Bus.register_rmap`.

    Attributes:
        id: the server's number; another one after the session was made anew.
        mm: the address space; 0 for the rmap list.
        notifier: yours.
        warnings: what will slip through because an op is missing.
        void: why it is no more, or None while it is alive.
        exported: pfns that are exported through it, for the rmap list.
        transfers: accesses that have not ended; what they touch is acknowledged away when they have.
        overtaken: grants so far that were void when they came, and were asked for again.
        slept_under_lock: notices with lock=1 whose handler waited.
    """

    def __init__(self, bus: Bus, notifier: Notifier | RmapNotifier, spec: Spec) -> None:
        self._bus = bus
        self.notifier = notifier
        self.spec = spec
        self.id = 0
        self.mm = spec.mm
        self.warnings: tuple[str, ...] = ()
        self.void: MmuBusError | None = None
        self.registered = False
        self.slept_under_lock = 0
        self.exported: set[int] = set()
        self.transfers = Transfers()
        self.overtaken = 0
        self._open_faults: set[_OpenFault] = set()

    def __repr__(self) -> str:
        where = f"mm {self.mm}" if self.mm else "rmap"
        return f"<Registration {self.id} {self.spec.name!r} {where}>"

    @property
    def faulting(self) -> bool:
        """True while a fault or an export is under way."""
        return bool(self._open_faults)

    @property
    def busy(self) -> bool:
        """True while notices must be compared with what is under way, or with what is exported."""
        return bool(self._open_faults or self.exported or self.transfers)

    @property
    def endangered(self) -> bool:
        """True while nothing that is held may be used: the connection is broken or silent, or this is void."""
        return not self.registered or self._bus.session.endangered

    async def unregister(self) -> None:
        """Take the notifier off its list. Nothing is delivered after this returns; legal inside release, and again.

        Accesses that are under way are let end first. Handlers that are running are waited for, unless it is one of
        them that calls. Kernel: mmu_notifier_unregister().
        """
        await self.transfers.ended(0, RANGE_MAX)
        await self._bus.session.unregister(self)

    def unregister_nowait(self) -> None:
        """`unregister` for plain handlers: nothing is delivered from now on, the server is told without waiting.

        Notices that are on their way are answered without the handlers: what these would have called dirty, the server
        takes to be dirty anyhow, where it could be written.
        """
        self._bus.session.unregister_nowait(self)

    async def fault(
        self,
        start: int,
        end: int,
        write: bool = False,
        *,
        commit: Callable[[Translations], None] | None = None,
        wait_s: float = 0.0,
        retries_max: int = FAULT_RETRIES_MAX,
    ) -> Translations:
        """Fault pages in and get translations, asking again while an invalidation overtakes the grant.

        Kernel: hmm_range_fault() between mmu_interval_read_begin() and mmu_interval_read_retry().
        Args:
            start, end: bytes, half-open, page-aligned.
            write: ask for the right to write.
            commit: called with the grant while it is certainly good, with no await before you have it; put it into your
                table there. Without it a notice may have been handled by the time that the caller continues.
            wait_s: how long the server may wait for a range that is being invalidated; 0: its default.
            retries_max: grants that may be void before it gives up.
        Returns: the translations.
        Raises: MmError (EFAULT: no mapping, or no right), RetriesExhausted, Fenced, ConnectionLost.
        """
        request = pb.FaultRequest(registration=self.id, start=start, end=end, write=write, wait_s=wait_s)
        return await self._granted(_OpenFault(start, end), "fault", "faults", request, retries_max, commit)

    async def snapshot(self, start: int, end: int) -> Translations:
        """Look at the page table without faulting; grants nothing. Raises: MmError, ..."""
        request = pb.SnapshotRequest(mm=self.mm, start=start, end=end, registration=self.id)
        response = (await self._ask(snapshot=request)).snapshot
        return translations_of(response.translations, 0, response.states, response.orders)

    async def pin(self, start: int, end: int, write: bool = False) -> Pin:
        """Pin pages for the long term, as get_user_pages(FOLL_LONGTERM) does. Raises: MmError, ..."""
        response = (await self._ask(pin=pb.PinRequest(registration=self.id, start=start, end=end, write=write))).pin
        return Pin(self, response.pin, translations_of(response.translations))

    async def unpin(self, pin: int, *, dirty: bool = False) -> None:
        """Give a pin back. Raises: NotFound, ..."""
        await self._ask(unpin=pb.UnpinRequest(pin=pin, dirty=dirty))

    async def dma_read(
        self, addr: int, length: int, pfns: Sequence[int], generations: Sequence[int], *, pin: int = 0
    ) -> bytes:
        """Read memory through translations.

        Args:
            addr, length: bytes, as the device knows them.
            pfns, generations: what it holds, one for each page touched.
            pin: the pin that it goes through.
        Raises: StaleTranslation when one of them was taken away: nothing is read; MmError, Fenced, ...
        """
        request = pb.DmaReadRequest(
            registration=self.id, addr=addr, length=length, pfns=pfns, generations=generations, pin=pin
        )
        ended = self._begin(addr, length, pfns, pin)
        return (await self._ask(ended, dma_read=request)).dma_read.data

    async def dma_write(
        self, addr: int, data: bytes, pfns: Sequence[int], generations: Sequence[int], *, pin: int = 0
    ) -> None:
        """Write memory through translations; the frames become dirty.

        Raises: StaleTranslation when one of them was taken away: nothing is written; MmError, Fenced, ...
        """
        request = pb.DmaWriteRequest(
            registration=self.id, addr=addr, data=data, pfns=pfns, generations=generations, pin=pin
        )
        ended = self._begin(addr, len(data), pfns, pin)
        await self._ask(ended, dma_write=request)

    def _begin(self, addr: int, length: int, pfns: Sequence[int], pin: int) -> Callable[[], None]:
        """An access that acknowledgements wait for; what is pinned is taken away by none. Returns: what ends it."""
        if pin:
            return _nothing
        if self.mm:
            return self.transfers.begin(addr, addr + length)
        return self.transfers.begin(min(pfns, default=0), max(pfns, default=0) + 1)

    async def export(
        self,
        mm: int,
        start: int,
        end: int,
        write: bool = False,
        *,
        commit: Callable[[Translations], None] | None = None,
        wait_s: float = 0.0,
        retries_max: int = FAULT_RETRIES_MAX,
    ) -> Translations:
        """Mark pages as external-rmap and get their frames; this rmap registration is told when one is taken away.

        Args: as of `fault`.
        Returns: the exported frames.
        Raises: MmError, RetriesExhausted, Fenced, ConnectionLost.
        """
        request = pb.ExportRequest(
            registration=self.id, mm=mm.__index__(), start=start, end=end, write=write, wait_s=wait_s
        )

        def take(translations: Translations) -> None:
            self.exported.update(pfn for _, pfn, *_ in translations)
            if commit is not None:
                commit(translations)

        return await self._granted(_OpenFault(0, 0), "export", "exports", request, retries_max, take)

    async def unexport(self, pfns: Sequence[int], dirty: Sequence[int] = ()) -> None:
        """Give exports back, once no access to them is under way. Args: dirty: those of them that were written.

        Raises: NotFound, ...
        """
        if pfns:
            await self.transfers.ended(min(pfns), max(pfns) + 1)
        await self._ask(unexport=pb.UnexportRequest(registration=self.id, pfns=pfns, dirty=dirty))
        self.exported.difference_update(pfns)

    async def migrate_to_device(
        self, start: int, end: int, *, coherent: bool = False, commit: Callable[[Translations], None] | None = None
    ) -> tuple[int, Translations]:
        """Move private pages into this registration's own memory. A page that the CPU touches comes back by itself.

        The notice that pages move to it has the reason "migrate" and this registration's id as owner: a driver may
        ignore it. Kernel: migrate_vma_setup() to migrate_vma_finalize().
        Args: coherent: into memory of it that the CPU and other devices reach too, so that a touched page stays;
            commit: as of `fault`.
        Returns: how many pages of the range are there now, and their translations; fault for those that are missing.
        Raises: MmError (EINVAL: part of the range is not mapped, or not readable), Fenced, ConnectionLost.
        """
        request = pb.MigrateRequest(registration=self.id, start=start, end=end, coherent=coherent)
        opened = _OpenFault(start, end)
        self._open_faults.add(opened)
        try:
            response = (await self._ask(migrate=request)).migrate
            translations = translations_of(response.translations, response.as_of_seq)
            if response.retry or response.as_of_seq < opened.overtaken_by:
                translations = await self.fault(start, end, commit=commit)
            elif commit is not None:
                commit(translations)
            return response.pages, translations
        finally:
            self._open_faults.discard(opened)

    async def migrate_to_system(self, start: int = 0, end: int = 0, *, coherent: bool = False) -> int:
        """Bring pages back from this registration's own memory; without a range: all of them, from everywhere.

        Args: coherent: those in its coherent memory instead of those in its private memory.
        Returns: how many pages of the range are in no device's memory now. Raises: MmError, Fenced, ConnectionLost.
        """
        request = pb.MigrateRequest(registration=self.id, start=start, end=end, to_system=True, coherent=coherent)
        return (await self._ask(migrate=request)).migrate.pages

    async def exclusive(
        self,
        start: int,
        end: int,
        *,
        commit: Callable[[Translations], None] | None = None,
        retries_max: int = FAULT_RETRIES_MAX,
    ) -> Translations:
        """Get pages for this registration alone, for atomic operations, until the CPU touches them.

        The notice that it gets a page has the reason "exclusive" and its id as owner; the one that it must give the
        page up has owner 0. Kernel: make_device_exclusive_range().
        Args, Raises: as of `fault`. Returns: the pages that were had; others have no translation.
        """
        request = pb.ExclusiveRequest(registration=self.id, start=start, end=end)
        return await self._granted(_OpenFault(start, end), "exclusive", "attempts", request, retries_max, commit)

    async def _granted(
        self,
        opened: _OpenFault,
        kind: str,
        attempts: str,
        request: Any,
        retries_max: int,
        commit: Callable[[Translations], None] | None,
    ) -> Translations:
        """Ask until the grant was not overtaken by a notice; commit it while it is certainly good.

        Args: kind: the field of the request and of its answer; attempts: what people call them.
        Raises: RetriesExhausted, and what the answer says.
        """
        self._open_faults.add(opened)
        try:
            for _ in range(retries_max):
                request.registration = self.id  # another one when the session was attached again
                opened.overtaken_by = 0
                opened.pages.clear()
                response = getattr(await self._ask(**{kind: request}), kind)
                if response.retry or self._is_overtaken(opened, response):
                    self.overtaken += 1
                    continue
                translations = translations_of(response.translations, response.as_of_seq)
                if commit is not None:
                    commit(translations)
                return translations
        finally:
            self._open_faults.discard(opened)
        where = f"[{request.start:#x}, {request.end:#x})"
        raise RetriesExhausted(f"{where} was invalidated during each of {retries_max} {attempts}")

    @staticmethod
    def _is_overtaken(opened: _OpenFault, response: Any) -> bool:
        seq = response.as_of_seq
        if seq < opened.overtaken_by or not opened.pages:
            return bool(seq < opened.overtaken_by)
        return any(seq < opened.pages.get(pfn, 0) for pfn in response.translations.pfns)

    async def _ask(self, ended: Callable[[], None] = _nothing, **request: object) -> pb.AccessResponse:
        if self.void is not None:
            ended()
            raise self.void
        return await self._bus.access.ask(pb.AccessRequest(**request), ended)  # type: ignore[arg-type]

    # What the dispatcher tells, before it calls the handler.

    def overtake(self, start: int, end: int, seq: int) -> None:
        """Notice seq invalidates [start, end): grants that were made before it are void."""
        for opened in self._open_faults:
            if start < opened.end and opened.start < end and seq > opened.overtaken_by:
                opened.overtaken_by = seq

    def overtake_pages(self, pfns: Sequence[int], seq: int) -> None:
        """Notice seq takes exported frames away."""
        self.exported.difference_update(pfns)
        for opened in self._open_faults:
            for pfn in pfns:
                opened.pages[pfn] = seq

    def overtake_everything(self, seq: int = EVERYTHING_SEQ) -> None:
        """Everything that was granted before notice seq is void."""
        for opened in self._open_faults:
            opened.overtaken_by = max(opened.overtaken_by, seq)

    def begin(self, registration: int, warnings: Iterable[str]) -> None:
        """The server has registered it."""
        self.id = registration
        self.warnings = tuple(warnings)
        self.void = None
        self.registered = True

    def end(self, why: MmuBusError | None) -> None:
        """The registration is no more: unregistered (None), or its session is over."""
        self.registered = False
        self.void = why or Unregistered(f"{self!r} has been unregistered")
        self.overtake_everything()
