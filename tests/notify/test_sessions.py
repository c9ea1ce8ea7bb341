"""Sessions, as transcripts: hello, losing and resuming, budgets, leases, fences, stalls."""

from collections.abc import Generator
from typing import Any

import pytest
from mmubusd.mm.notification import Answer, InvalidateRange, Reason
from mmubusd.notify import (
    Draining,
    FencedError,
    Hello,
    LimitReached,
    Limits,
    Op,
    Operation,
    PeerError,
    RequestError,
    Spec,
    State,
)
from notify.transcript import MAINLINE, PAGE, SEED, Client, World


def unmap(mm: Any, start: int = 0, end: int = PAGE) -> Generator[Any, Answer, Answer]:
    return (yield InvalidateRange(mm, start, end, Reason.UNMAP))


def one_round(limits: Limits | None = None, **hello: Any) -> tuple[World, Any, Client, Operation[Any]]:
    """A driver that has been told of a round and has not answered yet."""
    world = World(limits)
    mm = world.memory.create_mm()
    driver = world.client("driver", **hello)
    driver.register(mm, *SEED)
    operation = world.run(unmap(mm), "munmap(0, 4096)")
    assert driver.hears() == ["1 invalidate_range 0-1000 for 1"]
    return world, mm, driver, operation


# Hello


def test_what_is_agreed() -> None:
    world = World()
    session = world.client("driver", ack_budget_s=0.5, lease_s=3.0, features=frozenset({"unheard of"})).session
    assert (session.name, session.epoch, session.ack_budget_s, session.lease_s) == ("driver", 1, 0.5, 3.0)
    assert not session.resumed
    assert session.features == frozenset()
    assert world.client("").session.name == "session 2"


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"version": 2}, "VERSION"),
        ({"version": 0}, "VERSION"),
        ({"ack_budget_s": 0.001}, "ACK_BUDGET_S"),
        ({"ack_budget_s": float("nan")}, "ACK_BUDGET_S"),
        ({"ack_budget_s": -1.0}, "ACK_BUDGET_S"),
        ({"lease_s": 1e9}, "LEASE_S"),
        ({"token": "of nobody"}, "NO_SUCH_SESSION"),
    ],
)
def test_hello_refused(hello: dict[str, Any], reason: str) -> None:
    world = World()
    with pytest.raises(RequestError) as caught:
        world.client("driver", **hello)
    assert caught.value.reason == reason
    assert not world.bus.sessions


def test_limits() -> None:
    world = World(Limits(sessions_max=1, registrations_max=1))
    mm = world.memory.create_mm()
    driver = world.client("driver")
    with pytest.raises(LimitReached) as caught:
        world.client("one more")
    assert caught.value.fields["limit"] == "sessions_max"
    driver.register(mm, *SEED)
    with pytest.raises(LimitReached):
        driver.register(mm, *SEED)
    world.bus.fence(driver.session, world.now, "it is a test")
    assert world.client("one more").session.state is State.LIVE, "the fenced one is remembered, and does not count"


@pytest.mark.parametrize(
    ("spec", "errno"),
    [
        (Spec(9, frozenset(SEED)), "ESRCH"),
        (Spec(1, frozenset()), "EINVAL"),
        (Spec(1, frozenset({Op.RMAP_INVALIDATE_PAGE})), "EINVAL"),
        (Spec(1, frozenset({Op.FLUSH_ALL})), "EINVAL"),
        (Spec(1, frozenset(SEED), start=0x2000, end=0x2000), "EINVAL"),
        (Spec(1, frozenset(SEED), start=0x2000, end=1 << 60), "EOVERFLOW"),
        (Spec(1, frozenset(SEED), ack_budget_s=1000.0), "EINVAL"),
    ],
)
def test_register_refused(spec: Spec, errno: str) -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    with pytest.raises(RequestError) as caught:
        world.bus.register(driver.session, spec, world.now)
    assert caught.value.errno == errno
    assert not mm.notified
    assert not driver.session.registrations


def test_missing_ops_are_warned_of() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    assert driver.register(mm, *SEED).warnings == ()
    assert driver.register(mm, *MAINLINE).warnings == ()
    (release, page, age) = driver.register(mm, Op.RELEASE).warnings
    assert release.startswith("invalidate_range is missing: munmap")
    assert page.startswith("invalidate_page is missing: reclaim")
    assert age.startswith("age_page is missing")
    assert any(
        "invalidate_range_end is missing" in one for one in driver.register(mm, Op.INVALIDATE_RANGE_START).warnings
    )
    assert any("will never be called" in one for one in driver.register(mm, Op.INVALIDATE_RANGE_END).warnings)


def test_draining() -> None:
    world, mm, driver, operation = one_round()
    world.bus.drain()
    with pytest.raises(Draining):
        world.client("late")
    with pytest.raises(Draining):
        driver.register(mm, *SEED)
    with pytest.raises(Draining):
        world.run(unmap(mm))
    driver.acks(1)
    assert operation.done, "what is under way goes on"


# Budgets


