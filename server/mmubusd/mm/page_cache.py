"""The page cache of one file: which frame holds which page.

Tables of 512 frame numbers, like leaf page tables; 0 is "not cached" (frame 0, the zero page, is never cached).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.free_frames import Pfns

TABLE_SHIFT = 9
TABLE_PAGES = 1 << TABLE_SHIFT
TABLE_MASK = TABLE_PAGES - 1


class PageCache:
    """Frames by page index. Kernel: struct address_space's i_pages."""

    __slots__ = ("_at", "_tables", "nr")

    def __init__(self) -> None:
        self._tables: dict[int, NDArray[np.uint32]] = {}
        self._at: dict[int, memoryview] = {}
        self.nr = 0

    def get(self, index: int) -> int:
        """The frame, or 0."""
        table = self._at.get(index >> TABLE_SHIFT)
        return table[index & TABLE_MASK] if table is not None else 0

    def set(self, index: int, pfn: int) -> None:
        """Put in a frame where there is none."""
        number = index >> TABLE_SHIFT
        table = self._at.get(number)
        if table is None:
            self._tables[number] = np.zeros(TABLE_PAGES, np.uint32)
            table = self._at[number] = self._tables[number].data
        assert table[index & TABLE_MASK] == 0, "an index is cached once"
        table[index & TABLE_MASK] = pfn
        self.nr += 1

    def set_many(self, first: int, pfns: Pfns) -> None:
        """set() for consecutive indexes."""
        done = 0
        while done < len(pfns):
            number, at = (first + done) >> TABLE_SHIFT, (first + done) & TABLE_MASK
            part = pfns[done : done + TABLE_PAGES - at]
            if number not in self._tables:
                self._tables[number] = np.zeros(TABLE_PAGES, np.uint32)
                self._at[number] = self._tables[number].data
            self._tables[number][at : at + len(part)] = part
            done += len(part)
        self.nr += len(pfns)

    def replace(self, index: int, pfn: int) -> None:
        """Another frame takes the place."""
        self._at[index >> TABLE_SHIFT][index & TABLE_MASK] = pfn

    def delete(self, index: int) -> int:
        """Take the page out; the frame that held it."""
        table = self._at[index >> TABLE_SHIFT]
        pfn: int = table[index & TABLE_MASK]
        assert pfn, "only what is cached is deleted"
        table[index & TABLE_MASK] = 0
        self.nr -= 1
        return pfn

    def window(self, first: int, last: int) -> NDArray[np.uint32]:
        """The frames of [first, last), 0 where there is none; within one table it is the table itself."""
        number = first >> TABLE_SHIFT
        if last - 1 >> TABLE_SHIFT == number:
            table = self._tables.get(number)
            if table is not None:
                base = number << TABLE_SHIFT
                return table[first - base : last - base]
            return np.zeros(last - first, np.uint32)
        found = np.zeros(last - first, np.uint32)
        for number, table in self._tables.items():
            base = number << TABLE_SHIFT
            a, b = max(first, base), min(last, base + TABLE_PAGES)
            if a < b:
                found[a - first : b - first] = table[a - base : b - base]
        return found

    def missing(self, first: int, last: int) -> list[int]:
        """The indexes of [first, last) that are not cached."""
        return (np.flatnonzero(self.window(first, last) == 0) + first).tolist() if first < last else []

    def items(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """(index, frame) of every cached page of [first, last), ascending, as they are when each table is reached."""
        for number in sorted(self._tables):
            base = number << TABLE_SHIFT
            if base + TABLE_PAGES <= first or (last is not None and base >= last):
                continue
            table = self._tables[number]
            for at in np.flatnonzero(table).tolist():
                index = base + at
                if index >= first and (last is None or index < last):
                    yield index, int(table[at])
