"""A real server is killed, and another one goes on with its state: clients that were there hardly notice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import mmubus
import pytest
from mmubus import PAGE_SIZE

pytestmark = pytest.mark.e2e

SERVER = "from mmubusd.rpc import main; raise SystemExit(main())"
LIMIT_S = 60
BUDGET_S = 20.0
OPTIONS = ("--frames-nr", "4096", "--log-level", "error", "--grace-s", "30", "--checkpoint-bytes", "20000")


class Server:
    """A server process on one directory of state, started again as often as one likes."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.state = directory / "state"
        self.address = f"unix:{directory}/server.sock"
        self._options = (*OPTIONS, *options)
        self.process: subprocess.Popen[str] | None = None

    def _spawn(self) -> subprocess.Popen[str]:
        """Not asyncio's: a killed server's checkpointing process has the pipe, too, and may outlive the loop."""
        return subprocess.Popen(
            (sys.executable, "-c", SERVER, "--listen", self.address, "--state", str(self.state), *self._options),
            stdout=subprocess.PIPE, text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("MMUBUS_")},
        )  # fmt: skip

    async def start(self) -> None:
        self.process = await asyncio.to_thread(self._spawn)
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), LIMIT_S)
        assert line == f"listening on {self.address}\n"

    async def end(self, how: int) -> int:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.send_signal(how)  # to one that has ended: nothing
        self.process.stdout.close()
        return await asyncio.to_thread(self.process.wait, LIMIT_S)

    async def again(self, how: int = signal.SIGKILL) -> None:
        await self.end(how)
        await self.start()


@asynccontextmanager
async def running(directory: Path, *options: str) -> AsyncIterator[Server]:
    server = Server(directory, *options)
    await server.start()
    try:
        yield server
    finally:
        await server.end(signal.SIGKILL)


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - the library offers no event for it
            await asyncio.sleep(0.01)


async def until_nothing_is_quarantined(bus: mmubus.Bus) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await bus.inspection.statistics()).frames_quarantined:  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.02)


