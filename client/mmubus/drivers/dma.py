"""How the drivers reach memory, and what they do when a page is lost on the way.

    entries = walk(...)          the driver's own table: what it holds now, faulted in where it is missing
    access through the entries   by the server, which checks each, or through the frames' window, unchecked
    refused as stale?            walk again. The table lost the page meanwhile: that is the race, try again.
                                 The table still has it: the driver forgot to drop it. That is a bug, and is raised.

The second half is what makes a driver honest: a retry that hides its own stale entries hides every mistake there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import Context
from typing import Any, TypeAlias, TypeVar

from mmubus.device import Translations
from mmubus.errors import MirrorVoid, RetriesExhausted, StaleTranslation
from mmubus.linux import PAGE_SHIFT, PAGE_SIZE
from mmubus.mirror import Entry
from mmubus.notifier import Notifier, RmapNotifier
from mmubus.registration import Registration
from mmubus.window import FrameWindow

__all__ = [
    "RETRIES_MAX", "Entry", "Port", "Walk", "afterwards", "alive", "entries_of", "pages_of", "retried", "stand_back",
]  # fmt: skip

RETRIES_MAX = 64  # times that one access may be overtaken by an invalidation
STAND_BACK_S = 0.001
PIECE_BYTES_MAX = 256 << 10

T = TypeVar("T")

Walk: TypeAlias = "Callable[[int, int, bool], Awaitable[Sequence[Entry]]]"
"""(address, length, write) -> the entries of every page touched; good until the next await."""


async def stand_back(attempt: int) -> None:
    """Before another attempt: two who take a page from each other in turn get nowhere unless one lets the other end."""
    if attempt:
        await asyncio.sleep(attempt * STAND_BACK_S)


def alive(notifier: Notifier | RmapNotifier) -> Registration:
    """The notifier's registration, while what it holds may be used.

    Raises: MirrorVoid when it may not: never registered, or the server cannot be heard; what ended it otherwise.
    """
    registration = notifier.registration
    if registration is None:
        raise MirrorVoid(f"{type(notifier).__name__} is not registered; see Bus.register")
    if registration.void is not None:
        raise registration.void
    if registration.endangered:
        raise MirrorVoid("the server cannot be heard, and may take everything away")
    return registration


def entries_of(translations: Translations) -> dict[int, Entry]:
    """A grant as a table: page number -> entry."""
    return {address >> PAGE_SHIFT: Entry(pfn, generation, rights) for address, pfn, generation, rights in translations}


def pages_of(start: int, length: int) -> range:
    """The page numbers that [start, start + length) touches."""
    return range(start >> PAGE_SHIFT, (start + length + PAGE_SIZE - 1) >> PAGE_SHIFT) if length else range(0)


def afterwards(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start what a notice gives rise to and its acknowledgement does not wait for: giving back, mapping again.

    It runs in a context of its own. What a handler starts otherwise counts as part of the handler, and the server then
    rightly says that the notice was acknowledged before its handler had finished.
    """
    return asyncio.create_task(work, context=Context())


async def retried(
    walk: Callable[[], Awaitable[Sequence[Entry]]], access: Callable[[Sequence[Entry]], Awaitable[T]]
) -> T:
    """Access memory through what walk finds, again for as long as pages are lost on the way.

    Raises: StaleTranslation when the table still has exactly what was refused; RetriesExhausted; what the two raise.
    """
    entries = await walk()
    for _ in range(RETRIES_MAX):
        try:
            return await access(entries)
        except StaleTranslation:
            refused, entries = entries, await walk()
            if all(one is other for one, other in zip(refused, entries, strict=True)):
                raise
    raise RetriesExhausted(f"an access was overtaken by an invalidation {RETRIES_MAX} times in a row")


class Port:
    """A device's way to memory.

    Args:
        window: reach frames through it, as hardware does, with nobody to check it; None: through the server.
        piece_bytes_max: of one access; longer ones are split, and each piece is retried by itself.
    """

    def __init__(self, window: FrameWindow | None = None, piece_bytes_max: int = PIECE_BYTES_MAX) -> None:
        self.window = window
        self._piece = piece_bytes_max

    async def read(self, notifier: Notifier, walk: Walk, address: int, length: int) -> bytes:
        """Read [address, address + length). Raises: as walk and `retried`."""
        pieces = []
        for at in range(address, address + length, self._piece):
            pieces.append(await self._read(notifier, walk, at, min(self._piece, address + length - at)))
        return b"".join(pieces)

    async def write(self, notifier: Notifier, walk: Walk, address: int, data: bytes) -> None:
        """Write data at address. What was written before an error stays written. Raises: as walk and `retried`."""
        for at in range(0, len(data), self._piece):
            await self._write(notifier, walk, address + at, data[at : at + self._piece])

    async def _read(self, notifier: Notifier, walk: Walk, address: int, length: int) -> bytes:
        async def access(entries: Sequence[Entry]) -> bytes:
            registration = alive(notifier)
            if self.window is None:
                pfns, generations = [one.pfn for one in entries], [one.generation for one in entries]
                return await registration.dma_read(address, length, pfns, generations)
            pages = b"".join(self.window.page(entry.pfn) for entry in entries)
            offset = address % PAGE_SIZE
            return pages[offset : offset + length]

        return await retried(lambda: walk(address, length, False), access)

    async def _write(self, notifier: Notifier, walk: Walk, address: int, data: bytes) -> None:
        async def access(entries: Sequence[Entry]) -> None:
            registration = alive(notifier)
            if self.window is None:
                pfns, generations = [one.pfn for one in entries], [one.generation for one in entries]
                await registration.dma_write(address, data, pfns, generations)
                return
            done, offset = 0, address % PAGE_SIZE
            for entry in entries:
                count = min(PAGE_SIZE - offset, len(data) - done)
                self.window.page(entry.pfn)[offset : offset + count] = data[done : done + count]
                done, offset = done + count, 0

        await retried(lambda: walk(address, len(data), True), access)
