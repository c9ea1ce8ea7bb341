"""A session: one client process with one stream, its standing and how it behaves.

open_session ──► LIVE ──stream ends, or lease──► LOST ──grace──► FENCED ──remember──► (forgotten)
                 │  ▲                            │  │               ▲
                 │  └───────resume by token──────┘  └───budget──────┤
                 ├──────────────────────────────budget──────────────┘
                 └──leave──► LEFT
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from mmubusd.notify.errors import FencedError
from mmubusd.notify.finding import Finding
from mmubusd.notify.histogram import Histogram
from mmubusd.notify.notice import Batch, RegistrationId, SessionId
from mmubusd.notify.outbox import Outbox
from mmubusd.notify.registration import Registration

FINDINGS_MAX = 32
"""Findings about one session that wait to be read."""


class State(StrEnum):
    """Where a session stands."""

    LIVE = "live"
    LOST = "lost"
    FENCED = "fenced"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Hello:
    """A client's first message; the fields are the contract's Hello.

    window: it may map the frames, and reach them whatever we say.
    """

    name: str = ""
    version: int = 1
    features: frozenset[str] = frozenset()
    token: str = ""
    handled_through: int = 0
    ack_budget_s: float = 0.0
    lease_s: float = 0.0
    window: bool = False
    confirms: str = ""


class Session:
    """One client process.

    Attributes:
        id, token, epoch, name, features: who it is, and what was agreed.
        ack_budget_s, lease_s, grace_s: seconds, as agreed.
        resumed: whether the last open_session resumed it.
        state: where it stands; state_since: the bus's clock when it got there.
        registrations: its notifiers by id.
        fenced: why its rights are void and what it lost; None while they are not.
        shortest_budget_s: the least of its own and its registrations' budgets. holding: pages that they hold together.
        late_nr: times that half a budget was used up; harm_s: seconds that others waited for it alone.
        ack_latency: seconds from notice to ack.
        asked_after: through which notice it had handled everything when it asked for something last; None: not told.
        window: it may map the frames. withheld: frames that it could still reach, though it is
        fenced, or while flushes_due FLUSH_ALLs of demoted registrations are not answered.
        findings: what is to be said to it about its behaviour, until the room above takes it; on_finding: called then.
    """

    __slots__ = (
        "ack_budget_s", "ack_latency", "armed_at", "asked_after", "epoch", "features", "fenced", "findings",
        "flushes_due", "grace_s", "harm_s", "holding", "id", "in_ready", "late_nr", "late_seq", "late_told",
        "lease_s", "name", "on_finding", "outbox", "pins", "registrations", "resumed", "seen_at", "shortest_budget_s",
        "state", "state_since", "token", "window", "withheld",
    )  # fmt: skip

    def __init__(
        self, session_id: SessionId, token: str, epoch: int, name: str, outbox: Outbox, *, features: frozenset[str],
        ack_budget_s: float, lease_s: float, grace_s: float, clock: float,
    ) -> None:  # fmt: skip
        self.id = session_id
        self.token = token
        self.epoch = epoch
        self.name = name
        self.features = features
        self.ack_budget_s = ack_budget_s
        self.shortest_budget_s = ack_budget_s
        self.holding = 0
        self.lease_s = lease_s
        self.grace_s = grace_s
        self.resumed = False
        self.state = State.LIVE
        self.state_since = clock
        self.registrations: dict[RegistrationId, Registration] = {}
        self.pins: set[int] = set()
        self.fenced: FencedError | None = None
        self.late_nr = 0
        self.late_seq = 0
        self.late_told = 0
        self.harm_s = 0.0
        self.ack_latency = Histogram()
        self.outbox = outbox
        self.findings: deque[Finding] = deque(maxlen=FINDINGS_MAX)
        self.on_finding: Callable[[Session], None] | None = None
        self.seen_at = clock
        self.armed_at = float("inf")
        self.in_ready = False
        self.asked_after: int | None = None
        self.window = False
        self.withheld: list[int] = []
        self.flushes_due = 0

    @property
    def as_of_seq(self) -> int:
        """The number of the last notice that was taken for it."""
        return self.outbox.last_seq

    @property
    def notices_nr(self) -> int:
        """Notices that were put into its outbox."""
        return self.outbox.put_nr

    @property
    def acknowledged_nr(self) -> int:
        """Notices that it has answered."""
        return self.outbox.acked_nr

    @property
    def waiting_nr(self) -> int:
        """Notices that are sent, or wait to be, and are not answered."""
        return self.outbox.waiting_nr

    def tell(self, finding: Finding) -> None:
        """Say something about its behaviour; the oldest is dropped when too many wait."""
        self.findings.append(finding)
        if self.on_finding is not None:
            self.on_finding(self)

    def take_batch(self) -> Batch | None:
        """Take what is to be sent now, to put it into one message; None when there is nothing (any more).

        Call again until None before waiting for `Bus.ready`. After a resume it begins with the un-acknowledged ones.
        """
        self.in_ready = False
        if self.state is not State.LIVE:
            return None
        late = self.late_seq if self.late_told != self.late_seq <= self.outbox.last_seq else 0
        batch = self.outbox.take(late)
        if late and batch is not None:
            self.late_told = late
        return batch

    def __repr__(self) -> str:
        return f"Session({self.id} {self.name!r} {self.state})"
