"""What a device holds: translations as numpy arrays, and pins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from mmu.v1 import device_pb2 as pb

from mmubus.linux import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from mmubus.registration import Registration

__all__ = ["NO_PFN", "RIGHT_READ", "RIGHT_WRITE", "Pin", "Translations"]

NO_PFN = 0xFFFF_FFFF_FFFF_FFFF
"""The pfn of a page that has no translation."""
RIGHT_READ, RIGHT_WRITE = 1, 2

Frames: TypeAlias = "tuple[list[int], list[int]]"
"""pfns and generations, as an access presents them."""


@dataclass(frozen=True, slots=True)
class Translations:
    """Translations of consecutive pages.

    Attributes:
        start: address of the first page.
        pfns: uint64[n]; NO_PFN: no translation.
        generations: uint32[n]; another generation is another life of that frame.
        rights: uint8[n]; RIGHT_READ | RIGHT_WRITE, 0: none.
        as_of_seq: the last notice that was put into this session's outbox before the grant; 0 for snapshots and pins.
        states: uint8[n], of snapshots: 0 none, 1 present, 2 zero page, 3 in this registration's own private memory,
            4 in its own coherent memory, 5 in another's, 0xff no mapping or not readable; else empty.
        orders: uint8[n], of snapshots: one entry of the page table maps 2 ** order pages; else empty.
    """

    start: int
    pfns: npt.NDArray[np.uint64]
    generations: npt.NDArray[np.uint32]
    rights: npt.NDArray[np.uint8]
    as_of_seq: int
    states: npt.NDArray[np.uint8]
    orders: npt.NDArray[np.uint8]

    @property
    def end(self) -> int:
        """The address after the last page."""
        return self.start + (len(self.pfns) << PAGE_SHIFT)

    def __len__(self) -> int:
        return len(self.pfns)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """(address, pfn, generation, rights) of each page that has a translation."""
        addresses = range(self.start, self.end, PAGE_SIZE)
        for entry in zip(addresses, self.pfns.tolist(), self.generations.tolist(), self.rights.tolist(), strict=True):
            if entry[1] != NO_PFN:
                yield entry


def translations_of(
    message: pb.Translations, as_of_seq: int = 0, states: bytes = b"", orders: bytes = b""
) -> Translations:
    """The value of a message."""
    return Translations(
        message.start,
        np.array(message.pfns, dtype=np.uint64),
        np.array(message.generations, dtype=np.uint32),
        np.frombuffer(message.rights, dtype=np.uint8),
        as_of_seq,
        np.frombuffer(states, dtype=np.uint8),
        np.frombuffer(orders, dtype=np.uint8),
    )


@dataclass(frozen=True, slots=True)
class Pin:
    """Pages that are pinned: their frames stay, whatever happens to the addresses. Made by `Registration.pin`."""

    registration: Registration
    id: int
    translations: Translations

    async def read(self, offset: int, length: int) -> bytes:
        """Read through the pin. Args: offset: bytes from the start of the pinned range. Raises: CallFailed."""
        pfns, generations = self._frames(offset, length)
        return await self.registration.dma_read(
            self.translations.start + offset, length, pfns, generations, pin=self.id
        )

    async def write(self, offset: int, data: bytes) -> None:
        """Write through the pin. Args: offset: bytes from the start of the pinned range. Raises: CallFailed."""
        pfns, generations = self._frames(offset, len(data))
        await self.registration.dma_write(self.translations.start + offset, data, pfns, generations, pin=self.id)

    async def unpin(self, *, dirty: bool = False) -> None:
        """Give the pin back. Args: dirty: the device wrote to it. Raises: CallFailed."""
        await self.registration.unpin(self.id, dirty=dirty)

    def _frames(self, offset: int, length: int) -> Frames:
        first, last = offset >> PAGE_SHIFT, (offset + max(length, 1) - 1) >> PAGE_SHIFT
        return (
            self.translations.pfns[first : last + 1].tolist(),
            self.translations.generations[first : last + 1].tolist(),
        )
