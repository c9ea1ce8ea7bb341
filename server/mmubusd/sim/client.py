"""A model client: follows the protocol, over a network that does not. Its mirror is what a real driver would hold."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from mmubusd.mm.errno import MmError
from mmubusd.notify import (
    Ack,
    Batch,
    FencedError,
    Hello,
    Notice,
    Op,
    Operation,
    RequestError,
    Result,
    Session,
    Spec,
    StaleTranslation,
    State,
)
from mmubusd.notify.history import What
from mmubusd.sim.program import AT, PAGE, PAGES

if TYPE_CHECKING:
    from mmubusd.sim.simulation import Simulation

SEED = frozenset({Op.RELEASE, Op.AGE_PAGE, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_ALL})
MAINLINE = frozenset({Op.RELEASE, Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END, Op.CLEAR_FLUSH_YOUNG})
KINDS = (SEED, MAINLINE, SEED | MAINLINE, frozenset({Op.INVALIDATE_RANGE}), frozenset({Op.INVALIDATE_RANGE_START}))
FEATURES = frozenset({"findings", "within"})
AGING = (Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG)


class ModelClient:
    """One client process.

    mirror: (registration, page, or pfn for exports): (pfn, generation, rights). wrote: keys that were written through
    shared memory and not yet told of. paused_until, cut_until: until when the process is stopped, and until when its
    network carries nothing; heard_at: the last sign of life of the server.
    """

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation = simulation
        self.random = simulation.random
        self.name = name
        self.session: Session | None = None
        self.stream = 0
        self.connected = False
        self.crashed = False
        self.paused_until = 0.0
        self.cut_until = 0.0
        self.heard_at = 0.0
        self._tokens = 0
        self._voided = ""
        self._forget()

    def _forget(self) -> None:
        """A new session: nothing of the old one counts."""
        self.mirror: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.wrote: set[tuple[int, int]] = set()
        self.handled: list[tuple[int, Notice, tuple[int, ...]]] = []
        self.results: dict[int, Result] = {}
        self.mms: dict[int, int] = {}  # registration: mm
        self.pages: dict[int, range] = {}  # registration: pages of its interval
        self.done: set[int] = set()
        self.done_through = 0
        self.running: set[int] = set()  # notices whose handlers have called back
        self._sending = self._tell_again = False

    # The stream.

    def begin(self) -> None:
        """Start, or start again as a new process."""
        self._tokens += 1
        self._forget()
        self._attach(Hello(self.name, features=FEATURES, window=True, confirms=self._voided))
        self._voided = ""
        for mm in self.random.sample(self.simulation.programs.live(), min(2, len(self.simulation.programs.live()))):
            self._register(mm.id)
        if self.random.random() < 0.5:
            self._register(0)

    def _attach(self, hello: Hello) -> None:
        bus, now = self.simulation.bus, self.simulation.now
        self.session = bus.open_session(hello, now, f"{self.name}, {self._tokens}")
        self.stream += 1
        self._arrives_at = self.heard_at = now
        self._tell_again = bool(hello.token)  # nobody knows what arrived of what was said on the old stream
        self.connected, self._sending = True, False
        self._beat(self.stream)
        self.wake()

    def _beat(self, stream: int) -> None:
        """A heartbeat each way. Silence for two thirds of the lease: jeopardy; for a lease: the stream is given up."""
        if stream != self.stream or self.crashed or self.session is None:
            return
        now = self.simulation.now
        if self.connected and not self._paused() and not self.cut:
            if self.session.state is State.LIVE:
                self.simulation.bus.heartbeat(self.session, now)
            self.heard_at = now
        if self.connected and not self._paused() and now - self.heard_at > self.session.lease_s:
            self._break()
            return
        self.simulation.after(2.0, lambda: self._beat(stream))

    @property
    def cut(self) -> bool:
        """The network carries nothing."""
        return self.simulation.now < self.cut_until

    @property
    def jeopardy(self) -> bool:
        """The server has been silent for too long: what is held may be gone."""
        assert self.session is not None
        return self.simulation.now - self.heard_at > self.session.lease_s * 2 / 3

    def _way(self) -> float:
        """How long a message takes on this client's network; what is sent into a partition arrives after it."""
        return max(self.cut_until - self.simulation.now, 0.0) + self.simulation.delay()

    def _register(self, mm: int) -> None:
        assert self.session is not None
        interval = self.random.random() < 0.3
        first = self.random.randrange(PAGES)
        spec = Spec(
            mm, self.random.choice(KINDS), start=AT + first * PAGE if interval and mm else 0,
            end=AT + (first + 6) * PAGE if interval and mm else 0, only_held=bool(mm) and self.random.random() < 0.3,
            name=self.name, demotable=bool(mm) and self.random.random() < 0.2,
        )  # fmt: skip
        with suppress(RequestError, FencedError):  # the program may be gone by now
            made = self.simulation.bus.register(self.session, spec, self.simulation.now)
            self.mms[made.id] = mm
            self.pages[made.id] = range(first, min(first + 6, PAGES)) if interval and mm else range(PAGES)

    def wake(self) -> None:
        """The session has something to send: one message at a time."""
        session = self.session
        if session is None or self._sending or not self.connected:
            return
        if session.fenced is not None or session.state is State.LOST:
            if self.cut:  # it cannot know yet
                self.simulation.after(self._way(), self.wake)
                return
            self._lose()
            self.simulation.after(self.random.uniform(0.1, 1.0), self._again)
            return
        batch = session.take_batch()
        if batch is None:
            return
        self._sending = True
        stream = self.stream
        self.simulation.after(self._way(), lambda: self._receive(stream, batch))

    def _lose(self) -> None:
        self.connected = False
        self.stream += 1

    def _again(self) -> None:
        """Come back: to the same session if it is still there, else as a new one."""
        if self.connected or self.session is None or self.crashed:
            return
        if self.cut:
            self.simulation.after(self._way(), self._again)
            return
        last = self.handled[-1][0] if self.handled else 0
        try:
            self._attach(
                Hello(self.name, features=FEATURES, window=True, token=self.session.token, handled_through=last)
            )
        except (FencedError, RequestError):
            self._voided = self.session.token
            self.begin()

    def _receive(self, stream: int, batch: Batch) -> None:
        if stream != self.stream or not self.connected:
            return
        self._sending = False
        self.heard_at = self.simulation.now
        faults = self.simulation.faults
        if self.simulation.chance(faults.break_stream):
            self._break()
            return
        assert self.session is not None
        for seq in range(batch.first_seq, batch.first_seq + len(batch.notices)):
            self.simulation.bus.history.note(What.CLIENT_RECEIVED, session=self.session.id, number=seq)
        if self.simulation.chance(faults.pause):
            self.paused_until = self.simulation.now + self.random.uniform(0.0, faults.pause_s)
        if self.simulation.chance(faults.partition):
            self.cut_until = self.simulation.now + self.random.uniform(0.0, faults.partition_s)
        wait = max(self.paused_until - self.simulation.now, 0.0) + self.simulation.delay()
        self.simulation.after(wait, lambda: self._handle(stream, batch))
        self.wake()

    def _break(self) -> None:
        assert self.session is not None
        self._lose()
        self.simulation.bus.session_lost(self.session, self.simulation.now)
        self.simulation.after(self.random.uniform(0.0, 6.0), self._again)

    # Notices.

    def _handle(self, stream: int, batch: Batch) -> None:
        if stream != self.stream or not batch.notices:
            return
        results = []
        for seq, (notice, targets) in enumerate(zip(batch.notices, batch.targets, strict=True), batch.first_seq):
            if seq in self.running:
                continue
            if seq <= self.done_through or seq in self.done:  # it came again: the same answer
                if seq in self.results:
                    results.append(self.results[seq])
                continue
            again = notice.op is Op.INVALIDATE_RANGE_END
            if self.simulation.chance(self.simulation.faults.busy) and not again:
                results.append(Result(seq, busy=True))
                self.simulation.after(self.random.uniform(0.0, 1.5), partial(self._later, stream, seq, notice, targets))
                continue
            if self.simulation.chance(self.simulation.faults.fail) and not again:
                results.append(Result(seq, failed="it is a simulation"))
                self.simulation.after(self.random.uniform(0.0, 1.5), partial(self._later, stream, seq, notice, targets))
                continue
            if self.simulation.chance(self.simulation.faults.call_back) and not again:
                self._call_back(stream, seq, notice, targets)
                continue
            result = self._apply(seq, notice, targets)
            if result is not None:
                results.append(result)
        self._send(stream, self._ack(results))

    def _call_back(self, stream: int, seq: int, notice: Notice, targets: tuple[int, ...]) -> None:
        """The handler takes something away itself, and is done when that is over; or when it may not wait for it."""
        live = self.simulation.programs.live()
        if not live or notice.lock:
            self._later(stream, seq, notice, targets)
            return
        self.running.add(seq)
        session, mm = self.session, self.random.choice(live)
        at, length = self.simulation.programs.some_range()

        def ended(operation: Operation[Any]) -> None:
            if operation.error is not None and not isinstance(operation.error, MmError):
                self.simulation.broken.append(f"{operation.label} failed: {operation.error!r}")
            self.simulation.after(self._way(), over)

        def over() -> None:
            if session is self.session:  # on whatever stream it has by now
                self.running.discard(seq)
                self._later(self.stream, seq, notice, targets)

        def begin() -> None:
            label = f"madvise({at:#x}, {length:#x}) of {mm.name} by {self.name}"
            if mm.alive and session is self.session:
                call = mm.madvise(at, length, 4)
                self.simulation.call(call, label, ended, session=session, within=seq)
            else:
                over()

        self.simulation.after(self._way(), begin)

    def _send(self, stream: int, ack: Ack) -> None:
        """A stream keeps the order of its messages."""
        self._arrives_at = max(self._arrives_at, self.simulation.now + self._way())
        self.simulation.after(self._arrives_at - self.simulation.now, lambda: self._acknowledge(stream, ack))
        if self.simulation.chance(self.simulation.faults.replay):
            again = self._arrives_at - self.simulation.now + self.simulation.delay() * 10
            self.simulation.after(again, lambda: self._acknowledge(stream, ack))

    def _ack(self, results: list[Result]) -> Ack:
        """Everything that is done: cumulative as far as there is no gap."""
        while self.done_through + 1 in self.done:
            self.done_through += 1
            self.done.remove(self.done_through)
        if self._tell_again:
            self._tell_again = False
            told = {result.seq for result in results}
            results = [*(result for seq, result in self.results.items() if seq not in told), *results]
        return Ack(self.done_through, sorted(self.done), results)

    def _later(self, stream: int, seq: int, notice: Notice, targets: tuple[int, ...]) -> None:
        if stream == self.stream:
            done = seq <= self.done_through or seq in self.done  # it came again meanwhile, and was handled then
            result = self.results.get(seq) if done else self._apply(seq, notice, targets)
            if self.connected:
                self._send(stream, self._ack([result] if result is not None else []))

    def _acknowledge(self, stream: int, ack: Ack) -> None:
        if stream != self.stream or self.session is None:
            return
        try:
            self.simulation.bus.acknowledge(self.session, ack, self.simulation.now)
        except FencedError:
            self.wake()

    def _apply(self, seq: int, notice: Notice, targets: tuple[int, ...]) -> Result | None:
        """The handler: drop what the notice covers, hand over what was written there."""
        self.handled.append((seq, notice, targets))
        if seq > self.done_through:
            self.done.add(seq)
        if notice.op in AGING:
            return Result(seq, young=notice.pages[:1])
        if notice.op is Op.INVALIDATE_RANGE_END:
            return None
        if notice.refusable and self.random.random() < 0.3 and seq not in self.results:
            self.handled.pop()
            self.results[seq] = Result(seq, refused=True)
            return self.results[seq]
        dirty = []
        for key in [key for key in self.mirror if key[0] in targets and covers(notice, key[1])]:
            del self.mirror[key]
            if key in self.wrote:
                self.wrote.remove(key)
                dirty.append(key[1])
        if dirty:
            self.results[seq] = Result(seq, dirty=tuple(dirty))
        return self.results.get(seq)

    # What it does of itself.

    def step(self) -> None:
        """One random thing."""
        if self.session is None or not self.connected or self._paused():
            return
        if self.simulation.chance(self.simulation.faults.crash):
            self.crashed = True
            self._lose()
            self.simulation.bus.session_lost(self.session, self.simulation.now)
            return
        kind = self.random.choice(("fault", "fault", "fault", "use", "use", "use", "register", "unregister"))
        if kind == "fault" and self.mms:
            self._fault()
        elif kind == "use":
            self._use()
        elif kind == "register" and len(self.mms) < 5 and self.simulation.programs.live():
            self._register(self.random.choice(self.simulation.programs.live()).id)
        elif kind == "unregister" and self.mms and self.random.random() < 0.3:
            self._unregister()

    def _unregister(self) -> None:
        assert self.session is not None
        gone = self.random.choice(list(self.mms))
        del self.mms[gone]  # not used any more; but its handlers go on handing over until it is off the list
        stream, session = self.stream, self.session

        def unregister() -> None:
            if stream != self.stream:
                self.simulation.after(self._way(), lambda: self._unregister_again(session, gone))
                return
            self._unregistered(session, gone)

        self._arrives_at = max(self._arrives_at, self.simulation.now + self._way())
        self.simulation.after(self._arrives_at - self.simulation.now, unregister)

    def _unregister_again(self, session: Session, gone: int) -> None:
        """The stream broke before the server heard of it."""
        if session is self.session and self.connected:
            self._unregistered(session, gone)
        elif session is self.session:
            self.simulation.after(1.0, lambda: self._unregister_again(session, gone))

    def _unregistered(self, session: Session, gone: int) -> None:
        with suppress(FencedError):
            self.simulation.bus.unregister(session, gone, self.simulation.now)
        for key in [key for key in self.mirror if key[0] == gone]:
            del self.mirror[key]
            self.wrote.discard(key)

    def _fault(self) -> None:
        assert self.session is not None
        registration, mm = self.random.choice(list(self.mms.items()))
        first = self.random.choice(self.pages[registration])
        last = min(first + self.random.choice((1, 2, 8)), self.pages[registration].stop)
        at, length = AT + first * PAGE, (last - first) * PAGE
        write = self.random.random() < 0.5
        stream, session, bus = self.stream, self.session, self.simulation.bus
        key = registration

        def begin() -> None:
            if mm:
                self.simulation.start(bus.fault, session, key, at, at + length, write, then=ended, wait_s=0.5)
            else:
                live = self.simulation.programs.live()
                if live:
                    target = self.random.choice(live).id
                    self.simulation.start(
                        bus.export, session, key, target, at, at + length, write, then=ended, wait_s=0.5
                    )

        def ended(operation: Operation[Any]) -> None:
            if operation.error is None:
                self.simulation.after(self._way(), lambda: self._granted(session, key, mm, operation))
            elif not isinstance(operation.error, MmError | RequestError | FencedError):
                self.simulation.broken.append(f"fault of {self.name}: {operation.error!r}")
            elif getattr(operation.error, "reason", "") == "NO_SUCH_REGISTRATION" and session is self.session:
                self.mms.pop(key, None)  # its address space is gone

        if stream == self.stream:
            self.simulation.after(self._way(), begin)

    def _granted(self, session: Session, registration: int, mm: int, operation: Operation[Any]) -> None:
        granted = operation.result
        assert granted is not None
        if granted.retry or session is not self.session or session.fenced is not None or registration not in self.mms:
            return
        later = [notice for seq, notice, targets in self.handled if seq > granted.as_of_seq and registration in targets]
        translations = granted.translations
        for n, (pfn, generation, rights) in enumerate(
            zip(
                translations.pfns.tolist(), translations.generations.tolist(), translations.rights.tolist(), strict=True
            )
        ):
            page = translations.start + n * PAGE if mm else pfn
            if rights and not any(covers(notice, page) for notice in later):
                self.mirror[registration, page] = (pfn, generation, rights)

    def _use(self) -> None:
        """Through the server, which checks; or through shared memory, where nobody does."""
        assert self.session is not None
        usable = sorted(key for key in self.mirror if key[0] in self.mms)
        if not usable or self.jeopardy:
            return
        key = self.random.choice(usable)
        pfn, generation, rights = self.mirror[key]
        registration, page = key
        bus, session, now = self.simulation.bus, self.session, self.simulation.now
        address = page if self.mms[registration] else 0
        bus.history.note(
            What.CLIENT_USES,
            session=session.id,
            registration=registration,
            start=page,
            pfns=(pfn,),
            generations=(generation,),
        )
        if rights & 2 and self.random.random() < 0.5:
            self.simulation.memory.frames.store[(pfn << 12) + 8 : (pfn << 12) + 14] = b"device"
            bus.history.note(What.CLIENT_WROTE, session=session.id, registration=registration, start=page, pfns=(pfn,))
            self.wrote.add(key)
            return
        if self.cut or session.state is not State.LIVE:
            return  # the server cannot be asked
        if rights & 2 and self.random.random() < 0.5:
            operation: Operation[Any] = bus.dma_write(
                session, registration, address, b"dma", (pfn,), (generation,), now
            )
        else:
            operation = bus.dma_read(session, registration, address, 16, (pfn,), (generation,), now)
        self.simulation.running_nr += 1
        server_side = session.registrations.get(registration)  # type: ignore[call-overload]
        demoted = server_side is not None and server_side.uncached
        if isinstance(operation.error, StaleTranslation | RequestError) and not demoted:
            self.simulation.broken.append(f"{self.name} may use {page:#x}, and was refused: {operation.error.message}")

    # Ending.

    def _paused(self) -> bool:
        return self.simulation.now < self.paused_until

    def recover(self) -> None:
        """The liveness phase: whoever crashed is started again, whoever sleeps wakes."""
        self.paused_until = self.cut_until = 0.0
        if self.crashed:
            self.crashed = False
            if self.session is not None:
                self._voided = self.session.token
                self.simulation.bus.process_died(self.session, self.simulation.now)
            self.begin()
        elif not self.connected:
            self._again()


def covers(notice: Notice, page: int) -> bool:
    """Whether the notice takes this page (or frame) away."""
    if notice.op in (Op.RELEASE, Op.INVALIDATE_ALL, Op.FLUSH_ALL):
        return True
    if notice.op in (Op.INVALIDATE_PAGE, Op.RMAP_INVALIDATE_PAGE):
        return page in notice.pages
    return notice.op in (Op.INVALIDATE_RANGE, Op.INVALIDATE_RANGE_START) and notice.start <= page < notice.end
