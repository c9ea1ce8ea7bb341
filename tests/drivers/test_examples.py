"""The examples run, by themselves and against a server that runs already."""

from __future__ import annotations

import asyncio
import sys

import pytest
from mmubusd.rpc.server import EmbeddedServer
from source_tree import ROOT

EXAMPLES = ROOT / "client" / "examples"
SAYS = {
    "gru": "one notifier for both users: True",
    "hmm": "WRITE: EPERM",
    "kvm": "the fork still has b'guest data'",
    "rdma": "far: received 'done'",
    "sva": "after exit: EFAULT",
    "vfio_user": "20 times one page of 64 was taken away",
    "xpmem": "importer2 holds 0 pages now",
}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def run(name: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, stdout=-1, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()
    assert b"Warning" not in said
    return said.decode()


@pytest.mark.parametrize("name", sorted(SAYS))
async def test_with_a_server_that_runs(server: EmbeddedServer, name: str) -> None:
    said = await run(name, "--server", server.address)
    assert SAYS[name] in said
    assert "right: False" not in said


async def test_with_a_server_of_its_own() -> None:
    assert SAYS["kvm"] in await run("kvm")
