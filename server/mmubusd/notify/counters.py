"""What the bus counts, from its start on."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmubusd.notify.histogram import Histogram


@dataclass(slots=True)
class Counters:
    """Numbers for people and for tests.

    Attributes:
        operations, rounds, notices, acks: that were begun, raised, put into an outbox, answered by a handler.
        late: half budgets that were used up; fenced: sessions.
        stale_refused: accesses through a translation that was not (any more) held.
        slipped: pages that a registration lost without being told, for want of an op.
        dirty_unheld: pages that were reported dirty by someone who held no writable translation of them.
        freed_before_ack: frames found freed while a translation of them was still held. Must stay 0.
        merged: notices that were merged into others.
        flushes_overload: FLUSH_ALLs that took the place of too much that waited; flushes_mm: the same, of one mm.
        unasked: questions about age that an overloaded client was not asked.
        demoted, promoted: registrations that were too slow, and that have behaved well since.
        ack_latency_before: seconds from notice to ack, of sessions that are forgotten (see `Bus.ack_latency`).
    """

    operations: int = 0
    rounds: int = 0
    notices: int = 0
    acks: int = 0
    late: int = 0
    fenced: int = 0
    stale_refused: int = 0
    slipped: int = 0
    dirty_unheld: int = 0
    freed_before_ack: int = 0
    merged: int = 0
    unasked: int = 0
    flushes_overload: int = 0
    flushes_mm: int = 0
    demoted: int = 0
    promoted: int = 0
    ack_latency_before: Histogram = field(default_factory=Histogram)
