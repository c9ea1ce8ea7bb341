"""A machine without memory: what the notifier core asks of `mm`, and nothing else.

For tests of rounds, sessions and outboxes, whose operations are written out in the test. Whatever needs real pages
uses the real `Memory`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from mmubusd.mm.errno import MmError
from mmubusd.mm.range_lock import Grants


class Frames:
    def __init__(self, frames_nr: int) -> None:
        self.generation = np.zeros(frames_nr, np.uint32)
        self.free_nr = frames_nr
        self.damaged: list[tuple[int, int]] = []


@dataclass(eq=False)
class FakeMm:
    id: int
    name: str = ""
    notified: bool = False
    alive: bool = True


@dataclass
class FakeMemory:
    """Exports and dirty marks are remembered; frames have generations and nothing else."""

    frames: Frames = field(default_factory=lambda: Frames(64))
    mms: dict[int, FakeMm] = field(default_factory=dict)
    granted: Grants = field(default_factory=Grants)
    exported: dict[int, set[int]] = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    killed: list[FakeMm] = field(default_factory=list)
    low_watermark: int = 0

    def create_mm(self, name: str = "") -> FakeMm:
        mm = FakeMm(len(self.mms) + 1, name)
        self.mms[mm.id] = mm
        return mm

    def mm(self, mm_id: int) -> FakeMm:
        try:
            return self.mms[mm_id]
        except KeyError:
            raise MmError("ESRCH", f"there is no address space {mm_id}") from None

    def set_dirty(self, pfns: Iterable[int]) -> None:
        self.dirty.update(pfns)

    def export(self, pfn: int, exporter: int) -> None:
        self.exported.setdefault(pfn, set()).add(exporter)

    def unexport(self, pfn: int, exporter: int) -> None:
        self.exported.get(pfn, set()).discard(exporter)

    def exporters(self, pfn: int) -> frozenset[int]:
        return frozenset(self.exported.get(pfn, ()))