def test_half_a_budget_names_the_late_a_whole_one_fences() -> None:
    world, _, driver, operation = one_round()
    world.later(0.999)
    assert driver.hears() == []
    world.later(0.002)
    assert driver.session.late_nr == 1
    assert driver.hears() == ["1 invalidate_range 0-1000 for 1", "late 1"], "it is sent again, and named"
    assert driver.hears() == [], "named once"
    world.later(0.998)
    assert not operation.done
    world.later(0.002)
    assert operation.done
    fenced = driver.session.fenced
    assert fenced is not None
    assert (fenced.seq, fenced.round, fenced.registrations, fenced.held_pages) == (1, 1, (1,), (0,))
    assert fenced.waited_s == pytest.approx(2.0)
    assert driver.session.state is State.FENCED
    assert driver.session in world.bus.drain_ready()
    assert driver.hears() == []
    assert world.bus.counters.fenced == 1


def test_fenced_stays_fenced() -> None:
    world, mm, driver, _ = one_round()
    world.later(2.1)
    for attempt in (
        lambda: driver.acks(1),
        lambda: driver.register(mm, *SEED),
        lambda: world.bus.unregister(driver.session, 1, world.now),
        lambda: world.client("again", token=driver.session.token),
        lambda: world.bus.session_by_token(driver.session.token),
        lambda: world.bus.dma_read(driver.session, 1, 0, 1, (0,), (0,), world.now).value(),
    ):
        with pytest.raises(FencedError) as caught:
            attempt()
        assert caught.value is driver.session.fenced
    assert not mm.notified
    world.bus.session_lost(driver.session, world.now)
    world.bus.leave(driver.session, world.now)
    assert driver.session.state is State.FENCED
    world.later(600.0)
    assert not world.bus.sessions, "it is not remembered for ever"
    with pytest.raises(RequestError):
        world.bus.session_by_token(driver.session.token)


def test_busy_extends_up_to_the_cap() -> None:
    world, _, driver, operation = one_round(Limits(ack_budget_max_s=5.0))
    world.later(1.5)
    driver.acks(seq=1, busy=True)
    world.later(1.9)
    assert not operation.done, "3.4 s, and it said that it was alive at 1.5"
    driver.acks(seq=1, busy=True)
    world.later(1.5)
    assert not operation.done
    driver.acks(seq=1, busy=True)
    world.later(0.2)
    assert operation.done, "5.1 s are more than the cap"
    assert driver.session.state is State.FENCED


def test_busy_then_done() -> None:
    world, _, driver, operation = one_round()
    driver.acks(seq=1, busy=True)
    driver.acks(1)
    assert operation.done
    world.later(5.0)
    assert driver.session.state is State.LIVE
    world.run(unmap(world.memory.mms[1]))
    driver.hears()
    with pytest.raises(PeerError, match="busy and done"):
        driver.acks(2, seq=2, busy=True)


def test_a_failed_handler_is_not_an_ack() -> None:
    world, mm, driver, operation = one_round()
    second = world.run(unmap(mm, PAGE, 2 * PAGE))
    driver.hears()
    driver.acks(2, seq=1, failed="device is off the bus")
    assert second.done, "the later one is done"
    assert not operation.done
    driver.acks(also=(1,))
    assert operation.done, "it succeeded at the second try"
    assert driver.session.outbox.acked_through == 2


def test_a_failed_handler_is_named_in_the_fence() -> None:
    world, _, driver, operation = one_round()
    driver.acks(1, seq=1, failed="device is off the bus")
    world.later(2.1)
    assert operation.done
    assert driver.session.fenced is not None
    assert "device is off the bus" in driver.session.fenced.message


def test_a_registration_has_its_own_budget() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver")
    driver.register(mm, *SEED, ack_budget_s=0.1, start=0, end=PAGE)
    driver.register(mm, *SEED, ack_budget_s=10.0, start=PAGE, end=2 * PAGE)
    slow = world.run(unmap(mm, PAGE, 2 * PAGE))
    both = world.run(unmap(mm, 0, 2 * PAGE))
    driver.hears()
    world.later(1.0)
    assert not both.done, "one ack is for both, so the longer budget counts"
    driver.acks(2)
    assert slow.done
    quick = world.run(unmap(mm, 0, PAGE))
    driver.hears()
    world.later(0.11)
    assert quick.done
    assert driver.session.state is State.FENCED


def test_harm_is_what_others_waited_for_it_alone() -> None:
    world = World()
    mm = world.memory.create_mm()
    quick, slow = world.client("quick"), world.client("slow")
    quick.register(mm, *SEED)
    slow.register(mm, *SEED)
    world.run(unmap(mm))
    quick.hears(), slow.hears()
    world.later(0.1)
    quick.acks(1)
    world.later(0.3)
    slow.acks(1)
    assert slow.session.harm_s == pytest.approx(0.3)
    assert quick.session.harm_s == 0.0
    assert slow.session.ack_latency.quantile(0.5) == pytest.approx(0.4, rel=0.1)
    assert world.bus.ack_latency().count == 2


# Losing and resuming


