"""A world with real memory, and the few calls that scenarios need."""

from __future__ import annotations

from typing import Any

from mmubusd.mm.memory import Memory
from mmubusd.notify import Granted, Limits, Operation, Registration
from notify.transcript import PAGE, Client, World

READ_WRITE, READ_ONLY = 3, 1
PRIVATE, SHARED = 0x22, 0x21  # anonymous
AT = 0x10_0000


class MachineRoom(World):
    """Real frames and page tables below the bus."""

    def __init__(self, limits: Limits | None = None, frames_nr: int = 512) -> None:
        super().__init__(limits, Memory(frames_nr=frames_nr))

    def program(self, pages: int = 4, prot: int = READ_WRITE, flags: int = PRIVATE, data: bytes = b"old") -> Any:
        """An address space with one mapping at AT, whose first page holds data."""
        mm = self.memory.create_mm("program")
        self.run(mm.mmap(AT, pages * PAGE, prot, flags | 0x10)).value()
        if data:
            self.run(mm.store(AT, data)).value()
        return mm

    def fault(
        self, client: Client, registration: Registration, start: int, pages: int = 1, **more: Any
    ) -> Operation[Granted]:
        write = more.pop("write", False)
        return self.bus.fault(client.session, registration.id, start, start + pages * PAGE, write, self.now, **more)

    def grant(
        self, client: Client, registration: Registration, start: int, pages: int = 1, **more: Any
    ) -> list[tuple[int, int]]:
        """Fault, and say what was granted: (pfn, generation) a page."""
        translations = self.fault(client, registration, start, pages, **more).value().translations
        assert translations is not None
        return list(zip(translations.pfns.tolist(), translations.generations.tolist(), strict=True))

    def read(
        self, client: Client, registration: Registration, at: int, held: tuple[int, int], length: int = 3
    ) -> bytes:
        pfn, generation = held
        return self.bus.dma_read(client.session, registration.id, at, length, (pfn,), (generation,), self.now).value()

    def write(self, client: Client, registration: Registration, at: int, held: tuple[int, int], data: bytes) -> None:
        pfn, generation = held
        self.bus.dma_write(client.session, registration.id, at, data, (pfn,), (generation,), self.now).value()
