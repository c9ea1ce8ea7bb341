"""How long operations take when clients misbehave, in real processes.

python tests/robust/measure_processes.py            every kind: the median end, against budget + 50 ms
python tests/robust/measure_processes.py --ratio    p99 of unrelated rounds with 10 of 100 clients frozen
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
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
    """From here on it does not answer."""
    if kind == "stopped":
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
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


async def ratio(blocks: int = 12, block_s: float = 2.0, groups: int = 9) -> tuple[float, float]:
    """p99 of rounds of 90 clients, while 10 others are well and while they are frozen with rounds that wait for them.

    Both in turns, so that whatever else the machine does falls on both. Returns: the two, in seconds.
    """
    with tempfile.TemporaryDirectory() as directory, server(f"unix:{directory}/s", "--ack-budget-max-s", "3600"):
        address = f"unix:{directory}/s"
        cpu = Cpu(address)
        frozen = [await cpu.space(256) for _ in range(10)]
        unrelated = [await cpu.space(1 << 16) for _ in range(groups)]
        with (
            clients(address, "good", frozen, budget_s=600.0) as victims,
            clients(address, "good", [mm for mm in unrelated for _ in range(10)], budget_s=600.0),
        ):
            samples: tuple[list[float], list[float]] = ([], [])
            for block in range(blocks):
                freeze = block % 2
                waiting: list[asyncio.Task[float]] = []
                if freeze:
                    misbehave("stopped", victims)
                    waiting = [asyncio.create_task(cpu.unmap(mm)) for mm in frozen]
                until = time.perf_counter() + block_s
                while time.perf_counter() < until:
                    for mm in unrelated:
                        samples[freeze].append(await cpu.unmap(mm))
                if freeze:
                    victims.send_signal(signal.SIGCONT)
                    await asyncio.gather(*waiting)
        await cpu.close()
    return quantile(samples[0], 0.99), quantile(samples[1], 0.99)


def quantile(values: list[float], fraction: float) -> float:
    return sorted(values)[int(len(values) * fraction)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ratio", action="store_true")
    parser.add_argument("--blocks", type=int, default=20)
    given = parser.parse_args()
    if given.ratio:
        well, frozen = asyncio.run(ratio(given.blocks))
        print(
            f"p99 of unrelated rounds: {well * 1e3:.2f} ms, "
            f"with 10 of 100 frozen {frozen * 1e3:.2f} ms: {frozen / well:.3f}"
        )
        return int(frozen / well >= 1.10)
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
