"""The exporting side. Importers reach frames through it, as partitions do through the interconnect of a large machine.

    program            exporter (a client of the bus)                  importers, anywhere
                       ◄── fault(page) ──────────────────────────────  page missing
                       table: page -> frame, and who has it
                       ─── granted(pfn, generation) ─────────────────►
                       ◄── read / write (pfn, generation) ───────────  checked against the table
    page goes away ──► no access from here on
                       ─── recall(pages) ────────────────────────────► drop, say what was written
                       ◄── dirty ────────────────────────────────────
    frame is free  ◄── acknowledged, with what is dirty

Two ways to hear of it, as at SGI:

    by="rmap"    frames are exported, and the global rmap list tells when one of them is taken away. It runs outside of
                 all spinlocks, so waiting for another machine is legal; reclaim may be refused while a page is in use.
                 That an address shows another frame (copy-on-write) is no event of the frame: for that the address
                 space's own notifier is needed too, and the frame is then given back.
    by="range"   translations of addresses; the address space's notifier alone.

An importer that does not answer a recall in time is cut off, and what it may have written counts as dirty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable

from mmubus.address_space import AddressSpace
from mmubus.connection import Bus
from mmubus.device import RIGHT_READ, RIGHT_WRITE, Translations
from mmubus.drivers.dma import RETRIES_MAX, Entry, alive, pages_of
from mmubus.drivers.wire import Listener, Message, Wire, listen
from mmubus.drivers.xpmem.frames import ExportedFrames
from mmubus.drivers.xpmem.segment import By, OpenFault, Segment, Watch, forget
from mmubus.errors import ConnectionLost, MmError, NotFound, RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE
from mmubus.registration import Registration

__all__ = ["Exporter"]

RECALL_S = 1.0  # seconds that an importer may take to let go


class Exporter:
    """A process that exports; one for all its address spaces. Use `serve`, then `make` segments.

    Args: recall_s: seconds that an importer may take to let go of a page.
    Attributes: segments: by number. frames: those that are exported by frame. cut_off: importers that did not answer.
    """

    def __init__(self, bus: Bus, recall_s: float = RECALL_S) -> None:
        self._bus = bus
        self._recall_s = recall_s
        self.segments: dict[int, Segment] = {}
        self.importers: set[Wire] = set()
        self.cut_off = 0
        self.frames = ExportedFrames(lambda segment, entries, must: self._recall(segment, entries, must))
        self._listener: Listener | None = None

    async def serve(self, address: str) -> str:
        """Let importers connect. Args: address: unix:/path or host:port. Returns: where. Raises: OSError."""
        self._listener = await listen(address, self._connected)
        return self._listener.address

    async def make(
        self, mm: AddressSpace | int, start: int, length: int, *, by: By = "rmap", writable: bool = True
    ) -> int:
        """Make a segment of [start, start + length). Returns: its number. Kernel: xpmem_make(). Raises: MmError."""
        if by == "rmap" and (self.frames.registration is None or not self.frames.registration.registered):
            await self._bus.register_rmap(self.frames, name="xpmem")
        number = max(self.segments, default=0) + 1
        segment = Segment(number, mm.__index__(), start, len(pages_of(start, length)), by, writable, Watch(self.lose))
        segment.watch.segment = segment
        end = start + segment.pages * PAGE_SIZE
        await self._bus.register(segment.watch, mm, start=start, end=end, name=f"xpmem {number}")
        self.segments[number] = segment
        return number

    async def remove(self, number: int) -> None:
        """Take a segment back from everyone. Kernel: xpmem_remove()."""
        segment = self.segments.pop(number)
        segment.overtake(0, 1 << 64)
        await self.lose(segment, list(segment.table))
        if segment.watch.registration is not None:
            await segment.watch.registration.unregister()

    async def close(self) -> None:
        """Take everything back, from everyone."""
        for number in list(self.segments):
            await self.remove(number)
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(*(wire.close() for wire in self.importers))
        await self.frames.close()

    # What importers ask.

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers = {"get": self._get, "fault": self._fault, "read": self._read, "write": self._write}
        self.importers.add(Wire(reader, writer, handlers, self._gone))

    def _gone(self, wire: Wire) -> None:
        self.importers.discard(wire)
        for segment in self.segments.values():
            held = [(page, segment.table.get(page)) for page, holders in segment.holders.items() if wire in holders]
            written = [(page, entry) for page, entry in held if entry is not None and entry.rights & RIGHT_WRITE]
            self._let_go(segment, wire, [page for page, _ in held], written)

    def _segment(self, message: Message) -> Segment:
        segment = self.segments.get(message["segment"])
        if segment is None:
            raise NotFound("NO_SUCH_SEGMENT", f"there is no segment {message['segment']}")
        return segment

    def _get(self, message: Message) -> None:
        message.reply(pages=self._segment(message).pages)

    async def _fault(self, message: Message) -> None:
        segment, first, end, write = self._segment(message), message["first"], message["end"], message["write"]
        if not 0 <= first < end <= segment.pages:
            raise MmError("EFAULT", f"pages {first} to {end} are not in segment {segment.number}")
        if write and not segment.writable:
            raise MmError("EPERM", f"segment {segment.number} is exported for reading only")
        low, high = segment.start + first * PAGE_SIZE, segment.start + end * PAGE_SIZE
        for _ in range(RETRIES_MAX):
            self._segment(message)  # it may have been withdrawn meanwhile
            fault = OpenFault(first, end)

            def commit(translations: Translations, fault: OpenFault = fault) -> None:
                if translations.as_of_seq >= fault.overtaken_by:
                    self._grant(segment, translations, message)
                else:
                    self.frames.give_back(pfn for _, pfn, _, _ in translations)

            segment.faults.add(fault)
            try:
                if segment.by == "range":
                    await alive(segment.watch).fault(low, high, write, commit=commit)
                else:
                    await self.frames.export(segment, low, high, write, commit)
            finally:
                segment.faults.discard(fault)
            if message.answered or not message.wire.open:
                return
        raise RetriesExhausted(f"pages {first} to {end} were invalidated during each of {RETRIES_MAX} faults")

    def _grant(self, segment: Segment, translations: Translations, message: Message) -> None:
        """Into the table and onto the wire in one plain stretch: a recall can only come after it."""
        granted = []
        for address, pfn, generation, rights in translations:
            page = address - segment.start >> PAGE_SHIFT
            rights &= RIGHT_READ | RIGHT_WRITE if segment.writable else RIGHT_READ
            segment.table[page] = Entry(pfn, generation, rights)
            segment.holders.setdefault(page, set()).add(message.wire)
            if segment.by == "rmap":
                self.frames.shown(segment, page, pfn)
            granted.append((page, pfn, generation, rights))
        if message.wire.open:
            message.reply(granted=granted)

    async def _read(self, message: Message) -> None:
        address, registration, frames = self._checked(message, message["length"])
        message.reply(await registration.dma_read(address, message["length"], *frames))

    async def _write(self, message: Message) -> None:
        address, registration, frames = self._checked(message, len(message.data))
        await registration.dma_write(address, message.data, *frames)
        message.reply()

    def _checked(self, message: Message, length: int) -> tuple[int, Registration, tuple[list[int], list[int]]]:
        """What an importer presents must be what it was granted and has not lost."""
        segment, offset, frames = self._segment(message), message["offset"], message["frames"]
        for page, (pfn, generation) in zip(pages_of(offset, length), frames, strict=True):
            entry = segment.table.get(page)
            held = entry is not None and (entry.pfn, entry.generation) == (pfn, generation)
            if not held or message.wire not in segment.holders.get(page, ()):
                raise StaleTranslation("STALE_TRANSLATION", f"page {page} of segment {segment.number} was recalled")
        registration = alive(self.frames if segment.by == "rmap" else segment.watch)
        return segment.start + offset, registration, ([pfn for pfn, _ in frames], [gen for _, gen in frames])

    # What the memory manager takes away.

    async def lose(self, segment: Segment, pages: Iterable[int]) -> list[int]:
        """Addresses go: take them back from every importer. Returns: those of the pages that were written."""
        lost = {page: entry for page in pages if (entry := segment.table.get(page)) is not None}
        await self._recall(segment, lost, must=True)
        forget(segment, lost)
        if segment.by == "range":
            dirty = segment.written & lost.keys()
            segment.written -= dirty
            return [segment.start + page * PAGE_SIZE for page in sorted(dirty)]
        self.frames.hidden(segment, lost)
        return []  # the frames' own notifier hands it over, or giving them back does

    async def _recall(self, segment: Segment, entries: dict[int, Entry], must: bool) -> bool:
        """Ask everyone who has one of the pages to let go. Returns: whether somebody may keep one and does."""
        asked: dict[Wire, list[int]] = {}
        for page in entries:
            for wire in segment.holders.get(page, ()):
                asked.setdefault(wire, []).append(page)
        # A page stays in the table until all have answered: who asks about its frame meanwhile waits for them, too.
        answers = [self._ask(segment, wire, pages, entries, must) for wire, pages in asked.items()]
        return any(await asyncio.gather(*answers))

    def _ask(
        self, segment: Segment, wire: Wire, pages: list[int], entries: dict[int, Entry], must: bool
    ) -> Coroutine[None, None, bool]:
        def let_go(dirty: Iterable[int]) -> None:
            self._let_go(segment, wire, pages, [(page, entries[page]) for page in dirty])

        def commit(answer: Message) -> None:
            if not answer.fields.get("busy"):
                let_go(answer["dirty"])

        async def answered() -> bool:
            try:
                return bool((await asyncio.wait_for(question, self._recall_s)).fields.get("busy"))
            except TimeoutError:
                self.cut_off += 1
                await wire.close()
            except ConnectionLost:
                pass  # it has gone: nothing of it gets through any more either
            let_go(page for page in pages if entries[page].rights & RIGHT_WRITE)
            return False

        question = wire.ask("recall", segment=segment.number, pages=pages, must=must, commit=commit)
        return answered()

    def _let_go(self, segment: Segment, wire: Wire, pages: list[int], dirty: list[tuple[int, Entry]]) -> None:
        for page in pages:
            segment.holders.get(page, set()).discard(wire)
        if segment.by == "range":
            segment.written.update(page for page, _ in dirty)
        else:
            self.frames.wrote(entry for _, entry in dirty)
