"""Another epoch: the server is restarted under the driver, which must begin anew with nothing held."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from mmubus.conform.kit import BASE, PAGE, PAGES, Broken, Outcome, Stage, Subject, pages
from mmubus.errors import MmuBusError
from mmubus.linux import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE

if TYPE_CHECKING:
    from mmubus.address_space import AddressSpace

__all__ = ["restart"]

BACK_S = 20.0
Serve = Callable[[Sequence[str]], AbstractAsyncContextManager[str]]


async def restart(subject: Subject, seed: int, serve: Serve) -> Outcome:
    """Args: serve: starts a server with these options more, in a context."""
    from mmubus.connection import connect

    outcome, began = Outcome("restart"), time.monotonic()
    stage: Stage | None = None
    with tempfile.TemporaryDirectory(prefix="mmubus-") as directory:
        address = f"unix:{directory}/s"
        async with connect(address, name="program") as program:
            try:
                async with AsyncExitStack() as stack:
                    async with serve(("--listen", address)):
                        cpu = await program.create_mm("before")
                        await _map(cpu)
                        driver = await stack.enter_async_context(
                            subject.driver(address, cpu.id, chaos="", survives=True)
                        )
                        stage = Stage(cpu, program, driver, seed, set())
                        for page in pages():
                            await stage.do(f"store({page:#x})", cpu.store(page, b"before".ljust(16)))
                        await stage.coherent(pages())
                    async with serve(("--listen", address)):
                        stage.note("the server was restarted")
                        stage.cpu = await program.create_mm("after")  # has the same number
                        await _map(stage.cpu)
                        await stage.do("store", stage.cpu.store(BASE, b"after".ljust(16)))
                        await _back(stage)
                        await stage.coherent(pages())
                        await stage.judge()
                        await stack.aclose()
            except Broken as broken:
                outcome.broken = broken
    outcome.transcript = [] if stage is None else stage.transcript
    outcome.seconds = time.monotonic() - began
    return outcome


async def _map(cpu: AddressSpace) -> None:
    await cpu.mmap(BASE, PAGES * PAGE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED)


async def _back(stage: Stage) -> None:
    """Wait until the driver is registered with the new server."""
    until = time.monotonic() + BACK_S
    while True:
        try:
            if any(one.mm == stage.cpu.id for session in await stage.sessions() for one in session.registrations):
                break
        except MmuBusError as error:
            stage.note(f"program: the server does not answer yet: {error}")
        if time.monotonic() > until:
            raise Broken("Survives", f"the driver did not come back within {BACK_S:.0f} s")
        await asyncio.sleep(0.05)
    stage.note(f"the driver is back; {PAGE * PAGES} bytes are compared")
