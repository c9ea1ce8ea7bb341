"""The driver of the bus: every input goes in with the time, every output is delivered, one timer is armed.

    a request, an acknowledgement, the timer
        └─ bus.<input>(…, now)                    the pure core changes
             └─ pump()                            in the same turn of the loop, no task switch between
                  ├─ bus.finished   → the callback that came with each operation (its `tag`)
                  ├─ bus.ready      → the writer of each session is woken
                  └─ next_deadline  → the timer, if it must go off earlier than it would

Everything here is plain functions on one loop, so an input with all its consequences is atomic.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from structlog.typing import FilteringBoundLogger

from mmubusd.mm.memory import Memory
from mmubusd.notify import Draining, Operation, Session
from mmubusd.rpc.authority import Authority
from mmubusd.rpc.commits import Commits
from mmubusd.rpc.config import Settings
from mmubusd.rpc.errors import Alarm
from mmubusd.rpc.processes import Processes
from mmubusd.rpc.quota import Quotas
from mmubusd.rpc.tally import Tally
from mmubusd.rpc.tracing import Tracing
from mmubusd.state import Core

__all__ = ["Driver", "Ended", "SessionStream"]

T = TypeVar("T")

FULL_LOOK_S = 0.1
"""While the disk of the state is full, its deadlines are looked at so often."""

Ended = Callable[[Operation[T]], None]
"""Called once with an operation that has ended."""


class SessionStream(Protocol):
    """What carries a session's notices to its client."""

    def wake(self) -> None:
        """There is something to send."""

    def supersede(self) -> None:
        """Another stream carries the session now."""

    def drain(self, seconds: float) -> None:
        """Tell the client that the server stops in so many seconds."""


