"""The clock: deadlines that move, stalls that count for nobody."""

from types import SimpleNamespace
from typing import Any

from mmubusd.notify.clock import NEVER, Clock


def whose() -> Any:
    return SimpleNamespace(armed_at=NEVER)


def test_deadlines_in_order_and_the_last_one_counts() -> None:
    clock = Clock(0.25)
    a, b = whose(), whose()
    clock.tick(0.0)
    clock.arm(a, 1.0)
    clock.arm(b, 2.0)
    clock.arm(a, 3.0)
    assert clock.next_deadline() == 2.0
    assert clock.due() is None
    clock.tick(2.0)
    assert clock.due() is b
    assert clock.due() is None
    clock.arm(a, NEVER)
    assert clock.next_deadline() is None


def test_late_beyond_the_allowance_is_a_stall() -> None:
    clock = Clock(0.25)
    a = whose()
    clock.tick(0.0)
    clock.arm(a, 1.0)
    assert clock.tick(1.2) == 1.2, "within the allowance"
    a = whose()
    clock.arm(a, 2.0)
    clock.due()
    assert clock.tick(12.0) < 2.0, "it stands before the deadline, so that sockets are read before anyone is judged"
    assert clock.due() is None
    assert clock.next_deadline() == 2.0 + clock.stalled_s
    clock.tick(12.0 + 0.3)
    assert clock.due() is a


def test_it_never_goes_back() -> None:
    clock = Clock(0.25)
    clock.tick(5.0)
    assert clock.tick(4.0) == 5.0
    clock.stalled(3.0)
    assert clock.tick(6.0) == 5.0
    assert clock.tick(9.0) == 6.0


def test_a_long_idle_time_without_deadlines_is_no_stall() -> None:
    clock = Clock(0.25)
    clock.tick(0.0)
    assert clock.tick(1000.0) == 1000.0
    a = whose()
    clock.arm(a, 1001.0)
    clock.arm(a, 5000.0)
    assert clock.tick(3000.0) == 3000.0, "the deadline at 1001 had moved"
