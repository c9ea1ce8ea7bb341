"""The driver in JavaScript: registered, notified, acknowledging, by an independent implementation of gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mmubus
import pytest
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubusd.rpc.server import EmbeddedServer
from source_tree import ROOT

SOURCE = ROOT / "client" / "examples" / "node"
INSTALL_S = 90

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its modules, in a directory of its own."""
    import subprocess

    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node here")
    where = tmp_path_factory.mktemp("node")
    for name in ("driver.js", "package.json", "package-lock.json"):
        shutil.copy(SOURCE / name, where)
    try:
        command = ["npm", "ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm could not install the modules within {INSTALL_S} s")
    if done.returncode:
        pytest.skip(f"npm could not install the modules: {done.stderr.strip()[:200]}")
    return where


class Node:
    """The process: commands in, JSON lines out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def hear(self, what: str) -> dict[str, Any]:
        """The next line of that kind; others are passed over."""
        assert self.process.stdout is not None
        while line := await asyncio.wait_for(self.process.stdout.readline(), 20):
            said: dict[str, Any] = json.loads(line)
            if said["what"] == what:
                return said
        raise AssertionError(f"the driver ended without saying {what!r}")

    async def ask(self, command: str, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        return await self.hear(what)


@pytest.fixture
async def node(installed: Path, server: EmbeddedServer, mm: mmubus.AddressSpace, at: int) -> AsyncIterator[Node]:
    environment = {**os.environ, "MMUBUS_PROTO": str(ROOT / "proto")}
    process = await asyncio.create_subprocess_exec(
        "node", "driver.js", server.address, str(mm.id), str(at), "16",
        cwd=installed, env=environment, stdin=-1, stdout=-1,
    )  # fmt: skip
    driver = Node(process)
    try:
        assert (await driver.hear("ready"))["held"] == 16
        yield driver
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_dma_in_both_directions(node: Node, mm: mmubus.AddressSpace, at: int) -> None:
    await mm.store(at + PAGE_SIZE - 3, b"program")
    assert (await node.ask(f"read {at + PAGE_SIZE - 3} 7", "read"))["data"] == "program"
    await node.ask(f"write {at + 2 * PAGE_SIZE - 2} javascript", "written")
    assert await mm.load(at + 2 * PAGE_SIZE - 2, 10) == b"javascript"


async def test_it_lets_go_and_faults_again(node: Node, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    await node.ask(f"write {at} old", "written")
    held = (await node.ask("held -", "held"))["held"]
    await mm.madvise(at, 4 * PAGE_SIZE, MADV_DONTNEED)
    assert (await node.ask("held -", "held"))["held"] == held - 4
    assert (await node.ask(f"read {at} 3", "read"))["data"] == "\0\0\0"
    child = await mm.fork()
    await node.ask(f"write {at} mine", "written")
    assert await child.load(at, 4) == bytes(4)
    await mm.munmap(at, 16 * PAGE_SIZE)
    assert (await node.ask("held -", "held"))["held"] == 0
    assert "nothing is mapped" in (await node.ask(f"read {at} 1", "error"))["message"]
    seen = {session.name: session for session in await bus.inspection.sessions()}["node-driver"]
    assert (seen.waiting, seen.state) == (0, "live")
    assert seen.notices == seen.acknowledged > 2


async def test_it_survives_a_program_that_takes_its_memory_away_all_the_time(
    node: Node, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int
) -> None:
    running = True

    async def churn() -> None:
        while running:
            await mm.madvise(at, 8 * PAGE_SIZE, MADV_DONTNEED)
            await mm.store(at, b"program")

    churning = asyncio.create_task(churn())
    for _ in range(100):
        assert (await node.ask(f"read {at} 7", "read"))["data"] in ("program", "\0" * 7)
    running = False
    await churning
    statistics = await bus.inspection.statistics()
    assert (statistics.fenced, statistics.freed_before_ack, statistics.rounds_open) == (0, 0, 0)


async def test_it_leaves(node: Node, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    assert node.process.stdin is not None
    node.process.stdin.write(b"leave\n")
    await node.hear("left")
    await asyncio.wait_for(mm.munmap(at, 16 * PAGE_SIZE), 1)
    assert (await bus.inspection.statistics()).fenced == 0
