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
from sim.program import AT, PAGE, PAGES

if TYPE_CHECKING:
    from sim.simulation import Simulation

SEED = frozenset({Op.RELEASE, Op.AGE_PAGE, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_ALL})
MAINLINE = frozenset({Op.RELEASE, Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END, Op.CLEAR_FLUSH_YOUNG})
KINDS = (SEED, MAINLINE, SEED | MAINLINE, frozenset({Op.INVALIDATE_RANGE}), frozenset({Op.INVALIDATE_RANGE_START}))
AGING = (Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG)


class ModelClient:
    """One client process.

    mirror: (registration, page, or pfn for exports): (pfn, generation, rights). wrote: keys that were written through
    shared memory and not yet told of.
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
        self._tokens = 0
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
        self._sending = False

    # The stream.

    def begin(self) -> None:
        """Start, or start again as a new process."""
        self._tokens += 1
        self._forget()
        self._attach(Hello(self.name))
        for mm in self.random.sample(self.simulation.programs.live(), min(2, len(self.simulation.programs.live()))):
            self._register(mm.id)
        if self.random.random() < 0.5:
            self._register(0)

    def _attach(self, hello: Hello) -> None:
        bus, now = self.simulation.bus, self.simulation.now
        self.session = bus.open_session(hello, now, f"{self.name}, {self._tokens}")
        self.stream += 1
        self._arrives_at = now
        self.connected, self._sending = True, False
        self._beat(self.stream)
        self.wake()

    def _beat(self, stream: int) -> None:
        if self.connected and stream == self.stream and not self._paused() and self.session is not None:
            self.simulation.bus.heartbeat(self.session, self.simulation.now)
        if stream == self.stream and not self.crashed:
            self.simulation.after(2.0, lambda: self._beat(stream))

    def _register(self, mm: int) -> None:
        assert self.session is not None
        interval = self.random.random() < 0.3
        first = self.random.randrange(PAGES)
        spec = Spec(
            mm, self.random.choice(KINDS), start=AT + first * PAGE if interval and mm else 0,
            end=AT + (first + 6) * PAGE if interval and mm else 0, only_held=bool(mm) and self.random.random() < 0.3,
            name=self.name,
        )  # fmt: skip
        with suppress(RequestError):  # the program may be gone by now
            made = self.simulation.bus.register(self.session, spec, self.simulation.now)
            self.mms[made.id] = mm
            self.pages[made.id] = range(first, min(first + 6, PAGES)) if interval and mm else range(PAGES)

    def wake(self) -> None:
        """The session has something to send: one message at a time."""
        session = self.session
        if session is None or self._sending or not self.connected:
            return
        if session.fenced is not None:
            self._lose()
            self.simulation.after(self.random.uniform(0.1, 1.0), self._again)
            return
        batch = session.take_batch()
        if batch is None:
            return
        self._sending = True
        stream = self.stream
        self.simulation.after(self.simulation.delay(), lambda: self._receive(stream, batch))

    def _lose(self) -> None:
        self.connected = False
        self.stream += 1

    def _again(self) -> None:
        """Come back: to the same session if it is still there, else as a new one."""
        if self.connected or self.session is None or self.crashed:
            return
        last = self.handled[-1][0] if self.handled else 0
        try:
            self._attach(Hello(self.name, token=self.session.token, handled_through=last))
        except (FencedError, RequestError):
            self.begin()

    def _receive(self, stream: int, batch: Batch) -> None:
        if stream != self.stream or not self.connected:
            return
        self._sending = False
        faults = self.simulation.faults
        if self.simulation.chance(faults.break_stream):
            self._break()
            return
        assert self.session is not None
        for seq in range(batch.first_seq, batch.first_seq + len(batch.notices)):
            self.simulation.bus.history.note(What.CLIENT_RECEIVED, session=self.session.id, number=seq)
        if self.simulation.chance(faults.pause):
            self.paused_until = self.simulation.now + self.random.uniform(0.0, faults.pause_s)
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
            again = seq <= self.done_through or seq in self.done or notice.op is Op.INVALIDATE_RANGE_END
            if self.simulation.chance(self.simulation.faults.busy) and not again:
                results.append(Result(seq, busy=True))
                self.simulation.after(self.random.uniform(0.0, 1.5), partial(self._later, stream, seq, notice, targets))
                continue
            if self.simulation.chance(self.simulation.faults.fail) and not again:
                results.append(Result(seq, failed="it is a simulation"))
                self.simulation.after(self.random.uniform(0.0, 1.5), partial(self._later, stream, seq, notice, targets))
                continue
            result = self._apply(seq, notice, targets)
            if result is not None:
                results.append(result)
        self._send(stream, self._ack(results))

    def _send(self, stream: int, ack: Ack) -> None:
        """A stream keeps the order of its messages."""
        self._arrives_at = max(self._arrives_at, self.simulation.now + self.simulation.delay())
        self.simulation.after(self._arrives_at - self.simulation.now, lambda: self._acknowledge(stream, ack))

    def _ack(self, results: list[Result]) -> Ack:
        """Everything that is done: cumulative as far as there is no gap."""
        while self.done_through + 1 in self.done:
            self.done_through += 1
            self.done.remove(self.done_through)
        return Ack(self.done_through, sorted(self.done), results)

    def _later(self, stream: int, seq: int, notice: Notice, targets: tuple[int, ...]) -> None:
        if stream == self.stream:
            result = self._apply(seq, notice, targets)
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
        if (
            notice.refusable
            and notice.op is Op.RMAP_INVALIDATE_PAGE
            and self.random.random() < 0.3
            and seq not in self.results
        ):
            self.handled.pop()
            return Result(seq, refused=True)
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
        elif kind == "use" and self.mirror:
            self._use()
        elif kind == "register" and len(self.mms) < 5 and self.simulation.programs.live():
            self._register(self.random.choice(self.simulation.programs.live()).id)
        elif kind == "unregister" and self.mms and self.random.random() < 0.3:
            self._unregister()

    def _unregister(self) -> None:
        assert self.session is not None
        gone = self.random.choice(list(self.mms))
        for key in [key for key in self.mirror if key[0] == gone]:
            del self.mirror[key]
            self.wrote.discard(key)
        del self.mms[gone]
        try:
            self.simulation.bus.unregister(self.session, gone, self.simulation.now)
        except FencedError:
            self.wake()

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
                self.simulation.after(self.simulation.delay(), lambda: self._granted(session, key, mm, operation))
            elif not isinstance(operation.error, MmError | RequestError | FencedError):
                self.simulation.broken.append(f"fault of {self.name}: {operation.error!r}")
            elif getattr(operation.error, "reason", "") == "NO_SUCH_REGISTRATION" and session is self.session:
                self.mms.pop(key, None)  # its address space is gone

        if stream == self.stream:
            self.simulation.after(self.simulation.delay(), begin)

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
        key = self.random.choice(sorted(self.mirror))
        pfn, generation, rights = self.mirror[key]
        registration, page = key
        bus, session, now = self.simulation.bus, self.session, self.simulation.now
        if session.state is not State.LIVE:
            return
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
            self.simulation.memory.frames.write(pfn, 8, b"device")
            bus.history.note(What.CLIENT_WROTE, session=session.id, registration=registration, start=page, pfns=(pfn,))
            self.wrote.add(key)
            return
        if rights & 2 and self.random.random() < 0.5:
            operation: Operation[Any] = bus.dma_write(
                session, registration, address, b"dma", (pfn,), (generation,), now
            )
        else:
            operation = bus.dma_read(session, registration, address, 16, (pfn,), (generation,), now)
        self.simulation._running += 1
        if isinstance(operation.error, StaleTranslation):
            self.simulation.broken.append(f"{self.name} may use {page:#x}, and was refused: {operation.error.message}")

    # Ending.

    def _paused(self) -> bool:
        return self.simulation.now < self.paused_until

    def recover(self) -> None:
        """The liveness phase: whoever crashed is started again, whoever sleeps wakes."""
        self.paused_until = 0.0
        if self.crashed:
            self.crashed = False
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
