"""Several hosts on one machine: network namespaces, each with an address of its own, joined by a bridge in one more.

    [server 10.77.0.1]   [application 10.77.0.2]   [hmm 10.77.0.3]   [rdma 10.77.0.4]
           │                      │                      │                  │
           └──────────────────── [switch: bridge] ───────┴──────────────────┘

Nothing of the machine's own network is touched. Needs root, iproute2 and nftables.
"""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
PORT = 50551
PROXY_PORT = 50552
PREFIX = "mmubus"
ORDER_S = 60.0
SERVER = (sys.executable, "-c", "import sys; from mmubusd.rpc import main; sys.exit(main())")


def run(*command: str, text: str | None = None) -> str:
    """Run a command of the system's. Raises: AssertionError with what it said."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


def why_not() -> str:
    """Why this machine can't make such hosts; "" when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package {package})"
    sweep()
    name = f"{PREFIX}-{os.getpid()}-trial"
    try:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "bridge", "type", "bridge")
        run("ip", "netns", "exec", name, "nft", "add table inet faults")
    except AssertionError as error:
        return f"this kernel or container does not allow it: {error}"
    finally:
        subprocess.run(("ip", "netns", "del", name), capture_output=True, check=False)
    return ""


def sweep() -> None:
    """Remove what a test run that was killed has left."""
    for line in run("ip", "netns", "list").splitlines():
        found = re.match(rf"({PREFIX}-(\d+)-\S+)", line)
        if found and not Path("/proc", found[2]).exists():
            run("ip", "netns", "del", found[1])


class Host:
    """One namespace with one interface."""

    def __init__(self, network: str, name: str, number: int) -> None:
        self.name = name
        self.namespace = f"{network}-{name}"
        self.address = f"10.77.0.{number}"
        self._switch = f"{network}-switch"
        self._port = f"port{number}"
        run("ip", "netns", "add", self.namespace)
        peer = ("peer", "name", "eth0", "netns", self.namespace)
        run("ip", "-n", self._switch, "link", "add", self._port, "type", "veth", *peer)
        run("ip", "-n", self._switch, "link", "set", self._port, "master", "bridge", "up")
        run("ip", "-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", self.namespace, "link", "set", device, "up")
        self.nft("add table inet faults")
        self.nft("add chain inet faults out { type filter hook output priority 0; }")
        self.nft("add chain inet faults in { type filter hook input priority 0; }")

    def nft(self, rule: str) -> None:
        """Change the rules of this host."""
        run("ip", "netns", "exec", self.namespace, "nft", rule)

    def lose(self, percent: int) -> None:
        """Of the packets that leave by the network, lose so many."""
        self.nft(f"add rule inet faults out oifname eth0 numgen random mod 100 < {percent} counter drop")

    def lost(self) -> int:
        """Packets that the rules have dropped."""
        rules = run("ip", "netns", "exec", self.namespace, "nft", "list", "table", "inet", "faults")
        return sum(map(int, re.findall(r"counter packets (\d+)", rules)))

    def cut(self, how: str) -> None:
        """Partition: "link down", "both ways" or "one way" (this host is not heard, but hears)."""
        if how == "link down":
            run("ip", "-n", self._switch, "link", "set", self._port, "down")
            return
        self.nft("add rule inet faults out oifname eth0 counter drop")
        if how == "both ways":
            self.nft("add rule inet faults in iifname eth0 counter drop")

    def heal(self) -> None:
        """Undo every fault."""
        run("ip", "-n", self._switch, "link", "set", self._port, "up")
        for chain in ("in", "out"):
            self.nft(f"flush chain inet faults {chain}")


class Process:
    """A process on a host; its standard output is read as it comes."""

    def __init__(self, host: Host, command: tuple[str, ...], environment: Mapping[str, str], log: Path) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MMUBUS_")}
        self._log = log.open("w")
        self.process = subprocess.Popen(
            ("ip", "netns", "exec", host.namespace, *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**clean, **environment},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def close(self) -> None:
        """End it; a process that doesn't want to is killed."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reading.join(5)
        for stream in (self.process.stdin, self.process.stdout, self._log):
            if stream is not None:
                stream.close()


class Member(Process):
    """A member.py on a host."""

    def __init__(self, host: Host, address: str, environment: Mapping[str, str], log: Path) -> None:
        super().__init__(host, (sys.executable, str(HERE / "member.py"), address, host.name), environment, log)
        self.host = host
        self._answers: dict[int, dict[str, Any]] = {}
        self._orders = 0

    def begin(self, do: str, **arguments: object) -> int:
        """Give an order without waiting. Returns: its number, for `end`."""
        self._orders += 1
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": self._orders, "do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._orders

    def outcome(self, number: int, within_s: float = ORDER_S) -> dict[str, Any]:
        """The answer to an order: {"result": ...} or {"error": ...}. Raises: queue.Empty when there is none in time."""
        until = time.monotonic() + within_s
        while number not in self._answers:
            answer = json.loads(self.lines.get(timeout=max(0.01, until - time.monotonic())))
            self._answers[answer.pop("id")] = answer
        return self._answers.pop(number)

    def end(self, number: int, within_s: float = ORDER_S) -> Any:
        """The result of an order. Raises: AssertionError when it failed."""
        outcome = self.outcome(number, within_s)
        assert "error" not in outcome, outcome["error"]
        return outcome["result"]

    def ask(self, do: str, **arguments: object) -> Any:
        """Give an order and wait for its result."""
        return self.end(self.begin(do, **arguments))


class Network:
    """The hosts and what runs on them; a context manager, which always removes everything."""

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        self._directory = directory
        self._name = f"{PREFIX}-{os.getpid()}"
        self._names = names
        self._processes: list[Process] = []
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> "Network":
        try:
            switch = f"{self._name}-switch"
            run("ip", "netns", "add", switch)
            run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", switch, "link", "set", "bridge", "up")
            for number, name in enumerate(self._names, 1):
                self.hosts[name] = Host(self._name, name, number)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.close()
        self._remove()

    def _remove(self) -> None:
        for name in (*self._names, "switch"):
            subprocess.run(("ip", "netns", "del", f"{self._name}-{name}"), capture_output=True, check=False)

    def _start(self, process: Process) -> None:
        self._processes.append(process)

    def serve(self, *options: str, environment: Mapping[str, str]) -> None:
        """Start the server on its host; it listens when this returns."""
        host = self.hosts["server"]
        listen = f"{host.address}:{PORT}"
        command = (*SERVER, "--listen", listen, *options)
        process = Process(host, command, environment, self._directory / "server.log")
        self._start(process)
        assert process.lines.get(timeout=60) == f"listening on {listen}\n"

    def join(self, name: str, environment: Mapping[str, str], delay_s: float = 0.0) -> Member:
        """Start a member on its host. Args: delay_s: each way, by a proxy on the same host; half of it is jitter."""
        host = self.hosts[name]
        address = f"{self.hosts['server'].address}:{PORT}"
        if delay_s:
            where = (str(PROXY_PORT), self.hosts["server"].address, str(PORT), str(delay_s), str(delay_s / 2))
            proxy = Process(host, (sys.executable, str(HERE / "proxy.py"), *where), {}, self._directory / "proxy.log")
            self._start(proxy)
            assert proxy.lines.get(timeout=60) == "ready\n"
            address = f"127.0.0.1:{PROXY_PORT}"
        member = Member(host, address, environment, self._directory / f"{name}.log")
        self._start(member)
        return member
