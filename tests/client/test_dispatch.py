"""Handlers: who is called with what, what runs beside what, and what an answer becomes. No server, no stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from typing import Any, cast

import pytest
from mmu.v1 import session_pb2 as pb
from mmubus import PAGE_SIZE, Busy, Notifier, NotifierOp, NotifierRange, Reason, Refuse, RmapNotifier
from mmubus.acks import AckWindow
from mmubus.dispatch import Dispatcher
from mmubus.notifier import ops_of
from mmubus.registration import Registration, Spec
from patience import until


class Bench:
    """A dispatcher with notifiers on it, and what it has acknowledged."""

    def __init__(self, *notifiers: Notifier | RmapNotifier) -> None:
        self.acks = AckWindow()
        self.registrations: dict[int, Registration] = {}
        self.woken = 0
        for number, notifier in enumerate(notifiers, 1):
            registration = Registration(cast(Any, None), notifier, Spec(5, 0, 0, False, 0.0, "", 0))
            registration.begin(number, ())
            self.registrations[number] = registration
        self.dispatcher = Dispatcher(self.acks, self.registrations, self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def deliver(self, seq: int, op: NotifierOp, targets: Iterable[int] = (1,), **fields: Any) -> None:
        notice = pb.Notice(op=cast(Any, op.value), mm=5, **fields)
        targets = list(targets)
        batch = pb.NoticeBatch(first_seq=seq, notices=[notice], targets=targets, target_counts=[len(targets)])
        assert self.dispatcher.deliver(batch)

    def result(self) -> pb.NoticeResult:
        acknowledge = self.acks.take()
        assert acknowledge is not None
        (result,) = acknowledge.results
        return result


class Everything(Notifier):
    """Implements every op and remembers the calls."""

    def __init__(self, answer: object = None) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.answer: Any = answer

    def _saw(self, *call: object) -> Any:
        self.calls.append(call)
        return self.answer

    def release(self, mm: int) -> Any:
        return self._saw("release", mm)

    def age_page(self, mm: int, address: int) -> Any:
        return self._saw("age_page", mm, address)

    def invalidate_page(self, mm: int, address: int) -> Any:
        return self._saw("invalidate_page", mm, address)

    def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Any:
        return self._saw("invalidate_range", mm, start, end, lock)

    def invalidate_all(self, mm: int) -> Any:
        return self._saw("invalidate_all", mm)

    def invalidate_range_start(self, range: NotifierRange) -> Any:
        return self._saw("start", range)

    def invalidate_range_end(self, range: NotifierRange) -> Any:
        return self._saw("end", range)

    def clear_flush_young(self, mm: int, start: int, end: int) -> Any:
        return self._saw("clear_flush_young", mm, start, end)

    def clear_young(self, mm: int, start: int, end: int) -> Any:
        return self._saw("clear_young", mm, start, end)

    def test_young(self, mm: int, start: int, end: int) -> Any:
        return self._saw("test_young", mm, start, end)


class Waiting(Notifier):
    """Its invalidate_range waits until the test lets the range go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.gates: dict[int, asyncio.Event] = {}

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        self.begun.append(start)
        await self.gates.setdefault(start, asyncio.Event()).wait()

    def let_go(self, start: int) -> None:
        self.gates.setdefault(start, asyncio.Event()).set()


RANGE = NotifierOp.INVALIDATE_RANGE


