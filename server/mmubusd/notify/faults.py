"""Translations, as operations: faulting them in, looking, and moving pages to and from a device's own memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import device, device_exclusive, migrate_device
from mmubusd.mm.addr import MmId
from mmubusd.mm.device_memory import Select
from mmubusd.mm.mm import Mm
from mmubusd.notify.errors import RequestError
from mmubusd.notify.granted import NO_PFN, Granted, Looked, Migrated, Request, Translations
from mmubusd.notify.history import What
from mmubusd.notify.operation import RangeWait, WaitedEnough
from mmubusd.notify.registration import Registration
from mmubusd.notify.rights import Rights
from mmubusd.notify.translation import READ, WRITE, TranslationTable

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds
    from mmubusd.notify.session import Session

ATTEMPTS_MAX = 16
"""How often a fault that is overtaken begins again before it tells its caller to."""


class Faults:
    """Requests for translations. Each is a generator that the runner drives like any operation."""

    def __init__(self, rounds: Rounds, rights: Rights) -> None:
        self.rounds = rounds
        self.rights = rights
        self.registry = rounds.registry
        self.memory = rounds.registry.memory

    def fault(self, session: Session, registration_id: int, start: int, end: int, write: bool) -> Request:
        """See Bus.fault."""
        registration = self.rights.registration(session, registration_id)
        self.rights.check_range(start, end)
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
        self.rights.check_cached(registration)
        mm = self.registry.chains[MmId(registration.mm)].mm
        entries = yield from self.fault_in(session, registration, mm, start, end, write)
        if entries is None:
            return Granted(None, session.as_of_seq, retry=True)
        return self._grant(session, registration, start, end, entries)

    def fault_in(
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
                    self.rights.still(session, registration)
            try:
                entries = yield from device.fault(mm, start, end, write, registration.id if registration.mm else 0)
            except WaitedEnough:
                return None
            self.rights.still(session, registration)
            chain = self.registry.chains.get(mm.id)
            if chain is None or not chain.barred.covers(start, end):
                return entries
        return None

    def snapshot(
        self, session: Session, mm_id: int, start: int, end: int, owner: int = 0
    ) -> Generator[object, object, Looked]:
        """See Bus.snapshot."""
        self.rights.sessions.check(session)
        if owner:
            self.rights.registration(session, owner)
        self.rights.check_range(start, end)
        mm = self.memory.mm(MmId(mm_id))
        entries = device.snapshot(mm, start, end, owner)
        translations = self.translations(start, entries)
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
        registration = self.rights.registration(session, registration_id)
        if not registration.mm:
            raise RequestError("EINVAL", "an rmap registration has no memory of its own", registration=registration_id)
        owner = registration.id
        if to_system and not end:
            pages = yield from migrate_device.evict_device(self.memory, owner)
            return Migrated(pages, Granted(None, session.as_of_seq))
        self.rights.check_range(start, end)
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
        registration = self.rights.registration(session, registration_id)
        self.rights.check_range(start, end)
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
        self.rights.still(session, registration)
        return self._grant(session, registration, start, end, look())

    def _grant(
        self, session: Session, registration: Registration, start: int, end: int, entries: NDArray[np.uint64]
    ) -> Granted:
        translations = self.translations(start, entries)
        table = registration.table
        assert isinstance(table, TranslationTable)
        before = table.held
        table.grant(start, translations.pfns, translations.generations, translations.rights)
        session.holding += table.held - before
        self.registry.pages.give(registration.id, start, end, self.rounds.clock.time)
        self.note_grant(registration, start, end, translations)
        return Granted(translations, session.as_of_seq)

    def translations(self, start: int, entries: NDArray[np.uint64]) -> Translations:
        """Entries of the page table as a device gets them."""
        valid = entries & np.uint64(device.VALID) != 0
        pfns = np.where(valid, entries & np.uint64(device.PFN_MASK), np.uint64(NO_PFN))
        rights = np.where(valid, READ, 0).astype(np.uint8)
        rights[valid & (entries & np.uint64(device.WRITE) != 0)] |= WRITE
        at = np.where(valid, pfns, np.uint64(0)).astype(np.int64)
        generations = np.where(valid, self.memory.frames.generation[at], 0).astype(np.uint32)
        return Translations(start, pfns, generations, rights)

    def note_grant(self, registration: Registration, start: int, end: int, translations: Translations) -> None:
        """Record it."""
        if self.rounds.history.recording:
            self.rounds.history.note(
                What.GRANTED, session=registration.session.id, registration=registration.id, mm=registration.mm,
                start=start, end=end, pfns=[pfn if pfn != NO_PFN else -1 for pfn in translations.pfns.tolist()],
                generations=translations.generations.tolist(),
            )  # fmt: skip
