"""What a round costs when there is much that it does not concern, and how cost grows with what it does concern."""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator, Callable, Iterable

from mmubus.bench import ours
from mmubus.bench.effort import Effort, Sample, in_turn
from mmubus.bench.row import Row, ratio_at_most
from mmubus.bench.system import PROCESSES_MAX, Arena, counts

__all__ = ["CURVE", "curves", "filtered"]

CURVE = "curve, "
"""How the names of rows begin that are points of a curve: `curve, AXIS = VALUE`."""
MANY = 10_000
CONCERNED = 1
"""The process whose registration is concerned."""
FIRST_PAGE = 1
"""Of the registrations' pages; page 0 is nobody's."""


async def filtered(effort: Effort, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """Filtered fan-out: one round that concerns one of many registrations, against one that is alone."""
    steps = (1, 10, 100, 1_000, MANY) if effort.curve else (1, MANY)
    say(f"fan-out: {MANY} registrations on disjoint ranges")
    async with Arena(ours.SYSTEM) as arena:
        spaces = {registrations: await _disjoint(arena, registrations) for registrations in steps}
        p50 = await in_turn(
            {f"{n:06}": _sample(arena, effort.rounds, mm=mm, at=at) for n, (mm, at) in spaces.items()}, effort.runs
        )
    yield Row(
        f"{MANY} registrations on disjoint ranges, a round that concerns one, p50",
        "us",
        p50[f"{MANY:06}"],
        p50["000001"],
        "the same with one registration",
        ratio_at_most(1.5),
    )
    for registrations in steps:
        yield Row(f"{CURVE}registrations on disjoint ranges = {registrations}", "us", p50[f"{registrations:06}"])


async def _disjoint(arena: Arena, registrations: int) -> tuple[int, int]:
    """An address space with registrations of one page each, spread over the processes.

    Returns: its number, and a page that one registration of process CONCERNED covers.
    """
    mm = await arena.owner.ask("create", pages=registrations + FIRST_PAGE)
    spread = counts(registrations, PROCESSES_MAX) if registrations > 1 else [0, 1, 0, 0]
    begin = FIRST_PAGE
    concerned = 0
    for process, (worker, count) in enumerate(zip(arena.responders, spread, strict=True)):
        if process == CONCERNED:
            concerned = begin + count // 2
        if count:
            await worker.ask("ranges", first=begin, count=count, mm=mm)
        begin += count
    return mm, concerned


async def curves(effort: Effort, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """How a round's cost grows with sessions, registrations, mappings and pages."""
    few, many = effort.rounds // 4 + 10, effort.curve
    async with Arena(ours.SYSTEM) as arena:
        for sessions in (1, 2, 4, 8, 16, 32, 64) if many else (1, 4, 16):
            say(f"curves: {sessions} sessions")
            await arena.scale(sessions, sessions)
            yield await _point(arena, "sessions concerned", sessions, few)
        for registrations in (4, 16, 64, 256, 1024, 4096) if many else (4, 256):
            say(f"curves: {registrations} registrations")
            await arena.scale(registrations)
            yield await _point(arena, "registrations concerned, in 4 sessions", registrations, few)
        await arena.scale(1)
        for mappings in (1, 10, 100, 1_000, 10_000) if many else (1, 1_000):
            say(f"curves: {mappings} mappings")
            mm = await arena.owner.ask("create", pages=max(mappings, 4), pieces=mappings)
            yield await _one_driver(arena, "mappings of the address space", mappings, few, mm, pages=1)
        for pages in _powers(0, 18, 3 if many else 9):
            say(f"curves: {pages} pages")
            mm = await arena.owner.ask("create", pages=max(pages, 2))
            yield await _one_driver(arena, "pages taken away", pages, max(10, few // 4), mm, pages=pages)


async def _one_driver(arena: Arena, axis: str, value: int, rounds: int, mm: int, pages: int) -> Row:
    """A point with one registration of an address space of its own."""
    await arena.responders[0].ask("hold", count=1, streams=1, mm=mm)
    took = await arena.owner.ask("gather", rounds=rounds, mm=mm, at=0 if pages > 1 else 1, pages=pages)
    return Row(f"{CURVE}{axis} = {value}", "us", statistics.median(took))


async def _point(arena: Arena, axis: str, value: int, rounds: int) -> Row:
    await arena.gather(10)
    return Row(f"{CURVE}{axis} = {value}", "us", statistics.median(await arena.gather(rounds)))


def _sample(arena: Arena, rounds: int, mm: int, at: int) -> Sample:
    async def once() -> float:
        return float(statistics.median(await arena.owner.ask("gather", rounds=rounds, mm=mm, at=at)))

    return once


def _powers(first: int, last: int, step: int) -> Iterable[int]:
    return [1 << power for power in range(first, last + 1, step)]
