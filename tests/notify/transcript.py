"""Scenarios that read as transcripts: a world with its own clock, and clients that do what they are told."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from mmubusd.notify import Ack, Bus, Hello, Limits, Notice, Op, Operation, Registration, Result, Session, Spec
from mmubusd.notify.validators import judge
from notify.machine import FakeMemory

SEED = (Op.RELEASE, Op.AGE_PAGE, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_ALL)
MAINLINE = (
    Op.RELEASE,
    Op.INVALIDATE_RANGE_START,
    Op.INVALIDATE_RANGE_END,
    Op.CLEAR_FLUSH_YOUNG,
    Op.CLEAR_YOUNG,
    Op.TEST_YOUNG,
)
PAGE = 0x1000


class World:
    """One bus and its time."""

    def __init__(self, limits: Limits | None = None, memory: Any = None) -> None:
        self.memory = FakeMemory() if memory is None else memory
        self.bus = Bus(self.memory, limits)
        self.bus.history.recording = True
        self.now = 100.0
        self._tokens = 0

    def client(self, name: str, **hello: Any) -> Client:
        self._tokens += 1
        return Client(self, self.bus.open_session(Hello(name, **hello), self.now, f"token {self._tokens}"))

    def hello(self, name: str, **more: Any) -> Hello:
        """A Hello, to open a session by hand."""
        return Hello(name, **more)

    def run(self, generator: Generator[Any, Any, Any], label: str = "", **options: Any) -> Operation[Any]:
        return self.bus.start(generator, self.now, label=label, **options)

    def later(self, seconds: float) -> None:
        """Time passes as for a room above that never is late: the timer goes off at each deadline."""
        until = self.now + seconds
        while (deadline := self.bus.next_deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            self.bus.expire(self.now)
        self.now = until


class Client:
    """One session, driven by hand."""

    def __init__(self, world: World, session: Session) -> None:
        self.world = world
        self.session = session
        self.received: list[tuple[int, Notice, tuple[int, ...]]] = []

    def register(self, mm: Any, *ops: Op, **spec: Any) -> Registration:
        return self.world.bus.register(self.session, Spec(mm.id if mm else 0, frozenset(ops), **spec), self.world.now)

    def unregister(self, registration: Registration) -> bool:
        return self.world.bus.unregister(self.session, registration.id, self.world.now)

    def hears(self) -> list[str]:
        """Everything that is to be sent now, one line a notice: "1 invalidate_range 1000-3000 for 2,1"."""
        lines = []
        while (batch := self.session.take_batch()) is not None:
            for seq, (notice, targets) in enumerate(zip(batch.notices, batch.targets, strict=True), batch.first_seq):
                self.received.append((seq, notice, targets))
                lines.append(f"{seq} {describe(notice)} for {','.join(map(str, targets))}")
            if batch.late_seq:
                lines.append(f"late {batch.late_seq}")
        return lines

    def acks(self, through: int = 0, *, also: Sequence[int] = (), **result: Any) -> None:
        """Acknowledge; keyword arguments other than also are one result, of the notice `seq`."""
        results = (Result(**result),) if result else ()
        self.world.bus.acknowledge(self.session, Ack(through, also, results), self.world.now)


def describe(notice: Notice) -> str:
    where = f"{notice.start:x}-{notice.end:x}"
    if notice.op in (Op.AGE_PAGE, Op.CLEAR_FLUSH_YOUNG, Op.CLEAR_YOUNG, Op.TEST_YOUNG, Op.INVALIDATE_PAGE):
        where = ",".join(f"{page:x}" for page in notice.pages)
    elif notice.op is Op.RMAP_INVALIDATE_PAGE:
        where = ",".join(str(pfn) for pfn in notice.pages)
    elif notice.op in (Op.RELEASE, Op.INVALIDATE_ALL, Op.FLUSH_ALL):
        where = "all"
    return f"{notice.op.name.lower()} {where}"


def assert_rules(world: World, *, over: bool = True) -> None:
    """The rules of the design hold in all that has happened."""
    violations = judge(world.bus.history.events, over=over, longest_s=world.bus.limits.ack_budget_max_s)
    assert not violations, "\n".join(map(str, violations))
    assert world.bus.counters.freed_before_ack == 0
