"""The outbox: seqs, windows, selective acks, merging under overload."""

from collections.abc import Generator
from typing import Any

import pytest
from mmubusd.mm.addr import TASK_SIZE
from mmubusd.mm.notification import AgePage, Answer, InvalidatePage, InvalidateRange, Reason, RmapInvalidatePage
from mmubusd.notify import Ack, Limits, Notice, Op, PeerError, Result
from mmubusd.notify.merging import merge
from mmubusd.notify.notice import RoundId
from mmubusd.notify.outbox import Outbox
from notify.transcript import MAINLINE, PAGE, SEED, World, describe


def box(**more: int) -> Outbox:
    sizes = {"window_max": 8, "batch_max": 4, "waiting_max": 8, "ranges_max": 4} | more
    return Outbox(**sizes, busy_s=2.0, busy_max_s=30.0)


def notice(number: int = 1, start: int = 0, end: int = PAGE, op: Op = Op.INVALIDATE_RANGE, **more: Any) -> Notice:
    return Notice(op, RoundId(number), None, 0.0, mm=more.pop("mm", 1), start=start, end=end, **more)


def filled(count: int, **more: int) -> Outbox:
    outbox = box(**more)
    for number in range(1, count + 1):
        outbox.put(notice(number), (1,))
    return outbox


def rounds(outbox: Outbox, ack: Ack) -> list[int]:
    return [one.round for one, _, _ in outbox.acknowledge(ack, 0.0)]


def test_consecutive_in_batches_up_to_the_window() -> None:
    outbox = filled(10)
    batches = []
    while (batch := outbox.take()) is not None:
        batches.append((batch.first_seq, [one.round for one in batch.notices]))
    assert batches == [(1, [1, 2, 3, 4]), (5, [5, 6, 7, 8])]
    assert not outbox.idle
    assert outbox.waiting_nr == 10
    assert rounds(outbox, Ack(through=3)) == [1, 2, 3]
    batch = outbox.take()
    assert batch is not None
    assert (batch.first_seq, len(batch.notices)) == (9, 2)
    assert outbox.idle


def test_acks_are_cumulative_selective_and_harmless_again() -> None:
    outbox = filled(6)
    outbox.take(), outbox.take()
    assert rounds(outbox, Ack(also=(3, 5))) == [3, 5]
    assert rounds(outbox, Ack(also=(3, 5))) == []
    assert outbox.acked_through == 0
    assert rounds(outbox, Ack(through=2)) == [1, 2]
    assert outbox.acked_through == 3
    assert rounds(outbox, Ack(through=2, also=(1,))) == []
    assert rounds(outbox, Ack(through=6)) == [4, 6]
    assert outbox.acked_through == 6
    assert outbox.waiting_nr == 0


def test_results_may_come_before_the_ack() -> None:
    outbox = filled(2)
    outbox.take()
    assert outbox.acknowledge(Ack(results=(Result(2, young=(5,)),)), 0.0) == []
    first, second = outbox.acknowledge(Ack(through=2), 0.0)
    assert first[2] is None
    assert second[2] == Result(2, young=(5,))
    assert outbox.acknowledge(Ack(results=(Result(1, young=(5,)),)), 0.0) == [], "too late, and harmless"


@pytest.mark.parametrize("ack", [Ack(through=3), Ack(also=(3,)), Ack(results=(Result(3),))])
def test_never_sent(ack: Ack) -> None:
    outbox = filled(2)
    outbox.take()
    outbox.put(notice(3), (1,))
    with pytest.raises(PeerError) as caught:
        outbox.acknowledge(ack, 0.0)
    assert caught.value.fields == {"seq": 3, "last_seq": 2}
    assert outbox.waiting_nr == 3


def test_ends_need_no_answer() -> None:
    outbox = box()
    for number, op in enumerate((Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END, Op.INVALIDATE_RANGE_START), 1):
        outbox.put(notice(number, op=op), (1,))
    outbox.take()
    assert [seq for seq, _, _ in outbox.unanswered()] == [1, 3]
    assert rounds(outbox, Ack(also=(1,))) == [1]
    assert outbox.acked_through == 1
    assert rounds(outbox, Ack(also=(3,))) == [3]
    assert outbox.acked_through == 3, "the end was received before what was acked"


