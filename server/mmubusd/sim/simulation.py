"""A whole system in one seed: the real bus and the real memory, model clients and programs, a network that misbehaves.

The seed decides delays, losses, replays, pauses, crashes, partitions, stalls and restarts of the server. Virtual time
is a heap of what happens next, so a run is the same each time. A restarted server is a new epoch with new memory:
programs begin again, clients come back by themselves, and nothing is inherited.

    safety phase     faults; whatever happens, no rule may be broken
    liveness phase   none; everything under way must come to an end, and nobody is fenced any more

The validators of `mmubusd.notify.validators` judge the recording. Beside them the clients' own mirrors are compared
with the page tables when all is quiet, freed frames must hold their poison, and clients that follow the protocol must
not have been found doing anything wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from random import Random
from typing import Any

from mmubusd.mm import device
from mmubusd.mm.check import check_memory
from mmubusd.mm.memory import Memory
from mmubusd.notify import Bus, Limits, Op, Operation, Session, State
from mmubusd.notify.history import Event, What
from mmubusd.notify.sanitizer import Breach
from mmubusd.notify.transcript import line_of
from mmubusd.notify.validators import judge
from mmubusd.sim.client import ModelClient
from mmubusd.sim.program import Programs

SAFETY_S, LIVENESS_S = 8.0, 50.0
TIMER_S = 1e-6
"""A timer never goes off at once: what is rounded off of a deadline would make it go off for ever."""
HAPPENED_MAX = 200_000
"""More than happens in any run that comes to an end."""
SETTLED_S = 20.0
"""Seconds of calm after which everybody has come back and has been heard."""
SMALL = (
    Limits(outbox_notices_max=12, outbox_ranges_max=4, window_notices_max=16, batch_notices_max=5),
    Limits(outbox_notices_max=6, outbox_ranges_max=64, window_notices_max=16, batch_notices_max=5),
)
"""Bounds that are met: much is merged into everything, or into ranges."""
HONEST = frozenset({Breach.STALE_ACCESS, Breach.POISON, Breach.DIRTY_LOST, Breach.EARLY_ACK})
"""What a client that follows the protocol never does."""


@dataclass(frozen=True)
class Faults:
    """Chances, per event of its kind, and the greatest durations in seconds."""

    delay_s: float = 0.02
    break_stream: float = 0.01
    replay: float = 0.05
    crash: float = 0.003
    pause: float = 0.005
    pause_s: float = 3.0
    partition: float = 0.004
    partition_s: float = 12.0
    stall: float = 0.004
    stall_s: float = 4.0
    busy: float = 0.01
    fail: float = 0.01
    call_back: float = 0.02
    flush: float = 0.004
    restart: float = 0.001
    restart_s: float = 2.0


CALM = Faults(
    break_stream=0, replay=0, crash=0, pause=0, partition=0, stall=0, busy=0, fail=0, flush=0, restart=0,
)  # fmt: skip
"""No faults; handlers go on calling back."""
STALLS = replace(CALM, stall=0.03)
"""Only the server misbehaves: nobody may be fenced for it."""


class Simulation:
    """One run.

    Args: seed: decides everything; clients_nr, steps_nr: how much happens in the safety phase; limits: None: small
            ones for odd seeds, so that overload is met.
    """

    def __init__(self, seed: int, *, clients_nr: int = 4, steps_nr: int = 400, limits: Limits | None = None) -> None:
        self.seed = seed
        self.random = Random(seed)
        self._limits = limits or (SMALL[seed // 2 % len(SMALL)] if seed % 2 else Limits())
        self.faults = STALLS if seed % 5 == 4 else Faults()
        self.now = 1000.0
        self.broken: list[str] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = self._happened_nr = 0
        self._down_until = 0.0
        self._steps_nr = steps_nr
        self._shown: list[Event] = []
        self._begin_server(1)
        self.clients = [ModelClient(self, f"client {n}") for n in range(clients_nr)]

    # The server.

    def _begin_server(self, epoch: int) -> None:
        """A server's life begins: new memory, a new bus, new programs."""
        self.memory = Memory(frames_nr=2048)
        self.bus = Bus(self.memory, self._limits, epoch)
        self.bus.history.recording = True
        self._timer_at = float("inf")
        self.running_nr = 0
        self.programs = Programs(self)

    @property
    def down(self) -> bool:
        """It is being started again, and takes no connections."""
        return self.now < self._down_until

    def knows(self, session: Session) -> bool:
        """Whether the session is one of this server's life."""
        return session.epoch == self.bus.epoch

    def _restart(self) -> None:
        """The server dies with all that it knew, and begins again."""
        before = len(self.broken)
        self.broken += [f"{problem} (before a restart)" for problem in self._judge_life(over=False)]
        if len(self.broken) > before:
            self._shown = self._shown or self.bus.history.events
        self._down_until = self.now + self.random.uniform(0.0, self.faults.restart_s)
        self._begin_server(self.bus.epoch + 1)
        for client in self.clients:
            client.server_gone()

    # Time.

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Something happens later."""
        self._at(self.now + seconds, what)

    def to_server(self, session: Session, at: float, what: Callable[[], None]) -> None:
        """Something of a session reaches the server; when another one is there by then, it does not."""
        self._at(at, lambda: what() if self.knows(session) else None)

    def _at(self, at: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._heap, (at, self._serial, what))

    def delay(self) -> float:
        """How long a message takes."""
        return float(self.random.uniform(0.0, self.faults.delay_s) ** 1.5)

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def run_until(self, until: float) -> None:
        """Let time pass."""
        while self._heap and self._heap[0][0] <= until:
            self._happened_nr += 1
            assert self._happened_nr < HAPPENED_MAX, "a livelock: things happen, and time stands still"
            at, _, what = heappop(self._heap)
            self.now = max(self.now, at)
            what()
            self._settle()
        self.now = max(self.now, until)

    def _settle(self) -> None:
        """What the room above does after each input."""
        while self.bus.finished:
            ended = self.bus.finished[:]
            self.bus.finished.clear()
            for operation in ended:
                self.running_nr -= 1
                if callable(operation.tag):
                    operation.tag(operation)
        for session in self.bus.drain_ready():
            for client in self.clients:
                if client.session is session:
                    client.wake()
        deadline = self.bus.next_deadline()
        if deadline is not None and deadline < self._timer_at:
            self._timer_at = deadline
            self.after(max(deadline - self.now, TIMER_S), self._expire)

    def _expire(self) -> None:
        self._timer_at = float("inf")
        self.bus.expire(self.now)

    def _stall(self) -> None:
        """The server does not run: whatever arrives, and its own timer, waits. Then the timer goes off first."""
        self.now += self.random.uniform(0.0, self.faults.stall_s)

    # Operations.

    def start(
        self,
        begin: Callable[..., Operation[Any]],
        *args: Any,
        then: Callable[[Operation[Any]], None] | None = None,
        **more: Any,
    ) -> None:
        """Begin an operation of the bus; then is called when it has ended."""
        self.running_nr += 1
        begin(*args, self.now, tag=then, **more)

    def call(
        self,
        generator: Generator[Any, Any, Any],
        label: str,
        then: Callable[[Operation[Any]], None] | None = None,
        **more: Any,
    ) -> None:
        """Begin a call of a program."""
        self.start(self.bus.start, generator, label=label, then=then, **more)

    # The run.

    def run(self) -> list[str]:
        """Returns: what went wrong, one line each."""
        for client in self.clients:
            client.begin()
        for _ in range(self._steps_nr):
            self.after(self.random.uniform(0.0, 5.0), self._step)
        self.run_until(self.now + SAFETY_S)
        if self.faults is STALLS:
            self._nobody_is_fenced(0.0, "while only the server stalled")
        self.faults = CALM
        calm_at = self.bus.clock(self.now)
        for client in self.clients:
            client.recover()
        for _ in range(self._steps_nr // 8):
            self.after(self.random.uniform(SETTLED_S, SETTLED_S + 5.0), self._step)
        self.run_until(self.now + LIVENESS_S)
        self._nobody_is_fenced(calm_at + SETTLED_S, "though nothing went wrong any more")
        return [f"seed {self.seed}: {problem}" for problem in (*self.broken, *self._judge())]

    def _step(self) -> None:
        if self.chance(self.faults.stall):
            self._stall()
        if self.chance(self.faults.restart):
            self._restart()
        if self.down:
            return
        if self.chance(self.faults.flush):
            session = self.random.choice(self.clients).session
            if session is not None and self.knows(session):
                self.bus.flush(session, self.now)
        if self.chance(0.4):
            self.programs.step()
        else:
            self.random.choice(self.clients).step()

    def _nobody_is_fenced(self, since: float, why: str) -> None:
        for event in self.bus.history.events:
            if event.what in (What.FENCED, What.DEMOTED) and event.at >= since:
                self.broken.append(f"session {event.session} was {event.what} at {event.at:.3f} s {why}: {event.text}")

    def _judge(self) -> list[str]:
        problems = self._judge_life(over=True)
        if self.running_nr:
            problems.append(f"{self.running_nr} operations never ended: {list(self.bus.running.values())}")
        if self.bus.rounds.open:
            problems.append(f"rounds never ended: {list(self.bus.rounds.open.values())}")
        if self.memory.frames.withheld:
            problems.append(f"{len(self.memory.frames.withheld)} frames are withheld, and everybody has confirmed")
        if self.memory.frames.quarantine_nr:
            problems.append(f"{self.memory.frames.quarantine_nr} frames were left in quarantine")
        for client in self.clients:
            if client.session is None or client.session.state is not State.LIVE or not self.knows(client.session):
                problems.append(f"{client.name} has not come back: {client.session}")
        check_memory(self.memory)
        return problems + self._incoherent()

    def _judge_life(self, *, over: bool) -> list[str]:
        """What went wrong while this server lived. Args: over: all should have come to an end."""
        problems = [str(violation) for violation in judge(self.bus.history.events, over=over, longest_s=4.0)]
        if self.bus.counters.freed_before_ack:
            problems.append(f"{self.bus.counters.freed_before_ack} frames were freed before the ack")
        for offence in self.bus.offences(check_frames=2048):
            if offence.breach in HONEST:
                problems.append(f"{offence.name} was found: {offence.breach}: {offence.message} {offence.story}")
        return problems

    def _incoherent(self) -> list[str]:
        """All is quiet: what clients hold must be what the page tables say."""
        problems = []
        for client in self.clients:
            if client.session is None or client.session.state is not State.LIVE or not self.knows(client.session):
                continue
            for registration_id, round_id in sorted(client.mirror.begun):
                registration = client.session.registrations.get(registration_id)  # type: ignore[call-overload]
                if registration is not None and Op.INVALIDATE_RANGE_END in registration.ops:
                    problems.append(
                        f"registration {registration_id} of {client.name} heard the start of round {round_id}, and "
                        "never its end"
                    )
            for (registration_id, page), (pfn, generation, rights) in sorted(client.mirror.held.items()):
                registration = client.session.registrations.get(registration_id)  # type: ignore[call-overload]
                if registration is None:
                    problems.append(f"{client.name} still holds {page:#x} of a registration that is gone")
                elif registration.mm:
                    entry = int(device.snapshot(self.memory.mm(registration.mm), page, page + 4096)[0])
                    allowed = 3 if entry & device.WRITE else 1
                    if entry & device.PFN_MASK != pfn or not entry & device.VALID or rights & ~allowed:
                        problems.append(
                            f"{client.name} holds frame {pfn} at {page:#x} with rights {rights}; there is {entry:#x}"
                        )
                if int(self.memory.frames.generation[pfn]) != generation:
                    problems.append(f"{client.name} holds frame {pfn} at {page:#x}, which was freed")
        return problems

    def transcript(self, last_nr: int = 60) -> list[str]:
        """The end of the recording, for people; when something was wrong before a restart, of that one."""
        return [line_of(event) for event in (self._shown or self.bus.history.events)[-last_nr:]]
