"""A device that mirrors a whole address space: dmirror of the kernel's HMM tests. Kernel: lib/test_hmm.c, v6.12.

The device has a page table of its own, filled by faults and emptied by invalidations; it takes no reference on a page.
Its commands are the ones that tools/testing/selftests/mm/hmm-tests.c gives, and so are its answers:

    READ, WRITE   walk the device's table. The first page that is missing, or may not be written, makes one fault for
                  everything from there to the end of the request, at most 64 pages at a time; then the walk goes on.
    SNAPSHOT      one byte a page, of what the CPU's table says, without faulting anything in.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import TypeAlias

from mmubus.device import RIGHT_READ, RIGHT_WRITE
from mmubus.drivers.dma import RETRIES_MAX, Entry, alive, entries_of, pages_of
from mmubus.errors import RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange

__all__ = ["Copied", "Dmirror", "Prot"]

PAGES_AT_A_TIME = 64
STATE_NONE, STATE_ZERO, STATE_ERROR = 0, 2, 0xFF  # SnapshotResponse.states

Copy: TypeAlias = "Callable[[int, int, list[int], list[int]], Awaitable[None]]"
"""(address, length, pfns, generations)"""


class Prot(IntFlag):
    """A byte of a snapshot. Kernel: lib/test_hmm_uapi.h, HMM_DMIRROR_PROT_*."""

    NONE = 0x00
    READ = 0x01
    WRITE = 0x02
    ZERO = 0x10
    ERROR = 0xFF


@dataclass(frozen=True, slots=True)
class Copied:
    """The answer of READ and WRITE.

    Attributes: data: what was read. pages: how many were copied. faults: how many times the device had to fault.
    """

    data: bytes
    pages: int
    faults: int


class Dmirror(Notifier):
    """The device. Register it on an address space; a child of fork is mirrored when it opens its own.

    Attributes: table: page number -> entry. invalidations: so far.
    """

    slips = ("age_page", "invalidate_range_end")  # no accessed bits; the server holds faults off until the end

    def __init__(self) -> None:
        self.table: dict[int, Entry] = {}
        self.invalidations = 0

    async def read(self, address: int, pages: int) -> Copied:
        """READ. Raises: MmError: EFAULT where there is no mapping or no right to read."""
        parts: list[bytes] = []

        async def copy(at: int, length: int, pfns: list[int], generations: list[int]) -> None:
            parts.append(await alive(self).dma_read(at, length, pfns, generations))

        faults = await self._command(address, pages, False, copy)
        return Copied(b"".join(parts), pages, faults)

    async def write(self, address: int, data: bytes) -> Copied:
        """WRITE of whole pages. Raises: MmError: EFAULT, EPERM where the mapping may not be written."""

        async def copy(at: int, length: int, pfns: list[int], generations: list[int]) -> None:
            await alive(self).dma_write(at, data[at - address : at - address + length], pfns, generations)

        pages = len(data) // PAGE_SIZE
        return Copied(b"", pages, await self._command(address, pages, True, copy))

    async def snapshot(self, address: int, pages: int) -> list[Prot]:
        """SNAPSHOT."""
        seen = await alive(self).snapshot(address, address + pages * PAGE_SIZE)
        return [_prot(state, rights) for state, rights in zip(seen.states.tolist(), seen.rights.tolist(), strict=True)]

    async def _command(self, address: int, pages: int, write: bool, copy: Copy) -> int:
        """Copy as far as the table goes, fault the rest in, go on. Returns: faults. Kernel: dmirror_read()."""
        at, end = address, address + pages * PAGE_SIZE
        faults = fruitless = 0
        while at < end:
            copied = await self._copy(at, end, write, copy)
            at += copied
            if copied:
                fruitless = 0
                continue
            if (fruitless := fruitless + 1) > RETRIES_MAX:
                raise RetriesExhausted(f"{at:#x} was lost {RETRIES_MAX} times between its fault and its use")
            faults += 1
            await self._fault(at, end, write)
        return faults

    async def _copy(self, start: int, end: int, write: bool, copy: Copy) -> int:
        """Copy the pages from start on that the table has, at most a piece of them. Returns: bytes."""
        needed = RIGHT_WRITE if write else RIGHT_READ
        entries: list[Entry] = []
        for vpn in range(start >> PAGE_SHIFT, min(end >> PAGE_SHIFT, (start >> PAGE_SHIFT) + PAGES_AT_A_TIME)):
            entry = self.table.get(vpn)
            if entry is None or not entry.rights & needed:
                break
            entries.append(entry)
        length = len(entries) * PAGE_SIZE
        if not entries:
            return 0
        try:
            await copy(start, length, [one.pfn for one in entries], [one.generation for one in entries])
        except StaleTranslation:
            if all(self.table.get(vpn) is one for vpn, one in enumerate(entries, start >> PAGE_SHIFT)):
                raise  # the table still has what was taken away
            return 0
        return length

    async def _fault(self, start: int, end: int, write: bool) -> None:
        """Kernel: dmirror_fault(), dmirror_range_fault()."""
        for at in range(start, end, PAGES_AT_A_TIME * PAGE_SIZE):
            piece = min(end, at + PAGES_AT_A_TIME * PAGE_SIZE)
            await alive(self).fault(at, piece, write, commit=lambda got: self.table.update(entries_of(got)))

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        self.invalidations += 1
        pages = pages_of(range.start, range.end - range.start)
        for vpn in [vpn for vpn in self.table if vpn in pages] if len(pages) > len(self.table) else pages:
            self.table.pop(vpn, None)
        return None  # nothing is dirty that the server does not know: every write went through it

    def release(self, mm: int) -> Answer:
        self.table.clear()
        return None

    def invalidated_everything(self, why: str) -> Answer:
        self.table.clear()
        return None


def _prot(state: int, rights: int) -> Prot:
    if state == STATE_ERROR:
        return Prot.ERROR
    if state == STATE_NONE:
        return Prot.NONE
    zero = Prot.ZERO if state == STATE_ZERO else Prot.NONE
    return zero | (Prot.WRITE if rights & RIGHT_WRITE else Prot.READ)
