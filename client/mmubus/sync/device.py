"""The device's side without asyncio: registrations, pins and mirrors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mmubus import device as aio_device
from mmubus import mirror as aio_mirror
from mmubus import registration as aio_registration
from mmubus.device import Translations
from mmubus.mirror import Entry, MirrorStatistics
from mmubus.sync.cpu import AddressSpace
from mmubus.sync.portal import Run

__all__ = ["Mirror", "Pin", "Registration"]

T = TypeVar("T")


class Registration:
    """A registration; see `mmubus.Registration`."""

    def __init__(self, run: Run, raw: aio_registration.Registration) -> None:
        self._run = run
        self.aio = raw

    def __repr__(self) -> str:
        return repr(self.aio)

    @property
    def id(self) -> int:
        """The server's number."""
        return self.aio.id

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will slip through because an op is missing."""
        return self.aio.warnings

    @property
    def endangered(self) -> bool:
        """True while nothing that is held may be used."""
        return self._run(_get(lambda: self.aio.endangered))

    def unregister(self) -> None:
        """Take the notifier off its list. Nothing is delivered after this returns."""
        self._run(self.aio.unregister())

    def fault(
        self,
        start: int,
        end: int,
        write: bool = False,
        *,
        commit: Callable[[Translations], None] | None = None,
        wait_s: float = 0.0,
    ) -> Translations:
        """Fault pages in; commit runs in the library's thread, where no handler of "loop" can come between."""
        return self._run(self.aio.fault(start, end, write, commit=commit, wait_s=wait_s))

    def snapshot(self, start: int, end: int) -> Translations:
        """Look at the page table without faulting."""
        return self._run(self.aio.snapshot(start, end))

    def pin(self, start: int, end: int, write: bool = False) -> Pin:
        """Pin pages for the long term."""
        return Pin(self._run, self._run(self.aio.pin(start, end, write)))

    def dma_read(self, addr: int, length: int, pfns: Sequence[int], generations: Sequence[int]) -> bytes:
        """Read memory through translations."""
        return self._run(self.aio.dma_read(addr, length, pfns, generations))

    def dma_write(self, addr: int, data: bytes, pfns: Sequence[int], generations: Sequence[int]) -> None:
        """Write memory through translations."""
        self._run(self.aio.dma_write(addr, data, pfns, generations))

    def export(
        self,
        mm: AddressSpace | int,
        start: int,
        end: int,
        write: bool = False,
        *,
        commit: Callable[[Translations], None] | None = None,
    ) -> Translations:
        """Export pages through an rmap registration."""
        return self._run(self.aio.export(mm.__index__(), start, end, write, commit=commit))

    def unexport(self, pfns: Sequence[int], dirty: Sequence[int] = ()) -> None:
        """Give exports back."""
        self._run(self.aio.unexport(pfns, dirty))

    def migrate_to_device(self, start: int, end: int, *, coherent: bool = False) -> tuple[int, Translations]:
        """Move private pages into this registration's own memory."""
        return self._run(self.aio.migrate_to_device(start, end, coherent=coherent))

    def migrate_to_system(self, start: int = 0, end: int = 0, *, coherent: bool = False) -> int:
        """Bring them back; without a range: all, from everywhere."""
        return self._run(self.aio.migrate_to_system(start, end, coherent=coherent))

    def exclusive(self, start: int, end: int) -> Translations:
        """Get pages for this registration alone until the CPU touches them."""
        return self._run(self.aio.exclusive(start, end))


class Pin:
    """Pinned pages; see `mmubus.Pin`."""

    def __init__(self, run: Run, raw: aio_device.Pin) -> None:
        self._run = run
        self.aio = raw
        self.translations = raw.translations

    def read(self, offset: int, length: int) -> bytes:
        """Read through the pin."""
        return self._run(self.aio.read(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        """Write through the pin."""
        self._run(self.aio.write(offset, data))

    def unpin(self, *, dirty: bool = False) -> None:
        """Give the pin back."""
        self._run(self.aio.unpin(dirty=dirty))


class Mirror:
    """A shadow page table; see `mmubus.Mirror`."""

    def __init__(self, run: Run, raw: aio_mirror.Mirror) -> None:
        self._run = run
        self.aio = raw
        assert raw.registration is not None
        self.registration = Registration(run, raw.registration)

    @property
    def held(self) -> dict[int, Entry]:
        """What is held now: a copy."""
        return self._run(_get(lambda: self.aio.held))

    @property
    def valid(self) -> bool:
        """False while nothing may be used."""
        return self._run(_get(lambda: self.aio.valid))

    @property
    def statistics(self) -> MirrorStatistics:
        """Counters."""
        return self.aio.statistics

    def read(self, address: int, length: int) -> bytes:
        """Read memory as the device sees it."""
        return self._run(self.aio.read(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write memory through the device."""
        self._run(self.aio.write(address, data))

    def fault(self, start: int, end: int, *, write: bool = False) -> None:
        """Hold every page of [start, end) that may be had."""
        self._run(self.aio.fault(start, end, write=write))


async def _get(look: Callable[[], T]) -> T:
    """Look at something that belongs to the library's thread."""
    return look()
