"""The driver processes of a replay, seen from the replay: what each is told to read, and what it found.

The replay tells every driver over its standard input which pages the program has just touched and what is in them; the
driver faults them into its mirror, reads each by DMA and answers on its standard output. One JSON object a line:

    {"n": 7, "do": "attach", "mm": 3}                    -> {"n": 7}
    {"n": 8, "do": "check", "mm": 3,
     "pages": [[start, ["6d6d…", null, …]], …]}          -> {"n": 8, "reads": 64, "wrong": [[address, why, got]], …}
    {"n": 9, "do": "finish"}                             -> {"n": 9, …}, and the process ends

Pages are told in batches, and the program goes on meanwhile; only when it is about to change one of those pages does it
wait for the answers. So what must be found is always exactly known, and the replay is no slower than its slowest
driver. A driver that dies is noted; the others go on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmu.v1 import inspection_pb2

from mmubus.connection import Bus
from mmubus.linux import PAGE_SIZE
from mmubus.trace.contents import Bytes

__all__ = ["KINDS", "Crew", "Driver", "DriverFailed", "kinds_of", "start_crew"]

KINDS = ("mirror", "range", "rmap")
"""What drivers are unless asked for others: the seed's ops, mainline's start and end with aging, the rmap list."""
EXPORTERS = frozenset({"rmap", "xpmem"})
"""Those that export frames, which the zero page is none of."""
BATCH_PAGES = 64
ASKED_PAGES_MAX = 8 * BATCH_PAGES
LINE_BYTES_MAX = 16 << 20


class DriverFailed(Exception):
    """A driver process could not be started, or broke off for a reason of its own."""


@dataclass(slots=True)
class Driver:
    """One driver process.

    Attributes:
        died: it ended before it was asked to.
        finishing: it was asked to end.
        reads, wrong: DMA reads that it made, and those with the wrong bytes.
        refused: reads that the server refused because the translation was stale.
        lost: pages that it could not get.
        first_wrong: the first wrong reads, for people.
        seen: what the server says of its session, when it was last asked.
        held_most: pages of which it held translations at any time that the server was asked.
    """

    name: str
    kind: str
    process: Process
    died: bool = False
    finishing: bool = False
    reads: int = 0
    wrong: int = 0
    refused: int = 0
    lost: int = 0
    first_wrong: list[str] = field(default_factory=list)
    seen: inspection_pb2.Session = field(default_factory=inspection_pb2.Session)
    held_most: int = 0
    _answers: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    _reader: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """Pages of which it held translations, when the server was last asked."""
        return sum(registration.held_pages for registration in self.seen.registrations)

    def tell(self, number: int, message: bytes) -> asyncio.Future[dict[str, Any]] | None:
        """Send a message; returns a future of its answer, or None when the driver is dead."""
        assert self.process.stdin is not None
        if self.died or self.process.stdin.is_closing():
            return None
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        self.process.stdin.write(message)
        return future

    async def listen(self) -> None:
        """Read answers until the process ends; whoever waits for one then gets an empty one."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            answer = json.loads(line)
            self._take(answer)
            if (future := self._answers.pop(answer["n"], None)) and not future.done():
                future.set_result(answer)
        self.died = not self.finishing
        for future in self._answers.values():
            if not future.done():
                future.set_result({})
        self._answers.clear()

    def _take(self, answer: dict[str, Any]) -> None:
        self.reads += answer.get("reads", 0)
        self.wrong += len(answer.get("wrong", ()))
        self.refused = answer.get("refused", self.refused)
        self.lost += answer.get("lost", 0)
        for address, why, got in answer.get("wrong", ()):
            if len(self.first_wrong) < 3:
                self.first_wrong.append(f"{address:#x}: {why}: {got}")


