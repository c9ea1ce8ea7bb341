"""The free frames of a machine of several NUMA nodes: each node's own, and which nodes are tried in what order.

Kernel: struct zonelist, get_page_from_freelist() in mm/page_alloc.c, v6.12.
"""

from __future__ import annotations

import numpy as np

from mmubusd.mm.free_frames import FreeFrames, OutOfFrames, Pfns

Nodes = tuple[int, ...]
"""Nodes to be tried, in this order."""


class FreeNodes:
    """As FreeFrames, over the frames of each node: an equal share of the frames in a row.

    Attributes: untouched: where frames end, since who has been in use is known node by node.
    """

    __slots__ = ("_all", "_nodes", "frames_nr", "nodes_nr")

    def __init__(self, frames_nr: int, nodes_nr: int) -> None:
        self.frames_nr, self.nodes_nr = frames_nr, nodes_nr
        bounds = [-(-node * frames_nr // nodes_nr) for node in range(nodes_nr + 1)]
        self._nodes = [FreeFrames(max(1, bounds[node]), bounds[node + 1]) for node in range(nodes_nr)]
        self._all: Nodes = tuple(range(nodes_nr))

    @property
    def nr(self) -> int:
        return sum(node.nr for node in self._nodes)

    @property
    def untouched(self) -> int:
        return self.frames_nr

    @property
    def keeps_blocks(self) -> bool:
        return any(node.keeps_blocks for node in self._nodes)

    def nr_on(self, nodes: Nodes | None) -> int:
        """How many are free on these nodes; None: on all."""
        return sum(self._nodes[node].nr for node in nodes or self._all)

    def list(self) -> list[int]:
        """Every free frame, for checks."""
        return [pfn for node in self._nodes for pfn in (*node.list(), *range(node.untouched, node.end))]

    def latest(self, frames_max: int) -> Pfns:
        """Frames that have been in use, up to so many, of one node after another."""
        found: Pfns = np.zeros(0, np.int64)
        for node in self._nodes:
            found = np.concatenate((found, node.latest(frames_max - len(found))))
        return found

    def node_of(self, pfn: int) -> int:
        """The node of a frame."""
        return pfn * self.nodes_nr // self.frames_nr

    def take(self) -> int:
        """Raises: OutOfFrames."""
        return self.take_on(self._all)

    def take_on(self, nodes: Nodes) -> int:
        """A frame of the first of these nodes that has one. Raises: OutOfFrames."""
        for node in nodes:
            if self._nodes[node].nr:
                return self._nodes[node].take()
        raise OutOfFrames("ENOMEM", f"nodes {list(nodes)} have no free frame")

    def take_many(self, count: int, nodes: Nodes | None = None) -> Pfns:
        """All or nothing. Raises: OutOfFrames."""
        if count > self.nr_on(nodes):
            raise OutOfFrames("ENOMEM", f"{count} frames wanted, {self.nr_on(nodes)} free")
        taken: Pfns = np.zeros(0, np.int64)
        for node in nodes or self._all:
            part = self._nodes[node].take_many(min(count - len(taken), self._nodes[node].nr))
            taken = np.concatenate((taken, part))
        return taken

    def take_block(self, nodes: Nodes | None = None) -> int:
        """BLOCK_FRAMES frames in a row. Returns: the first of them, or 0 if there are none."""
        return next((first for node in nodes or self._all if (first := self._nodes[node].take_block())), 0)

    def remove(self, pfn: int) -> bool:
        """Take this frame, if it is free. Returns: whether it was."""
        return self._nodes[self.node_of(pfn)].remove(pfn)

    def give(self, pfn: int) -> None:
        self._nodes[self.node_of(pfn)].give(pfn)

    def give_many(self, pfns: Pfns) -> None:
        """shape (n,), no frame twice."""
        numbers = pfns * self.nodes_nr // self.frames_nr
        for node in np.unique(numbers).tolist():
            self._nodes[node].give_many(pfns[numbers == node])