class Driver:
    """Owns the bus of one server.

    Attributes:
        draining: no new work is taken any more.
        stalls_nr, stalled_s: times that the loop was late by more than the allowance, and by how much in all.
    """

    def __init__(
        self,
        memory: Memory,
        bus: Core,
        settings: Settings,
        alarm: Alarm,
        log: FilteringBoundLogger,
        authority: Authority,
    ) -> None:
        self.memory = memory
        self.bus = bus
        self.settings = settings
        self.alarm = alarm
        self.log = log
        self.authority = authority
        self.processes = Processes(self._process_died, log)
        self.tally = Tally()
        self.quotas = Quotas(self)
        self.tracing: Tracing | None = None
        self.commits: Commits | None = None
        self._loop = asyncio.get_running_loop()
        # The loops' own clock; uvloop's shows whole milliseconds, and a round takes less. A state that is
        # recovered goes on at the time at which it was left.
        self._ahead_s = 0.0 if bus.seen < 0 else time.monotonic() - bus.seen
        self.now = time.monotonic if not self._ahead_s else lambda: time.monotonic() - self._ahead_s
        self.started_at = self.now()
        self.stalls_nr = 0
        self.stalled_s = 0.0
        self._open_nr = sum(not operation.done for operation in bus.running.values())
        self.draining = False
        self._idle: asyncio.Future[None] | None = None
        self._streams: dict[int, SessionStream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._pumping = False

    # Operations.

    def admit(self) -> None:
        """Raises: Draining when no new work is taken any more, MmError ENOSPC while nothing can be kept."""
        if self.draining:
            raise Draining("the server stops soon and takes no new work; another one may")
        if self.commits is not None:
            self.commits.admit()

    def submit(self, begin: Callable[..., Operation[T]], *args: object, then: Ended[T], **options: object) -> None:
        """Begin an operation of the bus.

        Args:
            begin: a method of the bus that takes args, now and options and returns an operation.
            then: called with the operation when it has ended, before this returns when nobody had to be waited for.
        Raises: what begin raises; then is not called in that case.
        """
        if self.commits is not None:
            self.commits.admit()
        begin(*args, self.now(), tag=then, **options)
        self._open_nr += 1
        self.pump()

    async def run(self, begin: Callable[..., Operation[T]], *args: object, **options: object) -> T:
        """Begin an operation of the bus and wait for it.

        Returns: its result. Raises: its error.
        Cancellation: the operation goes on; only its result is lost.
        """
        ended: asyncio.Future[Operation[T]] = self._loop.create_future()

        def then(operation: Operation[T]) -> None:
            if not ended.done():
                ended.set_result(operation)

        if self.commits is not None and self.commits.pause is not None and not options.get("within"):
            await asyncio.shield(self.commits.pause)
        self.submit(begin, *args, then=then, **options)
        operation = ended.result() if ended.done() else await ended
        return operation.value()

    # Sessions.

    def carry(self, session: Session, stream: SessionStream) -> None:
        """From now on this stream carries the session; one that did before is told to end."""
        before = self._streams.get(session.id)
        self._streams[session.id] = stream
        if before is not None:
            before.supersede()

    def drop(self, session: Session, stream: SessionStream) -> bool:
        """The stream has ended. Returns: whether it was the one that carried the session."""
        if self._streams.get(session.id) is not stream:
            return False
        del self._streams[session.id]
        return True

    # The bus's outputs.

    def pump(self) -> None:
        """Deliver what the bus has put out, until there is no more. Call it after every input."""
        if self._pumping:
            return  # a callback of an ended operation gave another input; the loop below goes on with it
        bus, finished = self.bus, self.bus.finished
        if not finished and not bus.ready and self._idle is None:
            self._arm()
            return
        self._pumping = True
        try:
            while finished:
                ended = finished[:]
                finished.clear()
                self._open_nr -= len(ended)
                for operation in ended:
                    then, operation.tag = operation.tag, None  # the caller holds the operation: not for ever
                    if then is not None:  # its caller went with the server that began it
                        then(operation)  # type: ignore[operator]
            if bus.ready:
                for session in bus.drain_ready():
                    if session.fenced is not None and not session.withheld:
                        self.processes.forget(session)
                    if session.fenced is not None or session.late_seq:
                        self._tell_log(session)
                    stream = self._streams.get(session.id)
                    if stream is not None:
                        stream.wake()
        finally:
            self._pumping = False
        self._arm()
        if self._idle is not None and not self._open_nr and not self._idle.done():
            self._idle.set_result(None)

    def _tell_log(self, session: Session) -> None:
        """Who is late, and who was fenced: with the numbers by which rounds and notices are found elsewhere."""
        fenced = session.fenced
        who = {"session": session.id, "name": session.name}
        if fenced is not None:
            self.log.warning(
                "session fenced", **who, round=fenced.round, seq=fenced.seq, waited_s=round(fenced.waited_s, 3),
                because=fenced.message,
            )  # fmt: skip
        elif session.late_seq != session.late_told:
            self.log.warning("session is late", **who, seq=session.late_seq, waiting=session.waiting_nr)

    def _arm(self) -> None:
        """See to it that the timer goes off no later than the next deadline.

        A timer that goes off too early costs one look; moving it with each notice would cost more.
        """
        deadline = self.bus.next_deadline()
        if deadline is None or deadline >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline + self._ahead_s, self._expire)

    def _expire(self) -> None:
        """The timer went off. How late it is, the bus sees from the time; our own stall counts against nobody."""
        now = self.now()
        if self.commits is not None and self.commits.full:
            # Nothing is sent, so nobody can answer: the bus's clock stands still.
            self._timer = self._loop.call_later(FULL_LOOK_S, self._expire)
            self.bus.stalled(FULL_LOOK_S)
            return
        late_s = now - self._timer_at
        if late_s > self.bus.limits.stall_allowance_s:
            self.stalls_nr += 1
            self.stalled_s += late_s
            self.log.warning("the loop was late; it counts against no client", seconds=round(late_s, 3))
        self._timer, self._timer_at = None, float("inf")
        try:
            self.bus.expire(now)
            self.pump()
        except Exception as error:
            # Nobody is above a timer, and the loop would only log it.
            self.alarm.ring(error)

    # The end.

    async def drain(self, seconds: float) -> bool:
        """Take no new work, tell every session, and wait for the open operations.

        Returns: whether all of them ended within so many seconds.
        """
        self.draining = True
        self.bus.drain()
        for stream in list(self._streams.values()):
            stream.drain(seconds)
        self.pump()
        if not self._open_nr:
            return True
        self._idle = self._loop.create_future()
        try:
            await asyncio.wait_for(self._idle, seconds)
        except TimeoutError:
            return False
        return True

    def _process_died(self, session: Session) -> None:
        self.log.warning("the process of a session has ended", session=session.id, name=session.name)
        self.bus.process_died(session, self.now())
        self.pump()

    def close(self) -> None:
        """Disarm the timer, watch no process."""
        self.processes.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
