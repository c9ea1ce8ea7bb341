"""All drivers at once, on address spaces that do everything to their memory, in a machine that has too little of it.

    cd tests && python -m drivers.soak --seconds 600 --seed 1

Programs fork, move, protect, unmap, migrate, merge, write back and reclaim, with huge pages, two nodes and swap, and
somebody beside them wants more memory than there is. Every byte that a device reads is held against what a program or a
device wrote (`cells` says what may be there while several act at once). The validators judge everything that the
server does as it happens, and the sanitizer every access. Violations, findings, wrong bytes, fences and rounds that
never end must all be 0.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from random import Random

import mmubus
from drivers.devices import KINDS, Device
from drivers.outcome import WIDTH, Outcome
from drivers.program import Hog, Program
from mmubus.errors import MmuBusError
from mmubusd.mm.check import check_memory
from mmubusd.mm.huge_memory import Thp
from mmubusd.notify import validators
from mmubusd.rpc import EmbeddedServer
from rich.console import Console

FRAMES_NR, SWAP_SLOTS_NR, NODES_NR = 8192, 16384, 2
ACK_BUDGET_S = 30.0
STUCK_S = 60.0
LEASE_S = 60.0
"""Server and clients share one process: while it is not scheduled, nobody hears of anybody."""
LOOK_S = 0.25
QUIET_LOOKS_MAX = 40


class Judge:
    """The validators, fed as things happen, so that a long run needs no long recording."""

    def __init__(self, server: EmbeddedServer, outcome: Outcome) -> None:
        self._memory = server.server.memory
        self._history = server.server.driver.bus.history
        self._history.recording = True
        self._judge = validators.Judge(ACK_BUDGET_S)
        self.outcome = outcome

    def look(self, *, over: bool = False) -> None:
        """Judge what has happened since the last time."""
        events, self._history.events = self._history.events, []
        self.outcome.violations += [str(violation) for event in events for violation in self._judge.see(event)]
        self._look_at_memory()
        if over:
            self.outcome.violations += [str(violation) for violation in self._judge.end()]

    def _look_at_memory(self) -> None:
        """How short of memory the machine is."""
        outcome, memory = self.outcome, self._memory
        huge = sum(leaf.huge for mm in memory.mms.values() for leaf in mm.pgtable.leaves.values())
        outcome.huge_most = max(outcome.huge_most, huge)
        outcome.swapped_most = max(outcome.swapped_most, memory.swap.used_nr)
        outcome.free_least = min(outcome.free_least, memory.frames.free_nr)


async def soak(seconds: float, seed: int, programs_nr: int = 2) -> Outcome:
    """Run it. Returns: what it has shown."""
    outcome, random = Outcome(), Random(seed)
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            EmbeddedServer(
                frames_nr=FRAMES_NR, swap_slots_nr=SWAP_SLOTS_NR, nodes_nr=NODES_NR, thp=Thp.MADVISE,
                ack_budget_s=ACK_BUDGET_S,
            )
        )  # fmt: skip
        judge = Judge(server, outcome)
        cpu = await stack.enter_async_context(mmubus.connect(server.address, name="programs", lease_s=LEASE_S))
        programs = [
            await Program.start(cpu, Random(random.random()), f"program {n}", outcome) for n in range(programs_nr)
        ]
        hog = await Hog.start(cpu, Random(random.random()), outcome)
        devices: list[Device] = []
        for program in programs:
            for kind in KINDS:
                connected = mmubus.connect(server.address, name=kind.name, lease_s=LEASE_S)
                bus = await stack.enter_async_context(connected)
                devices += await kind.attach(stack, bus, program, random)
        outcome.title = (
            f"seed {seed}: {seconds:.0f} s, {programs_nr} programs, {len(devices)} devices of {len(KINDS)} kinds, "
            f"{FRAMES_NR:,} frames, swap, {NODES_NR} nodes, huge pages"
        )
        until = time.monotonic() + seconds
        await _work([actor.run(until) for actor in (hog, *programs, *devices)], until + STUCK_S, judge)
        await _sum_up(server, cpu, devices, judge)
    outcome.seconds = time.monotonic() - began
    return outcome


async def _work(actors: list[Coroutine[None, None, None]], late: float, judge: Judge) -> None:
    """Let all of them act, and judge meanwhile. One that fails, or comes to no end, ends all."""
    work = [asyncio.create_task(actor) for actor in actors]
    waiting: set[asyncio.Task[None]] = set(work)
    failed, looked, worked = False, time.monotonic(), time.process_time()
    while waiting and not failed and time.monotonic() < late:
        done, waiting = await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        judge.look()
        now, work_s = time.monotonic(), time.process_time() - worked
        judge.outcome.stall_s = max(judge.outcome.stall_s, (now - looked - LOOK_S, work_s))
        looked, worked = now, worked + work_s
        failed = any(task.exception() is not None for task in done)
    if waiting and not failed:
        judge.outcome.wrong.append(f"{len(waiting)} of {len(work)} actors never came to an end")
    for task in waiting:
        task.cancel()
    for ended in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
            judge.outcome.wrong.append(f"an actor failed: {type(ended).__name__}: {ended}")


async def _sum_up(server: EmbeddedServer, cpu: mmubus.Bus, devices: list[Device], judge: Judge) -> None:
    """Wait until all is quiet, and count. The devices are still there, and hold what they hold."""
    outcome, driver = judge.outcome, server.server.driver
    for _ in range(QUIET_LOOKS_MAX):
        if not (seen := await cpu.inspection.statistics()).rounds_open:
            break
        await asyncio.sleep(LOOK_S)
    check_memory(server.server.memory)
    await cpu.inspection.violations(check_frames=FRAMES_NR)
    judge.look(over=True)
    outcome.rounds, outcome.rounds_open = seen.rounds, seen.rounds_open
    outcome.fenced, outcome.freed_before_ack = seen.fenced, seen.freed_before_ack
    outcome.dirty_unheld = driver.bus.counters.dirty_unheld
    outcome.offences = {breach.value: count for breach, count in driver.bus.sanitizer.counts.items()}
    outcome.wrong += [str(offence.message) for offence in driver.bus.sanitizer.offences]
    for session in await cpu.inspection.sessions():
        if session.name in outcome.drivers:
            row = outcome.row(session.name)
            row.notices += session.notices
            row.acks += session.acknowledged
            row.held += sum(registration.held_pages for registration in session.registrations)
    for device in devices:
        outcome.row(device.name).retries += device.retries
        outcome.row(device.name).held += device.pinned
    for bus in {device.bus for device in devices}:
        outcome.row(bus.name).retries += sum(registration.overtaken for registration in bus.session.registrations)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="drivers.soak", description="All drivers at once, everything checked.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--programs", type=int, default=2)
    options = parser.parse_args()
    try:
        outcome = asyncio.run(soak(options.seconds, options.seed, options.programs))
    except MmuBusError as error:
        print(f"soak: seed {options.seed}: {error}", file=sys.stderr)
        return 1
    outcome.show(Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
