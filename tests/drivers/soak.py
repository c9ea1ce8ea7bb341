"""All drivers at once, on address spaces that fork, move, protect, unmap, write back and reclaim their memory.

    cd tests && python -m drivers.soak --seconds 600 --seed 1

Every byte that a device reads is held against what a program or a device wrote (`cells` says what may be there while
several act at once). The validators judge everything that the server does as it happens. At the end: violations, wrong
reads, fences and rounds that never ended, each of which must be 0.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random

import mmubus
from drivers.devices import Cached, Device, Guest, HmmDevice, Importing, OnDemand, Pinned, Sva, Tlb, VfioUser
from drivers.program import Hog, Program
from mmubus.errors import MmuBusError
from mmubusd.mm.check import check_memory
from mmubusd.notify.validators import RULES, Account
from mmubusd.rpc.server import EmbeddedServer

FRAMES_NR, FEW_FRAMES_NR = 4096, 1024
ACK_BUDGET_S = 10.0
STUCK_S = 30.0
KINDS: tuple[type[Device], ...] = (Guest, Tlb, HmmDevice, Sva, OnDemand, Cached, Pinned, VfioUser)


@dataclass
class Outcome:
    """What a run has shown."""

    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    rounds: int = 0
    rounds_open: int = 0
    notices: int = 0
    stale_refused: int = 0
    fenced: int = 0
    freed_before_ack: int = 0
    dirty_unheld: int = 0

    @property
    def good(self) -> bool:
        """Nothing went wrong, and everything ended."""
        bad = self.wrong or self.violations
        return not (bad or self.rounds_open or self.fenced or self.freed_before_ack or self.dirty_unheld)

    def __str__(self) -> str:
        lines = [
            f"{self.seconds:.0f} s, {self.rounds:,} rounds, {self.notices:,} notices",
            f"violations {len(self.violations)}, wrong bytes {len(self.wrong)}, rounds that did not end "
            f"{self.rounds_open}, fenced {self.fenced}, freed before ack {self.freed_before_ack}, dirty without a "
            f"translation {self.dirty_unheld}; accesses overtaken and repeated {self.stale_refused}",
            "  ".join(f"{name} {count:,}" for name, count in sorted(self.actions.items())),
        ]
        return "\n".join([*lines, *self.violations[:10], *self.wrong[:10]])


class Judge:
    """The validators, fed as things happen, so that a long run needs no long recording."""

    def __init__(self, server: EmbeddedServer, outcome: Outcome) -> None:
        self._history = server.server.driver.bus.history
        self._history.recording = True
        self._account = Account(ACK_BUDGET_S)
        self._rules = [rule(self._account) for rule in RULES]
        self._outcome = outcome

    def look(self, *, over: bool = False) -> None:
        """Judge what has happened since the last time."""
        events, self._history.events = self._history.events, []
        for event in events:
            for rule in self._rules:
                self._outcome.violations += [f"{type(rule).__name__}: {said}" for said in rule.see(event)]
            self._account.see(event)
        if over:
            for rule in self._rules:
                self._outcome.violations += [f"{type(rule).__name__}: {said}" for said in rule.end()]


async def soak(seconds: float, seed: int, programs_nr: int = 2, *, pressure: bool = False) -> Outcome:
    """Run it. Args: pressure: too little memory, and somebody who wants all of it. Returns: what it has shown."""
    outcome, random = Outcome(), Random(seed)
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        frames_nr = FEW_FRAMES_NR if pressure else FRAMES_NR
        server = await stack.enter_async_context(EmbeddedServer(frames_nr=frames_nr, ack_budget_s=ACK_BUDGET_S))
        judge = Judge(server, outcome)
        cpu = await stack.enter_async_context(mmubus.connect(server.address, name="programs"))
        programs = [
            await Program.start(cpu, Random(random.random()), f"program {n}", outcome) for n in range(programs_nr)
        ]
        hogs = [await Hog.start(cpu, Random(random.random()), outcome)] if pressure else []
        devices: list[Device] = []
        for program in programs:
            for kind in KINDS:
                bus = await stack.enter_async_context(mmubus.connect(server.address, name=kind.__name__.lower()))
                devices.append(await kind.attach(stack, bus, program, Random(random.random())))
            bus = await stack.enter_async_context(mmubus.connect(server.address, name="xpmem"))
            devices += await Importing.attach_all(stack, bus, program, random)
        until = began + seconds
        work = [asyncio.create_task(actor.run(until)) for actor in (*hogs, *programs, *devices)]
        stuck = False
        while not stuck and not all(task.done() for task in work):
            await asyncio.wait(work, timeout=0.25, return_when=asyncio.FIRST_EXCEPTION)
            judge.look()
            stuck = time.monotonic() > until + STUCK_S
            if any(task.done() and not task.cancelled() and task.exception() for task in work):
                break
        for task in work:
            task.cancel()
        for done in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(done, asyncio.CancelledError):
                if stuck:
                    outcome.wrong.append("an actor never came to an end")
            elif isinstance(done, BaseException):
                outcome.wrong.append(f"an actor failed: {type(done).__name__}: {done}")
        for device in devices:
            outcome.actions[f"{device.name} reads"] += device.reads
            outcome.actions[f"{device.name} writes"] += device.writes
        await asyncio.sleep(0.2)
        check_memory(server.server.memory)
        seen, counters = await cpu.inspection.statistics(), server.server.driver.bus.counters
        judge.look(over=True)
        outcome.rounds, outcome.rounds_open, outcome.notices = seen.rounds, seen.rounds_open, seen.notices
        outcome.stale_refused, outcome.fenced = seen.stale_refused, seen.fenced
        outcome.freed_before_ack, outcome.dirty_unheld = seen.freed_before_ack, counters.dirty_unheld
    outcome.seconds = time.monotonic() - began
    return outcome


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="drivers.soak", description="All drivers at once, everything checked.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--programs", type=int, default=2)
    parser.add_argument("--pressure", action="store_true", help="too little memory for all")
    options = parser.parse_args()
    try:
        outcome = asyncio.run(soak(options.seconds, options.seed, options.programs, pressure=options.pressure))
    except MmuBusError as error:
        print(f"soak: seed {options.seed}: {error}", file=sys.stderr)
        return 1
    print(f"seed {options.seed}: {outcome}")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
