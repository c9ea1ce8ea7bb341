"""A tracing instance of our own in the kernel's tracefs, so that nobody else's tracing is disturbed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TraceFs", "tracefs_root"]

ROOTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
BUFFER_KIB = 262_144


def tracefs_root() -> Path | None:
    """Where tracefs is mounted, mounting it if that is possible; None when it cannot be had."""
    for root in ROOTS:
        if os.access(root / "instances", os.W_OK):
            return root
    if os.geteuid() == 0 and ROOTS[0].is_dir():
        subprocess.run(["mount", "-t", "tracefs", "none", str(ROOTS[0])], check=False, capture_output=True)
        if os.access(ROOTS[0] / "instances", os.W_OK):
            return ROOTS[0]
    return None


class TraceFs:
    """An instance directory; made by `TraceFs.instance`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    @contextmanager
    def instance(cls, root: Path) -> Iterator[TraceFs]:
        """Make an instance with its events off; it is removed at the end. Raises: OSError."""
        directory = root / "instances" / f"mmubus-{os.getpid()}"
        directory.mkdir()
        trace = cls(directory)
        try:
            trace.write("tracing_on", "0")
            trace.write("buffer_size_kb", str(BUFFER_KIB))
            trace.write("trace_clock", "global")
            for option in ("event-fork", "nohash-ptr", "record-tgid"):
                trace.write("trace_options", option)
            yield trace
        finally:
            trace.write("tracing_on", "0")
            trace.write("events/enable", "0")
            directory.rmdir()

    @property
    def marker(self) -> Path:
        """The file through which a process leaves a mark in the trace."""
        return self.directory / "trace_marker"

    def write(self, name: str, value: str) -> None:
        """Write a control file. Raises: OSError."""
        (self.directory / name).write_text(value)

    def enable(self, event: str) -> bool:
        """Switch an event on. Returns: False when this kernel has no such event."""
        switch = self.directory / "events" / event / "enable"
        if not switch.exists():
            return False
        switch.write_text("1")
        return True

    def lines(self) -> Iterator[str]:
        """What was traced, in time order, without the comments."""
        with (self.directory / "trace").open(errors="replace") as trace:
            yield from (line for line in trace if not line.startswith("#"))

    def lost(self) -> int:
        """Events that did not fit the buffer."""
        return sum(_lost(stats.read_text()) for stats in self.directory.glob("per_cpu/*/stats"))


def _lost(stats: str) -> int:
    numbers: Iterable[str] = re.findall(r"^(?:overrun|dropped events): (\d+)", stats, re.MULTILINE)
    return sum(map(int, numbers))
