"""Recording a program: which way is open on this machine, and doing it.

kvm      tracefs and /dev/kvm, usually root: calls, page faults, and every notification that the kernel makes
strace   strace: the calls alone
both     a C compiler, for the small library that writes down what exists at the start
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mmubus.trace.format import write_trace
from mmubus.trace.record.kernel import record_with_kernel
from mmubus.trace.record.strace import record_with_strace
from mmubus.trace.record.tracefs import tracefs_root

__all__ = ["Means", "RecordError", "Recording", "means", "record"]

PAGE_SIZE = 4096


class RecordError(Exception):
    """Nothing could be recorded; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Means:
    """What this machine offers. missing: for each way, what it lacks, one clause each; empty: it can be used."""

    kvm: tuple[str, ...]
    strace: tuple[str, ...]

    def best(self, how: str) -> str:
        """The way to record: the one that was asked for, or the best one there is.

        Raises: RecordError, saying what is missing.
        """
        lacking = {"kvm": self.kvm, "strace": self.strace}
        if how in lacking:
            if lacking[how]:
                raise RecordError(f"cannot record with {how}: {'; '.join(lacking[how])}")
            return how
        if not self.kvm:
            return "kvm"
        if not self.strace:
            return "strace"
        raise RecordError(f"cannot record: for kvm, {'; '.join(self.kvm)}; for strace, {'; '.join(self.strace)}")


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded. lost: events that did not fit the kernel's buffer."""

    how: str
    status: int
    operations: int
    notifications: int
    processes: int
    lost: int = 0


def means() -> Means:
    """Look at what this machine offers."""
    both = []
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        both.append(f"this is {sys.platform} on {platform.machine()}, recordings are of Linux on x86-64")
    if _compiler() is None:
        both.append("there is no C compiler (cc, gcc or clang)")
    kvm = list(both)
    if tracefs_root() is None:
        kvm.append("tracefs cannot be used (it must be mounted, and root may write to it)")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        kvm.append("/dev/kvm is not there or may not be opened")
    strace = list(both)
    if shutil.which("strace") is None:
        strace.append("strace is not installed")
    return Means(tuple(kvm), tuple(strace))


def record(command: Sequence[str], out: Path, how: str = "auto", *, thp: bool = False) -> Recording:
    """Run a command and record it.

    Args: out: the recording's file; how: kvm, strace or auto; thp: leave transparent huge pages on.
    Raises: RecordError; OSError when out cannot be written.
    """
    how = means().best(how)
    if shutil.which(command[0]) is None:
        raise RecordError(f"there is no program {command[0]!r}")
    with tempfile.TemporaryDirectory(prefix="mmubus-record-") as directory, _library(Path(directory)) as library:
        snapshots = Path(directory, "snapshots")
        snapshots.mkdir()
        lost = 0
        if how == "kvm":
            root = tracefs_root()
            assert root is not None, "means() has looked"
            status, operations, lost = record_with_kernel(command, root, library, snapshots, os.environ, thp=thp)
        else:
            status, operations = record_with_strace(command, library, snapshots, os.environ)
    if not any(operation["op"] == "process" for operation in operations):
        raise RecordError(f"{command[0]} was not seen to start: a program without a dynamic loader cannot be recorded")
    write_trace(out, _header(command, how, thp), operations)
    return Recording(
        how,
        status,
        len(operations),
        sum(len(operation["notify"]) for operation in operations),
        len({operation["pid"] for operation in operations}),
        lost,
    )


def _header(command: Sequence[str], how: str, thp: bool) -> Mapping[str, Any]:
    header: dict[str, Any] = {
        "source": "program",
        "kernel": platform.release().split("-")[0],
        "page_size": PAGE_SIZE,
        "thp": thp,
        "environment": {"cpus": os.cpu_count(), "swap": _has_swap()},
        "command": list(command),
    }
    if how != "kvm":
        header["recorder"] = how
    return header


def _has_swap() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


@contextmanager
def _library(directory: Path) -> Iterator[Path]:
    """attach.c, built. Raises: RecordError."""
    target = directory / "attach.so"
    compiler = _compiler()
    assert compiler is not None, "means() has looked"
    with as_file(files("mmubus.trace.record") / "attach.c") as source:
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(source)]
        built = subprocess.run(command, check=False, capture_output=True, text=True)
    if built.returncode:
        raise RecordError(f"{compiler} could not build the library: {built.stderr.strip().splitlines()[-1]}")
    yield target
