"""The server by itself: operations a second, what it remembers for whom, how long it keeps others waiting."""

from __future__ import annotations

import os
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from mmubus.bench import ours
from mmubus.bench.effort import Effort
from mmubus.bench.row import Row, at_least, below
from mmubus.bench.system import PROCESSES_MAX, Arena
from mmubus.bench.worker import Worker

__all__ = ["footprint", "lag", "operations"]

SESSIONS, REGISTRATIONS = 256, 20_000
IN_FLIGHT = 256
BIG_PAGES = 1 << 20


@asynccontextmanager
async def _worker(role: str, **options: object) -> AsyncIterator[Worker]:
    worker = await Worker.start(role, **options)
    try:
        yield worker
    finally:
        await worker.stop()


async def operations(effort: Effort, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """The stream of calls: mmap, touch, munmap of 1 to 16 pages, nobody registered, the server on one core."""
    say("operation stream")
    async with (
        Arena(ours.SYSTEM) as arena,
        _worker("mmubus.bench.clients:program", address=arena.owner.ready) as worker,
    ):
        cpus = sorted(os.sched_getaffinity(0))
        pin(arena.owner.pid, {cpus[0]})
        pin(worker.pid, set(cpus[1:]) or {cpus[0]})
        encoded, library = [], []
        for _ in range(effort.runs):
            encoded.append(await worker.ask("flood", operations=effort.operations))
            library.append(await worker.ask("mix", operations=effort.operations, in_flight=IN_FLIGHT))
    measure = "operation stream (mmap, touch, munmap; no notifier), server on one core"
    yield Row(measure, "operations/s", statistics.median(encoded), bound=at_least(20_000))
    yield Row(f"{measure}, client library on the other", "operations/s", statistics.median(library))


def pin(pid: int, cpus: set[int]) -> None:
    """Keep every thread of a process on these cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cpus)


async def footprint(say: Callable[[str], None]) -> AsyncIterator[Row]:
    """What one more session and one more registration cost the server, from how its memory grows with many."""
    say(f"memory: {REGISTRATIONS} registrations, {SESSIONS} sessions")
    async with Arena(ours.SYSTEM) as arena:
        mm = await arena.owner.ask("create", pages=REGISTRATIONS)
        for worker in arena.responders:
            await worker.ask("attach", sessions=1, mm=mm)  # what the first session brings along is not what one costs
        before = await arena.owner.ask("memory")
        share = SESSIONS // PROCESSES_MAX
        for worker in arena.responders:
            await worker.ask("attach", sessions=share, mm=mm)
        attached = await arena.owner.ask("memory")
        share = REGISTRATIONS // PROCESSES_MAX
        for number, worker in enumerate(arena.responders):
            await worker.ask("ranges", first=number * share, count=share, mm=mm)
        registered = await arena.owner.ask("memory")
    session = (attached - before) / SESSIONS
    registration = (registered - attached - PROCESSES_MAX * session) / REGISTRATIONS
    yield Row("memory of a session", "KiB", (session - registration) / 1024, bound=below(64))
    yield Row("memory of a registration", "KiB", registration / 1024, bound=below(1))


async def lag(effort: Effort, say: Callable[[str], None]) -> AsyncIterator[Row]:
    """How long others wait for the loop while a large address space exits with 4 drivers attached."""
    p99, worst, took = [], [], []
    async with (
        _worker("mmubus.bench.served:owner", address="127.0.0.1:0", frames_nr=BIG_PAGES + 1024 + (1 << 15)) as server,
    ):
        for run in range(min(effort.runs, 5)):
            say(f"lag: an address space of {BIG_PAGES} pages exits, run {run + 1}")
            mm = await server.ask("create", pages=BIG_PAGES)
            await server.ask("populate", mm=mm, pages=BIG_PAGES)
            drivers = [
                await Worker.start("mmubus.bench.clients:responders", address=server.ready)
                for _ in range(PROCESSES_MAX)
            ]
            for driver in drivers:
                await driver.ask("hold", count=1, streams=1, mm=mm)
            seen = await server.ask("exit", mm=mm)
            for driver in drivers:
                await driver.stop()
            p99.append(seen["p99_ms"])
            worst.append(seen["worst_ms"])
            took.append(seen["took_ms"])
    measure = "loop lag p99 while 2^20 pages exit, 4 drivers attached"
    yield Row(measure, "ms", statistics.median(p99), bound=below(20))
    yield Row("the same, worst lag", "ms", statistics.median(worst))
    yield Row("the same, the whole exit", "ms", statistics.median(took))
