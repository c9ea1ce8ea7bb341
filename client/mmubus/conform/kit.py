"""What the kit asks of a driver, and how it judges.

Two kinds of driver can be put through it (`subject`): a factory in Python, and any command that speaks a few lines of
JSON. A `Mirror` is a driver already: `lambda bus, mm: bus.mirror(mm)`.

    mmubus conform my_package.my_driver:make
    mmubus conform --command 'node driver.js'

| rule | how it is judged |
|---|---|
| Coherent | when all is quiet, what the driver reads is what the program reads |
| DirtyIsNotLost | what was written through the driver is there after the page was taken away |
| AnswersInTime | nothing that the program does waits until the driver is fenced |
| NothingWrong | the server's sanitizer found nothing: no stale access, no early ack, no poison, nothing slipped |
| Survives | the driver raises nothing but what the library says it may |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Protocol

from mmubus.errors import Fenced, MmError, MmuBusError
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE

if TYPE_CHECKING:
    from mmu.v1 import inspection_pb2

    from mmubus.address_space import AddressSpace
    from mmubus.connection import Bus

__all__ = ["BASE", "NAME", "PAGE", "PAGES", "Broken", "Driver", "Outcome", "Stage", "Subject", "conform"]

PAGE, PAGES, BASE = 4096, 16, 0x7000_0000_0000
NAME = "driver"
"""What the driver's session is called: by that the server's view of it is found."""
FORGIVEN = frozenset({"after-fence", "deadlock"})
"""Findings that a driver is told of without being to blame."""
PATIENCE_S = 20.0


class Driver(Protocol):
    """What a driver must offer to be tested: reaching memory through whatever it keeps."""

    async def read(self, address: int, length: int) -> bytes:
        """The bytes, as the device sees them."""

    async def write(self, address: int, data: bytes) -> None:
        """Write them, as the device would."""


class Subject(Protocol):
    """Whoever makes the driver that is tested."""

    def driver(
        self, address: str, mm: int, *, chaos: str, survives: bool = False
    ) -> AbstractAsyncContextManager[Driver]:
        """A driver that is registered on an address space, on a session called NAME; it leaves at the end.

        Args: address: the server's; chaos: the value of the metadata key "mmubus-chaos" of its Attach, empty: none;
            survives: it must register again when a new session had to begin.
        Raises: Broken.
        """


class Broken(Exception):
    """A rule was broken. Attributes: rule: its name."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


@dataclass(slots=True)
class Outcome:
    """One scenario. broken: what went wrong, or None; transcript: what was done, in order."""

    scenario: str
    broken: Broken | None = None
    transcript: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Stage:
    """One scenario's world: a program's address space, the driver on it, and what was done.

    Attributes: cpu: the program's side, on a connection of its own; driver: yours; random: seeded; known: sessions that
        were there before.
    """

    def __init__(self, cpu: AddressSpace, program: Bus, driver: Driver, seed: int, known: set[int]) -> None:
        self.cpu = cpu
        self.program = program
        self.driver = driver
        self.known = known
        self.random = Random(seed)
        self.transcript: list[str] = []
        self._began = time.monotonic()

    def note(self, what: str) -> None:
        """Put a line into the transcript."""
        self.transcript.append(f"{time.monotonic() - self._began:9.4f}  {what}")

    async def do(self, what: str, call: Awaitable[object]) -> None:
        """Something that the program does; Linux's refusals are part of life."""
        self.note(f"program: {what}")
        began = time.monotonic()
        try:
            await asyncio.wait_for(call, PATIENCE_S)
        except MmError as error:
            self.note(f"program: {what} failed: {error}")
        except TimeoutError:
            raise Broken("AnswersInTime", f"{what} did not end within {PATIENCE_S:.0f} s") from None
        self.note(f"program: {what} took {(time.monotonic() - began) * 1e3:.1f} ms")

    async def read(self, address: int, length: int = 16) -> bytes | None:
        """Read through the driver; None where nothing is mapped."""
        self.note(f"driver: read({address:#x}, {length})")
        possible, found = await self._survive(self.driver.read(address, length), "read")
        return bytes(found) if possible and isinstance(found, bytes | bytearray | memoryview) else None

    async def write(self, address: int, data: bytes) -> bool:
        """Write through the driver. Returns: whether it was possible."""
        self.note(f"driver: write({address:#x}, {data[:8]!r})")
        return (await self._survive(self.driver.write(address, data), "write"))[0]

    async def _survive(self, access: Awaitable[object], what: str) -> tuple[bool, object]:
        """Returns: whether it was possible, and what it returned."""
        try:
            found = await asyncio.wait_for(access, PATIENCE_S)
            return True, found
        except Broken:
            raise
        except MmError as error:
            self.note(f"driver: {what} failed: {error}")
            return False, None
        except Fenced as error:
            raise Broken("AnswersInTime", f"the driver was fenced: {error}") from error
        except MmuBusError as error:
            self.note(f"driver: {what} failed: {error}")
            return False, None
        except TimeoutError:
            raise Broken("Survives", f"{what} did not return within {PATIENCE_S:.0f} s") from None
        except Exception as error:
            raise Broken("Survives", f"{what} raised {error!r}") from error

    async def coherent(self, addresses: Sequence[int]) -> None:
        """All is quiet: both sides read the same."""
        for address in addresses:
            seen = await self.read(address)
            try:
                there = await self.cpu.load(address, 16)
            except MmError:
                if isinstance(seen, bytes):
                    raise Broken("Coherent", f"{address:#x} is not mapped, and the driver reads {seen!r}") from None
                continue
            if isinstance(seen, bytes) and seen != there:
                raise Broken("Coherent", f"at {address:#x} the driver reads {seen!r}; there is {there!r}")

    async def judge(self) -> None:
        """What the server has found."""
        sessions = await self.sessions()
        for session in sessions:
            if session.fenced_because:
                raise Broken("AnswersInTime", session.fenced_because)
        own = {session.session for session in sessions}
        found = await self.program.inspection.violations(check_frames=4096)
        for violation in reversed(found.violations):
            if violation.kind not in FORGIVEN and violation.session in own:
                story = "; ".join(violation.story)
                raise Broken("NothingWrong", f"{violation.kind}: {violation.message} ({story})")

    async def sessions(self) -> list[inspection_pb2.Session]:
        """The driver's sessions, as the server sees them: more than one when it had to begin anew."""
        seen = await self.program.inspection.sessions()
        return [session for session in seen if session.name == NAME and session.session not in self.known]


def pages() -> list[int]:
    """The first byte of every page."""
    return [BASE + page * PAGE for page in range(PAGES)]


async def conform(
    name: str,
    scenario: Callable[[Stage], Awaitable[None]],
    subject: Subject,
    address: str,
    *,
    chaos: str,
    seed: int,
) -> Outcome:
    """Run one scenario against a server that was started with --chaos."""
    from mmubus.connection import connect

    outcome = Outcome(name)
    began = time.monotonic()
    stage: Stage | None = None
    try:
        async with connect(address, name="program") as program:
            known = {session.session for session in await program.inspection.sessions()}
            cpu = await program.create_mm("conform")
            await cpu.mmap(BASE, PAGES * PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)
            async with subject.driver(address, cpu.id, chaos=chaos and f"seed={seed} {chaos}") as driver:
                stage = Stage(cpu, program, driver, seed, known)
                await scenario(stage)
                await stage.judge()
                await stage.do("exit", cpu.exit())
    except Broken as broken:
        outcome.broken = broken
    outcome.transcript = [] if stage is None else stage.transcript
    outcome.seconds = time.monotonic() - began
    return outcome
