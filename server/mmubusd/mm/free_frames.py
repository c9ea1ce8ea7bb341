"""Which page frames are free: single ones, and blocks of 512 for huge pages.

A stack of frames that have been in use, the blocks that were freed as such, and the frames from some number on that
nobody has ever used. Kernel: mm/page_alloc.c, whose buddy allocator has blocks at hand where we look for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.errno import MmError

if TYPE_CHECKING:
    from mmubusd.mm.memcontrol import MemCgroup

Pfns = NDArray[np.int64]

BLOCK_ORDER = 9
BLOCK_FRAMES = 1 << BLOCK_ORDER
"""What a huge page takes: so many frames in a row, the first a multiple of it."""


class OutOfFrames(MmError):
    """No frame is to be had. Whoever can wait has some reclaimed and tries again.

    Attributes: memcg: the group that has all that it may have; None: the machine has none left. wanted: so many.
    """

    def __init__(self, errno: str, message: str, memcg: MemCgroup | None = None, wanted: int = 1) -> None:
        super().__init__(errno, message)
        self.memcg, self.wanted = memcg, wanted


class FreeFrames:
    """The free frames of a machine, or of one NUMA node (see `free_nodes`); frame 0 is never one.

    Args: first, end: which frames there are, [first, end).
    Attributes: keeps_blocks: a huge page has been wanted: what is given back as a block stays one. untouched: the first
    frame that has never been in use.
    """

    __slots__ = ("_at", "_blocks", "_nr", "_stack", "end", "keeps_blocks", "untouched")
    nodes_nr = 1

    def __init__(self, first: int, end: int) -> None:
        self.end = end
        self.untouched = first
        self.keeps_blocks = False
        self._stack = np.zeros(end - first, np.uint32)
        self._at = self._stack.data
        self._nr = 0
        self._blocks: list[int] = []  # by their first frame

    @property
    def nr(self) -> int:
        return self._nr + self.end - self.untouched + len(self._blocks) * BLOCK_FRAMES

    def node_of(self, pfn: int) -> int:
        """The node of a frame: there is one."""
        return 0

    def nr_on(self, nodes: object) -> int:
        """nr: there is one node."""
        return self.nr

    def list(self) -> list[int]:
        """Every free frame that has been in use, for checks."""
        in_blocks = [pfn for first in self._blocks for pfn in range(first, first + BLOCK_FRAMES)]
        return [int(pfn) for pfn in self._stack[: self._nr]] + in_blocks

    def latest(self, frames_max: int) -> Pfns:
        """Frames that have been in use, those freed last first of all, then those in blocks."""
        free = self._stack[max(self._nr - frames_max, 0) : self._nr].astype(np.int64)
        for first in self._blocks[: max(frames_max - len(free), 0) // BLOCK_FRAMES]:
            free = np.concatenate((free, np.arange(first, first + BLOCK_FRAMES, dtype=np.int64)))
        return free

    # Single frames

    def take(self) -> int:
        """Raises: OutOfFrames."""
        if not self._nr and self._blocks:
            self._break_blocks(1)
        nr = self._nr
        if nr:
            self._nr = nr = nr - 1
            pfn: int = self._at[nr]
            return pfn
        if self.untouched < self.end:
            self.untouched += 1
            return self.untouched - 1
        raise OutOfFrames("ENOMEM", f"all {self.end} frames are in use")

    def take_many(self, count: int, nodes: object = None) -> Pfns:
        """All or nothing. Raises: OutOfFrames."""
        if count > self.nr:
            raise OutOfFrames("ENOMEM", f"{count} frames wanted, {self.nr} of {self.end} free")
        if count > self._nr and self._blocks:
            self._break_blocks(count)
        again = min(count, self._nr)
        taken = self._stack[self._nr - again : self._nr]
        fresh = np.arange(self.untouched, self.untouched + count - again, dtype=np.int64)
        self._nr -= again
        self.untouched += count - again
        return np.concatenate((taken[::-1].astype(np.int64), fresh))

    def take_on(self, nodes: object) -> int:
        """take(): there is one node. Raises: OutOfFrames."""
        return self.take()

    def remove(self, pfn: int) -> bool:
        """Take this frame, if it is free. Kernel: take_page_off_buddy(). Returns: whether it was."""
        if pfn >= self.untouched:
            self._push(np.arange(self.untouched, pfn + 1, dtype=np.int64))
            self.untouched = pfn + 1
        first = pfn & -BLOCK_FRAMES
        if first in self._blocks:
            self._blocks.remove(first)
            self._push(np.arange(first, first + BLOCK_FRAMES, dtype=np.int64))
        there = np.flatnonzero(self._stack[: self._nr] == pfn)
        if not there.size:
            return False
        at, self._nr = int(there[0]), self._nr - 1
        self._stack[at : self._nr] = self._stack[at + 1 : self._nr + 1].copy()
        return True

    def give(self, pfn: int) -> None:
        self._at[self._nr] = pfn
        self._nr += 1

    def give_many(self, pfns: Pfns) -> None:
        """shape (n,), no frame twice."""
        if self.keeps_blocks and len(pfns) == BLOCK_FRAMES and _is_block(pfns):
            self._blocks.append(int(pfns[0]))
        else:
            self._push(pfns)

    def _push(self, pfns: Pfns) -> None:
        self._stack[self._nr : self._nr + len(pfns)] = pfns
        self._nr += len(pfns)

    # Blocks

    def take_block(self, nodes: object = None) -> int:
        """BLOCK_FRAMES frames in a row. Returns: the first of them, or 0 if there are none."""
        self.keeps_blocks = True
        if not self._blocks and not self._take_untouched_block():
            self._find_blocks()
        return self._blocks.pop() if self._blocks else 0

    def _take_untouched_block(self) -> bool:
        first = -(-self.untouched // BLOCK_FRAMES) * BLOCK_FRAMES
        if first + BLOCK_FRAMES > self.end:
            return False
        self._push(np.arange(self.untouched, first, dtype=np.int64))
        self.untouched = first + BLOCK_FRAMES
        self._blocks.append(first)
        return True

    def _find_blocks(self) -> None:
        """Put together the blocks that lie in pieces in the stack."""
        numbers = self._stack[: self._nr] >> np.uint32(BLOCK_ORDER)
        whole = np.flatnonzero(np.bincount(numbers) == BLOCK_FRAMES)
        if whole.size:
            rest = self._stack[: self._nr][~np.isin(numbers, whole)]
            self._nr = 0
            self._push(rest.astype(np.int64))
            self._blocks += (whole << BLOCK_ORDER).tolist()

    def _break_blocks(self, count: int) -> None:
        """Have at least so many single frames, as far as blocks can give them."""
        while self._nr < count and self._blocks:
            first = self._blocks.pop()
            self._push(np.arange(first, first + BLOCK_FRAMES, dtype=np.int64))


def _is_block(pfns: Pfns) -> bool:
    """Whether these BLOCK_FRAMES frames are one block, in order."""
    first = int(pfns[0])
    return first % BLOCK_FRAMES == 0 and bool((pfns == np.arange(first, first + BLOCK_FRAMES)).all())
