"""Frames whose bytes others may change: what the server sees of them becomes part of the record.

A device on this machine writes to a frame through shared memory, and no input tells. So the bytes of every frame that
was given out for writing are looked at where the core looks at them: when a program reads the page, when it is copied,
compared or written back, and when a device says that it has written. What had changed since the last look is *seen*,
and noted beside the input under which it was. When the inputs are played again, it is put in at the same look.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SHIFT, PAGE_SIZE
from mmubusd.mm.frame import FrameTable
from mmubusd.mm.frame_bytes import RESERVED

__all__ = ["ObservedFrames", "Seen"]

Pfns = NDArray[np.int64]
Seen = tuple[tuple[int, bytes], ...]
"""What was seen under one input: at which look, and the page's bytes."""


class ObservedFrames(FrameTable):
    """A frame table that knows which frames may be written to from outside.

    Attributes: live: what is seen is noted; without, it is played. inside: an input is being done.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Given out for writing: the frame's generation, and a hash of the bytes that whoever plays the record has.
        self._shared: dict[int, tuple[int, int]] = {}
        self._looks_nr = 0
        self._seen: list[tuple[int, bytes]] = []
        self._played: dict[int, bytes] = {}
        self.live = True
        self.inside = False

    # What the room around it does with each input.

    def begin(self) -> None:
        """An input begins."""
        self._looks_nr = 0
        self.inside = True

    def take_seen(self) -> Seen:
        """The input has ended. Returns: what it saw."""
        self.inside = False
        if not self._seen:
            return ()
        seen = tuple(self._seen)
        self._seen.clear()
        return seen

    def play(self, seen: Seen) -> None:
        """The next input saw this. Requires: not live."""
        self.begin()
        self._played = dict(seen)

    def go_live(self) -> None:
        """The record has been played; from here on there is somebody who may write."""
        self.live = True
        self.inside = False
        self._shared = {
            pfn: (generation, self._hash(pfn))
            for pfn, (generation, _) in self._shared.items()
            if self.generation_at[pfn] == generation
        }

    def attach(self, store: memoryview) -> None:
        """The bytes are here from now on. Requires: they are what they were."""
        self.store = store.cast("B") if store.format != "B" else store
        self.data = np.frombuffer(self.store, np.uint8, self.frames_nr << PAGE_SHIFT).reshape(-1, PAGE_SIZE)

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        del state["store"], state["data"]
        return state | {"_shared": {pfn: (generation, 0) for pfn, (generation, _) in self._shared.items()}}

    # Looking.

    def _hash(self, pfn: int) -> int:
        return hash(bytes(self.store[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT]))

    def _look(self, pfn: int) -> None:
        known = self._shared.get(pfn) if self.inside else None
        if known is None:
            return
        if known[0] != self.generation_at[pfn]:
            del self._shared[pfn]
            return
        self._looks_nr += 1
        if not self.live:
            data = self._played.pop(self._looks_nr, None)
            if data is not None:
                self.data[pfn] = np.frombuffer(data, np.uint8)
            return
        data = bytes(self.store[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT])
        if (now := hash(data)) != known[1]:
            self._shared[pfn] = (known[0], now)
            self._seen.append((self._looks_nr, data))

    def _know(self, pfn: int) -> None:
        """The core itself has written to it."""
        known = self._shared.get(pfn)
        if known is not None:
            self._shared[pfn] = (known[0], self._hash(pfn) if self.live else 0)

    # Where the core looks, and where it writes.

    def settle(self, pfns: Pfns, write: bool) -> None:
        super().settle(pfns, write)
        if not write:
            return
        for pfn in pfns.tolist():
            if self.flags_at[pfn] & RESERVED:
                continue
            known = self._shared.get(pfn)
            if known is not None and known[0] == self.generation_at[pfn]:
                self._look(pfn)
            else:
                self._shared[pfn] = (self.generation_at[pfn], self._hash(pfn) if self.live else 0)

    def read(self, pfn: int, offset: int = 0, length: int = PAGE_SIZE) -> bytes:
        self._look(pfn)
        return super().read(pfn, offset, length)

    def is_zero(self, pfn: int) -> bool:
        self._look(pfn)
        return super().is_zero(pfn)

    def copy(self, source: int, target: int) -> None:
        self._look(source)
        super().copy(source, target)
        self._know(target)

    def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
        if pfn not in self._shared:
            super().write(pfn, offset, data)
            return
        if len(data) < PAGE_SIZE:
            self._look(pfn)
        super().write(pfn, offset, data)
        self._know(pfn)
