"""A device that mirrors a whole address space: dmirror of the kernel's HMM tests. Kernel: lib/test_hmm.c, v6.12.

The device has a page table of its own, filled by faults and emptied by invalidations; it takes no reference on a page.
Its commands are the ones that tools/testing/selftests/mm/hmm-tests.c gives, and so are its answers:

    READ, WRITE   walk the device's table. The first page that is missing, or may not be written, makes one fault for
                  everything from there to the end of the request, at most 64 pages at a time; then the walk goes on.
    SNAPSHOT      one byte a page, of what the CPU's table says, without faulting anything in.
    MIGRATE_TO_DEV, MIGRATE_TO_SYS, RELEASE    pages to the device's own memory, back, and all of them back.
    EXCLUSIVE, CHECK_EXCLUSIVE                 pages for the device alone, and whether none of them is so any more.

Its own MIGRATE and EXCLUSIVE are not ignored, as the kernel's are: with the acknowledgement of a notice the server
counts what it names as given back, whoever caused it, and grants anew when the pages have moved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import TypeAlias

from mmubus.device import RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.drivers.dma import RETRIES_MAX, Entry, alive, entries_of, pages_of
from mmubus.errors import MmError, RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE
from mmubus.notifier import Answer, Notifier, NotifierRange

__all__ = ["Copied", "Dmirror", "Prot"]

PAGES_AT_A_TIME = 64
STATE_NONE, STATE_ZERO, STATE_OWN, STATE_COHERENT, STATE_OTHER, STATE_ERROR = 0, 2, 3, 4, 5, 0xFF
"""SnapshotResponse.states."""
PMD_ORDER = 9
PAGES_TO_MOVE = 1 << PMD_ORDER

Copy: TypeAlias = "Callable[[int, int, list[int], list[int]], Awaitable[None]]"
"""(address, length, pfns, generations)"""


class Prot(IntFlag):
    """A byte of a snapshot. Kernel: lib/test_hmm_uapi.h, HMM_DMIRROR_PROT_*."""

    NONE = 0x00
    READ = 0x01
    WRITE = 0x02
    PMD = 0x04
    ZERO = 0x10
    PRIV_LOCAL = 0x20
    COH_LOCAL = 0x40
    COH_REMOTE = 0x50
    ERROR = 0xFF


KINDS = {
    STATE_ZERO: Prot.ZERO,
    STATE_OWN: Prot.PRIV_LOCAL,
    STATE_COHERENT: Prot.COH_LOCAL,
    STATE_OTHER: Prot.COH_REMOTE,
}


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

    Args: coherent: its own memory is coherent, the variant of the kernel's tests; else private.
    Attributes: table: page number -> entry; atomic: those that it has for itself. invalidations: so far.
    """

    slips = ("age_page", "invalidate_range_end")  # no accessed bits; the server holds faults off until the end

    def __init__(self, *, coherent: bool = False) -> None:
        self.coherent = coherent
        self.table: dict[int, Entry] = {}
        self.atomic: set[int] = set()
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
        pages_seen = zip(seen.states.tolist(), seen.rights.tolist(), seen.orders.tolist(), strict=True)
        return [_prot(*page) for page in pages_seen]

    async def migrate_to_dev(self, address: int, pages: int) -> Copied:
        """MIGRATE_TO_DEV, and read them back there. Kernel: dmirror_migrate_to_device().

        Raises: MmError: EINVAL where something is not mapped or not readable; ENOENT: not all of them have moved.
        """
        for start, end in _pieces(address, pages, PAGES_TO_MOVE):
            await alive(self).migrate_to_device(start, end, coherent=self.coherent, commit=self._commit_own)
        return await self._read_back(address, pages)

    async def migrate_to_sys(self, address: int, pages: int) -> int:
        """MIGRATE_TO_SYS. Returns: how many pages are in no device's memory now."""
        return sum(
            [
                await alive(self).migrate_to_system(start, end, coherent=self.coherent)
                for start, end in _pieces(address, pages, PAGES_TO_MOVE)
            ]
        )

    async def release_device(self) -> int:
        """RELEASE: everything in the device's memory comes back. Returns: how many pages."""
        return await alive(self).migrate_to_system()

    async def exclusive(self, address: int, pages: int) -> Copied:
        """EXCLUSIVE, and read them. Raises: MmError: EFAULT, ENOENT as migrate_to_dev."""

        def commit(got: Translations) -> None:
            entries = entries_of(got)
            self.table.update(entries)
            self.atomic.update(entries)

        for start, end in _pieces(address, pages, PAGES_AT_A_TIME):
            await alive(self).exclusive(start, end, commit=commit)
        return await self._read_back(address, pages)

    def check_exclusive(self, address: int, pages: int) -> None:
        """CHECK_EXCLUSIVE. Raises: MmError EPERM: one of the pages is still the device's alone."""
        for vpn in pages_of(address, pages * PAGE_SIZE):
            if vpn in self.atomic:
                raise MmError("EPERM", f"page {vpn << PAGE_SHIFT:#x} is still exclusive")

    def _commit_own(self, got: Translations) -> None:
        self.table.update(entries_of(got))

    async def _read_back(self, address: int, pages: int) -> Copied:
        """Read what the device's table has, without a fault."""
        parts: list[bytes] = []

        async def copy(at: int, length: int, pfns: list[int], generations: list[int]) -> None:
            parts.append(await alive(self).dma_read(at, length, pfns, generations))

        at, end = address, address + pages * PAGE_SIZE
        while at < end:
            copied = await self._copy(at, end, False, copy)
            if not copied:
                done = (at - address) // PAGE_SIZE
                raise MmError("ENOENT", f"the device has {done} of {pages} pages: {at:#x} is missing")
            at += copied
        return Copied(b"".join(parts), pages, 0)

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
            self.atomic.discard(vpn)
        return None  # nothing is dirty that the server does not know: every write went through it

    def release(self, mm: int) -> Answer:
        self.table.clear()
        self.atomic.clear()
        return None

    def invalidated_everything(self, why: str) -> Answer:
        self.table.clear()
        self.atomic.clear()
        return None


def _prot(state: int, rights: int, order: int) -> Prot:
    if state == STATE_ERROR:
        return Prot.ERROR
    if state == STATE_NONE:
        return Prot.NONE
    kind = KINDS.get(state, Prot.NONE)
    size = Prot.PMD if order == PMD_ORDER else Prot.NONE
    return kind | size | (Prot.WRITE if rights & RIGHT_WRITE else Prot.READ)


def _pieces(address: int, pages: int, pages_max: int) -> list[tuple[int, int]]:
    """The range in pieces of at most so many pages."""
    end, step = address + pages * PAGE_SIZE, pages_max * PAGE_SIZE
    return [(at, min(end, at + step)) for at in range(address, end, step)]
