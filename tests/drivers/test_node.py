"""The driver in JavaScript: registered, notified, acknowledging, by an independent implementation of gRPC."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mmubus
import pytest
from mmubus import MADV_DONTNEED, PAGE_SIZE
from mmubusd.rpc import EmbeddedServer
from source_tree import ROOT

SOURCE = ROOT / "client" / "examples" / "node"
INSTALL_S = 90
ANSWER_S = 60
LINE_BYTES_MAX = 1 << 20
KIT_S = 240
ENVIRONMENT = {**os.environ, "MMUBUS_PROTO": str(ROOT / "proto")}
START = "import sys; from mmubus.cli import main; sys.exit(main())"

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its modules, in a directory of its own."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node here")
    where = tmp_path_factory.mktemp("node")
    for name in ("driver.js", "session.js", "package.json", "package-lock.json"):
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
    """The process, which is asked as the conformance kit asks."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._last = 0

    async def ask(self, what: str, **fields: object) -> dict[str, Any]:
        """One question at a time, and its answer."""
        self._last += 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"n": self._last, "do": what, **fields}).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)
        said: dict[str, Any] = json.loads(line)
        assert said["n"] == self._last
        return said

    async def read(self, address: int, length: int) -> bytes:
        return bytes.fromhex((await self.ask("read", address=address, length=length))["data"])

    async def write(self, address: int, data: bytes) -> None:
        assert "error" not in await self.ask("write", address=address, data=data.hex())

    async def held(self) -> int:
        return int((await self.ask("held"))["held"])


@pytest.fixture
async def node(installed: Path, server: EmbeddedServer, mm: mmubus.AddressSpace, at: int) -> AsyncIterator[Node]:
    process = await asyncio.create_subprocess_exec(
        "node", "driver.js", cwd=installed, env=ENVIRONMENT, stdin=-1, stdout=-1, limit=LINE_BYTES_MAX
    )  # fmt: skip
    driver = Node(process)
    try:
        assert "error" not in await driver.ask("attach", address=server.address, mm=mm.id, name="node-driver", chaos="")
        await driver.read(at, 16 * PAGE_SIZE)
        yield driver
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_dma_in_both_directions(node: Node, mm: mmubus.AddressSpace, at: int) -> None:
    assert await node.held() == 16
    await mm.store(at + PAGE_SIZE - 3, b"program")
    assert await node.read(at + PAGE_SIZE - 3, 7) == b"program"
    await node.write(at + 2 * PAGE_SIZE - 2, b"javascript")
    assert await mm.load(at + 2 * PAGE_SIZE - 2, 10) == b"javascript"


async def test_it_lets_go_and_faults_again(node: Node, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    await node.write(at, b"old")
    held = await node.held()
    await mm.madvise(at, 4 * PAGE_SIZE, MADV_DONTNEED)
    assert await node.held() == held - 4
    assert await node.read(at, 3) == bytes(3)
    child = await mm.fork()
    await node.write(at, b"mine")
    assert await child.load(at, 4) == bytes(4)
    await mm.munmap(at, 16 * PAGE_SIZE)
    assert await node.held() == 0
    assert "nothing is mapped" in (await node.ask("read", address=at, length=1))["error"]
    seen = {session.name: session for session in await bus.inspection.sessions()}["node-driver"]
    assert (seen.waiting, seen.state) == (0, "live")
    assert seen.notices == seen.acknowledged > 2


async def test_it_leaves(node: Node, bus: mmubus.Bus, mm: mmubus.AddressSpace, at: int) -> None:
    await node.ask("leave")
    await asyncio.wait_for(mm.munmap(at, 16 * PAGE_SIZE), ANSWER_S)
    assert (await bus.inspection.statistics()).fenced == 0
    assert await asyncio.wait_for(node.process.wait(), ANSWER_S) == 0


def test_it_survives_the_conformance_kit(installed: Path) -> None:
    command = [sys.executable, "-c", START, "conform", "--command", f"node {installed / 'driver.js'}", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=KIT_S, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 scenarios, 0 broken" in done.stdout
