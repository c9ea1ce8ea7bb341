"""The range lock beside a list that is searched from front to back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from mmubusd.mm.range_lock import Grants, RangeLock, Ticket

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=3).map(
    lambda pairs: tuple((start, start + length) for start, length in pairs)
)
STEPS = st.lists(st.one_of(RANGES, st.integers(0, 30)), max_size=60)


def overlap(one: Ticket, other: Ticket) -> bool:
    return any(a < d and c < b for a, b in one.ranges for c, d in other.ranges)


@given(STEPS)
def test_granted_exactly_when_no_earlier_one_that_overlaps_is_left(steps: list[object]) -> None:
    told = Grants()
    lock = RangeLock(told)
    queue: list[Ticket] = []
    for step in steps:
        if isinstance(step, int):
            if not queue:
                continue
            before = [ticket.granted for ticket in queue]
            gone = queue.pop(step % len(queue))
            before.pop(step % (len(queue) + 1))
            told.clear()
            lock.release(gone)
            assert told == [one for one, was in zip(queue, before, strict=True) if one.granted and not was]
        else:
            queue.append(lock.acquire(*step))
        for at, ticket in enumerate(queue):
            assert ticket.granted == (not any(overlap(earlier, ticket) for earlier in queue[:at]))
        assert bool(lock) == bool(queue)
        assert lock.contended(20, 25) == any(a < 25 and b > 20 for ticket in queue for a, b in ticket.ranges)


def test_the_whole_address_space_waits_for_everybody_and_everybody_for_it() -> None:
    told = Grants()
    lock = RangeLock(told)
    first = [lock.acquire((at, at + 1)) for at in (3, 1 << 40)]
    everything = lock.acquire((0, 1 << 64))
    last = lock.acquire((7, 9))
    assert [ticket.granted for ticket in (*first, everything, last)] == [True, True, False, False]
    lock.release(first[1])
    assert told == []
    lock.release(first[0])
    assert told == [everything]
    lock.release(everything)
    assert told == [everything, last]
