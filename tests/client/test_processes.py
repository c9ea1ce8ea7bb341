"""A driver in a process of its own is stopped or killed: nobody waits longer than its budget, and it learns why."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import mmubus
import pytest
from mmubus import PAGE_SIZE
from patience import LIMIT_S

pytestmark = pytest.mark.e2e

BUDGET_S = 3.0
SERVER = "from mmubusd.rpc import main; raise SystemExit(main())"
DRIVER = """
import asyncio, sys, mmubus

async def main(address, mm, start):
    def fenced(error):
        print("fenced", sum(error.lost.values()), len(mirror.held), flush=True)
    async with mmubus.connect(address, name="victim", ack_budget_s=float(sys.argv[4]), on_fenced=fenced) as bus:
        mirror = await bus.mirror(mm)
        await mirror.fault(start, start + 4 * mmubus.PAGE_SIZE)
        print("holds", len(mirror.held), flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""

Process = asyncio.subprocess.Process


async def line(process: Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), LIMIT_S)).decode().strip()


@asynccontextmanager
async def python(code: str, *args: object) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *map(str, args),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture(params=["--lane", "--no-lane"])
async def address(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    where = f"unix:{tmp_path}/bus.sock"
    async with python(SERVER, "--listen", where, request.param) as server:
        assert (await line(server)).startswith("listening")
        yield where


Act = Callable[[Process, Callable[[], Awaitable[float]]], Awaitable[None]]


async def scene(address: str, act: Act, budget_s: float, fenced: int) -> None:
    """A program, a driver that holds four pages of it, and the time that taking them away takes."""
    async with mmubus.connect(address, name="program") as bus:
        mm = await bus.create_mm("program")
        start = await mm.mmap(0, 4 * PAGE_SIZE)

        async def take_away() -> float:
            began = time.monotonic()
            await mm.munmap(start, 4 * PAGE_SIZE)
            return time.monotonic() - began

        async with python(DRIVER, address, mm.id, start, budget_s) as driver:
            assert await line(driver) == "holds 4"
            await act(driver, take_away)
            statistics = await bus.inspection.statistics()
            assert (statistics.freed_before_ack, statistics.fenced) == (0, fenced)


async def test_a_stopped_driver_is_fenced_after_its_budget_and_told_what_it_lost(address: str) -> None:
    async def act(driver: Process, take_away: Callable[[], Awaitable[float]]) -> None:
        os.kill(driver.pid, signal.SIGSTOP)
        assert await asyncio.wait_for(take_away(), LIMIT_S) >= BUDGET_S * 0.9
        os.kill(driver.pid, signal.SIGCONT)
        assert await line(driver) == "fenced 4 0"

    await scene(address, act, BUDGET_S, fenced=1)


async def test_a_killed_driver_is_not_waited_for_longer_than_its_budget(address: str) -> None:
    async def act(driver: Process, take_away: Callable[[], Awaitable[float]]) -> None:
        driver.kill()
        await asyncio.wait_for(take_away(), LIMIT_S)

    await scene(address, act, BUDGET_S, fenced=1)


async def test_a_driver_that_answers_costs_nothing_of_it(address: str) -> None:
    async def act(driver: Process, take_away: Callable[[], Awaitable[float]]) -> None:
        await asyncio.wait_for(take_away(), LIMIT_S)

    await scene(address, act, 30.0, fenced=0)
