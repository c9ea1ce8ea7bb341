"""Exports, as operations: frames of an address space that a registration on the rmap list gives away."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmubusd.mm import device
from mmubusd.mm.addr import MmId, Pfn
from mmubusd.mm.unshare import unshare_zero
from mmubusd.notify.errors import RequestError
from mmubusd.notify.faults import ATTEMPTS_MAX, Faults
from mmubusd.notify.granted import NO_PFN, Granted, Request
from mmubusd.notify.history import What
from mmubusd.notify.operation import WaitedEnough
from mmubusd.notify.rights import Rights
from mmubusd.notify.translation import WRITE, ExportTable

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds
    from mmubusd.notify.session import Session


class Exports:
    """Requests of exporters."""

    def __init__(self, rounds: Rounds, rights: Rights, faults: Faults) -> None:
        self.rounds = rounds
        self.rights = rights
        self.faults = faults
        self.registry = rounds.registry
        self.memory = rounds.registry.memory

    def export(self, session: Session, registration_id: int, mm_id: int, start: int, end: int, write: bool) -> Request:
        """See Bus.export."""
        registration = self.rights.registration(session, registration_id)
        self.rights.check_range(start, end)
        if registration.mm:
            raise RequestError("EINVAL", "only a registration on the rmap list exports", registration=registration_id)
        self.rights.check_cached(registration)
        mm = self.memory.mm(MmId(mm_id))
        for _ in range(ATTEMPTS_MAX):
            entries = yield from self.faults.fault_in(session, registration, mm, start, end, write)
            if entries is None:
                break
            zero = np.flatnonzero(entries & np.uint64(device.PFN_MASK) == 0)
            if len(zero):  # nobody is told when the zero page is replaced: give it a frame of its own
                try:
                    yield from unshare_zero(mm, start, end)
                except WaitedEnough:
                    break
                self.rights.still(session, registration)
                continue
            translations = self.faults.translations(start, entries)
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
            self.faults.note_grant(registration, 0, 0, translations)
            return Granted(translations, session.as_of_seq)
        return Granted(None, session.as_of_seq, retry=True)

    def unexport(
        self, session: Session, registration_id: int, pfns: Sequence[int], dirty: Sequence[int]
    ) -> Generator[object, object, None]:
        """See Bus.unexport."""
        registration = self.rights.registration(session, registration_id)
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
