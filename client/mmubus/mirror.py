"""A shadow page table: what most drivers are, made right once.

    mirror = await bus.mirror(mm)
    data = await mirror.read(address, 4096)      # faults what is missing, through the device's own translations
    await mirror.write(address, b"...")

The loop is the kernel's (Documentation/mm/hmm.rst): take the sequence, fault, check the sequence, put the
translations into the table, and start again when an invalidation came between. Every path that removes an entry is a
plain method, called by notices before they are acknowledged; every path that adds one is `_grant`, called while the
grant is certainly good. So the table never holds what the server has taken back.

A notice is acknowledged when the accesses to its pages that are on their way have ended (`transfers`). Should the
server still refuse one (a session that was resumed), it is dropped here, and tried again.

A subclass may override ops to see them pass, and must call `super()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from mmubus.device import NO_PFN, RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.errors import MirrorVoid, RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, NotifierOp
from mmubus.notifier import Answer, Notifier, NotifierRange
from mmubus.registration import Registration
from mmubus.window import FrameWindow

__all__ = ["Entry", "Mirror", "MirrorStatistics", "Style"]

Style: TypeAlias = Literal["seed", "mainline"]

ACCESS_BYTES_MAX = 1 << 20  # bytes of one access; longer ones are split
RETRIES_MAX = 64  # times that one access may be overtaken

_OPS_OF_STYLE: dict[Style, frozenset[NotifierOp]] = {
    "seed": frozenset(
        {
            NotifierOp.RELEASE,
            NotifierOp.AGE_PAGE,
            NotifierOp.INVALIDATE_PAGE,
            NotifierOp.INVALIDATE_RANGE,
            NotifierOp.INVALIDATE_ALL,
        }
    ),
    "mainline": frozenset(
        {
            NotifierOp.RELEASE,
            NotifierOp.INVALIDATE_RANGE_START,
            NotifierOp.INVALIDATE_RANGE_END,
            NotifierOp.CLEAR_FLUSH_YOUNG,
            NotifierOp.CLEAR_YOUNG,
            NotifierOp.TEST_YOUNG,
        }
    ),
}


class Entry(NamedTuple):
    """A translation in the table."""

    pfn: int
    generation: int
    rights: int


@dataclass(slots=True)
class MirrorStatistics:
    """What a mirror has done so far."""

    faults: int = 0
    pages_granted: int = 0
    pages_dropped: int = 0
    invalidations: int = 0
    reads: int = 0
    writes: int = 0
    retries: int = 0
    stale: int = 0


class Mirror(Notifier):
    """A shadow page table of one address space; register it with `Bus.register`, or make both with `Bus.mirror`.

    Args:
        style: "seed": the recorded patch's ops; "mainline": invalidate_range_start/end and the aging ops.
        window: reach memory through it instead of through the server: no copy, no round trip, only on the same machine.
    Attributes: statistics: counters.
    """

    def __init__(self, *, style: Style = "seed", window: FrameWindow | None = None) -> None:
        self.ops = _OPS_OF_STYLE[style]
        self.statistics = MirrorStatistics()
        self._window = window
        self._table: dict[int, Entry] = {}  # by page number
        self._dirty: set[int] = set()  # page numbers written since they were granted
        self._young: set[int] = set()  # page numbers used since the last aging
        if window is not None:
            window.carries(self._written)

    # The device's accesses.

    @property
    def held(self) -> dict[int, Entry]:
        """What is held now: a copy, address -> (pfn, generation, rights)."""
        return {vpn << PAGE_SHIFT: entry for vpn, entry in self._table.items()}

    @property
    def valid(self) -> bool:
        """False while nothing may be used: not registered, in jeopardy, fenced."""
        return self.registration is not None and not self.registration.endangered

    async def read(self, address: int, length: int) -> bytes:
        """Read memory as the device sees it. Pages that are missing are faulted in.

        Raises: MmError (EFAULT: no mapping, or no right), MirrorVoid, Fenced, ConnectionLost, RetriesExhausted.
        """
        pieces = [await self._read_piece(at, size) for at, size in _pieces(address, length)]
        self.statistics.reads += 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write memory through the device. Pages that are missing, or may not be written yet, are faulted in.

        Raises: as `read`. What was written before the error stays written.
        """
        view = memoryview(data).cast("B")
        for at, size in _pieces(address, len(view)):
            await self._write_piece(at, view[at - address : at - address + size])
        self.statistics.writes += 1

    async def fault(self, start: int, end: int, *, write: bool = False) -> None:
        """Hold every page of [start, end) that may be had; a range known to be used soon is cheaper in one piece.

        Raises: as `read`.
        """
        self.statistics.faults += 1
        await self._alive().fault(start & -PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE, write, commit=self._grant)

    def _written(self) -> list[int]:
        """The frames that were written to since they were granted, and are held."""
        return [self._table[vpn].pfn for vpn in self._dirty if vpn in self._table]

    async def _read_piece(self, address: int, length: int) -> bytes:
        for _ in range(RETRIES_MAX):
            entries = await self._entries(address, length, write=False)
            self._young.update(_vpns(address, length))
            if self._window is not None:
                return b"".join(
                    bytes(self._window.page(entry.pfn)[low:high])
                    for entry, (_, low, high) in zip(entries, _spans(address, length), strict=True)
                )
            pfns, generations = [entry.pfn for entry in entries], [entry.generation for entry in entries]
            try:
                return await self._alive().dma_read(address, length, pfns, generations)
            except StaleTranslation:
                self._drop_stale(address, length, entries)
        raise _exhausted("read", address, length)

    async def _write_piece(self, address: int, data: memoryview) -> None:
        for _ in range(RETRIES_MAX):
            entries = await self._entries(address, len(data), write=True)
            touched = _vpns(address, len(data))
            self._young.update(touched)
            # Before the bytes are there: an invalidation that comes meanwhile hands the page over as dirty, and a
            # page that is called dirty and is not costs nothing.
            self._dirty.update(touched)
            if self._window is not None:
                for entry, (at, low, high) in zip(entries, _spans(address, len(data)), strict=True):
                    self._window.page(entry.pfn)[low:high] = data[at : at + high - low]
                return
            pfns, generations = [entry.pfn for entry in entries], [entry.generation for entry in entries]
            try:
                await self._alive().dma_write(address, bytes(data), pfns, generations)
                return
            except StaleTranslation:
                self._drop_stale(address, len(data), entries)
        raise _exhausted("write", address, len(data))

    async def _entries(self, address: int, length: int, *, write: bool) -> list[Entry]:
        """The translations of every page touched, faulted in where they are missing. Valid until the next await."""
        needed = RIGHT_WRITE if write else RIGHT_READ
        vpns = _vpns(address, length)
        for _ in range(RETRIES_MAX):
            self._alive()
            entries = [self._table.get(vpn) for vpn in vpns]
            missing = [
                vpn for vpn, entry in zip(vpns, entries, strict=True) if entry is None or not entry.rights & needed
            ]
            if not missing:
                return [entry for entry in entries if entry is not None]
            await self.fault(missing[0] << PAGE_SHIFT, (missing[-1] + 1) << PAGE_SHIFT, write=write)
        raise _exhausted("fault", address, length)

    def _alive(self) -> Registration:
        registration = self.registration
        if registration is None:
            raise MirrorVoid("the mirror is not registered; see Bus.register")
        if registration.void is not None:
            raise registration.void
        if registration.endangered:
            raise MirrorVoid("the session is in jeopardy: the server cannot be heard, and may take everything away")
        return registration

    # The table.

    def _grant(self, translations: Translations) -> None:
        table = self._table
        vpn = translations.start >> PAGE_SHIFT
        columns = (translations.pfns.tolist(), translations.generations.tolist(), translations.rights.tolist())
        for pfn, generation, rights in zip(*columns, strict=True):
            if pfn != NO_PFN:
                table[vpn] = Entry(pfn, generation, rights)
                self.statistics.pages_granted += 1
            vpn += 1

    def _drop_stale(self, address: int, length: int, entries: list[Entry]) -> None:
        """The server refused these: they were taken away while the access was on its way."""
        self.statistics.stale += 1
        self.statistics.retries += 1
        for vpn, entry in zip(_vpns(address, length), entries, strict=True):
            if self._table.get(vpn) == entry:
                del self._table[vpn]
                self._dirty.discard(vpn)

    def drop(self, start: int, end: int) -> list[int]:
        """Forget [start, end). Returns: the addresses of its pages that were written, for the acknowledgement."""
        self.statistics.invalidations += 1
        table = self._table
        first, last = start >> PAGE_SHIFT, -(-end // PAGE_SIZE)
        if last - first > len(table):
            vpns: Iterable[int] = [vpn for vpn in table if first <= vpn < last]
        else:
            vpns = range(first, last)
        dirty = []
        for vpn in vpns:
            if table.pop(vpn, None) is not None:
                self.statistics.pages_dropped += 1
                self._young.discard(vpn)
                if vpn in self._dirty:
                    self._dirty.discard(vpn)
                    dirty.append(vpn << PAGE_SHIFT)
        return dirty

    # The ops.

    def release(self, mm: int) -> Answer:
        return self.drop(0, TASK_SIZE) or None

    def invalidate_all(self, mm: int) -> Answer:
        return self.drop(0, TASK_SIZE) or None

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Answer:
        return self.drop(start, end) or None

    def invalidate_page(self, mm: int, address: int) -> Answer:
        return self.drop(address, address + PAGE_SIZE) or None

    def invalidate_range_start(self, range: NotifierRange) -> Answer:
        return self.drop(range.start, range.end) or None

    def invalidate_range_end(self, range: NotifierRange) -> Answer:
        """Nothing to do: between start and end the server grants nothing in the range."""

    def age_page(self, mm: int, address: int) -> Answer:
        return self._age(address, address + PAGE_SIZE) != []

    def clear_flush_young(self, mm: int, start: int, end: int) -> Answer:
        return self._age(start, end) or None

    def clear_young(self, mm: int, start: int, end: int) -> Answer:
        return self._age(start, end) or None

    def test_young(self, mm: int, start: int, end: int) -> Answer:
        return [vpn << PAGE_SHIFT for vpn in self._young_within(start, end)] or None

    def invalidated_everything(self, why: str) -> Answer:
        return self.drop(0, TASK_SIZE) or None

    def _age(self, start: int, end: int) -> list[int]:
        """Clear the marks of [start, end). Returns: the addresses that had one."""
        young = self._young_within(start, end)
        self._young.difference_update(young)
        return [vpn << PAGE_SHIFT for vpn in young]

    def _young_within(self, start: int, end: int) -> list[int]:
        first, last = start >> PAGE_SHIFT, -(-end // PAGE_SIZE)
        if last - first == 1:
            return [first] if first in self._young else []
        return sorted(vpn for vpn in self._young if first <= vpn < last)


def _vpns(address: int, length: int) -> range:
    """The page numbers that [address, address + length) touches."""
    return range(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1) if length else range(0)


def _spans(address: int, length: int) -> list[tuple[int, int, int]]:
    """For each page touched: offset in the data, and the bytes of the page [low, high)."""
    spans = []
    at = 0
    while at < length:
        low = (address + at) & (PAGE_SIZE - 1)
        high = min(PAGE_SIZE, low + length - at)
        spans.append((at, low, high))
        at += high - low
    return spans


def _pieces(address: int, length: int) -> list[tuple[int, int]]:
    """[address, address + length) in pieces that fit one access."""
    if length <= ACCESS_BYTES_MAX:
        return [(address, length)] if length else []
    end = address + length
    return [(at, min(ACCESS_BYTES_MAX, end - at)) for at in range(address, end, ACCESS_BYTES_MAX)]


def _exhausted(what: str, address: int, length: int) -> RetriesExhausted:
    return RetriesExhausted(
        f"{what} of {length} bytes at {address:#x} was overtaken by an invalidation {RETRIES_MAX} times in a row"
    )
