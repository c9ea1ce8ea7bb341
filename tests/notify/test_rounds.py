"""Rounds, as transcripts: who hears what, when the operation goes on, what it is told."""

from collections.abc import Generator
from typing import Any

import pytest
from mmubusd.mm.notification import (
    AgePage,
    Answer,
    ClearYoung,
    InvalidatePage,
    InvalidateRange,
    Reason,
    Release,
    RmapInvalidatePage,
)
from mmubusd.mm.notification import (
    TestYoung as LookYoung,  # pytest would take its own name for a test
)
from mmubusd.notify import Op, PeerError
from notify.transcript import MAINLINE, PAGE, SEED, World


def ask(*notifications: Any) -> Generator[Any, Answer, list[Answer]]:
    """An operation that raises these one after another and returns the answers."""
    answers = []
    for notification in notifications:
        answers.append((yield notification))
    return answers


def unmap(mm: Any, start: int, end: int, **more: Any) -> InvalidateRange:
    return InvalidateRange(mm, start, end, Reason.UNMAP, **more)


def test_nobody_registered_nobody_waits() -> None:
    world = World()
    mm = world.memory.create_mm()
    operation = world.run(ask(unmap(mm, 0, PAGE), Release(mm)))
    assert operation.done
    assert world.bus.counters.rounds == 0
    assert not mm.notified


def test_one_round_trip() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    assert mm.notified
    operation = world.run(ask(unmap(mm, 0x1000, 0x3000)), "munmap")
    assert operation.waits_for == "round"
    assert world.bus.drain_ready() == [driver.session]
    assert driver.hears() == ["1 invalidate_range 1000-3000 for 1"]
    assert not operation.done
    driver.acks(1)
    assert operation.done
    assert operation.value() == [Answer()]
    assert world.bus.finished == [operation]
    assert not world.bus.rounds.open
    assert [round_.id for round_ in world.bus.rounds.past] == [1]


def test_newest_first_and_one_notice_a_session() -> None:
    world = World()
    mm = world.memory.create_mm()
    a, b = world.client("a"), world.client("b")
    a.register(mm, *SEED)
    b.register(mm, *SEED)
    a.register(mm, *SEED)
    operation = world.run(ask(unmap(mm, 0, PAGE)))
    assert a.hears() == ["1 invalidate_range 0-1000 for 3,1"]
    assert b.hears() == ["1 invalidate_range 0-1000 for 2"]
    assert a.received[0][1] is b.received[0][1], "a notice is one object, to be encoded once"
    a.acks(1)
    assert operation.round is not None
    assert operation.round.waiting_for() == ["b"]
    b.acks(1)
    assert operation.done


def test_both_generations_of_ops() -> None:
    """Start, then range; the end goes out without waiting, to those who had the start and have the op."""
    world = World()
    mm = world.memory.create_mm()
    both, only_start = world.client("both"), world.client("only start")
    both.register(mm, *SEED, *MAINLINE)
    only_start.register(mm, Op.INVALIDATE_RANGE_START)
    operation = world.run(ask(unmap(mm, 0, PAGE)))
    assert both.hears() == ["1 invalidate_range_start 0-1000 for 1", "2 invalidate_range 0-1000 for 1"]
    assert only_start.hears() == ["1 invalidate_range_start 0-1000 for 2"]
    both.acks(1)
    only_start.acks(1)
    assert not operation.done
    both.acks(2)
    assert operation.done
    assert both.hears() == ["3 invalidate_range_end 0-1000 for 1"]
    assert only_start.hears() == []
    assert both.received[0][1].round == both.received[2][1].round
    assert both.session.outbox.waiting_nr == 1
    both.acks(3)
    assert both.session.outbox.waiting_nr == 0


