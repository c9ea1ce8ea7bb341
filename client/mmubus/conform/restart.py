"""Another epoch: the server is restarted under the driver, which must begin anew with nothing held."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from mmubus.conform.kit import BASE, PAGE, PAGES, Broken, Factory, Outcome, Stage, pages
from mmubus.errors import MmuBusError
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE

__all__ = ["restart"]

BACK_S = 10.0
Serve = Callable[[Sequence[str]], AbstractAsyncContextManager[str]]


async def restart(make: Factory, seed: int, serve: Serve) -> Outcome:
    """Args: serve: starts a server with these options more, in a context."""
    from mmubus.connection import connect

    outcome, began = Outcome("restart"), time.monotonic()
    stage: Stage | None = None
    with tempfile.TemporaryDirectory(prefix="mmubus-") as directory:
        address = f"unix:{directory}/s"
        async with connect(address, name="program") as program, connect(address, name="driver", reattach=True) as bus:
            try:
                async with serve(("--listen", address)):
                    cpu = await program.create_mm("before")
                    await _map(cpu)
                    stage = Stage(cpu, program, bus, await make(bus, bus.mm(cpu.id)), seed)
                    for page in pages():
                        await stage.do(f"store({page:#x})", cpu.store(page, b"before".ljust(16)))
                    await stage.coherent(pages())
                    epoch = bus.session.epoch
                async with serve(("--listen", address)):
                    stage.note("the server was restarted")
                    stage.cpu = await program.create_mm("after")  # has the same number
                    await _map(stage.cpu)
                    await stage.do("store", stage.cpu.store(BASE, b"after".ljust(16)))
                    await _back(stage, epoch)
                    await stage.coherent(pages())
                    await stage.judge()
            except Broken as broken:
                outcome.broken = broken
    outcome.transcript = [] if stage is None else stage.transcript
    outcome.seconds = time.monotonic() - began
    return outcome


async def _map(cpu: object) -> None:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
    await cpu.mmap(BASE, PAGES * PAGE, flags=flags)  # type: ignore[attr-defined]


async def _back(stage: Stage, epoch: int) -> None:
    """Wait until the driver's session is one of the new server."""
    until = time.monotonic() + BACK_S
    while stage.bus.session.epoch == epoch or not stage.bus.session.registrations:
        if time.monotonic() > until:
            raise Broken("Survives", f"the driver did not come back within {BACK_S:.0f} s")
        try:
            await stage.program.inspection.statistics()
        except MmuBusError as error:
            stage.note(f"program: the server does not answer yet: {error}")
        await asyncio.sleep(0.05)
    stage.note(f"the driver is back; {PAGE * PAGES} bytes are compared")
