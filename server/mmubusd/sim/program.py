"""What programs do in a simulation: random calls on a few address spaces that share files and parents."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from mmubusd.mm.errno import MmError
from mmubusd.mm.mbind import MPOL_MF_MOVE_ALL
from mmubusd.mm.mempolicy import MPOL_DEFAULT
from mmubusd.mm.notification import InvalidateRange, Reason
from mmubusd.notify import Operation

if TYPE_CHECKING:
    from mmubusd.sim.simulation import Simulation

AT = 0x40_0000
PAGES = 24
PAGE = 0x1000
PRIVATE, SHARED, ANONYMOUS, FIXED = 0x02, 0x01, 0x20, 0x10


class Programs:
    """Every program of one simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.random = simulation.random
        memory = simulation.memory
        self.files = [memory.create_file("shared", "shm", PAGES), memory.create_file("data", "disk", PAGES)]
        self.mms: list[Any] = []
        self.exiting: set[int] = set()
        for n in range(3):
            self._begin(f"program {n}")

    def _begin(self, name: str) -> None:
        mm = self.simulation.memory.create_mm(name)
        self.mms.append(mm)
        third = PAGES // 3
        maps = ((0, PRIVATE | ANONYMOUS, 0), (third, SHARED, self.files[0]), (2 * third, SHARED, self.files[1]))
        for first, flags, file in maps:
            call = mm.mmap(AT + first * PAGE, third * PAGE, 3, flags | FIXED, file, first * PAGE if file else 0)
            self.simulation.call(call, "mmap")

    def live(self) -> list[Any]:
        return [mm for mm in self.mms if mm.alive and mm.id not in self.exiting]

    def some_range(self) -> tuple[int, int]:
        """A small range, mostly inside the mappings."""
        first = self.random.randrange(PAGES)
        return AT + first * PAGE, min(self.random.choice((1, 1, 2, 4, 8)), PAGES - first) * PAGE

    def step(self) -> None:
        """One random call."""
        alive = self.live()
        if not alive:
            self._begin("program again")
            return
        mm = self.random.choice(alive)
        at, length = self.some_range()
        kind = self.random.choice(
            (
                *("store",) * 4,
                *("mmap",) * 4,
                "load",
                "munmap",
                "mprotect",
                "dontneed",
                "pageout",
                "migrate",
                "fork",
                "exit",
                "file",
                "mremap",
                "nonblock",
            )
        )
        label = f"{kind}({at:#x}, {length:#x}) of {mm.name}"
        call = self.simulation.call
        match kind:
            case "store":
                call(mm.store(at, bytes([self.random.randrange(1, 256)]) * length), label, self._ended)
            case "load":
                call(mm.load(at, length), label, self._ended)
            case "munmap":
                call(mm.munmap(at, length), label, self._ended)
            case "mmap":
                file = self.random.choice((0, *self.files))
                flags = FIXED | (SHARED if file else PRIVATE | ANONYMOUS)
                call(mm.mmap(at, length, 3, flags, file, at - AT if file else 0), label, self._ended)
            case "mprotect":
                call(mm.mprotect(at, length, self.random.choice((1, 3, 3))), label, self._ended)
            case "dontneed":
                call(mm.madvise(at, length, 4), label, self._ended)
            case "pageout":
                call(mm.madvise(at, length, 21), label, self._ended)
            case "migrate":  # by a policy of no nodes, which moves every page to another frame
                call(mm.mbind(at, length, MPOL_DEFAULT, 0, MPOL_MF_MOVE_ALL), label, self._ended)
            case "mremap":
                call(
                    mm.mremap(at, length, length, 3, AT + (PAGES + 8 + self.random.randrange(8)) * PAGE),
                    label,
                    self._ended,
                )
            case "nonblock":
                call(self._nonblock(mm, at, length), label, self._ended)
            case "fork" if len(alive) < 6:
                call(mm.fork("child"), label, self._forked)
            case "exit" if len(alive) > 1 and self.random.random() < 0.5:
                self.exiting.add(mm.id)
                call(mm.exit(), label, self._ended)
            case _:
                self._on_file(label)

    def _nonblock(self, mm: Any, at: int, length: int) -> Generator[Any, Any, str]:
        """A caller that may not wait, as the OOM reaper: those who refuse the start get no end, all others do."""
        answer = yield InvalidateRange(mm, at, at + length, Reason.CLEAR, blockable=False)
        return "refused" if answer.refused else "done"

    def _on_file(self, label: str) -> None:
        memory, file = self.simulation.memory, self.random.choice(self.files)
        match self.random.randrange(4):
            case 0:
                operation = memory.ftruncate(file, self.random.randrange(PAGES + 1) * PAGE)
            case 1:
                operation = memory.punch(file, self.random.randrange(PAGES) * PAGE, 2 * PAGE)
            case 2:
                operation = memory.fsync(file)
            case _:
                operation = memory.write_file(file, self.random.randrange(PAGES) * PAGE, b"written")
        self.simulation.call(operation, f"file {label}", self._ended)

    def _forked(self, operation: Operation[Any]) -> None:
        self._ended(operation)
        if operation.error is None:
            self.mms.append(operation.result)

    def _ended(self, operation: Operation[Any]) -> None:
        if operation.error is not None and not isinstance(operation.error, MmError):
            self.simulation.broken.append(f"{operation.label} failed: {operation.error!r}")
