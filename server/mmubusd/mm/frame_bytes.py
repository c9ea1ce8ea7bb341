"""The bytes of page frames, in one store, and the poison in those that are free.

Bytes are lazy. WRITTEN: the store holds the page's bytes; without it the page reads as zeros and costs nothing. SOILED:
the store holds old bytes or poison there, to be cleared before anyone looks.
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.free_frames import Pfns

ZERO_PAGE = bytes(PAGE_SIZE)
POISON = 0xAA
POISON_PAGE = bytes([POISON]) * PAGE_SIZE
DAMAGED_MAX = 1024
"""Damaged frames that are remembered until somebody looks."""

# Frame flags, beside those of frame.
RESERVED = 1 << 0  # the zero page
WRITTEN = 1 << 19
SOILED = 1 << 20


class FrameBytes:
    """What is in the frames.

    Args: frames_nr: how many; store: their bytes, zero-filled, or None for anonymous memory of our own.
    Attributes: flags, generation: of each frame, kept by `frame`; damaged: frames that were written while free, as
        pfn and the generation that had ended.
    """

    def __init__(self, frames_nr: int, store: memoryview | None) -> None:
        if store is None:
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
            own = mmap.mmap(-1, frames_nr << PAGE_SHIFT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
            store = memoryview(own)
        self.store = store.cast("B") if store.format != "B" else store
        self.data: NDArray[np.uint8] = np.frombuffer(self.store, np.uint8, frames_nr << PAGE_SHIFT).reshape(
            -1, PAGE_SIZE
        )
        self.frames_nr = frames_nr
        self.flags = np.zeros(frames_nr, np.uint32)
        self.generation = np.zeros(frames_nr, np.uint32)
        self.flags_at = self.flags.data
        self.generation_at = self.generation.data
        self.damaged: list[tuple[int, int]] = []

    def page(self, pfn: int) -> memoryview:
        """The frame's bytes in the store, valid for reading and writing."""
        self._make_written(pfn)
        return self.store[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT]

    def read(self, pfn: int, offset: int = 0, length: int = PAGE_SIZE) -> bytes:
        if not self.flags_at[pfn] & WRITTEN:
            return ZERO_PAGE[:length]
        start = (pfn << PAGE_SHIFT) + offset
        return bytes(self.store[start : start + length])

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        if not self.flags_at[pfn] & WRITTEN:
            self._make_written(pfn)
        start = (pfn << PAGE_SHIFT) + offset
        self.store[start : start + len(data)] = data

    def zero(self, pfn: int, offset: int = 0, length: int = PAGE_SIZE) -> None:
        if self.flags_at[pfn] & WRITTEN:
            self.write(pfn, offset, ZERO_PAGE[:length])

    def is_zero(self, pfn: int) -> bool:
        """Whether all bytes of the page are 0."""
        return not self.flags_at[pfn] & WRITTEN or not self.data[pfn].any()

    def copy(self, source: int, target: int) -> None:
        """Copy a page's bytes to a frame just allocated; a page never written stays free of cost."""
        if self.flags_at[source] & WRITTEN:
            if self.flags_at[target] & SOILED:
                self._check_poison(target)
            self.data[target] = self.data[source]
            self.flags_at[target] |= WRITTEN | SOILED

    def settle(self, pfns: Pfns, write: bool) -> None:
        """Someone will reach these frames through the store itself: make it hold what the pages hold.

        write: they may also be written there, so from now on the store is what counts.
        """
        for pfn in pfns[self.flags[pfns] & (WRITTEN | RESERVED) == 0].tolist():
            if write:
                self._make_written(pfn)
            elif self.flags_at[pfn] & SOILED:
                self._check_poison(pfn)
                self.data[pfn] = 0
                self.flags_at[pfn] &= ~SOILED

    def _make_written(self, pfn: int) -> None:
        assert pfn, "the zero page is never written"
        flags = self.flags_at[pfn]
        if not flags & WRITTEN:
            if flags & SOILED:
                self._check_poison(pfn)
                self.data[pfn] = 0
            self.flags_at[pfn] = flags | WRITTEN | SOILED

    # Poison

    def _check_poison(self, pfn: int) -> None:
        """The frame is used again: did anyone write to it while it was free? Requires: SOILED, not WRITTEN."""
        start = pfn << PAGE_SHIFT
        if bytes(self.store[start : start + PAGE_SIZE]) != POISON_PAGE and len(self.damaged) < DAMAGED_MAX:
            self.damaged.append((pfn, (self.generation_at[pfn] - 1) & 0xFFFFFFFF))