@pytest.mark.parametrize(
    ("op", "fields", "calls"),
    [
        (NotifierOp.RELEASE, {}, [("release", 5)]),
        (NotifierOp.INVALIDATE_ALL, {}, [("invalidate_all", 5)]),
        (
            NotifierOp.AGE_PAGE,
            {"start": 0x1000, "end": 0x3000},
            [("age_page", 5, 0x1000), ("age_page", 5, 0x2000)],
        ),
        (NotifierOp.INVALIDATE_PAGE, {"start": 0x1000, "end": 0x2000}, [("invalidate_page", 5, 0x1000)]),
        (
            NotifierOp.INVALIDATE_PAGE,
            {"start": 0x1000, "end": 0x9000, "pages": [0x1000, 0x8000]},
            [("invalidate_page", 5, 0x1000), ("invalidate_page", 5, 0x8000)],
        ),
        (RANGE, {"start": 0x1000, "end": 0x9000, "lock": True}, [("invalidate_range", 5, 0x1000, 0x9000, True)]),
        (
            NotifierOp.INVALIDATE_RANGE_START,
            {"start": 0x1000, "end": 0x9000, "reason": 2, "nonblock": True, "owner": 9, "round": 4},
            [("start", NotifierRange(5, 0x1000, 0x9000, Reason.CLEAR, False, 9, 4, 1))],
        ),
        (
            NotifierOp.INVALIDATE_RANGE_END,
            {"start": 0x1000, "end": 0x9000},
            [("end", NotifierRange(5, 0x1000, 0x9000, Reason.UNSPECIFIED, True, 0, 0, 1))],
        ),
        (
            NotifierOp.CLEAR_FLUSH_YOUNG,
            {"start": 0x1000, "end": 0x9000},
            [("clear_flush_young", 5, 0x1000, 0x9000)],
        ),
        (NotifierOp.CLEAR_YOUNG, {"pages": [0x4000]}, [("clear_young", 5, 0x4000, 0x5000)]),
        (NotifierOp.TEST_YOUNG, {"start": 0x1000, "end": 0x2000}, [("test_young", 5, 0x1000, 0x2000)]),
    ],
)
async def test_every_op_reaches_its_method(
    op: NotifierOp, fields: dict[str, Any], calls: list[tuple[object, ...]]
) -> None:
    everything = Everything()
    bench = Bench(everything)
    bench.deliver(1, op, **fields)
    assert everything.calls == calls
    assert bench.acks.through == 1  # plain handlers: done before deliver returns


def test_the_ops_are_those_that_are_overridden() -> None:
    assert ops_of(Waiting()) == [RANGE]
    assert len(ops_of(Everything())) == 10
    assert ops_of(Notifier()) == []
    narrowed = Everything()
    narrowed.ops = {NotifierOp.RELEASE}
    assert ops_of(narrowed) == [NotifierOp.RELEASE]


@pytest.mark.parametrize(
    ("op", "fields", "answer", "young", "dirty"),
    [
        (NotifierOp.AGE_PAGE, {"pages": [0x1000, 0x2000]}, True, [0x1000, 0x2000], []),
        (NotifierOp.INVALIDATE_PAGE, {"pages": [0x1000]}, True, [], [0x1000]),
        (RANGE, {"start": 0x1000, "end": 0x3000}, [0x2000], [], [0x2000]),
        (NotifierOp.CLEAR_YOUNG, {"start": 0x1000, "end": 0x3000}, True, [0x1000, 0x2000], []),
        (NotifierOp.TEST_YOUNG, {"start": 0x1000, "end": 0x3000}, {0x1000}, [0x1000], []),
    ],
)
async def test_answers_become_results(
    op: NotifierOp, fields: dict[str, Any], answer: object, young: list[int], dirty: list[int]
) -> None:
    bench = Bench(Everything(answer))
    bench.deliver(1, op, **fields)
    result = bench.result()
    assert (result.seq, list(result.young), list(result.dirty)) == (1, young, dirty)