def test_resumed_within_grace_gets_everything_again_in_order() -> None:
    world, mm, driver, operation = one_round(Limits(ack_budget_s=10.0))
    second = world.run(unmap(mm, PAGE, 2 * PAGE))
    assert driver.hears() == ["2 invalidate_range 1000-2000 for 1"]
    driver.acks(also=(2,))
    assert second.done
    world.bus.session_lost(driver.session, world.now)
    assert driver.session.state is State.LOST
    world.run(unmap(mm, 2 * PAGE, 3 * PAGE))
    assert driver.hears() == [], "nothing is sent into the void"
    world.later(4.9)
    again = world.client("driver", token=driver.session.token, handled_through=1)
    assert again.session is driver.session
    assert again.session.resumed
    assert again.session in world.bus.drain_ready()
    assert again.hears() == [
        "1 invalidate_range 0-1000 for 1",
        "2 invalidate_range 1000-2000 for 1",
        "3 invalidate_range 2000-3000 for 1",
    ]
    again.acks(3)
    assert operation.done
    assert not world.bus.rounds.open


def test_what_was_handled_on_the_old_stream_can_be_acked_on_the_new_one() -> None:
    world, _, driver, operation = one_round()
    world.bus.session_lost(driver.session, world.now)
    again = world.client("driver", token=driver.session.token)
    again.acks(1)
    assert operation.done
    assert again.hears() == []
    with pytest.raises(RequestError) as caught:
        world.client("driver", token=driver.session.token, handled_through=7)
    assert caught.value.reason == "HANDLED_THROUGH"


def test_lost_beyond_its_grace_is_fenced() -> None:
    world, _, driver, operation = one_round(Limits(ack_budget_s=20.0))
    world.bus.session_lost(driver.session, world.now)
    world.bus.session_lost(driver.session, world.now + 1)
    world.later(4.99)
    assert not operation.done
    world.later(0.02)
    assert operation.done
    assert driver.session.state is State.FENCED


def test_the_budget_runs_on_while_a_session_is_lost() -> None:
    world, _, driver, operation = one_round(Limits(grace_s=100.0))
    world.bus.session_lost(driver.session, world.now)
    world.later(2.01)
    assert operation.done
    assert driver.session.state is State.FENCED


def test_lease() -> None:
    world = World()
    driver = world.client("driver", lease_s=1.0)
    for _ in range(5):
        world.later(0.9)
        world.bus.heartbeat(driver.session, world.now)
    assert driver.session.state is State.LIVE
    world.later(1.1)
    assert driver.session.state is State.LOST
    assert driver.session in world.bus.drain_ready()
    world.later(5.1)
    assert driver.session.state is State.FENCED


def test_leaving() -> None:
    world, mm, driver, operation = one_round()
    world.bus.leave(driver.session, world.now)
    assert operation.done
    assert driver.session.state is State.LEFT
    assert not world.bus.sessions
    assert not mm.notified
    world.bus.leave(driver.session, world.now)
    with pytest.raises(FencedError, match="has left"):
        driver.acks(1)
    with pytest.raises(RequestError):
        world.client("driver", token=driver.session.token)


def test_a_live_session_may_be_resumed_by_a_second_stream() -> None:
    world, _, driver, _ = one_round()
    again = world.client("driver", token=driver.session.token)
    assert again.hears() == ["1 invalidate_range 0-1000 for 1"]


def test_a_token_of_its_own() -> None:
    world = World()
    world.bus.open_session(Hello("a"), world.now, "secret")
    with pytest.raises(RequestError, match="token"):
        world.bus.open_session(Hello("b"), world.now, "secret")
    with pytest.raises(RequestError, match="token"):
        world.bus.open_session(Hello("b"), world.now, "")


# Stalls


def test_a_stall_of_the_server_counts_against_nobody() -> None:
    world, _, driver, operation = one_round()
    world.now += 60.0
    world.bus.expire(world.now)
    assert not operation.done
    assert driver.session.state is State.LIVE, "neither its budget nor its lease is over"
    driver.acks(1)
    assert operation.done


def test_after_a_stall_the_budget_goes_on() -> None:
    world, _, driver, operation = one_round()
    world.now += 60.0
    world.bus.expire(world.now)
    world.later(1.5)
    assert operation.done
    assert driver.session.state is State.FENCED


def test_an_idle_bus_is_not_a_stalled_one() -> None:
    world = World()
    mm = world.memory.create_mm()
    driver = world.client("driver", lease_s=20.0)
    driver.register(mm, *SEED)
    world.later(10.0)
    operation = world.run(unmap(mm))
    assert operation.round is not None
    assert operation.round.opened_at == world.now
    driver.hears()
    driver.acks(1)
    world.later(9.0)
    world.bus.heartbeat(driver.session, world.now)
    assert world.bus.clock(world.now) == world.now


def test_a_stall_that_the_room_above_noticed() -> None:
    world, _, driver, operation = one_round()
    world.now += 1.9
    world.bus.stalled(1.8)
    world.bus.expire(world.now)
    world.later(1.0)
    assert not operation.done
    driver.acks(1)
    assert operation.done
