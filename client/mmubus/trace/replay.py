"""One replay from start to end: the drivers, the recording, the report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from mmu.v1 import inspection_pb2

from mmubus.connection import Bus, connect
from mmubus.errors import MmuBusError
from mmubus.operations import Operations
from mmubus.trace.arena import ArenaPlayer
from mmubus.trace.compare import Books
from mmubus.trace.crew import KINDS, Crew, start_crew
from mmubus.trace.format import Trace
from mmubus.trace.player import Player
from mmubus.trace.program import ProgramPlayer
from mmubus.trace.report import Report

__all__ = ["Stage", "replay"]

FENCE_WAIT_S = 30.0
LOOK_S = 0.2


@dataclass(slots=True)
class Stage:
    """What a spectator of a running replay may look at.

    Attributes:
        known: sessions of the server that are none of the replay's.
        played: operations so far.
    """

    trace: Trace
    bus: Bus
    crew: Crew
    books: Books
    known: set[int]
    played: int = 0
    started: float = field(default_factory=time.monotonic)

    async def look(self) -> None:
        """Ask the server what it sees of the drivers. Raises: MmuBusError."""
        await self.crew.look(self.bus, self.known)


Spectator: TypeAlias = Callable[[Stage], Awaitable[None]]
"""Runs beside the replay and is cancelled at its end."""


async def replay(
    trace: Trace,
    address: str,
    *,
    drivers: Sequence[str] = KINDS,
    readers_max: int = 0,
    ack_budget_s: float = 0.0,
    progress: Callable[[int], None] = lambda played: None,
    spectator: Spectator | None = None,
    equipped: bool = False,
) -> Report:
    """Replay a recording on a server.

    Args:
        drivers: the kind of each driver process; none: state and notifications only.
        readers_max: drivers that read each page that was touched, in turn; 0: all of them do.
        ack_budget_s: what the drivers ask for; 0: the server's default.
        progress: called with the number of operations played.
        equipped: the server has what the recorded machine had: huge pages, swap.
        spectator: runs beside it.
    Raises: DriverFailed; ConnectionLost when the server is not there or goes away.
    """
    async with connect(address, name="replay") as bus:
        before = await bus.inspection.statistics()
        known = {session.session for session in await bus.inspection.sessions()}
        crew = await start_crew(address, drivers, ["--ack-budget", str(ack_budget_s)], readers_max)
        try:
            report = await _play(trace, bus, crew, before, known, progress, spectator)
            if not equipped:
                report.notes[:0] = remarks_on(trace)
            return report
        finally:
            await crew.kill()


async def _play(
    trace: Trace,
    bus: Bus,
    crew: Crew,
    before: inspection_pb2.GetStatisticsResponse,
    known: set[int],
    progress: Callable[[int], None],
    spectator: Spectator | None,
) -> Report:
    books = Books(notify_told=trace.header.recorder == "kernel")
    stage = Stage(trace, bus, crew, books, known)
    watching = asyncio.gather(_look(stage), *([spectator(stage)] if spectator is not None else []))

    def played(count: int) -> None:
        stage.played = count
        progress(count)

    async with bus.operations() as operations:
        player = player_of(trace, bus, operations, crew, books)
        started = time.monotonic()
        try:
            await player.play(played)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        seconds = time.monotonic() - started
        dead = [driver.name for driver in crew.drivers if driver.died]
        fenced = await _fenced(bus, known, dead)
        await stage.look()
        await player.cleanup()
    after = await bus.inspection.statistics()
    await crew.finish()
    return Report(
        trace,
        books,
        seconds,
        after.rounds - before.rounds,
        after.acks - before.acks,
        {"p50": after.ack_us_p50, "p99": after.ack_us_p99},
        after.freed_before_ack - before.freed_before_ack,
        fenced,
        crew.drivers,
        [*player.remarks()],
    )


async def _look(stage: Stage) -> None:
    """Ask the server again and again, until it is cancelled."""
    while stage.crew.drivers:
        with suppress(MmuBusError):  # what cannot be seen now is seen the next time
            await stage.look()
        await asyncio.sleep(LOOK_S)


def remarks_on(trace: Trace) -> list[str]:
    """What the machine had that it was recorded on and a replay has not."""
    found = []
    if trace.header.swap:
        found.append("recorded with swap: without --swap-slots-nr the server tells less of pages that were swapped out")
    return found


def player_of(trace: Trace, bus: Bus, operations: Operations, crew: Crew, books: Books) -> Player:
    """The player for this kind of recording."""
    kind = ArenaPlayer if trace.header.source == "random" else ProgramPlayer
    return kind(trace, bus, operations, crew, books)


async def _fenced(bus: Bus, known: set[int], dead: list[str]) -> list[str]:
    """Names of the sessions that were fenced. A driver that died is one once its grace period is over: wait for
    that."""
    deadline = time.monotonic() + FENCE_WAIT_S
    while True:
        sessions = [one for one in await bus.inspection.sessions() if one.session not in known]
        fenced = [one.name for one in sessions if one.state == "fenced"]
        waiting = [one.name for one in sessions if one.name in dead and one.state == "lost"]
        if not waiting or time.monotonic() > deadline:
            return sorted(fenced + waiting)
        await asyncio.sleep(0.1)
