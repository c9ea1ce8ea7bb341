"""A hypervisor: a guest's memory is a program's memory, reached through shadow page tables.

    guest physical ──memory slots──► host virtual ──the program's page table──► frame
          └───────────────── shadow page table ────────────────────────────────────┘

The shadow is a shortcut over both, so it must go when either changes. Kernel: virt/kvm/kvm_main.c, v6.12.

    vCPU: kvm_mmu_faultin_pfn()                      invalidate_range_start / _end
    seq = self.seq                                   in_progress += 1, zap
    fault the page in (waits)                        ... the memory manager changes the page ...
    plainly, without waiting:                        seq += 1        before
      in_progress over this page, or seq moved?      in_progress -= 1    the count drops
      again : put it into the shadow

Whoever samples seq before the end sees it moved or sees the count; the order of the last two lines is what makes it
so. Memory slots change only while no invalidation is under way, so that a start and its end see the same slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmubus.device import RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.drivers.dma import RETRIES_MAX, Entry, Port, Walk, alive, entries_of, pages_of, stand_back
from mmubus.errors import MmuBusError, RetriesExhausted
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange
from mmubus.window import FrameWindow

__all__ = ["MemorySlot", "MmioExit", "Spte", "Vm"]


class MmioExit(MmuBusError):
    """The guest touched guest physical memory that no slot backs: a device model would have to answer.

    Attributes: gpa: where. write: how.
    """

    def __init__(self, gpa: int, write: bool) -> None:
        super().__init__(f"no memory slot for a {'store' if write else 'load'} at guest physical {gpa:#x}")
        self.gpa = gpa
        self.write = write


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """Guest physical [gpa, gpa + pages) is host virtual [hva, hva + pages). Kernel: struct kvm_memory_slot.

    Attributes: log_dirty: note which of its pages the guest writes; readonly: stores leave the guest.
    """

    number: int
    gpa: int
    hva: int
    pages: int
    log_dirty: bool = False
    readonly: bool = False

    def gfns(self, start: int, end: int) -> range:
        """The guest's page numbers of what [start, end) of host virtual memory covers of it."""
        low = max(start, self.hva) - self.hva >> PAGE_SHIFT
        high = min(end, self.hva + self.pages * PAGE_SIZE) - self.hva + PAGE_SIZE - 1 >> PAGE_SHIFT
        first = self.gpa >> PAGE_SHIFT
        return range(first + low, first + max(low, high))

    def hva_of(self, gfn: int) -> int:
        """The host virtual address of one of its pages."""
        return self.hva + (gfn << PAGE_SHIFT) - self.gpa


@dataclass(slots=True, eq=False)
class Spte:
    """A shadow page table entry. writable may be less than the entry's rights: that is how dirty logging works."""

    entry: Entry
    writable: bool
    accessed: bool = False


