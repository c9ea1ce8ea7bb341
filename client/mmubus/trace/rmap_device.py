"""Exported frames: what a device knows that is told of frames, and not of addresses.

What an address shows may change while the frame stays exported: the frame lives on where it still is. Whoever reads by
address must ask again when the frame that it knew has gone.
"""

from __future__ import annotations

from mmubus.device import NO_PFN, Translations
from mmubus.errors import MmuBusError, RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SIZE
from mmubus.notifier import RmapNotifier
from mmubus.registration import Registration

__all__ = ["Frames"]

STALE_RETRIES = 3


class Frames(RmapNotifier):
    """The exported frames of all address spaces. Register it on the rmap list."""

    def __init__(self) -> None:
        self._generations: dict[int, int] = {}  # of exported pfns
        self._at: dict[tuple[int, int], int] = {}  # (mm, address) -> pfn, of the latest export

    def invalidate_page(self, page: int, must_evict: bool) -> None:
        self._generations.pop(page, None)

    def invalidated_everything(self, why: str) -> None:
        self._generations.clear()

    async def export(self, mm: int, start: int, end: int) -> None:
        """Export pages that have a frame. Raises: MmuBusError; what was known of these addresses is forgotten then."""

        def commit(translations: Translations) -> None:
            for address, pfn, generation, _ in translations:
                self._generations[pfn] = generation
                self._at[mm, address] = pfn

        try:
            await self._registered().export(mm, start, end, commit=commit)
        except MmuBusError:
            for address in range(start, end, PAGE_SIZE):
                self._at.pop((mm, address), None)
            raise

    async def read(self, mm: int, address: int, length: int) -> bytes:
        """The first bytes of a page. Raises: MmuBusError."""
        for _ in range(STALE_RETRIES):
            pfn = self._at.get((mm, address), NO_PFN)
            if pfn not in self._generations:
                await self.export(mm, address, address + PAGE_SIZE)
                pfn = self._at[mm, address]
            try:
                return await self._registered().dma_read(0, length, [pfn], [self._generations[pfn]])
            except StaleTranslation:
                self._generations.pop(pfn, None)
        raise RetriesExhausted(f"{address:#x} was stale {STALE_RETRIES} times in a row")

    def _registered(self) -> Registration:
        assert self.registration is not None, "to be registered first"
        return self.registration
