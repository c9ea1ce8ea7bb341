"""A model client: follows the protocol, over a network that does not. Its mirror is what a real driver would hold."""

from __future__ import annotations

from collections.abc import Callable
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
    State,
)
from mmubusd.notify.history import What
from mmubusd.sim.answers import Answers
from mmubusd.sim.device import Device
from mmubusd.sim.mirror import Mirror, stands_for

if TYPE_CHECKING:
    from mmubusd.sim.simulation import Simulation

FEATURES = frozenset({"findings", "within"})
AGING = (Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG)


class ModelClient:
    """One client process: a session, a stream and its handlers; `device` is what it does of itself.

    Attributes:
        mirror, answers: of this session. paused_until, cut_until: until when the process is stopped, and until when
        its network carries nothing; heard_at: the last sign of life of the server. stream: counts; what was on the way
        on an earlier one is lost.
    """

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation = simulation
        self.random = simulation.random
        self.name = name
        self.session: Session | None = None
        self.mirror, self.answers = Mirror(), Answers()
        self.device = Device(self)
        self.stream = 0
        self.connected = False
        self.crashed = False
        self.paused_until = 0.0
        self.cut_until = 0.0
        self.heard_at = 0.0
        self._arrives_at = 0.0
        self._tokens = 0
        self._voided = ""
        self._sending = False

    # Sessions.

    def begin(self) -> None:
        """Start, or start again as a new process: nothing of an old session counts."""
        self._tokens += 1
        self.mirror, self.answers = Mirror(), Answers()
        self._attach(Hello(self.name, features=FEATURES, window=True, confirms=self._voided))
        self._voided = ""
        live = self.simulation.programs.live()
        for mm in self.random.sample(live, min(2, len(live))):
            self.device.register(mm.id)
        if self.random.random() < 0.5:
            self.device.register(0)

    def _attach(self, hello: Hello) -> None:
        bus, now = self.simulation.bus, self.simulation.now
        self.session = bus.open_session(hello, now, f"{self.name}, {self._tokens}")
        self.stream += 1
        self._arrives_at = self.heard_at = now
        if hello.token:
            self.answers.resume()
        self.connected, self._sending = True, False
        self._beat(self.stream)
        self.wake()

    def _again(self) -> None:
        """Come back: to the same session if it is still there, else as a new one."""
        if self.connected or self.session is None or self.crashed:
            return
        if self.cut:
            self.simulation.after(self.way(), self._again)
            return
        if self.simulation.down:
            self.simulation.after(self.random.uniform(0.05, 0.5), self._again)  # with jitter
            return
        token, through = self.session.token, self.answers.last_seq
        try:
            self._attach(Hello(self.name, features=FEATURES, window=True, token=token, handled_through=through))
        except (FencedError, RequestError):
            self._voided = token
            self.begin()

    def recover(self) -> None:
        """The liveness phase: whoever crashed is started again, whoever sleeps wakes."""
        self.paused_until = self.cut_until = 0.0
        if self.crashed:
            self.crashed = False
            if self.session is not None and self.simulation.knows(self.session):
                self._voided = self.session.token
                self.simulation.bus.process_died(self.session, self.simulation.now)
            self._start()
        elif not self.connected:
            self._again()

    def _start(self) -> None:
        if self.simulation.down:
            self.simulation.after(0.5, self._start)
        else:
            self.begin()

    # The stream.

    def _beat(self, stream: int) -> None:
        """A heartbeat each way. Silence for two thirds of the lease: jeopardy; for a lease: the stream is given up."""
        if stream != self.stream or self.crashed or self.session is None:
            return
        now = self.simulation.now
        if self.connected and not self.paused and not self.cut and self.simulation.knows(self.session):
            if self.session.state is State.LIVE:
                self.simulation.bus.heartbeat(self.session, now)
            self.heard_at = now
        if self.connected and not self.paused and now - self.heard_at > self.session.lease_s:
            self._break()
            return
        self.simulation.after(2.0, lambda: self._beat(stream))

    @property
    def paused(self) -> bool:
        """The process is stopped."""
        return self.simulation.now < self.paused_until

    @property
    def cut(self) -> bool:
        """The network carries nothing."""
        return self.simulation.now < self.cut_until

    @property
    def jeopardy(self) -> bool:
        """The server has been silent for too long: what is held may be gone."""
        assert self.session is not None
        return self.simulation.now - self.heard_at > self.session.lease_s * 2 / 3

    def way(self) -> float:
        """How long a message takes on this client's network; what is sent into a partition arrives after it."""
        return max(self.cut_until - self.simulation.now, 0.0) + self.simulation.delay()

    def ask(self, what: Callable[[], None]) -> None:
        """Send a request, which needs no order."""
        assert self.session is not None
        self.simulation.to_server(self.session, self.simulation.now + self.way(), what)

    def say(self, what: Callable[[], None], lost: Callable[[], None] = lambda: None) -> None:
        """Send a message on the stream, which keeps their order; lost: it broke before the message had arrived."""
        assert self.session is not None
        self._arrives_at = max(self._arrives_at, self.simulation.now + self.way())
        stream = self.stream
        self.simulation.to_server(self.session, self._arrives_at, lambda: what() if stream == self.stream else lost())

    def wake(self) -> None:
        """The session has something to send: one message at a time."""
        session = self.session
        if session is None or self._sending or not self.connected or not self.simulation.knows(session):
            return
        if session.fenced is not None or session.state is State.LOST:
            if self.cut:  # it cannot know yet
                self.simulation.after(self.way(), self.wake)
                return
            self._lose()
            self.simulation.after(self.random.uniform(0.1, 1.0), self._again)
            return
        batch = session.take_batch()
        if batch is None:
            return
        self._look_at(batch)
        self._sending = True
        stream = self.stream
        self.simulation.after(self.way(), lambda: self._receive(stream, batch))

    def _look_at(self, batch: Batch) -> None:
        """What is sent names nobody who has unregistered, and what stands for many notices covers each of them."""
        for notice, targets in zip(batch.notices, batch.targets, strict=True):
            if gone := self.mirror.gone.intersection(targets):
                self.simulation.broken.append(
                    f"{notice} is sent to {sorted(gone)} of {self.name}, which are unregistered"
                )
            for original, _ in notice.merged or ():
                if not stands_for(notice, original):
                    self.simulation.broken.append(f"{notice} does not cover {original}, for which it stands")

    def _receive(self, stream: int, batch: Batch) -> None:
        assert self.session is not None
        if stream != self.stream or not self.connected or not self.simulation.knows(self.session):
            return
        self._sending = False
        self.heard_at = self.simulation.now
        faults = self.simulation.faults
        if self.simulation.chance(faults.break_stream):
            self._break()
            return
        for seq in range(batch.first_seq, batch.first_seq + len(batch.notices)):
            self.simulation.bus.history.note(What.CLIENT_RECEIVED, session=self.session.id, number=seq)
        if self.simulation.chance(faults.pause):
            self.paused_until = self.simulation.now + self.random.uniform(0.0, faults.pause_s)
        if self.simulation.chance(faults.partition):
            self.cut_until = self.simulation.now + self.random.uniform(0.0, faults.partition_s)
        wait = max(self.paused_until - self.simulation.now, 0.0) + self.simulation.delay()
        self.simulation.after(wait, lambda: self._handle(stream, batch))
        self.wake()

    # Its ends.

    def _lose(self) -> None:
        self.connected = False
        self.stream += 1

    def _break(self) -> None:
        assert self.session is not None
        self._lose()
        if self.simulation.knows(self.session):
            self.simulation.bus.session_lost(self.session, self.simulation.now)
        self.simulation.after(self.random.uniform(0.0, 6.0), self._again)

    def server_gone(self) -> None:
        """The server has stopped. Who is cut off hears of it later."""
        stream = self.stream

        def hear() -> None:
            if stream == self.stream and self.connected:
                self._lose()
                self.simulation.after(self.random.uniform(0.0, 0.5), self._again)

        self.simulation.after(self.way(), hear)

    def crash(self) -> None:
        """The process dies."""
        assert self.session is not None
        self.crashed = True
        self._lose()
        if self.simulation.knows(self.session):
            self.simulation.bus.session_lost(self.session, self.simulation.now)

    def step(self) -> None:
        """One random thing, unless it cannot do any."""
        if self.session is None or not self.connected or self.paused or not self.simulation.knows(self.session):
            return
        if self.simulation.chance(self.simulation.faults.crash):
            self.crash()
        else:
            self.device.step()

    # Notices.

    def _handle(self, stream: int, batch: Batch) -> None:
        if stream != self.stream or not batch.notices:
            return
        results = []
        for seq, (notice, targets) in enumerate(zip(batch.notices, batch.targets, strict=True), batch.first_seq):
            result = self._begin_handler(stream, seq, notice, targets)
            if result is not None:
                results.append(result)
        self._acknowledge(self.answers.ack(results))

    def _begin_handler(self, stream: int, seq: int, notice: Notice, targets: tuple[int, ...]) -> Result | None:
        """Returns: what is to be said of it at once."""
        if seq in self.answers.running:
            return None
        if self.answers.has_done(seq):  # it came again: the same answer
            return self.answers.results.get(seq)
        faults, later = self.simulation.faults, partial(self._later, stream, seq, notice, targets)
        if notice.op is Op.INVALIDATE_RANGE_END:
            return self._apply(seq, notice, targets)
        if self.simulation.chance(faults.busy):
            self.simulation.after(self.random.uniform(0.0, 1.5), later)
            return Result(seq, busy=True)
        if self.simulation.chance(faults.fail):
            self.simulation.after(self.random.uniform(0.0, 1.5), later)
            return Result(seq, failed="it is a simulation")
        if self.simulation.chance(faults.call_back):
            self._call_back(stream, seq, notice, targets)
            return None
        return self._apply(seq, notice, targets)

    def _call_back(self, stream: int, seq: int, notice: Notice, targets: tuple[int, ...]) -> None:
        """The handler takes something away itself, and is done when that is over; or when it may not wait for it."""
        live = self.simulation.programs.live()
        if not live or notice.lock:
            self._later(stream, seq, notice, targets)
            return
        self.answers.running.add(seq)
        session, mm = self.session, self.random.choice(live)
        at, length = self.simulation.programs.some_range()

        def ended(operation: Operation[Any]) -> None:
            if operation.error is not None and not isinstance(operation.error, MmError):
                self.simulation.broken.append(f"{operation.label} failed: {operation.error!r}")
            self.simulation.after(self.way(), over)

        def over() -> None:
            if session is self.session:  # on whatever stream it has by now
                self.answers.running.discard(seq)
                self._later(self.stream, seq, notice, targets)

        def begin() -> None:
            label = f"madvise({at:#x}, {length:#x}) of {mm.name} by {self.name}"
            if mm.alive and session is self.session:
                call = mm.madvise(at, length, 4)
                self.simulation.call(call, label, ended, session=session, within=seq)
            else:
                over()

        self.ask(begin)

    def _later(self, stream: int, seq: int, notice: Notice, targets: tuple[int, ...]) -> None:
        if stream == self.stream:
            done = self.answers.has_done(seq)  # it came again meanwhile, and was handled then
            result = self.answers.results.get(seq) if done else self._apply(seq, notice, targets)
            if self.connected:
                self._acknowledge(self.answers.ack([result] if result is not None else []))

    def _acknowledge(self, ack: Ack) -> None:
        session = self.session
        assert session is not None

        def arrives() -> None:
            try:
                self.simulation.bus.acknowledge(session, ack, self.simulation.now)
            except FencedError:
                self.wake()

        self.say(arrives)
        if self.simulation.chance(self.simulation.faults.replay):
            stream = self.stream
            again = self._arrives_at + self.simulation.delay() * 10
            self.simulation.to_server(session, again, lambda: arrives() if stream == self.stream else None)

    def _apply(self, seq: int, notice: Notice, targets: tuple[int, ...]) -> Result | None:
        """The handler: drop what the notice covers, hand over what was written there."""
        result: Result | None = None
        if notice.op in AGING:
            result = Result(seq, young=notice.pages[:1] or (notice.start,))
        elif notice.refusable and self.random.random() < 0.3:
            result = Result(seq, refused=True)
        elif notice.op is Op.INVALIDATE_RANGE_END:
            self.mirror.end(notice, targets)
        elif dirty := self.mirror.drop(seq, notice, targets):
            result = Result(seq, dirty=dirty)
        self.answers.done(seq, notice, targets, result)
        return result
