"""What a process must have done between its fork and the moment when its notifier was attached.

Its snapshot shows mappings and page kinds; the simulated child has those of its parent at the fork. The difference is
what it did unseen: mappings that came, went or changed their protection, and pages that it has copied for itself (kind
a, where the simulated page is still shared).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmubus.inspection import Mapping, PageRun
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, Op
from mmubus.trace.format import Snapshot

__all__ = ["Repair", "repairs_of"]

PROTECTION_BITS = {"r": 1, "w": 2, "x": 4}


@dataclass(frozen=True, slots=True)
class Repair:
    """Calls that make the simulated child what its snapshot shows: (op, *args); and how much that is."""

    calls: tuple[tuple[Op, *tuple[int, ...]], ...] = ()
    mappings: int = 0
    pages: int = 0

    def plus(self, other: Repair) -> Repair:
        """Both counts; the calls are done."""
        return Repair((), self.mappings + other.mappings, self.pages + other.pages)


def repairs_of(wanted: Sequence[Snapshot], there: Sequence[Mapping], pages: Sequence[PageRun]) -> Repair:
    """Args: wanted: the snapshot; there, pages: the simulated child's mappings and present pages."""
    calls = list(_mappings(wanted, there))
    count = len(calls)
    shared = [(run.start, run.end) for run in pages if not run.exclusive]
    copied = 0
    for mapping in wanted:
        if mapping.protection[1] != "w" or mapping.protection[3] != "p":
            continue
        for first, end, kind in mapping.resident:
            if kind == "a":
                run = mapping.start + first * PAGE_SIZE, mapping.start + end * PAGE_SIZE
                for start, stop in _overlaps(run, shared):
                    calls.append((Op.WRITE, start, stop - start))
                    copied += (stop - start) >> PAGE_SHIFT
    return Repair(tuple(calls), count, copied)


def _mappings(
    wanted: Sequence[Snapshot], there: Sequence[Mapping]
) -> Iterator[tuple[Op, int, int] | tuple[Op, *tuple[int, ...]]]:
    """The calls that make the mappings alike: whatever is between two boundaries is alike all over."""
    old = [(one.start, one.end, one.protection) for one in there]
    new = [(one.start, one.end, one.protection) for one in wanted if one.end <= TASK_SIZE]
    bounds = sorted({bound for start, end, _ in old + new for bound in (start, end)})
    pending: tuple[int, int, str | None, str | None] | None = None
    for start, end in pairwise(bounds):
        has, wants = _protection(old, start), _protection(new, start)
        if pending and pending[1] == start and pending[2:] == (has, wants):
            pending = pending[0], end, has, wants
            continue
        if pending:
            yield _change(*pending)
        pending = (start, end, has, wants) if has != wants else None
    if pending:
        yield _change(*pending)


def _protection(mappings: Sequence[tuple[int, int, str]], address: int) -> str | None:
    return next((protection for start, end, protection in mappings if start <= address < end), None)


def _change(start: int, end: int, has: str | None, wants: str | None) -> tuple[Op, *tuple[int, ...]]:
    if wants is None:
        return Op.MUNMAP, start, end - start
    bits = sum(bit for letter, bit in PROTECTION_BITS.items() if letter in wants[:3])
    if has is None:
        return Op.MMAP, start, end - start, bits, int(MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED), 0, 0
    return Op.MPROTECT, start, end - start, bits


def _overlaps(run: tuple[int, int], others: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in others:
        low, high = max(run[0], start), min(run[1], end)
        if low < high:
            yield low, high