def test_sent_again_under_the_same_numbers() -> None:
    outbox = filled(3)
    outbox.take()
    outbox.acknowledge(Ack(through=1), 0.0)
    outbox.put(notice(4), (1,))
    outbox.send_again()
    batch = outbox.take()
    assert batch is not None
    assert (batch.first_seq, [one.round for one in batch.notices]) == (2, [2, 3])
    batch = outbox.take()
    assert batch is not None
    assert (batch.first_seq, [one.round for one in batch.notices]) == (4, [4])
    outbox.send_again()
    assert rounds(outbox, Ack(through=3)) == [2, 3], "acked before it came again"
    batch = outbox.take()
    assert batch is not None
    assert (batch.first_seq, [one.round for one in batch.notices]) == (4, [4])
    assert outbox.take() is None


def test_withdrawn_in_the_window() -> None:
    outbox = box()
    for number, targets in enumerate(((2, 1), (2,), (1,)), 1):
        outbox.put(notice(number), targets)
    outbox.take()
    outbox.put(notice(4), (2,))
    outbox.put(notice(5), (2, 1))
    assert [one.round for one, _ in outbox.withdraw(2)] == [4, 2]
    assert [(seq, targets) for seq, _, targets in outbox.unanswered()] == [(1, (1,)), (3, (1,)), (0, (1,))]
    assert rounds(outbox, Ack(through=3)) == [1, 3]
    batch = outbox.take()
    assert batch is not None
    assert (batch.first_seq, batch.targets) == (4, [(1,)])


def test_withdrawn_and_perhaps_lost_leaves_no_gap() -> None:
    """What was on its way when the stream broke comes again, though nobody is left to act on it."""
    outbox = filled(2)
    outbox.take()
    assert len(outbox.withdraw(1)) == 2
    outbox.send_again()
    outbox.put(notice(3), (2,))
    batch = outbox.take()
    assert batch is not None
    assert (batch.first_seq, batch.targets) == (1, [(), ()])
    batch = outbox.take()
    assert batch is not None
    assert batch.first_seq == 3
    assert rounds(outbox, Ack(through=3)) == [3]
    assert outbox.acked_through == 3


# Merging


def test_ranges_become_an_interval_set() -> None:
    pending = [
        (notice(n, start, end), (1,)) for n, (start, end) in enumerate(((0, 2), (8, 9), (2, 4), (3, 6), (20, 21)), 1)
    ]
    merged = merge(pending, ranges_max=8)
    assert [(one.start, one.end, one.round) for one, _ in merged.waiting] == [(0, 6, 4), (8, 9, 2), (20, 21, 5)]
    first = merged.waiting[0][0]
    assert first.merged is not None
    assert sorted(one.round for one, _ in first.merged) == [1, 3, 4]


def test_what_differs_is_not_one() -> None:
    pending = [
        (notice(1), (1,)),
        (notice(2, mm=2), (1,)),
        (notice(3), (2,)),
        (notice(4, reason=Reason.CLEAR), (1,)),
        (notice(5, op=Op.INVALIDATE_RANGE_START), (1,)),
        (notice(6, nonblock=True), (1,)),
    ]
    assert merge(pending, ranges_max=8).waiting == pending


def test_then_everything_of_an_address_space_then_a_flush() -> None:
    pending = [(notice(n, 2 * n, 2 * n + 1, mm=1 + n % 2), (1,)) for n in range(1, 9)]
    merged = merge(pending, ranges_max=4)
    assert [(one.mm, one.start, one.end) for one, _ in merged.waiting] == [(2, 0, TASK_SIZE), (1, 0, TASK_SIZE)]
    ((flush, targets),) = merge(merged.waiting, ranges_max=1).waiting
    assert (flush.op, targets) == (Op.FLUSH_ALL, (1,))
    assert flush.merged is not None
    assert sorted(one.round for one, _ in flush.merged) == list(range(1, 9)), "merged twice, and still all of them"
    again = merge([(flush, targets), (notice(9), (1,)), (notice(10, mm=5), (2,))], ranges_max=1).waiting
    assert [(one.op, whom) for one, whom in again] == [(Op.FLUSH_ALL, (2, 1))]


def test_pages_merge_as_pages() -> None:
    pages = [
        (notice(1, 0, 2 * PAGE, Op.INVALIDATE_PAGE, pages=(0, PAGE)), (1,)),
        (notice(2, PAGE, 3 * PAGE, Op.INVALIDATE_PAGE, pages=(PAGE, 2 * PAGE)), (1,)),
        (notice(3, 9 * PAGE, 10 * PAGE, Op.INVALIDATE_PAGE, pages=(9 * PAGE,)), (1,)),
        (notice(4, 0, 0, Op.RMAP_INVALIDATE_PAGE, mm=0, pages=(7,)), (2,)),
        (notice(5, 0, 0, Op.RMAP_INVALIDATE_PAGE, mm=0, pages=(8, 7)), (2,)),
    ]
    merged = merge(pages, ranges_max=8).waiting
    assert [one.pages for one, _ in merged] == [(0, PAGE, 2 * PAGE), (9 * PAGE,), (7, 8)]
    fewer = merge(pages, ranges_max=2).waiting
    assert [(one.op, one.pages) for one, _ in fewer] == [
        (Op.INVALIDATE_PAGE, (0, PAGE, 2 * PAGE, 9 * PAGE)),
        (Op.FLUSH_ALL, ()),
    ]


