"""Every bound of the notifier core, with its default and what it prevents."""

from __future__ import annotations

from dataclasses import dataclass

CONTRACT_VERSION = 1
"""The version of the contract that this server speaks."""
WITHIN = "within"
"""The client says within which notice's handler a request was made."""
FINDINGS = "findings"
"""The client wants to be told what it does wrong."""
RUNS = "runs"
"""The client takes many notices in one short form."""
FEATURES = frozenset({WITHIN, FINDINGS, RUNS})
"""What this server can do beyond version 1; the intersection with the client's is agreed on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds; seconds where the name ends in `_s`.

    Attributes:
        ack_budget_s, ack_budget_min_s, ack_budget_max_s: what a notice may take before its session is fenced: the
        default,
            and what may be asked for. `ack_budget_max_s` is also how far BUSY extends it.
        lease_s, lease_min_s, lease_max_s: silence after which a session counts as lost.
        grace_s: how long a lost session can be resumed before it is fenced.
        remember_s: how long a fenced session is remembered, so that its client can be told what it lost.
        fault_wait_s, fault_wait_max_s: how long a device's request waits for a range that is being invalidated.
        stall_allowance_s: how late `Bus.expire` may be called; what is beyond it is our own stall and counts against
        nobody. sessions_max, registrations_max: at a time, all together and of one session.
        window_notices_max: notices of a session that are sent and not acknowledged; more wait.
        batch_notices_max: notices in one batch.
        outbox_notices_max: notices that wait before they are merged.
        outbox_ranges_max: merged ranges that wait before they become "everything".
        unread_asked_max: notices that wait beyond which a session is not asked about age any more.
        pages_max: pages of one device request.
        dma_bytes_max: bytes of one DMA access.
        rounds_ended_max: ended rounds that are remembered.
        taken_max: takings of a registration's pages, and grants, that are remembered to explain stale accesses.
        promote_s: how long a demoted registration must have behaved well before it gets translations again.
        fenced_max: fenced sessions that are remembered; beyond it the oldest is forgotten.
        offences_max: breaches of the contract by drivers that are remembered.
    """

    ack_budget_s: float = 2.0
    ack_budget_min_s: float = 0.05
    ack_budget_max_s: float = 30.0
    lease_s: float = 10.0
    lease_min_s: float = 0.1
    lease_max_s: float = 300.0
    grace_s: float = 5.0
    remember_s: float = 600.0
    fault_wait_s: float = 1.0
    fault_wait_max_s: float = 60.0
    stall_allowance_s: float = 0.25
    sessions_max: int = 4096
    registrations_max: int = 65536
    window_notices_max: int = 4096
    batch_notices_max: int = 1024
    outbox_notices_max: int = 4096
    outbox_ranges_max: int = 1024
    unread_asked_max: int = 512
    pages_max: int = 1 << 20
    dma_bytes_max: int = 1 << 20
    rounds_ended_max: int = 256
    taken_max: int = 32
    promote_s: float = 5.0
    fenced_max: int = 256
    offences_max: int = 256
