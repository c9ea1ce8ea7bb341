"""The device's side, as operations: what a driver asks of the bus for one of its registrations."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import device, device_exclusive, migrate_device
from mmubusd.mm.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, MmId, Pfn
from mmubusd.mm.device_memory import Select
from mmubusd.mm.mm import Mm
from mmubusd.mm.unshare import unshare_zero
from mmubusd.notify.errors import FencedError, RequestError, StaleTranslation
from mmubusd.notify.history import What
from mmubusd.notify.operation import RangeWait, WaitedEnough
from mmubusd.notify.registration import Registration
from mmubusd.notify.sanitizer import Breach
from mmubusd.notify.session import State
from mmubusd.notify.translation import READ, WRITE, ExportTable, Held, TranslationTable

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds
    from mmubusd.notify.session import Session
    from mmubusd.notify.sessions import Sessions

NO_PFN = 0xFFFF_FFFF_FFFF_FFFF
"""The pfn of a page without a translation."""
KNOWN_AFTER = 2 / 3
"""The part of its lease after which a session knows by the silence that its stream is lost."""
ATTEMPTS_MAX = 16
"""How often a fault that is overtaken begins again before it tells its caller to."""


@dataclass(frozen=True, slots=True)
class Translations:
    """Translations of consecutive pages, the contract's message of that name.

    start: address of the first page; pfns: shape (pages,), uint64, NO_PFN where there is none; generations: shape
    (pages,), uint32; rights: shape (pages,), uint8, bits READ and WRITE.
    """

    start: int
    pfns: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    rights: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Granted:
    """The answer of fault and export. retry: nothing was granted (translations is None), the range is still barred."""

    translations: Translations | None
    as_of_seq: int
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Migrated:
    """The answer of migrate. pages: how many of the range are where they should be; granted: those on the device."""

    pages: int
    granted: Granted


@dataclass(frozen=True, slots=True)
class Looked:
    """The answer of snapshot. states: shape (pages,), uint8: 0 none, 1 present, 2 zero page, 3 in the
    registration's own private memory, 4 in its own coherent memory, 5 in another's, 0xff not readable.
    orders: likewise: one entry of the page table maps 2^order pages."""

    translations: Translations
    states: NDArray[np.uint8]
    orders: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pinned:
    """The answer of pin: a number to give it back with."""

    pin: int
    translations: Translations


@dataclass(frozen=True, slots=True)
class _Pin:
    """Frames that a session holds for the long term."""

    session: Session
    registration: int
    mm: Mm
    frames: dict[int, Held]
    pfns: NDArray[np.uint64]


Request = Generator[object, object, Granted]


class Devices:
    """What drivers may ask for. Each request is a generator that the runner drives like any operation.

    Every one begins by checking that the session's rights are not void, and does so again after each wait.
    """

    def __init__(self, rounds: Rounds, sessions: Sessions) -> None:
        self.sanitizer = rounds.registry.sanitizer
        self.rounds = rounds
        self.sessions = sessions
        self.registry = rounds.registry
        self.memory = rounds.registry.memory
        self.limits = rounds.registry.limits
        self._pins: dict[int, _Pin] = {}
        self._last_pin = 0

    # Translations.

    def fault(self, session: Session, registration_id: int, start: int, end: int, write: bool) -> Request:
        """See Bus.fault."""
        registration = self._registration(session, registration_id)
        self._check_range(start, end)
        if not registration.mm:
            raise RequestError(
                "EINVAL", "an rmap registration exports, it does not fault", registration=registration_id
            )
        if start < registration.start or end > registration.end:
            raise RequestError(
                "EINVAL",
                f"[{start:#x}, {end:#x}) is not in the interval [{registration.start:#x}, {registration.end:#x})",
                registration=registration_id, start=start, end=end,
            )  # fmt: skip
        self._check_cached(registration)
        mm = self.registry.chains[MmId(registration.mm)].mm
        entries = yield from self._fault_in(session, registration, mm, start, end, write)
        if entries is None:
            return Granted(None, session.as_of_seq, retry=True)
        return self._grant(session, registration, start, end, entries)

    def _fault_in(
        self, session: Session, registration: Registration, mm: Mm, start: int, end: int, write: bool
    ) -> Generator[object, object, NDArray[np.uint64] | None]:
        """Fault, and see to it that nothing of the range is barred at the moment of return. None: it took too long.

        Kernel: the loop of mmu_interval_read_begin(), hmm_range_fault() and mmu_interval_read_retry().
        """
        chain = self.registry.chains.get(mm.id)
        for _ in range(ATTEMPTS_MAX):
            if chain is not None:
                while chain.barred.covers(start, end):
                    if not (yield RangeWait(chain.barred, start, end)):
                        return None
                    self._still(session, registration)
            try:
                entries = yield from device.fault(mm, start, end, write, registration.id if registration.mm else 0)
            except WaitedEnough:
                return None
            self._still(session, registration)
            chain = self.registry.chains.get(mm.id)
            if chain is None or not chain.barred.covers(start, end):
                return entries
        return None

    def snapshot(
        self, session: Session, mm_id: int, start: int, end: int, owner: int = 0
    ) -> Generator[object, object, Looked]:
        """See Bus.snapshot."""
        self.sessions.check(session)
        if owner:
            self._registration(session, owner)
        self._check_range(start, end)
        mm = self.memory.mm(MmId(mm_id))
        entries = device.snapshot(mm, start, end, owner)
        translations = self._translations(start, entries)
        states = np.zeros(len(entries), np.uint8)
        states[translations.rights != 0] = 1
        states[(translations.rights != 0) & (translations.pfns == 0)] = 2
        states[entries & np.uint64(device.DEVICE) != 0] = 3
        states[entries & np.uint64(device.COHERENT) != 0] = 5
        states[entries & np.uint64(device.COHERENT | device.DEVICE) == device.COHERENT | device.DEVICE] = 4
        states[entries & np.uint64(device.ERROR) != 0] = 0xFF
        orders = ((entries & np.uint64(device.ORDER_MASK)) >> np.uint64(device.ORDER_SHIFT)).astype(np.uint8)
        return Looked(translations, states, orders)
        yield  # a request like all others, though it never waits

    def _translations(self, start: int, entries: NDArray[np.uint64]) -> Translations:
        valid = entries & np.uint64(device.VALID) != 0
        pfns = np.where(valid, entries & np.uint64(device.PFN_MASK), np.uint64(NO_PFN))
        rights = np.where(valid, READ, 0).astype(np.uint8)
        rights[valid & (entries & np.uint64(device.WRITE) != 0)] |= WRITE
        at = np.where(valid, pfns, np.uint64(0)).astype(np.int64)
        generations = np.where(valid, self.memory.frames.generation[at], 0).astype(np.uint32)
        return Translations(start, pfns, generations, rights)

    def _note_grant(self, registration: Registration, start: int, end: int, translations: Translations) -> None:
        if self.rounds.history.recording:
            self.rounds.history.note(
                What.GRANTED, session=registration.session.id, registration=registration.id, mm=registration.mm,
                start=start, end=end, pfns=[pfn if pfn != NO_PFN else -1 for pfn in translations.pfns.tolist()],
                generations=translations.generations.tolist(),
            )  # fmt: skip

    # Exports.

    def export(self, session: Session, registration_id: int, mm_id: int, start: int, end: int, write: bool) -> Request:
        """See Bus.export."""
        registration = self._registration(session, registration_id)
        self._check_range(start, end)
        if registration.mm:
            raise RequestError("EINVAL", "only a registration on the rmap list exports", registration=registration_id)
        self._check_cached(registration)
        mm = self.memory.mm(MmId(mm_id))
        for _ in range(ATTEMPTS_MAX):
            entries = yield from self._fault_in(session, registration, mm, start, end, write)
            if entries is None:
                break
            zero = np.flatnonzero(entries & np.uint64(device.PFN_MASK) == 0)
            if len(zero):  # nobody is told when the zero page is replaced: give it a frame of its own
                try:
                    yield from unshare_zero(mm, start, end)
                except WaitedEnough:
                    break
                self._still(session, registration)
                continue
            translations = self._translations(start, entries)
            pfns = [int(pfn) for pfn in translations.pfns.tolist() if pfn != NO_PFN]
            if self.rounds.barred_frames.covers(pfns):
                break
            table = registration.table
            assert isinstance(table, ExportTable)
            before = table.held
            for pfn, generation, rights in zip(
                translations.pfns.tolist(), translations.generations.tolist(), translations.rights.tolist(), strict=True
            ):
                if rights:
                    self.memory.export(Pfn(pfn), registration.id)
                    table.grant(pfn, generation, rights)
                    self.registry.pages.give(registration.id, pfn, pfn + 1, self.rounds.clock.time)
            session.holding += table.held - before
            self._note_grant(registration, 0, 0, translations)
            return Granted(translations, session.as_of_seq)
        return Granted(None, session.as_of_seq, retry=True)

    def unexport(
        self, session: Session, registration_id: int, pfns: Sequence[int], dirty: Sequence[int]
    ) -> Generator[object, object, None]:
        """See Bus.unexport."""
        registration = self._registration(session, registration_id)
        table = registration.table
        if not isinstance(table, ExportTable):
            raise RequestError("EINVAL", "only a registration on the rmap list exports", registration=registration_id)
        generation = self.memory.frames.generation
        written = [pfn for pfn in dirty if (held := table.get(pfn)) is not None and held.rights & WRITE]
        self.rounds.counters.dirty_unheld += len(dirty) - len(written)
        for pfn in set(dirty) - set(written):
            self.rounds.dirty_too_late(session, registration_id, pfn)
        self.memory.set_dirty(written)
        for pfn in pfns:
            dropped = table.drop(pfn, generation)
            if dropped.pages:
                session.holding -= 1
                self.rounds.counters.freed_before_ack += dropped.freed_before
                if self.rounds.history.recording:
                    self.rounds.history.note(
                        What.RETURNED, session=session.id, registration=registration_id, pfns=(pfn,)
                    )
                self.memory.unexport(Pfn(pfn), registration.id)
        return None
        yield

    # A device's own memory, and exclusive access.

    def migrate(
        self, session: Session, registration_id: int, start: int, end: int, to_system: bool, coherent: bool = False
    ) -> Generator[object, object, Migrated]:
        """See Bus.migrate."""
        try:
            return (yield from self._migrate(session, registration_id, start, end, to_system, coherent))
        except WaitedEnough:
            return Migrated(0, Granted(None, session.as_of_seq, retry=True))

    def _migrate(
        self, session: Session, registration_id: int, start: int, end: int, to_system: bool, coherent: bool = False
    ) -> Generator[object, object, Migrated]:
        registration = self._registration(session, registration_id)
        if not registration.mm:
            raise RequestError("EINVAL", "an rmap registration has no memory of its own", registration=registration_id)
        owner = registration.id
        if to_system and not end:
            pages = yield from migrate_device.evict_device(self.memory, owner)
            return Migrated(pages, Granted(None, session.as_of_seq))
        self._check_range(start, end)
        mm = self.registry.chains[MmId(registration.mm)].mm
        if to_system:
            select = Select.DEVICE_COHERENT if coherent else Select.DEVICE_PRIVATE
            pages = yield from mm.migrate_to_system(start, end, owner, select)
            return Migrated(pages, Granted(None, session.as_of_seq))
        pages = yield from mm.migrate_to_device(start, end, owner, coherent)

        def in_own_memory() -> NDArray[np.uint64]:
            entries = device.snapshot(mm, start, end, owner)
            return np.where(entries & np.uint64(device.DEVICE) != 0, entries, np.uint64(0))

        granted = yield from self._grant_when_open(session, registration, mm, start, end, in_own_memory)
        return Migrated(pages, granted)

    def exclusive(self, session: Session, registration_id: int, start: int, end: int) -> Request:
        """See Bus.exclusive."""
        registration = self._registration(session, registration_id)
        self._check_range(start, end)
        if not registration.mm:
            raise RequestError("EINVAL", "an rmap registration cannot fault", registration=registration_id)
        mm = self.registry.chains[MmId(registration.mm)].mm
        try:
            yield from device_exclusive.make_exclusive(mm, start, end, registration.id)
        except WaitedEnough:
            return Granted(None, session.as_of_seq, retry=True)
        return (
            yield from self._grant_when_open(
                session, registration, mm, start, end,
                lambda: device_exclusive.exclusive_entries(mm, start, end, registration.id),
            )
        )  # fmt: skip

    def _grant_when_open(
        self, session: Session, registration: Registration, mm: Mm, start: int, end: int,
        look: Callable[[], NDArray[np.uint64]],
    ) -> Request:  # fmt: skip
        """Give out what there is to give once nothing of the range is barred, our own rounds included."""
        chain = self.registry.chains.get(mm.id)
        while chain is not None and chain.barred.covers(start, end):
            if not (yield RangeWait(chain.barred, start, end)):
                return Granted(None, session.as_of_seq, retry=True)
        self._still(session, registration)
        return self._grant(session, registration, start, end, look())

    def _grant(
        self, session: Session, registration: Registration, start: int, end: int, entries: NDArray[np.uint64]
    ) -> Granted:
        translations = self._translations(start, entries)
        table = registration.table
        assert isinstance(table, TranslationTable)
        before = table.held
        table.grant(start, translations.pfns, translations.generations, translations.rights)
        session.holding += table.held - before
        self.registry.pages.give(registration.id, start, end, self.rounds.clock.time)
        self._note_grant(registration, start, end, translations)
        return Granted(translations, session.as_of_seq)

    # Pins.

    def pin(
        self, session: Session, registration_id: int, start: int, end: int, write: bool
    ) -> Generator[object, object, Pinned]:
        """See Bus.pin."""
        registration = self._registration(session, registration_id)
        self._check_range(start, end)
        if not registration.mm:
            raise RequestError(
                "EINVAL", "an rmap registration has no address space to pin", registration=registration_id
            )
        mm = self.registry.chains[MmId(registration.mm)].mm
        pfns = yield from device.pin(mm, start, end, write)
        generations = self.memory.frames.generation[pfns.astype(np.int64)]
        rights = np.full(len(pfns), READ | WRITE if write else READ, np.uint8)
        frames = {
            pfn: Held(pfn, generation, int(rights[0]))
            for pfn, generation in zip(pfns.tolist(), generations.tolist(), strict=True)
        }
        try:
            self._still(session, registration)
        except (FencedError, RequestError):
            device.unpin(mm, pfns)
            raise
        self._last_pin += 1
        self._pins[self._last_pin] = _Pin(session, registration_id, mm, frames, pfns)
        session.pins.add(self._last_pin)
        return Pinned(self._last_pin, Translations(start, pfns, generations, rights))

    def unpin(self, session: Session, pin_id: int, dirty: bool) -> Generator[object, object, None]:
        """See Bus.unpin."""
        self.sessions.check(session)
        pin = self._pin(session, pin_id)
        del self._pins[pin_id]
        session.pins.discard(pin_id)
        device.unpin(pin.mm, pin.pfns, dirty)
        return None
        yield

    def forget(self, session: Session) -> None:
        """The session never comes back: its pins are given back."""
        for pin_id in sorted(session.pins):
            pin = self._pins.pop(pin_id)
            device.unpin(pin.mm, pin.pfns)
        session.pins.clear()

    # Reaching memory.

    def dma_read(
        self, session: Session, registration_id: int, addr: int, length: int, pfns: Sequence[int], generations:
        Sequence[int], pin: int,
    ) -> Generator[object, object, bytes]:  # fmt: skip
        """See Bus.dma_read."""
        self._check_access(session, registration_id, addr, length, pfns, generations, pin, READ)
        parts = []
        offset = addr & ~PAGE_MASK
        for pfn in pfns:
            count = min(PAGE_SIZE - offset, length)
            parts.append(self.memory.frames.read(pfn, offset, count))
            length -= count
            offset = 0
        return b"".join(parts)
        yield

    def dma_write(
        self, session: Session, registration_id: int, addr: int, data: bytes, pfns: Sequence[int], generations:
        Sequence[int], pin: int,
    ) -> Generator[object, object, None]:  # fmt: skip
        """See Bus.dma_write."""
        self._check_access(session, registration_id, addr, len(data), pfns, generations, pin, WRITE)
        offset, done = addr & ~PAGE_MASK, 0
        for pfn in pfns:
            count = min(PAGE_SIZE - offset, len(data) - done)
            self.memory.frames.write(pfn, offset, data[done : done + count])
            done += count
            offset = 0
        self.memory.set_dirty(pfns)
        return None
        yield

    def _check_access(
        self, session: Session, registration_id: int, addr: int, length: int, pfns: Sequence[int], generations:
        Sequence[int], pin_id: int, right: int,
    ) -> None:  # fmt: skip
        """Every page is presented with what the device holds, and every one must be held by it now."""
        registration = self._registration(session, registration_id)
        self._check_jeopardy(session, registration, addr, pfns)
        offset = addr & ~PAGE_MASK
        pages = (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
        if not 0 < length <= self.limits.dma_bytes_max:
            raise RequestError(
                "EINVAL", f"an access is of 1 to {self.limits.dma_bytes_max} bytes, not {length}", length=length
            )
        if not len(pfns) == len(generations) == pages:
            raise RequestError(
                "EINVAL", f"{length} bytes at {addr:#x} touch {pages} pages; {len(pfns)} were presented", pages=pages
            )
        pin = self._pin(session, pin_id) if pin_id else None
        table = registration.table
        for at, (pfn, generation) in enumerate(zip(pfns, generations, strict=True)):
            page = (addr & PAGE_MASK) + (at << PAGE_SHIFT)
            if pin is not None:
                held = pin.frames.get(pfn)
            elif isinstance(table, ExportTable):
                held = table.get(pfn)
            else:
                assert isinstance(table, TranslationTable)
                held = table.get(page)
            if held is None or held.pfn != pfn or held.generation != generation:
                raise self._stale(registration, page, pfn, generation, held)
            if not held.rights & right:
                raise RequestError("EPERM", f"the translation of {page:#x} is for reading only", addr=page, pfn=pfn)
        if self.rounds.history.recording:
            self.rounds.history.note(
                What.DMA_READ if right == READ else What.DMA_WRITTEN, session=session.id, registration=registration_id,
                start=addr & PAGE_MASK, pfns=pfns, generations=generations, number=pin_id, mm=registration.mm,
            )  # fmt: skip

    def _check_jeopardy(self, session: Session, registration: Registration, addr: int, pfns: Sequence[int]) -> None:
        """A session without a stream cannot hear of a notice: what it holds may be gone in a moment.

        It knows after two thirds of its lease, by the silence, if it does not see the stream end before. What it asks
        until then is refused, and may have been on its way.
        """
        if session.state is not State.LOST:
            return
        message = f"{session.name} has lost its stream and cannot hear of notices: attach again before any access"
        at = addr & PAGE_MASK if registration.mm else (pfns[0] if pfns else 0)
        if self.rounds.clock.time - session.state_since > session.lease_s * KNOWN_AFTER:
            self.sanitizer.page(
                Breach.JEOPARDY, session, message, registration.id, at, mm=registration.mm, refused=True
            )  # fmt: skip
        raise RequestError("EAGAIN", message, reason="JEOPARDY", registration=registration.id)

    def _stale(
        self, registration: Registration, page: int, pfn: int, generation: int, held: Held | None
    ) -> StaleTranslation:
        """Refuse, and explain: who took the page, when the notice was sent, when it was acknowledged."""
        self.rounds.counters.stale_refused += 1
        if self.rounds.history.recording:
            self.rounds.history.note(What.STALE, session=registration.session.id, registration=registration.id)
        fields: dict[str, str | int | float] = {
            "registration": registration.id, "addr": page, "pfn": pfn, "generation": generation,
        }  # fmt: skip
        what = f"frame {pfn} generation {generation}" + (f" at {page:#x}" if registration.mm else "")
        at = page if registration.mm else pfn
        taken = self.registry.pages.taken(registration.id, at)
        if held is not None:
            why = f"held there is frame {held.pfn} generation {held.generation}"
        elif taken is None:
            why = "it was never given out here, or longer ago than is remembered"
        else:
            by = taken.operation or "an operation"
            fields |= {"operation": taken.operation, "round": taken.round}
            if taken.acked_at is None or taken.notified_at is None:
                why = f"{by} took it in round {taken.round}, and this registration was not told: {taken.because}"
            else:
                fields |= {"notified_at": taken.notified_at, "acked_at": taken.acked_at}
                ago = self.rounds.clock.time - taken.acked_at
                why = (
                    f"{by} took it in round {taken.round}; the notice was sent at "
                    f"{taken.notified_at:.6f} s and acknowledged at {taken.acked_at:.6f} s, {ago:.6f} s ago"
                )
        message = f"{what} is not a translation that may be used: {why}"
        untold = registration.uncached and registration.flushed_at is None  # it is on its way
        breach = Breach.AFTER_FENCE if untold else Breach.STALE_ACCESS
        self.sanitizer.page(
            breach, registration.session, message, registration.id, at, mm=registration.mm, pfn=pfn,
            generation=generation, refused=True,
        )  # fmt: skip
        return StaleTranslation(message, **fields)

    # Checks.

    def _registration(self, session: Session, registration_id: int) -> Registration:
        if session.fenced is not None:
            message = f"{session.name} asks for something through registration {registration_id} after it was fenced"
            self.sanitizer.note(
                Breach.AFTER_FENCE, session, message, registration=registration_id, refused=True,
                story=self.registry.pages.story(registration_id, 0),
            )  # fmt: skip
        self.sessions.check(session)
        registration = session.registrations.get(registration_id)  # type: ignore[call-overload]
        if registration is None:
            gone = self.registry.pages.gone(registration_id)
            told = ""
            if gone is not None and gone.session == session.id:
                if gone.mm_ended and session.asked_after is not None and session.asked_after < gone.heard:
                    raise _ended_meanwhile(registration_id, gone.mm)
                told = f": {gone.because}, at {gone.at:.6f} s"
                self.sanitizer.note(
                    Breach.AFTER_UNREGISTER, session,
                    f"{session.name} asks for something through registration {registration_id}, which is gone{told}",
                    registration=registration_id, refused=True,
                )  # fmt: skip
            raise RequestError(
                "ENOENT", f"{session.name} has no registration {registration_id}{told}", reason="NO_SUCH_REGISTRATION",
                registration=registration_id,
            )  # fmt: skip
        return registration  # type: ignore[no-any-return]

    def _check_cached(self, registration: Registration) -> None:
        if not self.sessions.may_cache(registration):
            raise RequestError(
                "EAGAIN",
                f"{registration!r} is demoted for being slow: it gets translations again when it has dropped "
                f"everything and answered in time for {self.limits.promote_s:g} s",
                reason="UNCACHED", registration=registration.id,
            )  # fmt: skip

    def _still(self, session: Session, registration: Registration) -> None:
        """After a wait: is it still there? That it is not is nobody's mistake."""
        gone = self.registry.pages.gone(registration.id)
        if gone is not None and gone.mm_ended and session.fenced is None:
            raise _ended_meanwhile(registration.id, gone.mm)
        self._registration(session, registration.id)
        self._check_cached(registration)

    def _pin(self, session: Session, pin_id: int) -> _Pin:
        pin = self._pins.get(pin_id)
        if pin is None or pin.session is not session:
            raise RequestError("ENOENT", f"{session.name} holds no pin {pin_id}", reason="NO_SUCH_PIN", pin=pin_id)
        return pin

    def _check_range(self, start: int, end: int) -> None:
        if start & ~PAGE_MASK or end & ~PAGE_MASK or not 0 <= start < end <= TASK_SIZE:
            raise RequestError(
                "EINVAL",
                f"[{start:#x}, {end:#x}) is not a range of whole pages below {TASK_SIZE:#x}",
                start=start,
                end=end,
            )
        if (end - start) >> PAGE_SHIFT > self.limits.pages_max:
            raise RequestError(
                "E2BIG", f"{(end - start) >> PAGE_SHIFT} pages at once, at most {self.limits.pages_max} are taken",
                pages=(end - start) >> PAGE_SHIFT, maximum=self.limits.pages_max,
            )  # fmt: skip


def _ended_meanwhile(registration: int, mm: int) -> RequestError:
    message = f"address space {mm} has ended while this was under way, and registration {registration} with it"
    return RequestError("ESRCH", message, registration=registration, mm=mm)


__all__ = ["NO_PFN", "READ", "WRITE", "Devices", "Granted", "Looked", "Pinned", "Translations"]
