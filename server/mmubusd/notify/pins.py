"""Pins, as operations: long-term references to frames, for contrast."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmubusd.mm import device
from mmubusd.mm.addr import MmId
from mmubusd.mm.mm import Mm
from mmubusd.notify.errors import FencedError, RequestError
from mmubusd.notify.granted import Pinned, Translations
from mmubusd.notify.rights import Rights
from mmubusd.notify.translation import READ, WRITE, Held

if TYPE_CHECKING:
    from mmubusd.notify.rounds import Rounds
    from mmubusd.notify.session import Session


@dataclass(frozen=True, slots=True)
class Pin:
    """Frames that a session holds for the long term."""

    session: Session
    registration: int
    mm: Mm
    frames: dict[int, Held]
    pfns: NDArray[np.uint64]


class Pins:
    """Every pin there is."""

    def __init__(self, rounds: Rounds, rights: Rights) -> None:
        self.rounds = rounds
        self.rights = rights
        self.registry = rounds.registry
        self.memory = rounds.registry.memory
        self._pins: dict[int, Pin] = {}
        self._last_pin = 0

    def pin(
        self, session: Session, registration_id: int, start: int, end: int, write: bool
    ) -> Generator[object, object, Pinned]:
        """See Bus.pin."""
        registration = self.rights.registration(session, registration_id)
        self.rights.check_range(start, end)
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
            self.rights.still(session, registration)
        except (FencedError, RequestError):
            device.unpin(mm, pfns)
            raise
        self._last_pin += 1
        self._pins[self._last_pin] = Pin(session, registration_id, mm, frames, pfns)
        session.pins.add(self._last_pin)
        return Pinned(self._last_pin, Translations(start, pfns, generations, rights))

    def unpin(self, session: Session, pin_id: int, dirty: bool) -> Generator[object, object, None]:
        """See Bus.unpin."""
        self.rights.sessions.check(session)
        pin = self.of(session, pin_id)
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

    def of(self, session: Session, pin_id: int) -> Pin:
        """Raises: RequestError NO_SUCH_PIN."""
        pin = self._pins.get(pin_id)
        if pin is None or pin.session is not session:
            raise RequestError("ENOENT", f"{session.name} holds no pin {pin_id}", reason="NO_SUCH_PIN", pin=pin_id)
        return pin
