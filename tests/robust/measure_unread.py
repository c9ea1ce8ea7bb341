"""One client that does not read, while everybody goes on: what waits for it stays small, and one read catches up.

    python tests/robust/measure_unread.py 1000000

The notices are of every kind that can be raised without end: unmaps by as many producers as may be in flight at a time
(each waits for the client, and so is slowed), and questions about age, which wait for nobody who is overloaded. The
growth is that of everything the core allocates, beyond what the operations in flight take themselves.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Generator
from typing import Any

from mmubusd.mm.memory import Memory
from mmubusd.mm.notification import AgePage, InvalidateRange, Reason
from mmubusd.notify import Ack, Bus, Hello, Limits, Op, Spec

PAGE = 4096
AT = 0x7000_0000_0000
IN_FLIGHT = 1024
RANGES_MAX, GROWTH_MAX = 1024, 1 << 20
OPS = frozenset({Op.AGE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_PAGE, Op.RELEASE})


def takes(mm: Any, page: int) -> Generator[Any, Any, int]:
    """What an unmap of a page of a large, scattered range asks."""
    yield InvalidateRange(mm, AT + page * 2 * PAGE, AT + (page * 2 + 1) * PAGE, Reason.UNMAP)
    return 0


def ages(mm: Any, page: int) -> Generator[Any, Any, int]:
    """What the aging of a page asks."""
    answer = yield AgePage(mm, (AT + page % 65536 * PAGE,))
    return len(answer.young)


def measure(notices: int) -> tuple[int, int, int, int]:
    """Returns: notices that were put, ranges that wait at the most, growth in bytes, notices of the one read."""
    memory = Memory(frames_nr=64)
    bus = Bus(memory, Limits(ack_budget_s=30.0, ack_budget_max_s=30.0))
    mm = memory.create_mm("program")
    session = bus.open_session(Hello("deaf"), 0.0, "token")
    bus.register(session, Spec(mm.id, OPS), 0.0)
    now, most, page = 0.0, 0, 0
    session.take_batch()  # nothing yet; from here on it does not read
    for page in range(IN_FLIGHT):
        bus.start(takes(mm, page), now)
    bus.drain_ready()
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    while session.notices_nr < notices:
        bus.start(ages(mm, page), now)
        bus.finished.clear()
        page += 1
        if not page % 8192:
            bus.drain_ready()
        most = max(most, session.waiting_nr) if page % 64 == 0 else most
    gc.collect()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bus.rounds._merge(session)
    bus.finished.clear()
    waiting = session.waiting_nr
    read = 0
    while (batch := session.take_batch()) is not None:
        read += len(batch.notices)
    bus.acknowledge(session, Ack(session.as_of_seq), now)
    assert not bus.running, "one read and one ack end everything"
    assert session.waiting_nr == 0
    return session.notices_nr, waiting, max(after, peak) - before, read


def main() -> int:
    notices = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    put, ranges, growth, read = measure(notices)
    print(f"{put:,} notices unread by one client, {IN_FLIGHT:,} operations in flight")
    print(
        f"{ranges:,} merged ranges wait, memory grew by {growth / 1024:,.0f} KiB at its peak; "
        f"one read of {read:,} notices ends all"
    )
    return int(ranges > RANGES_MAX or growth > GROWTH_MAX)


if __name__ == "__main__":
    sys.exit(main())
