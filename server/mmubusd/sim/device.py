"""What a model client does of itself: registers and unregisters, faults, and uses what it holds as hardware would."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mmubusd.mm.errno import MmError
from mmubusd.notify import (
    FencedError,
    Op,
    Operation,
    Registration,
    RequestError,
    Session,
    Spec,
    StaleTranslation,
    State,
)
from mmubusd.notify.history import What
from mmubusd.sim.mirror import WRITE, covers
from mmubusd.sim.program import AT, PAGE, PAGES

if TYPE_CHECKING:
    from mmubusd.sim.client import ModelClient

SEED = frozenset({Op.RELEASE, Op.AGE_PAGE, Op.INVALIDATE_PAGE, Op.INVALIDATE_RANGE, Op.INVALIDATE_ALL})
MAINLINE = frozenset({Op.RELEASE, Op.INVALIDATE_RANGE_START, Op.INVALIDATE_RANGE_END, Op.CLEAR_FLUSH_YOUNG})
KINDS = (SEED, MAINLINE, SEED | MAINLINE, frozenset({Op.INVALIDATE_RANGE}), frozenset({Op.INVALIDATE_RANGE_START}))
REGISTRATIONS_MAX = 5
INTERVAL_PAGES = 6


class Device:
    """The device of one client."""

    def __init__(self, client: ModelClient) -> None:
        self.client = client
        self.simulation = client.simulation
        self.random = client.simulation.random
        self._made: dict[int, Registration] = {}

    def step(self) -> None:
        """One random thing. Requires: the client is connected."""
        mirror, live = self.client.mirror, self.simulation.programs.live()
        kind = self.random.choice(("fault", "fault", "fault", "use", "use", "use", "register", "unregister"))
        if kind == "fault" and mirror.mms:
            self._fault()
        elif kind == "use" and not self.client.jeopardy and (usable := mirror.usable()):
            self._use(*self.random.choice(usable))
        elif kind == "register" and len(mirror.mms) < REGISTRATIONS_MAX and live:
            self.register(self.random.choice(live).id)
        elif kind == "unregister" and mirror.mms and self.random.random() < 0.3:
            self._unregister()

    # The lists.

    def register(self, mm: int) -> None:
        """Register for an address space, or on the rmap list (0)."""
        session = self.client.session
        assert session is not None
        interval = self.random.random() < 0.3 and bool(mm)
        first = self.random.randrange(PAGES)
        spec = Spec(
            mm, self.random.choice(KINDS), start=AT + first * PAGE if interval else 0,
            end=AT + (first + INTERVAL_PAGES) * PAGE if interval else 0,
            only_held=bool(mm) and self.random.random() < 0.3, name=self.client.name,
            demotable=bool(mm) and self.random.random() < 0.2,
        )  # fmt: skip
        with suppress(RequestError, FencedError):  # the program may be gone by now
            made = self.simulation.bus.register(session, spec, self.simulation.now)
            self._made[made.id] = made
            self.client.mirror.mms[made.id] = mm
            last = min(first + INTERVAL_PAGES, PAGES)
            self.client.mirror.pages[made.id] = range(first, last) if interval else range(PAGES)

    def _unregister(self) -> None:
        """Not used any more from here on; but its handlers go on handing over until it is off the list."""
        mirror, session = self.client.mirror, self.client.session
        assert session is not None
        gone = self.random.choice(list(mirror.mms))
        del mirror.mms[gone]
        self.client.say(lambda: self._unregistered(session, gone), lost=lambda: self._unregister_again(session, gone))

    def _unregister_again(self, session: Session, gone: int) -> None:
        """The stream broke before the server heard of it."""
        if session is not self.client.session:
            return
        if self.client.connected:
            self._unregistered(session, gone)
        else:
            self.simulation.after(1.0, lambda: self._unregister_again(session, gone))

    def _unregistered(self, session: Session, gone: int) -> None:
        if self.simulation.knows(session):
            with suppress(FencedError):
                self.simulation.bus.unregister(session, gone, self.simulation.now)
            self.client.mirror.forget(gone)

    # Translations.

    def _fault(self) -> None:
        client, mirror, bus, session = self.client, self.client.mirror, self.simulation.bus, self.client.session
        assert session is not None
        registration, mm = self.random.choice(list(mirror.mms.items()))
        first = self.random.choice(mirror.pages[registration])
        last = min(first + self.random.choice((1, 2, 8)), mirror.pages[registration].stop)
        at, end = AT + first * PAGE, AT + last * PAGE
        write = self.random.random() < 0.5

        def begin() -> None:
            live = self.simulation.programs.live()
            more: dict[str, Any] = {"then": ended, "wait_s": 0.5}
            if mm:
                self.simulation.start(bus.fault, session, registration, at, end, write, **more)
            elif live:
                target = self.random.choice(live).id
                self.simulation.start(bus.export, session, registration, target, at, end, write, **more)

        def ended(operation: Operation[Any]) -> None:
            if operation.error is None:
                self.simulation.after(client.way(), lambda: self._granted(session, registration, mm, operation))
            elif not isinstance(operation.error, MmError | RequestError | FencedError):
                self.simulation.broken.append(f"fault of {client.name}: {operation.error!r}")
            elif getattr(operation.error, "reason", "") == "NO_SUCH_REGISTRATION" and session is client.session:
                mirror.mms.pop(registration, None)  # its address space is gone

        client.ask(begin)

    def _granted(self, session: Session, registration: int, mm: int, operation: Operation[Any]) -> None:
        client, granted = self.client, operation.result
        assert granted is not None
        if granted.retry or session is not client.session or session.fenced is not None:
            return
        if registration not in client.mirror.mms:
            return
        later = client.answers.overtaken(registration, granted.as_of_seq)
        given = granted.translations
        columns = (given.pfns.tolist(), given.generations.tolist(), given.rights.tolist())
        for n, (pfn, generation, rights) in enumerate(zip(*columns, strict=True)):
            page = given.start + n * PAGE if mm else pfn
            if rights and not any(covers(notice, page) for notice in later):
                client.mirror.grant((registration, page), pfn, generation, rights)

    # Accesses.

    def _use(self, registration: int, page: int) -> None:
        """Through the server, which checks; or through shared memory, where nobody does."""
        session, bus = self.client.session, self.simulation.bus
        assert session is not None
        pfn, generation, rights = self.client.mirror.held[registration, page]
        if not self.simulation.knows(session):
            return  # its memory is another server's
        bus.history.note(
            What.CLIENT_USES, session=session.id, registration=registration, start=page, pfns=(pfn,),
            generations=(generation,),
        )  # fmt: skip
        if int(self.simulation.memory.frames.generation[pfn]) != generation:
            self.simulation.broken.append(f"{self.client.name} can still reach frame {pfn}, which was freed")
        if rights & WRITE and self.random.random() < 0.5:
            self.simulation.memory.frames.store[(pfn << 12) + 8 : (pfn << 12) + 14] = b"device"
            bus.history.note(What.CLIENT_WROTE, session=session.id, registration=registration, start=page, pfns=(pfn,))
            self.client.mirror.wrote.add((registration, page))
        elif not self.client.cut and session.state is State.LIVE:  # else the server cannot be asked
            self._access(session, registration, page, rights)

    def _access(self, session: Session, registration: int, page: int, rights: int) -> None:
        bus, now = self.simulation.bus, self.simulation.now
        pfn, generation, _ = self.client.mirror.held[registration, page]
        address = page if self.client.mirror.mms[registration] else 0
        operation: Operation[Any]
        if rights & WRITE and self.random.random() < 0.5:
            operation = bus.dma_write(session, registration, address, b"dma", (pfn,), (generation,), now)
        else:
            operation = bus.dma_read(session, registration, address, 16, (pfn,), (generation,), now)
        self.simulation.running_nr += 1
        demoted = self._made[registration].uncached  # then it is told so, or will be
        if isinstance(operation.error, StaleTranslation | RequestError) and not demoted:
            self.simulation.broken.append(
                f"{self.client.name} may use {page:#x}, and was refused: {operation.error.message}"
            )