async def test_true_for_a_range_says_too_little(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(Everything(True))
    bench.deliver(1, RANGE, start=0x1000, end=0x3000)
    assert "return the addresses" in bench.result().failed
    assert bench.acks.through == 0


async def test_targets_are_called_in_the_order_given() -> None:
    order: list[int] = []

    class Named(Notifier):
        def __init__(self, number: int) -> None:
            self.number = number

        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            order.append(self.number)

    bench = Bench(Named(1), Named(2), Named(3))
    bench.deliver(1, RANGE, targets=[3, 1, 2], start=0, end=PAGE_SIZE)
    assert order == [3, 1, 2]


async def test_nothing_is_delivered_after_unregistering_in_a_handler() -> None:
    class Leaving(Notifier):
        pages = 0

        def invalidate_page(self, mm: int, address: int) -> None:
            self.pages += 1
            bench.registrations[1].end(None)

    leaving = Leaving()
    bench = Bench(leaving)
    bench.deliver(1, NotifierOp.INVALIDATE_PAGE, pages=[0x1000, 0x2000])
    assert leaving.pages == 1
    assert bench.acks.through == 1


async def test_unknown_targets_are_done() -> None:
    bench = Bench()
    bench.deliver(1, RANGE, targets=[7], start=0, end=PAGE_SIZE)
    assert bench.acks.through == 1


def run_of(first_seq: int, *starts: int, targets: Iterable[int] = (1,), op: NotifierOp = RANGE) -> pb.NoticeRun:
    """Notices of one page each."""
    return pb.NoticeRun(
        first_seq=first_seq, targets=targets, op=cast(Any, op.value), mm=5, reason=2, starts=starts,
        ends=[start + PAGE_SIZE for start in starts], rounds=range(len(starts)),
    )  # fmt: skip


async def test_a_run_is_its_notices() -> None:
    everything, other = Everything(), Everything()
    bench = Bench(everything, other)
    assert bench.dispatcher.deliver_run(run_of(1, 0x1000, 0x3000))
    assert everything.calls == [
        ("invalidate_range", 5, 0x1000, 0x2000, False),
        ("invalidate_range", 5, 0x3000, 0x4000, False),
    ]
    assert (bench.acks.through, bench.acks.received, bench.acks.handled) == (2, 2, 2)
    assert bench.dispatcher.deliver_run(run_of(3, 0x5000, targets=(2, 1)))
    assert len(everything.calls) == 3
    assert len(other.calls) == 1
    assert bench.dispatcher.deliver_run(run_of(3, 0x5000, 0x6000)), "the first came before"
    assert len(everything.calls) == 4
    assert bench.acks.through == 4
    assert not bench.dispatcher.deliver_run(run_of(6, 0x7000)), "one is missing"
    assert bench.dispatcher.deliver_run(run_of(5, 0x7000, op=NotifierOp.INVALIDATE_RANGE_START))
    assert everything.calls[-1] == ("start", NotifierRange(5, 0x7000, 0x8000, Reason.CLEAR, True, 0, 0, 5))


@pytest.mark.parametrize("answer", ["dirty", "later", "error"])
async def test_a_run_goes_on_after_an_answer_that_is_more_than_done(answer: str) -> None:
    class Second(Everything):
        def _saw(self, *call: object) -> Any:
            super()._saw(*call)
            if len(self.calls) != 2:
                return None
            if answer == "error":
                raise ValueError("not this one")
            return [0x2000] if answer == "dirty" else later()

    async def later() -> None:
        await gate.wait()

    gate = asyncio.Event()
    second = Second()
    bench = Bench(second)
    assert bench.dispatcher.deliver_run(run_of(1, 0x1000, 0x2000, 0x3000, 0x4000))
    assert [call[2] for call in second.calls] == [0x1000, 0x2000, 0x3000, 0x4000]
    assert bench.acks.received == 4
    acknowledge = bench.acks.take()
    assert acknowledge is not None
    if answer == "dirty":
        assert acknowledge == pb.Acknowledge(through=4, results=[pb.NoticeResult(seq=2, dirty=[0x2000])])
        return
    assert (acknowledge.through, list(acknowledge.also)) == (1, [3, 4])
    assert [result.failed != "" for result in acknowledge.results] == ([True] if answer == "error" else [])
    gate.set()
    if answer == "later":
        await until(lambda: bench.acks.through == 4)


async def test_a_run_ends_for_who_unregisters_in_its_handler() -> None:
    class Leaving(Everything):
        def _saw(self, *call: object) -> Any:
            super()._saw(*call)
            bench.registrations[1].end(None)

    leaving = Leaving()
    bench = Bench(leaving)
    assert bench.dispatcher.deliver_run(run_of(1, 0x1000, 0x2000, 0x3000))
    assert len(leaving.calls) == 1
    assert bench.acks.through == 3, "what concerns nobody is done"


async def test_disjoint_ranges_run_at_the_same_time_and_are_acknowledged_one_by_one() -> None:
    waiting = Waiting()
    bench = Bench(waiting)
    bench.deliver(1, RANGE, start=0x1000, end=0x2000)
    bench.deliver(2, RANGE, start=0x2000, end=0x3000)
    await until(lambda: waiting.begun == [0x1000, 0x2000])
    assert not bench.acks.pending
    waiting.let_go(0x2000)
    await until(lambda: bench.acks.pending)
    acknowledge = bench.acks.take()
    assert acknowledge is not None
    assert (acknowledge.through, list(acknowledge.also)) == (0, [2])
    waiting.let_go(0x1000)
    await until(lambda: bench.acks.through == 2)
    assert bench.woken == 2


async def test_overlapping_ranges_run_in_order() -> None:
    waiting = Waiting()
    bench = Bench(waiting)
    bench.deliver(1, RANGE, start=0x1000, end=0x3000)
    bench.deliver(2, RANGE, start=0x2000, end=0x4000)
    await until(lambda: waiting.begun == [0x1000])
    waiting.let_go(0x2000)
    await asyncio.sleep(0)
    assert waiting.begun == [0x1000]
    waiting.let_go(0x1000)
    await until(lambda: bench.acks.through == 2)
    assert waiting.begun == [0x1000, 0x2000]


async def test_other_notifiers_do_not_wait_for_an_overlapping_one() -> None:
    waiting, everything = Waiting(), Everything()
    bench = Bench(waiting, everything)
    bench.deliver(1, RANGE, targets=[1], start=0x1000, end=0x3000)
    bench.deliver(2, RANGE, targets=[2], start=0x1000, end=0x3000)
    assert len(everything.calls) == 1
    waiting.let_go(0x1000)
    await until(lambda: bench.acks.through == 2)


async def test_release_waits_for_every_range_of_its_notifier() -> None:
    class Both(Waiting):
        released = False

        def release(self, mm: int) -> None:
            self.released = True

    both = Both()
    bench = Bench(both)
    bench.deliver(1, RANGE, start=0x1000, end=0x3000)
    bench.deliver(2, NotifierOp.RELEASE)
    await until(lambda: both.begun)
    assert not both.released
    both.let_go(0x1000)
    await until(lambda: bench.acks.through == 2)
    assert both.released


async def test_an_exception_is_reported_and_never_acknowledged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Notifier):
        works = False

        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            if not self.works:
                raise ValueError("no such entry")

    broken = Broken()
    bench = Bench(broken)
    bench.deliver(1, RANGE, start=0x1000, end=0x2000)
    assert bench.result().failed == "Broken.invalidate_range: ValueError: no such entry"
    assert "fenced when the budget is over" in caplog.text
    bench.deliver(2, RANGE, start=0x4000, end=0x5000)
    assert bench.acks.through == 0
    # The server asks again, and now it works.
    broken.works = True
    bench.deliver(1, RANGE, start=0x1000, end=0x2000)
    bench.deliver(2, RANGE, start=0x4000, end=0x5000)
    assert bench.acks.through == 2


