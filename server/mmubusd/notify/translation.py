"""What a registration holds: a shadow page table of the translations that were given to it.

With it a round can skip those that hold nothing, a DMA access can be checked, a fence can say what was lost, and a
frame that is freed too early is noticed: its generation is then another one than when it was given out.

    granted ──► held ──ack of a notice that covers it──► gone
                  └────fence, unregister, leave────────► gone
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm.addr import PAGE_SHIFT, PTRS_PER_TABLE

if TYPE_CHECKING:
    from mmubusd.notify.registration import Registration

KEPT_MAX = 4096
"""Pages of one drop whose frames are told."""
READ, WRITE = 1, 2
"""Bits of a translation's rights."""

_LEAF_SHIFT = PAGE_SHIFT + 9
_SLOT_MASK = PTRS_PER_TABLE - 1
_RIGHTS_BITS = 2
_RIGHTS_MASK = (1 << _RIGHTS_BITS) - 1


class Held(NamedTuple):
    """One translation: the frame, its generation when it was given out, rights bits."""

    pfn: int
    generation: int
    rights: int


class Dropped(NamedTuple):
    """What a drop took away: pages, how many of their frames had been freed before it, and what they were.

    entries: pfn << 2 | rights, uint64; generations: uint32; both of shape (pages,), or None when more than KEPT_MAX.
    """

    pages: int
    freed_before: int
    entries: NDArray[np.uint64] | None = None
    generations: NDArray[np.uint32] | None = None


NOTHING = Dropped(0, 0)


