"""The examples run, by themselves and against a server that runs already."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from mmubusd.rpc import EmbeddedServer
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


@pytest.mark.parametrize("name", sorted(SAYS))
def test_with_a_server_of_its_own(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert "right: False" not in done.stdout
    assert "Warning" not in done.stderr


async def test_with_a_server_that_runs(server: EmbeddedServer) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "kvm.py"), "--server", server.address, stdout=-1
    )
    said, _ = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0
    assert SAYS["kvm"] in said.decode()