async def test_one_broken_notifier_does_not_keep_the_others_from_being_told() -> None:
    class Broken(Notifier):
        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            raise ValueError

    everything = Everything()
    bench = Bench(Broken(), everything)
    bench.deliver(1, RANGE, targets=[1, 2], start=0x1000, end=0x2000)
    assert len(everything.calls) == 1
    assert bench.acks.through == 0


async def test_refusal_only_where_it_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Notifier):
        async def invalidate_range_start(self, range: NotifierRange) -> None:
            raise Refuse

    bench = Bench(Refusing())
    bench.deliver(1, NotifierOp.INVALIDATE_RANGE_START, start=0, end=PAGE_SIZE, nonblock=True)
    await until(lambda: bench.acks.through == 1)
    assert bench.result().refused
    bench.deliver(2, NotifierOp.INVALIDATE_RANGE_START, start=0, end=PAGE_SIZE)
    await until(lambda: bench.acks.pending)
    assert "may not be refused" in bench.result().failed
    assert bench.acks.through == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_who_accepted_a_start_that_another_one_refuses_has_it_ended(asynchronous: bool) -> None:
    class Refusing(Notifier):
        def invalidate_range_start(self, range: NotifierRange) -> None:
            raise Refuse

    class Counting(Notifier):
        in_progress = 0

        def invalidate_range_start(self, range: NotifierRange) -> Any:
            self.in_progress += 1

        def invalidate_range_end(self, range: NotifierRange) -> Any:
            assert (range.start, range.end, range.blockable) == (0, PAGE_SIZE, False)
            self.in_progress -= 1

    class CountingAsync(Counting):
        async def invalidate_range_end(self, range: NotifierRange) -> Any:
            await asyncio.sleep(0)
            super().invalidate_range_end(range)

    counting = [CountingAsync() if asynchronous else Counting() for _ in range(2)]
    bench = Bench(counting[0], Refusing(), counting[1])
    bench.deliver(
        1, NotifierOp.INVALIDATE_RANGE_START, targets=[1, 2, 3], start=0, end=PAGE_SIZE, nonblock=True
    )  # fmt: skip
    await until(lambda: bench.acks.through == 1)
    assert bench.result().refused
    assert [one.in_progress for one in counting] == [0, 0]


