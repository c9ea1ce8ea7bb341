"""How long operations take when clients misbehave, in real processes: the median, against the budget + 50 ms.

    python tests/robust/measure_processes.py

`measure_isolation.py` measures what others notice of it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import Cpu, clients, server

KINDS = ("stopped", "killed", "deaf", "mute", "partition")
ALLOWANCE_S = 0.05
NAMESPACE, VETH, PEER = "mmubus-robust", "mmurob0", "mmurob1"
SERVER_IP, CLIENT_IP = "10.213.7.1", "10.213.7.2"


def can_partition() -> bool:
    """Whether this machine lets us make a network namespace."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", NAMESPACE], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)
    return made


@contextmanager
def namespace() -> Iterator[None]:
    """A network namespace that reaches us over one pair of devices."""
    commands = (
        f"ip netns add {NAMESPACE}",
        f"ip link add {VETH} type veth peer name {PEER}",
        f"ip link set {PEER} netns {NAMESPACE}",
        f"ip addr add {SERVER_IP}/30 dev {VETH}",
        f"ip link set {VETH} up",
        f"ip -n {NAMESPACE} addr add {CLIENT_IP}/30 dev {PEER}",
        f"ip -n {NAMESPACE} link set {PEER} up",
    )
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["ip", "link", "del", VETH], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)


def misbehave(kind: str, process: subprocess.Popen[str]) -> None:
    """From here on it does not answer; "continued": it does again."""
    if kind == "stopped":
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    elif kind == "continued":
        process.send_signal(signal.SIGCONT)
    elif kind == "killed":
        process.send_signal(signal.SIGKILL)
    elif kind == "partition":
        subprocess.run(["ip", "link", "set", VETH, "down"], check=True)


async def ends(kind: str, count: int = 5, budget_s: float = 0.4) -> list[float]:
    """How long unmaps take that must wait for clients of one kind; the limit is budget_s + ALLOWANCE_S."""
    cut = kind == "partition"
    with tempfile.TemporaryDirectory() as directory, namespace() if cut else nullcontext():
        address = f"{SERVER_IP}:50991" if cut else f"unix:{directory}/s"
        options = ("--insecure-public",) if cut else ()
        before = ("ip", "netns", "exec", NAMESPACE) if cut else ()
        with server(address, *options):
            cpu = Cpu(address)
            mms = [await cpu.space(16) for _ in range(count)]
            with clients(
                address, kind if kind in ("deaf", "mute") else "good", mms, budget_s=budget_s, before=before
            ) as one:
                if kind not in ("deaf", "mute"):
                    await asyncio.gather(*(cpu.unmap(mm) for mm in mms))
                misbehave(kind, one)
                taken = list(await asyncio.gather(*(cpu.unmap(mm) for mm in mms)))
            await cpu.close()
    return taken


def main() -> int:
    failed = 0
    for kind in KINDS:
        if kind == "partition" and not can_partition():
            print("partition: not measured; it needs root and iproute2")
            continue
        taken = asyncio.run(ends(kind))
        median = statistics.median(taken)
        failed += median > 0.4 + ALLOWANCE_S
        print(f"{kind:<10} median {median * 1e3:6.1f} ms, longest {max(taken) * 1e3:6.1f} ms; the budget is 400 ms")
    return failed


if __name__ == "__main__":
    sys.exit(main())
