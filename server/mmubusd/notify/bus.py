"""The bus: inputs are method calls that take `now`, outputs are collected in `finished` and `ready`.

`now` is monotonic seconds. Nothing here waits, looks at a clock or draws a random number; the room above arms one timer for
`next_deadline()` and calls `expire(now)` when it goes off, and drains both lists after every call.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mm
from mmubusd.notify.access import Granted, Looked, Pinned
from mmubusd.notify.limits import Limits
from mmubusd.notify.notice import Ack
from mmubusd.notify.operation import Operation
from mmubusd.notify.registration import Registration, Spec
from mmubusd.notify.session import Hello, Session

T = TypeVar("T")


class Bus:
    """Sessions, lists, rounds and operations of one memory.

    Attributes:
        memory, limits, epoch: as given.
        finished: operations that have ended since the list was last emptied; the room above empties it.
        ready: sessions that have something to send (or were fenced: `session.fenced`); the room above empties it by
            `drain_ready()`.
        sessions: every session that is remembered, by id. rounds_open: by number, oldest first. rounds_ended: newest last.
    """

    def __init__(self, memory: Memory, limits: Limits | None = None, epoch: int = 1) -> None: ...

    # Sessions.

    def open_session(self, hello: Hello, now: float, token: str) -> Session:
        """Begin a session, or resume the one whose token is in the Hello (state LOST, or LIVE: then the old stream is dead).

        Args: token: the secret of a new session, drawn by the room above.
        Ensures: `session.resumed` tells which; a resumed one gets its un-acknowledged notices again, in order, under the
            same numbers.
        Raises: RequestError (version, budget, a handled_through never sent), LimitReached, FencedError (the token's session
            was fenced), Draining.
        """
        raise NotImplementedError

    def session_by_token(self, token: str) -> Session:
        """Raises: RequestError NO_SUCH_SESSION, FencedError."""
        raise NotImplementedError

    def heartbeat(self, session: Session, now: float) -> None:
        """A sign of life; every other call for the session is one too."""
        raise NotImplementedError

    def session_lost(self, session: Session, now: float) -> None:
        """The stream ended without a leave. Idempotent."""
        raise NotImplementedError

    def leave(self, session: Session, now: float) -> None:
        """It goes for good: everything that waits for it counts as answered; its registrations and exports are gone. Idempotent."""
        raise NotImplementedError

    def fence(self, session: Session, now: float, because: str) -> None:
        """Void its rights now (it broke the contract, or someone decided so). Idempotent."""
        raise NotImplementedError

    def acknowledge(self, session: Session, ack: Ack, now: float) -> None:
        """Handlers have finished. Old and repeated acks are harmless.

        Raises: PeerError (a seq never sent; busy and done at once; a refusal where none is allowed), FencedError.
        """
        raise NotImplementedError

    # Registrations.

    def register(self, session: Session, spec: Spec, now: float) -> Registration:
        """Put a notifier at the head of its list; every later notification is seen.

        Raises: RequestError (ESRCH no such mm or it is exiting; EINVAL the interval, the ops or the budget), LimitReached, FencedError,
            Draining.
        """
        raise NotImplementedError

    def unregister(self, session: Session, registration_id: int, now: float) -> bool:
        """Take a notifier off its list; nothing is delivered to it after this. What waits for it counts as answered.

        Returns: False when it was gone already. Raises: FencedError.
        """
        raise NotImplementedError

    # Operations.

    def start(
        self, generator: Generator[object, object, T], now: float, *, label: str = "", session: Session | None = None,
        report: bool = False, mm: Mm | None = None, tag: object = None,
    ) -> Operation[T]:  # fmt: skip
        """Run a call of the memory manager until it ends or must wait; it is in `finished` when it has ended.

        Args: label: for people ("munmap(0x7000, 4096) of redis"); session: on whose behalf; report: collect the notifier calls;
            mm: with report, the address space to report of (None: all).
        """
        raise NotImplementedError

    def fault(
        self, session: Session, registration_id: int, start: int, end: int, write: bool, now: float, *, wait_s: float = 0.0,
        tag: object = None,
    ) -> Operation[Granted]:  # fmt: skip
        """Translations for a registration. Kernel: hmm_range_fault() between mmu_interval_read_begin() and _retry().

        The operation's errors: RequestError (no such registration, EINVAL, E2BIG), FencedError, MmError EFAULT, EPERM.
        """
        raise NotImplementedError

    def snapshot(self, session: Session, mm: int, start: int, end: int, now: float, *, tag: object = None) -> Operation[Looked]:
        """What the page table says; grants nothing."""
        raise NotImplementedError

    def pin(
        self, session: Session, registration_id: int, start: int, end: int, write: bool, now: float, *, tag: object = None
    ) -> Operation[Pinned]:
        """Long-term references. Kernel: pin_user_pages(FOLL_LONGTERM)."""
        raise NotImplementedError

    def unpin(self, session: Session, pin: int, dirty: bool, now: float, *, tag: object = None) -> Operation[None]:
        """Give a pin back. Errors: RequestError NO_SUCH_PIN."""
        raise NotImplementedError

    def dma_read(
        self, session: Session, registration_id: int, addr: int, length: int, pfns: Sequence[int], generations: Sequence[int],
        now: float, *, pin: int = 0, tag: object = None,
    ) -> Operation[bytes]:  # fmt: skip
        """Read through translations, one for each page touched. Errors: StaleTranslation, FencedError, RequestError."""
        raise NotImplementedError

    def dma_write(
        self, session: Session, registration_id: int, addr: int, data: bytes, pfns: Sequence[int], generations: Sequence[int],
        now: float, *, pin: int = 0, tag: object = None,
    ) -> Operation[None]:  # fmt: skip
        """Write through translations; the frames are dirty at once. Errors: StaleTranslation, FencedError, RequestError."""
        raise NotImplementedError

    def export(
        self, session: Session, registration_id: int, mm: int, start: int, end: int, write: bool, now: float, *,
        wait_s: float = 0.0, tag: object = None,
    ) -> Operation[Granted]:  # fmt: skip
        """Mark pages external-rmap for an rmap registration and get their frames."""
        raise NotImplementedError

    def unexport(
        self, session: Session, registration_id: int, pfns: Sequence[int], dirty: Sequence[int], now: float, *,
        tag: object = None,
    ) -> Operation[None]:  # fmt: skip
        """Give exports back; those written become dirty. Frames that are not exported through it are ignored."""
        raise NotImplementedError

    # Time.

    def next_deadline(self) -> float | None:
        """When `expire` must be called next, in the room above's seconds; None: never."""
        raise NotImplementedError

    def expire(self, now: float) -> None:
        """Act on the deadlines that have passed: late marks, fences, leases, grace, waits of device requests."""
        raise NotImplementedError

    # For the room above.

    def drain_ready(self) -> list[Session]:
        """The sessions that have something to send (or are fenced now), each once; empties the list."""
        raise NotImplementedError

    def drain(self) -> None:
        """Take no new sessions, registrations or operations; what is under way goes on."""
        raise NotImplementedError