async def test_rmap_pages_are_refused_one_by_one_unless_they_must_go() -> None:
    class Exporter(RmapNotifier):
        def invalidate_page(self, page: int, must_evict: bool) -> bool:
            if page == 7:
                raise Refuse
            return page == 8

    bench = Bench(Exporter())
    bench.deliver(1, NotifierOp.RMAP_INVALIDATE_PAGE, pages=[6, 7, 8])
    result = bench.result()
    assert (result.refused, list(result.refused_pages), list(result.dirty)) == (True, [7], [8])
    bench.deliver(2, NotifierOp.RMAP_INVALIDATE_PAGE, pages=[7], must_evict=True)
    assert "may not be refused" in bench.result().failed


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_busy_buys_time_and_is_called_again(asynchronous: bool) -> None:
    class Slow(Notifier):
        calls = 0

        def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Any:
            self.calls += 1
            if self.calls < 3:
                raise Busy(0.001)

    class SlowAsync(Slow):
        async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> Any:
            return super().invalidate_range(mm, start, end, lock)

    slow = SlowAsync() if asynchronous else Slow()
    bench = Bench(slow)
    bench.deliver(1, RANGE, start=0x1000, end=0x2000)
    await until(lambda: bench.acks.through == 1)
    acknowledge = bench.acks.take()
    assert acknowledge is not None
    assert [result.busy for result in acknowledge.results] == [True, True]
    assert slow.calls == 3


async def test_waiting_under_lock_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class Prompt(Notifier):
        async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
            pass

    waiting = Waiting()
    waiting.let_go(0x2000)
    bench = Bench(waiting, Prompt())
    bench.deliver(1, RANGE, targets=[2], start=0x1000, end=0x2000, lock=True)
    await until(lambda: bench.acks.through == 1)
    assert not caplog.records
    bench.deliver(2, RANGE, start=0x1000, end=0x2000, lock=True)
    await until(lambda: bench.registrations[1].slept_under_lock == 1)
    assert caplog.records[0].levelno == logging.WARNING
    assert "lock=1" in caplog.text
    waiting.let_go(0x1000)
    await until(lambda: bench.acks.through == 2)


async def test_a_failed_flush_with_an_end_that_waits_is_awaited() -> None:
    class Pair(Notifier):
        ended = False

        def invalidate_range_start(self, range: NotifierRange) -> Awaitable[list[int]]:
            async def later() -> list[int]:
                await asyncio.sleep(0)
                return [0x1000]

            return later()

        async def invalidate_range_end(self, range: NotifierRange) -> None:
            self.ended = True

    pair = Pair()
    bench = Bench(pair)
    bench.deliver(1, NotifierOp.FLUSH_ALL)
    await until(lambda: bench.acks.through == 1)
    assert pair.ended
    assert list(bench.result().dirty) == [0x1000]


def test_a_window_survives_any_order() -> None:
    window = AckWindow()
    for seq in range(1, 8):
        window.arrive(seq)
    for seq, through in ((3, 0), (1, 1), (2, 3), (7, 3), (5, 3), (4, 5), (6, 7)):
        window.done(seq)
        assert window.through == through