@dataclass(slots=True)
class Crew:
    """All drivers. Empty: every method returns at once.

    Attributes: readers_max: drivers that read each page that was touched, in turn; 0: all of them do.
    """

    drivers: list[Driver] = field(default_factory=list)
    readers_max: int = 0
    _turn: int = 0
    _next: int = 1
    _touched: dict[tuple[int, int], Bytes] = field(default_factory=dict)
    _own: set[tuple[int, int]] = field(default_factory=set)
    _asked: dict[tuple[int, int], asyncio.Future[None]] = field(default_factory=dict)
    on_answer: Callable[[], None] = lambda: None

    @property
    def empty(self) -> bool:
        """True when there is nobody to tell."""
        return not self.drivers

    @property
    def due(self) -> bool:
        """True when enough pages are waiting to be told."""
        return len(self._touched) >= BATCH_PAGES

    def touched(self, mm: int, address: int, expected: Bytes, *, own: bool) -> None:
        """The program has touched a page: every driver shall read it soon, and find these bytes.

        Args: own: it has a frame of its own, which may be exported; the zero page has not.
        """
        if self.drivers:
            self._touched[mm, address] = expected
            if own:
                self._own.add((mm, address))
            else:
                self._own.discard((mm, address))

    async def attach(self, mm: int) -> None:
        """Every driver registers on an address space; returns when all have."""
        await asyncio.gather(*self._tell({"do": "attach", "mm": mm}))

    def send(self) -> None:
        """Tell the drivers the pages that are waiting to be told. Requires: none of them is being changed."""
        for mm in {mm for mm, _ in self._touched}:
            pages = {address: data for (one, address), data in self._touched.items() if one == mm}
            own = {address: data for address, data in pages.items() if (mm, address) in self._own}
            readers = self._readers()
            others = [driver for driver in readers if driver.kind not in EXPORTERS]
            answers = self._tell({"do": "check", "mm": mm, "pages": _runs(pages)}, others)
            if own:
                exporters = [driver for driver in readers if driver.kind in EXPORTERS]
                answers += self._tell({"do": "check", "mm": mm, "pages": _runs(own)}, exporters)
            done = asyncio.ensure_future(self._collect(answers))
            for address in pages:
                self._asked[mm, address] = done
        self._touched.clear()
        self._own.clear()

    def asked(self, mm: int, address: int) -> bool:
        """Whether drivers are about to read this page."""
        return (mm, address) in self._asked

    async def settle(self, mm: int | None = None, start: int = 0, end: int = 1 << 64) -> None:
        """Before the program changes something: the drivers have read all that was touched in the range.

        Args: mm: None: in every address space.
        """
        if not self.drivers:
            return

        def inside(key: tuple[int, int]) -> bool:
            return mm is None or (key[0] == mm and start <= key[1] < end)

        if any(inside(key) for key in self._touched):
            self.send()
        if waiting := {future for key, future in self._asked.items() if inside(key)}:
            await asyncio.wait(waiting)
            self._drop_answered()

    async def keep_up(self) -> None:
        """Wait for drivers that are far behind."""
        while len(self._asked) > ASKED_PAGES_MAX:
            await asyncio.wait({next(iter(self._asked.values()))})
            self._drop_answered()

    def _drop_answered(self) -> None:
        self._asked = {key: future for key, future in self._asked.items() if not future.done()}

    def forget(self, mm: int) -> None:
        """The address space is gone."""
        for key in [key for key in self._touched if key[0] == mm]:
            del self._touched[key]

    async def finish(self) -> None:
        """Every driver says goodbye and ends."""
        await self.settle()
        for driver in self.drivers:
            driver.finishing = True
        await asyncio.gather(*self._tell({"do": "finish"}))
        for driver in self.drivers:
            await driver.process.wait()

    async def kill(self) -> None:
        """End every driver at once, whatever it does."""
        for driver in self.drivers:
            if driver.process.returncode is None:
                driver.process.kill()
            await driver.process.wait()
            if driver._reader is not None:
                driver._reader.cancel()

    def _readers(self) -> list[Driver]:
        """Whose turn it is to read."""
        if not 0 < self.readers_max < len(self.drivers):
            return self.drivers
        first, self._turn = self._turn, (self._turn + self.readers_max) % len(self.drivers)
        return [*self.drivers, *self.drivers][first : first + self.readers_max]

    def _tell(
        self, message: dict[str, Any], drivers: Sequence[Driver] | None = None
    ) -> list[asyncio.Future[dict[str, Any]]]:
        """Tell drivers; None: all of them."""
        number = self._next
        self._next += 1
        line = json.dumps({"n": number, **message}, separators=(",", ":")).encode() + b"\n"
        answers = [driver.tell(number, line) for driver in (self.drivers if drivers is None else drivers)]
        return [answer for answer in answers if answer is not None]

    async def look(self, bus: Bus, known: Collection[int] = ()) -> None:
        """Ask the server what it sees of the drivers. Args: known: sessions that are none of them."""
        named = {driver.name: driver for driver in self.drivers}
        for session in await bus.inspection.sessions():
            if session.session not in known and (driver := named.get(session.name)) is not None:
                driver.seen = session
                driver.held_most = max(driver.held_most, driver.held)

    async def _collect(self, answers: Iterable[asyncio.Future[dict[str, Any]]]) -> None:
        await asyncio.gather(*answers)
        self.on_answer()


def _runs(pages: dict[int, Bytes]) -> list[tuple[int, list[str | None]]]:
    """Pages as runs of adjacent ones: (start, what each holds)."""
    runs: list[tuple[int, list[str | None]]] = []
    end = -1
    for address in sorted(pages):
        data = pages[address]
        shown = data.hex() if isinstance(data, bytes) else None
        if address == end:
            runs[-1][1].append(shown)
        else:
            runs.append((address, [shown]))
        end = address + PAGE_SIZE
    return runs


def kinds_of(count: int) -> list[str]:
    """So many drivers, of each usual kind in turn."""
    return [KINDS[index % len(KINDS)] for index in range(count)]


async def start_crew(address: str, kinds: Sequence[str], options: Sequence[str] = (), readers_max: int = 0) -> Crew:
    """Start driver processes and wait until each has connected.

    Args: address: the server's; kinds: one for each process.
    Raises: DriverFailed.
    """
    crew = Crew(readers_max=readers_max)
    numbers: Counter[str] = Counter()
    try:
        for kind in kinds:
            numbers[kind] += 1
            name = kind if kinds.count(kind) == 1 and kind not in KINDS else f"{kind}-{numbers[kind]}"
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mmubus.trace.driver",
                *("--server", address, "--kind", kind, "--name", name),
                *options,
                stdin=PIPE,
                stdout=PIPE,
                limit=LINE_BYTES_MAX,
            )
            driver = Driver(name, kind, process)
            driver._reader = asyncio.create_task(driver.listen())
            crew.drivers.append(driver)
        await asyncio.gather(*crew._tell({"do": "hello"}))
    except OSError as error:
        await crew.kill()
        raise DriverFailed(f"a driver process could not be started: {error}") from error
    if dead := [driver.name for driver in crew.drivers if driver.died]:
        await crew.kill()
        raise DriverFailed(f"{', '.join(dead)}: ended at once; what went wrong stands above")
    return crew
