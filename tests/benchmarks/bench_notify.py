"""What the pure notifier core costs, without transport: python tests/benchmarks/bench_notify.py

Two measures: rounds/s of 16 sessions with 512 rounds in flight, and one round that concerns 1 of 10,000 registrations
on disjoint ranges, against the same with 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Generator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmubusd.mm.addr import PAGE_SIZE
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.notify import Ack, Bus, Hello, Op, Session, Spec
from notify.machine import FakeMemory, FakeMm

OPS = frozenset({Op.INVALIDATE_RANGE, Op.INVALIDATE_PAGE, Op.AGE_PAGE, Op.RELEASE})


def unmap(mm: FakeMm, start: int) -> Generator[object, object, None]:
    """The least operation that raises a round."""
    yield InvalidateRange(mm, start, start + PAGE_SIZE, Reason.UNMAP)  # type: ignore[arg-type]


def take_all(session: Session) -> int:
    """Take what is to be sent. Returns: how many notices."""
    taken = 0
    while (batch := session.take_batch()) is not None:
        taken += len(batch.notices)
    return taken


def in_flight(sessions_nr: int, window: int, rounds: int) -> float:
    """Rounds/s with so many in flight: all are opened, all batches taken, all acknowledged at once."""
    memory = FakeMemory()
    bus = Bus(memory)  # type: ignore[arg-type]
    mm = memory.create_mm()
    sessions = [bus.open_session(Hello(f"s{n}"), 0.0, f"t{n}") for n in range(sessions_nr)]
    for session in sessions:
        bus.register(session, Spec(mm.id, OPS), 0.0)
    begun = time.process_time()
    for turn in range(rounds // window):
        now = turn * 0.001
        for n in range(window):
            bus.start(unmap(mm, n * PAGE_SIZE), now + n * 1e-6)
        for session in bus.drain_ready():
            take_all(session)
            bus.acknowledge(session, Ack(through=session.outbox.last_seq), now + 0.0009)
        assert len(bus.finished) == window
        bus.finished.clear()
    return rounds / (time.process_time() - begun)


def one_of(registrations_nr: int, rounds: int) -> float:
    """Seconds a round that concerns one of so many registrations on disjoint ranges."""
    memory = FakeMemory()
    bus = Bus(memory)  # type: ignore[arg-type]
    mm = memory.create_mm()
    session = bus.open_session(Hello("s"), 0.0, "t")
    stride = 16 * PAGE_SIZE
    for n in range(registrations_nr):
        bus.register(session, Spec(mm.id, OPS, start=n * stride, end=(n + 1) * stride), 0.0)
    begun = time.process_time()
    for turn in range(rounds):
        now = turn * 0.001
        bus.start(unmap(mm, (turn * 7919 % registrations_nr) * stride), now)
        take_all(session)
        bus.acknowledge(session, Ack(through=session.outbox.last_seq), now)
        bus.drain_ready()
        bus.finished.clear()
    return (time.process_time() - begun) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=20480)
    arguments = parser.parse_args()
    rates = [in_flight(16, 512, arguments.rounds) for _ in range(3)]
    one = statistics.median(one_of(1, 5000) for _ in range(5))
    many = statistics.median(one_of(10_000, 5000) for _ in range(5))
    figures = {
        "rounds_per_s_16_sessions_512_in_flight": round(statistics.median(rates)),
        "us_per_session_notice": round(1e6 / statistics.median(rates) / 16, 3),
        "us_per_round_1_registration": round(one * 1e6, 2),
        "us_per_round_10000_registrations": round(many * 1e6, 2),
        "ratio": round(many / one, 3),
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:42} {value}")


if __name__ == "__main__":
    main()
