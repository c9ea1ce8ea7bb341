"""From notices to handlers to answers.

Plain handlers run here and now, on the path that reads the stream: their acknowledgement is ready before the next
notice is looked at. The first async handler of a notice turns the rest of it into a task. A notice that overlaps one
which is still running for the same notifier waits for it; all others go ahead. What takes something away is
acknowledged when the accesses to it that are under way have ended, too.

A run of notices that differ in their ranges only is one loop around the handler, until something is not plain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from mmu.v1 import session_pb2 as pb

from mmubus.acks import AckWindow, Arrival
from mmubus.errors import Busy, Refuse
from mmubus.handlers import INVALIDATE_RANGE, RANGE_END, Call, calls_of, extent, overtake, takes_away
from mmubus.linux import NotifierOp
from mmubus.outcome import Outcome, watch_lock
from mmubus.registration import Registration
from mmubus.tracing import Tracing
from mmubus.within import handling

__all__ = ["Dispatcher"]

log = logging.getLogger("mmubus")

_Running: TypeAlias = "dict[int, tuple[int, int, asyncio.Task[None]]]"
"""Notices of one registration whose handlers have not finished, by seq: what they cover, and who runs them."""


class Dispatcher:
    """Runs the handlers of one session.

    Args:
        acks: where it says what is done.
        registrations: by the server's number; what is not in it is not called.
        wake: called when there is something to tell and nobody is going to look.
        tracing: None: handlers are not traced.
    """

    def __init__(
        self,
        acks: AckWindow,
        registrations: dict[int, Registration],
        wake: Callable[[], None],
        tracing: Tracing | None = None,
    ) -> None:
        self._acks = acks
        self._registrations = registrations
        self._wake = wake
        self._tracing = tracing
        self._spans: dict[int, Any] = {}  # of traced notices whose handlers have not finished
        self._running: dict[int, _Running] = {}  # by registration

    def deliver(self, batch: pb.NoticeBatch) -> bool:
        """Handle a batch. Returns: False when notices before it are missing; nothing of it has been handled then."""
        seq, at = batch.first_seq, 0
        targets = list(batch.targets)
        acks = self._acks
        for notice, count in zip(batch.notices, batch.target_counts, strict=True):
            if seq == acks.received + 1:  # as it is nearly always
                acks.received = seq
                arrival = Arrival.NEW
            else:
                arrival = acks.arrive(seq)
                if arrival is Arrival.GAP:
                    return False
            if arrival is Arrival.NEW and not (count == 1 and self._plainly(seq, notice, targets[at])):
                self._notice(seq, notice, targets[at : at + count])
            seq += 1
            at += count
        return True

    def deliver_run(self, run: pb.NoticeRun) -> bool:
        """As `deliver`."""
        at = 0
        if run.first_seq == self._acks.received + 1 and run.op == INVALIDATE_RANGE and len(run.targets) == 1:
            at = self._run_plainly(run, run.targets[0])
        return at == len(run.starts) or self.deliver(_rest_of(run, at))

    def _run_plainly(self, run: pb.NoticeRun, target: int) -> int:
        """`_plainly`, for as many of a run as are plain, from the first on. Returns: how many it has handled."""
        registration = self._registrations.get(target)
        if registration is None or not self._is_plain(registration):
            return 0
        acks, first, mm, lock = self._acks, run.first_seq, run.mm, run.lock
        handle: Callable[..., object] = registration.notifier.invalidate_range  # type: ignore[union-attr]
        handled = 0
        said: object = None
        try:
            for start, end in zip(run.starts, run.ends, strict=True):
                if registration.busy or not registration.registered:
                    break
                said = handle(mm, start, end, lock)
                if said is not None and said is not False:
                    break
                handled += 1
        except Exception as error:
            said = error
        acks.run_done(first, handled)
        if said is not None and said is not False:
            acks.received += 1
            self._judge_plain(first + handled, _rest_of(run, handled).notices[0], registration, said)
            handled += 1
        return handled

    def _is_plain(self, registration: Registration) -> bool:
        """Nothing is under way that a notice must wait for or overtake."""
        return not (self._running or registration.busy or self._tracing is not None) and registration.registered

    def _plainly(self, seq: int, notice: pb.Notice, target: int) -> bool:
        """The most frequent notice by far, if it is plain: one call of `invalidate_range`, which says nothing but that
        it is done. Whatever else it says goes the general way.

        Returns: False when it is another notice; nothing has been done then.
        """
        registration = self._registrations.get(target)
        if registration is None or notice.op != INVALIDATE_RANGE or not self._is_plain(registration):
            return False
        said: object = None
        try:
            said = registration.notifier.invalidate_range(  # type: ignore[union-attr]  # of the op that it is
                notice.mm, notice.start, notice.end, notice.lock
            )
        except Exception as error:
            said = error
        if said is None or said is False:
            self._acks.done(seq)
        else:
            self._judge_plain(seq, notice, registration, said)
        return True

    def _judge_plain(self, seq: int, notice: pb.Notice, registration: Registration, said: object) -> None:
        """The one handler of a plain notice has said more than that it is done."""
        (call,) = calls_of(registration, notice, seq)
        outcome = Outcome()
        waiting = self._judge(notice, call, said, outcome, seq)
        if waiting is None:
            self._finish(seq, outcome)
        else:
            targets = (registration.id,)
            work = self._carry_on(seq, notice, targets, (call, waiting), iter(()), outcome)
            self._start(seq, notice, targets, work)

    async def settle(self, registration: Registration) -> None:
        """Wait for the registration's handlers that are running, unless the caller is one of them."""
        tasks = {task for *_, task in self._running.get(registration.id, {}).values()}
        if tasks and asyncio.current_task() not in tasks:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Cancel what is running: nobody wants its answer any more."""
        tasks = {task for running in self._running.values() for *_, task in running.values()}
        tasks.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _notice(self, seq: int, notice: pb.Notice, targets: Sequence[int]) -> None:
        """A notice that has not been seen: run its handlers, here as far as they are plain."""
        if self._tracing is not None and notice.traceparent:
            self._spans[seq] = self._tracing.handle(notice.traceparent, NotifierOp(notice.op).name.lower())
        calls: list[Call] = []
        before: set[asyncio.Task[None]] = set()
        for target in targets:
            registration = self._registrations.get(target)
            if registration is None:
                continue
            if registration.faulting or registration.exported:
                overtake(registration, notice, seq)
            if self._running and (running := self._running.get(target)):
                before |= _overlapping(running, notice)
            calls += calls_of(registration, notice, seq)
        rest = iter(calls)
        outcome = Outcome()
        if before:
            self._start(seq, notice, targets, self._wait_for(before, seq, notice, targets, rest, outcome))
            return
        waiting = self._run(notice, rest, outcome, seq)
        if waiting is not None or self._under_way(notice, targets) or outcome.refused_start:
            self._start(seq, notice, targets, self._carry_on(seq, notice, targets, waiting, rest, outcome))
        else:
            self._finish(seq, outcome)

    def _under_way(self, notice: pb.Notice, targets: Sequence[int]) -> list[asyncio.Future[None]]:
        """The accesses that must end before what the notice names is given back."""
        found: list[asyncio.Future[None]] = []
        for target in targets:
            registration = self._registrations.get(target)
            if registration is not None and registration.transfers and takes_away(notice):
                found += registration.transfers.within(*extent(notice))
        return found

    def _run(
        self, notice: pb.Notice, calls: Iterator[Call], outcome: Outcome, seq: int
    ) -> tuple[Call, Awaitable[Any] | float] | None:
        """Call handlers until one has to wait: (it, what it waits for), or None when all of them are done."""
        for call in calls:
            if not call.registration.registered:
                continue
            said: object
            try:
                said = call.method(*call.args)
            except Exception as error:
                said = error
            if said is not None and said is not False:
                waiting = self._judge(notice, call, said, outcome, seq)
                if waiting is not None:
                    return call, waiting
        return None

    def _judge(
        self, notice: pb.Notice, call: Call, said: object, outcome: Outcome, seq: int
    ) -> Awaitable[Any] | float | None:
        """Act on what a handler has returned or raised. Returns: what it waits for, if it does."""
        if isinstance(said, Busy):
            return said.again_in_s
        if isinstance(said, Refuse):
            outcome.refuse(notice, call, said)
        elif isinstance(said, Exception):
            outcome.fail(notice, call, said, seq)
        elif isinstance(said, Awaitable):
            return said
        else:
            outcome.take(notice, call, said, seq)
        return None

    async def _carry_on(
        self,
        seq: int,
        notice: pb.Notice,
        targets: Sequence[int],
        rest: tuple[Call, Awaitable[Any] | float] | None,
        calls: Iterator[Call],
        outcome: Outcome,
    ) -> None:
        """The rest of a notice, from the first handler that has to wait."""
        handling.set(seq)  # in this task, and whatever its handlers start
        while rest is not None:
            call, waiting = rest
            again: float | None = None
            try:
                if isinstance(waiting, float | int):
                    again = waiting
                else:
                    answer = await (watch_lock(call, waiting, outcome) if notice.lock else waiting)
                    if answer is not None and answer is not False:
                        outcome.take(notice, call, answer, seq)
            except Busy as busy:
                again = busy.again_in_s
            except Refuse as refusal:
                outcome.refuse(notice, call, refusal)
            except Exception as error:
                outcome.fail(notice, call, error, seq)
            if again is not None:
                self._acks.busy(seq)
                self._wake()
                await asyncio.sleep(again)
                rest = self._run(notice, iter((call,)), outcome, seq)
                if rest is not None:
                    continue
            rest = self._run(notice, calls, outcome, seq)
        if under_way := self._under_way(notice, targets):
            await asyncio.wait(under_way)
        if outcome.refused_start:
            await self._roll_back(seq, notice, targets, outcome)
        self._finish(seq, outcome)
        self._wake()

    async def _roll_back(self, seq: int, notice: pb.Notice, targets: Sequence[int], outcome: Outcome) -> None:
        """One has refused a start: the others of this session have it ended. The server ends it for other sessions.

        Kernel: mn_hlist_invalidate_range_start().
        """
        end = pb.Notice()
        end.CopyFrom(notice)
        end.op = cast(Any, RANGE_END)
        for target in targets:
            registration = self._registrations.get(target)
            if registration is None or target in outcome.refusers:
                continue
            for call in calls_of(registration, end, seq):
                try:
                    answer = call.method(*call.args)
                    if isinstance(answer, Awaitable):
                        await answer
                except Exception:
                    log.exception("%r failed at the end of what another one refused", registration)

    async def _wait_for(
        self,
        before: Iterable[asyncio.Task[None]],
        seq: int,
        notice: pb.Notice,
        targets: Sequence[int],
        calls: Iterator[Call],
        outcome: Outcome,
    ) -> None:
        await asyncio.wait(before)
        await self._carry_on(seq, notice, targets, self._run(notice, calls, outcome, seq), calls, outcome)

    def _start(self, seq: int, notice: pb.Notice, targets: Sequence[int], work: Coroutine[Any, Any, None]) -> None:
        start, end = extent(notice)
        task = asyncio.create_task(work)
        for target in targets:
            self._running.setdefault(target, {})[seq] = (start, end, task)

        def ended(_: asyncio.Task[None]) -> None:
            for target in targets:
                running = self._running[target]
                del running[seq]
                if not running:
                    del self._running[target]

        task.add_done_callback(ended)

    def _finish(self, seq: int, outcome: Outcome) -> None:
        if self._spans and (span := self._spans.pop(seq, None)) is not None:
            span.end()
        if outcome.failed:
            self._acks.failed(seq, outcome.failed)
        else:
            self._acks.done(seq, outcome.message(seq))


def _overlapping(running: _Running, notice: pb.Notice) -> set[asyncio.Task[None]]:
    """The tasks of one notifier that are still at what a notice covers."""
    low, high = extent(notice)
    return {task for start, end, task in running.values() if start < high and low < end}


def _rest_of(run: pb.NoticeRun, at: int) -> pb.NoticeBatch:
    """What a run says, from one of its notices on, as single notices."""
    notices = [
        pb.Notice(
            op=run.op, mm=run.mm, start=start, end=end, reason=run.reason, lock=run.lock, nonblock=run.nonblock,
            owner=run.owner, round=number,
        )
        for start, end, number in zip(run.starts[at:], run.ends[at:], run.rounds[at:], strict=True)
    ]  # fmt: skip
    return pb.NoticeBatch(
        first_seq=run.first_seq + at,
        targets=list(run.targets) * len(notices),
        target_counts=[len(run.targets)] * len(notices),
        notices=notices,
    )
