"""An operation under way: a generator of the memory manager, and what it waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from mmubusd.mm.notification import Reason

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from mmubusd.notify.barred import BarredRanges
    from mmubusd.notify.round import Round
    from mmubusd.notify.session import Session

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reported:
    """A notifier call that an operation made, as the kernel's tracepoints would show it; the contract's Notification.

    call: "invalidate_range", "clear_young" (also the flushing form) or "test_young"; start, end: bytes.
    """

    call: str
    start: int
    end: int
    reason: Reason | None
    mm: int


@dataclass(frozen=True, slots=True)
class RangeWait:
    """Yielded by a device's request: resume it with True when [start, end) is open, or with False at its deadline."""

    barred: BarredRanges
    start: int
    end: int


class WaitedEnough(Exception):
    """Thrown into a device's request that waits for a lock when its deadline has come."""


class Operation(Generic[T]):
    """One call, from `Bus.start` until it is in `Bus.finished`.

    Attributes:
        id, label, session, started_at: what it is, for whom, and since when (the bus's clock).
        done: whether `result` or `error` is set. error is MmError or NotifyError; anything else is a broken invariant
            and leaves `Bus` as it is raised.
        reported: the notifier calls that it made, in order, if they were asked for.
        waits_for: "" while it runs, else "round", "lock", "range", or "turn" (for others to run).
        round: the round that it waits for. bars: rounds that have ended, whose bars it still needs;
            sections: how many of them there were when each open Section began.
        deadline: when it gives up waiting for a lock or a range (the bus's clock); parked_on: that range.
        within: the session and the number of its notice whose handler began it and waits for it; None: nobody's.
        over: the generator has ended. An operation is done before it is over when it was part of a deadlock: its caller
            is not made to wait, and what it holds is held until everyone has answered.
        tag: for the room above; not looked at.
    """

    done = False
    result: T | None = None
    error: Exception | None = None
    round: Round | None = None
    waits_for = ""
    deadline = float("inf")
    armed_at = float("inf")
    parked_on = (0, 0)
    barred: BarredRanges | None = None
    exiting = 0
    within: tuple[Session, int] | None = None
    over = False
    tag: object = None
    reported: list[Reported] = []  # noqa: RUF012 - who reports has its own
    sections: Sequence[int] = ()

    def __init__(
        self, number: int, label: str, generator: Generator[object, object, T], session: Session | None,
        started_at: float, report: bool = False,
    ) -> None:  # fmt: skip
        """What few operations have is their class's until they have it: one is made for each call."""
        self.id = number
        self.label = label
        self.generator = generator
        self.session = session
        self.started_at = started_at
        self.report = report
        if report:
            self.reported = []
        self.bars: list[Round] = []

    def name(self) -> str:
        """For people."""
        what = f"{self.label or 'a call'} (operation {self.id})"
        return f"{what} of {self.session.name}" if self.session is not None else what

    def value(self) -> T:
        """The result of a finished operation. Raises: its error."""
        assert self.done, "the operation has not ended"
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]