@pytest.mark.parametrize(
    ("ops", "heard"),
    [
        ((Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE), ["1 invalidate_page 1000,2000,8000 for 1"]),
        ((Op.INVALIDATE_RANGE,), ["1 invalidate_range 1000-3000 for 1", "2 invalidate_range 8000-9000 for 1"]),
        (
            (Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE),
            ["1 invalidate_range_start 1000-3000 for 1", "2 invalidate_range_start 8000-9000 for 1"],
        ),
        ((Op.RELEASE,), []),
    ],
)
def test_pages(ops: tuple[Op, ...], heard: list[str]) -> None:
    """InvalidatePage falls back to ranges, one for each run of pages."""
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *ops)
    operation = world.run(ask(InvalidatePage(mm, (0x1000, 0x2000, 0x8000), Reason.CLEAR)))
    assert driver.hears() == heard
    driver.acks(len(heard))
    assert operation.done


@pytest.mark.parametrize(
    ("notification", "ops", "heard"),
    [
        (AgePage, SEED, ["1 age_page 1000,2000 for 1"]),
        (AgePage, MAINLINE, ["1 clear_flush_young 1000,2000 for 1"]),
        (AgePage, SEED + MAINLINE, ["1 age_page 1000,2000 for 1", "2 clear_flush_young 1000,2000 for 1"]),
        (ClearYoung, SEED, ["1 age_page 1000,2000 for 1"]),
        (ClearYoung, MAINLINE, ["1 clear_young 1000,2000 for 1"]),
        (LookYoung, SEED, []),
        (LookYoung, MAINLINE, ["1 test_young 1000,2000 for 1"]),
    ],
)
def test_aging_ops(notification: Any, ops: tuple[Op, ...], heard: list[str]) -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *ops)
    operation = world.run(ask(notification(mm, (0x1000, 0x2000))))
    assert driver.hears() == heard
    driver.acks(len(heard), **({"seq": 1, "young": (0x2000, 0x9000)} if heard else {}))
    assert operation.value()[0].young == (frozenset({0x2000}) if heard else frozenset()), (
        "what was not asked is no answer"
    )


def test_release() -> None:
    """invalidate_all, then release; both acked before the operation goes on; then the registrations are gone."""
    world = World()
    mm = world.memory.create_mm()
    seed, mainline, neither = world.client("seed"), world.client("mainline"), world.client("neither")
    first = seed.register(mm, *SEED)
    mainline.register(mm, *MAINLINE, start=0x1000, end=0x2000)
    neither.register(mm, Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END)
    operation = world.run(ask(Release(mm), unmap(mm, 0, PAGE)))
    assert seed.hears() == ["1 invalidate_all all for 1", "2 release all for 1"]
    assert mainline.hears() == ["1 release all for 2"], "an interval does not spare it the release"
    assert neither.hears() == ["1 invalidate_range_start 0-7ffffffff000 for 3"]
    seed.acks(2)
    mainline.acks(1)
    assert not operation.done
    neither.acks(1)
    assert operation.done, "nobody is left to hear of the unmapping"
    assert not mm.notified
    assert neither.hears() == [], "no end after the release"
    assert not first.alive
    assert seed.unregister(first) is False


def test_unregister_inside_release() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    registration = driver.register(mm, *SEED)
    operation = world.run(ask(Release(mm)))
    assert len(driver.hears()) == 2
    assert driver.unregister(registration) is True
    assert operation.done, "what waited for it counts as answered"
    driver.acks(2)
    assert driver.unregister(registration) is False


def test_register_while_exiting_is_refused() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    operation = world.run(ask(Release(mm)))
    with pytest.raises(Exception, match="is exiting") as caught:
        driver.register(mm, *SEED)
    assert caught.value.errno == "ESRCH"  # type: ignore[attr-defined]
    driver.acks(driver.hears() and 2)
    assert operation.done


def test_unregister_takes_back_what_is_not_sent() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    old, new = driver.register(mm, *SEED), driver.register(mm, *SEED)
    operation = world.run(ask(unmap(mm, 0, PAGE)))
    assert driver.unregister(new)
    assert driver.hears() == [f"1 invalidate_range 0-1000 for {old.id}"]
    assert not operation.done
    assert driver.unregister(old)
    assert operation.done
    assert driver.hears() == []


