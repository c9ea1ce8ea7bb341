"""Group commit around a loop: nothing leaves before it is kept, and a disk without room stops nobody for good."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import mmubus
import pytest
from mmubus import PAGE_SIZE
from mmubusd.rpc import EmbeddedServer
from mmubusd.state import Directory, Entry, Keeper

LIMIT_S = 30  # the longest budget, too


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - another thread does it
            await asyncio.sleep(0.01)


class Disk:
    """Stands between a server's keeper and its files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.go.set()
        self.full = False
        self.commits: list[int] = []
        append = Keeper.append

        def held(keeper: Keeper, entries: list[Entry]) -> None:
            assert self.go.wait(LIMIT_S)
            if self.full:
                raise OSError(errno.ENOSPC, "no room")
            append(keeper, entries)
            self.commits.append(len(entries))

        monkeypatch.setattr(Keeper, "append", held)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_no_answer_and_no_notice_leaves_before_it_is_kept(disk: Disk, tmp_path: Path) -> None:
    async with (
        EmbeddedServer(state=tmp_path / "state", frames_nr=256) as server,
        mmubus.connect(server.address) as bus,
        mmubus.connect(server.address) as other,
    ):
        mm = await other.create_mm("program")
        at = await mm.mmap(0, PAGE_SIZE)
        mirror = await bus.mirror(mm, ack_budget_s=LIMIT_S)
        await mirror.fault(at, at + PAGE_SIZE)
        disk.go.clear()
        asked = asyncio.create_task(mm.munmap(at, PAGE_SIZE))
        await until(lambda: bool(server.server.bus.rounds.open))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not asked.done()
        assert mirror.held, "the notice is on its way, and the disk has not been asked yet"
        disk.go.set()
        await asyncio.wait_for(asked, LIMIT_S)
        assert not mirror.held


async def test_what_comes_while_the_disk_is_busy_is_kept_together(disk: Disk, tmp_path: Path) -> None:
    async with EmbeddedServer(state=tmp_path / "state", frames_nr=256) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("program")
        disk.go.clear()
        asked = [asyncio.create_task(mm.mmap(0, PAGE_SIZE)) for _ in range(20)]
        await until(lambda: len(mm_of(server).mappings()) == 1 and server.server.bus.counters.operations >= 20)
        disk.go.set()
        await asyncio.gather(*asked)
        assert max(disk.commits) >= 15


def mm_of(server: EmbeddedServer) -> object:
    (mm,) = server.server.memory.mms.values()
    return mm


async def test_a_full_disk_refuses_and_the_server_goes_on_when_there_is_room(disk: Disk, tmp_path: Path) -> None:
    async with EmbeddedServer(state=tmp_path / "state", frames_nr=256) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("program")
        at = await mm.mmap(0, PAGE_SIZE)
        await mm.store(at, b"before")
        mirror = await bus.mirror(mm, ack_budget_s=LIMIT_S)
        await mirror.fault(at, at + PAGE_SIZE)
        disk.full = True
        with pytest.raises(mmubus.MmuBusError, match="is not kept yet"):
            await mm.store(at, b"during")
        with pytest.raises(mmubus.MmError) as refused:
            await mm.store(at, b"never")
        assert refused.value.errno_name == "ENOSPC"
        commits = server.server.machine.commits
        assert commits is not None
        await asyncio.sleep(0)
        disk.full = False
        await until(lambda: not commits.full)
        assert await mm.load(at, 6) == b"during"
        await mm.munmap(at, PAGE_SIZE)
        assert not mirror.held
    async with EmbeddedServer(state=tmp_path / "state", frames_nr=256) as server, mmubus.connect(server.address) as bus:
        assert await bus.mm(mm.id).maps() == []


async def test_a_disk_that_fails_stops_the_server(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(keeper: Keeper, entries: list[Entry]) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    async def run() -> None:
        async with (
            EmbeddedServer(state=tmp_path / "state", frames_nr=256) as server,
            mmubus.connect(server.address) as bus,
        ):
            monkeypatch.setattr(Keeper, "append", broken)
            asked = asyncio.create_task(bus.create_mm("program"))
            await asyncio.wait_for(server.server.alarm.broken, LIMIT_S)
            asked.cancel()

    with pytest.raises(OSError, match="the disk is broken"):
        await run()


async def test_a_server_that_is_never_quiet_gets_its_checkpoints(tmp_path: Path) -> None:
    """Operations overlap without end, until new ones wait for a moment."""
    state = tmp_path / "state"
    settings = {"state": state, "frames_nr": 256, "checkpoint_bytes": 4096}
    async with EmbeddedServer(**settings) as server, mmubus.connect(server.address) as bus:
        mm = await bus.create_mm("program")
        at = await mm.mmap(0, 16 * PAGE_SIZE)
        core = server.server.machine.core

        class Slow(mmubus.Notifier):
            slips = ("age_page", "invalidate_page")

            async def invalidate_range(self, mm: int, start: int, end: int, lock: bool) -> None:
                await until(lambda: len(core.running) > 1 or paused())

        def paused() -> bool:
            commits = server.server.machine.commits
            return commits is not None and (commits.pause is not None or stop.is_set())

        stop = asyncio.Event()
        await bus.register(Slow(), mm, ack_budget_s=LIMIT_S)

        async def work(page: int) -> None:
            while not stop.is_set():
                await mm.store(at + page * PAGE_SIZE, b"x" * 500)
                await mm.madvise(at + page * PAGE_SIZE, PAGE_SIZE, 4)

        working = [asyncio.create_task(work(page)) for page in range(4)]
        await until(lambda: "checkpoint-00000000" not in [path.name for path in state.iterdir()])
        stop.set()
        await asyncio.gather(*working)


async def test_without_file_descriptors_the_journal_goes_on_in_the_same_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections of strangers can take them all; found by 200 of them, which stopped the server."""
    crowded, refused = True, 0
    create = Directory.create

    def created(self: Directory, name: str) -> object:
        nonlocal refused
        if crowded:
            refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return create(self, name)

    async with (
        EmbeddedServer(state=tmp_path / "state", frames_nr=256, checkpoint_bytes=4096) as server,
        mmubus.connect(server.address) as bus,
    ):
        commits = server.server.machine.commits
        assert commits is not None
        monkeypatch.setattr(Directory, "create", created)
        while refused < 3:
            await bus.create_mm("program")
        assert commits._keeper.segment == 0
        crowded = False
        async with asyncio.timeout(LIMIT_S):
            while commits._keeper.segment == 0:
                await bus.create_mm("program")
        made = len(server.server.memory.mms)
    async with EmbeddedServer(state=tmp_path / "state", frames_nr=256) as server:
        assert len(server.server.memory.mms) == made