class Vm(Notifier):
    """A guest. Register it on the address space of the program that is its memory.

    Args: window: reach frames through it instead of through the server.
    Attributes:
        slots: by number. shadow: guest page number -> entry.
        seq, in_progress: see the module. flushes: of the guest's TLB.
    """

    def __init__(self, window: FrameWindow | None = None) -> None:
        self.slots: dict[int, MemorySlot] = {}
        self.shadow: dict[int, Spte] = {}
        self.seq = 0
        self.in_progress = 0
        self.faults = self.flushes = 0
        self._invalidating = (0, 0)  # host virtual; the smallest range that covers all that is in progress
        self._active = 0  # invalidations under way, whether or not they concern a slot
        self._idle = asyncio.Event()  # nothing is under way
        self._idle.set()
        self._dirty_log: dict[int, set[int]] = {}  # slot number -> guest page numbers
        self._written: set[int] = set()  # host page numbers that the next invalidation hands over as dirty
        self._port = Port(window)

    # Memory slots.

    async def set_memory_slot(self, slot: MemorySlot) -> None:
        """Add a slot, or replace the one of that number; with pages 0 it is removed. The shadow of the old one goes."""
        while self._active:
            await self._idle.wait()
        if (old := self.slots.pop(slot.number, None)) is not None:
            self._zap(old, 0, TASK_SIZE)
        self._dirty_log.pop(slot.number, None)
        if slot.pages:
            self.slots[slot.number] = slot

    def dirty_log(self, number: int) -> list[int]:
        """The guest pages of a slot that were written since the last call. The next store to each is noticed again."""
        written = self._dirty_log.pop(number, set())
        for gfn in written & self.shadow.keys():
            self.shadow[gfn].writable = False
        self.flushes += bool(written)
        return sorted(written)

    # The guest.

    async def load(self, gpa: int, length: int) -> bytes:
        """What the guest reads. Raises: MmioExit; MmError, Fenced, ..."""
        parts = []
        for slot, hva, count in self._spans(gpa, length, False):
            parts.append(await self._port.read(self, self._walker(slot), hva, count))
        return b"".join(parts)

    async def store(self, gpa: int, data: bytes) -> None:
        """What the guest writes. Raises: as load."""
        done = 0
        for slot, hva, count in self._spans(gpa, len(data), True):
            await self._port.write(self, self._walker(slot), hva, data[done : done + count])
            done += count

    def _spans(self, gpa: int, length: int, write: bool) -> Iterator[tuple[MemorySlot, int, int]]:
        """(slot, host virtual address, bytes) of each part of a guest access."""
        end = gpa + length
        while gpa < end:
            slot = self._slot_of(gpa >> PAGE_SHIFT)
            if slot is None or (write and slot.readonly):
                raise MmioExit(gpa, write)
            count = min(end, slot.gpa + slot.pages * PAGE_SIZE) - gpa
            yield slot, slot.hva + gpa - slot.gpa, count
            gpa += count

    def _slot_of(self, gfn: int) -> MemorySlot | None:
        for slot in self.slots.values():
            if slot.gpa >> PAGE_SHIFT <= gfn < (slot.gpa >> PAGE_SHIFT) + slot.pages:
                return slot
        return None

    def _walker(self, slot: MemorySlot) -> Walk:
        async def walk(hva: int, length: int, write: bool) -> Sequence[Entry]:
            gfns = slot.gfns(hva, hva + length)
            while (missing := next((gfn for gfn in gfns if not self._allows(gfn, write)), None)) is not None:
                await self._fault(slot, missing, write)
            for gfn in gfns:
                self.shadow[gfn].accessed = True
            if write:  # before the bytes are there: what is called dirty and is not costs nothing
                self._written.update(pages_of(hva, length))
            return [self.shadow[gfn].entry for gfn in gfns]

        return walk

    def _allows(self, gfn: int, write: bool) -> bool:
        spte = self.shadow.get(gfn)
        return spte is not None and (spte.writable or not write)

    async def _fault(self, slot: MemorySlot, gfn: int, write: bool) -> None:
        """A page fault of the guest. Kernel: kvm_tdp_page_fault(), mmu_invalidate_retry_gfn()."""
        self.faults += 1
        hva = slot.hva_of(gfn)
        for attempt in range(RETRIES_MAX):
            await stand_back(attempt)
            if self.slots.get(slot.number) is not slot:
                raise MmioExit(gfn << PAGE_SHIFT, write)
            seq = self.seq  # before the lookup: what ends after this is noticed

            def commit(translations: Translations, seq: int = seq) -> None:
                if not self._must_retry(seq, hva) and self.slots.get(slot.number) is slot:
                    self._map(slot, gfn, entries_of(translations), write)

            await alive(self).fault(hva, hva + PAGE_SIZE, write, commit=commit)
            if self._allows(gfn, write):
                return
            if self.in_progress:
                await self._idle.wait()  # the end is on its way; without this the vCPU would spin until it is here
        raise RetriesExhausted(f"guest page {gfn:#x} was invalidated during each of {RETRIES_MAX} faults")

    def _must_retry(self, seq: int, hva: int) -> bool:
        start, end = self._invalidating
        return seq != self.seq or (self.in_progress > 0 and start <= hva < end)

    def _map(self, slot: MemorySlot, gfn: int, entries: dict[int, Entry], write: bool) -> None:
        entry = entries.get(slot.hva_of(gfn) >> PAGE_SHIFT)
        if entry is None or not entry.rights & (RIGHT_WRITE if write else RIGHT_READ):
            return
        if slot.log_dirty and write:
            self._dirty_log.setdefault(slot.number, set()).add(gfn)
        writable = bool(entry.rights & RIGHT_WRITE) and not slot.readonly and (write or not slot.log_dirty)
        self.shadow[gfn] = Spte(entry, writable)

    # The notifier.

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        self._active += 1
        self._idle.clear()
        if self._concerns(range):
            low, high = self._invalidating if self.in_progress else (range.start, range.end)
            self._invalidating = min(low, range.start), max(high, range.end)
            self.in_progress += 1
        return self._drop(range.start, range.end) or None

    def invalidate_range_end(self, range: NotifierRange) -> Answer:
        if self._concerns(range):
            self.seq += 1  # before the count drops
            self.in_progress -= 1
        self._active -= 1
        if not self._active:
            self._idle.set()
        return None

    def clear_flush_young(self, mm: int, start: int, end: int) -> Answer:
        young = self._age(start, end)
        self.flushes += bool(young)
        return young or None

    def clear_young(self, mm: int, start: int, end: int) -> Answer:
        return self._age(start, end) or None

    def test_young(self, mm: int, start: int, end: int) -> Answer:
        return sorted({hva for hva, spte in self._sptes(start, end) if spte.accessed}) or None

    def release(self, mm: int) -> Answer:
        return self._drop(0, TASK_SIZE) or None

    def invalidated_everything(self, why: str) -> Answer:
        dirty = self._drop(0, TASK_SIZE)
        self.seq += 1
        if self.registration is None or not self.registration.registered:
            self.in_progress = self._active = 0  # the ends of what was under way are never told
            self._idle.set()
        return dirty or None

    def _concerns(self, range: NotifierRange) -> bool:
        return any(slot.gfns(range.start, range.end) for slot in self.slots.values())

    def _drop(self, start: int, end: int) -> list[int]:
        """Let go of [start, end) of host virtual memory. Returns: the addresses of its pages that the guest wrote."""
        for slot in self.slots.values():
            self._zap(slot, start, end)
        written = [vpn for vpn in self._written if start <= vpn << PAGE_SHIFT < end]
        self._written.difference_update(written)
        return [vpn << PAGE_SHIFT for vpn in written]

    def _zap(self, slot: MemorySlot, start: int, end: int) -> None:
        """Drop the shadow entries of a slot whose memory is in [start, end), and flush the guest's TLB."""
        gfns = slot.gfns(start, end)
        held = [gfn for gfn in self.shadow if gfn in gfns] if len(gfns) > len(self.shadow) else gfns
        zapped = [gfn for gfn in held if self.shadow.pop(gfn, None) is not None]
        self.flushes += bool(zapped)

    def _sptes(self, start: int, end: int) -> Iterator[tuple[int, Spte]]:
        """(host virtual address, entry) of each shadow entry of [start, end); a host page may have several."""
        for slot in self.slots.values():
            for gfn in slot.gfns(start, end):
                if (spte := self.shadow.get(gfn)) is not None:
                    yield slot.hva_of(gfn), spte

    def _age(self, start: int, end: int) -> list[int]:
        """Clear the accessed bits of [start, end). Returns: the addresses of the pages that had one."""
        young = []
        for hva, spte in self._sptes(start, end):
            if spte.accessed:
                spte.accessed = False
                young.append(hva)
        return sorted(set(young))
