"""Accesses, as operations: a device reaches memory through what it holds, and every page of it is checked.

A notice is acknowledged when the device is off its pages, so an access counts by when it arrives: one that comes after
the acknowledgement is stale, whenever it was begun. A client waits for what it has under way before it acknowledges.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from mmubusd.mm.addr import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from mmubusd.notify.errors import RequestError, StaleTranslation
from mmubusd.notify.history import What
from mmubusd.notify.pins import Pins
from mmubusd.notify.registration import Registration
from mmubusd.notify.rights import Rights
from mmubusd.notify.sanitizer import Breach
from mmubusd.notify.session import State
from mmubusd.notify.translation import READ, WRITE, ExportTable, Held, TranslationTable

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds
    from mmubusd.notify.session import Session

KNOWN_AFTER = 2 / 3
"""The part of its lease after which a session knows by the silence that its stream is lost."""


class Accesses:
    """Reads and writes of devices."""

    def __init__(self, rounds: Rounds, rights: Rights, pins: Pins) -> None:
        self.rounds = rounds
        self.rights = rights
        self.pins = pins
        self.registry = rounds.registry
        self.memory = rounds.registry.memory
        self.sanitizer = rounds.registry.sanitizer

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
        registration = self.rights.registration(session, registration_id)
        self._check_jeopardy(session, registration, addr, pfns)
        offset = addr & ~PAGE_MASK
        pages = (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
        if not 0 < length <= self.rights.limits.dma_bytes_max:
            raise RequestError(
                "EINVAL", f"an access is of 1 to {self.rights.limits.dma_bytes_max} bytes, not {length}", length=length
            )
        if not len(pfns) == len(generations) == pages:
            raise RequestError(
                "EINVAL", f"{length} bytes at {addr:#x} touch {pages} pages; {len(pfns)} were presented", pages=pages
            )
        pin = self.pins.of(session, pin_id) if pin_id else None
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