def test_refusal_is_rolled_back() -> None:
    """A non-blockable start that one refuses: the others get their end, the refuser does not, the operation is told."""
    world = World()
    mm = world.memory.create_mm()
    willing, refusing = world.client("willing"), world.client("refusing")
    willing.register(mm, *MAINLINE)
    refusing.register(mm, *MAINLINE)
    operation = world.run(ask(unmap(mm, 0, PAGE, blockable=False)))
    assert refusing.hears() == ["1 invalidate_range_start 0-1000 for 2"]
    assert willing.hears() == ["1 invalidate_range_start 0-1000 for 1"]
    assert willing.received[0][1].nonblock
    refusing.acks(1, seq=1, refused=True)
    assert not operation.done, "all are asked"
    willing.acks(1)
    assert operation.value()[0].refused
    assert willing.hears() == ["2 invalidate_range_end 0-1000 for 1"]
    assert refusing.hears() == []


def test_who_refuses_only_the_second_op_gets_the_end_of_the_first() -> None:
    world = World()
    mm = world.memory.create_mm()
    both = world.client("both")
    both.register(mm, Op.INVALIDATE_RANGE, *MAINLINE)
    operation = world.run(ask(unmap(mm, 0, PAGE, blockable=False)))
    assert both.hears() == ["1 invalidate_range_start 0-1000 for 1", "2 invalidate_range 0-1000 for 1"]
    both.acks(2, seq=2, refused=True)
    assert operation.value()[0].refused
    assert both.hears() == ["3 invalidate_range_end 0-1000 for 1"]


def test_refusing_what_may_not_be_refused_is_not_an_answer() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *MAINLINE)
    operation = world.run(ask(unmap(mm, 0, PAGE)))
    driver.hears()
    driver.acks(1, seq=1, refused=True)
    assert not operation.done
    world.later(2.0)
    assert operation.done
    assert operation.value() == [Answer()]
    assert driver.session.fenced is not None
    assert "refused" in driver.session.fenced.message


def test_rmap_concerns_exporters_only() -> None:
    world = World()
    exporter, other = world.client("exporter"), world.client("other")
    mine = exporter.register(None)
    other.register(None)
    world.memory.export(7, mine.id)
    operation = world.run(ask(RmapInvalidatePage((7,), must_evict=False), RmapInvalidatePage((8,), must_evict=True)))
    assert exporter.hears() == ["1 rmap_invalidate_page 7 for 1"]
    assert other.hears() == []
    exporter.acks(1)
    assert operation.done, "nobody exports frame 8"


def test_two_rounds_overlap_their_waits() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    first, second = world.run(ask(unmap(mm, 0, PAGE))), world.run(ask(unmap(mm, PAGE, 2 * PAGE)))
    assert len(driver.hears()) == 2
    driver.acks(also=(2,))
    assert second.done
    assert not first.done
    driver.acks(1)
    assert first.done


def test_a_notice_in_flight_to_the_past_is_a_peer_error() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED)
    world.run(ask(unmap(mm, 0, PAGE)))
    with pytest.raises(PeerError, match="only 0 were sent"):
        driver.acks(1)
    driver.hears()
    driver.acks(1)
    driver.acks(1)
    with pytest.raises(PeerError):
        driver.acks(also=(2,))


def test_report() -> None:
    """With a report the notifier calls are told, though nobody is registered."""
    world = World()
    mm = world.memory.create_mm()

    def operation() -> Generator[Any, Answer, bool]:
        notified = mm.notified
        yield unmap(mm, 0, PAGE)
        yield InvalidatePage(mm, (0x5000, 0x7000), Reason.CLEAR)
        yield AgePage(mm, (0x1000,))
        yield LookYoung(mm, (0x1000,))
        return notified

    done = world.run(operation(), report=True)
    assert done.value() is True
    assert [(one.call, one.start, one.end, one.mm) for one in done.reported] == [
        ("invalidate_range", 0, 0x1000, 1),
        ("invalidate_range", 0x5000, 0x6000, 1),
        ("invalidate_range", 0x7000, 0x8000, 1),
        ("clear_young", 0x1000, 0x2000, 1),
        ("test_young", 0x1000, 0x2000, 1),
    ]
    assert not mm.notified
