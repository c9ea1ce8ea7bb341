"""The bus: inputs are method calls that take `now`, outputs are collected in `finished` and `ready`.

`now` is monotonic seconds. Nothing here waits, looks at a clock or draws a random number; the room above arms one
timer for `next_deadline()` and calls `expire(now)` when it goes off, and drains both lists after every call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from mmubusd.mm.memory import Memory
from mmubusd.mm.mm import Mm
from mmubusd.notify.access import Accesses
from mmubusd.notify.clock import NEVER, Clock
from mmubusd.notify.counters import Counters
from mmubusd.notify.errors import Draining
from mmubusd.notify.explain import Explain
from mmubusd.notify.exports import Exports
from mmubusd.notify.faults import Faults
from mmubusd.notify.granted import Granted, Looked, Migrated, Pinned
from mmubusd.notify.histogram import Histogram
from mmubusd.notify.history import History, What
from mmubusd.notify.limits import Limits
from mmubusd.notify.notice import Ack, Notice, Op, SessionId, Targets
from mmubusd.notify.operation import Operation
from mmubusd.notify.page_history import PageHistory
from mmubusd.notify.pins import Pins
from mmubusd.notify.registration import Registration, Spec
from mmubusd.notify.registry import Registry
from mmubusd.notify.rights import Rights
from mmubusd.notify.rounds import Rounds
from mmubusd.notify.runner import Runner
from mmubusd.notify.sanitizer import Offence, Sanitizer
from mmubusd.notify.session import Hello, Session, State
from mmubusd.notify.sessions import Sessions

T = TypeVar("T")

Wrap = Callable[[Generator[Any, Any, Any]], Generator[Any, Any, Any]]
"""How the room above follows an operation: it passes everything through and changes nothing."""


class RequestOptions(TypedDict, total=False):
    """What every request of a device may come with: tag, within as `Bus.start` takes them; wrap to follow it."""

    tag: object
    within: int
    wrap: Wrap | None


class Bus:
    """Sessions, lists, rounds and operations of one memory.

    Attributes:
        memory, limits, epoch: as given.
        finished: operations that have ended since the list was last emptied; the room above empties it.
        ready: sessions that have something to send (or were fenced: `session.fenced`); the room above empties it by
            `drain_ready()`.
        sessions: every session that is remembered, by id.
        registry: chains and registrations; rounds: `rounds.open` by number, oldest first, and `rounds.past`, newest
        last. counters, history: what is counted, and what is recorded when someone asked for it.
    """

    def __init__(self, memory: Memory, limits: Limits | None = None, epoch: int = 1) -> None:
        self.memory = memory
        self.limits = limits or Limits()
        self.epoch = epoch
        self.counters = Counters()
        self.history = History()
        self._clock = Clock(self.limits.stall_allowance_s)
        pages = PageHistory(self.limits.taken_max)
        self.sanitizer = Sanitizer(memory, pages, self._clock, self.limits.offences_max)
        self.registry = Registry(memory, self.limits, self.counters, self.history, self.sanitizer)
        self.rounds = Rounds(self.registry, self._clock)
        self._runner = Runner(self.rounds)
        self._sessions = Sessions(self.limits, epoch, self.rounds, self._gone)
        self._sessions.suspect = self._runner.suspect
        self._rights = Rights(self.rounds, self._sessions)
        self._faults = Faults(self.rounds, self._rights)
        self._exports = Exports(self.rounds, self._rights, self._faults)
        self._pins = Pins(self.rounds, self._rights)
        self._accesses = Accesses(self.rounds, self._rights, self._pins)
        self.explain = Explain(self.rounds)
        self._draining = False

    def _gone(self, session: Session) -> None:
        self._pins.forget(session)

    @property
    def sessions(self) -> dict[SessionId, Session]:
        return self._sessions.by_id

    @property
    def finished(self) -> list[Operation[object]]:
        return self._runner.finished

    @property
    def ready(self) -> list[Session]:
        return self.rounds.ready

    @property
    def running(self) -> dict[int, Operation[object]]:
        """Operations that have not ended, by id."""
        return self._runner.running

    def clock(self, now: float) -> float:
        """The bus's time at `now`: behind by the time in which the server itself was stalled."""
        return now - self._clock.stalled_s

    def _tick(self, now: float, session: Session | None = None) -> float:
        time = self._clock.tick(now)
        self.history.clock = time
        if session is not None:
            session.seen_at = time
        return time

    # Sessions.

    def open_session(self, hello: Hello, now: float, token: str) -> Session:
        """Begin a session, or resume the one of the Hello's token (LOST, or LIVE: then the old stream is dead).

        Args: token: the secret of a new session, drawn by the room above.
        Ensures: `session.resumed` tells which; a resumed one gets its un-acknowledged notices again, in order, under
            the same numbers.
        Raises: RequestError (version, budget, a handled_through never sent), LimitReached, FencedError (the token's
            session was fenced), Draining.
        """
        self._tick(now)
        if self._draining and not hello.token:
            raise Draining("the server stops soon and takes no new sessions")
        return self._sessions.open(hello, token)

    def session_by_token(self, token: str) -> Session:
        """Raises: RequestError NO_SUCH_SESSION, FencedError."""
        return self._sessions.by_token(token)

    def heartbeat(self, session: Session, now: float) -> None:
        """A sign of life; every other call for the session is one too."""
        self._tick(now, session)

    def session_lost(self, session: Session, now: float) -> None:
        """The stream ended without a leave. Idempotent."""
        self._tick(now)
        self._sessions.lost(session)

    def leave(self, session: Session, now: float) -> None:
        """It goes for good: what waits for it counts as answered, its registrations are gone. Idempotent."""
        self._tick(now)
        self._sessions.leave(session)
        self._runner.run()

    def fence(self, session: Session, now: float, because: str) -> None:
        """Void its rights now (it broke the contract, or someone decided so). Idempotent."""
        self._tick(now)
        self._sessions.fence(session, because)
        self._runner.run()

    def flush(self, session: Session, now: float) -> None:
        """Tell it that everything it holds is void (FLUSH_ALL), though it is not: a superset is always legal."""
        self._tick(now)
        if session.registrations and session.state is State.LIVE:
            targets = tuple(sorted(session.registrations, reverse=True))
            self.rounds.flush(session, targets)

    def process_died(self, session: Session, now: float) -> None:
        """The client's process has ended: nobody can answer, and nobody reaches the frames. Idempotent."""
        self._tick(now)
        self._sessions.died(session)
        self._runner.run()

    def acknowledge(self, session: Session, ack: Ack, now: float) -> None:
        """Handlers have finished. Old and repeated acks are harmless.

        Raises: PeerError (a seq never sent; busy and done at once; a refusal where none is allowed), FencedError.
        """
        time = self._tick(now, session)
        self._sessions.check(session)
        outbox = session.outbox
        done = outbox.acknowledge_through(ack.through) if not (ack.also or ack.results) else None
        if done is not None:
            for part in done:
                self.rounds.answer_plainly(session, part)
                if part.log is None:
                    for notice, targets in zip(part.notices, part.targets, strict=True):
                        self._flushed(session, notice, targets)
                self._count(session, part.notices, time)
        else:
            self._count(session, self._acknowledge_selectively(session, ack, time), time)
        if session.late_seq and session.late_seq <= outbox.acked_through:
            session.late_seq = 0
        if not session.in_ready and not outbox.idle:
            self._sessions.make_ready(session)
        if ack.results:
            self._sessions.rearm(session)
        self._runner.run()

    def _count(self, session: Session, notices: Sequence[Notice], time: float) -> None:
        """These were acknowledged by one message."""
        self.counters.acks += len(notices)
        stride = len(notices) // 8 or 1  # what was raised side by side took as long: some of them tell enough
        for notice in notices[::stride]:
            session.ack_latency.add(time - notice.opened_at, stride)

    def _flushed(self, session: Session, notice: Notice, targets: Targets) -> None:
        """A notice is done; if it told somebody to drop everything, that somebody holds nothing any more."""
        if notice.op is Op.FLUSH_ALL:
            for one, whom in notice.merged or ((notice, targets),):
                if one.op is Op.FLUSH_ALL and not one.round:
                    self._sessions.flushed(session, whom)

    def _acknowledge_selectively(self, session: Session, ack: Ack, time: float) -> list[Notice]:
        """Returns: the notices that are done now. Raises: PeerError; nothing has changed then."""
        outbox = session.outbox
        written = [
            (outbox.sent(told.seq), whom, told.dirty)
            for told in ack.results
            if told.dirty and (whom := outbox.targets_of(told.seq))
        ]
        acked = outbox.acknowledge(ack, time)
        for notice, whom, pages in written:  # before anything that this message acknowledges: notices may overlap
            self.rounds.dirty(session, notice, whom, pages)
        for notice, targets, result in acked:
            self.rounds.answer(session, notice, targets, result)
            self._flushed(session, notice, targets)
            if result is not None and result.slept:
                self.sanitizer.slept(session, notice)
        return [notice for notice, _, _ in acked]

    # Registrations.

    def register(self, session: Session, spec: Spec, now: float) -> Registration:
        """Put a notifier at the head of its list; every later notification is seen.

        Raises: RequestError (ESRCH no such mm or it is exiting; EINVAL the interval, the ops or the budget),
            LimitReached, FencedError, Draining.
        """
        self._tick(now, session)
        self._sessions.check(session)
        if self._draining:
            raise Draining("the server stops soon and takes no new registrations")
        registration = self.registry.register(session, spec)
        self._sessions.budget_added(session, registration.ack_budget_s)
        return registration

    def unregister(self, session: Session, registration_id: int, now: float) -> bool:
        """Take a notifier off its list; nothing is delivered to it after this. What waits for it counts as answered.

        Returns: False when it was gone already. Raises: FencedError.
        """
        self._tick(now, session)
        self._sessions.check(session)
        registration = session.registrations.get(registration_id)  # type: ignore[call-overload]
        if registration is None:
            return False
        if self.history.recording:
            self.history.note(What.UNREGISTERED, session=session.id, registration=registration_id)
        self.rounds.withdraw(registration, "it was unregistered")
        if session.withheld:
            self._sessions.rearm(session)
        self._runner.run()
        return True

    # Operations.

    def start(
        self, generator: Generator[object, object, T], now: float, *, label: str = "", session: Session | None = None,
        report: bool = False, mm: Mm | None = None, tag: object = None, within: int = 0,
    ) -> Operation[T]:  # fmt: skip
        """Run a call of the memory manager until it ends or must wait; it is in `finished` when it has ended.

        Args: label: for people ("munmap(0x7000, 4096) of redis"); session: on whose behalf; report: collect the
            notifier calls; mm: with report, the address space to report of (None: all); within: the number of the
            session's notice whose handler asks and waits for it, 0: none (see `deadlock`).
        """
        self._tick(now)
        if session is not None:
            session.seen_at = self._clock.time
        if self._draining:
            generator.close()
            raise Draining("the server stops soon and takes no new operations")
        return self._runner.start(
            generator, label=label, session=session, report=report, mm=mm, wait_s=NEVER, tag=tag, within=within
        )

    def _request(
        self, session: Session, generator: Generator[object, object, T], label: str, now: float, *,
        wait_s: float = 0.0, tag: object = None, within: int = 0, wrap: Wrap | None = None,
    ) -> Operation[T]:  # fmt: skip
        """Run a device's request; it waits for ranges and locks so long, and then answers with retry."""
        self._tick(now, session)
        wait = min(wait_s or self.limits.fault_wait_s, self.limits.fault_wait_max_s)
        work = generator if wrap is None else wrap(generator)
        return self._runner.start(
            work, label=label, session=session, report=False, mm=None, wait_s=wait, tag=tag, within=within
        )

    def fault(
        self, session: Session, registration_id: int, start: int, end: int, write: bool, now: float, *, wait_s: float =
        0.0, **options: Unpack[RequestOptions],
    ) -> Operation[Granted]:  # fmt: skip
        """Translations for a registration. Kernel: hmm_range_fault() between mmu_interval_read_begin() and _retry().

        The operation's errors: RequestError (no such registration, EINVAL, E2BIG), FencedError, MmError EFAULT, EPERM.
        """
        label = f"fault({start:#x}, {end:#x}) of {session.name}"
        generator = self._faults.fault(session, registration_id, start, end, write)
        return self._request(session, generator, label, now, wait_s=wait_s, **options)

    def snapshot(
        self, session: Session, mm: int, start: int, end: int, now: float, *, registration: int = 0,
        **options: Unpack[RequestOptions],
    ) -> Operation[Looked]:  # fmt: skip
        """What the page table says, and what is in the registration's own memory; grants nothing."""
        generator = self._faults.snapshot(session, mm, start, end, registration)
        return self._request(session, generator, "snapshot", now, **options)

    def migrate(
        self, session: Session, registration_id: int, start: int, end: int, to_system: bool, now: float, *,
        coherent: bool = False, wait_s: float = 0.0, **options: Unpack[RequestOptions],
    ) -> Operation[Migrated]:  # fmt: skip
        """Move pages to the registration's own memory, private or coherent, or back from it; end 0: all of both."""
        label = f"migrate({start:#x}, {end:#x}, {'to system' if to_system else 'to device'}) of {session.name}"
        generator = self._faults.migrate(session, registration_id, start, end, to_system, coherent)
        return self._request(session, generator, label, now, wait_s=wait_s, **options)

    def exclusive(
        self, session: Session, registration_id: int, start: int, end: int, now: float, *, wait_s: float = 0.0,
        **options: Unpack[RequestOptions],
    ) -> Operation[Granted]:  # fmt: skip
        """Pages for the registration alone. Kernel: make_device_exclusive_range()."""
        label = f"exclusive({start:#x}, {end:#x}) of {session.name}"
        generator = self._faults.exclusive(session, registration_id, start, end)
        return self._request(session, generator, label, now, wait_s=wait_s, **options)

    def pin(
        self, session: Session, registration_id: int, start: int, end: int, write: bool, now: float,
        **options: Unpack[RequestOptions],
    ) -> Operation[Pinned]:  # fmt: skip
        """Long-term references. Kernel: pin_user_pages(FOLL_LONGTERM)."""
        label = f"pin({start:#x}, {end:#x}) of {session.name}"
        generator = self._pins.pin(session, registration_id, start, end, write)
        return self._request(session, generator, label, now, wait_s=NEVER, **options)

    def unpin(
        self, session: Session, pin: int, dirty: bool, now: float, **options: Unpack[RequestOptions]
    ) -> Operation[None]:
        """Give a pin back. Errors: RequestError NO_SUCH_PIN."""
        return self._request(session, self._pins.unpin(session, pin, dirty), "unpin", now, **options)

    def dma_read(
        self, session: Session, registration_id: int, addr: int, length: int, pfns: Sequence[int], generations:
        Sequence[int], now: float, *, pin: int = 0, **options: Unpack[RequestOptions],
    ) -> Operation[bytes]:  # fmt: skip
        """Read through translations, one for each page touched. Errors: StaleTranslation, FencedError, RequestError."""
        generator = self._accesses.dma_read(session, registration_id, addr, length, pfns, generations, pin)
        return self._request(session, generator, "dma_read", now, **options)

    def dma_write(
        self, session: Session, registration_id: int, addr: int, data: bytes, pfns: Sequence[int], generations:
        Sequence[int], now: float, *, pin: int = 0, **options: Unpack[RequestOptions],
    ) -> Operation[None]:  # fmt: skip
        """Write through translations; the frames are dirty at once. Errors: as dma_read's."""
        generator = self._accesses.dma_write(session, registration_id, addr, data, pfns, generations, pin)
        return self._request(session, generator, "dma_write", now, **options)

    def export(
        self, session: Session, registration_id: int, mm: int, start: int, end: int, write: bool, now: float, *,
        wait_s: float = 0.0, **options: Unpack[RequestOptions],
    ) -> Operation[Granted]:  # fmt: skip
        """Mark pages external-rmap for an rmap registration and get their frames."""
        label = f"export({start:#x}, {end:#x}) of {session.name}"
        generator = self._exports.export(session, registration_id, mm, start, end, write)
        return self._request(session, generator, label, now, wait_s=wait_s, **options)

    def unexport(
        self, session: Session, registration_id: int, pfns: Sequence[int], dirty: Sequence[int], now: float,
        **options: Unpack[RequestOptions],
    ) -> Operation[None]:  # fmt: skip
        """Give exports back; those written become dirty. Frames that are not exported through it are ignored."""
        generator = self._exports.unexport(session, registration_id, pfns, dirty)
        return self._request(session, generator, "unexport", now, **options)

    # Time.

    def next_deadline(self) -> float | None:
        """When `expire` must be called next, in the room above's seconds; None: never."""
        return self._clock.next_deadline()

    def expire(self, now: float) -> None:
        """Act on the deadlines that have passed: late marks, fences, leases, grace, waits of device requests."""
        self._tick(now)
        while (whose := self._clock.due()) is not None:
            if isinstance(whose, Session):
                self._sessions.expired(whose)
            else:
                self._runner.expired(whose)
        self.sanitizer.look_at_frames(self.sessions)
        self._runner.run()

    # For the room above.

    def stalled(self, seconds: float) -> None:
        """The room above has noticed that it did not run for so long: nobody's deadline comes nearer by it.

        `expire` sees by itself when it is called late; this is for a stall that ends just before a deadline.
        """
        self._clock.stalled(seconds)

    def change_limits(self, limits: Limits) -> None:
        """Other bounds from now on. What was agreed with a session, and the shape of its queues, stays as it is."""
        self.limits = self.registry.limits = self._sessions.limits = self._rights.limits = limits

    def ack_latency(self) -> Histogram:
        """Seconds from notice to ack, of all sessions there are and were."""
        merged = Histogram()
        merged.merge(self.counters.ack_latency_before)
        for session in self.sessions.values():
            merged.merge(session.ack_latency)
        return merged

    def offences(self, check_frames: int = 0) -> Sequence[Offence]:
        """What drivers did that no driver may do, oldest first.

        Args: check_frames: look for damage in so many free frames first.
        """
        if check_frames:
            self.memory.frames.check_poison(check_frames)
        self.sanitizer.look_at_frames(self.sessions)
        return self.sanitizer.offences

    def drain_ready(self) -> list[Session]:
        """The sessions that have something to send (or are fenced now), each once; empties the list."""
        ready = self.rounds.ready
        self.rounds.ready = []
        return ready

    def drain(self) -> None:
        """Take no new sessions, registrations or operations; what is under way goes on."""
        self._draining = True
