"""Large folios of private memory of which something is mapped no longer: the deferred split queue.

A frame that has lost its last reference stays with its folio as long as anybody has another page of it, since a folio
is freed as a whole. Splitting it frees such frames at once; that is left until memory is short, or until somebody wants
to reclaim the rest.

    mapped ──last mapping goes──► kept ──the folio is split, or its last page goes──► free

Kernel: deferred_split_folio(), mm/huge_memory.c, v6.18.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm.free_frames import BLOCK_FRAMES, BLOCK_ORDER, Pfns

if TYPE_CHECKING:
    from mmubusd.mm.frame import FrameTable


class PartiallyMapped:
    """Frames that are kept for their folios' sake.

    Args: member: the flags that a frame of a large folio has under the mask; kept: the flag that says it is kept;
        apart: that it waits for a round; failed: that its mark holds a reference.
    Attributes: queue: the folios by their first frames, in the order in which they lost a page.
    """

    __slots__ = ("_apart", "_failed", "_frames", "_kept", "_mask", "_member", "queue")

    def __init__(self, frames: FrameTable, *, mask: int, member: int, kept: int, apart: int, failed: int) -> None:
        self._frames = frames
        self._mask, self._member = mask, member
        self._kept, self._apart, self._failed = kept, apart, failed
        self.queue: dict[int, None] = {}

    def settle(self, pfns: Pfns) -> Pfns:
        """These frames have no reference any more: those of folios that are in use are kept.

        Args: pfns: shape (n,), no frame twice. Returns: which frames are to be freed, those that were kept included.
        """
        frames = self._frames
        large = frames.flags[pfns] & np.uint32(self._mask) == self._member
        if not large.any():
            return pfns
        free = [pfns[~large]]
        for head in np.unique(pfns[large] & -BLOCK_FRAMES).tolist():
            members = self.members(head)
            flags = frames.flags[members]
            marks = (flags & np.uint32(self._kept) != 0).astype(np.int32) + (flags & np.uint32(self._failed) != 0)
            if (frames.refcount[members] > marks).any():
                self._keep(head, pfns[large & (pfns & -BLOCK_FRAMES == head)])
            else:
                frames.refcount[members[flags & np.uint32(self._kept) != 0]] = 0
                self.queue.pop(head, None)
                free.append(members[frames.refcount[members] == 0])
        return np.concatenate(free)

    def members(self, head: int) -> Pfns:
        """The frames of the folio that begins with this one: shape (n,), ascending."""
        flags = self._frames.flags[head : head + BLOCK_FRAMES]
        return np.flatnonzero(flags & np.uint32(self._mask) == self._member) + head

    def _keep(self, head: int, pfns: Pfns) -> None:
        frames = self._frames
        frames.quarantine_nr -= int(np.count_nonzero(frames.flags[pfns] & np.uint32(self._apart)))
        frames.flags[pfns] = frames.flags[pfns] & ~np.uint32(self._apart) | np.uint32(self._kept)
        frames.refcount[pfns] = 1
        self.queue[head] = None

    def let_go(self, pfns: Pfns) -> Pfns:
        """Frames of a folio that has been split: those that were kept have no reason any more. Returns: which."""
        frames = self._frames
        self.queue.pop(int(pfns[0]) & -BLOCK_FRAMES, None)
        kept: Pfns = pfns[frames.flags[pfns] & np.uint32(self._kept) != 0]
        frames.flags[kept] &= ~np.uint32(self._kept)
        return kept


assert BLOCK_FRAMES == 1 << BLOCK_ORDER
