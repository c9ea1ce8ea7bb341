"""What a result was measured on: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["machine", "own_bytes"]

PACKAGES = ("grpcio", "protobuf", "numpy", "uvloop", "nats-py", "redis", "hiredis", "pyzmq")
PROGRAMS = {"nats-server": "--version", "redis-server": "--version"}


def machine() -> dict[str, str]:
    """Processor, memory, kernel, load and versions, by name."""
    found = {
        "processor": f"{_line('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores usable",
        "memory": f"{int(_line('/proc/meminfo', 'MemTotal').split()[0]) >> 20} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load when it began": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    for program, flag in PROGRAMS.items():
        found[program] = _version(program, flag)
    return found


def own_bytes() -> int:
    """Bytes of memory that are this process's own: not shared memory, not code."""
    return int(_line("/proc/self/status", "RssAnon").split()[0]) * 1024


def _line(path: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    return match[1] if match else "0"


def _version(program: str, flag: str) -> str:
    if shutil.which(program) is None:
        return "not installed"
    said = subprocess.run([program, flag], capture_output=True, text=True, check=False)
    match = re.search(r"\d+\.\d+[.\d]*", said.stdout + said.stderr)
    return match[0] if match else "unknown"
