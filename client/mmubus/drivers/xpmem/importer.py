"""The importing side: attach to a segment of another process, fault through its exporter, let go when it says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from mmubus.device import RIGHT_READ, RIGHT_WRITE
from mmubus.drivers.dma import RETRIES_MAX, Entry, pages_of, retried
from mmubus.drivers.wire import Message, Wire, dial
from mmubus.errors import RetriesExhausted

__all__ = ["Attachment", "Importer"]


class Importer:
    """A process that imports. Made by `Importer.connect`; needs no connection to the bus."""

    def __init__(self) -> None:
        self.attachments: dict[int, Attachment] = {}
        self._wire: Wire | None = None

    @classmethod
    async def connect(cls, address: str) -> Importer:
        """Args: address: of the exporter. Raises: OSError."""
        self = cls()
        self._wire = await dial(address, {"recall": self.recall})
        return self

    @property
    def wire(self) -> Wire:
        """The connection to the exporter."""
        assert self._wire is not None, "made by Importer.connect"
        return self._wire

    async def attach(self, segment: int) -> Attachment:
        """Attach to a segment; nothing is mapped yet. Raises: NotFound, ConnectionLost."""
        answer = await self.wire.ask("get", segment=segment)
        return self.attachments.setdefault(segment, Attachment(self, segment, answer["pages"]))

    def recall(self, message: Message) -> None:
        """The exporter takes pages away; it waits for the answer before it lets the memory manager go on.

        Answer: dirty: those of them that were written here; or busy, when they are in use and may stay.
        """
        attachment = self.attachments.get(message["segment"])
        pages: list[int] = message["pages"]
        if attachment is None:
            message.reply(dirty=[])
        elif not message["must"] and any(attachment.in_use[page] for page in pages):
            message.reply(busy=True, dirty=[])
        else:
            message.reply(dirty=attachment.drop(pages))

    async def close(self) -> None:
        """Detach from everything."""
        await self.wire.close()


class Attachment:
    """A segment as this process sees it. Made by `Importer.attach`.

    Attributes:
        table: page -> the frame that it was granted. pages: of the segment. in_use: accesses under way, by page.
        recalls: pages that were taken away so far.
    """

    def __init__(self, importer: Importer, segment: int, pages: int) -> None:
        self.segment = segment
        self.pages = pages
        self.table: dict[int, Entry] = {}
        self.in_use: Counter[int] = Counter()
        self.recalls = 0
        self._wire = importer.wire
        self._written: set[int] = set()

    async def read(self, offset: int, length: int) -> bytes:
        """Read bytes of the segment. Raises: MmError (EFAULT: unmapped, or outside), ConnectionLost."""

        async def access(entries: Sequence[Entry]) -> Message:
            frames = _frames(entries)
            return await self._wire.ask("read", segment=self.segment, offset=offset, frames=frames, length=length)

        return (await self._access(offset, length, False, access)).data

    async def write(self, offset: int, data: bytes) -> None:
        """Write bytes of the segment. Raises: as read; EPERM when it is exported for reading only."""

        async def access(entries: Sequence[Entry]) -> Message:
            return await self._wire.ask("write", data, segment=self.segment, offset=offset, frames=_frames(entries))

        await self._access(offset, len(data), True, access)

    def drop(self, pages: Sequence[int]) -> list[int]:
        """Forget pages. Returns: those that were written here."""
        self.recalls += len(pages)
        for page in pages:
            self.table.pop(page, None)
        dirty = [page for page in pages if page in self._written]
        self._written.difference_update(dirty)
        return dirty

    async def _access(
        self, offset: int, length: int, write: bool, access: Callable[[Sequence[Entry]], Awaitable[Message]]
    ) -> Message:
        pages = pages_of(offset, length)
        self.in_use.update(pages)
        try:
            return await retried(lambda: self._walk(offset, length, write), access)
        finally:
            self.in_use.subtract(pages)

    async def _walk(self, offset: int, length: int, write: bool) -> Sequence[Entry]:
        needed = RIGHT_WRITE if write else RIGHT_READ
        pages = pages_of(offset, length)
        for _ in range(RETRIES_MAX):
            found = [self.table.get(page) for page in pages]
            entries = [entry for entry in found if entry is not None and entry.rights & needed]
            if len(entries) == len(pages):
                if write:
                    self._written.update(pages)
                return entries
            await self._wire.ask(
                "fault", segment=self.segment, first=pages.start, end=pages.stop, write=write, commit=self._granted
            )
        raise RetriesExhausted(f"pages {pages} of segment {self.segment} were recalled {RETRIES_MAX} times in a row")

    def _granted(self, answer: Message) -> None:
        for page, pfn, generation, rights in answer["granted"]:
            self.table[page] = Entry(pfn, generation, rights)


def _frames(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    return [(entry.pfn, entry.generation) for entry in entries]
