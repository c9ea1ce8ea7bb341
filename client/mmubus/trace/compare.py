"""The books of a replay: what the kernel did beside what the bus did, operation by operation.

What is counted, and when an operation counts as different:

    err, ret        the errno or the returned value is not the recorded one
    vmas, present   the arena's mappings or resident pages after it are not (random recordings only)
    swapped, huge   likewise the pages in swap, and those that entries for huge pages map, where the recording has them
    notify          the list of notifier calls is not the recorded one, in order
    missed          kernel invalidations of which some byte was not invalidated on the bus in the same operation: each
                    is a secondary MMU that would keep a stale translation
    excess_bytes    what the bus invalidated and the kernel did not: only a cost
    unknowable      would be missed, but the recording does not tell the state that it depends on

In program recordings a fault that happens inside of a call (`during`) has its notifications in the call's line, so both
are held together before they are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmubus.trace.format import FAULTS, Notified, Operation, VmaLine

__all__ = ["Books", "Mismatch", "Outcome", "missing_bytes", "union"]

FIRST_MISMATCHES_MAX = 10
ASPECTS = ("err", "ret", "vmas", "present", "notify")
PAGES = ("present", "swapped", "huge")
"""What is compared as runs of pages; the last two are counted only where a recording has them."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one operation did on the bus, in the recording's own terms; its state is None where not asked for."""

    err: str | None = None
    ret: int | None = None
    notify: tuple[Notified, ...] = ()
    vmas: tuple[VmaLine, ...] | None = None
    present: tuple[Span, ...] | None = None
    swapped: tuple[Span, ...] | None = None
    huge: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference: which operation, in what, and both sides."""

    operation: Operation
    aspect: str
    expected: Any
    came: Any

    def as_json(self) -> dict[str, Any]:
        """The difference as --json shows it."""
        return {
            "i": self.operation.number,
            "op": self.operation.op,
            "args": list(self.operation.args),
            "differs": self.aspect,
            "expected": plain(self.expected),
            "came": plain(self.came),
        }


@dataclass(slots=True)
class _Entry:
    """A call whose line is still open: faults inside of it may follow."""

    operation: Operation
    kernel: list[Notified]
    bus: list[Notified]
    untold: Callable[[Notified], bool]


@dataclass(slots=True)
class Books:
    """Counts what differs.

    Args: notify_told: False when the recorder could not see notifications; then none are compared.
    """

    notify_told: bool = True
    operations: int = 0
    mismatched: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ASPECTS, 0))
    kernel: int = 0
    kernel_bytes: int = 0
    bus: int = 0
    bus_bytes: int = 0
    missed: int = 0
    missed_bytes: int = 0
    excess_bytes: int = 0
    unknowable: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    _open: dict[tuple[int, str], _Entry] = field(default_factory=dict)

    def enter(
        self, operation: Operation, outcome: Outcome | None, untold: Callable[[Notified], bool] = lambda notified: False
    ) -> None:
        """Enter an operation that is over.

        Args:
            outcome: what it did on the bus; None when there was nothing to replay.
            untold: whether a kernel invalidation depends on what the recording does not tell.
        """
        self.operations += 1
        bus = list(outcome.notify) if outcome is not None else []
        if outcome is not None:
            self._compare_state(operation, outcome)
        if not self.notify_told:
            self._count((), bus)
            return
        if operation.during is not None and (outer := self._open.get((operation.pid, operation.during))):
            outer.kernel += operation.notify
            outer.bus += bus
            return
        entry = _Entry(operation, list(operation.notify), bus, untold)
        if operation.op in FAULTS or operation.vmas is not None:
            self._close(entry)
        else:
            key = operation.pid, operation.op
            if before := self._open.pop(key, None):
                self._close(before)
            self._open[key] = entry

    def finish(self) -> None:
        """Close what is still open; the counts are final then."""
        for entry in self._open.values():
            self._close(entry)
        self._open.clear()
        self.mismatches.sort(key=lambda mismatch: mismatch.operation.number)
        del self.mismatches[FIRST_MISMATCHES_MAX:]

    @property
    def state_mismatched(self) -> int:
        """Differences in anything but notifications."""
        return sum(count for aspect, count in self.mismatched.items() if aspect != "notify")

    def notifications(self) -> dict[str, int]:
        """The notifications' part of the report."""
        return {
            "kernel": self.kernel,
            "kernel_bytes": self.kernel_bytes,
            "bus": self.bus,
            "bus_bytes": self.bus_bytes,
            "missed": self.missed,
            "missed_bytes": self.missed_bytes,
            "excess_bytes": self.excess_bytes,
            "unknowable": self.unknowable,
        }

    def _compare_state(self, operation: Operation, outcome: Outcome) -> None:
        if operation.err != outcome.err:
            self._differs(operation, "err", operation.err, outcome.err)
        elif operation.ret is not None and operation.ret != outcome.ret:
            self._differs(operation, "ret", operation.ret, outcome.ret)
        if operation.vmas is not None and outcome.vmas is not None and operation.vmas != outcome.vmas:
            self._differs(operation, "vmas", *only_different(operation.vmas, outcome.vmas))
        for aspect in PAGES:
            expected, came = getattr(operation, aspect), getattr(outcome, aspect)
            if expected is not None and came is not None:
                self.mismatched.setdefault(aspect, 0)
                if expected != came:
                    self._differs(operation, aspect, *only_different(expected, came))

    def _close(self, entry: _Entry) -> None:
        """Count an operation's notifications."""
        kernel, bus = entry.kernel, entry.bus
        self._count(kernel, bus)
        if kernel == bus:
            return
        self._differs(entry.operation, "notify", kernel, bus)
        held = union(spans(bus))
        for notified in kernel:
            if notified.call != "invalidate_range":
                continue
            missing = missing_bytes((notified.start, notified.end), held)
            if missing and entry.untold(notified):
                self.unknowable += 1
            elif missing:
                self.missed += 1
                self.missed_bytes += missing
        wanted = union(spans(kernel))
        self.excess_bytes += sum(missing_bytes(span, wanted) for span in held)

    def _count(self, kernel: Sequence[Notified], bus: Sequence[Notified] = ()) -> None:
        self.kernel += len(kernel)
        self.kernel_bytes += sum(notified.end - notified.start for notified in kernel)
        self.bus += len(bus)
        self.bus_bytes += sum(notified.end - notified.start for notified in bus)

    def _differs(self, operation: Operation, aspect: str, expected: Any, came: Any) -> None:
        self.mismatched[aspect] += 1
        if len(self.mismatches) < 4 * FIRST_MISMATCHES_MAX:  # some more: calls that are still open may come before them
            self.mismatches.append(Mismatch(operation, aspect, expected, came))


def spans(notified: Iterable[Notified]) -> Iterable[Span]:
    """What was invalidated; looking at young bits takes nothing away."""
    return ((one.start, one.end) for one in notified if one.call == "invalidate_range")


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans as disjoint ones, ascending, adjacent ones joined."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif start < end:
            joined.append((start, end))
    return joined


def missing_bytes(span: Span, held: Sequence[Span]) -> int:
    """Bytes of span that none of the disjoint spans in held covers."""
    start, end = span
    return end - start - sum(max(0, min(end, last) - max(start, first)) for first, last in held)


def only_different(expected: Sequence[Any], came: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What each side has and the other has not: whole lists are too long to read."""
    left, right = set(expected), set(came)
    return [one for one in expected if one not in right], [one for one in came if one not in left]


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Notified):
        return [value.call, value.start, value.end]
    if isinstance(value, VmaLine):
        return [value.start, value.end, value.protection, value.offset, value.file]
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value
