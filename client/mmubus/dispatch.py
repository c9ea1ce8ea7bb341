"""From notices to handlers to answers.

Plain handlers run here and now, on the path that reads the stream: their acknowledgement is ready before the next
notice is looked at. The first async handler of a notice turns the rest of it into a task. A notice that overlaps one
which is still running for the same notifier waits for it; all others go ahead. What takes something away is
acknowledged when the accesses to it that are under way have ended, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from mmu.v1 import session_pb2 as pb

from mmubus.acks import AckWindow, Arrival
from mmubus.errors import Busy, Refuse
from mmubus.linux import PAGE_SIZE, NotifierOp, Reason
from mmubus.notifier import METHODS, NotifierRange
from mmubus.registration import Registration
from mmubus.tracing import Tracing
from mmubus.within import handling

__all__ = ["Dispatcher"]

log = logging.getLogger("mmubus")

RANGE_MAX = 1 << 64
YOUNG_PAGES_MAX = 1 << 16  # pages that a plain True may stand for

RELEASE = NotifierOp.RELEASE.value
AGE_PAGE = NotifierOp.AGE_PAGE.value
INVALIDATE_PAGE = NotifierOp.INVALIDATE_PAGE.value
INVALIDATE_RANGE = NotifierOp.INVALIDATE_RANGE.value
INVALIDATE_ALL = NotifierOp.INVALIDATE_ALL.value
RANGE_START = NotifierOp.INVALIDATE_RANGE_START.value
RANGE_END = NotifierOp.INVALIDATE_RANGE_END.value
RMAP_PAGE = NotifierOp.RMAP_INVALIDATE_PAGE.value
FLUSH_ALL = NotifierOp.FLUSH_ALL.value
_METHOD_OF = {op.value: name for op, name in METHODS.items()}
_OF_EVERYTHING = frozenset({RELEASE, INVALIDATE_ALL, FLUSH_ALL})
_OF_PAGES = frozenset({AGE_PAGE, INVALIDATE_PAGE})
_OF_AGING = frozenset(
    op.value
    for op in (NotifierOp.AGE_PAGE, NotifierOp.CLEAR_FLUSH_YOUNG, NotifierOp.CLEAR_YOUNG, NotifierOp.TEST_YOUNG)
)


class _Call(NamedTuple):
    """One handler call: pages are what a plain True in its answer stands for."""

    registration: Registration
    method: Callable[..., Any]
    args: tuple[Any, ...]
    pages: Sequence[int]


class _Outcome:
    """What the handlers of one notice have answered so far."""

    __slots__ = ("dirty", "failed", "refused", "refused_pages", "slept", "told", "young")

    def __init__(self) -> None:
        self.told = False  # anything but "done"
        self.failed = ""

    def begin(self) -> None:
        """There is something to tell: rare enough that the lists are made only then."""
        if not self.told:
            self.told = True
            self.refused = self.slept = False
            self.young: list[int] = []
            self.dirty: list[int] = []
            self.refused_pages: list[int] = []

    def message(self, seq: int) -> pb.NoticeResult | None:
        """None when there is nothing to tell but that it is done."""
        if not self.told or not (self.young or self.dirty or self.refused or self.slept):
            return None
        return pb.NoticeResult(
            seq=seq,
            young=self.young,
            dirty=self.dirty,
            refused=self.refused,
            refused_pages=self.refused_pages,
            slept=self.slept,
        )


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

    def _plainly(self, seq: int, notice: pb.Notice, target: int) -> bool:
        """The most frequent notice by far, if nothing is under way that it must wait for or overtake: one call of
        `invalidate_range`, which says nothing but that it is done. Whatever else it says goes the general way.

        Returns: False when it is another notice; nothing has been done then.
        """
        registration = self._registrations.get(target)
        if (
            registration is None
            or notice.op != INVALIDATE_RANGE
            or self._running
            or registration.busy
            or self._tracing is not None
            or not registration.registered
        ):
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
            return True
        (call,) = _calls(registration, notice, seq)
        outcome = _Outcome()
        waiting = self._judge(notice, call, said, outcome, seq)
        if waiting is None:
            self._finish(seq, outcome)
        else:
            work = self._carry_on(seq, notice, (target,), (call, waiting), iter(()), outcome)
            self._start(seq, notice, (target,), work)
        return True

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
        calls: list[_Call] = []
        before: set[asyncio.Task[None]] = set()
        for target in targets:
            registration = self._registrations.get(target)
            if registration is None:
                continue
            if registration.faulting or registration.exported:
                _overtake(registration, notice, seq)
            if self._running and (running := self._running.get(target)):
                before |= _overlapping(running, notice)
            calls += _calls(registration, notice, seq)
        rest = iter(calls)
        outcome = _Outcome()
        if before:
            self._start(seq, notice, targets, self._wait_for(before, seq, notice, targets, rest, outcome))
            return
        waiting = self._run(notice, rest, outcome, seq)
        if waiting is not None or self._under_way(notice, targets):
            self._start(seq, notice, targets, self._carry_on(seq, notice, targets, waiting, rest, outcome))
        else:
            self._finish(seq, outcome)

    def _under_way(self, notice: pb.Notice, targets: Sequence[int]) -> list[asyncio.Future[None]]:
        """The accesses that must end before what the notice names is given back."""
        found: list[asyncio.Future[None]] = []
        for target in targets:
            registration = self._registrations.get(target)
            if registration is not None and registration.transfers and _takes_away(notice):
                found += registration.transfers.within(*_extent(notice))
        return found

    def _run(
        self, notice: pb.Notice, calls: Iterator[_Call], outcome: _Outcome, seq: int
    ) -> tuple[_Call, Awaitable[Any] | float] | None:
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
        self, notice: pb.Notice, call: _Call, said: object, outcome: _Outcome, seq: int
    ) -> Awaitable[Any] | float | None:
        """Act on what a handler has returned or raised. Returns: what it waits for, if it does."""
        if isinstance(said, Busy):
            return said.again_in_s
        if isinstance(said, Refuse):
            _refuse(notice, call, said, outcome)
        elif isinstance(said, Exception):
            _fail(seq, notice, call, said, outcome)
        elif isinstance(said, Awaitable):
            return said
        else:
            _take(notice, call, said, outcome, seq)
        return None

    async def _carry_on(
        self,
        seq: int,
        notice: pb.Notice,
        targets: Sequence[int],
        rest: tuple[_Call, Awaitable[Any] | float] | None,
        calls: Iterator[_Call],
        outcome: _Outcome,
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
                    answer = await (_watch_lock(call, waiting, outcome) if notice.lock else waiting)
                    if answer is not None and answer is not False:
                        _take(notice, call, answer, outcome, seq)
            except Busy as busy:
                again = busy.again_in_s
            except Refuse as refusal:
                _refuse(notice, call, refusal, outcome)
            except Exception as error:
                _fail(seq, notice, call, error, outcome)
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
        self._finish(seq, outcome)
        self._wake()

    async def _wait_for(
        self,
        before: Iterable[asyncio.Task[None]],
        seq: int,
        notice: pb.Notice,
        targets: Sequence[int],
        calls: Iterator[_Call],
        outcome: _Outcome,
    ) -> None:
        await asyncio.wait(before)
        await self._carry_on(seq, notice, targets, self._run(notice, calls, outcome, seq), calls, outcome)

    def _start(self, seq: int, notice: pb.Notice, targets: Sequence[int], work: Coroutine[Any, Any, None]) -> None:
        start, end = _extent(notice)
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

    def _finish(self, seq: int, outcome: _Outcome) -> None:
        if self._spans and (span := self._spans.pop(seq, None)) is not None:
            span.end()
        if outcome.failed:
            self._acks.failed(seq, outcome.failed)
        else:
            self._acks.done(seq, outcome.message(seq))


def _overlapping(running: _Running, notice: pb.Notice) -> set[asyncio.Task[None]]:
    """The tasks of one notifier that are still at what a notice covers."""
    low, high = _extent(notice)
    return {task for start, end, task in running.values() if start < high and low < end}


def _extent(notice: pb.Notice) -> tuple[int, int]:
    """What a notice covers: addresses, or frames for rmap notices. A registration has only one of the two kinds."""
    if notice.op in _OF_EVERYTHING:
        return 0, RANGE_MAX
    if notice.pages:
        step = 1 if notice.op == RMAP_PAGE else PAGE_SIZE
        return min(notice.pages), max(notice.pages) + step
    return notice.start, notice.end


def _takes_away(notice: pb.Notice) -> bool:
    return notice.op not in _OF_AGING and notice.op != RANGE_END


def _overtake(registration: Registration, notice: pb.Notice, seq: int) -> None:
    """Faults that are under way learn what is taken away."""
    op = notice.op
    if not _takes_away(notice):
        return
    if op in _OF_EVERYTHING:
        registration.overtake_everything(seq)
    elif op == RMAP_PAGE:
        registration.overtake_pages(notice.pages, seq)
    elif notice.pages:
        for page in notice.pages:
            registration.overtake(page, page + PAGE_SIZE, seq)
    else:
        registration.overtake(notice.start, notice.end, seq)


def _calls(registration: Registration, notice: pb.Notice, seq: int) -> list[_Call]:
    """The handler calls that a notice means for one registration."""
    op = notice.op
    notifier = registration.notifier
    if op == FLUSH_ALL:
        why = "the server could not keep notices apart"
        return [_Call(registration, notifier.invalidated_everything, (why,), ())]
    if op == RMAP_PAGE:
        method = notifier.invalidate_page
        return [_Call(registration, method, (page, notice.must_evict), (page,)) for page in notice.pages]
    method = getattr(notifier, _METHOD_OF[op])
    if op == INVALIDATE_RANGE:
        return [_Call(registration, method, (notice.mm, notice.start, notice.end, notice.lock), ())]
    if op in (RANGE_START, RANGE_END):
        return [_Call(registration, method, (_range(notice, seq),), ())]
    mm = notice.mm
    if op in _OF_EVERYTHING:
        return [_Call(registration, method, (mm,), ())]
    pages = notice.pages or range(notice.start, notice.end, PAGE_SIZE)
    if op in _OF_PAGES:
        return [_Call(registration, method, (mm, page), (page,)) for page in pages]
    if notice.pages:
        return [_Call(registration, method, (mm, page, page + PAGE_SIZE), (page,)) for page in pages]
    return [_Call(registration, method, (mm, notice.start, notice.end), pages)]


def _range(notice: pb.Notice, seq: int) -> NotifierRange:
    return NotifierRange(
        notice.mm,
        notice.start,
        notice.end,
        Reason(notice.reason),
        not notice.nonblock,
        notice.owner,
        notice.round,
        seq,
    )


def _take(notice: pb.Notice, call: _Call, answer: Any, outcome: _Outcome, seq: int) -> None:
    """Put an answer that is not just "done" into the outcome."""
    outcome.begin()
    into = outcome.young if notice.op in _OF_AGING else outcome.dirty
    try:
        if answer is True:
            if not call.pages or len(call.pages) > YOUNG_PAGES_MAX:
                raise TypeError("return the addresses of the pages; True says too little for a range")
            into.extend(call.pages)
        else:
            into.extend(answer)
    except Exception as error:
        _fail(seq, notice, call, error, outcome)


def _refuse(notice: pb.Notice, call: _Call, refusal: Refuse, outcome: _Outcome) -> None:
    """Put a refusal into the outcome, or a failure when this notice may not be refused."""
    outcome.begin()
    if notice.op == RMAP_PAGE and not notice.must_evict:
        outcome.refused = True
        outcome.refused_pages.extend(refusal.pages or call.pages)
        call.registration.exported.update(refusal.pages or call.pages)
    elif notice.nonblock:
        outcome.refused = True
    else:
        outcome.failed = f"{_where(call)} refused a notice that may not be refused"
        log.error("%s; it counts as not done, and this session is fenced when its budget is over", outcome.failed)


def _fail(seq: int, notice: pb.Notice, call: _Call, error: Exception, outcome: _Outcome) -> None:
    outcome.failed = f"{_where(call)}: {type(error).__name__}: {error}"
    log.error(
        "notice %d: %s failed on [%#x, %#x). It is not acknowledged: unless the server asks again and it succeeds, "
        "this session is fenced when the budget is over",
        seq,
        _where(call),
        notice.start,
        notice.end,
        exc_info=error,
    )


def _where(call: _Call) -> str:
    return f"{type(call.registration.notifier).__name__}.{getattr(call.method, '__name__', 'handler')}"


async def _watch_lock(call: _Call, waiting: Awaitable[Any], outcome: _Outcome) -> Any:
    """Await the handler of a notice with lock=1, and say so if it waits: it would sleep under a spinlock."""

    def waited() -> None:
        call.registration.slept_under_lock += 1
        outcome.begin()
        outcome.slept = True
        log.warning(
            "%s waits although lock=1: its caller holds a spinlock. Do what must be done without waiting, "
            "and the rest later",
            _where(call),
        )

    probe = asyncio.get_running_loop().call_soon(waited)
    try:
        return await waiting
    finally:
        probe.cancel()