def test_age_is_not_asked_and_the_rest_keeps_its_order() -> None:
    pending = [
        (notice(1, op=Op.RELEASE), (1,)),
        (notice(2, op=Op.AGE_PAGE, pages=(0,)), (1,)),
        (notice(3), (1,)),
        (notice(4, op=Op.INVALIDATE_RANGE_END), (1,)),
    ]
    merged = merge(pending, ranges_max=8)
    assert [one.round for one, _ in merged.waiting] == [3, 1, 4]
    assert [one.round for one, _ in merged.unasked] == [2]


def test_overload_ends_every_round_with_one_read() -> None:
    """A client that does not read is told in few notices, and its one ack ends every round."""
    world = World(Limits(outbox_notices_max=16, outbox_ranges_max=4, window_notices_max=64))
    mm = world.memory.create_mm()
    seed, mainline = world.client("seed"), world.client("mainline")
    seed.register(mm, *SEED)
    mainline.register(mm, *MAINLINE)

    def unmap(page: int) -> Generator[Any, Answer, None]:
        yield InvalidateRange(mm, page * PAGE, (page + 1) * PAGE, Reason.UNMAP)

    operations = [world.run(unmap(page)) for page in [*range(100), *range(0, 3000, 30)]]
    heard = seed.hears()
    assert len(heard) < 40
    assert any("0-7ffffffff000" in line for line in heard), "too many ranges: everything of the address space"
    seed.acks(seed.session.outbox.last_seq)
    assert not any(operation.done for operation in operations)
    starts = [line for line in mainline.hears() if "start" in line]
    mainline.acks(mainline.session.outbox.last_seq)
    assert all(operation.done for operation in operations)
    ends = [line for line in mainline.hears() if "end" in line]
    assert len(ends) == len(starts), "an end for each start, also of merged ones"
    assert world.bus.counters.merged > 150


def test_overload_does_not_ask_for_age_and_merges_frames() -> None:
    world = World(Limits(outbox_notices_max=4, outbox_ranges_max=2))
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    exporter = driver.register(None)
    for pfn in range(16):
        world.memory.export(pfn, exporter.id)

    def ask(notification: Any) -> Generator[Any, Answer, Answer]:
        return (yield notification)

    ages = [world.run(ask(AgePage(mm, (page * PAGE,)))) for page in range(4)]
    frames = [world.run(ask(RmapInvalidatePage((pfn,), must_evict=False))) for pfn in range(4)]
    pages = [world.run(ask(InvalidatePage(mm, (page * PAGE,), Reason.CLEAR))) for page in range(4)]
    assert all(one.value() == Answer() for one in ages), "whoever is not asked is not young"
    assert world.bus.counters.unasked == 4
    driver.hears()
    driver.acks(driver.session.outbox.last_seq)
    assert all(one.done for one in frames + pages)


def test_descriptions_are_for_people() -> None:
    assert describe(notice()) == "invalidate_range 0-1000"
    assert repr(notice(3)) == "Notice(invalidate_range mm=1 0x0-0x1000 round=3)"
    assert "2 pages" in repr(notice(3, 0, 0, Op.RMAP_INVALIDATE_PAGE, pages=(1, 2)))


def test_what_is_merged_waits_in_the_order_in_which_it_was_opened() -> None:
    """By range the younger one would be first; a deadline behind it would be missed, and its timer go off for ever."""
    world = World(Limits(outbox_notices_max=2))
    mm = world.memory.create_mm()
    deaf = world.client("deaf")
    deaf.register(mm, Op.INVALIDATE_RANGE)
    old = world.run(unmap(mm, 8 * PAGE))
    world.later(0.7)
    for page in (0, 1):
        world.run(unmap(mm, page * PAGE))
    waiting = [(one.start, one.opened_at) for _, one, _ in deaf.session.outbox.unanswered()]
    assert waiting == [(8 * PAGE, 100.0), (0, 100.7)]
    world.later(1.25)
    assert not old.done
    world.later(0.05)
    assert old.done
    assert deaf.session.fenced is not None, "a budget is over when the oldest one's is"


def unmap(mm: Any, start: int) -> Generator[Any, Answer, None]:
    yield InvalidateRange(mm, start, start + PAGE, Reason.UNMAP)
