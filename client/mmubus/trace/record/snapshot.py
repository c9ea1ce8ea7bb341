"""What existed when a process was attached: the file that attach.c writes, as the recording has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["read_snapshot"]

KEPT = frozenset({"hg", "nh", "dc", "wf", "rr", "sr", "mg", "lo", "gd"})
"""Flags that a program has chosen, and that decide what the kernel does: huge pages or none, not for children, ..."""


def read_snapshot(path: Path) -> list[list[Any]]:
    """Mappings as [start, end, protection, offset, file, name, resident, flags]; see docs/trace-format.md.

    The file has the lines of /proc/PID/maps, each followed by "P first end kind" for its runs of present pages, and
    "F", with the flags that smaps shows.
    """
    found: list[list[Any]] = []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("P "):
            _, first, last, kind = line.split()
            found[-1][6].append([int(first), int(last), kind])
            continue
        if line.startswith("F "):
            found[-1].append([flag for flag in line.split()[1:] if flag in KEPT])
            continue
        span, protection, offset, device, inode, *rest = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        file = None if inode == "0" else f"{device}:{inode}"
        name = rest[0].strip() if rest and file is None else ""
        found.append([start, end, protection, int(offset, 16) if file else None, file, name, []])
    return found
