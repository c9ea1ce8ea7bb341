"""Rounds that are counted together end when, and as, they would if each of them counted for itself."""

from __future__ import annotations

import gc
from collections.abc import Generator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmubusd.mm.notification import Answer, InvalidateRange, Reason
from mmubusd.notify import Limits, Op, Session
from mmubusd.notify.log import Log
from mmubusd.notify.round import Round
from notify.transcript import MAINLINE, PAGE, SEED, World, assert_rules

SESSIONS = 3


def unmap(mm: Any, page: int) -> Generator[Any, Answer, None]:
    yield InvalidateRange(mm, page * PAGE, (page + 1) * PAGE, Reason.UNMAP)


class Room:
    """A few drivers on one address space, and operations that wait for all of them."""

    def __init__(self, ops: tuple[Op, ...] = SEED) -> None:
        self.world = World(Limits(outbox_notices_max=5, window_notices_max=8, batch_notices_max=3, ack_budget_s=0.9))
        self.mm = self.world.memory.create_mm()
        self.drivers = [self.world.client(f"driver {number}") for number in range(SESSIONS)]
        self.registrations = [driver.register(self.mm, *ops) for driver in self.drivers]
        self.pages = 0
        self.rounds: list[Round] = []

    def act(self, action: str, who: int, much: int) -> None:
        """Anything that can happen; what a driver cannot do any more is left out."""
        driver = self.drivers[who]
        outbox = driver.session.outbox
        if action == "unmap":
            self.pages += 1
            operation = self.world.run(unmap(self.mm, self.pages))
            if operation.round is not None:
                self.rounds.append(operation.round)
        elif action == "later":
            self.world.later(much / 20)
        elif driver.session.fenced is not None:
            return
        elif action == "read":
            driver.hears()
        elif action == "ack":
            driver.acks(min(outbox.acked_through + much, outbox.last_seq))
        elif action == "ack one":
            if outbox.targets_of(outbox.acked_through + much):
                driver.acks(outbox.acked_through, also=(outbox.acked_through + much,))
        elif action == "break":
            self.world.bus.session_lost(driver.session, self.world.now)
            self.world.bus.open_session(self.world.hello("", token=driver.session.token), self.world.now, "")
        elif action == "unregister":
            driver.unregister(self.registrations[who])

    def account(self) -> list[tuple[object, ...]]:
        """Everything that can be seen of the rounds, with the numbers of sessions."""
        number = {driver.session: at for at, driver in enumerate(self.drivers)}

        def numbered(sessions: Any) -> list[int]:
            return sorted(number[session] for session in sessions)

        seen: list[tuple[object, ...]] = [
            (
                one.open,
                numbered(one.waiting),
                [(number[session], at, gone) for session, at, gone in one.answered],
                one.age(self.world.now),
                one.alone_since if not one.open or len(one.waiting) == 1 else None,
            )
            for one in self.rounds
        ]
        outboxes = [driver.session.outbox for driver in self.drivers]
        seen += [(outbox.waiting_nr, outbox.last_seq, outbox.acked_through, outbox.acked_nr) for outbox in outboxes]
        seen += [(driver.session.state, round(driver.session.harm_s, 9)) for driver in self.drivers]
        counters = self.world.bus.counters
        seen.append((counters.notices, counters.acks, counters.merged, counters.late, counters.fenced))
        return seen


actions = st.lists(
    st.tuples(
        st.sampled_from(("unmap",) * 6 + ("read",) * 3 + ("ack",) * 4 + ("ack one", "later", "break", "unregister")),
        st.integers(0, SESSIONS - 1),
        st.integers(1, 6),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(actions, st.sampled_from((SEED, MAINLINE)))
def test_together_is_as_each_for_itself(script: list[tuple[str, int, int]], ops: tuple[Op, ...]) -> None:
    together, apart = Room(ops), Room(ops)
    for action in script:
        together.act(*action)
        with patch.object(Log, "write", lambda self, notice: False):
            apart.act(*action)
        assert together.account() == apart.account()
    assert_rules(together.world, over=False)


def test_an_acknowledgement_of_many_moves_one_place() -> None:
    """What it costs is seen from what is kept of it: one entry, however many notices."""
    room = Room()
    room.world.bus.change_limits(Limits())
    for _ in range(4):
        room.act("unmap", 0, 0)
    log = room.rounds[0].log
    assert log is not None
    assert [one.log for one in room.rounds] == [log] * 4
    for who in range(SESSIONS):
        room.act("read", who, 0)
        room.act("read", who, 0)
        assert all(one.open for one in room.rounds)
        room.act("ack", who, 4)
    assert len(log.answers) == SESSIONS
    assert [one.open for one in room.rounds] == [False] * 4
    assert [one.position for one in room.world.bus.rounds.past] == [0, 1, 2, 3]


@pytest.mark.parametrize("sessions", [1, 2, 3])
def test_who_was_waited_for_alone(sessions: int) -> None:
    room = Room()
    for driver, registration in list(zip(room.drivers, room.registrations, strict=True))[sessions:]:
        driver.unregister(registration)
    room.act("unmap", 0, 0)
    room.act("unmap", 0, 0)
    harm: dict[Session, float] = {}
    for who in range(sessions):
        room.world.later(0.1)
        room.act("read", who, 0)
        room.act("ack", who, 2)
        harm = {driver.session: driver.session.harm_s for driver in room.drivers[:sessions]}
    last = room.drivers[sessions - 1].session
    assert harm.pop(last) == pytest.approx(0.2), "two rounds waited for it alone, for 0.1 s each"
    assert set(harm.values()) <= {0.0}


def test_rounds_that_have_ended_leave_nothing_for_the_collector() -> None:
    room = Room()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            room.act("unmap", 0, 0)
        for who in range(SESSIONS):
            room.act("read", who, 0)
            room.act("ack", who, 3)
        assert not any(one.open for one in room.rounds)
        room.rounds.clear()
        room.world.bus.finished.clear()
        room.world.bus.rounds.past.clear()
        for driver in room.drivers:
            driver.received.clear()
        gc.collect()
        assert not [one for one in gc.garbage if isinstance(one, Round | Log)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_a_registration_that_goes_makes_rounds_part() -> None:
    room = Room()
    for _ in range(3):
        room.act("unmap", 0, 0)
    room.act("read", 0, 0)
    room.act("ack", 0, 2)
    room.act("unregister", 1, 0)
    assert [one.log for one in room.rounds] == [None] * 3
    assert [[session.name for session in one.waiting] for one in room.rounds] == [
        ["driver 2"],
        ["driver 2"],
        ["driver 2", "driver 0"],
    ]