class Holdings(Protocol):
    """What both kinds of table can tell."""

    held: int

    def get(self, at: int, /) -> Held | None:
        """The translation at this address, or of this frame."""

    def drop_all(self, generation: NDArray[np.uint32]) -> Dropped:
        """Everything goes; generation: that of each frame now."""

    def writable(self, generation: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Pfns of what may be written and has not been freed since."""

    def frames(self) -> list[Held]:
        """Everything that is held."""


class _Leaf:
    """Translations of 2 MiB of addresses: pfn << 2 | rights, and generations."""

    __slots__ = ("count", "entries", "entries_at", "generations", "generations_at")

    def __init__(self) -> None:
        self.entries: NDArray[np.uint64] = np.zeros(PTRS_PER_TABLE, np.uint64)
        self.generations: NDArray[np.uint32] = np.zeros(PTRS_PER_TABLE, np.uint32)
        self.entries_at = self.entries.data
        self.generations_at = self.generations.data
        self.count = 0


class TranslationTable:
    """Translations of one registration on an address space, by address.

    Attributes:
        held: pages.
        watchers, owner: where to tell which leaves have something in them; used for registrations that only want to
        hear of
            ranges that they hold. None: nobody wants to know.
    """

    __slots__ = ("_leaves", "held", "owner", "watchers")

    def __init__(self) -> None:
        self._leaves: dict[int, _Leaf] = {}
        self.held = 0
        self.watchers: dict[int, set[Registration]] | None = None
        self.owner: Registration | None = None

    def grant(
        self, start: int, pfns: NDArray[np.uint64], generations: NDArray[np.uint32], rights: NDArray[np.uint8]
    ) -> None:
        """Note what was given out for consecutive pages from start; pages with rights 0 are left as they are.

        Rights to a frame add up: a later grant with fewer takes back none that the device may still use.

        Args: pfns, generations, rights: shape (pages,).
        """
        done, pages = 0, len(pfns)
        while done < pages:
            address = start + (done << PAGE_SHIFT)
            slot = address >> PAGE_SHIFT & _SLOT_MASK
            count = min(PTRS_PER_TABLE - slot, pages - done)
            given = rights[done : done + count]
            if given.any():
                leaf = self._leaf(address >> _LEAF_SHIFT)
                which = given != 0
                entries = leaf.entries[slot : slot + count]
                before = int(np.count_nonzero(entries))
                new = pfns[done : done + count] << np.uint64(_RIGHTS_BITS) | given
                held = leaf.generations[slot : slot + count]
                same = (entries >> np.uint64(_RIGHTS_BITS) == pfns[done : done + count]) & (
                    held == generations[done : done + count]
                )
                new |= np.where(same, entries & np.uint64(_RIGHTS_MASK), np.uint64(0))  # given until it is acked away
                entries[which] = new[which]
                held[which] = generations[done : done + count][which]
                more = int(np.count_nonzero(entries)) - before
                leaf.count += more
                self.held += more
            done += count

    def get(self, address: int) -> Held | None:
        """The translation of the page at the address. O(1)."""
        leaf = self._leaves.get(address >> _LEAF_SHIFT)
        if leaf is None:
            return None
        slot = address >> PAGE_SHIFT & _SLOT_MASK
        entry = leaf.entries_at[slot]
        if not entry:
            return None
        return Held(entry >> _RIGHTS_BITS, leaf.generations_at[slot], entry & _RIGHTS_MASK)

    def holds(self, start: int, end: int) -> bool:
        """Whether anything in [start, end) is held."""
        return self.held > 0 and any(entries.any() for _, _, entries in self._spans(start, end))

    def count(self, start: int, end: int) -> int:
        """Pages held in [start, end)."""
        return sum(int(np.count_nonzero(entries)) for _, _, entries in self._spans(start, end)) if self.held else 0

    def runs(self, start: int, end: int, runs_max: int) -> list[tuple[int, int]]:
        """Where in [start, end) something is held, ascending: at most so many runs of pages, in bytes."""
        found: list[tuple[int, int]] = []
        for number, slot, entries in sorted(self._spans(start, end), key=lambda span: span[0]):
            where = np.flatnonzero(entries)
            if not len(where):
                continue
            firsts = np.concatenate(([0], np.flatnonzero(np.diff(where) != 1) + 1))
            lasts = np.concatenate((firsts[1:], [len(where)])) - 1
            base = (number << _LEAF_SHIFT) + (slot << PAGE_SHIFT)
            for a, b in zip(where[firsts].tolist(), where[lasts].tolist(), strict=True):
                low, high = base + (a << PAGE_SHIFT), base + (b + 1 << PAGE_SHIFT)
                if found and found[-1][1] == low:
                    found[-1] = (found[-1][0], high)
                elif len(found) < runs_max:
                    found.append((low, high))
                else:
                    return found
        return found

    def drop(self, start: int, end: int, generation: NDArray[np.uint32]) -> Dropped:
        """What is held in [start, end) goes. Args: generation: that of each frame now, by pfn."""
        if not self.held:
            return NOTHING
        pages = freed = 0
        gone: list[tuple[NDArray[np.uint64], NDArray[np.uint32]]] = []
        for number, slot, entries in list(self._spans(start, end)):
            which = np.flatnonzero(entries)
            if not len(which):
                continue
            leaf = self._leaves[number]
            held, generations = entries[which], leaf.generations[slot + which]
            now = generation[(held >> np.uint64(_RIGHTS_BITS)).astype(np.int64)]
            freed += int(np.count_nonzero(now != generations))
            entries[which] = 0
            if pages <= KEPT_MAX:
                gone.append((held, generations))
            pages += len(which)
            leaf.count -= len(which)
            if not leaf.count:
                self._forget(number)
        self.held -= pages
        if len(gone) == 1:
            return Dropped(pages, freed, *gone[0])
        if not gone or pages > KEPT_MAX:
            return Dropped(pages, freed)
        return Dropped(pages, freed, np.concatenate([one for one, _ in gone]), np.concatenate([two for _, two in gone]))

    def frames(self) -> list[Held]:
        """Everything that is held."""
        found: list[Held] = []
        for leaf in self._leaves.values():
            which = np.flatnonzero(leaf.entries)
            entries, generations = leaf.entries[which].tolist(), leaf.generations[which].tolist()
            found += [
                Held(entry >> _RIGHTS_BITS, generation, entry & _RIGHTS_MASK)
                for entry, generation in zip(entries, generations, strict=True)
            ]
        return found

    def writable(self, generation: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Pfns of what may be written and has not been freed since."""
        found = [_writable(leaf.entries, leaf.generations, generation) for leaf in self._leaves.values()]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def drop_all(self, generation: NDArray[np.uint32]) -> Dropped:
        return self.drop(0, 1 << 64, generation)

    def _spans(self, start: int, end: int) -> Iterator[tuple[int, int, NDArray[np.uint64]]]:
        """The parts of [start, end) that have a leaf: its number, the first slot, the entries."""
        low, high = start >> _LEAF_SHIFT, (end - 1) >> _LEAF_SHIFT
        leaves = self._leaves
        if high - low < len(leaves):
            numbers = [number for number in range(low, high + 1) if number in leaves]
        else:
            numbers = [number for number in leaves if low <= number <= high]
        for number in numbers:
            base = number << _LEAF_SHIFT
            slot = max(start - base, 0) >> PAGE_SHIFT
            last = min(end - base + (1 << PAGE_SHIFT) - 1 >> PAGE_SHIFT, PTRS_PER_TABLE)
            yield number, slot, leaves[number].entries[slot:last]

    def _leaf(self, number: int) -> _Leaf:
        leaf = self._leaves.get(number)
        if leaf is None:
            leaf = self._leaves[number] = _Leaf()
            if self.watchers is not None and self.owner is not None:
                self.watchers.setdefault(number, set()).add(self.owner)
        return leaf

    def _forget(self, number: int) -> None:
        del self._leaves[number]
        if self.watchers is not None and self.owner is not None:
            watching = self.watchers[number]
            watching.discard(self.owner)
            if not watching:
                del self.watchers[number]


def leaves_of(start: int, end: int) -> range:
    """The leaf numbers that [start, end) touches, as `TranslationTable.watchers` knows them."""
    return range(start >> _LEAF_SHIFT, ((end - 1) >> _LEAF_SHIFT) + 1)


class ExportTable:
    """Frames that one registration on the rmap list exports, by pfn.

    Attributes: held: frames.
    """

    __slots__ = ("_frames",)

    def __init__(self) -> None:
        self._frames: dict[int, Held] = {}

    @property
    def held(self) -> int:
        return len(self._frames)

    def grant(self, pfn: int, generation: int, rights: int) -> None:
        """Note an export; more rights are added to what is there."""
        before = self._frames.get(pfn)
        if before is not None and before.generation == generation:
            rights |= before.rights
        self._frames[pfn] = Held(pfn, generation, rights)

    def get(self, pfn: int) -> Held | None:
        return self._frames.get(pfn)

    def pfns(self) -> list[int]:
        return list(self._frames)

    def frames(self) -> list[Held]:
        """Everything that is held."""
        return list(self._frames.values())

    def writable(self, generation: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Pfns of what may be written and has not been freed since."""
        return _writable(*_as_arrays(self.frames()), generation)

    def drop(self, pfn: int, generation: NDArray[np.uint32]) -> Dropped:
        """One frame goes."""
        held = self._frames.pop(pfn, None)
        if held is None:
            return NOTHING
        return Dropped(1, int(int(generation[pfn]) != held.generation), *_as_arrays([held]))

    def drop_all(self, generation: NDArray[np.uint32]) -> Dropped:
        freed = sum(int(generation[pfn]) != held.generation for pfn, held in self._frames.items())
        pages = len(self._frames)
        arrays = _as_arrays(list(self._frames.values())[:KEPT_MAX])
        self._frames.clear()
        return Dropped(pages, freed, *arrays)


def _as_arrays(held: list[Held]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    entries = np.array([one.pfn << _RIGHTS_BITS | one.rights for one in held], np.uint64)
    return entries, np.array([one.generation for one in held], np.uint32)


def _writable(
    entries: NDArray[np.uint64], generations: NDArray[np.uint32], generation: NDArray[np.uint32]
) -> NDArray[np.int64]:
    which = np.flatnonzero(entries & np.uint64(WRITE))
    pfns = (entries[which] >> np.uint64(_RIGHTS_BITS)).astype(np.int64)
    live: NDArray[np.int64] = pfns[generation[pfns] == generations[which]]
    return live
