"""The exported frames: told of by the global rmap list, one by one, wherever a segment shows them.

    exported ──the frame goes──► recalled from everyone who has it; the answer says whether it was written
        │
        └──no segment shows it any more (its address has another frame)──► given back, written or not

A frame is given back in the background, and the two ends may meet: a notice for a frame whose giving back is on its way
waits for that, since it carries what was written; a frame that a notice takes is not ours to give back any more; and no
export may pass a giving back of the same frame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeAlias

from mmubus.device import Translations
from mmubus.drivers.dma import Entry, afterwards, alive
from mmubus.drivers.xpmem.segment import Segment, forget
from mmubus.errors import NotFound, Refuse, Unregistered
from mmubus.notifier import RmapNotifier

__all__ = ["ExportedFrames", "Recall"]

Recall: TypeAlias = "Callable[[Segment, dict[int, Entry], bool], Awaitable[bool]]"
"""(segment, entries by page, must) -> whether somebody may keep one of them, and does."""


class ExportedFrames(RmapNotifier):
    """The frames of all segments that are exported by frame. Args: recall: asks importers to let go."""

    def __init__(self, recall: Recall) -> None:
        self._recall = recall
        self._places: dict[int, set[tuple[Segment, int]]] = {}  # pfn -> where it is in segments
        self._written: set[int] = set()  # pfns that were written, until they are handed over
        self._exporting = asyncio.Lock()
        self._giving: set[asyncio.Task[None]] = set()
        self._taken: set[int] = set()  # pfns that a notice takes, until they are exported again
        self._on_the_way: dict[int, asyncio.Future[None]] = {}  # pfns whose giving back has not been answered yet

    async def export(
        self, segment: Segment, low: int, high: int, write: bool, commit: Callable[[Translations], None]
    ) -> None:
        """Get the frames of [low, high) of the segment's program. Raises: MmError, RetriesExhausted, ..."""
        async with self._exporting:
            await alive(self).export(segment.mm, low, high, write, commit=commit)

    def shown(self, segment: Segment, page: int, pfn: int) -> None:
        """A segment shows the frame from now on."""
        self._places.setdefault(pfn, set()).add((segment, page))
        self._taken.discard(pfn)

    def hidden(self, segment: Segment, entries: Mapping[int, Entry]) -> None:
        """A segment does not show these any more; frames that none shows are given back."""
        for page, entry in entries.items():
            self._places.get(entry.pfn, set()).discard((segment, page))
        self.give_back(entry.pfn for entry in entries.values())

    def wrote(self, entries: Iterable[Entry]) -> None:
        """An importer says that it wrote these."""
        self._written.update(entry.pfn for entry in entries)

    async def invalidate_page(self, page: int, must_evict: bool) -> bool:
        """A frame goes, wherever it is in segments. Returns: whether it was written."""
        if (answered := self._on_the_way.get(page)) is not None:
            await asyncio.shield(answered)
        self._taken.add(page)
        places = [(segment, at, segment.table.get(at)) for segment, at in self._places.get(page, ())]
        held = [(segment, at, entry) for segment, at, entry in places if entry is not None and entry.pfn == page]
        busy = await asyncio.gather(*(self._recall(segment, {at: entry}, must_evict) for segment, at, entry in held))
        if any(busy):
            self._taken.discard(page)
            raise Refuse  # those who have let go of it fault again
        for segment, at, entry in held:
            forget(segment, {at: entry})
        self._places.pop(page, None)
        dirty = page in self._written
        self._written.discard(page)
        return dirty

    async def invalidated_everything(self, why: str) -> None:
        await asyncio.gather(*(self.invalidate_page(pfn, True) for pfn in list(self._places)))

    def give_back(self, pfns: Iterable[int]) -> None:
        """Those that are in no segment are not exported any more; nobody waits for that."""
        task = afterwards(self._unexport(list(pfns)))
        self._giving.add(task)
        task.add_done_callback(self._giving.discard)

    async def close(self) -> None:
        """Wait until all is given back, and take the notifier off."""
        await asyncio.gather(*self._giving)
        if self.registration is not None:
            await self.registration.unregister()

    async def _unexport(self, pfns: list[int]) -> None:
        async with self._exporting:
            gone = [pfn for pfn in pfns if not self._places.get(pfn) and pfn not in self._taken]
            registration = self.registration
            if not gone or registration is None or not registration.registered:
                return
            for pfn in gone:
                self._places.pop(pfn, None)
            dirty = [pfn for pfn in gone if pfn in self._written]
            self._written.difference_update(dirty)
            answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._on_the_way = dict.fromkeys(gone, answered)
            try:
                with suppress(NotFound, Unregistered):
                    await registration.unexport(gone, dirty)
            finally:
                self._on_the_way = {}
                answered.set_result(None)