async def test_what_was_answered_is_there_again_after_a_stop_and_after_a_kill(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        async with mmubus.connect(server.address) as bus:
            mm = await bus.create_mm("program")
            at = await mm.mmap(0, 8 * PAGE_SIZE)
            await mm.store(at, b"kept")
            file = await bus.open_file("named", size=PAGE_SIZE)
            await file.pwrite(b"file", 0)
            maps = await mm.maps()
        for how in (signal.SIGKILL, signal.SIGTERM):
            await server.again(how)
            async with mmubus.connect(server.address) as bus:
                again = bus.mm(mm.id)
                assert await again.maps() == maps
                assert await again.load(at, 4) == b"kept"
                assert await (await bus.open_file("named")).pread(4, 0) == b"file"
        await a_second_server_is_refused(server)
        async with mmubus.connect(server.address) as bus:
            await bus.mm(mm.id).mmap(0, PAGE_SIZE)  # it takes new work


async def a_second_server_is_refused(server: Server) -> None:
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, "--listen", f"{server.address}.other", "--state", str(server.state),
        "--frames-nr", "4096", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(other.communicate(), LIMIT_S)
    assert other.returncode == 1
    assert "is in use: process" in said.decode()


async def test_a_driver_goes_on_with_what_it_holds_and_what_it_wrote(tmp_path: Path) -> None:
    """What it wrote through the frames, and nobody has looked at, is in the old frames alone: it is carried over."""
    async with running(tmp_path) as server, mmubus.connect(server.address, name="driver") as bus:
        mm = await bus.create_mm("program")
        at = await mm.mmap(0, 4 * PAGE_SIZE)
        await mm.store(at, b"old")
        mirror = await bus.mirror(mm, ack_budget_s=BUDGET_S)
        await mirror.fault(at, at + 2 * PAGE_SIZE, write=True)
        near = await bus.mirror(mm, ack_budget_s=BUDGET_S, window=bus.frame_window(writable=True))
        await near.write(at, b"new")
        session, epoch, held = bus.session.id, bus.session.epoch, mirror.held
        await server.again()
        await until(lambda: bus.session.state == "lost")
        await until(lambda: bus.session.state == "live")
        assert (bus.session.id, bus.session.epoch, mirror.held) == (session, epoch, held)
        assert await near.read(at, 3) == await mirror.read(at, 3) == b"new"
        async with mmubus.connect(server.address) as other:
            program = other.mm(mm.id)
            assert await program.load(at, 3) == b"new"
            await program.store(at, b"too")
            assert await near.read(at, 3) == b"too"
            await program.munmap(at, PAGE_SIZE)  # returns when the driver has let go
        assert list(mirror.held) == [at + PAGE_SIZE]


class Slow(mmubus.Notifier):
    """Lets go when it is told to."""

    slips = frozenset({"age_page"})

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.go = asyncio.Event()

    async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
        self.asked.append(start)
        await self.go.wait()


async def test_a_round_that_waited_still_waits_and_its_frames_with_it(tmp_path: Path) -> None:
    async with running(tmp_path) as server, mmubus.connect(server.address, name="slow") as bus:
        mm = await bus.create_mm("program")
        at = await mm.mmap(0, 4 * PAGE_SIZE)
        await mm.store(at, b"taken")
        slow = Slow()
        registration = await bus.register(slow, mm, ack_budget_s=BUDGET_S)
        await registration.fault(at, at + PAGE_SIZE)
        async with mmubus.connect(server.address) as other:
            taking = asyncio.create_task(other.mm(mm.id).munmap(at, PAGE_SIZE))
            await until(lambda: slow.asked)
            assert (await bus.inspection.statistics()).frames_quarantined == 1
            await server.again()
            with pytest.raises(mmubus.ConnectionLost):
                await taking  # nobody knows whether it has happened; it has, but for its end
        await until(lambda: bus.session.state == "live")
        statistics = await bus.inspection.statistics()
        assert (statistics.rounds_open, statistics.frames_quarantined) == (1, 1)
        slow.go.set()
        await until_nothing_is_quarantined(bus)
        assert slow.asked == [at]  # it was not asked twice for one notice
        assert not (await bus.inspection.statistics()).rounds_open


async def test_who_does_not_come_back_is_fenced_and_only_then_its_frames_are_free(tmp_path: Path) -> None:
    async with running(tmp_path, "--grace-s", "1") as server:
        async with mmubus.connect(server.address, name="gone") as bus:
            mm = await bus.create_mm("program")
            at = await mm.mmap(0, 4 * PAGE_SIZE)
            await mm.store(at, b"taken")
            slow = Slow()
            registration = await bus.register(slow, mm, ack_budget_s=BUDGET_S)
            await registration.fault(at, at + PAGE_SIZE)
            async with mmubus.connect(server.address) as other:
                taking = asyncio.create_task(other.mm(mm.id).munmap(at, PAGE_SIZE))
                await until(lambda: slow.asked)
                await server.end(signal.SIGKILL)
                await asyncio.gather(taking, return_exceptions=True)
        await server.start()  # the driver has given up meanwhile
        async with mmubus.connect(server.address) as other:
            assert (await other.inspection.statistics()).frames_quarantined == 1
            await until_nothing_is_quarantined(other)
            assert (await other.inspection.statistics()).fenced == 1


async def test_killed_again_and_again_under_load_nothing_that_was_answered_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        async with mmubus.connect(server.address) as bus:
            mm = (await bus.create_mm("program")).id
            at = await bus.mm(mm).mmap(0, 64 * PAGE_SIZE)
        answered = 0
        for kill_after in (30, 77):
            answered = await work_until_it_is_killed(server, mm, at, answered, kill_after)
            await server.again()
            async with mmubus.connect(server.address) as bus:
                for number in range(max(1, answered - 31), answered + 1):
                    found = int.from_bytes(await bus.mm(mm).load(at + number % 32 * PAGE_SIZE, 4), "little")
                    assert found in (number, number + 32), f"page of store {number}: {found}"
        async with mmubus.connect(server.address) as bus, asyncio.timeout(LIMIT_S):
            await bus.mm(mm).store(at, b"more")
            while "checkpoint-00000000" in os.listdir(server.state):  # until another one takes its place
                await bus.mm(mm).store(at + PAGE_SIZE, b"and more" * 100)
        await server.again()
        async with mmubus.connect(server.address) as bus:
            assert await bus.mm(mm).load(at, 4) == b"more"


async def work_until_it_is_killed(server: Server, mm: int, at: int, answered: int, kill_after: int) -> int:
    """Returns: the number of the last store that was answered."""
    last = answered + kill_after
    async with mmubus.connect(server.address, name="driver", ack_budget_s=BUDGET_S) as bus:
        mirror = await bus.mirror(mm)
        program = bus.mm(mm)
        with suppress(mmubus.MmuBusError):
            while True:
                number = answered + 1
                page = at + number % 32 * PAGE_SIZE
                await program.store(page, number.to_bytes(4, "little"))
                answered = number
                await mirror.fault(page, page + PAGE_SIZE)
                if number == last:
                    assert server.process is not None
                    server.process.kill()
                await program.madvise(at + 40 * PAGE_SIZE, PAGE_SIZE, 4)
    return answered
