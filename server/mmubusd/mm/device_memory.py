"""Whose memory a frame is: a device's own, private or coherent, and the machine's.

A device's memory is made of frames that are flagged DEVICE. Private ones only their owner reaches: a page there has an
entry that is not present, and whoever else comes to it brings it back. Coherent ones everybody reaches, the CPU and
other devices; what they are not is the machine's to manage: they are not aged, reclaimed, merged or balanced, nor
pinned for the long term. Kernel: MEMORY_DEVICE_PRIVATE and MEMORY_DEVICE_COHERENT, include/linux/memremap.h, v6.12.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmubusd.mm.addr import PAGE_SHIFT
from mmubusd.mm.frame import DEVICE
from mmubusd.mm.free_frames import BLOCK_FRAMES
from mmubusd.mm.swapops import mapped_frames

if TYPE_CHECKING:
    from mmubusd.mm.frame import FrameTable
    from mmubusd.mm.memcontrol import MemCgroup
    from mmubusd.mm.mm import Mm


class Select(IntFlag):
    """Which pages move. Kernel: enum migrate_vma_direction, include/linux/migrate.h, v6.12."""

    SYSTEM = 1
    DEVICE_PRIVATE = 2
    DEVICE_COHERENT = 4


ANY_DEVICE = Select.DEVICE_PRIVATE | Select.DEVICE_COHERENT


class _Held(NamedTuple):
    owner: int
    generation: int
    coherent: bool


class DeviceMemory:
    """The frames that are devices'. has_coherent: there are, or have been, coherent ones."""

    __slots__ = ("_blocks", "_frames", "_held", "has_coherent")

    def __init__(self, frames: FrameTable) -> None:
        self._frames = frames
        self._held: dict[int, _Held] = {}
        self._blocks: dict[int, int] = {}  # those that were allocated together: the generation of each's first frame
        self.has_coherent = False

    def alloc(self, owner: int, coherent: bool = False, memcg: MemCgroup | None = None) -> int:
        """A frame of the owner's memory, without a mapping. Args: memcg: who pays. Raises: OutOfFrames."""
        pfn = self._frames.alloc(DEVICE, 0, 0, memcg=memcg)
        self._held[pfn] = _Held(owner, self._frames.generation_at[pfn], coherent)
        self.has_coherent |= coherent
        return pfn

    def alloc_block(self, owner: int, memcg: MemCgroup | None = None) -> int:
        """Frames of the owner's private memory for a huge page, in a row; the first, or 0 if none are to be had."""
        first = self._frames.alloc_block(memcg=memcg)
        if first:
            self._frames.flags[first : first + BLOCK_FRAMES] |= np.uint32(DEVICE)
            for pfn in range(first, first + BLOCK_FRAMES):
                self._held[pfn] = _Held(owner, self._frames.generation_at[pfn], False)
            self._blocks[first] = self._frames.generation_at[first]
        return first

    def is_block(self, first: int) -> bool:
        """Whether the frame is the first of those that were allocated for a huge page, which has not been split."""
        return self._blocks.get(first) == self._frames.generation_at[first]

    def split_block(self, first: int) -> None:
        """What begins with this frame, if anything does, is no huge page any more."""
        self._blocks.pop(first, None)

    def owner(self, pfn: int) -> int:
        """Whose memory the frame is; 0: the machine's."""
        held = self._find(pfn)
        return held.owner if held is not None else 0

    def is_coherent(self, pfn: int) -> bool:
        held = self._find(pfn)
        return held is not None and held.coherent

    def selected(self, pfn: int, select: Select) -> bool:
        """Whether pages that are there are among the selected ones."""
        held = self._find(pfn)
        if held is None:
            return Select.SYSTEM in select
        return (Select.DEVICE_COHERENT if held.coherent else Select.DEVICE_PRIVATE) in select

    def _find(self, pfn: int) -> _Held | None:
        if not self._frames.flags_at[pfn] & DEVICE:
            return None
        held = self._held.get(pfn)
        return held if held is not None and held.generation == self._frames.generation_at[pfn] else None


def pages_of(mm: Mm, start: int, end: int, owner: int = 0, select: Select = ANY_DEVICE) -> list[tuple[int, int]]:
    """The pages of [start, end) that are in the owner's memory, 0: in any device's: (vpn, frame), ascending."""
    memory, found = mm.memory, list[tuple[int, int]]()
    for base, ptes in mm.pgtable.spans(start >> PAGE_SHIFT, end >> PAGE_SHIFT):
        pfns = mapped_frames(ptes)
        for at in np.flatnonzero(memory.frames.flags[pfns] & np.uint32(DEVICE)).tolist():
            pfn = int(pfns[at])
            if owner in (0, memory.device_memory.owner(pfn)) and memory.device_memory.selected(pfn, select):
                found.append((base + at, pfn))
    return found
