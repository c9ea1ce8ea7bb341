"""The runner: takes operations from yield to yield, and parks them on what they wait for.

    runs ──yields a notification──► waits for its round ──ended──► runs on, and keeps the round's bar
      │ ──yields LockWait─────────► waits for a range lock ──granted──┘
      │ ──yields RangeWait─────────► parked on a barred range ──opened, or its deadline──┘
      │ ──yields Section───────────► runs on; what was barred inside is open again at its end
      │ ──yields Reschedule────────► its turn comes with the next `expire`, which is due at once
      └──ends──► its rounds are closed

What an operation's rounds covered stays barred until it has ended: a walk along the reverse map tells one place after
another and changes them all at the end.

When a handler's own request closes a cycle of waiting, it is broken at once (see `deadlock`): a request that has
changed nothing yet fails, any other one is answered with the error and goes on without its caller.

Between two yields nothing else runs. What becomes runnable meanwhile is queued, so that no call is ever nested in
another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TypeVar

from mmubusd.mm.addr import PAGE_SIZE, PMD_SIZE, MmId
from mmubusd.mm.errno import MmError
from mmubusd.mm.mm import Mm
from mmubusd.mm.notification import (
    ANSWERED,
    AgePage,
    ClearYoung,
    InvalidatePage,
    InvalidateRange,
    LockWait,
    Notification,
    Reschedule,
    Section,
    TestYoung,
)
from mmubusd.mm.range_lock import Ticket
from mmubusd.notify.clock import NEVER
from mmubusd.notify.deadlock import Cycle, WaitGraph, sessions_of, tell, weakest
from mmubusd.notify.errors import NotifyError
from mmubusd.notify.operation import Operation, RangeWait, Reported, WaitedEnough
from mmubusd.notify.rounds import Rounds
from mmubusd.notify.session import Session
from mmubusd.notify.telling import KINDS

T = TypeVar("T")


class Runner:
    """Every operation that has not ended.

    Attributes: running: those that have had to wait, by id; finished: those that have ended, in order, until the
            room above empties it.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.registry = rounds.registry
        self.memory = rounds.registry.memory
        self.clock = rounds.clock
        self.running: dict[int, Operation[object]] = {}
        self.finished: list[Operation[object]] = []
        self._by_ticket: dict[Ticket, Operation[object]] = {}
        self._reports: dict[int, Mm | None] = {}
        self._graph = WaitGraph(self.running, self._by_ticket)
        self._within_nr = 0
        self._last_id = 0
        self._queue: deque[tuple[Operation[object], object]] = deque()
        self._suspects: list[Operation[object]] = []
        self.sanitizer = rounds.registry.sanitizer

    def start(
        self, generator: Generator[object, object, T], *, label: str, session: Session | None, report: bool, mm: Mm |
        None, wait_s: float, tag: object, within: int = 0,
    ) -> Operation[T]:  # fmt: skip
        """Begin an operation and run everything that can run.

        Args: within: the number of the session's notice whose handler asks for it, 0: none.
        """
        self._last_id += 1
        operation: Operation[T] = Operation(self._last_id, label, generator, session, self.clock.time, report)
        operation.tag = tag
        if wait_s < NEVER:
            operation.deadline = self.clock.time + wait_s
        if within and session is not None and self._is_open(operation, session, within):  # type: ignore[arg-type]
            operation.within = (session, within)
            self._within_nr += 1
        if report:
            self.registry.report(mm, 1)
            self._reports[operation.id] = mm
        self.rounds.counters.operations += 1
        self._advance(operation, None)  # type: ignore[arg-type]
        self.run()
        return operation

    def run(self) -> None:
        """Run until everything waits for something."""
        rounds = self.rounds
        while True:
            if rounds.ended:
                round_ = rounds.ended.popleft()
                rounds.release_ended(round_)
                self._advance(round_.operation, round_.answer())
            elif self.memory.granted:
                for ticket in self.memory.granted:
                    operation = self._by_ticket.pop(ticket, None)
                    if operation is not None:
                        self._queue.append((operation, ANSWERED))
                self.memory.granted.clear()
            elif self._queue:
                self._advance(*self._queue.popleft())
            elif rounds.woken:
                self._queue.append((rounds.woken.popleft(), True))
            elif not (self._suspects and self._break_deadlock()) and not self._start_wanted():
                return

    def _start_wanted(self) -> bool:
        """Begin what the machine itself wants to run: nobody waits for it, and its end is told to nobody."""
        memory = self.memory
        if not memory.killed and memory.frames.free_nr >= memory.low_watermark:
            return False
        wanted = memory.wanted()
        for label, generator in wanted:
            self._last_id += 1
            operation: Operation[object] = Operation(
                self._last_id,
                label,
                generator,  # type: ignore[arg-type]
                None,
                self.clock.time,
            )
            operation.done = True
            self._queue.append((operation, None))
        return bool(wanted)

    def expired(self, operation: Operation[object]) -> None:
        """It has waited enough for a lock or a range. Requires: `run` is called afterwards."""
        if operation.over:
            return
        if operation.waits_for == "range":
            assert operation.barred is not None
            operation.barred.unpark(operation)
            self._queue.append((operation, False))
        elif operation.waits_for == "lock":
            for ticket in [ticket for ticket, waiting in self._by_ticket.items() if waiting is operation]:
                del self._by_ticket[ticket]
            self._queue.append((operation, WaitedEnough()))
        elif operation.waits_for == "turn":
            self._queue.append((operation, ANSWERED))

    def _advance(self, operation: Operation[object], answer: object) -> None:
        """Resume an operation and follow it until it waits or has ended."""
        generator = operation.generator
        granted = self.memory.granted
        while True:
            if operation.round is not None:
                operation.bars.append(operation.round)
                operation.round = None
            operation.waits_for = ""
            granted.owner = operation
            try:
                wanted = generator.throw(answer) if isinstance(answer, Exception) else generator.send(answer)
            except StopIteration as stop:
                operation.over = True
                if not operation.done:
                    operation.result = stop.value
            except (MmError, NotifyError) as error:
                operation.over = True
                operation.error = operation.error or error
            if self.rounds.history.recording:
                self.rounds.history.note_freed(self.memory.frames.generation)
            if operation.over:
                self._finish(operation)
                return
            if self._waits(operation, wanted):
                self.running[operation.id] = operation
                if self._within_nr:
                    self._suspects.append(operation)
                return
            answer = True if isinstance(wanted, RangeWait) else ANSWERED

    def _waits(self, operation: Operation[object], wanted: object) -> bool:
        """Act on what an operation has yielded. Returns: false when it can go on at once."""
        if type(wanted) in KINDS:
            return self._tells(operation, wanted)  # type: ignore[arg-type]
        if isinstance(wanted, LockWait):
            if wanted.ticket.granted:
                return False
            self._by_ticket[wanted.ticket] = operation
            self._arm(operation)
            operation.waits_for = "lock"
            return True
        if isinstance(wanted, RangeWait):
            self._lift(operation)
            if not wanted.barred.covers(wanted.start, wanted.end):
                return False
            operation.barred = wanted.barred
            operation.parked_on = (wanted.start, wanted.end)
            wanted.barred.park(operation)
            self._arm(operation)
            operation.waits_for = "range"
            return True
        if isinstance(wanted, Section):
            if wanted.begins:
                operation.sections = (*operation.sections, len(operation.bars))
            else:
                *operation.sections, begun = operation.sections
                self._lift(operation, begun)
            return False
        assert isinstance(wanted, Reschedule)
        operation.waits_for = "turn"
        self.clock.arm(operation, self.clock.time)
        return True

    def _tells(self, operation: Operation[object], notification: Notification) -> bool:
        """It has called the notifiers. Returns: whether anybody has to answer."""
        if operation.report:
            operation.reported.extend(_report(notification))
        round_ = self.rounds.begin(notification, operation)
        if round_ is None:
            return False
        operation.round = round_
        operation.waits_for = "round"
        return True

    def _arm(self, operation: Operation[object]) -> None:
        if operation.deadline != operation.armed_at:
            self.clock.arm(operation, operation.deadline)

    def _lift(self, operation: Operation[object], beyond: int = 0) -> None:
        for round_ in operation.bars[beyond:]:
            self.rounds.close(round_)
        del operation.bars[beyond:]
        if operation.sections:
            operation.sections = [min(begun, beyond) for begun in operation.sections]

    def _finish(self, operation: Operation[object]) -> None:
        if operation.bars:
            self._lift(operation)
        self.running.pop(operation.id, None)
        if operation.report:
            self.registry.report(self._reports.pop(operation.id), -1)
        if operation.exiting:
            self.rounds.exited(MmId(operation.exiting))
        if operation.within is not None:
            self._within_nr -= 1
        if not operation.done:
            operation.done = True
            self.finished.append(operation)

    # Deadlocks.

    def _is_open(self, operation: Operation[object], session: Session, seq: int) -> bool:
        """Whether the handler that asks has really still to answer."""
        if not session.outbox.targets_of(seq):
            self.sanitizer.early_ack(session, seq, operation)
            return False
        notice = session.outbox.sent(seq)
        if notice.lock:
            self.sanitizer.called_back(session, notice, operation)
        return True

    def suspect(self, session: Session, seq: int) -> None:
        """A notice is late, and its client does not say which requests come from its handlers: assume that all do that
        were begun since. Without a cycle nothing comes of it. Requires: `run` is called afterwards."""
        asked = next((one for number, one, _ in session.outbox.unanswered() if number == seq), None)
        if asked is None:
            return
        for operation in list(self.running.values()):
            if operation.session is session and operation.within is None and operation.started_at >= asked.opened_at:
                operation.within = (session, seq)
                cycle = self._graph.cycle(operation)
                if cycle is None:
                    operation.within = None
                else:
                    self._within_nr += 1
                    self._suspects.append(operation)

    def _break_deadlock(self) -> bool:
        """Look for cycles through what has begun to wait. Returns: whether something can run again."""
        while self._suspects:
            operation = self._suspects.pop()
            if operation.over or not operation.waits_for:
                continue
            cycle = self._graph.cycle(operation)
            if cycle is not None:
                self._suspects.append(operation)  # it may be in another one
                self._break(cycle)
                return True
        return False

    def _break(self, cycle: Cycle) -> None:
        """EDEADLK to one request in it, and the printed cycle to everyone."""
        victim = weakest(cycle)
        lines = tell(cycle)
        story = "; ".join(lines)
        if victim.waits_for == "round":
            rest = "it has taken effect, and what it took is freed when everyone has answered, without its caller"
        else:
            rest = "nothing has changed"
        error = MmError("EDEADLK", f"{victim.name()} would wait for itself: {rest}. The cycle: {story}")
        self.sanitizer.deadlock(victim, sessions_of(cycle), lines, error.message)
        if victim.waits_for == "round":
            victim.error, victim.done = error, True
            victim.within = None
            self._within_nr -= 1
            self.finished.append(victim)
            return
        if victim.waits_for == "range":
            assert victim.barred is not None
            victim.barred.unpark(victim)
        else:
            for ticket in [ticket for ticket, waiting in self._by_ticket.items() if waiting is victim]:
                del self._by_ticket[ticket]
        self._queue.append((victim, error))


def _report(notification: Notification) -> list[Reported]:
    """As the kernel's tracepoints would show it."""
    if isinstance(notification, InvalidateRange):
        return [
            Reported("invalidate_range", notification.start, notification.end, notification.reason, notification.mm.id)
        ]
    if isinstance(notification, InvalidatePage):
        return [
            Reported("invalidate_range", address, address + PAGE_SIZE, notification.reason, notification.mm.id)
            for address in notification.addresses
        ]
    if isinstance(notification, AgePage | ClearYoung | TestYoung):
        call = "test_young" if isinstance(notification, TestYoung) else "clear_young"
        return [
            Reported(call, address, address + PAGE_SIZE, None, notification.mm.id) for address in notification.addresses
        ] + [Reported(call, block, block + PMD_SIZE, None, notification.mm.id) for block in notification.huge]
    return []
